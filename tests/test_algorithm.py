"""The algorithms against independent references: naive loops, one sample at a time, and numbers
worked by hand."""

import dataclasses
import itertools
from math import inf

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import collm_cc
import collm_dc
import envs
import mc_baseline

SCRIPTS = [collm_cc, collm_dc, mc_baseline]
KINDS = [collm_cc, mc_baseline]  # with a critic, and without: the rest of DC is CC's
CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def in_float64(self, x, forward=LlamaRMSNorm.forward):
    """LlamaRMSNorm computes in float32 whatever the model's dtype, which would hide all
    differences below 1e-7."""
    if x.dtype != torch.float64:
        return forward(self, x)
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


LlamaRMSNorm.forward = in_float64


class Words(envs.Task):
    """A cheap task for any number of agents, with uneven texts; the reward depends on what was
    said, feedback on the turn."""

    name, num_turns, max_new_tokens, success, reward_shift = "words", 3, 16, 4.0, -1.0
    num_envs, settings = 8, {}

    def __init__(self, num_agents=2, num_turns=None, dataset=None, eval_dataset=None):
        self.num_agents = num_agents
        self.num_turns = num_turns or type(self).num_turns
        self.train = self.eval = [{"text": "word " * (3 + 8 * k)} for k in range(4)]

    def observe(self, item):
        return [f"agent {i}: {item['text']}" for i in range(self.num_agents)]

    def score(self, item, actions):
        reward = (sum(map(len, actions)) + len(item["text"])) % 6  # 4 and 5 end the episode
        return float(reward), {"score": reward * 20.0, "success": float(reward >= 4)}

    def feedback(self, item, actions, info, turn):
        texts = [f"turn {turn} " * (1 + i + len(item["text"]) % 4) for i in range(self.num_agents)]
        return texts

    def render(self, item, actions):
        return " | ".join(actions)


def make_args(script, **changes):
    """Args of a small team in float64; flags that the script lacks are left out."""
    changes = {"dtype": "float64", "device": "cpu", "num_envs": 8, "num_turns": 3, **changes}
    names = {f.name for f in dataclasses.fields(script.Args)}
    return script.Args(**{k: v for k, v in changes.items() if k in names})


def make_agent(script=collm_cc, model="models/tiny", **changes):
    """Agent 0 alone."""
    return script.Agent(0, model, make_args(script, **changes), CPU, {})


def make_team(script, args, model="models/tiny"):
    """(agents, critics) whose values differ from turn to turn."""
    torch.manual_seed(0)
    frozen, num_agents = {}, args.num_agents
    agents = [script.Agent(i, model, args, CPU, frozen) for i in range(num_agents)]
    for agent in agents:
        agent.longest_shared = inf
    reads = {collm_cc: [list(range(num_agents))], collm_dc: [[i] for i in range(num_agents)]}
    critics = [script.Critic(model, r, args, CPU, frozen) for r in reads.get(script, [])]
    for critic in critics:
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    return agents, critics


def play(script, agents, args, iteration=0, num_turns=3, items=None, purpose="rollout"):
    """(task, episodes) of Words: two of each item, by default of all of them."""
    task = Words(len(agents), num_turns)
    items = items or task.train
    episodes = script.start_episodes([x for x in items for _ in range(2)], len(agents))
    script.rollout(task, episodes, agents, args, purpose, iteration)
    return task, episodes


def record_gradients(script, monkeypatch):
    """Gradients that `optimize` is given, in order of its calls; nothing is stepped."""
    seen = []

    def optimize(model, max_grad_norm):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        seen.append((model.name, torch.cat([g.flatten() for g in grads])))
        model.zero_grad()
        return seen[-1][1].norm()

    monkeypatch.setattr(script, "optimize", optimize)
    return seen


def run_update(script, episodes, agents, critics, args, num_turns=3, iteration=0):
    return script.update(episodes, agents, critics, num_turns, args, iteration)


def responses(episode, i):
    """[turn] (start, end) of agent i's responses."""
    marks = episode.turns[i]
    turns = range(len(episode.rewards))
    return [(marks.index(t), len(marks) - marks[::-1].index(t)) for t in turns]


def make_episode(tokens, turns):
    """An episode of one agent: ids, and for each the turn of its response or -1."""
    logps = [0.0] * len(tokens)
    return collm_cc.Episode(0, {}, [tokens], [turns], [logps], [[]], [[]], [0.0] * (max(turns) + 1))


def log_probs(agent, episodes, num_turns=3, share=inf, i=0):
    """`logprobs` of an agent: (T, b)."""
    total, _ = collm_cc.logprobs(
        agent.model, episodes, i, num_turns, agent.temperature, share=share
    )
    return total


def parameters_of(models):
    return [p.detach().clone() for model in models for p in model.parameters()]


