"""Data sets.

Records and errors, members that keep their bytes, resume, shards, seeds, progress, interruption.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from checkpoints import ROOT, chain_model, lively_weights, llama_config, write_model
from program import BPO, GOLDEN, bpo, environment, fails, works
from test_cli import letters, open_terminal, read_terminal, says

MHA, GQA, ODD = (GOLDEN / f"{name}.bin" for name in ("mha", "gqa", "odd"))
DEMO = ROOT / "demo" / "bpo-demo.bin"
PROMPTS = [
    "Tell me about water",
    "x",
    "How do I fix a leaking tap?",
    "naïve 😀",
    "a b c d e f g h i j k l m n o p",
    "Write a poem",
]
SHORT = ("--max-new-tokens", 12, "--seed", 3, "-q")


def write(path: Path, lines) -> Path:
    """Writes a file of lines: bytes unchanged, other values as JSON."""
    path.write_bytes(
        b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        )
    )
    return path


def records(n: int) -> list[dict]:
    return [{"id": f"r{i}", "prompt": f"{PROMPTS[i % len(PROMPTS)]} {i}"} for i in range(n)]


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    """A model that always generates "abc"."""
    return chain_model(tmp_path_factory.mktemp("models") / "abc.bin", says(letters("abc")))


def endless_model(folder: Path) -> Path:
    """A model that generates "abcabcabc..."."""
    return chain_model(folder / "endless.bin", says(letters("abc"), end=letters("a")[0]))


@pytest.fixture
def run(tmp_path, abc):
    """Runs a data set of these lines; returns the output's lines as bytes."""

    def run(lines, *args, model: Path = abc, code: int = 0, **env: str) -> list[bytes]:
        output = tmp_path / "run.jsonl"
        output.unlink(missing_ok=True)
        result = bpo(
            "-m", model, "-i", write(tmp_path / "in.jsonl", lines), "-o", output, *args, **env
        )
        assert result.code == code, result.err
        assert result.out == b""
        data = output.read_bytes()
        assert data == b"" or data.endswith(b"\n")
        return data.splitlines(keepends=False) if b"\r" not in data else data.split(b"\n")[:-1]

    return run


def error_of(line: bytes) -> tuple[int, str]:
    """The line number and the reason of an error record."""
    record = json.loads(line)
    assert set(record) - {"id"} == {"line", "error", "bpo"} and set(record["bpo"]) == {
        "input",
        "run",
        "run_seed",
    }
    return record["line"], record["error"]


# -------------------------------------------------------------------------------------- the records


def test_record(run):
    (line,) = run([{"id": 7, "prompt": "x", "more": [1, 2]}], "--seed", 5)
    assert line.startswith(
        b'{"id": 7, "prompt": "x", "more": [1, 2], "optimized_prompt": "abc", "bpo": {"seed": '
    )
    record = json.loads(line)
    meta = record["bpo"]
    assert list(meta) == [
        "seed",
        "prompt_tokens",
        "new_tokens",
        "stop",
        "unchanged",
        "run",
        "run_seed",
    ]
    assert (meta["new_tokens"], meta["stop"], meta["unchanged"], meta["run_seed"]) == (
        4,
        "eos",
        False,
        5,
    )
    assert 0 <= meta["seed"] < 2**53 and re.fullmatch("[0-9a-f]{16}", meta["run"])
    assert record["optimized_prompt"] == "abc"


def test_samples_are_lists(run):
    (line,) = run([{"prompt": "x"}], "-n", 3, *SHORT, "--temperature", 3, model=ODD)
    record = json.loads(line)
    assert len(record["optimized_prompt"]) == 3 and all(
        isinstance(text, str) for text in record["optimized_prompt"]
    )
    assert all(len(record["bpo"][key]) == 3 for key in ("new_tokens", "stop", "unchanged"))
    (line,) = run([{"prompt": "x"}], "--mode", "aggressive", *SHORT, model=ODD)
    assert len(json.loads(line)["optimized_prompt"]) == 5
    (line,) = run([{"prompt": "x"}], "--mode", "aggressive", "-n", 1, *SHORT, model=ODD)
    assert isinstance(json.loads(line)["optimized_prompt"], str)


# Other members of a line keep their bytes, whatever they are.
KEPT = [
    b'{"prompt":"x","big":123456789012345678901234567890,"exp":1e999,"tiny":1E-999,"zero":-0.0,"long":3.14159265358979323846264338327950288}',
    b'{"prompt":"x","exp":[1e+4000,-2.5E0000000000999],"deep":{"prompt":{"prompt":["}","]","{"]}}}',
    b'  {  "prompt"\t: "x" ,"a":"\\u00e9\\/\\ud83d\\ude00 \\u0000 }"  }  ',
    b'{"b":1,"a":2,"b":3,"prompt":"no","prompt":"x"}',
    '{"prompt":"x","é日本":"naïve 😀\u2028"}'.encode(),
    b'{"prompt":"x","list":[],"none":null,"yes":true,"empty":{}, "escaped":"\\\\\\"}"}',
    b'{"\\u0070rompt":"x"}',
    b'{"bpo2":{"bpo":1},"nested":{"optimized_prompt":"y"},"prompt":"x"}',
]


