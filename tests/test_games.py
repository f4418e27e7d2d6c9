"""The games: golden rewards, parsing of any text, reference policies, rows, team sizes, speed."""

import copy
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from growth import LINEAR, growth

import collm_cc
import envs
import voxels

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
STR, HOUSE = envs.StrBuild(), envs.HouseBuild()
STR1, HOUSE1 = envs.StrBuild(num_agents=1), envs.HouseBuild(num_agents=1)
LINE = {
    "rows": ["####", "...."],
    "blocks": [["oak_planks", "stone"], ["white_concrete", "obsidian"]],
    "max_commands": 99,
}
CUBE = {
    "legend": {"B": "bricks", "A": "air"},
    "layers": [["BB", "BB"], ["BA", "BB"]],
    "player_hp": 10,
    "spider_damage": 5,
    "limited_resource": True,
    "max_commands": 20,
}


# ---------------------------------------------------------------- reference policies
def str_cells(item):
    h = len(item["rows"])
    return [
        (x, h - 1 - r) for r, row in enumerate(item["rows"]) for x, c in enumerate(row) if c == "#"
    ]


def str_text(cells):
    return "\n".join(f"/setblock {x} {y} 0 {block}" for (x, y), block in cells.items())


def str_team(item):
    """Every second cell of the reading order each; a row has one block, the next row the other.
    Where a builder has one block, every second cell of a checkerboard."""
    cells, (one, two) = str_cells(item), item["blocks"]
    parts = cells[0::2], cells[1::2]
    colours = [[cell for cell in cells if sum(cell) % 2 == k] for k in (0, 1)]
    if min(len(one), len(two)) == 1 and all(colours):
        parts = sorted(colours, key=len, reverse=len(one) > len(two))
    texts = []
    for own, part in zip((one, two), parts):
        built = {(x, y): own[y % len(own)] for x, y in part}
        if set(built.values()) != set(own):  # none of its cells touch: show the other anywhere
            first = next(iter(built))
            built[first] = own[1 - own.index(built[first])]
        texts.append(str_text(built))
    return texts


def str_lone(item, agent, cap):
    """The best one builder of two can do: all cells its cap allows, as a checkerboard."""
    own = item["blocks"][agent]
    cells = {(x, y): own[(x + y) % len(own)] for x, y in str_cells(item)[:cap]}
    if set(cells.values()) != set(own):  # a diagonal: no cells touch
        cells[next(iter(cells))] = own[1 - own.index(next(iter(cells.values())))]
    return str_text(cells)


def house_cells(item):
    rows = ((y, z, row) for y, layer in enumerate(item["layers"]) for z, row in enumerate(layer))
    return {
        (x, y, z): item["legend"][c]
        for y, z, row in rows
        for x, c in enumerate(row)
        if item["legend"][c] != "air"
    }


def house_text(boxes):
    return "\n".join(f"/fill {' '.join(map(str, (*a, *b)))} {block}" for a, b, block in boxes)


def house_team(item):
    """The x halves; builder 1 kills first."""
    cells, half = house_cells(item), (len(item["layers"][0][0]) + 1) // 2
    left, right = (
        {c: b for c, b in cells.items() if (c[0] < half) == side} for side in (True, False)
    )
    return ["/kill\n" + house_text(voxels.boxes(left)), house_text(voxels.boxes(right))]


def house_lone(item, limits):
    """All cells as far as the limits allow, kill first: no lone builder under limits beats it."""
    boxes, used = [], Counter()
    for a, block in house_cells(item).items():
        used[block] += 1
        if used[block] <= limits[block]:
            boxes.append((a, a, block))
    return "/kill\n" + house_text(boxes)


def random_text(rng, task, item):
    (w, h, d) = task.plan(item).size

    def xyz():
        return f"{rng.randrange(w)} {rng.randrange(h)} {rng.randrange(d)}"

    blocks = sorted({block for allowed in task.plan(item).allowed for block in allowed} - {"air"})
    if task.name == "strbuild":
        return "\n".join(f"/setblock {xyz()} {rng.choice(blocks)}" for _ in range(12))
    return "\n".join(f"/fill {xyz()} {xyz()} {rng.choice(blocks)}" for _ in range(8))


