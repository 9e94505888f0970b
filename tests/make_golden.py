"""Writes tests/data/golden/: tiny random Llama models, and what transformers computes with them.

    NAME.bin       the model, through export_weights.py; its weights are fp16
    NAME.npz       plain, rounded [rows][V]: logits in fp32, without and with K and V rounded to
                   fp16
    golden.json    per model: the input's ids; which of its rows NAME.npz holds; greedy
                   continuations of its beginnings, with K and V rounded; and measures, checked
                   here, that make sure that the tests can fail

Needs torch and transformers (tests/requirements-torch.txt). Run it from anywhere: python
tests/make_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
import torch
import transformers
from checkpoints import NMSE_BOUND, WORST_BOUND, lively_weights, llama_config, nmse, worst
from reference import Reference

GOLDEN = checkpoints.TESTS / "data" / "golden"

MODELS = {
    "mha": {},
    "gqa": {
        "hidden_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "rope_theta": 1e6,
        "max_position_embeddings": 256,
    },
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "headdim": {"hidden_size": 60, "num_key_value_heads": 1, "head_dim": 22},
    "odd": {
        "hidden_size": 66,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 181,
        "vocab_size": 411,  # 11 rows more than the tokenizer has pieces
        "rms_norm_eps": 1e-6,
    },
    "huge": {
        "hidden_size": 32,
        "head_dim": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 1 << 30,
    },
}
# rows of lm_head that are scaled, so that EOS and newline are generated
LOUD = {"mha": {2: 1.6, 13: 1.6}}

N_IDS = 200
# The rows that are stored: around the borders of SIMD blocks and of chunks of 64 rows
ROWS = [
    *range(5),
    *range(14, 19),
    *range(30, 34),
    *range(60, 69),
    100,
    *range(124, 133),
    160,
    *range(189, 200),
]
GREEDY_LENGTHS, N_GREEDY = (1, 17, 66), 48


def make(name: str, changes: dict, seed: int, folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """One model in folder/NAME.bin; returns its entry in golden.json and the logits.

    Raises ValueError if the weights do not qualify.
    """
    config = llama_config(**changes)
    config["num_key_value_heads"] = changes.get(
        "num_key_value_heads", config["num_attention_heads"]
    )
    weights = lively_weights(config, seed)
    for i, scale in LOUD.get(name, {}).items():
        weights["lm_head.weight"][i] *= np.float16(scale)
    ids = [1, *np.random.default_rng(seed).integers(3, config["vocab_size"], N_IDS - 1).tolist()]

    checkpoints.write_model(folder / f"{name}.bin", config, weights)
    reference = Reference(checkpoints.write_checkpoint(folder / name, config, weights))
    plain, rounded = reference.logits(ids), reference.logits(ids, rounded=True)
    greedy = []
    for n in GREEDY_LENGTHS:
        tokens, gaps = reference.greedy(ids[:n], N_GREEDY, config["eos_token_id"])
        greedy.append({"n": n, "tokens": tokens, "least_gap": round(min(gaps), 6)})

    stats: dict = {}
    exact = checkpoints.forward(weights, config, ids, stats=stats)
    mutants = checkpoints.mutants(weights, config, ids)
    measures = {
        "standard_deviation": round(float(plain.std()), 3),
        "entropy_over_log_n": round(stats["entropy"], 3),
        "numpy": errors(exact, plain),
        "rounded": errors(rounded, plain),
        "mutants": {mistake: errors(logits, plain) for mistake, logits in mutants.items()},
    }
    demand(3 <= plain.std() <= 5, "the logits' standard deviation")
    demand(stats["entropy"] < 0.5, "the attention's entropy")
    demand(nmse(exact, plain) < 1e-9, "numpy and transformers agree")
    demand(
        nmse(rounded, plain) < NMSE_BOUND / 5 and worst(rounded, plain) < WORST_BOUND / 1.5,
        "rounding K and V leaves a margin for bpo",
    )
    demand(min(entry["least_gap"] for entry in greedy) > 1e-3, "no ties in greedy text")
    demand(
        name not in LOUD or any(entry["tokens"][-1] == config["eos_token_id"] for entry in greedy),
        "EOS is generated",
    )
    for mistake in ("rope pairing", "kv position"):
        far = (
            nmse(mutants[mistake], plain) > 100 * NMSE_BOUND
            and worst(mutants[mistake], plain) > 100 * WORST_BOUND
        )
        demand(far, f"the mutant with another {mistake} is far off")
    for mistake in ("eps", "rope theta"):
        demand(
            nmse(mutants[mistake], plain) > 2 * NMSE_BOUND,
            f"the mutant with another {mistake} is off",
        )
    return (
        {"ids": ids, "rows": ROWS, "greedy": greedy, "seed": seed, "measures": measures},
        plain[ROWS],
        rounded[ROWS],
    )


def errors(found: np.ndarray, expected: np.ndarray) -> list[float]:
    """NMSE and largest difference, to two digits."""
    return [float(f"{error(found, expected):.1e}") for error in (nmse, worst)]


def demand(condition: bool, what: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(what)


def main() -> None:
    """Makes all models, each with the first seed that gives a useful one."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    golden = {"torch": torch.__version__, "transformers": transformers.__version__, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in MODELS.items():
            for seed in range(100):
                try:
                    entry, plain, rounded = make(name, changes, seed, Path(folder))
                    break
                except ValueError as e:
                    print(f"{name}: seed {seed}: not met: {e}", file=sys.stderr)
            golden["models"][name] = entry
            (GOLDEN / f"{name}.bin").write_bytes((Path(folder) / f"{name}.bin").read_bytes())
            np.savez_compressed(GOLDEN / f"{name}.npz", plain=plain, rounded=rounded)
            print(
                name,
                json.dumps(entry["measures"]),
                [len(g["tokens"]) for g in entry["greedy"]],
                file=sys.stderr,
            )
    lines = ",\n".join(
        f'"{name}": {json.dumps(entry)}' for name, entry in golden.pop("models").items()
    )
    (GOLDEN / "golden.json").write_text(f'{json.dumps(golden)[:-1]}, "models": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
