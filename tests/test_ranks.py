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


def team_update(script, episodes):
    """Weights after one float64 update on this rank's share of the episodes."""
    args = make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    script.update(envs.parts(episodes, args)[0], agents, *([critics] if critics else []), 2, args, 0)
    return [p.detach().clone() for model in [*agents, *critics] for p in model.parameters()]


def run_rank(rank, port, path, played):
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    assert envs.join_ranks("auto").type == "cpu"
    torch.save(list(map(team_update, SCRIPTS, played)), f"{path}/{rank}.pt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_make_the_update_of_one(tmp_path):
    teams = [(script, make_args(script)) for script in SCRIPTS]
    played = [play(script, make_team(script, args)[0], args, num_turns=2)[1] for script, args in teams]
    ranks = torch.multiprocessing.spawn(run_rank, (free_port(), str(tmp_path), played), nprocs=2, join=False)
    alone = list(map(team_update, SCRIPTS, played))
    while not ranks.join():
        pass
    for rank in (0, 1):
        for expected, weights in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for p, q in zip(expected, weights, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def torchrun(folder, *flags):
    for name in ("models", "envs.py", "collm_dc.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(Path(name).resolve())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += "collm_dc.py --task tldr --num-envs 4 --eval-episodes 4 --eval-samples 1 --max-new-tokens 8".split()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, "--save-every", "1", *flags], cwd=folder, env=env, text=True, **pipes)


def test_torchrun_trains_ends_with_a_dead_rank_and_resumes(tmp_path):
    process = torchrun(tmp_path, "--run-name", "a", "--total-env-steps", "100000")
    try:
        while not (tmp_path / "runs/a/checkpoint_000001.pt").exists() and process.poll() is None:
            time.sleep(0.1)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0 and "SIGKILL" in output and output.count("held-out at step 0") == 1, output
    finally:
        process.kill()
    newest = max((tmp_path / "runs/a").glob("checkpoint_*.pt"))
    total = torch.load(newest)["global_step"] + 8
    process = torchrun(tmp_path, "--resume", "runs/a", "--total-env-steps", str(total))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count(f"held-out at step {total}") == 1 and f"at step {total}" in output
    newest = max((tmp_path / "runs/a").glob("checkpoint_*.pt"))
    assert torch.load(newest)["global_step"] == total and len(list((tmp_path / "runs").iterdir())) == 1
