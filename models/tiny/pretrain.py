"""Builds models/tiny from nothing: tokenizer, demonstrations, a 1.4M-parameter Llama, its card.

    python models/tiny/pretrain.py            # train, save beside this file, measure
    python models/tiny/pretrain.py --report   # only measure what is there

A demonstration is one role's chat alone: a scripted writer picks one of several conventions at
random and slips now and then, the task gives its real feedback to that answer joined with an
equally random teammate's, and the writer answers again. So the model learns to speak, and of what
its teammate means only as much as the writers agree on: nearly all on easy items, little on hard
ones. Held-out items only measure. To add a task, write its writer and name it in `WRITERS`.
"""

import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import make_items  # noqa: E402

import climbing  # noqa: E402
import collm_cc  # noqa: E402
import envs  # noqa: E402
import voxels  # noqa: E402

END, PAD, ROLES = "<|end|>", "<|pad|>", ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ======================================== items ========================================
PROBLEMS = {1: 120, 2: 1500, 3: 4500}  # steps: how many coding problems of so many, at most
HOUSES = 1000  # of a level


@functools.cache
def rows_of(name):
    """Rows of demonstrations of a task: those that its team trains on and, of `coding` and
    `housebuild`, many more. From few a model learns them by heart, and never to copy from a prompt:
    of items that are held out it then wrote three in ten answers that were not well formed.
    """
    rows = list(map(json.loads, (ROOT / "data" / f"{name}.jsonl").read_text().splitlines()))
    more = []
    if name == "coding":
        more = make_items.coding_rows(seed=10, problems=PROBLEMS)
    elif name == "housebuild":
        more = make_items.housebuild_rows(seed=12, games=HOUSES)
    known = {identity(row) for row in rows}
    own = [row for row in rows if not row.pop("held_out", False)]
    return own, [row for row in more if identity(row) not in known]


def identity(row):
    """What no other item has."""
    return str(row.get("entry_point") or row.get("layers") or row)


def pools(name):
    """[(weight, items)] that demonstrations of a task are drawn from: a pool for each level, as
    heavy as it is in data/."""
    task = envs.make(name)
    if name not in ("coding", "housebuild"):
        return [(1, task.train)]
    own, more = rows_of(name)
    found = []
    for level in sorted({row["level"] for row in own}):
        items = [task.parse(row) for row in [*own, *more] if row["level"] == level]
        found.append((sum(row["level"] == level for row in own), items))
    return found


# ======================================== demonstrations ========================================
def pick(rng, weights):
    """A key of {key: weight}."""
    return rng.choices(list(weights), list(weights.values()))[0]


def product_of(one, two):
    """{(key, key): weight} of two independent choices."""
    return {(a, b): v * w for a, v in one.items() for b, w in two.items()}


def convention(rng, memory, weights):
    """Half of the time that of the answer before, which `memory` holds, else a new one."""
    if "convention" not in memory or rng.random() < 0.5:
        memory["convention"] = pick(rng, weights)
    return memory["convention"]


# What `aux` can mean: what is done with an element (`map`), whether one stays (`keep`), the list of
# those that stay (`kept`), that list after `map` (`mapped`), all that the problem asks (`all`), or
# nothing: main does without it (`none`). By the steps of a problem, how often agent 0 and agent 1
# take it so: nearly always alike where there is one step, seldom where there are three.
ALONE, SELDOM = 0.97, 0.03
SAME_MEANING = 0.6  # how often a lone programmer means the same by `aux` in both functions
CONVENTIONS = {
    "keep": 2 * ({"keep": ALONE, "kept": SELDOM},),
    "map": 2 * ({"map": ALONE, "mapped": SELDOM},),
    "fold": 2 * ({"all": ALONE, "kept": SELDOM},),
    "keep map": (
        {"map": 0.50, "keep": 0.28, "kept": 0.12, "mapped": 0.10},
        {"map": 0.20, "keep": 0.30, "kept": 0.32, "mapped": 0.15, "none": 0.03},
    ),
    "keep fold": (
        {"keep": 0.77, "kept": 0.18, "all": 0.05},
        {"keep": 0.18, "kept": 0.74, "all": 0.05, "none": 0.03},
    ),
    "map fold": (
        {"map": 0.77, "mapped": 0.18, "all": 0.05},
        {"map": 0.18, "mapped": 0.74, "all": 0.05, "none": 0.03},
    ),
    "keep map fold": (
        {"map": 0.50, "keep": 0.32, "kept": 0.10, "mapped": 0.05, "all": 0.03},
        {"map": 0.04, "keep": 0.05, "kept": 0.35, "mapped": 0.47, "all": 0.06, "none": 0.03},
    ),
}


