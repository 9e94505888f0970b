#!/usr/bin/env python3
"""Draw the data's way through the forward pass, with shapes: writes docs/forward.svg.

    python docs/picture.py && rsvg-convert docs/forward.svg -o /tmp/forward.png     # to look at it

Each box is one op of kernels.h (or one step of bpo.c), in the order in which bpo.c calls them. Shapes are those of
Llama-2-7b: D 4096, F 11008, H = HK 32, hd 128, L 32, V 32000.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, BOX_X, BOX_W, BOX_H, GAP = 930, 330, 240, 34, 22
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"
OP, STEP, MEMORY, STREAM = "#dbeafe", "#fef3c7", "#dcfce7", "#7c3aed"

# (name, what it computes, what comes out, its shape for R rows, colour)
BEFORE = [
    ("prompt", "text in the template", "UTF-8 bytes", STEP),
    ("tokenizer", "SentencePiece, BOS first", "ids [P]", STEP),
    ("choose rows", "(token, slot, position)", "rows [R]", STEP),
    ("embed", "x = table[token]", "x [R][4096]", OP),
]
ATTENTION = [
    ("rmsnorm", "y = x / rms(x) · gain", "[R][4096]", OP),
    ("matmul  W_qkv", "one matrix for q, k, v", "qkv [R][(32 + 2·32)·128]", OP),
    ("rope_kv", "rotate q, k; store k, v", "qkv [R][12288]", OP),
    ("attention", "softmax(q Kᵀ / √hd) V", "[R][32·128]", OP),
    ("matmul  W_o", "added to x", "x [R][4096]", OP),
]
FEED_FORWARD = [
    ("rmsnorm", "y = x / rms(x) · gain", "[R][4096]", OP),
    ("matmul  W_gate_up", "one matrix for gate, up", "[R][2·11008]", OP),
    ("swiglu", "silu(gate) · up", "[R][11008]", OP),
    ("matmul  W_down", "added to x", "x [R][4096]", OP),
]
AFTER = [
    ("gather", "rows whose logits are wanted", "[n][4096]", OP),
    ("rmsnorm", "", "[n][4096]", OP),
    ("matmul  lm_head", "", "logits [n][32000]", OP),
    ("sampler", "temperature, top-k, top-p, draw", "id", STEP),
    ("decoder", "pieces to bytes, strip, cut", "UTF-8 text", STEP),
]


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "start", style: str = "") -> str:
    """One line of text."""
    return f"<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}' {FONT} {style}>{escape(words)}</text>"


def arrow(points: str, colour: str = "#374151", width: float = 1.6) -> str:
    """A line through points, with an arrow head at its end."""
    return f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='{width}' marker-end='url(#head)'/>"


def column(y: float, boxes: list) -> tuple[list[str], float, list[float]]:
    """Boxes under each other from y on; returns the drawing, where the next one begins, and the boxes' middles."""
    out, middles = [], []
    centre = BOX_X + BOX_W / 2
    for name, meaning, shape, colour in boxes:
        out.append(f"<rect x='{BOX_X}' y='{y}' width='{BOX_W}' height='{BOX_H}' rx='7' fill='{colour}' stroke='#374151'/>")
        out.append(text(centre, y + 22, name, 14, "middle", "font-weight='bold'"))
        out.append(text(BOX_X - 16, y + 18, meaning, 12, "end", "fill='#4b5563'"))
        out.append(text(centre + 10, y + BOX_H + 15, shape, 11, "start", "fill='#1d4ed8'"))
        last = name in ("embed", "matmul  W_o")  # the residual stream branches off behind it: a longer way
        out.append(arrow(f"{centre},{y + BOX_H} {centre},{y + BOX_H + GAP + 14 * last - 2}"))
        middles.append(y + BOX_H / 2)
        y += BOX_H + GAP
    return out, y, middles


def residual(top: float, bottom: float, label_y: float) -> list[str]:
    """The residual stream beside a sublayer: x goes around it, and its result is added."""
    x = BOX_X + BOX_W + 175
    centre = BOX_X + BOX_W / 2
    line = f"{centre},{top} {x},{top} {x},{bottom} {BOX_X + BOX_W + 3},{bottom}"
    return [arrow(line, STREAM, 2.4), text(x + 10, label_y, "residual stream x, fp32", 12, "start", f"fill='{STREAM}'")]


def draw() -> str:
    """The whole picture as SVG."""
    parts, y, _ = column(20, BEFORE)
    top = y
    y += 14
    boxes, y, middles = column(y, ATTENTION)
    parts += boxes
    parts += residual(top, middles[-1], (top + middles[-1]) / 2)
    kv_y = (middles[2] + middles[3]) / 2
    parts.append(f"<rect x='{BOX_X + BOX_W + 40}' y='{kv_y - 27}' width='118' height='54' rx='7' fill='{MEMORY}' stroke='#374151'/>")
    parts.append(text(BOX_X + BOX_W + 99, kv_y - 9, "KV cache", 13, "middle", "font-weight='bold'"))
    parts.append(text(BOX_X + BOX_W + 99, kv_y + 6, "fp16, per slot", 10, "middle"))
    parts.append(text(BOX_X + BOX_W + 99, kv_y + 19, "[L][2][HK][S][hd]", 10, "middle"))
    parts.append(arrow(f"{BOX_X + BOX_W},{middles[2]} {BOX_X + BOX_W + 38},{kv_y - 14}"))
    parts.append(arrow(f"{BOX_X + BOX_W + 40},{kv_y + 14} {BOX_X + BOX_W + 3},{middles[3]}"))
    middle_top = y
    y += 14
    boxes, y, middles = column(y, FEED_FORWARD)
    parts += boxes
    parts += residual(middle_top, middles[-1], (middle_top + middles[-1]) / 2)
    bottom = y
    frame = "rx='12' fill='#f9fafb' stroke='#9ca3af' stroke-dasharray='6 4'"
    parts.insert(0, f"<rect x='60' y='{top + 7}' width='860' height='{bottom - top - 11}' {frame}/>")
    parts.append(text(76, top + 30, "layer 0 … L-1", 14, "start", "font-weight='bold'"))
    parts.append(text(76, top + 48, "(32 times)", 12))
    boxes, y, middles = column(y, AFTER)
    parts += boxes[:-1]  # no arrow behind the last
    low, high = middles[-2] + 9, 20 + 2 * (BOX_H + GAP) + BOX_H / 2 + 9
    back = f"{BOX_X},{low} 30,{low} 30,{high} {BOX_X - 3},{high}"
    parts.insert(0, arrow(back, "#9ca3af"))
    parts.append(text(36, middles[-2] + 22, "the id is the next row", 11, "start", "fill='#6b7280'"))
    height = int(y + 4)
    head = (
        "<defs><marker id='head' markerWidth='9' markerHeight='9' refX='7' refY='3' orient='auto'>"
        "<path d='M0,0 L7,3 L0,6 z' fill='#374151'/></marker></defs>"
    )
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>",
        "<rect width='100%' height='100%' fill='white'/>",
        head,
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("forward.svg").write_text(draw(), encoding="utf-8")
