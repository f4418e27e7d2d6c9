# ruff: noqa: E501 (programs are data)
"""python tests/soak_sandbox.py --programs 100000: many sandboxed programs leave nothing behind.

One in ten is hostile. Prints programs per second and, before and after, the processes,
descriptors, temporary files and memory in use; exit code 1 if one of them has grown or a program
got a wrong verdict. Linux only.
"""

import argparse
import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sandbox

PROBLEM = {
    "prompt": "",
    "entry_point": "f",
    "test": "def check(g):\n    assert g(2) == 3\n    assert g(4) == 5",
}
HONEST = ("def f(x): return x + 1", 2, 5)
ATTACKS = [  # (program, tests passed, seconds for a call)
    ("import os\ndef f(x): os._exit(0)", 0, 2),
    (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\ndef f(x): return x + 1",
        2,
        5,
    ),
    (
        "import os\nfor _ in 1, 2, 3:\n    os.fork()\n    os.setpgid(0, 0)\nwhile True: pass",
        0,
        0.05,
    ),
    ("import ctypes\ndef f(x): return ctypes.string_at(0)", 0, 2),
    ("def f(x): return 'x' * 10**7", 0, 2),
    (
        "import os\nfor _ in range(50):\n    os.mkdir('d')\n    os.chdir('d')\ndef f(x): return x + 1",
        2,
        5,
    ),
    (
        "for d in ('/tmp', '/dev/shm', '/var/tmp'):\n    with open(f'{d}/soak', 'w') as h: h.write('a')",
        0,
        2,
    ),
    (
        "def f(x):\n    while True:\n        try: bytearray(1 << 30)\n        except BaseException: pass",
        0,
        0.05,
    ),
    ("import os\nall(os.open('a', 65) for _ in range(999))", 0, 2),
    ("class E:\n    __eq__ = lambda *_: True\ndef f(x): return E()", 0, 2),
]


def family(pid):
    """The process and all that descend from it."""
    pids = [pid]
    for parent in pids:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                pids += map(int, path.read_text().split())
    return pids


def usage():
    """What the sandbox holds now: (amount, by how much it may vary when nothing leaks)."""
    pids, orphans = family(os.getpid()), 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            orphans += parent == "1" and b"class Worker:" in (folder / "cmdline").read_bytes()
    memory = [
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) / 256 for pid in pids
    ]  # pages of 4 KB
    return {
        "processes": (len(pids) + orphans, 0),
        "descriptors of the parent": (len(os.listdir("/proc/self/fd")), 0),
        "temporary files": (
            sum(os.path.exists(f"{d}/soak") for d in ("/tmp", "/dev/shm", "/var/tmp")),
            0,
        ),
        "MB of the parent": (memory[0], 16),
        "MB of the zygotes": (sum(memory[1:]), 4),
    }


def run(index):
    """Whether program `index` has the verdict that it deserves."""
    program, passed, seconds = ATTACKS[index // 10 % len(ATTACKS)] if index % 10 == 0 else HONEST
    return sandbox.run_tests(PROBLEM, "", program, seconds, 10.0)["passed"] == passed


def soak(programs):
    """(programs a second, wrong verdicts, {what: (before, after, allowed growth)})."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(run, range(200)))  # the workers start, and all that is imported late
        before, begin, wrong = usage(), time.monotonic(), 0
        for start in range(0, programs, 1000):  # a map takes all its arguments at once
            wrong += list(threads.map(run, range(start, min(start + 1000, programs)))).count(False)
        speed = programs / (time.monotonic() - begin)
        return (
            speed,
            wrong,
            {what: (before[what][0], after, slack) for what, (after, slack) in usage().items()},
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].split("\n")[0])
    parser.add_argument(
        "--programs", type=int, default=100_000, help="to run, after 200 to warm up"
    )
    speed, wrong, figures = soak(parser.parse_args().programs)
    print(f"{speed:.0f} programs a second, {wrong} wrong verdicts")
    for what, (before, after, slack) in figures.items():
        print(f"{what:26}{before:9.1f} -> {after:9.1f}{'  GROWN' * (after > before + slack)}")
    sys.exit(wrong > 0 or any(after > before + slack for before, after, slack in figures.values()))
