"""export_weights.py: what it reads, what it writes, and everything that it refuses."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import (
    ROOT,
    TOKENIZER,
    export_weights,
    llama_config,
    read_header,
    read_model,
    weight_shapes,
    write_checkpoint,
)
from safetensors import safe_open

from export_weights import ExportError, export

EXPORTER = [sys.executable, str(ROOT / "export_weights.py")]
CONFIG = llama_config(
    hidden_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=13,
    vocab_size=403,
    pad_token_id=0,
)


def random_weights(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Weights of every size and sign; no forward pass is run on them."""
    rng = np.random.default_rng(7)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in weight_shapes(config).items()
    }


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], n_bytes: int = 0
) -> None:
    """Writes a safetensors file of {name: (dtype, shape, data)}, for types that numpy lacks.

    n_bytes: the size of all data; the file ends with a hole of the rest.
    """
    header, begin = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        end = begin + len(data) if data else n_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(
            len(text).to_bytes(8, "little")
            + text
            + b"".join(data for _, _, data in tensors.values())
        )
        file.truncate(8 + len(text) + begin)


def shard(folder: Path, weights: dict[str, np.ndarray], n: int = 3) -> dict[str, str]:
    """Replaces a folder's weights by n shards with an index; returns the index's map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(index.values()):
        part = {
            name: ("F32", w.shape, w.astype(np.float32).tobytes())
            for name, w in weights.items()
            if index[name] == file
        }
        write_safetensors(folder / file, part)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return index


def files_in(folder: Path) -> list[str]:
    """Names of all files, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def weights():
    return random_weights(CONFIG)


@pytest.fixture
def folder(tmp_path, weights):
    return write_checkpoint(tmp_path / "Tiny-BPO", CONFIG, weights)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bpo.bin"


def refused(folder: Path, out: Path) -> str:
    """Exports; demands exit code 3 and that no file is left. Returns the message and the hint."""
    with pytest.raises(ExportError) as error:
        export(folder, out)
    assert error.value.code == 3
    assert files_in(out.parent) == []
    return f"{error.value}\n{error.value.hint}"


def same_weights(out: Path, expected: dict[str, np.ndarray]) -> bool:
    """Whether a bpo.bin holds these weights, rounded to fp16, bit for bit."""
    _, found = read_model(out)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[n], expected[n].astype(np.float16)) for n in found
    )


# ----------------------------------------------------------------------------------- what it writes


def test_weights_and_config(folder, out, weights):
    assert export(folder, out)[1] == []
    assert same_weights(out, weights)
    meta = read_header(out)["__metadata__"]
    expected = {
        "dim": "20",
        "ffn_dim": "13",
        "n_layers": "2",
        "n_heads": "4",
        "n_kv_heads": "2",
        "head_dim": "6",
        "vocab_size": "403",
    }
    expected |= {
        "max_positions": "2048",
        "rms_norm_eps": "1e-05",
        "rope_theta": "10000.0",
        "tie_embeddings": "false",
    }
    expected |= {
        "bos_id": "1",
        "eos_id": "2",
        "pad_id": "0",
        "newline_id": "13",
        "source": "Tiny-BPO",
        "trained_length": "512",
    }
    expected |= {
        "format": "bpo",
        "format_version": "1",
        "stable.temperature": "0.6",
        "aggressive.samples": "5",
    }
    assert {key: meta[key] for key in expected} == expected
    assert meta["template"].count("{prompt}") == 1


def test_layout(folder, out):
    """Fused matrices, the order of use, 64-byte alignment, no holes, a tokenizer of bytes."""
    export(folder, out)
    data, header = out.read_bytes(), read_header(out)
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 64 == 0 and next(iter(header)) == "__metadata__"
    at, shapes = begin, {}
    for name, entry in list(header.items())[1:]:
        assert begin + entry["data_offsets"][0] == at
        if name.startswith("pad."):
            assert not any(data[at : begin + entry["data_offsets"][1]])
        else:
            assert at % 64 == 0
            shapes[name] = entry["shape"]
        at = begin + entry["data_offsets"][1]
    assert at == len(data)
    layer = {
        "input_layernorm.weight": [20],
        "self_attn.qkv_proj.weight": [48, 20],
        "self_attn.o_proj.weight": [20, 24],
        "post_attention_layernorm.weight": [20],
        "mlp.gate_up_proj.weight": [26, 20],
        "mlp.down_proj.weight": [20, 13],
    }
    expected = {"model.embed_tokens.weight": [403, 20]}
    expected |= {
        f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()
    }
    expected |= {
        "model.norm.weight": [20],
        "lm_head.weight": [403, 20],
        "tokenizer.model": [TOKENIZER.stat().st_size],
    }
    assert list(shapes.items()) == list(expected.items())


