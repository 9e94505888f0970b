#!/usr/bin/env python3
"""Writes bpo.bin, bpo's model file, from a Hugging Face Llama checkpoint folder.

    export_weights.py HF_DIR -o bpo.bin

bpo.bin is a valid safetensors file (https://github.com/huggingface/safetensors), which
docs/model-file.md documents byte by byte:

    8 bytes     N, the header's length, little-endian
    N bytes     the header: JSON, padded with spaces until 8 + N is a multiple of 64
    the rest    the tensors, in the order in which the engine reads them, each at a multiple of 64;
                U8 tensors pad.* fill the gaps

Its __metadata__ holds everything that the engine knows about the model; all numbers come from the
checkpoint's config.json. Weights are fp16. W_q, W_k and W_v of a layer are stacked into one matrix,
and so are W_gate and W_up; rows keep the checkpoint's order (no permutation for RoPE).
tokenizer.model is a tensor of bytes. __metadata__ has an XXH3-64 hash of every tensor, and one of
the header.

Weights pass through memory in blocks of a few MiB, so a model of any size needs little of it.

    shapes      D model width, F feed-forward width, H query heads, HK key/value heads,
                hd head size, L layers, V vocabulary
    exit codes  0 done, 1 the output could not be written, 2 usage,
                3 the checkpoint is broken or not supported, 128 + signal when stopped
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import numpy as np
    import sentencepiece
    import xxhash
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
except ImportError as e:
    sys.exit(
        f"error: the Python package {e.name} is missing\n"
        "hint: python3 -m pip install -r requirements.txt"
    )

EXIT_OUTPUT, EXIT_USAGE, EXIT_CHECKPOINT = 1, 2, 3
ALIGN = 64  # bytes
BLOCK = 1 << 22  # elements that are converted at a time

TEMPLATE = (
    "[INST] You are an expert prompt engineer. Please help me improve this prompt "
    "to get a more helpful and harmless response:\n"
    "{prompt} [/INST]"
)
# The authors' two ways of sampling: the model card's, and infer_example.py's of thu-coai/BPO.
SETTINGS = {
    "trained_length": "512",
    "stable.temperature": "0.6",
    "stable.top_k": "50",
    "stable.top_p": "0.9",
    "stable.max_new_tokens": "1024",
    "stable.samples": "1",
    "aggressive.temperature": "0.9",
    "aggressive.top_k": "50",
    "aggressive.top_p": "0.9",
    "aggressive.max_new_tokens": "1024",
    "aggressive.samples": "5",
}


class ExportError(Exception):
    """An error in a folder or an output, with a hint and the program's exit code.

    The message says what was expected and what was found; the hint suggests the next step.
    """

    def __init__(
        self,
        message: str,
        hint: str = "compare the folder with the source of the model",
        code: int = EXIT_CHECKPOINT,
    ):
        super().__init__(message)
        self.hint = hint
        self.code = code


# -------------------------------------------------------------------------------------- config.json


@dataclasses.dataclass
class Config:
    """The numbers of a Llama model, under their names in bpo.bin; pad_id is -1 if it has none."""

    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    bos_id: int
    eos_id: int
    pad_id: int


def read_config(folder: Path) -> Config:
    """Reads config.json; raises ExportError for missing, impossible and unsupported values."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ExportError(
            f"{path}: {e.strerror}",
            "HF_DIR is the folder of a Hugging Face checkpoint, which contains config.json",
        ) from e
    except ValueError as e:
        raise ExportError(f"{path} is not JSON: {e}", "download it again") from e
    if not isinstance(raw, dict):
        raise ExportError(f"{path} is not a JSON object", "download it again")
    refuse_unsupported(raw)

    def integer(key: str, minimum: int, maximum: int, default: int | None = None) -> int:
        value = default if raw.get(key) is None else raw[key]
        if isinstance(value, list) and len(value) == 1 and key == "eos_token_id":
            value = value[0]
        if value is None:
            raise ExportError(
                f"config.json has no {key}",
                "no number is ever guessed: complete config.json from the model's source",
            )
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ExportError(
                f"config.json: {key} is {json.dumps(value)}; "
                f"expected an integer from {minimum} to {maximum}"
            )
        return value

    dim = integer("hidden_size", 1, 1 << 20)
    n_heads = integer("num_attention_heads", 1, 1 << 12)
    vocab_size = integer("vocab_size", 1, 1 << 20)
    if raw.get("head_dim") is None and dim % n_heads:
        raise ExportError(
            f"config.json has no head_dim, and hidden_size {dim} "
            f"is not a multiple of num_attention_heads {n_heads}"
        )
    config = Config(
        dim=dim,
        ffn_dim=integer("intermediate_size", 1, 1 << 19),
        n_layers=integer("num_hidden_layers", 1, 1 << 12),
        n_heads=n_heads,
        # absent: multi-head attention, as in transformers
        n_kv_heads=integer("num_key_value_heads", 1, n_heads, default=n_heads),
        head_dim=integer("head_dim", 2, 1 << 12, default=dim // n_heads),
        vocab_size=vocab_size,
        max_positions=integer("max_position_embeddings", 2, 1 << 30),
        rms_norm_eps=real(raw, "rms_norm_eps", 0.0, 1.0),
        rope_theta=rope_theta(raw),
        tie_embeddings=raw.get("tie_word_embeddings") or False,
        bos_id=integer("bos_token_id", 0, vocab_size - 1),
        eos_id=integer("eos_token_id", 0, vocab_size - 1),
        pad_id=integer("pad_token_id", -1, vocab_size - 1, default=-1),
    )
    if config.head_dim % 2:
        raise ExportError(
            f"config.json: the head size is {config.head_dim}; "
            "rotary embeddings need an even number"
        )
    if config.n_heads % config.n_kv_heads:
        raise ExportError(
            f"config.json: num_attention_heads {config.n_heads} "
            f"is not a multiple of num_key_value_heads {config.n_kv_heads}"
        )
    if (rows := (config.n_heads + 2 * config.n_kv_heads) * config.head_dim) > 1 << 20:
        raise ExportError(
            f"config.json: queries, keys and values have {rows} rows in total; "
            f"the maximum is {1 << 20}"
        )
    return config


def refuse_unsupported(raw: dict) -> None:
    """Raises ExportError for an architecture, or a variant of Llama, that bpo does not support."""
    hint = "bpo runs plain Llama models, such as Llama-2 and its fine-tunes"
    if raw.get("architectures") != ["LlamaForCausalLM"]:
        found = json.dumps(raw.get("architectures"))
        raise ExportError(
            f'config.json: architectures is {found}; only ["LlamaForCausalLM"] is supported', hint
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ExportError(
            f'config.json: hidden_act is {json.dumps(raw["hidden_act"])}; only "silu" is supported',
            hint,
        )
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(key):
            raise ExportError(
                f"config.json: {key} is {json.dumps(raw[key])[:80]}, which is not supported", hint
            )
    if not isinstance(raw.get("tie_word_embeddings") or False, bool):
        raise ExportError(
            f"config.json: tie_word_embeddings is {json.dumps(raw['tie_word_embeddings'])}; "
            "expected true or false"
        )
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if (
            not isinstance(rope, dict)
            or rope.get("rope_type", rope.get("type", "default")) != "default"
            or "factor" in rope
        ):
            raise ExportError(
                f"config.json: {key} is {json.dumps(rope)[:200]}; "
                "only plain rotary embeddings are supported",
                hint,
            )
        factor = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
        if factor != 1:
            raise ExportError(
                f"config.json: partial_rotary_factor is {json.dumps(factor)}; only 1 is supported",
                hint,
            )


def real(raw: dict, key: str, minimum: float, maximum: float, where: str = "") -> float:
    """The number under a key, from minimum to maximum; NaN is refused."""
    value = raw.get(key)
    if value is None:
        raise ExportError(
            f"config.json has no {key}",
            "no number is ever guessed: complete config.json from the model's source",
        )
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not minimum <= value <= maximum
    ):
        raise ExportError(
            f"config.json: {where}{key} is {json.dumps(value)}; "
            f"expected a number from {minimum:g} to {maximum:g}"
        )
    return float(value)


def rope_theta(raw: dict) -> float:
    """RoPE's base, which is 10000 if config.json does not give it, as in Llama.

    It is at the top level, or under rope_parameters (transformers 5).
    """
    places = [("", raw), ("rope_parameters.", raw.get("rope_parameters") or {})]
    found = {
        real(place, "rope_theta", 1.0, 1e12, name)
        for name, place in places
        if place.get("rope_theta") is not None
    }
    if len(found) > 1:
        raise ExportError(
            f"config.json: rope_theta is both {min(found):g} and {max(found):g}, "
            "at the top level and under rope_parameters"
        )
    return found.pop() if found else 10000.0


# ---------------------------------------------------------------------------------- tokenizer.model


def read_tokenizer(folder: Path, config: Config) -> tuple[bytes, int]:
    """The bytes of tokenizer.model, checked against the config, and the id of the newline byte.

    The id is -1 if there is no piece for this byte.
    """
    path = folder / "tokenizer.model"
    try:
        data = path.read_bytes()
    except OSError as e:
        hint = (
            "the SentencePiece file is required; tokenizer.json does not replace it. "
            "Llama-2 fine-tunes use Llama-2's tokenizer.model"
        )
        raise ExportError(f"{path}: {e.strerror}", hint) from e
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(data)
        n_pieces = pieces.GetPieceSize() if data else 0
    except RuntimeError:
        n_pieces = 0
    if n_pieces == 0:
        raise ExportError(
            f"{path} is not a SentencePiece model ({len(data)} bytes)",
            "download it again (a Git LFS pointer is not a model)",
        )
    if n_pieces > config.vocab_size:
        raise ExportError(
            f"{path} has {n_pieces} pieces; config.json has vocab_size {config.vocab_size}, "
            "but every piece needs an embedding",
            "tokenizer and checkpoint do not belong together",
        )
    for key, i in (("bos_token_id", config.bos_id), ("eos_token_id", config.eos_id)):
        if i < n_pieces and not pieces.IsControl(i):
            raise ExportError(
                f"config.json: {key} is {i}, which is the ordinary piece {pieces.IdToPiece(i)!r} "
                f"of {path}; expected a control piece",
                "tokenizer and checkpoint do not belong together",
            )
    newline = pieces.PieceToId("<0x0A>")
    return data, newline if pieces.IsByte(newline) else -1


# ------------------------------------------------------------------------- the checkpoint's weights


@dataclasses.dataclass
class Tensor:
    """A tensor of the checkpoint: its type and shape, and where it is."""

    name: str
    file: Path
    dtype: str  # as safetensors calls it: "F16"
    shape: tuple[int, ...]
    offset: int = 0  # of its first byte in a safetensors file


class SafetensorsFile:
    """Reads the tensors of a .safetensors file.

    With plain reads: mapped pages would count as this process's memory, and numpy has no bf16.
    """

    TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # noqa: RUF012

    @staticmethod
    def tensors(path: Path) -> list[Tensor]:
        """All tensors of a file, after the safetensors package has checked the header."""
        try:
            with safe_open(path, framework="numpy"):
                pass
            with path.open("rb") as file:
                n_header = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(n_header))
        except (SafetensorError, OSError, ValueError) as e:
            raise ExportError(f"{path}: {e}", "is it complete? download it again") from e
        header.pop("__metadata__", None)
        begin = 8 + n_header
        return [
            Tensor(name, path, e["dtype"], tuple(e["shape"]), begin + e["data_offsets"][0])
            for name, e in header.items()
        ]

    def read(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yields the tensor's elements, flat, in blocks: fp32, fp16, or bf16's raw 16 bits."""
        dtype = np.dtype(self.TYPES[tensor.dtype])
        n = math.prod(tensor.shape)
        try:
            with tensor.file.open("rb", buffering=0) as file:
                file.seek(tensor.offset)
                for first in range(0, n, BLOCK):
                    block = np.fromfile(file, dtype, min(BLOCK, n - first))
                    if block.size != min(BLOCK, n - first):
                        raise OSError("the file ends too early")
                    yield block
        except OSError as e:
            raise ExportError(
                f"{tensor.file}: {tensor.name}: {e}", "was the file changed during the export?"
            ) from e


class PickledFile:
    """Reads the tensors of a pytorch_model*.bin with torch.

    The file is mapped, and loaded with weights_only, so that no code in the pickle runs.
    """

    def __init__(self) -> None:
        self.torch = import_torch()
        self.types = {
            "F32": self.torch.float32,
            "F16": self.torch.float16,
            "BF16": self.torch.bfloat16,
        }

    def load(self, path: Path) -> dict:
        """The state dict of a file; a tensor's data is not read until it is accessed."""
        try:
            state = self.torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # its many readers raise many types
            if isinstance(e, RuntimeError) and "mmap can only be used" in str(e):
                message = "the file has the format of torch before 1.6"
                hint = "load it and save it again with a current torch, then export"
            else:
                message, hint = str(e).split("\n")[0], "is it complete? download it again"
            raise ExportError(f"{path}: {message}", hint) from e
        if not isinstance(state, dict) or not all(
            isinstance(tensor, self.torch.Tensor) for tensor in state.values()
        ):
            raise ExportError(f"{path} holds something other than a dictionary of tensors")
        return state

    def tensors(self, path: Path) -> list[Tensor]:
        """All tensors of a file."""
        names = {dtype: name for name, dtype in self.types.items()}
        return [
            Tensor(str(name), path, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in self.load(path).items()
        ]

    def read(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Like SafetensorsFile.read.

        The file is mapped anew for each tensor, so that what was read does not stay in memory.
        """
        flat = self.load(tensor.file)[tensor.name].detach().contiguous().reshape(-1)
        flat = flat.view(self.torch.int16) if tensor.dtype == "BF16" else flat
        for first in range(0, flat.numel(), BLOCK):
            block = flat[first : first + BLOCK].numpy()
            yield block.view("<u2") if tensor.dtype == "BF16" else block


def import_torch():
    """Imports torch, which only pickled checkpoints need."""
    try:
        import torch
    except ImportError as e:
        raise ExportError(
            "the checkpoint is pickled (pytorch_model*.bin), "
            "and reading it safely needs torch, which is not installed",
            "python3 -m pip install torch, or use the model's safetensors files if it has any",
        ) from e
    return torch


class Checkpoint:
    """The tensors of a folder, in one file or several, in either format."""

    # transformers' order of preference: safetensors before pickles, single before sharded files
    LAYOUTS = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )

    def __init__(self, folder: Path):
        layout = next((name for name in self.LAYOUTS if (folder / name).exists()), None)
        if layout is None:
            raise ExportError(
                f"{folder} has no weights: none of {', '.join(self.LAYOUTS)}",
                "is the download complete?",
            )
        sharded = layout.endswith(".index.json")
        index = read_index(folder / layout) if sharded else {}
        names = sorted(set(index.values())) if sharded else [layout]
        self.files = [folder / name for name in names]
        if absent := [path.name for path in self.files if not path.is_file()]:
            raise ExportError(
                f"{folder / layout} names missing files: {', '.join(absent)}", "download them too"
            )
        self.reader = SafetensorsFile() if ".safetensors" in layout else PickledFile()
        self.tensors: dict[str, Tensor] = {}
        for path in self.files:
            for tensor in self.reader.tensors(path):
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name].file.name
                    raise ExportError(f"{tensor.name} is in {other} and again in {path.name}")
                self.tensors[tensor.name] = tensor
        for name, file in index.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ExportError(
                    f"{folder / layout} says that {name} is in {file}, but it is not",
                    "download both files again",
                )

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor's elements as fp16, flat, in blocks.

        Raises ExportError for an element that fp16 cannot hold.
        """
        tensor = self.tensors[name]
        for block in self.reader.read(tensor):
            if tensor.dtype == "BF16":
                block = (block.astype("<u4") << 16).view("<f4")  # bf16 is the upper half of an fp32
            with np.errstate(over="ignore"):
                half = block.astype("<f2", copy=False)
            if not np.isfinite(half).all():
                value = float(block[~np.isfinite(half)][0])
                why = "is not finite"
                if math.isfinite(value):
                    why = "overflows fp16, whose largest number is 65504"
                raise ExportError(
                    f"{name} holds the value {value:g}, which {why}",
                    "the checkpoint cannot be represented in fp16",
                )
            yield half


def read_index(path: Path) -> dict[str, str]:
    """The {tensor: file} map of a sharded checkpoint.

    Only plain names are accepted, so that an index cannot leave the folder.
    """
    try:
        index = json.loads(path.read_text("utf-8"))["weight_map"]
        names = list(index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ExportError(f"{path} is not an index of weights: {e!r}", "download it again") from e
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):
            raise ExportError(
                f"{path} names the file {name!r}; "
                "expected the plain name of a .safetensors or .bin file"
            )
    return index


# ----------------------------------------------------------------- the tensors of bpo.bin, in order


@dataclasses.dataclass
class Entry:
    """A tensor of bpo.bin: a stack of the checkpoint's tensors, or plain bytes."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()  # names and shapes in the checkpoint
    data: bytes = b""

    @property
    def dtype(self) -> str:
        """The type's name in safetensors."""
        return "F16" if self.parts else "U8"

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * (2 if self.parts else 1)


def plan(config: Config, tokenizer: bytes) -> list[Entry]:
    """All tensors of bpo.bin, in the file's order, in which a forward pass reads them."""
    d, f, v = config.dim, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def weight(name: str, *shape: int) -> Entry:
        return Entry(name, shape, ((name, shape),))

    def stacked(name: str, *parts: tuple[str, tuple[int, int]]) -> Entry:
        return Entry(name, (sum(shape[0] for _, shape in parts), d), parts)

    entries = [weight("model.embed_tokens.weight", v, d)]
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        entries += [
            weight(layer + "input_layernorm.weight", d),
            stacked(
                attention + "qkv_proj.weight",
                (attention + "q_proj.weight", (q, d)),
                (attention + "k_proj.weight", (kv, d)),
                (attention + "v_proj.weight", (kv, d)),
            ),
            weight(attention + "o_proj.weight", d, q),
            weight(layer + "post_attention_layernorm.weight", d),
            stacked(
                mlp + "gate_up_proj.weight",
                (mlp + "gate_proj.weight", (f, d)),
                (mlp + "up_proj.weight", (f, d)),
            ),
            weight(mlp + "down_proj.weight", d, f),
        ]
    entries.append(weight("model.norm.weight", d))
    if not config.tie_embeddings:
        entries.append(weight("lm_head.weight", v, d))
    entries.append(Entry("tokenizer.model", (len(tokenizer),), data=tokenizer))
    return padded(entries)


def padded(entries: list[Entry]) -> list[Entry]:
    """The same entries with pad.* tensors in between.

    Every other tensor then starts at a multiple of ALIGN, and there are no holes.
    """
    result: list[Entry] = []
    for entry in entries:
        if gap := -sum(e.n_bytes for e in result[-1:]) % ALIGN:
            n_pads = sum(e.name.startswith("pad.") for e in result)
            result.append(Entry(f"pad.{n_pads}", (gap,), data=bytes(gap)))
        result.append(entry)
    return result


def check_tensors(checkpoint: Checkpoint, entries: list[Entry], tied: bool) -> list[str]:
    """Compares the tensors with what config.json requires; returns notes.

    Raises ExportError with all differences.
    """
    expected = {name: shape for entry in entries for name, shape in entry.parts}
    found = checkpoint.tensors
    extra = [name for name in found if name not in expected]
    notes = []
    if inv_freq := [name for name in extra if name.endswith(".rotary_emb.inv_freq")]:
        notes.append(
            f"ignored {len(inv_freq)} tensors *.rotary_emb.inv_freq: they follow from config.json"
        )
    if (
        tied
        and "lm_head.weight" in extra
        and same_elements(checkpoint, "lm_head.weight", "model.embed_tokens.weight")
    ):
        notes.append("ignored lm_head.weight: it is the embedding, as tie_word_embeddings says")
        extra.remove("lm_head.weight")
    problems = [
        f"missing: {name}, expected {list(shape)}"
        for name, shape in expected.items()
        if name not in found
    ]
    problems += [
        f"extra: {name}, found {list(found[name].shape)}" for name in extra if name not in inv_freq
    ]
    problems += [
        f"shape: {name}, expected {list(shape)}, found {list(found[name].shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"type: {name}, expected F32, F16 or BF16, found {found[name].dtype}"
        for name in expected
        if name in found and found[name].dtype not in SafetensorsFile.TYPES
    ]
    if problems:
        raise ExportError(
            "the weights do not match config.json:\n  " + "\n  ".join(problems),
            "config.json and the weights do not belong together, or bpo does not support the model",
        )
    return notes


def same_elements(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors are equal after rounding to fp16."""
    found = [checkpoint.tensors.get(name) for name in (a, b)]
    if not all(tensor and tensor.dtype in SafetensorsFile.TYPES for tensor in found):
        return False
    if found[0].shape != found[1].shape:
        return False
    blocks = zip(checkpoint.read(a), checkpoint.read(b), strict=True)
    return all(np.array_equal(x, y) for x, y in blocks)


# ------------------------------------------------------------------------------------------ bpo.bin


def header_bytes(metadata: dict[str, str], entries: list[Entry]) -> bytes:
    """The file's first 8 + N bytes.

    Their first metadata is xxh3.header, the hash of these bytes with zeros in the hash's place.
    """
    header: dict = {"__metadata__": {"xxh3.header": "0" * 16, **metadata}}
    begin = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.n_bytes],
        }
        begin += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    raw = len(text).to_bytes(8, "little") + text
    key, digest = b'"xxh3.header":"', hash_text(xxhash.xxh3_64(raw)).encode("ascii")
    return raw.replace(key + b"0" * 16, key + digest, 1)


def hash_text(state: "xxhash.xxh3_64") -> str:
    """A hash as it is written in the header: 16 lower-case hexadecimal digits."""
    return f"{state.intdigest():016x}"


def describe(config: Config, source: str, newline_id: int) -> dict[str, str]:
    """The metadata without the hashes: flat, and all strings, as safetensors requires."""
    numbers = {
        key: str(value).lower() if isinstance(value, bool) else repr(value)
        for key, value in vars(config).items()
    }
    tail = {"newline_id": str(newline_id), "template": TEMPLATE}
    return {"format": "bpo", "format_version": "1", "source": source, **numbers, **tail, **SETTINGS}


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    metadata: dict[str, str],
    entries: list[Entry],
    progress: bool,
) -> int:
    """Writes bpo.bin, under a temporary name until it is complete; returns its size in bytes."""
    hashes = {
        f"xxh3.{entry.name}": "0" * 16 for entry in entries if not entry.name.startswith("pad.")
    }
    header = header_bytes(metadata | hashes, entries)
    total = len(header) + sum(entry.n_bytes for entry in entries)
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise ExportError(
            f"{path} needs {human(total)}; {human(free)} are free in {path.parent}",
            "free some space, or choose another disk",
            EXIT_OUTPUT,
        )
    with (
        temporary_file(path) as file,
        tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        file.write(header)
        for entry in entries:
            state = xxhash.xxh3_64(entry.data)
            file.write(entry.data)
            for block in (block for name, _ in entry.parts for block in checkpoint.read(name)):
                state.update(block)
                file.write(block)
                bar.update(block.nbytes)
            if not entry.name.startswith("pad."):
                hashes[f"xxh3.{entry.name}"] = hash_text(state)
        bar.update(total - bar.n)
        file.seek(0)
        file.write(header_bytes(metadata | hashes, entries))
    return total


@contextlib.contextmanager
def temporary_file(path: Path):
    """A file to write under a temporary name beside path.

    If the block succeeds, it is flushed to disk and renamed to path; if not, it is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def export(
    folder: Path, output: Path, source: str | None = None, progress: bool = False
) -> tuple[int, list[str]]:
    """Exports a checkpoint folder; returns the file's size in bytes and notes for the user.

    Raises ExportError.
    """
    output = Path(os.path.realpath(output))  # a link stays one
    if output.exists() and not output.is_file():
        raise ExportError(
            f"{output} is not a regular file", "-o names the file to write", EXIT_USAGE
        )
    if not output.parent.is_dir():
        raise ExportError(f"{output.parent} is not a folder", "create it first", EXIT_OUTPUT)
    config = read_config(folder)
    tokenizer, newline_id = read_tokenizer(folder, config)
    checkpoint = Checkpoint(folder)
    sources = [*checkpoint.files, folder / "tokenizer.model", folder / "config.json"]
    if output.exists() and any(output.samefile(path) for path in sources):
        raise ExportError(
            f"{output} is a file of the checkpoint itself", "-o names the file to write", EXIT_USAGE
        )
    entries = plan(config, tokenizer)
    notes = check_tensors(checkpoint, entries, config.tie_embeddings)
    metadata = describe(config, printable(source or default_source(folder)), newline_id)
    try:
        return write_model(output, checkpoint, metadata, entries, progress), notes
    except OSError as e:
        raise ExportError(
            f"{output}: {e.strerror or e}",
            "is the folder writable, and is there space on the disk?",
            EXIT_OUTPUT,
        ) from e


def default_source(folder: Path) -> str:
    """The folder's name, or the model's in the Hugging Face cache.

    There the folder is .../models--THUDM--BPO/snapshots/<hash>, and the name THUDM/BPO.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def printable(text: str) -> str:
    """The text with everything unprintable, newlines included, replaced by question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def human(n_bytes: int) -> str:
    """A size in readable units."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------- command line


def stop(signum: int, frame) -> None:
    """A signal handler that unwinds the stack, so that the temporary file is removed."""
    raise SystemExit(128 + signum)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Write bpo.bin from a Hugging Face Llama checkpoint: config.json, "
        "tokenizer.model, and weights as model.safetensors, model-*-of-*.safetensors "
        "or pytorch_model-*.bin (these need torch).",
        epilog="An existing output is replaced once the new one is complete.",
    )
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path, help="the checkpoint's folder")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="the model file to write, such as bpo.bin",
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="the model's name, stored in the file (default: the folder's name)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    args = parser.parse_args(argv)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP: keep it so
            signal.signal(signum, stop)
    try:
        progress = sys.stderr.isatty() and not args.quiet
        size, notes = export(args.hf_dir, args.output, args.source, progress)
    except ExportError as e:
        print(f"error: {e}\nhint: {e.hint}", file=sys.stderr)
        return e.code
    if not args.quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{args.output}: {human(size)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
