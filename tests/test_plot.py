"""plot.py on hand-made runs with known numbers."""

import csv
import json
import os
from dataclasses import asdict
from importlib import import_module

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import envs
import plot

HOUSE = """    === turn 0, agent 0 is told
    say === reward 9.000
    and | this
    === reward 0.750
    BB|B.  B.|B.
    BB|BB  BB|..

    B bricks"""


def make_run(
    folder,
    name,
    script="collm_cc",
    scores=((0, 20.0), (64, 40.0), (128, 80.0)),
    purge=None,
    **changes,
):
    """A run folder; events are 10 s apart."""
    args = asdict(import_module(script).Args())
    task = envs.TASKS[changes.get("task", "coding").partition(":")[0]]
    filled = {"num_envs": task.num_envs, "num_turns": task.num_turns}  # as main fills them in
    args |= filled | {"total_env_steps": 128} | changes
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "args.json").write_text(json.dumps(args))
    writer = SummaryWriter(path, purge_step=purge, filename_suffix=f".{len(list(path.iterdir()))}")
    first = next(path.glob("events*")).stat().st_mtime
    for k, (step, score) in enumerate(scores):
        now = first + 10 * k
        writer.add_scalar("eval/score", score, step, now)
        writer.add_scalar("eval/score/turn_0", score / 2, step, now)
        writer.add_scalar("eval/pass@1", score / 100, step, now)
        if k:
            writer.add_scalar("losses/explained_variance", 0.25 * k, step, now)
            writer.add_scalar("charts/peak_memory_gb", 1.0 + k, step, now)
            writer.add_scalar("charts/tokens_per_second", 100.0, step, now)
            writer.add_scalar("time/rollout", 2.0, step, now)
            writer.add_scalar("time/update", 3.0, step, now)
        writer.add_text("episodes/0", HOUSE, step, now)
    writer.close()
    return path


def test_run_is_read_as_written(tmp_path):
    run = plot.read_run(make_run(tmp_path, "a"))
    steps, values = run.curve("eval/score")
    assert steps.tolist() == [0, 64, 128]
    assert values.tolist() == [20, 40, 80]
    assert run.ends("eval/pass@1") == pytest.approx((0.2, 0.8))
    assert np.isnan(run.ends("eval/iou")).all()
    assert run.texts["episodes/0"] == HOUSE
    assert run.wall == pytest.approx(20, abs=0.5)
    assert run.metric == "eval/score"
    assert plot.peak_memory(run) == 3.0


def test_resumed_run_drops_what_was_done_again_and_the_pause(tmp_path):
    make_run(tmp_path, "a", scores=((0, 20.0), (64, 40.0), (100, 99.0)))
    first = next((tmp_path / "a").glob("events*"))
    first.rename(first.with_name("events.out.tfevents.1"))
    make_run(tmp_path, "a", scores=((96, 50.0), (128, 80.0)), purge=65)
    run = plot.read_run(tmp_path / "a")
    assert run.scalars["eval/score"] == {0: 20.0, 64: 40.0, 96: 50.0, 128: 80.0}
    assert run.wall == pytest.approx(30, abs=0.5)
    assert run.finished


def test_finished_means_evaluated_at_the_end_and_saved_after_it(tmp_path):
    assert not plot.read_run(make_run(tmp_path, "short", total_env_steps=129)).finished
    path = make_run(tmp_path, "saved")
    assert plot.read_run(path).finished
    last = plot.read_run(path).last
    for age, expected in ((-5, False), (5, True)):
        (path / "checkpoint_000002.pt").write_text("")
        os.utime(path / "checkpoint_000002.pt", (last + age, last + age))
        assert plot.read_run(path).finished is expected
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text((path / "args.json").read_text())
    assert not plot.read_run(tmp_path / "begun").finished


def test_runs_are_pooled_over_seeds_and_nothing_else(tmp_path):
    same = {"seed": 2, "run_name": "x", "resume": "runs/x", "device": "cpu"}
    same |= {"microbatch_tokens": 1, "gradient_checkpointing": True}
    others = [{"num_agents": 1}, {"num_turns": 1}, {"actor_lr": [1e-3, 0.0]}, {"task": "tldr"}]
    others += [{"exp_name": "mine"}, {"num_agents": 3}, {"task": "strbuild:sparse=80"}]
    for k, changes in enumerate([{}, same, *others]):
        make_run(tmp_path, f"run{k}", **changes)
    make_run(tmp_path, "dc", "collm_dc")
    groups = plot.group([plot.csv_row(run) for run in plot.read_runs(tmp_path)])
    sizes = {name: len(runs) for name, runs in groups["coding"].items()}
    mine = [
        name for name in sizes if name.startswith("mine (")
    ]  # not a script of this folder: all its arguments show
    assert len(mine) == 1
    assert sizes == {
        "CoLLM-CC (total_env_steps=128)": 2,
        "CoLLM-DC (total_env_steps=128)": 1,
        "AC (CC) (total_env_steps=128)": 1,
        "CoLLM-CC (num_turns=1 total_env_steps=128)": 1,
        "CoLLM-CC (actor_lr=0.001 0.0 total_env_steps=128)": 1,
        "CoLLM-CC (num_agents=3 total_env_steps=128)": 1,
        mine[0]: 1,
    }
    assert list(groups["tldr"]) == ["CoLLM-CC (total_env_steps=128)"]
    assert list(groups["strbuild:sparse=80"]) == ["CoLLM-CC (total_env_steps=128)"]


