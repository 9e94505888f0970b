#!/usr/bin/env python3
"""Draws the README's pictures from a result file of bench/run.py: plots.py bench/results/1b.json

    NAME-decode      how much of the memory's read bandwidth decoding uses, by engine
    NAME-rewrite     one rewrite from nothing: opening, prefill, decode, by engine
    NAME-rows        what a pass costs with more rows, and what the machine allows

each for light and for dark pages, next to the result file.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import report
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, DPI = 8.0, 180  # inches; pixels an inch


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    back: str
    text: str
    faint: str  # lines, and text of less weight
    grid: str
    engines: dict[str, str]
    parts: tuple[str, str, str]  # open, prefill, decode


BPO, LLAMA = "bpo", "llama.cpp f16"
FP32, FP16, BF16 = "transformers fp32", "transformers fp16", "transformers bf16 *"

THEMES = (
    Theme(
        "light",
        "#ffffff",
        "#1f2328",
        "#59636e",
        "#e6e8eb",
        {BPO: "#0b6bcb", LLAMA: "#e0812b", FP32: "#8a63c7", FP16: "#b07fd0", BF16: "#c9b5de"},
        ("#9aa4af", "#3aa6a0", "#0b6bcb"),
    ),
    Theme(
        "dark",
        "#0d1117",
        "#e6edf3",
        "#9198a1",
        "#262c36",
        {BPO: "#58a6ff", LLAMA: "#f0a050", FP32: "#b392f0", FP16: "#8a6fc0", BF16: "#7462a3"},
        ("#6e7681", "#39c5bb", "#58a6ff"),
    ),
)


def new_figure(theme: Theme, title: str, subtitle: str, height: float) -> tuple[Figure, Axes]:
    """An empty picture with its two lines of heading."""
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "text.color": theme.text,
            "hatch.linewidth": 0.6,
        }
    )
    figure, axes = plt.subplots(figsize=(WIDTH, height), facecolor=theme.back)
    axes.set_facecolor(theme.back)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=theme.faint, length=0, labelsize=10)
    figure.text(
        0.03, 1 - 0.22 / height, title, fontsize=13.5, fontweight="bold", va="top", color=theme.text
    )
    figure.text(0.03, 1 - 0.52 / height, subtitle, fontsize=9.5, va="top", color=theme.faint)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    figure.savefig(path, dpi=DPI, facecolor=figure.get_facecolor())
    plt.close(figure)


def where(raw: dict) -> str:
    """The machine and the model, for a heading."""
    cpu = raw["machine"]["cpu"].get("model name", "CPU")
    sizes = f"{raw['shape']['pass_bytes'] * 1e-9:.2g} GB of fp16 weights"
    threads = raw["settings"]["threads"]
    return f"shape {raw['model']}, {sizes}  ·  {cpu}, {threads} threads  ·  {raw['date'][:10]}"


def kinds(result: report.Result, row: report.Row) -> list[tuple[str, str]]:
    """Engines by label, with the way to run each that was fastest in a row; only those that ran."""
    found = [(BPO, "bpo"), (LLAMA, result.best(row, report.LLAMA))]
    found += [(FP16, "transformers fp16"), (FP32, "transformers fp32"), (BF16, "transformers bf16")]
    return [(label, kind) for label, kind in found if kind and result.values(row, kind)]


def bar_names(axes: Axes, theme: Theme, labels: list[str]) -> None:
    """Engines' names at the left of horizontal bars, the first one on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_color(theme.text)
        tick.set_fontweight("bold" if label == BPO else "normal")