# -------------------------------------------------------------------------------------- generation
def draw(rows, limit, seed=0):
    """(rows, limit) numbers of (0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(rows, limit, dtype=torch.float64, generator=generator)


@torch.no_grad()
def is_greedy(agent, tokens, response, limit):
    """One row, no cache, no mask: whether each token is the most likely one after those before it,
    up to an EOS or the limit."""
    logits = agent.model(torch.tensor([tokens + response])).logits[0, len(tokens) - 1 : -1]
    *going, last = [token in agent.eos for token in response]
    whole = not any(going) and (last or len(response) == limit)
    return whole and response == logits.argmax(-1).tolist()


@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_batched_cached_generation_equals_unbatched(model, other_model):
    agent = make_agent(model=other_model if model == "other" else model, temperature=[1e-9])
    frame = agent.chat.frame
    task = envs.make("coding")
    prompts = [frame(task.observe(item)[k % 2], []) for k, item in enumerate(task.train[:4])]
    prompts = [*prompts, prompts[2], frame("x", [])]  # of different lengths, two of them equal
    prompts[1] = frame("a long one " * 80, [])
    cache = collm_cc.RowsCache()
    histories, limit = [[] for _ in prompts], 10
    alive, frames = list(range(len(prompts))), dict(enumerate(prompts))
    for turn, kept in enumerate([alive, [0, 1, 3, 4, 5], [5, 3, 0]]):  # rows leave between turns
        if turn:
            cache.row_of = cache.row_of[[alive.index(k) for k in kept]]
            frames = {k: frame(f"again {turn} " * (9 * k + 1), histories[k]) for k in kept}
            alive = kept
        feed = [histories[k][-1:] + frames[k] for k in alive]
        out = collm_cc.generate(agent, feed, cache, draw(len(feed), limit, turn))
        for k, (response, _) in zip(alive, out, strict=True):
            histories[k] = histories[k] + frames[k]
            assert is_greedy(agent, histories[k], response, limit), (turn, k)
            histories[k] = histories[k] + response


def test_cache_holds_the_same_values_as_a_forward_without_it():
    """After a turn in which rows ended at different steps, the next token's logits are those of a
    plain forward."""
    agent = make_agent()
    task = envs.make("coding")
    prompts = [agent.chat.frame(task.observe(item)[0], []) for item in task.train[:6]]
    cache = collm_cc.RowsCache()
    out = [ids for ids, _ in collm_cc.generate(agent, prompts, cache, draw(6, 60))]
    assert len(set(map(len, out))) > 2
    ids = torch.tensor([response[-1:] for response in out])
    cache.select(cache.row_of)
    mask = torch.cat([cache.mask, torch.ones(6, 1, dtype=torch.long)], 1)
    places = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    with torch.inference_mode():
        logits = agent.model(ids, **places, past_key_values=cache).logits[:, -1]
        for k in range(6):
            alone = agent.model(torch.tensor([prompts[k] + out[k]])).logits[0, -1]
            torch.testing.assert_close(logits[k], alone, rtol=0, atol=1e-10)


def test_equal_prompts_are_read_once():
    agent, read = make_agent(), []
    agent.model.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    prompts = [[5, 6, 7], [5, 6, 8, 9], [5, 6, 7]]
    collm_cc.generate(agent, prompts, collm_cc.RowsCache(), draw(3, 2))
    assert read[:2] == [
        (2, 3),
        (3, 1),
    ]  # all but the last token of two prompts; then a row for each


def test_rows_that_end_change_places():
    """[ended, going, going]: row 2 fills hole 0, and what ended goes behind."""
    source, to = collm_cc.swaps(torch.tensor([False, True, True]), 2)
    assert (source.tolist(), to.tolist()) == ([2, 0], [0, 2])
    for bits in itertools.product([False, True], repeat=5):
        rows, going = torch.arange(5), torch.tensor(bits)
        source, to = collm_cc.swaps(going, sum(bits))
        rows[to] = rows[source]
        assert sorted(rows.tolist()) == list(range(5)) and going[rows[: sum(bits)]].all()


def test_the_cache_is_as_small_as_autocast_allows():
    """Rotary embeddings give float32 keys under autocast; attention reads them as bfloat16, so
    that is what is kept."""
    agent = make_agent(dtype="bfloat16")
    cache = collm_cc.RowsCache()
    prompt = agent.chat.frame("Say anything.", [])
    collm_cc.generate(agent, [prompt], cache, draw(1, 2))
    assert {layer.key_buffer.dtype for layer in cache.layers} == {torch.bfloat16}
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        alone = agent.model(ids).logits[0, -1]
        cached = agent.model(ids, past_key_values=collm_cc.RowsCache()).logits[0, -1]
    torch.testing.assert_close(cached, alone, rtol=0, atol=0)


def test_sampling_distribution_is_the_trained_one(monkeypatch):
    """The probabilities that were sampled from are the ones whose logs `logprobs` gives, at the
    same temperature, and the ones that the episode keeps."""
    agent = make_agent(temperature=[0.7])
    log, searchsorted = [], torch.searchsorted

    def spy(cdf, value):
        token = searchsorted(cdf, value)
        share = cdf[0].diff(prepend=cdf.new_zeros(1))[token[0, 0]] / cdf[0, -1]
        log.append(float(share.log()))
        return token

    monkeypatch.setattr(torch, "searchsorted", spy)
    task = envs.make("coding")
    prompt = agent.chat.frame(task.observe(task.train[0])[1], [])
    ((response, logps),) = collm_cc.generate(agent, [prompt], collm_cc.RowsCache(), draw(1, 60, 3))
    episode = make_episode(prompt + response, [-1] * len(prompt) + [0] * len(response))
    assert response[-1] in agent.eos
    assert log_probs(agent, [episode], 1).item() == pytest.approx(sum(log), abs=1e-9)
    assert logps == pytest.approx(log, abs=1e-9)


def test_sampled_tokens_are_distributed_as_the_softmax():
    """First tokens of 4000 responses to one prompt against the model's own probabilities, by a
    chi-squared test."""
    agent = make_agent(temperature=[1.5])
    prompt, num = agent.chat.frame("Say anything.", []), 4000
    found = collm_cc.generate(agent, [prompt] * num, collm_cc.RowsCache(), draw(num, 1))
    tokens = torch.tensor([ids for ids, _ in found])[:, 0]
    count = torch.bincount(tokens, minlength=agent.model.config.vocab_size)
    with torch.no_grad():
        expected = num * (agent.model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    often = expected >= 10
    assert often.sum() > 10 and count[expected == 0].sum() == 0
    pairs = [(count[often], expected[often]), (count[~often].sum(), expected[~often].sum())]
    chi = sum(((o - e) ** 2 / e).sum() for o, e in pairs)
    freedom = float(often.sum())
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5  # mean, 4 standard deviations


@pytest.mark.parametrize("uniform", [1e-300, 0.5, 1.0])
def test_no_number_samples_a_token_without_a_share(uniform):
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]])
    token, logp = collm_cc.sample(logits, 1.0, torch.tensor([[uniform]], dtype=torch.float64))
    assert token.item() in (1, 3) and logp.isfinite()


def test_logits_that_are_not_finite_are_named_not_sampled_from():
    agent = make_agent()
    with torch.no_grad():
        agent.model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"agent 0 \(models/tiny\): its logits are not"):
        collm_cc.generate(agent, [[5, 6]], collm_cc.RowsCache(), draw(1, 3))


# ------------------------------------------------------------------------------------------- seeds
def sampled(script, seed, iteration=0, purpose="rollout", items=None, **changes):
    """[episode][agent] ids of responses to one item, four times."""
    # To prompts of no task models/tiny gives one of three answers, but for high temperatures
    args = make_args(script, seed=seed, temperature=[3.0], **changes)
    agents, _ = make_team(script, args)
    items = items or [{"text": "one"}] * 2
    _, episodes = play(script, agents, args, iteration, 1, items, purpose)
    return [[ids[turns.index(0) :] for ids, turns in zip(e.tokens, e.turns)] for e in episodes]


def test_one_item_is_answered_by_the_seed():
    """Two seeds, iterations, episodes, agents or purposes share no stream; the same seed twice
    draws the same. Seeds that agree in their low 32 bits can not be given."""
    first = sampled(collm_cc, 1)
    assert sampled(collm_cc, 1) == first
    assert len({tuple(ids) for episode in first for ids in episode}) == 8
    others = [sampled(collm_cc, 2), sampled(collm_cc, 1, 1), sampled(collm_cc, 1, 0, "evaluation")]
    others += [sampled(collm_cc, 2**32 - 1)]
    for other in others:
        assert not {str(x) for e in first for x in e} & {str(x) for e in other for x in e}


def test_no_two_purposes_seeds_or_numbers_share_a_stream():
    purposes = ["initialisation", "items", "minibatches", "rollout", "evaluation"]
    numbers = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (256, 0, 0), (0, 256, 0), (0, 0, 2**31)]
    seeds = [0, 1, 2, 3, 255, 256, 2**31, 2**32 - 1]
    keys = itertools.product(seeds, purposes, numbers)
    drawn = [collm_cc.rng(seed, purpose, *ns).random() for seed, purpose, ns in keys]
    assert len(set(drawn)) == len(drawn) == 280


def test_no_two_calls_share_a_stream():
    """With as many numbers as each purpose is given: numpy takes missing ones for zeros."""
    given = {"initialisation": 0, "items": 1, "minibatches": 2, "rollout": 4, "evaluation": 4}
    given["check"] = 2
    keys = [(seed, p, ns) for seed in (0, 1) for p in given for ns in bits(given[p])]
    drawn = [collm_cc.rng(seed, purpose, *ns).random() for seed, purpose, ns in keys]
    assert len(set(drawn)) == len(drawn) == 2 * (1 + 2 + 4 + 16 + 16 + 4)


def bits(n):
    """All tuples of n zeros and ones."""
    return itertools.product([0, 1], repeat=n)


def on_rank(monkeypatch, rank, ranks):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def test_ranks_and_batches_sample_what_one_process_samples(monkeypatch):
    """An episode's samples depend on its number alone: ranks answer one item differently, and
    together as one process does, whatever is played beside it."""
    alone = sampled(collm_cc, 1)
    parts = []
    for rank in (0, 1):
        on_rank(monkeypatch, rank, 2)
        parts.append(sampled(collm_cc, 1))
    assert parts[0] + parts[1] == alone and parts[0] != parts[1]
    assert all(len(part) == 2 for part in parts)


def test_evaluation_depends_on_the_seed_and_not_on_its_batches():
    def played(**changes):
        args = make_args(collm_cc, eval_episodes=80, **changes)
        agents, _ = make_team(collm_cc, args)
        metrics, episodes = collm_cc.evaluate(Words(2, 2), agents, args, None, 0, samples=20)
        del metrics["time"]
        return metrics, [e.tokens for e in episodes], [e.item["text"] for e in episodes]

    whole, parts, other = played(num_envs=80), played(num_envs=4), played(num_envs=80, seed=2)
    assert whole == parts  # 80 at once, or 64 and 16
    assert whole[1] != other[1]
    assert whole[2] == [item["text"] for item in Words().eval for _ in range(20)]


def test_items_are_an_endless_stream_shuffled_by_the_seed():
    items = list(range(10))

    def stream(size, count, seed):
        return [x for k in range(count) for x in collm_cc.draw_items(items, size, seed, k)]

    first = stream(4, 5, 1)
    assert sorted(first[:10]) == items and sorted(first[10:]) == items and first[:10] != first[10:]
    assert first == stream(10, 2, 1)
    assert first != stream(4, 5, 2)
    assert len(collm_cc.draw_items([1, 2, 3], 64, 0, 7)) == 64


@pytest.mark.parametrize("script", SCRIPTS)
def test_minibatches_are_whole_groups_that_the_seed_draws(script, monkeypatch):
    monkeypatch.setattr(
        script, "stack_rewards", lambda episodes, *_: seen.append(episodes) or 1 / 0
    )
    args = make_args(script, num_generations=2, num_minibatches=2)
    episodes, firsts = list(range(16)), []
    for args.seed, iteration, rank in [(1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]:
        seen = []
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ZeroDivisionError):
            run_update(script, episodes, [], [], args, iteration=iteration)
        firsts.append(seen[0])
        assert len(seen[0]) == 8 and sorted(set(seen[0])) == seen[0]
        if script is mc_baseline:
            pairs = zip(seen[0][::2], seen[0][1::2])
            assert all(a % 2 == 0 and b == a + 1 for a, b in pairs)
    assert firsts[0] == firsts[1]
    assert all(firsts[0] != other for other in firsts[2:])


def test_initialisation_depends_on_the_seed():
    """What is drawn when models are made: the critic's head, and LoRA adapters."""

    def drawn(seed):
        args = make_args(collm_dc, seed=seed, max_new_tokens=4)
        _, critics = collm_dc.build(Words(), args, CPU)
        assert all((critic.head.weight == 0).all() for critic in critics)
        return torch.cat([critic.head.bias for critic in critics]).tolist()

    one, again, two = drawn(1), drawn(1), drawn(2)
    assert one == again and len({*one, *two}) == 4


