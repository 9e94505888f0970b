#!/usr/bin/env python3
"""Write (prompt, better prompt) pairs for the demo model, as JSON Lines, from patterns.py.

    python demo/make_pairs.py --out demo/build/pairs.jsonl
        training pairs: {"prompt", "answer"}
    python demo/make_pairs.py --heldout demo/heldout.jsonl
        300 test prompts: {"id", "prompt", "keep", ...}

Every word of the lists, and every word of the system's dictionary, belongs either to training or to
the held-out prompts (a hash of the word decides), so the topics of the held-out prompts were never
seen; half of these prompts also come from patterns that were never seen. The same seed gives the
same file.
"""

import argparse
import json
import random
import re
import string
import zlib
from pathlib import Path

import words
from patterns import FILLERS, PATTERNS

DICTIONARY = Path("/usr/share/dict/american-english")
SLOT = re.compile(r"\{(\w+)\}")
SYLLABLES = """
ba be bo bra bri cal cor da del dor el en fa fen fir ga gal gor ha hol in ka kel kri la len lo lu ma
mel mi mor na nel ni no or pa pel po qua ra ren ri ro sa sel shi sta su ta tel ti tor tu ul va ven
vi wa wil xa yor za zel zi
""".split()
ENDINGS = "a an en er ia ic in is ium o on or os um us y th ck".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
STOP_WORDS = set(
    "a an and the of to in on at for with by from about my me i you your it its this that these "
    "those is are was were be do does did what why how who when where which can could should would "
    "will have has had not or as if than then so no us our we he she they them his her their there "
    "here just some any am im into out up over one please give make write tell take create list "
    "suggest explain describe find show people pretend imagine act".split()
)

RANGES = {"year": (1400, 2031), "day": (1, 29), "few": (2, 13), "many": (50, 1001, 50)}

COMMAND_ENDS = [
    ". Be clear and specific, and give examples where they help.",
    ". Give enough detail to make the answer useful, and keep a clear structure.",
    ", with clear explanations and relevant details.",
    ". Keep the answer clear, accurate and well organised.",
    ", and explain the reasons behind each choice.",
    ". Provide a clear and complete answer with concrete details.",
]
QUESTION_ENDS = [
    " Please give a clear and detailed answer, with examples.",
    " Please explain the answer step by step, and give some background.",
    " Please give accurate information, and say so if you are not sure.",
    " Explain the main reasons clearly, and give an example.",
    " Please give a short answer first, and then explain it in more detail.",
]
TEXT_ENDS = [
    " Be clear and specific, and explain the reasons for your answer.",
    " Refer to the details given below, and keep the answer well organised.",
    " Base the answer on the following text, and keep names and numbers as they are.",
]


def is_heldout(word):
    """Whether a word belongs to the held-out prompts: one in eight does, for good."""
    return zlib.crc32(word.lower().encode()) % 8 == 0


def with_article(noun):
    """'an apple', 'a pear'."""
    vowel = noun[0].lower() in "aeio" or noun.startswith(("um", "ur", "unu"))
    return f"an {noun}" if vowel else f"a {noun}"


