"""What larger models need: adapters over one shared base, a KL penalty, recomputed activations, several devices."""

import pytest
import torch
from test_algorithm import CPU, SCRIPTS, make_args, make_team, play, record_gradients, responses, run_update
from test_scripts import train_short, weights
from transformers import AutoModelForCausalLM

import collm_cc
import collm_dc
import envs


def nudge(agents, seed=5, scale=0.02):
    """Move what is trained away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for agent in agents for p in agent.parameters() if p.requires_grad):
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize(("script", "lora_rank"), [*((script, 0) for script in SCRIPTS), (collm_cc, 2)])
def test_kl_penalty_equals_a_naive_reference(script, lora_rank, monkeypatch):
    """The gradient that kl_coef adds is that of the mean of 0.5 (log pi - log reference)^2 over responses."""
    if lora_rank:
        pytest.importorskip("peft")
    args = make_args(script, kl_coef=0.3, lora_rank=lora_rank, norm_adv=False, num_generations=2, microbatch_tokens=300)
    agents, critics = make_team(script, args)
    nudge(agents)
    _, episodes = play(script, agents, args)
    for e in episodes:  # no advantages: nothing but the penalty is left
        e.rewards = [0.0] * len(e.rewards)
    for critic in critics:
        torch.nn.init.zeros_(critic.head.weight)
        torch.nn.init.zeros_(critic.head.bias)
    base = AutoModelForCausalLM.from_pretrained("models/tiny", dtype=torch.float64).eval()
    live, expected, kl = sum(len(e.rewards) for e in episodes), [], []
    for i, agent in enumerate(agents):
        ratios = []
        for e in episodes:
            ids = torch.tensor([e.tokens[i]])
            mine, start = (m(ids).logits[0].log_softmax(-1) for m in (agent.model, base))
            ratios += [sum((mine - start.detach())[p - 1, e.tokens[i][p]] for p in range(*s)) for s in responses(e, i)]
        kl.append(sum(ratios).item() / live)
        loss = 0.3 * sum(0.5 * x**2 for x in ratios) / live
        trained = [p for p in agent.parameters() if p.requires_grad]
        grads = dict(zip(trained, torch.autograd.grad(loss, trained), strict=True))
        expected.append(torch.cat([grads.get(p, torch.zeros_like(p)).flatten() for p in agent.parameters()]))
    seen = record_gradients(script, monkeypatch)
    metrics = run_update(script, episodes, agents, critics, args)
    assert metrics["losses/kl"] == pytest.approx(kl, rel=1e-8)
    for (name, gradient), reference in zip(seen[-len(agents) :], expected, strict=True):
        assert reference.norm() > 1e-3
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)
    args.kl_coef = 0.0
    assert "losses/kl" not in run_update(script, episodes, agents, critics, args)
    assert all(gradient.norm() == 0 for _, gradient in seen[-len(agents) :])


@pytest.mark.parametrize(("script", "lora_rank"), [(collm_cc, 0), (collm_dc, 2)])
def test_gradient_checkpointing_changes_only_what_is_kept(script, lora_rank, monkeypatch):
    """The same gradients, while less is kept for the backward pass; rollouts and dropout are as without it."""
    if lora_rank:
        pytest.importorskip("peft")
    seen, kept, episodes = [], [], None
    for on in (False, True):
        args = make_args(script, gradient_checkpointing=on, lora_rank=lora_rank, num_generations=2)
        agents, critics = make_team(script, args)
        nudge([*agents, *critics])
        if episodes is None:
            _, episodes = play(script, agents, args)
        else:
            assert [e.tokens for e in play(script, agents, args)[1]] == [e.tokens for e in episodes]
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            seen.append(record_gradients(script, patch))
            run_update(script, episodes, agents, critics, args)
        kept.append(sum(sizes))
    for (name, a), (_, b) in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_lora_shares_its_base_and_saves_adapters(script, elsewhere):
    peft = pytest.importorskip("peft")
    args = make_args(script, lora_rank=4, dtype="float32")
    agents, critics = make_team(script, args)
    trained = [name for model in [*agents, *critics] for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name.startswith("head.") for name in trained)
    frozen = [[p.data_ptr() for p in a.parameters() if not p.requires_grad] for a in agents]
    assert len(frozen[0]) > 30 and frozen[0] == frozen[1]
    for critic in critics:
        assert {p.data_ptr() for p in critic.parameters() if not p.requires_grad} <= set(frozen[0])
    folder = train_short(script, "whole", lora_rank=4, total_env_steps=1)
    after, *_ = weights(folder)
    assert after and all(".lora_" in name or ".head." in name or ".adam." in name for name in after)
    start = AutoModelForCausalLM.from_pretrained("models/tiny")
    ids = torch.arange(2, 40)[None]
    base = peft.PeftModel.from_pretrained(start, folder / "agent_0")
    with torch.inference_mode():
        adapted, plain = base(ids).logits, AutoModelForCausalLM.from_pretrained(folder / "agent_0")(ids).logits
        with base.disable_adapter():
            assert (base(ids).logits - adapted).abs().max() > 1e-4
    torch.testing.assert_close(adapted, plain)


def test_lora_resumes_exactly(elsewhere):
    pytest.importorskip("peft")
    whole = train_short(collm_cc, "whole", lora_rank=4, total_env_steps=12)
    part = train_short(collm_cc, "part", lora_rank=4, total_env_steps=8)
    resumed = train_short(collm_cc, "part", lora_rank=4, total_env_steps=12, resume=str(part))
    (a, *_), (b, *_) = weights(whole), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_without_peft_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(envs.UserError, match="pip install peft"):
        collm_cc.Agent("models/tiny", make_args(collm_cc, lora_rank=4), CPU)


@pytest.mark.parametrize("script", [collm_dc])
def test_agents_on_devices_of_their_own_train_the_same(script, elsewhere):
    """Every agent and critic placed by itself, agents acting at once, or all together one after the other."""
    (a, *_), (b, *_) = (
        weights(train_short(script, f"run{len(devices)}", agent_devices=devices)) for devices in ([], ["cpu", "cpu"])
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_models_go_to_their_devices(monkeypatch):
    """Agents first, then critics, the list over and over; here on a device that computes nothing."""
    placed = []
    load = envs.load_model

    def record(auto_class, name, args, device):
        placed.append(str(device))
        return load(auto_class, name, args, CPU)

    class Stop(Exception):
        pass

    def stop(args):
        raise Stop

    monkeypatch.setattr(envs, "load_model", record)
    monkeypatch.setattr(envs, "run_folder", stop)
    for script, expected in zip(SCRIPTS, ([0, 1, 0], [0, 1, 0, 1], [0, 1]), strict=True):
        placed.clear()
        monkeypatch.setattr(
            script, "Critic", lambda name, reads, args, device: placed.append(str(device)), raising=False
        )
        with pytest.raises(Stop):
            script.main(script.Args(agent_devices=["cuda:0", "cuda:1"], device="cpu", num_envs=4))
        assert placed == [f"cuda:{k}" for k in expected]
