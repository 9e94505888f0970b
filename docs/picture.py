#!/usr/bin/env python3
"""Draw the pictures of the documentation: docs/*.svg.

    python docs/picture.py              write them
    python docs/picture.py --check      exit with 1 if a committed picture is not current
    python docs/picture.py --dark DIR   write them to DIR in the dark colours, to look at them:
                                        rsvg-convert DIR/layer.svg -o /tmp/layer.png

    forward.svg          the whole forward pass with the shapes of Llama-2-7b: D 4096, F 11008,
                         H = HK 32, hd 128, L 32, V 32000
    layer.svg            one layer, with one row's vectors drawn to scale; the demo model's shapes
    kv-cache.svg         where keys and values lie, and which rows a call has
    sampling.svg         temperature, top-k, top-p and the draw on a small example
    online-softmax.svg   attention over blocks of positions, with numbers

The colours are CSS classes with a second set for readers who prefer dark pages. Names in the
pictures are those of bpo.c and kernels.h.
"""

import argparse
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"

# class: (property, light, dark)
COLOURS = {
    "page": ("fill", "#ffffff", "#0d1117"),
    "panel": ("fill", "#f6f8fa", "#161b22"),
    "op": ("fill", "#dbeafe", "#1e3a5f"),
    "step": ("fill", "#fef3c7", "#533f03"),
    "memory": ("fill", "#dcfce7", "#14432a"),
    "query": ("fill", "#fbcfe8", "#6b2150"),
    "faint": ("fill", "#e5e7eb", "#30363d"),
    "ink": ("fill", "#111827", "#e6edf3"),
    "soft": ("fill", "#4b5563", "#9da7b3"),
    "shape": ("fill", "#1d4ed8", "#79b8ff"),
    "residual": ("fill", "#7c3aed", "#b694f5"),
    "line": ("stroke", "#374151", "#adb8c4"),
    "dim": ("stroke", "#9ca3af", "#6e7681"),
    "stream": ("stroke", "#7c3aed", "#b694f5"),
}


