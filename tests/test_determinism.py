"""The same seed gives the same text.

With any number of threads and samples, and with every SIMD level.
"""

import json

import numpy as np
import pytest
from checkpoints import read_header
from make_rewrites import logits_hash
from program import DEMO, GOLDEN, csv, dump_logits, simd_levels, works

MODELS = json.loads((GOLDEN / "golden.json").read_text("utf-8"))["models"]
REWRITES = json.loads((GOLDEN / "rewrites.json").read_text("utf-8"))
LEVELS = simd_levels()
SAMPLED = ("-p", "Tell me about water", "--json", "--max-new-tokens", 40, "--seed", 7)


def samples(model: str, *args, **env: str) -> list[dict]:
    """The objects of a sampled run, without their timings; args override SAMPLED."""
    return works("-m", GOLDEN / f"{model}.bin", *SAMPLED, *args, **env).samples


@pytest.mark.parametrize("matmul", ["own", "openblas"])
@pytest.mark.parametrize("mode", ["stable", "aggressive"])
def test_threads_and_repetition(mode, matmul):
    first = samples("mha", "--mode", mode, "--matmul", matmul, "-n", 3, "-t", 1)
    assert len(first) == 3
    assert samples("mha", "--mode", mode, "--matmul", matmul, "-n", 3, "-t", 1) == first
    for threads in (2, 3, 5):
        assert samples("mha", "--mode", mode, "--matmul", matmul, "-n", 3, "-t", threads) == first


@pytest.mark.parametrize("matmul", ["own", "openblas"])
@pytest.mark.parametrize("mode", ["stable", "aggressive"])
@pytest.mark.parametrize("model", ["gqa", "odd"])
def test_a_sample_is_the_same_in_any_company(model, mode, matmul):
    args = ("--mode", mode, "--matmul", matmul, "-n")
    many = samples(model, *args, 40)  # more than are decoded together
    assert [line["sample"] for line in many] == list(range(40))
    for n in (1, 2, 4):
        assert samples(model, *args, n) == many[:n]
    assert len({csv(line["tokens"]) for line in many}) > 30


def test_seeds_differ():
    texts = {
        csv(samples("mha", "--seed", seed)[0]["tokens"])
        for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**53 - 1)
    }
    assert len(texts) == 6


def test_sample_index_is_not_added_to_the_seed():
    assert samples("mha", "-n", 2)[1]["tokens"] != samples("mha", "--seed", 8)[0]["tokens"]


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 199])
def test_logits_do_not_depend_on_what_follows(tmp_path, n):
    """A row has the same bits whether it comes first, last or in the middle of a chunk."""
    for model in ("gqa", "odd"):
        ids, args = MODELS[model]["ids"], ("--matmul", "own")
        whole = dump_logits(tmp_path, GOLDEN / f"{model}.bin", ids, *args)
        part = dump_logits(tmp_path, GOLDEN / f"{model}.bin", ids[:n], *args)
        assert part.tobytes() == whole[:n].tobytes()


@pytest.mark.parametrize("model", MODELS)
def test_decoding_equals_prefill(tmp_path, model):
    """Greedy ids that were generated one by one are the best ones of the logits that are computed
    at once for the whole text."""
    ids = MODELS[model]["ids"][:50]
    tokens_of = ("-m", GOLDEN / f"{model}.bin", "--tokens")
    (line,) = works(*tokens_of, csv(ids), "--greedy", "--max-new-tokens", 40, "--json").lines
    logits = dump_logits(
        tmp_path, GOLDEN / f"{model}.bin", ids + line["tokens"][:-1], "--matmul", "own"
    )
    assert logits[len(ids) - 1 :].argmax(axis=1).tolist() == line["tokens"]


