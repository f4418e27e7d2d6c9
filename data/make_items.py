"""Writes the embedded items of all tasks: python data/make_items.py

One JSONL file a task, one row a line, in the format that `--dataset` takes (docs/tasks.md); rows
with "held_out": true are for evaluation alone. All is drawn from fixed seeds, so that the files
come out the same, byte for byte, on every machine.
"""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent

# ======================================== writing ========================================
# The first entry of a table is the frame, the others are subjects, whose facts, parted by "|",
# fill {0}, {1}, ...; [a/b] is a choice; a line that starts with a space goes on with the one above.
POSTS = """
[/Throwaway account. /First post here. /Sorry for the length. /I need an outside view. ]I am
 {number} and have known my {0} {name} for [two/three/four/five/six] years[, and we are usually
 close/, mostly without trouble/ and have always liked {him}]. [Last week/Two weeks ago/Last
 month/On Friday/A few days ago] {he} {1}. {2}. [I tried to talk about it, but {he} changed the
 subject/When I asked why, {he} just shrugged/I told {him} that I was upset, and {he} called me
 dramatic/{He} apologized once, but nothing has changed/I wrote a long message, and {he} never
 answered it]. [I do not know whether I can trust {him} now/It is not the first time that I feel
 ignored/Now others think that I am the problem/I lie awake at night and go over it]. [I feel hurt
 and a little foolish/I am torn between anger and guilt/Part of me just wants to let it go/I am
 tired of always being the reasonable one/I do not want to make things worse]. [Am I overreacting,
 or is this as bad as it feels/How do I bring it up without starting a fight/Should I talk to {him}
 again or keep my distance/What would you do if you were in my place/Is it fair to ask for an
 apology]?
manager|gave my [desk/project/best client] to a new hire while I was on leave|I learned about it
 from a calendar invite
[friend/cousin]|met my ex for [coffee/lunch/a movie] and did not tell me|I saw a photo of them
 online the next day
neighbor|cut down the old [apple/cherry/walnut] tree between our gardens|My [father/grandmother]
 had planted it for me
[friend/cousin]|borrowed my [bike/camera/guitar] and brought it back broken|The repair costs
 [80/120/200] dollars
coworker|took credit for a [report/design/budget] that I had written alone|Our director praised
 {him} for it
[manager/boss]|asked me to work every [Saturday/Sunday] until the summer|I need that time for my
 [kids/mother/classes]
[friend/roommate]|crashed my car into a [fence/mailbox/parked van]|Nobody was hurt, but my
 insurance will cost much more
[friend/cousin]|invited [six/nine/twelve] people to my birthday dinner|I had booked a quiet table
 for only four of us
roommate|refused to pay {his} share of the rent|{He} lost a job in [March/June/October] and barely
 looks for another
[friend/cousin]|asked me to invest [2000/5000] dollars in a [candle/bakery] business|There is no
 plan, only a logo
[friend/coworker]|told other people about my [divorce/illness/debts]|I found out when a near
 stranger wished me luck
roommate|adopted a [puppy/kitten/rabbit] without asking me|It is cute, but it chews cables and
 wakes me at night
[friend/cousin]|cancelled our [hiking/camping/beach] trip one night before we left|I had already
 paid for the cabin
roommate|painted our [kitchen/hallway/bathroom] [orange/purple/green]|We rent the place and could
 lose the deposit
[friend/cousin]|found a wallet in a [taxi/cinema/park] and kept it|The owner's card was inside,
 with a phone number
[friend/neighbor]|stopped greeting me after I forgot {his} [birthday/party]|We used to go for a
 walk almost every day
neighbor|started to practice the [drums/trumpet/violin] after midnight|The walls are thin, and I
 get up at [four/five]
coworker|ate the [lunch/cake/soup] that I had put in the office fridge|There was a label with my
 name on the box
"""
ABSTRACTS = """
[Progress in/Research on/Work on] {0} is [slow/difficult/limited] because {1}. [Existing
 methods/Current systems/Standard approaches] [rely on fixed rules/need large amounts of data/treat
 every case alone/are tuned by hand], which makes them [costly/brittle/unreliable/hard to use] in
 practice. [We introduce/We propose/This paper presents] {2}. [The key idea is/Our idea is/The main
 insight is] to [share what is learned between similar cases/ask for help when a decision is
 uncertain/combine many weak signals into a strong one/correct a simple model where it fails]. We
 [test/evaluate] [it/the approach] on {3} [and compare it with [three/four/five] strong
 baselines/under realistic conditions/without manual tuning]. [Compared with the best baseline,
 it/On average, it/In all settings, it] [reduces/lowers/cuts] {4} by {number} percent [and needs
 half the [time/data]/while remaining simple to run/at no extra cost]. [An ablation/Further
 analysis/A closer look] shows that [most of the gain comes from this idea/the gain is largest in
 the hardest cases/the method still works when data are missing]. [These results/Our findings]
 [suggest/indicate] a [practical/realistic/promising] path toward [cheap/reliable/widely available]
 tools for {0}.
malaria control|mosquitoes adapt to insecticides|a plan of rotating treatments|[thirty/fifty]
 villages|infection rates
robot grasping|objects are soft or hidden|a tactile policy that corrects its grip|[forty/seventy]
 objects|the drop rate
speech recognition|recordings are few|an encoder with shared sounds|[nine/twelve] languages|the
 word error rate
flood forecasting|rain changes within hours|a graph network over rivers|[ten/twenty] years of
 records|the peak error
traffic control|demand shifts every hour|a controller that learns from queues|[two/four]
 cities|waiting times
quantum computing|qubits lose their state quickly|a small neural decoder|codes of [three/five]
 sizes|logical error rates
crop protection|symptoms look alike|a vision model that asks for a second view|[eighty/ninety]
 farms|missed infections
galaxy surveys|images are faint|a probabilistic classifier|[two/three] sky catalogs|calibration
 error
hospital scheduling|emergencies upset any plan|an optimizer that repairs plans|records from
 [four/six] clinics|overtime
code review|big changes hide small faults|a language model that tests each warning|[twelve/thirty]
 projects|false alarms
battery testing|cells age slowly|a physical model with a learned correction|[ninety/two hundred]
 cells|lifetime error
ocean monitoring|debris is small and clouds hide it|a detector for satellite images|[five/seven]
 coasts|false detections
air quality monitoring|sensors drift|a sensor network that calibrates itself|[eleven/sixteen]
 schools|measurement error
electricity trading|bidders hide costs|a market rule that rewards honesty|[two/three] years of
 bids|balancing costs
bird conservation|calls overlap at dawn|a model that separates singers by direction|[six/eight]
 forests|counting errors
online teaching|students leave without warning|an early alert based on writing|[six/ten]
 courses|the number of dropouts
earthquake forecasting|records are short|a point process with memory|[seven/nine]
 regions|prediction error
"""
HE = {"he": "he", "He": "He", "him": "him", "his": "his"}
SHE = {"he": "she", "He": "She", "him": "her", "his": "her"}
NAMES = {"he": ["Marcus", "Owen", "Felix", "Ben"], "she": ["Dana", "Priya", "Rosa", "Leah"]}
TEXTS, HELD_OUT_TEXTS = 2000, 64  # of each writing task


