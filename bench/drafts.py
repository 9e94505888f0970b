"""Measures how many forward passes drafts save, on real pairs of prompt and rewrite.

The pairs are teacher-forced, so no model is needed. Needs BPO's test pairs and Llama-2's tokenizer
in a folder `shared` beside the checkout ($BPO_SHARED), and the sentencepiece package. Prints a
table: ids per pass, drafted rows per pass, and what an id costs in passes of one row, where a pass
of r rows costs what it does with a large model (its weights stream from memory) and with a small
one (they are in the caches).

    .venv/bin/python bench/drafts.py
"""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import sentencepiece

SHARED = Path(
    os.environ.get("BPO_SHARED", Path(__file__).resolve().parent.parent.parent / "shared")
)
TEMPLATE = (
    "[INST] You are an expert prompt engineer. Please help me improve this prompt "
    "to get a more helpful and harmless response:\n{} [/INST]"
)
BOS, EOS = 1, 2
KNOTS = (1, 2, 4, 8, 16, 32)
# The rest as in engine/lookup.c: the costs of passes of KNOTS rows,
LARGE, SMALL = (1, 1.04, 1.14, 1.2, 1.95, 3.7), (1, 1.1, 1.3, 2.1, 3.6, 7)
# and how often an id from a source is right, by the length of the match.
CHANCES = {
    "prompt": (0, 0.38, 0.68, 0.75, 0.79, 0.86, 0.88),
    "answer": (0, 0.16, 0.37, 0.40, 0.50, 0.50, 0.55),
    "earlier": (0, 0.11, 0.21, 0.25, 0.30, 0.50, 0.50),
}
LONGEST, HISTORY, BELIEF, CAUTION, MIN_CHANCE = 6, 4096, 4, 1.25, 0.02


def cost(rows: int, costs: tuple) -> float:
    """What a pass of this many rows costs, in passes of one row."""
    for i in range(len(KNOTS) - 1):
        if rows <= KNOTS[i + 1]:
            below, above = KNOTS[i], KNOTS[i + 1]
            rise = costs[i + 1] - costs[i]
            return costs[i] + rise * (rows - below) / (above - below)
    raise ValueError(rows)


class NGram:
    """The usual way: n-grams, with always the same number of drafted ids, `limit`.

    Looks up the last n ids, n from 4 down to 1, where they first occur in the prompt (then in the
    answer).
    """

    def __init__(self, limit: int, templated: bool = False, answer: bool = True):
        self.limit, self.templated, self.answer = limit, templated, answer

    def begin(self, bare: list, templated: list) -> None:
        self.texts = [templated if self.templated else bare]

    def draft(self, out: list) -> list:
        for n in range(min(4, len(out)), 0, -1):
            for text in [*self.texts, *([out[:-1]] if self.answer else [])]:
                for i in range(len(text) - n):
                    if text[i : i + n] == out[-n:]:
                        return text[i + n : i + n + self.limit]
        return []

    def learn(self, right: int) -> None:
        """Nothing is learned."""

    def end(self, out: list) -> None:
        """Nothing is kept."""


class Lookup:
    """The way of engine/lookup.c: as many ids as will pay off, each from its likeliest source.

    Which source is the likeliest follows from what was right before.
    """

    def __init__(
        self,
        costs: tuple,
        limit: int = 15,
        eos: bool = False,
        earlier: bool = False,
        fixed: bool = False,
        fresh: bool = False,
    ):
        self.costs, self.limit, self.eos = costs, limit, eos
        self.earlier, self.fixed, self.fresh = earlier, fixed, fresh
        self.history = []
        self.forget()

    def forget(self) -> None:
        """Back to where learning begins."""
        self.tried = defaultdict(lambda: BELIEF)
        self.kept = {
            (source, n): BELIEF * chance
            for source, chances in CHANCES.items()
            for n, chance in enumerate(chances)
        }

    def begin(self, bare: list, templated: list) -> None:
        del templated
        self.prompt = [*bare, EOS] if self.eos else bare
        if self.fresh:
            self.forget()

    @staticmethod
    def match(text: list, context: list, last: bool) -> tuple[int, int]:
        """The length of the longest run of the last ids that occurs in text, and what follows it.

        Of runs of the same length it is the first, or the last.
        """
        best, following = 0, -1
        for i in range(1, len(text)):
            if text[i - 1] == context[-1] and text[i] >= 0:
                n = 1
                while n < min(LONGEST, len(context), i) and text[i - 1 - n] == context[-1 - n]:
                    n += 1
                if n > best or (last and n == best):
                    best, following = n, text[i]
        return best, following

    def draft(self, out: list) -> list:
        context, self.buckets, chance, expected, paying = list(out), [], 1.0, 1.0, True
        ids, n_rows = [], 0
        while len(ids) < self.limit and (self.fixed or chance >= MIN_CHANCE):
            found = []
            sources = (("prompt", self.prompt), ("answer", out), ("earlier", self.history))
            for source, text in sources:
                n, following = self.match(text, context, source != "prompt")
                if n > 0:
                    bucket = source, n
                    found.append((self.kept[bucket] / self.tried[bucket], bucket, following))
            if not found:
                break
            right, bucket, following = max(found, key=lambda candidate: candidate[0])
            chance *= right
            now, more = cost(n_rows + 1, self.costs), cost(n_rows + 2, self.costs)
            paying = paying and (self.fixed or chance * now >= CAUTION * expected * (more - now))
            n_rows += paying
            expected += chance
            self.buckets.append((bucket, following))
            ids.append(following)
            context.append(following)
        return ids[:n_rows]

    def learn(self, drawn: list) -> None:
        """Learns from what was drawn, also about the ids of the last draft that got no row."""
        for (bucket, guess), actual in zip(self.buckets, drawn, strict=False):
            self.tried[bucket] += 1
            self.kept[bucket] += guess == actual
            if guess != actual:
                break

    def end(self, out: list) -> None:
        if self.earlier:
            self.history = [*self.history, *out, -1][-HISTORY:]


