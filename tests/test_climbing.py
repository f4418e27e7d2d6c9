"""climbing.py: its table, and whether critics come to know what is known by hand."""

from collections import Counter
from itertools import product

import pytest
import torch

import climbing
import collm_cc
import collm_dc
import envs


def test_climbing_pays_what_its_table_says():
    task = envs.make("climbing")
    payoff = {("a", "a"): 11, ("a", "b"): -30, ("a", "c"): 0}
    payoff |= {("b", "a"): -30, ("b", "b"): 7, ("b", "c"): 6}
    payoff |= {("c", "a"): 0, ("c", "b"): 0, ("c", "c"): 5}
    for actions, value in payoff.items():
        reward, info = task.score(task.train[0], list(actions))
        assert reward == pytest.approx((value + 30) / 41)
        assert info["success"] == float(actions == ("a", "a")) and info["valid"] == 1.0
        assert info["played_a"] == Counter(actions)["a"] / 2
    assert 4 * len(task.eval) == collm_cc.Args().eval_episodes
    for odd in ("", "d", "a b", "aa"):
        assert task.score(task.train[0], [odd, "a"])[0] == 0.0


def test_value_of_two_policies():
    uniform = dict.fromkeys("abc", 1 / 3)
    assert climbing.value([uniform, uniform]) == pytest.approx((-31 / 9 + 30) / 41)
    one, two = {"a": 0.5, "b": 0.2, "c": 0.3}, {"a": 0.1, "b": 0.6, "c": 0.3}
    task, total = envs.make("climbing"), 0.0
    for x, y in product("abc", repeat=2):
        total += one[x] * two[y] * task.score(task.train[0], [x, y])[0]
    assert climbing.value([one, two]) == pytest.approx(total)


def policy(agent, observation):
    """{action: probability} of an agent: that of its token, and that it then ends."""
    prompt, chances = agent.chat.frame(observation, []), {}
    for action in climbing.ACTIONS:
        (token,) = agent.chat.encode(action)
        logits = agent.model(torch.tensor([[*prompt, token]])).logits[0, -2:]
        ends = logits[1].softmax(-1)[sorted(agent.eos)].sum()
        chances[action] = float(logits[0].softmax(-1)[token] * ends)
    return chances


def trained(script, iterations, **flags):
    """(agents, critics, the last episodes) after so many iterations."""
    args = script.Args(task="climbing", device="cpu", **flags)
    task = envs.make("climbing")
    agents, critics = script.build(task, args, torch.device("cpu"))
    for iteration in range(iterations):
        items = script.draw_items(task.train, args.num_envs, args.seed, iteration)
        episodes = script.start_episodes(items, 2)
        script.rollout(task, episodes, agents, args, "rollout", iteration, critics)
        script.update(episodes, agents, critics, 1, args, iteration)
    return agents, critics, episodes


@pytest.mark.parametrize("script", [collm_cc, collm_dc])
def test_critics_learn_the_value_of_a_fixed_team(script):
    """The policies stand still, so V(h_0) is what their probabilities say, within the noise of
    four times 128 episodes."""
    agents, critics, episodes = trained(script, 4, num_envs=128, actor_lr=[0.0])
    task = envs.make("climbing")
    with torch.no_grad():
        texts = task.observe(task.train[0])
        policies = [policy(agent, text) for agent, text in zip(agents, texts, strict=True)]
        assert all(0.9 < sum(chances.values()) <= 1.001 for chances in policies)
        known = climbing.value(policies)
        for critic in critics:
            tokens, ends = critic.encode(episodes[0], 1)
            assert critic([tokens], [ends], 1).item() == pytest.approx(known, abs=0.08)


def test_of_one_state_both_kinds_of_critic_teach_the_same():
    """All episodes have the same value then, whichever critic gives it; normalisation takes it
    out. So the game is a control in which CC must not win."""
    teams = [trained(script, 3, num_envs=32)[0] for script in (collm_cc, collm_dc)]
    ours, theirs = ([p.detach() for agent in team for p in agent.parameters()] for team in teams)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
