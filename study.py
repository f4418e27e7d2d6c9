# docs: docs/study.md#protocol
"""The study, written down before its runs: problems, methods, comparisons, and their statistics.

    python study.py [main|horizon|information|control ...] [--steps N]

prints the runs of one seed for benchmark.sh, a line each: script, task, flags. Without parts: all.
`--steps N` plays N env steps in each, to see that all of it runs; such runs are not the study's.
plot.py makes the tables and figures. The statistics follow Agarwal et al. (2021) and Gorsane et al.
(2022); numpy is all they need.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np
import tyro

SEEDS = range(1, 11)
METHODS = {  # name: script, flags
    "CoLLM-CC": ("collm_cc", ""),
    "CoLLM-DC": ("collm_dc", ""),
    "MAGRPO": ("mc_baseline", "--baseline mean"),
    "MC rloo": ("mc_baseline", "--baseline rloo"),
}
OURS, *OTHERS = METHODS  # every comparison is of CC and another method
LEVELS = [50, 60, 70, 80, 90]  # of the score, for steps to a level
MARGIN = 0.05  # of the normalised score: methods that differ by less are alike
ALPHA = 0.05


@dataclass(frozen=True)
class Problem:
    """What is learned: a task, for so many env steps, evaluated every so many iterations."""

    task: str
    steps: int
    eval_every: int  # ten points a curve at least, at equal steps
    turns: int | None = None  # the task's own by default
    dataset: str | None = None  # the embedded items by default

    @property
    def title(self):
        """Name in tables and figures."""
        if self.dataset:
            return f"{self.task}, items of private"
        if self.turns is None:
            return self.task
        return f"{self.task}, {self.turns} turn{'s'[: self.turns - 1]}"

    def flags(self, steps=None):
        """Flags of its runs, or of runs of other env steps."""
        flags = "" if self.turns is None else f"--num-turns {self.turns} "
        flags += f"--dataset {self.dataset} " if self.dataset else ""
        every = self.eval_every
        if steps is not None:
            every = max(1, every * steps // self.steps)
        return f"{flags}--total-env-steps {steps or self.steps} --eval-every {every}"


TLDR, ARXIV = Problem("tldr", 2048, 3), Problem("arxiv", 2048, 3)
CODING = Problem("coding", 6144, 4)
STRBUILD, HOUSEBUILD = Problem("strbuild", 6144, 9), Problem("housebuild", 6144, 9)
TURNS = [Problem("strbuild", 6144, 36 // turns, turns) for turns in (1, 2, 8)]
SPARSE = Problem("strbuild:sparse=80", 6144, 9)
PRIVATE = [Problem(f"{game}:private", 6144, 9) for game in ("strbuild", "housebuild")]
SHOWN = [  # the items of PRIVATE, of which all is shown to both
    Problem(game, 6144, 9, dataset=f"data/{game}_private.jsonl")
    for game in ("strbuild", "housebuild")
]
CLIMBING = Problem("climbing", 2048, 3)
GAMES = [STRBUILD, HOUSEBUILD]

PARTS = {  # part: its problems; shared ones are played once
    "main": [TLDR, ARXIV, CODING, *GAMES],
    "horizon": [*TURNS[:2], STRBUILD, TURNS[2], SPARSE],
    "information": [*SHOWN, *PRIVATE],
    "control": [CLIMBING],
}
FEWER = [OURS, "CoLLM-DC", "MC rloo"]  # methods of horizon and information
OF_PART = {"main": [*METHODS], "horizon": FEWER, "information": FEWER, "control": [*METHODS]}
GROUPS = {  # of problems that are compared as one, and the methods that CC is compared with
    "all five tasks": (PARTS["main"], OTHERS),
    "writing": ([TLDR, ARXIV], OTHERS),
    "coding": ([CODING], OTHERS),
    "games": (GAMES, OTHERS),
    "strbuild, 1 turn": (TURNS[:1], FEWER[1:]),
    "strbuild, 2 turns": (TURNS[1:2], FEWER[1:]),
    "strbuild, 4 turns": ([STRBUILD], FEWER[1:]),
    "strbuild, 8 turns": (TURNS[2:], FEWER[1:]),
    "strbuild, sparse": ([SPARSE], FEWER[1:]),
    "games, private": (PRIVATE, FEWER[1:]),
    "games, items of private, all shown": (SHOWN, FEWER[1:]),
    "climbing": ([CLIMBING], OTHERS),
}
COMPARISONS = [(group, other) for group, (_, others) in GROUPS.items() for other in others]


def run_name(problem, method, seed):
    """Name of a run of the study, as benchmark.sh gives it."""
    script, flags = METHODS[method]
    flags = re.sub(r"[^A-Za-z0-9.]+", "-", f"{flags} {problem.flags()}").strip("-")
    return f"{problem.task}__{script}__{seed}__{flags}"


def command_lines(parts, steps=None):
    """Lines of script, task and flags: the runs of one seed, those of several parts once."""
    lines = {}  # a dict, to keep their order
    for part in parts:
        for problem in PARTS[part]:
            for method in OF_PART[part]:
                script, flags = METHODS[method]
                words = script, problem.task, *flags.split(), problem.flags(steps)
                lines[" ".join(words)] = None
    return list(lines)


# ========================================== statistics ==========================================
def iqm(sample):
    """Interquartile mean over the last axis: without the lowest and the highest quarter.

    A quarter is rounded down, as in scipy.stats.trim_mean, which rliable uses: of ten, two.
    """
    sample = np.sort(sample, -1)
    n = sample.shape[-1]
    return sample[..., n // 4 : n - n // 4].mean(-1)


def improvement(a, b):
    """Probability of improvement P(a > b), over the last axis; a tie counts half."""
    a = np.asarray(a)[..., :, None]
    b = np.asarray(b)[..., None, :]
    wins = (a > b) + 0.5 * (a == b)
    return wins.mean((-2, -1))


def aggregate(*samples):
    """IQM of the runs of all problems, a sample each."""
    return iqm(np.concatenate(samples, -1))


def mean_improvement(*samples):
    """P(a > b), mean over problems; samples: a and b of the first problem, then of the next."""
    pairs = zip(samples[::2], samples[1::2])
    return np.mean([improvement(a, b) for a, b in pairs], 0)


def difference(*samples):
    """IQM of a less IQM of b over all problems; samples as for mean_improvement."""
    return aggregate(*samples[::2]) - aggregate(*samples[1::2])


def bootstrap(statistic, *samples, draws=5000, seed=0):
    """95% percentile interval of statistic(*samples); NaN if a sample has fewer than two values.

    Stratified: each sample is drawn anew, with replacement, by itself. statistic gets arrays
    (draws, n), gives (draws,).
    """
    if min(map(len, samples)) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = []
    for sample in samples:
        chosen = rng.integers(len(sample), size=(draws, len(sample)))
        drawn.append(np.asarray(sample, float)[chosen])
    return tuple(np.percentile(statistic(*drawn), [2.5, 97.5]))


def chances_of_wins(a, b):
    """Chance of each doubled number of pairs that a wins, 0 to 2 n_a n_b, were methods exchanged.

    Exact: over all ways to choose which n_a of the ranks are a's (Mann and Whitney's U).
    """
    both = np.concatenate([a, b])
    below = (both[:, None] > both).sum(1)
    ranks = 2 * below + (both[:, None] == both).sum(1) + 1  # doubled, of ties their mean
    ways = np.zeros((len(a) + 1, ranks.sum() + 1))  # to choose so many ranks of so large a sum
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :-rank]
    least = len(a) * (len(a) + 1)
    chosen = ways[-1, least : least + 2 * len(a) * len(b) + 1]
    return chosen / chosen.sum()


def permutation_p(*samples):
    """Two-sided p-value of mean_improvement = 1/2, were methods exchanged within each problem.

    Exact. With one problem it is the permutation test of Mann and Whitney's U.
    """
    nulls = [chances_of_wins(a, b) for a, b in zip(samples[::2], samples[1::2])]
    size = np.lcm.reduce([len(null) - 1 for null in nulls])
    chances = np.ones(1)  # of each sum over problems, in units of 1 / size
    for null in nulls:
        stretched = np.zeros(size + 1)
        stretched[:: size // (len(null) - 1)] = null
        chances = np.convolve(chances, stretched)
    means = np.arange(len(chances)) / (size * len(nulls))
    observed = abs(mean_improvement(*samples) - 0.5)
    return min(1.0, chances[np.abs(means - 0.5) >= observed - 1e-9].sum())


def holm(p_values):
    """Holm's correction; NaN, a comparison that was not made yet, counts as one all the same."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(np.nan_to_num(p_values, nan=1.0), kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    in_order = np.nan_to_num(p_values[order], nan=1.0) * factors
    corrected[order] = np.maximum.accumulate(in_order).clip(max=1)
    return np.where(np.isnan(p_values), np.nan, corrected)