# -------------------------------------------------------------------------- log-probs and values
@pytest.mark.parametrize("share", [inf, 0])
@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_logprobs_equal_a_naive_loop(model, share, other_model):
    args = make_args(collm_cc, temperature=[0.8])
    agents, _ = make_team(collm_cc, args, other_model if model == "other" else model)
    _, episodes = play(collm_cc, agents, args)
    assert len({len(e.rewards) for e in episodes}) > 1  # some end early
    agent, ended = agents[0], 0
    with torch.no_grad():
        batch, gap = collm_cc.logprobs(agent.model, episodes, 0, 3, 0.8, share)
        for k, e in enumerate(episodes):
            logits = agent.model(torch.tensor([e.tokens[0]])).logits[0] / 0.8
            logps = logits.log_softmax(-1)
            for t, (start, end) in enumerate(responses(e, 0)):
                expected = [logps[p - 1, e.tokens[0][p]].item() for p in range(start, end)]
                assert batch[t, k].item() == pytest.approx(sum(expected), abs=1e-10)
                assert e.logps[0][start:end] == pytest.approx(expected, abs=1e-10)
                ended += e.tokens[0][end - 1] in agent.eos
            assert (batch[len(e.rewards) :, k] == 0).all()
            assert len(e.logps[0]) == len(e.tokens[0])
    assert len(gap) == sum(turn >= 0 for e in episodes for turn in e.turns[0])
    assert gap.abs().max() < 1e-10
    assert ended > 0 or model == "other"


def test_the_sampling_gap_is_that_of_the_token():
    """A token's kept log-prob that is off by 0.25 gives that gap at that token, and no other."""
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args)
    start, _ = responses(episodes[3], 1)[0]
    episodes[3].logps[1][start + 1] -= 0.25
    for share in (inf, 0):
        _, gap = collm_cc.logprobs(agents[1].model, episodes, 1, 3, 1.0, share)
        assert gap.abs().sort().values[-2:].tolist() == pytest.approx([0.0, 0.25], abs=1e-9)
    metrics = run_update(collm_cc, episodes, *make_team(collm_cc, args), args)
    num_tokens = sum(turn >= 0 for e in episodes for turn in e.turns[1])
    assert metrics["losses/sampling_gap"] == pytest.approx([0.0, 0.25 / num_tokens], abs=1e-10)


