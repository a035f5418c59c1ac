import statistics

import pytest
from conftest import ROOT

from history import read_history
from plot import group, last_accuracies, name_row


def as_published(accuracies):
    mean = f"{statistics.fmean(accuracies):.2f} %"
    return mean if len(accuracies) == 1 else f"{mean} ± {statistics.stdev(accuracies):.2f}"


@pytest.mark.parametrize(
    "page, folder, column",
    [
        ("README.md", "rows", 8),
        ("README.md", "quarter", 9),
        ("README.md", "controls", 5),
        ("docs/recipe.md", "without", 2),
        ("docs/recipe.md", "wider", 4),
    ],
)
def test_a_table_has_the_figures_of_the_results(page, folder, column):
    lines = (ROOT / page).read_text().splitlines()
    paths = sorted(ROOT.glob(f"results/{folder}/*.json"))
    for row in group(read_history(path) | {"name": path.stem} for path in paths):
        (line,) = (line for line in lines if line.startswith(f"| {name_row(row)} "))
        assert as_published(last_accuracies(row)) in line.split("|")[column]


def epochs_at_a_quarter(row):
    files = [f"{row}{seed}.json" for seed in ("", "-seed1", "-seed2")]
    paths = [path for file in files for path in ROOT.joinpath("results/quarter").rglob(file)]
    assert len(paths) == 3
    return [read_history(path)["epochs"] for path in paths]


def accuracies_at_a_quarter(what):
    """Of "row3", "row3 at epoch 15" or "10", the report's chance."""
    if what.isdigit():
        return [float(what)] * 3
    row, _, epoch = what.partition(" at epoch ")
    return [epochs[int(epoch or 0) - 1]["val_accuracy"] for epochs in epochs_at_a_quarter(row)]


def claims_of_the_report():
    lines = [line.split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    return [line[1:] for line in lines if len(line) == 4]  # what is compared, difference, verdict


def test_the_claims_of_the_report_are_held_against_the_results():
    claims = [claim for claim in claims_of_the_report() if " − " in claim[0]]
    assert len(claims) > 5
    for compared, difference, verdict in claims:
        pair = [accuracies_at_a_quarter(what) for what in compared.split(" − ")]
        mean = statistics.fmean(pair[0]) - statistics.fmean(pair[1])
        spread = sum(map(statistics.variance, pair)) ** 0.5
        assert difference == f"{mean:+.2f} ± {spread:.2f}"
        assert (verdict == "undecided |") == (abs(mean) <= spread)


def test_where_final_overfits_is_held_against_the_results():
    lowest = [min(run, key=lambda epoch: epoch["val_loss"]) for run in epochs_at_a_quarter("final")]
    numbers = [epoch["epoch"] for epoch in lowest]
    published = f"epoch {statistics.fmean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"
    assert published in [difference for _, difference, _ in claims_of_the_report()]


def test_the_readme_has_the_figures_of_best():
    text = " ".join((ROOT / "README.md").read_text().split())
    tests = [read_history(path)["test"] for path in sorted(ROOT.glob("results/best/best*.json"))]
    accuracies = [test["accuracy"] for test in tests]
    mirrored = [test["tta"]["accuracy"] for test in tests]
    assert f"{as_published(accuracies)}** of the test images" in text
    assert f"{as_published(mirrored)} with mirror images" in text
    paths = sorted(ROOT.glob("results/gpu/best*.json"))
    on_gpu = [read_history(path)["epochs"][-1]["val_accuracy"] for path in paths]
    assert f"On an H200 seeds 0 to 2 end at {as_published(on_gpu)}" in text
    assert f"weights/best.pt # {accuracies[-1]:.2f} %" in text  # seed 0's
