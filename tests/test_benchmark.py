"""benchmark.sh with a stand-in for the scripts, and the arithmetic of benchmark_speed.py."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModel, AutoModelForCausalLM

import benchmark_speed
import collm_cc
import study

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, shutil, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Args:
    total_env_steps: int = 100

if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    run = Path("runs", flags["--run-name"])
    print("told:", *sys.argv[1:], "threads", os.environ.get("OMP_NUM_THREADS"))
    if run.name in os.environ.get("FAIL", "").split():
        sys.exit("no luck")
    if run.exists() != ("--resume" in flags):
        sys.exit("the folder is there, or is not")
    exp_name = Path(__file__).stem
    steps = int(flags.get("--total-env-steps", 100))
    args = asdict(Args(steps)) | {"exp_name": exp_name, "task": flags["--task"]}
    args["seed"] = int(flags["--seed"])
    run.mkdir(parents=True, exist_ok=True)
    time.sleep(float(os.environ.get("SLOW", 0)))
    (run / "args.json").write_text(json.dumps(args))
    shutil.copytree(f"logged/{steps}", run, dirs_exist_ok=True)
    (run / "checkpoint_000001.pt").write_text("")
"""

CLIMBING = """
import runpy, sys

runpy.run_path(sys.argv.pop(1) + ".py", run_name="__main__")
"""


