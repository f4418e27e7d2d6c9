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
from kill_and_resume import differences, family, gone, kill_and_resume, start, state, wait_for_events
from test_scripts import ROOT, SCRIPTS
from test_scripts import train_short as train
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import collm_cc
import collm_dc
import envs
import mc_baseline


def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path):
    kills, wrong = kill_and_resume("mc_baseline", tmp_path, kills=1, total_env_steps=30)
    assert kills >= 1 and not wrong


def test_a_signal_saves_and_ends_the_run(tmp_path):
    run, folder = start("collm_cc", tmp_path, "one", "--total-env-steps", "100000"), tmp_path / "runs/one"
    wait_for_events(run, folder, 0)
    pids = family(run.pid)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 0, error
    assert "stopping after this iteration" in error and "Traceback" not in error
    assert state(folder)["global_step"] < 1000
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_from_the_moment_that_logs_exist(number, elsewhere, monkeypatch):
    handlers, open_run = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, envs.open_run

    def interrupted(*given):
        writer = open_run(*given)
        signal.raise_signal(number)
        return writer

    monkeypatch.setattr(envs, "open_run", interrupted)
    try:
        folder = train(collm_dc, "one", total_env_steps=100)
    except KeyboardInterrupt:
        pytest.fail("nothing waits for the signal yet")
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert state(folder)["iteration"] == 0


def resumed(script, folder, **changes):
    saved = json.loads((folder / "args.json").read_text())
    script.main(script.Args(**saved | {"resume": str(folder)} | changes))


def test_a_broken_checkpoint_falls_back_to_the_one_before(elsewhere, capsys):
    whole = train(collm_cc, "whole", total_env_steps=12, save_every=1)
    for name in ("half", "gone"):
        part = train(collm_cc, name, total_env_steps=8, save_every=1)
        newest = max(part.glob("checkpoint_*.pt"))
        data = newest.read_bytes()
        newest.write_bytes(data[: len(data) // 2]) if name == "half" else newest.unlink()
        capsys.readouterr()
        resumed(collm_cc, part, total_env_steps=12)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert (len(said) == 1 and newest.name in said[0]) or name == "gone"
        assert not [x for x in differences(whole, part) if "eval/" not in x]  # part was evaluated at its first end
    for path in part.glob("checkpoint_*.pt"):
        path.write_bytes(b"PK")
    with pytest.raises(envs.UserError, match="no checkpoint there that can be read"):
        resumed(collm_cc, part)


def test_a_checkpoint_of_other_arguments_is_refused(elsewhere):
    two, one = (
        train(collm_cc, "two", total_env_steps=1),
        train(collm_cc, "one", total_env_steps=1, num_agents=1, seed=2),
    )
    for path in one.glob("checkpoint_*.pt"):
        shutil.copy(path, two)
    with pytest.raises(envs.UserError, match=r"--resume runs/two: the run has other values of seed, num_agents$"):
        resumed(collm_cc, two)


def test_a_model_of_another_shape_is_refused(elsewhere, other_model):
    shutil.copytree(ROOT / "models/tiny", "model")
    folder = train(collm_dc, "shape", total_env_steps=1, model=["model"])
    shutil.rmtree("model")
    shutil.copytree(other_model, "model")
    with pytest.raises(envs.UserError, match="--resume runs/shape: its model 0 has other shapes than --model"):
        resumed(collm_dc, folder)


def test_a_full_disk_leaves_the_last_good_checkpoint(elsewhere, monkeypatch, capsys):
    folder = train(collm_cc, "disk", total_env_steps=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "events" not in path.name}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = ["collm_cc", "--resume", str(folder), "--total-env-steps", "20"]
    monkeypatch.setattr(sys, "argv", argv)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # a file can not grow beyond: EFBIG, as for ENOSPC
    try:
        with pytest.raises(SystemExit) as stop:
            envs.command_line(collm_cc.Args, collm_cc.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    assert "can not be written, what was saved before stays" in error[0]
    after = {path: path.read_bytes() for path in before}
    assert {path for path in before if before[path] != after[path]} <= {folder / "args.json"}  # more steps were asked
    resumed(collm_cc, folder, total_env_steps=20)
    assert not list(folder.glob("*.tmp"))


NAN = {
    "agent": (mc_baseline, "logprobs", r"iteration 1, agent 0: the gradient norm is nan"),
    "critic": (collm_dc, "Critic.forward", r"iteration 1, critic of agents \[0\]: the gradient norm is nan"),
    "joint": (collm_cc, "Critic.forward", r"iteration 1, critic of agents \[0, 1\]: the gradient norm is nan"),
}


@pytest.mark.parametrize("case", NAN)
def test_what_is_not_finite_stops_the_run_and_is_named(case, elsewhere, monkeypatch, capsys):
    script, function, said = NAN[case]
    folder = train(script, "nan", total_env_steps=1)
    good = state(folder)
    owner, name = (script.Critic, "forward") if "." in function else (script, function)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * torch.nan)
    argv = [script.__name__, "--resume", str(folder), "--total-env-steps", "50", "--save-every", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    bars = set(tqdm._instances)
    with pytest.raises(SystemExit) as stop:
        envs.command_line(script.Args, script.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and len(error) == 1
    assert re.search(said, error[0]), error
    assert set(tqdm._instances) <= bars  # a bar that stays would shift the lines of the next run in this process
    after = state(folder)
    assert all(torch.equal(good[k], after[k]) if torch.is_tensor(good[k]) else good[k] == after[k] for k in good)


def test_a_model_whose_logits_are_not_finite_is_named(elsewhere):
    shutil.copytree(ROOT / "models/tiny", "model")
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        model.get_input_embeddings().weight[4000] = torch.nan
    model.save_pretrained("model")
    with pytest.raises(FloatingPointError, match=r"iteration 0, agent 0: the gradient norm is nan"):
        train(mc_baseline, "nan", total_env_steps=1, model=["model"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_args_json_that_is_not_one(script, elsewhere):
    folder = Path("runs/broken")
    folder.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"exp_name": "%s", "no_such": 1}' % script.__name__):  # noqa: UP031
        (folder / "args.json").write_text(text)
        with pytest.raises(envs.UserError, match=r"must be the folder of a run, with its args.json"):
            envs.parse_args(script.Args, ["--resume", str(folder)])


def test_the_kill_script_has_a_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("tests/kill_and_resume.py", run_name="__main__")
    assert stop.value.code == 0 and "--kills" in capsys.readouterr().out
