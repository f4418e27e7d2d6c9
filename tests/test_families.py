"""Models of many families: trained as they were sampled, or refused at the start in one line."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from families import LONGEST, REFUSED, TRAINED, Uneven, make_model
from transformers import AutoModelForCausalLM

import collm_cc
import envs

CPU = torch.device("cpu")
WINDOWS = ["mistral_window", "gemma2_window", "gemma3_window", "gpt_oss_window", "llama4_chunk"]
DENSE = ["llama", "gemma2", "gptj", "bloom", "phi3_longrope", "gpt2"]
EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss", "llama4", "deepseek_v3"]
LAYERS_WITH_NOISE = ["opt", "phimoe", "gpt2", "falcon_alibi", "gemma2", "qwen3_moe"]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function: the folder of the model of a family, made once."""
    made = {}

    def get(name: str) -> str:
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp("family"), name)
        return made[name]

    return get


def build(folder: str, **changes):
    """(task, args, agent, critic) of a team of one."""
    options = {"task": "uneven", "num_agents": 1, "num_envs": 8, "max_new_tokens": 8, **changes}
    args = collm_cc.Args(model=[folder], **options)
    task = Uneven(1)
    agents, critics = collm_cc.build(task, args, CPU)
    torch.nn.init.normal_(critics[0].head.weight)
    return task, args, agents[0], critics[0]


def play(task, args, agent) -> list:
    """Eight episodes, four of each o_0; some end a response early, two end after a turn."""
    agent.chat.eos = agent.chat.eos | set(range(0, 4096, 12))
    episodes = collm_cc.start_episodes(task.train, 1)
    collm_cc.rollout(task, episodes, [agent], args, "rollout", 0)
    assert [len(e.rewards) for e in episodes] == [2, 1, 2, 2] * 2
    assert not any(e.too_long for e in episodes)
    assert num_columns(episodes) > LONGEST
    return episodes


def num_columns(episodes) -> int:
    """Columns of the cache after two turns: the longest frames and the longest responses."""
    widest = [0] * 4
    for episode in episodes:
        runs = [list(run) for _, run in itertools.groupby(episode.turns[0])]
        for k, run in enumerate(runs):
            widest[k] = max(widest[k], len(run))
    return sum(widest)


def gradient(model) -> torch.Tensor:
    """The gradient of all that is trained, which it forgets."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad()
    return torch.cat([part.flatten().clone() for part in parts])


def trained_step(agent, episodes, args, monkeypatch):
    """(log-probs, gap of a token, gradient) of one actor step, which steps nothing."""
    gradients = []

    def optimize(model, max_grad_norm):
        gradients.append(gradient(model))
        return gradients[-1].norm()

    monkeypatch.setattr(collm_cc, "optimize", optimize)
    rewards, live = collm_cc.stack_rewards(episodes, 2, [agent])
    advantages = rewards[..., 0] + 1.5
    logps, metrics = collm_cc.actor_step(0, agent, episodes, advantages, live, args)
    return logps, metrics["losses/sampling_gap"].item(), gradients[0]


def plain_step(agent, episodes):
    """(log-probs, gradient) of the same loss: a forward of each history alone, without a mask."""
    rewards, live = collm_cc.stack_rewards(episodes, 2, [agent])
    advantages = rewards[..., 0] + 1.5
    logps = torch.zeros_like(advantages)
    for k, episode in enumerate(episodes):
        ids, turns = torch.tensor(episode.tokens[0]), torch.tensor(episode.turns[0])
        logits = agent.model(input_ids=ids[None]).logits[0].to(agent.model.dtype)
        logp = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        totals = torch.stack([logp[turns[1:] == turn].sum() for turn in range(2)])
        (-(totals * advantages[:, k] * live[:, k]).sum() / live.sum()).backward()
        logps[:, k] = totals.detach()
    return logps, gradient(agent)


def is_close(x: torch.Tensor, reference: torch.Tensor, share: float) -> bool:
    """Whether two differ by at most a share of the reference's norm."""
    return bool((x - reference).norm() <= share * reference.norm())


