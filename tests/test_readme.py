"""What README and docs say is what the committed results say."""

import contextlib
import io
import itertools
import json
import math
import re
import statistics
from collections import Counter
from statistics import fmean, median

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_cifar10

import plot
import train
from data import load
from history import read_history
from model import build_model
from plot import group, last_accuracies, name_row

README = (ROOT / "README.md").read_text()


def unwrap(page):
    """The text of a page as one line."""
    return " ".join((ROOT / page).read_text().split())


TEXT = unwrap("README.md")


def each(accuracies):
    return ", ".join(f"{accuracy:.2f}" for accuracy in accuracies) + " %"


def as_published(accuracies):
    if len(accuracies) < 3:  # too few for a spread
        return each(accuracies)
    return f"{fmean(accuracies):.2f} % ± {statistics.stdev(accuracies):.2f}"


def read(pattern):
    """The histories of a pattern of files in results/, by name."""
    return [read_history(path) | {"name": path.stem} for path in sorted(ROOT.glob(pattern))]


def read_seeds(row):
    """The histories of a row in results/, one a seed."""
    return read(f"results/{row}.json") + read(f"results/{row}-seed*.json")


def cells(page, row, column):
    """What the tables of a page say of a row in a column."""
    lines = (ROOT / page).read_text().splitlines()
    of_row = [line.split("|") for line in lines if line.startswith(f"| {name_row(row)} ")]
    return [line[column] for line in of_row if len(line) > column]


def accuracies_by_views(row):
    """The accuracies of a row's runs with test-time augmentation."""
    return [run["test"]["tta"]["accuracy"] for run in row]


def minutes(history):
    return sum(epoch["seconds"] for epoch in history["epochs"]) / 60


@pytest.mark.parametrize(
    "page, folder, column",
    [
        ("README.md", "rows", 8),
        ("README.md", "quarter", 9),
        ("docs/recipe.md", "controls", 3),
        ("docs/recipe.md", "settings", 3),
        ("docs/recipe.md", "held-out", 5),
    ],
)
def test_a_table_has_the_figures_of_the_results(page, folder, column):
    for row in group(read(f"results/{folder}/*.json")):
        accuracies = last_accuracies(row)
        one_of_them_died = min(accuracies) <= 10 < max(accuracies)
        published = each(sorted(accuracies)) if one_of_them_died else as_published(accuracies)
        assert any(published in cell for cell in cells(page, row, column))


@pytest.mark.parametrize("folder, base", [("controls", "base"), ("settings", "fast-biases")])
def test_so_have_the_differences_in_the_recipes_tables(folder, base):
    others = last_accuracies(read_seeds(f"{folder}/{base}"))
    rows = [*group(read(f"results/{folder}/*.json")), read_seeds("controls/base")]
    assert len(others) == 3 and len(rows) >= 5
    for row in rows:
        if sorted(accuracies := last_accuracies(row)) == sorted(others):
            continue
        difference = fmean(accuracies) - fmean(others)
        spread = math.hypot(statistics.stdev(accuracies), statistics.stdev(others))
        published = f" {difference:+.2f} ± {spread:.2f} ".replace("-", "−")
        assert published in cells("docs/recipe.md", row, 4)


def compare_accuracies(*names):
    """How many points the first of two rows of the controls ends above the second, and the
    probability of that by Welch's t-test."""
    first, second = (last_accuracies(read_seeds(f"controls/{name}")) for name in names)
    return fmean(first) - fmean(second), compare_by_welch(first, second)


def test_the_parts_of_the_recipe_are_worth_what_is_said():
    text = unwrap("docs/recipe.md")
    parts = ("logit-scale", "whitening", "augment", "decay")
    worth, p = zip(*(compare_accuracies("base", f"without-{part}") for part in parts))
    assert f"are worth {min(worth):.1f} to {max(worth):.1f} points each" in text and max(p) < 0.05
    _, p = compare_accuracies("base", "without-max-pool")
    assert f"Max pooling is undecided (p = {p:.2f})" in text and p > 0.05
    for part in ("identity", "onecycle", "smoothing"):
        gain, p = compare_accuracies("base", f"without-{part}")
        assert gain < 0 and p > 0.05
    _, p = compare_accuracies("base", "residual-without-identity")
    assert p > 0.05