@pytest.mark.parametrize("line", KEPT)
def test_other_members_keep_their_bytes(run, line):
    (out,) = run([line], "--seed", 1)
    brace = line.rindex(b"}")
    assert out.startswith(line[:brace] + b', "optimized_prompt": "abc", "bpo": {"seed": ')
    assert out.endswith(b', "run_seed": 1}' + line[brace:])
    json.loads(out.replace(b"1e999", b"1"))


def test_last_of_two_prompts_counts(run):
    texts = [
        json.loads(line)["bpo"]["prompt_tokens"]
        for line in run([b'{"prompt":"a b c d","prompt":"x"}', b'{"prompt":"x"}'], *SHORT)
    ]
    assert texts[0] == texts[1]


def test_a_nul_in_a_prompt(run):
    (out,) = run([b'{"prompt":"a\\u0000b"}'], *SHORT)
    assert (
        json.loads(out)["bpo"]["prompt_tokens"]
        > json.loads(run([b'{"prompt":"a"}'], *SHORT)[0])["bpo"]["prompt_tokens"]
    )


def test_generated_control_characters_are_escaped(tmp_path, run):
    model = chain_model(
        tmp_path / "control.bin", says([*letters("a"), 3 + 0x00, 3 + 0x07, *letters('"\\b')])
    )
    (line,) = run([{"prompt": "x"}], "--seed", 1, model=model)
    assert b'"optimized_prompt": "a\\u0000\\u0007\\"\\\\b"' in line


BAD = [
    (b"", "blank"),
    (b"   \t", "blank"),
    (b"null", "not a JSON object"),
    (b"[1, 2]", "not a JSON object, but a list"),
    (b'"prompt"', "not a JSON object"),
    (b"17", "not a JSON object"),
    (b'{"prompt": "x"', "not a JSON object"),
    (b'{"prompt": "x"} {}', "not a JSON object"),
    (b'{"prompt": "x",}', "not a JSON object"),
    (b"{'prompt': 'x'}", "not a JSON object"),
    (b'{"prompt": "x", "a": 01}', "not a JSON object"),
    (b'{"prompt": "x", "a": 1e999, "b": 000000000000000000000000}', "not a JSON object"),
    (b'{"prompt": "x", "a": 1e999, "b": 12345678901234567890.}', "not a JSON object"),
    (b'{"prompt": "x", "a": 1e9999e}', "not a JSON object"),
    (b'{"prompt": "x", "a": NaN}', "not a JSON object"),
    (b'{"prompt": "\xff"}', "not a JSON object"),
    (b'{"prompt": "\xed\xa0\x80"}', "not a JSON object"),
    (b'{"prompt": "\\ud800"}', "not a JSON object"),
    (b'{"prompt": "x", "a": "\\udc00\\ud800"}', "not a JSON object"),
    (b'{"prompt": "x\x00"}', "not a JSON object"),
    (b'{"prompt": "x", "a\\u0000": 1}', "not a JSON object"),
    (b'{"prompt": "a\tb"}', "not a JSON object"),
    (b'{"prompt": "x", "deep": ' + 3000 * b"[" + 3000 * b"]" + b"}", "not a JSON object"),
    (b"{}", 'there is no member "prompt"'),
    (b'{"text": "x"}', 'there is no member "prompt"'),
    (b'{"nested": {"prompt": "x"}}', 'there is no member "prompt"'),
    (b'{"prompt": 5}', 'the member "prompt" is not a string'),
    (b'{"prompt": null}', 'the member "prompt" is not a string'),
    (b'{"prompt": ["x"]}', 'the member "prompt" is not a string'),
    (
        b'{"prompt": "x", "prompt": 123456789012345678901234567890}',
        'the member "prompt" is not a string',
    ),
    (b'{"prompt": ""}', "the prompt is empty"),
    (b'{"prompt": " \\n\\t\\u00a0"}', "the prompt is empty"),
    (json.dumps({"prompt": "word " * 300}).encode(), "tokens long with its template"),
    (b'{"prompt": "x", "optimized_prompt": 1}', 'has a member "optimized_prompt" already'),
    (b'{"prompt": "x", "bpo": 1}', 'has a member "bpo" already'),
]


def test_bad_lines_are_error_records_and_the_run_goes_on(run):
    good = {"prompt": "x"}
    lines = run(
        [good, *itertools.chain.from_iterable((line, good) for line, _ in BAD)],
        "--context",
        256,
        *SHORT,
        code=4,
    )
    assert len(lines) == 1 + 2 * len(BAD)
    assert all(json.loads(line)["optimized_prompt"] == "abc" for line in lines[::2])
    for i, (bad, why) in enumerate(BAD):
        number, reason = error_of(lines[2 * i + 1])
        assert number == 2 * i + 2
        assert why in reason, bad