def test_mean_curve_interpolates_seeds_over_the_steps_they_share():
    curves = [
        (np.array([0.0, 100]), np.array([0.0, 100])),
        (np.array([0.0, 50, 120]), np.array([20.0, 70, 140])),
    ]
    grid, middle, low, high = plot.mean_curve(curves, points=3)
    assert grid.tolist() == [0, 50, 100]
    assert middle == pytest.approx([10, 60, 110])
    assert low == pytest.approx([0, 50, 100])
    assert high == pytest.approx([20, 70, 120])


def test_mean_curve_is_an_interquartile_mean():
    curves = [(np.array([0.0, 100]), np.array([0.0, end])) for end in (10, 20, 40, 900)]
    grid, middle, _, _ = plot.mean_curve(curves)
    assert len(grid) == 11  # ten equal steps
    assert middle == pytest.approx(np.linspace(0, 30, 11))


def test_two_runs_of_a_seed_both_count(tmp_path, monkeypatch):
    """Of other code, which starts elsewhere; methods of one code start alike: counted once."""
    monkeypatch.setattr(plot, "NOT_A_SETTING", [*plot.NOT_A_SETTING, "total_env_steps"])
    for name, start, end in (("old", 20.0, 80.0), ("new", 26.0, 90.0)):
        for script in ("collm_cc", "collm_dc"):
            make_run(
                tmp_path,
                f"{name}_{script}",
                script,
                scores=((0, start), (4000, end)),
                total_env_steps=4000,
            )
    plot.main(plot.Args(runs=tmp_path, results=tmp_path))
    text = (tmp_path / "tables.md").read_text()
    assert "| untrained team | - | - | 23.0 ± 4.2 | 23.0 ± 4.2 | - | 2 |" in text
    assert "| CoLLM-CC | - | - | 85.0 ± 7.1 | 85.0 ± 7.1 | - | 2 |" in text


def test_tables_curves_and_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        plot, "NOT_A_SETTING", [*plot.NOT_A_SETTING, "total_env_steps"]
    )  # whatever its default is
    runs, results = tmp_path / "runs", tmp_path / "results"
    default = {"total_env_steps": 4000}
    make_run(runs, "cc1", scores=((0, 20.0), (4000, 80.0)), **default)
    make_run(runs, "cc2", scores=((0, 30.0), (4010, 90.0)), seed=2, **default)
    make_run(runs, "dc1", "collm_dc", scores=((0, 20.0), (4000, 60.0)), **default)
    make_run(runs, "dc2", "collm_dc", scores=((0, 30.0), (4000, 80.0)), seed=2, **default)
    make_run(runs, "alone", scores=((0, 10.0), (4000, 70.0)), num_agents=1, **default)
    make_run(runs, "open", scores=((0, 30.0), (64, 31.0)), **default)
    (runs / "cc1.log").write_text(
        "+ abc1 /a/b/python collm_cc.py --seed 1\nnoise\n+ abc2 python collm_cc.py --resume x\n"
    )
    plot.main(plot.Args(runs=runs, results=results))
    told = capsys.readouterr().out
    assert "not finished" in told
    text = (results / "tables.md").read_text()
    assert "| untrained team | - | - | 25.0 ± 7.1 | 25.0 ± 7.1 | - | 2 |" in text
    assert "| untrained agent | - | - | 10.0 | 10.0 | - | 1 |" in text
    assert "| AC (CC) | - | - | 70.0 | 70.0 | - | 1 |" in text
    assert "| CoLLM-CC | - | - | 85.0 ± 7.1 | 85.0 ± 7.1 | - | 2 |" in text
    assert "| coding | CoLLM-CC | 2 | 25.0 ± 7.1 | 85.0 ± 7.1 | 4005 ± 7 |" in text
    assert "| coding | CoLLM-CC | 0.25 ± 0.00 | - |" in text
    assert (results / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["run"]: row for row in csv.DictReader((results / "runs.csv").open())}
    assert set(rows) == {"cc1", "cc2", "dc1", "dc2", "alone"}
    row = rows["cc1"]
    assert (row["commit"], row["command"]) == ("abc1 abc2", "python collm_cc.py --seed 1")
    assert (float(row["start/score"]), float(row["end/score"]), row["env_steps"]) == (
        20,
        80,
        "4000",
    )
    assert (row["response_tokens"], row["peak_memory_gb"]) == ("500", "2.0")
    assert "start/score/turn_0" not in row
    assert json.loads(row["curve"]) == [[0, 20.0], [4000, 80.0]]


