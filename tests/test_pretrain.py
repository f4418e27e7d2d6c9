"""The scripted demonstrations that models/tiny learns from: what they say, how often it fits."""

import importlib.util
import json
import random
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import envs

path = ROOT / "models" / "tiny" / "pretrain.py"
spec = importlib.util.spec_from_file_location("pretrain", path)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)
pretrain.PROBLEMS, pretrain.HOUSES = {1: 120, 2: 400, 3: 400}, 200  # fewer: they take time


def played(task, items, samples):
    """Returns (items, samples) of teams of scripted writers."""
    write, rng, returns = pretrain.WRITERS[task.name][0], random.Random(0), []
    for item in items * samples:
        memories, total = [{}, {}], 0.0
        for turn in range(task.num_turns):
            actions = [write(rng, task, item, i, memories[i]) for i in (0, 1)]
            reward = task.score(item, actions)[0]
            total += 0.9**turn * (reward + task.reward_shift)
            if reward >= task.success:
                break
        returns.append(total)
    return torch.tensor(returns).view(samples, len(items)).T


@pytest.mark.parametrize("name", ["coding", "strbuild", "housebuild"])
def test_items_differ_for_scripted_teams(name):
    task = envs.make(name)
    returns = played(task, task.eval[:48], 4)
    assert pretrain.between_share(returns) > 0.25
    means = returns.mean(1).sort().values
    assert means[-4:].mean() > -0.5 and means[:12].mean() < means[-12:].mean() - 1


def test_between_share_by_hand():
    assert pretrain.between_share(torch.tensor([[0.0, 0.0], [2.0, 2.0]])) == 1.0
    assert pretrain.between_share(torch.tensor([[0.0, 2.0], [2.0, 0.0]])) == 0.0
    # Within: variances 2 and 2, mean 2. Means 1 and 5: variance 8, less 2 / 2. 7 / (7 + 2).
    assert pretrain.between_share(torch.tensor([[0.0, 2.0], [4.0, 6.0]])) == pytest.approx(7 / 9)


def test_programmers_who_mean_the_same_solve_every_problem():
    task, solved = envs.make("coding"), set()
    for item in task.eval:
        parts = pretrain.all_coding_parts()[item["entry_point"]]
        aux_meanings, main_meanings = pretrain.CONVENTIONS[parts["steps"]]
        for meaning in aux_meanings.keys() & main_meanings.keys():
            if meaning == "all" and parts["steps"] != "fold":
                continue  # main merely wraps it
            arg = parts["each"] if meaning in ("map", "keep") else parts["arg"]
            aux = f"def aux({arg}):\n    return {pretrain.aux_body(parts, meaning)}"
            main = f"def {item['entry_point']}({parts['arg']}):\n    return "
            main += pretrain.main_body(parts, meaning)
            assert task.score(item, [aux, main])[0] == task.success, (aux, main)
            solved.add((parts["steps"], meaning))
    assert len(solved) > 12


@pytest.mark.parametrize("name", ["strbuild", "housebuild"])
def test_private_builders_write_what_they_are_shown(name):
    task, rng = envs.make(f"{name}:private"), random.Random(0)
    inside = 0
    for item in task.train[:40]:
        width = task.plan(item).size[0]
        for agent in (0, 1):
            text = pretrain.WRITERS[name][0](rng, task, item, agent, {})
            starts = [int(x) for x in re.findall(r"^/(?:setblock|fill) (\d+)", text, re.MULTILINE)]
            share = sum((2 * x // width == agent) for x in starts) / max(1, len(starts))
            inside += share > 0.75  # but for slips
    assert inside >= 78


def test_lone_agents_are_seen_over_all_turns():
    chats = pretrain.conversations("strbuild", pretrain.pools("strbuild"), 80, seed=0)
    lone = [chat for chat in chats if "You are builder" not in chat[0]["content"]]
    assert len(lone) >= 3 and {len(chat) for chat in lone} & {8}
    assert any("your part" in chat[0]["content"] for chat in chats)


@pytest.mark.parametrize("name", ["coding", "housebuild"])
def test_demonstrations_are_of_more_items_and_of_none_that_is_held_out(name):
    task = envs.make(name)
    observed = {str(task.observe(item)) for _, items in pretrain.pools(name) for item in items}
    held_out = {str(task.observe(item)) for item in task.eval}
    assert len(observed) > 1.5 * len(task.train)
    assert {str(task.observe(item)) for item in task.train} <= observed
    assert not held_out & observed
    if name == "coding":  # nor with other examples
        names = {item["entry_point"] for _, items in pretrain.pools(name) for item in items}
        assert not names & {item["entry_point"] for item in task.eval}


def test_the_card_says_what_facts_say():
    folder = ROOT / "models" / "tiny"
    facts = json.loads((folder / "facts.json").read_text())
    head, _, tail = pretrain.card(facts, []).partition("Teams of it")
    committed = (folder / "README.md").read_text()
    assert head and committed.startswith(head)
    assert str(sum(x.numel() for x in load_file(folder / "model.safetensors").values())) in head
    assert tail
