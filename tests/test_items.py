"""The embedded items: their files, the script that writes them, and what the items promise."""

import importlib.util
import itertools
import json
import random
import re
import string
from collections import Counter

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import envs
import voxels

spec = importlib.util.spec_from_file_location("make_items", ROOT / "data" / "make_items.py")
make_items = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_items)

COUNTS = {
    "tldr": (1936, 64),
    "arxiv": (1936, 64),
    "coding": (461, 115),
    "strbuild": (322, 78),
    "housebuild": (320, 80),
    "strbuild_private": (320, 80),
    "housebuild_private": (320, 80),
}
LEVELS = {"coding": 3, "strbuild": 5, "housebuild": 5}


def rows_of(name):
    return list(map(json.loads, (ROOT / "data" / f"{name}.jsonl").read_text().splitlines()))


def test_make_items_writes_the_committed_files():
    files = make_items.files()
    assert set(files) == {f"{name}.jsonl" for name in COUNTS}
    for name, text in files.items():
        assert (ROOT / "data" / name).read_bytes() == text.encode(), name


@pytest.mark.parametrize("name", COUNTS)
def test_items_are_the_rows_of_the_file(name):
    task, path = envs.make(name.replace("_", ":")), ROOT / "data" / f"{name}.jsonl"
    assert (len(task.train), len(task.eval)) == COUNTS[name]
    rows = rows_of(name)
    places = [f"{path}:{line}" for line in range(1, len(rows) + 1)]
    held_out = [row.get("held_out", False) for row in rows]
    assert [item["place"] for item in task.eval] == [*itertools.compress(places, held_out)]
    kept = [not marked for marked in held_out]
    assert [item["place"] for item in task.train] == [*itertools.compress(places, kept)]
    again = envs.make(name.split("_")[0], dataset=str(path))
    assert (again.train, again.eval) == (task.train, task.eval)
    assert all("held_out" not in item for item in task.train + task.eval)


@pytest.mark.parametrize("name", LEVELS)
def test_held_out_items_are_no_train_items(name):
    field = {"coding": "prompt", "strbuild": "rows", "housebuild": "layers"}[name]
    rows = rows_of(name)
    held_out = {str(row[field]) for row in rows if row.get("held_out")}
    train = {str(row[field]) for row in rows if not row.get("held_out")}
    assert not held_out & train
    assert len({str(row | {"held_out": None}) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_has_its_part_of_train_and_held_out_items(name):
    rows = rows_of(name)
    held_out = Counter(row["level"] for row in rows if row.get("held_out"))
    train = Counter(row["level"] for row in rows if not row.get("held_out"))
    assert sorted(train) == sorted(held_out) == [*range(1, LEVELS[name] + 1)]
    assert min(train.values()) >= 0.15 * len(rows) * 0.8
    for level, count in train.items():
        assert held_out[level] == pytest.approx(count / 4, abs=2)


# ---------------------------------------------------------------- writing
WRITING = {"tldr": ("prompt", make_items.POSTS), "arxiv": ("abstract", make_items.ABSTRACTS)}


@pytest.mark.parametrize("name", WRITING)
def test_texts_read_well(name):
    field = WRITING[name][0]
    texts = [row[field] for row in rows_of(name)]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert 60 <= len(text.split()) <= 150
        assert not re.search(r"[\[\]{}|/\n]|  | [.,?]|\.\.", text), text
        assert text[0].isupper() and text[-1] in ".?"
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.?]) ", text))
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\b(\w+) \1\b", text), text


@pytest.mark.parametrize("name", WRITING)
def test_many_subjects_and_few_repeats(name):
    field, table = WRITING[name]
    texts = [row[field] for row in rows_of(name) if "held_out" not in row]
    _, *subjects = make_items.table_entries(table)
    marks = [max(re.split(r"[\[\]{}|/]", row), key=len) for row in subjects]  # no choice changes it
    counts = [sum(mark in text for text in texts) for mark in marks]
    assert sum(counts) == len(texts) and sum(n > 0 for n in counts) >= 14
    assert max(counts) < 0.12 * len(texts)
    assert len({text[:250] for text in texts}) > 0.95 * len(texts)