def on(colour: str) -> str:
    """What can be read on a colour: white, or nearly black."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else "#14181d"


def draw_decode(result: report.Result, theme: Theme, path: Path) -> None:
    """Bars of decode as percent of what the memory can read."""
    row = report.row_of("decode")
    engines = kinds(result, row)
    limit = statistics.median(result.bandwidth())
    height = 1.65 + 0.42 * len(engines)
    title = "Decoding, as share of what the memory can deliver"
    subtitle = (
        f"100 % is {limit:.0f} GB/s, the best of 12 ways to read memory, measured in turn with bpo"
    )
    figure, axes = new_figure(theme, title, subtitle, height)
    for i, (label, kind) in enumerate(engines):
        share = 100 * result.bandwidth_share(kind).median
        speed = statistics.median(result.values(row, kind))
        axes.barh(i, share, height=0.62, color=theme.engines[label], zorder=2)
        weight, inside = "bold" if label == BPO else "normal", share > 18
        axes.text(
            share + 1.2,
            i,
            f"{share:.0f} %",
            va="center",
            fontweight=weight,
            color=theme.text,
            zorder=3,
        )
        if inside:
            colour, at, side = on(theme.engines[label]), share - 1.2, "right"
        else:
            colour, at, side = theme.faint, share + 9.5, "left"
        axes.text(
            at,
            i,
            f"{speed:,.1f} tokens/s",
            va="center",
            ha=side,
            color=colour,
            fontsize=9.5,
            zorder=3,
        )
    bar_names(axes, theme, [label for label, _ in engines])
    axes.axvline(100, color=theme.faint, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    for at in (0, 25, 50, 75):
        axes.axvline(at, color=theme.grid, linewidth=0.8, zorder=0)
    footnote(figure, theme, result.raw, [label for label, _ in engines])
    figure.subplots_adjust(left=0.205, right=0.985, top=1 - 0.85 / height, bottom=0.68 / height)
    save(figure, path)


def footnote(figure: Figure, theme: Theme, raw: dict, labels: list[str]) -> None:
    """What was measured, where and when; and what the star means, where there is one."""
    figure.text(
        0.03, 0.1 / figure.get_figheight(), where(raw), fontsize=8, va="bottom", color=theme.faint
    )
    if BF16 in labels:
        text = "* bf16: lower precision than the others"
        figure.text(
            0.985,
            0.1 / figure.get_figheight(),
            text,
            fontsize=8,
            ha="right",
            va="bottom",
            color=theme.faint,
        )


def draw_rewrite(result: report.Result, theme: Theme, path: Path) -> None:
    """Stacked bars of a first rewrite: opening, prefill, decode."""
    row = report.row_of("fresh, warm")
    engines = kinds(result, row)
    engines = [(label, "bpo, prefix cached" if kind == "bpo" else kind) for label, kind in engines]
    height = 1.65 + 0.42 * len(engines)
    n_prompt, n_new = result.raw["texts"]["pairs"][0]
    subtitle = (
        f"in a new process; {n_prompt} tokens of prompt in a template of 33, "
        f"{n_new} new tokens; file in memory"
    )
    figure, axes = new_figure(
        theme, "One rewrite, from opening the model to the last token", subtitle, height
    )
    longest = max(statistics.median(result.values(row, kind)) for _, kind in engines)
    for i, (label, kind) in enumerate(engines):
        figures, left = result.figures["fresh, warm"][kind], 0.0
        for part, colour in zip(("open_s", "prefill_s", "decode_s"), theme.parts, strict=True):
            width = statistics.median(f[part] for f in figures)
            axes.barh(i, width, left=left, height=0.62, color=colour, zorder=2, linewidth=0)
            left += width
        weight = "bold" if label == BPO else "normal"
        axes.text(
            left + 0.012 * longest,
            i,
            f"{left:.2f} s" if left < 10 else f"{left:.1f} s",
            va="center",
            fontweight=weight,
            zorder=3,
        )
    bar_names(axes, theme, [label for label, _ in engines])
    axes.set_xlim(0, 1.12 * longest)
    axes.grid(axis="x", color=theme.grid, zorder=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} s")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in theme.parts]
    axes.legend(
        handles,
        ["open", "prefill", "decode"],
        loc="upper right",
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.text,
        handlelength=1.0,
        handleheight=1.0,
    )
    footnote(figure, theme, result.raw, [label for label, _ in engines])
    figure.subplots_adjust(left=0.205, right=0.985, top=1 - 0.85 / height, bottom=0.68 / height)
    save(figure, path)


def row_times(result: report.Result) -> dict[str, dict[int, float]]:
    """Seconds of a pass by label and number of rows, for the fastest way to run each engine."""
    rows = result.figures.get("rows", {})
    ways = {
        BPO: ("bpo",),
        LLAMA: report.LLAMA,
        FP16: ("transformers fp16",),
        FP32: ("transformers fp32",),
        BF16: ("transformers bf16",),
    }
    found = {}
    for label, choice in ways.items():
        medians = [
            {n: statistics.median(times[n] for times in rows[kind]) for n in rows[kind][0]}
            for kind in choice
            if kind in rows
        ]
        if medians:
            found[label] = {int(n): min(by_rows[n] for by_rows in medians) for n in medians[0]}
    return found


def draw_rows(result: report.Result, theme: Theme, path: Path) -> None:
    """Lines of the cost of a pass over its rows, in passes over the weights at full bandwidth."""
    times, shape = row_times(result), result.raw["shape"]
    # the fastest: the rows of a pass may have been measured while memory was fast
    limit = max(result.bandwidth())
    peak = statistics.median(
        max(levels.values()) for levels in result.figures["fma_gflop_s"]["bpo"]
    )
    unit = shape["pass_bytes"] / limit * 1e-9
    subtitle = f"1 x is one reading of all weights at {limit:.0f} GB/s, the fastest of the run"
    figure, axes = new_figure(theme, "What a pass costs when it computes more rows", subtitle, 4.6)
    counts = sorted(next(iter(times.values())))
    bound = [max(1.0, shape["pass_bytes"] * n / peak * 1e-9 / unit) for n in counts]
    axes.fill_between(counts, 0.01, bound, color=theme.grid, zorder=1, linewidth=0)
    axes.text(
        1.06,
        0.78,
        "more than this machine can do in fp32",
        color=theme.faint,
        fontsize=9,
        va="center",
        zorder=2,
    )
    ends = []
    for label, by_rows in times.items():
        values = [by_rows[n] / unit for n in counts]
        star = {"linestyle": (0, (2, 1.5))} if label == BF16 else {}
        width = 2.6 if label == BPO else 1.8
        axes.plot(
            counts,
            values,
            color=theme.engines[label],
            linewidth=width,
            marker="o",
            markersize=4,
            zorder=4 if label == BPO else 3,
            **star,
        )
        ends.append((values[-1], label))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    top = max(value for value, _ in ends)
    axes.set_ylim(0.6, 1.25 * max(top, max(max(r.values()) for r in times.values()) / unit))
    axes.set_xlim(0.94, counts[-1] * 1.04)
    axes.set_xticks([n for n in counts if n in (1, 2, 4, 8, 16, 32, 64)])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} x")
    axes.minorticks_off()
    axes.grid(color=theme.grid, zorder=0)
    axes.set_xlabel(
        "rows (drafted tokens to check, or sequences decoded together)",
        color=theme.faint,
        fontsize=9.5,
    )
    place_labels(axes, theme, ends, counts[-1])
    footnote(figure, theme, result.raw, list(times))
    figure.subplots_adjust(left=0.075, right=0.79, top=1 - 0.85 / 4.6, bottom=0.85 / 4.6)
    save(figure, path)


def place_labels(axes: Axes, theme: Theme, ends: list[tuple[float, str]], x: float) -> None:
    """Names at the ends of lines, apart enough to be read."""
    last = 0.0
    for value, label in sorted(ends):
        y = max(value, last * 1.3)
        last = y
        axes.annotate(
            label,
            (x, value),
            xytext=(x * 1.12, y),
            va="center",
            fontsize=9.5,
            color=theme.engines[label],
            fontweight="bold" if label == BPO else "normal",
            annotation_clip=False,
        )


def draw(path: Path) -> list[Path]:
    """All pictures of a result file; returns where they are."""
    raw = json.loads(path.read_text("utf-8"))
    result, written = report.Result(raw), []
    for theme in THEMES:
        for name, function in (
            ("decode", draw_decode),
            ("rewrite", draw_rewrite),
            ("rows", draw_rows),
        ):
            picture = path.with_name(f"{path.stem}-{name}-{theme.name}.png")
            function(result, theme, picture)
            written.append(picture)
    return written


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draws the pictures of result files.")
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        for picture in draw(path):
            print(picture)


if __name__ == "__main__":
    main()