# ---------------------------------------------------------------- rewards
@pytest.mark.parametrize("task", [STR, HOUSE], ids=["strbuild", "housebuild"])
def test_golden(task):
    path = GOLDEN / f"{task.name}.jsonl"
    if not path.exists():
        pytest.skip("no golden file")
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    wrong = [
        r["id"] for r in rows if abs(task.score(r["item"], r["actions"])[0] - r["reward"]) > 1e-6
    ]
    assert rows and not wrong


def test_strbuild_by_hand():
    # cells (0..3, 1); agent 0: planks at 0 and stone at 1, agent 1: obsidian at 2 and at (0, 0)
    a = [
        "/setblock 0 1 0 oak_planks\n/setblock 1 1 0 stone",
        "/setblock 2 1 0 obsidian\n/setblock 0 0 0 obsidian",
    ]
    reward, info = STR.score(LINE, a)
    assert reward == pytest.approx(
        2 * 3 / 4 - 1.5 * 1 / 4 - 0 - 0.25
    )  # white_concrete is not shown
    assert info["iou"] == pytest.approx(3 / 5) and info["palette"] == 0.5 and info["success"] == 0.0
    assert info["score"] == pytest.approx(50 * reward)
    reward, info = STR.score(
        LINE, ["/setblock 0 1 0 stone\n/setblock 1 1 0 stone\n/setblock 2 1 0 oak_planks", ""]
    )
    assert reward == pytest.approx(2 * 3 / 4 - 1 / 2 - 0.25) and info["adjacency"] == 0.5


def test_housebuild_by_hand():
    # 7 bricks of 8 cells; each agent may fill 4 + 1 = 5
    reward, info = HOUSE.score(CUBE, ["/fill 0 0 0 1 0 1 bricks", "/fill 1 1 1 0 1 1 bricks"])
    assert reward == pytest.approx(
        7 / 8 - 0.05
    )  # (0, 1, 0) is missing, the spiders bite for half the health
    assert (
        info["iou"] == pytest.approx(6 / 7)
        and info["hp"] == pytest.approx(0.5)
        and info["kill"] == 0.0
    )
    assert (
        HOUSE.score(
            CUBE,
            [
                "/fill 0 0 0 1 0 1 bricks\n/kill",
                "/fill 0 1 0 0 1 1 bricks\n/fill 1 1 1 1 1 1 bricks",
            ],
        )[0]
        == 1
    )
    over = "/fill 0 0 0 1 0 1 bricks\n"  # 4, then 2 too many, then 1
    over += "/fill 0 1 0 0 1 1 bricks\n/fill 0 1 0 0 1 0 bricks"
    assert HOUSE.score(CUBE, [over, ""])[1]["match"] == pytest.approx(6 / 8)
    assert HOUSE.score(CUBE, [over, ""])[1]["counts"] == [(2, 1), (0, 0)]


def test_one_agent_has_the_whole_cap_and_both_palettes_and_limits():
    for item in STR1.eval[:20]:
        assert STR1.score(item, ["\n".join(str_team(item))])[0] == 2.0
        assert all(block in STR1.observe(item)[0] for own in item["blocks"] for block in own)
    for item in HOUSE1.eval[:20]:
        assert (
            HOUSE1.score(item, ["/kill\n" + house_text(voxels.boxes(house_cells(item)))])[0] == 1.0
        )
    assert STR1.cap({"max_commands": 7}, 0) == 7 and STR1.max_new_tokens == 2 * STR.max_new_tokens
    assert [STR.cap({"max_commands": 7}, i) for i in (0, 1)] == [4, 3]
    assert [STR.cap({"max_commands": 1}, i) for i in (0, 1)] == [1, 1]


def test_caps_hold():
    item = dict(LINE, max_commands=3)
    text = "\n".join(f"noise\n/setblock {x} 1 0 stone" for x in range(4))
    assert STR.score(item, [text, text])[1]["counts"] == [(2, 6), (0, 8)]
    other = text.replace("stone", "obsidian")
    assert sorted(STR.build(item, [text, other])[0]) == [(0, 1, 0), (1, 1, 0)]