# ---------------------------------------------------------------- coding
def reference(parts):
    inner = f"[{parts['map']} for {parts['each']} in {parts['source']} if {parts['keep']}]"
    return f"lambda {parts['arg']}: {parts['fold'].format(inner)}"


def passes(row, code):
    space = {}
    exec(row["test"], space)
    try:
        space["check"](eval(code))
    except Exception:
        return False
    return True


def test_problems():
    rows = rows_of("coding")
    assert len({row["prompt"] for row in rows}) == len({row["entry_point"] for row in rows}) == 576
    assert len({row["test"].count("assert") for row in rows}) >= 5
    for row in rows:
        assert 3 <= row["test"].count("assert") <= 9
        assert len(row["parts"]["steps"].split()) == row["level"]
        name = row["entry_point"]
        assert name.isidentifier() and row["prompt"].startswith(f"def {name}(")
        assert passes(row, reference(row["parts"]))
        call, answer = row["prompt"].split(">>> ")[1].split("\n")[:2]
        assert repr(eval(call, {name: eval(reference(row["parts"]))})) == answer.strip()
        shown = row["prompt"] + row["test"]
        assert row["parts"]["fold"] not in shown and " for " not in shown


def test_wrong_programs_fail_a_test():
    rows, families = rows_of("coding"), {}
    for family in (make_items.NUMBERS, make_items.TEXT):
        tables = [make_items.table_of(family[key]) for key in ("keep", "map", "fold")]
        tables[0].append(("", "", "True"))
        families[family["parts"]["arg"]] = [[entry[2] for entry in table] for table in tables]
    for row in rows[::6]:
        parts = row["parts"]
        keeps, maps, folds = families[parts["arg"]]
        rivals = [parts | {"keep": keep} for keep in keeps]
        rivals += [parts | {"map": map_} for map_ in [*maps, parts["each"]]]
        rivals += [parts | {"fold": fold} for fold in folds]
        for rival in rivals:
            assert rival == parts or not passes(row, reference(rival)), (row["test"], rival)
    survivors = 0
    hard = [row for row in rows if row["level"] == 3 and row["parts"]["arg"] == "nums"]
    for row in hard[:6]:  # two things wrong at once: hardly any such program gets through
        keeps, maps, _ = families["nums"]
        for keep, map_ in itertools.product(keeps, maps):
            if keep != row["parts"]["keep"] and map_ != row["parts"]["map"]:
                survivors += passes(row, reference(row["parts"] | {"keep": keep, "map": map_}))
    assert survivors <= 3


def test_empty_input_alone_pays_nothing():
    task = envs.make("coding")
    for item in task.train[:100]:
        empty = "0" if "sum" in item["entry_point"] else "None"
        assert not passes(item, f"lambda y: {empty} if not y else 1 / 0")
        main = f"def {item['entry_point']}(y):\n    return aux(1) / 0 if y else {empty}"
        assert task.score(item, ["def aux(y):\n    return y", main])[0] == 1.5


def solutions(parts):
    """[(aux, main's expression)] that should earn all, one for each meaning of `aux`."""
    each, arg, source, keep, map_ = (parts[k] for k in ("each", "arg", "source", "keep", "map"))

    def fold(listed):
        return parts["fold"].format(listed)

    kept = f"[{each} for {each} in {source} if {keep}]"
    return [
        (each, map_, fold(f"[aux({each}) for {each} in {source} if {keep}]")),
        (each, keep, fold(f"[{map_} for {each} in {source} if aux({each})]")),
        (arg, kept, fold(f"[{map_} for {each} in aux({arg})]")),
    ]


def test_every_problem_can_be_solved_by_a_team_in_several_ways():
    task = envs.make("coding")
    parts_of = {row["entry_point"]: row["parts"] for row in rows_of("coding")}
    for item in (task.train + task.eval)[::3]:
        name = item["entry_point"]
        for arg, aux, main in solutions(parts_of[name]):
            main = f"def {name}({parts_of[name]['arg']}):\n    return {main}"
            reward, info = task.score(item, [f"def aux({arg}):\n    return {aux}", main])
            assert reward == task.success, (name, main, info)