class Picture:
    """An SVG that grows by boxes, lines and words."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        kind: str,
        radius: float = 6,
        border: str = "line",
        dash: bool = False,
    ):
        """A rectangle."""
        style = " stroke-dasharray='6 4'" if dash else ""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='{radius:g}' "
            f"class='{kind} {border}'{style}/>"
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        anchor: str = "start",
        kind: str = "ink",
        bold: bool = False,
    ):
        """One line of text."""
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' text-anchor='{anchor}' "
            f"class='{kind}'{weight}>{escape(words)}</text>"
        )

    def line(
        self,
        *points: tuple[float, float],
        kind: str = "line",
        width: float = 1.6,
        head: bool = True,
    ):
        """A line through points, with an arrow head at its end."""
        where = " ".join(f"{x:g},{y:g}" for x, y in points)
        marker = f" marker-end='url(#head-{kind})'" if head else ""
        self.parts.append(
            f"<polyline points='{where}' fill='none' stroke-width='{width:g}' "
            f"class='{kind}'{marker}/>"
        )

    def svg(self, dark: bool) -> str:
        """The file. dark: the dark colours for everyone, for looking at them."""
        light = "\n".join(
            f".{name} {{ {prop}: {(night if dark else day)} }}"
            for name, (prop, day, night) in COLOURS.items()
        )
        night_rules = "\n".join(
            f"  .{name} {{ {prop}: {night} }}" for name, (prop, _, night) in COLOURS.items()
        )
        heads = "".join(
            f"<marker id='head-{kind}' markerWidth='9' markerHeight='9' refX='7' refY='3' "
            "orient='auto' markerUnits='userSpaceOnUse'>"
            f"<path d='M0,0 L8,3 L0,6' fill='none' class='{kind}'/></marker>"
            for kind in ("line", "dim", "stream")
        )
        lines = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' "
            f"width='{self.width}' height='{self.height}' font-family='{FONT}'>",
            f"<style>\n{light}\n"
            f"@media (prefers-color-scheme: dark) {{\n{night_rules}\n}}\n</style>",
            f"<defs>{heads}</defs>",
            "<rect width='100%' height='100%' class='page'/>",
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------- the whole forward pass

BOX_X, BOX_W, BOX_H, GAP = 330, 240, 34, 22

# (name, what it computes, what comes out: its shape for R rows, colour)
BEFORE = [
    ("prompt", "text in the template", "UTF-8 bytes", "step"),
    ("tokenize_templated", "SentencePiece, BOS first", "ids [P]", "step"),
    ("rows", "(token, slot, position)", "rows [R]", "step"),
    ("embed", "x = table[token]", "x [R][4096]", "op"),
]
ATTENTION = [
    ("rmsnorm", "y = x / rms(x) · gain", "[R][4096]", "op"),
    ("matmul  W_qkv", "one matrix for q, k, v", "qkv [R][(32 + 2·32)·128]", "op"),
    ("rope_kv", "rotate q, k; store k, v", "qkv [R][12288]", "op"),
    ("attention", "softmax(q Kᵀ / √hd) V", "[R][32·128]", "op"),
    ("matmul  W_o", "added to x", "x [R][4096]", "op"),
]
FEED_FORWARD = [
    ("rmsnorm", "y = x / rms(x) · gain", "[R][4096]", "op"),
    ("matmul  W_gate_up", "one matrix for gate, up", "[R][2·11008]", "op"),
    ("swiglu", "silu(gate) · up", "[R][11008]", "op"),
    ("matmul  W_down", "added to x", "x [R][4096]", "op"),
]
AFTER = [
    ("gather", "rows whose logits are wanted", "[n][4096]", "op"),
    ("rmsnorm", "", "[n][4096]", "op"),
    ("matmul  lm_head", "", "logits [n][32000]", "op"),
    ("sampler_draw", "temperature, top-k, top-p, draw", "id", "step"),
    ("decoder_push", "pieces to bytes; cut, strip", "UTF-8 text", "step"),
]


def column(
    picture: Picture, y: float, boxes: list, last: bool = False
) -> tuple[float, list[float]]:
    """Boxes under each other from y on; returns the next one's y, and the boxes' middles."""
    middles = []
    centre = BOX_X + BOX_W / 2
    for i, (name, meaning, shape, colour) in enumerate(boxes):
        picture.box(BOX_X, y, BOX_W, BOX_H, colour, 7)
        picture.text(centre, y + 22, name, 14, "middle", bold=True)
        picture.text(BOX_X - 16, y + 18, meaning, 12, "end", "soft")
        picture.text(centre + 10, y + BOX_H + 15, shape, 11, "start", "shape")
        if not (last and i == len(boxes) - 1):
            # the residual stream leaves below these two: a longer arrow
            branch = 14 * (name in ("embed", "matmul  W_o"))
            picture.line((centre, y + BOX_H), (centre, y + BOX_H + GAP + branch - 2))
        middles.append(y + BOX_H / 2)
        y += BOX_H + GAP
    return y, middles


def around(picture: Picture, top: float, bottom: float) -> None:
    """The residual stream beside a sublayer: x goes around it, and its result is added."""
    x, centre = BOX_X + BOX_W + 175, BOX_X + BOX_W / 2
    picture.line(
        (centre, top), (x, top), (x, bottom), (BOX_X + BOX_W + 3, bottom), kind="stream", width=2.4
    )
    picture.text(x + 10, (top + bottom) / 2, "residual stream x, fp32", 12, kind="residual")


def forward() -> Picture:
    """The data's way through the forward pass, with shapes."""
    picture = Picture(930, 1080)
    picture.box(
        60, 20 + 4 * (BOX_H + GAP) + 7, 860, 9 * (BOX_H + GAP) + 18, "panel", 12, "dim", dash=True
    )
    top, _ = column(picture, 20, BEFORE)
    picture.text(76, top + 30, "layer()", 14, bold=True)
    picture.text(76, top + 48, "32 times", 12)
    middle, middles = column(picture, top + 14, ATTENTION)
    around(picture, top, middles[-1])
    side, kv_y = BOX_X + BOX_W, (middles[2] + middles[3]) / 2
    picture.box(side + 40, kv_y - 27, 118, 54, "memory", 7)
    picture.text(side + 99, kv_y - 9, "KV cache", 13, "middle", bold=True)
    picture.text(side + 99, kv_y + 6, "fp16, per slot", 10, "middle")
    picture.text(side + 99, kv_y + 19, "[L][2][HK][S][hd]", 10, "middle")
    picture.line((side, middles[2]), (side + 38, kv_y - 14))
    picture.line((side + 40, kv_y + 14), (side + 3, middles[3]))
    y, middles = column(picture, middle + 14, FEED_FORWARD)
    around(picture, middle, middles[-1])
    y, middles = column(picture, y, AFTER, last=True)
    low, high = middles[-2] + 9, 20 + 2 * (BOX_H + GAP) + BOX_H / 2 + 9
    picture.line((BOX_X, low), (30, low), (30, high), (BOX_X - 3, high), kind="dim")
    picture.text(36, middles[-2] + 24, "the id is the next row", 11, kind="soft")
    picture.box(640, 188, 118, BOX_H, "op", 7)
    picture.text(699, 210, "rope_angles", 13, "middle", bold=True)
    picture.text(770, 202, "cos, sin for rope_kv", 12, kind="soft")
    picture.text(770, 218, "angles [R][64][2]", 11, kind="shape")
    picture.line((BOX_X + BOX_W, 158), (638, 198))
    picture.box(640, 22, 16, 16, "op", 3)
    picture.text(664, 35, "an op of kernels.h", 12)
    picture.box(640, 46, 16, 16, "step", 3)
    picture.text(664, 59, "a step around forward()", 12)
    picture.height = int(y + 4)
    return picture