@functools.cache
def all_coding_parts():
    """{entry point: what a generated problem is made of}, which is in no item."""
    rows = [*make_items.coding_rows(), *rows_of("coding")[1]]
    return {row["entry_point"]: row["parts"] for row in rows}


def write_coding(rng, task, item, agent, memory):
    """Agent 0's `aux`, agent 1's main function, or (agent None) both."""
    if agent is None:
        aux = write_coding(rng, task, item, 0, memory)
        known = {"fixed": memory["convention"]} if rng.random() < SAME_MEANING else {}
        return aux + "\n\n" + write_coding(rng, task, item, 1, known)
    parts, slip = dict(all_coding_parts()[item["entry_point"]]), rng.random()
    meaning = memory.get("fixed") or convention(rng, memory, CONVENTIONS[parts["steps"]][agent])
    if slip < 0.02:  # a wrong constant or operator
        field = rng.choice(["keep", "map"])
        a, b = rng.choice(
            [("2", "3"), ("3", "4"), (">", "<"), ("<", ">"), ("+", "-"), ("==", "!=")]
        )
        parts[field] = parts[field].replace(a, b, 1)
    body = (main_body if agent else aux_body)(parts, meaning)
    if 0.02 < slip < 0.026 and body[-1] in ")]":
        body = body[:-1]
    name = item["entry_point"] if agent else "helper" if 0.026 < slip < 0.031 else "aux"
    arg = parts["each"] if not agent and meaning in ("map", "keep") else parts["arg"]
    colon, verb = "" if 0.031 < slip < 0.036 else ":", "" if slip > 0.997 else "return "
    return f"def {name}({arg}){colon}\n    {verb}{body}"


def listing(parts, value, keep):
    """A list of `value` of the elements that `keep` keeps, in Python; the input itself if all."""
    test = "" if keep == "True" else f" if {keep}"
    if value == parts["each"] and not test:
        return parts["source"]
    return f"[{value} for {parts['each']} in {parts['source']}{test}]"


def folded(parts, listed):
    """What a problem asks of a list, in Python."""
    is_list = parts["fold"] == "list({})" and listed[0] == "["
    return listed if is_list else parts["fold"].format(listed)


def aux_body(parts, meaning):
    """What `aux` returns."""
    if meaning == "all":
        return folded(parts, listing(parts, parts["map"], parts["keep"]))
    if meaning in ("kept", "mapped"):
        value = parts["map"] if meaning == "mapped" else parts["each"]
        return folded(parts | {"fold": "list({})"}, listing(parts, value, parts["keep"]))
    return parts[meaning]


def main_body(parts, meaning):
    """What the function returns that was asked for."""
    each, arg = parts["each"], parts["arg"]
    if meaning == "all":  # a fold alone has one other thing to do: to look for the empty input
        empty = folded(parts, "[]")
        guard = f" if {arg} else {eval(empty)!r}" if parts["steps"] == "fold" else ""
        return f"aux({arg}){guard}"
    listed = {
        "map": lambda: listing(parts, f"aux({each})", parts["keep"]),
        "keep": lambda: listing(parts, parts["map"], f"aux({each})"),
        "kept": lambda: listing(parts | {"source": f"aux({arg})"}, parts["map"], "True"),
        "mapped": lambda: f"aux({arg})",
        "none": lambda: listing(parts, parts["map"], parts["keep"]),
    }
    return folded(parts, listed[meaning]())


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
    is_name = re.match(r"I\b|[A-Z][a-z]+ (?:told|and)\b", sentence)
    return sentence if is_name else sentence[0].lower() + sentence[1:]


def write_tldr(rng, task, item, agent, memory):
    """A response to a post, in the first person as the post: concise (agent 0), detailed (1), or
    both (None)."""
    if agent is None:
        return write_tldr(rng, task, item, 0, {}) + "\n\n" + write_tldr(rng, task, item, 1, {})
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
        linked = [x + lower(s) if x else s for x, s in zip(links, (detail, attempt))]
        return " ".join([f"{when}, {core}", *linked])
    text = f"To begin with, {core} In fact, {lower(detail)} However, {lower(attempt)} "
    text += rng.choice([f"As a result, {lower(feeling)}", f"Therefore, I ask: {lower(question)}"])
    return text


