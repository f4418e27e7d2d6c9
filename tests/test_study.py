"""study.py, and the tables and figures of its runs, on made-up runs with known numbers."""

import csv
import itertools
import json

import numpy as np
import pytest

import climbing  # noqa: F401
import envs
import plot
import study

# =========================================== protocol ===========================================
PROBLEMS = list(dict.fromkeys(x for part in study.PARTS.values() for x in part))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_curve_has_ten_points_at_least(problem):
    task = envs.make(problem.task, num_turns=problem.turns)
    iterations = -(-problem.steps // (task.num_envs * task.num_turns))  # none ends early
    points = [0, *range(problem.eval_every, iterations, problem.eval_every), iterations]
    assert len(points) - 1 >= 10
    gaps = np.diff(points)
    assert set(gaps[:-1]) == {problem.eval_every}


def test_problems_that_parts_share_are_played_once():
    lines = study.command_lines(study.PARTS)
    assert len(lines) == len(set(lines)) == 48
    alone = [study.command_lines([part]) for part in study.PARTS]
    assert sum(map(len, alone)) - len(lines) == 3  # strbuild with four turns
    shown, private = (study.command_lines(["information"])[k : k + 6] for k in (0, 6))
    for line, other in zip(shown, private):  # the same items
        task, dataset = line.split()[1], line.split("--dataset ")[1].split()[0]
        assert other == line.replace(task, f"{task}:private", 1).replace(
            f"--dataset {dataset} ", ""
        )
        both = envs.make(task, dataset=dataset), envs.make(f"{task}:private")
        rows, same = ([x | {"place": None} for x in game.train] for game in both)
        assert rows == same
    (line, *_) = study.command_lines(["control"], steps=100)
    assert line == "collm_cc climbing --total-env-steps 100 --eval-every 1"
    assert study.CODING.flags(3072) == "--total-env-steps 3072 --eval-every 2"


def test_comparisons_are_of_methods_that_are_run():
    for name, other in study.COMPARISONS:
        for problem in study.GROUPS[name][0]:
            parts = [part for part in study.PARTS if problem in study.PARTS[part]]
            assert any({study.OURS, other} <= set(study.OF_PART[part]) for part in parts)


# ========================================== statistics ==========================================
def naive_improvement(a, b):
    return sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b) / (len(a) * len(b))


def naive_iqm(values):
    values = sorted(values)
    cut = int(0.25 * len(values))
    values = values[cut : len(values) - cut]
    return sum(values) / len(values)


def test_statistics_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c, d = (rng.integers(0, 5, n) for n in (4, 3, 7, 5))
        assert study.improvement(a, b) == pytest.approx(naive_improvement(a, b))
        both = (naive_improvement(a, b) + naive_improvement(c, d)) / 2
        assert study.mean_improvement(a, b, c, d) == pytest.approx(both)
        assert study.iqm(c) == pytest.approx(naive_iqm(c))
        assert study.aggregate(a, c) == pytest.approx(naive_iqm([*a, *c]))
        gap = naive_iqm([*a, *c]) - naive_iqm([*b, *d])
        assert study.difference(a, b, c, d) == pytest.approx(gap)
    batch = study.improvement(np.array([[1, 2], [3, 3]]), np.array([[0, 5, 2], [3, 3, 3]]))
    assert batch == pytest.approx([naive_improvement([1, 2], [0, 5, 2]), 0.5])
    assert study.iqm(np.arange(20).reshape(2, 10)).tolist() == [4.5, 14.5]  # two go at each end
    assert study.improvement([-np.inf], [-np.inf]) == 0.5  # neither ever reached a level


@pytest.mark.parametrize("statistic", ["iqm", "difference", "mean_improvement"])
def test_bootstrap_against_all_resamples(statistic):
    """Three seeds have 27 resamples: their percentiles are what the bootstrap must come to."""
    samples = [np.array([1.0, 4.0, 6.5]), np.array([3.0, 3.5, 0.0])]
    if statistic == "iqm":
        samples = samples[:1]
    measure = getattr(study, statistic)
    every = [list(itertools.product(x, repeat=3)) for x in samples]
    exact = [measure(*map(np.array, drawn)) for drawn in itertools.product(*every)]
    bounds = study.bootstrap(measure, *samples, draws=20000)
    assert np.allclose(bounds, np.percentile(exact, [2.5, 97.5], method="inverted_cdf"), atol=0.2)
    assert bounds == study.bootstrap(measure, *samples, draws=20000)  # seeded


