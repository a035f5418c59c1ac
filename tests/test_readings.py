"""The tables of results/readings/README.md say what the histories beside it say."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
from conftest import ROOT

from history import read_history

PAGE = (ROOT / "results/readings/README.md").read_text()
ROW_1, ROW_2, FINAL = "../rows/row1", "../rows/row2", "../rows/final"
EPOCHS = 1, 2, 5, 6, 8, 11, 15

# Of each line its label and the cells' histories in results/readings/, with @ and an epoch if it is
# not the last; "" where nothing was trained.
LINES = [
    ("as the README has it", f"{ROW_1}@1", f"{ROW_2}@1", f"{ROW_2}@3", f"{ROW_2}@6", ROW_2),
    (
        "the pool of the other row "
        "(`--pool adaptive`, `norelu-adaptive`; `--pool avg`, `relu-avg`)",
        *("norelu-adaptive@1", "relu-avg@1", "relu-avg@3", "relu-avg@6", ""),
    ),
    ("`--batch-size 32`", "row1-batch32@1", "row2-batch32@1", "row2-batch32@3", "", ""),
    ("`--init he`", "row1-he@1", "", "", "", ""),
    (
        "`--gate relu`",
        *("row1-gate-relu@1", "row2-gate-relu@1", "row2-gate-relu@3", "row2-gate-relu@6", ""),
    ),
    ("`--fc 3`", "row1-fc3@1", "", "", "", ""),
    (
        "global average pool before the FC layer (`global`)",
        *("", "row2-global@1", "row2-global@3", "row2-global@6", "row2-global@30"),
    ),
    ("as the README has it", *(f"{FINAL}@{epoch}" for epoch in EPOCHS)),
    ("`--batch-size 32` (`final-batch32`)", *(f"final-batch32@{epoch}" for epoch in EPOCHS)),
    (
        "as the README has it",
        *("small/row1", "small/row2", "limited/row2", "small/final", "limited/final"),
        "../rows/row4-seed0",
    ),
    (
        "images from 0 to 1, not normalised (`raw`)",
        *("small/row1-raw", "small/row2-raw", "limited/row2-raw", "", "limited/final-raw"),
        "small/row4-raw",
    ),
    (
        "`--batch-size 32`",
        *("", "", "", "small/final-batch32", "limited/final-batch32", "small/row4-batch32"),
    ),
    ("both", "", "", "limited/row2-raw-batch32", "", "limited/final-raw-batch32", ""),
    ("learning rate falls in steps (`steplr`)", "", "", "", "small/final-steplr", "", ""),
    ("the same with `--batch-size 32`", "", "", "", "small/final-steplr-batch32", "", ""),
    ("`--schedule onecycle`, in float32", "", "", "", "small/final-onecycle", "", ""),
    (
        "`--weight-decay 0.1`, in float32 (AdamW's own: 0.01)",
        *("", "", "", "small/final-decay", "", ""),
    ),
    (
        "the gate's softmax over the images of a batch (`dim0`), in float32",
        *("", "", "", "small/final-dim0", "", ""),
    ),
    ("`--augment flip`, in float32", "", "", "", "small/final-flip", "", ""),
    ("`--batch-size 512`", "small/row1-batch512", "small/row2-batch512", "", "", "", ""),
    (
        "`--precision float32`, 3 epochs (bfloat16: 43.9)",
        *("small/row1-float32", "", "", "", "", ""),
    ),
    (
        "`--gate relu` (row 1: 5 epochs)",
        *("small/row1-gate-relu", "small/row2-gate-relu", "limited/row2-gate-relu", "", ""),
        "small/row4-gate-relu",
    ),
    (
        "`--fc 3` (row 2: `--hidden 1024 --dropout 0`)",
        *("small/row1-fc3", "", "limited/row2-fc3", "", "", ""),
    ),
    (
        "global average pool before the FC layer (`global`)",
        *("", "", "limited/row2-global", "", "", ""),
    ),
    (
        "dropout before each hidden layer instead of after it",
        *("", "", "", "", "limited/final-dropout-first", ""),
    ),
]


def epoch_of(cell):
    name, _, number = cell.partition("@")
    epochs = read_history(ROOT / f"results/readings/{name}.json")["epochs"]
    return epochs[int(number) - 1 if number else -1]


def round_up(accuracy):
    """An accuracy of 10,000 images with one digit: 72.05 is 72.1."""
    return Decimal(f"{accuracy:.2f}").quantize(Decimal("0.1"), ROUND_HALF_UP)


@pytest.mark.parametrize("label, cells", [(label, cells) for label, *cells in LINES])
def test_a_line_has_the_accuracies_of_its_histories(label, cells):
    shown = [f" {round_up(epoch_of(cell)['val_accuracy'])}" if cell else "" for cell in cells]
    assert f"| {label} |{' |'.join(shown)} |" in PAGE


def test_all_lines_are_held_against_histories():
    for line in PAGE.splitlines():
        label, *cells = line[1:-1].split(" |") if line.startswith("| ") else [""]
        if any(len(cell) == 5 and cell[3] == "." for cell in cells):  # such as " 41.2"
            assert label.strip() in [known for known, *_ in LINES]


def test_final_is_as_far_off_as_is_said():
    final, batch_32 = (epoch_of(name) for name in (FINAL, "final-batch32"))
    assert f"{batch_32['val_accuracy']:.2f} % for {final['val_accuracy']:.2f} %" in PAGE
    assert {f"{e['train_accuracy']:.1f}" for e in (final, batch_32)} == {"99.7"}
    assert f"is {82.84 - final['val_accuracy']:.1f} points short of the report" in PAGE
    one_cycle, decay = (epoch_of(f"small/final-{name}") for name in ("onecycle", "decay"))
    seeds = [f"../quarter/final{seed}" for seed in ("", "-seed1", "-seed2")]
    accuracies = sorted(epoch_of(seed)["val_accuracy"] for seed in seeds)
    ends = f"({one_cycle['val_accuracy']:.2f} and {decay['val_accuracy']:.2f} %; seeds"
    assert f"{ends} {accuracies[0]:.2f} to {accuracies[-1]:.2f})" in PAGE


def test_row_2_hardly_overfits_with_a_global_pool():
    with_it, without = epoch_of("row2-global@30"), epoch_of(ROW_2)
    said = f"it has {with_it['train_accuracy']:.1f} % of its training images right"
    assert said in " ".join(PAGE.split())
    assert f"with the grid it has {without['train_accuracy']:.1f} %" in PAGE


def test_the_pool_of_row_2_is_worth_what_the_readme_says():
    worth = epoch_of(f"{ROW_2}@6")["val_accuracy"] - epoch_of("relu-avg@6")["val_accuracy"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"worth {worth:.1f} points after six epochs (full width, one seed)" in text