def check_family(folder: str, tolerance: float, monkeypatch, **changes) -> None:
    """Two turns, K = 4 of two items: sampled equals trained, which equals the plain loss."""
    task, args, agent, critic = build(folder, **changes)
    episodes = play(task, args, agent)
    logps, gap, actor_gradient = trained_step(agent, episodes, args, monkeypatch)
    assert gap < tolerance
    plain_logps, plain_gradient = plain_step(agent, episodes)
    assert plain_gradient.norm() > 0.01
    assert is_close(logps, plain_logps, tolerance)
    assert is_close(actor_gradient, plain_gradient, 10 * tolerance)
    tokens = [[7 * k + j for j in range(length)] for k, length in enumerate([100, 40, 75])]
    ends = [[60, 99], [39], [0, 74]]
    critic.sums[0] = critic.sums[2] = 1.0  # returns of mean 0 and variance 1
    values = critic(tokens, ends, 2)
    for k, (ids, places) in enumerate(zip(tokens, ends, strict=True)):
        hidden = critic.model(input_ids=torch.tensor([ids])).last_hidden_state[0, places]
        alone = critic.head(hidden.to(critic.head.weight.dtype))[:, 0]
        assert is_close(values[: len(places), k].to(alone.dtype), alone, 10 * tolerance)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_sampled_is_what_is_trained(name, folder_of, monkeypatch):
    check_family(folder_of(name), 1e-4, monkeypatch)


@pytest.mark.parametrize("name", DENSE + EXPERTS + WINDOWS)
def test_float64_too(name, folder_of, monkeypatch):
    check_family(folder_of(name), 1e-7, monkeypatch, dtype="float64")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon_alibi", "mixtral", "llama4"])
def test_bfloat16_differs_by_little(name, folder_of, monkeypatch):
    task, args, agent, _ = build(folder_of(name), dtype="bfloat16")
    episodes = play(task, args, agent)
    _, gap, actor_gradient = trained_step(agent, episodes, args, monkeypatch)
    assert gap < 0.02  # of log-probs of about -8; 0.004 was measured
    assert actor_gradient.isfinite().all()


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_alibi_is_not_shared(name, folder_of):
    assert not build(folder_of(name))[2].longest_shared


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_can_share_a_beginning_does(name, dtype, folder_of):
    assert build(folder_of(name), dtype=dtype)[2].longest_shared


