"""How much of the returns could any critic explain? By hand: python tests/explainable.py --task coding

Plays K episodes of each of n train items with one team and splits the variance of the discounted return in that within
items, which is chance (of the agents' sampling), and that between items (one-way analysis of variance). The share
between items bounds the explained variance of every V(h_0), whatever it reads, and is all that a baseline per item
removes. The second share is R^2 of the return-to-go from turn 1 on, explained by the reward of turn 0.
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
    """one of envs.TASKS"""
    model: list[str] = field(default_factory=lambda: ["models/tiny"])
    """folder of a model for all agents, or one for each, e.g. runs/NAME/agent_0 runs/NAME/agent_1"""
    items: int = 64
    """train items (n)"""
    samples: int = 8
    """episodes of each (K)"""


def between_share(returns):
    """Share of the variance of returns (n, K) that lies between the n items; unbiased in both parts, at least 0."""
    within = returns.var(1, ddof=1).mean()
    between = max(0.0, returns.mean(1).var(ddof=1) - within / returns.shape[1])
    return between / (between + within)


def main(args):
    config = collm_cc.Args(task=args.task, model=args.model, num_envs=args.items)
    task, generator = envs.make(args.task), torch.Generator().manual_seed(0)
    names = args.model * 2 if len(args.model) == 1 else args.model
    agents = [collm_cc.Agent(name, config, torch.device("cpu")) for name in names]
    items = envs.sample(task.train, args.items, 0, 0)
    sets = [collm_cc.rollout(task, items, agents, config, generator) for _ in range(args.samples)]
    gamma = config.gamma ** np.arange(task.num_turns)
    returns = np.array([[gamma[: len(e.rewards)] @ e.rewards for e in episodes] for episodes in sets]).T  # (n, K)
    print(f"{between_share(returns):.3f} of the variance of returns lies between items")
    later = [(e.rewards[0], gamma[: len(e.rewards) - 1] @ e.rewards[1:]) for x in sets for e in x if len(e.rewards) > 1]
    if later:
        print(f"{np.corrcoef(np.transpose(later))[0, 1] ** 2:.3f} of what follows a first turn, its reward explains")


if __name__ == "__main__":
    main(tyro.cli(Args))