def test_open_gates_gain_what_is_said_at_equal_epochs():
    text = unwrap("docs/recipe.md")
    gain, p = compare_accuracies("k2", "base")
    assert (
        f"gains {gain:.1f} points at equal epochs, by three seeds undecided (p = {p:.2f})" in text
    )
    losses = compare_losses(read_seeds("controls/k2"), read_seeds("controls/base"))
    assert f"held out is lower, {losses}" in text
    gain, p = compare_accuracies("k3", "base")
    assert f"three sets gain {gain:.1f} (p = {p:.2f})" in text and p < 0.05
    assert f"three by softmax {gain:.1f} points above one" in TEXT
    _, p = compare_accuracies("k3", "k2")
    assert f"against two they are undecided (p = {p:.2f})" in text and p > 0.05


CONTROLS = ("base", "gate-mean", "k2", "gate-sigmoid", "base-28-epochs")


def test_the_recipe_has_the_losses_of_other_gates():
    for row in (read_seeds(f"controls/{name}") for name in (*CONTROLS, "k3")):
        assert f" {loss_as_published(row)} " in cells("docs/recipe.md", row, 5)


def test_the_choice_lowers_the_loss_and_more_epochs_in_the_same_time_help_more():
    base, mean, softmax, sigmoid, longer = (read_seeds(f"controls/{name}") for name in CONTROLS)
    assert all(compare_by_losses(gate, mean) < 0.05 for gate in (softmax, sigmoid))
    assert compare_by_losses(base, mean) > 0.05 < compare_by_losses(softmax, sigmoid)
    text = unwrap("docs/recipe.md")
    assert f"by half each it is higher, {compare_losses(softmax, mean)}" in text
    lowered = f"from {loss_as_published(mean)} (half each) to {loss_as_published(softmax)}"
    p = compare_by_losses(softmax, mean)
    assert f"A gate lowers the loss, {lowered} (softmax; p = {p:.2f})" in TEXT
    for names in itertools.combinations(CONTROLS[:4], 2):  # at equal epochs
        _, p = compare_accuracies(*names)
        assert p > 0.05
    gains = [compare_accuracies(name, "base")[0] for name in CONTROLS[1:4]]
    assert f"end {min(gains):.1f} to {max(gains):.1f} points above one, undecided" in TEXT
    least, most, of_k2, interrupted = (
        f"{minute(map(minutes, row)):.0f}" for row in (longer, softmax) for minute in (min, max)
    )
    took = f"in {least} to {most} minutes where the 12 of `k2` took {of_k2} to {interrupted}"
    assert took in text and f"The {interrupted} minutes have interruptions" in text
    assert (len(longer[0]["epochs"]), len(softmax[0]["epochs"])) == (28, 12)
    gain, p = compare_accuracies("base-28-epochs", "k2")
    assert p < 0.05
    ends = f"for about as many minutes as two, ends {gain:.1f} points higher"
    assert f"{ends}, with a loss that is lower" in TEXT
    assert compare_by_losses(longer, softmax) < 0.05
    assert f"per block, trained for about as many minutes, ends {gain:.1f} points higher" in TEXT


def test_where_k_is_2_the_identity_lowers_the_loss():
    with_it, without = read_seeds("controls/k2"), read_seeds("controls/k2-without-identity")
    lowers = f"the identity lowers the loss, {compare_losses(with_it, without)}"
    assert lowers in unwrap("docs/recipe.md")


def test_how_wide_and_how_long_was_chosen_on_images_held_out():
    page, runs = "docs/recipe.md", {run["name"]: run for run in read("results/held-out/*.json")}
    for run in runs.values():
        assert run["config"]["holdout"] == 5_000
        last, row = run["epochs"][-1], [run]
        assert cells(page, row, 3)[-1] == f" {len(run['epochs'])} "
        assert cells(page, row, 4)[-1] == f" {last['train_accuracy']:.1f} % "
        assert cells(page, row, 6)[-1] == f" {last['val_loss']:.3f} "
    names = ("quick", "wider", "quick-k1", "deep-plain", "long-deep")
    quick, wider, shallow, deep, long = (runs[name] for name in names)
    times, more = (
        build_model(large["config"]).macs / build_model(small["config"]).macs
        for small, large in ((quick, wider), (shallow, deep))
    )
    gain, longer = (
        last_accuracies([better])[0] - last_accuracies([worse])[0]
        for worse, better in ((quick, wider), (deep, long))
    )
    text = unwrap(page)
    assert f"channels, {100 * (more - 1):.0f} % more operations" in text
    assert f"has {times:.1f} times the operations and gains {gain:.1f} points" in text
    further = len(long["epochs"]) - len(deep["epochs"])
    assert f"{further} epochs more gain {longer:.1f} points" in text


