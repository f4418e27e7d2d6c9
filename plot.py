# docs: README.md#plotpy
"""Tables, learning curves and pictures of the runs in runs/.

python plot.py                  a row for each finished run in runs/ to results/runs.csv, then, from all its rows,
                                results/learning_curves.png and results/tables.md
python plot.py csv              runs.csv only
python plot.py render runs/NAME draws the last evaluated builds (games) or episodes (others), to results/NAME.png

Definitions. Start and end: the first and last held-out evaluation of a run (temperature 1). A run is finished if the
last one is at --total-env-steps and, where checkpoints are kept, one is newer than it. Runs are pooled over seeds, and
only if no argument but NOT_A_SETTING differs. Time and tokens of an episode: eval/time (seconds) and eval/tokens (all
responses). Wall time: from the first to the last event of each event file, added up, so that a pause before --resume
does not count and work done twice does. sd: with n - 1. Intervals: 95%, percentile bootstrap of the mean over seeds;
with three seeds they are too narrow. P(A > B), the probability of improvement of Agarwal et al. (2021): the share of
pairs of a seed of A and one of B in which A ends higher, a tie counting half. Steps to a level: the first crossing,
linear between evaluations. Curves and the first table show, of each method, the runs with the fewest settings.
"""

import csv
import itertools
import json
import textwrap
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).resolve().parent
# What does not change what is learned
NOT_A_SETTING = ("seed", "run_name", "resume", "device", "agent_devices", "track", "save_every")
METHODS = {"collm_cc": "CoLLM-CC", "collm_dc": "CoLLM-DC", "mc_baseline": "MAGRPO"}
ALONE = {"collm_cc": "AC (CC)", "collm_dc": "AC (DC)", "mc_baseline": "GRPO"}  # with --num-agents 1
COST = [("time", "time s", 1, 2), ("tokens", "tokens", 1, 0)]  # metric, column, factor, decimals
SCORE = ("score", "score", 1, 1)
ADJACENCY, IOU, MATCH = ((name, f"{name} %", 100, 1) for name in ("adjacency", "iou", "match"))
FAMILIES = {  # the columns of the paper's Table 1
    "Writing": {"tldr": [SCORE], "arxiv": [SCORE]},
    "Coding": {"coding": [SCORE, *((f"pass@{k}", f"pass@{k} %", 100, 1) for k in (1, 4))]},
    "Games": {"strbuild": [SCORE, ADJACENCY, IOU], "housebuild": [SCORE, MATCH, IOU]},
}
LEVELS = (50, 60, 70, 80, 90)  # of the score, for steps to a level
NOISE = ("losses/grad_norm", "losses/advantage_variance", "losses/explained_variance")


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["all", "csv", "render"]] = "all"
    """all: rows, tables and learning curves; csv: a row for each finished run; render: the last episodes of one run"""
    run: tyro.conf.Positional[Path | None] = None
    """run folder, for render"""
    runs: Path = Path("runs")
    """folder of run folders"""
    results: Path = Path("results")
    """folder to write to"""


# ==================================================== runs ====================================================
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
        """Whether it was evaluated at its last step and the checkpoint that follows (if any is kept) was written."""
        saved = [path.stat().st_mtime for path in self.path.glob("checkpoint_*")]
        done = max(self.scalars.get(self.metric, {-1: 0})) >= self.args["total_env_steps"]
        return done and (not saved or max(saved) >= self.last)

    @property
    def metric(self):
        """The tag that stands for the run: the score, or the return of a task without one."""
        return "eval/score" if "eval/score" in self.scalars else "eval/episodic_return"

    def curve(self, tag):
        """(env steps, values) of a tag, in order."""
        points = sorted(self.scalars.get(tag, {}).items())
        return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)

    def ends(self, tag):
        """(first, last) value of a tag; NaN where it was not logged."""
        values = self.curve(tag)[1]
        return (values[0], values[-1]) if len(values) else (np.nan, np.nan)


def read_run(path):
    """Run of a folder. What a resumed run did after its checkpoint is dropped, because it has been done again."""
    run = Run(path, json.loads((path / "args.json").read_text()))
    for file in sorted(path.glob("events.out.tfevents.*")):
        times = []
        for event in EventFileLoader(str(file)).Load():
            times.append(event.wall_time)
            if event.HasField("session_log"):  # written by --resume
                run.scalars = {k: {x: y for x, y in v.items() if x < event.step} for k, v in run.scalars.items()}
            for value in event.summary.value:
                data = make_ndarray(value.tensor)
                if value.metadata.plugin_data.plugin_name == "text":
                    run.texts[value.tag.removesuffix("/text_summary")] = data.item().decode()
                else:
                    run.scalars.setdefault(value.tag, {})[event.step] = data.item()
                    run.last = event.wall_time if value.tag.startswith("eval/") else run.last
        run.wall += max(times, default=0) - min(times, default=0)
    return run


