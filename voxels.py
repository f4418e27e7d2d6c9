"""Runs the building commands of a text on a grid {(x, y, z): block}, y upwards, and puts a grid
into few words. Known to envs.py, whose games are rewarded for what stands there in the end, and to
the scripted builders of models/tiny.

A text is what a model wrote, so that anything may be in it; all of this takes time linear in its
length. What is no command, or none that is allowed, is skipped (docs/tasks.md has the rules).
"""

import itertools
import math
import re

# Six coordinates and a block. ASCII digits only: int() also takes "1_0" and other scripts, not
# thousands of zeros.
BOX = re.compile(r"(?:\+?0*(0|[1-9][0-9]{0,8})|-0+) " * 6 + r"(\S+)")


def cells(layers):
    """{(x, y, z): letter} of layers[y][z][x]."""
    found = {}
    for y, layer in enumerate(layers):
        for z, row in enumerate(layer):
            found |= {(x, y, z): letter for x, letter in enumerate(row)}
    return found


def command_lines(text):
    """Lines that are not empty (of the first fence, if there is one), without list marker and
    slash. A fence's first line goes if it is one word, its language."""
    parts = text.split("```", 2)
    fenced = len(parts) == 3
    lines = (parts[1] if fenced else text).splitlines()
    if fenced and lines and re.fullmatch(r"[\w.+#-]+", lines[0].strip()):
        del lines[0]
    lines = (re.sub(r"^(?:[-*]|[0-9]+[.)])", "", line.strip()).strip() for line in lines)
    return [line.removeprefix("/") for line in lines if line]


def run(lines, verbs, grid, left, size, cap):
    """Run at most `cap` commands on a grid of `size` (w, h, d); the list of those that ran, as
    verbs. verbs: the commands there are, of setblock, fill and kill; left: {block: cells that may
    still be filled with it}, from which is taken what is filled."""
    done = []
    for line in lines:
        verb, *words = line.split(None, 8) or [""]
        verb = verb.lower()
        if verb not in verbs or len(done) == cap:
            continue
        if verb == "setblock":
            words = words[:3] + words[:4]  # a box of one cell; what follows the block is ignored
        if verb == "kill" or fill(words, grid, left, size):
            done.append(verb)
    return done


def fill(words, grid, left, size):
    """Fill a box of the grid by the words x1 y1 z1 x2 y2 z2 block. False, with nothing done, if
    they are other words, the box is not within the size, or too little is left of the block."""
    match = BOX.fullmatch(" ".join(words))
    if not match:
        return False
    *corners, block = match.groups("0")
    block = block.removeprefix("minecraft:")
    ends = zip(map(int, corners[:3]), map(int, corners[3:]))
    spans = [range(min(pair), max(pair) + 1) for pair in ends]
    volume = math.prod(map(len, spans))
    if volume > left.get(block, 0):
        return False
    if any(span.stop > length for span, length in zip(spans, size)):
        return False
    left[block] -= volume
    grid.update(dict.fromkeys(itertools.product(*spans), block))
    return True


def boxes(labels):
    """{(x, y, z): label} as disjoint boxes [(x1, y1, z1), (x2, y2, z2), label], both corners
    included: from the first free cell in the order y, z, x, each grows as far as it can along x,
    then z, then y."""
    order = sorted(labels, key=lambda cell: (cell[1], cell[2], cell[0]))
    left = {cell: labels[cell] for cell in order}
    found = []
    while left:
        low, label = next(iter(left.items()))
        spans = [range(start, start + 1) for start in low]
        for axis in (0, 2, 1):
            grown = [*spans]
            while all(left.get(cell) == label for cell in itertools.product(*grown)):
                spans = [*grown]
                grown[axis] = range(low[axis], grown[axis].stop + 1)
        found.append((low, tuple(span[-1] for span in spans), label))
        for cell in itertools.product(*spans):
            del left[cell]
    return found


def halves(labels, width):
    """The part of {(x, y, z): label} with x below the middle of the width, and the other."""
    middle = (width + 1) // 2
    left = {cell: label for cell, label in labels.items() if cell[0] < middle}
    right = {cell: label for cell, label in labels.items() if cell[0] >= middle}
    return [left, right]


def neighbours(cell):
    """The four cells of a wall that share a side with this one."""
    x, y, z = cell
    return [(x - 1, y, z), (x + 1, y, z), (x, y - 1, z), (x, y + 1, z)]


def reading_order(cell):
    """Sorts the cells of a wall as one reads: from the top, then from the left."""
    return -cell[1], cell[0]


def texture(block):
    """What looks alike: strbuild's adjacency compares textures, not ids."""
    if block.endswith(("planks", "wood")):
        return "wood"
    if block == "cobblestone" or f"_{block}".endswith(("_stone", "_stone_bricks")):
        return "stone"
    return "concrete" if block.endswith("_concrete") else block


def drawing(grids, chars, size):
    """Lines of text that show grids beside each other, a character for each block: a wall from the
    front, else layers from y = 0 with z downwards."""
    width, height, depth = size
    lines = [[(y, z) for y in range(height)] for z in range(depth)]
    if depth == 1:
        lines = [[(y, 0)] for y in reversed(range(height))]

    def row(grid, y, z):
        blocks = [grid.get((x, y, z)) for x in range(width)]
        return "".join(chars.get(block, ".") for block in blocks)

    drawn = []
    for line in lines:
        views = ["|".join(row(grid, y, z) for grid in grids) for y, z in line]
        drawn.append("  ".join(views))
    return drawn
