"""tests/gradient_variance.py: variance and bias by hand, gradients against a naive reference."""

import copy
import functools
import json

import gradient_variance
import numpy as np
import pytest
import torch

import collm_cc
import collm_dc
import envs
import mc_baseline


def moments_of(own, true):
    moments = gradient_variance.Moments()
    for a, b in zip(own, true):
        moments.add(torch.as_tensor(a).double(), torch.as_tensor(b).double())
    return moments.measures()


def test_two_batches_by_hand():
    """Gradients (3, 0) and (1, 2): mean (2, 1), deviations (1, -1) and (-1, 1), trace 2 + 2."""
    found = moments_of([[3.0, 0], [1, 2]], [[1.0, 0], [1, 0]])
    assert found["variance"] == pytest.approx(4)
    assert found["mean_squared"] == pytest.approx(5 - 4 / 2)  # (3, 0) times (1, 2)
    assert found["noise"] == pytest.approx(4 / 3)
    # Differences (2, 0) and (0, 2): their inner product is 0
    assert found["bias_squared"] == pytest.approx(0)
    # (3, 0) and (1, 2) times (1, 0): 3 and 1, mean 2
    assert found["cosine"] == pytest.approx(2 / 3**0.5)


def test_a_bandit_whose_moments_are_known():
    """Two actions of probability 1/2: scores are 1/2 and -1/2; rewards are 1 and 0."""
    rng = np.random.default_rng(0)
    first = rng.random(4000) < 0.5
    score, reward = np.where(first, 0.5, -0.5)[:, None], first[:, None].astype(float)
    reinforce, centred = score * reward, score * (reward - 0.5)
    found = moments_of(reinforce, centred)
    assert found["variance"] == pytest.approx(1 / 16, rel=0.02)
    assert found["mean_squared"] == pytest.approx(1 / 16, rel=0.05)
    assert found["bias_squared"] == pytest.approx(0, abs=1e-3)
    found = moments_of(centred, reinforce)
    assert found["variance"] == pytest.approx(0, abs=1e-9)
    assert found["noise"] == pytest.approx(0, abs=1e-9)
    half = moments_of(centred / 2, centred)  # the baseline of two samples holds the sample itself
    assert half["bias_squared"] == pytest.approx((1 / 8) ** 2)
    assert half["cosine"] == pytest.approx(1)
    away = moments_of(rng.normal(size=(5, 2)), -np.ones((5, 2)))
    assert away["mean_squared"] > 0 or away["cosine"] is None


def make_args(**changes):
    sizes = {"max_new_tokens": 6, "num_envs": 4, "fit": 1, "batches": 2, "num_generations": 2}
    return gradient_variance.Args(**sizes, **changes)


@functools.cache
def built():
    args = make_args(task="strbuild", num_turns=2)
    task = envs.make(args.task, 2, args.num_turns)
    agents, critics = collm_cc.build(task, args, torch.device("cpu"))
    return task, args, agents, critics, collm_dc.build(task, args, torch.device("cpu"))[1]


def make_team():
    """Task, args, agents and {script: critics}; a copy for each test."""
    task, args, agents, cc, dc = copy.deepcopy(built())
    return task, args, agents, {collm_cc: cc, collm_dc: dc}


def test_gradients_against_one_episode_at_a_time():
    task, args, agents, _ = make_team()
    episodes = gradient_variance.draw(task, agents, [], args, 0, 2)
    assert [e.item for e in episodes[::2]] == [e.item for e in episodes[1::2]]
    advantages = torch.randn(2, len(episodes), 2, dtype=torch.float64)
    found = gradient_variance.gradients(agents, episodes, {"x": advantages}, 2, args)["x"]
    for agent in agents:
        agent.zero_grad()
    for k, e in enumerate(episodes):
        for i, agent in enumerate(agents):
            logps = agent.model(torch.tensor([e.tokens[i]])).logits[0].log_softmax(-1)
            total = 0.0
            for s, turn in enumerate(e.turns[i]):
                if turn >= 0:
                    total += advantages[turn, k, i] * logps[s - 1, e.tokens[i][s]]
            (total / len(episodes)).backward()
    expected = torch.cat([p.grad.flatten() for agent in agents for p in agent.model.parameters()])
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-4 * expected.norm()


