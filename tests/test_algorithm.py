"""The algorithms against independent references: naive loops, one sample at a time, and numbers worked by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import collm_cc
import collm_dc
import envs
import mc_baseline

SCRIPTS = [collm_cc, collm_dc, mc_baseline]
CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def in_float64(self, x, forward=LlamaRMSNorm.forward):
    """LlamaRMSNorm computes in float32 whatever the model's dtype, which would hide all differences below 1e-7."""
    if x.dtype != torch.float64:
        return forward(self, x)
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


LlamaRMSNorm.forward = in_float64


class Words(envs.Task):
    """A cheap task with uneven texts; the reward depends on what was said, feedback on the turn."""

    name, num_turns, max_new_tokens, success, reward_shift = "words", 3, 16, 4.0, -1.0

    def items(self):
        items = [{"text": "word " * (3 + 8 * k)} for k in range(4)]
        return items, items

    def observe(self, item):
        return [f"agent {i}: {item['text']}" for i in range(self.num_agents)]

    def score(self, item, actions):
        reward = (sum(map(len, actions)) + len(item["text"])) % 6  # 4 and 5 end the episode
        return float(reward), {"success": float(reward >= 4)}

    def feedback(self, item, actions, info, turn):
        return [f"turn {turn} " * (1 + i + len(item["text"]) % 4) for i in range(self.num_agents)]

    def render(self, item, actions):
        return " | ".join(actions)


def make_args(script, **changes):
    changes = {"dtype": "float64", "device": "cpu", "num_envs": 8, "num_minibatches": 1, **changes}
    return script.Args(**{k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(script.Args)}})


def make_team(script, args, num_agents=2, model="models/tiny"):
    torch.manual_seed(0)
    agents = [script.Agent(model, args, CPU) for _ in range(num_agents)]
    critics = []
    if script is collm_cc:
        critics = [script.Critic(model, list(range(num_agents)), args, CPU)]
    if script is collm_dc:
        critics = [script.Critic(model, [i], args, CPU) for i in range(num_agents)]
    for critic in critics:  # values that differ from turn to turn
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    return agents, critics


def play(script, agents, args, seed=0, num_turns=3, items=None):
    task = Words(len(agents), num_turns)
    items = items or [item for item in task.train for _ in range(2)]
    return task, script.rollout(task, items, agents, args, torch.Generator().manual_seed(seed))


def record_gradients(script, monkeypatch):
    """Gradients that `optimize` is given, in order of its calls; nothing is stepped."""
    seen = []

    def optimize(name, model, max_grad_norm):
        grads = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        seen.append((name, torch.cat([g.flatten() for g in grads])))
        model.zero_grad()
        return seen[-1][1].norm()

    monkeypatch.setattr(script, "optimize", optimize)
    return seen


def run_update(script, episodes, agents, critics, args, num_turns=3):
    team = (agents,) if script is mc_baseline else (agents, critics)
    return script.update(episodes, *team, num_turns, args, 0)


def responses(episode, i):
    """[turn] (start, end) of agent i's responses."""
    marks = episode.turns[i]
    return [(marks.index(t), len(marks) - marks[::-1].index(t)) for t in range(len(episode.rewards))]


# ---------------------------------------------------------------------------------------------------- generation
def reference_greedy(agent, tokens, limit):
    """One row, no cache, no mask: the most likely token again and again."""
    response = []
    while len(response) < limit and (not response or response[-1] not in agent.eos):
        logits = agent.model(torch.tensor([tokens + response])).logits[0, -1]
        response.append(int(logits.argmax()))
    return response


