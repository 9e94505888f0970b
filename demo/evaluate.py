#!/usr/bin/env python3
"""Measure the demo model and print the report that is kept as demo/evaluation.txt.

1. 300 held-out prompts through ./bpo in stable mode: how many rewrites are not degenerate, keep
   every content word of the prompt, and differ from it;
2. the first 20 of these rewrites, selected by nobody;
3. greedy text of 100 held-out prompts, compared with transformers' token by token;
4. with --prompts, prompts that real people wrote: the same figures, and what goes wrong with them.

    python demo/evaluate.py --prompts ../shared/prompts/bpo_test.jsonl > demo/evaluation.txt

With --reference, transformers does the sampling too (with the same settings), to judge a checkpoint
before it is exported. Its random numbers are its own, so its texts differ from those of ./bpo.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import sentencepiece
import torch
from make_pairs import content_words
from train import BOS, EOS, TEMPLATE, rounded
from transformers import LlamaForCausalLM

DEMO = Path(__file__).resolve().parent
CONTROL = re.compile(r"</?s>|<unk>|<0x|\[/?INST|<</?SYS|\ufffd")
TIE = 2e-2  # two logits closer than this many standard deviations may change places


class Bpo:
    """The program under test: one process for each prompt."""

    def __init__(self, program, model):
        self.command = [program, "--json", "-q", "-m", str(model), "--mode", "stable"]

    def rewrite(self, prompt, seed=None):
        """The JSON object of one rewrite; greedy without a seed."""
        how = ["--greedy"] if seed is None else ["--seed", str(seed)]
        done = subprocess.run(
            [*self.command, *how, "-p", prompt], capture_output=True, check=True, text=True
        )
        return json.loads(done.stdout)


class Reference:
    """transformers in fp32 on fp16-rounded weights, fed with SentencePiece's ids."""

    def __init__(self, folder):
        self.model = rounded(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def encode(self, prompt):
        """Ids of the templated prompt."""
        return [BOS, *self.sp.encode(TEMPLATE.format(prompt=prompt))]

    @torch.no_grad()
    def rewrite(self, prompt, seed=None):
        """The same members as in a JSON object of ./bpo."""
        ids = torch.tensor([self.encode(prompt)])
        torch.manual_seed(seed or 0)
        sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9}
        if seed is None:
            sampling = {"do_sample": False}
        room = self.model.config.max_position_embeddings - ids.shape[1]
        new = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            eos_token_id=EOS,
            pad_token_id=EOS,
            **sampling,
        )[0, ids.shape[1] :].tolist()
        stop = "eos" if new[-1] == EOS else "context"
        return {
            "text": self.sp.decode(new).split("[/INST]")[0].strip(),
            "tokens": new,
            "stop": stop,
            "prompt_tokens": ids.shape[1],
        }

    @torch.no_grad()
    def logits(self, ids):
        """Logits of the token after ids."""
        return self.model(torch.tensor([ids])).logits[0, -1]


# ---------------------------------------------------------------- what is measured


def fault(prompt, result):
    """Why a rewrite is degenerate, or None."""
    text = result["text"]
    if result["stop"] != "eos":
        return f"stopped by {result['stop']}"
    if not text:
        return "empty"
    if set(CONTROL.findall(text)) - set(CONTROL.findall(prompt)):
        return "control text"
    if (
        re.search(r"(?s)(\S.{0,80}?\S)(?:\s*\1){3}", text)
        and text not in prompt
        and not re.search(r"(?s)(\S.{0,80}?\S)(?:\s*\1){3}", prompt)
    ):
        return "loop"
    words, given = text.lower().split(), prompt.lower().split()
    phrases, in_prompt = (
        Counter(zip(w, w[1:], w[2:], w[3:], strict=False)) for w in (words, given)
    )
    if any(n > 2 and n > in_prompt[phrase] + 1 for phrase, n in phrases.items()):
        return "loop"
    return None


def lost_words(keep, text):
    """The words of `keep` that a text doesn't have as whole words, in small or capital letters."""
    text = text.lower()
    return [
        word for word in keep if not re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text)
    ]


def plain(text):
    """A text without what hardly counts as a change: case, punctuation and space."""
    return re.findall(r"\w+", text.lower())


def measure(rows, writer, seed):
    """Rewrite each row's prompt and judge the result."""
    judged = []
    for row in rows:
        result = writer.rewrite(row["prompt"], seed)
        text = result["text"]
        judged.append(
            row
            | {
                "text": text,
                "fault": fault(row["prompt"], result),
                "lost": lost_words(row["keep"], text),
                "changed": text != row["prompt"],
                "reworded": plain(text) != plain(row["prompt"]),
            }
        )
    return judged


def share(title, flags):
    """One line of a table."""
    flags = list(flags)
    print(
        f"  {title:<58} {sum(flags):4} of {len(flags):3}   {100 * sum(flags) / len(flags):5.1f} %"
    )


def figures(judged):
    """The three figures of the demo model, and some detail."""
    title = "not degenerate (ends by EOS, no loop, no control text)"
    share(title, (r["fault"] is None for r in judged))
    share("every content word of the prompt kept", (not r["lost"] for r in judged))
    share("changed", (r["changed"] for r in judged))
    share("changed in more than case, punctuation and space", (r["reworded"] for r in judged))
    kept = (word not in r["lost"] for r in judged for word in r["keep"])
    share("all content words, one by one", kept)


def indented(title, text):
    """A text of one or more lines beside its title."""
    return f"  {title:<10}" + text.replace("\n", "\n" + " " * 12)