@pytest.mark.parametrize("model", ["models/tiny", "other"])
def test_histories_that_share_a_row_equal_a_row_for_each(model, other_model):
    """Log-probs and gradients, with few tokens computed: o_0, less its last token, once, and the
    rest of each."""
    agent = make_agent(model=other_model if model == "other" else model, temperature=[0.8])
    _, episodes = play(collm_cc, [agent], make_args(collm_cc))
    parameters, generator = list(agent.model.parameters()), torch.Generator().manual_seed(0)
    weights = torch.randn(3, len(episodes), dtype=torch.float64, generator=generator)
    apart = torch.cat([log_probs(agent, [e]) for e in episodes], 1)
    expected = torch.autograd.grad((apart * weights).sum(), parameters, allow_unused=True)
    computed = []
    agent.model.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0]))
    together = log_probs(agent, episodes)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)
    grads = torch.autograd.grad((together * weights).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-9)
    (ids,) = computed
    lengths = [len(e.tokens[0]) for e in episodes]
    starts = [e.turns[0].index(0) - 1 for e in episodes]
    rows = [sum(lengths[k : k + 2]) - starts[k] for k in (0, 2, 4, 6)]
    assert ids.shape == (4, max(rows))  # two episodes of each item


def test_histories_share_a_row_only_if_fewer_tokens_are_computed():
    agent = make_agent()
    tokens = [[5, 6, *[7] * 20], [5, 6, *[8] * 20], [9, 6, *[7] * 20]]
    turns = [[-1, -1, *[0] * 20]] * 3  # shared: rows of 41 and 22 tokens, 82 in all
    assert collm_cc.share_prefixes(tokens, turns, inf).shape == (3, 22, 4)
    episodes = list(map(make_episode, tokens, turns))
    apart = torch.cat([log_probs(agent, [e], 1) for e in episodes], 1)
    torch.testing.assert_close(log_probs(agent, episodes, 1), apart, rtol=0, atol=1e-10)
    tokens = [[*range(5, 35), 7], [*range(5, 35), 8], [*range(6, 36), 7]]
    turns = [[-1] * 30 + [0]] * 3
    assert collm_cc.share_prefixes(tokens, turns, inf).shape == (2, 33, 4)  # 29 + 2 + 2, and 31
    assert collm_cc.share_prefixes(tokens, turns, 0).shape == (3, 31, 4)
    assert collm_cc.share_prefixes(tokens, turns, 30).shape == (3, 31, 4)  # one has 31
    assert collm_cc.share_prefixes(tokens, turns, 31).shape == (2, 33, 4)


def test_the_last_token_and_the_eos_are_trained_even_if_eos_is_pad(other_model):
    agent = make_agent(model=other_model)
    eos = agent.tokenizer.eos_token_id
    assert agent.tokenizer.pad_token_id == eos and agent.eos == {eos}
    tokens = [5, 6, 7, 8, eos]
    episodes = [make_episode(tokens, [-1, -1, 0, 0, 0]), make_episode([5, 6, 9], [-1, -1, 0])]
    whole = log_probs(agent, episodes, 1)[0]
    logp = agent.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = (logp[1, 7] + logp[2, 8] + logp[3, eos]).item()
    assert whole[0].item() == pytest.approx(expected, abs=1e-10)
    (eos_row,) = torch.autograd.grad(whole[0], agent.model.lm_head.weight)
    assert eos_row[eos].abs().sum() > 0


def test_values_equal_a_naive_loop_over_prefixes():
    """V(h_t) from one forward is what a forward of h_t alone gives at its last token."""
    args = make_args(collm_cc)
    agents, (critic,) = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args)
    tokens, ends = zip(*[critic.encode(e, len(e.rewards)) for e in episodes], strict=True)
    values = critic(tokens, ends, 3)
    for k, e in enumerate(episodes):
        assert len(ends[k]) == len(e.rewards) and ends[k][-1] == len(tokens[k]) - 1
        for t, end in enumerate(ends[k] if k % 3 == 0 else []):
            alone = critic([tokens[k][: end + 1]], [[end]], 1)
            assert values[t, k].item() == pytest.approx(alone.item(), abs=1e-10)
        assert (values[len(e.rewards) :, k] == 0).all()


def test_what_each_critic_reads():
    told, said = [["o00", "o01"], ["o10", "o11"]], [["a00", "a01"], ["a10", "a11"]]
    episode = collm_cc.Episode(0, {}, [], [], [], told, said, [0.0, 0.0])

    def read(script, reads, **changes):
        critic = script.Critic("models/tiny", reads, make_args(script, **changes), CPU, {})
        tokens, ends = critic.encode(episode, len(episode.rewards))
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


# --------------------------------------------------------------------------- advantages, baselines
def test_gae_by_hand():
    """Episode 0 lives for three turns, episode 1 for one. gamma 0.9."""
    rewards = torch.tensor([[1.0, 5.0], [2.0, 0.0], [3.0, 0.0]])[..., None]
    values = torch.tensor([[10.0, 4.0], [20.0, 7.0], [30.0, 7.0]])[..., None]
    live = torch.tensor([[True, True], [True, False], [True, False]])

    def gae(script, values, gae_lambda):
        return script.gae(rewards, values, live, 0.9, gae_lambda)[..., 0]

    for script in SCRIPTS:
        # 1 + 0.9 * 20 - 10, 2 + 0.9 * 30 - 20, 3 - 30; 5 - 4 without bootstrap
        td = torch.tensor([[9.0, 1.0], [9.0, 0.0], [-27.0, 0.0]])
        torch.testing.assert_close(gae(script, values, 0.0), td)
        # from the end: -27; 9 + 0.45 * -27 = -3.15; 9 + 0.45 * -3.15 = 7.5825
        half = torch.tensor([[7.5825, 1.0], [-3.15, 0.0], [-27.0, 0.0]])
        torch.testing.assert_close(gae(script, values, 0.5), half)
        # 1 + 0.9 * (2 + 0.9 * 3), 2 + 0.9 * 3, 3
        returns = torch.tensor([[5.23, 5.0], [4.7, 0.0], [3.0, 0.0]])
        torch.testing.assert_close(gae(script, torch.zeros(3, 2, 1), 1.0), returns)


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
        out = mc_baseline.baselines(returns[..., None], live, 3, kind)
        assert out.shape == (2, 6, 1)
        for t, k in live.nonzero().tolist():
            assert float(out[t, k]) == pytest.approx(rows[t][k]), (kind, t, k)
    dead = mc_baseline.baselines(returns[..., None], torch.zeros_like(live), 3, "max")
    assert dead.isfinite().all()


