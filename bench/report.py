#!/usr/bin/env python3
"""What a result file of bench/run.py says: report.py bench/results/1b.json prints the tables.

Also the arithmetic from single figures to medians, ratios and the bounds that were set before
anything was measured.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LLAMA = ("llama.cpp", "llama.cpp no-fa")
SAME_ACCURACY = ("transformers fp32", "transformers fp16")
LOWER = ("transformers bf16",)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of the repeats' values; there must be one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Row:
    """A row of the table: where its figures are, and how they are written."""

    name: str
    title: str
    unit: str
    of: Callable  # figure -> number
    faster_is_more: bool
    digits: int = 2


def seconds(scale: float = 1.0, key: str = "s") -> Callable:
    """Takes a time out of a figure."""
    return lambda figure: scale * figure[key]


ROWS = (
    Row("fresh, cold", "open and rewrite, file not in memory", "s", seconds(), False, 2),
    Row("fresh, warm", "open and rewrite, file in memory", "s", seconds(), False, 3),
    Row("prefill 48", "prefill, 48 tokens", "tok/s", lambda v: v, True, 1),
    Row("prefill 512", "prefill, 512 tokens", "tok/s", lambda v: v, True, 1),
    Row("decode", "decode at the start", "tok/s", lambda v: v, True, 2),
    Row("decode at 2000", "decode at position 2,000", "tok/s", lambda v: v, True, 2),
    Row("rewrite", "one whole rewrite", "s", seconds(), False, 3),
    Row("replay", "replay of real pairs, each", "s", seconds(), False, 3),
    Row("5 samples", "five samples together", "s", seconds(), False, 3),
    Row("memory", "peak memory, mapped file included", "GB", seconds(1e-9, "peak_bytes"), False, 2),
    Row("memory", "memory of its own", "GB", seconds(1e-9, "private_bytes"), False, 2),
)


class Result:
    """A result file, with what follows from its figures."""

    def __init__(self, result: dict):
        self.raw, self.figures = result, result["figures"]

    def values(self, row: Row, engine: str) -> list[float]:
        """The figures of a row and engine, one for each repeat."""
        return [row.of(figure) for figure in self.figures.get(row.name, {}).get(engine, [])]

    def best(self, row: Row, kinds: tuple[str, ...], suffix: str = "") -> str | None:
        """The fastest of several ways to run an engine in this row, by its median."""
        there = {
            kind + suffix: self.values(row, kind + suffix)
            for kind in kinds
            if self.values(row, kind + suffix)
        }
        sign = -1 if row.faster_is_more else 1
        return min(there, key=lambda kind: sign * statistics.median(there[kind]), default=None)

    def spread(self, row: Row, engine: str | None) -> Spread | None:
        """Median and quartiles, or None where the engine did not run."""
        values = self.values(row, engine) if engine else []
        return Spread.of(values) if values else None

    def speed_up(self, row: Row, fast: str, slow: str | None) -> Spread | None:
        """How many times faster, repeat by repeat.

        Where one engine rewrote fewer texts, only those that both rewrote count.
        """
        if not slow or not self.values(row, fast) or not self.values(row, slow):
            return None
        a, b = self.values(row, fast), self.values(row, slow)
        if row.name in ("rewrite", "replay"):
            texts = [
                [figure["each"] for figure in self.figures[row.name][kind]] for kind in (fast, slow)
            ]
            a, b = (
                [sum(each[: min(len(x), len(y))]) for each, x, y in zip(of, *texts, strict=False)]
                for of in texts
            )
        pairs = zip(a, b, strict=False)
        return Spread.of([x / y if row.faster_is_more else y / x for x, y in pairs])

    # ---- the machine's limits

    def best_pattern(self) -> str:
        """The reading pattern with the highest median."""
        reads = self.figures["read_gb_s"]["bpo"]
        return max(reads[0], key=lambda name: statistics.median(read[name] for read in reads))

    def bandwidth(self) -> list[float]:
        """GB/s of the best pattern, repeat by repeat."""
        return [read[self.best_pattern()] for read in self.figures["read_gb_s"]["bpo"]]

    def decode_gb_s(self, engine: str) -> list[float]:
        """Weight bytes per second while decoding, as if all engines read fp16.

        transformers in fp32 in fact reads twice the bytes.
        """
        speeds = self.figures.get("decode", {}).get(engine, [])
        return [1e-9 * self.raw["shape"]["pass_bytes"] * speed for speed in speeds]

    def bandwidth_share(self, engine: str) -> Spread | None:
        """... as share of the bandwidth of the same repeat."""
        pairs = list(zip(self.decode_gb_s(engine), self.bandwidth(), strict=False))
        return Spread.of([a / b for a, b in pairs]) if pairs else None

    def prefill_share(self, n: int) -> Spread | None:
        """Arithmetic of a whole prefill per second, as share of the peak right before and after it.

        In older results it is the share of the peak of the same repeat.
        """
        shape = self.raw["shape"]
        peaks = self.figures.get(f"peak beside prefill {n}", {}).get("bpo")
        peaks = peaks or [max(peak.values()) for peak in self.figures["fma_gflop_s"]["bpo"]]
        lm_head = 2 * shape["vocab"] * shape["dim"]  # of the last row only
        flop = (shape["pass_bytes"] - lm_head) * n + lm_head
        speeds = self.figures.get(f"prefill {n}", {}).get("bpo", [])
        shares = [
            1e-9 * flop * speed / n / peak for speed, peak in zip(speeds, peaks, strict=False)
        ]
        return Spread.of(shares) if shares else None

    def rows_cost(self, n: int) -> Spread | None:
        """The time of a pass of n rows over that of one right before it, in bpo."""
        passes = self.figures.get("rows", {}).get("bpo", [])
        beside = self.figures.get("one row beside", {}).get("bpo")
        beside = beside or [dict.fromkeys(times, times["1"]) for times in passes]
        costs = [times[str(n)] / one[str(n)] for times, one in zip(passes, beside, strict=True)]
        return Spread.of(costs) if costs else None

    def step(self, kind: str, rows: int, key: str) -> Spread | None:
        """A figure of kernels_bench, of our own kernels."""
        for case in (self.raw["kernels"] or {}).get("steps", []):
            at_start = case["position"] <= 64
            if (
                case["kind"] == kind
                and case["rows"] == rows
                and at_start
                and case["kernels"] != "openblas"
                and key in case
            ):
                return Spread(**{name: case[key][name] for name in ("median", "low", "high", "n")})
        return None


# --------------------------------------------------------------------------------------- the bounds


@dataclass(frozen=True)
class Bound:
    """A target, and what was reached."""

    title: str
    found: Spread | None
    must: float
    goal: float
    upper: bool = False  # the bound is an upper one
    unit: str = "x"

    def reached(self, bound: float) -> bool | None:
        """Whether the median keeps a bound; None when nothing was measured."""
        if self.found is None:
            return None
        return self.found.median <= bound if self.upper else self.found.median >= bound


def row_of(name: str) -> Row:
    """A row of the table."""
    return next(row for row in ROWS if row.name == name)


def bounds(result: Result) -> list[Bound]:
    """All bounds, for the shape that was measured."""
    name = result.raw["model"]
    decode, rewrite, samples = row_of("decode"), row_of("rewrite"), row_of("5 samples")

    def against(row: Row, kinds: tuple[str, ...], suffix: str = "") -> Spread | None:
        return result.speed_up(row, "bpo", result.best(row, kinds, suffix))

    small = name in ("15m", "110m")
    first = Bound(
        "decode, against llama.cpp f16",
        against(decode, LLAMA),
        1.2 if small else 1.0,
        1.5 if small else 1.1,
    )
    if small:
        return [first]
    fast = statistics.median(result.bandwidth()) > 45
    share = Bound(
        "decode, of the read bandwidth",
        result.bandwidth_share("bpo"),
        0.85 if fast else 0.9,
        0.9 if fast else 0.95,
        unit="",
    )
    found = [first, share]
    for rows, must, goal in ((4, 1.2, 1.1), (8, 1.5, 1.4), (16, 2.6, 2.3)):
        title = f"{rows} rows, against one row's time"
        found.append(Bound(title, result.rows_cost(rows), must, goal, upper=True))
    for n in (48, 512):
        title, share = f"matmuls of {n} prompt rows", result.step("prompt", n, "fma_share")
        found.append(Bound(f"{title}, of FMA peak", share, 0.88, 0.92, unit=""))
    for n in (48, 512):
        title, gain = f"whole prefill of {n} rows", against(row_of(f"prefill {n}"), LLAMA)
        found.append(Bound(f"{title}, of FMA peak", result.prefill_share(n), 0.8, 0.86, unit=""))
        found.append(Bound(f"{title}, against llama.cpp f16", gain, 1.1, 1.2))
    gain, kept = against(rewrite, LLAMA), against(rewrite, LLAMA, ", prefix kept")
    found.append(Bound("one whole rewrite, against llama.cpp f16", gain, 1.6, 1.9))
    found.append(Bound("... which keeps the template's prefix", kept, 1.3, 1.5))
    gain = against(rewrite, SAME_ACCURACY)
    found.append(Bound("... against transformers, fp16 or fp32", gain, 4, 6))
    for suffix, must, goal in ((", no drafts", 3.5, 4), ("", 2.5, 3)):
        figures = result.figures.get("5 samples", {}).get(f"bpo{suffix}", [])
        gains = [figure["single_s"] / figure["s"] for figure in figures]
        title = f"{samples.title}, against 5 single runs{suffix or ', defaults'}"
        found.append(Bound(title, Spread.of(gains) if gains else None, must, goal))
    demo = result.figures.get("demo process", {}).get("bpo", [])
    spread = Spread.of([1e3 * s for s in demo]) if demo else None
    found.append(Bound("demo model, one whole process", spread, 50, 25, upper=True, unit="ms"))
    return found


# ----------------------------------------------------------------------------------------- printing


def colours(file) -> tuple[str, str, str]:
    """Green, red and the end of both, where the terminal shows them."""
    if file.isatty() and not os.environ.get("NO_COLOR"):
        return "\033[32m", "\033[31m", "\033[0m"
    return "", "", ""


def written(spread: Spread | None, digits: int) -> str:
    """ "12.3 (12.1 to 12.6)" """
    if spread is None:
        return "-"
    if spread.n == 1:
        return f"{spread.median:,.{digits}f}"
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f} to {spread.high:,.{digits}f})"


def times(spread: Spread | None) -> str:
    """ "1.23 x" """
    return "-" if spread is None else f"{spread.median:.2f} x"


def columns(result: Result, row: Row) -> list[tuple[str, str | None]]:
    """The table's columns, with the way of running an engine that each shows in a row."""
    cached = {"fresh, warm": "bpo, prefix cached", "fresh, cold": "bpo, prefix cached"}
    return [
        ("bpo", cached.get(row.name, "bpo")),
        ("llama.cpp f16", result.best(row, LLAMA)),
        ("transformers", result.best(row, SAME_ACCURACY)),
        ("... bf16 *", result.best(row, LOWER)),
    ]


