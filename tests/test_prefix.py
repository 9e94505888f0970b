"""The template's prefix in the user's cache folder.

The same bytes with and without it, and with files that are damaged.
"""

import os
import shutil
import stat
import subprocess

import pytest
from checkpoints import cached_prefix_model, edit_metadata
from program import BPO, GOLDEN, Result, bpo, csv, dump_logits, environment, works

PROMPT = ("-p", "Tell me about water", "--seed", 3, "--max-new-tokens", 8)
IGNORED = "is ignored"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cached_prefix_model(tmp_path_factory.mktemp("model") / "large.bin")


@pytest.fixture(scope="module")
def expected(model):
    """The samples without the cache, by matmul."""
    return {
        matmul: samples(works("-m", model, *PROMPT, "--json", "--matmul", matmul, "--no-cache"))
        for matmul in ("own", "openblas")
    }


def samples(result: Result) -> list[dict]:
    assert IGNORED not in result.err, result.err
    return result.samples


def kept(result: Result) -> int:
    """How many of the prompt's ids were not computed; the same number for all samples."""
    (n,) = {line["timings"]["kept"] for line in result.lines}
    return n


def rewrite(model, cache, *args, **env) -> Result:
    return works("-m", model, *PROMPT, "--json", *args, XDG_CACHE_HOME=str(cache), **env)


def files(cache) -> list:
    return sorted((cache / "bpo").iterdir()) if (cache / "bpo").exists() else []


def test_a_second_process_reads_the_file(model, expected, tmp_path):
    first, second = rewrite(model, tmp_path), rewrite(model, tmp_path)
    assert kept(first) == 0 and kept(second) > 20
    assert samples(first) == samples(second) == expected["own"]
    (file,) = files(tmp_path)
    assert (
        stat.S_IMODE(file.stat().st_mode) == 0o600
        and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    )
    assert first.err == second.err == ""


@pytest.mark.parametrize("matmul", ["own", "openblas"])
@pytest.mark.parametrize("n", [1, 4])
def test_the_same_bytes_on_any_machine(model, tmp_path, matmul, n):
    args = ("--matmul", matmul, "-n", n)
    plain = samples(rewrite(model, tmp_path, *args, "--no-cache"))
    assert files(tmp_path) == []
    for threads in (1, 2, 3):
        for level in ({}, {"BPO_SIMD": "scalar"}):
            assert samples(rewrite(model, tmp_path, *args, "-t", threads, **level)) == plain
    assert kept(rewrite(model, tmp_path, *args)) > 20
    assert len(files(tmp_path)) == 1  # one file for all


def test_other_arithmetic_has_another_file(model, expected, tmp_path):
    rewrite(model, tmp_path, "--matmul", "own")
    first = rewrite(model, tmp_path, "--matmul", "openblas")
    assert kept(first) == 0 and samples(first) == expected["openblas"]
    assert samples(rewrite(model, tmp_path, "--matmul", "openblas")) == expected["openblas"]
    assert len(files(tmp_path)) == 2


def test_no_cache_neither_writes_nor_reads(model, expected, tmp_path):
    rewrite(model, tmp_path, "--no-cache")
    assert files(tmp_path) == []
    rewrite(model, tmp_path)
    files(tmp_path)[0].write_bytes(b"damaged")
    result = rewrite(model, tmp_path, "--no-cache")
    assert kept(result) == 0 and samples(result) == expected["own"]


def test_a_toy_needs_no_file(tmp_path):
    for _ in range(2):
        assert kept(rewrite(GOLDEN / "mha.bin", tmp_path)) == 0
    assert files(tmp_path) == []


def flip(at):
    def spoil(file):
        data = bytearray(file.read_bytes())
        data[at if at >= 0 else len(data) + at] ^= 4
        file.write_bytes(data)

    return spoil


def cut(n):
    return lambda file: file.write_bytes(file.read_bytes()[:n])


def link(file):
    target = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(target)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def folder(file):
    file.unlink()
    file.mkdir()