def test_opens_with_safetensors(folder, out, weights):
    export(folder, out)
    with safe_open(out, framework="numpy") as file:
        qkv = file.get_tensor("model.layers.1.self_attn.qkv_proj.weight")
        parts = [
            weights[f"model.layers.1.self_attn.{x}_proj.weight"].astype(np.float16) for x in "qkv"
        ]
        assert np.array_equal(qkv, np.concatenate(parts))
        assert file.get_tensor("tokenizer.model").tobytes() == TOKENIZER.read_bytes()


def test_hashes(folder, out):
    export(folder, out)
    data, header = out.read_bytes(), read_header(out)
    meta, begin = header.pop("__metadata__"), 8 + int.from_bytes(data[:8], "little")
    assert next(iter(meta)) == "xxh3.header"
    zeroed = data[:begin].replace(meta["xxh3.header"].encode(), b"0" * 16, 1)
    assert meta["xxh3.header"] == f"{xxhash.xxh3_64_intdigest(zeroed):016x}"
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        digest = f"{xxhash.xxh3_64_intdigest(data[begin + first : begin + last]):016x}"
        assert meta.get(f"xxh3.{name}") == (None if name.startswith("pad.") else digest)


def test_same_bytes_again(folder, out):
    export(folder, out)
    first = out.read_bytes()
    export(folder, out)
    assert out.read_bytes() == first


def test_tied_embeddings(tmp_path, out):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = random_weights(config)
    export(write_checkpoint(tmp_path / "hf", config, weights), out)
    assert (
        same_weights(out, weights) and read_header(out)["__metadata__"]["tie_embeddings"] == "true"
    )
    assert "lm_head.weight" not in read_header(out)
    out.unlink()

    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    assert any(
        "lm_head.weight" in note
        for note in export(write_checkpoint(tmp_path / "hf", config, same), out)[1]
    )
    out.unlink()
    same["lm_head.weight"][5, 5] += 1
    assert "extra: lm_head.weight, found [403, 20]" in refused(
        write_checkpoint(tmp_path / "hf", config, same), out
    )


def test_harmless_extra_is_ignored_and_said(tmp_path, out, weights):
    extra = weights | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)
    }
    assert any(
        "ignored 2 tensors *.rotary_emb.inv_freq" in n
        for n in export(write_checkpoint(tmp_path / "hf", CONFIG, extra), out)[1]
    )
    assert same_weights(out, weights)


def test_source_name(tmp_path, folder, out):
    export(folder, out, source="a\nb\0c é")
    assert read_header(out)["__metadata__"]["source"] == "a?b?c é"
    cache = tmp_path / "models--THUDM--BPO" / "snapshots" / "0123abcd"
    shutil.copytree(folder, cache)
    export(cache, out)
    assert read_header(out)["__metadata__"]["source"] == "THUDM/BPO"


# ------------------------------------------------------------------------------------ what it reads


def test_fp16_source(tmp_path, out):
    weights = random_weights(CONFIG, np.float16)
    export(write_checkpoint(tmp_path / "hf", CONFIG, weights), out)
    assert same_weights(out, weights)


def test_bf16_source(folder, out, weights):
    raw = {name: (w.view(np.uint32) >> 16).astype(np.uint16) for name, w in weights.items()}
    write_safetensors(
        folder / "model.safetensors",
        {name: ("BF16", bits.shape, bits.tobytes()) for name, bits in raw.items()},
    )
    export(folder, out)
    assert same_weights(
        out, {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in raw.items()}
    )


@pytest.mark.parametrize("block", [1, 7, 64])
def test_any_block_size(folder, out, weights, monkeypatch, block):
    monkeypatch.setattr(export_weights, "BLOCK", block)
    export(folder, out)
    assert same_weights(out, weights)


def test_sharded(folder, out, weights):
    shard(folder, weights)
    export(folder, out)
    assert same_weights(out, weights)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "rope_theta": None,
                "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            },
            {"rope_theta": "500000.0"},
        ),
        ({"rope_theta": None}, {"rope_theta": "10000.0"}),
        ({"rope_theta": 1000000}, {"rope_theta": "1000000.0"}),
        ({"rms_norm_eps": 1e-6, "rope_scaling": None}, {"rms_norm_eps": "1e-06"}),
        (
            {"max_position_embeddings": 4096, "pad_token_id": None},
            {"max_positions": "4096", "pad_id": "-1"},
        ),
        ({"eos_token_id": [2], "pad_token_id": -1}, {"eos_id": "2", "pad_id": "-1"}),
        ({"eos_token_id": 401}, {"eos_id": "401"}),
    ],
)
def test_config_variants(tmp_path, out, weights, changes, expected):
    export(write_checkpoint(tmp_path / "hf", CONFIG | changes, weights), out)
    assert read_header(out)["__metadata__"].items() >= expected.items()


