"""The engines under test, each in its own process, which stays alive between measurements.

An engine is a class with the methods below; worker.py calls them by name in the engine's own
process, and Engine, here, is the harness's end of the pipe. bpo's process is the C program
bpo_worker.c, with the same commands.

    open(model, threads)       opens a model                   {"s", "version", "settings"}
    start(ids, room)           a new sequence, to one token    {"s"}
    advance(n)                 n more tokens, a pass each      {"s"}
    rewrite(ids, forced, ...)  from ids to the last token      {"s", "prefill_s", "passes"}
    rows(n)                    one pass of n rows              {"s"}
    memory()                   memory of the process           {"peak_bytes", "private_bytes"}

Every pass is run and every token is drawn by the engine's sampler, at temperature 0.6, top-k 50,
top-p 0.9; what is drawn is then replaced by the next forced id (where there is none, by some id),
so that all engines do the same work on the same text.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
TEMPERATURE, TOP_K, TOP_P = 0.6, 50, 0.9
CONTEXT = 2304  # positions: 2,000 and some
EOS = 2


def memory() -> dict:
    """Bytes of the process's peak memory so far, mapped files included, and private memory now."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {
        "peak_bytes": 1024 * int(lines["VmHWM"].split()[0]),
        "private_bytes": 1024 * int(lines["RssAnon"].split()[0]),
    }