def steps_to(steps, values, level):
    """Env steps at which a curve first reaches a level, linear between points; inf if never."""
    reached = np.flatnonzero(values >= level)
    if not len(reached):
        return np.inf
    after = reached[0]
    if after == 0:
        return steps[0]
    before = after - 1
    share = (level - values[before]) / (values[after] - values[before])
    return steps[before] + share * (steps[after] - steps[before])


def common_level(finals):
    """The highest of LEVELS that at least half of all runs of a problem end at; the lowest if none.

    It knows no methods, so it favours none.
    """
    reached = [level for level in LEVELS if np.mean(np.asarray(finals) >= level) >= 0.5]
    return max(reached, default=LEVELS[0])


def verdict(p, improved, differed):
    """What counts as shown, of a corrected p and intervals.

    improved: of the probability of improvement. differed: of the difference, one of each problem,
    since over problems differences would cancel.
    """
    if p < ALPHA and improved[0] > 0.5:
        return f"{OURS} ends higher"
    if p < ALPHA and improved[1] < 0.5:
        return f"{OURS} ends lower"
    if np.abs(differed).max() < MARGIN:
        return "alike"
    return "open"


# ========================================= comparisons ==========================================
def curve(row):
    """(env steps, values) of the metric that stands for a run, a row of runs.csv."""
    steps, values = zip(*json.loads(row["curve"]))
    return np.array(steps, float), np.array(values, float)


