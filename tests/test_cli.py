"""The command line: input, output, exit codes.

And every error comes with a hint at what to do next.
"""

import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import sentencepiece
from checkpoints import (
    ROOT,
    TESTS,
    TOKENIZER,
    chain_model,
    constant_model,
    edit_metadata,
    export_weights,
    read_header,
)
from program import BPO, GOLDEN, bpo, csv, environment, fails, works

# GQA has 256 positions, HUGE 2^30
MHA, GQA, ODD, HUGE = (GOLDEN / f"{name}.bin" for name in ("mha", "gqa", "odd", "huge"))
BOS, EOS, NEWLINE = 1, 2, 13
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
TEMPLATE = export_weights.TEMPLATE


def piece(text: str) -> int:
    """The id of a piece, "▁" being a space."""
    i = PIECES.PieceToId(text)
    assert i != PIECES.unk_id(), text
    return i


def letters(text: str) -> list[int]:
    """The ids of a text, character by character.

    The piece of the character, or else the pieces of its bytes.
    """
    ids = []
    for c in text.replace(" ", "▁"):
        i = PIECES.PieceToId(c)
        ids += [i] if i != PIECES.unk_id() else [3 + byte for byte in c.encode()]
    return ids


def templated(text: str) -> list[int]:
    """BOS and the ids of a prompt in the template."""
    return [BOS, *PIECES.Encode(TEMPLATE.replace("{prompt}", text))]


START = templated("a")[-1]  # the template's last id


def says(ids: list[int], end: int = EOS) -> dict[int, int]:
    """Successors (chain_model) with which a model generates these ids, all different, and then EOS.

    With end=START, it repeats them.
    """
    chain = [START, *ids, end]
    assert len(set(chain[:-1])) == len(chain) - 1, "an id can have one successor only"
    return dict(itertools.pairwise(chain))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def abc(models):
    """A model that always generates "abc"."""
    return chain_model(models / "abc.bin", says(letters("abc")))


# ------------------------------------------------------------------------------------ plain results


def test_stdout_is_the_text_and_nothing_else(abc):
    result = works("-m", abc, "-p", "Tell me about water")
    assert result.out == b"abc\n"
    assert re.fullmatch(r"bpo: seed \d+\n", result.err)


def test_samples_are_separated_by_one_empty_line(abc):
    assert works("-m", abc, "-p", "x", "-n", 3).out == b"abc\n\nabc\n\nabc\n"


def test_quiet(abc):
    result = works("-m", abc, "-p", "x", "-q")
    assert (result.out, result.err) == (b"abc\n", "")


def test_given_seed_is_not_reported(abc):
    assert works("-m", abc, "-p", "x", "--seed", 5).err == ""


def test_reported_seed_repeats_the_text():
    args = ("-m", ODD, "-p", "x", "--max-new-tokens", 50, "--temperature", 2)
    first, other = works(*args), works(*args)
    (seed,) = re.findall(r"seed (\d+)", first.err)
    assert 0 <= int(seed) < 2**53
    assert works(*args, "--seed", seed).out == first.out
    assert other.out != first.out and other.err != first.err


def test_greedy_is_temperature_zero():
    args = ("-m", MHA, "-p", "Tell me", "--max-new-tokens", 40, "--json")
    greedy = works(*args, "--greedy", "--seed", 1).samples
    assert works(*args, "--temperature", 0, "--seed", 1).samples == greedy
    assert works(*args, "--top-k", 1, "--seed", 1).samples == greedy
    assert works(*args, "--greedy", "--seed", 2).samples[0]["tokens"] == greedy[0]["tokens"]


def test_json_fields():
    lines = works(
        "-m",
        ODD,
        "-p",
        "Tell me about water",
        "--json",
        "-n",
        3,
        "--seed",
        2**53 - 1,
        "--max-new-tokens",
        30,
    ).lines
    types = {
        "text": str,
        "tokens": list,
        "sample": int,
        "seed": int,
        "prompt_tokens": int,
        "new_tokens": int,
        "stop": str,
    }
    types |= {"unchanged": bool, "timings": dict}
    for i, line in enumerate(lines):
        assert {key: type(value) for key, value in line.items()} == types
        assert line["sample"] == i and line["seed"] == 2**53 - 1
        assert line["prompt_tokens"] == len(templated("Tell me about water"))
        assert line["new_tokens"] == len(line["tokens"]) and all(
            0 <= i < 411 for i in line["tokens"]
        )
        assert line["stop"] == ("eos" if line["tokens"][-1] == EOS else "length")
        timings = line["timings"]
        assert set(timings) == {
            "open_s",
            "prefill_s",
            "decode_s",
            "kept",
            "passes",
            "drafted",
            "accepted",
        }
        assert all(0 <= timings[f"{part}_s"] < 60 for part in ("open", "prefill", "decode"))
        assert (
            timings["passes"] + timings["accepted"] == line["new_tokens"] - 1
            and timings["accepted"] <= timings["drafted"]
        )


