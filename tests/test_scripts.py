"""Whole runs of the scripts on models/tiny: that they train, log, save, resume, and refuse what
they can not use."""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_algorithm import Talkative, Words
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import collm_cc
import collm_dc
import envs
import mc_baseline

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [collm_cc, collm_dc, mc_baseline]
# With a critic, and without. What the scripts share word for word (test_diff.py) one will show
KINDS = [collm_cc, mc_baseline]
SMALL = {
    "task": "coding",
    "num_envs": 4,
    "num_minibatches": 1,
    "total_env_steps": 14,
    "eval_every": 0,
    "eval_episodes": 4,
    "save_every": 0,
    "max_new_tokens": 16,
    "device": "cpu",
}


def train(script, run_name, **changes):
    """Run folder of a small run; in the current folder's runs/."""
    changes = {**SMALL, "run_name": run_name, "num_generations": 2, **changes}
    names = {f.name for f in dataclasses.fields(script.Args)}
    script.main(script.Args(**{k: v for k, v in changes.items() if k in names}))
    return Path(changes.get("resume") or f"runs/{run_name}")


# Short texts in one turn: the cheapest run whose rewards differ, where the task does not matter,
# and the first iteration of the seed has a signal
train_short = functools.partial(train, task="tldr", max_new_tokens=8, seed=2)


def scalars(folder):
    """{tag: [(step, value)]} of a run."""
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def weights(folder):
    """{name: tensor} of the newest checkpoint (agents, critics, and their optimizers), its
    iteration and step."""
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
    per_agent += ["losses/kl", "losses/sampling_gap"]
    per_agent += ["losses/advantage_variance", "charts/response_length", "charts/eos_rate"]
    per_agent += [] if script is mc_baseline else ["losses/value_loss", "losses/explained_variance"]
    once = "episodic_return SPS learning_rate tokens_per_second peak_memory_gb sandbox_error"
    once = [*once.split(), "too_long"]
    tags = {f"charts/{name}" for name in once} | set(per_agent)
    tags |= {"time/rollout", "time/update"}
    tags |= {f"{name}/agent_{i}" for name in per_agent for i in range(2)}
    metrics = "score success pass@1 pass@2 pass@4 tests aux_defined main_defined syntax".split()
    metrics += ["cooperation", "wrapper", "sandbox_error"]
    tags |= {f"eval/{name}" for name in metrics}
    tags |= {"eval/episodic_return", "eval/time", "eval/tokens"}
    assert tags <= set(logged)
    for tag, values in logged.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
        assert len(values) == (iteration + 1 if tag.startswith("eval/") else iteration), tag
        finite = all(value == value and abs(value) < 1e9 for _, value in values)
        # Four returns may be equal
        assert finite or "explained_variance" in tag, (tag, values)
    assert 0 < max(value for _, value in logged["losses/sampling_gap"]) < 1e-5  # float32
    texts = EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    assert {"hyperparameters/text_summary", "episodes/0/text_summary"} <= set(texts)


