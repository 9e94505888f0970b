"""The documentation.

Pictures are current, links resolve, and numbers and texts are those of the program.
"""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import bpo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("bench", "demo", "scale")),
]


def prose(page: Path) -> str:
    """A page without its code: neither fenced blocks nor code spans hold links."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    )


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page, images included, whose target does not exist."""
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"\b(?:src|srcset|href)=\"([^\"]+)\"", text
    )
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](page.md) [b](#a-heading) [c](nowhere.md) [d](#none) ![e](f.svg) `[g](h)` [i](https://j.k)\n"
    )
    assert broken_links(page) == ["nowhere.md", "#none", "f.svg"]


def check_pictures(folder: Path) -> subprocess.CompletedProcess:
    """Runs picture.py --check on a folder's pictures."""
    return subprocess.run(
        [sys.executable, folder / "picture.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_pictures_are_current():
    done = check_pictures(ROOT / "docs")
    assert (done.returncode, done.stderr) == (0, "")


def test_stale_picture_is_found(tmp_path):
    for path in [ROOT / "docs" / "picture.py", *(ROOT / "docs").glob("*.svg")]:
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    with (tmp_path / "layer.svg").open("a") as file:
        file.write("<!-- edited by hand -->\n")
    done = check_pictures(tmp_path)
    assert done.returncode == 1 and "layer.svg is not current" in done.stderr


# ---------------------------------------------------------------------------- docs/how-bpo-works.md

HOW = (ROOT / "docs" / "how-bpo-works.md").read_text("utf-8")
PROMPT = "Tell me about Harry Potter"


def ids_of(prompt: str) -> list[int]:
    """The ids of a templated prompt."""
    return json.loads(bpo("--demo", "-p", prompt, "--tokenize").out)


def test_ids_of_the_walk():
    ids, other = ids_of(PROMPT), ids_of("1")
    shared = next(i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    assert f"{len(ids)} ids:" in HOW and f"The first {shared} ids are the same" in HOW


def test_logits_of_the_walk(tmp_path):
    assert bpo("--demo", "-p", PROMPT, "--dump-logits", tmp_path / "logits.npy").code == 0
    logits = np.load(tmp_path / "logits.npy")[-1].astype(float)
    best = np.argsort(-logits)[:50]
    mass = np.exp((logits[best] - logits[best[0]]) / 0.6)
    rows = re.findall(r"^\| (\d+) \| `.` \| ([\d.]+) \| ([\d.]+) \|$", HOW, flags=re.M)
    assert len(rows) == 4
    for (id_, logit, probability), i, m in zip(rows, best, mass / mass.sum(), strict=False):
        assert (int(id_), logit, probability) == (i, f"{logits[i]:.2f}", f"{m:.3f}")


@pytest.mark.parametrize(("seed", "start"), [(1, "Give me a clear overview"), (2, "Tell me about")])
def test_draws_of_the_walk(seed, start):
    assert bpo("--demo", "-p", PROMPT, "--seed", seed).out.decode().startswith(start)


def quotes(text: str) -> list[list[str]]:
    """The code that a page quotes from C.

    The lines of each block, without indentation and blank lines.
    """
    blocks = re.findall(r"^```c\n(.*?)^```$", text, flags=re.M | re.S)
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]


def is_quoted(lines: list[str], source: str) -> bool:
    """Whether these lines follow one another in a source file."""
    whole = [line.strip() for line in source.splitlines() if line.strip()]
    return any(whole[i : i + len(lines)] == lines for i in range(len(whole)))


def test_quoted_code_is_that_of_bpo_c():
    source = (ROOT / "bpo.c").read_text("utf-8")
    found = quotes(HOW)
    assert len(found) >= 4
    for lines in found:
        assert is_quoted(lines, source), "\n".join(lines)
        assert not is_quoted(["changed", *lines[1:]], source)


# ---------------------------------------------------------------------------- docs/model-file.md


def exporter_keys() -> set[str]:
    """The metadata keys that export_weights.py writes, without the hashes."""
    spec = importlib.util.spec_from_file_location("export_weights", ROOT / "export_weights.py")
    export = importlib.util.module_from_spec(spec)
    sys.modules["export_weights"] = export  # dataclasses look their module up
    spec.loader.exec_module(export)
    fields = {field.name: 1 for field in dataclasses.fields(export.Config)}
    return set(export.describe(export.Config(**fields), "a model", 13))


def test_model_file_page_names_every_key_and_tensor():
    page = (ROOT / "docs" / "model-file.md").read_text("utf-8")
    data = (ROOT / "demo" / "bpo-demo.bin").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    keys = {
        "xxh3.NAME" if re.match(r"xxh3\.(?!header$)", key) else key
        for key in header["__metadata__"]
    }
    names = {re.sub(r"\.\d+\.", ".I.", name) for name in header} - {"__metadata__"}
    assert {"xxh3.NAME", "xxh3.header", "format_version", "stable.samples"} <= keys
    assert "model.layers.I.mlp.down_proj.weight" in names
    words = keys | exporter_keys() | names | {"lm_head.weight", "pad.I"}
    missing = [word for word in sorted(words) if f"`{word}`" not in page]
    assert missing == []
