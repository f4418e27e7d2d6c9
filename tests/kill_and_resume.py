"""Kill a training run at random moments, resume it each time, and compare it with a run that nobody
killed.

python tests/kill_and_resume.py --script collm_dc --kills 20

Both must end with the same weights, optimizers and metrics at the same steps, bit for bit, and
after each kill no process of the run may be left. `pytest` does the same with fewer kills
(test_faults.py).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from soak_sandbox import family
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ["collm_cc", "collm_dc", "mc_baseline"]
ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--task coding --max-new-tokens 12 --num-envs 8 --num-minibatches 2 --save-every 1".split()
FLAGS += "--eval-every 3 --eval-episodes 4".split()
CLOCKS = ("time/", "eval/time", "charts/SPS", "charts/tokens_per_second", "charts/peak_memory_gb")


def start(script, folder, name, *flags):
    """A run in a process of its own, in `folder`/runs/`name`; resumed if it has a checkpoint."""
    resume = list(Path(folder, "runs", name).glob("checkpoint_*.pt"))
    where = ["--resume", f"runs/{name}"] if resume else ["--run-name", name, *FLAGS, *flags]
    command = [sys.executable, ROOT / f"{script}.py", *where, "--device", "cpu"]
    command += ["--model", str(ROOT / "models/tiny")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_events(run, folder, before):
    """Until the run has opened an event file of its own, when training starts, or has ended."""
    while run.poll() is None and len(list(folder.glob("events*"))) <= before:
        time.sleep(0.01)


def gone(pids, seconds=20.0):
    """Whether all these processes end within some seconds."""
    deadline = time.monotonic() + seconds
    paths = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    while time.monotonic() < deadline:
        if not any(path.exists() and path.read_bytes() for path in paths):
            return True
        time.sleep(0.05)
    return False


def state(folder):
    """{name: tensor or number} of the newest checkpoint."""
    saved = torch.load(max(Path(folder).glob("checkpoint_*.pt")), weights_only=True)
    out = {"iteration": saved["iteration"], "global_step": saved["global_step"]}
    for k, (model, optimizer) in enumerate(saved["models"]):
        out |= {f"{k}.{name}": x for name, x in model.items()}
        out |= {f"{k}.adam.{n}.{m}": x for n, s in optimizer["state"].items() for m, x in s.items()}
    return out


def metrics(folder):
    """{tag: [(step, value)]} of a run, without what a clock or a memory meter gave."""
    board = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith(CLOCKS)]
    # repr, so that NaN equals NaN
    return {tag: [(event.step, repr(event.value)) for event in board.Scalars(tag)] for tag in tags}


def differences(whole, part):
    """What differs between two runs, as a list of names."""
    a, b = state(whole), state(part)
    names = [f"checkpoint: {k}" for k in a.keys() | b.keys() if not equal(a.get(k), b.get(k))]
    a, b = metrics(whole), metrics(part)
    names += [f"metric: {tag}" for tag in a.keys() | b.keys() if a.get(tag) != b.get(tag)]
    return names + [
        f"steps of {tag}" for tag, row in b.items() if len({step for step, _ in row}) < len(row)
    ]


def equal(a, b):
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def kill_and_resume(script, folder, kills, total_env_steps, seed=0, number=signal.SIGKILL):
    """(kills that met a running training, differences from the run that was left alone)."""
    rng, flags, hits = random.Random(seed), ["--total-env-steps", str(total_env_steps)], 0
    start_time, whole = time.monotonic(), start(script, folder, "whole", *flags)
    wait_for_events(whole, Path(folder, "runs/whole"), 0)
    training = time.monotonic()
    assert whole.communicate() and whole.returncode == 0
    mean = (time.monotonic() - training) / (kills + 1)
    print(f"whole run: {time.monotonic() - start_time:.0f} s", flush=True)
    part = Path(folder, "runs/part")
    while True:
        before = len(list(part.glob("events*")))
        if before and not list(part.glob("checkpoint_*.pt")):  # killed before it saved: start anew
            part.rename(part.with_name(f"part_{before}_{time.time_ns()}"))
            before = 0
        run = start(script, folder, "part", *flags)
        wait_for_events(run, part, before)
        if hits < kills:
            time.sleep(rng.uniform(0, mean))
            pids = family(run.pid)
            hits += run.poll() is None
            run.send_signal(number)
        error = run.communicate()[1]
        if hits == kills and run.returncode == 0 and json.loads((part / "args.json").read_text()):
            break
        assert run.returncode in (0, -number), error
        assert gone(pids), "processes are left behind"
        print(f"kill {hits}: {len(list(part.glob('checkpoint_*.pt')))} checkpoints", flush=True)
        if run.returncode == 0 and state(part)["global_step"] >= total_env_steps:
            break
    return hits, differences(Path(folder, "runs/whole"), part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--script", default="collm_dc", choices=SCRIPTS, help="whose training it is"
    )
    parser.add_argument("--kills", type=int, default=20, help="of a running training")
    parser.add_argument("--total-env-steps", type=int, default=600, help="of both runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        met, wrong = kill_and_resume(args.script, temp, args.kills, args.total_env_steps)
    print(f"{args.script}: {met} kills of a running training; differences: {wrong or 'none'}")
    sys.exit(bool(wrong))