# ---------------------------------------------------------------------------------- one layer

SCALE = 0.5  # pixels per value of a vector


def vector(
    picture: Picture, y: float, name: str, parts: list[tuple[str, int, str]], shape: str
) -> None:
    """A row's vector as a bar, drawn to scale: parts are (label, values, colour)."""
    x = 230.0
    picture.text(x - 14, y + 17, name, 13, "end", bold=True)
    for label, n, colour in parts:
        picture.box(x, y, n * SCALE, 26, colour, 2)
        if label:
            picture.text(x + n * SCALE / 2, y + 17, label, 11, "middle")
        x += n * SCALE
    picture.text(x + 10, y + 17, shape, 12, kind="shape")


def between(picture: Picture, y: float, name: str, why: str, weights: str = "") -> None:
    """The op between two vectors: its arrow, name, weights and reason."""
    picture.line((248, y), (248, y + 34))
    picture.text(262, y + 21, name, 13, bold=True)
    picture.text(400, y + 21, weights, 12, kind="shape")
    picture.text(560, y + 21, why, 12, kind="soft")


def layer() -> Picture:
    """One layer with the demo model's shapes: D 256, F 512, H 8, HK 2, hd 32."""
    picture = Picture(940, 816)
    heads = [("", 32, "query") for _ in range(8)]
    keys = [("k0", 32, "memory"), ("k1", 32, "memory"), ("v0", 32, "op"), ("v1", 32, "op")]
    queries = [(f"q{h}", 32, "query") for h in range(8)]
    y = 34.0
    title = "a model of width 256 with 8 query heads and 2 key/value heads"
    picture.text(230, 22, f"one row of R, drawn to scale: {title}", 12, kind="soft")
    vector(picture, y, "x", [("residual stream", 256, "faint")], "[256]")
    start = y + 13
    between(picture, y + 30, "rmsnorm", "bring every row to the same size", "attention_norm [256]")
    vector(picture, y + 68, "normed", [("", 256, "faint")], "[256]")
    between(picture, y + 98, "matmul", "what this token asks, offers and says", "W_qkv [384][256]")
    vector(picture, y + 136, "qkv", queries + keys, "[384] = (8 + 2·2)·32")
    between(picture, y + 166, "rope_kv", "turn q and k by the position; k, v to the cache")
    vector(picture, y + 204, "qkv", queries, "[256] now rotated")
    picture.box(620, y + 204, 290, 26, "memory", 4)
    picture.text(765, y + 221, "KV cache: positions 0 … pos of k0 k1 v0 v1", 11, "middle")
    picture.line((765, y + 193), (765, y + 202))
    picture.line((640, y + 230), (640, y + 242))
    between(picture, y + 234, "attention", "q0 … q3 read k0, v0;  q4 … q7 read k1, v1")
    vector(picture, y + 272, "mixed", heads, "[256] = 8·32")
    between(picture, y + 302, "matmul, add", "mix the heads' findings into x", "W_o [256][256]")
    vector(picture, y + 340, "x", [("residual stream", 256, "faint")], "[256]")
    middle = y + 353
    between(picture, y + 370, "rmsnorm", "", "ffn_norm [256]")
    vector(picture, y + 408, "normed", [("", 256, "faint")], "[256]")
    between(picture, y + 438, "matmul", "", "W_gate_up [1024][256]")
    vector(
        picture, y + 476, "gate_up", [("gate", 512, "query"), ("up", 512, "op")], "[1024] = 2·512"
    )
    between(picture, y + 506, "swiglu", "each gate opens or closes its value of up")
    vector(picture, y + 544, "hidden", [("", 512, "op")], "[512]")
    between(
        picture, y + 574, "matmul, add", "bring it back to the stream's width", "W_down [256][512]"
    )
    vector(picture, y + 612, "x", [("residual stream", 256, "faint")], "[256]  to the next layer")
    for top, bottom in ((start, middle), (middle + 5, y + 625)):
        picture.line((200, top), (100, top), (100, bottom), (200, bottom), kind="stream", width=2.4)
    picture.text(92, (start + middle) / 2, "x goes", 12, "end", "residual")
    picture.text(92, (start + middle) / 2 + 16, "around", 12, "end", "residual")
    picture.text(92, (middle + y + 625) / 2, "and is", 12, "end", "residual")
    picture.text(92, (middle + y + 625) / 2 + 16, "added to", 12, "end", "residual")
    picture.height = int(y + 656)
    return picture


