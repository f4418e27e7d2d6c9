"""What README.md says, held against the repo."""

import re
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

import collm_cc
import collm_dc
import envs
import mc_baseline
import plot

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = {"collm_cc": collm_cc, "collm_dc": collm_dc, "mc_baseline": mc_baseline}  # SCRIPT is any


def test_set_up_is_two_commands_that_install_first():
    commands = re.findall(r"```bash\n(.*)\n```", README)
    assert len(commands) == 2
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && "
    assert commands[0] == set_up + "python collm_dc.py --task coding --seed 1"
    assert commands[1].startswith(set_up + "python -m pytest tests")
    assert "grep -m1 'pytest tests' README.md" in (ROOT / ".ci/run").read_text()


def command_lines():
    texts = [README, *((ROOT / f"{name}.py").read_text().split("\n# Shapes")[0] for name in SCRIPTS)]
    found = [re.findall(r"(collm_cc|collm_dc|mc_baseline|SCRIPT)\.py( --[^\n`|#]*)", text) for text in texts]
    return sorted({match for group in found for match in group})


@pytest.mark.parametrize(("name", "flags"), command_lines(), ids=" ".join)
def test_every_command_line_is_one_that_the_script_takes(name, flags):
    flags = flags.split()
    if "--help" in flags or "--resume" in flags:
        return
    assert envs.parse_args(SCRIPTS.get(name, collm_dc).Args, flags)


def test_settings_for_real_models_are_flags():
    (flags,) = re.findall(r"settings like the paper's: `([^`]*)`", README)
    args = envs.parse_args(collm_cc.Args, flags.split())
    assert (args.actor_lr, args.dtype) == (5e-6, "bfloat16")


def test_the_diff_shown_is_the_diff():
    (shown,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    run = subprocess.run(["diff", "collm_cc.py", "collm_dc.py"], cwd=ROOT, capture_output=True, text=True)
    assert shown == run.stdout
    hunks = re.findall(r"^\d[\dc,]*$", shown, re.MULTILINE)
    assert re.findall(r"^- `(\d[\dc,]*)`: ", README, re.MULTILINE) == hunks  # a sentence for each


def test_flags_and_metrics_named_in_the_readme_exist():
    code = "".join((ROOT / f"{name}.py").read_text() for name in [*SCRIPTS, "envs"])
    fields = {name for script in SCRIPTS.values() for name in script.Args.__dataclass_fields__}
    for flag in re.findall(r"--([a-z][a-z-]+)", README.split("## models/tiny")[0]):
        name = flag.removeprefix("no-").replace("-", "_")
        others = "help logdir dist durations script kills programs nproc-per-node no-deps runs results".split()
        assert name in fields or flag in others, flag
    for name in re.findall(r"`(?:losses|charts|time|eval)/(\w+)`", README):
        assert name in code or name == "NAME", name


def test_the_new_task_trains_and_its_agents_act_alone(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(# lengths\.py.*?)```", README, re.DOTALL)
    assert code.count("\n") < 40
    monkeypatch.setattr(envs, "TASKS", dict(envs.TASKS))
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "lengths"})
    flags = "--task lengths --num-envs 8 --total-env-steps 16 --eval-episodes 8 --eval-samples 1 --run-name a"
    collm_cc.main(envs.parse_args(collm_cc.Args, [*flags.split(), "--model", str(ROOT / "models/tiny")]))
    (code,) = re.findall(r"```python\n(from transformers.*?)```", README, re.DOTALL)
    exec(code.replace("NAME", "a"), {})
    assert "what agent 0 observes" in capsys.readouterr().out


@pytest.mark.parametrize("name", envs.TASKS)
def test_table_of_tasks(name):
    task = envs.make(name)
    (row,) = re.findall(rf"^\| `{name}` \|.*", README, re.MULTILINE)
    assert f"| {task.num_turns}" in row and f"{len(task.train)} + {len(task.eval)} " in row
    assert task.num_envs == (16 if name.endswith("build") else 64)  # as the text below the table has it
    assert task.max_new_tokens == {"arxiv": 384, "coding": 96}.get(name, 128)


@pytest.mark.parametrize("folder", ["results", "results/smollm2"])
def test_tables_are_those_of_the_committed_rows(folder):
    rows = plot.read_csv(ROOT / folder / "runs.csv")
    assert (ROOT / folder / "tables.md").read_text() == plot.tables(plot.group(rows))


def test_pictures_are_those_of_the_committed_data(tmp_path):
    pictures = ["results/learning_curves.png", "results/smollm2/learning_curves.png", "results/strbuild_team.png"]
    assert set(pictures) == set(re.findall(r"!\[.*?\]\((.*?)\)", README))
    for name in pictures[:2]:
        rows = plot.read_csv((ROOT / name).parent / "runs.csv")
        plot.draw_curves(plot.group(rows), tmp_path / name.replace("/", "_"))
    plot.main(plot.Args(action="render", run=ROOT / "results/strbuild_team", results=tmp_path))
    (tmp_path / "strbuild_team.png").rename(tmp_path / "results_strbuild_team.png")
    for name in pictures:
        shown, drawn = imread(ROOT / name), imread(tmp_path / name.replace("/", "_"))
        assert shown.shape == drawn.shape and abs(shown - drawn).mean() < 1e-3, name


def test_results_are_those_of_the_committed_rows():
    tables = (ROOT / "results/tables.md").read_text()
    shown = README.split("## Results")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?:tldr|arxiv|coding|strbuild|housebuild) \|.*", shown, re.MULTILINE)
    assert len(rows) >= 15
    for row in rows:
        assert row in tables, row


def test_variances_of_advantages_are_those_of_the_committed_rows():
    groups = plot.group(plot.read_csv(ROOT / "results/runs.csv"))
    head, _, *rows = re.search(r"^\| variance of advantages.*\n(?:\|.*\n)+", README, re.MULTILINE)[0].splitlines()
    methods = {"CC": "CoLLM-CC", "DC": "CoLLM-DC", "MC, `rloo`": "MAGRPO (baseline=rloo)", "MC, `mean`": "MAGRPO"}
    assert len(rows) == len(methods)
    for _, method, *cells, _ in (re.split(r" *\| *", row) for row in rows):
        for task, cell in zip(re.split(r" *\| *", head)[2:], cells, strict=False):
            values = [plot.number(row, "mean/losses/advantage_variance") for row in groups[task][methods[method]]]
            decimals = len(cell.split(" ")[0].split(".")[1])
            assert plot.spread(values, decimals) == cell, (method, task)
