# docs: docs/study.md#tables-and-pictures
"""Tables, learning curves and pictures of the runs in runs/.

python plot.py
    a row for each finished run in runs/ to results/runs.csv; then, from all its rows,
    results/tables.md and the figures: study_{part}.png, study_critics.png and
    study_comparisons.png of the study's runs (study.py says which), learning_curves.png of
    others; prints the table of the study's main part
python plot.py csv
    runs.csv only
python plot.py render runs/NAME
    draws the last evaluated builds (games) or episodes (others), to results/NAME.png

Start and end: the first and last held-out evaluation of a run. A run is finished if the last one is
at --total-env-steps and, where checkpoints are kept, one is newer than it. Runs are pooled over
seeds, and only if no argument but those of NOT_A_SETTING differs. Time and tokens of an episode:
eval/time (seconds) and eval/tokens (all responses). Wall time: from the first to the last event of
each event file, added up, so that a pause before --resume does not count and work done twice does.
sd: with n - 1. Scores of the study are normalised to 0..1, IQM is their interquartile mean.
Intervals: 95%, percentile bootstrap over seeds within each task. P(A > B): the share of pairs of a
seed of A and one of B in which A ends higher, a tie counting half, mean over tasks. p: two-sided
permutation test of it, corrected by Holm for all comparisons that were written down. Steps to a
level: the first crossing, linear between evaluations; a run that never does takes longer than any.
"""

import contextlib
import csv
import itertools
import json
import os
import textwrap
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

import study

ROOT = Path(__file__).resolve().parent
# What does not change what is learned
NOT_A_SETTING = ["seed", "run_name", "resume", "device", "track", "save_every", "eval_every"]
NOT_A_SETTING += ["microbatch_tokens", "gradient_checkpointing"]
TEAM = {"collm_cc": "CoLLM-CC", "collm_dc": "CoLLM-DC", "mc_baseline": "MAGRPO"}
ALONE = {"collm_cc": "AC (CC)", "collm_dc": "AC (DC)", "mc_baseline": "GRPO"}  # --num-agents 1
NAMES = [*study.METHODS, *ALONE.values()]  # each has its colour everywhere
CRITICS = ["CoLLM-CC", "CoLLM-DC"]  # methods that have one
GAMES = ["strbuild", "housebuild"]


@dataclass
class Column:
    """A column of the first table: a metric times a factor."""

    metric: str
    title: str
    factor: float = 1
    decimals: int = 1


COST = [Column("time", "time s", decimals=2), Column("tokens", "tokens", decimals=0)]
SCORE = Column("score", "score")
PASS = [Column(f"pass@{k}", f"pass@{k} %", 100) for k in (1, 4)]
ADJACENCY = Column("adjacency", "adjacency %", 100)
IOU = Column("iou", "iou %", 100)
MATCH = Column("match", "match %", 100)
FAMILIES = {  # the columns of the paper's Table 1
    "Writing": {"tldr": [SCORE], "arxiv": [SCORE]},
    "Coding": {"coding": [SCORE, *PASS]},
    "Games": {"strbuild": [SCORE, ADJACENCY, IOU], "housebuild": [SCORE, MATCH, IOU]},
}


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["all", "csv", "render"]] = "all"
    """all: rows, tables and curves; csv: rows; render: the last episodes of one run"""
    run: tyro.conf.Positional[Path | None] = None
    """run folder, for render"""
    runs: Path = Path("runs")
    """folder of run folders"""
    results: Path = Path("results")
    """folder to write to"""