# ---------------------------------------------------------------------------------------- llama.cpp


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain C functions, so that Python does not slow it down.

    One call of llama_decode and one of llama_sampler_sample per token. Its sampler chain takes
    top-k before the temperature, which gives the same ids and is faster.
    """

    N_SEQUENCES = 8

    def __init__(self, flash: bool = True):
        import llama_cpp

        self.lib, self.flash = llama_cpp, flash
        self.contexts = {}
        self.sequence = {}  # ids by context
        self.keep = []  # ids whose KV stays in the context "prefix kept"
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))

    def open(self, model: str, threads: int) -> dict:
        """Maps the GGUF (llama.cpp's default) and makes a context."""
        begin = time.perf_counter()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.threads = threads
        self.model = self.lib.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.context("main")
        seconds = time.perf_counter() - begin
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        chain = self.lib.llama_sampler_chain_init(self.lib.llama_sampler_chain_default_params())
        for sampler in (
            self.lib.llama_sampler_init_top_k(TOP_K),
            self.lib.llama_sampler_init_temp(TEMPERATURE),
            self.lib.llama_sampler_init_top_p(TOP_P, 1),
            self.lib.llama_sampler_init_dist(1),
        ):
            self.lib.llama_sampler_chain_add(chain, sampler)
        self.sampler = chain
        system = self.lib.llama_print_system_info().decode()
        return {
            "s": seconds,
            "version": importlib.metadata.version("llama-cpp-python"),
            "settings": {
                "threads": threads,
                "flash_attn": self.flash,
                "n_batch": 512,
                "kv": "f16",
                "system": system,
            },
        }

    def context(self, name: str):
        """The context of a name; each has its own KV cache."""
        if name not in self.contexts:
            params = self.lib.llama_context_default_params()
            params.n_seq_max = self.N_SEQUENCES if name == "samples" else 1
            params.n_ctx = CONTEXT
            params.kv_unified = True  # all sequences share the positions
            params.n_batch = params.n_ubatch = 512
            params.n_threads = params.n_threads_batch = self.threads
            kinds = self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = kinds[0] if self.flash else kinds[1]
            params.no_perf = True
            context = self.lib.llama_init_from_model(self.model, params)
            if not context:
                raise RuntimeError("llama.cpp makes no context")
            self.contexts[name] = (
                context,
                self.lib.llama_get_memory(context),
                self.lib.llama_batch_init(512, 0, self.N_SEQUENCES),
            )
        return self.contexts[name]

    def decode(self, name: str, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call of llama_decode for rows (id, position, sequence, wants logits)."""
        context, _, batch = self.contexts[name]
        batch.n_tokens = len(rows)
        for i, (token, pos, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = pos
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if self.lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def step(self, name: str, token: int, pos: int) -> None:
        """One row of sequence 0 with logits: as decode, but with as little Python as possible."""
        context, _, batch = self.contexts[name]
        batch.n_tokens, batch.token[0], batch.pos[0], batch.logits[0] = 1, token, pos, True
        if self.lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.lib.llama_sampler_sample(self.sampler, context, -1)

    def prefill(self, name: str, ids: list[int], first: int = 0) -> None:
        """Ids from position first on, in batches of 512, with logits for the last."""
        for at in range(first, len(ids), 512):
            end = min(at + 512, len(ids))
            self.decode(name, [(ids[i], i, 0, i == len(ids) - 1) for i in range(at, end)])

    def sample(self, name: str, row: int = -1) -> int:
        """Draws an id from a row's logits."""
        return self.lib.llama_sampler_sample(self.sampler, self.contexts[name][0], row)

    def forget(self, name: str, first: int = 0) -> None:
        """Empties a context from a position on."""
        self.lib.llama_memory_seq_rm(self.context(name)[1], -1, first, -1)

    def start(self, ids: list[int], room: int = 1, in_: str = "main") -> dict:
        """See above."""
        self.forget(in_)
        begin = time.perf_counter()
        self.prefill(in_, ids)
        self.sample(in_)
        seconds = time.perf_counter() - begin
        self.sequence[in_] = list(ids)
        return {"s": seconds}

    def advance(self, n: int, in_: str = "main") -> dict:
        """See above."""
        ids = self.sequence[in_]
        begin = time.perf_counter()
        for i in range(n):
            self.step(in_, ids[i], len(ids))
            ids.append(ids[i])
        return {"s": time.perf_counter() - begin, "passes": n}

    def rewrite(self, ids: list[int], forced: list[int], samples: int = 1, prefix: int = 0) -> dict:
        """See above.

        prefix: how many ids at the start stay in the context from one rewrite to the next.
        """
        if samples > 1:
            return self.rewrite_samples(ids, forced, samples)
        where = "prefix kept" if prefix else "main"
        same = prefix if prefix and self.keep == ids[:prefix] else 0
        self.context(where)
        begin = time.perf_counter()
        self.forget(where, same)
        self.prefill(where, ids, same)
        self.sample(where)
        first = time.perf_counter() - begin
        for i, token in enumerate(forced[:-1]):
            self.step(where, token, len(ids) + i)
        seconds = time.perf_counter() - begin
        self.keep = ids[:prefix] if prefix else self.keep
        return {
            "s": seconds,
            "prefill_s": first,
            "passes": len(forced),
            "tokens": len(forced),
            "kept": same,
        }

    def rewrite_samples(self, ids: list[int], forced: list[int], samples: int) -> dict:
        """n sequences that share the prompt's KV and are decoded together."""
        begin = time.perf_counter()
        self.forget("samples")
        self.prefill("samples", ids)
        for s in range(samples):
            if s > 0:
                self.lib.llama_memory_seq_cp(self.contexts["samples"][1], 0, s, -1, -1)
            self.sample("samples")
        first = time.perf_counter() - begin
        for i, token in enumerate(forced[:-1]):
            self.decode("samples", [(token, len(ids) + i, s, True) for s in range(samples)])
            for s in range(samples):
                self.sample("samples", s)
        seconds = time.perf_counter() - begin
        return {
            "s": seconds,
            "prefill_s": first,
            "passes": len(forced),
            "tokens": samples * len(forced),
        }

    def rows(self, n: int) -> dict:
        """One pass of n rows of a sequence at position 64, with logits for all."""
        if not self.contexts.get("rows"):
            self.context("rows")
            self.prefill("rows", [5 + i for i in range(64)])
        self.forget("rows", 64)
        begin = time.perf_counter()
        self.decode("rows", [(5 + i, 64 + i, 0, True) for i in range(n)])
        return {"s": time.perf_counter() - begin}

    def memory(self) -> dict:
        """See above."""
        return memory()


# ------------------------------------------------------------------------------------- transformers


class Transformers:
    """transformers on the CPU as BPO's model card uses it: AutoModelForCausalLM and generate.

    Single passes call the model as generate does; the KV cache of a long sequence is filled with
    random numbers, because computing it would take minutes.
    """

    def __init__(self, dtype: str = "float32"):
        import torch
        import transformers

        # would otherwise be imported on demand, while something is measured
        from transformers.models.llama import modeling_llama  # noqa: F401

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.dtype = torch, transformers, getattr(torch, dtype)
        self.sequence = {}
        self.inference = torch.inference_mode()
        self.inference.__enter__()

    def open(self, model: str, threads: int) -> dict:
        """Loads the checkpoint's safetensors."""
        self.torch.set_num_threads(threads)
        begin = time.perf_counter()
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(model, dtype=self.dtype).eval()
        seconds = time.perf_counter() - begin
        settings = {
            "threads": threads,
            "dtype": str(self.dtype),
            "attention": self.model.config._attn_implementation,
        }
        settings["torch"] = self.torch.__version__
        return {"s": seconds, "version": self.transformers.__version__, "settings": settings}

    def warpers(self):
        """The card's sampling, as generate builds it."""
        t = self.transformers
        warpers = [t.TemperatureLogitsWarper(TEMPERATURE), t.TopKLogitsWarper(TOP_K)]
        return t.LogitsProcessorList([*warpers, t.TopPLogitsWarper(TOP_P)])

    def draw(self, logits) -> None:
        """Draws an id for each row of logits."""
        scores = self.warpers()(None, logits.to(copy=True, dtype=self.torch.float32))
        self.torch.multinomial(self.torch.nn.functional.softmax(scores, dim=-1), num_samples=1)

    def cache_of(self, n: int):
        """A KV cache with n positions of random numbers."""
        c = self.model.config
        cache = self.transformers.DynamicCache()
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        for layer in range(c.num_hidden_layers):
            shape = (1, c.num_key_value_heads, n, head_dim)
            key, value = (self.torch.randn(*shape).to(self.dtype) for _ in range(2))
            cache.update(key, value, layer)
        return cache

    def start(self, ids: list[int], room: int = 1, in_: str = "main") -> dict:
        """See above. In "long", all but the last 48 ids' KV is random."""
        cache = self.cache_of(len(ids) - 48) if in_ == "long" else self.transformers.DynamicCache()
        rest = self.torch.tensor([ids[-48:] if in_ == "long" else ids])
        begin = time.perf_counter()
        output = self.model(rest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.draw(output.logits[:, -1])
        seconds = time.perf_counter() - begin
        self.sequence[in_] = (cache, rest[:, -1:])
        return {"s": seconds}

    def advance(self, n: int, in_: str = "main") -> dict:
        """See above."""
        cache, token = self.sequence[in_]
        begin = time.perf_counter()
        for _ in range(n):
            out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.draw(out.logits[:, -1])
        return {"s": time.perf_counter() - begin, "passes": n}

    def rewrite(self, ids: list[int], forced: list[int], samples: int = 1, **_) -> dict:
        """generate; before the card's logits processors, another one leaves only the forced id."""
        torch, first, begin = self.torch, [], time.perf_counter()

        class Force(self.transformers.LogitsProcessor):
            def __call__(self, input_ids, scores):
                n = input_ids.shape[1] - len(ids)
                if n == 0:
                    first.append(time.perf_counter() - begin)
                only = torch.full_like(scores, -float("inf"))
                only[:, forced[n]] = 0
                return only

        tokens = torch.tensor([ids])
        begin = time.perf_counter()
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=TOP_P,
            max_new_tokens=len(forced),
            num_return_sequences=samples,
            eos_token_id=EOS,
            pad_token_id=0,
            logits_processor=self.transformers.LogitsProcessorList([Force()]),
        )
        seconds = time.perf_counter() - begin
        if out[0, len(ids) :].tolist() != forced:
            raise RuntimeError("transformers did not make the forced ids")
        return {
            "s": seconds,
            "prefill_s": first[0],
            "passes": len(forced),
            "tokens": samples * len(forced),
        }

    def rows(self, n: int) -> dict:
        """One pass of n rows of a sequence at position 64, with logits for all."""
        if "rows" not in self.sequence:
            self.sequence["rows"] = (self.cache_of(64), None)
        cache = self.sequence["rows"][0]
        tokens = self.torch.arange(5, 5 + n)[None]
        begin = time.perf_counter()
        self.model(tokens, past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - begin
        cache.crop(-n)
        return {"s": seconds}

    def memory(self) -> dict:
        """See above."""
        gc.collect()
        return memory()


# -------------------------------------------------------------------------------- the harness's end


class EngineError(Exception):
    """An engine that cannot do what it was asked to; the message says why."""


KINDS = {
    "bpo": None,
    "llama.cpp": ("LlamaCpp", {"flash": True}),
    "llama.cpp no-fa": ("LlamaCpp", {"flash": False}),
    "transformers fp32": ("Transformers", {"dtype": "float32"}),
    "transformers fp16": ("Transformers", {"dtype": "float16"}),
    "transformers bf16": ("Transformers", {"dtype": "bfloat16"}),
}


def environment() -> dict[str, str]:
    """The environment variables of the engines other than bpo.

    Settings that hold an OpenBLAS to an old CPU's kernels are bpo's alone, and threads that wait go
    to sleep soon, so that an engine that has nothing to do takes nothing from the one that is
    measured.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "BPO_SIMD")
    }
    return env | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class Engine:
    """An engine's process. Methods are sent to it by name; seconds are measured there."""

    def __init__(
        self,
        kind: str,
        python: str = sys.executable,
        worker: Path = ROOT / "build" / "bench" / "bpo_worker",
    ):
        self.kind = kind
        command = [str(worker)] if KINDS[kind] is None else [python, str(BENCH / "worker.py"), kind]
        env = os.environ if KINDS[kind] is None else environment()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        if KINDS[kind] is not None:
            self.read()  # it is ready, or says why it is not

    def read(self) -> dict:
        """The next answer; raises EngineError."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise EngineError(f"{self.kind}: its process ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.kind}: {answer['error']}")
        return answer

    def __call__(self, do: str, **arguments) -> dict:
        """Sends a command and waits for its answer."""
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()
        return self.read()

    def busy_share(self, seconds: float = 0.3) -> float:
        """How much of a core the process takes while it has nothing to do."""

        def ticks() -> int:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        time.sleep(seconds)
        return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()
