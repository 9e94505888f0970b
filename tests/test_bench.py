"""The whole benchmark harness on a tiny model, with bpo alone. Its numbers must be consistent.

They need not be good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ROOT
from program import BPO

BENCH, BUILD = ROOT / "bench", ROOT / "build" / "bench"
sys.path.insert(0, str(BENCH))

import make_model  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

OPTIONS = (
    "--shape tiny --engines bpo --threads 2 --repeats 2 --fresh 1 --cold 1 --replay-pairs 4 "
    "--pairs 3 --rounds 1 --demo 2 --tokens 4"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """A result file of a short run."""
    for program in ("bpo_worker", "kernels_bench"):
        if not (BUILD / program).exists():
            pytest.fail(f"{BUILD / program} does not exist: run make test", pytrace=False)
    folder = tmp_path_factory.mktemp("bench")
    output = folder / "tiny.json"
    command = [
        sys.executable,
        BENCH / "run.py",
        *OPTIONS.split(),
        "--bpo",
        BPO,
        "--folder",
        folder,
        "-o",
        output,
    ]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text("utf-8"))
    result["stdout"] = done.stdout
    return result


def test_every_row_was_measured(result):
    figures = result["figures"]
    for row in report.ROWS:
        assert figures[row.name]["bpo"], row.name
        assert all(value > 0 for value in report.Result(result).values(row, "bpo"))
    repeats = ("decode at 2000", "prefill 48", "prefill 512", "rewrite", "5 samples")
    turns = ("decode", "rows", "one row beside", "read_gb_s", "fma_gflop_s", "round_trip_ns")
    assert all(len(figures[row]["bpo"]) == 2 for row in repeats)
    assert all(len(figures[row]["bpo"]) == 2 * result["settings"]["turns"] == 6 for row in turns)
    assert (
        result["machine"]["cores"] >= 1
        and result["commit"]
        and result["engines"]["bpo"]["settings"]["threads"] == 2
    )


def test_counts_of_whole_rewrites_are_consistent(result):
    for row in ("rewrite", "replay"):
        plain, drafted = (result["figures"][row][way][0] for way in ("bpo, no drafts", "bpo"))
        assert (
            plain["passes"] == plain["tokens"] == drafted["tokens"] == 27
        )  # one pass a token, the first one the prompt's
        # means
        assert drafted["passes"] == pytest.approx(plain["passes"] - drafted["accepted"], rel=1e-9)
        assert 0 < drafted["accepted"] <= drafted["drafted"]
        assert 0 < plain["prefill_s"] < plain["s"]
    for figure in result["figures"]["fresh, warm"]["bpo"]:
        assert figure["s"] == pytest.approx(
            figure["open_s"] + figure["prefill_s"] + figure["decode_s"]
        )


def test_kernels_are_measured_with_their_limits(result):
    kernels = result["kernels"]
    assert len(kernels["read_gb_s"]) >= 4 and kernels["best_read"] in kernels["read_gb_s"]
    assert kernels["pass_bytes"] == result["shape"]["pass_bytes"]
    decode = [
        case["rows"]
        for case in kernels["steps"]
        if case["kind"] == "decode" and case["position"] == 64
    ]
    assert decode == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    one = next(case for case in kernels["steps"] if case["rows"] == 1)
    assert one["cost"]["median"] == one["step_cost"]["median"] == 1
    for case in kernels["steps"]:
        # one round
        assert sum(op["median"] for op in case["op_s"].values()) == pytest.approx(
            case["step_s"]["median"], rel=1e-3
        )


def test_table_and_bounds(result):
    bounds = report.bounds(report.Result(result))
    without = [bound.title for bound in bounds if bound.found is None]
    assert without and all(
        "llama.cpp" in title or "template" in title or "transformers" in title for title in without
    )
    assert all(bound.title in result["stdout"] for bound in bounds)
    high, low = (
        report.Bound("a speed-up", report.Spread(1.5, 1, 2, 3), 1.4, 1.6),
        report.Bound("a cost", report.Spread(1.5, 1, 2, 3), 1.6, 1.4, upper=True),
    )
    for bound in (high, low):
        assert (bound.reached(bound.must), bound.reached(bound.goal)) == (True, False)


def test_a_ratio_is_taken_repeat_by_repeat():
    figures = {
        "decode": {
            "bpo": [10.0, 40.0, 30.0],
            "llama.cpp": [5.0, 20.0, 10.0],
            "llama.cpp no-fa": [4.0, 4.0, 4.0],
        }
    }
    result, row = report.Result({"figures": figures}), report.row_of("decode")
    assert result.best(row, report.LLAMA) == "llama.cpp"
    assert result.speed_up(row, "bpo", "llama.cpp").median == 2.0
    slow = report.row_of("rewrite")
    figures["rewrite"] = {
        "bpo": [{"s": 2.0, "each": [1.0, 3.0]}],
        "llama.cpp": [{"s": 3.0, "each": [3.0]}],
    }
    # of the only text that both rewrote
    assert result.speed_up(slow, "bpo", "llama.cpp").median == 3.0


def test_made_up_pairs_have_the_median_counts():
    for pair in run.made_up_pairs(3, 32000):
        assert (pair.n_prompt, len(pair.forced)) == run.MEDIAN_COUNTS
        assert len(pair.ids) == run.N_PREFIX + run.MEDIAN_COUNTS[0] + 4
        assert pair.forced[-1] == 2 and 2 not in pair.forced[:-1]


def test_rope_rows_for_llama_cpp():
    """llama.cpp rotates neighbours.

    Its row 2i is the checkpoint's i, its row 2i + 1 the checkpoint's i + hd/2.
    """
    hd, n_heads = 6, 2
    weight = np.arange(hd * n_heads)[:, None] * np.ones((1, 3))
    rows = make_model.pair_neighbours(weight, n_heads)[:, 0]
    assert rows.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_evicting_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    run.read_all([path])
    assert run.resident_share(path) == 1.0
    left = run.evict([path])
    if left > 0.02:
        pytest.skip(f"this file system keeps {100 * left:.0f} % in memory")
    run.read_all([path])
    assert run.resident_share(path) == 1.0