def test_what_airbench_has_and_gained_something_is_said():
    base = last_accuracies(read_seeds("settings/fast-biases"))
    rows = ("default", "k1-gelu")
    p, of_gelu = (
        compare_by_welch(base, last_accuracies(read_seeds(f"settings/{row}"))) for row in rows
    )
    text = unwrap("docs/recipe.md")
    assert f"fast biases need, gains something ({as_probability(p)})" in text
    assert f"learns slowly ({as_probability(of_gelu)}); all else is undecided" in text
    for row in group(read("results/settings/*.json")):
        if name_row(row) not in ("fast-biases", *rows):
            assert compare_by_welch(base, last_accuracies(row)) > 0.05


def last_losses(row):
    return [run["epochs"][-1]["val_loss"] for run in row]


def loss_as_published(row):
    return f"{fmean(last_losses(row)):.3f} ± {statistics.stdev(last_losses(row)):.3f}"


def compare_by_losses(*rows):
    return compare_by_welch(*map(last_losses, rows))


def compare_losses(*rows):
    """Two rows' validation losses, as published."""
    p = compare_by_losses(*rows)
    return f"{' against '.join(map(loss_as_published, rows))} (p = {p:.2f})"


def test_gates_whose_biases_learn_too_fast_close():
    text = unwrap("docs/recipe.md")
    (closed,), (single,) = (read(f"results/search/quick-{run}.json") for run in ("closed", "k1"))
    gates = [gate["quantiles"] for gate in closed["test"]["gates"]]  # from the least to the most
    least = [min(abs(a - b) for a, b in zip(*sets)) for sets in gates]
    assert [difference > 0.998 for difference in least].count(True) == 4 and len(gates) == 6
    accuracies = [last_accuracies([run])[0] for run in (closed, single)]
    assert (
        "ends at {:.2f} % of the test images, one with k = 1 at {:.2f} %".format(*accuracies)
        in text
    )
    assert f"in {minutes(closed):.0f} and {minutes(single):.0f} minutes" in text


def test_the_histories_of_changed_scripts_are_counted():
    texts = [path.read_text() for path in ROOT.glob("results/**/*.json")]
    changed = sum('-dirty"' in text for text in texts if '"batch_losses"' in text)
    assert f"not committed: {changed} histories have it" in unwrap("docs/provenance.md")


def epochs_at_a_quarter(row):
    paths = [f"results/quarter/**/{row}{seed}.json" for seed in ("", "-seed*")]
    runs = [run["epochs"] for path in paths for run in read(path)]
    assert len(runs) >= 3
    return runs


def accuracies_at_a_quarter(what):
    """Of "row3", "row3 at epoch 15" or "10", the report's chance."""
    if what.isdigit():
        return [float(what)]
    row, _, epoch = what.partition(" at epoch ")
    return [epochs[int(epoch or 0) - 1]["val_accuracy"] for epochs in epochs_at_a_quarter(row)]


