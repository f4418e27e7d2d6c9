"""Data sets in all forms, options and numbers of agents: each works, or is refused in one line.
Rows and texts that nobody meant too."""

import copy
import csv
import gzip
import json
import random
import re
import sys
import types

import pytest
from conftest import ROOT, TASKS

import envs

JUNK = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    "",
    " ",
    "x",
    "\x00\ud800",
    "é" * 50,
    [],
    [[]],
    {},
    {"": []},
    "def f(",
    10**30,
]


def spoil(rng, value):
    """A copy of a row with one thing in it changed, at any depth."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.7:
        value, key = (
            copy.copy(value),
            rng.choice(list(value) if isinstance(value, dict) else range(len(value))),
        )
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = spoil(rng, value[key])
        return value
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return (
            value[:at]
            + rng.choice(["", "\n", "#", "\u2028", "(", "9" * 30, chr(rng.randrange(0xD7FF))])
            + value[at + 1 :]
        )
    return rng.choice(JUNK)


def text(rng, item):
    parts = [
        json.dumps(item)[: rng.randrange(400)],
        "```",
        "\n",
        "def aux(x):\n    return x",
        "/fill 0 0 0 1 1 1 ",
        "/kill",
    ]
    return "".join(
        rng.choice([*parts, chr(rng.randrange(0xD7FF)), "  ", "\x00"])
        for _ in range(rng.randrange(12))
    )


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_fuzzed_datasets_and_texts(name, num_agents, tmp_path):
    rng, items, path, loaded = (
        random.Random(f"{name} {num_agents}"),
        envs.make(name).train,
        tmp_path / "rows.jsonl",
        0,
    )
    for _ in range(100):
        rows = [
            spoil(rng, item) if rng.random() < 0.7 else item
            for item in rng.sample(items, rng.randint(1, 2))
        ]
        lines = [json.dumps(row)[rng.random() < 0.05 :] for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            task = envs.make(name, num_agents=num_agents, dataset=str(path))
        except envs.UserError as error:
            assert "\n" not in str(error) and "rows.jsonl" in str(error), error
            continue
        loaded += 1
        if name == "coding" and loaded > 15:  # a program takes milliseconds, a hanging test seconds
            continue
        item = task.train[0]
        assert len(task.observe(item)) == num_agents
        actions = [text(rng, item) for _ in range(num_agents)]
        reward, info = task.score(item, actions)
        assert reward == reward and task.score(item, actions)[0] == reward
        assert len(task.feedback(item, actions, info, 0)) == num_agents
        assert isinstance(task.render(item, actions), str)
    assert loaded > 5


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"\x00" * 100, b"[" * 5000, b'{"a": 1}\n{"a": ', b"[1, 2"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", TASKS)
def test_files_that_are_no_datasets(name, suffix, data, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(data)
    with pytest.raises(envs.UserError) as error:
        envs.make(name, dataset=str(path))
    assert "\n" not in str(error.value) and path.name in str(error.value)


# ---------------------------------------------------------------- forms of files
ROWS = [{"id": k, "prompt": f"Text {k}, é \u2028 \U0001f600."} for k in range(10)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = [row["prompt"] for row in ROWS]


def texts(items):
    return [item["prompt"] for item in items]


def load(name, path, **options):
    return envs.make(name, dataset=str(path), **options)


def refused(name, path, said, **options):
    with pytest.raises(envs.UserError) as error:
        load(name, path, **options)
    message = str(error.value)
    assert said in message and "\n" not in message and len(message) < 400 + len(str(path)), message
    message.encode()  # can be printed
    return message


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,  # an ending that nobody knows
    "bom.jsonl": "\ufeff" + LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "blank.jsonl": "\n  \n" + LINES.replace("\n", "\n\n\t\n").rstrip(),
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "lines.json": LINES,  # as much of the Hub
    **{f"{key}.json": json.dumps({"version": "1", key: ROWS}) for key in ("data", "rows", "train")},
    "examples.json": json.dumps({"tags": ["x"], "examples": ROWS}, indent=1),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_forms_of_json(name, zipped, tmp_path):
    path, data = tmp_path / (name + ".gz" * zipped), FILES[name].encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    if zipped and name == "a.ndjson":
        path = path.rename(tmp_path / "b.jsonl.gz")
    task = load("tldr", path)
    assert texts(task.eval) == [TEXTS[4], TEXTS[9]] and texts(task.train) == TEXTS[:4] + TEXTS[5:9]


def test_place_is_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + LINES.replace("\n", "\n\n"))
    task = load("tldr", path)
    assert [item["place"] for item in task.eval] == [f"{path}:10", f"{path}:20"]


def test_one_object_is_the_only_row(tmp_path):
    path = tmp_path / "one.json"
    for name in ("tldr", "strbuild", "housebuild"):  # strbuild's row has a key "rows"
        row = {k: v for k, v in envs.make(name).train[0].items() if k != "place"}
        path.write_text(json.dumps(row, indent=1))
        task = load(name, path)
        assert task.train == task.eval == [row | {"place": f"{path}:1"}]


def test_an_object_with_several_lists(tmp_path):
    path = tmp_path / "parts.json"
    path.write_text(json.dumps({"train": ROWS[:6], "test": ROWS[6:], "mine": ROWS[:1]}))
    refused("tldr", path, "rows stand under ['train', 'test', 'mine']; name one")
    task = load("tldr", f"{path}:train", eval_dataset=f"{path}:test")
    assert texts(task.train) == TEXTS[:6] and texts(task.eval) == TEXTS[6:]
    assert texts(load("tldr", f"{path}:mine").train) == TEXTS[:1]
    refused("tldr", f"{path}:dev", "name one")
    path.write_text(json.dumps(ROWS))
    refused("tldr", f"{path}:train", "must hold rows, not one list")
    path.rename(tmp_path / "a.jsonl")
    refused("tldr", f"{tmp_path}/a.jsonl:train", "only .json files and the Hub have parts")
    odd = tmp_path / "odd:name.jsonl"
    odd.write_text(LINES)
    assert len(load("tldr", odd).train) == 8


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    for ending in ("\n", "\r\n"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, ["id", "prompt"], lineterminator=ending)
            table.writeheader()
            odd = {"id": 5, "prompt": 'Two\nlines, "quoted"'}
            table.writerows([*ROWS[:5], odd, *ROWS[6:]])
        task = load("tldr", path)
        assert texts(task.eval) == [TEXTS[4], TEXTS[9]]
        assert task.train[4]["prompt"] == 'Two\nlines, "quoted"'
        assert [item["place"] for item in task.train[4:6]] == [f"{path}:7", f"{path}:9"]
    path.write_text(f"prompt,article\nShort.,{'long ' * 100_000}\n")
    assert texts(load("tldr", path).train) == ["Short."]
    path.write_text("prompt\n[a tag] and text\n")
    assert texts(load("tldr", path).train) == ["[a tag] and text"]
    for text, said in [
        ("", "no rows"),
        ("prompt\n", "no rows"),
        ("id,prompt\n1\n", "a.csv:2: field 'prompt' is missing"),
        ("prompt\na\nb,c\n", "a.csv:3: needs a cell for each"),
        ("prompt,prompt\na,b\n", "a.csv:2: needs a cell for each"),
        ('prompt\n"a\n', "unexpected end of data"),
    ]:
        path.write_text(text)
        refused("tldr", path, said)


def test_an_empty_cell_of_csv_is_missing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,post\n,one post\n"two",\n')
    task = envs.make("tldr", dataset=path)
    texts = str([task.observe(item) for item in [*task.train, *task.eval]])
    assert "one post" in texts and "two" in texts


def test_csv_as_pandas_writes_it(tmp_path):
    path = tmp_path / "a.CSV"
    tests = ["assert f(1) == '1'", 'assert f("a") == "a"']
    row = {"text": "Do.", "code": "def f(x): return str(x)", "test_list": tests, "held_out": True}
    rows = [row, row | {"held_out": False}]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(row))  # str() of each value, as to_csv
        table.writeheader()
        table.writerows(rows)
    task = load("coding", path)
    assert [len(split) for split in (task.train, task.eval)] == [1, 1]
    assert task.train[0]["test"].count("assert") == 2
    path = tmp_path / "a.tsv"
    path.write_text('id\tprompt\n1\t"A text, ""with"" commas, two."\n2\tTrue story\n')
    assert texts(load("tldr", path).train) == ['A text, "with" commas, two.', "True story"]


def test_rows_under_another_key_and_by_id(tmp_path):
    path = tmp_path / "a.JSON"
    path.write_text(json.dumps({"split": "test", "problems": ROWS}))
    refused("tldr", path, "for the rows under a key, name it: FILE:'problems'")
    refused("coding", path, "for the rows under a key, name it: FILE:'problems'")
    assert len(load("tldr", f"{path}:problems").train) == 8
    path.write_text(json.dumps({f"id/{row['id']}": row for row in ROWS}))
    assert len(load("tldr", path).train) == 8
    house = {"legend": {"0": "stone", "S": "dirt"}, "layers": {"0": ["SS"], "1": ["S0"]}}
    path.write_text(json.dumps(house))
    assert load("housebuild", path).train[0]["layers"] == [["SS"], ["S0"]]


def test_the_flag_of_held_out_items_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    said = refused("tldr", path, "none.jsonl", eval_dataset=str(tmp_path / "none.jsonl"))
    assert said.startswith("--eval-dataset ")
    assert refused("tldr", tmp_path / "none.jsonl", "").startswith("--dataset ")


def test_palettes_of_air(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {k: v for k, v in envs.make("strbuild").train[0].items() if k != "place"}
    for air in ["air"], ["minecraft:air", "air"], []:
        path.write_text(json.dumps(row | {"blocks": [["stone"], air]}))
        refused("strbuild", path, "a.jsonl:1: field blocks: must be 2 lists")


def test_csv_of_a_game(tmp_path):
    path = tmp_path / "a.csv"
    row = {k: v for k, v in envs.make("housebuild").train[0].items() if k != "place"}
    cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(row), cells])
    assert load("housebuild", path).train == [row | {"place": f"{path}:2"}]


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    for name in ("tldr", "strbuild", "housebuild"):
        items = envs.make(name).train[:10]
        parquet.write_table(arrow.Table.from_pylist(items), path)
        task = load(name, path)
        found = [*task.train[:4], task.eval[0]]
        assert found == [x | {"place": f"{path}:{n}"} for n, x in enumerate(items[:5], 1)]
    path.write_bytes(b"PAR1 but no more")
    refused("tldr", path, "a.parquet: ")
    refused("tldr", tmp_path / "none.parquet", "No such file")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    refused("tldr", path, "pip install pyarrow")


def test_hub_splits(monkeypatch):
    splits = {"validation": ROWS[:2], "train": ROWS[:7], "test": ROWS[7:]}
    splits["train[:3]"] = ROWS[:3]

    def load_dataset(name, split=None):
        assert name == "some/set"
        return splits[split] if split else splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load("tldr", "some/set")
    assert texts(task.train) == TEXTS[:4] + TEXTS[5:7] and task.eval[0]["place"] == "some/set:5"
    task = load("tldr", "some/set:test")
    assert texts(task.train) == TEXTS[7:] and task.train[0]["place"] == "some/set:test:1"
    task = load("tldr", "some/set:train", eval_dataset="some/set:test")
    assert texts(task.train) == TEXTS[:7] and texts(task.eval) == TEXTS[7:]
    assert texts(load("tldr", "some/set:train[:3]").train) == TEXTS[:3]
    refused("tldr", "some/set:dev", "the Hub says: 'dev'")
    del splits["train"]
    assert texts(load("tldr", "some/set").train) == TEXTS[:2]


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cut.jsonl.gz"),
        ("broken.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 40, "broken.jsonl.gz"),
        ("plain.jsonl.gz", LINES.encode(), "Not a gzipped file"),
        ("wide.jsonl", LINES.encode("utf-16"), "wide.jsonl:1: 'utf-8' codec can't decode"),
        ("latin.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', "latin.jsonl:2: 'utf-8' codec"),
        ("bom.csv", b"\xef\xbb\xbfprompt\na\n\xff\n", "bom.csv:3: 'utf-8' codec"),
        ("three.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "three.jsonl:3: not JSON"),
        ("word.json", b'"prompt"', "must hold rows, not one str"),
        ("empty.json", b"[]", "no rows"),
        ("nothing.json", b"", "not JSON"),
        ("digits.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "digits.jsonl:1: not JSON"),
        (
            "twice.jsonl",
            b'{"prompt": "a", "x": {"y": 1, "y": 2}}',
            "twice.jsonl:1: field 'y' stands",
        ),
        ("twice.json", b'[{"prompt": "a", "prompt": "b"}]', "field 'prompt' stands twice"),
    ],
)
def test_files_that_can_not_be_read(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert name in refused("tldr", tmp_path / name, said)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".jsonl", "a\x00b.jsonl", "none/none.json", "none.csv"]
)
def test_files_that_are_not_there(name, tmp_path):
    refused("tldr", tmp_path / name, "")


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize(
    "name, change, field",
    [
        ("tldr", {"prompt": "a \ud800 b"}, "prompt"),
        ("tldr", {"prompt": "a", "note": ["\udfff"]}, "note"),
        ("tldr", {"prompt": "a", "\ud800": 1}, "\\ud800"),
        ("strbuild", {"blocks": [["stone", "st\ud800ne"], ["dirt"]]}, "blocks"),
        ("housebuild", {"legend": {"\ud800": "stone"}}, "legend"),
        ("coding", {"test": "def check(candidate):\n    assert candidate('\ud800')\n"}, "test"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lone_surrogates(name, change, field, suffix, tmp_path):
    good = {k: v for k, v in envs.make(name).train[0].items() if k != "place"}
    path, rows = tmp_path / f"a.{suffix}", [good, good | change]
    lines = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path.write_text(lines)
    refused(name, path, f"a.{suffix}:2: field '{field}': has a lone surrogate")


def test_pairs_of_surrogates_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 fine"}')
    assert texts(load("tldr", path).train) == ["\U0001f600 fine"]


def test_nan_where_nobody_reads_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "label": NaN, "x": Infinity, "y": 1e400}')
    assert texts(load("tldr", path).train) == ["a"]
    path.write_text('{"prompt": NaN}')
    refused("tldr", path, "a.jsonl:1: field prompt: must be a string that is not blank, not nan")


def test_marks_say_what_is_held_out(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    marks = [True, False, None, True, ""]
    rows = [row | {"held_out": mark} for row, mark in zip(ROWS, marks)] + ROWS[5:]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load("tldr", path)
    assert texts(task.eval) == [TEXTS[0], TEXTS[3]]
    assert texts(task.train) == TEXTS[1:3] + TEXTS[4:]
    other.write_text("\n".join(map(json.dumps, ROWS[:3])))
    task = load("tldr", other, eval_dataset=str(path))  # all rows of both
    assert texts(task.train) == TEXTS[:3] and sorted(texts(task.eval)) == TEXTS
    task = load("tldr", path, eval_dataset=str(other))  # marked rows are never trained on
    assert texts(task.train) == TEXTS[1:3] + TEXTS[4:] and texts(task.eval) == TEXTS[:3]
    task = envs.make("tldr", eval_dataset=str(other))
    assert len(task.train) == 1936 and texts(task.eval) == TEXTS[:3]
    path.write_text(json.dumps(ROWS[0] | {"held_out": True}))
    refused("tldr", path, "every row is held out")
    path.write_text(json.dumps(ROWS[0] | {"held_out": "maybe"}))
    refused("tldr", path, "a.jsonl:1: field held_out: must be true or false")


def test_few_rows_serve_for_both(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS[:4])))
    task = load("tldr", path)
    assert texts(task.train) == texts(task.eval) == TEXTS[:4]


# ---------------------------------------------------------------- options and a task of one's own
def test_options():
    task = envs.make("strbuild:feedback=score,sparse=80")
    expected = {"feedback": "score", "private": False, "sparse": 80.0}
    assert task.settings == expected and task.name == "strbuild"
    assert envs.make("tldr").settings == {"sparse": 0.0}
    settings = envs.make("housebuild:private,sparse=1e1").settings
    assert settings == {"feedback": "score", "private": True, "sparse": 10.0}


@pytest.mark.parametrize(
    "name, said",
    [
        ("chess", "choose one of tldr, arxiv, coding, strbuild, housebuild"),
        ("strbuild:feedback=nice", "feedback=nice must be one of position, score, perfect"),
        ("strbuild:feedback", "feedback= must be one of position, score, perfect"),
        ("tldr:feedback=score", "no option 'feedback', but sparse"),
        ("coding:private", "no option 'private', but sparse"),
        ("strbuild:private=1", "option private takes no value, not '1'"),
        ("tldr:sparse=101", "sparse=101 must be a number from 0 to 100"),
        ("tldr:sparse=nan", "sparse=nan must be a number from 0 to 100"),
        ("tldr:sparse=", "sparse= must be a number from 0 to 100"),
        ("tldr:sparse=1,,sparse=2", "no option ''"),
    ],
)
def test_options_that_are_none(name, said):
    with pytest.raises(envs.UserError, match=r"^--task") as error:
        envs.make(name)
    assert said in str(error.value) and "\n" not in str(error.value)


class Lengths(envs.Task):
    """Any number of agents write a given number of words together; some are told how many."""

    name = "lengths"
    options = envs.Task.options | {"private": False, "hint": ("none", "exact")}

    def items(self):
        items = [{"words": n} for n in range(20, 30)]
        return items[2:], items[:2]

    def parse(self, row):
        return {"words": int(row["words"])}

    def observe(self, item):
        told = "some" if self.settings["private"] else item["words"]
        return [f"Write a part of {told} words."] * self.num_agents

    def score(self, item, actions):
        words = len(" ".join(actions).split())
        reward = max(0.0, 1 - abs(words - item["words"]) / item["words"])
        return reward, {"score": 100 * reward, "success": float(reward >= self.success)}


@pytest.fixture
def lengths(monkeypatch):
    monkeypatch.setitem(envs.TASKS, "lengths", Lengths)


@pytest.mark.parametrize("num_agents", [1, 2, 3, 7])
def test_a_task_of_ones_own(lengths, num_agents):
    task = envs.make("lengths:private,hint=exact", num_agents=num_agents)
    assert task.settings == {"sparse": 0.0, "private": True, "hint": "exact"}
    assert task.observe(task.train[0]) == ["Write a part of some words."] * num_agents
    actions = ["a b c"] * num_agents
    assert task.score(task.train[0], actions)[0] == pytest.approx(3 * num_agents / 22)
    assert task.max_new_tokens == 128 * (1 + (num_agents == 1))
    assert envs.make("lengths").settings["private"] is False


def test_a_task_of_ones_own_is_checked(lengths, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": 5}\n{"number": 7}\n')
    refused("lengths", path, "a.jsonl:2: field 'words' is missing; the row has ['number']")
    path.write_text('{"words": "many"}')
    refused("lengths", path, "a.jsonl:1: invalid literal for int() with base 10: 'many'")
    monkeypatch.delattr(Lengths, "parse")
    refused("lengths", path, "a.jsonl:1: task lengths takes no data set")
    for name, said in (("lengths:private=1", "takes no value"), ("lengths:hint=x", "none, exact")):
        with pytest.raises(envs.UserError, match=said):
            envs.make(name)
    with pytest.raises(envs.UserError, match="--num-agents 0: lengths is for any number of agents"):
        envs.make("lengths", num_agents=0)
    with pytest.raises(envs.UserError, match="--num-turns 0"):
        envs.make("lengths", num_turns=0)


def test_sparse_rewards(lengths):
    items = [{"words": 4}] * 4
    actions = [["a", "b"], ["a b", "c"], ["a b", "c d"], [""] * 2]
    dense = [reward for reward, _ in envs.score_batch(envs.make("lengths"), items, actions)]
    assert dense == [0.5, 0.75, 1.0, 0.0]
    sparse = envs.score_batch(envs.make("lengths:sparse=75"), items, actions)
    assert [reward for reward, _ in sparse] == [0.0, 1.0, 1.0, 0.0]
    assert [info["score"] for _, info in sparse] == [50.0, 75.0, 100.0, 0.0]


# ---------------------------------------------------------------- docs
def test_rows_of_the_docs():
    sections = re.split(r"^## ", (ROOT / "docs" / "tasks.md").read_text(), flags=re.MULTILINE)
    tried = []
    for section in sections:
        names = re.findall(r"`(\w+)`", section.splitlines()[0])
        rows = re.findall(r"^```json\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        for row in map(json.loads, "".join(rows).splitlines()):
            name = next(name for name in names if name != "tldr" or "prompt" in row)
            task = envs.make(name)
            item = task.parse(row)
            task.score(item, task.observe(item))
            tried.append(name)
    assert tried == ["tldr", "arxiv", "coding", "strbuild", "housebuild", "housebuild"]
    fields = set().union(*(task.train[0] for task in map(envs.make, TASKS))) - {"place"}
    docs = "".join(sections)
    assert all(f"| `{field}`" in docs for field in fields)
    table = re.findall(r"^\| `(\w+)` \|.* (\d+) \+ (\d+) \|$", docs, re.MULTILINE)
    tasks = [envs.make(name) for name in TASKS]
    counts = [(task.name, str(len(task.train)), str(len(task.eval))) for task in tasks]
    assert table == counts