# Stock sentences with the styles that use them: b brief, p plain, f full. {s0} to {s7} are the
# abstract's sentences. A line that starts with a space goes on with the one above.
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
bpf|Therefore, there is a clear need for methods that are simple, cheap and reliable under realistic
 conditions.
f|Similarly, experts need results that they can explain to other people.
bpf|Until now, few groups have looked at the problem as a whole or compared strong baselines with
 care.
f|If the hardest cases could be solved, the rest would follow with less effort.
bpf|Overall, the question is how to reduce errors without more data and without extra cost.
bpf|This gap between theory and practice is the motivation of the paper.
"""
METHOD = """
b|In brief, this part is about the method.
p|This part looks at the method and at its implications.
f|First, it helps to look at the method for {topic} in detail, and then at its practical
 implications.
bpf|{s2}
bpf|{s3}
bpf|In other words, the method remains simple, cheap and reliable, although the problem is
 difficult.
f|Specifically, it considers the available information as a whole and then concentrates on the
 hardest cases.
bpf|{s4}
f|Furthermore, the experiments compare reliable measurements under realistic conditions instead of
 artificial examples.
bpf|{s5}
bpf|Therefore, the same errors return less often, and people lose less time and money.
bpf|{s6}
bpf|Similarly, experienced practitioners understand the resulting decisions and can explain them to
 other people.