@pytest.mark.parametrize("name", [*WINDOWS, "gpt_neo_window"])  # which attends in float32 always
def test_windows_shorter_than_a_history(name, folder_of):
    """They are there, so that these families show something: without one, log-probs differ."""
    task, args, agent, _ = build(folder_of(name), dtype="float64")
    episodes = play(task, args, agent)
    logp, gap = collm_cc.logprobs(agent.model, episodes, 0, 2, 1.0, agent.longest_shared)
    assert agent.longest_shared <= 16 and gap.abs().max() < 1e-6  # some rotate in float32
    assert sum(len(e.tokens[0]) > 3 * 16 for e in episodes) > 5
    folder = Path(folder_of(name))
    config = transformers.AutoConfig.from_pretrained(folder)
    for window in ("sliding_window", "attention_chunk_size", "window_size"):
        if getattr(config, window, None):
            setattr(config, window, 10**6)
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    wide = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    other, _ = collm_cc.logprobs(wide, episodes, 0, 2, 1.0, 0)
    assert (other - logp).abs().max() > 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_start(name, folder_of):
    with pytest.raises(envs.UserError, match=REFUSED[name][2]) as caught:
        build(folder_of(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bloom", "mamba2", "bert"])
def test_small_weights_hide_nothing(name, folder_of, tmp_path):
    """With the usual random weights all tokens are nearly as likely, whatever was read."""
    model = AutoModelForCausalLM.from_pretrained(folder_of(name))
    for parameter in model.parameters():
        parameter.data *= 0.1
    model.save_pretrained(tmp_path)
    for path in Path(folder_of(name)).glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if name == "bloom":
        assert not build(str(tmp_path))[2].longest_shared
    else:
        with pytest.raises(envs.UserError):
            build(str(tmp_path))


@pytest.mark.parametrize("name", LAYERS_WITH_NOISE)
def test_checkpointing_changes_no_gradient(name, folder_of, monkeypatch):
    steps, calls = {}, []
    for on in (False, True):
        task, args, agent, critic = build(folder_of(name), gradient_checkpointing=on)
        episodes = play(task, args, agent)
        for model in (agent.model, critic.model):
            inside = [x for path, x in model.named_modules() if re.search(r"\.\d+\.", path)]
            inside[0].register_forward_hook(
                lambda *_, on=on, model=model: calls.append((on, model))
            )
        del calls[:]
        steps[on] = trained_step(agent, episodes, args, monkeypatch)
        rewards, live = collm_cc.stack_rewards(episodes, 2, [agent])
        collm_cc.critic_step(critic, episodes, rewards, live, args)
        steps[on] = *steps[on], calls.count((on, agent.model)), calls.count((on, critic.model))
    assert is_close(steps[True][2], steps[False][2], 1e-5)
    assert steps[True][1] < 1e-4
    for place in (3, 4):  # forwards of a layer, of the agent and of the critic
        assert steps[True][place] > steps[False][place] > 0


def test_checkpointing_that_a_model_can_not_do(folder_of, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(envs.UserError, match="does not support activation checkpointing"):
        build(folder_of("llama"), gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["llama4", "mixtral", "gpt2", "opt_350m", "falcon"])
def test_lora_leaves_routers_alone(name, folder_of, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    task, args, agent, _ = build(folder_of(name), lora_rank=4)
    for parameter_name, parameter in agent.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    episodes = play(task, args, agent)
    _, gap, actor_gradient = trained_step(agent, episodes, args, monkeypatch)
    assert gap < 1e-4
    assert actor_gradient.norm() > 0
    agent.export(tmp_path / "agent")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (exported, agent.model)]
    assert is_close(*logits, 1e-5)


@pytest.mark.parametrize("name", ["mistral", "llama4", "gemma2"])
def test_an_exported_agent_keeps_its_windows(name, folder_of, tmp_path):
    agent = build(folder_of(name))[2]
    before = copy.deepcopy(agent.model.config.to_dict())
    agent.export(tmp_path / "agent")
    exported = json.loads((tmp_path / "agent" / "config.json").read_text())
    given = json.loads(Path(folder_of(name), "config.json").read_text())
    for window in ("sliding_window", "attention_chunk_size", "floor_scale"):
        assert exported.get(window) == given.get(window)
    assert agent.model.config.to_dict() == before


def test_a_critic_that_sees_what_follows_is_refused(folder_of):
    with pytest.raises(envs.UserError, match=r"critic of agents .* not causal"):
        build(folder_of("llama"), critic_model=folder_of("gemma3_encoder"))


@pytest.mark.parametrize("name", ["mamba", "opt_350m"])
def test_any_causal_body_can_be_a_critic(name, folder_of):
    task, args, agent, critic = build(folder_of("llama"), critic_model=folder_of(name))
    episodes = play(task, args, agent)
    rewards, live = collm_cc.stack_rewards(episodes, 2, [agent])
    before = collm_cc.critic_step(critic, episodes, rewards, live, args)
    after = collm_cc.critic_step(critic, episodes, rewards, live, args)
    assert before[live].isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "opt", "llama4"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_of_padding_alone_is_finite(name, dtype, folder_of):
    """A prompt of one token beside longer ones: all that is read of it first is padding."""
    agent = build(folder_of(name), dtype=dtype)[2]
    prompts, uniforms = [[5], [6, 7, 8, 9, 10, 11]], torch.rand(2, 4, dtype=torch.float64)
    together = collm_cc.generate(agent, prompts, collm_cc.RowsCache(), uniforms)
    for k, prompt in enumerate(prompts):
        cache = collm_cc.RowsCache()
        alone = collm_cc.generate(agent, [prompt], cache, uniforms[k : k + 1])[0]
        assert together[k][0] == alone[0]
        assert together[k][1] == pytest.approx(alone[1], abs=1e-5)


def test_weights_that_become_nan_stop_a_rollout(folder_of):
    task, args, agent, _ = build(folder_of("llama"))
    agent.model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="agent 0 "):
        collm_cc.rollout(task, collm_cc.start_episodes(task.train, 1), [agent], args, "rollout", 0)