def extra_rows(result: Result) -> list[tuple[str, str, list[Spread | None], int]]:
    """Rows that show other ways to run the same thing: title, unit, figures by column."""
    rewrite, replay, fresh = row_of("rewrite"), row_of("replay"), row_of("fresh, warm")
    found = []
    for row in (rewrite, replay):
        title = "... without drafts, or cached prefix"
        kept = result.best(row, LLAMA, ", prefix kept")
        spreads = [result.spread(row, "bpo, no drafts"), result.spread(row, kept), None, None]
        found.append((row.title, title, row.unit, spreads, row.digits))
    title = "... without the cached prefix"
    spreads = [result.spread(fresh, "bpo"), None, None, None]
    found.append((fresh.title, title, fresh.unit, spreads, fresh.digits))
    return found


def table(result: Result) -> list[list[str]]:
    """The table's lines, its head first."""
    titles = [title for title, _ in columns(result, ROWS[0])]
    lines = [["", "", *titles, "vs llama.cpp", "vs transformers"]]
    for row in ROWS:
        kinds = [kind for _, kind in columns(result, row)]
        if not any(result.values(row, kind) for kind in kinds if kind):
            continue
        figures = [written(result.spread(row, kind), row.digits) for kind in kinds]
        ratios = [times(result.speed_up(row, kinds[0], kind)) for kind in kinds[1:3]]
        lines.append([row.title, row.unit, *figures, *ratios])
        for after, title, unit, spreads, digits in extra_rows(result):
            if after == row.title and any(spreads):
                figures = [written(spread, digits) for spread in spreads]
                lines.append([title, unit, *figures, "", ""])
        if row.name == "decode":
            shares = [
                result.bandwidth_share(kind) if kind and "fp32" not in kind else None
                for kind in kinds
            ]
            figures = [written(share, 2) for share in shares]
            lines.append(["... of the read bandwidth", "", *figures, "", ""])
    return lines