bpf|There is still a gap between theory and practice, but it becomes smaller.
bpf|Overall, many people who depend on such tools could use the method without extra cost.
bpf|{s7}
"""


def write_arxiv(rng, task, item, agent, memory):
    """An introduction from an abstract: background and motivation (agent 0), method and
    implications (1), or both (None)."""
    if agent is None:
        return write_arxiv(rng, task, item, 0, {}) + "\n\n" + write_arxiv(rng, task, item, 1, {})
    slip, style = rng.random() < 0.01, convention(rng, memory, ARXIV_STYLES[agent])
    sentences = re.split(r"(?<=\.) ", item["abstract"])
    topic = re.match(r"\w+ (?:on|in) (.*?) is \w+ because", sentences[0])[1]
    fill = {"topic": topic} | {f"s{i}": s for i, s in enumerate(sentences)}
    table = (METHOD if agent else BACKGROUND).replace("\n ", " ").strip()
    rows = [row.split("|") for row in table.splitlines()]
    rows = [text.format(**fill) for styles, text in rows if style[0] in styles]
    if slip:
        return " ".join(rows[: rng.randint(3, 6)])
    if style != "brief" and rng.random() < 0.3:  # a sentence is forgotten
        del rows[rng.randrange(2, len(rows))]
    return " ".join(rows)


# Which cells a builder takes, and how it fills them: the upper or lower rows, with the middle one
# or, in long words, often without it; or every other cell as on a checkerboard. On dotted letters,
# where nobody needs to care what touches what, two builders take different rows nearly always, on
# other single letters more often than not.
LETTER_PARTS = (
    {"top": 0.62, "bottom": 0.22, "even": 0.08, "odd": 0.08},
    {"top": 0.22, "bottom": 0.62, "even": 0.08, "odd": 0.08},
)
PARTS = {"top": 0.42, "bottom": 0.42, "even": 0.08, "odd": 0.08}
LONG_PARTS = {"top": 0.2, "bottom": 0.2, "roof": 0.22, "foot": 0.22, "even": 0.08, "odd": 0.08}
DOTTED_PARTS = {"top": 0.96, "bottom": 0.04}, {"top": 0.04, "bottom": 0.96}
PRIVATE_PARTS = {"all": 0.6, "top": 0.2, "bottom": 0.2}
STYLES = {"checker": 0.35, "rows": 0.3, "one": 0.35}
DOTTED_STYLES = {"checker": 0.94, "rows": 0.03, "one": 0.03}
ONE_LETTER, TWO_LETTERS = 5, 12  # columns


def write_strbuild(rng, task, item, agent, memory):
    """`/setblock` lines of one builder with its own blocks, in reading order, of some of the cells
    that it is shown. Its blocks take turns, or change by the row, or it takes one of them. A single
    agent (None) writes both."""
    if agent is None:
        return write_both(write_strbuild, rng, task, item, memory)
    width, height, _ = task.plan(item).size
    target = sorted(task.own_part(task.plan(item).design, item, agent), key=voxels.reading_order)
    dotted = all(not x % 2 and not y % 2 for x, y, _ in target)
    styles = DOTTED_STYLES if dotted else STYLES
    part, style = convention(
        rng, memory, product_of(word_parts(task, agent, width, dotted), styles)
    )
    wanted = [cell for cell in target if in_part(part, cell, height // 2)] or target
    apart = dotted or part in ("even", "odd")  # then its cells do not touch
    own, first, lines = item["blocks"][agent], rng.randrange(2), []
    for x, y, _ in wanted[: (item["max_commands"] + (agent == 0)) // 2]:
        turns = {"checker": x // 2 + y // 2 if apart else x + y, "rows": y, "one": 0}
        block = own[(first + turns[style]) % len(own)]
        if rng.random() < (0.01 if dotted else 0.02):
            x = min(width - 1, max(0, x + rng.choice((-1, 1))))
        lines.append(f"/setblock {x} {y} 0 {block}")
    return "\n".join(lines)


def word_parts(task, agent, width, dotted):
    """{part of a word: how often a builder takes it}."""
    if task.settings["private"]:
        return PRIVATE_PARTS
    if dotted:
        return DOTTED_PARTS[agent]
    if width <= ONE_LETTER:
        return LETTER_PARTS[agent]
    return PARTS if width <= TWO_LETTERS else LONG_PARTS


def in_part(part, cell, middle):
    """Whether a builder takes a cell; middle: y of the middle row."""
    x, y, _ = cell
    return {
        "all": True,
        "top": y >= middle,
        "bottom": y <= middle,
        "roof": y > middle,
        "foot": y < middle,
        "even": (x + y) % 2 == 0,
        "odd": (x + y) % 2 == 1,
    }[part]


def write_both(write, rng, task, item, memory):
    """What a lone builder writes: the lines of two, each of which goes on as it began."""
    return "\n".join(
        write(rng, task, item, agent, memory.setdefault(agent, {})) for agent in (0, 1)
    )


# What a builder fills: all boxes, the walls, or floor and roof; and how often it builds both sides
# where blocks are not limited. The keys are numbers of boxes of a house up to which it is so.
FILLS = {
    4: {"all": 0.96, "walls": 0.02, "decks": 0.02},
    10: {"all": 0.3, "walls": 0.3, "decks": 0.4},
    math.inf: {"all": 0.06, "walls": 0.4, "decks": 0.54},
}
BOTH_SIDES = {4: 0.8, math.inf: 0.3}


def up_to(table, number):
    """The entry of {most: entry} for a number: the first that is not too small."""
    return next(entry for most, entry in table.items() if number <= most)


def write_housebuild(rng, task, item, agent, memory):
    """`/fill` lines of one builder for its side of the house, or for both where blocks are not
    limited; `/kill` first if it takes care of the spiders. A single agent (None) writes both."""
    if agent is None:
        return write_both(write_housebuild, rng, task, item, memory)
    plan = task.plan(item)
    size, share = plan.size, 2 // task.num_agents  # a lone builder has both limits
    left = {block: cells / share for block, cells in plan.allowed[0].items()}
    halves = voxels.halves(task.own_part(plan.design, item, agent), size[0])
    boxes = [voxels.boxes(half) for half in halves]
    count = len(boxes[0] + boxes[1])
    both = 0.0 if item["limited_resource"] else up_to(BOTH_SIDES, count)
    sides = {"left": (1 - both) / 2, "right": (1 - both) / 2, "both": both}
    side, fill = convention(rng, memory, product_of(sides, up_to(FILLS, count)))
    wanted = {"left": boxes[0], "right": boxes[1], "both": boxes[0] + boxes[1]}[side]
    if task.settings["private"]:
        wanted = boxes[0] + boxes[1]
    lines = ["/kill"] if rng.random() < (0.2 if plan.harm else 0.05) else []
    for a, b, block in wanted:
        a, b, deck = [*a], [*b], b[1] == 0 or a[1] == size[1] - 1
        if {"all": False, "walls": deck, "decks": not deck}[fill]:
            continue
        if rng.random() < 0.02:
            end, axis = rng.choice((a, b)), rng.randrange(3)
            end[axis] = min(size[axis] - 1, max(0, end[axis] + rng.choice((-1, 1))))
        volume = math.prod(abs(v - m) + 1 for v, m in zip(a, b))
        if volume <= left[block]:  # everybody knows the limits, so a slip beyond them is left out
            left[block] -= volume
            lines.append(f"/fill {' '.join(map(str, (*a, *b)))} {block}")
    lines = lines[: task.cap(item, agent) // share]
    return "\n".join(lines) or write_housebuild(rng, task, item, agent, memory)


def write_climbing(rng, task, item, agent, memory):
    """Any of the three actions."""
    return rng.choice(climbing.ACTIONS)


# task: (writer, number of chats, share of episodes with a single agent that plays both parts)
WRITERS = {
    "tldr": (write_tldr, 10000, 0.1),
    "arxiv": (write_arxiv, 10000, 0.1),
    "coding": (write_coding, 20000, 0.2),
    "strbuild": (write_strbuild, 14000, 0.25),
    "housebuild": (write_housebuild, 20000, 0.25),
    "climbing": (write_climbing, 2000, 0.0),
}
PRIVATE = 0.2  # share of a game's episodes of teams in which each is shown its own part alone
LONG, LONG_TURNS = 0.1, 8  # share of a game's episodes of teams that have more turns; how many


def conversations(name, drawn_from, count, seed):
    """`count` chats (lists of messages) of one role each; the roles of a team are written apart,
    scored together. drawn_from: [(weight, items)], of which each pool is shuffled anew once it has
    been gone through."""
    (write, _, alone), rng, chats = WRITERS[name], random.Random(seed), []
    weights, items = zip(*drawn_from)
    orders = [[] for _ in items]
    teams = {envs.make(name): 1 - alone}
    if alone:
        teams[envs.make(name, num_agents=1)] = alone
    if name.endswith("build"):
        teams = {team: share * (1 - PRIVATE - LONG) for team, share in teams.items()}
        teams[envs.make(f"{name}:private")] = PRIVATE
        teams[envs.make(name, num_turns=LONG_TURNS)] = LONG
    while len(chats) < count:
        (k,) = rng.choices(range(len(items)), weights)
        orders[k] = orders[k] or rng.sample(items[k], len(items[k]))
        item, task = orders[k].pop(), pick(rng, teams)
        agents = [0, 1] if task.num_agents > 1 else [None]
        texts, new, memories = task.observe(item), [[] for _ in agents], [{} for _ in agents]
        for turn in range(task.num_turns):
            actions = [write(rng, task, item, *pair) for pair in zip(agents, memories, strict=True)]
            for chat, text, action in zip(new, texts, actions, strict=True):
                chat += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": action},
                ]
            reward, info = task.score(item, actions)
            if reward >= task.success or turn == task.num_turns - 1:
                break
            texts = task.feedback(item, actions, info, turn)
        chats += new
    return chats


# ======================================== tokens ========================================
def make_tokenizer(texts):
    """Byte-level BPE: any text encodes. A run of words stays whole in front of BPE, so that a
    common phrase becomes one token and an answer takes few of them; parts of a name (`_over_5`) and
    numbers (`, 5`) are tokens of their own."""
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
    """(token ids, whether each is a target): answers and their end and, given a rng, one in ten
    other tokens."""
    ids, targets = [], []
    for message in chat:
        tokens = tokenizer(message["content"] + END)["input_ids"]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *tokens]
        answer = message["role"] == "assistant"
        targets += [False, *(answer or (rng is not None and rng.random() < 0.1) for _ in tokens)]
    return ids, targets


def batches(rng, data, size, pad):
    """(ids, targets), both (B, S), of chats of similar length, about `size` tokens each, in random
    order. Right padding needs no attention mask in a causal model; it is no target."""
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


# ======================================== train ========================================
def loss_of(model, ids, targets):
    """Mean cross-entropy of the n targets, which alone get logits; and n. In float32: bfloat16 is
    twice as fast on some CPUs and seventy times as slow on those without its instructions."""
    ids, targets, following = ids[:, :-1], targets[:, 1:], ids[:, 1:]  # (B, S-1)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=targets).logits  # (1, n, V)
    logits = logits.view(-1, logits.shape[-1])  # (n, V)
    return torch.nn.functional.cross_entropy(logits, following[targets]), targets.sum()


WARM_UP, LEAST_LR = 100, 0.01  # steps; share of the largest learning rate that stays


def fit(model, data, rng, args):
    """Train once on all of `data`, with AdamW, warm-up and cosine decay; the number of steps."""
    pad = model.config.pad_token_id
    plan = list(batches(rng, data, args.batch_tokens, pad))
    print(f"{len(plan)} steps, {sum(len(ids) for ids, _ in data)} tokens", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    mean, start = None, time.time()
    for step, batch in enumerate(plan):
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (LEAST_LR + (1 - LEAST_LR) * cosine)
        loss, _ = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step} loss {mean:.4f} {time.time() - start:.0f} s", flush=True)
    return len(plan)


def train(args):
    """Write demonstrations, train on them, save the model and the facts of its card."""
    start, rng = time.time(), random.Random(3)
    torch.manual_seed(0)
    chats, tests = {}, {}
    with ProcessPoolExecutor(args.threads) as pool:
        for name in sorted(WRITERS, key=lambda name: name != "coding"):  # the slowest first
            task, count = envs.make(name), int(WRITERS[name][1] * args.scale)
            chats[name] = pool.submit(conversations, name, pools(name), count, seed=1)
            tests[name] = pool.submit(conversations, name, [(1, task.eval)], 400, seed=2)
    chats, tests = ({name: a[name].result() for name in WRITERS} for a in (chats, tests))
    print(f"demonstrations: {time.time() - start:.0f} s", flush=True)
    some = [chat for many in chats.values() for chat in many[:8000]]
    tokenizer = make_tokenizer(message["content"] for chat in some for message in chat)
    data = {name: [encode(tokenizer, chat, rng) for chat in many] for name, many in chats.items()}
    model = new_model(tokenizer)
    everything = [chat for many in data.values() for chat in many]
    steps = fit(model, everything, rng, args)
    commit = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts = {"commit": told or "unknown"}
    facts |= {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
    facts["tokens"] = sum(len(ids) for ids, _ in everything)
    facts["fresh"] = sum(len(rows_of(name)[1]) for name in ("coding", "housebuild"))
    facts |= {"scale": args.scale, "threads": args.threads, "steps": steps}
    facts["chats"] = {name: len(many) for name, many in chats.items()}
    facts["loss"] = {
        name: mean_loss(model, [encode(tokenizer, chat) for chat in many], rng, args)
        for name, many in tests.items()
    }
    facts["minutes"] = round((time.time() - start) / 60, 1)
    print(json.dumps(facts), flush=True)
    save(args.out, model, tokenizer, facts)


def new_model(tokenizer):
    """An untrained Llama. Eager attention is the fastest on a CPU: heads are few, chats short."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@torch.inference_mode()
