"""The writing tasks: golden and hand-worked rewards, hostile texts, rows, observations."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from growth import LINEAR, growth

import envs

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TASKS = {"tldr": envs.Tldr, "arxiv": envs.Arxiv}
METRICS = {"score", "success", "length_ratio", "unique_ratio", "jaccard", "transitions"}
METRICS |= {f"{name}_{i}" for name in ("tokens", "length") for i in (1, 2)} | {
    f"level_{i}" for i in (1, 2, 3, 4)
}


def words(n, start=0, length=6):
    """n distinct made-up words of `length` letters: no stopword, no transition."""
    return " ".join(
        "q" + f"{k:0{length - 1}d}".translate(str.maketrans("0123456789", "bcdfghjklm"))
        for k in range(start, start + n)
    )


@pytest.mark.parametrize("name", TASKS)
def test_golden(name):
    path = GOLDEN / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    task = TASKS[name]()
    for row in map(json.loads, path.open(encoding="utf-8")):  # not splitlines: rows hold U+2028
        reward, info = task.score(row["item"], row["actions"])
        assert reward == pytest.approx(row["reward"], abs=1e-6), row["id"]
        assert info["score"] == pytest.approx(100 * row["reward"] / 3, abs=1e-4)


def test_tldr_levels_by_hand():
    task = envs.Tldr()
    one = words(10)  # 69 characters
    # 7 words in a text: level 1 fails
    assert task.score({}, [words(7), words(30)])[0] == 0
    assert task.score({}, [one, one])[0] == 0.5  # length ratio 1 < 1.1: level 2 fails
    # 13 words: ratio 90/69, unique 1.3 = the bound, which passes with 0; nothing shared
    reward, info = task.score({}, [one, words(13, 50)])
    assert (
        reward == pytest.approx(0.5 + (90 / 69 - 1.1) / 0.5)
        and info["level_3"] == 0
        and info["jaccard"] == 0
    )
    # 20 words, all of text 1's among them: levels 1 to 3 in full, 0.6 for Jaccard 0.5
    reward, info = task.score({}, [one, words(20)])
    assert (
        reward == pytest.approx(2.6)
        and info["jaccard"] == 0.5
        and info["level_4"] == pytest.approx(0.6)
    )
    # "however" is contrast, "in \n fact" both explanation and emphasis: style 0.4 + 0.1
    reward, info = task.score({}, [one, words(20) + " However, in \n fact"])
    assert reward == pytest.approx(2.6 + 0.4 * 0.5) and info["found"] == [
        "explanation",
        "contrast",
        "emphasis",
    ]
    # transitions in text 1 and inside longer words are nothing
    assert task.score({}, [words(9) + " however", words(20) + " wasp sofa"])[1]["transitions"] == 0


def test_arxiv_levels_by_hand():
    task = envs.Arxiv()
    one = words(130)  # 909 characters
    assert task.score({}, [words(127), words(180)])[0] == 0
    assert task.score({}, [words(257), words(250)])[0] == 0
    # 130 and 182 words: ratio 1273/909 = 1.4005 in full, unique 1.4 = three quarters, Jaccard
    # 130/182 over the cap
    reward, info = task.score({}, [one, words(182)])
    assert reward == pytest.approx(0.5 + 1 + 0.5 * 0.75 + 0.6) and info["jaccard"] == pytest.approx(
        130 / 182
    )
    # transitions of text 1 count here, also a phrase that spans the two texts, "in" + "fact"
    two = "fact " + words(180, 1)
    reward, info = task.score({}, [words(130) + " therefore in", two])
    assert info["found"] == ["explanation", "cause_effect", "emphasis"]


def test_single_agent_is_cut_at_the_first_blank_line():
    one, two = words(10), words(20)
    for name, cls in TASKS.items():
        pair, alone = cls(), cls(num_agents=1)
        for gap in ("\n\n", "\n \t\n", "\r\n\r\n\n"):
            text = "\n" + one + gap + two + "\n\n" + two
            expect = pair.score({}, [one + "\r" * gap.startswith("\r"), two + "\n\n" + two])
            assert alone.score({}, [text]) == expect, name
        assert alone.score({}, [one])[1]["tokens_1"] == 0 and alone.score({}, [one])[0] == 0
        assert len(alone.observe({cls.fields[0]: "x"})) == 1


def hostile_texts():
    rng = random.Random(0)
    yield from [
        "",
        " ",
        "\n\n\n",
        "\x00",
        "\ud800\udfff",
        "word",
        "\u4f60\u597d" * 50,
        "\U0001f600 " * 20,
        "...",
        "\t" * 300,
        "\u0130" * 9,
    ]
    for _ in range(150):
        alphabet = rng.choice(
            [
                "ab \n",
                "\x00\x01\xff \r\n\u2028",
                "as so in fact \n",
                "\u0627\u0644 \u05d0",
                "\ud83d\ude00\udc00 x",
            ]
        )
        size = rng.choice([5, 40, 400, 3000])
        yield "".join(rng.choice(alphabet) for _ in range(size))
        yield "".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice([3, 60, 600])))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("num_agents", [1, 2])
def test_any_text_is_scored_fed_back_and_rendered(name, num_agents):
    task, texts = TASKS[name](num_agents=num_agents), list(hostile_texts())
    rng, item = random.Random(1), TASKS[name]().train[0]
    for text in texts:
        actions = [text, rng.choice(texts)][:num_agents]
        reward, info = task.score(item, actions)
        assert 0 <= reward <= 3 and task.score(item, actions) == (reward, info)
        numbers = {k: v for k, v in info.items() if isinstance(v, float)}
        assert set(numbers) == METRICS and all(math.isfinite(v) for v in numbers.values())
        assert all(0 <= info[f"level_{i}"] <= 1 for i in (1, 2, 3, 4))
        assert reward == pytest.approx(
            sum(w * info[f"level_{i}"] for i, w in ((1, 0.5), (2, 1), (3, 0.5), (4, 1)))
        )
        told = task.feedback(item, actions, info, 0)
        assert len(told) == num_agents and all(len(t.split()) < 60 for t in told)
        task.render(item, actions).encode()  # no lone surrogates, no control characters
        assert "\x00" not in task.render(item, actions)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "in ",
        " ",
        "x ",
        "\x00",
        "even  as well \n",
        "\n",
        "\n ",
        "the water on the hand ",
        "\ud800\u00e9",
    ],
)
@pytest.mark.parametrize("num_agents", [1, 2])
def test_cost_is_linear(name, unit, num_agents):
    task = TASKS[name](num_agents=num_agents)

    def score(text):
        task.score({}, [text] * num_agents)
        task.render({}, [text] * num_agents)

    assert growth(score, unit * (2**16 // num_agents // len(unit))) < LINEAR


@pytest.mark.parametrize("name", TASKS)
def test_dataset_file(name, tmp_path):
    field, path = TASKS[name].fields[0], tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"id": k, field: f"Text {k}."}) + "\n" for k in range(10)),
        encoding="utf-8",
    )
    task = envs.make(name, dataset=str(path))
    texts = [{field: f"Text {k}.", "place": f"{path}:{k + 1}"} for k in range(10)]
    assert task.eval == texts[4::5] and task.train == texts[:4] + texts[5:9]
    assert task.observe(task.eval[0])[0].endswith("\n\nText 4.")
    path.write_text(json.dumps({"other": "x"}))
    with pytest.raises(envs.UserError, match=f"rows.jsonl:1: field '{field}' is missing"):
        envs.make(name, dataset=str(path))


@pytest.mark.parametrize("name", TASKS)
def test_one_turn_unless_asked_for_more(name):
    assert envs.make(name).num_turns == 1 and envs.make(name, num_turns=3).num_turns == 3


@pytest.mark.parametrize("name", TASKS)
def test_observations(name):
    task, item = TASKS[name](), TASKS[name]().eval[0]
    pair, single = task.observe(item), TASKS[name](num_agents=1).observe(item)
    text = item[task.fields[0]]
    assert len(pair) == 2 and pair[0] != pair[1] and len(single) == 1
    for observation in pair + single:
        prompt, _, source = observation.partition("\n\n")
        assert source == text and len(prompt.split()) <= 35


def test_feedback_tells_of_ones_own_part_only():
    task, one, two = envs.Tldr(num_turns=2), words(30), words(12, 70)
    told = task.feedback({}, [one, two], task.score({}, [one, two])[1], 0)
    assert "too long" in told[0] and "too short" in told[1]
    assert not any(word in t for t in told for word in (one + " " + two).split())
    told = task.feedback({}, [words(3), two], task.score({}, [words(3), two])[1], 0)
    assert "has 3 words" in told[0] and "has 12 words" in told[1] and "8 to 256" in told[0]


def test_render_shows_the_reward_its_terms_and_both_texts():
    task, one, two = envs.Tldr(), words(10), words(20) + " however\x00"
    shown = task.render({}, [one, two]).splitlines()
    assert shown[0] == "tldr: reward 2.760 of 3"
    assert "score 92" in shown[1] and "level_4 0.76" in shown[1] and "length_ratio 2.1" in shown[1]
    assert shown[2] == "transitions: contrast"
    assert shown[3:] == ["----- text 1", one, "----- text 2", two.replace("\x00", "?")]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("bad", [3, "", " \n", ["a", 1], {"a": "b"}])
def test_parse_refuses_what_is_not_text(name, bad):
    task, field = TASKS[name](), TASKS[name].fields[0]
    assert task.parse({field: "fine", "other": 1}) == {field: "fine"}
    with pytest.raises(ValueError, match=f"field {field}: must be a string"):
        task.parse({field: bad})
    with pytest.raises(ValueError, match=f"field '{field}' is missing"):
        task.parse({field: None})


def test_rows_as_they_are_published():
    tldr, arxiv = envs.Tldr(), envs.Arxiv()
    assert tldr.parse({"id": 1, "title": "t", "post": "My post."}) == {"prompt": "My post."}
    assert tldr.parse({"content": "My post.", "summary": "x"}) == {"prompt": "My post."}
    sentences = ["<S> first sentence . </S>", "<S> the  second . </S>"]
    want = {"abstract": "first sentence . the second ."}
    assert arxiv.parse({"article_id": "1", "abstract_text": sentences}) == want
    assert arxiv.parse({"abstract_text": " ".join(sentences)}) == want
    assert arxiv.parse({"abstract_text": ["One.", "Two."]}) == {"abstract": "One. Two."}
    assert arxiv.parse({"abstract": "As\n it  is."}) == {"abstract": "As\n it  is."}
    with pytest.raises(envs.UserError, match=r"'abstract' is missing \(or abstract_text\).*'text'"):
        arxiv.parse({"text": "x"})
    with pytest.raises(envs.UserError, match="field abstract_text: must be a string"):
        arxiv.parse({"abstract_text": ["One.", None]})


def test_phrases_are_the_rules():
    assert len(envs.TRANSITIONS) == 12
    phrases = [p for ps in envs.PHRASES["transitions"].values() for p in ps]
    assert len(phrases) == 145 and len(envs.STOPWORDS) == len(envs.PHRASES["stopwords"])
    rules = GOLDEN.parent / "RULES.md"
    if rules.exists():
        listed = re.findall(r"^- (\w+): (.+)$", rules.read_text(), re.MULTILINE)
        found = {name: text.split(", ") for name, text in listed if name in envs.TRANSITIONS}
        assert found == envs.PHRASES["transitions"]
        stopwords = re.search(r"^Stopwords: (.+)$", rules.read_text(), re.MULTILINE)
        assert set(stopwords[1].split()) == envs.STOPWORDS
    for name, pattern in envs.TRANSITIONS.items():
        for phrase in envs.PHRASES["transitions"][name]:
            assert pattern.search(f"x {phrase.replace(' ', chr(10) + ' ')}.")
            assert pattern.fullmatch(phrase)
