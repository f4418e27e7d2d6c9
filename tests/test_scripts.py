"""Whole runs of the scripts on models/tiny: that they train, log, save, resume, and refuse what they can not use."""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import collm_cc
import collm_dc
import envs
import mc_baseline

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [collm_cc, collm_dc, mc_baseline]
SMALL = {
    "task": "coding",
    "num_envs": 4,
    "num_minibatches": 1,
    "total_env_steps": 14,
    "eval_every": 0,
    "eval_episodes": 4,
    "eval_samples": 2,
    "save_every": 0,
    "max_new_tokens": 40,
    "device": "cpu",
}


def train(script, run_name, **changes):
    """Run folder of a small run; in the current folder's runs/."""
    changes = {**SMALL, "run_name": run_name, "num_generations": 2, **changes}
    names = {f.name for f in dataclasses.fields(script.Args)}
    script.main(script.Args(**{k: v for k, v in changes.items() if k in names}))
    return Path(changes.get("resume") or f"runs/{run_name}")


# Short texts in one turn: the cheapest run whose rewards differ, for tests of what the task does not matter to
train_short = functools.partial(train, task="tldr", max_new_tokens=16)


def scalars(folder):
    """{tag: [(step, value)]} of a run."""
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def weights(folder):
    """{name: tensor} of the newest checkpoint (agents, critics, and their optimizers), its iteration and step."""
    saved = state(folder)
    return saved, saved.pop("iteration"), saved.pop("global_step")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_trains_logs_and_saves(script, elsewhere):
    folder = train(script, "one", eval_every=1, save_every=1)
    after, iteration, global_step = weights(folder)
    assert iteration >= 2 and global_step >= 14
    start = AutoModelForCausalLM.from_pretrained("models/tiny").state_dict()
    num_models = {collm_cc: 3, collm_dc: 4, mc_baseline: 2}[script]
    assert {name.split(".")[0] for name in after} == {str(k) for k in range(num_models)}
    for k in range(2):  # each agent moved, as a model that needs nothing of this repo
        model = AutoModelForCausalLM.from_pretrained(folder / f"agent_{k}")
        assert any(not torch.equal(x, start[name]) for name, x in model.state_dict().items())
        assert torch.equal(model.lm_head.weight, after[f"{k}.model.lm_head.weight"])
        tokenizer = AutoTokenizer.from_pretrained(folder / f"agent_{k}")
        out = model.generate(**tokenizer("def aux(x):", return_tensors="pt"), max_new_tokens=4)
        assert out.shape[1] > 4
    for k in range(2, num_models):
        assert after[f"{k}.head.weight"].abs().sum() > 0
    assert len(list(folder.glob("checkpoint_*.pt"))) == 2 and not list(folder.glob("*.tmp"))
    assert json.loads((folder / "args.json").read_text())["seed"] == 1

    logged = scalars(folder)
    per_agent = ["losses/policy_loss", "losses/entropy", "losses/grad_norm"]
    per_agent += ["losses/advantage_variance", "charts/response_length", "charts/eos_rate"]
    per_agent += [] if script is mc_baseline else ["losses/value_loss", "losses/explained_variance"]
    once = "episodic_return SPS learning_rate tokens_per_second peak_memory_gb sandbox_error".split()
    tags = {f"charts/{name}" for name in once} | {"time/rollout", "time/update", "time/reward"} | set(per_agent)
    tags |= {f"{name}/agent_{i}" for name in per_agent for i in range(2)}
    metrics = (
        "score success pass@1 pass@2 tests aux_defined main_defined syntax cooperation wrapper sandbox_error".split()
    )
    tags |= {f"eval/{name}{turn}" for name in metrics for turn in ("", "/turn_0", "/turn_1")}
    tags |= {"eval/episodic_return", "eval/time", "eval/tokens"}
    assert tags <= set(logged)
    for tag, values in logged.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
        assert len(values) == (iteration + 1 if tag.startswith("eval/") else iteration), tag
        finite = all(value == value and abs(value) < 1e9 for _, value in values)
        assert finite or "explained_variance" in tag, (tag, values)  # no variance among four returns
    texts = EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    assert {"hyperparameters/text_summary", "episodes/0/text_summary"} <= set(texts)


@pytest.mark.parametrize("task", [name for name in envs.TASKS if name != "coding"])
def test_every_task_trains(task, elsewhere):
    kinds = envs.TASKS[task].feedback_kinds
    folder = train(collm_dc, task, task=task, total_env_steps=1, feedback=kinds[-1] if kinds else None)
    assert {"eval/score", "eval/success", "losses/value_loss"} <= set(scalars(folder))
    text = EventAccumulator(str(folder)).Reload().Tensors("episodes/0/text_summary")[-1]
    shown = text.tensor_proto.string_val[0].decode()
    assert f"turn {envs.TASKS[task].num_turns - 1}, agent 1 is told" in shown and "=== reward " in shown