# ============================================= runs =============================================
@dataclass
class Run:
    """One run folder."""

    path: Path
    args: dict
    scalars: dict = field(default_factory=dict)  # tag: {env step: value}
    texts: dict = field(default_factory=dict)  # tag: text of the last step
    wall: float = 0.0  # seconds
    last: float = 0.0  # wall-clock time of the last held-out metric

    @property
    def finished(self):
        """Whether it was evaluated at its last step, and saved after that if it saves at all."""
        saved = []
        for path in self.path.glob("checkpoint_*.pt"):
            with contextlib.suppress(FileNotFoundError):  # a run that goes on has removed it
                saved.append(path.stat().st_mtime)
        steps, _ = self.curve(self.metric)
        if not len(steps) or steps[-1] < self.args["total_env_steps"]:
            return False
        return not saved or max(saved) >= self.last

    @property
    def metric(self):
        """The tag that stands for the run: the score, or the return of a task without one."""
        return "eval/score" if "eval/score" in self.scalars else "eval/episodic_return"

    def curve(self, tag):
        """(env steps, values) of a tag, in order."""
        points = sorted(self.scalars.get(tag, {}).items())
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        return np.array(steps, float), np.array(values, float)

    def ends(self, tag):
        """(first, last) value of a tag; NaN where it was not logged."""
        _, values = self.curve(tag)
        if not len(values):
            return np.nan, np.nan
        return values[0], values[-1]

    def forget_from(self, step):
        """Drop scalars from a step on: --resume does that work again."""
        for points in self.scalars.values():
            for later in [x for x in points if x >= step]:
                del points[later]

    def add(self, event):
        """Take in one TensorBoard event."""
        if event.HasField("session_log"):  # written by --resume
            self.forget_from(event.step)
        for value in event.summary.value:
            data = make_ndarray(value.tensor).item()
            if value.metadata.plugin_data.plugin_name == "text":
                self.texts[value.tag.removesuffix("/text_summary")] = data.decode()
                continue
            self.scalars.setdefault(value.tag, {})[event.step] = data
            if value.tag.startswith("eval/"):
                self.last = event.wall_time


def read_run(path):
    """Run of a folder."""
    run = Run(path, json.loads((path / "args.json").read_text()))
    for file in sorted(path.glob("events.out.tfevents.*")):
        times = []
        for event in EventFileLoader(str(file)).Load():
            times.append(event.wall_time)
            run.add(event)
        if times:
            run.wall += max(times) - min(times)
    return run


def read_runs(folder):
    """All runs in a folder, by name."""
    return [read_run(path.parent) for path in sorted(folder.glob("*/args.json"))]


def kind(task):
    """The name of a task without its options."""
    return task.partition(":")[0]


def settings(run):
    """{name: value} of the arguments that differ from the script's defaults.

    All of them, if the script is not in this folder.
    """
    script = run.args["exp_name"]
    defaults = {}
    if (ROOT / f"{script}.py").exists():
        defaults = asdict(import_module(script).Args())
    if "num_envs" in defaults:  # None is the task's own, which args.json has
        task = import_module("climbing").envs.TASKS.get(kind(run.args["task"]))
        for name in ("num_envs", "num_turns", "total_env_steps"):
            defaults[name] = getattr(task, name, None)
    changed = {}
    for name, value in run.args.items():
        if name in ("task", "exp_name") or name in NOT_A_SETTING:
            continue
        if name not in defaults or value != defaults[name]:
            changed[name] = value
    return changed


# ============================================= rows =============================================
def alone(row):
    """Whether it is a run of a single agent."""
    return json.loads(row["settings"]).get("num_agents") == 1


def method(row):
    """Name of the method, as in the paper's tables."""
    if json.loads(row["settings"]).get("baseline") == "rloo":
        return "GRPO rloo" if alone(row) else "MC rloo"
    names = ALONE if alone(row) else TEAM
    return names.get(row["script"], row["script"])


def flags(row):
    """Settings of a row of runs.csv as text, but for those that the method's name tells."""
    words = []
    for name, value in sorted(json.loads(row["settings"]).items()):
        if (name == "num_agents" and value <= 2) or value == "rloo":
            continue
        if isinstance(value, list):
            value = " ".join(map(str, value))
        words.append(f"{name}={value}")
    return " ".join(words)


def label(row):
    """Name of the method and its settings."""
    return f"{method(row)} ({flags(row)})" if flags(row) else method(row)


def group(rows):
    """{task: {label: [row of each seed]}}; methods with the fewest settings come first."""

    def place(row):
        num_settings = flags(row).count("=")
        return row["task"], num_settings, label(row), int(row["seed"])

    groups = {}
    for row in sorted(rows, key=place):
        methods = groups.setdefault(row["task"], {})
        methods.setdefault(label(row), []).append(row)
    return groups


def flat(groups):
    """[(task, label, rows)]."""
    found = []
    for task, methods in groups.items():
        found += [(task, name, rows) for name, rows in methods.items()]
    return found