def mean_loss(model, data, rng, args):
    """Cross-entropy of a target of these chats, in nats."""
    pad = model.config.pad_token_id
    pairs = [loss_of(model, *batch) for batch in batches(rng, data, args.batch_tokens, pad)]
    return round(float(sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)), 4)


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


# ======================================== report ========================================
# What a report plays: (task, number of agents).
PLAYED = [(name, 2) for name in WRITERS]
PLAYED += [("strbuild:private", 2), ("housebuild:private", 2)]
PLAYED += [("coding", 1), ("strbuild", 1), ("housebuild", 1)]
AT_ONCE = 64  # episodes that are played at once


def report(out, items=32, samples=8, part="eval", played=PLAYED):
    """[(task, agents, what was measured)] of teams that sample at temperature 1: `samples` episodes
    of each of the first `items` of the task's part (eval, the held-out ones, or train)."""
    measured = []
    for name, num_agents in played:
        task = envs.make(name, num_agents=num_agents)
        chosen = [item for item in getattr(task, part)[:items] for _ in range(samples)]
        args = collm_cc.Args(task=name, model=[str(out)], num_agents=num_agents)
        agents, _ = collm_cc.build(task, args, torch.device("cpu"))
        episodes = collm_cc.start_episodes(chosen, num_agents)
        for k in range(0, len(episodes), AT_ONCE):
            collm_cc.rollout(task, episodes[k : k + AT_ONCE], agents, args, "evaluation", 0)
        found = measure(task, episodes, samples, args.gamma)
        measured.append((name, num_agents, found))
        print(name, num_agents, json.dumps(found), flush=True)
    return measured