@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_batched_cached_generation_equals_unbatched(model, other_model):
    args = make_args(collm_cc)
    agent = collm_cc.Agent(other_model if model == "other" else model, args, CPU)
    task = envs.make("coding")
    prompts = [agent.frame(task.observe(item)[k % 2], []) for k, item in enumerate(task.train[:4])]
    prompts = [*prompts, prompts[2], agent.frame("x", [])]  # of different lengths, two of them equal
    prompts[1] = agent.frame("a long one " * 80, [])  # several blocks of columns are read, the first ones by it alone
    assert len(prompts[1]) > 128 + len(prompts[0])
    cache = collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
    histories, limit = [[] for _ in prompts], 10
    alive, frames = list(range(len(prompts))), dict(enumerate(prompts))
    for turn, kept in enumerate([alive, [0, 1, 3, 4, 5], [5, 3, 0]]):  # rows leave between the turns
        if turn:
            cache.place = cache.place[[alive.index(k) for k in kept]]
            frames = {k: agent.frame(f"again {turn} " * (9 * k + 1), histories[k]) for k in kept}
            alive = kept
        feed = [histories[k][-1:] + frames[k] for k in alive]
        out = collm_cc.generate(agent, feed, cache, limit, 1e-9, torch.Generator().manual_seed(turn))
        for k, response in zip(alive, out, strict=True):
            histories[k] = histories[k] + frames[k]
            assert response == reference_greedy(agent, histories[k], limit), (turn, k)
            histories[k] = histories[k] + response


def test_cache_holds_the_same_values_as_a_forward_without_it():
    """After a turn in which rows ended at different steps, the next token's logits are those of a plain forward."""
    args = make_args(collm_cc)
    agent = collm_cc.Agent("models/tiny", args, CPU)
    task = envs.make("coding")
    prompts = [agent.frame(task.observe(item)[0], []) for item in task.train[:6]]
    cache = collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
    out = collm_cc.generate(agent, prompts, cache, 60, 1.0, torch.Generator().manual_seed(0))
    assert len(set(map(len, out))) > 2
    ids = torch.tensor([response[-1:] for response in out])
    cache.select(cache.place)
    mask = torch.cat([cache.mask, torch.ones(6, 1, dtype=torch.long)], 1)
    with torch.inference_mode():
        positions = mask.sum(1, keepdim=True) - 1
        logits = agent.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        for k in range(6):
            alone = agent.model(torch.tensor([prompts[k] + out[k]])).logits[0, -1]
            torch.testing.assert_close(logits[k], alone, rtol=0, atol=1e-10)