def compare_greedy(rows, writer, reference):
    """Compares the token ids of greedy text, ours and transformers'; returns whether all is well.

    A first difference must be a tie in transformers' own logits.
    """
    same = ties = 0
    for row in rows:
        ours, theirs = writer.rewrite(row["prompt"]), reference.rewrite(row["prompt"])
        if ours["tokens"] == theirs["tokens"] and ours["prompt_tokens"] == theirs["prompt_tokens"]:
            same += 1
            continue
        pairs = enumerate(zip(ours["tokens"], theirs["tokens"], strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        gap = float("inf")
        if at is not None and ours["prompt_tokens"] == theirs["prompt_tokens"]:
            logits = reference.logits(reference.encode(row["prompt"]) + theirs["tokens"][:at])
            gap = ((logits.max() - logits[ours["tokens"][at]]) / logits.std()).item()
        ties += gap < TIE
        print(
            f"  {row['id']}: differs at new token {at}; "
            f"the logits there are {gap:.1e} standard deviations apart"
        )
    good, n = same + ties, len(rows)
    share("greedy token ids the same as transformers'", [True] * same + [False] * (n - same))
    title = f"... or different from a tie on (closer than {TIE:g})"
    share(title, [True] * good + [False] * (n - good))
    return good == n


# ---------------------------------------------------------------- the report


def heading(text):
    """A line between the parts of the report."""
    print(f"\n{text}\n{'-' * len(text)}\n")


def report_heldout(rows, writer, seed):
    """Parts 1 and 2."""
    judged = measure(rows, writer, seed)
    heading(f"1. {len(rows)} held-out prompts, stable mode, seed {seed}")
    figures(judged)
    for flag, which in ((False, "known"), (True, "unseen")):
        print(f"\n  of these, {which} patterns about unseen topics:\n")
        figures([r for r in judged if r["heldout_pattern"] == flag])
    print("\n  All that went wrong:\n")
    for r in judged:
        if r["fault"] or r["lost"]:
            print(f"  {r['id']}  {r['fault'] or 'lost: ' + ', '.join(r['lost'])}")
    heading("2. The first 20 of them, selected by nobody")
    for r in judged[:20]:
        print(indented("prompt", r["prompt"]))
        print(indented("rewritten", r["text"]) + "\n")


def report_real(path, n, writer, seed):
    """Part 4; of other people's prompts only figures are printed, and three short examples."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")][:n]
    rows = [
        {"id": r["id"], "prompt": r["prompt"], "keep": content_words(r["prompt"])} for r in rows
    ]
    judged = measure(rows, writer, seed)
    heading(
        f"4. The first {len(rows)} prompts of {path.name}, written by people, "
        f"stable mode, seed {seed}"
    )
    print(
        "  The demo model has never seen prompts like these. "
        "Every word of the prompt counts here, not only topics.\n"
    )
    figures(judged)
    faults = Counter(r["fault"] for r in judged if r["fault"])
    lost = Counter(len(r["lost"]) for r in judged)
    print("\n  Degenerate:", ", ".join(f"{k}: {v}" for k, v in faults.items()) or "none")
    print(
        "  Prompts by number of lost words:",
        ", ".join(f"{k}: {v}" for k, v in sorted(lost.items())),
    )
    print("\n  The three shortest prompts:\n")
    for r in sorted(judged, key=lambda r: len(r["prompt"]))[:3]:
        print(indented("prompt", r["prompt"]))
        print(indented("rewritten", r["text"]) + "\n")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bpo", default=str(DEMO.parent / "bpo"), help="the program under test")
    parser.add_argument("--model", type=Path, default=DEMO / "bpo-demo.bin")
    parser.add_argument(
        "--hf",
        type=Path,
        default=DEMO / "build" / "hf",
        help="the checkpoint that the model file was made of",
    )
    parser.add_argument("--heldout", type=Path, default=DEMO / "heldout.jsonl")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with prompts of other people")
    parser.add_argument("--first", type=int, default=50, help="how many of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--greedy",
        type=int,
        default=100,
        help="prompts whose greedy text is compared with transformers'",
    )
    parser.add_argument("--reference", action="store_true", help="let transformers do the sampling")
    args = parser.parse_args()
    torch.set_num_threads(2)

    rows = [json.loads(line) for line in args.heldout.open(encoding="utf-8")]
    reference = Reference(args.hf) if args.reference or args.greedy else None
    writer = reference if args.reference else Bpo(args.bpo, args.model)
    n_parameters = ""
    if reference:
        n_parameters = f", {sum(p.numel() for p in reference.model.parameters()):,} parameters"
    n_bytes = f", {args.model.stat().st_size:,} bytes" if args.model.exists() else ""
    print(
        "bpo's bundled demo model: tiny, trained on made-up pairs; "
        "it shows that everything works, and is no BPO model of the paper."
    )
    print(f"\n  model      {args.model.name}{n_bytes}{n_parameters}")
    program = "transformers" if args.reference else "./bpo"
    print(f"  rewritten  by {program}; temperature 0.6, top-k 50, top-p 0.9")
    report_heldout(rows, writer, args.seed)
    ok = True
    if args.greedy and not args.reference:
        heading(
            f"3. Greedy text of the first {args.greedy} held-out prompts: "
            "./bpo and transformers (fp32 on fp16-rounded weights)"
        )
        ok = compare_greedy(rows[: args.greedy], writer, reference)
    if args.prompts:
        report_real(args.prompts, args.first, writer, args.seed)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
