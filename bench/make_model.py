#!/usr/bin/env python3
"""Makes a model of a given shape with random weights, in every engine's format.

The files are written to build/bench/SHAPE:

    make_model.py SHAPE [--gguf]

    hf/           a Hugging Face checkpoint, fp16 safetensors
    bpo.bin       the same through export_weights.py
    f16.gguf      the same for llama.cpp (with --gguf, which needs the package gguf)

Files that exist already are kept. How fast an engine runs does not depend on the values of the
weights, as long as they make finite and lively logits. The tokenizer is Llama-2's where ../shared
has it; else the tests' own tiny one, its 400 pieces being the first of the vocabulary.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402

import export_weights  # noqa: E402

SHARED = ROOT.parent / "shared"
LLAMA2_TOKENIZER = SHARED / "llama2" / "tokenizer.model"
LLAMA2_PIECES = 32000
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Shape:
    """D, L, H, HK, F, V of a model, and the positions that it takes."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab: int = 32000
    max_positions: int = 4096

    def config(self) -> dict:
        """A config.json."""
        return checkpoints.llama_config(
            hidden_size=self.dim,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            intermediate_size=self.ffn_dim,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_positions,
            torch_dtype="float16",
        )


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 176, 512),
    "15m": Shape(288, 6, 6, 6, 768),
    "110m": Shape(768, 12, 12, 12, 2048),
    "1b": Shape(2048, 22, 32, 4, 5632),
    "7b": Shape(4096, 32, 32, 32, 11008),
}


@dataclass(frozen=True)
class Model:
    """The paths of a model's formats; gguf and hf are None if it lacks them."""

    name: str
    bpo: Path
    hf: Path | None
    gguf: Path | None


def tokenizer(vocab: int) -> Path:
    """Llama-2's tokenizer.model where it is there and fits, or the tests' own."""
    if LLAMA2_TOKENIZER.exists() and vocab >= LLAMA2_PIECES:
        return LLAMA2_TOKENIZER
    return checkpoints.TOKENIZER


# ----------------------------------------------------------------------------------- the checkpoint


def random_weights(config: dict, seed: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """fp16 weights by name.

    lm_head's scale gives logits a standard deviation of 3, since its input is normalised.
    """
    rng = np.random.default_rng(seed)
    scales = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 0.3, "down_proj": 0.3, "lm_head": 3.0}
    for name, shape in checkpoints.weight_shapes(config).items():
        kind = name.split(".")[-2]
        if len(shape) == 1:
            yield name, rng.uniform(0.8, 1.2, shape).astype(np.float16)
            continue
        scale = 0.5 if kind == "embed_tokens" else scales.get(kind, 1.0) / math.sqrt(shape[1])
        weight = rng.standard_normal(shape, np.float32)
        weight *= np.float32(scale)
        yield name, weight.astype(np.float16)


def write_checkpoint(folder: Path, config: dict) -> None:
    """Writes a checkpoint as real ones come: config.json, tokenizer.model, shards and their index.

    A shard has at most about SHARD_BYTES.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard, shards, where = {}, [], {}

    def flush() -> None:
        path = folder / f"part-{len(shards) + 1}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, path.name))
        shards.append(path)
        shard.clear()

    for name, weight in random_weights(config):
        if shard and sum(w.nbytes for w in shard.values()) + weight.nbytes > SHARD_BYTES:
            flush()
        shard[name] = weight
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
    else:
        total = sum(path.stat().st_size for path in shards)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(tokenizer(config["vocab_size"]), folder / "tokenizer.model")
    # written last: is_there takes it as the sign that the rest is complete
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """fp16 weights of a checkpoint's safetensors files by name, one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name).astype(np.float16, copy=False)