def weights_of(name, episodes, agents, critics, args):
    script, _, changes = gradient_variance.METHODS[name]
    args = copy.copy(args)
    vars(args).update(changes)
    return gradient_variance.weights(script, episodes, agents, critics.get(script), 2, args)[0]


def test_advantages_are_those_of_the_scripts_which_stay_as_they_were():
    task, args, agents, critics = make_team()
    torch.nn.init.normal_(critics[collm_cc][0].head.weight, std=0.1)
    episodes = gradient_variance.draw(task, agents, critics[collm_cc], args, 0, 2)
    before = [copy.deepcopy(x.state_dict()) for x in (*agents, *critics[collm_cc])]
    found = {
        name: weights_of(name, episodes, agents, critics, args)
        for name in ("CoLLM-CC", "CoLLM-CC, lambda 1", "MAGRPO", "MC rloo", "none")
    }
    rewards, live = collm_cc.stack_rewards(episodes, 2, agents)
    returns = rewards.clone()
    returns[0] += args.gamma * rewards[1]
    assert torch.allclose(found["none"][False], returns)
    # Of two samples, the mean's advantages are half of those of leaving one out
    assert live.all()
    others = returns.unflatten(1, (2, 2)).flip(2).flatten(1, 2)
    assert torch.allclose(found["MC rloo"][False], returns - others)
    assert torch.allclose(found["MAGRPO"][False], (returns - others) / 2)
    assert torch.allclose(found["MAGRPO"][True], found["MC rloo"][True])
    # V from TD errors and from returns: A = r + gamma V' - V, or G - V
    values = returns - found["CoLLM-CC, lambda 1"][False]
    assert values.std() > 0
    # Which the batch's own returns are no part of, or they would be no baseline without bias
    paid = copy.deepcopy(episodes)
    paid[0].rewards[0] += 1
    more = returns.clone()
    more[0, 0] += 1
    again = weights_of("CoLLM-CC, lambda 1", paid, agents, critics, args)[False]
    assert torch.allclose(more - again, values)
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])
    assert torch.allclose(found["CoLLM-CC"][False], rewards + args.gamma * following - values)
    for both in found.values():
        x = both[True].flatten(0, 1)
        assert torch.allclose(x.mean(0), torch.zeros(2).double(), atol=1e-9)
    after = [x.state_dict() for x in (*agents, *critics[collm_cc])]
    for a, b in zip(before, after):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for script in (collm_cc, mc_baseline):  # as they were
        for name in ("optimize", "normalise", "actor_step"):
            assert getattr(script, name).__module__ == script.__name__
            assert getattr(script, name).__name__ == name


def test_critics_learn_and_the_agents_stay():
    task, args, agents, critics = make_team()
    everyone = [critic for some in critics.values() for critic in some]
    assert len(everyone) == 3
    before = [copy.deepcopy(x.state_dict()) for x in (*agents, *everyone)]
    gradient_variance.fit(task, agents, critics, args)
    for k, (a, x) in enumerate(zip(before, (*agents, *everyone))):
        same = all(torch.equal(a[name], x.state_dict()[name]) for name in a)
        assert same == (k < 2)
    assert all(agent.trains for agent in agents)


def test_it_prints_a_line_for_each_method(capsys):
    gradient_variance.main(make_args(task="strbuild", num_turns=1))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["method"] for line in lines] == list(gradient_variance.METHODS)
    by_name = {line["method"]: line for line in lines}
    assert by_name["none"]["norm_adv_off"]["ratio"] == 1.0
    for line in lines:
        assert line["batches"] == 2
        assert line["norm_adv_off"]["variance"] > 0
        assert "bias_squared" not in line["norm_adv_on"]
    # In one turn a TD error is the return less V: without bias, batch for batch
    assert abs(by_name["CoLLM-CC"]["norm_adv_off"]["bias_squared"]) < 1e-9
    both = by_name["CoLLM-CC"]["norm_adv_off"], by_name["CoLLM-CC, lambda 1"]["norm_adv_off"]
    assert both[0]["variance"] == both[1]["variance"]
    assert by_name["MAGRPO"]["norm_adv_on"] == by_name["MC rloo"]["norm_adv_on"]