@pytest.mark.parametrize("num_agents", [1, 2])
def test_limits_and_caps_hold_whatever_is_asked_for(num_agents):
    rng, task = random.Random(5), envs.HouseBuild(num_agents=num_agents)
    for item in [item for item in task.train if item["limited_resource"]][:60]:
        count = Counter(house_cells(item).values())
        for agent in range(num_agents):
            texts = [""] * num_agents
            texts[agent] = "\n".join(random_text(rng, task, item) for _ in range(20))
            grid, _, counts = task.build(item, texts)
            assert (
                counts[agent][0] <= item["max_commands"] // num_agents and sum(counts[agent]) == 160
            )
            for block, n in Counter(grid.values()).items():
                assert n <= (3 - num_agents) * ((count[block] + 1) // 2 + count[block] // 4)


# ---------------------------------------------------------------- parsing
@pytest.mark.parametrize(
    "line, ok",
    [
        ("/setblock 0 1 0 stone", True),
        ("setblock +0 01 -0 minecraft:stone and more", True),
        ("1. / SetBlock 0 1 0 stone", True),
        ("12) setblock\t0\t1\t0\tstone", True),
        ("-setblock 0 1 0 stone", True),
        (f"setblock {'0' * 9999} {'0' * 9999}1 0 stone", True),
        ("setblock 0 1_0 0 stone", False),
        ("setblock 0 \u0661 0 stone", False),  # ARABIC-INDIC DIGIT ONE
        ("setblock 0 \u00b9 0 stone", False),  # SUPERSCRIPT ONE: isdigit, but not for int
        ("setblock 0 99999999999999999999 0 stone", False),
        (f"setblock {'9' * 9999} 1 0 stone", False),
        ("setblock -1 1 0 stone", False),
        ("setblock ~0 1 0 stone", False),
        ("setblock 0 1.0 0 stone", False),
        ("setblock 0 1 0", False),
        ("setblock 0 1 0 Stone", False),
        ("setblock 0 1 0 obsidian", False),  # the other builder's
        ("//setblock 0 1 0 stone", False),
        ("- - setblock 0 1 0 stone", False),
        ("kill", False),
    ],
)
def test_lines(line, ok):
    assert bool(STR.build(LINE, [line, ""])[0]) == ok


def test_fences():
    line = "/setblock 0 1 0 stone"
    for text in (
        f"```\n{line}\n```",
        f"x\n```mcfunction\n{line}\n``` y",
        f"```{line}```",
        f"``` {line}\n```",
    ):
        assert STR.build(LINE, [text, ""])[0] == {(0, 1, 0): "stone"}, text
    assert not STR.build(LINE, [f"```\n```\n{line}", ""])[0]  # outside
    assert STR.build(LINE, [f"```\n{line}", ""])[0]  # one fence mark is no fence
    assert HOUSE.build(CUBE, ["```\nkill\n```", "kill everything @e"])[1] == 2
    assert HOUSE.build(CUBE, ["```kill\n```", "skill"])[1] == 0


def test_fuzz():
    rng = random.Random(0)
    words = [
        "/",
        "setblock",
        "fill",
        "kill",
        "0",
        "1",
        "-1",
        "+1",
        "\u0663",
        "1_0",
        "9" * 5000,
        "stone",
        "air",
        "minecraft:",
        "minecraft:air",
        "```",
        "\n",
        "\r",
        "\x0b",
        "\u2028",
        "- ",
        "1. ",
        "*",
        "~",
        "^",
        "\x00",
        "\ud800",
        "{}",
        "\t",
        "bricks",
        "[a=b]",
        "\u212aill",
        "\u0130",
        ",",
    ]
    for _ in range(3000):
        texts = [" ".join(rng.choices(words, k=rng.randrange(40))) for _ in range(2)]
        texts[0] += "".join(chr(rng.randrange(0x110000)) for _ in range(20))
        for task, item in ((STR, LINE), (HOUSE, CUBE)):
            reward, info = task.score(item, texts)
            assert -2.5 <= reward <= task.max_reward
            task.feedback(item, texts, info, 0), task.render(item, texts)


@pytest.mark.parametrize(
    "text",
    [
        "/setblock 0 1 0 stone\n" * 250_000,
        "0" * 500_000,
        "setblock " + "0" * 250_000 + "x",
        "`" * 250_000,
        "\n" * 500_000,
        "setblock " + "0 " * 250_000,
        "-" * 250_000,
        "fill " + "1 " * 6 + "a" * 250_000,
        "1" * 250_000 + ")x",
        "/fill 0 0 0 1 1 1 bricks\n" * 75_000,
        "fill " + ("0" * 50_000 + " ") * 6 + "a b",
    ],
    ids=range(11),
)
def test_cost_is_linear(text):
    def score(text):
        STR.score(LINE, [text, ""])
        HOUSE.score(CUBE, ["", text])

    assert growth(score, text) < LINEAR


# ---------------------------------------------------------------- embedded items
@pytest.mark.parametrize("task", [STR, HOUSE], ids=["strbuild", "housebuild"])
def test_items(task):
    assert len(task.train) >= 200 and len(task.eval) >= 50
    for item in task.train + task.eval:
        assert task.parse(copy.deepcopy(item)) | {"place": item["place"]} == item


def test_houses_vary():
    items = HOUSE.train + HOUSE.eval
    sizes = {HOUSE.plan(item).size for item in items}
    assert len(sizes) > 50
    assert {w for w, *_ in sizes} == {2, 3, 4, 5, 6, 7, 8}
    assert {h for _, h, _ in sizes} == {1, 2, 3, 4, 5, 6}
    assert {item["spider_damage"] for item in items} == {0, 5, 10}
    assert len({tuple(item["legend"].values()) for item in items}) > 20


# ---------------------------------------------------------------- policies
def test_strbuild_policies():
    rng = random.Random(0)
    for item in STR.train + STR.eval:
        assert STR.score(item, ["", ""])[0] == -0.5
        reward, info = STR.score(item, str_team(item))
        assert reward == 2.0 and reward >= STR.success and info["success"] == 1.0
        assert all(other == 0 for _, other in info["counts"])  # within the caps
        for agent in (
            0,
            1,
        ):  # the other palette is never shown, and the cap stops short of the word
            texts = ["", ""]
            texts[agent] = str_lone(item, agent, STR.cap(item, agent))
            lone, cells = STR.score(item, texts)[0], len(str_cells(item))
            best = 2 * min(1, STR.cap(item, agent) / cells) - 0.25
            if len(item["blocks"][agent]) > 1:
                assert lone == pytest.approx(best)
            assert lone <= best + 1e-9 and best <= 1.75 < reward
        assert STR.score(item, [random_text(rng, STR, item)] * 2)[0] < 1.0
    mean = sum(STR.score(i, [random_text(rng, STR, i) for _ in "ab"])[0] for i in STR.eval) / len(
        STR.eval
    )
    assert -0.8 < mean < 0.1


def test_housebuild_policies():
    rng, idle, lone, noise = random.Random(0), [], [], []
    for item in HOUSE.train + HOUSE.eval:
        reward, info = HOUSE.score(item, house_team(item))
        assert reward == 1.0 and reward >= HOUSE.success and info["success"] == 1.0
        assert all(other == 0 for _, other in info["counts"])
        if not item["limited_resource"]:
            continue
        free = dict(item, max_commands=10**6)  # not even without a cap
        limits = HOUSE.plan(item).allowed[0]
        lone.append(HOUSE.score(free, [house_lone(item, limits), ""])[0])
        cells = Counter(house_cells(item).values())
        lost = sum(n - limits[block] for block, n in cells.items())
        size = HOUSE.plan(item).size
        assert (
            lost > 0
            and lone[-1] == pytest.approx(1 - lost / (size[0] * size[1] * size[2]))
            and lone[-1] < reward
        )
        idle.append(HOUSE.score(item, ["", ""])[0])
        harm = 0.1 * min(1, item["spider_damage"] / item["player_hp"])
        assert idle[-1] == pytest.approx(
            1 - sum(cells.values()) / (size[0] * size[1] * size[2]) - harm
        )
        noise.append(HOUSE.score(item, [random_text(rng, HOUSE, item) for _ in "ab"])[0])
    means = [sum(values) / len(values) for values in (idle, noise, lone)]
    assert 0.1 < means[0] < 0.2 and means[1] < 0.5 and 0.7 < means[2] < 0.85
    assert len(idle) > 200


# ---------------------------------------------------------------- observations and feedback
def test_observations():
    item = STR.eval[0]
    one, two = STR.observe(item)
    own = [", ".join(blocks) for blocks in item["blocks"]]
    assert f"Your blocks: {own[0]}." in one and own[1] not in one and f"{own[1]}." in two
    for term in (
        "2 x",
        "1.5 x",
        "touching",
        "0.25",
        "4 turns",
        "complete new build",
        str(STR.cap(item, 0)),
    ):
        assert term in one
    told = [tuple(map(int, cell.split())) for cell in one.splitlines()[-1].split(", ")]
    assert told == str_cells(item)
    for house in HOUSE.eval:
        text = HOUSE.observe(house)[1]
        built = {}
        for line in text.split("air:\n")[1].splitlines():
            *corners, block = line.split()
            x1, y1, z1, x2, y2, z2 = map(int, corners)
            for y in range(y1, y2 + 1):
                for x in range(x1, x2 + 1):
                    built |= {(x, y, z): block for z in range(z1, z2 + 1)}
        assert built == house_cells(house)
        assert ("spiders" in text) == (house["spider_damage"] > 0)
    assert "turns" not in envs.StrBuild(num_turns=1).observe(item)[0]


def test_a_right_cell_is_not_called_wrong():
    """A cell between two others, of which each has one of the two textures that there are."""
    item = STR.train[0] | {"rows": ["##.#", "#..."], "blocks": [["oak_planks"], ["white_concrete"]]}
    grid = {(0, 1, 0): "oak_planks", (1, 1, 0): "oak_planks"}
    grid |= {(0, 0, 0): "white_concrete", (3, 1, 0): "white_concrete"}
    assert STR.needs(item, grid) == {(1, 1, 0): "white_concrete"}


def test_perfect_feedback_repairs_any_build():
    rng = random.Random(3)
    for item in STR.train[:100]:
        grid = STR.build(item, [random_text(rng, STR, item) for _ in "ab"])[0]
        fixed = {c: b for c, b in (grid | STR.needs(item, grid)).items() if b != "air"}
        own = [{c: b for c, b in fixed.items() if b in p} for p in item["blocks"]]
        texts = [str_text({c[:2]: b for c, b in cells.items()}) for cells in own]
        info = STR.score(dict(item, max_commands=999), texts)[1]
        assert (info["coverage"], info["extra"], info["adjacency"]) == (1.0, 0.0, 0.0)
        assert STR.needs(item, STR.build(item, str_team(item))[0]) == {}
    for item in HOUSE.train[:100]:
        grid = HOUSE.build(item, [random_text(rng, HOUSE, item) for _ in "ab"])[0]
        fixed = {c: b for c, b in (grid | HOUSE.needs(item, grid)).items() if b != "air"}
        assert fixed == house_cells(item)


def test_feedback_kinds():
    texts = ["/setblock 0 1 0 stone\nhello", "/setblock 3 0 0 obsidian"]
    told = {}
    for kind in ("position", "score", "perfect"):
        task = envs.StrBuild(options=f"feedback={kind}")
        told[kind] = task.feedback(LINE, texts, task.score(LINE, texts)[1], 0)
        assert told[kind][0].startswith("Turn 1: 1 of your commands ran, 1 lines did not.")
        assert told[kind][1].startswith("Turn 1: 1 of your commands ran, 0 lines did not.")
        assert all("setblock" not in text for text in told[kind])
    assert "extra 3 0; missing 1 1, 2 1, 3 1." in told["position"][0]
    assert (
        "stone" not in told["position"][1]
        and "coverage 0.25" in told["score"][0]
        and "3 0" not in told["score"][0]
    )
    assert "air 3 0" in told["perfect"][0]
    assert STR.settings["feedback"] == "position" and HOUSE.settings["feedback"] == "score"
    house = envs.HouseBuild(options="feedback=perfect")
    text = house.feedback(CUBE, ["", ""], house.score(CUBE, ["", ""])[1], 2)[0]
    assert "Turn 3" in text and "0 0 0 1 0 1 bricks" in text and "hp 0.50" in text
    house = envs.HouseBuild(options="feedback=position")
    actions = ["/fill 0 0 0 1 1 0 bricks", ""]
    text = house.feedback(CUBE, actions, house.score(CUBE, actions)[1], 0)[1]
    assert "0 0 1 1 1 1 missing" in text and "1 1 0 1 1 0 extra" in text and "bricks" not in text


@pytest.mark.parametrize("name", ["strbuild", "housebuild"])
@pytest.mark.parametrize("kind", ["position", "score", "perfect"])
def test_feedback_shows_no_command_of_a_teammate(name, kind):
    rng, task = random.Random(6), envs.make(f"{name}:feedback={kind}")
    for item in task.train[:30]:
        texts = [random_text(rng, task, item) for _ in "ab"]
        told = [task.feedback(item, texts, task.score(item, texts)[1], 0)]
        assert not any(
            line.strip("/") in text
            for text in told[0]
            for own in texts
            for line in own.splitlines()
        )
        # other words for the same build, and lines that do not run, change nothing for the teammate
        for agent in (0, 1):
            other = list(texts)
            other[1 - agent] = "secret plan\n" + other[1 - agent].replace("/", "- ").replace(
                "fill", "FILL"
            )
            told = task.feedback(item, texts, task.score(item, texts)[1], 0)[agent]
            assert task.feedback(item, other, task.score(item, other)[1], 0)[agent] == told


def test_render():
    lines = STR.render(LINE, ["/setblock 0 1 0 stone", "/setblock 3 0 0 obsidian"]).splitlines()
    assert lines[:2] == ["####|b...", "....|...d"] and "b stone" in lines[2]
    lines = HOUSE.render(CUBE, ["/fill 0 0 0 1 0 0 bricks", ""]).splitlines()
    assert lines == ["BB|BB  B.|..", "BB|..  BB|..", "B bricks"]


# ---------------------------------------------------------------- datasets
PUBLIC = {
    "task_id": "h1",
    "inventory": {"C": "minecraft:stone", "A": ["air"]},
    "target_spec": {"layers": [["CC"], ["CA"]]},
}


def test_public_house_format():
    item = HOUSE.parse(PUBLIC)
    assert item["layers"] == [["CC"], ["CA"]] and item["legend"] == {
        "C": "minecraft:stone",
        "A": "air",
    }
    assert (
        item["player_hp"],
        item["spider_damage"],
        item["limited_resource"],
        item["max_commands"],
    ) == (
        5,
        0,
        True,
        600,
    )
    assert HOUSE.score(item, ["/fill 0 0 0 1 0 0 stone", "/fill 0 1 0 0 1 0 stone"])[0] == 1.0
    nulls = dict.fromkeys(("player_hp", "spider_damage", "limited_resource", "max_commands"))
    assert HOUSE.parse(PUBLIC | nulls) == item
    spec = {"layers": [{"y": 1, "rows": ["C."]}, {"y": 0, "rows": ["CC"]}]}
    assert HOUSE.parse(PUBLIC | {"target_spec": spec})["layers"] == [["CC"], ["C."]]
    assert HOUSE.parse(PUBLIC | {"max_commands": 8})["max_commands"] == 8


@pytest.mark.parametrize(
    "layers",
    [
        {"0": ["CC"], "1": ["C."]},
        {"1": ["C."], "0": ["CC"]},
        {"0": ["CC"], "1": ["C."], "2": None},  # Parquet: a key of other rows
        [{"y": 1, "rows": ["C."]}, {"y": 0, "rows": ["CC"]}],
        [{"y": "0", "rows": ["CC"]}, {"y": "1", "rows": ["C."]}],
        [["CC"], ["C."]],
    ],
)
def test_forms_of_layers(layers):
    for row in ({"layers": layers}, {"target_spec": {"layers": layers}}):
        item = HOUSE.parse({"inventory": {"C": "stone", "Z": None}} | row)
        assert item["layers"] == [["CC"], ["C."]] and item["legend"] == {"C": "stone", ".": "air"}


@pytest.mark.parametrize(
    "change, field",
    [
        ({"inventory": None}, "'legend' is missing"),
        ({"inventory": ["C"]}, "legend"),
        ({"inventory": {"CC": "stone"}}, "legend"),
        ({"inventory": {"C": 3}}, "legend"),
        ({"inventory": {"C": []}}, "legend"),
        ({"target_spec": 3}, "layers"),
        ({"target_spec": {}}, "layers"),
        ({"target_spec": {"layers": []}}, "layers"),
        ({"target_spec": {"layers": [[]]}}, "layers"),
        ({"target_spec": {"layers": [["CC"], ["C"]]}}, "layers"),
        ({"target_spec": {"layers": [["CC"], ["CC", "CC"]]}}, "layers"),
        ({"target_spec": {"layers": [["CX"]]}}, "layers"),
        ({"target_spec": {"layers": [[["C"]]]}}, "layers"),
        ({"target_spec": {"layers": [{"y": 1, "rows": ["C"]}]}}, "layers"),
        (
            {"target_spec": {"layers": [{"y": 0, "rows": ["C"]}, {"y": 0, "rows": ["A"]}]}},
            "layers",
        ),  # twice
        ({"target_spec": {"layers": {"0": ["CC"], "2": ["CC"]}}}, "layers"),
        ({"target_spec": {"layers": {"0": "CC"}}}, "layers"),
        ({"target_spec": {"layers": {"low": ["CC"]}}}, "layers"),
        ({"player_hp": -1}, "player_hp"),
        ({"player_hp": True}, "player_hp"),
        ({"player_hp": 10**400}, "player_hp"),
        ({"spider_damage": float("inf")}, "spider_damage"),
        ({"spider_damage": "much"}, "spider_damage"),
        ({"spider_damage": float("nan")}, "spider_damage"),
        ({"limited_resource": 1}, "limited_resource"),
        ({"max_commands": 0}, "max_commands"),
        ({"max_commands": 2.5}, "max_commands"),
    ],
)
def test_bad_house_rows(change, field):
    with pytest.raises(ValueError, match=f"field {field}"):
        HOUSE.parse(PUBLIC | change)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"rows": "###"}, "rows"),
        ({"rows": ["##", "#"]}, "rows"),
        ({"rows": [".."]}, "rows"),
        ({"rows": ["#a"]}, "rows"),
        ({"rows": [3]}, "rows"),
        ({"blocks": [["stone"]]}, "blocks"),
        ({"blocks": {"0": ["stone"]}}, "blocks"),
        ({"rows": None}, "'rows' is missing"),
        ({"blocks": [["stone"], []]}, "blocks"),
        ({"blocks": [["stone"], ["a b"]]}, "blocks"),
        ({"max_commands": True}, "max_commands"),
        ({"max_commands": "9"}, "max_commands"),
    ],
)
def test_bad_strbuild_rows(change, field):
    with pytest.raises(ValueError, match=f"field {field}"):
        STR.parse(LINE | change)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_dataset_file_in_the_public_format(tmp_path, suffix):
    rows, path = [PUBLIC | {"task_id": f"h{k}"} for k in range(5)], tmp_path / f"houses.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    task = envs.make("housebuild", dataset=str(path))
    assert len(task.train) == 4
    assert task.eval == [HOUSE.parse(PUBLIC) | {"place": f"{path}:5"}]
    assert (
        task.score(task.eval[0], ["/fill 0 0 0 1 0 0 stone", "/fill 0 1 0 0 1 0 stone"])[0] == 1.0
    )
    path.write_text(
        json.dumps(
            [PUBLIC | {"max_commands": 0}] if suffix == "json" else PUBLIC | {"max_commands": 0}
        )
    )
    with pytest.raises(envs.UserError, match=f"houses.{suffix}:1: field max_commands"):
        envs.make("housebuild", dataset=str(path))


