"""Data parallel training: P ranks make the update of one, and torchrun runs, resumes and ends as
one process does."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from kill_and_resume import metrics, state
from test_algorithm import make_args, make_team, parameters_of, play, run_update
from test_faults import resumed
from test_scripts import ROOT, train
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import main as torchrun

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


def run_rank(played):
    torch.set_num_threads(1)
    rank = collm_dc.rank()
    assert collm_dc.join_ranks("auto").type == "cpu"
    assert collm_dc.gather([rank, rank]) == [0, 0, 1, 1]
    return list(map(team_update, KINDS, played))


@pytest.fixture
def launch():
    """A function: what another one gives on two ranks, which torchrun's agent forks from here."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    handlers = {n: signal.getsignal(n) for n in numbers}
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    config = LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", **options)
    yield lambda function, *given: elastic_launch(config, function)(*given)
    for n, handler in handlers.items():
        signal.signal(n, handler)


def test_two_ranks_make_the_update_of_one(launch):
    teams = [(script, make_args(script, max_new_tokens=8)) for script in KINDS]
    played = [play(script, make_team(script, args)[0], args)[1] for script, args in teams]
    alone = list(map(team_update, KINDS, played))
    found = launch(run_rank, played)
    assert found.keys() == {0, 1}
    for rank in found:
        for (expected, told), (weights, learned) in zip(alone, found[rank], strict=True):
            for p, q in zip(expected, weights, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
            for name, values in told.items():
                assert learned[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def newest(folder):
    return max(folder.glob("checkpoint_*.pt"))


# In float64, of a model whose layers compute in it throughout
FLAGS = {"task": "tldr", "max_new_tokens": 8, "save_every": 1, "dtype": "float64"}


def run_until_a_rank_dies(model):
    """Rank 1 is killed once rank 0 has saved its first iteration."""
    torch.set_num_threads(1)
    draw = collm_dc.draw_items

    def die(items, n, seed, iteration):
        if collm_dc.rank() == 1 and iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(items, n, seed, iteration)

    collm_dc.draw_items = die
    train(collm_dc, "a", **FLAGS, model=[model], total_env_steps=100000)


def test_a_dead_rank_ends_the_run_which_torchrun_and_one_rank_resume(
    launch, elsewhere, other_model, monkeypatch, capfd
):
    folder = Path("runs/a")
    with pytest.raises(ChildFailedError, match="SIGKILL"):
        launch(run_until_a_rank_dies, other_model)
    assert capfd.readouterr().err.count("held-out at step 0") == 1
    shutil.copytree(folder, "runs/b")
    total = torch.load(newest(folder))["global_step"] + 4

    # As a user does it: torchrun starts and ends processes
    for name in ("data", "envs.py", "sandbox.py", "collm_dc.py"):
        Path(name).symlink_to(ROOT / name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--nproc-per-node=2", f"--master-port={free_port()}", "collm_dc.py"]
    torchrun([*flags, "--resume", "runs/a", "--total-env-steps", str(total)])
    output = capfd.readouterr().err
    assert output.count(f"held-out at step {total}") == 1 and f"at step {total}" in output
    saved = torch.load(newest(folder))
    assert saved["global_step"] == total and saved["ranks"] == 2
    assert len(list(Path("runs").iterdir())) == 2

    # One rank goes on as two do, but for rounding: episodes are seeded by their number
    resumed(collm_dc, Path("runs/b"), total_env_steps=total)
    two, one = state(folder), state(Path("runs/b"))
    assert two.keys() == one.keys()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-7, msg=name)
    two, one = metrics(folder), metrics(Path("runs/b"))
    for tag in two:
        found = [float(value) for _, value in one[tag]]
        expected = [float(value) for _, value in two[tag]]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True), tag