def plain(groups):
    """Of each task and method, the runs with the fewest settings."""
    shown = {}
    for task, _, rows in flat(groups):  # in order of the number of settings
        shown.setdefault(task, {}).setdefault(method(rows[0]), rows)
    return shown


def number(row, column):
    """A cell as float, NaN if it is empty."""
    return float(row.get(column) or "nan")


def start_of(row):
    """What runs of one untrained team have in common.

    All methods start alike with a seed; other code may not.
    """
    return row["seed"], row.get("start/score")


def mean_curve(curves, points=11):
    """(env steps, IQM, low, high) over seeds of [(steps, values)], on the steps that all have."""
    first = max(steps[0] for steps, _ in curves)
    last = min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, last, points)
    values = [np.interp(grid, steps, y) for steps, y in curves]
    values = np.array(values)  # (seeds, points)
    bounds = [study.bootstrap(study.iqm, column) for column in values.T]
    low, high = np.transpose(bounds)
    return grid, study.iqm(values.T), low, high


# ============================================ tables ============================================
def spread(values, decimals=1):
    """mean ± sd of what is not NaN; - if all is."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return "-"
    text = f"{values.mean():.{decimals}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{decimals}f}"
    return text


def estimate(value, low, high):
    """value [low, high]; the value alone, if there is no interval."""
    return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def table(header, rows):
    """Lines of a Markdown table."""
    lines = []
    for row in [header, ["---"] * len(header), *rows]:
        cells = " | ".join(map(str, row))
        lines.append(f"| {cells} |")
    return lines


def paper_cells(groups, tasks):
    """{(row of the table, "start" or "end"): {task: rows of runs.csv}} of the paper's Table 1."""
    starts, trained = {}, {}
    for task in tasks:
        for name, rows in groups[task].items():
            untrained = "untrained agent" if alone(rows[0]) else "untrained team"
            cells = starts.setdefault((untrained, "start"), {})
            once = cells.setdefault(task, {})
            once.update({start_of(row): row for row in rows})
            cells = trained.setdefault((name, "end"), {})
            cells[task] = rows
    for cells in starts.values():
        for task, once in cells.items():
            cells[task] = list(once.values())
    return starts | trained


def paper_row(name, side, found, columns):
    """A row of it. found: {task: rows}; columns: {task: [Column]}."""
    cells = [name]
    for task in columns:
        rows = found.get(task, [])
        for column in columns[task]:
            values = [number(row, f"{side}/{column.metric}") for row in rows]
            scaled = np.array(values) * column.factor
            cells.append(spread(scaled, column.decimals))
        cells.append(len(rows))
    return cells


def paper_table(shown):
    """The paper's Table 1: a row for each method and for what it starts from."""
    lines = []
    for family, tasks in FAMILIES.items():
        columns = {task: COST + tasks[task] for task in tasks if task in shown}
        if not columns:
            continue
        header = ["method"]
        for task in columns:
            header += [f"{task} {column.title}" for column in columns[task]]
            header.append(f"{task} n")
        cells = paper_cells(shown, columns)
        body = [paper_row(*key, found, columns) for key, found in cells.items()]
        lines += ["", f"### {family}", ""]
        lines += table(header, body)
    return lines


def run_table(groups):
    """What the runs cost, and the held-out score at their start and end."""
    header = ["task", "method", "n", "start", "end", "env steps", "wall minutes", "peak GiB"]
    lines = []
    for task, name, rows in flat(groups):
        start, end = study.ends(rows)
        minutes = [number(row, "wall_seconds") / 60 for row in rows]
        line = [task, name, len(rows), spread(start), spread(end)]
        line.append(spread([number(row, "env_steps") for row in rows], 0))
        line.append(spread(minutes))
        line.append(spread([number(row, "peak_memory_gb") for row in rows], 2))
        lines.append(line)
    return table(header, lines)


