"""What larger models need: adapters over one shared base, a KL penalty, recomputed activations."""

import json
import shutil
import sys
from collections import Counter
from math import inf
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda
from families import make_model
from safetensors.torch import load_file, save_file
from test_algorithm import (
    CPU,
    SCRIPTS,
    Words,
    make_agent,
    make_args,
    make_episode,
    make_team,
    play,
    record_gradients,
    responses,
    run_update,
)
from test_scripts import train_short, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import collm_cc
import collm_dc
import envs

ITEMS = Words().train[:2]


def nudge(agents, seed=5, scale=0.02):
    """Move what is trained away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for agent in agents for p in agent.parameters() if p.requires_grad):
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


CASES = [*((script, 0) for script in SCRIPTS), (collm_cc, 2)]


@pytest.mark.parametrize(("script", "lora_rank"), CASES)
def test_kl_penalty_equals_a_naive_reference(script, lora_rank, monkeypatch):
    """The gradient that kl_coef adds is that of the mean of 0.5 (log pi - log reference)^2 over
    responses."""
    if lora_rank:
        pytest.importorskip("peft")
    flags = {"lora_rank": lora_rank, "num_generations": 2, "microbatch_tokens": 300}
    flags["max_new_tokens"] = 8
    args = make_args(script, kl_coef=0.3, **flags)
    agents, critics = make_team(script, args)
    nudge(agents)
    _, episodes = play(script, agents, args, items=ITEMS)
    for e in episodes:  # no advantages: nothing but the penalty is left
        e.rewards = [0.0] * len(e.rewards)
    base = AutoModelForCausalLM.from_pretrained("models/tiny", dtype=torch.float64).eval()
    live, expected, kl = sum(len(e.rewards) for e in episodes), [], []
    for i, agent in enumerate(agents):
        ratios = []
        for e in episodes:
            ids = torch.tensor([e.tokens[i]])
            mine, base_logp = (m(ids).logits[0].log_softmax(-1) for m in (agent.model, base))
            ratio = mine - base_logp.detach()
            spans = responses(e, i)
            for start, end in spans:
                ratios.append(ratio[range(start - 1, end - 1), e.tokens[i][start:end]].sum())
        kl.append(sum(ratios).item() / live)
        loss = 0.3 * sum(0.5 * x**2 for x in ratios) / live
        trained = [p for p in agent.parameters() if p.requires_grad]
        grads = dict(zip(trained, torch.autograd.grad(loss, trained), strict=True))
        flat = [grads.get(p, torch.zeros_like(p)).flatten() for p in agent.parameters()]
        expected.append(torch.cat(flat))
    seen = record_gradients(script, monkeypatch)
    metrics = run_update(script, episodes, agents, critics, args)
    assert metrics["losses/kl"] == pytest.approx(kl, rel=1e-8)
    for (name, gradient), reference in zip(seen[-len(agents) :], expected, strict=True):
        assert reference.norm() > 1e-3
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)
    args.kl_coef = 0.0
    agents, critics = make_team(script, args)
    assert not any(agent.reference for agent in agents)
    assert run_update(script, episodes, agents, critics, args)["losses/kl"] == [0.0, 0.0]
    assert all(gradient.norm() == 0 for _, gradient in seen[-len(agents) :])


@pytest.mark.parametrize(("script", "lora_rank"), [(collm_cc, 0), (collm_dc, 2)])
def test_gradient_checkpointing_changes_only_what_is_kept(script, lora_rank, monkeypatch):
    """The same gradients, while less is kept for the backward pass; rollouts are as without it."""
    if lora_rank:
        pytest.importorskip("peft")
    seen, kept, episodes = [], [], None
    for on in (False, True):
        flags = {"lora_rank": lora_rank, "num_generations": 2, "max_new_tokens": 8}
        args = make_args(script, gradient_checkpointing=on, **flags)
        agents, critics = make_team(script, args)
        nudge([*agents, *critics])
        if episodes is None:
            _, episodes = play(script, agents, args, items=ITEMS)
        else:
            assert [e.tokens for e in play(script, agents, args, items=ITEMS)[1]] == [
                e.tokens for e in episodes
            ]
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with (
            monkeypatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            seen.append(record_gradients(script, patch))
            run_update(script, episodes, agents, critics, args)
        kept.append(sum(sizes))
    for (name, a), (_, b) in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert kept[1] < 0.5 * kept[0]


def test_lora_shares_its_base_and_saves_adapters(elsewhere):
    peft = pytest.importorskip("peft")
    args = make_args(collm_dc, lora_rank=4, dtype="float32")
    agents, critics = make_team(collm_dc, args)
    for model in [*agents, *critics]:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all(".lora_" in x or x.startswith(("head.", "sums")) for x in trained)
    frozen = [[p.data_ptr() for p in a.parameters() if not p.requires_grad] for a in agents]
    assert len(frozen[0]) > 30 and frozen[0] == frozen[1]
    for critic in critics:
        theirs = {p.data_ptr() for p in critic.parameters() if not p.requires_grad}
        assert theirs <= set(frozen[0])
    with fake_cuda():
        device = torch.device("cuda", 0)
        weight, shared = {}, {}
        for i in range(2):
            agent = collm_dc.Agent(i, "models/tiny", args, device, shared)
            weight[i] = agent.model.get_input_embeddings().weight
        assert weight[0].is_cuda and weight[0].data_ptr() == weight[1].data_ptr()
    folder = train_short(collm_dc, "whole", lora_rank=4, total_env_steps=1)
    after, *_ = weights(folder)
    kinds = ".lora_", ".head.", ".sums", ".adam."
    assert after and all(any(kind in name for kind in kinds) for name in after)
    start = AutoModelForCausalLM.from_pretrained("models/tiny")
    ids = torch.arange(2, 40)[None]
    base = peft.PeftModel.from_pretrained(start, folder / "agent_0/adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "agent_0")
    with torch.inference_mode():
        adapted, plain = base(ids).logits, merged(ids).logits
        with base.disable_adapter():
            assert (base(ids).logits - adapted).abs().max() > 1e-4
    torch.testing.assert_close(adapted, plain, rtol=1e-4, atol=1e-4)


def test_lora_resumes_exactly(elsewhere):
    pytest.importorskip("peft")
    flags = {"lora_rank": 4, "total_env_steps": 8, "save_every": 1}
    whole = train_short(collm_cc, "whole", **flags)
    part = Path(shutil.copytree(whole, "runs/part"))
    max(part.glob("checkpoint_*.pt")).unlink()
    resumed = train_short(collm_cc, "part", **flags, resume=str(part))
    (a, *_), (b, *_) = weights(whole), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained_adapter(tmp_path):
    """(agent with a LoRA adapter of rank 4 that has moved, the folder that it is exported to)."""
    pytest.importorskip("peft")
    agent = make_agent(lora_rank=4)
    nudge([agent])
    agent.export(tmp_path / "trained")
    return agent, str(tmp_path / "trained")


IDS = torch.arange(2, 40)[None]


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def test_lora_goes_on_with_a_trained_adapter(trained_adapter):
    """It computes what the exported agent does, its adapter trains, and the base is shared."""
    trained, folder = trained_adapter
    frozen, args = {}, make_args(collm_cc, lora_rank=4, kl_coef=0.1)
    agents = [collm_cc.Agent(i, folder, args, CPU, frozen) for i in (0, 1)]
    assert (logits_of(trained.model) - logits_of(make_agent().model)).abs().max() > 1e-2
    for agent in agents:
        torch.testing.assert_close(logits_of(agent.model), logits_of(trained.model))
        torch.testing.assert_close(logits_of(agent.reference[0]), logits_of(trained.model))
    names = [name for name, p in agents[0].named_parameters() if p.requires_grad]
    expected = [name for name, p in trained.named_parameters() if p.requires_grad]
    assert names == expected and all(".lora_" in name for name in names)
    shared = [[p.data_ptr() for p in a.parameters() if not p.requires_grad] for a in agents]
    assert shared[0] == shared[1]
    nudge(agents[:1], seed=6)
    assert (logits_of(agents[0].model) - logits_of(agents[1].model)).abs().max() > 1e-2


def test_an_adapter_of_another_rank_is_refused(trained_adapter):
    _, folder = trained_adapter
    with pytest.raises(envs.UserError, match=r"^--model .*trained: .*size mismatch.*lora_A"):
        make_agent(model=folder, lora_rank=8)


def test_without_lora_an_exported_adapter_is_the_merged_model(trained_adapter):
    trained, folder = trained_adapter
    agent = make_agent(model=folder)
    assert all(p.requires_grad for p in agent.parameters())
    torch.testing.assert_close(logits_of(agent.model), logits_of(trained.model))


def test_an_adapter_alone_is_no_model(trained_adapter):
    _, folder = trained_adapter
    for lora_rank in (0, 4):
        with pytest.raises(envs.UserError, match=r"^--model .*adapter: "):
            make_agent(model=f"{folder}/adapter", lora_rank=lora_rank)


@pytest.mark.parametrize("fault", ["keys", "json", "weights"])
def test_an_adapter_that_can_not_go_on_is_one_line(fault, trained_adapter):
    """What does not fit its base, or is broken: never trained from the base."""
    _, folder = trained_adapter
    adapter = Path(folder, "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    if fault == "json":
        (adapter / "adapter_config.json").write_text("{")
    if fault == "keys":
        weights = {name.replace(".layers.0.", ".layers.9."): x for name, x in weights.items()}
        save_file(weights, adapter / "adapter_model.safetensors")
    if fault == "weights":
        (adapter / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(envs.UserError, match=r"^--model .*trained: ") as error:
        make_agent(model=folder, lora_rank=4)
    assert "\n" not in str(error.value)


def test_a_run_starts_from_the_adapters_of_another(elsewhere):
    """Also critics, which have no adapter to go on with: theirs are new, over the same base."""
    pytest.importorskip("peft")
    first = train_short(collm_cc, "first", lora_rank=2, total_env_steps=4)
    agents = [str(first / f"agent_{i}") for i in (0, 1)]
    second = train_short(collm_cc, "second", lora_rank=2, total_env_steps=4, model=agents)
    (a, *_), (b, *_) = weights(first), weights(second)
    assert a.keys() == b.keys()
    adapters = [name for name in a if name.startswith("0.model") and ".lora_B" in name]
    assert adapters and all((a[name] != 0).any() for name in adapters)
    # One step of AdamW moves a weight by its learning rate at most
    rate = collm_cc.Args.__dataclass_fields__["actor_lr"].default_factory()[0]
    for name in adapters:
        assert 0 < (a[name] - b[name]).abs().max() <= 1.01 * rate
    config = json.loads(Path(second, "agent_0/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/tiny" and config["r"] == 2


def test_two_adapters_without_a_step_stay_the_same(trained_adapter, tmp_path):
    """Exported again, an adapter that went on without training is the one that it was."""
    _, folder = trained_adapter
    again = make_agent(model=folder, lora_rank=4)
    again.export(tmp_path / "again")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(f"{path}/{name}") for path in (folder, tmp_path / "again"))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key])


def test_without_peft_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(envs.UserError, match="pip install peft"):
        make_agent(lora_rank=4)


def test_models_of_one_name_are_shared_only_with_lora():
    """Without it each agent has weights of its own, which train apart."""
    frozen, args = {}, make_args(collm_cc)
    a, b = (collm_cc.Agent(i, "models/tiny", args, CPU, frozen) for i in (0, 1))
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}


class Casts(TorchDispatchMode):
    """Counts how often each weight is cast to bfloat16."""

    def __init__(self, models):
        super().__init__()
        self.names = {p.data_ptr(): name for m in models for name, p in m.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_cast = func.__name__.startswith(("_to_copy.", "to."))
        if is_cast and torch.bfloat16 in (*args, *kwargs.values()):
            self.counts[self.names.get(args[0].data_ptr())] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}, {"actor_lr": [0.0]}], ids=str)
def test_weights_are_cast_once_for_all_tokens_of_a_response(flags):
    """What is trained; what is frozen is kept in bfloat16, but for embeddings and norms."""
    if "lora_rank" in flags:
        pytest.importorskip("peft")
    args = make_args(collm_cc, dtype="bfloat16", num_agents=1, **flags)
    agents, _ = make_team(collm_cc, args)
    with Casts(agents) as casts:
        _, episodes = play(collm_cc, agents, args, num_turns=1)
    assert max(len(e.tokens[0]) for e in episodes) > 20
    trained = {name for name, p in agents[0].named_parameters() if p.requires_grad}
    matrices = {name for name, p in agents[0].named_parameters() if p.dim() > 1}
    embeddings = {name for name in matrices if "embed" in name}
    cast = {name: count for name, count in casts.counts.items() if name}
    assert cast == dict.fromkeys(matrices & trained - embeddings, 1)
    for name, p in agents[0].named_parameters():
        is_small = name in matrices - trained - embeddings
        assert p.dtype == (torch.bfloat16 if is_small else torch.float32), name


def test_frozen_weights_in_bfloat16_change_no_result(monkeypatch):
    """Autocast would cast them to the same numbers; two adapters share one copy of them."""
    pytest.importorskip("peft")
    args = make_args(collm_cc, dtype="bfloat16", lora_rank=4)
    agents, critics = make_team(collm_cc, args)
    logits = logits_of(agents[0].model)
    frozen = [{p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in agents]
    assert frozen[0] == frozen[1]
    assert {p.data_ptr() for p in critics[0].parameters() if not p.requires_grad} <= frozen[0]
    monkeypatch.setattr(collm_cc, "freeze", lambda model, args: model.requires_grad_(False))
    assert torch.equal(logits_of(make_team(collm_cc, args)[0][0].model), logits)


def test_logits_are_float32_in_bfloat16():
    """What the head makes of its input is exact to float32, whose logits differ by no tenth."""
    agent, seen = make_agent(dtype="bfloat16"), []
    head = agent.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    logits = logits_of(agent.model)
    exact = seen[0].double() @ head.weight.double().T
    assert logits.dtype == torch.float32 and logits.abs().max() > 4
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_logits_of_many_tokens_are_made_in_parts(dtype, other_model):
    """The same log-probs and gradients, and never the logits of all tokens at once."""
    for name in (other_model, "models/tiny"):
        agent = make_agent(model=name, dtype=dtype)
        tokens = [5 + k % 90 for k in range(160)]
        episodes = [
            make_episode(tokens[: 160 - 20 * k], [-1] * 10 + [0] * (150 - 20 * k)) for k in (0, 1)
        ]
        found = []
        for split in (inf, 16):
            with Largest() as largest:
                logp, gap = collm_cc.logprobs(agent.model, episodes, 0, 1, 0.7, inf, split)
                logp.sum().backward()
            found.append((logp.detach(), gap, gradient_of(agent), largest.numel))
        tolerance = (
            {"rtol": 1e-9, "atol": 1e-9} if dtype == "float64" else {"rtol": 1e-3, "atol": 1e-4}
        )
        for a, b in zip(*(x[:3] for x in found), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    vocabulary = make_agent().model.config.vocab_size
    assert found[0][3] >= 280 * vocabulary
    assert found[1][3] < 140 * vocabulary  # weights are as large as that


def gradient_of(agent):
    """The gradient of all that is trained, which it forgets."""
    flat = torch.cat([p.grad.flatten() for p in agent.parameters()])
    agent.zero_grad()
    return flat


@pytest.mark.parametrize("cap", [None, 5.0])
def test_parts_are_for_models_whose_last_layer_is_their_head(cap, tmp_path):
    """With a cap on logits the head is not the last: they are then made as a whole."""
    folder = make_model(tmp_path, "gemma2", final_logit_softcapping=cap)
    args = make_args(collm_cc, model=[folder], num_agents=1)
    agent = collm_cc.Agent(0, folder, args, torch.device("cpu"), {})
    collm_cc.check_sampling(Words(1, 2), [agent], args)
    assert agent.logits_at_once == (2**26 // 4096 if cap is None else inf)