def test_the_cache_is_as_small_as_autocast_allows():
    """Rotary embeddings give float32 keys under autocast; attention reads them as bfloat16, so that is what is kept."""
    agent = collm_cc.Agent("models/tiny", make_args(collm_cc, dtype="bfloat16"), CPU)
    cache = collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
    prompt = agent.frame("Say anything.", [])
    collm_cc.generate(agent, [prompt], cache, 2, 1.0, torch.Generator().manual_seed(0))
    assert {layer.buffer.dtype for layer in cache.layers} == {torch.bfloat16}
    with torch.inference_mode():
        alone = agent.model(torch.tensor([prompt])).logits[0, -1]
        ids, cache = torch.tensor([prompt]), collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
        cached = agent.model(ids, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(cached, alone, rtol=0, atol=0)


def test_sampling_distribution_is_the_trained_one(monkeypatch):
    """The probabilities that were sampled from are the ones whose logs `logprobs` gives, at the same temperature."""
    args = make_args(collm_cc, temperature=0.7)
    agent = collm_cc.Agent("models/tiny", args, CPU)
    log, searchsorted = [], torch.searchsorted

    def spy(cdf, value):
        token = searchsorted(cdf, value)
        log.append(float(cdf[0].diff(prepend=cdf.new_zeros(1))[token[0, 0]].log()))
        return token

    monkeypatch.setattr(torch, "searchsorted", spy)
    prompt = agent.frame(envs.make("coding").observe(envs.make("coding").train[0])[1], [])
    cache = collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
    (response,) = collm_cc.generate(agent, [prompt], cache, 60, 0.7, torch.Generator().manual_seed(3))
    turns = [-1] * len(prompt) + [0] * len(response)
    logp = collm_cc.logprobs(agent, [prompt + response], [turns], 1, 0.7)
    assert response[-1] in agent.eos
    assert logp.item() == pytest.approx(sum(log), abs=1e-9)


def test_sampled_tokens_are_distributed_as_the_softmax():
    """First tokens of 20000 responses to one prompt against the model's own probabilities, by a chi-squared test."""
    agent = collm_cc.Agent("models/tiny", make_args(collm_cc), CPU)
    prompt = agent.frame("Say anything.", [])
    cache = collm_cc.RowsCache(layer_class_to_replicate=collm_cc.RowsLayer)
    found = collm_cc.generate(agent, [prompt] * 20000, cache, 1, 1.5, torch.Generator().manual_seed(0))
    count = torch.bincount(torch.tensor(found)[:, 0], minlength=agent.model.config.vocab_size)
    with torch.no_grad():
        expected = 20000 * (agent.model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    often = expected >= 10
    assert often.sum() > 20 and count[expected == 0].sum() == 0
    pairs = [(count[often], expected[often]), (count[~often].sum(), expected[~often].sum())]
    chi = sum(((o - e) ** 2 / e).sum() for o, e in pairs)
    freedom = float(often.sum())
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5  # mean and 4 standard deviations of the statistic


def test_a_rollout_plays_at_most_rollout_batch_episodes_at_once():
    args = make_args(collm_cc, num_envs=8, rollout_batch=3)
    assert envs.parts(list(range(8)), args) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    args.num_envs, args.rollout_batch = 2, 64  # nor does an evaluation play more than an iteration does
    assert envs.parts(list(range(5)), args) == [[0, 1], [2, 3], [4]]


# ------------------------------------------------------------------------------------------- log-probs and values
@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_logprobs_equal_a_naive_loop(model, other_model):
    args = make_args(collm_cc, temperature=0.8)
    agents = [collm_cc.Agent(other_model if model == "other" else model, args, CPU) for _ in range(2)]
    _, episodes = play(collm_cc, agents, args)
    assert len({len(e.rewards) for e in episodes}) > 1  # some end early
    batch = collm_cc.logprobs(agents[0], [e.tokens[0] for e in episodes], [e.turns[0] for e in episodes], 3, 0.8)
    ended = 0
    for k, e in enumerate(episodes):
        logits = agents[0].model(torch.tensor([e.tokens[0]])).logits[0] / 0.8
        for t, (start, end) in enumerate(responses(e, 0)):
            expected = sum(logits[p - 1].log_softmax(-1)[e.tokens[0][p]].item() for p in range(start, end))
            assert batch[t, k].item() == pytest.approx(expected, abs=1e-10)
            ended += e.tokens[0][end - 1] in agents[0].eos
        assert (batch[len(e.rewards) :, k] == 0).all()
    assert ended > 0 or model == "other"


@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_histories_that_share_a_row_equal_a_row_for_each(model, other_model):
    """Log-probs and gradients, with few tokens computed: o_0, less its last token, once, and the rest of each."""
    agent = collm_cc.Agent(other_model if model == "other" else model, make_args(collm_cc), CPU)
    _, episodes = play(collm_cc, [agent], make_args(collm_cc))
    tokens, turns = [e.tokens[0] for e in episodes], [e.turns[0] for e in episodes]
    starts = [t.index(0) - 1 for t in turns]
    weights = torch.randn(3, len(tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([collm_cc.logprobs(agent, [x], [t], 3, 0.8) for x, t in zip(tokens, turns, strict=True)], 1)
    expected = torch.autograd.grad((apart * weights).sum(), list(agent.model.parameters()), allow_unused=True)
    computed = []
    agent.model.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0]))
    together = collm_cc.logprobs(agent, tokens, turns, 3, 0.8)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)
    grads = torch.autograd.grad((together * weights).sum(), list(agent.model.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-9)
    (ids,) = computed
    rows = [sum(len(tokens[k]) for k in (2 * p, 2 * p + 1)) - starts[2 * p] for p in range(4)]
    assert ids.shape == (4, max(rows))  # two episodes of each item


def test_histories_share_a_row_only_if_fewer_tokens_are_computed():
    agent = collm_cc.Agent("models/tiny", make_args(collm_cc), CPU)
    tokens = [[5, 6, *[7] * 20], [5, 6, *[8] * 20], [9, 6, *[7] * 20]]  # shared: rows of 41 and 22 tokens, 82 in all
    turns = [[-1, -1, *[0] * 20]] * 3
    assert [x.shape for x in envs.pack(tokens, turns, agent.model)[:3]] == [(3, 22)] * 3
    apart = [collm_cc.logprobs(agent, [x], [t], 1, 1.0) for x, t in zip(tokens, turns, strict=True)]
    torch.testing.assert_close(collm_cc.logprobs(agent, tokens, turns, 1, 1.0), torch.cat(apart, 1), rtol=0, atol=1e-10)
    tokens = [[*range(5, 35), 7], [*range(5, 35), 8], [*range(6, 36), 7]]  # rows of 29 + 2 + 2 and 31
    assert envs.pack(tokens, [[-1] * 30 + [0]] * 3, agent.model)[0].shape == (2, 33)


def test_the_last_token_and_the_eos_are_trained_even_if_eos_is_pad(other_model):
    agent = collm_cc.Agent(other_model, make_args(collm_cc), CPU)
    eos = agent.tokenizer.eos_token_id
    assert agent.tokenizer.pad_token_id == eos and agent.eos == {eos}
    tokens, turns = [5, 6, 7, 8, eos], [-1, -1, 0, 0, 0]
    agent.model.zero_grad()
    whole = collm_cc.logprobs(agent, [tokens, [5, 6, 9]], [turns, [-1, -1, 0]], 1, 1.0)[0]
    logp = agent.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = (logp[1, 7] + logp[2, 8] + logp[3, eos]).item()
    assert whole[0].item() == pytest.approx(expected, abs=1e-10)
    (eos_row,) = torch.autograd.grad(whole[0], agent.model.lm_head.bias or agent.model.lm_head.weight)
    assert eos_row[eos].abs().sum() > 0


def test_values_equal_a_naive_loop_over_prefixes():
    """V(h_t) from one forward is what a forward of h_t alone gives at its last token."""
    args = make_args(collm_cc)
    agents, (critic,) = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args)
    tokens, ends = zip(*map(critic.encode, episodes), strict=True)
    values = critic(tokens, ends, 3)
    for k, e in enumerate(episodes):
        assert len(ends[k]) == len(e.rewards) and ends[k][-1] == len(tokens[k]) - 1
        for t, end in enumerate(ends[k] if k % 3 == 0 else []):
            alone = critic([tokens[k][: end + 1]], [[end]], 1)
            assert values[t, k].item() == pytest.approx(alone.item(), abs=1e-10)