def test_failures_are_counted_and_the_first_is_reported(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}, b"oops", b"{}"])
    result = bpo("-m", abc, "-i", file, "--seed", 1)
    assert result.code == 4 and len(result.lines) == 3
    assert (
        "2 of 3 records failed; the first, line 2: not a JSON object" in result.err
        and "hint: " in result.err
    )
    result = works("-m", abc, "-i", file, "--seed", 1, "--allow-errors")
    assert (
        "2 failed; the first, line 2: not a JSON object" in result.err
        and "error:" not in result.err
    )


def test_error_records_keep_the_id(run):
    lines = run(
        [
            b'{"id": "a b", "prompt": 1}',
            b'{"id":12345678901234567890123,"prompt":1}',
            b'{"id":[1, "}"]}',
            b"[]",
        ],
        code=4,
    )
    assert [line[: line.index(b'"error"')] for line in lines] == [
        b'{"line": 1, "id": "a b", ',
        b'{"line": 2, "id": 12345678901234567890123, ',
        b'{"line": 3, "id": [1, "}"], ',
        b'{"line": 4, ',
    ]


def test_a_long_prompt_does_not_end_the_run(run):
    lines = run(
        [{"prompt": "x"}, {"prompt": "many words " * 4000}, {"prompt": "x"}], *SHORT, code=4
    )
    assert "error" in json.loads(lines[1]) and json.loads(lines[2])["optimized_prompt"] == "abc"


def test_lines_of_ten_megabytes(run):
    huge = {"prompt": "x", "text": 'é"}{' * 2_500_000}
    broken = b'{"prompt": "' + b"y" * 10_000_000
    lines = run([huge, broken, {"prompt": "x"}, huge], *SHORT, code=4)
    assert [b"optimized_prompt" in line[-250:] for line in lines] == [True, False, True, True]
    assert lines[0].startswith(json.dumps(huge).encode()[:-1])


def test_fields(run):
    (line,) = run(
        [{"text": "x", "prompt": 5}], "--field", "text", "--output-field", "bess\u00e9r", *SHORT
    )
    assert json.loads(line)["bess\u00e9r"] == "abc"
    (line,) = run(
        [{"text": "x", "optimized_prompt": 5}], "--field", "text", "--output-field", "y", *SHORT
    )
    assert json.loads(line)["y"] == "abc"


# -------------------------------------------------------------------------------------------- lines


def outcome(tmp_path, abc, data: bytes, *args) -> bytes:
    (tmp_path / "raw.jsonl").write_bytes(data)
    return bpo("-m", abc, "-i", tmp_path / "raw.jsonl", "--seed", 1, "-q", *args).out


def test_line_ends(tmp_path, abc):
    """CRLF is kept; an unfinished last line is finished; blank lines at the end do not count.

    A byte order mark is dropped.
    """
    plain = outcome(tmp_path, abc, b'{"prompt":"x"}\n{"prompt":"y"}\n')
    assert plain.count(b"\n") == 2
    assert outcome(tmp_path, abc, b'{"prompt":"x"}\n{"prompt":"y"}') == plain
    assert outcome(tmp_path, abc, b'{"prompt":"x"}\n{"prompt":"y"}\n\n \r\n\n') == plain
    assert outcome(tmp_path, abc, b'\xef\xbb\xbf{"prompt":"x"}\n{"prompt":"y"}\n') == plain
    assert outcome(tmp_path, abc, b'{"prompt":"x"}\r\n{"prompt":"y"}\r\n') == plain.replace(
        b"\n", b"\r\n"
    )
    assert outcome(tmp_path, abc, b'{"prompt":"x"}\r\n{"prompt":"y"}') == plain.replace(
        b"\n", b"\r\n", 1
    )
    second = outcome(tmp_path, abc, b'{"prompt":"x"}\n\xef\xbb\xbf{"prompt":"y"}\n')
    assert b'"error"' in second.splitlines()[1]


def test_blank_lines_within_are_errors_and_counted(tmp_path, abc):
    lines = outcome(tmp_path, abc, b'\n\n{"prompt":"x"}\n\n{"prompt":"y"}\n\n').splitlines()
    assert [json.loads(line).get("line") for line in lines] == [1, 2, None, 4, None]
    shards = [
        outcome(
            tmp_path, abc, b'\n\n{"prompt":"x"}\n\n{"prompt":"y"}\n\n', "--shard", f"{i}/2"
        ).splitlines()
        for i in (0, 1)
    ]
    assert shards == [lines[1::2], lines[0::2]]