def test_bootstrap_is_stratified():
    """Tasks whose seeds do not differ have no interval, however much the tasks do."""
    assert study.bootstrap(study.aggregate, [1.0] * 5, [9.0] * 5) == (5.0, 5.0)


def test_one_seed_has_no_interval():
    assert np.isnan(study.bootstrap(study.iqm, [1.0])).all()
    assert plot.estimate(*study.estimate(study.difference, [[1.0], [1.0, 2.0]])) == "-0.500"


def exact_p(*pairs):
    """Over all ways to exchange the methods within each pair of samples."""
    ways = []
    for a, b in pairs:
        both = [*a, *b]
        chances = []
        for chosen in itertools.combinations(range(len(both)), len(a)):
            x = [both[k] for k in chosen]
            y = [both[k] for k in range(len(both)) if k not in chosen]
            chances.append(naive_improvement(x, y))
        ways.append(chances)
    null = [abs(np.mean(way) - 0.5) for way in itertools.product(*ways)]
    observed = abs(np.mean([naive_improvement(a, b) for a, b in pairs]) - 0.5)
    return np.mean([distance >= observed - 1e-9 for distance in null])


def test_p_values_against_all_permutations():
    a, b = [5.0, 6, 7, 9], [1.0, 2, 6, 3]
    c, d = [2.0, 2, 4], [1.0, 2, 2]
    assert study.permutation_p(a, b) == pytest.approx(exact_p((a, b)))
    both = exact_p((a, b), (c, d))  # of 16 and of 9 pairs
    assert study.permutation_p(a, b, c, d) == pytest.approx(both)
    assert study.permutation_p(b, a) == pytest.approx(exact_p((a, b)))  # two-sided
    assert study.permutation_p([1.0] * 3, [1.0] * 3) == pytest.approx(1.0)


def test_p_value_from_a_table():
    """Ten against ten, 89 of 100 pairs won: U = 11 or less has 193 of the 184756 ways."""
    a, b = [*range(10, 20)], [*range(8), 10.5, 20.5]
    wins = study.improvement(a, b)
    assert wins == pytest.approx(0.89)
    assert study.permutation_p(a, b) == pytest.approx(2 * 193 / 184756)


def test_p_values_of_no_difference_are_uniform():
    rng = np.random.default_rng(1)
    found = [study.permutation_p(*rng.random((4, 10))) for _ in range(400)]
    assert np.mean(np.array(found) < 0.05) < 0.09
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_holm_by_hand():
    assert study.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study.holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    corrected = study.holm([np.nan, 0.02, np.nan])  # what is not made yet counts as a comparison
    assert np.isnan(corrected[[0, 2]]).all() and corrected[1] == pytest.approx(0.06)


def test_steps_to_a_level():
    steps, values = np.array([0.0, 100, 200, 300]), np.array([10.0, 30, 20, 60])
    assert study.steps_to(steps, values, 10) == 0
    assert study.steps_to(steps, values, 20) == 50
    assert study.steps_to(steps, values, 40) == 250
    assert study.steps_to(steps, values, 61) == np.inf
    assert study.steps_to(np.array([]), np.array([]), 1) == np.inf


def test_common_level_is_one_that_half_of_all_runs_reach():
    assert study.common_level([95, 85, 84, 30]) == 80
    assert study.common_level([95, 85, 30, 30]) == 80
    assert study.common_level([95, 45, 30, 30]) == study.LEVELS[0]


@pytest.mark.parametrize(
    ("p", "improved", "differed", "expected"),
    [
        (0.01, (0.6, 0.9), [(0.1, 0.2)], "CoLLM-CC ends higher"),
        (0.01, (0.1, 0.4), [(-0.2, -0.1)], "CoLLM-CC ends lower"),
        (0.06, (0.6, 0.9), [(0.1, 0.2)], "open"),
        (0.01, (0.5, 0.9), [(0.1, 0.2)], "open"),
        (0.9, (0.2, 0.8), [(-0.04, 0.03), (0.01, 0.02)], "alike"),
        (0.9, (0.2, 0.8), [(-0.06, 0.03), (0.01, 0.02)], "open"),
    ],
)
def test_what_counts_as_shown(p, improved, differed, expected):
    assert study.verdict(p, improved, differed) == expected