def read_runs(folder):
    """All runs in a folder, by name."""
    return [read_run(path.parent) for path in sorted(folder.glob("*/args.json"))]


def settings(run):
    """{name: value} of the arguments that differ from the script's defaults; all if the script is not here."""
    known = (ROOT / f"{run.args['exp_name']}.py").exists()
    script = import_module(run.args["exp_name"]) if known else None
    defaults = asdict(script.Args()) if known else {}
    if "num_envs" in defaults:  # None is the task's own, which args.json has
        defaults["num_envs"] = script.envs.TASKS.get(run.args["task"], script.envs.Task).num_envs
    named = {k: v for k, v in run.args.items() if k not in ("task", "exp_name", *NOT_A_SETTING)}
    return {k: v for k, v in named.items() if k not in defaults or v != defaults[k]}


def flags(row):
    """Settings of a row of runs.csv as text, but for --num-agents, which is a part of the method's name."""
    named = {k: v for k, v in json.loads(row["settings"]).items() if k != "num_agents"}
    return " ".join(f"{k}={' '.join(v) if isinstance(v, list) else v}" for k, v in sorted(named.items()))


def alone(row):
    """Whether it is a run of a single agent."""
    return json.loads(row["settings"]).get("num_agents") == 1


def label(row):
    """Name of the method, as in the paper's tables, and its settings."""
    name = (ALONE if alone(row) else METHODS).get(row["script"], row["script"])
    return f"{name} ({flags(row)})" if flags(row) else name


def group(rows):
    """{task: {label: [row of each seed]}}."""
    groups = {}
    for row in sorted(rows, key=lambda row: (row["task"], flags(row).count("="), label(row), int(row["seed"]))):
        groups.setdefault(row["task"], {}).setdefault(label(row), []).append(row)
    return groups


def flat(groups):
    """[(task, label, rows)]."""
    return [(task, method, rows) for task, methods in groups.items() for method, rows in methods.items()]


def number(row, column):
    """A cell as float, NaN if it is empty."""
    return float(row.get(column) or "nan")


def curve(row):
    """(env steps, values) of the metric that stands for a run."""
    points = np.array(json.loads(row["curve"]), float)  # (evaluations, 2)
    return points[:, 0], points[:, 1]


def ends(rows):
    """Values of that metric at the start and at the end, (2, rows)."""
    return np.array([curve(row)[1][[0, -1]] for row in rows]).T


# ================================================= statistics =================================================
def start_of(row):
    """What runs of one untrained team have in common: all methods start alike with a seed, other code may not."""
    return row["seed"], row.get("start/score")


def bootstrap(statistic, *samples, draws=5000, seed=0):
    """95% percentile interval of statistic(*samples), each sample drawn anew with replacement; NaN below two values.
    statistic gets arrays (draws, n) and gives (draws,)."""
    if min(map(len, samples)) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = [np.asarray(x, float)[rng.integers(len(x), size=(draws, len(x)))] for x in samples]
    return tuple(np.percentile(statistic(*drawn), [2.5, 97.5]))


def difference(a, b):
    """Mean of a less mean of b, over the last axis."""
    return np.mean(a, -1) - np.mean(b, -1)


def improvement(a, b):
    """Probability of improvement P(a > b), over the last axis."""
    a, b = np.asarray(a)[..., :, None], np.asarray(b)[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def steps_to(steps, values, level):
    """Env steps at which a curve first reaches a level, NaN if never."""
    if not (values >= level).any():
        return np.nan
    at = int(np.argmax(values >= level))
    if at == 0:
        return steps[0]
    share = (level - values[at - 1]) / (values[at] - values[at - 1])
    return steps[at - 1] + share * (steps[at] - steps[at - 1])


def mean_curve(curves, points=100):
    """(env steps, mean, low, high) over seeds of [(steps, values)], on a grid over the steps that all of them have."""
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), points)
    values = np.array([np.interp(grid, x, y) for x, y in curves])  # (seeds, points)
    bounds = np.array([bootstrap(lambda sample: sample.mean(-1), column) for column in values.T])  # (points, 2)
    return grid, values.mean(0), bounds[:, 0], bounds[:, 1]


