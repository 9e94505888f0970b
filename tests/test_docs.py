"""The documentation: pictures are current, links resolve, and numbers and texts are those of the program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import bpo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / name / "README.md" for name in ("bench", "demo", "scale"))]


def prose(page: Path) -> str:
    """A page without its code: neither fenced blocks nor code spans hold links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page, images included, whose target does not exist."""
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)\"", text)
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
    page.write_text("# A heading\n[a](page.md) [b](#a-heading) [c](nowhere.md) [d](#none) ![e](f.svg) `[g](h)` [i](https://j.k)\n")
    assert broken_links(page) == ["nowhere.md", "#none", "f.svg"]


def check_pictures(folder: Path) -> subprocess.CompletedProcess:
    """Runs picture.py --check on a folder's pictures."""
    return subprocess.run([sys.executable, folder / "picture.py", "--check"], capture_output=True, text=True, timeout=60)


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
