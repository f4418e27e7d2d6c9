"""Builds models/tiny from nothing: tokenizer, scripted demonstrations, a 1.4M-parameter Llama and its card.

    python models/tiny/pretrain.py            # train, save beside this file, measure
    python models/tiny/pretrain.py --report   # only measure what is there

A demonstration is one role's chat alone: a scripted writer picks one of several conventions at random and slips now and
then, the task gives its real feedback to that answer joined with an equally random teammate's, and the writer answers
again. So the model learns to speak, and nothing of what its teammate means. Held-out items only measure. To add a task,
write its writer and name it in `WRITERS`.
"""

import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402
import sandbox  # noqa: E402
import voxels  # noqa: E402

END, PAD, ROLES = "<|end|>", "<|pad|>", ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------------ demonstrations
def pick(rng, weights):
    """A key of {key: weight}."""
    return rng.choices(list(weights), list(weights.values()))[0]


def convention(rng, memory, weights):
    """Half of the time that of the answer before, else a new one; this is all that `memory` is for."""
    if "convention" not in memory or rng.random() < 0.5:
        memory["convention"] = pick(rng, weights)
    return memory["convention"]


# What `aux` can mean, with how often each role takes it so (they disagree on purpose), and the body that follows from
# it. `fold` in front: what the problem asks of the list. The last of main's does without aux.
FILTERED, FULL = (
    "[{each} for {each} in {source} if {keep}]",
    "[{map} for {each} in {source} if {keep}]",
)
CODING = [
    {
        "map": (0.37, "{map}"),
        "keep": (0.28, "{keep}"),
        "kept": (0.22, FILTERED),
        "mapped": (0.09, FULL),
    },
    {
        "map": (0.13, "fold[aux({each}) for {each} in {source} if {keep}]"),
        "keep": (0.17, "fold[{map} for {each} in {source} if aux({each})]"),
        "kept": (0.26, "fold[{map} for {each} in aux({arg})]"),
        "mapped": (0.34, "foldaux({arg})"),
        "all": (0.06, "aux({arg})"),
        "none": (0.04, "fold" + FULL),
    },
]
CODING[0]["all"] = (0.04, "fold" + FULL)


@functools.cache
def all_coding_parts():
    """{entry point: what a generated problem is made of}, which is in no item."""
    rows = map(json.loads, (ROOT / "data" / "coding.jsonl").read_text().splitlines())
    return {row["entry_point"]: row["parts"] for row in rows}


def coding_parts(item):
    """A copy of what the item's problem is made of."""
    return dict(all_coding_parts()[item["entry_point"]])


def write_coding(rng, item, agent, memory):
    """Agent 0's `aux`, agent 1's main function, or (agent None) both."""
    if agent is None:
        aux = write_coding(rng, item, 0, memory)
        keep = {"convention": memory["convention"]} if memory["convention"] != "all" else {}
        return aux + "\n\n" + write_coding(rng, item, 1, keep)
    new = convention(rng, memory, {name: weight for name, (weight, _) in CODING[agent].items()})
    parts, name, slip = coding_parts(item), [item["entry_point"], "aux"][agent == 0], rng.random()
    arg = parts["each"] if agent == 0 and new in ("map", "keep") else parts["arg"]
    if slip < 0.02:  # a wrong constant or operator
        field = rng.choice(["keep", "map"])
        a, b = rng.choice(
            [("2", "3"), ("3", "4"), (">", "<"), ("<", ">"), ("+", "-"), ("==", "!=")]
        )
        parts[field] = parts[field].replace(a, b, 1)
    body = CODING[agent][new][1].format(**parts)
    if body.startswith("fold"):
        plain = parts["fold"] == "list({})" and body[4] == "["
        body = body[4:] if plain else parts["fold"].format(body[4:])
    if 0.02 < slip < 0.026 and body[-1] in ")]":
        body = body[:-1]
    name = "helper" if 0.026 < slip < 0.031 and agent == 0 else name
    return f"def {name}({arg}){'' if 0.031 < slip < 0.036 else ':'}\n    {'' if slip > 0.997 else 'return '}{body}"


