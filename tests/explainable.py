"""How much of the returns could any critic explain? By hand: python tests/explainable.py

Plays K episodes of each of n train items with one team and splits the variance of the discounted
return in that within items, which is chance (of the agents' sampling), and that between items
(one-way analysis of variance). The share between items bounds the explained variance of every
V(h_0), whatever it reads, and is all that a baseline per item removes. The second share is R^2 of
the return-to-go from turn 1 on, explained by the reward of turn 0.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import collm_cc
import envs


@dataclass
class Args:
    task: str = "coding"
    """a task, as the scripts take it"""
    model: list[str] = field(default_factory=lambda: ["models/tiny"])
    """folder of a model for all agents, or one each: runs/NAME/agent_0 runs/NAME/agent_1"""
    items: int = 64
    """train items (n)"""
    samples: int = 8
    """episodes of each (K)"""
    seed: int = 0
    """seed of items and sampling"""


def between_share(returns):
    """Share of the variance of returns (n, K) that lies between the n items.

    Both parts are unbiased; the one between items is at least 0.
    """
    num_samples = returns.shape[1]
    within = returns.var(1, ddof=1).mean()
    between = max(0.0, returns.mean(1).var(ddof=1) - within / num_samples)
    return between / (between + within)


def discounted(rewards, gamma):
    """Sum of rewards, each discounted once for each turn before it."""
    return sum(gamma**t * reward for t, reward in enumerate(rewards))


def play(task, args):
    """Rewards of K episodes of each of n items: [[rewards of an episode]], K beside each other."""
    config = collm_cc.Args(task=args.task, model=args.model, seed=args.seed, num_envs=args.items)
    agents, _ = collm_cc.build(task, config, torch.device("cpu"))
    items = collm_cc.draw_items(task.train, args.items, args.seed, 0)
    repeated = [item for item in items for _ in range(args.samples)]
    episodes = collm_cc.start_episodes(repeated, len(agents))
    for k in range(0, len(episodes), config.num_envs):
        batch = episodes[k : k + config.num_envs]
        collm_cc.rollout(task, batch, agents, config, "rollout", 0)
    return [e.rewards for e in episodes]


def main(args):
    """Print both shares."""
    task = envs.make(args.task)
    gamma = collm_cc.Args().gamma
    rewards = play(task, args)
    returns = np.array([discounted(x, gamma) for x in rewards]).reshape(args.items, args.samples)
    share = between_share(returns)
    print(f"{share:.3f} of the variance of returns lies between items")
    later = [(x[0], discounted(x[1:], gamma)) for x in rewards if len(x) > 1]
    if later:
        share = np.corrcoef(np.transpose(later))[0, 1] ** 2
        print(f"{share:.3f} of what follows a first turn, its reward explains")


if __name__ == "__main__":
    main(tyro.cli(Args))