# -------------------------------------------------------------------------------- KV cache and rows


def cells(
    picture: Picture, x: float, y: float, n: int, filled: dict[int, str], size: float = 17
) -> None:
    """Positions of a slot as a strip of n cells; filled: {position: colour}."""
    for i in range(n):
        picture.box(x + i * size, y, size, 22, filled.get(i, "page"), 0, "dim")


def row_table(
    picture: Picture, x: float, y: float, title: str, rows: list[tuple[str, str, str]], note: str
) -> None:
    """The rows of a call."""
    picture.text(x, y, title, 13, bold=True)
    for i, cell in enumerate([("token", "slot", "pos"), *rows]):
        for j, words in enumerate(cell):
            picture.text(
                x + (0, 92, 136)[j], y + 22 + 17 * i, words, 12, kind="ink" if i else "shape"
            )
    picture.text(x, y + 22 + 17 * (len(rows) + 1), note, 11, kind="soft")


def kv_cache() -> Picture:
    """The KV cache's layout, and the rows that calls write there."""
    picture = Picture(940, 600)
    picture.text(20, 28, "One block of memory: fp16 [slot][L][K, V][HK][S][hd]", 15, bold=True)
    levels = [
        ("slot: one sequence", ["slot 0", "slot 1", "…"], 0),
        ("layer", ["layer 0", "layer 1", "layer 2", "layer 3", "layer 4"], 0),
        ("plane", ["K", "V"], 0),
        ("key/value head", ["head 0", "head 1"], 0),
        ("position", ["0", "1", "2", "3", "4", "5", "…", "S-1"], 2),
    ]
    for i, (name, items, chosen) in enumerate(levels):
        y, w = 44 + 46 * i, 560 / len(items)
        picture.text(190, y + 20, name, 13, "end")
        for j, item in enumerate(items):
            picture.box(210 + j * w, y, w, 28, "memory" if j == chosen else "panel", 3)
            picture.text(210 + (j + 0.5) * w, y + 19, item, 12, "middle")
        left, right = 210 + chosen * w, 210 + (chosen + 1) * w
        picture.line((left, y + 28), (210, y + 46), kind="dim", width=1, head=False)
        picture.line((right, y + 28), (770, y + 46), kind="dim", width=1, head=False)
    picture.box(210, 274, 560, 28, "memory", 3)
    picture.text(490, 293, "hd = 32 values of one key: 64 bytes, read in one go", 12, "middle")
    lines = ("the demo model:", "5 · 2 · 2 · 32 values", "· 2 bytes = 1,280", "bytes a position")
    for i, words in enumerate(lines):
        picture.text(785, 64 + 17 * i, words, 12, kind="soft")

    y = 346
    title = "What calls write: each row of a call fills one position of one slot, in every layer"
    picture.text(20, y, title, 15, bold=True)
    picture.text(100, y + 35, "slot 0", 13, "end")
    picture.text(100, y + 71, "slot 1", 13, "end")
    first = {i: "op" for i in range(8)} | {8: "step", 9: "step"} | {10: "query", 11: "query"}
    cells(picture, 110, y + 20, 20, first)
    cells(picture, 110, y + 56, 20, {i: "op" for i in range(5)} | {5: "step"})
    picture.text(470, y + 35, "positions 0, 1, 2, …", 12, kind="soft")
    legend = (("op", "prefill: the prompt's ids, many rows"), ("step", "decode: one id a call"))
    for i, (kind, words) in enumerate(legend):
        picture.box(470, y + 48 + 20 * i, 14, 14, kind, 2)
        picture.text(492, y + 60 + 20 * i, words, 12)
    picture.box(720, y + 48, 14, 14, "query", 2)
    picture.text(742, y + 60, "a draft that is checked", 12)
    y = 466
    row_table(
        picture,
        20,
        y,
        "prefill of slot 0",
        [("<s>", "0", "0"), ("[", "0", "1"), ("INST", "0", "2"), ("…", "0", "…")],
        "8 rows, logits of the last",
    )
    rows = [("Give", "0", "8"), ("What", "1", "5")]
    row_table(picture, 260, y, "decode both", rows, "2 rows, logits of both")
    rows = [("me", "0", "9"), ("a", "0", "10"), ("clear", "0", "11")]
    row_table(picture, 490, y, "check a draft", rows, "3 rows of one slot, logits of all")
    rows = [("overview", "0", "12"), ("<s>", "2", "0"), ("[", "2", "1")]
    row_table(picture, 740, y, "any mixture", rows, "forward() sees only rows")
    return picture