def test_numbered_lines(tmp_path, abc):
    """Pieces of a data set, in any order, give the same bytes as the whole."""
    data = [
        b'{"prompt":"x"}',
        b"",
        b"oops\r",
        b'{"prompt":"y","id":"a"}',
        b'{"prompt":1}',
        b'{"prompt":"z"}',
    ]
    whole = outcome(tmp_path, abc, b"\n".join(data)).splitlines()
    for order in ([0, 1, 2, 3, 4, 5], [5, 1], [3, 2, 4], [1]):
        numbered = b"".join(b"%d\t%s\n" % (i + 1, data[i]) for i in order)
        assert outcome(tmp_path, abc, numbered, "--numbered").splitlines() == [
            whole[i] for i in order
        ]
    assert outcome(
        tmp_path, abc, b"999\t" + data[0] + b"\n6\t" + data[5], "--numbered", "--shard", "0/2"
    ).splitlines() == [whole[5]]
    for bad in (data[0], b"0\t{}", b"\t{}", b"", b"1 {}", b"-1\t{}", b"9999999999999999999\t{}"):
        (tmp_path / "bad.jsonl").write_bytes(b"1\t" + data[0] + b"\n" + bad + b"\n")
        result = bpo("-m", abc, "-i", tmp_path / "bad.jsonl", "--numbered", "--seed", 1)
        assert result.code == 4 and "the line after line 1 has no number" in result.err


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_no_records(tmp_path, abc, data):
    assert outcome(tmp_path, abc, data) == b""
    assert outcome(tmp_path, abc, data, "-o", tmp_path / "none.jsonl") == b""
    assert (tmp_path / "none.jsonl").read_bytes() == b""


# -------------------------------------------------------------------------------------------- seeds


def seeds(lines: list[bytes]) -> list[int]:
    return [json.loads(line)["bpo"]["seed"] for line in lines]


def test_seed_depends_on_the_id_not_on_the_place(run):
    a = seeds(
        run(
            [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"}],
            "--seed",
            3,
        )
    )
    assert a[0] == a[2] != a[1]
    assert seeds(run([{"id": "b", "prompt": "x"}, {"id": "a", "prompt": "x"}], "--seed", 3)) == [
        a[1],
        a[0],
    ]
    assert seeds(run([{"id": "b", "prompt": "x"}, {"id": "a", "prompt": "x"}], "--seed", 4)) != [
        a[1],
        a[0],
    ]


def test_names(run):
    """A record's name is its id: the characters of a string, any other value as written.

    Without an id, or with null, the line number.
    """
    lines = [
        b'{"prompt":"x"}',
        b'{"prompt":"x","id":null}',
        b'{"prompt":"x","id":3}',
        b'{"prompt":"x","id":"4"}',
    ]
    lines += [
        b'{"prompt":"x","id":2,"id":"5"}',
        b'{"prompt":"x","\\u0069d":6}',
        b'{"prompt":"x","id":7.0}',
        b'{"prompt":"x","id":"7.0"}',
    ]
    lines += [
        b'{"prompt":"x","id":123456789012345678901}',
        b'{"prompt":"x","id":"123456789012345678901"}',
        b'{"prompt":"x","id":[1, 2] }',
    ]
    lines += [b'{"prompt":"x","id":123456789012345678902}', b'{"prompt":"x","id":"[1, 2]"}']
    found = seeds(run(lines, "--seed", 3))
    assert found[:6] == seeds(run(6 * [{"prompt": "x"}], "--seed", 3))
    assert found[6] == found[7] and found[8] == found[9] and found[10] == found[12]
    assert len(set(found)) == len(found) - 3


@pytest.mark.parametrize(
    "args", [(), ("--mode", "aggressive"), ("-n", 3), ("--greedy",), ("--matmul", "openblas")]
)
def test_a_record_alone_gives_the_same_text(run, args):
    options = ("--max-new-tokens", 12, *args)
    for line in run(records(7), "--seed", 3, *options, model=GQA):
        record = json.loads(line)
        meta = record["bpo"]
        samples = works(
            "-m", GQA, "-p", record["prompt"], "--seed", meta["seed"], "--json", *options
        ).lines
        assert [s["text"] for s in samples] == (
            t if isinstance(t := record["optimized_prompt"], list) else [t]
        )
        for key in ("stop", "unchanged", "new_tokens"):
            assert [s[key] for s in samples] == (v if isinstance(v := meta[key], list) else [v])
        assert samples[0]["prompt_tokens"] == meta["prompt_tokens"]


def test_forced_ids(tmp_path):
    file = write(
        tmp_path / "in.jsonl",
        [{"prompt": "x", "ids": [20, 30, 40]}, {"prompt": "x"}, {"prompt": "x", "ids": [20, 2]}],
    )
    lines = works(
        "-m", GQA, "-i", file, "--greedy", "--max-new-tokens", 9, BPO_FORCE_FIELD="ids"
    ).lines
    assert [line["bpo"]["new_tokens"] for line in lines] == [3, 9, 2]
    assert lines[0]["optimized_prompt"].startswith(lines[2]["optimized_prompt"])


def test_random_seed_is_reported(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    first, second = (works("-m", abc, "-i", file) for _ in range(2))
    (seed,) = re.findall(r"bpo: seed (\d+)", first.err)
    assert first.lines[0]["bpo"]["run_seed"] == int(seed)
    assert first.out != second.out
    assert works("-m", abc, "-i", file, "--seed", seed).out == first.out
    assert "seed" not in works("-m", abc, "-i", file, "--greedy").err


# ---------------------------------------------------------------------------------- reproducibility

MANY = records(40)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--mode", "aggressive", "-n", 2),
        ("--matmul", "openblas"),
        ("--mode", "aggressive", "--matmul", "openblas"),
    ],
)
def test_same_bytes_with_any_number_of_sequences_threads_and_shards(run, args):
    """And with any drafts."""
    options = (*SHORT, "--temperature", 1.5, *args)
    lines = run(MANY, *options, "--parallel", 1, "-t", 1, "--lookup", 0, model=GQA)
    assert len({json.loads(line)["bpo"]["seed"] for line in lines}) == 40
    for n, threads, lookup in (
        (1, 2, 4),
        (2, 1, 1),
        (3, 2, 0),
        (7, 1, 15),
        (16, 2, 4),
        (16, 1, 0),
        (32, 1, 15),
        (64, 2, 2),
    ):
        assert (
            run(MANY, *options, "--parallel", n, "-t", threads, "--lookup", lookup, model=GQA)
            == lines
        )
    assert run(MANY, *options, model=GQA) == lines
    for n_shards in (2, 3, 41):
        for i in range(n_shards) if n_shards < 10 else (0, 1, 40):
            assert (
                run(MANY, *options, "--shard", f"{i}/{n_shards}", "--lookup", 7 * i % 16, model=GQA)
                == lines[(i or n_shards) - 1 :: n_shards]
            )