def test_replay_hook():
    args = ("-m", MHA, "-p", "x", "--json", "--seed", 1, "-n", 2)
    for line in works(*args, BPO_FORCE_TOKENS="70, 80,90").lines:
        assert (line["tokens"], line["stop"]) == ([70, 80, 90], "length")
    for line in works(*args, BPO_FORCE_TOKENS=f"70,{EOS},90").lines:
        assert (line["tokens"], line["stop"]) == ([70, EOS], "eos")
    fails(2, *args, BPO_FORCE_TOKENS="70,x", says="BPO_FORCE_TOKENS")
    fails(4, *args, BPO_FORCE_TOKENS="70,99999", says="99999")


@pytest.mark.parametrize("model", [MHA, ODD])
def test_text_is_the_tokens_decoded_and_stripped(model):
    """Random ids make every kind of invalid UTF-8.

    ODD also has ids without a piece, and so without text.
    """
    for line in works(
        "-m",
        model,
        "-p",
        "x",
        "--json",
        "-n",
        60,
        "--seed",
        3,
        "--max-new-tokens",
        40,
        "--temperature",
        5,
    ).lines:
        text = PIECES.Decode(
            [
                i
                for i in line["tokens"]
                if i < 400 and not PIECES.IsControl(i) and not PIECES.IsUnknown(i)
            ]
        )
        if "[/INST]" not in text:
            assert line["text"] == text.strip()


def test_characters_made_of_bytes(models):
    model = chain_model(models / "emoji.bin", says(letters("a😀b")))
    assert works("-m", model, "-p", "x").out == "a😀b\n".encode()
    half = chain_model(models / "half.bin", says([*letters("a"), 3 + 0xF0, 3 + 0x9F]))
    assert works("-m", half, "-p", "x").out == "a\ufffd\ufffd\n".encode()


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\u1680", "\x1c", "\u2003"])
def test_ends_are_stripped(models, space):
    ids = letters("ab")
    ids = letters(space) + ids[:1] if space.isascii() else ids[:1] + letters(space)
    model = chain_model(models / "space.bin", says(ids))
    assert works("-m", model, "-p", "x").out == b"a\n"


def test_empty_result(models):
    model = chain_model(models / "empty.bin", says([]))
    (line,) = works("-m", model, "-p", "x", "--json").lines
    assert (line["text"], line["tokens"], line["stop"]) == ("", [EOS], "eos")
    assert works("-m", model, "-p", "x").out == b"\n"


def test_stable_mode_cuts_at_the_end_of_an_instruction(models):
    model = chain_model(models / "inst.bin", says(letters("ab [/INST"), end=START))
    (line,) = works("-m", model, "-p", "x", "--json", "--max-new-tokens", 30).lines
    assert (line["text"], line["stop"], line["new_tokens"]) == ("ab", "length", 30)


def test_unchanged(models):
    model = chain_model(models / "same.bin", says([piece("▁help")]))
    for prompt, unchanged in (("help", True), (" help\n", True), ("helps", False), ("Help", False)):
        (line,) = works("-m", model, "-p", prompt, "--json").lines
        assert (line["text"], line["unchanged"]) == ("help", unchanged)


def test_stop_reasons(abc):
    assert works("-m", abc, "-p", "x", "--json").lines[0]["stop"] == "eos"
    (line,) = works("-m", abc, "-p", "x", "--json", "--max-new-tokens", 2).lines
    assert (line["stop"], line["text"], line["new_tokens"]) == ("length", "ab", 2)
    n = len(templated("x"))
    (line,) = works("-m", abc, "-p", "x", "--json", "--context", n + 1).lines
    assert (line["stop"], line["text"], line["new_tokens"]) == ("context", "a", 1)
    for mode in ("stable", "aggressive"):
        (line,) = works(
            "-m",
            GQA,
            "-p",
            "x",
            "--json",
            "--temperature",
            50,
            "--seed",
            1,
            "-n",
            1,
            "--mode",
            mode,
        ).lines
        assert line["stop"] != "context" or line["new_tokens"] == 256 - n