def test_what_each_critic_reads():
    args = make_args(collm_cc)
    texts = [["o00", "a00", "o01", "a01"], ["o10", "a10", "o11", "a11"]]
    episode = collm_cc.Episode({}, [], [], texts, [0.0, 0.0], [])

    def read(script, reads, **changes):
        critic = script.Critic("models/tiny", reads, make_args(script, **changes), CPU)
        tokens, ends = critic.encode(episode)
        pieces = [0] + [end + 1 for end in ends]
        return [critic.tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(pieces)]

    assert read(collm_cc, [0, 1]) == [
        "[Agent 0]\no00\n\n[Agent 1]\no10",
        "\n\n[Agent 0]\na00\no01\n\n[Agent 1]\na10\no11",
    ]
    assert read(collm_dc, [1]) == ["[Agent 1]\no10", "\n\n[Agent 1]\na10\no11"]
    assert read(collm_cc, [0, 1], critic_type="q") == [
        "[Agent 0]\no00\na00\n\n[Agent 1]\no10\na10",
        "\n\n[Agent 0]\no01\na01\n\n[Agent 1]\no11\na11",
    ]
    assert args.critic_type == "v"


# ----------------------------------------------------------------------------------------- advantages, baselines
def test_gae_by_hand():
    """Episode 0 lives for three turns, episode 1 for one. gamma 0.9."""
    rewards = torch.tensor([[1.0, 5.0], [2.0, 0.0], [3.0, 0.0]])
    values = torch.tensor([[10.0, 4.0], [20.0, 7.0], [30.0, 7.0]])
    live = torch.tensor([[True, True], [True, False], [True, False]])
    for script in SCRIPTS:
        td = script.gae(rewards, values, live, 0.9, 0.0)
        # 1 + 0.9 * 20 - 10, 2 + 0.9 * 30 - 20, 3 - 30; 5 - 4 without bootstrap
        torch.testing.assert_close(td, torch.tensor([[9.0, 1.0], [9.0, 0.0], [-27.0, 0.0]]))
        half = script.gae(rewards, values, live, 0.9, 0.5)
        # from the end: -27; 9 + 0.45 * -27 = -3.15; 9 + 0.45 * -3.15 = 7.5825
        torch.testing.assert_close(half, torch.tensor([[7.5825, 1.0], [-3.15, 0.0], [-27.0, 0.0]]))
        returns = script.gae(rewards, torch.zeros(3, 2), live, 0.9, 1.0)
        # 1 + 0.9 * (2 + 0.9 * 3), 2 + 0.9 * 3, 3
        torch.testing.assert_close(returns, torch.tensor([[5.23, 5.0], [4.7, 0.0], [3.0, 0.0]]))