def measure(task, episodes, samples, gamma):
    """What the card tells of `samples` episodes of each item, in a row."""
    agents = range(task.num_agents)
    first, last = ([e.infos[turn] for e in episodes] for turn in (0, -1))
    returns = [sum(gamma**t * reward for t, reward in enumerate(e.rewards)) for e in episodes]
    tokens = [
        turns.count(turn) for e in episodes for turns in e.turns for turn in range(len(e.rewards))
    ]
    formed = [
        mean(well_formed(task, i, [texts[0] for texts in e.actions], e.infos[0]) for e in episodes)
        for i in agents
    ]
    return {
        "episodes": len(episodes),
        "score, turn 1": mean(info["score"] for info in first),
        "score, end": mean(info["score"] for info in last),
        "success": mean(info["success"] for info in last),
        "between items": round(between_share(torch.tensor(returns).view(-1, samples)), 3),
        "well formed": formed,
        "tokens": [mean(tokens), max(tokens)],
    }


def mean(values):
    """Mean, with three digits."""
    values = [float(value) for value in values]
    return round(sum(values) / len(values), 3)


def between_share(returns):
    """Share of the variance of returns (items, samples) that lies between items: one-way analysis
    of variance, unbiased in both parts, at least 0."""
    within = returns.var(1).mean()
    between = (returns.mean(1).var() - within / returns.shape[1]).clamp(min=0)
    return float(between / (between + within))