@pytest.mark.parametrize("model", MODELS)
def test_simd_levels_agree_in_every_bit(tmp_path, model):
    ids = MODELS[model]["ids"]
    file, args = GOLDEN / f"{model}.bin", ("--matmul", "own")
    best, text = dump_logits(tmp_path, file, ids, *args), samples(model, *args, "-n", 3)
    for level in LEVELS:
        assert dump_logits(tmp_path, file, ids, *args, BPO_SIMD=level).tobytes() == best.tobytes()
        assert samples(model, *args, "-n", 3, BPO_SIMD=level) == text


@pytest.mark.parametrize(
    ("level", "threads"), [("scalar", 2), *((level, n) for level in LEVELS[1:] for n in (1, 3))]
)
def test_whole_rewrites_are_the_golden_ones(tmp_path, level, threads):
    """On every CPU: make neon runs this test for 64-bit ARM. Drafting is left on."""
    options = ("-m", DEMO, "--json", "--matmul", "own", "-t", threads)
    for run in REWRITES["runs"]:
        result = works(*options, *run["args"], "--stats", BPO_SIMD=level)
        assert result.samples == run["samples"]
        assert f"cpu {level}, {threads} thread" in result.err
    assert (
        logits_hash(tmp_path, REWRITES["logits"]["ids"], "-t", threads, BPO_SIMD=level)
        == REWRITES["logits"]["sha256"]
    )


def test_whole_rewrites_would_show_a_change(tmp_path):
    """Another seed changes the samples, and the last bit of one of 3.8 million weights changes the
    logits."""
    run = REWRITES["runs"][1]
    other = works("-m", DEMO, "--json", "--matmul", "own", *run["args"], "--seed", 2).samples
    assert [line["tokens"] for line in other] != [line["tokens"] for line in run["samples"]]
    data, model = bytearray(DEMO.read_bytes()), tmp_path / "flipped.bin"
    start, _ = read_header(DEMO)["model.layers.4.mlp.down_proj.weight"]["data_offsets"]
    data[8 + int.from_bytes(data[:8], "little") + start] ^= 1
    model.write_bytes(data)
    ids, expected = REWRITES["logits"]["ids"], REWRITES["logits"]["sha256"]
    assert (
        logits_hash(tmp_path, ids, model=DEMO)
        == expected
        != logits_hash(tmp_path, ids, model=model)
    )


@pytest.mark.parametrize("matmul", ["own", "openblas"])
def test_logits_do_not_depend_on_threads(tmp_path, matmul):
    ids = MODELS["gqa"]["ids"]
    one, two, again = (
        dump_logits(tmp_path, GOLDEN / "gqa.bin", ids, "--matmul", matmul, "-t", n)
        for n in (1, 2, 2)
    )
    assert one.tobytes() == two.tobytes() == again.tobytes()


def test_openblas_and_own_are_close_but_not_the_same(tmp_path):
    """The tests above do compare two ways of computing."""
    own, openblas = (
        dump_logits(tmp_path, GOLDEN / "gqa.bin", MODELS["gqa"]["ids"], "--matmul", m)
        for m in ("own", "openblas")
    )
    assert own.tobytes() != openblas.tobytes()
    assert np.abs(own - openblas).max() < 0.1


@pytest.mark.parametrize("matmul", ["own", "openblas"])
@pytest.mark.parametrize("mode", ["stable", "aggressive"])
@pytest.mark.parametrize("n", [1, 5])
def test_lookup_changes_no_byte(mode, n, matmul):
    """The demo model's rewrites copy much of the prompt, so drafts are accepted, passes saved."""
    args = (
        "-p",
        "Tell me about the history of the city of Paris and its people",
        "--mode",
        mode,
        "-n",
        n,
        "--matmul",
        matmul,
    )
    saved = 0
    for seed in range(3):
        run = ("-m", DEMO, *args, "--json", "--seed", seed)
        plain = works(*run, "--lookup", 0)
        for lookup in (["--lookup", 1], ["--lookup", 15], []):
            drafted = works(*run, *lookup)
            assert drafted.samples == plain.samples
            saved += sum(line["timings"]["accepted"] for line in drafted.lines)
        assert all(line["timings"]["drafted"] == 0 for line in plain.lines)
    assert saved > 30