def replay(pairs: list, drafter, costs: tuple) -> tuple[float, float, float]:
    """Ids per pass, drafted rows per pass, cost of an id.

    The first id of an answer comes with its prompt, and does not count.
    """
    n_passes = n_ids = n_rows = 0
    total = 0.0
    for bare, templated, answer in pairs:
        drafter.begin(bare, templated)
        at = 1
        while at < len(answer):
            drafted, right = drafter.draft(answer[:at]), 0
            drafted = drafted[: len(answer) - at]
            while (
                right < len(drafted)
                and at + right < len(answer) - 1
                and drafted[right] == answer[at + right]
            ):
                right += 1
            drafter.learn(answer[at : at + right + 1])
            n_passes, n_ids, n_rows = n_passes + 1, n_ids + right + 1, n_rows + len(drafted)
            total += cost(1 + len(drafted), costs)
            at += right + 1
        drafter.end(answer)
    return n_ids / n_passes, n_rows / n_passes, total / n_ids


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, default=SHARED / "prompts" / "bpo_test.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "llama2" / "tokenizer.model")
    args = parser.parse_args()
    encode = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer)).Encode
    pairs = []
    for line in args.pairs.read_text("utf-8").splitlines():
        pair = json.loads(line)
        prompt, answer = pair["prompt"].strip(), pair["optimized_prompt"].strip()
        pairs.append(
            (encode(prompt), [BOS, *encode(TEMPLATE.format(prompt))], [*encode(answer), EOS])
        )
    rows = [
        (
            "n-grams of 4 to 1, templated prompt",
            lambda _, limit=limit: NGram(limit, True, False),
            limit,
        )
        for limit in (3, 4, 8)
    ]
    rows += [
        ("the same, bare prompt", lambda _, limit=limit: NGram(limit, answer=False), limit)
        for limit in (3, 4, 8)
    ]
    rows += [
        ("... and the answer so far", lambda _, limit=limit: NGram(limit), limit)
        for limit in (3, 4, 8)
    ]
    rows += [
        ("longest match, always all", lambda c, limit=limit: Lookup(c, limit, fixed=True), limit)
        for limit in (4, 8)
    ]
    rows += [
        (
            "... with EOS after the prompt",
            lambda c, limit=limit: Lookup(c, limit, eos=True, fixed=True),
            limit,
        )
        for limit in (4, 8)
    ]
    rows += [
        (
            "longest match, as many as pay off, a process for each prompt",
            lambda c: Lookup(c, fresh=True),
            15,
        )
    ]
    rows += [("... one process", Lookup, 15)]
    rows += [("... and earlier rewrites too", lambda c: Lookup(c, earlier=True), 15)]
    print(f"{len(pairs)} pairs, {sum(len(answer) for *_, answer in pairs)} ids\n")
    print(
        "| draft | limit | large: ids per pass | drafted | cost of an id "
        "| small: ids per pass | drafted | cost of an id |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, make, limit in rows:
        cells = [
            f"{number:.2f}"
            for costs in (LARGE, SMALL)
            for number in replay(pairs, make(costs), costs)
        ]
        print(f"| {name} | {limit} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