# ---------------------------------------------------------------------------------- sampling

WORDS = ["clear", "short", "detailed", "list", "poem", "recipe", "the", "[/INST]"]
LOGITS = [4.0, 3.6, 3.1, 2.2, 1.5, 0.9, 0.2, -1.0]
TEMPERATURE, TOP_K, TOP_P, DRAW = 0.6, 5, 0.9, 0.71


def chosen_from() -> tuple[list[float], list[float], int]:
    """Probabilities at the temperature, among the top-k, and how many of them top-p keeps."""
    mass = [math.exp((logit - LOGITS[0]) / TEMPERATURE) for logit in LOGITS]
    all_ids = [m / sum(mass) for m in mass]
    best = [m / sum(mass[:TOP_K]) for m in mass[:TOP_K]]
    kept = sum(sum(best[:i]) < TOP_P for i in range(TOP_K))
    return all_ids, best, kept


def sampling() -> Picture:
    """How an id is drawn from the logits."""
    picture = Picture(940, 452)
    all_ids, best, kept = chosen_from()
    total = sum(best[:kept])
    columns = [
        (
            110,
            "logits",
            "one score per id",
            [f"{logit:.1f}" for logit in LOGITS],
            [(logit + 1.2) / 5.2 for logit in LOGITS],
        ),
        (
            300,
            f"temperature {TEMPERATURE}",
            "p ∝ exp(logit / T)",
            [f"{p:.3f}" for p in all_ids],
            all_ids,
        ),
        (490, f"top-k {TOP_K}", "the k best remain", [f"{p:.3f}" for p in best], best),
        (
            680,
            f"top-p {TOP_P}",
            "mass above the id < p",
            [f"{p:.3f}" for p in best[:kept]],
            best[:kept],
        ),
    ]
    for x, title, meaning, values, sizes in columns:
        picture.text(x, 28, title, 14, bold=True)
        picture.text(x, 46, meaning, 12, kind="soft")
        for i, (value, size) in enumerate(zip(values, sizes, strict=True)):
            y = 62 + 28 * i
            picture.box(x, y, max(1.5, 110 * size), 18, "op" if i < kept else "faint", 2)
            picture.text(x + max(1.5, 110 * size) + 6, y + 14, value, 12)
        for i in range(len(values), len(WORDS)):
            picture.text(x, 62 + 28 * i + 14, "—", 12, kind="soft")
    for i, word in enumerate(WORDS):
        picture.text(96, 62 + 28 * i + 14, word, 13, "end", bold=i < kept)
    for i in range(TOP_K):  # what top-p compares
        picture.text(826, 62 + 28 * i + 14, f"above: {sum(best[:i]):.3f}", 12, kind="soft")
    y, x, width = 330, 110, 720
    picture.text(x, y - 8, "one draw walks the ids that are left, in order of rank", 14, bold=True)
    at = 0.0
    for i in range(kept):
        w = width * best[i] / total
        picture.box(x + at, y + 8, w, 30, ("op", "memory", "step")[i % 3], 0)
        picture.text(x + at + w / 2, y + 28, WORDS[i], 13, "middle")
        picture.text(x + at + w, y + 56, f"{sum(best[: i + 1]):.3f}", 12, "middle")
        at += w
    picture.text(x, y + 56, "0", 12, "middle")
    mark = x + width * DRAW
    picture.line((mark, y + 84), (mark, y + 42), kind="stream", width=2.4)
    walked, drawn = 0.0, 0
    while walked + best[drawn] <= DRAW * total:
        walked += best[drawn]
        drawn += 1
    words = f"u = {DRAW}:  u · {total:.3f} = {DRAW * total:.3f}  →  “{WORDS[drawn]}”"
    picture.text(mark, y + 102, words, 13, "middle", "residual")
    return picture


