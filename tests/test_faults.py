"""Runs that are killed, stopped, out of disk, out of numbers, or resumed from what is broken."""

import json
import re
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import (
    differences,
    equal,
    family,
    gone,
    kill_and_resume,
    start,
    state,
    wait_for_events,
)
from test_scripts import ROOT
from test_scripts import train_short as train
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import collm_cc
import collm_dc
import envs
import mc_baseline


def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path):
    kills, wrong = kill_and_resume("mc_baseline", tmp_path, kills=1, total_env_steps=20)
    assert kills >= 1 and not wrong


def test_a_signal_saves_and_ends_the_run(tmp_path):
    run = start("collm_cc", tmp_path, "one", "--total-env-steps", "100000")
    folder = tmp_path / "runs/one"
    wait_for_events(run, folder, 0)
    pids = family(run.pid)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 0, error
    assert "stopping after this iteration" in error and "Traceback" not in error
    assert state(folder)["global_step"] < 1000
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_counts_from_the_moment_that_logs_exist(number, elsewhere, monkeypatch):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    open_run = collm_dc.open_run

    def interrupted(*given):
        opened = open_run(*given)
        signal.raise_signal(number)
        return opened

    monkeypatch.setattr(collm_dc, "open_run", interrupted)
    try:
        folder = train(collm_dc, "one", total_env_steps=100)
    except KeyboardInterrupt:
        pytest.fail("nothing waits for the signal yet")
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert state(folder)["iteration"] == 1


def resumed(script, folder, **changes):
    saved = json.loads((folder / "args.json").read_text())
    script.main(script.Args(**saved | {"resume": str(folder)} | changes))


def copied(folder, name):
    """A copy of a run, to go on with in another way: (its folder, its newest checkpoint)."""
    copy = Path(shutil.copytree(folder, folder.with_name(name)))
    return copy, max(copy.glob("checkpoint_*.pt"))


def test_a_broken_checkpoint_falls_back_to_the_one_before(elsewhere, capsys):
    whole = train(collm_cc, "whole", total_env_steps=8, save_every=1)
    part, newest = copied(whole, "part")
    data = newest.read_bytes()
    newest.write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    resumed(collm_cc, part)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("warning: ")]
    assert len(said) == 1 and newest.name in said[0]
    assert not differences(whole, part)
    for path in part.glob("checkpoint_*.pt"):
        path.write_bytes(b"PK")
    with pytest.raises(envs.UserError, match="no checkpoint there that can be read"):
        resumed(collm_cc, part)


def test_a_damaged_checkpoint_is_seen(elsewhere, capsys):
    """Bytes that changed on disk, within a tensor."""
    folder = train(collm_cc, "one", total_env_steps=1, save_every=1)
    one, two = sorted(folder.glob("checkpoint_*.pt"))
    data = bytearray(two.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    two.write_bytes(data)
    assert collm_cc.read_checkpoint(folder)["iteration"] == int(one.stem[-6:])
    assert two.name in capsys.readouterr().err


def test_a_checkpoint_of_other_arguments_is_refused(elsewhere):
    two = train(collm_cc, "two", total_env_steps=0)
    one = train(collm_cc, "one", total_env_steps=0, num_agents=1, seed=3)
    for path in one.glob("checkpoint_*.pt"):
        shutil.copy(path, two)
    told = r"--resume runs/two: the run has other values of seed, num_agents$"
    with pytest.raises(envs.UserError, match=told):
        resumed(collm_cc, two)


def test_what_changes_only_rounding_may_change_on_resume(elsewhere):
    """Portions and recomputation: what one changes after running out of memory."""
    whole = train(collm_cc, "whole", total_env_steps=8, save_every=1, dtype="float64")
    part, newest = copied(whole, "part")
    newest.unlink()
    flags = {"microbatch_tokens": 64, "gradient_checkpointing": True}
    resumed(collm_cc, part, **flags)
    a, b = state(whole), state(part)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9, msg=name)


def test_other_ranks_make_other_minibatches_which_one_line_says(elsewhere, capsys):
    for num_minibatches in (1, 2):
        name = f"run{num_minibatches}"
        folder = train(collm_cc, name, total_env_steps=0, num_minibatches=num_minibatches)
        for path in folder.glob("checkpoint_*.pt"):  # as two ranks would have written it
            torch.save(torch.load(path) | {"ranks": 2}, path)
        capsys.readouterr()
        resumed(collm_cc, folder)
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if "ranks" in line]
        told = "runs/run2 had 2 ranks: its minibatches will be others from here on"
        assert said == ([told] if num_minibatches == 2 else [])