def test_key_value_heads_default_to_heads(tmp_path, out):
    config = llama_config(hidden_size=16, intermediate_size=8, num_hidden_layers=1)
    weights = random_weights(config)
    del config["num_key_value_heads"], config["rope_theta"]
    export(write_checkpoint(tmp_path / "hf", config, weights), out)
    meta = read_header(out)["__metadata__"]
    assert (meta["n_kv_heads"], meta["head_dim"]) == ("4", "4")


def test_tokenizer_without_newline_piece(tmp_path, folder, out):
    spm = pytest.importorskip("sentencepiece")
    options = {"vocab_size": 20, "model_type": "bpe", "minloglevel": 2, "hard_vocab_limit": False}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_prefix=str(tmp_path / "plain"), **options
    )
    shutil.copyfile(tmp_path / "plain.model", folder / "tokenizer.model")
    export(folder, out)
    assert read_header(out)["__metadata__"]["newline_id"] == "-1"


# ----------------------------------------------------------------------------------- pickled shards


@pytest.fixture
def torch():
    return pytest.importorskip(
        "torch",
        reason="no torch (make parity installs it), so pickled checkpoints are not tested",
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pickled(folder, out, weights, torch, dtype):
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(w).to(getattr(torch, dtype)) for name, w in weights.items()}
    torch.save(state, folder / "pytorch_model.bin")
    export(folder, out)
    assert same_weights(out, {name: t.float().numpy() for name, t in state.items()})


def test_pickled_shards(folder, out, weights, torch):
    (folder / "model.safetensors").unlink()
    index = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(index.values()):
        torch.save(
            {
                name: torch.from_numpy(w).half()
                for name, w in weights.items()
                if index[name] == file
            },
            folder / file,
        )
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    export(folder, out)
    assert same_weights(out, weights)


def test_pickle_cannot_run_code(folder, out, tmp_path, torch):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack()}, folder / "pytorch_model.bin")
    refused(folder, out)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    refused(folder, out)
    assert not (tmp_path / "attacked").exists()