def ends(rows):
    """Values of that metric at the start and at the end, an array over rows each."""
    curves = [curve(row) for row in rows]
    starts = np.array([values[0] for _, values in curves])
    finals = np.array([values[-1] for _, values in curves])
    return starts, finals


def scores(rows, methods=None):
    """Normalised scores at the end, at most 1: what methods are compared by."""
    return ends(rows)[1] / 100


def quickness(rows, methods):
    """How soon runs reach the level of a problem's methods, {name: rows}: minus env steps."""
    level = common_level(np.concatenate([ends(runs)[1] for runs in methods.values()]))
    return np.array([-steps_to(*curve(row), level) for row in rows])


def find(rows):
    """{problem: {method: rows}} of the runs of the study; SystemExit if those of a cell differ."""
    by_name, cells = {row["run"]: row for row in rows}, {}
    for part, problems in PARTS.items():
        for problem, method in product(problems, OF_PART[part]):
            names = [run_name(problem, method, seed) for seed in SEEDS]
            found = [by_name[name] for name in names if name in by_name]
            if len({row["settings"] for row in found}) > 1:
                raise SystemExit(f"{names[0]} and its other seeds have unlike settings")
            if found:
                cells.setdefault(problem, {})[method] = found
    return cells


def of_part(cells, part):
    """{title: {method: rows}} of the problems and methods of a part that have runs."""
    found = {}
    for problem, method in product(PARTS[part], OF_PART[part]):
        if method in cells.get(problem, {}):
            found.setdefault(problem.title, {})[method] = cells[problem][method]
    return found


def paired(cells, problems, a, b, value=scores):
    """Values of the runs of a and of b, problem by problem; none unless all have two seeds."""
    samples = []
    for problem in problems:
        methods = cells.get(problem, {})
        both = [methods.get(name, []) for name in (a, b)]
        if min(map(len, both)) < 2:
            return []
        samples += [value(rows, methods) for rows in both]
    return samples


def estimate(statistic, samples):
    """(value, low, high) of a statistic of samples."""
    return statistic(*samples), *bootstrap(statistic, *samples)


@dataclass
class Outcome:
    """What a comparison of CC and another method came to: (value, low, high) of each measure."""

    group: str
    other: str
    made: bool = False  # whether its runs are there
    seeds: tuple = ()  # of a cell: the least and the most, where they differ
    difference: tuple = (np.nan,) * 3  # IQM of CC less IQM of the other
    of_each: list = field(default_factory=list)  # (low, high) of it on each problem
    higher: tuple = (np.nan,) * 3  # probability that CC ends higher
    faster: tuple = (np.nan,) * 3  # probability that CC reaches the level sooner
    p: float = np.nan  # of `higher`, after Holm
    verdict: str = "not run yet"


def compare(cells):
    """An Outcome of each comparison that was written down."""
    outcomes = []
    for group, other in COMPARISONS:
        problems, out = GROUPS[group][0], Outcome(group, other)
        samples = paired(cells, problems, OURS, other)
        if samples:
            out.made = True
            out.seeds = tuple(sorted({min(map(len, samples)), max(map(len, samples))}))
            out.difference = estimate(difference, samples)
            pairs = zip(samples[::2], samples[1::2])
            out.of_each = [bootstrap(difference, *pair) for pair in pairs]
            out.higher = estimate(mean_improvement, samples)
            times = paired(cells, problems, OURS, other, quickness)
            out.faster = estimate(mean_improvement, times)
            out.p = permutation_p(*samples)
        outcomes.append(out)
    for out, p in zip(outcomes, holm([out.p for out in outcomes])):
        out.p = p
        if out.made:
            out.verdict = "not complete"
        if out.seeds == (len(SEEDS),):
            out.verdict = verdict(p, out.higher[1:], out.of_each)
    return outcomes


@dataclass
class Args:
    parts: tyro.conf.Positional[list[Literal["main", "horizon", "information", "control"]]]
    """parts of the study; all without any"""
    steps: int | None = None
    """env steps of each run, instead of the study's"""


if __name__ == "__main__":
    args = tyro.cli(Args)
    print("\n".join(command_lines(args.parts or PARTS, args.steps)))