def study_table(cells, parts=tuple(study.PARTS)):
    """A row for each problem of the study, and one for all problems of a part."""
    lines = []
    for part in parts:
        shown = study.of_part(cells, part)
        for title, methods in shown.items():
            once = {start_of(row): row for rows in methods.values() for row in rows}
            start, _ = study.ends(list(once.values()))
            line = [part, title, f"{study.iqm(start) / 100:.3f}"]
            for name in study.METHODS:
                rows = methods.get(name)
                told = rows and estimate(*study.estimate(study.iqm, [study.scores(rows)]))
                line.append(f"{told} ({len(rows)})" if rows else "-")
            lines.append(line)
        if len(shown) == len(study.PARTS[part]) > 1:
            line = [part, "all", "-"]
            for name in study.METHODS:
                samples = [study.scores(x[name]) for x in shown.values() if name in x]
                whole = len(samples) == len(shown)
                line.append(estimate(*study.estimate(study.aggregate, samples)) if whole else "-")
            lines.append(line)
    return table(["part", "task", "start", *study.METHODS], lines)


def readme_table(rows):
    """That of the main part of the study, for README.md; no lines without any of its runs."""
    cells = study.find(rows)
    if not study.of_part(cells, "main"):
        return []
    lines = study_table(cells, ["main"])
    return ["|" + line.split("|", 2)[2] for line in lines]  # without the name of the part


def comparison_table(cells):
    """The comparisons that were written down before the runs."""
    lines = []
    for x in study.compare(cells):
        line = [x.group, study.OURS, x.other]
        if not x.made:
            lines.append([*line, *["-"] * 5, x.verdict])
            continue
        line += [" to ".join(map(str, x.seeds)), estimate(*x.difference), estimate(*x.higher)]
        lines.append([*line, f"{x.p:.4f}", estimate(*x.faster), x.verdict])
    header = ["group", "A", "B", "n", "IQM of A - B", "P(A > B)", "p", "P(A is faster)", "verdict"]
    return table(header, lines)


def pair_table(cells):
    """P(A > B) of every pair of methods, mean over all problems of a part."""
    lines = []
    for part, problems in study.PARTS.items():
        for a, b in itertools.combinations(study.OF_PART[part], 2):
            samples = study.paired(cells, problems, a, b)
            if samples:
                difference = study.estimate(study.difference, samples)
                higher = study.estimate(study.mean_improvement, samples)
                lines.append([part, a, b, estimate(*difference), estimate(*higher)])
    return table(["part", "A", "B", "IQM of A - B", "P(A > B)"], lines)


def level_table(cells):
    """Median env steps to fixed scores; where half of the runs never get there, more than all.

    Level: the score at which the methods of a problem are compared.
    """
    lines = []
    for problem, methods in cells.items():
        finals = np.concatenate([study.ends(rows)[1] for rows in methods.values()])
        for name, rows in methods.items():
            line = [problem.title, name, study.common_level(finals)]
            for level in study.LEVELS:
                steps = np.array([study.steps_to(*study.curve(row), level) for row in rows])
                middle = np.median(steps)  # inf where fewer than half of the runs are known
                told = f"{middle:.0f}" if middle < np.inf else f"> {problem.steps}"
                line.append(f"{told} ({np.isfinite(steps).sum()}/{len(steps)})")
            lines.append(line)
    levels = [f"score {level}" for level in study.LEVELS]
    return table(["task", "method", "level", *levels], lines)


def critic_table(groups):
    """What a critic, or a baseline, explains of the variance of returns, as a run goes on."""
    lines = []
    for task, name, rows in flat(groups):
        known = [row["explained_variance"] for row in rows if row.get("explained_variance")]
        if known:
            tenths = np.array([json.loads(values) for values in known], float)  # (seeds, 10)
            lines.append([task, name, *(spread(values, 2) for values in tenths.T)])
    return table(["task", "method", *(f"to {10 * k}%" for k in range(1, 11))], lines)


STUDY = [
    (
        "Study: scores",
        "IQM at the end, 95% interval (seeds); scores are normalised to 0..1.",
        study_table,
    ),
    (
        "Study: comparisons",
        f"Those that were written down. p is Holm's, of all {len(study.COMPARISONS)}.",
        comparison_table,
    ),
    ("Study: pairs of methods", "Each pair, over the tasks of a part; not corrected.", pair_table),
    (
        "Study: sample efficiency",
        "Median env steps to a held-out score (runs that reach it).",
        level_table,
    ),
]
SECTIONS = [
    ("Runs", "Held-out score (% of the largest reward), mean ± sd over seeds.", run_table),
    ("Explained variance", "Of each tenth of a run in training; mean ± sd.", critic_table),
]


