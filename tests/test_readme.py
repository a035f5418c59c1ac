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
    paths = sorted(ROOT.glob(f"results/{folder}/*"))
    for row in group(read_history(path) | {"name": path.stem} for path in paths):
        (line,) = (line for line in lines if line.startswith(f"| {name_row(row)} "))
        assert as_published(last_accuracies(row)) in line.split("|")[column]


def test_the_readme_has_the_figures_of_best():
    text = " ".join((ROOT / "README.md").read_text().split())
    tests = [read_history(path)["test"] for path in sorted(ROOT.glob("results/best/best*.json"))]
    accuracies = [test["accuracy"] for test in tests]
    mirrored = [test["tta"]["accuracy"] for test in tests]
    assert f"{as_published(accuracies)}** of the test images" in text
    assert f"{as_published(mirrored)} with mirror images" in text
    assert f"weights/best.pt # {accuracies[-1]:.2f} %" in text  # seed 0's
