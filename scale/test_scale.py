"""scale/: many machines write, byte for byte, what one writes, even when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCALE = Path(__file__).resolve().parent
ROOT = SCALE.parent
BPO = Path(os.environ.get("BPO_BIN", ROOT / "bpo")).resolve()
OPTIONS = ["-m", str(ROOT / "demo" / "bpo-demo.bin"), "--seed", "5"]
OPTIONS += ["--max-new-tokens", "40", "--allow-errors"]
HELD_OUT = (ROOT / "demo" / "heldout.jsonl").read_bytes().splitlines()
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if not key.startswith(("BPO_", "SLURM_"))
} | {"BPO": str(BPO)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An input with every kind of line, and what a single bpo writes for it."""
    folder = tmp_path_factory.mktemp("data")
    lines = [
        b'{"prompt": "Tell me about number %d", "big": 123456789012345678901234}' % i
        for i in range(150)
    ]
    lines[::3] = HELD_OUT[:50]
    lines[7], lines[8], lines[40] = b"oops", b"", b'{"no": "prompt"}'
    lines[149] = b'{"prompt": "last", "id": null}\r'
    (folder / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n \n")
    subprocess.run(
        [BPO, *OPTIONS, "-q", "-i", folder / "in.jsonl", "-o", folder / "whole.jsonl"], check=True
    )
    whole = (folder / "whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 150 and whole.count(b'"error": ') == 3
    return folder / "in.jsonl", whole


def start_ray(source: Path, output: Path, *options: str, bpo: tuple = OPTIONS) -> subprocess.Popen:
    command = [sys.executable, SCALE / "bpo_ray.py", source, output, "--bpo", BPO]
    command = [str(argument) for argument in [*command, *options, "--", *bpo]]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def run_ray(source: Path, output: Path, *options: str, bpo: tuple = OPTIONS, code: int = 0) -> str:
    process = start_ray(source, output, *options, bpo=bpo)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == code, messages
    return messages


# ---------------------------------------------------------------------------------------------- Ray


def children_of_ray(driver: int) -> list[tuple[int, int]]:
    """The bpo processes that descend from a driver, each with the worker that started it."""
    parent, is_bpo = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rsplit(")", 1)[1]
            parent[int(folder.name)] = int(after_name.split()[1])
            if os.readlink(folder / "exe") == str(BPO):
                is_bpo.add(int(folder.name))
        except (OSError, IndexError):
            continue

    def descends(pid: int) -> bool:
        while pid in parent and pid != driver:
            pid = parent[pid]
        return pid == driver

    return [(pid, parent[pid]) for pid in sorted(is_bpo) if descends(pid)]


def test_ray_with_a_worker_and_two_filters_killed(tmp_path, data):
    source, whole = data
    process = start_ray(
        source, tmp_path / "out.jsonl", "--piece", "4", "--workers", "2", "--verbose"
    )
    seen, killed, messages = 0, 0, ""
    for line in process.stderr:
        messages += line
        seen += line.startswith("bpo_ray: ")
        if seen in (2, 6, 10) and killed < {2: 1, 6: 2, 10: 3}[seen]:
            found = children_of_ray(process.pid)
            assert found, messages
            # a filter, a whole worker, a filter
            os.kill(found[-1][0 if seen != 6 else 1], signal.SIGKILL)
            killed += 1
            assert (tmp_path / "out.jsonl").read_bytes() != whole
    assert process.wait(60) == 0, messages
    assert killed == 3
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_ray_resumes(tmp_path, data):
    source, whole = data
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:20000])  # torn
    assert "150 records, " in run_ray(source, out, "--piece", "32", "--resume")
    assert out.read_bytes() == whole
    assert "exists already" in run_ray(source, out, code=2)
    assert "150 records, 0 failed in this run" in run_ray(source, out, "--resume")
    out.write_bytes(whole[:20000])
    assert "written with another model or other options" in run_ray(
        source, out, "--resume", bpo=(*OPTIONS, "--greedy"), code=1
    )
    assert out.read_bytes() == whole[: whole.rindex(b"\n", 0, 20000) + 1]