def tables(rows):
    """The whole of tables.md."""
    groups, cells = group(rows), study.find(rows)
    found = [(title, caption, make(cells)) for title, caption, make in STUDY if cells]
    shown = study.of_part(cells, "main") or plain(groups)
    caption = "Held-out, mean ± sd over seeds; the study's runs, or those with the fewest settings."
    found.append(("Methods and tasks", caption, paper_table(shown)))
    found += [(title, caption, make(groups)) for title, caption, make in SECTIONS]
    lines = ["Written by `python plot.py`; its first lines say how each figure is defined."]
    for title, caption, body in found:
        lines += ["", f"## {title}", "", caption, "", *body]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


# ============================================= csv ==============================================
def peak_memory(run):
    """GiB; NaN if nothing was trained."""
    _, values = run.curve("charts/peak_memory_gb")
    return values.max() if len(values) else np.nan


def response_tokens(run):
    """Tokens of all responses in training: of each iteration, its rate times its seconds."""
    _, rates = run.curve("charts/tokens_per_second")
    _, rollout = run.curve("time/rollout")
    _, update = run.curve("time/update")
    return round(float((rates * (rollout + update)).sum()))


def tenths(values):
    """Means of the tenths of a run, without NaN; None where nothing is left."""
    parts = [part[~np.isnan(part)] for part in np.array_split(values, 10)]
    return [round(float(part.mean()), 3) if len(part) else None for part in parts]


def starts(run):
    """[(commit, command)] of each start, from the log that benchmark.sh keeps beside a run.

    The interpreter is named without its folder, which is nobody else's.
    """
    log = run.path.with_name(f"{run.path.name}.log")
    lines = log.read_text().splitlines() if log.exists() else []
    begun = []
    for line in lines:
        if line.startswith("+ "):
            _, commit, interpreter, words = line.split(" ", 3)
            begun.append((commit, f"{Path(interpreter).name} {words}"))
    return begun


def csv_row(run):
    """What a run was and gave, as {column: value}."""
    begun = starts(run)
    steps, scores = run.curve(run.metric)
    points = zip(steps.tolist(), scores.round(3).tolist())
    row = {
        "run": run.path.name,
        "task": run.args["task"],
        "script": run.args["exp_name"],
        "seed": run.args["seed"],
        "settings": json.dumps(settings(run)),
        # More than one commit if it was resumed
        "commit": " ".join(dict.fromkeys(commit for commit, _ in begun)),
        "command": begun[0][1] if begun else "",
        "env_steps": int(steps[-1]),
        "wall_seconds": round(run.wall, 1),
        "response_tokens": response_tokens(run),
        "peak_memory_gb": round(peak_memory(run), 3),
        "curve": json.dumps(list(points)),
        "explained_variance": json.dumps(tenths(run.curve("losses/explained_variance")[1])),
    }
    metrics = [tag for tag in run.scalars if tag.startswith("eval/") and "/turn_" not in tag]
    for side, name in enumerate(("start", "end")):
        for tag in sorted(metrics):
            row[f"{name}/{tag.removeprefix('eval/')}"] = run.ends(tag)[side]
    return row


