"""Whole runs on a pretended GPU, which refuses what CUDA would, equal those on the CPU."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda
from families import Uneven, make_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import collm_cc
import collm_dc
import envs
import mc_baseline

SCRIPTS = [collm_cc, collm_dc, mc_baseline]
KINDS = [collm_cc, mc_baseline]  # with a critic, and without: the rest of DC is CC's
NOT_COMPARED = ("time/", "charts/SPS", "charts/tokens_per_second", "charts/peak_memory_gb")


@pytest.fixture
def little(elsewhere, monkeypatch) -> Path:
    """A current folder with a model that is smaller than models/tiny, and a task to play."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "make", lambda task, num_agents, *options: Uneven(num_agents))
    make_model(elsewhere / "little", "llama", max_position_embeddings=2048)
    return elsewhere


def make_args(script, name: str, device: str, **changes):
    """Args of a short run: at least two iterations, of at most two turns."""
    options = {
        "model": ["little"],
        "task": "uneven",
        "max_new_tokens": 3,
        "num_envs": 4,
        "num_minibatches": 1,
        "total_env_steps": 12,
        "eval_every": 1,
        "eval_episodes": 4,
        "save_every": 1,
        "dtype": "float64",
        "kl_coef": 0.01,
        "run_name": name,
        "device": device,
        **changes,
    }
    names = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{key: value for key, value in options.items() if key in names})
    script.check_args(args)
    return args


def run(script, name: str, device: str, **changes) -> Path:
    """Run a script's main as its command line would; gives the run folder."""
    script.main(make_args(script, name, device, **changes))
    return Path("runs", name)


def scalars(folder: Path) -> dict:
    """{name: [(step, value)]} of a run, without what depends on the clock."""
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    names = [x for x in names if not x.startswith(NOT_COMPARED) and not x.endswith("/time")]
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in names}


def checkpoint(folder: Path) -> dict:
    """The newest checkpoint of a run, whose tensors must be on the CPU."""
    return torch.load(sorted(folder.glob("checkpoint_*.pt"))[-1], weights_only=True)


def assert_same(x, y) -> None:
    """Nested dicts, lists and tensors are equal, tensors up to rounding."""
    assert type(x) is type(y)
    if isinstance(x, torch.Tensor):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    elif isinstance(x, dict):
        assert x.keys() == y.keys()
        for key in x:
            assert_same(x[key], y[key])
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for a, b in zip(x, y, strict=True):
            assert_same(a, b)
    else:
        assert x == pytest.approx(y, rel=1e-6, nan_ok=True) if isinstance(x, float) else x == y


@pytest.mark.parametrize("script", KINDS)
def test_a_run_on_a_gpu_equals_that_on_the_cpu(script, little):
    """Rollout, update, evaluation, checkpoints, in two parts by a resume."""
    on_cpu = run(script, "cpu", "cpu")
    with fake_cuda():
        on_gpu = run(script, "gpu", "auto", total_env_steps=1)
        script.main(make_args(script, "gpu", "cuda:0", resume=str(on_gpu)))
    expected, found = checkpoint(on_cpu), checkpoint(on_gpu)
    assert found["iteration"] == expected["iteration"] > 1
    assert_same(found["models"], expected["models"])
    for i in range(2):
        weights = [x / f"agent_{i}" / "model.safetensors" for x in (on_gpu, on_cpu)]
        assert len({path.stat().st_size for path in weights}) == 1
    assert_same(scalars(on_gpu), scalars(on_cpu))
    assert any(value > 0 for _, value in scalars(on_cpu)["losses/advantage_variance"])