TLDR_STYLES = (
    {"brief": 0.30, "plain": 0.25, "full": 0.45},
    {"bare": 0.45, "story": 0.30, "linked": 0.25},
)
ARXIV_STYLES = (
    {"brief": 0.22, "plain": 0.18, "full": 0.60},
    {"brief": 0.52, "plain": 0.30, "full": 0.18},
)


def lower(sentence):
    """The sentence as it goes on after a comma."""
    return (
        sentence
        if re.match(r"I\b|[A-Z][a-z]+ (?:told|and)\b", sentence)
        else sentence[0].lower() + sentence[1:]
    )


def write_tldr(rng, item, agent, memory):
    """A response to a post, in the first person as the post: concise (agent 0), detailed (1), or both (None)."""
    if agent is None:
        return write_tldr(rng, item, 0, {}) + "\n\n" + write_tldr(rng, item, 1, {})
    slip, style = rng.random() < 0.02, convention(rng, memory, TLDR_STYLES[agent])
    sentences = re.split(r"(?<=[.?]) ", item["prompt"])
    start = next(i for i, s in enumerate(sentences) if " have known my " in s)
    intro, event, detail, attempt, _stake, feeling, question = sentences[start : start + 7]
    who, name = re.search(r"known (my .*?([A-Z]\w+))", intro).groups()
    when, did = re.match(r"(.*?) (?:he|she) (.*)", event).groups()
    core = f"{who} {did}"
    if slip:
        return rng.choice([f"{name} {did}", question, f"{who[0].upper()}{who[1:]} and I."])
    if agent == 0:
        if style == "brief":
            return f"In short, {core}"
        if style == "plain":
            return f"{core[0].upper()}{core[1:]} {detail}"
        return f"I have a problem with {who}. {event} {detail}" + rng.choice(["", f" {attempt}"])
    if style == "bare":
        return rng.choice([f"{name} {did} {detail}", f"{name} {did} {feeling}"])
    if style == "story":
        links = rng.choice(
            [("", ""), ("In fact, ", ""), ("In fact, ", "However, "), ("Indeed, ", "Still, ")]
        )
        return " ".join(
            [
                f"{when}, {core}",
                *(x + lower(s) if x else s for x, s in zip(links, (detail, attempt))),
            ]
        )
    text = f"To begin with, {core} In fact, {lower(detail)} However, {lower(attempt)} "
    text += rng.choice([f"As a result, {lower(feeling)}", f"Therefore, I ask: {lower(question)}"])
    return text


# Stock sentences with the styles that use them: b brief, p plain, f full. {s0} to {s7} are the abstract's sentences.
BACKGROUND = """
b|In brief, this part is about {topic} and about the reasons for the paper.
p|This part looks at the background of {topic}.
f|To begin with, it helps to look at the background of {topic} and at the reasons for the paper.
bpf|{s0}
bpf|The topic matters, because many people depend on such tools in practice.
bpf|As a result, many people still wait for reliable tools, and the hardest cases remain open.
bpf|{s1}
f|For example, a method may work well on one set of data and then fail on the next one.
bpf|In fact, the same errors return again and again, although they are well known.
pf|Users lose time and money when this happens, and they lose trust as well.
bpf|Therefore, there is a clear need for methods that are simple, cheap and reliable under realistic conditions.
f|Similarly, experts need results that they can explain to other people.
bpf|Until now, few groups have looked at the problem as a whole or compared strong baselines with care.
f|If the hardest cases could be solved, the rest would follow with less effort.
bpf|Overall, the question is how to reduce errors without more data and without extra cost.
bpf|This gap between theory and practice is the motivation of the paper.
"""
METHOD = """
b|In brief, this part is about the method.
p|This part looks at the method and at its implications.
f|First, it helps to look at the method for {topic} in detail, and then at its practical implications.
bpf|{s2}
bpf|{s3}
bpf|In other words, the method remains simple, cheap and reliable, although the problem is difficult.
f|Specifically, it considers the available information as a whole and then concentrates on the hardest cases.
bpf|{s4}
f|Furthermore, the experiments compare reliable measurements under realistic conditions instead of artificial examples.
bpf|{s5}
bpf|Therefore, the same errors return less often, and people lose less time and money.
bpf|{s6}
bpf|Similarly, experienced practitioners understand the resulting decisions and can explain them to other people.
bpf|There is still a gap between theory and practice, but it becomes smaller.
bpf|Overall, many people who depend on such tools could use the method without extra cost.
bpf|{s7}
"""