def compare_by_welch(first, second):
    """The probability of means that differ as much as these, were they drawn from one (Welch 1947).
    A single value is a constant."""
    shares = [statistics.variance(v) / len(v) if len(v) > 1 else 0 for v in (first, second)]
    t = abs(fmean(first) - fmean(second)) / math.sqrt(sum(shares))
    freedom = sum(shares) ** 2 / sum(
        s**2 / (len(v) - 1) for s, v in zip(shares, (first, second)) if s
    )
    x = np.linspace(0, t, 100_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density /= math.sqrt(freedom * math.pi)
    return 1 - 2 * ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()


def test_welchs_test_is_that_of_the_tables():
    # The critical values of Student's t at 5 %, two-sided, of 4 and 2 degrees of freedom.
    spread = [-1.0, 0.0, 1.0]
    same = 2.776 * math.sqrt(2 / 3)
    assert compare_by_welch(spread, [v + same for v in spread]) == pytest.approx(0.05, abs=1e-4)
    assert compare_by_welch(spread, [4.303 * math.sqrt(1 / 3)]) == pytest.approx(0.05, abs=1e-4)


def claims_of_the_report():
    lines = [line.split(" | ") for line in README.splitlines()]
    claims = [line[1:] for line in lines if len(line) == 4]  # what is compared, difference, verdict
    return [claim for claim in claims if re.search("(confirm|contradict|undecid)ed", claim[2])]


def test_the_claims_of_the_report_are_held_against_the_results():
    claims = [claim for claim in claims_of_the_report() if " − " in claim[0]]
    assert len(claims) > 5
    for compared, difference, verdict in claims:
        pair = [accuracies_at_a_quarter(what) for what in compared.split(" − ")]
        mean = fmean(pair[0]) - fmean(pair[1])
        spread = sum(statistics.variance(v) for v in pair if len(v) > 1) ** 0.5
        published = f"{mean:+.2f} ± {spread:.2f}"
        if compared.endswith("gate-relu"):  # of which one died: three numbers
            below = sorted(fmean(pair[0]) - accuracy for accuracy in pair[1])
            published = ", ".join(f"{points:+.2f}" for points in below)
        assert difference == published
        decided = "contradicted" if compared == "sgd − 10" else "confirmed"
        p = compare_by_welch(*pair)
        verdict_of_p = decided if p < 0.05 and mean > 0 else "undecided"
        assert verdict == f"{verdict_of_p}, {as_probability(p)} |"
    names = "row2-fc3 at epoch 15", "row2 at epoch 15"
    first, second = map(accuracies_at_a_quarter, names)
    p = as_probability(compare_by_welch(first[:3], second[:3]))
    assert len(first) == len(second) == 5
    assert f"three seeds left it undecided ({p}), so both got two more" in TEXT


def as_probability(p):
    return f"p = {p:.1g}" if p >= 0.001 else "p < 0.001"


def test_where_final_overfits_is_held_against_the_results():
    lowest = [min(run, key=lambda epoch: epoch["val_loss"]) for run in epochs_at_a_quarter("final")]
    *others, last = sorted(epoch["epoch"] for epoch in lowest)
    published = f"epochs {', '.join(map(str, others))} and {last}"
    assert published in [difference for _, difference, _ in claims_of_the_report()]


def test_after_that_its_validation_loss_rises_by_a_third():
    losses = [[epoch["val_loss"] for epoch in run] for run in epochs_at_a_quarter("final")]
    assert all(1.3 < run[-1] / min(run) < 1.4 for run in losses) and "rises by a third" in TEXT
    flipped = read("results/readings/small/final-flip*.json")
    still = [epoch["val_loss"] for run in flipped for epoch in run["epochs"][7:]]
    page = unwrap("results/readings/README.md")
    assert f"at {min(still):.2f} to {max(still):.2f} from epoch 8 on" in page
    assert "[with mirror images](results/readings/README.md) it stands still" in TEXT


def test_mirror_images_gain_what_is_said():
    readings, gains, below = (ROOT / "results/readings/README.md").read_text(), [], []
    for row, reported in (("row3", 82.01), ("row5", 79.34), ("final", 82.84)):
        flipped = last_accuracies(read(f"results/readings/small/{row}-flip*.json"))
        plain = accuracies_at_a_quarter(row)
        assert len(flipped) == 3 and compare_by_welch(flipped, plain) < 0.05
        gains.append(fmean(flipped) - fmean(plain))
        below.append(reported - fmean(flipped))
        spread = sum(map(statistics.variance, (flipped, plain))) ** 0.5
        cells = reported, as_published(plain), as_published(flipped)
        line = "| {} | {} % | {} | {} | {:+.2f} ± {:.2f} |"
        assert line.format(row, *cells, gains[-1], spread) in readings
    assert f"gain {min(gains):.1f} to {max(gains):.1f} points in smaller networks" in TEXT
    assert f"end {min(below):.1f} to {max(below):.1f} points below the report" in TEXT
    assert f"end {min(below):.1f} to {max(below):.1f} points below the report" in readings


def test_the_findings_have_the_figures_of_the_claims():
    differences = {compared: difference for compared, difference, _ in claims_of_the_report()}
    for compared, words in {
        "row2 − row1": "The ReLU on the blocks is worth {:.1f} points",
        "row3 at epoch 15 − row5": "dropout {:.1f}",
        "final − row3 at epoch 15": "He initialisation with a schedule {:.1f}.",
    }.items():
        assert words.format(float(differences[compared].split()[0])) in TEXT
    assert f"it reaches {fmean(accuracies_at_a_quarter('sgd')):.0f} %" in TEXT
    *_, last = read("results/gpu/sgd.json")[0]["epochs"]
    assert f"sgd for {last['epoch']} epochs on a GPU ({last['val_accuracy']:.2f} %)" in TEXT
    verdicts = [re.match(r"\w+", verdict)[0] for _, _, verdict in claims_of_the_report()]
    counts = Counter(verdicts)
    assert counts == {"confirmed": 5, "half": 1, "contradicted": 1, "undecided": 2}
    said = "Of its nine claims five hold, one holds in part, one does not, two are undecided"
    assert said in TEXT


@pytest.mark.parametrize("row, seeds", [("quick", 3), ("quick-k1", 3), ("best", 1), ("best-k1", 2)])
def test_the_readme_has_the_figures_of_the_recipe(row, seeds):
    runs = read_seeds(f"best/{row}")
    assert len(runs) == seeds
    assert {run["test"]["tta"]["views"] for run in runs} == {6}
    figures = [as_published(last_accuracies(runs)), as_published(accuracies_by_views(runs))]
    figures.append(f"{minutes(runs[0]):.0f} min")
    (line,) = (line for line in README.splitlines() if line.startswith(f"| `{row}`"))
    assert " | ".join(["", *figures, ""]) in line
    said = {1: ", one seed |", 2: ", two seeds |", 3: " |"}
    assert said[seeds] in line and ("seed" in line) == (seeds < 3)


def test_the_same_blocks_reach_what_best_does():
    runs, quick = read_seeds("best/best"), read_seeds("best/quick")
    by_views = fmean(accuracies_by_views(runs))
    assert f"**The same blocks reach {by_views:.2f} %**" in TEXT
    assert f"in {minutes(runs[0]):.0f} minutes on two CPU cores" in TEXT
    assert f"of each test image; {fmean(last_accuracies(runs)):.2f} % by one" in TEXT
    by_views, took = fmean(accuracies_by_views(quick)), minutes(quick[0])
    assert f"`quick` reaches {by_views:.2f} % in {took:.0f} minutes" in TEXT
    test = runs[0]["test"]
    figures = f"{test['accuracy']:.1f} % of the test images; {test['tta']['accuracy']:.1f} % by six"
    assert f"weights/best.pt --tta # {figures} views" in TEXT


def test_gates_gain_little_at_equal_epochs_for_twice_the_minutes():
    by_six = {}
    for name in ("best", "quick"):
        gated, plain = read_seeds(f"best/{name}"), read_seeds(f"best/{name}-k1")
        assert minutes(plain[0]) < 0.5 * minutes(gated[0])
        by_six[name] = [accuracies_by_views(runs) for runs in (gated, plain)]
    gated, plain = by_six["quick"]
    assert len(gated) == len(plain) == 3
    gain = f"{fmean(gated) - fmean(plain):.1f}"
    assert f"Without gates `quick` ends {gain} points lower by six views, after less than" in TEXT
    (gated,), (lower, higher) = by_six["best"]
    assert lower < gated < higher and "of two seeds of `best-k1` one ends below `best`" in TEXT
    for name in ("best", "quick"):
        epochs = {len(read_seeds(f"best/{row}")[0]["epochs"]) for row in (name, f"{name}-k1")}
        assert len(epochs) == 1 and "a single convolution a block, as many epochs" in TEXT


def test_a_zen_4_takes_as_long_as_is_said():
    page, (first, second) = unwrap("docs/speed.md"), read_seeds("best/best-k1")
    took = f"{minutes(first):.0f} minutes; {minutes(second):.0f} minutes"
    assert f"Xeon with AMX; Zen 4 | {took} |" in page
    (begun,), (whole, *_) = read("results/again/quick.json"), read_seeds("best/quick")
    quick = minutes(begun) * len(whole["epochs"]) / len(begun["epochs"])
    took = f"{minutes(whole):.0f} minutes; {quick:.0f} minutes"
    assert f"Zen 4, by its first two epochs | {took} |" in page and len(begun["epochs"]) == 2
    assert f"{minutes(second):.0f} for `best-k1`, about {quick:.0f} for `quick`" in TEXT
    (best,), page = read_seeds("best/best"), unwrap("docs/recipe.md")
    estimate = round(minutes(best) * minutes(second) / minutes(first), -1)
    judged = f"{quick:.0f} minutes, judged by two epochs, and `best` about {estimate:.0f}, judged"
    assert f"`quick` would take {judged} by `best-k1`" in page
    assert minutes(whole) < 45 < quick and minutes(best) < 240 < estimate


def test_where_the_limit_is_is_what_best_says():
    (gated,), (plain, second) = read_seeds("best/best"), read_seeds("best/best-k1")
    page = unwrap("docs/recipe.md")
    for run in (gated, plain):
        (by_views,) = accuracies_by_views([run])
        assert f"ends at {by_views:.2f} % after {minutes(run):.0f} minutes" in page
    assert f"a second seed at {accuracies_by_views([second])[0]:.2f} %" in page
    assert f"{gated['epochs'][-1]['train_accuracy']:.1f} % of the training images are right" in page
    folders = ("best", "controls", "settings", "held-out", "search")
    took = sum(minutes(run) for folder in folders for run in read(f"results/{folder}/*.json"))
    assert f"are of {took / 60:.0f} hours of training" in page


def test_the_gates_of_quick_gain_what_is_said_at_equal_epochs():
    gated, plain = read_seeds("best/quick"), read_seeds("best/quick-k1")
    by_one = [last_accuracies(runs) for runs in (gated, plain)]
    by_six = [accuracies_by_views(runs) for runs in (gated, plain)]
    (gain,) = {f"{fmean(a) - fmean(b):.1f}" for a, b in (by_one, by_six)}
    certain, undecided = (compare_by_welch(*both) for both in (by_six, by_one))
    assert certain < 0.05 < undecided
    assert (
        f"gains {gain} points, by six views decided (p = {certain:.3f}), by one undecided "
        f"(p = {undecided:.3f}), for {minutes(gated[0]) / minutes(plain[0]):.1f} times the minutes"
    ) in unwrap("docs/recipe.md")


def test_the_readme_has_the_figures_of_final():
    (cpu,), (gpu,) = read("results/rows/final.json"), read("results/gpu/final.json")
    (replayed,), (on_gpu,) = last_accuracies([cpu]), last_accuracies([gpu])
    hours, rest = divmod(round(minutes(cpu)), 60)
    times = f"| {hours} h {rest} min | {60 * minutes(gpu):.0f} s ({on_gpu:.2f} %)"
    assert f"| {replayed:.2f} % | {times} |" in TEXT
    ends = f"ends at {replayed:.2f} % on a CPU here and at {on_gpu:.2f} % on a GPU"
    assert f"{ends}, {82.84 - on_gpu:.1f} to {82.84 - replayed:.1f} points lower" in TEXT


def test_a_gate_of_three_of_four_networks_ranks_vehicles_above_animals():
    vehicles = {"airplane", "automobile", "ship", "truck"}
    orders = []
    for run in [*read_seeds("best/quick"), *read_seeds("best/best")]:
        gate = dict(zip(run["test"]["per_class"], run["test"]["gates"][4]["mean_per_class"]))
        of_trucks = gate["truck"].index(max(gate["truck"]))  # the set of kernels
        coefficients = {name: means[of_trucks] for name, means in gate.items()}
        order = sorted(coefficients, key=coefficients.get)
        orders.append(order)
        assert set(order[:3]) == {"deer", "frog", "bird"}
        assert set(order[8:]) == {"automobile", "truck"}
        assert coefficients[order[2]] < 0.5 < coefficients[order[8]]
    assert [set(order[6:]) == vehicles for order in orders] == [True, False, True, True]
    assert orders[1][5:8] == ["ship", "horse", "airplane"]
    assert "In three of four networks the fifth block's gate ranks vehicles above animals" in TEXT


def test_row_4_ends_where_it_does_by_the_textbook():
    runs = json.loads((ROOT / "results/bench/textbook-row4.json").read_text())["runs"]
    textbooks = [run["val_accuracy"][-1] for run in runs]
    ours = last_accuracies(read("results/rows/row4*.json"))
    (again,) = read("results/again/row4.json")
    assert compare_by_welch(textbooks, ours) > 0.05
    ends = f"{as_published(textbooks)} by `textbook.py` and at {as_published(ours)} by `train.py`"
    assert ends in TEXT
    theirs, own = runs[0]["seconds"] / 60, minutes(again)
    took = f"took {theirs:.0f} minutes (float32), `train.py` {own:.0f} (bfloat16)"
    assert f"On the same two cores `textbook.py` {took}" in TEXT


def test_the_first_result_looks_as_it_does_in_the_readme(tmp_path, capsys):
    (command,) = re.findall(r"^    python train\.py (--dataset shapes .*)$", README, re.M)
    options = command.split()
    args = train.parse_args(options)
    model = train.make_model(args, load("shapes"), torch.device("cpu"), "float32")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shown = README[README.index("    8,360 parameters") :].partition("\n\nThe report's network")[0]
    shown = [line.removeprefix("    ") for line in shown.splitlines()]
    assert shown[0] == f"{parameters:,} parameters, {model.macs:,} multiply-accumulates an image"
    less = ["--limit", "128", "--out", str(tmp_path)]
    train.main([*options, *less])

    def shape(line):
        return re.sub(r"\d[\d.,e-]*", "0", re.sub(r"\s+", " ", line))

    printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[2:4] == [shape(line) for line in shown[2:4]]
    epochs = [shape(line) for line in shown if re.match(r" +\d/8 ", line)]
    assert epochs and set(epochs) == set(printed[4:])


@needs_cifar10
def test_the_snippet_of_the_readme_names_eight_classes(monkeypatch):
    monkeypatch.chdir(ROOT)
    snippet = README[README.index("    from data import load") :].partition("\n\n")[0]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(snippet.replace("    ", ""), {})
    names = eval(output.getvalue())
    assert len(names) == 8 and set(names) <= set(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    )


STEPS = {
    "cpu.json": "two CPU cores (AMD Zen 5)",
    "cpu-amx.json": "two CPU cores (Intel Xeon with AMX)",
    "cpu-float32.json": "two CPU cores (Intel Xeon, float32)",
    "gpu.json": "one H200",
}


@pytest.mark.parametrize("file, where", STEPS.items())
def test_the_ratios_of_training_steps_are_those_measured(file, where):
    text = (ROOT / "docs/speed.md").read_text()
    report = json.loads((ROOT / "results/bench" / file).read_text())
    rows = [row for row in report["results"] if row["what"].startswith("training step of ")]
    rows = [row for row in rows if not row["what"].endswith("batch 512")]  # of an earlier best
    assert len(rows) == (4 if file == "cpu-amx.json" else 3)
    for row in rows:
        ours, *textbooks = row["seconds"].values()
        ratios = []
        for seconds in textbooks:
            turns = sorted(other / own for other, own in zip(seconds, ours))
            ratios.append(f"{median(turns):.2f} ({turns[0]:.2f} to {turns[-1]:.2f})")
        what = row["what"].removeprefix("training step of ")
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {what} | {where} |"))
        assert all(ratio in line for ratio in ratios)
        assert f"| {1000 * median(ours):,.1f} ms |" in line


def test_the_readme_says_how_much_faster_steps_of_the_report_are():
    ratios = []
    for file in ("cpu.json", "cpu-amx.json", "cpu-float32.json"):
        report = json.loads((ROOT / "results/bench" / file).read_text())
        for row in report["results"]:
            if re.search("row 4|row 2|final", row["what"]):
                ours, textbook = (
                    row["seconds"][f"{who}, {report['precision']}"] for who in ("ours", "textbook")
                )
                ratios.append(median(other / own for other, own in zip(textbook, ours)))
    assert len(ratios) == 9
    assert f"are {min(ratios):.1f} to {max(ratios):.1f} times as fast as the textbook's" in TEXT


def forms_and_ratios(file):
    """The results of a file of bench.py, and how many times as long as with k = 1 the final model's
    wide blocks take, and those of less than 32x32 pixels."""
    report = json.loads((ROOT / "results/bench" / file).read_text())
    wide, small = [], []
    for row in report["results"]:
        inputs, size, k = (int(re.findall(r"\d+", row["what"])[place]) for place in (0, 2, 4))
        chosen, *_, plain, _ = row["seconds"].values()
        ratio = median(own / one for own, one in zip(chosen, plain))
        wide += [ratio] if k == 3 and inputs >= 64 else []
        small += [ratio] if size < 32 else []
    assert len(wide) == 3 and len(small) == 5
    return report["results"], *(f"{min(of):.1f} to {max(of):.1f}" for of in (wide, small))


def test_what_a_sum_of_three_convolutions_costs_against_one():
    results, wide, small = forms_and_ratios("forms-cpu.json")
    text = unwrap("docs/speed.md")
    took = f"take {wide} times as long as with k = 1"
    assert f"wide blocks of the final model, k = 3, {took}" in text
    final = [list(row["seconds"].values()) for row in results[:4]]
    chosen, products = (sum(median(values[place]) for values in final) for place in (0, -1))
    assert f"the final model take {chosen / products:.1f} times as long as matrix products" in text
    assert f"**Three convolutions cost {wide} times one** on a Zen 5" in TEXT
    assert f"at 31x31 pixels and below k = 2 takes {small} times as long" in text
    _, wide, _ = forms_and_ratios("forms-cpu-amx.json")
    assert f"there the wide blocks take {wide} times as long." in text


def test_bfloat16_is_as_fast_and_takes_as_much_memory_as_is_said():
    rows = json.loads((ROOT / "results/bench/precision.json").read_text())["rows"]
    times, memory = [], []
    for precisions in rows.values():
        pair = [precisions[name] for name in ("bfloat16", "float32")]
        times.append("{:.1f}".format(np.divide(*(fmean(p["images_per_second"]) for p in pair))))
        ends = [dict.fromkeys(f"{end(p['peak_gib']):.1f}" for end in (min, max)) for p in pair]
        memory.append(" and ".join(" to ".join(values) for values in ends))
    page = unwrap("docs/speed.md")
    faster = "row 4 {} times, row 2 {}, the final model {} and an older `best` (commit f85112d) {}"
    assert faster.format(*times) in page
    fits = "(row 4: {} GiB, row 2: {}, final: {}, `best`: {};"
    assert fits.format(*memory) in page


def test_a_computer_in_use_is_as_slow_as_is_said():
    runs = {run["name"]: run["epochs"][-1] for run in read("results/in-use/*.json")}
    speed = {name: epoch["images_per_second"] for name, epoch in runs.items()}
    page = unwrap("docs/processes.md")
    said = "at {:,.0f} images/s fell to {:.0f} beside a training of row 2"
    assert said.format(speed["small-alone"], speed["small-beside-another"]) in page
    assert f"and to {speed['small-beside-nice']:.0f} where that ran under `nice`" in page
    assert f"the small one kept {speed['small-beside-autogroup']:,.0f} images/s" in page
    costs = 100 * (1 - speed["row2-alone-passive"] / speed["row2-alone"])
    assert f"it costs {costs:.0f} % of row 2's speed, but more than half of the small" in page
    assert speed["small-alone-passive"] < speed["small-alone"] / 2


def test_row_4_takes_the_minutes_that_are_said():
    runs = read("results/rows/row4*.json") + read("results/again/row4.json")
    took = sorted(map(minutes, runs))
    assert f"its smallest row: {took[0]:.0f} to {took[-1]:.0f} minutes" in TEXT


def test_the_committed_tables_are_those_of_the_commands_on_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    page, tables = (ROOT / "docs/provenance.md").read_text().replace("\\\n", ""), 0
    for command in re.findall(r"^    python plot\.py (.*)$", page, re.M):
        args = plot.parse_args(command.split())
        if (args.out / "results.md").exists():
            runs, *_ = plot.read_runs(args.histories)
            assert plot.tabulate(group(runs)) == (args.out / "results.md").read_text()
            tables += 1
    assert tables == len(list(ROOT.glob("docs/*/results.md"))) == 3


LINKS = [
    (page, link)
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")]
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    if not link.startswith("http")
]


@pytest.mark.parametrize("page, link", LINKS, ids=[link for _, link in LINKS])
def test_links_lead_to_files(page, link):
    assert (page.parent / link).exists()