@pytest.mark.parametrize("task", [name for name in envs.TASKS if name != "coding"])
def test_every_task_trains(task, elsewhere):
    num_turns = min(2, envs.TASKS[task].num_turns)
    flags = {"num_turns": num_turns, "max_new_tokens": 8}
    folder = train(collm_dc, task, task=task, total_env_steps=1, **flags)
    assert {"eval/score", "eval/success", "losses/value_loss"} <= set(scalars(folder))
    board = EventAccumulator(str(folder)).Reload()
    shown = board.Tensors("episodes/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"turn {num_turns - 1}, agent 1 is told" in shown and "=== reward " in shown


def test_cc_and_dc_log_the_same_tags(elsewhere):
    names = [(script, script.__name__) for script in (collm_cc, collm_dc)]
    cc, dc = (set(scalars(train_short(*name, total_env_steps=1))) for name in names)
    assert cc == dc


@pytest.mark.parametrize("script", KINDS)
def test_resume_is_exact(script, elsewhere):
    """Stopped after any number of iterations and resumed: the weights, optimizers and logged values
    of one run."""
    run = train if script is collm_cc else train_short  # of two turns, and of one
    whole = run(script, "whole", total_env_steps=8, save_every=1, eval_every=1)
    part = run(script, "part", total_env_steps=4, save_every=1, eval_every=0)
    assert weights(part)[1] < weights(whole)[1]
    saved = json.loads((part / "args.json").read_text()) | {"total_env_steps": 8, "eval_every": 1}
    script.main(script.Args(**saved | {"resume": str(part)}))
    a, b = weights(whole), weights(part)
    assert a[1:] == b[1:] and a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    first, second = scalars(whole), scalars(part)
    for tag in first:
        same = ("losses/", "charts/episodic_return", "charts/score", "charts/eos_rate")
        if tag.startswith(same):
            assert str(first[tag]) == str(second[tag]), tag  # as texts, NaN equals NaN


def test_same_seed_same_run_and_another_seed_another(elsewhere):
    seeds = enumerate([5, 5, 6])
    folders = [train_short(collm_dc, f"r{k}", total_env_steps=1, seed=seed) for k, seed in seeds]
    runs = [weights(folder)[0] for folder in folders]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("script", KINDS)
def test_a_single_agent_trains(script, elsewhere):
    flags = {"num_agents": 1, "total_env_steps": 5, "baseline": "rloo"}
    folder = train(script, "single", **flags)
    assert (folder / "agent_0").is_dir() and not (folder / "agent_1").exists()
    assert "losses/policy_loss/agent_0" in scalars(folder)


def test_agents_may_be_different_models(elsewhere, other_model):
    models = ["models/tiny", other_model]
    folder = train(collm_dc, "mixed", model=models, total_env_steps=5, max_new_tokens=12)
    configs = [AutoConfig.from_pretrained(folder / f"agent_{i}") for i in range(2)]
    assert [config.model_type for config in configs] == ["llama", "gpt2"]


def three_agents(script, monkeypatch, name, **flags):
    """A run of three agents on Words, which is for any number."""
    monkeypatch.setattr(script, "make", lambda name, num_agents, *_: Words(num_agents))
    flags = {"num_agents": 3, "max_new_tokens": 8, "total_env_steps": 1, **flags}
    return train(script, name, task="words", **flags)


@pytest.mark.parametrize("script", KINDS)
def test_three_agents_train(script, elsewhere, monkeypatch):
    rates = {"actor_lr": [1e-3, 1e-4, 1e-3], "temperature": [1.0, 0.8, 1.2]}
    folder = three_agents(script, monkeypatch, "three", **rates, save_every=1)
    start = AutoModelForCausalLM.from_pretrained("models/tiny").state_dict()
    for i in range(3):
        model = AutoModelForCausalLM.from_pretrained(folder / f"agent_{i}")
        assert any(not torch.equal(x, start[name]) for name, x in model.state_dict().items())
        assert model.generation_config.temperature == rates["temperature"][i]
    logged = scalars(folder)
    assert all(f"losses/grad_norm/agent_{i}" in logged for i in range(3))
    assert logged["charts/learning_rate"][0][1] == pytest.approx(7e-4)
    num_models = {collm_cc: 4, mc_baseline: 3}[script]
    assert len({name.split(".")[0] for name in weights(folder)[0]}) == num_models


@pytest.mark.parametrize("script", KINDS)
def test_an_agent_with_a_rate_of_0_is_a_fixed_partner(script, elsewhere, monkeypatch):
    """It is exported once, is in no checkpoint, and stays as it was, resumed as well."""
    exported, export = [], script.Agent.export

    def spy(agent, folder):
        exported.append(agent.reads[0])
        export(agent, folder)

    monkeypatch.setattr(script.Agent, "export", spy)
    flags = {"actor_lr": [1e-3, 0.0], "kl_coef": 0.1, "save_every": 1, "total_env_steps": 4}
    folder = train_short(script, "fixed", **flags)
    assert exported == [0, 1, 0]
    train_short(script, "fixed", **flags | {"total_env_steps": 8}, resume=str(folder))
    assert exported == [0, 1, 0, 0]
    start = AutoModelForCausalLM.from_pretrained("models/tiny").state_dict()
    moved, fixed = (AutoModelForCausalLM.from_pretrained(folder / f"agent_{i}") for i in (0, 1))
    assert all(torch.equal(x, start[name]) for name, x in fixed.state_dict().items())
    assert any(not torch.equal(x, start[name]) for name, x in moved.state_dict().items())
    logged = scalars(folder)
    assert {value for _, value in logged["losses/grad_norm/agent_1"]} == {0.0}
    assert max(value for _, value in logged["losses/grad_norm/agent_0"]) > 0
    assert max(value for _, value in logged["losses/entropy/agent_1"]) > 0
    num_models = {collm_cc: 2, mc_baseline: 1}[script]
    assert len({name.split(".")[0] for name in weights(folder)[0]}) == num_models


def test_a_critic_may_be_another_model(elsewhere, other_model):
    # In the first step its head is 0, so that nothing but the head moves
    folder = train_short(collm_dc, "other", critic_model=other_model, total_env_steps=5)
    assert AutoConfig.from_pretrained(folder / "agent_1").model_type == "llama"
    after, start = weights(folder)[0], AutoModelForCausalLM.from_pretrained(other_model)
    for k in range(2, 4):
        body = after[f"{k}.model.wte.weight"]
        assert body.shape == start.transformer.wte.weight.shape
        assert not torch.equal(body, start.transformer.wte.weight)


def test_success_ends_episodes(elsewhere):
    """At a raw reward of 0 every episode ends after its first turn; at 5, none does."""
    for success, turns in [(0.0, 1), (5.0, 2)]:
        folder = train(collm_cc, f"s{turns}", success=success, total_env_steps=1, num_turns=2)
        assert weights(folder)[2] == 4 * turns


def test_histories_that_grow_too_long_are_counted(elsewhere, monkeypatch):
    task = Talkative(2, 2)
    monkeypatch.setattr(collm_cc, "make", lambda *_: task)
    task.train = task.train[1:2] * 2 + task.train[:1] * 2  # two rows of four
    folder = train(collm_cc, "long", total_env_steps=6, max_new_tokens=8, success=9.0)
    assert scalars(folder)["charts/too_long"] == [(6, 0.5)]
    assert scalars(folder)["eval/too_long"][-1][1] in (0.0, 1.0)


def test_a_checkpoint_counts_only_once_the_agents_are_exported(elsewhere, monkeypatch):
    args = collm_cc.Args(device="cpu")
    agents = [collm_cc.Agent(0, "models/tiny", args, torch.device("cpu"), {})]

    def full_disk(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(agents[0].tokenizer, "save_pretrained", full_disk)
    with pytest.raises(envs.UserError, match=r"agent_0: can not be written, .*: No space"):
        collm_cc.save(elsewhere, SummaryWriter(elsewhere), agents, agents, args, 3, 5)
    assert not list(elsewhere.glob("checkpoint_*"))


GENERATION = {
    "penalties": {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "truncation": {"do_sample": True, "top_p": 0.5, "top_k": 3, "temperature": 0.3, "min_p": 0.2},
    "greedy": {"do_sample": False, "temperature": 0.9, "top_p": 0.8},  # loads, but does not save
    "bans": {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7], "bad_words_ids": [[8]]},
    "beams": {"num_beams": 2, "length_penalty": 2.0, "min_new_tokens": 4, "max_length": 9},
}


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("kind", GENERATION)
def test_an_exported_agent_samples_as_in_training_by_default(kind, lora_rank, tmp_path):
    """What `generate` samples from, with nothing passed, is softmax(logits / temperature), whatever
    the model that training started from has as its defaults."""
    if lora_rank:
        pytest.importorskip("peft")
    shutil.copytree(ROOT / "models/tiny", tmp_path / "base")
    path = tmp_path / "base/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GENERATION[kind]))
    args = collm_cc.Args(device="cpu", lora_rank=lora_rank, temperature=[0.7, 1.0])
    agent = collm_cc.Agent(0, str(tmp_path / "base"), args, torch.device("cpu"), {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as training would
        for p in agent.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    agent.export(tmp_path / "agent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    ids = torch.tensor([agent.chat.frame("word word word", [])])
    torch.manual_seed(0)
    options = {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options)
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    with torch.no_grad():
        logits = agent.model(out.sequences[:, :-1]).logits[0, ids.shape[1] - 1 :]
    trained = (logits / 0.7).softmax(-1)
    sampled = torch.cat(out.scores).softmax(-1)
    torch.testing.assert_close(sampled, trained, rtol=1e-3, atol=1e-5)
    assert len(tokens) == 6 or tokens[-1] in agent.eos
    assert set(model.generation_config.eos_token_id) == agent.eos
    assert model.generation_config.do_sample is True


def test_bfloat16_and_minibatches_and_q_critic(elsewhere):
    flags = {"dtype": "bfloat16", "num_minibatches": 2, "critic_type": "q"}
    folder = train(collm_cc, "bf16", **flags, total_env_steps=5)
    saved = AutoModelForCausalLM.from_pretrained(folder / "agent_0")
    assert saved.dtype == torch.float32
    assert all(value == value for _, value in scalars(folder)["losses/policy_loss"])


# --------------------------------------------------------------------------------------- bad input
BAD = [
    (collm_cc, "--task chess", r"--task chess: .*coding"),
    (collm_cc, "--dataset no/such.jsonl", r"--dataset no/such.jsonl: "),
    (collm_dc, "--model no/such/folder", r"--model no/such/folder: OSError: .*no/such/folder"),
    (collm_dc, "--model models", r"--model models: .*config"),
    (collm_dc, "--model a b c", r"--model .*: must be one for all agents, or 2, one for each"),
    (collm_dc, "--actor-lr 1 2 3", r"--actor-lr .*: must be one for all agents, or 2"),
    (collm_dc, "--temperature 1 2 3", r"--temperature .*: must be one for all agents, or 2"),
    (collm_cc, "--critic-model no/such", r"--critic-model no/such: OSError: "),
    (collm_cc, "--num-envs 10 --num-minibatches 4", r"--num-envs 10: must be divisible by"),
    (mc_baseline, "--num-envs 6", r"--num-envs 6: must be divisible by"),
    (mc_baseline, "--num-envs 8 --num-minibatches 4", r"--num-envs 8: must be divisible by"),
    (
        mc_baseline,
        "--num-generations 1",
        r"--num-generations 1: .* at least 2 with --baseline mean",
    ),
    (mc_baseline, "--baseline rloo --num-generations 1", r"--num-generations 1: .* at least 2"),
    (mc_baseline, "--num-generations 0", r"--num-generations 0: must be above 0"),
    (collm_cc, "--eval-episodes 0", r"--eval-episodes 0: must be above 0"),
    (collm_cc, "--temperature 0", r"--temperature \[0.0\]: must be above 0"),
    (collm_cc, "--temperature 1 -1", r"--temperature \[1.0, -1.0\]: must be above 0"),
    (collm_cc, "--temperature nan", r"--temperature \[nan\]: must be above 0"),
    (collm_dc, "--actor-lr -1", r"--actor-lr \[-1.0\]: must be at least 0"),
    (collm_dc, "--gamma 1.5", r"--gamma 1.5: must be at most 1"),
    (collm_dc, "--critic-lr 0", r"--critic-lr 0.0: must be above 0"),
    (collm_dc, "--gae-lambda -0.1", r"--gae-lambda -0.1: must be at least 0"),
    (collm_dc, "--num-agents 3", r"--num-agents 3: "),
    (collm_dc, "--num-agents 0", r"--num-agents 0: must be above 0"),
    (collm_dc, "--num-turns 0", r"--num-turns 0: must be above 0"),
    (collm_dc, "--max-new-tokens 0", r"--max-new-tokens 0: must be above 0"),
    (collm_dc, "--max-new-tokens 100000", r"first observation and 2 responses are .* reads"),
    (collm_dc, "--total-env-steps 0", r"--total-env-steps 0: must be above 0"),
    (collm_dc, "--eval-every -1", r"--eval-every -1: must be at least 0"),
    (collm_dc, "--seed -1", r"--seed -1: must be at least 0"),
    (collm_dc, "--device tpu7", r"--device tpu7: RuntimeError: .*tpu7"),
    (collm_dc, "--resume runs/none", r"--resume runs/none: .* No such file .*runs/none/args.json"),
    (mc_baseline, "--task tldr --dataset humaneval", r"--dataset humaneval: "),
    (collm_cc, "--microbatch-tokens 0", r"--microbatch-tokens 0: must be above 0"),
    (collm_cc, "--max-grad-norm 0", r"--max-grad-norm 0.0: must be above 0"),
    (collm_dc, "--track", r"pip install wandb"),
    (collm_dc, f"--run-name {'x' * 300}", r"x{300}: .*File name too long"),
]


def fail(script, flags, monkeypatch, capsys):
    """The one line with which a command line is refused."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        script.command_line(script.Args, script.main)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and "Traceback" not in lines
    return errors[0]


@pytest.mark.parametrize(("script", "flags", "said"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line_and_exit_code_2(script, flags, said, elsewhere, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = fail(script, flags, monkeypatch, capsys)
    assert re.search(said, error), error
    assert not list(Path("runs").glob("*"))  # nothing that would block the name


def test_a_row_that_is_too_long_is_named_before_anything_is_trained(elsewhere, monkeypatch, capsys):
    rows = [{"prompt": "a post of a few words"}, {"prompt": "word " * 5000}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--task tldr --dataset rows.jsonl"
    told = r"rows.jsonl:2: first observation and 1 responses are \d+ tokens, agent 0 .* reads 4096"
    assert re.search(told, fail(collm_cc, flags, monkeypatch, capsys))
    Path("few.jsonl").write_text(json.dumps(rows[0]) + "\n")
    flags = "--task tldr --dataset few.jsonl --eval-dataset rows.jsonl"
    assert re.search(told, fail(mc_baseline, flags, monkeypatch, capsys))
    assert not Path("runs").exists()


def test_runs_that_can_not_be_made_are_one_line(elsewhere, monkeypatch, capsys):
    Path("runs").write_text("")
    error = fail(collm_cc, "--run-name one --task tldr", monkeypatch, capsys)
    assert error.startswith("error: runs/one: ") and "Not a directory" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_runs_that_can_not_be_written_are_one_line(elsewhere, monkeypatch, capsys):
    Path("runs").mkdir(mode=0o500)
    error = fail(collm_cc, "--run-name one --task tldr", monkeypatch, capsys)
    assert error.startswith("error: runs/one: ") and "Permission denied" in error


def test_without_a_network_the_hub_client_does_not_log_each_retry(monkeypatch, capsys):
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # as it starts
    fail(collm_cc, "--task chess", monkeypatch, capsys)
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_resume_refuses_other_arguments_and_other_scripts(elsewhere):
    name = {"exp_name": "mine"}  # a label, which says nothing of the script
    folder = str(train_short(collm_cc, "first", total_env_steps=1, seed=3, **name))
    with pytest.raises(envs.UserError, match=r"--resume .*: is a run of collm_cc\.py$"):
        collm_dc.main(collm_dc.parse_args(collm_dc.Args, ["--resume", folder]))
    flags = ["--resume", folder, "--seed", "4", "--gamma", "0.5"]
    with pytest.raises(envs.UserError, match="has other values of seed, gamma"):
        collm_cc.main(collm_cc.parse_args(collm_cc.Args, flags))
    args = collm_cc.parse_args(collm_cc.Args, ["--resume", folder, "--total-env-steps", "9"])
    assert (args.seed, args.num_envs, args.total_env_steps) == (3, 4, 9)
    assert args.exp_name == "mine"
    told = r"runs/first: give another --run-name, or --resume it: .* exists"
    with pytest.raises(envs.UserError, match=told):
        train_short(collm_cc, "first")


def test_threads_that_wait_give_up_their_core_unless_the_environment_says_otherwise():
    """By default two runs on the same cores would keep each other from working, by spinning."""
    for name in ("collm_cc", "collm_dc", "mc_baseline"):
        before, _, _ = (ROOT / f"{name}.py").read_text().partition("import torch")  # which reads it
        statement = before[before.index('if "OMP_WAIT_POLICY"') : before.index("import numpy")]
        for given, count in [
            ({}, "2000"),
            ({"GOMP_SPINCOUNT": "7"}, "7"),
            ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ]:
            exec(statement, {"os": SimpleNamespace(environ=given)})
            assert given.get("GOMP_SPINCOUNT") == count
