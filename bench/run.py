#!/usr/bin/env python3
"""Measures bpo, llama.cpp and transformers in turn, in one run: make bench SHAPE=1b

What is compared is measured one engine right after the other, again and again, because the speed of
a shared machine changes from second to second; figures are medians over the repeats, ratios are
medians of ratios within a repeat. bench/README.md says what the rows are. The result is a table on
the terminal and a JSON file, from which bench/plots.py draws.
"""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import json
import mmap
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import engines
import make_model
import report
from engines import Engine, EngineError

ROOT = engines.ROOT
BUILD = ROOT / "build"
PROMPTS = make_model.SHARED / "prompts"
N_PREFIX = 29  # ids before the prompt in BPO's template, with Llama-2's tokenizer; 4 come after it
# ids of the prompt and of the rewrite, EOS included: medians of 200 real pairs
MEDIAN_COUNTS = 18, 27
SUMMED = ("s", "prefill_s", "passes", "tokens", "drafted", "accepted")
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass
class Pair:
    """A prompt with its rewrite, in ids: ids is the whole templated input, forced ends with EOS."""

    ids: list[int]
    forced: list[int]
    text: str | None  # the bare prompt
    n_prompt: int


# ---------------------------------------------------------------------------------------- the texts


def real_pairs(model: make_model.Model) -> list[Pair]:
    """The 200 real pairs of ../shared; none if it is missing or the model has another tokenizer."""
    if not PROMPTS.exists() or not make_model.LLAMA2_TOKENIZER.exists() or model.hf is None:
        return []
    if (model.hf / "tokenizer.model").read_bytes() != make_model.LLAMA2_TOKENIZER.read_bytes():
        return []
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(make_model.LLAMA2_TOKENIZER))
    templated = {}
    for line in (PROMPTS / "template_ids.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        templated[record["id"]] = record["ids"]
    pairs = []
    for line in (PROMPTS / "bpo_test.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        ids, forced = templated[record["id"]], pieces.Encode(record["optimized_prompt"])
        pairs.append(Pair(ids, [*forced, engines.EOS], record["prompt"], len(ids) - N_PREFIX - 4))
    return pairs


def made_up_pairs(n: int, vocab: int) -> list[Pair]:
    """Pairs of random ids of the median counts.

    Their rewrites copy runs of the prompt as real ones do: about half of the ids.
    """
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(300, vocab) for _ in range(count)]

    template, pairs = some(N_PREFIX + 4), []
    for _ in range(n):
        prompt = some(MEDIAN_COUNTS[0])
        forced = some(3) + prompt[:7] + some(5) + prompt[10:16] + some(5)
        ids = [1, *template[1:N_PREFIX], *prompt, *template[N_PREFIX:]]
        pairs.append(Pair(ids, [*forced, engines.EOS], None, len(prompt)))
    return pairs


def nearest_to_median(pairs: list[Pair], n: int) -> list[Pair]:
    """The n pairs whose counts are nearest to the median ones."""
    prompt, new = MEDIAN_COUNTS

    def distance(pair: Pair) -> float:
        return abs(pair.n_prompt - prompt) / prompt + abs(len(pair.forced) - new) / new

    return sorted(pairs, key=distance)[:n]


# -------------------------------------------------------------------------------------- the machine


class Lock:
    """Locks that keep other jobs of this machine away while something is measured.

    $BENCH_LOCK names the files, if any: jobs take the same ones, with flock. They are taken in
    order, and all but the last are given back once all are held. It is kept from one measurement to
    the next for HOLD_S seconds, so that waiting does not take longer than measuring.
    """

    HOLD_S = 100

    def __init__(self) -> None:
        names = os.environ.get("BENCH_LOCK", "").split(":")
        self.files = [open(name, "a") for name in names if name]  # noqa: SIM115
        self.since = 0.0  # when it was taken; 0: it is not held

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.since:
            for file in self.files:
                fcntl.flock(file, fcntl.LOCK_EX)
            for file in self.files[:-1]:
                fcntl.flock(file, fcntl.LOCK_UN)
            self.since = time.monotonic()
        try:
            yield
        finally:
            if time.monotonic() - self.since > self.HOLD_S:
                self.release()

    def release(self) -> None:
        """Lets the other jobs run."""
        self.since = 0.0
        for file in self.files[-1:]:
            fcntl.flock(file, fcntl.LOCK_UN)


def resident_share(path: Path) -> float:
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, access) as mapped,
    ):
        n_pages = -(-size // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * n_pages)()
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), pages) != 0:
            return float("nan")
        return sum(page & 1 for page in bytes(pages)) / n_pages