def test_cc_and_dc_log_the_same_tags(elsewhere):
    cc, dc = (set(scalars(train_short(script, script.__name__, total_env_steps=1))) for script in (collm_cc, collm_dc))
    assert cc == dc


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_exact(script, elsewhere):
    """Stopped after any number of iterations and resumed: the weights, optimizers and logged values of one run."""
    whole = train(script, "whole", total_env_steps=14, save_every=1, eval_every=2)
    part = train(script, "part", total_env_steps=6, save_every=1, eval_every=0)
    assert weights(part)[1] < weights(whole)[1]
    saved = json.loads((part / "args.json").read_text()) | {"total_env_steps": 14, "eval_every": 2}
    script.main(script.Args(**saved | {"resume": str(part)}))
    a, b = weights(whole), weights(part)
    assert a[1:] == b[1:] and a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    first, second = scalars(whole), scalars(part)
    for tag in first:
        if tag.startswith(("losses/", "charts/episodic_return", "charts/score", "charts/eos_rate")):
            assert first[tag] == second[tag] or "explained_variance" in tag, tag


def test_same_seed_same_run_and_another_seed_another(elsewhere):
    seeds = enumerate([5, 5, 6])
    runs = [weights(train_short(collm_dc, f"r{k}", total_env_steps=1, seed=seed))[0] for k, seed in seeds]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_single_agent_trains(script, elsewhere):
    folder = train(script, "single", num_agents=1, total_env_steps=5, baseline="rloo", max_new_tokens=80)
    assert (folder / "agent_0").is_dir() and not (folder / "agent_1").exists()
    assert "losses/policy_loss/agent_0" in scalars(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_agents_may_be_different_models(script, elsewhere, other_model):
    folder = train(script, "mixed", model=["models/tiny", other_model], total_env_steps=5, max_new_tokens=12)
    types = [AutoModelForCausalLM.from_pretrained(folder / f"agent_{i}").config.model_type for i in range(2)]
    assert types == ["llama", "gpt2"]


def test_a_checkpoint_counts_only_once_the_agents_are_exported(elsewhere, monkeypatch):
    args = collm_cc.Args(device="cpu")
    agents = [collm_cc.Agent("models/tiny", args, torch.device("cpu"))]

    def full_disk(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(agents[0].tokenizer, "save_pretrained", full_disk)
    with pytest.raises(envs.UserError, match=r"agent_0: can not be written, .*: No space"):
        collm_cc.save(elsewhere, agents, agents, args, 3, 5)
    assert not list(elsewhere.glob("checkpoint_*"))


def test_a_greedy_generation_config_does_not_stop_the_export(elsewhere, tmp_path):
    """Some models of the Hub come with do_sample off and a temperature, which transformers loads but does not save."""
    shutil.copytree(ROOT / "models/tiny", tmp_path / "greedy")
    path = tmp_path / "greedy/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.9}))
    folder = train_short(mc_baseline, "greedy", model=[str(tmp_path / "greedy")], total_env_steps=1)
    assert AutoModelForCausalLM.from_pretrained(folder / "agent_1").generation_config.do_sample is True


def test_bfloat16_and_minibatches_and_q_critic(elsewhere):
    folder = train(collm_cc, "bf16", dtype="bfloat16", num_minibatches=2, critic_type="q", total_env_steps=5)
    saved = AutoModelForCausalLM.from_pretrained(folder / "agent_0")
    assert saved.dtype == torch.float32
    assert all(value == value for _, value in scalars(folder)["losses/policy_loss"])


# ------------------------------------------------------------------------------------------------------ bad input
BAD = [
    (collm_cc, ["--task", "chess"], r"--task chess: .*coding"),
    (collm_cc, ["--dataset", "no/such.jsonl"], r"--dataset no/such.jsonl: "),
    (collm_dc, ["--model", "no/such/folder"], r"--model no/such/folder: neither a folder"),
    (collm_dc, ["--model", "models"], r"--model models: neither a folder"),
    (collm_dc, ["--model", "models/tiny", "models/tiny", "models/tiny"], r"--model .*: must be one name, or 2"),
    (collm_cc, ["--num-envs", "10", "--num-minibatches", "4"], r"--num-envs 10: must be divisible by 4"),
    (mc_baseline, ["--num-envs", "6"], r"--num-envs 6: must be divisible by 4"),
    (mc_baseline, ["--num-envs", "8", "--num-minibatches", "4"], r"--num-envs 8: must be divisible by 16"),
    (mc_baseline, ["--num-generations", "1"], r"--num-generations 1: must be at least 2 with --baseline mean"),
    (collm_cc, ["--eval-episodes", "10"], r"--eval-episodes 10: must be divisible by --eval-samples"),
    (collm_cc, ["--temperature", "0"], r"--temperature 0.0: must be above 0"),
    (collm_cc, ["--temperature", "-1"], r"--temperature -1.0: must be above 0"),
    (collm_cc, ["--temperature", "nan"], r"--temperature nan: must be above 0"),
    (collm_dc, ["--actor-lr", "0"], r"--actor-lr 0.0: must be above 0"),
    (collm_dc, ["--gamma", "1.5"], r"--gamma 1.5: must be at most 1"),
    (collm_dc, ["--gae-lambda", "-0.1"], r"--gae-lambda -0.1: must be at least 0"),
    (collm_dc, ["--num-agents", "3"], r"--num-agents 3: "),
    (collm_dc, ["--num-agents", "0"], r"--num-agents 0: must be above 0"),
    (collm_dc, ["--num-turns", "0"], r"--num-turns 0: must be above 0"),
    (collm_dc, ["--max-new-tokens", "0"], r"--max-new-tokens 0: must be above 0"),
    (collm_dc, ["--max-new-tokens", "100000"], r"agent 0: .* longer than its model reads"),
    (collm_dc, ["--total-env-steps", "0"], r"--total-env-steps 0: must be above 0"),
    (collm_dc, ["--eval-every", "-1"], r"--eval-every -1: must be at least 0"),
    (collm_dc, ["--seed", "-1"], r"--seed -1: must be at least 0"),
    (collm_dc, ["--seed", "4294967296"], r"--seed 4294967296: must be at most 4294967295"),
    (collm_dc, ["--device", "tpu7"], r"--device tpu7: must be "),
    (collm_dc, ["--resume", "runs/none"], r"--resume runs/none: must be the folder of a run"),
    (collm_dc, ["--feedback", "score"], r"--feedback score: task coding takes none"),
    (
        collm_dc,
        ["--task", "strbuild", "--feedback", "x"],
        r"--feedback x: task strbuild takes position, score, perfect",
    ),
    (mc_baseline, ["--task", "tldr", "--dataset", "humaneval"], r"--dataset humaneval: "),
    (mc_baseline, ["--baseline", "rloo", "--num-generations", "1"], r"--num-generations 1: must be at least 2"),
    (mc_baseline, ["--num-generations", "0"], r"--num-generations 0: must be above 0"),
    (collm_cc, ["--microbatch-tokens", "0"], r"--microbatch-tokens 0: must be above 0"),
    (collm_cc, ["--max-grad-norm", "inf"], r"--max-grad-norm inf: must be above 0"),
    (collm_dc, ["--track"], r"pip install wandb"),
]


@pytest.mark.parametrize(("script", "flags", "said"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(script, flags, said, elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        envs.command_line(script.Args, script.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(error) == 1 and re.search(said, error[0]), error


def test_without_a_network_the_hub_client_does_not_log_each_retry(monkeypatch):
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # as it starts
    monkeypatch.setattr(sys, "argv", ["collm_cc", "--task", "chess"])
    with pytest.raises(SystemExit):
        envs.command_line(collm_cc.Args, collm_cc.main)
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_resume_refuses_other_arguments_and_other_scripts(elsewhere, monkeypatch, capsys):
    folder = str(train_short(collm_cc, "first", total_env_steps=1, seed=3))
    with pytest.raises(envs.UserError, match="is a run of collm_cc, not of collm_dc"):
        envs.parse_args(collm_dc.Args, ["--resume", folder])
    with pytest.raises(envs.UserError, match="has other values of seed, gamma"):
        collm_cc.main(envs.parse_args(collm_cc.Args, ["--resume", folder, "--seed", "4", "--gamma", "0.5"]))
    args = envs.parse_args(collm_cc.Args, ["--resume", folder, "--total-env-steps", "9"])
    assert (args.seed, args.num_envs, args.total_env_steps) == (3, 4, 9)
    with pytest.raises(envs.UserError, match=r"--run-name first: runs/first exists"):
        train_short(collm_cc, "first")


@pytest.mark.parametrize("name", ["collm_cc", "collm_dc", "mc_baseline"])
def test_command_line(name, elsewhere):
    """As a user runs it, in a process of its own and copied with envs.py and models/tiny to an empty folder."""
    for file in (f"{name}.py", "envs.py"):
        (elsewhere / file).write_text((ROOT / file).read_text())
    flags = "--num-envs 4 --total-env-steps 2 --eval-episodes 4 --max-new-tokens 24 --run-name cli".split()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, f"{name}.py", *flags], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "held-out at step 0: " in run.stdout + run.stderr and "SPS=" in run.stderr and "return=" in run.stderr
    assert (elsewhere / "runs/cli/agent_0/model.safetensors").is_file()
    if name == "collm_cc":  # the command line is the same code for all three
        wrong = subprocess.run([sys.executable, f"{name}.py", "--task", "x"], env=env, capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: --task x: ") and wrong.stderr.count("\n") == 1