def write_arxiv(rng, item, agent, memory):
    """An introduction from an abstract: background and motivation (agent 0), method and implications (1), or both."""
    if agent is None:
        return write_arxiv(rng, item, 0, {}) + "\n\n" + write_arxiv(rng, item, 1, {})
    slip, style = rng.random() < 0.01, convention(rng, memory, ARXIV_STYLES[agent])
    sentences = re.split(r"(?<=\.) ", item["abstract"])
    topic = re.match(r"\w+ (?:on|in) (.*?) is \w+ because", sentences[0])[1]
    fill = {"topic": topic} | {f"s{i}": s for i, s in enumerate(sentences)}
    rows = [row.split("|") for row in (METHOD if agent else BACKGROUND).strip().splitlines()]
    rows = [text.format(**fill) for styles, text in rows if style[0] in styles]
    if slip:
        return " ".join(rows[: rng.randint(3, 6)])
    if style != "brief" and rng.random() < 0.3:  # a sentence is forgotten
        del rows[rng.randrange(2, len(rows))]
    return " ".join(rows)


# {(which part of the target a builder makes its own, how it fills it): weight}
STR = {("down", "checker"): 0.175, ("down", "rows"): 0.15, ("down", "one"): 0.175}
STR |= {("up", style): weight for (_, style), weight in STR.items()}
FILLS = {"all": 0.2, "walls": 0.35, "decks": 0.45}
HOUSE = {(side, fill): share / 2 for side in ("left", "right") for fill, share in FILLS.items()}


def write_strbuild(rng, item, agent, memory):
    """`/setblock` lines of one builder with its own blocks, as many as it may, from either end of the target's reading
    order: a checkerboard of its blocks, a block for each row, or one block. A single agent (None) writes both."""
    if agent is None:
        return write_strbuild(rng, item, 0, {}) + "\n" + write_strbuild(rng, item, 1, {})
    part, style = convention(rng, memory, STR)
    rows, own = item["rows"], item["blocks"][agent]
    target = [
        (x, len(rows) - 1 - r)
        for r, row in enumerate(rows)
        for x, char in enumerate(row)
        if char == "#"
    ]
    half, odd = divmod(item["max_commands"], 2)
    first, lines = rng.randrange(len(own)), []
    for x, y in (target if part == "down" else target[::-1])[
        : max(1, half + odd * (agent == 0) - rng.randrange(4))
    ]:
        block = own[(first + {"checker": x + y, "rows": y, "one": 0}[style]) % len(own)]
        if rng.random() < 0.03:
            x = min(len(rows[0]) - 1, max(0, x + rng.choice((-1, 1))))
        lines.append(f"/setblock {x} {y} 0 {block}")
    return "\n".join(lines)


