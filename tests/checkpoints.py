"""Small Llama models for the tests, and a reference forward pass in numpy.

Random weights, checkpoint folders, bpo.bin files.

Shape letters: D model width, F feed-forward width, H query heads, HK key/value heads, hd head size,
L layers, V vocabulary.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import xxhash
from safetensors import safe_open
from safetensors.numpy import save_file

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TOKENIZER = TESTS / "data" / "tiny.model"  # 400 pieces; BOS 1, EOS 2, the newline byte 13

sys.path.insert(0, str(ROOT))
import export_weights  # noqa: E402

# Bounds on logits: against fp32, and against fp32 with K and V rounded to fp16 as in bpo's KV
# cache.
NMSE_BOUND, WORST_BOUND, ROUNDED_NMSE_BOUND = 5e-6, 2e-2, 1e-7


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the variance of the expected values."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.mean((found - expected) ** 2) / np.var(expected))


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in standard deviations of the expected values."""
    return float(
        np.max(np.abs(found.astype(np.float64) - expected)) / np.std(expected.astype(np.float64))
    )


def within_bounds(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether logits are as close to the fp32 reference's as they must be."""
    return nmse(found, expected) <= NMSE_BOUND and worst(found, expected) <= WORST_BOUND


# -------------------------------------------------------------------------------------- checkpoints


def llama_config(**changes) -> dict:
    """A config.json of a tiny Llama, as transformers would write it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 400,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | changes


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that a Hugging Face Llama checkpoint has, in its naming."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    hd = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,),
                "self_attn.q_proj": (q, d),
                "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d),
                "self_attn.o_proj": (d, q),
                "post_attention_layernorm": (d,),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }.items()
        }
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def lively_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random fp16 weights that make mistakes visible.

    Sharp attention, gains away from 1, logits with a standard deviation of about 4, and a residual
    stream so small (0.02 and up) that RMSNorm's eps matters in every layer.
    """
    rng = np.random.default_rng(seed)
    small = 0.02
    scales = {
        "q_proj": 1.8,
        "k_proj": 1.8,
        "o_proj": small,
        "gate_proj": 1.5,
        "down_proj": small,
        "embed_tokens": small,
    }
    weights = {}
    for name, shape in weight_shapes(config).items():
        kind = name.split(".")[-2]
        if len(shape) == 1:
            weights[name] = rng.uniform(0.4, 1.6, shape)
        elif kind == "embed_tokens":
            weights[name] = small * rng.standard_normal(shape)
        else:
            weights[name] = scales.get(kind, 1.0) / math.sqrt(shape[1]) * rng.standard_normal(shape)
    weights = {name: w.astype(np.float16) for name, w in weights.items()}
    ids = rng.integers(3, config["vocab_size"], 64)
    head = "model.norm.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    scale = 4.0 / forward(weights, config, ids).std()
    weights[head] = (weights[head] * scale).astype(np.float16)
    return weights


def write_checkpoint(
    folder: Path, config: dict, weights: dict[str, np.ndarray], tokenizer: Path = TOKENIZER
) -> Path:
    """Writes a Hugging Face checkpoint folder with one model.safetensors; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def write_model(path: Path, config: dict, weights: dict[str, np.ndarray]) -> Path:
    """Writes a bpo.bin of these weights, through a checkpoint folder and the exporter.

    Returns path.
    """
    folder = write_checkpoint(path.with_suffix(".hf"), config, weights)
    export_weights.export(folder, path, source=path.stem)
    shutil.rmtree(folder)
    return path


def constant_model(path: Path, logits: dict[int, float], rest: float = -30.0, **changes) -> Path:
    """Writes a bpo.bin whose logits are the same after any ids and at every position.

    Logits[id], and rest for all other ids.
    """
    config = llama_config(
        hidden_size=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        intermediate_size=2,
        **changes,
    )
    weights = {name: np.zeros(shape, np.float16) for name, shape in weight_shapes(config).items()}
    weights["model.embed_tokens.weight"][:] = 1.0
    weights["model.norm.weight"][:] = 1.0
    weights["lm_head.weight"][:] = rest / 2
    for i, logit in logits.items():
        weights["lm_head.weight"][i] = logit / 2
    return write_model(path, config, weights)


def cached_prefix_model(path: Path) -> Path:
    """Writes a model whose prefix takes so many operations (5e8) that bpo caches it."""
    config = llama_config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return write_model(path, config, lively_weights(config, 1))


def chain_model(path: Path, successors: dict[int, int | tuple[int, ...]], **changes) -> Path:
    """Writes a bpo.bin that recites a text: successors[id] follows id by a wide margin.

    Several successors are equally likely; after an id without successors, all ids are.
    """
    nodes = list(successors)
    d = len(nodes) + 1
    sizes = {
        "hidden_size": d,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 1,
    }
    config = llama_config(**sizes, num_hidden_layers=1, **changes)
    weights = {name: np.zeros(shape, np.float16) for name, shape in weight_shapes(config).items()}
    weights["model.embed_tokens.weight"][:, -1] = 1.0
    weights["model.norm.weight"][:] = 1.0
    for dim, node in enumerate(nodes):
        weights["model.embed_tokens.weight"][node] = np.eye(d)[dim]
        # RMSNorm makes a unit vector sqrt(D) long
        weights["lm_head.weight"][np.ravel(successors[node]), dim] = 30 / math.sqrt(d)
    return write_model(path, config, weights)


# ------------------------------------------------------------------------------------------ bpo.bin


def read_header(path: Path) -> dict:
    """The header of a bpo.bin, parsed."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def read_model(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A bpo.bin as the config and the weights of the checkpoint that it was made from."""
    with safe_open(path, framework="numpy") as file:
        meta, stored = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = {
        "dim": "hidden_size",
        "ffn_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    }
    names |= {
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
    }
    config = {hf: int(meta[name]) for name, hf in names.items()}
    config |= {"rms_norm_eps": float(meta["rms_norm_eps"]), "rope_theta": float(meta["rope_theta"])}
    config["tie_word_embeddings"] = meta["tie_embeddings"] == "true"
    shapes, weights = weight_shapes(config), {}
    for name in shapes:
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        fused = {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }
        whole = next((whole for whole, parts in fused.items() if kind in parts), None)
        if whole is None:
            weights[name] = stored[name]
            continue
        rows = {part: shapes[f"{prefix}.{part}.weight"][0] for part in fused[whole]}
        first = sum(
            n for part, n in rows.items() if fused[whole].index(part) < fused[whole].index(kind)
        )
        weights[name] = stored[f"{prefix}.{whole}.weight"][first : first + rows[kind]]
    return config, weights


def edit_metadata(path: Path, output: Path, **changes: str) -> Path:
    """Copies a bpo.bin with changed metadata and a correct header hash.

    Two underscores in a keyword are a dot in the key.
    """
    data = path.read_bytes()
    n = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:n])
    header["__metadata__"] |= {key.replace("__", "."): value for key, value in changes.items()} | {
        "xxh3.header": "0" * 16
    }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    raw = len(text).to_bytes(8, "little") + text
    digits = f"{xxhash.xxh3_64_intdigest(raw):016x}".encode("ascii")
    output.write_bytes(raw.replace(b"0" * 16, digits, 1) + data[n:])
    return output