# --------------------------------------------------------------------------------------------- GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, kind = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[kind]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def pair_neighbours(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """W_q or W_k with each head's rows in the order of Meta's pairing for RoPE, (2i, 2i + 1).

    llama.cpp expects it of this architecture; the checkpoint pairs i with i + hd/2.
    """
    rows, cols = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def gguf_tensor(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
    """A weight as llama.cpp's own converter writes it for f16.

    Matrices are fp16, norms fp32, and W_q and W_k permuted.
    """
    if weight.ndim == 1:
        return weight.astype(np.float32)
    if ".q_proj." in name:
        return np.ascontiguousarray(pair_neighbours(weight, config["num_attention_heads"]))
    if ".k_proj." in name:
        n_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return np.ascontiguousarray(pair_neighbours(weight, n_kv_heads))
    return weight


def add_vocabulary(writer, tokenizer_model: Path, vocab_size: int) -> None:
    """The pieces of a SentencePiece model, with unused ones up to vocab_size."""
    import gguf
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    n, types = pieces.GetPieceSize(), gguf.TokenType
    tokens, scores, kinds = [], [], []
    for i in range(vocab_size):
        if i >= n:
            tokens.append(f"<pad{i}>".encode())
            scores.append(-10000.0)
            kinds.append(types.UNUSED)
            continue
        tokens.append(pieces.IdToPiece(i).encode())
        scores.append(pieces.GetScore(i))
        is_kind = {
            types.UNKNOWN: pieces.IsUnknown,
            types.CONTROL: pieces.IsControl,
            types.UNUSED: pieces.IsUnused,
            types.BYTE: pieces.IsByte,
        }
        kinds.append(next((kind for kind, test in is_kind.items() if test(i)), types.NORMAL))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def write_gguf(path: Path, folder: Path) -> None:
    """Writes a checkpoint for llama.cpp, tensor by tensor."""
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(path.parent.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_vocabulary(writer, folder / "tokenizer.model", config["vocab_size"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])

    # only the shapes are used here: this first reading of a mapped file is cheap
    for name, weight in read_weights(folder):
        dtype = np.dtype(np.float32 if weight.ndim == 1 else np.float16)
        writer.add_tensor_info(gguf_name(name), weight.shape, dtype, weight.size * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in read_weights(folder):
        writer.write_tensor_data(gguf_tensor(name, weight, config))
    writer.close()
    temporary.rename(path)


# ----------------------------------------------------------------------------------------- together


def is_there(hf: Path, config: dict) -> bool:
    """Whether a checkpoint of this config, with the current tokenizer, is complete."""
    if not (hf / "config.json").exists():
        return False
    if json.loads((hf / "config.json").read_text("utf-8")) != config:
        return False
    wanted = tokenizer(config["vocab_size"])
    return (hf / "tokenizer.model").read_bytes() == wanted.read_bytes()


def make(name: str, folder: Path, gguf: bool = False) -> Model:
    """The model of a named shape; makes what is missing in folder/name."""
    config = SHAPES[name].config()
    folder = folder / name
    hf = folder / "hf"
    if not is_there(hf, config):
        print(
            f"making a random model of shape {name} in {os.path.relpath(folder)}", file=sys.stderr
        )
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(hf, config)
    return from_checkpoint(hf, folder, gguf)


def from_checkpoint(hf: Path, folder: Path, gguf: bool = False) -> Model:
    """A Hugging Face checkpoint as a model in folder, which gets the formats that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    bpo, for_llama = folder / "bpo.bin", folder / "f16.gguf"
    if not bpo.exists():
        print(f"exporting {os.path.relpath(bpo)}", file=sys.stderr)
        export_weights.export(hf, bpo, source=f"random weights, shape {folder.name}")
    if gguf and not for_llama.exists():
        print(f"writing {os.path.relpath(for_llama)}", file=sys.stderr)
        write_gguf(for_llama, hf)
    return Model(folder.name, bpo, hf, for_llama if for_llama.exists() else None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument(
        "--gguf", action="store_true", help="for llama.cpp too; needs the package gguf"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    args = parser.parse_args()
    print(make(args.shape, args.folder, args.gguf))


if __name__ == "__main__":
    main()