def test_in_episodes_of_one_turn_mean_and_rloo_are_one_method():
    returns = torch.randn(1, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    live = torch.ones(1, 12, dtype=torch.bool)
    for norm_adv in (False, True):
        out = []
        for kind in ("mean", "rloo"):
            advantages = returns - mc_baseline.baselines(returns, live, 4, kind)
            if norm_adv:
                advantages = mc_baseline.normalise(advantages, returns, live)
            out.append(advantages)
        scale = 1 if norm_adv else 3 / 4
        torch.testing.assert_close(out[0], scale * out[1], rtol=1e-12, atol=0)


def test_normalise_by_hand():
    """Agent 0's advantages at the four live turns are 1, 2, 3, 6: mean 3, variance 3.5."""
    advantages = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]], dtype=torch.float64)[..., None]
    live = torch.tensor([[True] * 3, [True, False, False]])
    for script in SCRIPTS:
        out = script.normalise(advantages, advantages, live)[..., 0]
        expected = (torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64) - 3) / 3.5**0.5
        torch.testing.assert_close(out[live], expected, rtol=1e-12, atol=0)


def test_explained_variance_by_hand():
    """Returns 1, 2, 3 and values 1, 1, 3: var(G) = 2/3, var(G - V) = 2/9. NaN without variance."""
    returns = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)[..., None]
    values = torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64)[..., None]
    live = torch.ones(1, 3, dtype=torch.bool)
    for script in SCRIPTS:
        assert script.explained_variance(returns, values, live).item() == pytest.approx(2 / 3)
        for equal in (0.0, -1.7, 1e5 / 3):
            same = torch.full_like(returns, equal)
            assert script.explained_variance(same, values, live).isnan().all()


# ------------------------------------------------------------------------------- without a signal
def short_episodes(script, num_items, num_generations):
    """Made-up episodes of two agents, of two turns for every other item, else of one."""
    episodes = []
    for k in range(num_items * num_generations):
        num_turns = 2 - k // num_generations % 2
        tokens, turns = [5, 6, 7 + k, 8, 9 + k], [-1, 0, 0, -1, 1]
        rows = [[row[: 1 + 2 * num_turns]] * 2 for row in (tokens, turns, [0.0] * 5)]
        texts = [["a", "b"], ["c", "d"]]
        episodes.append(script.Episode(k, {}, *rows, texts, texts, [0.0] * num_turns))
    return episodes


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("baseline", ["mean", "rloo", "max"])
def test_equal_returns_of_an_item_make_no_step(baseline, norm_adv):
    """All K returns of an item are equal, and items differ: no gradient, no moved weight."""
    flags = {"baseline": baseline, "norm_adv": norm_adv}
    args = make_args(mc_baseline, **flags, dtype="float32")
    agents, _ = make_team(mc_baseline, args)
    before, played = parameters_of(agents), {}
    for k in (3, 4, 5, 6, 8):
        args.num_generations, played[k] = k, short_episodes(mc_baseline, 3, k)
        for e in played[k]:
            item = e.number // k
            e.rewards = [0.1 * (item + 1) + 0.2, -0.7 * item][: len(e.rewards)]
        metrics = run_update(mc_baseline, played[k], agents, [], args, num_turns=2)
        assert metrics["losses/grad_norm"] == [0.0, 0.0]
        assert metrics["losses/advantage_variance"] == [0.0, 0.0]
        assert all(map(torch.equal, before, parameters_of(agents)))
    for args.num_generations, episodes in played.items():
        episodes[0].rewards = [x + 1e-3 for x in episodes[0].rewards]  # what differs is a signal
        metrics = run_update(mc_baseline, episodes, agents, [], args, num_turns=2)
        assert min(metrics["losses/grad_norm"]) > (1e-2 if norm_adv else 1e-6)


@pytest.mark.parametrize("critic_type", ["v", "q"])
@pytest.mark.parametrize("script", [collm_cc, collm_dc])
def test_equal_returns_move_the_critic_and_no_agent(script, critic_type):
    """All returns are equal: what differs between advantages is the critic's own error."""
    args = make_args(script, dtype="float32", critic_type=critic_type, num_turns=2)
    agents, critics = make_team(script, args)
    episodes = short_episodes(script, 2, 4)
    for e in episodes:
        e.rewards = [0.1 + 0.2, 0.0][: len(e.rewards)]
    before, critic_before = parameters_of(agents), parameters_of(critics)
    metrics = run_update(script, episodes, agents, critics, args, num_turns=2)
    assert metrics["losses/grad_norm"] == [0.0, 0.0]
    assert all(map(torch.equal, before, parameters_of(agents)))
    assert not all(map(torch.equal, critic_before, parameters_of(critics)))
    assert all(np.isfinite(metrics["losses/value_loss"]))
    episodes[0].rewards[-1] += 0.5
    metrics = run_update(script, episodes, agents, critics, args, num_turns=2)
    assert min(metrics["losses/grad_norm"]) > 1e-2


# ----------------------------------------------------------------------------------------- updates
def discounted(rewards, gamma):
    return sum(gamma**s * r for s, r in enumerate(rewards))


def scales(episodes, gamma):
    """[(mean, sd)] of the returns of each turn."""
    returns = [[] for _ in range(max(len(e.rewards) for e in episodes))]
    for e in episodes:
        for t in range(len(e.rewards)):
            returns[t].append(discounted(e.rewards[t:], gamma))
    return [(np.mean(g), max(np.std(g), 1e-3)) for g in returns]


def reference_values(critic, e, scale):
    """V(h_t) of each turn of an episode, with gradients."""
    tokens, ends = critic.encode(e, len(e.rewards))
    hidden = critic.model(torch.tensor([tokens])).last_hidden_state[0]
    pairs = zip(ends, scale[: len(ends)], strict=True)
    return [mean + sd * critic.head(hidden[end])[0] for end, (mean, sd) in pairs]


def critic_loss(episodes, critic, args):
    """The loss of a critic, one sample at a time."""
    live, scale = sum(len(e.rewards) for e in episodes), scales(episodes, args.gamma)
    loss = 0.0
    for e in episodes:
        v = reference_values(critic, e, scale)
        for t, reward in enumerate(e.rewards):
            target = reward + (args.gamma * v[t + 1].item() if t + 1 < len(v) else 0.0)
            loss = loss + args.vf_coef * ((v[t] - target) / scale[t][1]) ** 2 / live
    return loss