def test_baselines_by_hand():
    """Two items, K = 3; in turn 1 the second item has two live episodes, and the first has one."""
    returns = torch.tensor([[1.0, 2.0, 6.0, -1.0, -4.0, 2.0], [0.0, 5.0, 0.0, 3.0, 0.0, 7.0]])
    live = torch.tensor([[True] * 6, [False, True, False, True, False, True]])
    expected = {
        "mean": [[3.0, 3, 3, -1, -1, -1], [5.0, 5, 5, 5, 5, 5]],
        "rloo": [[4.0, 3.5, 1.5, -1.0, 0.5, -2.5], [None, 5.0, None, 7.0, None, 3.0]],
        "max": [[6.0, 6, 6, 2, 2, 2], [5.0, 5, 5, 7, 7, 7]],
        "none": [[0.0] * 6, [0.0] * 6],
    }
    for kind, rows in expected.items():
        out = mc_baseline.baselines(returns, live, 3, kind)
        assert out.shape == (2, 6)
        for t in range(2):
            for k in range(6):
                if live[t, k]:
                    assert float(out[t, k]) == pytest.approx(rows[t][k]), (kind, t, k)
    dead = mc_baseline.baselines(returns, torch.zeros_like(live), 3, "max")
    assert dead.isfinite().all()