@pytest.fixture
def project(tmp_path):
    for name in ("benchmark.sh", "plot.py", "study.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("collm_cc", "collm_dc", "mc_baseline"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    (tmp_path / "climbing.py").write_text(CLIMBING)
    for steps in (20, 100, 2048):  # what a stand-in logs that trains for so long
        with SummaryWriter(tmp_path / f"logged/{steps}") as writer:
            writer.add_scalar("eval/score", 10.0, 0)
            writer.add_scalar("eval/score", 50.0, steps)
    return tmp_path


def start(project, *words, **variables):
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"PYTHON": sys.executable} | variables
    sizes = ["SCRIPTS=collm_cc collm_dc", "TASKS=coding"]
    command = ["bash", str(project / "benchmark.sh"), *sizes, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def sweep(project, *words, **variables):
    process = start(project, *words, **variables)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows(project):
    return {row["run"]: row for row in csv.DictReader((project / "results/runs.csv").open())}


def test_sweep_reports_failures_skips_what_is_done_and_resumes(project):
    done, failed, half = "coding__collm_cc__1", "coding__collm_dc__1", "coding__collm_cc__2"
    first = sweep(project, "SEEDS=1 2", "JOBS=2", FAIL=failed)
    assert first.returncode == 1
    assert f"FAILED  {failed}" in first.stdout
    assert "no luck" in first.stdout  # the end of its log
    assert set(rows(project)) == {done, half, "coding__collm_dc__2"}  # the others went on
    row = rows(project)[done]
    assert (row["start/score"], row["end/score"], row["seed"]) == ("10.0", "50.0", "1")
    assert (
        row["command"]
        == f"{Path(sys.executable).name} collm_cc.py --task coding --seed 1 --run-name {done}"
    )
    assert "threads 1" in (project / f"runs/{done}.log").read_text()

    # A run that was killed after a checkpoint, and one that was killed before the first
    for file in (project / "runs" / half).glob("events*"):
        file.unlink()
    (project / "runs" / failed).mkdir()
    second = sweep(project, "SEEDS=1 2", "JOBS=1")
    assert second.returncode == 0, second.stdout + second.stderr
    words = [line.split()[:2] for line in second.stdout.splitlines()]
    assert ["skip", done] in words
    assert ["done", failed] in words
    assert f"--resume runs/{half}" in (project / f"runs/{half}.log").read_text()
    assert "--resume" not in (project / f"runs/{failed}.log").read_text()
    assert (
        "threads None" in (project / f"runs/{failed}.log").read_text()
    )  # alone, it may use all cores
    assert len(rows(project)) == 4
    assert (project / "results/learning_curves.png").exists()


@pytest.mark.skipif(not shutil.which("flock"), reason="two sweeps at once need flock")
def test_a_run_that_another_sweep_plays_is_left_alone(project):
    words = "SEEDS=1", "SCRIPTS=collm_cc", "JOBS=1"
    first = start(project, *words, SLOW="6")
    folder = project / "runs/coding__collm_cc__1"
    while not folder.exists() and first.poll() is None:
        time.sleep(0.05)
    second = sweep(project, *words)
    assert f"busy    {folder.name}" in second.stdout and "done" not in second.stdout
    out, err = first.communicate()
    assert first.returncode == 0 and f"done    {folder.name}" in out, out + err
    assert folder.with_suffix(".log").read_text().count("\n+ ") == 0
    assert len(rows(project)) == 1


def test_quick_and_other_flags_are_runs_of_their_own(project):
    run = sweep(project, "quick", "JOBS=2", "QUICK_STEPS=20", "ARGS=--num-agents 1")
    assert run.returncode == 0, run.stdout + run.stderr
    name = "coding__collm_cc__1__total-env-steps-20-num-agents-1"
    assert set(rows(project)) == {name, name.replace("_cc", "_dc")}
    assert "--total-env-steps 20 --num-agents 1" in rows(project)[name]["command"]


def test_options_of_a_task_are_in_the_name_of_its_runs(project):
    task = "strbuild:feedback=score,sparse=80"
    run = sweep(project, "SEEDS=1", "JOBS=1", "SCRIPTS=collm_cc", f"TASKS=coding {task}")
    assert run.returncode == 0, run.stdout + run.stderr
    found = {row["task"]: row["run"] for row in rows(project).values()}
    assert found == {"coding": "coding__collm_cc__1", task: f"{task}__collm_cc__1"}
    again = sweep(project, "SEEDS=1", "JOBS=1", "SCRIPTS=collm_cc", f"TASKS={task}")
    assert f"skip    {task}__collm_cc__1" in again.stdout


def test_a_study_is_what_study_py_lists(project):
    """Its part control, played by climbing.py: one fails, one was stopped, and both go on."""
    ours, _, failed, last = (study.run_name(study.CLIMBING, x, 2) for x in study.METHODS)
    other = project / "runs/coding__collm_cc__2__eval-every-5"
    for folder in (other, project / "runs" / ours):
        folder.mkdir(parents=True)
        (folder / "checkpoint_000001.pt").write_text("")
    words = "study", "PART=control", "SEEDS=2", "JOBS=2"
    first = sweep(project, *words, FAIL=failed)
    assert first.returncode == 1
    assert f"FAILED  {failed}" in first.stdout
    assert len(rows(project)) == 3  # the others went on
    assert f"--resume runs/{ours}" in (project / f"runs/{ours}.log").read_text()
    row = rows(project)[last]
    flags = "--baseline rloo --total-env-steps 2048 --eval-every 3"
    command = f"climbing.py mc_baseline --task climbing --seed 2 --run-name {last} {flags}"
    assert row["command"] == f"{Path(sys.executable).name} {command}"
    assert row["env_steps"] == "2048"
    # Only what has finished, and is the study's, loses its checkpoints
    assert [path.parent for path in project.glob("runs/*/*.pt")] == [other]

    second = sweep(project, *words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"done    {failed}" in second.stdout
    assert second.stdout.count("skip    ") == 3
    found = study.find(list(rows(project).values()))  # names are those that the tables look for
    assert {name: len(x) for name, x in found[study.CLIMBING].items()} == dict.fromkeys(
        study.METHODS, 1
    )
    assert (project / "results/study_control.png").exists()
    assert not (project / "results/learning_curves.png").exists()


def test_a_study_goes_on_where_another_machine_left_it(project):
    """Rows are committed, run folders are not; a sweep, which anyone may want to see, is played."""
    words = "PART=control", "SEEDS=2", "JOBS=2"
    assert sweep(project, "study", *words).returncode == 0
    before = rows(project)
    assert sweep(project, "SEEDS=1", "JOBS=1", "TASKS=tldr").returncode == 0
    shutil.rmtree(project / "runs")
    again = sweep(project, "study", *words)
    assert again.stdout.count("skip    ") == 4 and "start " not in again.stdout
    assert rows(project).items() >= before.items()
    anew = sweep(project, "SEEDS=1", "JOBS=1", "TASKS=tldr")
    assert anew.stdout.count("done    ") == 2


def test_a_wrong_part_is_told(project):
    run = sweep(project, "study", "PART=mian")
    assert run.returncode != 0 and "mian" in run.stderr + run.stdout
    assert not list(project.glob("runs/*"))


def test_padding_is_what_need_not_be_computed(monkeypatch):
    """On models/tiny the tokens of one iteration are few: nearly all of them are needed."""
    monkeypatch.setattr(benchmark_speed, "matmul_rate", lambda: 1e11)
    spec = {
        "side": "ours",
        "script": "collm_cc",
        "agents": 2,
        "task": "tldr",
        "episodes": 4,
        "iterations": 1,
        "model": "models/tiny",
        "threads": 1,
    }
    assert 0 <= benchmark_speed.ours(spec)["padding"] < 0.2


def test_help_and_a_wrong_word(project):
    assert "usage: bash benchmark.sh" in sweep(project, "--help").stdout
    wrong = sweep(project, "swepe")
    assert wrong.returncode == 2
    assert "usage" in wrong.stderr


def test_needed_flops_against_a_count_by_hand():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny")
    config = model.config
    d, ff, layers, vocab = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    weights = layers * (4 * d * d + 3 * d * ff + 2 * d) + d
    expected = 6 * weights * (5 + 7) + 6 * layers * d * (25 + 49) + 6 * vocab * d * 4
    assert benchmark_speed.needed_flops(model, [(0, 5), (0, 3), (3, 7)], 4) == expected
    body = AutoModel.from_pretrained(ROOT / "models/tiny")
    assert benchmark_speed.needed_flops(body, [(0, 5), (0, 7)], 0) == expected - 6 * vocab * d * 4


def test_needed_spans_count_what_histories_share_once():
    tokens, turns = (
        [[1, 2, 3, 8, 9], [1, 2, 3, 7], [4, 2, 3, 8]],
        [[-1, -1, -1, 0, 0], [-1, -1, -1, 0], [-1, -1, -1, 0]],
    )
    assert sorted(benchmark_speed.needed_spans(tokens, turns)) == [
        (0, 2),
        (0, 2),
        (2, 4),
        (2, 4),
        (2, 5),
    ]


def test_copied_model_speaks_plain_text_and_never_ends(tmp_path):
    from transformers import AutoTokenizer

    folder = benchmark_speed.copy_model(ROOT / "models/tiny", tmp_path / "model")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert not tokenizer.chat_template
    stops = model.generation_config.suppress_tokens
    assert {model.config.eos_token_id, model.config.pad_token_id} <= set(stops)
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer("def aux(x):\n    return x\n")["input_ids"] * 2] * 4)
    out = model.generate(ids, max_new_tokens=24, do_sample=True)
    assert out.shape == (4, ids.shape[1] + 24)
    assert not torch.isin(out[:, ids.shape[1] :], torch.tensor(stops)).any()