def table_entries(table):
    """Entries of a grammar's table, one string each."""
    return table.replace("\n ", " ").strip().splitlines()


def writing_rows(field, table):
    """Distinct texts of a grammar, as rows with one field; the first ones are held out."""
    frame, *subjects = table_entries(table)
    rng = random.Random(field)
    texts = {}  # a dict as a set that keeps its order
    while len(texts) < TEXTS:
        pronouns = rng.choice([HE, SHE])
        name = rng.choice(NAMES[pronouns["he"]])
        slots = pronouns | {"name": name, "number": rng.randint(22, 44)}
        facts = rng.choice(subjects).split("|")
        text = frame.format(*(fact.format(**slots) for fact in facts), **slots)
        texts[choose(rng, text)] = True
    return [
        {field: text} | ({"held_out": True} if k < HELD_OUT_TEXTS else {})
        for k, text in enumerate(texts)
    ]


def choose(rng, text):
    """The text with every [a/b/...] replaced by one of its choices, innermost first."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("/")), text)
    return text


# ======================================== coding ========================================
# The problems take the elements that `keep` keeps, `map` each and `fold` what comes out. Entries of
# a table are name | English | Python, and stand for several where a fourth part lists what to put
# for #.
NUMBERS = {
    "doc": "Take the {} in nums, {}, and return {}.",
    "parts": {"arg": "nums", "each": "x", "source": "nums"},
    "keep": """
        even | even numbers | x % 2 == 0
        odd | odd numbers | x % 2 == 1
        positive | positive numbers | x > 0
        negative | negative numbers | x < 0
        over_# | numbers greater than # | x > # | 2 3 4 5 6
        under_# | numbers less than # | x < # | 2 3 4 5 6
        multiple_# | multiples of # | x % # == 0 | 3 4 5
    """,
    "map": """
        squares | square each | x * x
        cubes | cube each | x ** 3
        halves | halve each, rounding down | x // 2
        negated | negate each | -x
        times_# | multiply each by # | x * # | 2 3 4 5
        plus_# | add # to each | x + # | 1 2 3 4 5
        minus_# | subtract # from each | x - # | 1 2 3 4
    """,
    "fold": """
        sum | the sum | sum({})
        max | the largest, or 0 if there is none | max({}, default=0)
        min | the smallest, or 0 if there is none | min({}, default=0)
        list | them as a list | list({})
        sorted | them in rising order | sorted({})
        set | how many different values there are | len(set({}))
        first | the first, or None if there is none | next(iter({}), None)
    """,
}
TEXT = {
    "doc": "Take the words of s {}, {}, and return {}.",
    "parts": {"arg": "s", "each": "w", "source": "s.split()"},
    "keep": """
        over_# | longer than # letters | len(w) > # | 2 3 4
        under_# | shorter than # letters | len(w) < # | 3 4 5
        with_# | that contain '#' | '#' in w | a e o r t
        vowel | that start with a vowel | w[0] in 'aeiou'
        ending_vowel | that end with a vowel | w[-1] in 'aeiou'
        even | with an even number of letters | len(w) % 2 == 0
    """,
    "map": """
        upper | upper-case each | w.upper()
        reversed | reverse each | w[::-1]
        doubled | write each twice | w * 2
        cut | drop the first letter of each | w[1:]
        chopped | drop the last letter of each | w[:-1]
        initials | take the first letter of each | w[0]
        shouted | add '!' to each | w + '!'
    """,
    "fold": """
        joined | them joined by spaces | ' '.join({})
        dashed | them joined by dashes | '-'.join({})
        list | them as a list | list({})
        sorted | them in rising order | sorted({})
        first | the first, or None if there is none | next(iter({}), None)
    """,
}
WORDS = """
    a i an at ax be by do go in is it on to up all and ant arm bad bee cat cow dog egg fox hat ice
    owl red sea the tree area bird blue echo fish gate idea iron leaf moon note open rain star tone
    apple bread cloud eagle green house lemon ocean queen river table water yellow orange rabbit