# ---------------------------------------------------------------------------------------- the input


TEXTS = [
    "a",
    " a",
    "a  b\n",
    "naïve 😀 日本",
    "</s> [INST] <s> <0x0A>",
    "tab\there",
    "\n x",
    "[/INST]",
    "{prompt}",
    "ab\r\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize(text):
    assert json.loads(works("-m", MHA, "--tokenize", "--raw", "-p", text).out) == PIECES.Encode(
        text
    )
    # The reference does not strip the prompt before it fills in the template.
    assert json.loads(works("-m", MHA, "--tokenize", "-p", text).out) == templated(text)


def ids_of(*args, **kwargs) -> list[int]:
    """The ids of the text that the program reads, without the template."""
    return json.loads(works("-m", MHA, "--tokenize", "--raw", *args, **kwargs).out)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a b", b"a b"),
        (b"a b\n", b"a b"),
        (b"a b\r\n", b"a b"),
        (b"a b\n\n", b"a b\n"),
        (b"a b\r", b"a b\r"),
        (b"a\0b", b"a\0b"),
        (b"a\xff\n", b"a\xff"),
        ("é\n\n😀\n".encode(), "é\n\n😀".encode()),
    ],
)
def test_one_final_newline_is_dropped(tmp_path, data, text):
    expected = PIECES.Encode(text)
    (tmp_path / "prompt.txt").write_bytes(data)
    assert ids_of("-p", "-", stdin=data) == expected
    assert ids_of(stdin=data) == expected
    assert ids_of("-f", tmp_path / "prompt.txt") == expected


def test_argument_is_taken_exactly():
    assert ids_of("-p", "a\n") == PIECES.Encode("a\n") != PIECES.Encode("a")


def test_large_input(tmp_path):
    text = "the water " * 30_000
    assert ids_of(stdin=text.encode()) == PIECES.Encode(text)


@pytest.mark.parametrize("prompt", ["", " ", " \n\t ", "\u3000\u00a0", "\r\n"])
def test_blank_prompt(abc, tmp_path, prompt):
    fails(4, "-m", abc, "-p", prompt)
    fails(4, "-m", abc, stdin=prompt.encode())
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    fails(4, "-m", abc, "-f", tmp_path / "prompt.txt")


def test_missing_prompt_file(abc, tmp_path):
    fails(4, "-m", abc, "-f", tmp_path / "nowhere.txt", says="nowhere.txt")
    fails(4, "-m", abc, "-f", tmp_path)


def test_too_long_prompt():
    prompt = "the " * 300
    n = len(templated(prompt))
    message = fails(4, "-m", GQA, "-p", prompt).err
    assert str(n) in message and "256" in message
    fails(4, "-m", MHA, "-p", "x", "--context", len(templated("x")))
    works("-m", MHA, "-p", "x", "--context", len(templated("x")) + 1)


def test_warning_above_the_trained_length():
    args = ("-m", MHA, "-p", "a " * 460, "--max-new-tokens", 1, "--seed", 1)
    message = works(*args).err
    assert "warning" in message and "512" in message
    assert works(*args, "-q").err == ""
    assert works("-m", MHA, "-p", "x", "--max-new-tokens", 1, "--seed", 1).err == ""


def test_invalid_utf8_is_a_warning(abc):
    result = works("-m", abc, stdin=b"a \xff b")
    assert result.out == b"abc\n" and "warning" in result.err and "UTF-8" in result.err


def test_typed_control_tokens_stay_text():
    assert EOS not in ids_of("-p", "</s>") and BOS not in ids_of("-p", "<s>")


def test_tokens_are_the_whole_input(abc):
    for ids in (f"1,{START}", f"[1, {START}]", f"1, {START}"):
        (line,) = works("-m", abc, "--tokens", ids, "--json").lines
        assert (line["prompt_tokens"], line["text"], line["tokens"]) == (
            2,
            "abc",
            [*letters("abc"), EOS],
        )
    for ids in ("", "a", "1,,2", "1,2,x", "-1", "1;2", "99999999999"):
        fails(2, "-m", abc, "--tokens", ids)
    fails(4, "-m", abc, "--tokens", "1,400")
    assert bpo("-m", abc, "--tokens", "1,2", "--mode", "aggressive").code in (2, 4)


