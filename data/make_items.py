"""Writes the embedded items of all tasks: python data/make_items.py

One JSONL file a task, one row a line, in the format that `--dataset` takes (docs/tasks.md); rows
with "held_out": true are for evaluation alone. All is drawn from fixed seeds, so that the files
come out the same, byte for byte, on every machine.
"""

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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
# The problems take the elements that `keep` keeps, `map` each and `fold` what comes out; an easy
# problem has one of these steps alone. Entries of a table are name | English | Python, and stand
# for several where a fourth part lists what to put for #.
NUMBERS = {
    "doc": ("the {} in nums", "numbers in nums"),
    "parts": {"arg": "nums", "each": "x", "source": "nums"},
    "keep": """
        even | even numbers | x % 2 == 0
        odd | odd numbers | x % 2 == 1
        positive | positive numbers | x > 0
        negative | negative numbers | x < 0
        over_# | numbers greater than # | x > # | 1 2 3 4 5 6 7
        under_# | numbers less than # | x < # | 1 2 3 4 5 6 7
        not_# | numbers other than # | x != # | 1 2 3 4 5 6 7
        multiple_# | multiples of # | x % # == 0 | 3 4 5
    """,
    "map": """
        squares | square each | x * x
        cubes | cube each | x ** 3
        halves | halve each, rounding down | x // 2
        negated | negate each | -x
        times_# | multiply each by # | x * # | 2 3 4 5 6 7 8 9
        plus_# | add # to each | x + # | 1 2 3 4 5 6 7 8 9
        minus_# | subtract # from each | x - # | 1 2 3 4 5 6 7 8 9
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
    "doc": ("the words of s {}", "words of s"),
    "parts": {"arg": "s", "each": "w", "source": "s.split()"},
    "keep": """
        over_# | longer than # letters | len(w) > # | 1 2 3 4 5
        under_# | shorter than # letters | len(w) < # | 2 3 4 5 6
        with_# | that contain '#' | '#' in w | a d e i l n o r t
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
        endings | take the last letter of each | w[-1]
        shouted | add '!' to each | w + '!'
        asked | add '?' to each | w + '?'
        ended | add '.' to each | w + '.'
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
INPUTS, FEWEST_TESTS, MOST_TESTS = 80, (3, 6), 9  # fewest: between these two, as it falls
PROBLEMS = {1: 120, 2: 240, 3: 240}  # steps: how many problems of so many
NO_KEEP, NO_FOLD = "True", "list({})"


def table_of(text):
    """[(name, English, Python)] of a table of the family."""
    entries = []
    for line in text.strip().splitlines():
        name, english, python, *values = [part.strip() for part in line.split(" | ")]
        for value in values[0].split() if values else [""]:
            entries.append(tuple(part.replace("#", value) for part in (name, english, python)))
    return entries


def coding_rows(seed=0, problems=PROBLEMS):
    """Problems on numbers and on words: prompt, entry_point, test, the number of steps as `level`,
    and the `parts` they are made of, which no agent sees; every fifth of a level is held out."""
    rng = random.Random(seed)
    numbers = [[rng.randint(-6, 9) for _ in range(rng.randint(3, 5))] for _ in range(INPUTS)]
    texts = [" ".join(rng.sample(WORDS, rng.randint(3, 5))) for _ in range(INPUTS)]
    families = (
        family_rows(rng, NUMBERS, "", numbers, problems),
        family_rows(rng, TEXT, "_words", texts, problems),
    )
    levels = {}
    for level, count in problems.items():
        one, two = ([row for row in rows if row["level"] == level] for rows in families)
        smaller = min(len(two), count // 3)
        levels[level] = one[: count - smaller] + two[:smaller]
        rng.shuffle(levels[level])
    return held_out_rows(rng, levels)


def held_out_rows(rng, levels):
    """Rows of all levels {level: its rows} in random order, every fifth of a level held out."""
    rows = []
    for many in levels.values():
        rows += [row | ({"held_out": True} if k % 5 == 4 else {}) for k, row in enumerate(many)]
    rng.shuffle(rows)
    return rows


def family_rows(rng, family, suffix, inputs, most):
    """Problems of a family in random order, as many of each level as there can be up to its
    number in `most`; each has inputs that tell it from all of its neighbours."""
    keeps, maps, folds = (table_of(family[key]) for key in ("keep", "map", "fold"))
    keeps.append(("", "", NO_KEEP))
    maps.append(("", "", family["parts"]["each"]))
    empty = type(inputs[0])()
    problems = list(itertools.product(keeps, maps, folds))
    answers = {problem: solve(family, problem, [*inputs, empty]) for problem in problems}
    listing = next(fold for fold in folds if fold[2] == NO_FOLD)
    rng.shuffle(problems)
    rows, found = [], Counter()
    for problem in problems:
        keep, map_, fold = problem
        level = len(steps(family, problem))
        if level == 0 or found[level] == most[level]:
            continue
        rivals = {(other, map_, fold) for other in keeps}
        rivals |= {(keep, other, fold) for other in maps}
        rivals |= {(keep, map_, other) for other in folds}
        something = [bool(answer) for answer in answers[keep, map_, listing]]
        chosen = telling_inputs(rng, problem, rivals - {problem}, answers, something)
        if chosen:
            chosen.sort(key=lambda k: len(str(inputs[k])))
            pairs = [(inputs[k], answers[problem][k]) for k in chosen]
            rows.append(coding_row(family, problem, suffix, pairs, (empty, answers[problem][-1])))
            found[level] += 1
    return rows


def steps(family, problem):
    """The steps that a problem (keep, map, fold) has: some of keep, map and fold."""
    idle = NO_KEEP, family["parts"]["each"], NO_FOLD
    names = "keep", "map", "fold"
    return [name for name, part, none in zip(names, problem, idle) if part[2] != none]


def solve(family, problem, inputs):
    """The answer of a problem (keep, map, fold) to each of the inputs."""
    (_, _, keep), (_, _, map_), (_, _, fold) = problem
    arg, each, source = family["parts"].values()
    program = fold.format(f"[{map_} for {each} in {source} if {keep}]")
    return list(map(eval(f"lambda {arg}: {program}"), inputs))


def telling_inputs(rng, problem, rivals, answers, something):
    """Numbers of inputs, in random order, on which every rival answers one of them wrongly; [] if
    there are none. `something` tells where any element is kept: elsewhere an input says little."""
    chosen, fewest = [], rng.randint(*FEWEST_TESTS)
    for k in rng.sample(range(INPUTS), INPUTS):
        beaten = {rival for rival in rivals if answers[rival][k] != answers[problem][k]}
        if something[k] and (beaten or not rivals) and len(chosen) < MOST_TESTS:
            chosen.append(k)
            rivals = rivals - beaten
        if not rivals and len(chosen) >= fewest:
            break
    return [] if rivals else chosen


def coding_row(family, problem, suffix, pairs, empty):
    """Row of a problem with tests of (input, answer) pairs. The empty input shares an assert with a
    full one, because alone it passes for almost any program."""
    keep, map_, fold = problem
    used = steps(family, problem)
    kept, all_ = family["doc"]
    taken = kept.format(keep[1]) if "keep" in used else f"the {all_}"
    mapped = f", {map_[1]}," if "map" in used else ""
    names = [part[0] for part in (fold, keep, map_) if part[0]]
    name = "_".join(names if len(names) > 1 else [*names, "all"]) + suffix
    value, answer = pairs[0]
    stub = f"def {name}({family['parts']['arg']}):"
    doc = f"Take {taken}{mapped} and return {fold[1]}."
    prompt = f'{stub}\n    """{doc}\n    >>> {name}({value!r})\n    {answer!r}\n    """\n'
    asserts = [f"candidate({value!r}) == {answer!r}" for value, answer in pairs]
    asserts[-1] = f"candidate({empty[0]!r}) == {empty[1]!r} and {asserts[-1]}"
    test = "\n    assert ".join(["def check(candidate):", *asserts]) + "\n"
    parts = {"keep": keep[2], "map": map_[2], "fold": fold[2]} | family["parts"]
    row = {"prompt": prompt, "entry_point": name, "test": test, "level": len(used)}
    return row | {"parts": parts | {"steps": " ".join(used)}}


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
    AD AH AM AN AS AT AX BE BY DO GO HA HE HI IF IN IS IT LO ME MY NO OF OH OK ON OR OX PI SO TO UP
    US WE YE YO
    ACE AGE AIM AIR ANT APE ARM ART ASH BAG BAT BED BEE BOX BUS CAP CAR CAT COW CUP DAY DOG EAR EGG
    ELF EYE FAN FIG FOX GAS GEM HAT HEN ICE INK JAM JAR KEY KIT LEG LOG MAP MUD NET NUT OAK OWL PEN
    PIG POT RAT RUG SEA SKY SUN TEA TOY URN VAN WAX WEB YAK ZOO
    ARCH BARN BEAR BELL BIRD BOAT BOOK CAKE CAVE CLAY CORN DOOR DRUM DUCK EAST FARM FIRE FISH FLAG
    FROG GATE GOAT GOLD HALL HARP HILL IRON JADE KING KITE LAKE LAMP LEAF LION MILK MOON NEST NOTE
    OPAL OVEN PARK PATH PINE POND QUIZ RAIN RING ROAD ROSE SAND SEED SHIP SNOW SONG STAR TENT TREE
    VASE WALL WEST WIND WOLF YARN
""".split()
# One for each of four builders; a team takes the first ones. Together they have seven textures, as
# many as the smallest letter has cells.
PALETTES = [
    ["oak_planks", "stone"],
    ["white_concrete", "obsidian"],
    ["bricks", "glass"],
    ["dirt"],
]


class WordLevel(NamedTuple):
    """How hard a word is to build."""

    letters: int
    dotted: bool  # then no two cells touch, and nothing can look alike
    blocks: int  # different ones of a builder, at most
    commands: float  # as a multiple of the fewest that do


WORD_LEVELS = [
    WordLevel(letters=1, dotted=True, blocks=2, commands=1.0),
    WordLevel(letters=1, dotted=False, blocks=2, commands=1.1),
    WordLevel(letters=2, dotted=False, blocks=2, commands=1.1),
    WordLevel(letters=3, dotted=False, blocks=2, commands=1.0),
    WordLevel(letters=4, dotted=False, blocks=1, commands=1.0),
]
LEVEL_GAMES = 80  # items of each of five levels of a game


def letters_of(font):
    """{letter: its rows from the top} of drawn letters: a line of names, then their rows."""
    letters = {}
    lines = [line.split() for line in font.strip().splitlines()]
    for top in range(0, len(lines), 1 + LETTER_HEIGHT):
        names, *rows = lines[top : top + 1 + LETTER_HEIGHT]
        letters |= dict(zip(names, zip(*rows)))
    return letters


def dotted(rows):
    """Rows of # and . pulled apart, so that no two cells touch."""
    spread = [".".join(row) for row in rows]
    gap = "." * len(spread[0])
    return [line for row in spread for line in (row, gap)][:-1]


def strbuild_rows():
    """Words of one to four letters; every fifth word of a level is held out. Single letters come
    several times, with more and more commands to spare."""
    rng, letters, rows = random.Random(1), letters_of(FONT), []
    for number, level in enumerate(WORD_LEVELS, 1):
        words = words_of(rng, level.letters, [*letters])
        for k in range(LEVEL_GAMES):
            again, place = divmod(k, len(words))
            row = strbuild_row(level, [letters[letter] for letter in words[place]])
            row["max_commands"] += 2 * again + rng.randint(0, 1)
            row["level"] = number
            rows.append(row | ({"held_out": True} if place % 5 == 4 else {}))
    rng.shuffle(rows)
    return rows


def words_of(rng, length, alphabet):
    """Different words in random order: all letters, or half of them words and half at random."""
    known = [word for word in SHORT_WORDS if len(word) == length]
    words = rng.sample(known, min(len(known), LEVEL_GAMES // 2))
    words = words or rng.sample(alphabet, len(alphabet))
    while length > 1 and len(words) < LEVEL_GAMES:
        word = "".join(rng.choices(alphabet, k=length))
        words += [word] if word not in words else []
    rng.shuffle(words)
    return words


def strbuild_row(level, letters):
    """A row of drawn letters, without commands to spare."""
    drawn = [GAP.join(row) for row in zip(*letters)]
    drawn = dotted(drawn) if level.dotted else drawn
    palettes = [ids[: level.blocks] for ids in PALETTES]
    most = math.ceil(level.commands * fewest_commands(drawn))
    return {"rows": drawn, "blocks": palettes, "max_commands": most}


def fewest_commands(rows):
    """Commands with which two builders can share a word in any of these ways: the colours of a
    checkerboard, so that no cell touches another of its builder; the left and the right half; the
    upper and the lower half, with the middle row. Twice as many as the largest of these has."""
    cells = [(x, y) for y, row in enumerate(rows) for x, char in enumerate(row) if char == "#"]
    middle, width = len(rows) // 2, len(rows[0])
    colours = Counter((x + y) % 2 for x, y in cells)
    sides = Counter(2 * x // width for x, _ in cells)
    upper, lower = sum(y <= middle for _, y in cells), sum(y >= middle for _, y in cells)
    larger = max(colours.values()) if len(colours) > 1 else 0  # one colour: no two cells touch
    return 2 * max(larger, upper, lower, *sides.values())


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


class HouseLevel(NamedTuple):
    """How hard a house is to build. Pairs are the ends of a range."""

    width: tuple
    depth: tuple
    walls: tuple  # their height
    blocks: int  # different ones at most; with one, there is no roof
    windows: int  # in each side wall
    limited: bool  # whether a builder has few of each block
    spiders: tuple  # the choice of what they take of HOUSE_HP


HOUSE_LEVELS = [
    HouseLevel((2, 5), (2, 3), (0, 2), blocks=1, windows=0, limited=False, spiders=(0,)),
    HouseLevel((3, 5), (3, 4), (1, 2), blocks=2, windows=0, limited=False, spiders=(0, 0, 5)),
    HouseLevel((3, 5), (3, 4), (1, 3), blocks=3, windows=1, limited=True, spiders=(0, 0, 5)),
    HouseLevel((4, 6), (3, 4), (2, 3), blocks=3, windows=2, limited=True, spiders=(5, 10)),
    HouseLevel((6, 8), (3, 4), (3, 4), blocks=3, windows=4, limited=True, spiders=(10,)),
]
HOUSE_HP = 10


def housebuild_rows(seed=2, games=LEVEL_GAMES):
    """Different houses from huts to halls, as many of each level as there can be up to `games`;
    every fifth of a level is held out."""
    rng, levels, seen = random.Random(seed), {}, set()
    for number, level in enumerate(HOUSE_LEVELS, 1):
        levels[number] = []
        for _ in range(50 * games):
            if len(levels[number]) == games:
                break
            row = housebuild_row(rng, level)
            if str(row["layers"]) not in seen and can_be_shared(row):
                seen.add(str(row["layers"]))
                levels[number].append(row | {"level": number})
    return held_out_rows(rng, levels)


def housebuild_row(rng, level):
    """A row of a random house."""
    layers = house_layers(rng, level)
    return {
        "legend": legend_of(layers),
        "layers": layers,
        "player_hp": HOUSE_HP,
        "spider_damage": rng.choice(level.spiders),
        "limited_resource": level.limited,
        "max_commands": HOUSE_COMMANDS,
    }


def legend_of(layers):
    """{letter: block} of the letters that stand in layers."""
    used = set("".join(row for layer in layers for row in layer))
    return {letter: block for letter, block in BLOCKS.items() if letter in used}


def house_layers(rng, level):
    """layers[y][z], rows of letters along x, of a house: floor and walls and, if it has more than
    one block, a door, windows, and a roof of one of three shapes."""
    blocks = level.blocks
    floor, wall, roof = (rng.sample("BCDOS", blocks) * 3)[:3]
    spans = level.width, level.depth, level.walls
    width, depth, walls = (rng.randint(*span) for span in spans)
    ring = [wall * width, *[wall + "A" * (width - 2) + wall] * (depth - 2), wall * width]
    layers = [[floor * width] * depth, *[ring] * walls]
    if blocks > 1:
        layers.append([roof * width] * depth)
        door, high = rng.randint(1, width - 2), rng.randint(1, walls)
        for y in range(1, 1 + high):
            layers[y] = [wall * door + "A" + wall * (width - door - 1), *ring[1:]]
    for _ in range(level.windows):  # one in each side wall
        y, z, pane = rng.randint(1, walls), rng.randint(1, depth - 2), rng.choice("AG")
        layers[y] = [*layers[y][:z], pane + layers[y][z][1:-1] + pane, *layers[y][z + 1 :]]
    shape = rng.choice(("flat", "hatch", "ridge")) if blocks > 2 else "flat"
    if shape == "hatch":
        half = width // 2
        layers[-1] = [*layers[-1][1:], roof * half + "A" + roof * (width - half - 1)]
    elif shape == "ridge" and walls < 3:
        layers.append([(roof if z == depth // 2 else "A") * width for z in range(depth)])
    return layers


def count_letters(layers, width):
    """How often each letter stands in the first `width` columns of all layers."""
    return Counter("".join(row[:width] for layer in layers for row in layer))


def can_be_shared(row):
    """Whether either builder can make its half, cut at x = (width + 1) // 2, within the limits of
    its blocks (docs/tasks.md)."""
    width = len(row["layers"][0][0])
    count, left = (count_letters(row["layers"], n) for n in (width, (width + 1) // 2))
    solid = [letter for letter in count if letter != "A"]
    larger = {letter: max(left[letter], count[letter] - left[letter]) for letter in solid}
    limit = {letter: (count[letter] + 1) // 2 + count[letter] // 4 for letter in solid}
    return not row["limited_resource"] or all(larger[letter] <= limit[letter] for letter in solid)


# ======================================== private games ========================================
# With the option `private` a builder is shown its half of the target. Here each left half meets
# each right one, hard or easy, and all else that a builder is told is the same for all items: what
# the other one has to do can not be known from the own half.
HALVES = 20  # on either side
WORD_HALVES = [  # how many letters, and whether only those of their cells that do not touch
    (1, True),
    (1, False),
    (2, True),
    (2, False),
]
TWO_LETTERS = 12  # columns
PLAIN = HouseLevel((8, 8), (4, 4), (0, 0), blocks=1, windows=0, limited=False, spiders=(5,))
WHOLE_HOUSES = [  # of which halves are cut
    PLAIN,
    PLAIN._replace(walls=(1, 3)),
    PLAIN._replace(walls=(1, 3), blocks=2),
    PLAIN._replace(walls=(2, 3), blocks=3, windows=2),
]
HOUSE_LAYERS = 5  # a floor, three of walls, a roof


def crossed_rows(rng, kinds, draw, join):
    """A row, join(left, right), for each left and each right half, in random order. draw(kind)
    gives a pair of halves; kinds take turns. Of the rows of any half a fifth is held out."""
    lefts, rights, rows = [], [], []
    while len(lefts) < HALVES:
        left, right = draw(kinds[len(lefts) % len(kinds)])
        if left not in lefts and right not in rights:
            lefts.append(left)
            rights.append(right)
    for (k, left), (j, right) in itertools.product(enumerate(lefts), enumerate(rights)):
        rows.append(join(left, right) | ({"held_out": True} if (k + j) % 5 == 4 else {}))
    rng.shuffle(rows)
    return rows


def strbuild_private_rows():
    """Words of two halves; a builder may write as many commands as a half has cells at most."""
    rng, letters = random.Random(3), letters_of(FONT)

    def draw(kind):
        return word_half(rng, letters, *kind), word_half(rng, letters, *kind)

    def join(left, right):
        drawn = [GAP.join(row) for row in zip(left, right)]
        return {"rows": drawn, "blocks": PALETTES}

    rows = crossed_rows(rng, WORD_HALVES, draw, join)
    halves = [[line[:TWO_LETTERS] for line in row["rows"]] for row in rows]
    halves += [[line[-TWO_LETTERS:] for line in row["rows"]] for row in rows]
    most = max("".join(half).count("#") for half in halves)
    return [row | {"max_commands": 2 * most} for row in rows]


def word_half(rng, letters, number, sparse):
    """Rows of one or two letters, as wide as two."""
    drawn = [letters[letter] for letter in rng.sample([*letters], number)]
    rows = [GAP.join(row).ljust(TWO_LETTERS, ".") for row in zip(*drawn)]
    if not sparse:
        return rows
    for y, row in enumerate(rows):
        rows[y] = "".join(char if (x + y) % 2 == 0 else "." for x, char in enumerate(row))
    return rows


def housebuild_private_rows():
    """Houses of which one side is another house's."""
    rng = random.Random(4)

    def join(left, right):
        layers = [[a + b for a, b in zip(*rows)] for rows in zip(left, right)]
        return {
            "legend": legend_of(layers),
            "layers": layers,
            "player_hp": HOUSE_HP,
            "spider_damage": PLAIN.spiders[0],
            "limited_resource": False,
            "max_commands": HOUSE_COMMANDS,
        }

    return crossed_rows(rng, WHOLE_HOUSES, lambda level: house_halves(rng, level), join)


def house_halves(rng, level):
    """The layers of either side of a random house, with air above, all of one height."""
    layers = house_layers(rng, level)
    air = ["A" * len(row) for row in layers[0]]
    layers += [air] * (HOUSE_LAYERS - len(layers))
    middle = len(air[0]) // 2
    left = [[row[:middle] for row in layer] for layer in layers]
    return left, [[row[middle:] for row in layer] for layer in layers]


# ======================================== files ========================================
def files():
    """{file name: its text} of all tasks."""
    rows = {
        "tldr": writing_rows("prompt", POSTS),
        "arxiv": writing_rows("abstract", ABSTRACTS),
        "coding": coding_rows(),
        "strbuild": strbuild_rows(),
        "housebuild": housebuild_rows(),
        "strbuild_private": strbuild_private_rows(),
        "housebuild_private": housebuild_private_rows(),
    }
    return {
        f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in many)
        for name, many in rows.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