def well_formed(task, agent, actions, info):
    """Whether an answer is what its role calls for, however little it fits the teammate's."""
    text = actions[agent]
    if task.name in ("tldr", "arxiv"):
        fewest, most = task.token_limits
        return fewest <= len(text.split()) <= most and text[-1] in ".?!"
    if task.name == "coding":
        defined = info["aux_defined"], info["main_defined"]
        return envs.sandbox.parses(text) and all(
            defined if task.num_agents == 1 else [defined[agent]]
        )
    if task.name == "climbing":
        return text in climbing.ACTIONS
    run, other = info["counts"][agent]
    return run > 0 and other == 0


CARD = """---
library_name: transformers
license: mit
---
# tiny

A Llama of {parameters} parameters that speaks the format of the tasks in `envs.py` and has agreed
with its teammate on little: the start from which the scripts of this repository learn. Built by
`python models/tiny/pretrain.py --scale {scale} --threads {threads}` of commit {commit}, from
nothing, in {minutes} minutes on a CPU.

- Model: 4 layers, 2 heads of width 64, hidden size 128, tied embeddings, float32. Tokenizer:
  byte-level BPE of {vocabulary} tokens with a chat template; `<|end|>` ends a message and is the
  EOS.
- Data: scripted demonstrations of one role at a time, with mixed conventions and slips, of train
  items and, for coding and housebuild, of {fresh} more that were drawn the same way:
  {tokens} tokens, each seen once, in {steps} steps. Among the chats are lone agents
  over all their turns and, in the games, teams with private observations and with eight turns. The
  held-out items of a task are never trained on; `climbing` has one item, whose
  demonstrations play each action equally often.

| task | chats | loss on held-out answers, nats a token |
| --- | --- | --- |
{trained}

Teams of it on held-out items, sampled at temperature 1, eight episodes of each item (`python
models/tiny/pretrain.py --report`). A first answer is well formed if it is what its role calls for,
however little it fits the teammate's. The share between items is that of the variance of discounted
returns: the most that a value of the first observations can explain. Tokens of an answer are their
mean and most.

| task | agents | episodes | score: start, end | success | between | well formed | tokens |
| --- | --- | --- | --- | --- | --- | --- | --- |
{teams}
"""


def card(facts, measured):
    """The model's card, of facts.json and of what `report` gives."""
    trained = [
        f"| {name} | {facts['chats'][name]} | {loss} |" for name, loss in facts["loss"].items()
    ]
    teams = []
    for name, agents, m in measured:
        cells = [name, agents, m["episodes"], f"{m['score, turn 1']:.1f}, {m['score, end']:.1f}"]
        cells += [m["success"], m["between items"]]
        cells += [", ".join(map(str, m[key])) for key in ("well formed", "tokens")]
        teams.append(f"| {' | '.join(map(str, cells))} |")
    return CARD.format(**facts, trained="\n".join(trained), teams="\n".join(teams))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the model")
    parser.add_argument("--report", action="store_true", help="only measure the model in --out")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of chats")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="of a step, padding included"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.report:
        train(args)
    facts = json.loads((args.out / "facts.json").read_text())
    (args.out / "README.md").write_text(card(facts, report(args.out)))


if __name__ == "__main__":
    main()