""".split()
INPUTS, FEWEST_TESTS, MOST_TESTS = 60, 5, 6
NUMBER_PROBLEMS, TEXT_PROBLEMS = 480, 240


def table_of(text):
    """[(name, English, Python)] of a table of the family."""
    entries = []
    for line in text.strip().splitlines():
        name, english, python, *values = [part.strip() for part in line.split(" | ")]
        for value in values[0].split() if values else [""]:
            entries.append(tuple(part.replace("#", value) for part in (name, english, python)))
    return entries


def coding_rows():
    """Problems on numbers and on words: prompt, entry_point, test, and the `parts` they are made
    of, which no agent sees; every fifth is held out."""
    rng = random.Random(0)
    numbers = [[rng.randint(-6, 9) for _ in range(rng.randint(3, 5))] for _ in range(INPUTS)]
    rows = family_rows(rng, NUMBERS, "", numbers, NUMBER_PROBLEMS)
    texts = [" ".join(rng.sample(WORDS, rng.randint(3, 5))) for _ in range(INPUTS)]
    rows += family_rows(rng, TEXT, "_words", texts, TEXT_PROBLEMS)
    rng.shuffle(rows)
    return [row | ({"held_out": True} if k % 5 == 4 else {}) for k, row in enumerate(rows)]


def family_rows(rng, family, suffix, inputs, count):
    """`count` problems of a family, each with inputs that tell it from all of its neighbours."""
    keeps, maps, folds = (table_of(family[key]) for key in ("keep", "map", "fold"))
    problems = list(itertools.product(keeps, maps, folds))
    keeps.append(("", "", "True"))  # rivals that leave a step out
    maps.append(("", "", family["parts"]["each"]))
    empty = type(inputs[0])()
    answers = {
        problem: solve(family, problem, [*inputs, empty])
        for problem in itertools.product(keeps, maps, folds)
    }
    listing = next(fold for fold in folds if fold[0] == "list")
    rng.shuffle(problems)
    rows = []
    for keep, map_, fold in problems:
        problem = keep, map_, fold
        rivals = {(other, map_, fold) for other in keeps}
        rivals |= {(keep, other, fold) for other in maps}
        rivals |= {(keep, map_, other) for other in folds}
        something = [bool(answer) for answer in answers[keep, map_, listing]]
        chosen = telling_inputs(rng, problem, rivals - {problem}, answers, something)
        if chosen and len(rows) < count:
            chosen.sort(key=lambda k: len(str(inputs[k])))
            pairs = [(inputs[k], answers[problem][k]) for k in chosen]
            rows.append(coding_row(family, problem, suffix, pairs, (empty, answers[problem][-1])))
    return rows


def solve(family, problem, inputs):
    """The answer of a problem (keep, map, fold) to each of the inputs."""
    (_, _, keep), (_, _, map_), (_, _, fold) = problem
    arg, each, source = family["parts"].values()
    program = fold.format(f"[{map_} for {each} in {source} if {keep}]")
    return list(map(eval(f"lambda {arg}: {program}"), inputs))


def telling_inputs(rng, problem, rivals, answers, something):
    """Numbers of inputs, in random order, on which every rival answers one of them wrongly; [] if
    there are none. `something` tells where any element is kept: elsewhere an input says little."""
    chosen = []
    for k in rng.sample(range(INPUTS), INPUTS):
        beaten = {rival for rival in rivals if answers[rival][k] != answers[problem][k]}
        if something[k] and (beaten or not rivals) and len(chosen) < MOST_TESTS:
            chosen.append(k)
            rivals = rivals - beaten
        if not rivals and len(chosen) >= FEWEST_TESTS:
            break
    return [] if rivals else chosen


def coding_row(family, problem, suffix, pairs, empty):
    """Row of a problem with tests of (input, answer) pairs. The empty input shares an assert with a
    full one, because alone it passes for almost any program."""
    keep, map_, fold = problem
    name = f"{fold[0]}_{keep[0]}_{map_[0]}{suffix}"
    doc = family["doc"].format(keep[1], map_[1], fold[1])
    value, answer = pairs[0]
    stub = f"def {name}({family['parts']['arg']}):"
    prompt = f'{stub}\n    """{doc}\n    >>> {name}({value!r})\n    {answer!r}\n    """\n'
    asserts = [f"candidate({value!r}) == {answer!r}" for value, answer in pairs]
    asserts[-1] = f"candidate({empty[0]!r}) == {empty[1]!r} and {asserts[-1]}"
    test = "\n    assert ".join(["def check(candidate):", *asserts]) + "\n"
    parts = {"keep": keep[2], "map": map_[2], "fold": fold[2]} | family["parts"]
    return {"prompt": prompt, "entry_point": name, "test": test, "parts": parts}


# ======================================== strbuild ========================================
FONT = """
A      B      C      D      E      F      G      H      I      J      K      L      M
.###.  ####.  .####  ####.  #####  #####  .####  #...#  #####  ..###  #...#  #....  #...#
#...#  #...#  #....  #...#  #....  #....  #....  #...#  ..#..  ...#.  #..#.  #....  ##.##
#####  ####.  #....  #...#  ####.  ####.  #..##  #####  ..#..  ...#.  #.#..  #....  #.#.#
#...#  #...#  #....  #...#  #....  #....  #...#  #...#  ..#..  ...#.  #..#.  #....  #...#
#...#  ####.  .####  ####.  #####  #....  .####  #...#  #####  .##..  #...#  #####  #...#
N      O      P      Q      R      S      T      U      V      W      X      Y      Z
#...#  .###.  ####.  .###.  ####.  .####  #####  #...#  #...#  #...#  #...#  #...#  #####
##..#  #...#  #...#  #...#  #...#  #....  ..#..  #...#  #...#  #...#  .#.#.  .#.#.  ...#.
#.#.#  #...#  ####.  #.#.#  ####.  .###.  ..#..  #...#  #...#  #.#.#  ..#..  ..#..  ..#..
#..##  #...#  #....  #..#.  #..#.  ....#  ..#..  #...#  .#.#.  ##.##  .#.#.  ..#..  .#...
#...#  .###.  #....  .##.#  #...#  ####.  ..#..  .###.  ..#..  #...#  #...#  ..#..  #####
"""
LETTER_HEIGHT, GAP = 5, ".."
SHORT_WORDS = """
    AD AH AM AN AS AT AX BE BY DO GO HA HE HI IF IN IS IT LO ME MY NO OF OH OK ON OR OX SO TO UP US
    WE YE