def print_table(lines: list[list[str]], file) -> None:
    """Columns as wide as they must be; text to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file)
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2), file=file)


def drafts(result: Result) -> str:
    """Tokens per pass, in the rewrites and in the replay."""
    parts = []
    for row, title in (("rewrite", "rewrites"), ("replay", "the replay")):
        figures = result.figures.get(row, {}).get("bpo", [])
        if figures:
            f = figures[0]
            wasted = 100 * (f["drafted"] - f["accepted"]) / max(1, f["drafted"])
            parts.append(
                f"{f['tokens'] / f['passes']:.2f} tokens per pass in {title} "
                f"({wasted:.0f} % of the drafted ones wasted)"
            )
    return "; ".join(parts)


def print_bounds(result: Result, file) -> None:
    """The targets, with marks."""
    green, red, end = colours(file)
    print(f"\n{'what must be shown':<58} {'measured':>28} {'must':>8} {'goal':>8}", file=file)
    print("-" * 105, file=file)
    for bound in bounds(result):
        marks = []
        for limit in (bound.must, bound.goal):
            reached = bound.reached(limit)
            mark = "?" if reached is None else f"{green}✓{end}" if reached else f"{red}✗{end}"
            marks.append(f"{limit:>6g} {mark}")
        digits = 1 if bound.unit == "ms" else 2
        found = f"{written(bound.found, digits)} {bound.unit}".rstrip()
        print(f"{bound.title:<58} {found:>28} {marks[0]} {marks[1]}", file=file)


def show(raw: dict, file=sys.stdout) -> None:
    """Prints everything."""
    result, machine, shape = Result(raw), raw["machine"], raw["shape"]
    cpu = machine["cpu"].get("model name", "?")
    print(
        f"\nmodel {raw['model']}: D {shape['dim']} L {shape['n_layers']} H {shape['n_heads']} "
        f"HK {shape['n_kv_heads']} F {shape['ffn_dim']} V {shape['vocab']}, "
        f"{shape['pass_bytes'] * 1e-9:.2f} GB of weights a pass\n"
        f"{cpu}, {machine['cores']} cores, {raw['settings']['threads']} threads; "
        f"{raw['date'][:10]}; bpo at {raw['commit']}",
        file=file,
    )
    for kind, about in raw["engines"].items():
        settings = ", ".join(
            f"{key} {value}" for key, value in about["settings"].items() if key != "system"
        )
        print(f"  {kind:<18} {about['version']:<8} {settings}", file=file)
    limit = Spread.of(result.bandwidth())
    fma = Spread.of([max(peak.values()) for peak in result.figures["fma_gflop_s"]["bpo"]])
    trips = result.figures.get("round_trip_ns", {}).get("bpo", [])  # not in older results
    apart = ""
    if trips:
        apart = f"; from a thread to another and back {written(Spread.of(trips), 0)} ns"
    print(
        f"read bandwidth {written(limit, 1)} GB/s ({result.best_pattern()}); "
        f"FMA peak {written(fma, 0)} GFLOP/s{apart}\n",
        file=file,
    )
    print_table(table(result), file)
    print(
        "\nMedians, with quartiles where there are several repeats. "
        "* lower precision than the others. transformers: the faster of fp16 and fp32, "
        "llama.cpp: with or without flash attention, row by row.",
        file=file,
    )
    print(drafts(result), file=file)
    for note in raw["notes"]:
        print(f"note: {note}", file=file)
    print_bounds(result, file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prints the tables of result files.")
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        show(json.loads(path.read_text("utf-8")))


if __name__ == "__main__":
    main()
