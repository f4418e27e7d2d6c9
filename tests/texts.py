"""How texts of a writing task read, beside what they score: run as a program.

    python tests/texts.py --task tldr --base smollm2 --model smollm2            # before training
    python tests/texts.py --task tldr --base smollm2 --model runs/NAME/agent_0 runs/NAME/agent_1

Plays held-out episodes as an evaluation does, and prints a line of JSON for each agent, means over
its responses, then the first responses as text:

score         of the team, in % of the largest reward
tokens        of a response
source_words  share of a response's words, without the reward's stopwords, that its source has:
              the post or the abstract, which stands in an observation after the first blank line
copied        share of a response's runs of 8 words that its source has
distinct_2    different pairs of neighbouring words / all of a response
base_logp     log-likelihood of a token by the base model, in nats
kl            KL(agent || base) of a response, in nats, estimated from what was sampled
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import collm_cc
import envs


@dataclass
class Args(collm_cc.Args):
    base: str = "models/tiny"
    """Hub id or folder of the model that training started from"""
    shown: int = 3
    """responses of each agent that are printed"""


def words_of(text):
    """The words of a text, in lower case."""
    return re.findall(r"\b\w+\b", text.lower())


def runs_of(words, length):
    """All runs of so many neighbouring words."""
    return list(zip(*(words[k:] for k in range(length))))


def mean(values):
    """Mean of numbers, 0 of none."""
    values = list(values)
    return sum(values) / max(1, len(values))


def reading(text, source):
    """{measure: value} of one response to a source."""
    words, given = words_of(text), words_of(source)
    telling = [word for word in words if word not in envs.STOPWORDS]
    pairs = runs_of(words, 2)
    known = set(runs_of(given, 8))
    return {
        "source_words": mean(word in set(given) for word in telling),
        "copied": mean(run in known for run in runs_of(words, 8)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }


@torch.no_grad()
def likelihoods(i, agent, base, episodes, args):
    """(log-likelihood of a token by the base model, KL of a response) of agent i's responses."""
    by_base = sampled = num_tokens = 0
    lengths = [len(e.tokens[i]) for e in episodes]
    for rows in collm_cc.microbatches(lengths, args.microbatch_tokens):
        batch = [episodes[k] for k in rows]
        total, difference = collm_cc.logprobs(base, batch, i, 1, agent.temperature)
        by_base += total.sum().item()
        sampled += total.sum().item() - difference.sum().item()
        num_tokens += len(difference)
    return by_base / num_tokens, (sampled - by_base) / len(episodes)


def texts(task, agents, base, args):
    """([{measure: value} of each agent], episodes)."""
    metrics, episodes = collm_cc.evaluate(task, agents, args, None, 0)
    found = []
    for i, agent in enumerate(agents):
        sources = [e.observations[i][0].partition("\n\n")[2] for e in episodes]
        measures = [reading(e.actions[i][0], s) for e, s in zip(episodes, sources, strict=True)]
        tokens = [sum(turn >= 0 for turn in e.turns[i]) for e in episodes]
        values = {"score": metrics["score"], "tokens": mean(tokens)}
        values |= {name: mean(x[name] for x in measures) for name in measures[0]}
        values["base_logp"], values["kl"] = likelihoods(i, agent, base, episodes, args)
        found.append({name: round(value, 3) for name, value in values.items()})
    return found, episodes


def main(args):
    task = envs.make(args.task, args.num_agents, args.num_turns, args.dataset, args.eval_dataset)
    agents, _ = collm_cc.build(task, args, torch.device("cpu"))
    base, _ = collm_cc.load_model(AutoModelForCausalLM, args.base, args, torch.device("cpu"), {})
    found, episodes = texts(task, agents, base, args)
    for measures in found:
        print(json.dumps(measures))
    for e in episodes[::4][: args.shown]:
        for i, actions in enumerate(e.actions):
            print(f"--- agent {i} is told\n{e.observations[i][0]}\n--- and answers\n{actions[0]}")


if __name__ == "__main__":
    main(tyro.cli(Args))
