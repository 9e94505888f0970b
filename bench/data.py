#!/usr/bin/env python3
"""Measures whole data sets in bpo, llama.cpp and transformers, by batch size: make bench-data

bpo runs with -i, llama.cpp with continuous batching, transformers with padding. All engines get the
same prompts and make the same rewrites: every pass is run and every token drawn at the model card's
settings, and what is drawn is then replaced by the real rewrite's next id, which ends with EOS.

    bpo             the whole program: JSON Lines in and out, tokenizing, opening the model
    llama.cpp       slots that are taken by the next prompt as soon as they are free, prompts' rows
                    beside those of others that decode, and the template's prefix computed once and
                    copied, as its server does; ids in, no text; opening does not count
    transformers    generate on batches of prompts sorted by length, padded on the left; likewise

Figures are medians over the repeats. The result is a table, a JSON file and, if matplotlib is
installed, a plot of the cost over the batch size. Texts: the 200 real pairs of ../shared, else the
bundled held-out prompts and what the demo model makes of them.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import engines
import make_model
import run

ROOT, N_PREFIX = engines.ROOT, run.N_PREFIX


# --------------------------------------------------------------------------------------- the others


class LlamaCpp(engines.LlamaCpp):
    """llama.cpp, many sequences at once."""

    def data(self, pairs: list[dict], n: int, prefix: int, unified: bool) -> dict:
        """Rewrites all pairs with n slots; unified: one KV buffer for all, else one for each."""
        lib, longest = self.lib, max(len(pair["ids"]) + len(pair["forced"]) for pair in pairs)
        params = lib.llama_context_default_params()
        params.n_seq_max, params.kv_unified = n + 1, unified
        params.n_ctx = (n + 1) * (-(-longest // 256) * 256)
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        batch = lib.llama_batch_init(512, 0, 1)
        self.contexts["data"] = (context, lib.llama_get_memory(context), batch)
        try:
            return self.continuous(pairs, n, prefix)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(self.contexts.pop("data")[0])

    def continuous(self, pairs: list[dict], n: int, prefix: int) -> dict:
        """The loop. A slot is [pair, positions in its KV cache, ids made]."""
        memory, waiting, slots, passes = self.contexts["data"][1], iter(pairs), {}, 0
        begin = time.perf_counter()
        if prefix:
            shared = pairs[0]["ids"][:prefix]
            self.decode("data", [(token, i, n, False) for i, token in enumerate(shared)])
        while True:
            for slot in range(n):
                if slot not in slots and (pair := next(waiting, None)):
                    slots[slot] = [pair, prefix, 0]
                    if prefix:
                        self.lib.llama_memory_seq_cp(memory, n, slot, -1, -1)
            if not slots:
                break
            rows = [
                (q[0]["forced"][q[2] - 1], q[1], slot, True)
                for slot, q in slots.items()
                if q[2] > 0
            ]
            for slot, q in slots.items():
                ids = q[0]["ids"]
                if q[2] == 0:
                    end = min(len(ids), q[1] + 512 - len(rows))
                    rows += [(ids[i], i, slot, i == len(ids) - 1) for i in range(q[1], end)]
            self.decode("data", rows)
            passes += 1
            for i, (_, pos, slot, wanted) in enumerate(rows):
                q = slots[slot]
                q[1] = pos + 1
                if wanted:
                    self.sample("data", i)
                    q[2] += 1
                    if q[2] == len(q[0]["forced"]):
                        self.lib.llama_memory_seq_rm(memory, slot, -1, -1)
                        del slots[slot]
        return {"s": time.perf_counter() - begin, "passes": passes}


class Transformers(engines.Transformers):
    """transformers, batches of prompts."""

    def data(self, pairs: list[dict], n: int, **_) -> dict:
        """Rewrites all pairs in batches of n, sorted by the prompts' lengths."""
        torch, t = self.torch, self.transformers
        pairs = sorted(pairs, key=lambda pair: len(pair["ids"]))
        begin, passes = time.perf_counter(), 0
        for at in range(0, len(pairs), n):
            batch = pairs[at : at + n]
            width = max(len(pair["ids"]) for pair in batch)
            longest = max(len(pair["forced"]) for pair in batch)
            ids = torch.tensor([[0] * (width - len(pair["ids"])) + pair["ids"] for pair in batch])
            mask = torch.tensor(
                [[0] * (width - len(pair["ids"])) + [1] * len(pair["ids"]) for pair in batch]
            )
            forced = torch.tensor(
                [pair["forced"] + [engines.EOS] * (longest - len(pair["forced"])) for pair in batch]
            )

            class Force(t.LogitsProcessor):
                """Leaves only the forced id of each row; generate pads rows that have ended."""

                def __init__(self, forced, width: int):
                    self.forced, self.width = forced, width

                def __call__(self, input_ids, scores):
                    only = torch.full_like(scores, -float("inf"))
                    following = self.forced[:, input_ids.shape[1] - self.width]
                    return only.scatter_(1, following.unsqueeze(1), 0.0)

            sampling = {
                "do_sample": True,
                "temperature": engines.TEMPERATURE,
                "top_k": engines.TOP_K,
                "top_p": engines.TOP_P,
            }
            end = {"max_new_tokens": longest, "eos_token_id": engines.EOS, "pad_token_id": 0}
            processors = t.LogitsProcessorList([Force(forced, width)])
            self.model.generate(
                ids, attention_mask=mask, logits_processor=processors, **sampling, **end
            )
            passes += longest
        return {"s": time.perf_counter() - begin, "passes": passes}


