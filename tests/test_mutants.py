"""The mutants of the GPU kernels still apply to kernels.cu (make mutants runs them)."""

import subprocess
import sys

from checkpoints import ROOT


def test_every_mutant_applies():
    command = [sys.executable, ROOT / "tests" / "mutants" / "mutants.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