""".split()
# One for each of four builders; a team takes the first ones. Together they have seven textures, as
# many as the smallest letter has cells.
PALETTES = [
    ["oak_planks", "stone"],
    ["white_concrete", "obsidian"],
    ["bricks", "glass"],
    ["dirt"],
]
GAMES, HELD_OUT_GAMES = 400, 80  # items of each game
SPARE_COMMANDS = 4


def letters_of(font):
    """{letter: its rows from the top} of drawn letters: a line of names, then their rows."""
    letters = {}
    lines = [line.split() for line in font.strip().splitlines()]
    for top in range(0, len(lines), 1 + LETTER_HEIGHT):
        names, *rows = lines[top : top + 1 + LETTER_HEIGHT]
        letters |= dict(zip(names, zip(*rows)))
    return letters


def strbuild_rows():
    """Words of one or two letters: all letters, short words, initials. The first are held out."""
    rng, letters = random.Random(1), letters_of(FONT)
    pairs = [a + b for a in letters for b in letters]
    words = dict.fromkeys([*letters, *SHORT_WORDS, *rng.sample(pairs, len(pairs))])
    words = list(words)[:GAMES]
    rows = []
    for word in rng.sample(words, len(words)):
        drawn = [GAP.join(row) for row in zip(*(letters[letter] for letter in word))]
        cells = "".join(drawn).count("#")
        row = {"rows": drawn, "blocks": PALETTES, "max_commands": cells + SPARE_COMMANDS}
        rows.append(row | ({"held_out": True} if len(rows) < HELD_OUT_GAMES else {}))
    return rows


# ======================================== housebuild ========================================
BLOCKS = {
    "B": "bricks",
    "D": "dirt",
    "O": "oak_planks",
    "S": "stone",
    "C": "clay",
    "G": "glass",
    "A": "air",
}
HOUSE_COMMANDS = 28


def housebuild_rows():
    """Houses of which either builder can make one half, cut at x = (width + 1) // 2, within the
    limits of its blocks. The first are held out."""
    rng, houses = random.Random(2), {}
    while len(houses) < GAMES:
        width, layers = house_layers(rng)
        hp, damage = rng.choice((10, 20)), rng.choice((0, 5, 10))
        count = count_letters(layers, width)
        if not halves_fit(count, count_letters(layers, (width + 1) // 2)):
            continue
        houses[str(layers)] = {
            "legend": {letter: block for letter, block in BLOCKS.items() if letter in count},
            "layers": layers,
            "player_hp": hp,
            "spider_damage": damage,
            "limited_resource": True,
            "max_commands": HOUSE_COMMANDS,
        }
    return [
        house | ({"held_out": True} if k < HELD_OUT_GAMES else {})
        for k, house in enumerate(houses.values())
    ]


def house_layers(rng):
    """(width, layers) of a house: floor, walls with a door and windows, a roof of one of three
    shapes; layers[y][z] is a row of letters along x."""
    (floor, wall, roof), width, depth = (
        rng.choices("BCDOS", k=3),
        rng.randint(3, 6),
        rng.randint(3, 5),
    )
    ring = [wall * width, *[wall + "A" * (width - 2) + wall] * (depth - 2), wall * width]
    walls, door = rng.randint(1, 3), rng.randint(1, width - 2)
    layers = [[floor * width] * depth, *[ring] * walls, [roof * width] * depth]
    for y in range(1, 1 + min(walls, rng.randint(0, 2))):
        layers[y] = [wall * door + "A" + wall * (width - door - 1), *ring[1:]]
    if rng.random() < 0.5:  # a window in each side wall
        y, z, pane = rng.randint(1, walls), rng.randint(1, depth - 2), rng.choice("AG")
        layers[y] = [*layers[y][:z], pane + "A" * (width - 2) + pane, *layers[y][z + 1 :]]
    shape = rng.choice(("flat", "hatch", "ridge"))
    if shape == "hatch":
        half = width // 2
        layers[-1] = [*layers[-1][1:], roof * half + "A" + roof * (width - half - 1)]
    elif shape == "ridge" and walls < 3:
        layers.append([(roof if z == depth // 2 else "A") * width for z in range(depth)])
    return width, layers


def count_letters(layers, width):
    """How often each letter stands in the first `width` columns of all layers."""
    return Counter("".join(row[:width] for layer in layers for row in layer))


def halves_fit(count, left):
    """Whether both halves of a house keep to a builder's limit on every block (docs/tasks.md)."""
    solid = [letter for letter in count if letter != "A"]
    larger = {letter: max(left[letter], count[letter] - left[letter]) for letter in solid}
    limit = {letter: (count[letter] + 1) // 2 + count[letter] // 4 for letter in solid}
    return all(larger[letter] <= limit[letter] for letter in solid)


# ======================================== files ========================================
def files():
    """{file name: its text} of all tasks."""
    rows = {
        "tldr": writing_rows("prompt", POSTS),
        "arxiv": writing_rows("abstract", ABSTRACTS),
        "coding": coding_rows(),
        "strbuild": strbuild_rows(),
        "housebuild": housebuild_rows(),
    }
    return {
        f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in many)
        for name, many in rows.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