# ---------------------------------------------------------------------------------- online softmax

SCORES = [1.0, 3.0, 0.0, 2.0, 2.5, 5.0, 1.5, 0.5, 4.0, 2.0]
VALUES = [2.0, 4.0, 1.0, 3.0, 5.0, 8.0, 2.0, 1.0, 6.0, 3.0]
BLOCK = 4


def online_softmax() -> Picture:
    """Attention of one query over ten positions, in blocks of four."""
    picture = Picture(940, 420)
    title = "One query, ten positions, blocks of 4 (the engine's are of 128)"
    picture.text(20, 28, title, 15, bold=True)
    x0, cell = 110, 62
    for i, name in enumerate(("position p", "score s", "value v")):
        picture.text(x0 - 12, 68 + 32 * i, name, 13, "end")
    m = total = y = before = 0.0
    for first in range(0, len(SCORES), BLOCK):
        n = min(BLOCK, len(SCORES) - first)
        block = first // BLOCK
        x = x0 + first * cell + 24 * block
        for i in range(n):
            p = first + i
            three = ((str(p), "panel"), (f"{SCORES[p]:g}", "query"), (f"{VALUES[p]:g}", "memory"))
            for j, (words, kind) in enumerate(three):
                picture.box(x + i * cell, 50 + 32 * j, cell - 6, 26, kind, 3)
                picture.text(x + i * cell + cell / 2 - 3, 68 + 32 * j, words, 12, "middle")
        own_m = max(SCORES[first : first + n])
        e = [math.exp(s - own_m) for s in SCORES[first : first + n]]
        own_l, own_y = sum(e), sum(a * v for a, v in zip(e, VALUES[first:], strict=False))
        left = x + BLOCK * cell / 2 - 3
        picture.line((x + n * cell / 2 - 3, 148), (left, 170))
        picture.box(left - 100, 174, 200, 62, "op", 6)
        picture.text(left, 192, f"m' = {own_m:g}, the largest score", 12, "middle")
        picture.text(left, 210, f"l' = Σ exp(s - m') = {own_l:.3f}", 12, "middle")
        picture.text(left, 228, f"y' = Σ exp(s - m') v = {own_y:.2f}", 12, "middle")
        if first == 0:
            m, total, y = own_m, own_l, own_y
        else:
            new = max(m, own_m)
            old_factor, own_factor = math.exp(m - new), math.exp(own_m - new)
            picture.line((before + 100, 292), (left - 104, 292))
            total = total * old_factor + own_l * own_factor
            m, y = new, y * old_factor + own_y * own_factor
            picture.text((before + left) / 2, 282, f"× {old_factor:.3f}", 11, "middle", "soft")
            picture.text(left + 8, 252, f"× {own_factor:.3f}", 11, "start", "soft")
        picture.line((left, 236), (left, 258))
        picture.box(left - 100, 262, 200, 62, "step", 6)
        picture.text(left, 280, f"m = {m:g}", 12, "middle")
        picture.text(left, 298, f"l = {total:.3f}", 12, "middle")
        picture.text(left, 316, f"y = {y:.2f}", 12, "middle")
        before = left
    sums = "l = l exp(m - M) + l' exp(m' - M),   y = y exp(m - M) + y' exp(m' - M)"
    picture.text(20, 354, f"M = max(m, m'),   {sums}", 13)
    everything = [math.exp(s - max(SCORES)) for s in SCORES]
    whole = sum(a * v for a, v in zip(everything, VALUES, strict=True)) / sum(everything)
    words = f"result: y / l = {y:.2f} / {total:.3f} = {y / total:.3f};"
    picture.text(20, 382, words, 13, bold=True)
    picture.text(300, 382, f"softmax over all ten at once: {whole:.3f}", 13, kind="soft")
    words = "the old sums are scaled down whenever a larger score appears, so exp never overflows"
    picture.text(20, 406, words, 12, kind="soft")
    return picture


PICTURES = {
    "forward.svg": forward,
    "layer.svg": layer,
    "kv-cache.svg": kv_cache,
    "sampling.svg": sampling,
    "online-softmax.svg": online_softmax,
}


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument(
        "--check", action="store_true", help="only report pictures that are not current"
    )
    parser.add_argument(
        "--dark", metavar="DIR", type=Path, help="write them in the dark colours to this folder"
    )
    args = parser.parse_args()
    stale = 0
    for name, draw in PICTURES.items():
        path = (args.dark or FOLDER) / name
        text = draw().svg(dark=args.dark is not None)
        if args.check:
            if not path.is_file() or path.read_text("utf-8") != text:
                print(f"{path} is not current; run: python docs/picture.py", file=sys.stderr)
                stale += 1
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