def read_csv(path):
    """Rows of runs.csv; none if there is no such file."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_csv(runs, path):
    """Replace the rows of these runs; rows of runs that are not here any more stay."""
    here = [run.path.name for run in runs]
    rows = [row for row in read_csv(path) if row["run"] not in here]
    rows += [csv_row(run) for run in runs if run.finished]
    columns = {}  # a dict, to keep their order
    for row in rows:
        columns |= dict.fromkeys(row)
    partial = path.with_suffix(f".{os.getpid()}.tmp")  # two sweeps may write at once
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["run"]))
    partial.replace(path)


# =========================================== pictures ===========================================
def colour(k):
    """The k-th colour of curves and blocks."""
    return matplotlib.colormaps["tab10"](k % 10)


def colour_of(name):
    """The colour of a method."""
    return colour(NAMES.index(name) if name in NAMES else len(NAMES))


def legend_beside(figure, axes):
    """One legend for all panels, to their right."""
    entries = {}  # a dict, to name each method once
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(name, handle)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
    figure.legend(entries.values(), entries, **place)


def critic_curve(row):
    """(env steps, explained variance) of the tenths of a run, each at its middle."""
    middles = (np.arange(10) + 0.5) / 10 * number(row, "env_steps")
    values = np.array(json.loads(row["explained_variance"]), float)
    known = ~np.isnan(values)
    return middles[known], values[known]


def draw_curves(shown, path, curve=study.curve, name_of_y="held-out score, %", limits=None):
    """{title: {method: rows}}: one panel for each title; IQM over seeds and its 95% interval.

    curve gives (env steps, values) of a row; limits are of these values.
    """
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    size = 3.6 * columns, 2.8 * height
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (title, methods) in zip(axes.flat, shown.items()):
        for name, rows in methods.items():
            steps, middle, low, high = mean_curve([curve(row) for row in rows])
            look = {"color": colour_of(name), "linewidth": 1.8, "marker": "o", "markersize": 3}
            axis.plot(steps, middle, label=name, **look)
            axis.fill_between(steps, low, high, color=colour_of(name), alpha=0.2, linewidth=0)
        counts = sorted({len(rows) for rows in methods.values()})
        seeds = " to ".join(map(str, counts[:: max(1, len(counts) - 1)]))
        axis.set(title=f"{title}, n = {seeds}", xlabel="env steps", ylabel=name_of_y)
        axis.set_ylim(limits)
        axis.grid(alpha=0.3)
    legend_beside(figure, axes.flat)
    save(figure, path)


def draw_comparisons(made, path):
    """P(CC ends higher) of each comparison, with its interval."""
    figure, axis = plt.subplots(figsize=(5.2, 0.9 + 0.26 * len(made)))
    for k, x in enumerate(made):
        (chance, low, high), look = x.higher, {"color": colour_of(x.other)}
        axis.plot([low, high], [k, k], label=x.other, linewidth=2.5, **look)
        axis.plot(chance, k, "o", markerfacecolor=None if x.p < study.ALPHA else "white", **look)
    axis.set_yticks(range(len(made)), [x.group for x in made])
    axis.invert_yaxis()
    axis.axvline(0.5, color="black", linewidth=0.8)
    title = f"{study.OURS} against the method of the colour\nfilled: p < {study.ALPHA} after Holm"
    axis.set(xlim=(-0.02, 1.02), xlabel=f"P({study.OURS} ends higher)")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    legend_beside(figure, [axis])
    save(figure, path)


def draw_all(rows, folder):
    """Figures of each part of the study, its critics, its comparisons, and of the other runs."""
    cells = study.find(rows)
    for part in study.PARTS:
        shown = study.of_part(cells, part)
        if shown:
            draw_curves(shown, folder / f"study_{part}.png")
    critics = {}
    for problem, methods in cells.items():
        for name in CRITICS:
            known = [row for row in methods.get(name, []) if len(critic_curve(row)[0])]
            if known:
                critics.setdefault(problem.title, {})[name] = known
    if critics:
        look = "explained variance", (-0.2, 1)
        draw_curves(critics, folder / "study_critics.png", critic_curve, *look)
    made = [x for x in study.compare(cells) if x.made]
    if made:
        draw_comparisons(made, folder / "study_comparisons.png")
    in_study = {row["run"] for methods in cells.values() for x in methods.values() for row in x}
    others = [row for row in rows if row["run"] not in in_study]
    if others:
        draw_curves(plain(group(others)), folder / "learning_curves.png")


def read_build(text):
    """What a game's render drew: ({character: block}, [line of [(target row, result row)]])."""
    *lines, legend = [line for line in text.splitlines() if line]
    blocks = dict(entry.split(" ", 1) for entry in legend.split(", "))
    rows = []
    for line in lines:
        layers = line.split("  ")
        rows.append([tuple(layer.split("|")) for layer in layers])
    return blocks, rows


def build_codes(rows, codes):
    """Numbers to colour, (cells of height, cells of width): target, gap, result; gaps are -1."""
    cells = []
    for row in rows:
        line = []
        for target, result in row:
            line += [codes[char] for char in target] + [-1]
            line += [codes[char] for char in result] + [-1, -1, -1]
        cells.append(line)
    return np.array(cells[::-1])


