#!/usr/bin/env python3
"""Train the demo model: a SentencePiece tokenizer and a small Llama.

The result is a Hugging Face checkpoint. Three steps, each of which can be read alone:

1. the tokenizer: byte-pair encoding set up the way Llama-2's was, with about 4,000 pieces;
2. the model: transformers' LlamaForCausalLM holds the weights, and `forward` below is a lean
   version of its forward pass for training on a CPU (the log ends with a check that both give the
   same logits);
3. the lessons: first copy random pieces (the skill that a prompt rewriter needs most, and the one
   that a small model finds last), then rewrite prompts.

    python demo/make_pairs.py --out demo/build/pairs.jsonl
    python demo/train.py --minutes 75
"""

import argparse
import json
import math
import random
import re
import shutil
import string
import time
from pathlib import Path

import make_pairs
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).resolve().parent
TEMPLATE = (
    "[INST] You are an expert prompt engineer. Please help me improve this prompt "
    "to get a more helpful and harmless response:\n{prompt} [/INST]"
)
BOS, EOS = 1, 2
VOCAB = 4096
EMBED_STD = 0.05
COPY_STEPS = 150  # the first lessons are only about copying
COPY_EVERY = 6  # later, one in so many
MAX_TRAINED = 384  # ids after the prefix; longer pairs are left out


# ---------------------------------------------------------------- the tokenizer


def train_tokenizer(pairs, path):
    """Train a BPE model like Llama-2's and write it to `path`.

    Like Llama-2's, it has the identity normaliser and byte fallback, and splits digits.
    """
    lines = [TEMPLATE.format(prompt="").replace("\n", " ")] * (len(pairs) // 10)
    for pair in pairs:
        lines += pair["prompt"].split("\n") + pair["answer"].split("\n")
    text = path.with_suffix(".txt")
    text.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCAB,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        required_chars="".join(map(chr, range(33, 127))),
        num_threads=2,
        minloglevel=1,
    )
    text.unlink()
    path.with_suffix(".vocab").unlink()


class Encoder:
    """Pairs to ids: a prefix that all examples share, then what belongs to this one."""

    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        a, b = ([BOS, *self.sp.encode(TEMPLATE.format(prompt=p))] for p in ("Aa", "zz"))
        shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        self.prefix = a[:shared]
        self.suffix = self.sp.encode(TEMPLATE.format(prompt=""))[len(self.prefix) - 1 :]

        signs = string.digits + string.ascii_letters
        self.signs = [i for i in range(259, VOCAB) if self.sp.id_to_piece(i) in signs]

    def encode(self, prompt, answer):
        """Return (ids after the prefix, how many of them are prompt).

        The prompt follows a newline, so its first word has no space before it. The answer is
        written in the same way: a word that begins both consists of the same pieces in both.
        """
        question = [BOS, *self.sp.encode(TEMPLATE.format(prompt=prompt))]
        assert question[: len(self.prefix)] == self.prefix
        question = question[len(self.prefix) :]
        return question + self.sp.encode("\n" + answer)[2:] + [EOS], len(question)


# ---------------------------------------------------------------- the model