# =================================================== tables ===================================================
def spread(values, decimals=1):
    """mean ± sd of what is not NaN; - if all is."""
    values = np.asarray(values, float)[~np.isnan(values)]
    if not len(values):
        return "-"
    sd = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{sd}"


def interval(low, high):
    """[low, high], or - if there is none."""
    return "-" if np.isnan(low) else f"[{low:.2f}, {high:.2f}]"


def table(header, rows):
    """Lines of a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]


def plain(groups):
    """Of each task and method, the runs with the fewest settings."""
    shown = {}
    for task, methods in groups.items():
        for name, rows in methods.items():  # in order of the number of settings
            base = name.removesuffix(f" ({flags(rows[0])})")
            shown.setdefault(task, {}).setdefault(base, rows)
    return shown


def paper_table(groups):
    """The paper's Table 1: a row for each method, trained, and for what they start from; columns for each task."""
    lines, groups = [], plain(groups)
    for family, tasks in FAMILIES.items():
        tasks = {task: [*COST, *columns] for task, columns in tasks.items() if task in groups}
        cells = {}  # (row of the table, start or end) -> task -> key -> row of runs.csv
        for task in tasks:
            for method, rows in groups[task].items():
                untrained = "untrained agent" if alone(rows[0]) else "untrained team"
                starts = cells.setdefault((untrained, "start"), {}).setdefault(task, {})
                starts.update({start_of(row): row for row in rows})
                cells.setdefault((method, "end"), {})[task] = {row["run"]: row for row in rows}
        header = ["method", *(f"{t} {c[1]}" for t, cs in tasks.items() for c in [*cs, ("", "n")])]
        table_rows = []
        for name, side in sorted(cells, key=lambda cell: cell[1] == "end"):
            table_rows.append([name])
            for task, columns in tasks.items():
                rows = cells[name, side].get(task, {}).values()
                for metric, _, factor, decimals in columns:
                    table_rows[-1].append(spread([number(row, f"{side}/{metric}") * factor for row in rows], decimals))
                table_rows[-1].append(len(rows))
        lines += ["", f"### {family}", "", *table(header, table_rows)] if table_rows else []
    return lines


def run_table(groups):
    """What the runs cost, and the held-out score at their start and end."""
    header = ["task", "method", "n", "start", "end", "env steps", "wall minutes", "peak memory GiB"]
    columns = [("env_steps", 1, 0), ("wall_seconds", 1 / 60, 1), ("peak_memory_gb", 1, 2)]
    lines = []
    for task, method, rows in flat(groups):
        cells = [spread([number(row, name) * factor for row in rows], decimals) for name, factor, decimals in columns]
        lines.append([task, method, len(rows), *(spread(side, 2) for side in ends(rows)), *cells])
    return table(header, lines)


def setting_table(groups):
    """A row for each task and settings, a column for each method: n in brackets."""
    starts, cells = {}, {}
    for task, _, rows in flat(groups):
        key = task, " ".join(["one agent"] * alone(rows[0]) + [flags(rows[0])]).strip() or "default"
        starts.setdefault(key, {}).update({start_of(row): ends([row])[0, 0] for row in rows})
        cells.setdefault(key, {})[rows[0]["script"]] = f"{spread(ends(rows)[1])} ({len(rows)})"
    keys = sorted(cells, key=lambda key: (key[0], key[1] != "default"))
    lines = [[*key, spread(list(starts[key].values())), *(cells[key].get(x, "-") for x in METHODS)] for key in keys]
    return table(["task", "settings", "start", *METHODS.values()], lines)


def pair_table(groups):
    """Every pair of methods of a task with the same settings."""
    lines = []
    for task, methods in groups.items():
        for (a, x), (b, y) in itertools.combinations(methods.items(), 2):
            if flags(x[0]) == flags(y[0]):
                final = ends(x)[1], ends(y)[1]
                lines.append([task, a, b, f"{len(x)}, {len(y)}"])
                for statistic in (difference, improvement):
                    lines[-1] += [f"{statistic(*final):.2f}", interval(*bootstrap(statistic, *final))]
    return table(["task", "A", "B", "n", "end of A - B", "95%", "P(A > B)", "95%"], lines)


def level_table(groups):
    """Env steps to reach fixed scores, mean ± sd over the seeds that do."""
    lines = []
    for task, method, rows in flat(groups):
        lines.append([task, method])
        for level in LEVELS:
            steps = np.array([steps_to(*curve(row), level) for row in rows])
            lines[-1].append(f"{spread(steps, 0)} ({(~np.isnan(steps)).sum()}/{len(rows)})")
    return table(["task", "method", *(f"score {level}" for level in LEVELS)], lines)