def plural(noun):
    """The plural of a regular noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("fe") or noun.endswith("lf"):
        return noun[: -2 if noun.endswith("fe") else -1] + "ves"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def lower_first(text):
    """Small first letter, except for the word I."""
    return text if re.match(r"I\b|[A-Z]{2}", text) else text[:1].lower() + text[1:]


def upper_first(text):
    """Capital first letter."""
    return text[:1].upper() + text[1:]


def content_words(text):
    """The words and numbers of a text that a better prompt must not lose, each once."""
    found = re.findall(r"\d+(?:[.,]\d+)*(?![^\W_])|[^\W_]+(?:['_-][^\W_]+)*", text)
    kept = (w for w in found if w.lower() not in STOP_WORDS and (len(w) > 1 or w.isdigit()))
    return list(dict.fromkeys(kept))


def lower_case(prompt, answer):
    """A pair typed without capitals; the answer has them at the start of sentences and in "I"."""
    answer = re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), answer.lower())
    return prompt.lower(), re.sub(r"\bi\b", "I", answer)


class Writer:
    """Fills patterns at random, from the training words or from the held-out ones."""

    def __init__(self, seed, heldout=False):
        self.rng = random.Random(seed)
        self.heldout = heldout
        # training has more of what is hard to copy: codes and long numbers
        self.codes = 0.12 if heldout else 0.3
        self.small_numbers = 0.6 if heldout else 0.35
        dictionary = DICTIONARY.read_text().split() if DICTIONARY.exists() else words.NOUNS
        dictionary = [w for w in dictionary if "'" not in w and len(w) > 2]
        split = {
            "noun": words.NOUNS,
            "concept": words.CONCEPTS,
            "place": words.PLACES,
            "name": words.FIRST_NAMES,
            "surname": words.SURNAMES,
            "food": words.FOODS,
            "word": dictionary,
            "known": words.ACTIVITIES,
        }
        self.words = {name: self.mine(items) for name, items in split.items()}
        self.words |= {
            "adj": words.ADJECTIVES,
            "job": words.JOBS,
            "audience": words.AUDIENCES,
            "verb": words.VERBS,
            "language": words.LANGUAGES,
            "past": words.PAST_VERBS,
            "request": words.REQUEST_VERBS,
            "month": MONTHS,
        }

    def mine(self, items):
        """The items of this writer's side of the split."""
        return [w for w in items if is_heldout(w) == self.heldout]

    def pick(self, kind):
        """One word of a list."""
        return self.rng.choice(self.words[kind])

    def pseudo(self, codes=None):
        """A word that does not exist, made of syllables, or (a share of `codes`) a code.

        Codes are letters and digits; their share is self.codes where `codes` is None. Words have
        accents, rarely.
        """
        r = self.rng
        codes, kind = self.codes if codes is None else codes, r.random()
        if kind < codes:
            letters = "".join(r.choices(string.ascii_uppercase, k=r.randint(2, 3)))
            return letters + r.choice(["-", ""]) + str(r.randint(1, 999))
        word = "".join(r.choices(SYLLABLES, k=r.randint(1, 3))) + r.choice(ENDINGS)
        accents = max(0.2, codes + 0.08)
        if kind < accents:
            word = word.replace(r.choice("aeou"), r.choice("áéíóúäöüñçø"), 1)
        elif kind < accents + 0.07:
            word = "".join(r.choices(string.ascii_lowercase, k=r.randint(3, 9)))
        if is_heldout(word) != self.heldout:
            return self.pseudo(codes)
        return word if r.random() < 0.2 else word.capitalize()

    def number(self):
        """A number as people write it: mostly small."""
        r = self.rng
        kind = r.random()
        if kind < self.small_numbers:
            return str(r.randint(2, 20))
        if kind < 0.92:
            return str(r.randint(21, 999))
        decimal = f"{r.randint(1, 99)}.{r.randint(1, 99)}"
        comma = f"{r.randint(1, 99)},{r.randint(0, 999):03}"
        return r.choice([decimal, comma, str(r.randint(1000, 99999))])

    def person(self):
        """A name, sometimes made up, sometimes of one word."""
        first = self.pick("name") if self.rng.random() < 0.7 else self.pseudo(codes=0).capitalize()
        last = (
            self.pick("surname") if self.rng.random() < 0.7 else self.pseudo(codes=0).capitalize()
        )
        return f"{first} {last}" if self.rng.random() < 0.9 else last

    def topic(self):
        """Something to talk about."""
        kinds = "concept thing athing person place work food pseudo word words doing".split()
        kind = self.rng.choices(kinds, [26, 16, 7, 14, 9, 7, 3, 7, 8, 5, 5])[0]
        if kind == "words":
            return " ".join(self.pick("word") for _ in range(self.rng.randint(2, 3)))
        return self.fill(f"{{{kind}}}")

    def activity(self):
        """A verb with its object, such as 'repair a broken chair'."""
        if self.rng.random() < 0.3 and not self.heldout:
            return self.pick("known")
        verb = self.pick("verb")
        return f"{verb} {self.fill('{object}')}"

    def code(self):
        """A short piece of code, right or wrong."""
        noun, other, n = self.pick("noun"), self.pick("noun").replace("-", "_"), self.number()
        name = re.sub(r"\W", "_", self.pseudo().lower())
        return self.rng.choice([
            f"def {name}({noun}):\n    return {noun} + {n}",
            f"for {noun} in {plural(noun)}:\n    print({name}[{noun}])",
            f"int {name}(int {noun}) {{\n  return {noun} / {n};\n}}",
            f"function {name}({noun}, {other}) {{\n  return {noun} - {other};\n}}",
            f"{noun} = [{n}, {self.number()}, {self.number()}]\nprint(sum({noun}) / len({other}))",
            f"SELECT {noun}, {other} FROM {name} WHERE {noun} > {n};",
            f"while {noun} < {n}:\n    {noun} += 1\n    {name}({noun})",
            f'if {noun} == "{other}":\n    {name} = {n}',
        ])  # fmt: skip

    def items(self):
        """A list of things, with commas or one a line."""
        kind = self.rng.choice(["noun", "place", "food", "word", "person", "adj", "n", "pseudo"])
        things = [self.fill(f"{{{kind}}}") for _ in range(self.rng.randint(2, 7))]
        if self.rng.random() < 0.3:
            return "\n".join(self.rng.choice(["", "- "])[:2] + t for t in things)
        return ", ".join(things)

    def text(self):
        """One to five sentences, rarely in quotation marks, or a noisy line."""
        r = self.rng
        if r.random() < 0.12:
            return self.noise(r.randint(4, 24))
        n = r.choices([1, 2, 3, 4, 5, 9], [50, 22, 14, 7, 5, 2])[0]
        sentences = [self.fill("{sentence}") for _ in range(n)]
        text = " ".join(upper_first(s) for s in sentences)
        return f'"{text}"' if r.random() < 0.12 else text

    def noise(self, n):
        """n words in no order, with some punctuation: copying and nothing else helps here."""
        r = self.rng
        slots = ["{word}", "{word}", "{word}", "{pseudo}", "{noun}", "{n}", "{name}", "{adj}"]
        marks = ["", ",", ".", ";", ":", "?", "!", " -", " /"]
        quotes = ['"%s"', "(%s)", "'%s'", "*%s*"]
        parts = [self.fill(r.choice(slots)) for _ in range(n)]
        parts = [p + r.choices(marks, [82, 7, 4, 1, 1, 1, 1, 2, 1])[0] for p in parts]
        parts = [r.choice(quotes) % p if r.random() < 0.04 else p for p in parts]
        if r.random() < 0.05:
            signs = "é ü ñ – — … € £ ° × → • “ ” ’ 😀 中 д λ".split()
            parts.insert(r.randrange(n), r.choice(signs))
        return " ".join(parts)

    def value(self, slot):
        """What fills one slot."""
        made = {
            "topic": self.topic,
            "topic2": self.topic,
            "activity": self.activity,
            "pseudo": self.pseudo,
            "person": self.person,
            "person2": self.person,
            "n": self.number,
            "n2": self.number,
            "number": self.number,
            "code": self.code,
            "items": self.items,
            "text": self.text,
        }
        if slot in made:
            return made[slot]()
        if slot in FILLERS:
            return self.fill(self.rng.choice(FILLERS[slot]))
        aliases = {"place2": "place", "name2": "name", "food2": "food", "b": "a", "ajob": "a_job"}
        if slot in aliases:
            return self.value(aliases[slot])
        if slot == "onetopic":
            topics = (self.topic() for _ in range(99))
            return next(t for t in topics if not t.endswith("s"))
        if slot in ("quote", "quoted"):
            return f'"{self.fill("{sentence}" if slot == "quote" else "{word}")}"'
        if slot in RANGES:
            return str(self.rng.randrange(*RANGES[slot]))
        if slot in ("plural", "Plural"):
            return (str.capitalize if slot[0] == "P" else str)(plural(self.pick("noun")))
        if slot.startswith("a_"):
            return with_article(self.pick(slot[2:]))
        if slot in ("Adj", "Noun"):
            return self.pick(slot.lower()).capitalize()
        return self.pick(slot)

    def fill(self, template, values=None):
        """Fill a template's slots; `values` remembers them, so that prompt and answer agree."""

        def one(match):
            slot = match[1]
            if values is None:
                return self.value(slot)
            if slot not in values:
                base = slot.removesuffix("_low")
                if base == slot:
                    values[slot] = self.value(slot)
                else:
                    values[slot] = lower_first(one(re.match(r"(.*)", base)))
            return values[slot]

        return SLOT.sub(one, template)

    def pattern_pair(self, pattern):
        """One (prompt, answer, content words) of a pattern; a held-out pattern has no answer."""
        r = self.rng
        prompt, values = r.choice(pattern.prompts), {}
        if "{why" in prompt:
            values["why"], values["why_plain"] = self.reason()
        if "{c}" in prompt:
            limited = pattern.limits and r.random() < 0.4
            values["c"] = self.fill(r.choice(pattern.limits)) if limited else ""
        if r.random() < 0.25:
            prompt = prompt.replace("{short} ", "")
        prompt = self.fill(prompt, values)
        keep = content_words(" ".join(values.values()))
        if pattern.heldout:
            return prompt, None, keep
        head = r.choice(pattern.heads)
        if "short" not in values:
            head = head.replace("{short} ", "")
        style = " " + values.get("style", "")
        values = {"c": "", "text": values.get("quote"), "style_c": style} | values
        values["style_c"] = values["style_c"].rstrip()
        assert set(SLOT.findall(head)) <= set(values), (pattern.name, head)
        return prompt, self.join(self.fill(head, values), pattern), keep

    def join(self, head, pattern):
        """Head, extra and tail as one text."""
        r = self.rng
        if not pattern.extras:
            return upper_first(head)
        extra = r.choice(pattern.extras)
        if head.endswith((".", "?", "!")) and extra[0] == " ":
            extra = " " + upper_first(extra[1:])
        tail = " " + r.choice(pattern.tails) if pattern.tails and r.random() < 0.25 else ""
        return upper_first(head) + extra + tail

    def reason(self):
        """A why-question and the same as a statement."""
        r = self.rng
        people, place, topic = self.person(), self.pick("place"), self.topic()
        things, others = self.fill("{plural}"), self.fill("{plural}")
        adj, verb = self.pick("adj"), self.pick("verb")
        return r.choice([
            (f"are {things} so {adj}", f"{things} are so {adj}"),
            (f"do {things} {verb} {others}", f"{things} {verb} {others}"),
            (f"is {topic} important in {place}", f"{topic} is important in {place}"),
            (f"is {people} so famous", f"{people} is so famous"),
            (f"are there so many {things} in {place}", f"there are so many {things} in {place}"),
            (f"do people like {topic}", f"people like {topic}"),
            (f"is my {things[:-1]} {adj}", f"my {things[:-1]} is {adj}"),
            (f"should I care about {topic}", f"I should care about {topic}"),
            (f"does {place} have so few {things}", f"{place} has so few {things}"),
        ])  # fmt: skip

    def free_pair(self):
        """A prompt of no known pattern: copy it, and add what is always right."""
        r = self.rng
        kind = r.random()
        if kind < 0.30:
            prompt = self.fill("{command}")
            answer = prompt + r.choice(COMMAND_ENDS)
            prompt += r.choice([".", ""])
        elif kind < 0.56:
            prompt = self.fill("{question}") + "?"
            answer = prompt + r.choice(QUESTION_ENDS)
            prompt = prompt if r.random() < 0.7 else prompt[:-1]
        elif kind < 0.70:
            command = self.fill(r.choice(["{command}", "{command}", "{question}?"]))
            text = self.text()
            command += "" if command[-1] == "?" else "."
            prompt, answer = f"{command}\n{text}", f"{command}{r.choice(TEXT_ENDS)}\n{text}"
        elif kind < 0.82:
            facts = ["{statement}. ", "{statement}. {sentence} ", "{sentence} {sentence} "]
            told = self.fill(r.choice(facts))
            prompt = told + self.fill(r.choice(["{question}?", "{fact}?", "{yesno}?"]))
            answer = prompt + r.choice(QUESTION_ENDS)
        elif kind < 0.92:
            prompt = self.noise(r.randint(1, 14))
            answer = prompt.rstrip(".,?!;: ")
            answer += ". Please explain what is meant, and give relevant details."
        else:
            text, command = r.choice([self.text, self.items, self.code])(), self.fill("{command}.")
            prompt, answer = f"{text}\n{command}", f"{text}\n{command}{TEXT_ENDS[0]}"
        return prompt, answer

    def typed(self, prompt):
        """The prompt as a person in a hurry types it."""
        r = self.rng
        if r.random() < 0.06:
            greetings = ["Please ", "please ", "Hi, ", "hey, ", "Hello! ", "can you please "]
            prompt = r.choice(greetings) + lower_first(prompt)
        if r.random() < 0.25:
            prompt = lower_first(prompt)
        if r.random() < 0.25 and prompt[-1] in ".?" and "\n" not in prompt:
            prompt = prompt[:-1]
        if r.random() < 0.04 and "\n" not in prompt:
            prompt = prompt.rstrip(".") + r.choice([" please", ", thanks", "!!", " ?", "..."])
        return prompt

    def pair(self):
        """One training pair of any kind: {"prompt", "answer"}."""
        r = self.rng
        kind = r.random()
        if kind < 0.70:
            trained = [p for p in PATTERNS if not p.heldout]
            pattern = r.choices(trained, [p.weight for p in trained])[0]
            prompt, answer, _ = self.pattern_pair(pattern)
        else:
            prompt, answer = self.free_pair()
        if r.random() < 0.12:
            return {"prompt": answer, "answer": answer}  # good already: it stays as it is
        if "\n" not in prompt and r.random() < 0.12:
            prompt, answer = lower_case(prompt, answer)
        return {"prompt": self.typed(prompt), "answer": answer}


def heldout_prompts(n, seed):
    """n test prompts about held-out topics, every second one of a held-out pattern."""
    writer, prompts = Writer(seed, heldout=True), []
    kinds = [[p for p in PATTERNS if p.heldout == flag] for flag in (False, True)]
    for i in range(n):
        pattern = writer.rng.choice(kinds[i % 2])
        prompt, _, keep = writer.pattern_pair(pattern)
        if "\n" not in prompt and writer.rng.random() < 0.12:
            prompt = prompt.lower()
        row = {"id": f"heldout-{i:03}", "prompt": writer.typed(prompt), "keep": keep}
        prompts.append(row | {"pattern": pattern.name, "heldout_pattern": pattern.heldout})
    return prompts


def write_jsonl(path, rows):
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="training pairs go here")
    parser.add_argument("--pairs", type=int, default=250_000, help="how many training pairs")
    parser.add_argument("--heldout", type=Path, help="300 held-out prompts go here")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out:
        writer = Writer(args.seed)
        write_jsonl(args.out, (writer.pair() for _ in range(args.pairs)))
    if args.heldout:
        write_jsonl(args.heldout, heldout_prompts(300, args.seed + 1))


if __name__ == "__main__":
    main()