def new_model(seed):
    """A Llama of about 4 million parameters with grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(0, 0.002)
            elif p.ndim == 2:
                p.normal_(0, EMBED_STD if "embed" in name else p.shape[1] ** -0.5)
        wire_copying(model)
    return model


def wire_copying(model):
    """Start with two heads per layer that copy.

    By chance they would form only after millions of tokens. Copying takes two steps (the induction
    heads of Olsson et al. 2022). A head of layer 0 looks one position back and notes, in a part of
    the residual stream kept free for it, which token stood there. A head of layer 1 or 2 searches
    for the position whose note is the present token, and adds the token it finds there to the
    output: what followed last time is likely to follow now. Training starts from this and changes
    it freely.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size
    size = width // heads
    embedding = model.model.embed_tokens.weight
    # columns of the residual stream: 0 is constant, then the notes, then the token
    note = 1 + torch.arange(kv_heads * size)
    free = 1 + len(note)
    embedding[:, :free] = 0
    embedding[:, 0] = 4 * EMBED_STD
    token = torch.zeros(width - free, width)  # orthonormal directions among the token's columns
    token[:, free:] = torch.linalg.qr(torch.randn(width - free, width - free))[0]
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    # hardly rotated by RoPE
    slow = torch.cat((torch.arange(size // 4, size // 2), torch.arange(3 * size // 4, size)))

    for layer in range(3):
        attention = model.model.layers[layer].self_attn
        q, k, v, o = (getattr(attention, f"{x}_proj").weight for x in "qkvo")
        for kv in range(kv_heads):
            key = torch.arange(size) + kv * size
            query = torch.arange(size) + kv * size * (heads // kv_heads)
            if layer == 0:  # the constant's query is its key, rotated by one position
                q[query] *= 0.1
                k[key] *= 0.1
                fast, strength = torch.arange(5), 1.7
                k[key[fast], 0] = strength
                q[query[fast], 0] = strength * frequency[fast].cos()
                q[query[fast + size // 2], 0] = -strength * frequency[fast].sin()
                v[key] = token[key]
                o[:, query] = 0
                o[note[key], query] = 1.5 * EMBED_STD
            else:
                part = (torch.arange(size // 2) + (layer - 1) * (size // 2)) + kv * size
                q[query] = 0
                k[key] *= 0.3
                q[query[slow]] = 3.3 * token[part]
                k[key[slow]] = 0
                k[key[slow], note[part]] = 3.3
                first = 2 * size + (2 * (layer - 1) + kv) * (size - 1)
                v[key[:-1]] = token[first : first + size - 1]
                o[:, query[:-1]] = 8 * EMBED_STD * token[first : first + size - 1].T


def rms_norm(x, weight):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def rotary_tables(n, size, theta=10000.0):
    """cos and sin of shape [n, 1, size] for positions 0..n-1.

    They follow Hugging Face's pairing: i with i + size/2.
    """
    frequency = theta ** (-torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(n), frequency).repeat(1, 2)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding of x [rows, heads, size]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(q, k, v, mask):
    """Grouped-query attention.

    q [B, T, H, hd], k and v [B, S, HK, hd], mask [T, S] -> [B * T, H * hd].
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


def forward(model, prefix, ids):
    """Final hidden states [B, T, D] of ids [B, T], each row of which follows the shared `prefix`.

    The prefix goes through the layers once, not B times, and its keys and values are shared by all
    rows: a third of the work saved. Padding is on the right, where the causal mask hides it.
    """
    config, p = model.config, dict(model.named_parameters())
    (batch, t), n = ids.shape, len(prefix)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    cos, sin = rotary_tables(n + t, size)
    cos, sin = (torch.cat((table[:n], table[n:].repeat(batch, 1, 1))) for table in (cos, sin))
    causal = torch.ones(n + t, n + t, dtype=torch.bool).tril()

    flat = torch.cat((torch.tensor(prefix), ids.flatten()))
    x = F.embedding(flat, p["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        w = {k: p[f"model.layers.{layer}.{k}.weight"] for k in LAYER_WEIGHTS}
        h = rms_norm(x, w["input_layernorm"])
        q = rotate(F.linear(h, w["self_attn.q_proj"]).view(-1, heads, size), cos, sin)
        k = rotate(F.linear(h, w["self_attn.k_proj"]).view(-1, kv_heads, size), cos, sin)
        v = F.linear(h, w["self_attn.v_proj"]).view(-1, kv_heads, size)
        first = attend(q[None, :n], k[None, :n], v[None, :n], causal[:n, :n])
        before = (s[None, :n].expand(batch, -1, -1, -1) for s in (k, v))
        after = (s[n:].view(batch, t, kv_heads, size) for s in (k, v))
        k, v = (torch.cat(parts, 1) for parts in zip(before, after, strict=True))
        rest = attend(q[n:].view(batch, t, heads, size), k, v, causal[n:])
        x = x + F.linear(torch.cat((first, rest)), w["self_attn.o_proj"])
        h = rms_norm(x, w["post_attention_layernorm"])
        h = F.silu(F.linear(h, w["mlp.gate_proj"])) * F.linear(h, w["mlp.up_proj"])
        x = x + F.linear(h, w["mlp.down_proj"])
    return rms_norm(x[n:], p["model.norm.weight"]).view(batch, t, -1)


LAYER_WEIGHTS = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()


# ---------------------------------------------------------------- lessons


class Lessons:
    """Endless batches of about `size` positions.

    A batch is ids [B, T], where each answer begins, and where it ends.
    """

    def __init__(self, pairs, encoder, size, seed):
        self.pairs, self.encoder, self.size = pairs, encoder, size
        self.rng = random.Random(seed)
        self.next_pair, self.ready = 0, []

    def copying(self):
        """Random pieces, to be repeated as they are: rare, frequent, or a few again and again.

        Where a piece occurs twice, the one before it does not say how to go on: here the model
        learns to look further back.
        """
        n = self.rng.randint(2, self.rng.choice((12, 24, 24, 160)))
        rows = []
        for i in range(max(4, self.size // (2 * n + 4))):
            pieces = [self.rng.randrange(3, VOCAB) for _ in range(n)]
            if i % 3 == 1:  # after the 256 bytes, the pieces stand in the order of their frequency
                pieces = [259 + int((VOCAB - 259) * self.rng.random() ** 3) for _ in range(n)]
            if i % 3 == 2:
                pool = pieces[: n // 3 + 2]
                pools = (pool, self.encoder.signs)
                pieces = [self.rng.choice(self.rng.choice(pools)) for _ in range(n)]
            suffix = self.encoder.suffix
            rows.append((pieces + suffix + pieces + [EOS], n + len(suffix)))
        return rows

    def rewriting(self):
        """The next pairs of the file; pairs of about the same length share a batch."""
        if not self.ready:
            pool = self.pairs[self.next_pair : self.next_pair + 2000]
            self.next_pair = (self.next_pair + 2000) % (len(self.pairs) - 2000)
            rows = [self.encoder.encode(p["prompt"], p["answer"]) for p in pool]
            rows = [row for row in rows if len(row[0]) <= MAX_TRAINED]
            rows.sort(key=lambda row: len(row[0]))
            batch = []
            for row in rows:
                if batch and (len(batch) + 1) * len(row[0]) > self.size:
                    self.ready.append(batch)
                    batch = []
                batch.append(row)
            self.ready.append(batch)
            self.rng.shuffle(self.ready)
        return self.ready.pop()


def to_tensors(rows):
    """Padded ids [B, T] and a mask [B, T] of the answers' tokens."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), EOS)
    answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (row, begin) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        answer[i, begin : len(row)] = True
    return ids, answer


def answer_logits(model, prefix, rows):
    """Logits [N, V] and right ids [N] of all the answers' tokens; none for the prompts' tokens."""
    ids, answer = to_tensors(rows)
    hidden = forward(model, prefix, ids[:, :-1])
    return F.linear(hidden[answer[:, 1:]], model.model.embed_tokens.weight), ids[answer]


# ---------------------------------------------------------------- held-out checks and checkpoints


def rounded(model):
    """A copy of the model with fp16-rounded weights: what will be exported."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    return copy.eval()


@torch.no_grad()
def check(model, encoder, pairs, prompts):
    """Figures on held-out topics.

    They are the loss, the share of right copied tokens (given the text before them), and the shares
    of greedy texts that keep all words and that end.
    """
    loss = right = copied = count = 0
    for pair in pairs:
        row = encoder.encode(pair["prompt"], pair["answer"])
        logits, target = answer_logits(model, encoder.prefix, [row])
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
        from_prompt = torch.isin(target, torch.tensor(row[0][: row[1]]))
        right += (logits.argmax(-1) == target)[from_prompt].sum().item()
        copied += from_prompt.sum().item()
    kept = ended = 0
    for prompt in prompts:
        question = [BOS, *encoder.sp.encode(TEMPLATE.format(prompt=prompt["prompt"]))]
        ids = torch.tensor([question])
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 2 * len(question),
            "pad_token_id": EOS,
        }
        out = model.generate(ids, do_sample=False, **options)[0]
        text = encoder.sp.decode(out[len(question) :].tolist()).lower()
        words = (re.escape(word.lower()) for word in prompt["keep"])
        kept += all(re.search(rf"(?<!\w){word}(?!\w)", text) for word in words)
        ended += out[-1].item() == EOS
    return {
        "loss": loss / count,
        "copied": right / copied,
        "kept": kept / len(prompts),
        "ended": ended / len(prompts),
    }


def save(model, tokenizer, folder):
    """Write the Hugging Face checkpoint folder, whole or not at all."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new)
    shutil.copy(tokenizer, new / "tokenizer.model")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- training


def train(args, model, encoder, pairs, log):
    """Train within the time budget; the best checkpoint by held-out copying stays in args.out."""
    heldout = make_pairs.Writer(args.seed + 100, heldout=True)
    dev_pairs = [heldout.pair() for _ in range(200)]
    dev_prompts = make_pairs.heldout_prompts(60, args.seed + 200)
    lessons = Lessons(pairs, encoder, args.batch, args.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    step, tokens, spent, best, recent = 0, 0, 0.0, -1.0, []
    if args.resume:
        state = torch.load(args.state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, spent, best = (state[k] for k in ("step", "tokens", "spent", "best"))
        lessons.next_pair = state["next_pair"]
    budget, last_check, clock = args.minutes * 60, spent, time.monotonic()
    while True:
        now = time.monotonic()
        spent, clock = spent + now - clock, now
        if spent - last_check > args.check_every * 60 or spent >= budget:
            last_check, half = spent, rounded(model)
            found = check(half, encoder, dev_pairs, dev_prompts)
            listed = ", ".join(f"{k} {v:.4f}" for k, v in found.items())
            log(f"  check after {spent / 60:5.1f} min: {listed}")
            score = found["copied"] + found["kept"] / 4 - found["loss"] / 10
            if score > best:
                best = score
                save(half, args.tokenizer, args.out)
                log(f"  saved {args.out.name}")
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "next_pair": lessons.next_pair,
            }
            state |= {"step": step, "tokens": tokens, "spent": spent, "best": best}
            torch.save(state, args.state)
        if spent >= budget:
            break
        copy = step < COPY_STEPS or step % COPY_EVERY == 0
        rows = lessons.copying() if copy else lessons.rewriting()
        warm_up = min(1, (step + 1) / 100)
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * spent / budget)) / 2
        rate = args.lr * warm_up * decay
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, target = answer_logits(model, encoder.prefix, rows)
        loss = F.cross_entropy(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + sum(len(ids) for ids, _ in rows)
        recent = [*recent[-49:], loss.item()]
        if step % 50 == 0:
            log(
                f"{spent / 60:5.1f} min  step {step:5}  tokens {tokens:8}  "
                f"rate {rate:.1e}  loss {sum(recent) / 50:.4f}"
            )


@torch.no_grad()
def same_as_transformers(folder, encoder, pairs):
    """Largest difference of a logit between `forward` and transformers, on the saved checkpoint."""
    model, worst = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0
    for pair in pairs[:20]:
        row = encoder.encode(pair["prompt"], pair["answer"])
        ours, _ = answer_logits(model, encoder.prefix, [row])
        first = len(encoder.prefix) + row[1] - 1
        theirs = model(torch.tensor([encoder.prefix + row[0]])).logits[0, first:-1]
        worst = max(worst, (ours - theirs).abs().max().item())
    return worst


def main():
    """The command line."""
    build = DEMO / "build"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=Path, default=build / "pairs.jsonl", help="made by make_pairs.py"
    )
    parser.add_argument("--out", type=Path, default=build / "hf", help="the checkpoint folder")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=build / "tokenizer.model",
        help="trained if it is not there",
    )
    parser.add_argument(
        "--state", type=Path, default=build / "state.pt", help="what --resume needs"
    )
    parser.add_argument("--log", type=Path, default=build / "train.log")
    parser.add_argument(
        "--minutes", type=float, default=75, help="time budget; the learning rate falls to its end"
    )
    parser.add_argument(
        "--check-every", type=float, default=5, help="minutes between held-out checks"
    )
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--batch", type=int, default=2000, help="positions per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    with args.log.open("a" if args.resume else "w", buffering=1) as out:

        def log(line):
            print(line, file=out)
            print(line, flush=True)

        pairs = [json.loads(line) for line in args.pairs.open(encoding="utf-8")]
        if not args.tokenizer.exists():
            train_tokenizer(pairs[:60_000], args.tokenizer)
        encoder = Encoder(args.tokenizer)
        model = new_model(args.seed)
        n_parameters = sum(p.numel() for p in model.parameters())
        log(
            f"{len(pairs)} pairs, {encoder.sp.vocab_size()} pieces, "
            f"a prefix of {len(encoder.prefix)} ids, {n_parameters} parameters"
        )
        log(
            f"torch {torch.__version__}, {args.threads} threads, "
            f"seed {args.seed}, {args.minutes:g} minutes"
        )
        train(args, model, encoder, pairs, log)
        difference = same_as_transformers(args.out, encoder, pairs)
        log(f"largest logit difference from transformers: {difference:.1e}")


if __name__ == "__main__":
    main()