# ------------------------------------------------------------------------------------- usage errors


@pytest.mark.parametrize(
    "args",
    [
        ["--top-p", "2"],
        ["--top-p", "-0.1"],
        ["--top-p", "nan"],
        ["--top-p", ""],
        ["--top-p", "0.5x"],
        ["--temperature", "-1"],
        ["--temperature", "inf"],
        ["--temperature", "101"],
        ["--greedy", "--temperature", "1"],
        ["--top-k", "-1"],
        ["--top-k", "1.5"],
        ["-n", "0"],
        ["-n", "-3"],
        ["-n", "many"],
        ["-n", "1e3"],
        ["-n", "99999999999999999999"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
        ["--seed", "9007199254740992"],
        ["--seed", "1.0"],
        ["-t", "0"],
        ["--context", "0"],
        ["--mode", "wild"],
        ["--device", "tpu"],
        ["--matmul", "mkl"],
        ["--nonsense"],
        ["-X"],
        ["extra"],
        ["--seed"],
        ["-f", "file"],
        ["--tokens", "1,2"],
    ],
    ids=" ".join,
)
def test_usage_errors(abc, args):
    fails(2, "-m", abc, "-p", "x", *args)


def test_error_names_option_value_and_range(abc):
    message = fails(2, "-m", abc, "-p", "x", "--top-p", "2").err
    assert "--top-p" in message and '"2"' in message and "0 to 1" in message
    assert "--nonsense" in fails(2, "-m", abc, "-p", "x", "--nonsense").err


def test_errors_of_the_library_name_options(abc, tmp_path):
    """The library's messages name fields of bpo.h, the program's name its options.

    Cli/option_words.c translates.
    """
    table = re.findall(
        r'\{"(\w+)", "(-[\w-]*)"\}', (ROOT / "cli" / "option_words.c").read_text("utf-8")
    )
    header, options = (ROOT / "bpo.h").read_text("utf-8"), works("--help").out.decode().split()
    assert len(table) > 10
    for word, option in table:
        assert re.search(rf"\b{word}\b", header), word
        assert option in options or f"{option}," in options, option
    assert "or leave --device at auto" in fails(5, "-m", abc, "-p", "x", "--device", "cuda").err
    assert "give -m a bpo.bin" in fails(3, "-m", tmp_path / "nowhere.bin", "-p", "x").err
    words = re.compile(
        r"\b(n_slots|n_samples|n_threads|n_positions|max_new_tokens|top_[kp]|bpo_[a-z_]+)\b"
    )
    for args in (
        ["--context", "9999"],
        ["--max-new-tokens", 1 << 30],
        ["--tokens", "1,99999"],
        ["--context", "3"],
        ["-t", "1025"],
    ):
        result = bpo("-m", GQA, *([] if "--tokens" in args else ["-p", "x"]), *args, "-q")
        assert result.code in (0, 2, 4) and not words.search(result.err), result.err


def test_file_names_are_not_translated(tmp_path):
    for name in ("n_slots.bin", "device", "n_slots/ids"):
        assert f"/{name}: " in fails(3, "-m", tmp_path / name, "-p", "x").err


def test_no_such_device(abc):
    fails(5, "-m", abc, "-p", "x", "--device", "cuda")
    for device in ("auto", "cpu"):
        assert works("-m", abc, "-p", "x", "--device", device).out == b"abc\n"


# -------------------------------------------------------------------------------------- model files


def test_missing_model(tmp_path):
    fails(3, "-m", tmp_path / "nowhere.bin", "-p", "x", says="nowhere.bin")
    fails(3, "-m", "/dev/null", "-p", "x")
    fails(3, "-m", tmp_path, "-p", "x")


def test_truncated_or_longer_model(tmp_path):
    data, path = GQA.read_bytes(), tmp_path / "cut.bin"
    header = 8 + int.from_bytes(data[:8], "little")
    for n in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        fails(3, "-m", path, "-p", "x")
        fails(3, "-m", path, "--info")
    path.write_bytes(data + b"\0")
    fails(3, "-m", path, "-p", "x")


def test_other_files(tmp_path):
    for path in (TOKENIZER, TESTS / "test_cli.py", GOLDEN / "gqa.npz"):
        fails(3, "-m", path, "-p", "x")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float16)}, tmp_path / "other.safetensors")
    fails(3, "-m", tmp_path / "other.safetensors", "-p", "x", says="export_weights.py")