def test_a_checkpoint_is_loaded_on_the_cpu(elsewhere, monkeypatch):
    """On a GPU it would stand beside the models, as large as they are."""
    folder, load, places = train(collm_dc, "one", total_env_steps=0), torch.load, []

    def spy(*given, **options):
        places.append(str(options["map_location"]))
        return load(*given, **options)

    monkeypatch.setattr(torch, "load", spy)
    resumed(collm_dc, folder)
    assert places == ["cpu"]


def test_a_model_of_another_shape_is_refused(elsewhere, other_model):
    shutil.copytree(ROOT / "models/tiny", "model")
    folder = train(collm_dc, "shape", total_env_steps=0, model=["model"])
    shutil.rmtree("model")
    shutil.copytree(other_model, "model")
    told = r"--resume runs/shape: \w+Error: .*"
    with pytest.raises(envs.UserError, match=told):
        resumed(collm_dc, folder)


def test_a_full_disk_leaves_the_last_good_checkpoint(elsewhere, monkeypatch, capsys):
    folder = train(collm_cc, "disk", total_env_steps=0)
    files = [path for path in folder.rglob("*") if path.is_file() and "events" not in path.name]
    before = {path: path.read_bytes() for path in files}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = ["collm_cc", "--resume", str(folder), "--total-env-steps", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    # A file can not grow beyond that: EFBIG, as ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            collm_cc.command_line(collm_cc.Args, collm_cc.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    assert "can not be written, what was saved before stays" in error[0]
    after = {path: path.read_bytes() for path in before}
    changed = {path for path in before if before[path] != after[path]}
    assert changed <= {folder / "args.json"}  # more steps were asked for
    resumed(collm_cc, folder)
    assert not list(folder.glob("*.tmp"))


NAN = {
    "agent": (mc_baseline, r"agent 0 \(models/tiny\): its gradient norm is nan"),
    "critic": (collm_dc, r"critic of agents \[0\]: its gradient norm is nan"),
    "joint": (collm_cc, r"critic of agents \[0, 1\]: its gradient norm is nan"),
}


@pytest.mark.parametrize("case", NAN)
def test_what_is_not_finite_stops_the_run_and_is_named(case, elsewhere, monkeypatch, capsys):
    script, said = NAN[case]
    folder = train(script, "nan", total_env_steps=0)
    good = state(folder)
    if case == "agent":
        logprobs = script.logprobs

        def broken(*given, **options):
            total, gap = logprobs(*given, **options)
            return total * torch.nan, gap

        monkeypatch.setattr(script, "logprobs", broken)
    else:
        forward = script.Critic.forward
        monkeypatch.setattr(script.Critic, "forward", lambda *given: forward(*given) * torch.nan)
    argv = [script.__name__, "--resume", str(folder), "--total-env-steps", "50"]
    monkeypatch.setattr(sys, "argv", [*argv, "--save-every", "1"])
    bars = set(tqdm._instances)
    with pytest.raises(SystemExit) as stop:
        script.command_line(script.Args, script.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and len(error) == 1
    assert re.search(said, error[0]), error
    assert set(tqdm._instances) <= bars  # a bar that stays would shift the lines of the next run
    after = state(folder)
    assert all(equal(good[name], after[name]) for name in good)


def test_a_model_whose_logits_are_not_finite_is_named(elsewhere):
    shutil.copytree(ROOT / "models/tiny", "model")
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        model.get_input_embeddings().weight[4000] = torch.nan
    model.save_pretrained("model")
    said = r"agent 0 \(model\): .* not finite"
    with pytest.raises((envs.UserError, FloatingPointError), match=said):
        train(collm_cc, "nan", total_env_steps=1, model=["model"])
    assert not Path("runs").exists()


def test_args_json_that_is_not_one(elsewhere):
    folder = Path("runs/broken")
    folder.mkdir(parents=True)
    unknown = json.dumps({"exp_name": "collm_cc", "no_such": 1})
    for text in ("", "[]", "[1]", '"x"', unknown):
        (folder / "args.json").write_text(text)
        with pytest.raises(envs.UserError, match=r"^--resume runs/broken: \w+Error: "):
            collm_cc.parse_args(collm_cc.Args, ["--resume", str(folder)])


def test_the_kill_script_has_a_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("tests/kill_and_resume.py", run_name="__main__")
    assert stop.value.code == 0 and "--kills" in capsys.readouterr().out
