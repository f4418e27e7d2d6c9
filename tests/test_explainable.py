"""tests/explainable.py: shares of the variance of returns, by hand and on a task known by hand."""

import json

import explainable
import pytest
import torch

import collm_cc
import envs


def test_shares_by_hand():
    # Two decision points of means 1 and 5, variances 2 and 2: means have variance 8, half of the
    # variance within counts twice.
    one_turn = {0: torch.tensor([[0.0, 2.0], [4.0, 6.0]])}
    found = explainable.shares(one_turn)
    assert found["turn_0"] == found["share"] == pytest.approx(1 - 2 / 9, abs=1e-3)
    # A second turn of returns that are known: turn 1 is all known, turn 0 as before.
    both = one_turn | {1: torch.tensor([[7.0, 7.0], [9.0, 9.0]])}
    found = explainable.shares(both)
    assert found["turn_1"] == 1.0
    of_turns = (9 + 2) / 2
    assert found["within_turns"] == pytest.approx(1 - 1.0 / of_turns, abs=1e-3)
    between = 2.5**2  # means of the turns: 3 and 8
    assert found["share"] == pytest.approx(1 - 1.0 / (of_turns + between), abs=1e-3)


def test_own_share_by_hand():
    one, three, both = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 3.0]])
    assert explainable.own_share({"a": [one, one], "b": [three, three]}) == 1.0
    # Nobody can tell one from three: both groups hold them, and vary by 2 where all vary by 4/3
    groups = {"a": [one, three], "b": [one, three]}
    assert explainable.own_share(groups) == pytest.approx(1 - 2 / (4 / 3))
    # Of one decision point each, it is what the decision point itself determines
    groups = {"a": [both], "b": [both + 4]}
    found = explainable.shares({0: torch.stack([both, both + 4])})
    assert explainable.own_share(groups) == found["turn_0"]


def test_an_own_share_is_found():
    """Returns are the sum of what agent 0 is told, what agent 1 is told, and noise: a third each,
    however few items share what agent 0 is told."""
    stream = torch.Generator().manual_seed(0)
    groups = {}
    for key in range(4000):
        left, *rights = torch.randn(4, generator=stream)
        noise = torch.randn(3, 2, generator=stream)
        groups[key] = [left + right + noise[j] for j, right in enumerate(rights)]
    assert explainable.own_share(groups) == pytest.approx(1 / 3, abs=0.04)


def test_a_known_share_is_found():
    stream = torch.Generator().manual_seed(0)
    known = torch.randn(4000, 1, generator=stream)
    returns = known + 3 * torch.randn(4000, 8, generator=stream)
    assert explainable.shares({0: returns})["share"] == pytest.approx(0.1, abs=0.01)


def test_few_decision_points_do_not_bias_it():
    stream = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2000):
        returns = torch.randn(5, 1, generator=stream) + torch.randn(5, 4, generator=stream)
        inner = returns.var(1).mean()
        found.append((inner, inner / (1 - explainable.shares({0: returns})["turn_0"])))
    within, total = torch.tensor(found).mean(0)
    assert within == pytest.approx(1, abs=0.05) and total == pytest.approx(2, abs=0.07)


def test_later_rewards_count_less():
    assert explainable.discounted([1.0, 2.0, 4.0], 0.5) == 1 + 1 + 1
    assert explainable.discounted([], 0.5) == 0


def test_it_plays_from_every_decision_point(capsys):
    args = explainable.Args(task="strbuild", items=4, samples=2, max_new_tokens=8, num_turns=2)
    explainable.main(args)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"share", "within_turns", "turn_0", "turn_1", "own_0"}
    assert all(value <= 1 for value in [found["share"], *found["own_0"]])


def test_a_decision_point_is_the_episode_as_it_was():
    args = explainable.Args(task="strbuild", max_new_tokens=12)
    task = envs.make("strbuild")
    agents, _ = collm_cc.build(task, args, torch.device("cpu"))
    episodes = collm_cc.start_episodes(task.train[:4], 2)
    collm_cc.rollout(task, episodes, agents, args, "rollout", 0)
    e = max(episodes, key=lambda e: len(e.rewards))
    assert len(e.rewards) > 1
    for turn in range(len(e.rewards)):
        copy = explainable.copy_until(e, 0, turn)
        assert copy.rewards == e.rewards[:turn] and len(copy.observations[0]) == turn + 1
        for i, agent in enumerate(agents):
            start = e.turns[i].index(turn)
            frame = agent.chat.frame(copy.observations[i][-1], copy.tokens[i])
            assert copy.tokens[i] + frame == e.tokens[i][:start]
