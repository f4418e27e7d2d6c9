"""Rows and texts that nobody meant: a dataset loads or is refused in one line, and any text at all is scored."""

import copy
import json
import random

import pytest

import envs

JUNK = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    "",
    " ",
    "x",
    "\x00\ud800",
    "é" * 50,
    [],
    [[]],
    {},
    {"": []},
    "def f(",
    10**30,
]


def spoil(rng, value):
    """A copy of a row with one thing in it changed, at any depth."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.7:
        value, key = copy.copy(value), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = spoil(rng, value[key])
        return value
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return (
            value[:at]
            + rng.choice(["", "\n", "#", "\u2028", "(", "9" * 30, chr(rng.randrange(0xD7FF))])
            + value[at + 1 :]
        )
    return rng.choice(JUNK)


def text(rng, item):
    parts = [
        json.dumps(item)[: rng.randrange(400)],
        "```",
        "\n",
        "def aux(x):\n    return x",
        "/fill 0 0 0 1 1 1 ",
        "/kill",
    ]
    return "".join(rng.choice([*parts, chr(rng.randrange(0xD7FF)), "  ", "\x00"]) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("name", envs.TASKS)
def test_fuzzed_datasets_and_texts(name, num_agents, tmp_path):
    rng, items, path, loaded = random.Random(f"{name} {num_agents}"), envs.make(name).train, tmp_path / "rows.jsonl", 0
    for _ in range(100):
        rows = [spoil(rng, item) if rng.random() < 0.7 else item for item in rng.sample(items, rng.randint(1, 2))]
        lines = [json.dumps(row)[rng.random() < 0.05 :] for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            task = envs.make(name, num_agents=num_agents, dataset=str(path))
        except envs.UserError as error:
            assert "\n" not in str(error) and "rows.jsonl" in str(error), error
            continue
        loaded += 1
        if name == "coding" and loaded > 15:  # a program takes milliseconds, a hanging test seconds
            continue
        item = task.train[0]
        assert len(task.observe(item)) == num_agents
        actions = [text(rng, item) for _ in range(num_agents)]
        reward, info = task.score(item, actions)
        assert reward == reward and task.score(item, actions)[0] == reward
        assert len(task.feedback(item, actions, info, 0)) == num_agents
        assert isinstance(task.render(item, actions), str)
    assert loaded > 5


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x00" * 100, b"[" * 5000, b'{"a": 1}\n{"a": ', b"[1, 2"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", envs.TASKS)
def test_files_that_are_no_datasets(name, suffix, data, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(data)
    with pytest.raises(envs.UserError) as error:
        envs.make(name, dataset=str(path))
    assert "\n" not in str(error.value) and path.name in str(error.value)