def draw_build(axis, text, names):
    """Coloured cells: of each layer the target and, to its right, the result.

    names[k] has the k-th colour.
    """
    legend, rows = read_build(text)
    codes = {char: 1 + names.index(name) for char, name in legend.items()}
    colours = ["#e8e8e8"]  # air
    for k, name in enumerate(names):
        colours.append("#333333" if name == "#" else colour(k))
    numbers = build_codes(rows, codes | {".": 0})
    grid = np.ma.masked_less(numbers, 0)
    look = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(names) + 0.5}
    axis.pcolormesh(grid, edgecolors="white", linewidth=0.8, **look)
    axis.set_aspect("equal")
    patches = []
    for char, name in legend.items():
        patches.append(Patch(color=colours[codes[char]], label=name))
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axis.legend(handles=patches, fontsize=7, frameon=False, **place)


def draw_builds(texts):
    """Figure of what was built at the end of each episode."""
    # The build follows the last reward; texts of the agents, which may say anything, are before it
    ends = [text.rpartition("=== reward ")[2].partition("\n") for text in texts]
    names = {}  # a dict, to keep their order
    for _, _, build in ends:
        legend, _ = read_build(build)
        names |= dict.fromkeys(legend.values())
    size = 9, 1.7 * len(ends)
    figure, axes = plt.subplots(len(ends), figsize=size, squeeze=False)
    for axis, (reward, _, build) in zip(axes.flat, ends):
        draw_build(axis, build, list(names))
        axis.set_title(f"target beside result, reward {reward}", fontsize=8, loc="left")
    return figure


def wrapped(text, width=90):
    """The text with long lines broken."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, width, drop_whitespace=False) or [""]
    return "\n".join(lines)


def draw_texts(texts):
    """Figure of whole episodes as text, two beside each other."""
    pages = [f"episode {k}\n\n{wrapped(text)}" for k, text in enumerate(texts)]
    pairs = [pages[k : k + 2] for k in range(0, len(pages), 2)]
    num_lines = 0
    for pair in pairs:
        num_lines += 3 + max(page.count("\n") for page in pair)
    size = 11, 0.5 + 0.118 * num_lines
    figure, axes = plt.subplots(len(pairs), 2, figsize=size, squeeze=False)
    look = {"family": "monospace", "fontsize": 7, "va": "top", "parse_math": False}
    for axis, page in zip(axes.flat, pages):
        axis.text(0, 1, page, transform=axis.transAxes, **look)
    return figure


def draw_episodes(run, path):
    """The last evaluated episodes: of a game what was built at the end, else the whole text."""
    tags = [tag for tag in sorted(run.texts) if tag.startswith("episodes/")]
    texts = [textwrap.dedent(run.texts[tag]) for tag in tags]
    if not texts:
        raise SystemExit(f"{run.path}: no evaluated episode was logged")
    draw = draw_builds if kind(run.args["task"]) in GAMES else draw_texts
    figure = draw(texts)
    for axis in figure.axes:
        axis.axis("off")
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG."""
    figure.tight_layout()
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


# ============================================= main =============================================
def main(args):
    """Do what the command line says."""
    args.results.mkdir(parents=True, exist_ok=True)
    if args.action == "render":
        if args.run is None or not (args.run / "args.json").exists():
            raise SystemExit(f"render {args.run}: must be a run folder, e.g. runs/NAME")
        name = args.run.resolve().name
        draw_episodes(read_run(args.run), args.results / f"{name}.png")
        return
    runs = read_runs(args.runs)
    write_csv(runs, args.results / "runs.csv")
    if args.action == "csv":
        return
    for run in runs:
        if not run.finished:
            print(f"left out, not finished: {run.path}")
    rows = read_csv(args.results / "runs.csv")
    if not rows:
        raise SystemExit(f"--runs {args.runs}: no finished run is in there")
    (args.results / "tables.md").write_text(tables(rows))
    draw_all(rows, args.results)
    print(*readme_table(rows), sep="\n")
    print(f"written: {args.results}/tables.md and figures")


if __name__ == "__main__":
    matplotlib.use("Agg")  # no window, and no display needed
    main(tyro.cli(Args))
