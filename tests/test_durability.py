"""Data sets that are killed, out of space or without a reader.

The output has whole records, and --resume completes it byte for byte.
"""

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpoints import ROOT
from program import BPO, bpo, environment, fails, works

DEMO = ROOT / "demo" / "bpo-demo.bin"
HELD_OUT = ROOT / "demo" / "heldout.jsonl"
OPTIONS = ("-m", DEMO, "--max-new-tokens", 25, "-q")
KILLS = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An input with a bad line, and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("data")
    lines = HELD_OUT.read_bytes().splitlines(keepends=True)[:100]
    (folder / "in.jsonl").write_bytes(b"".join([*lines[:50], b"oops\n", *lines[50:]]))
    works(
        *OPTIONS,
        "-i",
        folder / "in.jsonl",
        "-o",
        folder / "whole.jsonl",
        "--seed",
        11,
        "--allow-errors",
    )
    whole = (folder / "whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 101
    return folder / "in.jsonl", whole


def completed(file: Path, out: Path, *args) -> bytes:
    works(*OPTIONS, "-i", file, "-o", out, "--resume", "--seed", 11, "--allow-errors", *args)
    return out.read_bytes()


def test_killed_200_times(tmp_path, data):
    file, whole = data
    rng = random.Random(5)
    out, kills, within, rounds = tmp_path / "out.jsonl", 0, 0, 0
    while kills < KILLS:
        options = (
            "--resume",
            "--seed",
            11,
            "--allow-errors",
            "--parallel",
            rng.choice((1, 2, 5, 16)),
            "--lookup",
            rng.choice((0, 4)),
        )
        command = [str(arg) for arg in (BPO, *OPTIONS, "-i", file, "-o", out, *options)]
        process = subprocess.Popen(command, env=environment())
        try:
            code = process.wait(rng.uniform(0.0, 0.2))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == -signal.SIGKILL:
            kills += 1
            part = out.read_bytes() if out.exists() else b""
            assert whole.startswith(part)
            within += 0 < len(part) < len(whole)
            continue
        assert code == 0 and out.read_bytes() == whole
        out.unlink()
        rounds += 1
    assert completed(file, out) == whole
    assert within >= KILLS / 2 and rounds >= 2, (
        f"{within} of {kills} kills hit a part of the file, in {rounds} rounds"
    )


def test_the_seed_is_needed_for_the_same_bytes(tmp_path, data):
    """The test above can fail: it would notice a difference."""
    file, whole = data
    works(*OPTIONS, "-i", file, "-o", tmp_path / "out.jsonl", "--seed", 12, "--allow-errors")
    other = (tmp_path / "out.jsonl").read_bytes()
    assert other != whole and other.count(b"\n") == whole.count(b"\n")


@pytest.mark.parametrize("limit", [1, 400, 1000, 20000])
def test_full_disk(tmp_path, data, limit):
    """A file that must not grow beyond a limit.

    The write that crosses it is cut short, as on a full disk.
    """
    file, whole = data
    out = tmp_path / "out.jsonl"
    command = [str(arg) for arg in (BPO, *OPTIONS, "-i", file, "-o", out, "--seed", 11)]
    limits = (limit, limit)
    done = subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert done.returncode == 1
    assert f"cannot write {out}" in done.stderr and "hint: " in done.stderr
    part = out.read_bytes() if out.exists() else b""
    assert whole.startswith(part) and len(part) <= limit and (part == b"" or part.endswith(b"\n"))
    assert (part == b"") == (not out.exists()) == (limit <= whole.index(b"\n"))
    assert completed(file, out) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_really_full_disk(tmp_path, data, small_disk):
    file, whole = data
    filler, out = small_disk / "filler", small_disk / "out.jsonl"
    filler.write_bytes(bytes(40 << 10))
    fails(1, *OPTIONS, "-i", file, "-o", out, "--seed", 11, says="No space left on device")
    part = out.read_bytes()
    assert 0 < len(part) < len(whole) and part.endswith(b"\n") and whole.startswith(part)
    filler.unlink()
    assert completed(file, out) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_device(data):
    fails(
        1,
        *OPTIONS,
        "-i",
        data[0],
        "-o",
        "/dev/full",
        says="cannot write /dev/full: No space left on device",
    )


def test_closed_pipe(data):
    file, whole = data
    command = [str(arg) for arg in (BPO, *OPTIONS, "-i", file, "--seed", 11)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == whole[: whole.index(b"\n") + 1]
    process.stdout.close()
    assert "cannot write standard output: Broken pipe" in process.stderr.read().decode()
    assert process.wait(30) == 1


def test_unwritable_places(tmp_path, data):
    (tmp_path / "plain").touch()
    for place in (tmp_path / "none" / "out.jsonl", tmp_path / "plain" / "out.jsonl", tmp_path):
        fails(1, *OPTIONS, "-i", data[0], "-o", place, says=f"cannot write {place}: ")
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        fails(1, *OPTIONS, "-i", data[0], "-o", tmp_path / "out.jsonl", says="Permission denied")
        tmp_path.chmod(0o755)


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [str(arg) for arg in (BPO, *OPTIONS, "-i", "-", "-o", out, "--seed", 11)]
    first = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    fails(2, *OPTIONS, "-i", HELD_OUT, "-o", out, "--resume", says="another process writes")
    first.communicate(json.dumps({"prompt": "x"}).encode() + b"\n")
    assert first.returncode == 0 and out.read_bytes().count(b"\n") == 1
    assert bpo(*OPTIONS, "-i", HELD_OUT, "-o", out, "--resume").code == 4  # free again
