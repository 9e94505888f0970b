"""The program's ids against the sentencepiece package's, on random texts.

The tiny tokenizer, and Llama-2's where ../shared has it.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from checkpoints import (
    ROOT,
    TOKENIZER,
    export_weights,
    llama_config,
    weight_shapes,
    write_checkpoint,
)
from program import GOLDEN, works

LLAMA = Path(os.environ.get("BPO_SHARED", ROOT.parent / "shared")) / "llama2" / "tokenizer.model"
WORDS = [
    *(
        "the",
        "prompt",
        "Tell",
        "me",
        "about",
        "Harry",
        "Potter",
        "water",
        "1234",
        "3.14",
        "don't",
        "import",
        "  \t",
    ),
    *(
        "[INST]",
        "</s>",
        "<s>",
        "<0x0A>",
        "▁",
        "é",
        "ß",
        "€",
        "日本",
        "привет",
        "😀",
        "👩\u200d👧",
        "\ufeff",
    ),
]


def random_text(rng: random.Random) -> bytes:
    """Words, spaces, line ends, any characters and any bytes.

    Never blank, and without a final line end, which -f drops.
    """
    parts = []
    for _ in range(rng.randint(1, 30)):
        kind = rng.randrange(8)
        if kind < 4:
            parts.append(rng.choice(WORDS).encode() + b" " * rng.randrange(3))
        elif kind == 4:
            parts.append(rng.choice([b"\n", b"\r\n", b"\t", b"\0", b"    ", b"\xc2\xa0"]))
        elif kind == 5:
            code = rng.choice(
                [
                    rng.randrange(0x80),
                    rng.randrange(0x800),
                    rng.randrange(0x10000),
                    rng.randrange(0x110000),
                ]
            )
            parts.append(chr(code).encode("utf-8", "surrogatepass"))
        elif kind == 6:
            parts.append(bytes(rng.choices(range(256), k=rng.randint(1, 5))))
        else:
            parts.append(bytes(rng.choices(range(0x20, 0x7F), k=rng.randint(1, 10))))
    return b"".join(parts) + b"."


def compare(model: Path, tokenizer: Path, folder: Path, n: int) -> None:
    """Compares the ids of n texts, each given as a file, because an argument cannot contain NUL."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    rng = random.Random(n)
    texts = [random_text(rng) for _ in range(n)]

    def ids_of(i: int) -> list[int]:
        file = folder / f"{i}.txt"
        file.write_bytes(texts[i])
        return json.loads(works("-m", model, "--tokenize", "--raw", "-f", file).out)

    with ThreadPoolExecutor(4) as pool:
        for text, found in zip(texts, pool.map(ids_of, range(n)), strict=True):
            assert found == pieces.encode(text), text


def test_random_texts(tmp_path):
    compare(GOLDEN / "mha.bin", TOKENIZER, tmp_path, 100)


@pytest.mark.skipif(
    not LLAMA.exists(), reason="no ../shared/llama2/tokenizer.model (set BPO_SHARED)"
)
def test_random_texts_llama(tmp_path):
    config = llama_config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=32000,
    )
    weights = {name: np.ones(shape, np.float16) for name, shape in weight_shapes(config).items()}
    export_weights.export(
        write_checkpoint(tmp_path / "hf", config, weights, LLAMA),
        tmp_path / "llama.bin",
        source="llama",
    )
    compare(tmp_path / "llama.bin", LLAMA, tmp_path, 250)