def noise_table(groups):
    """How large gradients and advantages are, how much they vary from one iteration to the next within a run, and how
    much of the returns the critic explains."""
    lines = []
    for task, method, rows in flat(groups):
        for tag in NOISE:
            values = [[number(row, f"{moment}/{tag}") for row in rows] for moment in ("mean", "variance")]
            if not np.isnan(values).all():
                lines.append([task, method, tag, *(spread(column, 3) for column in values)])
    return table(["task", "method", "scalar", "mean", "variance over iterations"], lines)


def tables(groups):
    """The whole of tables.md."""
    text = [
        ("Methods and tasks", "Held-out, mean ± sd over n seeds; of a method, runs with fewest settings.", paper_table),
        ("Runs", "Held-out score (% of the largest reward).", run_table),
        ("Settings", "Score at the start and at the end (seeds).", setting_table),
        ("Pairs of methods", "Score at the end, methods with the same settings.", pair_table),
        ("Sample efficiency", "Env steps to a held-out score (seeds that reach it / seeds).", level_table),
        ("Variance", "Mean and variance over the iterations of a run; of them, mean ± sd over seeds.", noise_table),
    ]
    lines = ["Written by `python plot.py`; its first lines say how each figure is defined."]
    for title, caption, make in text:
        lines += ["", f"## {title}", "", caption, "", *make(groups)]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


# ===================================================== csv ====================================================
def peak_memory(run):
    """GiB; NaN if nothing was trained."""
    return max(run.scalars.get("charts/peak_memory_gb", {0: np.nan}).values())


def csv_row(run):
    """What a run was and gave, as {column: value}. Commit and command are in the log that benchmark.sh keeps of it."""
    log = run.path.with_suffix(run.path.suffix + ".log")
    lines = log.read_text().splitlines() if log.exists() else []
    starts = [line.split(" ", 2) for line in lines if line.startswith("+ ")]
    rate, *seconds = (run.curve(tag)[1] for tag in ("charts/tokens_per_second", "time/rollout", "time/update"))
    row = {
        "run": run.path.name,
        "task": run.args["task"],
        "script": run.args["exp_name"],
        "seed": run.args["seed"],
        "settings": json.dumps(settings(run)),
        "commit": " ".join(dict.fromkeys(commit for _, commit, _ in starts)),  # more than one if it was resumed
        "command": starts[0][2] if starts else "",
        "env_steps": max(run.scalars[run.metric]),
        "wall_seconds": round(run.wall, 1),
        "response_tokens": round(float((rate * sum(seconds)).sum())) if len(rate) else 0,
        "peak_memory_gb": round(peak_memory(run), 3),
    }
    row["curve"] = json.dumps(
        [[step, round(value, 3)] for step, value in zip(*(x.tolist() for x in run.curve(run.metric)))]
    )
    for tag in NOISE:
        values = run.curve(tag)[1]
        values = values[~np.isnan(values)]
        if len(values):
            row |= {f"mean/{tag}": values.mean(), f"variance/{tag}": values.var()}
    tags = sorted(tag for tag in run.scalars if tag.startswith("eval/") and "/turn_" not in tag)
    return row | {f"{side}/{tag[5:]}": run.ends(tag)[k] for k, side in enumerate(("start", "end")) for tag in tags}


def read_csv(path):
    """Rows of runs.csv; none if there is no such file."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_csv(runs, path):
    """Replace the rows of these runs; rows of runs that are not here any more stay."""
    rows = {row["run"]: row for row in read_csv(path)}
    rows = {name: row for name, row in rows.items() if name not in {run.path.name for run in runs}}
    rows |= {run.path.name: csv_row(run) for run in runs if run.finished}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    partial.replace(path)


# ================================================== pictures ==================================================
def draw_curves(groups, path):
    """One panel for each task; mean over seeds and its 95% interval."""
    shown = plain(groups)
    names = list(dict.fromkeys(name for methods in shown.values() for name in methods))
    colours = {name: matplotlib.colormaps["tab10"](k % 10) for k, name in enumerate(names)}
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(3.6 * columns + 0.6, 2.8 * height + 0.6), squeeze=False)
    for axis, (task, methods) in itertools.zip_longest(axes.flat, shown.items(), fillvalue=("", {})):
        if not methods:
            axis.axis("off")
            continue
        for name, rows in methods.items():
            x, mean, low, high = mean_curve([curve(row) for row in rows])
            axis.plot(x, mean, color=colours[name], label=f"{name}, n = {len(rows)}", linewidth=1.8)
            axis.fill_between(x, low, high, color=colours[name], alpha=0.2, linewidth=0)
        axis.set(title=task, xlabel="env steps", ylabel="held-out score, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="best")
    save(figure, path)


def read_build(text):
    """({character: block}, [[(target row, result row) of each layer] of each line]) of what a game's render drew."""
    *lines, legend = [line for line in text.splitlines() if line]
    rows = [[tuple(part.split("|")) for part in line.split("  ")] for line in lines]
    return dict(entry.split(" ", 1) for entry in legend.split(", ")), rows