def test_old_pickle_format(folder, out, torch):
    (folder / "model.safetensors").unlink()
    torch.save(
        {"x": torch.zeros(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    assert "before 1.6" in refused(folder, out)


def test_pickled_non_tensor(folder, out, torch):
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    assert "other than a dictionary of tensors" in refused(folder, out)


def test_pickled_without_torch(folder, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(folder, out)
    assert "needs torch, which is not installed" in message and "pip install torch" in message


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            'architectures is ["MistralForCausalLM"]; only ["LlamaForCausalLM"] is supported',
        ),
        ({"architectures": None}, "architectures is null"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is supported'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is"),
        ({"rope_scaling": "yarn"}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_theta": 500000.0}}, "rope_theta is both 10000 and 500000"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a number"),
        ({"head_dim": 5}, "the head size is 5; rotary embeddings need an even number"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; expected an integer from 1"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
            "not a multiple of num_attention_heads 3",
        ),
        ({"hidden_size": 20.0}, "hidden_size is 20.0; expected an integer"),
        ({"hidden_size": True}, "hidden_size is true; expected an integer"),
        ({"hidden_size": -20}, "hidden_size is -20"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ({"vocab_size": "403"}, 'vocab_size is "403"'),
        ({"rms_norm_eps": None}, "config.json has no rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
        ({"intermediate_size": None}, "config.json has no intermediate_size"),
        ({"bos_token_id": None}, "config.json has no bos_token_id"),
        ({"eos_token_id": [2, 3]}, "eos_token_id is [2, 3]; expected an integer"),
        ({"eos_token_id": 403}, "eos_token_id is 403; expected an integer from 0 to 402"),
        ({"eos_token_id": 300}, "eos_token_id is 300, which is the ordinary piece"),
        ({"pad_token_id": -2}, "pad_token_id is -2"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2"),
        ({"vocab_size": 399}, "has 400 pieces; config.json has vocab_size 399"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_configs(tmp_path, out, weights, changes, expected):
    assert expected in refused(write_checkpoint(tmp_path / "hf", CONFIG | changes, weights), out)


def test_all_wrong_tensors_are_listed(folder, tmp_path, out, weights):
    wrong = dict(weights)
    del wrong["model.norm.weight"], wrong["model.layers.0.self_attn.k_proj.weight"]
    wrong["model.layers.1.mlp.up_proj.weight"] = np.zeros((13, 21), np.float32)
    wrong["model.layers.1.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    wrong["model.layers.2.mlp.up_proj.weight"] = np.zeros((13, 20), np.float32)
    wrong["lm_head.weight"] = np.zeros((403, 20), np.int32)
    message = refused(write_checkpoint(tmp_path / "hf", CONFIG, wrong), out)
    for line in (
        "missing: model.norm.weight, expected [20]",
        "missing: model.layers.0.self_attn.k_proj.weight, expected [12, 20]",
        "shape: model.layers.1.mlp.up_proj.weight, expected [13, 20], found [13, 21]",
        "extra: model.layers.1.self_attn.q_proj.bias, found [24]",
        "extra: model.layers.2.mlp.up_proj.weight, found [13, 20]",
        "type: lm_head.weight, expected F32, F16 or BF16, found I32",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("value", "why"),
    [(65520.0, "overflows fp16"), (-1e30, "overflows"), (np.nan, "finite"), (np.inf, "finite")],
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_value_that_fp16_cannot_hold(tmp_path, out, weights, name, value, why):
    weights[name].flat[-1] = value
    message = refused(write_checkpoint(tmp_path / "hf", CONFIG, weights), out)
    assert name in message and f"{value:g}" in message and why in message


def test_largest_fp16_value_is_fine(tmp_path, out, weights):
    weights["model.norm.weight"][0] = 65519.0  # rounds to 65504
    export(write_checkpoint(tmp_path / "hf", CONFIG, weights), out)
    assert read_model(out)[1]["model.norm.weight"][0] == 65504


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", None, "No such file"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"\xff{}", "is not JSON"),
        ("config.json", b"[]", "not a JSON object"),
        ("tokenizer.model", None, "No such file"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        (
            "tokenizer.model",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is not a SentencePiece model",
        ),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors"),
    ],
)
def test_broken_files(folder, out, file, content, expected):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert expected in refused(folder, out)


def test_truncated_safetensors(folder, out):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)
    assert "is it complete?" in refused(folder, out)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/a.safetensors",
        "..",
        "config.json",
        "",
        3,
    ],
)
def test_index_cannot_leave_the_folder(folder, out, weights, name):
    index = shard(folder, weights)
    shutil.copyfile(
        folder / "model-00001-of-00003.safetensors", folder.parent / "secret.safetensors"
    )
    index["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "expected the plain name" in refused(folder, out)


def test_wrong_index(folder, out, weights):
    index, path = shard(folder, weights), folder / "model.safetensors.index.json"
    path.write_text(
        json.dumps(
            {"weight_map": index | {"model.norm.weight": "model-00004-of-00004.safetensors"}}
        )
    )
    assert "missing files: model-00004-of-00004.safetensors" in refused(folder, out)
    other = next(file for file in index.values() if file != index["model.norm.weight"])
    path.write_text(json.dumps({"weight_map": index | {"model.norm.weight": other}}))
    assert f"says that model.norm.weight is in {other}, but it is not" in refused(folder, out)
    shutil.copyfile(folder / other, folder / "again.safetensors")
    path.write_text(json.dumps({"weight_map": index | {"x": "again.safetensors"}}))
    assert "and again in" in refused(folder, out)
    for text in ("[]", "{", '{"weight_map": []}'):
        path.write_text(text)
        assert "is not an index of weights" in refused(folder, out)


# --------------------------------------------------------- the command line, disks and interruption


def run(*args) -> subprocess.CompletedProcess:
    """Runs the exporter as a user would."""
    return subprocess.run([*EXPORTER, *map(str, args)], capture_output=True, text=True, timeout=60)


def test_command_line(folder, out):
    done = run(folder, "-o", out, "--source", "a name")
    assert (
        (done.returncode, done.stdout) == (0, "")
        and "bpo.bin: 0.1 MB" in done.stderr
        and "\r" not in done.stderr
    )
    assert read_header(out)["__metadata__"]["source"] == "a name"
    assert files_in(out.parent) == ["bpo.bin"]
    done = run(folder, "-o", out, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_usage_errors(folder, out):
    for args in (
        [],
        [folder],
        [folder, "-o"],
        [folder, "-o", out, "--what"],
        [folder, "-o", "/dev/null"],
        [folder, "-o", out.parent],
    ):
        done = run(*args)
        assert done.returncode == 2 and "error: " in done.stderr, args
    assert Path("/dev/null").is_char_device()


def test_bad_checkpoint_is_exit_3_with_a_hint(tmp_path, out):
    done = run(tmp_path / "nowhere", "-o", out)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "\nhint: HF_DIR is the folder" in done.stderr


def test_does_not_overwrite_the_checkpoint(folder):
    before = (folder / "model.safetensors").read_bytes()
    (folder / "link").symlink_to("model.safetensors")
    for name in ("model.safetensors", "link", "config.json", "tokenizer.model"):
        with pytest.raises(ExportError) as error:
            export(folder, folder / name)
        assert error.value.code == 2
    assert (folder / "model.safetensors").read_bytes() == before


def test_output_through_a_link(folder, out):
    out.symlink_to("real.bin")
    export(folder, out)
    assert out.is_symlink() and not (out.parent / "real.bin").is_symlink()


def test_output_follows_umask(folder, out):
    before = os.umask(0o027)
    try:
        export(folder, out)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o640


def test_failure_keeps_the_old_output(folder, out, weights):
    out.write_bytes(b"old")
    weights["lm_head.weight"][-1, -1] = np.inf
    write_checkpoint(folder, CONFIG, weights)
    with pytest.raises(ExportError):
        export(folder, out)
    assert out.read_bytes() == b"old" and files_in(out.parent) == ["bpo.bin"]


def test_disk_too_small(folder, out, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5, 5))
    with pytest.raises(ExportError, match=r"needs 0\.1 MB; 0\.0 MB are free") as error:
        export(folder, out)
    assert error.value.code == 1 and files_in(out.parent) == []


def test_disk_gets_full(folder, out, monkeypatch):
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ExportError, match="No space left on device") as error:
        export(folder, out)
    assert error.value.code == 1 and files_in(out.parent) == []


def test_write_fails_half_way(folder, out):
    """A limit on file sizes makes a write in the middle fail."""
    script = 'ulimit -f 50; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "-", *EXPORTER, folder, "-o", out],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "error: " in done.stderr and "hint: " in done.stderr
    assert files_in(out.parent) == []


def test_output_folder_missing_or_not_writable(folder, tmp_path):
    done = run(folder, "-o", tmp_path / "nowhere" / "bpo.bin")
    assert done.returncode == 1 and "is not a folder" in done.stderr
    if Path("/proc/self").is_dir():  # even root cannot write there
        done = run(folder, "-o", "/proc/bpo.bin")
        assert done.returncode == 1 and "error: " in done.stderr


def large_checkpoint(folder: Path, n_rows: int) -> Path:
    """A tied checkpoint whose fp32 embedding, n_rows x 1024 zeros, is a hole in the file and takes
    no space."""
    config = llama_config(
        hidden_size=1024,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=n_rows,
        head_dim=2,
        tie_word_embeddings=True,
    )
    shapes = weight_shapes(config)
    write_checkpoint(folder, config, {})
    tensors = {
        name: ("F32", shape, bytes(4 * int(np.prod(shape))))
        for name, shape in shapes.items()
        if "embed" not in name
    }
    n_bytes = sum(len(data) for _, _, data in tensors.values()) + 4 * 1024 * n_rows
    tensors["model.embed_tokens.weight"] = ("F32", shapes["model.embed_tokens.weight"], b"")
    write_safetensors(folder / "model.safetensors", tensors, n_bytes)
    return folder


def test_memory_is_bounded(tmp_path, out):
    """A tensor of 320 MB is converted in blocks.

    Peak memory, with Python and its packages, is less than half of that.
    """
    large_checkpoint(tmp_path / "large", 80_000)
    # a process's peak includes the memory of its parent at the fork, so the parent must be small
    script = (
        "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True);"
        " print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"
    )
    args = [sys.executable, "-c", script, *EXPORTER, tmp_path / "large", "-o", out, "-q"]
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=60)
    size = out.stat().st_size
    out.unlink()  # pytest keeps temporary folders for a while
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert size > 160e6
    assert 10e6 < peak < 160e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(tmp_path, out, signum, code):
    large_checkpoint(tmp_path / "large", 500_000)
    process = subprocess.Popen([*EXPORTER, tmp_path / "large", "-o", out], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not files_in(out.parent) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signum)
    assert process.wait(30) == code and b"Traceback" not in process.stderr.read()
    assert files_in(out.parent) == []