# ------------------------------------------------------------------------------------------------------- updates
def reference_losses(script, episodes, agents, critics, args):
    """The losses of one minibatch, one sample at a time; lists of scalars with gradients, critics first."""
    num, live = len(agents), sum(len(e.rewards) for e in episodes)
    advantages = [[[0.0] * len(e.rewards) for e in episodes] for _ in agents]
    losses = [0.0 for _ in critics]
    for k, e in enumerate(episodes):
        turns = range(len(e.rewards))
        for c, critic in enumerate(critics):
            tokens, ends = critic.encode(e)
            hidden = critic.body(torch.tensor([tokens])).last_hidden_state[0]
            v = [critic.head(hidden[end])[0] for end in ends]
            for t in turns:
                target = e.rewards[t] + (args.gamma * v[t + 1].item() if t + 1 in turns else 0.0)
                losses[c] = losses[c] + args.vf_coef * (v[t] - target) ** 2 / live
                for i in critic.reads:
                    advantages[i][k][t] = target - v[t].item()
        if script is mc_baseline:
            group = episodes[k // args.num_generations * args.num_generations :][: args.num_generations]
            for t in turns:
                to_go = [
                    sum(args.gamma**s * r for s, r in enumerate(x.rewards[t:])) for x in group if len(x.rewards) > t
                ]
                own = sum(args.gamma**s * r for s, r in enumerate(e.rewards[t:]))
                for i in range(num):
                    advantages[i][k][t] = own - sum(to_go) / len(to_go)
    for i, agent in enumerate(agents):
        flat = np.array([a for row in advantages[i] for a in row])
        mean, std = (flat.mean(), flat.std() + 1e-8) if args.norm_adv else (0.0, 1.0)
        loss = 0.0
        for k, e in enumerate(episodes):
            logp = agent.model(torch.tensor([e.tokens[i]])).logits[0].div(args.temperature).log_softmax(-1)
            for t, (start, end) in enumerate(responses(e, i)):
                total = sum(logp[p - 1, e.tokens[i][p]] for p in range(start, end))
                loss = loss - total * (advantages[i][k][t] - mean) / std / live
        losses.append(loss)
    return losses


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_equal_a_naive_reference(script, norm_adv, monkeypatch):
    args = make_args(script, norm_adv=norm_adv, num_generations=2, microbatch_tokens=300)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    assert {len(e.rewards) for e in episodes} >= {1, 3}
    expected = []
    for loss, model in zip(reference_losses(script, episodes, agents, critics, args), [*critics, *agents], strict=True):
        model.zero_grad()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, model.parameters(), strict=True)]
        expected.append(torch.cat([g.flatten() for g in grads]))
    seen = record_gradients(script, monkeypatch)
    run_update(script, episodes, agents, critics, args)
    assert len(seen) == len(expected)  # the centralized critic takes one step, not one for each agent
    for (name, gradient), reference in zip(seen, expected, strict=True):
        assert reference.norm() > 1e-6, name
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_microbatches_change_nothing(script, monkeypatch):
    """One row at a time (no padding at all) or all rows at once (much padding): the same gradients and metrics."""
    seen, metrics, args = [], [], make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    for args.microbatch_tokens in (1, 500, 10**9):
        with monkeypatch.context() as patch:
            seen.append(record_gradients(script, patch))
            metrics.append(run_update(script, episodes, agents, critics, args))
    for other, values in zip(seen[1:], metrics[1:], strict=True):
        for (_, a), (_, b) in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert values.keys() == metrics[0].keys()
        for name in values:
            assert values[name] == pytest.approx(metrics[0][name], rel=1e-8), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_are_means_over_real_tokens_and_live_turns(script):
    args = make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    lengths = [end - start for e in episodes for i in (0, 1) for start, end in responses(e, i)[-1:]]
    args.max_new_tokens = int(np.median(lengths))  # cuts some responses
    _, episodes = play(script, agents, args)
    live = sum(len(e.rewards) for e in episodes)
    expected = {}
    for i, agent in enumerate(agents):
        spans = [(e, start, end) for e in episodes for start, end in responses(e, i)]
        count, total = sum(end - start for _, start, end in spans), 0.0
        for e, start, end in spans:
            logp = agent.model(torch.tensor([e.tokens[i][:end]])).logits[0].log_softmax(-1)
            total -= sum(logp[p - 1, e.tokens[i][p]].item() for p in range(start, end))
        expected["losses/entropy", i] = total / count
        expected["charts/response_length", i] = count / live
        ended = [e.tokens[i][-1] in agent.eos for e in episodes]
        assert 0 < sum(ended) < len(ended)
        expected["charts/eos_rate", i] = sum(ended) / len(ended)
        for critic in critics:
            if i in critic.reads:
                errors, rest, returns = [], [], []
                for e in episodes:
                    tokens, ends = critic.encode(e)
                    v = [*critic([tokens], [ends], len(ends))[:, 0].tolist(), 0.0]
                    errors += [r + args.gamma * v[t + 1] - v[t] for t, r in enumerate(e.rewards)]
                    to_go = [sum(args.gamma**s * r for s, r in enumerate(e.rewards[t:])) for t in range(len(e.rewards))]
                    returns += to_go
                    rest += [g - v[t] for t, g in enumerate(to_go)]
                expected["losses/value_loss", i] = np.mean(np.square(errors))
                expected["losses/advantage_variance", i] = np.var(errors)
                expected["losses/explained_variance", i] = 1 - np.var(rest) / np.var(returns)
    metrics = run_update(script, episodes, agents, critics, args)
    for (name, i), value in expected.items():
        assert metrics[name][i] == pytest.approx(value, rel=1e-6), (name, i)