# ---------------------------------------------------------------- teams of other sizes
PALETTES = [["oak_planks", "stone"], ["white_concrete", "obsidian"], ["bricks"], ["dirt"]]


@pytest.mark.parametrize("num_agents", [1, 2, 3, 4])
def test_embedded_palettes(num_agents):
    task = envs.make("strbuild", num_agents=num_agents)
    for item in task.train[:5]:
        assert len(item["blocks"]) == max(2, num_agents)
        blocks = [block for own in item["blocks"] for block in own]
        assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("num_agents", [1, 2, 3, 4])
def test_caps_share_the_commands(num_agents):
    task = envs.StrBuild(num_agents=num_agents)
    for commands in range(1, 30):
        caps = [task.cap({"max_commands": commands}, i) for i in range(num_agents)]
        share = commands // num_agents
        first = max(1, share + commands % num_agents)
        assert caps == [first, *[max(1, share)] * (num_agents - 1)]
        assert sum(caps) == commands or commands < num_agents


def test_three_builders_by_hand():
    task = envs.StrBuild(num_agents=3)
    item = task.parse(LINE | {"blocks": PALETTES})
    assert item["blocks"] == PALETTES[:3]
    # (0..3, 1): planks, stone, bricks, nothing; agent 1 shows nothing, agent 2 builds on its own
    actions = ["setblock 0 1 0 oak_planks\nsetblock 1 1 0 stone", "", "setblock 2 1 0 bricks"]
    reward, info = task.score(item, actions)
    assert reward == pytest.approx(2 * 3 / 4 - 0.25) and info["palette"] == pytest.approx(2 / 3)
    assert task.score(item, ["", "", ""])[0] == -0.75
    stolen = ["", "setblock 0 1 0 bricks", "setblock 0 1 0 stone"]  # nobody else's blocks
    assert task.score(item, stolen)[1]["counts"] == [(0, 0), (0, 1), (0, 1)]
    assert task.score(item, ["", "setblock 0 1 0 obsidian", "setblock 0 1 0 bricks"])[1][
        "grid"
    ] == {
        (0, 1, 0): "bricks"  # the last builder's line runs last
    }
    told = task.observe(item)
    assert [f"builder {i} of 3 and cannot talk to the others." in told[i - 1] for i in (1, 2, 3)]
    assert "Your blocks: bricks." in told[2] and "bricks" not in told[0]
    assert len(task.feedback(item, actions, info, 0)) == 3 and task.render(item, actions)