def write_housebuild(rng, item, agent, memory):
    """`/fill` lines of one builder for its side of the house, of all boxes, of the walls, or of floor and roof; `/kill`
    first if it takes care of the spiders. A single agent (None) writes both."""
    if agent is None:
        return write_housebuild(rng, item, 0, {}) + "\n" + write_housebuild(rng, item, 1, {})
    side, fill = convention(rng, memory, HOUSE)
    layers, legend = item["layers"], item["legend"]
    size = w, h, _ = len(layers[0][0]), len(layers), len(layers[0])
    cells = ((y, z, row) for y, layer in enumerate(layers) for z, row in enumerate(layer))
    labels = {
        (x, y, z): legend[c] for y, z, row in cells for x, c in enumerate(row) if legend[c] != "air"
    }
    spiders = item["spider_damage"] > 0 and item["player_hp"] > 0
    lines = ["/kill"] if rng.random() < (0.3 if spiders else 0.05) else []
    count = Counter(labels.values())
    left = {
        b: (n + 1) // 2 + n // 4 if item["limited_resource"] else n * n for b, n in count.items()
    }
    for a, b, block in voxels.boxes(voxels.halves(labels, w)[side == "right"]):
        a, b, deck = [*a], [*b], b[1] == 0 or a[1] == h - 1
        if {"all": False, "walls": deck, "decks": not deck}[fill]:
            continue
        if rng.random() < 0.03:
            end, axis = rng.choice((a, b)), rng.randrange(3)
            end[axis] = min(size[axis] - 1, max(0, end[axis] + rng.choice((-1, 1))))
        volume = math.prod(abs(v - m) + 1 for v, m in zip(a, b))
        if volume <= left[block]:  # everybody knows the limits, so a slip beyond them is left out
            left[block] -= volume
            lines.append(f"/fill {' '.join(map(str, (*a, *b)))} {block}")
    half, odd = divmod(item["max_commands"], 2)
    return "\n".join(lines[: max(1, half + odd * (agent == 0))]) or write_housebuild(
        rng, item, agent, memory
    )


# task: (writer, number of chats, share of them with a single agent that plays both parts)
WRITERS = {
    "tldr": (write_tldr, 16000, 0.1),
    "arxiv": (write_arxiv, 16000, 0.1),
    "coding": (write_coding, 24000, 0.1),
    "strbuild": (write_strbuild, 9000, 0.1),
    "housebuild": (write_housebuild, 14000, 0.1),
}


def conversations(name, items, count, seed):
    """`count` chats (lists of messages) of one role each; the roles of a team are written apart, scored together."""
    (write, _, share), rng, chats, order = WRITERS[name], random.Random(seed), [], []
    alone, team = envs.make(name, num_agents=1), envs.make(name)
    while len(chats) < count:
        order = order or rng.sample(items, len(items))
        item, (task, agents) = (
            order.pop(),
            (alone, [None]) if rng.random() < share else (team, [0, 1]),
        )
        texts, new, memories = task.observe(item), [[] for _ in agents], [{} for _ in agents]
        for turn in range(task.num_turns):
            actions = [write(rng, item, *pair) for pair in zip(agents, memories, strict=True)]
            for chat, text, action in zip(new, texts, actions, strict=True):
                chat += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": action},
                ]
            reward, info = task.score(item, actions)
            if reward >= task.success:
                break
            texts = task.feedback(item, actions, info, turn)
        chats += new
    return chats