def test_microbatches_hold_every_row_once_within_the_budget():
    lengths = [5, 90, 7, 7, 300, 12, 5, 40, 41]
    groups = list(envs.microbatches(lengths, 100))
    assert sorted(k for rows in groups for k in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[k] for k in rows) <= 100 for rows in groups)
    padding = [1 - sum(lengths[k] for k in rows) / (len(rows) * max(lengths[k] for k in rows)) for rows in groups]
    assert max(padding) <= 0.1
    assert len(groups) == 6  # 5 5 | 7 7 | 12 | 40 41 | 90 | 300: 3 x 7 and 3 x 12 would hold too much padding
    assert [len(rows) for rows in envs.microbatches([40] * 5, 100)] == [2, 2, 1]
    # Groups of two stay together if every group keeps to the budget: 30 + 40 | 50 + 10 | 20 + 20
    assert list(envs.microbatches([30, 40, 50, 10, 20, 20], 100, 2)) == [[4, 5], [2, 3], [0, 1]]
    assert list(envs.microbatches([30, 40, 50, 10, 20, 20], 140, 2)) == [[4, 5], [2, 3, 0, 1]]
    assert list(envs.microbatches([30, 40, 70, 10, 20, 20], 75, 2)) == list(
        envs.microbatches([30, 40, 70, 10, 20, 20], 75)
    )


@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_one_agent_makes_cc_and_dc_the_same(critic_type):
    out = []
    for script in (collm_cc, collm_dc):
        args = make_args(script, num_agents=1, critic_type=critic_type, num_minibatches=2, gae_lambda=0.5)
        agents, critics = make_team(script, args, num_agents=1)
        for step in range(2):
            _, episodes = play(script, agents, args, seed=step)
            metrics = run_update(script, episodes, agents, critics, args)
        weights = torch.cat([p.detach().flatten() for p in [*agents[0].parameters(), *critics[0].parameters()]])
        out.append((metrics, weights))
    assert out[0][0] == out[1][0]
    assert torch.equal(out[0][1], out[1][1])


def test_q_critic_advantage_is_q_and_its_target_bootstraps_q(monkeypatch):
    args = make_args(collm_cc, critic_type="q", norm_adv=False)
    agents, (critic,) = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args)
    live, losses = sum(len(e.rewards) for e in episodes), [0.0, 0.0, 0.0]
    for e in episodes:
        tokens, ends = critic.encode(e)
        hidden = critic.body(torch.tensor([tokens])).last_hidden_state[0]
        q = [critic.head(hidden[end])[0] for end in ends]
        for t in range(len(q)):
            target = e.rewards[t] + (args.gamma * q[t + 1].item() if t + 1 < len(q) else 0.0)
            losses[0] = losses[0] + args.vf_coef * (q[t] - target) ** 2 / live
        for i, agent in enumerate(agents):
            logp = collm_cc.logprobs(agent, [e.tokens[i]], [e.turns[i]], 3, 1.0)[:, 0]
            losses[i + 1] = losses[i + 1] - sum(logp[t] * q[t].item() for t in range(len(q))) / live
    expected = []
    for loss, model in zip(losses, [critic, *agents], strict=True):
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, model.parameters(), strict=True)]
        expected.append(torch.cat([g.flatten() for g in grads]))
    seen = record_gradients(collm_cc, monkeypatch)
    run_update(collm_cc, episodes, agents, [critic], args)
    for (name, gradient), reference in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_non_finite_gradient_stops_before_the_step(script):
    args = make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    episodes[3].rewards[0] = float("nan")
    before = [p.clone() for model in [*critics, *agents] for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"agent 0|critic of agents \[0"):
        run_update(script, episodes, agents, critics, args)
    after = [p for model in [*critics, *agents] for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------------ rollouts
def test_an_episode_only_grows_and_keeps_the_sampled_ids():
    """Turn by turn: the observation's tokens, then the sampled ones; one EOS between them; texts are what they say."""
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    task, episodes = play(collm_cc, agents, args)
    for e in episodes:
        assert len(e.rewards) == len(e.infos) and len(e.rewards) <= 3
        assert all(info["success"] == 0 for info in e.infos[:-1])  # success ends an episode
        assert len(e.rewards) == 3 or e.infos[-1]["success"] == 1
        for i, agent in enumerate(agents):
            assert len(e.tokens[i]) == len(e.turns[i])
            history, begin = [], 0
            for t, (start, end) in enumerate(responses(e, i)):
                frame = agent.frame(e.texts[i][2 * t], history)
                assert e.tokens[i][begin:start] == frame
                text = agent.tokenizer.decode(e.tokens[i][start:end], skip_special_tokens=True)
                assert text == e.texts[i][2 * t + 1]
                assert not set(e.tokens[i][start : end - 1]) & agent.eos  # nothing after an EOS
                assert end - start == task.max_new_tokens or e.tokens[i][end - 1] in agent.eos
                if t:  # never two EOS in a row, and always one: the agent's own or the template's
                    assert (e.tokens[i][begin - 1] in agent.eos) + (frame[0] in agent.eos) == 1
                history, begin = e.tokens[i][:end], end
            assert e.rewards[0] == task.score(e.item, [x[1] for x in e.texts])[0] + task.reward_shift


def test_chat_template_is_the_whole_conversations_rendering():
    """What an episode's frames add up to is what the template makes of the conversation."""
    agent = collm_cc.Agent("models/tiny", make_args(collm_cc), CPU)
    turns = [("one", "two"), ("three", "four")]
    tokens, chat = [], []
    for user, reply in turns:
        tokens += agent.frame(user, tokens)
        tokens += agent.tokenizer(reply)["input_ids"] + [agent.tokenizer.eos_token_id]
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    tokens += agent.frame("five", tokens)
    chat.append({"role": "user", "content": "five"})
    whole = agent.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert agent.tokenizer.decode(tokens) == whole


def test_reward_shift_and_too_long_histories():
    args = make_args(collm_cc, reward_shift=100.0)
    agents, _ = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args, num_turns=1)
    assert all(100 <= e.rewards[0] <= 105 for e in episodes)
    with pytest.raises(envs.UserError, match=r"agent 0: .* longer than its model reads"):
        play(collm_cc, agents, args, items=[{"text": "word " * 5000}])


