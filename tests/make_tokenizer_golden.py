"""Writes tests/data/tiny.model and tests/data/tiny_tokenizer.json.

They are a model for the tokenizer's tests, and its golden ids.

The model is trained with the settings of Llama-2's, but tiny: BPE, no normalisation, byte fallback,
split digits. The oracle is the sentencepiece package. Run it from anywhere: python
tests/make_tokenizer_golden.py
"""

import io
import json
import random
from pathlib import Path

import sentencepiece as spm

DATA = Path(__file__).parent / "data"

WORDS = (
    "you are an expert prompt engineer please help me improve this prompt to get a more helpful "
    "and harmless response tell me about the history of a city write a short poem for my "
    "grandmother explain how water turns into ice list three reasons why people travel and give "
    "examples in simple words compare two books"
).split()

# Texts at which tokenizers differ: spaces, control pieces typed by a user, digits, other scripts,
# bytes that are not UTF-8.
TEXTS = [
    *(
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\0",
        "a\0b",
        "a",
        " a",
        "  a",
        "a ",
        "a  ",
        "a  b",
        "a\nb",
        " \n a",
    ),
    *(
        "the",
        " the",
        "the the",
        "The THE tHe",
        "1234567890",
        "3.14159",
        "x=1;y=22",
        "don't",
        "e-mail: a@b.org",
        "C:\\dir\\file",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<s>the</s>",
        "<0x0A>",
        "[INST]",
        " [/INST]",
        "▁",
        "▁▁",
        "▁the",
        "the▁water",
        "\ufeffthe",
    ),
    *("é", "e\u0301", "naïve café", "Größe", "€", "日本語", "привет", "😀", "😀😀"),
    *("👩\u200d👩\u200d👧", "🏳️\u200d🌈", "\u2028", "\u00a0", "\ufffd", "\x7f\x80"),
    *(
        "[INST] You are an expert\nTell me about water [/INST]",
        "a" * 200,
        "the " * 50,
        "ab" * 65,
        " " * 33,
    ),
]
BYTES = [
    *(
        b"\x80",
        b"\xff",
        b"a\xffb",
        b"\xc0\x80",
        b"\xc3",
        b"\xe2\x82",
        b"\xe2\x82the",
        b"\xf0\x9f\x98",
        b"\xf0\x9f\x98\x80",
    ),
    *(b"\xed\xa0\x80", b"\xed\xa0\xbd\xed\xb8\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80"),
    *(b"\xef\xbf\xbe", b"\0\0", b"\xc3\xa9\xc3"),
]


def train() -> bytes:
    """Trains the model on made-up sentences; the same on every machine."""
    rng = random.Random(1)
    sentences = [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(2000)
    ]
    # these give pieces of several spaces
    sentences += ["a    b  c" + " " * (i % 5) for i in range(2000)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def random_bytes(rng: random.Random) -> bytes:
    """A text of words, spaces, characters of several scripts and stray bytes."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(5)
        if kind == 0:
            parts.append(bytes(rng.choices(range(256), k=rng.randint(1, 4))))
        elif kind == 1:
            parts.append(rng.choice([" ", "  ", "\n", "\t", "▁", "é", "日", "😀"]).encode())
        else:
            parts.append((rng.choice(["", " "]) + rng.choice(WORDS)).encode())
    return b"".join(parts)


def random_ids(rng: random.Random, sp: spm.SentencePieceProcessor) -> list[int]:
    """Runs of byte pieces, some of them characters, among other pieces; no control pieces."""
    ids = []
    for _ in range(rng.randint(1, 8)):
        kind = rng.randrange(4)
        if kind == 0:
            ids += [
                sp.piece_to_id(f"<0x{byte:02X}>")
                for byte in rng.choices(range(256), k=rng.randint(1, 5))
            ]
        elif kind == 1:
            text = rng.choice(["é", "日", "😀", "\n"]).encode()
            ids += [sp.piece_to_id(f"<0x{byte:02X}>") for byte in text[: rng.randint(1, len(text))]]
        elif kind == 2:
            ids += [sp.piece_to_id("▁")] * rng.randint(1, 2)
        else:
            ids += rng.choices(range(3, sp.get_piece_size()), k=rng.randint(1, 3))
    return ids


def golden(model: bytes, append: bytes, n: int, seed: int) -> dict:
    """Golden rows of the model with some protobuf fields appended, which override its own."""
    sp = spm.SentencePieceProcessor(model_proto=model + append)
    rng = random.Random(seed)
    texts = [text.encode() for text in TEXTS] + BYTES + [random_bytes(rng) for _ in range(n)]
    rows = [random_ids(rng, sp) for _ in range(n)]
    return {
        "append": append.hex(),
        "encode": [[text.hex(), sp.encode(text)] for text in texts],
        "decode": [[ids, sp.decode(ids).encode().hex()] for ids in rows],
    }


def main() -> None:
    """Writes both files."""
    model = train()
    variants = [
        golden(model, b"", 150, 2),
        golden(model, b"\x1a\x02\x18\x00", 40, 3),  # normalizer_spec { add_dummy_prefix: false }
        # normalizer_spec { remove_extra_whitespaces: true }
        golden(model, b"\x1a\x02\x20\x01", 40, 4),
    ]
    DATA.mkdir(exist_ok=True)
    (DATA / "tiny.model").write_bytes(model)
    rows = (
        json.dumps(variants, separators=(",", ":"))
        .replace("]],", "]],\n")
        .replace('"],[', '"],\n[')
        .replace("]],[", "]],\n[")
    )
    (DATA / "tiny_tokenizer.json").write_text(rows + "\n")


if __name__ == "__main__":
    main()
