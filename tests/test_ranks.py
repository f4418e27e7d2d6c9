"""Data parallel training: P ranks make the update of one, and torchrun runs, resumes and ends as
one process does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_and_resume import metrics, state
from test_algorithm import make_args, make_team, parameters_of, play, run_update
from test_faults import resumed

import collm_cc
import collm_dc
import mc_baseline

KINDS = [collm_cc, mc_baseline]  # with a critic, and without


def team_update(script, episodes):
    """Weights and metrics after one float64 update on this rank's share of the episodes."""
    args = make_args(script, num_generations=2, kl_coef=0.1)
    agents, critics = make_team(script, args)
    share = len(episodes) // script.world_size()
    mine = episodes[script.rank() * share :][:share]
    learned = run_update(script, mine, agents, critics, args)
    return parameters_of([*agents, *critics]), learned


def run_rank(rank, port, path, played):
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    assert collm_dc.join_ranks("auto").type == "cpu"
    assert collm_dc.gather([rank, rank]) == [0, 0, 1, 1]
    torch.save(list(map(team_update, KINDS, played)), f"{path}/{rank}.pt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_make_the_update_of_one(tmp_path):
    teams = [(script, make_args(script)) for script in KINDS]
    played = [play(script, make_team(script, args)[0], args)[1] for script, args in teams]
    given = (free_port(), str(tmp_path), played)
    ranks = torch.multiprocessing.spawn(run_rank, given, nprocs=2, join=False)
    alone = list(map(team_update, KINDS, played))
    while not ranks.join():
        pass
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (expected, told), (weights, learned) in zip(alone, found, strict=True):
            for p, q in zip(expected, weights, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
            for name, values in told.items():
                assert learned[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def torchrun(folder, model, *flags):
    """A run of two processes in float64, of a model whose layers compute in it throughout."""
    for name in ("models", "data", "envs.py", "sandbox.py", "collm_dc.py"):
        if Path(name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(Path(name).resolve())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port()}", "collm_dc.py", "--save-every", "1"]
    command += "--task tldr --num-envs 4 --eval-episodes 4 --max-new-tokens 8".split()
    command += ["--dtype", "float64", "--model", model, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes)


def newest(folder):
    return max(folder.glob("checkpoint_*.pt"))


def test_torchrun_trains_ends_with_a_dead_rank_and_resumes(tmp_path, other_model, monkeypatch):
    folder = tmp_path / "runs/a"
    flags = ["--run-name", "a", "--total-env-steps", "100000"]
    process = torchrun(tmp_path, other_model, *flags)
    try:
        while not (folder / "checkpoint_000001.pt").exists() and process.poll() is None:
            time.sleep(0.1)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0 and "SIGKILL" in output, output
        assert output.count("held-out at step 0") == 1, output
    finally:
        process.kill()
    shutil.copytree(folder, tmp_path / "runs/b")
    total = torch.load(newest(folder))["global_step"] + 8
    flags = ["--resume", "runs/a", "--total-env-steps", str(total)]
    process = torchrun(tmp_path, other_model, *flags)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count(f"held-out at step {total}") == 1 and f"at step {total}" in output
    saved = torch.load(newest(folder))
    assert saved["global_step"] == total and saved["ranks"] == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2

    # One rank goes on as two do, but for rounding: episodes are seeded by their number
    monkeypatch.chdir(tmp_path)
    resumed(collm_dc, Path("runs/b"), total_env_steps=total)
    two, one = state(folder), state(tmp_path / "runs/b")
    assert two.keys() == one.keys()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-7, msg=name)
    two, one = metrics(folder), metrics(tmp_path / "runs/b")
    for tag in two:
        found = [float(value) for _, value in one[tag]]
        expected = [float(value) for _, value in two[tag]]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True), tag
