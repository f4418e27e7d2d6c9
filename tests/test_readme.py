"""What README.md and docs/ say, held against the repo."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import explainable
import gradient_variance
import pytest
import texts
import tyro
from matplotlib.image import imread

import envs
import plot
import study

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT): path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
PAGES = {Path("README.md"): README} | PAGES
SCRIPTS = ["collm_cc", "collm_dc", "mc_baseline"]
TASKS = ["tldr", "arxiv", "coding", "strbuild", "housebuild"]
TINY = "--num-envs 4 --total-env-steps 4 --eval-episodes 4 --save-every 0 --max-new-tokens 4"


def section(text, title):
    """The text below a heading, up to the next one of the same level."""
    (level, body) = re.search(rf"^(#+) {title}\n(.*)", text, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^{level} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def run_script(name, flags):
    """Train with a script of this repo, in this process."""
    script = import_module(name)
    script.main(script.parse_args(script.Args, [*flags.split(), "--device", "cpu"]))


# ======================================= form ========================================
def test_one_page():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.split()) <= 1600
    assert any(line.startswith("python3 -m venv") for line in lines[:20])
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    order = ["Start", "Results", "How to read", "Tasks", "Your own", "Files", "What differs"]
    assert headings == [*order, "Licence and citing"]


def test_set_up_is_two_commands_that_install_first():
    commands = re.findall(r"```bash\n(.*)\n```", README)
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt"
    assert len(commands) == 2
    assert commands[0] == f"{set_up} && python collm_dc.py --task coding --seed 1"
    assert commands[1].startswith(f"{set_up} && python -m pytest tests")
    assert "grep -m1 'pytest tests' README.md" in (ROOT / ".ci/run").read_text()


def anchors(text):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    """[(page, target)] of all links but those to the web, and of the first lines of files."""
    found = []
    for page, text in PAGES.items():
        found += [(page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        targets = re.findall(r"^# docs: (\S+)$", path.read_text(), re.MULTILINE)
        found += [(path.relative_to(ROOT), target) for target in targets]
    return sorted({(str(page), x) for page, x in found if not x.startswith("http")})


@pytest.mark.parametrize(("page", "target"), links())
def test_every_link_leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    assert not anchor or anchor in anchors(file.read_text())


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        assert page == Path("README.md") or f"]({page}" in README, page


def test_every_file_named_is_there():
    (tree,) = re.findall(r"```\n(.*?)```", section(README, "Files"), re.DOTALL)
    named = [name for line in tree.splitlines() for name in line.split("  ")[0].split()]
    for name in named:
        assert (ROOT / name).exists(), name
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        assert path.name in named
    made = ["results/runs.csv", "results/tables.md", "results/learning_curves.png"]
    made += [f"results/study_{part}.png" for part in (*study.PARTS, "critics", "comparisons")]
    folders = "docs|tests|data|models|results"
    for name in re.findall(rf"`((?:{folders})/[\w./]*)`", "".join(PAGES.values())):
        assert name in made or "NAME" in name or (ROOT / name).exists(), name


# ============================================ commands ============================================
def command_lines():
    """(script, flags) of all command lines in README, docs and the heads of the scripts."""
    pages = dict(PAGES)
    for name in SCRIPTS:
        pages[Path(f"{name}.py")] = (ROOT / f"{name}.py").read_text().split("\n# Shapes")[0]
    found = set()
    for path, text in pages.items():
        for name, flags in re.findall(r"\b(\w+)\.py( --[^\n`|#)]*)", text):
            if name == "SCRIPT":
                name = path.stem if path.stem in SCRIPTS else "collm_cc"
            flags = re.sub(r" with .*", "", flags).strip()
            if name in SCRIPTS and "--help" not in flags and "--resume" not in flags:
                found.add((name, flags))
    return sorted(found)


@pytest.mark.parametrize(("name", "flags"), command_lines(), ids=" ".join)
def test_every_command_line_is_one_that_the_script_takes(name, flags):
    script = import_module(name)
    args = script.parse_args(script.Args, shlex.split(flags))
    assert envs.make(args.task, args.num_agents, args.num_turns)


def test_options_of_tasks_that_are_named_exist():
    text = "".join(PAGES.values())
    named = set(re.findall(rf"\b(?:{'|'.join(TASKS)}):[a-z]+=[\w=,.]+", text))
    assert "strbuild:feedback=score,sparse=80" in named
    for name in named:
        assert envs.make(name), name


def test_words_of_benchmark_are_those_of_its_help():
    script = ROOT / "benchmark.sh"
    told = subprocess.run(["bash", script, "--help"], capture_output=True, text=True).stdout
    for line in re.findall(r"bash benchmark\.sh([^`\n]*)", "".join(PAGES.values())):
        for word in shlex.split(line):
            name = word.partition("=")[0]
            assert name in ("quick", "study", "speed", "--help") or f"  {name} " in told, line


def test_commands_of_helpers_are_ones_that_they_take():
    text = "".join(PAGES.values())
    for flags in re.findall(r"explainable\.py( --[^`]*)`", text):
        assert tyro.cli(explainable.Args, args=shlex.split(flags))
    for flags in re.findall(r"gradient_variance\.py( --[^`]*)`", text):
        assert tyro.cli(gradient_variance.Args, args=shlex.split(flags))
    for flags in re.findall(r"texts\.py( --[^`]*)`", text):
        assert tyro.cli(texts.Args, args=shlex.split(flags))
    for words in re.findall(r"python study\.py([^`]*)`", text):
        assert tyro.cli(study.Args, args=shlex.split(words))
    for words in re.findall(r"python plot\.py([^`\n]*)[`\n]", text):
        assert tyro.cli(plot.Args, args=shlex.split(words))


def test_flags_that_are_named_exist():
    fields = set()
    for name in SCRIPTS:
        fields |= set(import_module(name).Args.__dataclass_fields__)
    others = "help logdir dist durations nproc-per-node shutdown-timeout"
    others += " fit batches script kills programs no-deps report items samples base"
    for page, text in PAGES.items():
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text):
            name = flag.removeprefix("no-").replace("-", "_")
            assert name in fields or flag in others.split(), (page, flag)


# ============================================ reading =============================================
def names_of(script):
    """Names of functions, classes and methods (Class.method) of a script."""
    names = set()
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [x.name for x in node.body if isinstance(x, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
    return names


def test_names_in_how_to_read_exist():
    text = section(README, "How to read")
    rows = re.findall(r"^\| .* \| (`.*`) \|$", text, re.MULTILINE)
    assert len(rows) >= 12
    for row in rows:
        for name in re.findall(r"`([\w.]+)`", row):
            assert name in names_of("collm_cc"), name
    prose = set(re.findall(r"`([A-Za-z_]+)`", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)))
    for name in prose:
        assert name in names_of("collm_cc") | names_of("mc_baseline"), name


def test_the_diff_shown_is_the_diff():
    """All of it but for the docstring, and the hunk's place, which says nothing."""
    (shown,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    command = ["diff", "collm_cc.py", "collm_dc.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    hunks = re.findall(r"^([\d,]+)[acd][\d,]+\n((?:[<>-].*\n)+)", out, re.MULTILINE)
    head = (ROOT / "collm_cc.py").read_text().split("\n# Shapes")[0].count("\n")
    code = [text for place, text in hunks if int(place.split(",")[0]) > head]
    assert code == [shown]


# ============================================ metrics =============================================
def documented(where):
    """Names in the first column of the tables of docs/metrics.md, or those of a task."""
    text = (ROOT / "docs/metrics.md").read_text()
    names = set()
    for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        cells = row.split(" | ")
        if where == "once" and len(cells) == 2:
            names |= set(re.findall(r"`([^`]+)`", cells[0]))
        if len(cells) == 3 and (cells[0] == "all" or where in cells[0].split(", ")):
            names |= set(re.findall(r"`([^`]+)`", cells[1]))
    return names


@pytest.mark.parametrize("name", TASKS)
def test_metrics_of_tasks_are_those_of_the_page(name):
    task = envs.make(name)
    item = task.train[0]
    _, info = task.score(item, ["nothing"] * task.num_agents)
    numbers = {key for key, value in info.items() if isinstance(value, (int, float))}
    assert documented(name) - {"pass@2", "pass@3", "pass@4"} == numbers


@pytest.mark.parametrize("name", ["collm_dc", "mc_baseline"])
def test_what_is_logged_is_on_the_page(elsewhere, name):
    run_script(name, f"--task coding --run-name a {TINY}")
    run = plot.read_run(elsewhere / "runs/a")
    tags = {re.sub(r"/(agent|turn)_\d+$", "", tag) for tag in run.scalars}
    page = {tag for tag in documented("once") if "/" in tag}
    task = documented("coding")
    known = page | {f"{kind}/{metric}" for kind in ("charts", "eval") for metric in task}
    known -= {"charts/pass@2", "charts/pass@3", "charts/pass@4"}
    if name == "mc_baseline":
        known -= {"losses/value_loss"}
    assert tags == known - {"episodes/{k}"}
    assert {"hyperparameters", "episodes/0"} <= set(run.texts)
    per_agent = {tag.removesuffix("/agent_1") for tag in run.scalars if tag.endswith("/agent_1")}
    assert per_agent == {tag for tag in tags if tag.startswith("losses/")} | {
        "charts/response_length",
        "charts/eos_rate",
    }


# ========================================= tasks, results =========================================
@pytest.mark.parametrize("name", TASKS)
def test_table_of_tasks(name):
    task = envs.make(name)
    (row,) = re.findall(rf"^\| `{name}` \|.*", README, re.MULTILINE)
    assert f"| {task.num_turns} |" in row
    assert f"| {len(task.train)} + {len(task.eval)} |" in row


def python_block(text, first_line):
    """The code block that begins with this line."""
    (code,) = re.findall(rf"```python\n({re.escape(first_line)}\n.*?)```", text, re.DOTALL)
    return code


def test_the_new_task_trains_three_agents_that_act_alone(elsewhere, monkeypatch, capsys):
    code = python_block(README, "# lengths.py")
    assert code.count("\n") <= 32
    monkeypatch.setattr(envs, "TASKS", dict(envs.TASKS))
    exec(code, {"__name__": "lengths"})
    run_script("collm_cc", f"--task lengths --num-agents 3 --run-name a {TINY}")
    alone = python_block(README, "from transformers import AutoModelForCausalLM, AutoTokenizer")
    exec(alone.replace("NAME", "a"), {})
    assert "what agent 0 observes" in capsys.readouterr().out
    assert (elsewhere / "runs/a/agent_2/model.safetensors").exists()


def test_a_task_without_envs(elsewhere):
    """The module of docs/own_task.md, beside a copied script and nothing else."""
    page = (ROOT / "docs/own_task.md").read_text()
    (elsewhere / "my_task.py").write_text(python_block(page, "# my_task.py"))
    shutil.copy(ROOT / "collm_dc.py", elsewhere)
    (commands,) = re.findall(r"```\n(sed .*?)```", page, re.DOTALL)
    copy, train = commands.splitlines()
    subprocess.run(copy, shell=True, cwd=elsewhere, check=True)
    (elsewhere / "collm_dc.py").unlink()
    words = [sys.executable, *train.split()[1:], "--run-name", "a", "--device", "cpu"]
    run = subprocess.run([*words, *TINY.split()], cwd=elsewhere, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    trained = plot.read_run(elsewhere / "runs/a")
    assert trained.args["exp_name"] == "my_dc"
    assert {"charts/total", "losses/value_loss/agent_2"} <= set(trained.scalars)


def test_the_tour(tmp_path):
    """Its commands and its program, one after the other, as a user runs them: on a copy, in
    processes of their own, but with a shorter training."""
    page = (ROOT / "docs/tour.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    code = [line for _, block in blocks for line in block.splitlines() if line]
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python"]
    assert len(code) <= 24
    for name in (
        "collm_dc.py",
        "envs.py",
        "voxels.py",
        "sandbox.py",
        "plot.py",
        "study.py",
        "climbing.py",
    ):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "OMP_NUM_THREADS": "1"}
    for kind, block in blocks:
        block = block.replace("--run-name tour", f"--run-name tour --device cpu {TINY}")
        words = ["bash", "-ec", block] if kind == "bash" else ["python", "-c", block]
        run = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        if "collm_dc.py" in block:
            for shown in ("held-out at step 0: ", "SPS=", "return="):
                assert shown in run.stderr
    assert {"tour.png", "learning_curves.png"} <= {x.name for x in tmp_path.glob("results/*")}
    assert run.stdout.startswith("turn 0: reward ")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_blocks_are_python(page):
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        ast.parse(code)


def test_table_of_results_is_that_of_the_committed_rows():
    rows = plot.read_csv(ROOT / "results/runs.csv")
    between = r"<!-- results: [^\n]* -->\n(.*?)<!-- end of results -->"
    (shown,) = re.findall(between, README, re.DOTALL)
    lines = plot.readme_table(rows)
    assert shown.split("\n")[:-1] == lines or shown.strip() == "\n".join(lines)
    if rows:
        assert (ROOT / "results/tables.md").read_text() == plot.tables(rows)


def test_the_picture_is_that_of_the_committed_run(tmp_path):
    assert re.findall(r"!\[.*?\]\((.*?)\)", README) == ["results/strbuild_team.png"]
    run = ROOT / "results/strbuild_team"
    plot.main(plot.Args(action="render", run=run, results=tmp_path))
    shown, drawn = (imread(x / "strbuild_team.png") for x in (ROOT / "results", tmp_path))
    assert shown.shape == drawn.shape
    assert abs(shown - drawn).mean() < 1e-3