def reference_losses(script, episodes, agents, critics, args):
    """The losses of one minibatch, one sample at a time; scalars with gradients, critics first."""
    num, live = len(agents), sum(len(e.rewards) for e in episodes)
    advantages = [[[0.0] * len(e.rewards) for e in episodes] for _ in agents]
    losses = [critic_loss(episodes, critic, args) for critic in critics]
    for k, e in enumerate(episodes):
        turns = range(len(e.rewards))
        for critic in critics:
            v = reference_values(critic, e, scales(episodes, args.gamma))
            for t in turns:
                target = e.rewards[t] + (args.gamma * v[t + 1].item() if t + 1 in turns else 0.0)
                for i in critic.reads:
                    advantages[i][k][t] = target - v[t].item()
        if script is mc_baseline:
            first = k // args.num_generations * args.num_generations
            group = episodes[first : first + args.num_generations]
            for t in turns:
                to_go = [discounted(x.rewards[t:], args.gamma) for x in group if len(x.rewards) > t]
                for i in range(num):
                    own = discounted(e.rewards[t:], args.gamma)
                    advantages[i][k][t] = own - sum(to_go) / len(to_go)
    for i, agent in enumerate(agents):
        flat = np.array([a for row in advantages[i] for a in row])
        mean, std = (flat.mean(), flat.std()) if args.norm_adv else (0.0, 1.0)
        loss = 0.0
        for k, e in enumerate(episodes):
            logits = agent.model(torch.tensor([e.tokens[i]])).logits[0]
            logp = logits.div(agent.temperature).log_softmax(-1)
            for t, (start, end) in enumerate(responses(e, i)):
                total = logp[range(start - 1, end - 1), e.tokens[i][start:end]].sum()
                loss = loss - total * (advantages[i][k][t] - mean) / std / live
        losses.append(loss)
    return losses


def gradients(losses, models):
    """One flat gradient for each loss and its model, 0 where a parameter has none."""
    flat = []
    for loss, model in zip(losses, models, strict=True):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        pairs = zip(grads, parameters, strict=True)
        flat.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return flat


CASES = [(collm_cc, 3, True), (collm_dc, 2, False)]
CASES += [(mc_baseline, 2, False), (mc_baseline, 3, True)]


@pytest.mark.parametrize(("script", "num_agents", "norm_adv"), CASES)
def test_gradients_equal_a_naive_reference(script, num_agents, norm_adv, monkeypatch):
    """Of two agents of one temperature, and of three with one each."""
    temperature = [0.9] if num_agents == 2 else [0.7, 1.0, 1.3]
    flags = {"num_agents": num_agents, "temperature": temperature, "norm_adv": norm_adv}
    flags |= {"num_generations": 2, "microbatch_tokens": 300, "max_new_tokens": 8}
    args = make_args(script, **flags)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    assert {len(e.rewards) for e in episodes} >= {1, 3}
    losses = reference_losses(script, episodes, agents, critics, args)
    expected = gradients(losses, [*critics, *agents])
    seen = record_gradients(script, monkeypatch)
    run_update(script, episodes, agents, critics, args)
    assert len(seen) == len(expected)  # the centralized critic learns once, not for each agent
    for (name, gradient), reference in zip(seen, expected, strict=True):
        assert reference.norm() > 1e-6, name
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("script", KINDS)
def test_microbatches_change_nothing(script, monkeypatch):
    """One row at a time (no padding at all) or all rows at once (much padding), beginnings shared
    or not: the same gradients and metrics."""
    seen, metrics, args = [], [], make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args, items=Words().train[1:3])
    for args.microbatch_tokens, shares in [(1, inf), (500, inf), (10**9, 0)]:
        for agent in agents:
            agent.longest_shared = shares
        with monkeypatch.context() as patch:
            seen.append(record_gradients(script, patch))
            metrics.append(run_update(script, episodes, agents, critics, args))
    for other, values in zip(seen[1:], metrics[1:], strict=True):
        for (_, a), (_, b) in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert values.keys() == metrics[0].keys()
        for name in values:
            assert values[name] == pytest.approx(metrics[0][name], rel=1e-8, abs=1e-12), name


@pytest.mark.parametrize("script", KINDS)
def test_metrics_are_means_over_real_tokens_and_live_turns(script):
    args = make_args(script, num_generations=2, critic_lr=1e-12)
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
                    v = reference_values(critic, e, scales(episodes, args.gamma))
                    v = [*(value.item() for value in v), 0.0]
                    errors += [r + args.gamma * v[t + 1] - v[t] for t, r in enumerate(e.rewards)]
                    turns = range(len(e.rewards))
                    to_go = [discounted(e.rewards[t:], args.gamma) for t in turns]
                    returns += to_go
                    rest += [g - v[t] for t, g in enumerate(to_go)]
                expected["losses/value_loss", i] = np.mean(np.square(errors))
                expected["losses/advantage_variance", i] = np.var(errors)
                expected["losses/explained_variance", i] = 1 - np.var(rest) / np.var(returns)
    metrics = run_update(script, episodes, agents, critics, args)
    for (name, i), value in expected.items():
        assert metrics[name][i] == pytest.approx(value, rel=1e-6), (name, i)


def test_microbatches_hold_every_row_once_within_the_budget():
    lengths, microbatches = [5, 90, 7, 7, 300, 12, 5, 40, 41], collm_cc.microbatches
    groups = list(microbatches(lengths, 100))
    assert sorted(k for rows in groups for k in rows) == list(range(len(lengths)))
    sizes = [len(rows) * max(lengths[k] for k in rows) for rows in groups]
    pairs = list(zip(groups, sizes, strict=True))
    assert all(len(rows) == 1 or size <= 100 for rows, size in pairs)
    assert max(1 - sum(lengths[k] for k in rows) / size for rows, size in pairs) <= 0.1
    # 5 5 | 7 7 | 12 | 40 41 | 90 | 300: 3 x 7 and 3 x 12 would hold too much padding
    assert len(groups) == 6
    assert [len(rows) for rows in microbatches([40] * 5, 100)] == [2, 2, 1]
    # Groups of two stay together: 30 + 40 | 50 + 10 | 20 + 20
    assert list(microbatches([30, 40, 50, 10, 20, 20], 100, 2)) == [[4, 5], [2, 3], [0, 1]]
    assert list(microbatches([30, 40, 50, 10, 20, 20], 140, 2)) == [[4, 5], [2, 3, 0, 1]]
    assert list(microbatches([30, 40, 70, 10, 20, 20], 75, 2)) == [[4, 5], [0, 1], [2, 3]]


@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_one_agent_makes_cc_and_dc_the_same(critic_type):
    out = []
    for script in (collm_cc, collm_dc):
        flags = {"num_minibatches": 2, "gae_lambda": 0.5, "critic_type": critic_type}
        args = make_args(script, num_agents=1, max_new_tokens=8, **flags)
        agents, critics = make_team(script, args)
        for step in range(2):
            _, episodes = play(script, agents, args, iteration=step)
            metrics = run_update(script, episodes, agents, critics, args, iteration=step)
        weights = torch.cat([p.flatten() for p in parameters_of([*agents, *critics])])
        out.append((metrics, weights))
    assert out[0][0] == out[1][0]
    assert torch.equal(out[0][1], out[1][1])


