import copy
import subprocess
import sys
from pathlib import Path

import pytest

import plot
from history import write_history

PNG = b"\x89PNG\r\n"


@pytest.fixture
def history():
    """A finished run of three epochs."""
    epochs = [
        {
            "epoch": number,
            "lr": 0.001,
            "train_loss": 2 / number,
            "train_accuracy": 20.0 * number,
            "val_loss": 2.1 / number,
            "val_accuracy": 15.0 * number,
            "seconds": 2.0,
            "images_per_second": 1000.0,
        }
        for number in (1, 2, 3)
    ]
    return {
        "name": "row4",
        "config": {"arch": [16, 8, 4], "k": 3, "fc": 1, "seed": 0, "epochs": 3, "gate": "softmax"},
        "reported": 61.0,
        "epochs": epochs,
        "batch_losses": [2.3, 2.0, 1.5, 1.2],
        "finished": True,
    }


def changed(history, name, accuracy=None, **config):
    """A copy of a history under another name, with another last accuracy and other options."""
    other = copy.deepcopy(history)
    other["name"] = name
    other["config"] |= config
    if accuracy is not None:
        other["epochs"][-1]["val_accuracy"] = accuracy
    return other


def values(axes):
    """The y values of an axes' labelled lines, by label."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_a_run_is_drawn_as_loss_and_accuracy_per_epoch(history):
    loss, accuracy, _ = plot.draw_run(history).axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "loss")
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "accuracy (%)")
    assert values(loss)["training"] == pytest.approx([2, 1, 2 / 3])
    assert values(loss)["validation"] == pytest.approx([2.1, 1.05, 0.7])
    assert values(accuracy) == {"training": [20, 40, 60], "validation": [15, 30, 45]}


def test_the_loss_of_every_batch_is_drawn_where_it_is_kept(history):
    batches = plot.draw_run(history).axes[2]
    assert values(batches)["each batch"] == history["batch_losses"]
    history["batch_losses"] = []
    assert len(plot.draw_run(history).axes) == 2


def test_an_unfinished_run_is_drawn_as_far_as_it_got(history):
    history |= {"epochs": history["epochs"][:1], "finished": False}
    assert values(plot.draw_run(history).axes[0])["training"] == [2]
    history |= {"epochs": [], "batch_losses": []}
    assert values(plot.draw_run(history).axes[0])["training"] == []


def test_runs_that_differ_in_their_seed_alone_make_one_row(history):
    runs = [history, changed(history, "row4-seed1", seed=1), changed(history, "wide", arch=[32])]
    assert [[run["name"] for run in row] for row in plot.rows_of(runs)] == [
        ["row4", "row4-seed1"],
        ["wide"],
    ]


def test_the_comparison_shows_reported_and_measured_accuracy_of_each_row(history):
    rows = plot.rows_of([history, changed(history, "wide", 70.0, arch=[32])])
    dots, curves = plot.draw_comparison(rows).axes
    assert [label.get_text() for label in dots.get_yticklabels()] == ["row4", "wide"]
    shown = {
        (line.get_label(), line.get_xdata()[0]) for line in dots.lines if len(line.get_xdata())
    }
    assert {("reported", 61.0), ("measured", 45.0), ("measured", 70.0)} <= shown
    assert values(curves) == {"row4": [15, 30, 45], "wide": [15, 30, 70]}


def test_the_table_has_the_options_that_differ_and_the_difference_to_the_report(history):
    rows = plot.rows_of([history, changed(history, "relu", 50.0, gate="relu", epochs=9)])
    lines = plot.table(rows).splitlines()
    assert lines[0] == "| row | hyperparameters | reported | measured | difference |"
    assert lines[2] == (
        "| row4 | arch 16 8 4, k 3, epochs 3, gate softmax | 61.00 % | 45.00 % | -16.00 |"
    )
    assert "gate relu" in lines[3] and "fc" not in lines[3]


def test_the_table_gives_mean_and_spread_over_seeds(history):
    rows = plot.rows_of([history, changed(history, "row4-seed1", 47.0, seed=1)])
    assert "46.00 % ± 1.41 (n = 2)" in plot.table(rows)


def test_the_table_says_what_is_not_finished_and_prefers_test_figures(history):
    history["test"] = {"accuracy": 44.0}
    running = changed(history, "running", arch=[1]) | {"finished": False}
    del running["test"]
    lines = plot.table(plot.rows_of([history, running])).splitlines()
    assert "44.00 %" in lines[2]
    assert "45.00 % (unfinished, epoch 3 of 3)" in lines[3]


def test_pictures_and_table_are_written_beside_the_histories(history, tmp_path, capsys):
    paths = []
    for name, arch in (("row4", [16, 8, 4]), ("x" * 60, [8])):
        paths.append(tmp_path / f"{name}.json")
        write_history(paths[-1], changed(history, name, arch=arch))
    with pytest.raises(SystemExit) as done:
        plot.main([str(path) for path in paths])
    assert not done.value.code
    for name in ("row4.png", "x" * 60 + ".png", "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_one_bad_history_does_not_keep_the_others_from_being_drawn(history, tmp_path, capsys):
    write_history(tmp_path / "good.json", history)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SystemExit) as done:
        plot.main([str(tmp_path / "bad.json"), str(tmp_path / "good.json")])
    assert done.value.code == 1
    assert "bad.json" in capsys.readouterr().err
    assert (tmp_path / "good.png").exists()


def test_plot_never_imports_torch():
    code = "import plot, sys; sys.exit('torch' in sys.modules)"
    root = Path(plot.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
