import pytest
from conftest import ROOT, changed

from history import group, read_history, tabulate


def test_runs_that_differ_in_their_seed_alone_make_one_row(history):
    runs = [history, changed(history, "row4-seed1", seed=1), changed(history, "wide", arch=[32])]
    names = [[run["name"] for run in row] for row in group(runs)]
    assert names == [["row4", "row4-seed1"], ["wide"]]


def cells(*histories):
    """The cells of the table of some runs, line by line, without the header's rule."""
    lines = [line.strip("|").split("|") for line in tabulate(group(histories)).splitlines()]
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def test_the_table_has_the_options_that_differ_and_the_difference_to_the_report(history):
    header, row4, relu = cells(history, changed(history, "relu", 50.0, gate="relu", epochs=9))
    columns = "row, hyperparameters, parameters, reported, measured, difference, seconds"
    assert header == columns.split(", ")
    options = "arch 16 8 4, k 3, epochs 3, gate softmax"
    assert row4 == ["row4", options, "8,360", "61.00 %", "45.00 %", "-16.00", "6.0"]
    assert "gate relu" in relu[1] and "fc" not in relu[1]


def test_the_table_gives_mean_and_spread_over_seeds(history):
    other = changed(history, "row4-seed1", 47.0, seed=1)
    other["epochs"][0]["seconds"] = 4.0
    _, row4 = cells(history, other)
    assert row4[4:] == ["46.00 % ± 1.41 (n = 2)", "-15.00", "7.0"]


def test_the_table_says_what_is_not_finished_and_prefers_test_figures(history):
    running = changed(history, "running", arch=[1]) | {"finished": False}
    _, tested, unfinished = cells(history | {"test": {"accuracy": 44.0}}, running)
    assert tested[4] == "44.00 %"
    assert unfinished[4] == "45.00 % (unfinished, epoch 3 of 3)"


def test_unfinished_seeds_do_not_count_beside_finished_ones(history):
    running = changed(history, "row4-seed1", 10.0, seed=1) | {"finished": False}
    (row4,) = cells(history, running)[1:]
    assert row4[4] == "45.00 %"


def test_the_table_is_aligned_for_the_terminal(history):
    table = tabulate(group([history, changed(history, "a|long|name", arch=[32])]))
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "a\\|long\\|name" in table


def test_a_seed_counts_once(history):
    again = changed(history, "row4-seed0", 99.0)
    assert group([history, again]) == [[history]]
    assert group([history | {"finished": False}, again]) == [[again]]


def test_held_out_accuracies_are_not_compared_with_the_report(history):
    (row4,) = cells(changed(history, "row4", holdout=5000))[1:]
    assert row4[4:6] == ["45.00 % on held-out images", ""]


@pytest.mark.parametrize("tested", [0, 1])
def test_seeds_are_compared_by_the_same_images(history, tested):
    seeds = [changed(history, f"row4-seed{seed}", holdout=5000, seed=seed) for seed in (0, 1)]
    seeds[tested]["test"] = {"accuracy": 50.0}
    assert cells(*seeds)[1][4] == "45.00 % ± 0.00 (n = 2) on held-out images"


def test_the_readme_has_the_table_that_the_results_give():
    paths = sorted(ROOT.glob("results/rows/*"))
    assert tabulate(group(map(read_history, paths))) in (ROOT / "README.md").read_text()