# ----------------------------------------------------------------------- the forward pass, in numpy


def rmsnorm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * gain
    x [n][D], gain [D]"""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rotate(x: np.ndarray, positions: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """Rotates the pairs (i, i + hd/2) of each head, or, interleaved, the pairs (2i, 2i + 1).

    x [heads][n][hd]
    """
    hd = x.shape[-1]
    angles = positions[:, None] / theta ** (np.arange(0, hd, 2) / hd)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = (
        (slice(0, hd, 2), slice(1, hd, 2))
        if interleaved
        else (slice(0, hd // 2), slice(hd // 2, hd))
    )
    y = np.empty_like(x)
    y[..., a] = x[..., a] * cos - x[..., b] * sin
    y[..., b] = x[..., b] * cos + x[..., a] * sin
    return y


def forward(
    weights: dict[str, np.ndarray],
    config: dict,
    ids,
    rounded: bool = False,
    interleaved: bool = False,
    key_shift: int = 0,
    stats: dict | None = None,
) -> np.ndarray:
    """Logits [n][V] of n ids in double precision.

    rounded: K and V to fp16. interleaved and key_shift (added to the keys' positions) are mistakes
    that the tests must notice. stats receives the mean entropy of attention over log n.
    """
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    n, h, hk = len(ids), config["num_attention_heads"], config["num_key_value_heads"]
    hd = config.get("head_dim") or config["hidden_size"] // h
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    positions, entropy = np.arange(n), []
    x = w["model.embed_tokens.weight"][np.asarray(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{i}."): weight
            for name, weight in w.items()
            if name.startswith(f"model.layers.{i}.")
        }
        y = rmsnorm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            (y @ layer[f"self_attn.{name}_proj.weight"].T).reshape(n, heads, hd).transpose(1, 0, 2)
            for name, heads in (("q", h), ("k", hk), ("v", hk))
        )
        q = rotate(q, positions, theta, interleaved)
        k = rotate(k, positions + key_shift, theta, interleaved)
        if rounded:
            k, v = (z.astype(np.float32).astype(np.float16).astype(np.float64) for z in (k, v))
        # query head j reads key/value head j / (H / HK)
        k, v = (np.repeat(z, h // hk, axis=0) for z in (k, v))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(hd)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        if n > 16:
            entropy.append(
                -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)[:, 16:]
                / np.log(positions[16:] + 1)
            )
        x = x + (p @ v).transpose(1, 0, 2).reshape(n, h * hd) @ layer["self_attn.o_proj.weight"].T
        y = rmsnorm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = y @ layer["mlp.gate_proj.weight"].T, y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    if stats is not None and entropy:
        stats["entropy"] = float(np.mean(entropy))
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rmsnorm(x, w["model.norm.weight"], eps) @ head.T


def mutants(weights: dict[str, np.ndarray], config: dict, ids) -> dict[str, np.ndarray]:
    """Logits [n][V] of four forward passes, each with one mistake."""
    other_eps = 1e-6 if config["rms_norm_eps"] == 1e-5 else 1e-5
    other_theta = 1e4 if config["rope_theta"] != 1e4 else 5e5
    return {
        "rope pairing": forward(weights, config, ids, interleaved=True),
        "kv position": forward(weights, config, ids, key_shift=1),
        "eps": forward(weights, config | {"rms_norm_eps": other_eps}, ids),
        "rope theta": forward(weights, config | {"rope_theta": other_theta}, ids),
    }
