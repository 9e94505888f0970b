"""The layout that CONTRIBUTING.md describes.

Includes point down only, and what is to be read fits a reader.
"""

import re
import subprocess

import pytest
from checkpoints import ROOT

CORE = {"base", "bpo.h", "kernels.h", "model.h", "tokenizer.h"}
# Who may include what; a folder stands for its files.
MAY_INCLUDE = {
    "base": {"base", "bpo_error.h"},
    "bpo.h": {"bpo_error.h"},
    "kernels.h": {"base", "bpo.h"},
    "cpu": {"base", "cpu", "kernels.h"},
    "kernels.cu": {"base", "kernels.h"},
    "tokenizer": {"base", "tokenizer.h"},
    "model": CORE,
    "bpo.c": CORE,
    "engine": CORE | {"engine"},
    "cli": {"base", "bpo.h", "bpo_error.h", "cli"},
}


def tracked() -> list[str]:
    """The files of the project: those that git tracks, or, in an unpacked archive, all sources."""
    try:
        names = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [name for name in names if name and (ROOT / name).exists()]


def sources() -> list[str]:
    return [
        name
        for name in tracked()
        if re.fullmatch(r"(base|cpu|engine|cli)/.*\.(c|h|cc)|[^/]*\.(c|h|cu)", name)
    ]


def room(name: str) -> str:
    """The folder of a file, or, in the root, the file.

    Model.c and model.h are one, and so is tokenizer.
    """
    folder = name.split("/")[0]
    return folder if folder in MAY_INCLUDE else name.split(".")[0]


def wrong_includes(name: str, text: str) -> list[str]:
    allowed = MAY_INCLUDE.get(name, MAY_INCLUDE.get(room(name), set()))
    included = re.findall(r'^#include "([^"]+)"', text, re.M)
    return [
        f"{name} includes {path}"
        for path in included
        if path not in allowed and path.split("/")[0] not in allowed
    ]


def long_functions(name: str, text: str, limit: int) -> list[str]:
    """Functions of more lines than the limit.

    From a line that begins in the first column and opens a body to its closing brace.
    """
    found, lines, begin = [], text.split("\n"), 0
    for number, line in enumerate(lines):
        if re.match(r"[a-z].*\(", line):
            begin = number
        if line == "}" and number - begin + 1 > limit:
            found.append(f"{name}: {lines[begin]} ({number - begin + 1} lines)")
    return found


def test_includes_point_down():
    assert len(sources()) > 40
    assert [
        wrong
        for name in sources()
        for wrong in wrong_includes(name, (ROOT / name).read_text("utf-8"))
    ] == []


def test_functions_are_short():
    names = [
        name for name in sources() if name == "bpo.c" or name.split("/")[0] in ("engine", "cli")
    ]
    assert [
        found
        for name in names
        for found in long_functions(name, (ROOT / name).read_text("utf-8"), 60)
    ] == []


def test_the_model_is_short():
    text = (ROOT / "bpo.c").read_text("utf-8")
    assert text.count("\n") < 900
    forward = re.findall(r"^(?:static )?void (?:layer|forward)\(.*?^}\n", text, re.M | re.S)
    assert len(forward) == 2 and sum(part.count("\n") for part in forward) < 50


def test_lines_are_short():
    names = [name for name in tracked() if re.search(r"\.(c|h|cc|cu)$", name)]
    long = [
        f"{name}:{i}"
        for name in names
        for i, line in enumerate((ROOT / name).read_text("utf-8").split("\n"), 1)
        if len(line) > 100
    ]
    assert long == []


def test_the_root_is_small():
    assert len({name.split("/")[0] for name in tracked() if not name.startswith(".")}) <= 30


def test_these_tests_can_fail():
    assert wrong_includes("bpo.c", '#include "engine/engine.h"\n') and wrong_includes(
        "base/text.c", '#include "model.h"\n'
    )
    assert wrong_includes("cpu/matmul.c", '#include "model.h"\n') and wrong_includes(
        "cli/main.c", '#include "engine/engine.h"\n'
    )
    body = "static int f(int a) {\n" + "    a++;\n" * 10 + "}\n"
    assert long_functions("x.c", body, 11) and not long_functions("x.c", body, 12)