def test_verify():
    assert b"mha.bin" in works("-m", MHA, "--verify").out


def test_verify_notices_every_flipped_byte(tmp_path):
    """Bytes are changed in the header's length, text and padding, at the beginning and the end of
    every tensor, and at random."""
    data, path = bytearray(GQA.read_bytes()), tmp_path / "flipped.bin"
    begin = 8 + int.from_bytes(data[:8], "little")
    places = {*range(9), 40, 44, begin - 1, begin - 2, len(data) - 1}
    for name, entry in read_header(GQA).items():
        if name != "__metadata__":
            places |= {begin + entry["data_offsets"][0], begin + entry["data_offsets"][1] - 1}
    rng = np.random.default_rng(1)
    places |= {*rng.integers(0, begin, 30).tolist(), *rng.integers(0, len(data), 20).tolist()}
    for place in sorted(places):
        data[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data)
        result = bpo("-m", path, "--verify")
        assert (
            result.code == 3
            and result.out == b""
            and "error: " in result.err
            and "hint: " in result.err
        ), place
        data[place] = GQA.read_bytes()[place]
    path.write_bytes(data)
    works("-m", path, "--verify")


def test_verify_names_the_tensor(tmp_path):
    data, path = bytearray(GQA.read_bytes()), tmp_path / "flipped.bin"
    begin = 8 + int.from_bytes(data[:8], "little")
    name = "model.layers.1.mlp.down_proj.weight"
    data[begin + read_header(GQA)[name]["data_offsets"][0] + 77] ^= 4
    path.write_bytes(data)
    fails(3, "-m", path, "--verify", says=name)


