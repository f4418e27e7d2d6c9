"""tests/texts.py: measures of texts by hand, and likelihoods held against one forward a text."""

import pytest
import texts
import torch

import collm_cc
import envs


def test_reading_by_hand():
    source = "My neighbor cut down our old apple tree, and I am sad. Should I talk to him?"
    text = "The neighbor cut the tree. The neighbor cut the hedge."
    found = texts.reading(text, source)
    assert found["source_words"] == pytest.approx(5 / 6)  # all but hedge; "the" counts for nothing
    assert found["copied"] == 0
    assert found["distinct_2"] == pytest.approx(6 / 9)  # three of nine pairs come again
    assert texts.reading("cut down our old apple tree and I am so sad", source)["copied"] == 0.5
    assert set(texts.reading("", source).values()) == {0.0}


def test_likelihoods_equal_one_forward_of_each_text():
    task = envs.make("tldr", 2)
    flags = "--task tldr --max-new-tokens 12 --microbatch-tokens 600 --temperature 0.7 1.0"
    args = collm_cc.parse_args(collm_cc.Args, flags.split())
    agents, _ = collm_cc.build(task, args, torch.device("cpu"))
    base = agents[1].model
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in agents[0].model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    args.eval_episodes = 8
    found, episodes = texts.texts(task, agents, base, args)
    assert found[1]["kl"] == pytest.approx(0, abs=1e-3)  # it is the base model itself
    by_base, by_agent = [], []
    for e in episodes:
        ids = torch.tensor(e.tokens[0])
        answer = torch.tensor(e.turns[0]) == 0
        for model, logps in ((base, by_base), (agents[0].model, by_agent)):
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1] / 0.7
            logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            logps.append(logp[answer[1:]])
    assert found[0]["base_logp"] == pytest.approx(torch.cat(by_base).mean().item(), abs=1e-3)
    kl = sum((a - b).sum().item() for a, b in zip(by_agent, by_base)) / len(episodes)
    assert kl > 0.1 and found[0]["kl"] == pytest.approx(kl, abs=2e-3)
    assert found[0]["tokens"] == sum(map(len, by_agent)) / len(episodes)