def test_q_critic_advantage_is_q_and_its_target_bootstraps_q(monkeypatch):
    args = make_args(collm_cc, critic_type="q", norm_adv=False, max_new_tokens=8)
    agents, (critic,) = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args)
    live, losses = sum(len(e.rewards) for e in episodes), [0.0, 0.0]
    for e in episodes:
        q = reference_values(critic, e, scales(episodes, args.gamma))
        for i, agent in enumerate(agents):
            logp = log_probs(agent, [e], i=i)[:, 0]
            losses[i] = losses[i] - sum(logp[t] * q[t].item() for t in range(len(q))) / live
    losses = [critic_loss(episodes, critic, args), *losses]
    expected = gradients(losses, [critic, *agents])
    seen = record_gradients(collm_cc, monkeypatch)
    run_update(collm_cc, episodes, agents, [critic], args)
    for (name, gradient), reference in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("script", KINDS)
def test_a_non_finite_gradient_stops_before_the_step(script):
    args = make_args(script, num_generations=2)
    agents, critics = make_team(script, args)
    _, episodes = play(script, agents, args)
    episodes[3].rewards[0] = float("nan")
    before = parameters_of([*critics, *agents])
    with pytest.raises(FloatingPointError, match=r"agent 0|critic of agents \[0"):
        run_update(script, episodes, agents, critics, args)
    assert all(map(torch.equal, before, parameters_of([*critics, *agents])))


@pytest.mark.parametrize("script", KINDS)
def test_a_rate_of_0_freezes_an_agent(script):
    """No optimizer, no gradient, the same weights; the other agent's gradient stays as it was."""
    norms = []
    for rates in ([1e-3, 1e-3], [1e-3, 0.0]):
        args = make_args(script, num_generations=2, actor_lr=rates)
        agents, critics = make_team(script, args)
        _, episodes = play(script, agents, args, items=Words().train[:2])
        before = [parameters_of([agent]) for agent in agents]
        norms.append(run_update(script, episodes, agents, critics, args)["losses/grad_norm"])
    assert norms[0][0] == norms[1][0] > 0 and norms[1][1] == 0.0 < norms[0][1]
    assert not all(map(torch.equal, before[0], parameters_of(agents[:1])))
    assert all(map(torch.equal, before[1], parameters_of(agents[1:])))
    assert agents[1].optimizer is None and agents[0].optimizer is not None
    assert all(p.grad is None and not p.requires_grad for p in agents[1].parameters())


def test_each_agent_has_its_own_rate():
    args = make_args(collm_cc, actor_lr=[1e-3, 1e-5])
    agents, _ = make_team(collm_cc, args)
    assert [a.optimizer.param_groups[0]["lr"] for a in agents] == [1e-3, 1e-5]
    args = make_args(collm_cc, actor_lr=[1e-4], temperature=[0.5])
    agents, _ = make_team(collm_cc, args)
    assert [(a.optimizer.defaults["lr"], a.temperature) for a in agents] == [(1e-4, 0.5)] * 2


# ---------------------------------------------------------------------------------------- rollouts
def test_an_episode_only_grows_and_keeps_the_sampled_ids():
    """Turn by turn: the observation's tokens, then the sampled ones; one EOS between them; texts
    are what they say."""
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    task, episodes = play(collm_cc, agents, args)
    for e in episodes:
        assert len(e.rewards) == len(e.infos) and len(e.rewards) <= 3
        assert all(info["success"] == 0 for info in e.infos[:-1])  # success ends an episode
        assert len(e.rewards) == 3 or e.infos[-1]["success"] == 1
        for i, agent in enumerate(agents):
            assert len(e.tokens[i]) == len(e.turns[i]) == len(e.logps[i])
            history, begin = [], 0
            for t, (start, end) in enumerate(responses(e, i)):
                frame = agent.chat.frame(e.observations[i][t], history)
                assert e.tokens[i][begin:start] == frame
                text = agent.tokenizer.decode(e.tokens[i][start:end], skip_special_tokens=True)
                assert text == e.actions[i][t]
                assert not set(e.tokens[i][start : end - 1]) & agent.eos  # nothing after an EOS
                assert end - start == task.max_new_tokens or e.tokens[i][end - 1] in agent.eos
                if t:  # never two EOS in a row, and always one: the agent's own or the template's
                    assert (e.tokens[i][begin - 1] in agent.eos) + (frame[0] in agent.eos) == 1
                history, begin = e.tokens[i][:end], end
        first = task.score(e.item, [actions[0] for actions in e.actions])[0]
        assert e.rewards[0] == first + task.reward_shift


def test_each_agent_samples_at_its_own_temperature():
    """A cold agent says the most likely tokens beside one that samples."""
    args = make_args(collm_cc, temperature=[1e-9, 3.0])
    agents, _ = make_team(collm_cc, args)
    _, episodes = play(collm_cc, agents, args, num_turns=1, items=[{"text": "one"}] * 2)
    ids, turns = episodes[0].tokens[0], episodes[0].turns[0]
    start = turns.index(0)
    assert is_greedy(agents[0], ids[:start], ids[start:], Words.max_new_tokens)
    assert len({str(e.tokens[0]) for e in episodes}) == 1
    assert len({str(e.tokens[1]) for e in episodes}) == 4


def test_chat_template_is_the_whole_conversations_rendering():
    """What an episode's frames add up to is what the template makes of the conversation."""
    agent = make_agent()
    turns = [("one", "two"), ("three", "four")]
    tokens, chat = [], []
    for user, reply in turns:
        tokens += agent.chat.frame(user, tokens)
        tokens += agent.tokenizer(reply)["input_ids"] + [agent.tokenizer.eos_token_id]
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    tokens += agent.chat.frame("five", tokens)
    chat.append({"role": "user", "content": "five"})
    options = {"tokenize": False, "add_generation_prompt": True}
    whole = agent.tokenizer.apply_chat_template(chat, **options)
    assert agent.tokenizer.decode(tokens) == whole


def test_reward_shift_and_success_are_the_tasks_own_or_given():
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    args.reward_shift = 100.0
    _, episodes = play(collm_cc, agents, args, num_turns=1)
    assert all(100 <= e.rewards[0] <= 105 for e in episodes)
    for success, most in [(0.0, 1), (6.0, 3)]:  # raw rewards are 0 to 5
        args.success = success
        _, episodes = play(collm_cc, agents, args)
        assert {len(e.rewards) for e in episodes} == {most}
    args.success = 3.0
    _, episodes = play(collm_cc, agents, args)
    for e in episodes:
        assert all(reward - 100 < 3 for reward in e.rewards[:-1])
        assert len(e.rewards) == 3 or e.rewards[-1] - 100 >= 3
    assert len({len(e.rewards) for e in episodes}) > 1


class Talkative(Words):
    """Words whose feedback on the second item is longer than a model reads."""

    def feedback(self, item, actions, info, turn):
        return ["word " * (5000 if len(item["text"]) == 55 else 2)] * self.num_agents