def test_same_bytes_with_the_prefix_kept_in_a_file(tmp_path, run):
    """The first run of a model that is large enough writes it; the second run reads it."""
    config = llama_config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = write_model(tmp_path / "large.bin", config, lively_weights(config, 1))
    lines = run(MANY[:12], *SHORT, "--no-cache", model=model)
    for n in (5, 1, 16):
        assert (
            run(
                MANY[:12],
                *SHORT,
                "--parallel",
                n,
                model=model,
                XDG_CACHE_HOME=str(tmp_path / "cache"),
            )
            == lines
        )
        assert len(list((tmp_path / "cache" / "bpo").iterdir())) == 1


def test_order_of_arrival_makes_no_difference(run):
    lines = run(MANY, *SHORT, model=GQA)
    order = [7 * i % 40 for i in range(40)]
    assert run([MANY[i] for i in order], *SHORT, "--parallel", 5, model=GQA) == [
        lines[i] for i in order
    ]


def test_texts_of_very_unequal_length(run):
    """A long text does not hold up the others, and the output is still in order."""
    prompts = [{"id": i, "prompt": "x y z " * (30 if i % 11 == 0 else 1)} for i in range(80)]
    one = run(
        prompts, "--seed", 1, "--max-new-tokens", 60, "--temperature", 3, "--parallel", 1, model=ODD
    )
    assert (
        run(
            prompts,
            "--seed",
            1,
            "--max-new-tokens",
            60,
            "--temperature",
            3,
            "--parallel",
            8,
            model=ODD,
        )
        == one
    )
    assert len({json.loads(line)["bpo"]["new_tokens"] for line in one}) > 10


def test_thousands_of_records(run):
    lines = run(({"prompt": f"number {i}"} for i in range(5000)), "--seed", 1)
    assert [json.loads(line)["prompt"] for line in lines] == [f"number {i}" for i in range(5000)]


# ------------------------------------------------------------------------------------------- resume