def test_a_lone_builder_has_the_palettes_of_a_pair():
    item = STR1.parse(LINE | {"blocks": PALETTES})
    assert STR1.observe(item) == STR1.observe(STR1.parse(LINE))
    assert STR1.score(item, [""])[0] == -0.5


def test_too_few_palettes_or_builders():
    with pytest.raises(envs.UserError, match="field blocks: must be 3 lists"):
        envs.StrBuild(num_agents=3).parse(LINE)
    for name, num_agents in (("strbuild", 5), ("housebuild", 3), ("tldr", 3), ("arxiv", 0)):
        with pytest.raises(
            envs.UserError, match=f"--num-agents {num_agents}: {name} is for 1 or 2"
        ):
            envs.make(name, num_agents=num_agents)


def test_odd_datasets_are_scored_and_rendered():
    item = STR.parse({"rows": ["#"], "blocks": [["a{0}"], ["b"]], "max_commands": 1})
    for kind in ("position", "score", "perfect"):
        task = envs.StrBuild(options=f"feedback={kind}")
        task.feedback(item, ["", ""], task.score(item, ["", ""])[1], 0), task.render(item, ["", ""])
    wide = dict(LINE, blocks=[[f"a{i}" for i in range(60)], ["b"]])
    assert STR.render(wide, ["", ""]) and STR.observe(wide)


def test_rewards_cost_little_beside_a_joint_action():  # 50 ms and more, with models/tiny
    rng = random.Random(0)
    for task, team in ((STR, str_team), (HOUSE, house_team)):
        start, episodes = time.process_time(), 50
        for i in range(episodes):
            item = task.train[i % len(task.train)]
            for turn in range(4):
                actions = team(item) if turn % 2 else [random_text(rng, task, item) for _ in "ab"]
                task.feedback(item, actions, task.score(item, actions)[1], turn)
        assert (time.process_time() - start) / (4 * episodes) < 0.01


def test_sparse_rewards_come_at_the_end_alone():
    args = collm_cc.Args(task="strbuild:sparse=60")
    task = envs.make(args.task)
    agents, _ = collm_cc.build(task, args, torch.device("cpu"))
    episodes = collm_cc.start_episodes(task.train[:16], 2)
    collm_cc.rollout(task, episodes, agents, args, "rollout", 0)
    paid = [[reward - task.reward_shift for reward in e.rewards] for e in episodes]
    assert {rewards[-1] for rewards in paid} == {0.0, task.max_reward}
    assert not any(reward for rewards in paid for reward in rewards[:-1])
    assert all(len(rewards) == 4 for rewards in paid if not rewards[-1])