# ======================================= tables, figures ========================================
def make_rows(finals, problem, seeds=study.SEEDS):
    """Rows of runs.csv: {method: [score at the end of each seed]}; all start at 20."""
    rows = []
    for method, values in finals.items():
        script, _ = study.METHODS[method]
        for seed, end in zip(seeds, values):
            settings = {"baseline": "rloo"} if method == "MC rloo" else {}
            curve = [[0, 20.0], [problem.steps / 2, (20.0 + end) / 2], [problem.steps, end]]
            rows.append(
                {
                    "run": study.run_name(problem, method, seed),
                    "task": problem.task,
                    "script": script,
                    "seed": str(seed),
                    "settings": json.dumps(settings),
                    "env_steps": str(problem.steps),
                    "curve": json.dumps(curve),
                    "explained_variance": json.dumps([None] + [0.5] * 9),
                    "start/score": "20.0",
                }
            )
    return rows


def climbs(*starts):
    """Ten scores upwards from each start."""
    return {name: [start + k for k in range(10)] for name, start in zip(study.METHODS, starts)}


def line_of(lines, *cells, below=""):
    """Cells of the first line that begins with these, below a heading."""
    lines = lines[[below in line for line in lines].index(True) :]
    line = next(x for x in lines if x.startswith("| " + " | ".join(cells) + " |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_comparisons_of_known_runs():
    rows = make_rows(climbs(80, 60, 79, 80), study.STRBUILD)
    rows += make_rows(climbs(70, 50, 70, 71), study.HOUSEBUILD)
    outcomes = {(x.group, x.other): x for x in study.compare(study.find(rows))}
    dc = outcomes["games", "CoLLM-DC"]
    assert dc.difference[0] == pytest.approx(0.2)
    assert dc.higher == (1.0, 1.0, 1.0)
    assert dc.p == pytest.approx(len(study.COMPARISONS) * 2 / 184756**2)
    assert dc.verdict == "CoLLM-CC ends higher"
    rloo = outcomes["games", "MC rloo"]
    # 45 of 100 pairs are won and 10 tied; on housebuild 36 and 9
    assert rloo.higher[0] == pytest.approx((0.5 + 0.405) / 2)
    assert rloo.p == 1.0 and rloo.verdict == "alike"
    assert outcomes["strbuild, 4 turns", "CoLLM-DC"].verdict == "CoLLM-CC ends higher"
    assert outcomes["coding", "MAGRPO"].verdict == "not run yet"
    assert outcomes["all five tasks", "MAGRPO"].verdict == "not run yet"  # three are missing


def test_problems_that_differ_in_opposite_ways_are_not_alike():
    """Pooled they cancel: CC 20 points above on one, 20 below on the other."""
    rows = make_rows(climbs(80, 60), study.TLDR) + make_rows(climbs(40, 60), study.ARXIV)
    outcomes = {(x.group, x.other): x for x in study.compare(study.find(rows))}
    found = outcomes["writing", "CoLLM-DC"]
    assert found.difference[0] == pytest.approx(0) and found.higher[0] == 0.5
    assert found.verdict == "open"


def test_no_verdict_before_all_seeds():
    rows = make_rows({name: ends[:9] for name, ends in climbs(80, 20).items()}, study.CODING)
    (found,) = [x for x in study.compare(study.find(rows)) if x.made]
    assert found.seeds == (9,) and found.verdict == "not complete"


def test_who_is_faster():
    rows = make_rows(climbs(85, 65), study.CODING)  # half of the runs end at 80 or more
    cells = study.find(rows)
    methods = cells[study.CODING]
    ours, other = (study.quickness(methods[name], methods) for name in methods)
    assert ours[0] == -study.steps_to(np.array([0, 3072, 6144.0]), np.array([20, 52.5, 85]), 80)
    assert np.isneginf(other).all()
    (found,) = [x for x in study.compare(cells) if x.made]
    assert found.faster == (1.0, 1.0, 1.0)


def test_seeds_of_a_cell_have_like_settings():
    rows = make_rows(climbs(80), study.CODING)
    rows[3]["settings"] = '{"gamma": 0.5}'
    with pytest.raises(SystemExit, match=r"coding__collm_cc__1__.*unlike settings"):
        study.find(rows)


def test_other_runs_are_not_the_studys():
    rows = make_rows(climbs(80), study.CODING, seeds=range(101, 111))
    assert study.find(rows) == {}


def write(rows, folder):
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def test_tables_and_figures_of_a_study(tmp_path, capsys):
    rows = []
    for k, problem in enumerate(study.PARTS["main"]):
        rows += make_rows(climbs(80, 60 + k, 70, 70), problem)
    rows += make_rows(climbs(60, 50), study.TURNS[2])
    rows += make_rows(climbs(60), study.CLIMBING)
    other = make_rows(climbs(30), study.CODING, seeds=range(101, 104))
    write([*rows, *other], tmp_path)
    plot.main(plot.Args(runs=tmp_path / "none", results=tmp_path))
    told = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "tables.md").read_text().splitlines()
    # IQM of 80 to 89: the mean of 82 to 87
    cells = line_of(told, "coding")
    assert cells[1] == "0.200" and cells[2].startswith("0.845 [0.8") and cells[2].endswith("(10)")
    assert line_of(told, "all")[5].startswith("0.745 [0.7")
    assert not [line for line in told if line.startswith("| strbuild, 8")]
    assert line_of(lines, "main", *cells) == ["main", *cells]
    horizon = line_of(lines, "horizon", "strbuild, 8 turns")
    assert horizon[4].startswith("0.545") and horizon[5:7] == ["-", "-"]
    assert line_of(lines, "main", "CoLLM-CC", "CoLLM-DC")[4] == "1.000 [1.000, 1.000]"
    assert line_of(lines, "main", "MAGRPO", "MC rloo")[4].startswith("0.500 [")
    found = line_of(lines, "writing", "CoLLM-CC", "MC rloo")
    assert found[3] == "10" and found[5] == "1.000 [1.000, 1.000]"
    assert found[6] == "0.0000" and found[8] == "CoLLM-CC ends higher"
    assert line_of(lines, "climbing", "CoLLM-CC", "MAGRPO")[8] == "not run yet"
    levels = line_of(lines, "coding", "CoLLM-CC", below="sample efficiency")
    assert levels[2] == "70" and "(10/10)" in levels[6] and levels[7] == "> 6144 (0/10)"
    levels = line_of(lines, "coding", "MC rloo", below="sample efficiency")
    assert levels[6] == "> 6144 (0/10)" and "(10/10)" in levels[5]
    for name in ("main", "horizon", "control", "critics", "comparisons"):
        assert (tmp_path / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "learning_curves.png").exists()  # of seeds that are no part of the study
    assert not (tmp_path / "study_information.png").exists()  # none of its runs is there


def test_half_of_the_runs_reach_a_level():
    rows = make_rows({"CoLLM-CC": [90.0] * 5 + [60.0] * 5}, study.CODING)
    (line,) = plot.level_table(study.find(rows))[2:]
    at_60 = (study.steps_to(np.array([0, 6144]), np.array([20, 90]), 60) + 6144) / 2
    assert f"| {at_60:.0f} (10/10) |" in line
    assert "| > 6144 (5/10) |" in line  # between a number and infinity


def test_a_method_has_one_colour_and_the_legend_is_beside(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    rows = make_rows(climbs(80, 60, 70, 70), study.CODING) + make_rows(climbs(80), study.TLDR)
    plot.draw_curves(study.of_part(study.find(rows), "main"), tmp_path)
    plot.draw_comparisons([x for x in study.compare(study.find(rows)) if x.made], tmp_path)
    colours = {}
    for figure in drawn:
        (legend,) = figure.legends
        assert not [axis for axis in figure.axes if axis.get_legend()]
        figure.canvas.draw()
        right = max(axis.get_window_extent().x1 for axis in figure.axes)
        assert legend.get_window_extent().x0 >= right
        for axis in figure.axes:
            for line in axis.lines:
                if line.get_label() in study.METHODS:
                    colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert set(colours) == set(study.METHODS)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(study.METHODS)