@pytest.mark.parametrize(
    ("script", "turns"), [("collm_cc", 2), ("collm_dc", 1), ("mc_baseline", 1)]
)
def test_our_side_plays_exactly_the_work_it_is_given(tmp_path, monkeypatch, script, turns):
    monkeypatch.setattr(benchmark_speed, "matmul_rate", lambda: 1e11)  # takes seconds
    spec = {
        "side": "ours",
        "script": script,
        "agents": 2,
        "turns": turns,
        "episodes": 4,
        "iterations": 1,
        "model": benchmark_speed.copy_model(ROOT / "models/tiny", tmp_path / "model"),
        "max_new_tokens": 5,
        "prompts": [["say it", "say it at length"]] * 4,
        "threads": 1,
    }
    out = benchmark_speed.ours(spec)
    assert (out["steps"], out["tokens"]) == (4 * turns, 4 * turns * 2 * 5)
    assert out["utilisation"] > 0


def test_both_sides_use_the_same_prompts(monkeypatch):
    """Each prompt of a comparison is played once by either side: none is left over for one."""
    seen = []

    def measure(spec, python=None):
        seen.append(spec)
        return {
            "rollout": [1.0],
            "update": [1.0],
            "steps": 1,
            "tokens": 1,
            "memory": 1.0,
            "utilisation": 1.0,
        }

    monkeypatch.setattr(benchmark_speed, "measure", measure)
    prompts = benchmark_speed.make_prompts(128)
    base = {"prompts": prompts, "iterations": 2}
    rows = list(benchmark_speed.compare(base, benchmark_speed.Args(comlrl="a", trl="b", repeats=1)))
    assert [row[1] for row in rows] == ["comlrl"] * 5 + ["trl"]
    assert len(seen) == 12
    for spec in seen:
        group = 4 if spec["script"] == "mc_baseline" else 1
        pool = [{"prompts": x} for x in spec["prompts"]]
        num_items = spec["episodes"] // group
        played = [x for k in range(2) for x in collm_cc.draw_items(pool, num_items, 1, k)]
        assert sorted(x["prompts"] for x in played) == sorted(prompts[: len(played)])


def test_a_table_is_printed_row_by_row(capsys):
    def rows():
        yield ["one", 1.2345]
        raise SystemExit("the second failed")

    with pytest.raises(SystemExit):
        benchmark_speed.table(["name", "value"], rows())
    assert capsys.readouterr().out == "| name | value |\n| --- | --- |\n| one | 1.23 |\n"


def test_a_worker_takes_more_than_an_argument_holds(tmp_path):
    spec = {
        "side": "ours",
        "script": "collm_dc",
        "agents": 1,
        "turns": 1,
        "episodes": 1,
        "iterations": 1,
        "threads": 1,
        "model": benchmark_speed.copy_model(ROOT / "models/tiny", tmp_path / "model"),
        "max_new_tokens": 2,
        "prompts": [["say it"], ["never played " * 20000]],
    }
    spec["prompts"][1] = [
        *spec["prompts"][0],
        *spec["prompts"][1],
    ]  # an agent that is not there reads it
    assert benchmark_speed.measure(spec)["tokens"] == 2