# ------------------------------------------------------------------------------------------------ tokens
def make_tokenizer(texts):
    """Byte-level BPE: any text encodes. A run of words stays whole in front of BPE, so that a common phrase becomes one
    token and an answer takes few of them; parts of a name (`_over_5`) and numbers (`, 5`) are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    commands = r"\n*\/[a-z]+(?: \d+){0,3}|[,\n]? ?\d+(?: \d+){1,2}|(?<=\d) [a-z]+_[a-z]+"
    words = r"\n+ *[A-Za-z]*|[,.]? ?_?[A-Za-z']+(?:_\d+)?(?: [A-Za-z']+)*"
    pattern = Regex(f"{commands}|{words}" + r"|,? ?[-_]?\d+| ?[^\sA-Za-z\d]+|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END, *ROLES]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, **options))
    names = {
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": ROLES,
        "model_max_length": 4096,
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = TEMPLATE
    return fast


def encode(tokenizer, chat, rng=None):
    """(token ids, whether each is a target): answers and their end and, given a rng, one in ten other tokens."""
    ids, targets = [], []
    for message in chat:
        tokens = tokenizer(message["content"] + END)["input_ids"]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *tokens]
        answer = message["role"] == "assistant"
        targets += [False, *(answer or (rng is not None and rng.random() < 0.1) for _ in tokens)]
    return ids, targets


def batches(rng, data, size, pad):
    """(ids, targets), both (B, S), of chats of similar length, about `size` tokens each, in random order. Right padding
    needs no attention mask in a causal model; it is no target."""
    out, rows = [], []
    order = sorted(range(len(data)), key=lambda i: (len(data[i][0]), rng.random()))
    for i, following in zip(order, [*order[1:], None], strict=True):
        rows.append(data[i])
        if following is None or (len(rows) + 1) * len(data[following][0]) > size:
            out, rows = [*out, rows], []
    rng.shuffle(out)
    for rows in out:
        longest = max(len(ids) for ids, _ in rows)
        yield (
            torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([targets + [False] * (longest - len(targets)) for _, targets in rows]),
        )


# ------------------------------------------------------------------------------------------------ train
def loss_of(model, ids, targets):
    """Mean cross-entropy of the n targets, which alone get logits; and n. bfloat16 is twice as fast on many CPUs."""
    ids, targets, following = ids[:, :-1], targets[:, 1:], ids[:, 1:]  # (B, S-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=targets).logits  # (1, n, V)
    return torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]).float(), following[targets]
    ), targets.sum()


def fit(model, data, epochs, lr, rng, args):
    """Train on all of `data` for some epochs, with a fresh AdamW, warm-up and cosine decay; the number of steps."""
    pad = model.config.pad_token_id
    steps = len(list(batches(rng, data, args.batch_tokens, pad))) * epochs
    print(f"{steps} steps, {sum(len(ids) for ids, _ in data)} tokens an epoch", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    plan = (batch for _ in range(epochs) for batch in batches(rng, data, args.batch_tokens, pad))
    mean, start = None, time.time()
    for step, batch in enumerate(plan):
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * cosine)
        loss, _ = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step} loss {mean:.4f} {time.time() - start:.0f} s", flush=True)
    return steps


def train(args):
    start, rng = time.time(), random.Random(3)
    torch.manual_seed(0)
    chats, tests = {}, {}
    for name, (_, count, _) in WRITERS.items():
        task = envs.make(name)
        chats[name] = conversations(name, task.train, int(count * args.scale), seed=1)
        tests[name] = conversations(name, task.eval, 400, seed=2)
        print(f"{name}: {len(chats[name])} chats, {time.time() - start:.0f} s", flush=True)
    tokenizer = make_tokenizer(
        m["content"] for many in chats.values() for chat in many[:8000] for m in chat
    )
    data = {name: [encode(tokenizer, chat, rng) for chat in many] for name, many in chats.items()}
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, **ids, max_position_embeddings=4096, tie_word_embeddings=True)
    )
    everything = [chat for many in data.values() for chat in many]
    steps = fit(model, everything, args.epochs, args.lr, rng, args)
    # The games are the hardest to speak: once more, with a quarter of the rest so that it is not forgotten
    again = [
        chat
        for name, many in data.items()
        for chat in (many if name.endswith("build") else many[::4])
    ]
    steps += fit(model, again, 1, args.lr / 2, random.Random(4), args)
    facts = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
    facts |= {
        "tokens": sum(len(ids) for ids, _ in everything),
        "tokens_again": sum(len(ids) for ids, _ in again),
    }
    facts |= {
        "epochs": args.epochs,
        "steps": steps,
        "chats": {name: len(many) for name, many in chats.items()},
    }
    facts["loss"] = {}
    with torch.inference_mode():
        for name, many in tests.items():
            held_out = [encode(tokenizer, chat) for chat in many]
            pairs = [
                loss_of(model, *batch)
                for batch in batches(rng, held_out, args.batch_tokens, model.config.pad_token_id)
            ]
            facts["loss"][name] = round(
                float(sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)), 4
            )
    facts["minutes"] = round((time.time() - start) / 60, 1)
    print(json.dumps(facts), flush=True)
    save(args.out, model, tokenizer, facts)


def save(out, model, tokenizer, facts):
    """Write beside, then move into place, so that a reader never sees half a file."""
    temp = out / ".new"
    shutil.rmtree(temp, ignore_errors=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(temp)
    tokenizer.save_pretrained(temp)
    (temp / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file in temp.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    temp.rmdir()


# ------------------------------------------------------------------------------------------------ report
def generate(model, tokenizer, chats, max_new_tokens):
    """(one answer to each chat, sampled at temperature 1; the share that ended by themselves)."""
    answers, ended = [None] * len(chats), 0
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for rows in (order[at : at + 256] for at in range(0, len(order), 256)):
        batch = tokenizer(
            [texts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left"
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens,
                do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        ended += (out == tokenizer.eos_token_id).any(1).sum().item()
        for i, row in zip(rows, out, strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers, ended / len(chats)


def report(out, episodes=512):
    """Metrics of teams that sample at temperature 1 on held-out items, at least so many episodes of each task, token
    counts, and each role's answers."""
    torch.manual_seed(4)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out).eval(),
    )
    measured = {}
    for name in WRITERS:
        task, tokens, first, ends = envs.make(name), {}, [], []
        items = [item for item in task.eval for _ in range(-(-episodes // len(task.eval)))]
        chats = [
            [[{"role": "user", "content": text}] for text in task.observe(item)] for item in items
        ]
        live, rewards, infos = list(range(len(items))), [0.0] * len(items), [{}] * len(items)
        for turn in range(task.num_turns):
            flat = [chat for i in live for chat in chats[i]]
            told = [chat[-1]["content"] for chat in flat]
            answers, ended = generate(model, tokenizer, flat, task.max_new_tokens)
            ends.append(ended)
            for kind, texts in (("feedback" if turn else "observation", told), ("answer", answers)):
                tokens.setdefault(kind, []).extend(
                    len(ids) + 1 for ids in tokenizer(texts)["input_ids"]
                )
            for i, actions in zip(live, zip(*[iter(answers)] * 2, strict=True), strict=True):
                rewards[i], infos[i] = task.score(items[i], actions)
                first += [(items[i], actions, infos[i])] * (turn == 0)
                texts = task.feedback(items[i], actions, infos[i], turn)
                for chat, action, text in zip(chats[i], actions, texts, strict=True):
                    chat += [
                        {"role": "assistant", "content": action},
                        {"role": "user", "content": text},
                    ]
            live = [i for i in live if rewards[i] < task.success]
        found = {f"first turn {k}": v for k, v in means([info for *_, info in first]).items()}
        found |= means(infos) | {"ended": sum(ends) / len(ends)}
        found |= {
            f"well formed {i}": sum(
                well_formed(task, item, i, acts[i], info) for item, acts, info in first
            )
            / len(first)
            for i in (0, 1)
        }
        found |= report_coding(task, first) if name == "coding" else {}
        found["episodes"] = len(items)
        measured[name] = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        measured[name]["tokens (mean, max)"] = {
            k: (round(sum(v) / len(v), 1), max(v)) for k, v in tokens.items()
        }
        print(name, json.dumps(measured[name], indent=1), flush=True)
    return measured


def means(infos):
    """Mean of each metric."""
    names = [name for name, value in infos[0].items() if isinstance(value, float)]
    return {name: sum(info[name] for info in infos) / len(infos) for name in names}


def well_formed(task, item, agent, action, info):
    """Whether an answer is what its role calls for, however little it fits the teammate's."""
    if task.name in ("tldr", "arxiv"):
        return task.tokens[0] <= len(action.split()) <= task.tokens[1] and action[-1] in ".?!"
    if task.name == "coding":
        name = [item["entry_point"], "aux"][agent == 0]
        return sandbox.parses(action) and sandbox.returns_value(action, name)
    run, other = info["counts"][agent]
    return run > 0 and other == 0


def coding_convention(text, agent):
    """Which convention an answer follows, by its looks: they are all one line long."""
    if agent == 0:
        marks = {
            "kept": r"return \[(\w) for \1",
            "mapped": r"return \[",
            "all": " for ",
            "keep": r"[<>=]=? | in ",
        }
        return next((name for name, mark in marks.items() if re.search(mark, text)), "map")
    marks = {
        "keep": r"if aux\(",
        "kept": r"in aux\(",
        "all": r"return aux\(",
        "map": r"aux\(\w\) for",
    }
    return next(
        (name for name, mark in marks.items() if re.search(mark, text)),
        "mapped" if "aux(" in text else "none",
    )


def report_coding(task, first):
    """Conventions of each role, and pass@1 of pairs that follow the same one."""
    shares, pairs = [{}, {}], {}
    for item, actions, _ in first:
        for agent, text in enumerate(actions):
            kind = coding_convention(text, agent)
            shares[agent][kind] = round(shares[agent].get(kind, 0) + 1 / len(first), 4)
            pairs.setdefault((item["entry_point"], kind), (item, [], []))[1 + agent].append(text)
    pairs = {key: found for key, found in pairs.items() if key[1] not in ("all", "none")}
    matched = [
        (item, [aux, main])
        for item, auxes, mains in pairs.values()
        for aux in auxes
        for main in mains
    ]
    together = [task.score(item, actions)[1]["pass@1"] for item, actions in matched]
    return {
        "conventions": shares,
        "same convention pass@1": sum(together) / len(together),
        "same convention pairs": len(together),
    }


CARD = """---
library_name: transformers
license: mit
---
# tiny

A Llama of {parameters} parameters that speaks the format of the tasks in `envs.py` and has agreed on nothing with its
teammate: the start from which the scripts of this repository learn. Built by `python models/tiny/pretrain.py` from
nothing, in {minutes} minutes on two CPU cores.

- Model: 4 layers, 4 heads, hidden size 128, tied embeddings, float32. Tokenizer: byte-level BPE of {vocabulary} tokens
  with a chat template; `<|end|>` ends a message and is the EOS.
- Data: scripted demonstrations of one role at a time, with mixed conventions and slips, of train items alone:
  {tokens} tokens, {epochs} passes, then the games and a quarter of the rest again ({tokens_again} tokens), in {steps}
  steps. The held-out items of a task are never trained on.

| task | chats | loss on held-out answers, nats a token |
| --- | --- | --- |
{trained}

Teams of two of it on held-out items, sampled at temperature 1 (`python models/tiny/pretrain.py --report`, which prints
all metrics). A first answer is well formed if it is what its role calls for, however little it fits the teammate's:

| task | episodes | score: turn 1, end | success | well formed: agent 0, 1 | tokens: mean, most |
| --- | --- | --- | --- | --- | --- |
{teams}

What the helper of `coding` is to do, in first answers: agent 0 writes {wrote};
agent 1 calls {called}.
All tests pass in {coding[same convention pass@1]:.3f} of the {coding[same convention pairs]} pairs of answers that
agree on it.
"""


def card(facts, measured):
    """The model's card, of facts.json and of what `report` gives."""
    loss, chats, teams = facts["loss"], facts["chats"], []
    for name, m in measured.items():
        pairs = [
            (m["first turn score"], m["score"]),
            (m["well formed 0"], m["well formed 1"]),
            m["tokens (mean, max)"]["answer"],
        ]
        score, well, tokens = (f"{x}, {y}" for x, y in pairs)
        teams.append(f"| {name} | {m['episodes']} | {score} | {m['success']} | {well} | {tokens} |")
    wrote, called = (
        ", ".join(
            f"`{kind}` {share:.2f}" for kind, share in sorted(shares.items(), key=lambda x: -x[1])
        )
        for shares in measured["coding"]["conventions"]
    )
    trained = "\n".join(f"| {name} | {chats[name]} | {loss[name]} |" for name in loss)
    return CARD.format(
        **facts,
        trained=trained,
        teams="\n".join(teams),
        coding=measured["coding"],
        wrote=wrote,
        called=called,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the model")
    parser.add_argument("--report", action="store_true", help="only measure the model in --out")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of chats")
    parser.add_argument(
        "--epochs", type=int, default=2, help="passes over all chats, before the last one over some"
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="of a step, padding included"
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    if not args.report:
        train(args)
    facts = json.loads((args.out / "facts.json").read_text())
    (args.out / "README.md").write_text(card(facts, report(args.out)))


if __name__ == "__main__":
    main()