class Other:
    """Another engine's process: this script with --serve."""

    def __init__(self, kind: str, path: Path, threads: int):
        command = [sys.executable, __file__, "--serve", kind]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=engines.environment(),
        )
        self.about = self("open", model=str(path), threads=threads)

    def __call__(self, do: str, **arguments) -> dict:
        """Sends a command and waits for its answer."""
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise engines.EngineError(f"its process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise engines.EngineError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(kind: str) -> None:
    """The other end of Other."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print must not come between
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if engine is None:
                name, arguments = engines.KINDS[kind]
                engine = globals()[name](**arguments)
            answer = getattr(engine, command.pop("do"))(**command)
        except Exception as e:  # whatever it is, the harness tells it
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers)


# -------------------------------------------------------------------------------------------- texts


def tokenize(bpo: Path, model: Path, text: str, *options: str) -> list[int]:
    """A text's ids."""
    command = [bpo, "-m", model, "--tokenize", *options, "-p", text]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def held_out_pairs(bpo: Path, model: Path, n: int) -> list[run.Pair]:
    """The bundled held-out prompts with the demo model's rewrites."""
    command = [bpo, "--demo", "-i", ROOT / "demo" / "heldout.jsonl", "--greedy", "-q"]
    done = subprocess.run(command, capture_output=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()[:n]]
    pairs = []
    for record in records:
        ids = tokenize(bpo, model, record["prompt"])
        forced = [*tokenize(bpo, model, record["optimized_prompt"], "--raw"), engines.EOS]
        pairs.append(run.Pair(ids, forced, record["prompt"], len(ids)))
    return pairs


def common_prefix(pairs: list[run.Pair]) -> int:
    """How many ids all prompts begin with."""
    columns = zip(*(pair.ids[:-1] for pair in pairs), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))


# ---------------------------------------------------------------------------------------- measuring