def draw_build(axis, text, names):
    """Coloured cells: of each layer the target and, to its right, the result; names[k] has the k-th colour."""
    legend, rows = read_build(text)
    codes = {".": 0} | {char: 1 + names.index(name) for char, name in legend.items()}
    gap, cells = [-1], []  # not drawn
    for row in rows:
        cells.append([])
        for target, result in row:
            cells[-1] += [codes[c] for c in target] + gap + [codes[c] for c in result] + 3 * gap
    colours = [
        "#e8e8e8",
        *("#333333" if x == "#" else matplotlib.colormaps["tab10"](names.index(x) % 10) for x in names),
    ]
    grid = np.ma.masked_less(np.array(cells)[::-1], 0)
    colormap = matplotlib.colors.ListedColormap(colours)
    axis.pcolormesh(grid, cmap=colormap, vmin=-0.5, vmax=len(names) + 0.5, edgecolors="white", linewidth=0.8)
    axis.set_aspect("equal")
    patches = [matplotlib.patches.Patch(color=colours[k], label=legend[char]) for char, k in codes.items() if k]
    axis.legend(handles=patches, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_episodes(run, path):
    """The last evaluated episodes: of a game what was built at the end, else the whole text."""
    texts = [textwrap.dedent(run.texts[tag]) for tag in sorted(run.texts) if tag.startswith("episodes/")]
    if not texts:
        raise SystemExit(f"{run.path}: no evaluated episode was logged")
    if run.args["task"] in FAMILIES["Games"]:
        # The build follows the last reward; texts of the agents, which may say anything, are before it
        ends = [text.rpartition("=== reward ")[2].partition("\n") for text in texts]
        figure, axes = plt.subplots(len(ends), figsize=(9, 1.7 * len(ends)), squeeze=False)
        names = list(dict.fromkeys(name for *_, build in ends for name in read_build(build)[0].values()))
        for axis, (reward, _, build) in zip(axes.flat, ends):
            draw_build(axis, build, names)
            axis.set_title(f"target beside result, reward {reward}", fontsize=8, loc="left")
    else:
        pages = [
            [part for line in text.splitlines() for part in textwrap.wrap(line, 90, drop_whitespace=False) or [""]]
            for text in texts
        ]
        size = (11, 0.5 + 0.118 * sum(max(map(len, pages[k : k + 2])) + 4 for k in range(0, len(pages), 2)))
        figure, axes = plt.subplots(-(-len(pages) // 2), 2, figsize=size, squeeze=False)
        for k, (axis, page) in enumerate(zip(axes.flat, pages)):
            options = {"family": "monospace", "fontsize": 7, "va": "top", "parse_math": False}
            axis.text(0, 1, "\n".join([f"episode {k}", "", *page]), transform=axis.transAxes, **options)
    for axis in axes.flat:
        axis.axis("off")
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG."""
    figure.tight_layout()
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


# ==================================================== main ====================================================
def main(args):
    """Do what the command line says."""
    args.results.mkdir(parents=True, exist_ok=True)
    if args.action == "render":
        if args.run is None or not (args.run / "args.json").exists():
            raise SystemExit(f"render {args.run}: must be a run folder, e.g. runs/NAME")
        draw_episodes(read_run(args.run), args.results / f"{args.run.resolve().name}.png")
        return
    runs = read_runs(args.runs)
    write_csv(runs, args.results / "runs.csv")
    if args.action == "csv":
        return
    for run in runs:
        if not run.finished:
            print(f"left out, not finished: {run.path}")
    groups = group(read_csv(args.results / "runs.csv"))
    if not groups:
        raise SystemExit(f"--runs {args.runs}: no finished run is in there")
    (args.results / "tables.md").write_text(tables(groups))
    draw_curves(groups, args.results / "learning_curves.png")
    print(f"written: {args.results}/learning_curves.png and {args.results}/tables.md")


if __name__ == "__main__":
    matplotlib.use("Agg")  # no window, and no display needed
    main(tyro.cli(Args))
