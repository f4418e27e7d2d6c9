"""The commands of docs/paper.md: parsed, held against the paper's settings, and played for an
iteration on a random model of their family."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import families
import pytest

import envs
import plot

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/paper.md").read_text()
COMMANDS = {}
for words in map(shlex.split, re.findall(r"^python collm_cc\.py (.*)$", PAGE, re.MULTILINE)):
    COMMANDS[words[words.index("--task") + 1]] = words
ROWS = {"CoLLM-CC": ["collm_cc.py"]}
for name, cell in re.findall(r"^\| (.*) \| (`.*py`.*) \|$", PAGE, re.MULTILINE):
    ROWS[name] = re.findall(r"`(.*?)`", cell)
# task: turns, rate of the agents, temperature (section 5 and the authors' configurations)
PAPER = {
    "tldr": (1, 5e-6, 0.7),
    "arxiv": (1, 5e-6, 0.7),
    "coding": (2, 5e-6, 0.6),
    "strbuild": (4, 2.5e-6, 0.6),
    "housebuild": (4, 5e-6, 0.6),
}
FAMILIES = {"Qwen/Qwen3": "qwen3", "Qwen/Qwen2.5": "qwen2"}
SHORT = {"--total-env-steps": "4", "--max-new-tokens": "4", "--eval-episodes": "1"}
SHORT |= {"--save-every": "0", "--device": "cpu", "--run-name": "a"}


def command(row, task):
    """(script, its flags as {flag: value}) of a cell of the table."""
    script, *changes = ROWS[row]
    words = COMMANDS[task]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    if "--critic-lr" in changes:
        del flags["--critic-lr"]
    if "--num-agents 1" in changes:
        flags["--num-agents"] = "1"
    if "--total-env-steps 8800" in changes and task in ("tldr", "arxiv"):
        flags["--total-env-steps"] = "8800"
    return import_module(script.removesuffix(".py")), flags


def parse(script, flags):
    return script.parse_args(script.Args, [word for pair in flags.items() for word in pair])


def test_all_rows_and_tasks_are_there():
    assert list(COMMANDS) == list(PAPER)
    assert list(ROWS) == ["CoLLM-CC", "CoLLM-DC", "MAGRPO", "AC, one agent", "GRPO, one agent"]


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("row", ROWS)
def test_settings_are_the_papers(row, task):
    args = parse(*command(row, task))
    turns, rate, temperature = PAPER[task]
    team = envs.make(args.task, args.num_agents, args.num_turns)
    assert team.num_turns == turns
    assert team.num_agents == (1 if "one agent" in row else 2)
    assert (args.actor_lr, args.temperature, args.gamma) == ([rate], [temperature], 0.9)
    assert args.dtype == "bfloat16"
    if row not in ("MAGRPO", "GRPO, one agent"):
        assert (args.vf_coef, args.gae_lambda, args.critic_type) == (0.6, 0.0, "v")


CELLS = [("CoLLM-CC", task) for task in PAPER]
CELLS += [(row, "coding") for row in ROWS if row != "CoLLM-CC"]


@pytest.mark.parametrize(("row", "task"), CELLS)
def test_an_iteration_on_a_random_model(row, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, flags = command(row, task)
    (family,) = (FAMILIES[start] for start in FAMILIES if flags["--model"].startswith(start))
    flags.pop("--dataset", None)
    flags.pop("--eval-dataset", None)
    model = families.make_model(tmp_path / "model", family, max_position_embeddings=8192)
    script.main(parse(script, {**flags, **SHORT, "--model": model}))
    assert plot.read_run(tmp_path / "runs/a").scalars["losses/policy_loss"]