def run_bpo(
    args: argparse.Namespace, model: Path, pairs: list[run.Pair], n: int, *options: str
) -> dict:
    """One whole run of the program."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        lines = [json.dumps({"prompt": pair.text, "forced": pair.forced}) for pair in pairs]
        source.write_text("".join(line + "\n" for line in lines), "utf-8")
        command = [args.bpo, "-m", model, "-i", source, "-o", output, "-q"]
        command += ["-t", str(args.threads), "--parallel", str(n), *options]
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            env=os.environ | {"BPO_FORCE_FIELD": "forced"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            raise engines.EngineError(f"bpo: {done.stderr.strip()}")
        made = [json.loads(line)["bpo"] for line in output.read_text("utf-8").splitlines()]
        if [(m["prompt_tokens"], m["new_tokens"]) for m in made] != [
            (len(pair.ids), len(pair.forced)) for pair in pairs
        ]:
            raise engines.EngineError("bpo did not make the forced ids")
        return {"s": seconds}


def kept_flop(shape: make_model.Shape, pairs: list[run.Pair], prefix: int) -> float:
    """Operations of the rows that the result needs, two for a multiply-add, without attention.

    These rows are the prompts after the prefix and the new ids but the last: no drafts, no padding.
    """
    per_row = run.pass_bytes(shape) / 2 - shape.vocab * shape.dim
    n_rows = prefix + sum(len(pair.ids) - prefix + len(pair.forced) - 1 for pair in pairs)
    return 2 * (
        per_row * n_rows + shape.vocab * shape.dim * sum(len(pair.forced) for pair in pairs)
    )


def ways(args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    """What is measured: name -> engine, options."""
    found = {}
    for kind in args.engines:
        if kind == "bpo":
            found |= {"bpo": (kind, {}), "bpo, no drafts": (kind, {"lookup": 0})}
        elif kind.startswith("llama"):
            found |= {
                f"{kind}, one KV buffer": (kind, {"unified": True}),
                f"{kind}, one each": (kind, {"unified": False}),
            }
        else:
            found[kind] = (kind, {})
    if unknown := set(args.ways or []) - set(found):
        raise SystemExit(
            f"data.py: --ways: there is no {', '.join(sorted(unknown))}; "
            f"there are: {', '.join(found)}"
        )
    return {name: way for name, way in found.items() if not args.ways or name in args.ways}


def measure(args: argparse.Namespace, model: make_model.Model, pairs: list[run.Pair]) -> dict:
    """All figures: way -> N -> repeats, each {"s", "prompts", "tokens"}."""
    lock, prefix, figures, notes, others = run.Lock(), common_prefix(pairs), {}, [], {}
    for kind in args.engines:
        if kind != "bpo":
            try:
                with lock():
                    others[kind] = Other(
                        kind, model.gguf if kind.startswith("llama") else model.hf, args.threads
                    )
            except engines.EngineError as e:
                notes.append(f"{kind} is left out: {e}")
    some = pairs[:: max(1, len(pairs) // args.slow_prompts)][: args.slow_prompts]
    for repeat in range(args.repeats):
        for n in args.sizes:
            for name, (kind, options) in ways(args).items():
                slow = kind.startswith("transformers")
                if (kind != "bpo" and kind not in others) or (slow and repeat >= args.slow_repeats):
                    continue
                texts = some if slow else pairs
                plain = [{"ids": pair.ids, "forced": pair.forced} for pair in texts]
                with lock():
                    if kind == "bpo":
                        lookup = ["--lookup", str(options["lookup"])] if options else []
                        # the file is in memory then
                        run_bpo(args, model.bpo, texts[:2], n, *lookup)
                        before = machine_now(args, model.bpo)
                        answer = run_bpo(args, model.bpo, texts, n, *lookup)
                        after = machine_now(args, model.bpo)
                        answer |= {what: (before[what] + after[what]) / 2 for what in before}
                    else:
                        others[kind]("data", pairs=plain[:2], n=n, prefix=prefix, **options)
                        answer = others[kind]("data", pairs=plain, n=n, prefix=prefix, **options)
                answer |= {"prompts": len(texts), "tokens": sum(len(pair.forced) for pair in texts)}
                figures.setdefault(name, {}).setdefault(str(n), []).append(answer)
                print(
                    f"{name}, N = {n}: {answer['tokens'] / answer['s']:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    for other in others.values():
        other.close()
    return {"figures": figures, "notes": notes, "prefix": prefix}


def machine_now(args: argparse.Namespace, model: Path) -> dict[str, float]:
    """The machine's FMA peak in FLOP/s, and the round trip between two threads in ns."""
    with engines.Engine("bpo") as worker:
        worker("open", model=str(model), threads=args.threads)
        peaks = [worker("peaks") for _ in range(5)]
    return {
        "fma_flop_s": 1e9 * statistics.median(map(run.fma_peak, peaks)),
        "round_trip_ns": statistics.median(p["round_trip_ns"] for p in peaks),
    }