def test_histories_beyond_a_window_or_a_critic_are_refused(tmp_path):
    """A sliding window counts the holes of the cache, so it would sample from another distribution than is trained."""
    args = make_args(collm_cc)
    config = AutoConfig.from_pretrained("models/tiny")
    MistralForCausalLM(MistralConfig(**SHAPE, vocab_size=config.vocab_size, sliding_window=64)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained("models/tiny").save_pretrained(tmp_path)
    agents, (critic,) = make_team(collm_cc, args, model=str(tmp_path))
    with pytest.raises(envs.UserError, match=r"agent 0: .* longer than its model reads"):
        play(collm_cc, agents, args)
    episode = collm_cc.Episode({}, [], [], [["word " * 40] * 2, ["word " * 40] * 2], [0.0], [])
    with pytest.raises(envs.UserError, match=r"critic of agents \[0, 1\]: .* too long"):
        critic.encode(episode)


def test_sample_is_an_endless_shuffled_stream():
    items = list(range(10))
    stream = [x for k in range(5) for x in envs.sample(items, 4, seed=1, iteration=k)]
    assert sorted(stream[:10]) == items and sorted(stream[10:]) == items and stream[:10] != stream[10:]
    assert stream == [x for k in range(2) for x in envs.sample(items, 10, seed=1, iteration=k)]
    assert stream != [x for k in range(5) for x in envs.sample(items, 4, seed=2, iteration=k)]
    assert len(envs.sample([1, 2, 3], 64, 0, 7)) == 64


def test_sparse_rewards_pay_all_or_nothing(monkeypatch):
    monkeypatch.setattr(envs.StrBuild, "score", lambda self, item, action: (2 * action / 100, {"score": action}))
    actions = [0.0, 69.9, 70.0, 85.0, 100.0]
    task = envs.make("strbuild", sparse=70.0)
    scores = envs.score_batch(task, [None] * 5, actions)
    assert scores == [(r, {"score": a}) for r, a in zip([0.0, 0.0, 2.0, 2.0, 2.0], actions, strict=True)]
    assert task.success <= 2.0  # so that what is paid ends the episode
    dense = [reward for reward, _ in envs.score_batch(envs.make("strbuild"), [None] * 5, actions)]
    assert dense == pytest.approx([0.0, 1.398, 1.4, 1.7, 2.0])
