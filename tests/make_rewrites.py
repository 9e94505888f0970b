"""Writes tests/data/golden/rewrites.json: whole rewrites by the demo model, and a hash of logits.

    runs      per run of the program: its options, and the objects that --json prints, less timings
    logits    ids, and the SHA-256 of the logits of all their rows, in which every bit of the
              arithmetic shows

The oracle is the program itself: scalar C, one thread, no drafts. Other tests check that its
results are right; this file makes sure that they are the same bytes with every SIMD level, on every
machine and in every version. It changes only with the demo model, the sampler or NUMERICS_VERSION.
Run it from anywhere, with a program that make has built: python tests/make_rewrites.py
"""

import hashlib
import json
import tempfile
from pathlib import Path

from checkpoints import ROOT
from program import DEMO, GOLDEN, dump_logits, works

POTTER, SEA = "Tell me about Harry Potter", "Write a short poem about the sea for my grandmother"
LONG = " ".join(
    json.loads(line)["prompt"]
    for line in (ROOT / "demo" / "heldout.jsonl").read_text("utf-8").splitlines()[:6]
)
RUNS = [
    ["-p", POTTER, "--greedy"],
    ["-p", POTTER, "--seed", "1"],
    ["-p", "How do I fix a leaking tap?", "--seed", "7", "-n", "2"],
    ["-p", SEA, "--seed", "4", "--mode", "aggressive"],
    ["-p", LONG, "--seed", "2", "--max-new-tokens", "24"],
]


def logits_hash(folder: Path, ids: list[int], *args, model: Path = DEMO, **env: str) -> str:
    """SHA-256 of the logits: fp32, little-endian, row by row."""
    return hashlib.sha256(
        dump_logits(folder, model, ids, "--matmul", "own", *args, **env).tobytes()
    ).hexdigest()


def main() -> None:
    """Makes the file."""
    plain = {"BPO_SIMD": "scalar"}
    options = ("-m", DEMO, "--json", "--matmul", "own", "-t", 1, "--lookup", 0)
    runs = [{"args": args, "samples": works(*options, *args, **plain).samples} for args in RUNS]
    # More than the 96 rows of one pass over the weights, and than the 128 positions of a block of
    # attention.
    ids = json.loads(works("-m", DEMO, "-p", LONG, "--tokenize").out)
    assert len(ids) > 140
    with tempfile.TemporaryDirectory() as folder:
        logits = {"ids": ids, "sha256": logits_hash(Path(folder), ids, "-t", 1, **plain)}
    text = json.dumps({"runs": runs, "logits": logits}, ensure_ascii=False, indent=1)
    (GOLDEN / "rewrites.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