def test_edited_config_is_refused_or_obeyed(tmp_path):
    for changes in (
        {"n_heads": "7"},
        {"rope_theta": "nan"},
        {"format_version": "2"},
        {"template": "no placeholder"},
        {"dim": "1e9"},
    ):
        fails(3, "-m", edit_metadata(GQA, tmp_path / "edited.bin", **changes), "-p", "x")
    edited = edit_metadata(
        GQA, tmp_path / "edited.bin", stable__samples="2", stable__max_new_tokens="3"
    )
    assert [line["new_tokens"] <= 3 for line in works("-m", edited, "-p", "x", "--json").lines] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.layers.2.self_attn.qkv_proj.weight", "layer 2"),
        ("lm_head.weight", "the logits"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error(tmp_path, name, where):
    data, path = bytearray(GQA.read_bytes()), tmp_path / "nan.bin"
    begin = 8 + int.from_bytes(data[:8], "little")
    at = begin + read_header(GQA)[name]["data_offsets"][0]
    data[at : at + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(data)
    message = fails(1, "-m", path, "-p", "x", "-q", says=where).err
    assert "not finite" in message
    fails(1, "-m", path, "-p", "x", "-q", "--dump-logits", tmp_path / "logits.npy")


def test_memory_is_refused_before_work_begins():
    """An error instead of a killed process.

    The keys and values of 2^30 positions would take a terabyte.
    """
    started = time.monotonic()
    message = fails(5, "-m", HUGE, "-p", "x", "--max-new-tokens", 1 << 29, "-q").err
    assert "memory" in message
    assert time.monotonic() - started < 5
    fails(
        5,
        "-m",
        HUGE,
        "-p",
        "x",
        "--max-new-tokens",
        1 << 29,
        "--context",
        1 << 30,
        "-n",
        2,
        "-q",
        says="memory",
    )
    works("-m", HUGE, "-p", "x", "--max-new-tokens", 2)


@pytest.mark.parametrize("where", ["env", "-m over env", "./bpo.bin"])
def test_where_the_model_comes_from(abc, tmp_path, where):
    if where == "env":
        result = works("-p", "x", "-q", BPO_MODEL=str(abc))
    elif where == "-m over env":
        result = works("-m", abc, "-p", "x", "-q", BPO_MODEL="/dev/null")
    else:
        shutil.copyfile(abc, tmp_path / "bpo.bin")
        result = works("-p", "x", "-q", cwd=tmp_path)
    assert (result.out, result.err) == (b"abc\n", "")


@pytest.mark.parametrize("place", ["bin/demo", "share/bpo"])
def test_demo_model_is_the_last_choice_and_says_so(abc, tmp_path, place):
    (tmp_path / "bin").mkdir()
    (tmp_path / place).mkdir(parents=True)
    shutil.copy2(BPO, tmp_path / "bin" / "bpo")
    fails(3, "-p", "x", program=tmp_path / "bin" / "bpo")
    shutil.copyfile(abc, tmp_path / place / "bpo-demo.bin")
    result = works("-p", "x", "-q", program=tmp_path / "bin" / "bpo")
    assert result.out == b"abc\n" and "demo" in result.err


# ----------------------------------------------------------------------------------- other commands


def test_help_and_version():
    for option in ("-h", "--help"):
        result = works(option)
        assert result.err == "" and b"--max-new-tokens" in result.out and b"--seed" in result.out
    for option in ("-V", "--version"):
        result = works(option)
        assert (
            result.err == ""
            and re.match(rb"bpo \d+\.\d+\.\d+\n", result.out)
            and b"OpenBLAS" in result.out
        )
    assert b"scalar" in works("--version", BPO_SIMD="scalar").out


def test_info():
    text = works("-m", GQA, "--info").out.decode()
    for part in ("gqa", "1e+06", "1e-05", "256", "temperature 0.6", "temperature 0.9", "{prompt}"):
        assert part in text, part


def test_stats_are_on_stderr(abc):
    result = works("-m", abc, "-p", "x", "--stats", "--seed", 1)
    assert result.out == b"abc\n"
    for part in ("load", "prefill", "decode", "tokens/s"):
        assert part in result.err


def test_dump_logits(tmp_path):
    file = tmp_path / "logits.npy"
    works("-m", GQA, "-p", "Tell me", "--dump-logits", file)
    from_text = np.load(file)
    works("-m", GQA, "--tokens", csv(templated("Tell me")), "--dump-logits", file)
    assert from_text.shape == (len(templated("Tell me")), 400) and np.array_equal(
        from_text, np.load(file)
    )
    fails(1, "-m", GQA, "-p", "x", "--dump-logits", tmp_path / "nowhere" / "logits.npy", "-q")
    fails(1, "-m", GQA, "-p", "x", "--dump-logits", "/dev/full", "-q")


# ---------------------------------------------------------------------------------- aggressive mode


def test_aggressive_defaults(abc):
    assert len(works("-m", abc, "-p", "x", "--mode", "aggressive", "--json").lines) == 5
    assert len(works("-m", abc, "-p", "x", "--mode", "aggressive", "--json", "-n", 2).lines) == 2


@pytest.mark.parametrize("prompt", ["x", "Tell me about water, and how it turns into ice"])
def test_aggressive_minimum_length(models, prompt):
    """EOS and newline are forbidden while P + new < P + N + 5, where N counts the prompt's ids and
    BOS; then they are nearly certain."""
    model = constant_model(
        models / "ends.bin", {EOS: 6.0, NEWLINE: 6.0, piece("a"): 0.0, piece("e"): 0.0}
    )
    min_new = 1 + len(PIECES.Encode(prompt)) + 5
    lines = works(
        "-m", model, "-p", prompt, "--mode", "aggressive", "-n", 60, "--json", "--seed", 1
    ).lines
    assert {line["new_tokens"] for line in lines} == {min_new + 1}
    assert {line["tokens"][-1]: line["stop"] for line in lines} == {EOS: "eos", NEWLINE: "newline"}
    stable = works(
        "-m", model, "-p", prompt, "-n", 60, "--json", "--seed", 1, "--max-new-tokens", 90
    ).lines
    assert {line["stop"] for line in stable} == {"eos"} and min(
        line["new_tokens"] for line in stable
    ) == 1


BANNED = ("[PROTECT]", "\n\n[PROTECT]", "[KEEP", "[INSTRUCTION]")


def count(needle: list[int], ids: list[int]) -> int:
    """How often a sequence of ids occurs in another one."""
    return sum(ids[i : i + len(needle)] == needle for i in range(len(ids)))


def test_banned_sequences_in_what_is_generated(models):
    """The model repeats "[KEEP" with a random number of Es. After two of them, "P" is forbidden."""
    banned = PIECES.Encode("[KEEP")
    space, bracket, k, e, _, p = banned
    model = chain_model(
        models / "keep.bin", {START: space, space: bracket, bracket: k, k: e, e: (e, p), p: space}
    )
    args = ("-m", model, "-p", "x", "--json", "-n", 3, "--max-new-tokens", 300, "--seed", 1)
    found = {
        mode: [line["tokens"] for line in works(*args, "--mode", mode).lines]
        for mode in ("stable", "aggressive")
    }
    assert sum(count(banned, tokens) for tokens in found["stable"]) > 10
    assert sum(count(banned[:-1], tokens) for tokens in found["aggressive"]) > 10
    assert sum(count(banned, tokens) for tokens in found["aggressive"]) == 0


@pytest.mark.parametrize("text", BANNED)
def test_banned_sequences_across_the_prompt(models, tmp_path, text):
    """A template that ends with the beginning of a banned sequence, whose last id then cannot be
    the first one generated."""
    ids = PIECES.Encode(text)
    model = constant_model(models / "banned.bin", {ids[-1]: 3.0, piece("a"): 0.0})
    template = "{prompt} " + text[:-1]
    assert PIECES.Encode(template.replace("{prompt}", "x"))[1 - len(ids) :] == ids[:-1]
    model = edit_metadata(model, tmp_path / "banned.bin", template=template)
    args = (
        "-m",
        model,
        "-p",
        "x",
        "--json",
        "--max-new-tokens",
        1,
        "-n",
        40,
        "--top-p",
        1,
        "--seed",
        1,
    )
    hot = ("--temperature", 2)
    assert {line["tokens"][0] for line in works(*args, *hot).lines} == {ids[-1], piece("a")}
    assert {line["tokens"][0] for line in works(*args, *hot, "--mode", "aggressive").lines} == {
        piece("a")
    }
    assert {
        line["tokens"][0] for line in works(*args, "--greedy", "--mode", "aggressive").lines
    } == {piece("a")}


@pytest.mark.parametrize(
    ("tail", "cut"),
    [("[/INST", True), ("[KES", True), ("[INSA", True), ("[PRO", True), ("[KA", False)],
)
def test_aggressive_cuts(models, tail, cut):
    model = chain_model(models / "cut.bin", says(letters("gbcdf " + tail), end=START))
    args = ("-m", model, "-p", "x", "--json", "--max-new-tokens", 20)
    text = works(*args, "--mode", "aggressive", "-n", 1).lines[0]["text"]
    assert text == "gbcdf" if cut else text.startswith("gbcdf " + tail)
    stable = works(*args).lines[0]["text"]
    assert stable == "gbcdf" if tail == "[/INST" else stable.startswith("gbcdf " + tail)


# ----------------------------------------------------------------------------------------- sampling


def kept(
    logits: dict[int, float], temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """The reference's rules: the ids that may be drawn, and their probabilities."""
    ranked = sorted(logits, key=lambda i: (-logits[i], i))
    if 0 < top_k < len(ranked):
        # with all ties of the last
        ranked = [i for i in ranked if logits[i] >= logits[ranked[top_k - 1]]]
    p = np.exp((np.array([logits[i] for i in ranked]) - logits[ranked[0]]) / temperature)
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    n = len(ranked) if top_p >= 1 else max(1, int(np.sum(before < top_p)))
    return {i: float(x / p[:n].sum()) for i, x in zip(ranked[:n], p[:n], strict=True)}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.6, 50, 0.9), (0.9, 50, 0.9), (1, 0, 1), (2, 3, 1), (1, 0, 0), (1.5, 0, 0.55), (1, 1, 1)],
)
def test_sampled_distribution(models, temperature, top_k, top_p):
    """2,000 draws with one seed follow the exact distribution, even if the third rank is tied."""
    logits = {50: 2.0, 60: 1.5, 70: 1.0, 80: 1.0, 90: 0.5, 100: 0.0, 110: -1.0}
    model = constant_model(models / "draws.bin", logits)
    args = ("--temperature", temperature, "--top-k", top_k, "--top-p", top_p, "--seed", 1)
    lines = works("-m", model, "-p", "x", "--json", "-n", 2000, "--max-new-tokens", 1, *args).lines
    drawn = [line["tokens"][0] for line in lines]
    expected = kept(logits, temperature, top_k, top_p)
    assert set(drawn) <= set(expected)
    chi2 = sum((drawn.count(i) - 2000 * p) ** 2 / (2000 * p) for i, p in expected.items())
    assert chi2 < 3 * len(expected) + 10  # its mean is len(expected) - 1