def evict(paths: list[Path]) -> float:
    """Drops files from the page cache; returns how much of them is still in it."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return max(resident_share(path) for path in paths)


def read_all(paths: list[Path]) -> None:
    """Brings files to the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def n_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def machine() -> dict:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    first = cpuinfo.split("\n\n")[0].splitlines()
    lines = dict(line.split(":", 1) for line in first if ":" in line)
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(lines.get("flags", "").split())
    simd = {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile"}
    keys = ("vendor_id", "model name", "cpu family", "model", "cache size", "Features")
    return {
        "cpu": {key: lines[key] for key in keys if key in lines},
        "simd": sorted(flags & simd),
        "cores": n_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is measured; "+" when the working tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------ the run


def fma_peak(peaks: dict) -> float:
    """The fp32 peak among what bpo's process measured, in GFLOP/s."""
    return max(peaks["fma_gflop_s"].values())


@dataclass
class Bench:
    """A run: what it measures with, and what it has measured.

    figures[row][engine] is a list of one value per repeat, or turn of one. A value is seconds,
    unless the row's name says something else.
    """

    args: argparse.Namespace
    model: make_model.Model
    shape: make_model.Shape
    pairs: list[Pair]  # near the median
    replay: list[Pair]
    lock: Lock = field(default_factory=Lock)
    figures: dict[str, dict[str, list]] = field(default_factory=dict)
    about: dict[str, dict] = field(default_factory=dict)  # by engine: version and settings
    notes: list[str] = field(default_factory=list)
    running: dict[str, Engine] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A note for the reader of the result."""
        if text not in self.notes:
            self.notes.append(text)
            self.say(f"note: {text}")

    def add(self, row: str, engine: str, value) -> None:
        """A figure of a repeat."""
        self.figures.setdefault(row, {}).setdefault(engine, []).append(value)

    # ---- engines

    def file_of(self, kind: str) -> Path | None:
        """What an engine opens."""
        if kind == "bpo":
            return self.model.bpo
        return self.model.gguf if kind.startswith("llama") else self.model.hf

    def files_of(self, kind: str) -> list[Path]:
        """The files that an engine reads its weights from."""
        path = self.file_of(kind)
        return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]

    def start(self, kind: str) -> Engine | None:
        """An engine's process, or None with a note."""
        if self.file_of(kind) is None:
            self.note(f"{kind} is left out: there is no file for it")
            return None
        try:
            return Engine(kind, sys.executable)
        except EngineError as e:
            self.note(f"{kind} is left out: {e}")
            return None

    def open(self, engine: Engine) -> dict:
        """Opens the model in an engine."""
        answer = engine("open", model=str(self.file_of(engine.kind)), threads=self.args.threads)
        self.about[engine.kind] = {"version": answer["version"], "settings": answer["settings"]}
        return answer

    def each(self, kinds: list[str] | None = None) -> Iterator[tuple[str, Engine]]:
        """The running engines, or some of them, in turn."""
        for kind, engine in self.running.items():
            if kinds is None or kind in kinds:
                yield kind, engine

    def is_there(self, kind: str) -> bool:
        """Whether an engine can run, with a note if not."""
        if self.bytes_of(kind) > 0.9 * memory_bytes():
            self.note(
                f"{kind} is left out: {self.bytes_of(kind) * 1e-9:.0f} GB of weights "
                "do not fit this machine's memory"
            )
            return False
        engine = self.start(kind)
        if engine:
            engine.close()
        return engine is not None

    def bytes_of(self, kind: str) -> int:
        """Memory that an engine's weights take."""
        if self.file_of(kind) is None:
            return 0
        n_bytes = sum(path.stat().st_size for path in self.files_of(kind))
        return 2 * n_bytes if kind == "transformers fp32" else n_bytes

    def groups(self, kinds: list[str]) -> list[list[str]]:
        """Engines whose weights fit into memory together: all in one group if that is possible."""
        files = {self.file_of(kind): self.bytes_of(kind) for kind in kinds}
        own = sum(self.bytes_of(kind) for kind in kinds if kind.startswith("transformers"))
        if sum(files.values()) + own < 0.8 * memory_bytes():
            return [kinds]
        self.note(
            "the engines were measured one after the other, not in turn: "
            "their weights do not fit into memory together"
        )
        return [[kind] for kind in kinds]

    # ---- from nothing to the rewrite

    def program(self, pair: Pair, *options: str) -> dict:
        """One whole ./bpo process; seconds from before it is started until it has ended."""
        what = ["-p", pair.text]
        if pair.text is None:
            what = ["--tokens", ",".join(map(str, pair.ids))]
        command = [str(self.args.bpo), "-m", str(self.model.bpo), *what, "--json", "-q"]
        command += ["-t", str(self.args.threads), *options]
        env = os.environ | {"BPO_FORCE_TOKENS": ",".join(map(str, pair.forced))}
        begin = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            raise EngineError(f"bpo: {done.stderr.strip()}")
        result = json.loads(done.stdout)
        if result["tokens"] != pair.forced:
            raise EngineError("bpo did not make the forced ids")
        timings = result["timings"]
        # what is left is opening the model, starting the process and ending it
        rest = seconds - timings["prefill_s"] - timings["decode_s"]
        return {
            "s": seconds,
            "open_s": rest,
            "prefill_s": timings["prefill_s"],
            "decode_s": timings["decode_s"],
        }

    def fresh(self, kind: str, pair: Pair) -> dict:
        """Opens the model in a new process and rewrites at once.

        Loading the engine's packages comes before and does not count.
        """
        engine = self.start(kind)
        with engine:
            opened = self.open(engine)["s"]
            answer = engine("rewrite", ids=pair.ids, forced=pair.forced)
            self.add("memory", kind, engine("memory"))
        parts = {
            "open_s": opened,
            "prefill_s": answer["prefill_s"],
            "decode_s": answer["s"] - answer["prefill_s"],
        }
        return {"s": opened + answer["s"]} | parts

    def measure_fresh(self, kinds: list[str]) -> None:
        """First rewrites of new processes, with the model's file in memory and not."""
        pair = self.pairs[0]
        ways: list[tuple[str, list[str], Callable]] = [
            ("bpo", ["--no-cache"], self.program),
            ("bpo, prefix cached", [], self.program),
        ]
        with self.lock():
            for _, options, run in ways:  # writes the cached prefix
                run(pair, *options)
        for repeat in range(self.args.fresh):
            for temperature in ("warm", "cold"):
                if temperature == "cold" and repeat >= self.args.cold:
                    continue
                with self.lock():
                    for name, options, run in ways:
                        self.prepare("bpo", temperature)
                        self.add(f"fresh, {temperature}", name, run(pair, *options))
                for kind in kinds:
                    if kind == "bpo" or (
                        kind.startswith("transformers") and repeat >= self.args.slow_repeats
                    ):
                        continue
                    with self.lock():
                        self.prepare(kind, temperature)
                        self.add(f"fresh, {temperature}", kind, self.fresh(kind, pair))
            self.say(f"first rewrites of new processes, repeat {repeat + 1} of {self.args.fresh}")
        with self.lock():
            self.prepare("bpo", "warm")
            self.fresh("bpo", pair)

    def prepare(self, kind: str, temperature: str) -> None:
        """Has the engine's files in the page cache, or not."""
        files = self.files_of(kind)
        if temperature == "warm":
            read_all(files)
        elif (left := evict(files)) > 0.02:
            self.note(
                f"cold starts: {100 * left:.0f} % of {kind}'s file "
                "could not be dropped from the page cache"
            )

    # ---- with the model open

    def touch(self, engine: Engine) -> None:
        """One pass that does not count: the system may have taken back pages of an idle file.

        Before it, the threads of the engine whose turn it was stop spinning (OpenMP's spin for some
        10 ms, the time of a rewrite with a small model).
        """
        time.sleep(0.1)
        engine("start", ids=self.pairs[0].ids[:2], room=1)

    def measure_prefill(self, kind: str, engine: Engine, n: int) -> None:
        """Tokens per second of a prompt of n ids, to the first token drawn.

        For bpo also the FMA peak right before and after.
        """
        ids = [1, *range(300, 300 + n - 1)]
        if self.shape.vocab <= 300 + n:
            ids = [1, *(5 + i % 300 for i in range(n - 1))]
        self.touch(engine)
        before = engine("peaks") if kind == "bpo" else None
        self.add(f"prefill {n}", kind, n / engine("start", ids=ids, room=1)["s"])
        if before:
            peak = (fma_peak(before) + fma_peak(engine("peaks"))) / 2
            self.add(f"peak beside prefill {n}", "bpo", peak)

    def measure_decode(self, kind: str, engine: Engine) -> None:
        """Tokens per second at the start; for bpo also the machine's peaks, measured around it."""
        self.touch(engine)
        before = engine("peaks") if kind == "bpo" else None
        engine("start", ids=self.pairs[0].ids, room=80)
        engine("advance", n=4)
        speed = self.args.tokens / engine("advance", n=self.args.tokens)["s"]
        self.add("decode", kind, speed)
        if before:
            after = engine("peaks")
            for what in ("read_gb_s", "fma_gflop_s"):
                means = {
                    name: (before[what][name] + after[what][name]) / 2 for name in before[what]
                }
                self.add(what, "bpo", means)
            self.add("round_trip_ns", "bpo", (before["round_trip_ns"] + after["round_trip_ns"]) / 2)

    def measure_long(self, kind: str, engine: Engine) -> None:
        """Tokens per second at position 2,000, of a sequence that is begun once."""
        self.touch(engine)
        seconds = engine("advance", n=self.args.tokens, **{"in": "long"})["s"]
        self.add("decode at 2000", kind, self.args.tokens / seconds)

    def start_long(self, n_repeats: int) -> None:
        """Brings every engine to where measure_long's tokens lie around position 2,000."""
        n = n_repeats * self.args.tokens
        ids = [1, *(5 + i % 300 for i in range(2000 - n // 2 - 1))]
        for kind, engine in self.each():
            context = {"context": engines.CONTEXT} if kind == "bpo" else {}
            with self.lock():
                engine("start", ids=ids, room=n + 8, **{"in": "long"}, **context)
            self.say(f"{kind} is at position {len(ids)}")

    def rewrites(
        self, kind: str, engine: Engine, pair: Pair, name: str
    ) -> Iterator[tuple[str, dict]]:
        """The ways in which an engine rewrites, each with its answer.

        bpo rewrites with and without drafts, llama.cpp without and with the template's prefix kept.
        """
        text = {"ids": pair.ids, "forced": pair.forced}
        if kind == "bpo":
            yield "bpo", engine("rewrite", **text, drafts=True, **{"in": name})
            yield "bpo, no drafts", engine("rewrite", **text, **{"in": name})
            return
        yield kind, engine("rewrite", **text)
        if kind.startswith("llama"):
            yield f"{kind}, prefix kept", engine("rewrite", **text, prefix=N_PREFIX)

    def measure_rewrites(
        self, row: str, pairs: list[Pair], repeat: int, kinds: list[str] | None = None
    ) -> None:
        """Whole rewrites of these pairs, one pair after the other by all engines.

        The figure is the mean of the pairs. Each repeat has a new session, because drafts come from
        a session's earlier rewrites too.
        """
        sums: dict[str, dict] = {}
        name, first = f"{row} {repeat}", {"ids": pairs[0].ids, "forced": pairs[0].forced[-2:]}
        for kind, engine in self.each(kinds):  # what only a first call has
            if kind == "bpo":
                for drafts in (True, False):
                    engine("rewrite", **first, drafts=drafts, **{"in": name})
            else:
                engine("rewrite", **first, prefix=N_PREFIX)
        for i, pair in enumerate(pairs):
            with self.lock():
                for kind, engine in self.each(kinds):
                    if kind.startswith("transformers") and i >= self.args.slow_pairs:
                        continue
                    self.touch(engine)
                    for way, answer in self.rewrites(kind, engine, pair, name):
                        total = sums.setdefault(way, dict.fromkeys(SUMMED, 0) | {"each": []})
                        total["each"].append(answer["s"])
                        for key in SUMMED:
                            total[key] += answer.get(key, 0)
            if i % 10 == 9:
                self.say(f"{row}: {i + 1} of {len(pairs)} pairs")
        for way, total in sums.items():
            means = {key: total[key] / len(total["each"]) for key in SUMMED}
            self.add(row, way, means | {"pairs": len(total["each"]), "each": total["each"]})
        for _, engine in self.each(["bpo"]):
            engine("close", **{"in": name})

    def measure_samples(self, kind: str, engine: Engine, repeat: int) -> None:
        """Five samples of a prompt together; for bpo also five single runs.

        Both are run with and without drafts.
        """
        pair = self.pairs[0]
        text = {"ids": pair.ids, "forced": pair.forced}
        short = {"ids": pair.ids, "forced": pair.forced[-2:]}
        if kind != "bpo":
            engine("rewrite", **short, samples=5)
            self.add("5 samples", kind, engine("rewrite", **text, samples=5))
            return
        for suffix, drafts in ((", no drafts", False), ("", True)):
            five, one = ({"in": f"{n} samples {repeat}", "drafts": drafts} for n in ("5", "1"))
            engine("rewrite", **short, samples=5, **five)  # opens the session
            together = engine("rewrite", **text, samples=5, **five)["s"]
            single = 0.0
            for _ in range(5):  # each in a new session: a single run knows nothing of the others
                engine("rewrite", **short, **one)
                single += engine("rewrite", **text, **one)["s"]
                engine("close", **one)
            engine("close", **five)
            self.add("5 samples", kind + suffix, {"s": together, "single_s": single})

    def measure_rows(self, kind: str, engine: Engine) -> None:
        """Passes of 1 to 64 rows, with a pass of one row right before each.

        The memory's speed changes within seconds, and the two are compared.
        """
        place = {"in": "rows"} if kind == "bpo" else {}

        def seconds(n: int) -> float:
            return min(engine("rows", n=n, **place)["s"] for _ in range(2))

        one, times = {}, {}
        for n in ROWS:
            one[str(n)], times[str(n)] = seconds(1), seconds(n)
        self.add("rows", kind, times)
        self.add("one row beside", kind, one)

    def warm_up(self) -> None:
        """Opens the model in all engines, and has each do everything once."""
        for kind, engine in self.each():
            with self.lock():
                read_all(self.files_of(kind))
                self.open(engine)
                engine("start", ids=self.pairs[0].ids, room=8)
                engine("advance", n=4)
                engine("rewrite", ids=self.pairs[0].ids, forced=self.pairs[0].forced[-4:])
                engine("rows", n=4, **({"in": "rows"} if kind == "bpo" else {}))
        with self.lock():
            time.sleep(0.5)
            for kind, engine in self.each():
                if (busy := engine.busy_share()) > 0.05:
                    self.note(f"{kind} takes {100 * busy:.0f} % of a core while it waits")

    def measure_open(self) -> None:
        """All that is measured with the models open."""
        args = self.args
        self.warm_up()
        if args.long:
            self.start_long(args.repeats)
        for repeat in range(args.repeats):
            slow = repeat < args.slow_repeats
            kinds = [kind for kind in self.running if slow or not kind.startswith("transformers")]
            whole: list[Callable] = [self.measure_decode]
            whole += [self.measure_long] if args.long else []
            whole += [
                lambda kind, engine, n=n: self.measure_prefill(kind, engine, n) for n in (48, 512)
            ]
            whole += [lambda kind, engine, r=repeat: self.measure_samples(kind, engine, r)]
            whole += [self.measure_rows]
            # these take about a second, and the machine changes from second to second
            brief = [(self.measure_decode, kinds), (self.measure_rows, ["bpo"])]
            for task, by in [(task, kinds) for task in whole] + brief * (args.turns - 1):
                with self.lock():
                    for kind, engine in self.each(by):
                        task(kind, engine)
            self.measure_rewrites("rewrite", self.pairs, repeat, kinds)
            self.say(f"models open, repeat {repeat + 1} of {args.repeats}")
        quick = [kind for kind in self.running if not kind.startswith("transformers")]
        for repeat in range(args.replays):
            self.measure_rewrites("replay", self.replay, repeat, quick)

    def measure_kernels(self) -> dict | None:
        """What kernels_bench.c finds for this shape."""
        if self.args.shape is None:
            return None
        command = [str(self.args.kernels_bench), "--shape", self.args.shape, "--json"]
        command += ["--threads", str(self.args.threads), "--rounds", str(self.args.rounds)]
        with self.lock():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def measure_demo(self) -> None:
        """Whole processes with the bundled model, from a prompt's text to the rewrite's."""
        model = ROOT / "demo" / "bpo-demo.bin"
        command = [str(self.args.bpo), "-m", str(model), "--seed", "1", "-q"]
        command += ["-p", "Tell me about Harry Potter"]
        with self.lock():
            for repeat in range(self.args.demo + 1):
                begin = time.perf_counter()
                subprocess.run(command, capture_output=True, check=True)
                if repeat > 0:
                    self.add("demo process", "bpo", time.perf_counter() - begin)

    def run(self) -> dict:
        """Measures everything; returns the result as it goes to the JSON file."""
        begin = time.time()
        present = [kind for kind in self.args.engines if self.is_there(kind)]
        self.measure_demo()
        kernels = self.measure_kernels()
        self.measure_fresh(present)
        for group in self.groups(present):
            try:
                self.running = {kind: self.start(kind) for kind in group}
                self.measure_open()
            finally:
                for engine in self.running.values():
                    engine.close()
        self.lock.release()
        date = datetime.datetime.fromtimestamp(begin, datetime.UTC)
        return {
            "format": 1,
            "date": date.isoformat(timespec="seconds"),
            "seconds": round(time.time() - begin),
            "commit": commit(),
            "machine": machine(),
            "model": self.model.name,
            "shape": vars(self.shape) | {"pass_bytes": pass_bytes(self.shape)},
            "settings": {
                key: value
                for key, value in vars(self.args).items()
                if isinstance(value, int | str | list | bool)
            },
            "texts": {
                "real": self.pairs[0].text is not None,
                "pairs": [[pair.n_prompt, len(pair.forced)] for pair in self.pairs],
                "replay": [[pair.n_prompt, len(pair.forced)] for pair in self.replay],
            },
            "engines": self.about,
            "figures": self.figures,
            "kernels": kernels,
            "notes": self.notes,
        }


def pass_bytes(shape: make_model.Shape) -> int:
    """Bytes of weights that a pass reads: all but the embedding."""
    head_dim = shape.dim // shape.n_heads
    layer = (
        (shape.n_heads + 2 * shape.n_kv_heads) * head_dim * shape.dim
        + shape.dim * shape.dim
        + 3 * shape.dim * shape.ffn_dim
    )
    return 2 * (shape.n_layers * layer + shape.vocab * shape.dim)


def shape_of(hf: Path) -> make_model.Shape:
    """The shape of a checkpoint."""
    c = json.loads((hf / "config.json").read_text("utf-8"))
    sizes = (c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"])
    kv = c.get("num_key_value_heads") or c["num_attention_heads"]
    return make_model.Shape(
        *sizes, kv, c["intermediate_size"], c["vocab_size"], c["max_position_embeddings"]
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measures bpo, llama.cpp and transformers next to each other."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape",
        choices=make_model.SHAPES,
        help="a random model of this shape, made when it is not there (1b)",
    )
    what.add_argument("--model", type=Path, help="a Hugging Face checkpoint folder")
    parser.add_argument(
        "--engines", nargs="+", choices=engines.KINDS, default=list(engines.KINDS), metavar="ENGINE"
    )
    parser.add_argument("--threads", type=int, default=n_cores())
    parser.add_argument(
        "--repeats", type=int, default=5, help="of what is measured with the models open"
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="of decoding and of rows, in each repeat"
    )
    parser.add_argument(
        "--slow-repeats",
        type=int,
        default=1,
        help="of transformers, whose figures differ by factors",
    )
    parser.add_argument("--fresh", type=int, default=3, help="first rewrites of new processes")
    parser.add_argument(
        "--cold", type=int, default=2, help="... of them with the file not in memory"
    )
    parser.add_argument("--replays", type=int, default=1, help="of the real pairs")
    parser.add_argument(
        "--pairs", type=int, default=16, help="near the median, for the row of one whole rewrite"
    )
    parser.add_argument("--slow-pairs", type=int, default=8, help="... of them for transformers")
    parser.add_argument("--replay-pairs", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a repeat")
    parser.add_argument("--rounds", type=int, default=7, help="of kernels_bench")
    parser.add_argument("--demo", type=int, default=20, help="processes with the demo model")
    parser.add_argument(
        "--no-long",
        dest="long",
        action="store_false",
        help="without position 2,000, whose prefill takes a while",
    )
    parser.add_argument("--bpo", type=Path, default=ROOT / "bpo", help="the program")
    parser.add_argument("--kernels-bench", type=Path, default=BUILD / "bench" / "kernels_bench")
    parser.add_argument("--folder", type=Path, default=BUILD / "bench", help="for models")
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON file (default: bench/results/SHAPE.json)"
    )
    args = parser.parse_args(argv)
    args.shape = args.shape or (None if args.model else "1b")
    return args


def prepare(args: argparse.Namespace) -> Bench:
    """The model and the texts of a run."""
    need_gguf = any(kind.startswith("llama") for kind in args.engines)
    try:
        import gguf  # noqa: F401
    except ImportError:
        need_gguf = False
    if args.shape:
        model = make_model.make(args.shape, args.folder, need_gguf)
        shape = make_model.SHAPES[args.shape]
    else:
        model = make_model.from_checkpoint(
            args.model, args.folder / args.model.resolve().name, need_gguf
        )
        shape = shape_of(args.model)
    real = real_pairs(model)
    pairs = nearest_to_median(real, args.pairs) or made_up_pairs(args.pairs, shape.vocab)
    step = max(1, len(real) // args.replay_pairs)
    replay = real[::step][: args.replay_pairs] or made_up_pairs(args.replay_pairs, shape.vocab)
    bench = Bench(args, model, shape, pairs, replay)
    if not real:
        bench.note(
            "the texts are made-up ids: there are no real pairs beside the project, "
            "or the model has another tokenizer"
        )
    return bench


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    args = parse()
    name = args.shape or args.model.resolve().name
    output = args.output or engines.BENCH / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # where bpo keeps the template's prefix
        result = prepare(args).run()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    report.show(result)
    python = os.path.relpath(sys.executable)
    print(f"\nwritten to {os.path.relpath(output)}; plots: {python} bench/plots.py")


if __name__ == "__main__":
    main()