def rates(figures: dict) -> dict[str, dict[int, float]]:
    """New tokens per second: way -> N -> median."""
    return {
        name: {
            int(n): statistics.median(r["tokens"] / r["s"] for r in repeats)
            for n, repeats in sizes.items()
        }
        for name, sizes in figures.items()
    }


def show(result: dict) -> None:
    """The table."""
    found = rates(result["figures"])
    sizes = sorted({n for by_size in found.values() for n in by_size})
    print(f"\n{result['model']}: new tokens per second, ", end="")
    print(f"{result['prompts']} prompts, {result['texts']}")
    print(f"{'N':32}" + "".join(f"{n:>9}" for n in sizes) + "     best")
    for name, by_size in found.items():
        print(
            f"{name:32}"
            + "".join(f"{by_size[n]:9.1f}" if n in by_size else " " * 9 for n in sizes)
            + f"{max(by_size.values()):9.1f}"
        )
    best = {
        kind: max((max(v.values()) for k, v in found.items() if k.startswith(kind)), default=0)
        for kind in ("bpo", "llama", "transf")
    }
    for kind, name, target in (("llama", "llama.cpp", 1.3), ("transf", "transformers", 2.5)):
        if best[kind]:
            ratio = best["bpo"] / best[kind]
            print(f"bpo's best is {ratio:.2f} times {name}'s best (target: {target})")
    for n, share in result["peak_share"].items():
        print(
            f"N = {n}: {100 * share:.0f} % of the FMA peak, kept rows only"
            + (" (target: 60)" if int(n) >= 16 else "")
        )
    for note in result["notes"]:
        print(f"note: {note}")


def plot(result: dict, path: Path) -> None:
    """Milliseconds per new token over N."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, by_size in rates(result["figures"]).items():
        axes.plot(list(by_size), [1000 / rate for rate in by_size.values()], marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="sequences together (N)",
        ylabel="ms per new token, prompts included",
        title=result["model"],
    )
    counts = sorted({int(n) for sizes in result["figures"].values() for n in sizes})
    axes.set_xticks(counts, minor=False)
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measures, prints the table, writes the JSON and the plot."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description="Measures data sets.")
    parser.add_argument("--shape", choices=make_model.SHAPES, default="110m")
    parser.add_argument(
        "--engines", nargs="+", choices=engines.KINDS, default=list(engines.KINDS), metavar="ENGINE"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help='rows of the table, such as "llama.cpp, one KV buffer" (all)',
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--slow-prompts", type=int, default=32, help="of transformers")
    parser.add_argument("--threads", type=int, default=run.n_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help="of transformers")
    parser.add_argument("--bpo", type=Path, default=ROOT / "bpo")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="for models")
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON file (default: bench/results/data-SHAPE.json)"
    )
    args = parser.parse_args()
    ways(args)  # report a wrong name before any work is done
    output = args.output or engines.BENCH / "results" / f"data-{args.shape}.json"
    model = make_model.make(
        args.shape, args.folder, any(kind.startswith("llama") for kind in args.engines)
    )
    pairs, texts = run.real_pairs(model), "real pairs"
    if not pairs:
        pairs = held_out_pairs(args.bpo, model.bpo, args.prompts)
        texts = "bundled held-out prompts with the demo model's rewrites"
    pairs = pairs[:: max(1, len(pairs) // args.prompts)][: args.prompts]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # where bpo keeps the template's prefix
        result = measure(args, model, pairs)
    flop = kept_flop(make_model.SHAPES[args.shape], pairs, result["prefix"])
    drafted = result["figures"].get("bpo", {})
    result |= {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": run.commit(),
        "machine": run.machine(),
        "model": args.shape,
        "prompts": len(pairs),
        "texts": texts,
        "threads": args.threads,
        "peak_share": {
            n: statistics.median(flop / r["s"] / r["fma_flop_s"] for r in repeats)
            for n, repeats in drafted.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    try:
        plot(result, output.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed (make bench-deps)")


if __name__ == "__main__":
    main()
