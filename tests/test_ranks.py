"""Data parallel training: P ranks make the update of one, and torchrun runs, resumes and ends as one process does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from test_algorithm import SCRIPTS, make_args, make_team, play

import envs


def team_update(script):
    """Weights after one float64 update on this rank's share of eight episodes that are the same on all ranks."""
    args = make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args, num_turns=2)
    script.update(envs.parts(episodes, args)[0], agents, *([critics] if critics else []), 2, args, 0)
    return [p.detach().clone() for model in [*agents, *critics] for p in model.parameters()]


def run_rank(rank, port, path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    assert envs.join_ranks("auto").type == "cpu"
    torch.save([team_update(script) for script in SCRIPTS], f"{path}/{rank}.pt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_make_the_update_of_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, (free_port(), str(tmp_path)), nprocs=2)
    alone = [team_update(script) for script in SCRIPTS]
    for rank in (0, 1):
        for expected, weights in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for p, q in zip(expected, weights, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def torchrun(folder, *flags):
    for name in ("models", "envs.py", "collm_dc.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(Path(name).resolve())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [
        "collm_dc.py",
        "--task",
        "tldr",
        "--num-envs",
        "4",
        "--eval-episodes",
        "4",
        "--eval-samples",
        "1",
        *flags,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_torchrun_trains_and_resumes(tmp_path):
    flags = ("--max-new-tokens", "8", "--save-every", "1")
    for total, more in ((8, ("--run-name", "a")), (12, ("--resume", "runs/a"))):
        process = torchrun(tmp_path, *flags, "--total-env-steps", str(total), *more)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert output.count("held-out at step") == (2 if total == 8 else 1) and f"at step {total}" in output
    state = torch.load(tmp_path / "runs/a/checkpoint_000003.pt")
    assert state["global_step"] == 12 and len(list((tmp_path / "runs").iterdir())) == 1


def test_a_dead_rank_ends_the_job(tmp_path):
    process = torchrun(tmp_path, "--run-name", "a", "--total-env-steps", "100000", "--save-every", "1")
    try:
        while not (tmp_path / "runs/a/checkpoint_000001.pt").exists() and process.poll() is None:
            time.sleep(0.1)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0 and "SIGKILL" in output, output
    finally:
        process.kill()
