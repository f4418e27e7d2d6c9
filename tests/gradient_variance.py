"""Variance and bias of the actors' policy gradient at a fixed team: run as a program.

    python tests/gradient_variance.py --task strbuild --fit 50 --batches 32
    python tests/gradient_variance.py --task strbuild --model runs/NAME/agent_0 runs/NAME/agent_1

The critics of CC and DC first learn for `--fit` iterations while the agents stay as they are. Then
`--batches` batches are drawn, each of items and of sampling streams of its own, and the scripts'
own update() is run on each: the advantages that it gives the agents are kept, and nothing is
stepped. A gradient is the sum over the turns of an episode of grad log pi A, mean over episodes,
not clipped; that of all agents is one vector. One line of JSON for each method, with norm_adv off
and on:

variance            total: the trace of the covariance over batches
ratio               that over the one of REINFORCE (none)
mean_squared        squared norm of the expected gradient
noise               variance / mean_squared: what is left if the scale, a learning rate, is free
bias_squared        squared distance of the expected gradient from the true one (norm_adv off)
cosine              of the expected gradient and the true one
explained_variance  of the returns, by critic or baseline, mean over batches and agents

Squares and the cosine are without the noise of finitely many batches, so squares may be below 0;
what then has no value is null: draw more batches. The true gradient is that of returns-to-go less
the fitted V(h_t) of CC: a function of the history alone, so a baseline without bias, on the very
batches of the method it is compared with. MC draws --num-generations episodes of an item, the
others an item for each episode, as in training. Compare methods over several --seed, or teams.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import climbing  # noqa: F401
import collm_cc
import collm_dc
import envs
import mc_baseline


@dataclass
class Args(collm_cc.Args):
    batches: int = 32
    """batches that the gradient is estimated from"""
    fit: int = 50
    """iterations in which the critics learn, the agents staying as they are"""
    num_generations: int = 4
    """episodes of each item in a batch of mean and rloo"""
    baseline: str = "mean"
    """of mc_baseline.py; set for each method"""


METHODS = {  # name: script, whether episodes share items, args
    "CoLLM-CC": (collm_cc, False, {}),
    "CoLLM-DC": (collm_dc, False, {}),
    "CoLLM-CC, lambda 1": (collm_cc, False, {"gae_lambda": 1.0}),
    "MAGRPO": (mc_baseline, True, {"baseline": "mean"}),
    "MC rloo": (mc_baseline, True, {"baseline": "rloo"}),
    "none": (mc_baseline, False, {"baseline": "none", "num_generations": 1}),
}
TRUE = "CoLLM-CC, lambda 1"


class Moments:
    """Sums over batches of a method's gradients and of the true ones beside them."""

    def __init__(self):
        self.count = 0
        self.sums = {}  # "own", "true": sum of vectors
        self.products = {}  # "own", "true", "both": sum of inner products

    def add(self, own: torch.Tensor, true: torch.Tensor) -> None:
        """Take in the gradients of one batch."""
        self.count += 1
        for name, vector in (("own", own), ("true", true)):
            self.sums[name] = self.sums.get(name, 0) + vector
        pairs = {"own": (own, own), "true": (true, true), "both": (own, true)}
        for name, (a, b) in pairs.items():
            self.products[name] = self.products.get(name, 0.0) + float(a @ b)

    def product(self, name: str) -> float:
        """Inner product of two expected gradients: mean over pairs of different batches."""
        a, b = {"both": ("own", "true")}.get(name, (name, name))
        all_pairs = float(self.sums[a] @ self.sums[b])
        return (all_pairs - self.products[name]) / (self.count * (self.count - 1))

    def measures(self) -> dict[str, float | None]:
        """Variance, squares and cosine, see above."""
        own, true, both = (self.product(name) for name in ("own", "true", "both"))
        # E |g|^2 = |E g|^2 + trace of the covariance
        variance = self.products["own"] / self.count - own
        return {
            "variance": variance,
            "mean_squared": own,
            "noise": variance / own if own > 0 else None,
            "bias_squared": own + true - 2 * both,
            "cosine": both / (own * true) ** 0.5 if min(own, true) > 0 else None,
        }


def no_step(i, agent, minibatch, advantages, *_):
    """Stands for actor_step: nothing is learned."""
    return torch.zeros_like(advantages), {"losses/sampling_gap": torch.zeros(())}


def weights(script, episodes, agents, critics, num_turns: int, args: Args):
    """({norm_adv: advantages (T, B, N) that update() gives the agents}, its explained variance).

    Nothing is stepped; the critics are as before.
    """
    kept, places, normalise = {}, [], script.normalise

    def keep_advantages(advantages, returns, live):
        kept[False], kept[True] = advantages, normalise(advantages, returns, live)
        return kept[True]

    def keep_order(i, agent, minibatch, advantages, *_):
        places[:] = [e.number for e in minibatch]
        return no_step(i, agent, minibatch, advantages)

    def stay(model, *_):
        model.zero_grad()
        return torch.zeros((), dtype=torch.float64)

    args = copy.copy(args)
    args.norm_adv, args.num_minibatches = True, 1
    stubs = {"normalise": keep_advantages, "actor_step": keep_order, "optimize": stay}
    critics = copy.deepcopy(critics)
    for critic in critics or []:  # the batch's own returns do not scale its values
        critic.learn_scale = lambda *_: None
    with mock.patch.multiple(script, **stubs):
        metrics = script.update(episodes, agents, critics, num_turns, args, 0)
    order = torch.tensor(places).argsort()
    explained = metrics["losses/explained_variance"]
    return {norm: x[:, order] for norm, x in kept.items()}, sum(explained) / len(explained)