# -------------------------------------------------------------- outputs that fail, and interruption


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "args",
    [
        ["-p", "x"],
        ["-p", "x", "--json"],
        ["--info"],
        ["--verify"],
        ["--tokenize", "-p", "x"],
        ["-h"],
        ["-V"],
    ],
)
def test_full_disk(abc, args):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [BPO, "-m", abc, "-q", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert done.returncode == 1
    assert (
        b"cannot write to standard output: No space left" in done.stderr
        and b"hint: " in done.stderr
    )


def test_closed_pipe(abc):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [BPO, "-m", abc, "-p", "x", "-q"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(write)
    assert done.returncode == 1 and b"error: " in done.stderr and b"hint: " in done.stderr


def test_closed_stdout(abc):
    command = ["sh", "-c", '"$@" >&-', "-", BPO, "-m", abc, "-p", "x", "-q"]
    done = subprocess.run(command, capture_output=True, env=environment(), check=False)
    assert done.returncode == 1 and b"error: " in done.stderr


@pytest.fixture(scope="module")
def endless(models):
    """A model that never ends its text, and has positions for minutes of it."""
    return constant_model(
        models / "endless.bin", {piece(c): 0.0 for c in "aetr"}, max_position_embeddings=1 << 24
    )


@pytest.fixture
def start():
    """Starts the program; it is killed if it still runs when the test ends."""
    processes = []

    def start(*args, stdout) -> subprocess.Popen:
        processes.append(
            subprocess.Popen([BPO, *args], stdout=stdout, stderr=subprocess.PIPE, env=environment())
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


ENDLESS = ("-p", "x", "--max-new-tokens", str(1 << 22))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_the_text_so_far(start, endless, signum, code):
    """On a terminal the text is streamed, which shows the test when it has begun."""
    master, slave = open_terminal()
    process = start("-m", endless, *ENDLESS, stdout=slave)
    os.close(slave)
    text = os.read(master, 1000)
    process.send_signal(signum)
    while chunk := read_terminal(master):
        text += chunk
    os.close(master)
    assert process.wait(60) == code
    assert re.fullmatch(rb"[aetr ]+\r\n", text)


def open_terminal() -> tuple[int, int]:
    """The two ends of a pseudo-terminal."""
    try:
        return pty.openpty()
    except OSError as why:  # a bare chroot has no /dev/pts
        pytest.skip(f"no pseudo-terminal here: {why}")


def read_terminal(master: int) -> bytes:
    """What the program has written so far; b"" after it has closed the terminal."""
    try:
        return os.read(master, 1 << 16)
    except OSError:  # on Linux it is EIO
        return b""


def test_interruption_in_json(start, endless):
    process = start("-m", endless, *ENDLESS, "--json", stdout=subprocess.PIPE)
    assert b"seed" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = map(json.loads, out.splitlines())
    assert line["stop"] == "interrupted" and line["new_tokens"] == len(line["tokens"]) > 0
    assert line["text"] == PIECES.Decode(line["tokens"]).strip()


def test_terminal_output_is_the_same_text(models):
    model = chain_model(models / "stream.bin", says(letters("a😀b [/I"), end=START))
    args = ("-m", model, "-p", "x", "--max-new-tokens", "30", "-q")
    master, slave = open_terminal()
    done = subprocess.run(
        [BPO, *args], stdout=slave, stderr=subprocess.PIPE, env=environment(), check=True
    )
    os.close(slave)
    text = b""
    while chunk := read_terminal(master):
        text += chunk
    os.close(master)
    assert text.replace(b"\r\n", b"\n") == works(*args).out and done.stderr == b""


def test_colour_only_on_a_terminal(abc):
    assert "\x1b" not in fails(2, "--nonsense").err
    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        master, slave = open_terminal()
        subprocess.run(
            [BPO, "--nonsense"], stdout=slave, stderr=slave, env=environment(**env), check=False
        )
        os.close(slave)
        assert (b"\x1b" in read_terminal(master)) == coloured
        os.close(master)


# ----------------------------------------------------------------------------------- the demo model


@pytest.mark.skipif(
    not (ROOT / "demo" / "bpo-demo.bin").exists(), reason="demo/bpo-demo.bin is not there"
)
def test_demo_model():
    demo = ROOT / "demo" / "bpo-demo.bin"
    works("-m", demo, "--verify")
    first = works("-m", demo, "-p", "Tell me about Harry Potter", "--seed", 1)
    assert works("-m", demo, "-p", "Tell me about Harry Potter", "--seed", 1).out == first.out
    assert b"Harry Potter" in first.out and demo.stat().st_size <= 16 << 20
    assert (
        b"Harry Potter"
        in works(
            "-m", demo, "-p", "Tell me about Harry Potter", "--seed", 1, "--matmul", "openblas"
        ).out
    )