def test_tables_and_curves_come_from_the_committed_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "NOT_A_SETTING", [*plot.NOT_A_SETTING, "total_env_steps"])
    make_run(
        tmp_path / "runs",
        "cc1",
        scores=((0, 20.0), (128, 40.0), (4000, 80.0)),
        total_env_steps=4000,
    )
    make_run(tmp_path / "runs", "short", num_turns=1, total_env_steps=128)
    plot.main(plot.Args(runs=tmp_path / "runs", results=tmp_path))
    text = (tmp_path / "tables.md").read_text()
    assert "| coding | CoLLM-CC | 0.25 | 0.50 | - |" in text  # a tenth each
    assert "CoLLM-CC (num_turns=1) | 1 |" in text
    plot.main(plot.Args(runs=tmp_path / "none", results=tmp_path))
    assert (tmp_path / "tables.md").read_text() == text


def test_curves_show_the_runs_with_the_fewest_settings(tmp_path, monkeypatch):
    for name, changes in {"a": {}, "b": {"num_agents": 1}, "c": {"num_turns": 1}}.items():
        make_run(tmp_path, name, **changes)
    drawn = []
    monkeypatch.setattr(
        plot,
        "mean_curve",
        lambda curves: drawn.append(len(curves)) or (*curves[0], *curves[0])[:1] * 4,
    )
    rows = [plot.csv_row(run) for run in plot.read_runs(tmp_path)]
    plot.draw_curves(plot.plain(plot.group(rows)), tmp_path / "x.png")
    assert drawn == [1, 1]  # CoLLM-CC and AC


def test_tenths_of_a_run():
    values = np.arange(20.0)
    values[[0, 2, 3]] = np.nan
    assert plot.tenths(values)[:3] == [1.0, None, 4.5]
    assert plot.tenths(np.array([1.0, 2.0])) == [1.0, 2.0, *[None] * 8]


def test_a_critics_curve_has_a_point_in_the_middle_of_each_tenth_that_is_known():
    values = [None, 0.25, 0.5, *[None] * 6, 1.0]
    row = {"env_steps": "2000", "explained_variance": json.dumps(values)}
    steps, known = plot.critic_curve(row)
    assert steps.tolist() == [300.0, 500.0, 1900.0] and known.tolist() == [0.25, 0.5, 1.0]


def test_rows_of_runs_that_are_gone_stay(tmp_path):
    (tmp_path / "runs.csv").write_text("run,task,old\ngone,tldr,1\nopen,coding,2\n")
    done, begun = make_run(tmp_path, "done"), make_run(tmp_path, "open", total_env_steps=1000)
    plot.write_csv([plot.read_run(done), plot.read_run(begun)], tmp_path / "runs.csv")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [row["run"] for row in rows] == ["done", "gone"]
    assert (rows[1]["old"], rows[0]["old"], rows[0]["end/score"]) == ("1", "", "80.0")


def test_build_is_read_from_what_render_drew():
    legend, rows = plot.read_build("\nBB|B.  B.|B.\nBB|BB  BB|..\nB bricks, a oak_planks\n")
    assert legend == {"B": "bricks", "a": "oak_planks"}
    assert rows == [[("BB", "B."), ("B.", "B.")], [("BB", "BB"), ("BB", "..")]]


@pytest.mark.parametrize("task", ["housebuild", "housebuild:feedback=score", "coding"])
def test_render_draws_the_last_episodes(tmp_path, task):
    path = make_run(tmp_path, "a", task=task)
    plot.main(plot.Args(action="render", run=path, results=tmp_path))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_runs_of_the_study_the_readme_has_no_table(tmp_path):
    run = plot.read_run(make_run(tmp_path, "a"))
    assert plot.readme_table([plot.csv_row(run)]) == []


@pytest.mark.parametrize("changes", [{"action": "render"}, {"action": "all"}])
def test_nothing_to_show_is_one_line(tmp_path, changes):
    with pytest.raises(SystemExit, match=r"must be a run folder|no finished run"):
        plot.main(plot.Args(runs=tmp_path, results=tmp_path, **changes))


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path):
    path = make_run(tmp_path, "a")
    assert plot.read_run(path).finished
    whole, begun = path / "checkpoint_000001.pt", path / "checkpoint_000002.pt.tmp"
    whole.write_text("")
    os.utime(whole, (0, 0))  # older than the last evaluation
    begun.write_text("")
    assert not plot.read_run(path).finished


def test_what_the_task_fills_in_is_no_setting(tmp_path):
    run = plot.read_run(make_run(tmp_path, "a", task="strbuild"))
    assert run.args["num_envs"] == 16 != envs.Task.num_envs
    assert run.args["num_turns"] == 4 != envs.Task.num_turns
    assert plot.settings(run) == {"total_env_steps": 128}
    whole = plot.read_run(make_run(tmp_path, "c", total_env_steps=4096))  # of coding
    assert plot.settings(whole) == {}
    assert "num_envs" in plot.settings(
        plot.read_run(make_run(tmp_path, "b", task="strbuild", num_envs=64))
    )
