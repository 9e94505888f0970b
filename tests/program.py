"""Runs the program under test: ./bpo, or what BPO_BIN names.

Through BPO_EMULATOR, if it is for another CPU.
"""

import json
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ROOT, TESTS

BPO = Path(os.environ.get("BPO_BIN", ROOT / "bpo")).resolve()
EMULATOR = shlex.split(os.environ.get("BPO_EMULATOR", ""))
GOLDEN = TESTS / "data" / "golden"
DEMO = ROOT / "demo" / "bpo-demo.bin"


def simd_levels() -> list[str]:
    """The levels that the program must offer here, scalar C first, by the system's word on the CPU.

    An emulated CPU is a 64-bit ARM.
    """
    if EMULATOR or platform.machine() in ("aarch64", "arm64"):
        return ["scalar", "neon"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.exists() else set()
    has_avx2 = flags >= {"avx2", "fma", "f16c"}
    has_avx512 = has_avx2 and flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    return ["scalar"] + ["avx2"] * has_avx2 + ["avx512"] * has_avx512


def environment(**changes: str) -> dict[str, str]:
    """The environment, less what would change the program's behaviour.

    No GPU, and no files in the user's cache folder.
    """
    ours = ("BPO_MODEL", "BPO_SIMD", "BPO_FORCE_TOKENS", "BPO_FORCE_FIELD", "NO_COLOR")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    return clean | {"XDG_CACHE_HOME": "/dev/null", "BPO_CUDA_SO": "none"} | changes


@dataclass
class Result:
    """The result of a run of the program."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[dict]:
        """The objects that --json printed, one per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def samples(self) -> list[dict]:
        """The same without what differs from run to run."""
        return [
            {key: value for key, value in line.items() if key != "timings"} for line in self.lines
        ]


def bpo(*args, stdin: bytes = b"", cwd: Path = TESTS, program: Path = BPO, **env: str) -> Result:
    """Runs the program to its end; keywords are environment variables."""
    if not program.exists():
        pytest.fail(f"{program} does not exist: run make first", pytrace=False)
    command = [*EMULATOR, *(str(arg) for arg in (program, *args))]
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**env),
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


def works(*args, **kwargs) -> Result:
    """Runs the program and demands success."""
    result = bpo(*args, **kwargs)
    assert result.code == 0, result.err
    return result


def fails(code: int, *args, says: str = "", **kwargs) -> Result:
    """Runs the program and demands this exit code, one error with a hint on stderr, and nothing on
    stdout."""
    result = bpo(*args, **kwargs)
    assert result.code == code, f"exit code {result.code}, expected {code}: {result.err}"
    assert result.out == b""
    assert result.err.count("bpo: error: ") == 1 and result.err.count("bpo: hint: ") == 1, (
        result.err
    )
    assert says in result.err, result.err
    return result


def csv(ids) -> str:
    """Ids in the format of --tokens."""
    return ",".join(map(str, ids))


def dump_logits(folder: Path, model: Path, ids, *args, **env: str) -> np.ndarray:
    """The program's logits [n][V] of a whole input of n ids."""
    file = folder / "logits.npy"
    result = works("-m", model, "--tokens", csv(ids), "--dump-logits", file, "-q", *args, **env)
    assert (result.out, result.err) == (b"", "")
    logits = np.load(file)
    assert logits.dtype == np.float32 and logits.shape[0] == len(ids)
    return logits