def test_devices(monkeypatch):
    with fake_cuda():
        for name in ("auto", "cuda", "cuda:0"):
            assert collm_cc.join_ranks(name) == torch.device("cuda", 0)
        assert collm_cc.join_ranks("cpu") == torch.device("cpu")
        with pytest.raises(envs.UserError, match="--device cuda:1: RuntimeError: "):
            collm_cc.join_ranks("cuda:1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(envs.UserError, match=r"--device cuda:1: .*ordinal"):
            collm_cc.join_ranks("cuda")
    for name in ("cuda", "cuda:0", "tpu9"):
        with pytest.raises(envs.UserError, match=f"--device {name}.*: "):
            collm_cc.join_ranks(name)
    assert collm_cc.join_ranks("auto") == torch.device("cpu")


def two_turns(device: str) -> tuple:
    """([turn] responses of six rows, which end at different steps; agent, cache)."""
    args = make_args(collm_cc, "turns", device)
    agent = collm_cc.Agent(0, "little", args, collm_cc.join_ranks(device), {})
    agent.chat.eos = agent.chat.eos | set(range(0, 4096, 24))
    cache, turns = collm_cc.RowsCache(), []
    generator = torch.Generator().manual_seed(0)
    prompts = [list(range(5, 9 + 3 * k)) for k in range(6)]
    for _ in range(2):
        uniforms = 1 - torch.rand(6, 40, dtype=torch.float64, generator=generator)
        turns.append(collm_cc.generate(agent, prompts, cache, uniforms))
        prompts = [ids[-1:] + [7] * (1 + k) for k, (ids, _) in enumerate(turns[-1])]
    return turns, agent, cache


def test_what_a_gpu_samples_after_an_eos_leaves_nothing_behind(little):
    """It asks every 16 tokens who has ended: responses, log-probs and the cache are those of
    asking at each token, the keys and positions of tokens after an EOS are in none of them."""
    on_cpu, agent, cache = two_turns("cpu")
    with fake_cuda() as waits:
        before = waits.total()
        on_gpu, _, gpu_cache = two_turns("cuda")
        assert waits.total() - before < 60  # of 80 tokens, each of which asked three times
        gpu_cache.select(gpu_cache.row_of)
        gpu_mask, gpu_keys = gpu_cache.mask.cpu(), [x.keys.cpu() for x in gpu_cache.layers]
    cache.select(cache.row_of)
    lengths = {len(ids) for turn in on_cpu for ids, _ in turn}
    assert len(lengths) > 6 and min(lengths) < 12 and max(lengths) > 16
    for a, b in zip(on_cpu, on_gpu, strict=True):
        for (ids, logps), (gpu_ids, gpu_logps) in zip(a, b, strict=True):
            assert gpu_ids == ids and gpu_logps == pytest.approx(logps, abs=1e-12)
            assert not agent.eos & set(ids[:-1])
    assert torch.equal(gpu_mask, cache.mask)
    seen = cache.mask[:, None, :, None].bool()
    for layer, keys in zip(cache.layers, gpu_keys, strict=True):
        torch.testing.assert_close(layer.keys * seen, keys * seen, rtol=0, atol=1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_how_often_the_cpu_waits_in_an_update(script, little):
    """A microbatch costs few waits: its sequences are moved once, its log-probs are never read."""
    seen = []
    with fake_cuda() as waits:
        task, args = Uneven(2), make_args(script, "waits", "cuda", kl_coef=0)
        team = script.build(task, args, script.join_ranks("cuda"))
        episodes = script.start_episodes(task.train[:4], 2)
        script.rollout(task, episodes, team[0], args, "rollout", 0)
        for args.microbatch_tokens in (10**6, 1):
            models = copy.deepcopy(team)
            before = waits.total()
            script.update(episodes, *models, 2, args, 0)
            seen.append(waits.total() - before)
    num_models = {collm_cc: 3, collm_dc: 4, mc_baseline: 2}[script]
    # A whole update of one microbatch for each step, its metrics read; a critic takes four steps
    assert seen[0] <= {collm_cc: 37, collm_dc: 57, mc_baseline: 14}[script]
    assert (seen[1] - seen[0]) / (4 * num_models - num_models) <= 1  # of transformers, each forward


def test_what_cuda_refuses():
    """The pretended GPU is of use only if it refuses."""
    with fake_cuda():
        gpu, cpu = torch.zeros(3, device="cuda"), torch.ones(3)
        row = torch.zeros(1, dtype=torch.long, device="cuda")
        refused = [
            lambda: gpu + cpu,
            lambda: cpu.add_(gpu),
            lambda: torch.cat([gpu, cpu]),
            lambda: cpu[row],
            lambda: torch.zeros(()).add_(gpu.sum()),
            lambda: gpu.normal_(generator=torch.Generator()),
            lambda: gpu.numpy(),
            lambda: torch.empty(0, device="cuda:1"),
            lambda: torch.cuda.set_device(torch.device("cuda")),
            lambda: torch.nn.functional.linear(gpu, cpu[None]),
        ]
        for call in refused:
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                call()
        assert (gpu + torch.tensor(2.0))[torch.tensor([1])].tolist() == [2.0]
        leaf = cpu.to("cuda").requires_grad_()
        (leaf * 3).sum().backward()
        assert leaf.grad.device == gpu.device
        assert not cpu.is_cuda
    assert torch.zeros(1).device == torch.device("cpu")