def gradients(agents, episodes, advantages, num_turns: int, args: Args):
    """{key: policy gradient of all agents, (P,)} of {key: advantages (T, B, N)}: mean over episodes
    of the sum over turns of grad log pi_i(a_it | h_it) A_it."""
    sums = {key: [] for key in advantages}
    for i, agent in enumerate(agents):
        trained = list(agent.model.parameters())
        totals = dict.fromkeys(advantages, 0.0)
        lengths = [len(e.tokens[i]) for e in episodes]
        for rows in collm_cc.microbatches(lengths, args.microbatch_tokens):
            batch = [episodes[k] for k in rows], i, num_turns, agent.temperature
            logp, _ = collm_cc.logprobs(agent.model, *batch, share=False)  # (T, b)
            for key, x in advantages.items():
                weight = x[:, rows, i].to(logp.dtype)  # (T, b)
                found = torch.autograd.grad(logp, trained, weight, retain_graph=True)
                totals[key] += torch.cat([g.flatten() for g in found]).double()
        for key, total in totals.items():
            sums[key].append(total / len(episodes))
    return {key: torch.cat(parts) for key, parts in sums.items()}


def draw(task, agents, critics, args: Args, number: int, group: int):
    """Batch `number`: no two share an item's place in an epoch or a sampling stream."""
    stream = 10**6 * (args.seed + 1) + number  # of no training run
    items = collm_cc.draw_items(task.train, args.num_envs // group, stream, 0)
    episodes = collm_cc.start_episodes([x for x in items for _ in range(group)], args.num_agents)
    collm_cc.rollout(task, episodes, agents, args, "rollout", stream, critics)
    return episodes


def fit(task, agents, critics, args: Args) -> None:
    """Let the critics learn, {script: critics}, and no agent."""
    everyone = [critic for some in critics.values() for critic in some]
    for number in range(args.fit):
        episodes = draw(task, agents, everyone, args, number, 1)
        for script, some in critics.items():
            with mock.patch.object(script, "actor_step", no_step):
                script.update(episodes, agents, some, task.num_turns, args, number)


def measure(task, agents, critics, args: Args):
    """({(method, norm_adv): Moments}, {method: explained variance of each batch})."""
    moments = {(name, norm): Moments() for name in METHODS for norm in (False, True)}
    explained = {name: [] for name in METHODS}
    everyone = [critic for some in critics.values() for critic in some]
    for number in range(args.fit, args.fit + 2 * args.batches):
        grouped = number % 2 == 1
        group = args.num_generations if grouped else 1
        episodes = draw(task, agents, everyone, args, number, group)
        names = [name for name, (_, shares, _) in METHODS.items() if shares == grouped]
        advantages = {}
        for name in dict.fromkeys([TRUE, *names]):
            script, _, changes = METHODS[name]
            options = copy.copy(args)
            vars(options).update(changes)
            team = agents, critics.get(script), task.num_turns, options
            both, share = weights(script, episodes, *team)
            advantages |= {(name, norm): x for norm, x in both.items()}
            explained[name] += [share] if name in names else []
        found = gradients(agents, episodes, advantages, task.num_turns, args)
        for name in names:
            for norm in (False, True):
                moments[name, norm].add(found[name, norm], found[TRUE, False])
    return moments, explained


def report(moments, explained) -> list[dict]:
    """What is printed: a line for each method."""
    lines = []
    for name in METHODS:
        line = {"method": name}
        for norm, told in ((False, "norm_adv_off"), (True, "norm_adv_on")):
            found = moments[name, norm].measures()
            reinforce = moments["none", norm].measures()["variance"]
            found["ratio"] = found["variance"] / reinforce if reinforce > 0 else None
            if norm:  # of another scale
                del found["bias_squared"]
            line[told] = {key: x and float(f"{x:.4g}") for key, x in found.items()}
        line["explained_variance"] = round(sum(explained[name]) / len(explained[name]), 4)
        lines.append(line | {"batches": moments[name, False].count})
    return lines


def main(args):
    task = envs.make(args.task, args.num_agents, args.num_turns, args.dataset, args.eval_dataset)
    args.num_envs = args.num_envs or task.num_envs
    agents, critics = collm_cc.build(task, args, torch.device("cpu"))
    critics = {collm_cc: critics, collm_dc: collm_dc.build(task, args, torch.device("cpu"))[1]}
    fit(task, agents, critics, args)
    for line in report(*measure(task, agents, critics, args)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
