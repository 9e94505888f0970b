"""Compares bpo live with transformers: logits, greedy text, sampled tokens, and, for a real
checkpoint, ids.

    python tests/parity.py                          freshly drawn random models, about a minute
    python tests/parity.py --hf-dir FOLDER          that checkpoint

A checkpoint is loaded in fp32: four bytes of memory per parameter, and twice that for a moment (a
7B model: 27 GB, better 54), and two bytes of disk for its export. Needs torch and transformers
(tests/requirements-torch.txt). The program is ./bpo, or what BPO_BIN names. The exit code is 0 if
every comparison passed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
import sentencepiece
import torch
from checkpoints import (
    NMSE_BOUND,
    ROOT,
    ROUNDED_NMSE_BOUND,
    WORST_BOUND,
    export_weights,
    lively_weights,
    llama_config,
    nmse,
    worst,
)
from program import csv, dump_logits, works
from reference import Reference
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

N_GREEDY = 48  # new ids
N_DRAWS = 2000
MIN_P_VALUE = 1e-4  # of a chi-square test: an exact sampler falls below it once in 10,000 runs
# how far the last bits of K and V in fp16 (0.0013 of a logit) can move the mass that top-p compares
MASS_TIE = 4e-4


class Report:
    """The table of comparisons, printed line by line."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        print(f"{'':4}  {'model':40}  {'comparison':22}  result")

    def add(self, model: str, comparison: str, result: str, fine: bool) -> None:
        """One comparison."""
        print(f"{'ok' if fine else 'FAIL':4}  {model:40}  {comparison:22}  {result}", flush=True)
        self.passed += fine
        self.failed += not fine


def random_config(rng: np.random.Generator) -> dict:
    """A tiny Llama of odd sizes: any grouping of heads, any head size, tied or not."""
    kv_heads, head_dim = int(rng.integers(1, 4)), 2 * int(rng.integers(4, 20))
    heads = kv_heads * int(rng.integers(1, 5))
    return llama_config(
        # transformers demands a multiple of the heads
        hidden_size=heads * int(rng.integers(-(-48 // heads), -(-160 // heads))),
        intermediate_size=int(rng.integers(40, 400)),
        # more would amplify the last bit of K and V beyond the bound now and then
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=400 + int(rng.integers(0, 40)),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        rope_theta=float(rng.choice([1e4, 5e5, 1e6])),
        tie_word_embeddings=bool(rng.integers(0, 2)),
    )


def compare_logits(
    report: Report,
    name: str,
    reference: Reference,
    model: Path,
    ids: list[int],
    folder: Path,
    bounds: bool = True,
) -> None:
    """Logits of a whole input. bounds False.

    Without the bound against the fp16-rounded reference, which deep models exceed.
    """
    plain, rounded = reference.logits(ids), reference.logits(ids, rounded=True)
    for matmul in ("own", "openblas"):
        found = dump_logits(folder, model, ids, "--matmul", matmul)
        errors = nmse(found, plain), worst(found, plain), nmse(found, rounded)
        fine = (
            errors[0] <= NMSE_BOUND
            and errors[1] <= WORST_BOUND
            and (errors[2] <= ROUNDED_NMSE_BOUND or not bounds)
        )
        result = f"nmse {errors[0]:.1e}, worst {errors[1]:.1e}; K, V in fp16: nmse {errors[2]:.1e}"
        report.add(name, f"{len(ids)} rows, {matmul}", result, fine)


def compare_greedy(
    report: Report,
    name: str,
    reference: Reference,
    model: Path,
    prompts: list[list[int]],
    eos: int,
    max_new: int,
) -> None:
    """Greedy text.

    Two texts may differ from a position on whose two best logits are closer than the bound on
    logits.
    """
    same = ties = 0
    for ids in prompts:
        expected, gaps = reference.greedy(ids, max_new, eos)
        (line,) = works(
            "-m", model, "--tokens", csv(ids), "--greedy", "--json", "--max-new-tokens", max_new
        ).lines
        same += line["tokens"] == expected
        if line["tokens"] != expected:
            at = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(line["tokens"], expected, strict=False))
                    if a != b
                ),
                len(expected) - 1,
            )
            ties += gaps[at] < WORST_BOUND
    result = f"{same} of {len(prompts)} the same, {ties} differ after a tie"
    report.add(name, "greedy text", result, same + ties == len(prompts))