def test_parquet(tmp_path, data):
    """The same texts whether input and output are Parquet, or only one of them is."""
    rows = [
        {"id": json.loads(line)["id"], "prompt": json.loads(line)["prompt"], "score": 0.5 * i}
        for i, line in enumerate(HELD_OUT[:60])
    ]
    rows[3]["prompt"], rows[4]["score"] = " ", float("nan")
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=25)
    run_ray(tmp_path / "in.parquet", tmp_path / "out.parquet", "--piece", "10")
    run_ray(tmp_path / "in.parquet", tmp_path / "out.jsonl", "--piece", "64")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["id", "prompt", "score", "optimized_prompt", "bpo", "error"]
    assert found.select(["id", "prompt"]).equals(table.select(["id", "prompt"]))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found["optimized_prompt"].to_pylist() == [line.get("optimized_prompt") for line in lines]
    bpo = [json.loads(text) for text in found["bpo"].to_pylist()]
    assert bpo[5:] == [line["bpo"] for line in lines[5:]]
    assert [i for i, error in enumerate(found["error"].to_pylist()) if error] == [3]
    assert lines[4]["score"] is None and lines[5]["score"] == 2.5

    source, whole = data
    run_ray(source, tmp_path / "lines.parquet", "--piece", "50")
    found = pq.read_table(tmp_path / "lines.parquet")
    names = "line id prompt record optimized_prompt bpo error".split()
    assert found.column_names == names
    assert "".join(text + "\n" for text in found["record"].to_pylist()).encode() == whole
    assert found["line"].to_pylist() == list(range(1, 151))


def test_ray_reports_what_is_wrong(tmp_path, data):
    source, _ = data
    messages = run_ray(
        source, tmp_path / "a.jsonl", bpo=["-m", "/nowhere.bin", "--seed", "1"], code=1
    )
    assert "bpo: error: " in messages and "/nowhere.bin" in messages
    assert "--shard is set by this program" in run_ray(
        source, tmp_path / "b.jsonl", bpo=[*OPTIONS, "--shard", "0/2"], code=2
    )
    assert "No such file" in run_ray(tmp_path / "none.jsonl", tmp_path / "c.jsonl", code=1)
    # some records fail, and there is no --allow-errors
    assert run_ray(source, tmp_path / "d.jsonl", bpo=OPTIONS[:-1], code=4)
    assert (tmp_path / "d.jsonl").read_bytes().count(b"\n") == 150


# --------------------------------------------------------------------- Slurm, GNU parallel, merging


def merge(prefix: Path, n: int, code: int = 0) -> bytes:
    done = subprocess.run([SCALE / "merge.sh", prefix, str(n)], capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize("n", [1, 3, 4])
def test_slurm_script(tmp_path, data, n):
    """With the variables that Slurm sets; one task is killed and requeued."""
    source, whole = data
    for shard in range(n):
        slurm = {
            "SLURM_ARRAY_TASK_ID": str(shard),
            "SLURM_ARRAY_TASK_COUNT": str(n),
            "SLURM_CPUS_PER_TASK": "1",
        }
        command = [SCALE / "slurm.sh", source, tmp_path / "part", str(n), *OPTIONS, "-q"]
        if shard == n - 1:
            process = subprocess.Popen(command, env=ENVIRONMENT | slurm)
            deadline = time.monotonic() + 20
            part = tmp_path / f"part.{shard}.jsonl"
            while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            assert process.wait() in (0, 143)
        subprocess.run(command, env=ENVIRONMENT | slurm, check=True)
    assert merge(tmp_path / "part", n) == whole


def test_slurm_script_reports_what_is_missing(tmp_path, data):
    def message(*args, **env: str) -> str:
        done = subprocess.run(
            [SCALE / "slurm.sh", *args],
            env=ENVIRONMENT | env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        return done.stderr

    assert "usage: sbatch" in message("in.jsonl")
    assert "--seed" in message("in.jsonl", "part", "2", "-m", "x", SLURM_ARRAY_TASK_ID="0")
    assert "--array=0-1" in message("in.jsonl", "part", "2", *OPTIONS)
    assert "I from 0 to N - 1" in message(
        data[0], tmp_path / "part", "2", *OPTIONS, SLURM_ARRAY_TASK_ID="2"
    )


def test_gnu_parallel(tmp_path, data):
    source, whole = data
    command = [SCALE / "parallel.sh", source, tmp_path / "a part", "3", *OPTIONS, "-q", "-t", "1"]
    subprocess.run(command, env=ENVIRONMENT | {"PARALLEL": "--jobs 2"}, check=True)
    assert merge(tmp_path / "a part", 3) == whole
    (part := tmp_path / "a part.1.jsonl").write_bytes(part.read_bytes()[:5000])
    merge(tmp_path / "a part", 3, code=1)
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert merge(tmp_path / "a part", 3) == whole


def test_merge_of_fewer_records_than_shards(tmp_path):
    for shard, text in enumerate(("", "1\n", "2\n", "")):
        (tmp_path / f"p.{shard}.jsonl").write_text(text)
    assert merge(tmp_path / "p", 4) == b"1\n2\n"
    (tmp_path / "p.3.jsonl").unlink()
    merge(tmp_path / "p", 4, code=1)