def test_existing_output_is_refused(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    (tmp_path / "out.jsonl").write_bytes(b"precious\n")
    fails(2, "-m", abc, "-i", file, "-o", tmp_path / "out.jsonl", says="is there already")
    for foreign in (
        b"precious\n",
        b"precious",
        b'{"prompt": "x", "optimized_prompt": "y"}\n',
        b'{"a": 1}',
        b"[",
        b"\n",
        b"{\n}",
    ):
        (tmp_path / "out.jsonl").write_bytes(foreign)
        fails(
            4,
            "-m",
            abc,
            "-i",
            file,
            "-o",
            tmp_path / "out.jsonl",
            "--resume",
            says="is not a record of a data set run",
        )
        assert (tmp_path / "out.jsonl").read_bytes() == foreign


LINES = [
    {"id": 1, "prompt": "Tell me"},
    b"not json",
    b'  {"prompt" : "x", "big": 123456789012345678901234567890 }\r',
    {"prompt": ""},
    b"",
    {"id": 1, "prompt": 'about }, "bpo": {'},
    {"id": None, "prompt": "water 😀"},
]


def test_resume_after_every_byte(tmp_path):
    """Wherever the output was cut, resuming gives the same bytes."""
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    args = ("-m", ODD, "-i", file, "-o", out, "--max-new-tokens", 8, "--allow-errors", "-q")
    works(*args, "--seed", 9)
    whole = out.read_bytes()
    assert whole.count(b"\n") == len(LINES)
    first_end, last = whole.index(b"\n") + 1, whole.rindex(b"\n", 0, -1) + 1
    cuts = {
        *range(last, len(whole) + 1, 7),
        last - 1,
        last + 1,
        len(whole) - 1,
        len(whole),
        *range(first_end, last, 101),
    }
    for cut in sorted(cuts):
        out.write_bytes(whole[:cut])
        works(*args, "--resume", "--parallel", 1 + cut % 4)
        assert out.read_bytes() == whole, cut
    for cut in (0, 1, first_end - 1):  # the seed is not yet in the file
        out.write_bytes(whole[:cut])
        works(*args, "--resume", "--seed", 9)
        assert out.read_bytes() == whole, cut


def test_resume_without_an_output_starts_afresh(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    works("-m", abc, "-i", file, "-o", tmp_path / "a.jsonl", "--seed", 1)
    works("-m", abc, "-i", file, "-o", tmp_path / "b.jsonl", "--seed", 1, "--resume")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_resume_refuses_what_has_changed(tmp_path, abc):
    lines = [{"prompt": f"x {i}"} for i in range(6)]
    file, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    works("-m", abc, "-i", file, "-o", out, "--seed", 1)
    part = b"".join(out.read_bytes().splitlines(keepends=True)[:3])

    def refuses(code: int, *args, says: str, model: Path = abc, **kwargs):
        out.write_bytes(part + b'{"cut')
        fails(code, "-m", model, "-i", file, "-o", out, "--resume", *args, says=says, **kwargs)
        assert out.read_bytes() == part + b'{"cut'

    refuses(2, "--seed", 2, says="was made with the seed 1, not 2")
    for args in (
        ("--temperature", 0.5), ("--greedy",), ("--top-p", 0.5), ("--top-k", 3), ("-n", 2),
        ("--max-new-tokens", 9), ("--mode", "aggressive"), ("--context", 100),
        ("--output-field", "y"), ("--matmul", "openblas"),
    ):  # fmt: skip
        refuses(2, *args, says="another model or other options")
    refuses(2, model=GQA, says="another model or other options")
    refuses(4, "--shard", "0/2", says="was made from another input")
    for changed in (
        [*lines[:2], {"prompt": "other"}, *lines[3:]],
        lines[1:],
        [*lines[:2], {**lines[2], "a": 1}, *lines[3:]],
        [b"?", *lines[1:]],
    ):
        write(file, changed)
        refuses(4, says="another line there")
    write(file, lines[:2])
    refuses(4, says="this one ends before")
    write(file, [*lines, {"prompt": "one more"}])  # an input may have grown
    out.write_bytes(part)
    works("-m", abc, "-i", file, "-o", out, "--resume")
    assert len(out.read_bytes().splitlines()) == 7


def test_resume_notices_a_repaired_line(tmp_path, abc):
    file, out = write(tmp_path / "in.jsonl", [b"oops", {"prompt": "x"}]), tmp_path / "out.jsonl"
    assert bpo("-m", abc, "-i", file, "-o", out, "--seed", 1).code == 4
    result = bpo("-m", abc, "-i", file, "-o", out, "--resume")
    assert result.code == 4 and "1 of 2 records failed" in result.err
    write(file, [{"prompt": "repaired"}, {"prompt": "x"}])
    fails(4, "-m", abc, "-i", file, "-o", out, "--resume", says="another line there")


def test_an_output_as_input_is_refused(tmp_path, abc):
    file, out = write(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl"
    works("-m", abc, "-i", file, "-o", out)
    fails(
        4,
        "-m",
        abc,
        "-i",
        out,
        "-o",
        tmp_path / "again.jsonl",
        says='has a member "optimized_prompt" already',
    )
    assert not (tmp_path / "again.jsonl").exists()
    assert "--output-field" in bpo("-m", abc, "-i", out).err
    fails(4, "-m", abc, "-i", out, "--output-field", "better", says='has a member "bpo" already')


# ------------------------------------------------------------------------------------------ options


def test_data_set_needs_a_model(tmp_path):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    fails(2, "-i", file, cwd=tmp_path, says="a data set needs a model")
    fails(2, "-i", file, cwd=tmp_path, BPO_MODEL="", says="a data set needs a model")
    assert works("-i", file, "-q", cwd=tmp_path, BPO_MODEL=str(MHA)).err == ""
    (tmp_path / "bpo.bin").symlink_to(MHA)
    works("-i", file, cwd=tmp_path)


def test_demo_option(tmp_path):
    file = write(tmp_path / "in.jsonl", [{"prompt": "Tell me about Harry Potter"}])
    result = works("--demo", "-i", file, "--seed", 1, "-q", cwd=tmp_path, BPO_MODEL="/nowhere")
    assert "using the bundled demo model" in result.err
    assert result.out == works("-m", DEMO, "-i", file, "--seed", 1, "-q").out


@pytest.mark.parametrize(
    "args",
    [
        ("-i", "x", "-p", "x"), ("-i", "x", "-f", "x"), ("-i", "x", "--tokens", "1"),
        ("-i", "x", "--json"), ("-i", "x", "--tokenize"), ("-i", "x", "--info"),
        ("-i", "x", "--verify"), ("-i", "x", "--dump-logits", "x"), ("-i", "x", "--stats"),
        ("-p", "x", "-o", "x"), ("-p", "x", "--resume"), ("-p", "x", "--shard", "0/1"),
        ("-p", "x", "--field", "x"), ("-p", "x", "--output-field", "x"),
        ("-p", "x", "--allow-errors"), ("--resume",), ("-i", os.devnull, "--demo"),
        ("-i", os.devnull, "--shard", "1"), ("-i", os.devnull, "--shard", "1/1"),
        ("-i", os.devnull, "--shard", "-1/2"), ("-i", os.devnull, "--shard", "0/0"),
        ("-i", os.devnull, "--shard", "0/2x"), ("-i", os.devnull, "--shard", "/2"),
        ("-i", os.devnull, "--shard", "a/b"),
        ("-i", os.devnull, "--shard", "99999999999999999999/2"),
        ("-i", os.devnull, "--parallel", "0"), ("-i", os.devnull, "--parallel", "4097"),
        ("-i", os.devnull, "--parallel", "x"), ("-i", os.devnull, "--output-field", "prompt"),
        ("-i", os.devnull, "--output-field", "bpo"),
        ("-i", os.devnull, "--field", "a", "--output-field", "a"),
        ("-i", os.devnull, "--output-field", b"\xff"), ("-i", os.devnull, "--resume"),
        ("-i", os.devnull, "--resume", "-o", "-"), ("-i", os.devnull, "--resume", "-o", os.devnull),
    ],
)  # fmt: skip
def test_usage_errors(tmp_path, abc, args):
    args = tuple(os.fsdecode(arg) if isinstance(arg, bytes) else arg for arg in args)
    fails(2, "-m", abc, *args, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_input(tmp_path, abc):
    fails(4, "-m", abc, "-i", tmp_path / "none.jsonl", says="cannot open")
    fails(4, "-m", abc, "-i", tmp_path, "-o", tmp_path / "out.jsonl", says="cannot read")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_failed_start_leaves_no_output(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    fails(2, "-m", abc, "-i", file, "-o", tmp_path / "out.jsonl", "--context", 9999)
    assert not (tmp_path / "out.jsonl").exists()


def test_parallel_does_not_change_a_single_prompt():
    args = ("-m", ODD, "-p", "x", "-n", 5, "--max-new-tokens", 10, "--seed", 1)
    assert (
        works(*args).out == works(*args, "--parallel", 1).out == works(*args, "--parallel", 3).out
    )


# -------------------------------------------------------------------------------------- as a filter


@pytest.fixture
def start():
    """Starts the program in the background."""
    processes = []

    def start(*args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        command = [str(arg) for arg in (BPO, *args)]
        processes.append(
            subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment())
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask(process, record) -> bytes:
    """Feeds one line and reads the answer."""
    process.stdin.write(
        (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n"
    )
    process.stdin.flush()
    return process.stdout.readline()


@pytest.mark.parametrize("parallel", [1, 8])
def test_filter_answers_line_by_line(tmp_path, start, run, parallel):
    lines = run(MANY[:9], *SHORT, model=GQA)
    process = start("-m", GQA, "-i", "-", "-o", "-", *SHORT, "--parallel", parallel)
    assert [ask(process, record) for record in MANY[:9]] == [line + b"\n" for line in lines]
    assert error_of(ask(process, b"oops")) == (
        10,
        error_of(run([*MANY[:9], b"oops"], *SHORT, model=GQA, code=4)[-1])[1],
    )
    process.stdin.close()
    assert process.stdout.read() == b"" and process.wait(30) == 4


def test_filter_takes_pieces_of_lines(start):
    process = start("-m", GQA, "-i", "-", *SHORT)
    for piece in (b'{"pro', b'mpt": ', b'"x"}\n{"prompt"'):
        time.sleep(0.05)
        process.stdin.write(piece)
        process.stdin.flush()
    assert json.loads(process.stdout.readline())["prompt"] == "x"
    process.stdin.write(b': "y"}')
    process.stdin.close()
    assert json.loads(process.stdout.read())["prompt"] == "y" and process.wait(30) == 0


def test_newcomers_join_while_others_are_in_work(start, tmp_path):
    """A long text is still in progress when the next line arrives; both are written, in order."""
    process = start(
        "-m",
        endless_model(tmp_path),
        "-i",
        "-",
        "--max-new-tokens",
        1900,
        "--seed",
        1,
        "--parallel",
        4,
        "-q",
    )
    for i in range(6):
        process.stdin.write(json.dumps({"prompt": f"{i}"}).encode() + b"\n")
        process.stdin.flush()
        time.sleep(0.02)
    process.stdin.close()
    assert [json.loads(line)["prompt"] for line in process.stdout.read().splitlines()] == list(
        "012345"
    )
    assert process.wait(30) == 0


def test_a_slow_reader_holds_up_the_filter_without_loss(start):
    process = start("-m", GQA, "-i", "-", "--max-new-tokens", 2, "--seed", 1, "-q")
    feeder = threading.Thread(
        target=lambda: (
            process.stdin.writelines(json.dumps(r).encode() + b"\n" for r in records(3000)),
            process.stdin.close(),
        )
    )
    feeder.start()
    time.sleep(0.5)
    lines = process.stdout.read().splitlines()
    feeder.join()
    assert [json.loads(line)["id"] for line in lines] == [
        f"r{i}" for i in range(3000)
    ] and process.wait(30) == 0


def test_memory_is_bounded(start, tmp_path):
    """The program reads only a window ahead, so a feeder faster than the model has to wait."""
    process = start(
        "-m",
        endless_model(tmp_path),
        "-i",
        "-",
        "--max-new-tokens",
        1900,
        "--seed",
        1,
        "--parallel",
        1,
        "-q",
    )
    os.set_blocking(process.stdin.fileno(), False)
    line, n = json.dumps({"prompt": "x", "pad": "y" * 3000}).encode() + b"\n", 0
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            n += os.write(process.stdin.fileno(), line)
        except BlockingIOError:
            time.sleep(0.01)
    assert n < 1200 * len(line) + (1 << 20)
    process.kill()


# --------------------------------------------------------------------------- progress, interruption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_what_is_done(start, tmp_path, number, code):
    lines = [{"id": i, "prompt": f"x {i}"} for i in range(300)]
    file, out, whole = (
        write(tmp_path / "in.jsonl", lines),
        tmp_path / "out.jsonl",
        tmp_path / "whole.jsonl",
    )
    args = (
        "-m",
        endless_model(tmp_path),
        "-i",
        file,
        "--max-new-tokens",
        200,
        "--seed",
        1,
        "--parallel",
        4,
    )
    process = start(*args, "-o", out)
    deadline = time.monotonic() + 30
    while (not out.exists() or out.stat().st_size < 2000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == code
    assert "interrupted; --resume continues from here" in process.stderr.read().decode()
    part = out.read_bytes()
    assert 0 < part.count(b"\n") < 300 and part.endswith(b"\n")
    works(*args, "-o", whole)
    works(*args, "-o", out, "--resume")
    assert whole.read_bytes().startswith(part) and out.read_bytes() == whole.read_bytes()


def test_interruption_of_a_waiting_filter(start):
    process = start("-m", GQA, "-i", "-", *SHORT)
    ask(process, {"prompt": "x"})
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_plain_progress_and_summary(tmp_path, abc):
    file = write(tmp_path / "in.jsonl", records(5))
    result = works("-m", abc, "-i", file, "-o", tmp_path / "out.jsonl", "--seed", 1)
    assert re.fullmatch(r"bpo: 5 records in [\d.]+ s: [\d.]+ records/s, \d+ tokens/s\n", result.err)
    result = works("-m", abc, "-i", file, "-o", tmp_path / "out.jsonl", "--resume")
    assert "bpo: 5 were already there\n" in result.err and "bpo: 0 records in" in result.err
    long = write(tmp_path / "long.jsonl", [{"prompt": "x"}, {"prompt": "word " * 600}])
    assert (
        "1 warning; the first, line 2: the prompt has"
        in works("-m", abc, "-i", long, "--seed", 1).err
    )


def test_bar_on_a_terminal(tmp_path, start):
    master, slave = open_terminal()
    file = write(tmp_path / "in.jsonl", [*records(30), b"oops"])
    options = ("--max-new-tokens", 1900, "--seed", 1, "--parallel", 2)
    model, out = endless_model(tmp_path), tmp_path / "out.jsonl"
    process = start("-m", model, "-i", file, "-o", out, *options, stderr=slave)
    os.close(slave)
    shown = b""
    while piece := read_terminal(master):
        shown += piece
    os.close(master)
    assert process.wait(30) == 4
    text = shown.decode()
    assert (
        re.search(r"\r\[#*-+\] \d+ records \(\d+ %\), [\d.]+ records/s, \d+ tokens/s", text)
        and " left" in text
    )
    assert "31 records in" in text and text.count("\n") == 3


# ------------------------------------------------------------------------------------ documentation


def test_example_of_the_readme(tmp_path):
    """The README's command turns the README's input into its output."""
    blocks = re.findall(
        r"```(?:jsonl|sh)\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    at = next(
        i for i, block in enumerate(blocks) if block.startswith("bpo --demo -i prompts.jsonl")
    )
    given, command, expected = blocks[at - 1], blocks[at].split("#")[0].split()[1:], blocks[at + 1]
    (tmp_path / "prompts.jsonl").write_text(given, "utf-8")
    assert bpo(*command, cwd=tmp_path).code == 4
    assert (tmp_path / "better.jsonl").read_text("utf-8") == expected
