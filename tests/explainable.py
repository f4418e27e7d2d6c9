"""How much of the variance of returns a value function can explain: run as a program.

    python tests/explainable.py --task strbuild                     # the untrained team
    python tests/explainable.py --task strbuild --model runs/NAME/agent_0 runs/NAME/agent_1

From each decision point h_t of some episodes of train items, `--samples` continuations are played.
What differs among them no V(h_t) can know; the rest it can. Printed in one line of JSON:

share        of the variance of G_t over all live turns, as losses/explained_variance has it
within_turns the same without the differences between turns: mean of the variances of single turns
turn_t       of the variance of G_t at turn t; turn_0 is the share that h_0, the item, determines
own_0        [agent] of the variance of G_0 that the agent's own o_i0 determines
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import climbing  # noqa: F401
import collm_cc
import envs


@dataclass
class Args(collm_cc.Args):
    items: int = 64
    """train items, one episode each"""
    samples: int = 8
    """continuations of each decision point"""
    at_once: int = 64
    """episodes that are played at once"""


def copy_until(e, number, num_turns):
    """The episode as it stood when its agents had observed, but not answered, turn num_turns."""
    copy = collm_cc.Episode.start(number, e.item, len(e.tokens))
    for i, turns in enumerate(e.turns):
        end = turns.index(num_turns) if num_turns in turns else len(turns)
        # The frame of a turn's observation stands before its response: act() writes it again
        while end and turns[end - 1] < 0:
            end -= 1
        copy.tokens[i], copy.turns[i] = e.tokens[i][:end], turns[:end]
        copy.observations[i] = e.observations[i][: num_turns + 1]
        copy.actions[i] = e.actions[i][:num_turns]
    copy.rewards, copy.infos = e.rewards[:num_turns], e.infos[:num_turns]
    return copy


def play_on(task, episodes, agents, args, stream):
    """Play episodes, all at the same turn, to their ends, reading their whole histories anew."""
    limit = args.max_new_tokens or task.max_new_tokens
    success = task.success if args.success is None else args.success
    shift = task.reward_shift if args.reward_shift is None else args.reward_shift
    while episodes:
        turn = len(episodes[0].rewards)
        for i, agent in enumerate(agents):
            frames = [agent.chat.frame(e.observations[i][-1], e.tokens[i]) for e in episodes]
            prompts = [e.tokens[i] + frame for e, frame in zip(episodes, frames)]
            uniforms = 1 - torch.rand(len(episodes), limit, generator=stream, dtype=torch.float64)
            responses = collm_cc.generate(agent, prompts, collm_cc.RowsCache(), uniforms)
            for e, frame, (ids, _) in zip(episodes, frames, responses):
                e.tokens[i] += frame + ids
                e.turns[i] += [-1] * len(frame) + [turn] * len(ids)
                e.actions[i].append(agent.tokenizer.decode(ids, skip_special_tokens=True))
        actions = [[texts[turn] for texts in e.actions] for e in episodes]
        going = []
        scores = envs.score_batch(task, [e.item for e in episodes], actions)
        for e, texts, (reward, info) in zip(episodes, actions, scores):
            e.rewards.append(reward + shift)
            e.infos.append(info)
            if turn + 1 < task.num_turns and reward < success:
                collm_cc.observe(e, task.feedback(e.item, texts, info, turn))
                going.append(e)
        episodes = going


def discounted(rewards, gamma):
    """G of a list of rewards."""
    return sum(gamma**t * reward for t, reward in enumerate(rewards))


def explainable(task, agents, args):
    """{measure: share}, see above."""
    stream = torch.Generator().manual_seed(args.seed)
    items = collm_cc.draw_items(task.train, args.items, args.seed, 0)
    episodes = collm_cc.start_episodes(items, len(agents))
    for e in episodes:
        collm_cc.observe(e, task.observe(e.item))
    play_on(task, episodes, agents, args, stream)
    found = {}  # turn: returns (decision points, samples)
    own = [defaultdict(list) for _ in agents]  # o_i0: returns (samples,) of each decision point
    for turn in range(task.num_turns):
        points = [e for e in episodes if len(e.rewards) > turn]
        copies = [copy_until(e, 0, turn) for e in points for _ in range(args.samples)]
        for k in range(0, len(copies), args.at_once):
            play_on(task, copies[k : k + args.at_once], agents, args, stream)
        returns = [discounted(e.rewards[turn:], args.gamma) for e in copies]
        found[turn] = torch.tensor(returns, dtype=torch.float64).view(len(points), args.samples)
        if turn == 0:
            for e, g in zip(points, found[0]):
                for texts, groups in zip(e.observations, own):
                    groups[texts[0]].append(g)
    return shares(found) | {"own_0": [own_share(groups) for groups in own]}


def variances(returns):
    """(within decision points, total) variances of returns (decision points, samples)."""
    within = returns.var(1).mean()
    if len(returns) == 1:
        return within, within
    # Means of m samples vary by 1/m of what is within, which counts once
    return within, returns.mean(1).var() + within * (1 - 1 / returns.shape[1])


def shares(found):
    """{measure: share} of {turn: returns (decision points, samples)}."""
    weights = torch.tensor([len(returns) for returns in found.values()]).double()
    weights = weights / weights.sum()
    pairs = [variances(returns) for returns in found.values()]
    within, total = torch.tensor(pairs, dtype=torch.float64).T
    means = torch.stack([returns.mean() for returns in found.values()])
    between_turns = (weights * (means - (weights * means).sum()) ** 2).sum()
    mean_within, mean_total = (weights * within).sum(), (weights * total).sum()
    out = {
        "share": 1 - mean_within / (mean_total + between_turns),
        "within_turns": 1 - mean_within / mean_total,
    }
    out |= {f"turn_{turn}": 1 - x / y for turn, x, y in zip(found, within, total)}
    return {name: round(float(value), 3) for name, value in out.items()}


def own_share(groups):
    """Share of the variance of returns between groups {key: [returns of a decision point]}."""
    groups = [torch.stack(points) for points in groups.values()]
    everything = torch.cat(groups)  # (decision points, samples)
    within = sum(len(group) * variances(group)[1] for group in groups) / len(everything)
    return round(float(1 - within / variances(everything)[1]), 3)


def main(args):
    task = envs.make(args.task, args.num_agents, args.num_turns, args.dataset, args.eval_dataset)
    args.num_envs = args.num_envs or task.num_envs
    agents, _ = collm_cc.build(task, args, torch.device("cpu"))
    print(json.dumps(explainable(task, agents, args)))


if __name__ == "__main__":
    main(tyro.cli(Args))