def test_feedback_that_is_too_long_ends_that_episode_alone():
    args = make_args(collm_cc, success=6.0, num_turns=2)
    agents, critics = make_team(collm_cc, args)
    task = Talkative(2, 2)
    episodes = collm_cc.start_episodes([x for x in task.train for _ in range(2)], 2)
    collm_cc.rollout(task, episodes, agents, args, "rollout", 0)
    assert [e.too_long for e in episodes] == [False, False, True, True] + [False] * 4
    assert [len(e.rewards) for e in episodes] == [2, 2, 1, 1, 2, 2, 2, 2]
    assert collm_cc.summarize(episodes)["too_long"] == 0.25
    metrics = run_update(collm_cc, episodes, agents, critics, args, num_turns=2)
    assert all(np.isfinite(metrics["losses/grad_norm"]))


def too_long(items, agents, critics=()):
    """What the check of lengths says of a task with these items."""
    task = Words(len(agents), 2)
    task.train, task.eval = items[::2], items[1::2]
    with pytest.raises(envs.UserError) as error:
        collm_cc.check_lengths(task, [*agents, *critics], len(agents), 16)
    return str(error.value)


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_that_is_too_long_is_named_at_the_start(place):
    """The first observation and two responses of 16 tokens are more than the model reads; a row
    that fits exactly is not."""
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    limit = agents[0].model.config.max_position_embeddings
    items = [{"text": "word", "place": "rows.jsonl:1"}, {"text": "word", "place": "rows.jsonl:2"}]
    items[place]["text"] = "word " * limit
    row = Words().observe(items[place])[0]
    length = len(agents[0].chat.frame(row, [])) + 32
    told = f"rows.jsonl:{place + 1}: first observation and 2 responses are {length} tokens, "
    assert too_long(items, agents) == told + f"agent 0 (models/tiny) reads {limit}"
    config = agents[1].model.config  # agent 1 reads one token less than this row takes
    items[place]["text"] = "word " * 40
    needed = len(agents[1].chat.frame(Words().observe(items[place])[1], [])) + 32
    config.max_position_embeddings = needed
    collm_cc.check_lengths(Words(2, 2), agents, 2, 16)
    config.max_position_embeddings = needed - 1
    assert f"agent 1 (models/tiny) reads {needed - 1}" in too_long(items, agents)


def test_a_row_that_the_joint_critic_can_not_read_is_named():
    args = make_args(collm_cc)
    agents, critics = make_team(collm_cc, args)
    critics[0].model.config.max_position_embeddings = 150
    items = [{"text": "word " * 40, "place": "rows.jsonl:7"}] * 2
    for agent in agents:
        assert len(agent.chat.frame(Words().observe(items[0])[0], [])) + 32 < 150
    said = too_long(items, agents, critics)
    assert said.startswith("rows.jsonl:7: ") and "critic of agents [0, 1] reads 150" in said


def test_an_episode_ends_where_a_critic_has_no_room():
    """Agents read 4096 tokens, the critic of both 200, which ends longer ones."""
    args = make_args(collm_cc, success=6.0, num_turns=2)
    agents, critics = make_team(collm_cc, args)
    critics[0].model.config.max_position_embeddings = 200
    task = Words(2, 2)
    episodes = collm_cc.start_episodes(task.train, 2)
    collm_cc.rollout(task, episodes, agents, args, "rollout", 0, critics)
    assert {e.too_long for e in episodes} == {False, True}
    for e in episodes:
        assert len(e.rewards) == (1 if e.too_long else 2)
        assert len(critics[0].encode(e, len(e.rewards))[0]) <= 200
    metrics = run_update(collm_cc, episodes, agents, critics, args, num_turns=2)
    assert all(np.isfinite(metrics["losses/value_loss"]))


@pytest.mark.parametrize("script", KINDS)
def test_an_episode_by_itself_has_a_signal(script, monkeypatch):
    """No other returns to differ from, but turns that do."""
    args = make_args(script, num_envs=1, num_generations=1, baseline="none", success=6.0)
    agents, critics = make_team(script, args)
    episodes = script.start_episodes(Words().train[:1], 2)
    script.rollout(Words(2, 3), episodes, agents, args, "rollout", 0)
    episodes[0].rewards = [0.0, 1.0, 3.0]
    seen = record_gradients(script, monkeypatch)
    run_update(script, episodes, agents, critics, args)
    assert all(gradient.norm() > 1e-6 for _, gradient in seen)


# ----------------------------------------------------------------------- what is checked at a start
def test_sampling_that_is_not_what_is_trained_is_refused(monkeypatch):
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    task = Words(2, 2)
    collm_cc.check_sampling(task, agents, args)
    assert all(agent.longest_shared for agent in agents)
    original = collm_cc.sample

    def biased(logits, temperature, uniform):
        tokens, logp = original(logits, temperature, uniform)
        return tokens, logp + 0.02

    monkeypatch.setattr(collm_cc, "sample", biased)
    with pytest.raises(envs.UserError, match=r"agent 0 \(models/tiny\): what it samples is not"):
        collm_cc.check_sampling(task, agents, args)
    args.dtype = "bfloat16"  # whose rounding is larger than that
    collm_cc.check_sampling(task, agents, args)


def test_a_model_whose_rows_can_not_be_shared_gets_a_row_for_each(monkeypatch):
    """Here it ignores the mask that keeps the episodes of a row apart."""
    args = make_args(collm_cc)
    agents, _ = make_team(collm_cc, args)
    blind = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(collm_cc, "shared_mask", lambda owners, dtype: blind)
    collm_cc.check_sampling(Words(2, 2), agents, args)
    assert not any(agent.longest_shared for agent in agents)


def test_pass_at_k_by_hand():
    """Of four samples one passes: 1/4 for one, 1/2 for two; of two that pass, 5/6 for two."""
    assert [collm_cc.pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert collm_cc.pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    episodes = [collm_cc.Episode.start(k, {}, 1) for k in range(8)]
    for k, episode in enumerate(episodes):
        episode.infos = [{"pass@1": 0.5, "kind": "y"}, {"pass@1": float(k == 0), "kind": "x"}]
    means = collm_cc.summarize(episodes, 4)
    assert means.pop("too_long") == means.pop("episodic_return") == 0
    assert means == {f"pass@{k}": k / 8 for k in (1, 2, 3, 4)}


def test_an_ended_episode_keeps_its_last_metrics():
    """Two episodes, of one turn and of two: scores 1, and 2 then 4; rewards 1, and 2 + 4."""
    episodes = [collm_cc.Episode.start(k, {}, 1) for k in (0, 1)]
    episodes[0].rewards, episodes[0].infos = [1.0], [{"score": 1.0}]
    episodes[1].rewards, episodes[1].infos = [2.0, 4.0], [{"score": 2.0}, {"score": 4.0}]
    assert collm_cc.summarize(episodes) == {
        "score": 2.5,
        "too_long": 0.0,
        "episodic_return": 3.5,
    }