def compare_draws(
    report: Report,
    name: str,
    reference: Reference,
    model: Path,
    ids: list[int],
    settings: tuple,
    seed: int,
) -> None:
    """Sampled next ids against the probabilities that transformers' logits processors give.

    Support and chi-square. The input is cut where the model is least certain, so that there is
    something to draw.
    """
    temperature, top_k, top_p = settings
    p = torch.softmax(torch.from_numpy(reference.logits(ids)) / temperature, -1).double()
    ids = ids[: 1 + int(torch.special.entr(p).sum(-1).argmax())]
    logits = torch.from_numpy(reference.logits(ids, rounded=True)[-1:])

    def probabilities(top_p: float) -> np.ndarray:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        return torch.softmax(warpers(torch.tensor([ids]), logits.clone()).double(), -1)[0].numpy()

    args = (
        "--temperature",
        temperature,
        "--top-k",
        top_k,
        "--top-p",
        top_p,
        "--max-new-tokens",
        1,
        "--json",
    )
    drawn = np.zeros(logits.shape[-1], int)
    for part in range(4):
        lines = works(
            "-m", model, "--tokens", csv(ids), *args, "-n", N_DRAWS // 4, "--seed", seed + part
        ).lines
        np.add.at(drawn, [line["tokens"][0] for line in lines], 1)
    # the same ids, except for a tie at the limit
    limits = [top_p, top_p - MASS_TIE, top_p + MASS_TIE] if top_p < 1 else [top_p]
    found = []
    for expected in map(probabilities, limits):
        outside = int(drawn[expected == 0].sum())
        p = chi_square(drawn[expected > 0], N_DRAWS * expected[expected > 0])
        found.append(
            (
                outside == 0,
                p,
                f"{N_DRAWS} draws from {int((expected > 0).sum())} ids, {outside} outside, "
                f"p = {p:.3f}",
            )
        )
    fine, p, result = max(found, key=lambda one: one[:2])
    report.add(name, f"T {temperature:g}, k {top_k}, p {top_p:g}", result, fine and p > MIN_P_VALUE)


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of counts; rare ones are merged until at least five are expected in each."""
    order = np.argsort(-expected)
    found, expected = found[order], expected[order]
    n = int(np.sum(expected >= 5))
    if n < expected.size:
        found = np.append(found[:n], found[n:].sum())
        expected = np.append(expected[:n], expected[n:].sum())
    if expected.size > 1 and expected[-1] < 5:
        found = np.append(found[:-2], found[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    if expected.size < 2:
        return 1.0
    statistic = float(np.sum((found - expected) ** 2 / expected))
    return float(
        torch.special.gammaincc(
            torch.tensor((expected.size - 1) / 2.0).double(), torch.tensor(statistic / 2).double()
        )
    )


def compare_ids(
    report: Report, name: str, model: Path, tokenizer: Path, prompts: list[str]
) -> None:
    """Ids of templated prompts against the sentencepiece package."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    bos = int(checkpoints.read_header(model)["__metadata__"]["bos_id"])
    expected = [
        [bos, *pieces.Encode(export_weights.TEMPLATE.replace("{prompt}", prompt))]
        for prompt in prompts
    ]
    same = sum(
        json.loads(works("-m", model, "--tokenize", "-p", p).out) == ids
        for p, ids in zip(prompts, expected, strict=True)
    )
    report.add(name, "ids of prompts", f"{same} of {len(prompts)} the same", same == len(prompts))


def random_models(report: Report, n: int, seed: int, folder: Path) -> None:
    """Compares on n random models."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        config = random_config(rng)
        weights = lively_weights(config, int(rng.integers(2**31)))
        reference = Reference(checkpoints.write_checkpoint(folder / "hf", config, weights))
        model = checkpoints.write_model(folder / f"{i}.bin", config, weights)
        d, f, heads = (
            config["hidden_size"],
            config["intermediate_size"],
            f"{config['num_attention_heads']}/{config['num_key_value_heads']}",
        )
        name = (
            f"D {d} F {f} L {config['num_hidden_layers']} H {heads} hd {config['head_dim']} "
            f"theta {config['rope_theta']:g}"
        )
        prompts = [
            [1, *rng.integers(3, config["vocab_size"], length - 1).tolist()]
            for length in rng.integers(2, 260, 4)
        ]
        compare_logits(report, name, reference, model, prompts[0], folder)
        compare_greedy(report, name, reference, model, prompts, config["eos_token_id"], N_GREEDY)
        for settings in ((0.6, 50, 0.9), (0.9, 50, 0.9), (1.5, 0, 1.0))[i % 3 :][:1]:
            compare_draws(
                report, name, reference, model, prompts[1], settings, int(rng.integers(2**40))
            )


def real_model(report: Report, hf_dir: Path, folder: Path) -> None:
    """Compares a checkpoint folder: ids, logits, greedy text and sampled tokens on 20 prompts."""
    name, model = hf_dir.resolve().name[:40], folder / "bpo.bin"
    export_weights.export(hf_dir, model, progress=sys.stderr.isatty())
    with (ROOT / "demo" / "heldout.jsonl").open(encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for _, line in zip(range(20), file, strict=False)]
    compare_ids(report, name, model, hf_dir / "tokenizer.model", prompts)
    reference = Reference(hf_dir)
    ids = [json.loads(works("-m", model, "--tokenize", "-p", prompt).out) for prompt in prompts]
    eos = int(checkpoints.read_header(model)["__metadata__"]["eos_id"])
    for row in ids[:3]:
        compare_logits(report, name, reference, model, row, folder, bounds=False)
    compare_greedy(report, name, reference, model, ids, eos, 256)
    for settings in ((0.6, 50, 0.9), (0.9, 50, 0.9)):
        compare_draws(report, name, reference, model, ids[0], settings, 1)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf-dir",
        metavar="FOLDER",
        type=Path,
        help="compare on this checkpoint instead of random ones",
    )
    parser.add_argument(
        "--configs", metavar="N", type=int, default=8, help="how many random models (default 8)"
    )
    parser.add_argument(
        "--seed", type=int, help="of the random models (default: a new one, printed)"
    )
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        if args.hf_dir:
            real_model(report, args.hf_dir, Path(folder))
        else:
            seed = int(np.random.default_rng().integers(2**31)) if args.seed is None else args.seed
            print(f"      --seed {seed}")
            random_models(report, args.configs, seed, Path(folder))
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