# ---------------------------------------------------------------- games
@pytest.mark.parametrize("num_agents, part", [(1, 1.0), (2, 0.99)])
def test_a_response_has_room_for_a_part_of_a_house_and_little_more(num_agents, part):
    """A lone builder's part is the house, a team's a side of it. Longer responses fill the chat
    with lines that do not run."""
    task, lengths = envs.make("housebuild", num_agents=num_agents), []
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    for item in task.train + task.eval:
        plan = task.plan(item)
        halves = [voxels.boxes(half) for half in voxels.halves(plan.design, plan.size[0])]
        for boxes in halves if num_agents == 2 else [halves[0] + halves[1]]:
            lines = [f"/fill {' '.join(map(str, (*low, *high)))} {b}" for low, high, b in boxes]
            text = "\n".join(["/kill", *lines]) + tokenizer.eos_token
            lengths.append(len(tokenizer(text)["input_ids"]))
    fit = [length <= task.max_new_tokens for length in lengths]
    assert sum(fit) >= part * len(fit)
    assert task.max_new_tokens <= 1.1 * max(lengths)


def test_letters():
    letters = make_items.letters_of(make_items.FONT)
    assert "".join(letters) == string.ascii_uppercase
    assert letters["A"] == (".###.", "#...#", "#####", "#...#", "#...#")
    assert letters["I"] == ("#####", "..#..", "..#..", "..#..", "#####")
    assert all(len(rows) == 5 and set(map(len, rows)) == {5} for rows in letters.values())
    assert len(set(letters.values())) == 26
    for row in rows_of("strbuild"):
        length = max(1, row["level"] - 1)
        step = 2 if row["level"] == 1 else 1
        drawn = [line[::step] for line in row["rows"][::step]]
        assert sum(line.count("#") for line in drawn) == sum(
            line.count("#") for line in row["rows"]
        )
        for k in range(length):
            assert tuple(line[7 * k : 7 * k + 5] for line in drawn) in letters.values()
        assert len(drawn) == 5 and len(drawn[0]) == 7 * length - 2


def test_dotted_letters_have_no_neighbours():
    assert make_items.dotted(("##.", ".#.")) == ["#.#..", ".....", "..#.."]


# What stands in an observation of a game: the cells of the target.
def told_cells(name, text):
    if name == "strbuild":
        return {(int(x), int(y), 0) for x, y in re.findall(r"(\d+) (\d+)", text.splitlines()[-1])}
    cells = set()
    for line in text.split("the rest air:\n")[1].splitlines():
        x1, y1, z1, x2, y2, z2 = map(int, line.split()[:6])
        spans = range(x1, x2 + 1), range(y1, y2 + 1), range(z1, z2 + 1)
        cells |= set(itertools.product(*spans))
    return cells


@pytest.mark.parametrize("name", ["strbuild", "housebuild"])
def test_private_shows_each_agent_its_part_and_together_everything(name):
    shared, private = envs.make(name), envs.make(f"{name}:private")
    for item in private.train[:60]:
        design = set(shared.plan(item).design)
        assert [told_cells(name, text) for text in shared.observe(item)] == [design, design]
        left, right = (told_cells(name, text) for text in private.observe(item))
        assert left | right == design and not left & right and left and right
        assert max(x for x, _, _ in left) < min(x for x, _, _ in right)
        assert all("your part" in text for text in private.observe(item))
        empty = ["", ""]
        assert private.score(item, empty)[0] == shared.score(item, empty)[0]


