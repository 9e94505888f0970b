"""Logits and greedy text of tiny random models against those of transformers, which
tests/make_golden.py stored."""

import json

import numpy as np
import pytest
from checkpoints import (
    NMSE_BOUND,
    ROUNDED_NMSE_BOUND,
    WORST_BOUND,
    edit_metadata,
    forward,
    llama_config,
    mutants,
    nmse,
    read_model,
    within_bounds,
    worst,
    write_model,
)
from program import GOLDEN, csv, dump_logits, works

MODELS = json.loads((GOLDEN / "golden.json").read_text("utf-8"))["models"]
MATMULS = ("own", "openblas")
LENGTHS = (1, 2, 17, 65, 130, 200)  # around the borders of chunks of 64 rows


def golden_logits(name: str, n: int = 200) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The rows among the first n that are stored, and their logits from transformers.

    In fp32, and with K and V rounded to fp16.
    """
    rows = [row for row in MODELS[name]["rows"] if row < n]
    with np.load(GOLDEN / f"{name}.npz") as file:
        return rows, file["plain"][: len(rows)], file["rounded"][: len(rows)]


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, name, n, matmul):
    rows, plain, rounded = golden_logits(name, n)
    logits = dump_logits(
        tmp_path, GOLDEN / f"{name}.bin", MODELS[name]["ids"][:n], "--matmul", matmul
    )[rows]
    assert nmse(logits, plain) <= NMSE_BOUND
    assert worst(logits, plain) <= WORST_BOUND
    assert nmse(logits, rounded) <= ROUNDED_NMSE_BOUND


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(name, matmul):
    """Every id must match.

    In the texts that make_golden.py chose, each leads the second best by far more than the engine's
    error.
    """
    for golden in MODELS[name]["greedy"]:
        ids = MODELS[name]["ids"][: golden["n"]]
        args = ("--greedy", "--json", "--max-new-tokens", 48, "--matmul", matmul)
        (line,) = works("-m", GOLDEN / f"{name}.bin", "--tokens", csv(ids), *args).lines
        assert line["tokens"] == golden["tokens"]
        assert (line["prompt_tokens"], line["new_tokens"]) == (len(ids), len(golden["tokens"]))
        assert line["stop"] == ("eos" if golden["tokens"][-1] == 2 else "length")


def test_a_greedy_text_ends_by_eos():
    assert any(golden["tokens"][-1] == 2 for model in MODELS.values() for golden in model["greedy"])


# ----------------------------------------------- the tests above can fail: models broken on purpose


@pytest.mark.parametrize("name", MODELS)
def test_models_are_lively(name):
    config, weights = read_model(GOLDEN / f"{name}.bin")
    stats: dict = {}
    logits = forward(weights, config, MODELS[name]["ids"], stats=stats)
    assert 3 <= logits.std() <= 5
    assert stats["entropy"] < 0.5  # of log n
    gains = np.concatenate([w for w in weights.values() if w.ndim == 1])
    assert np.mean(np.abs(gains - 1) > 0.1) > 0.7


@pytest.mark.parametrize("name", MODELS)
def test_mistakes_miss_the_bounds(name):
    """A forward pass with one mistake exceeds the bounds.

    By a factor of 100 if positions are wrong.
    """
    config, weights = read_model(GOLDEN / f"{name}.bin")
    rows, plain, rounded = golden_logits(name)
    right = forward(weights, config, MODELS[name]["ids"], rounded=True)[rows]
    assert within_bounds(right, plain) and nmse(right, rounded) <= ROUNDED_NMSE_BOUND
    for mistake, logits in mutants(weights, config, MODELS[name]["ids"]).items():
        factor = 100 if mistake in ("rope pairing", "kv position") else 1
        assert nmse(logits[rows], plain) > factor * NMSE_BOUND, mistake
        assert worst(logits[rows], plain) > factor * WORST_BOUND, mistake


@pytest.mark.parametrize("name", MODELS)
def test_engine_with_the_other_rope_pairing_misses(tmp_path, name):
    """The classic mistake of exports: rows of W_q and W_k permuted for the interleaved pairing."""
    config, weights = read_model(GOLDEN / f"{name}.bin")
    hd = config["head_dim"]
    for key in (key for key in weights if "q_proj" in key or "k_proj" in key):
        heads = weights[key].reshape(-1, hd, config["hidden_size"])
        weights[key] = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(
            weights[key].shape
        )
    model = write_model(tmp_path / "broken.bin", llama_config(**config), weights)
    rows, plain, _ = golden_logits(name)
    logits = dump_logits(tmp_path, model, MODELS[name]["ids"])[rows]
    assert nmse(logits, plain) > 100 * NMSE_BOUND and worst(logits, plain) > 100 * WORST_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_engine_with_another_eps_or_theta_misses(tmp_path, name):
    config, _ = read_model(GOLDEN / f"{name}.bin")
    rows, plain, _ = golden_logits(name)
    other = "1e-06" if config["rms_norm_eps"] == 1e-5 else "1e-05"
    theta = "500000.0" if config["rope_theta"] == 1e4 else "10000.0"
    for changes in ({"rms_norm_eps": other}, {"rope_theta": theta}):
        model = edit_metadata(GOLDEN / f"{name}.bin", tmp_path / "broken.bin", **changes)
        logits = dump_logits(tmp_path, model, MODELS[name]["ids"])[rows]
        assert nmse(logits, plain) > NMSE_BOUND and worst(logits, plain) > WORST_BOUND


def test_one_changed_weight_is_noticed(tmp_path):
    config, weights = read_model(GOLDEN / "mha.bin")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] *= -30
    model = write_model(tmp_path / "broken.bin", llama_config(**config), weights)
    rows, plain, _ = golden_logits("mha")
    assert not within_bounds(dump_logits(tmp_path, model, MODELS["mha"]["ids"])[rows], plain)