SPOILS = {
    f"byte {at}": flip(at) for at in (0, 7, 8, 16, 24, 31, 32, 40, 56, 64, 70, 100, 200, 5000, -1)
}
SPOILS |= {f"first {n}": cut(n) for n in (0, 1, 31, 32, 50, 1000, -1)}
SPOILS |= {
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "link": link,
    "pipe": pipe,
    "folder": folder,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_what_is_not_as_it_should_be_is_ignored(model, expected, tmp_path, spoil):
    rewrite(model, tmp_path)
    (file,) = files(tmp_path)
    good = file.read_bytes()
    spoil(file)
    result = rewrite(model, tmp_path)
    assert result.err.count("\n") == 1 and file.name in result.err and IGNORED in result.err
    assert kept(result) == 0 and result.samples == expected["own"]
    if spoil is folder:  # it is not replaced
        return
    assert files(tmp_path) == [file] and not file.is_symlink()
    assert file.read_bytes() == good
    assert kept(rewrite(model, tmp_path)) > 20


def test_a_file_of_another_model_is_foreign(model, expected, tmp_path):
    other = edit_metadata(model, tmp_path / "other.bin", source="another")
    rewrite(other, tmp_path / "b")
    rewrite(model, tmp_path / "a")
    (mine,), (theirs,) = files(tmp_path / "a"), files(tmp_path / "b")
    assert mine.name != theirs.name
    shutil.copyfile(theirs, mine)
    result = rewrite(model, tmp_path / "a")
    assert "another model" in result.err and result.samples == expected["own"]


def test_eight_files_stay(model, tmp_path):
    models = [edit_metadata(model, tmp_path / f"{i}.bin", source=f"model {i}") for i in range(10)]
    names = []
    for i, each in enumerate(models):
        rewrite(each, tmp_path)
        (name,) = {file.name for file in files(tmp_path)} - set(names)
        names.append(name)
        os.utime(tmp_path / "bpo" / name, (i + 1, i + 1))
        assert len(files(tmp_path)) == min(i + 1, 8)
        if i == 7:
            assert kept(rewrite(models[0], tmp_path)) > 20  # used: no longer the oldest
    assert {file.name for file in files(tmp_path)} == {names[0], *names[3:]}
    # files of killed processes are removed too; foreign files stay
    torn = tmp_path / "bpo" / f"{names[5]}.123-4"
    note = tmp_path / "bpo" / "note"
    for file in (torn, note):
        file.write_text("x")
        os.utime(file, (1, 1))
    rewrite(models[1], tmp_path)
    assert note.exists() and not torn.exists()


def test_no_folder_is_no_news(model, expected, tmp_path):
    (tmp_path / "file").touch()
    for cache in ("/dev/null", str(tmp_path / "file"), "relative"):
        result = works("-m", model, *PROMPT, "--json", XDG_CACHE_HOME=cache, HOME="", cwd=tmp_path)
        assert result.err == "" and result.samples == expected["own"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    result = works("-m", model, *PROMPT, "--json", XDG_CACHE_HOME="", HOME=str(tmp_path))
    assert result.samples == expected["own"]
    assert len(files(tmp_path / ".cache")) + len(files(tmp_path / "Library" / "Caches")) <= 1


def test_processes_at_once(model, expected, tmp_path):
    command = [str(arg) for arg in (BPO, "-m", model, *PROMPT, "--json", "-t", 1)]
    env = environment(XDG_CACHE_HOME=str(tmp_path))
    for _ in range(3):
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
            for _ in range(6)
        ]
        for process in running:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, b"")
            assert Result(0, out, "").samples == expected["own"]
    assert len(files(tmp_path)) == 1
    assert kept(rewrite(model, tmp_path)) > 20


def test_logits_are_computed(model, tmp_path):
    """--dump-logits does not read the file."""
    rewrite(model, tmp_path)
    ids = works("-m", model, *PROMPT[:2], "--tokenize").lines[0]
    first = dump_logits(tmp_path, model, ids, XDG_CACHE_HOME=str(tmp_path))
    files(tmp_path)[0].write_bytes(b"damaged")
    assert (
        dump_logits(tmp_path, model, ids, XDG_CACHE_HOME=str(tmp_path)).tobytes() == first.tobytes()
    )


def test_ids_with_and_without_the_prefix(model, tmp_path):
    """--tokens that begin with the prefix use the file.

    The prefix alone, or another beginning, is computed.
    """
    rewrite(model, tmp_path)
    n = kept(rewrite(model, tmp_path))
    ids = works("-m", model, *PROMPT[:2], "--tokenize").lines[0]
    args = ("-m", model, "--seed", 1, "--max-new-tokens", 4, "--json")
    for given, expected_kept in (
        (ids, n),
        (ids[: n + 1], n),
        (ids[:n], 0),
        ([*ids[: n - 1], 99, 98], 0),
    ):
        cached = bpo(*args, "--tokens", csv(given), XDG_CACHE_HOME=str(tmp_path))
        assert kept(cached) == expected_kept
        assert cached.samples == works(*args, "--tokens", csv(given), "--no-cache").samples