@pytest.mark.parametrize("name", ["strbuild", "housebuild"])
def test_private_halves_tell_nothing_of_each_other(name):
    task = envs.make(f"{name}:private")
    for i in range(2):
        others = {}
        for item in task.train:
            texts = task.observe(item)
            others.setdefault(texts[i], set()).add(texts[1 - i])
        assert len(others) == make_items.HALVES  # each in 16 train items, with 16 other halves
        assert {len(texts) for texts in others.values()} == {4 * make_items.HALVES // 5}
    seen = {text for item in task.train for text in task.observe(item)}
    assert {text for item in task.eval for text in task.observe(item)} == seen


def test_private_builders_are_told_of_their_own_blocks_alone():
    task = envs.make("housebuild:private")
    for item in task.train[:60]:
        for text in task.observe(item):
            named = re.search(r"Blocks: (.*)\.\n", text)[1].split(", ")
            boxes = text.split("the rest air:\n")[1].splitlines()
            assert set(named) == {box.split()[-1] for box in boxes}


def test_builders_who_know_their_own_halves_can_build_it_all():
    task = envs.make("strbuild:private")
    for item in task.train[:60]:
        actions = []
        for i, text in enumerate(task.observe(item)):
            blocks = item["blocks"][i]
            cells = sorted(told_cells("strbuild", text))
            assert len(cells) <= task.cap(item, i)
            actions.append(
                "\n".join(f"/setblock {x} {y} 0 {blocks[(x + y) % 2]}" for x, y, _ in cells)
            )
        reward, info = task.score(item, actions)
        assert reward == task.max_reward or info["palette"] < 1
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    task = envs.make("housebuild:private")
    for item in task.train[:60]:
        actions = []
        for i, text in enumerate(task.observe(item)):
            lines = text.split("the rest air:\n")[1].splitlines()
            assert len(lines) < task.cap(item, i)
            actions.append("\n".join(["/kill", *(f"/fill {line}" for line in lines)]))
            assert len(tokenizer(actions[-1])["input_ids"]) < task.max_new_tokens
        assert task.score(item, actions)[0] == task.max_reward


def test_private_feedback_tells_of_the_own_part_alone():
    for kind in ("position", "perfect"):
        task = envs.make(f"strbuild:private,feedback={kind}")
        item = task.train[0]
        parts = [told_cells("strbuild", text) for text in task.observe(item)]
        texts = task.feedback(item, ["", ""], task.score(item, ["", ""])[1], 0)
        for text, own in zip(texts, parts):
            told = text.split("missing " if kind == "position" else "need: ")[1]
            assert {(int(x), int(y), 0) for x, y in re.findall(r"(\d+) (\d+)", told)} == own


def test_private_parts_of_other_teams():
    lone = envs.make("strbuild:private", num_agents=1)
    item = lone.train[0]
    assert told_cells("strbuild", lone.observe(item)[0]) == set(lone.plan(item).design)
    four = envs.make("strbuild:private", num_agents=4)
    item = four.train[0]
    parts = [told_cells("strbuild", text) for text in four.observe(item)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(four.plan(item).design)


def colouring(rng, cells, blocks, share):
    """{cell: block} with no two equal neighbours, each block at least once, at most `share` cells
    for the blocks of one builder; by random restarts. blocks: [(builder, block)]."""
    for _ in range(200):
        left, used, colour = dict(enumerate(share)), dict.fromkeys(blocks, 0), {}
        for x, y in rng.sample(cells, len(cells)):
            near = [colour.get(cell) for cell in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))]
            free = [pair for pair in blocks if left[pair[0]] > 0 and pair not in near]
            if not free:
                break
            pick = min(free, key=lambda pair: (used[pair] > 0, -left[pair[0]], used[pair]))
            colour[x, y] = pick
            used[pick] += 1
            left[pick[0]] -= 1
        if len(colour) == len(cells) and all(used.values()):
            return colour
    raise AssertionError("no perfect team found")


@pytest.mark.parametrize("builders", [2, 3, 4])
def test_every_word_has_a_perfect_team_of_any_size(builders):
    rng, task = random.Random(0), envs.make("strbuild", num_agents=builders)
    items = [item for item in task.train + task.eval if builders > 2 or len(item["blocks"][0]) > 1]
    for item in items[::3]:
        height = len(item["rows"])
        cells = [
            (x, height - 1 - r)
            for r, row in enumerate(item["rows"])
            for x, char in enumerate(row)
            if char == "#"
        ]
        blocks = [(i, block) for i, own in enumerate(item["blocks"]) for block in own]
        share = [task.cap(item, i) for i in range(builders)]
        texts = [""] * builders
        for (x, y), (builder, block) in colouring(rng, cells, blocks, share).items():
            texts[builder] += f"/setblock {x} {y} 0 {block}\n"
        reward, info = task.score(item, texts)
        assert reward == task.success == 2.0 and all(other == 0 for _, other in info["counts"])


def test_smallest_word_has_a_perfect_team_of_four():
    task = envs.make("strbuild", num_agents=4)
    smallest = min(task.train + task.eval, key=lambda item: "".join(item["rows"]).count("#"))
    assert "".join(smallest["rows"]).count("#") == sum(map(len, smallest["blocks"]))
