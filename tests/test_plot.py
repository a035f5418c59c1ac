import sys
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, changed, ended, execute

import gallery
import plot
from history import read_history, write_history
from plot import group, tabulate
from train import parse_args


def values(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def save(folder, *histories):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{history['name']}.json" for history in histories]
    for path, history in zip(paths, histories):
        write_history(path, history)
    return paths


def draw(*arguments):
    """Run plot.py; its exit code, or the line that it leaves with exit code 1."""
    return ended(plot.main, [str(argument) for argument in arguments]) or 0


def pictures(folder):
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.fixture
def test():
    """Test figures of a network with 2 blocks and k = 3, right every time."""
    gate = {"mean_per_class": [[0.5, 0.3, 0.2]] * 10, "quantiles": [[0.1, 0.2, 0.3, 0.4, 0.5]] * 3}
    bins = [{"confidence": None, "accuracy": None, "count": 0}] * 14
    bins.append({"confidence": 97.0, "accuracy": 100.0, "count": 40})
    return {
        "accuracy": 100.0,
        "images": 40,
        "wrong": [],
        "calibration": {"bins": bins, "ece": 3.0},
        "per_class": {f"class{number}": 100.0 for number in range(10)},
        "confusion": (4 * np.eye(10, dtype=int)).tolist(),
        "gates": [{"block": name} | gate for name in ("block1", "block2")],
    }


def test_a_run_is_drawn_as_loss_and_accuracy_per_epoch(history):
    loss, accuracy, _ = plot.draw_run([history], "row4").axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "loss")
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "accuracy (%)")
    assert values(loss)["training"] == pytest.approx([2, 1, 2 / 3])
    assert values(loss)["validation"] == pytest.approx([2.1, 1.05, 0.7])
    assert values(accuracy) == {"training": [20, 40, 60], "validation": [15, 30, 45]}
    assert sorted(texts(accuracy)) == ["45.00", "60.00"]  # the last values


def test_the_space_between_training_and_validation_is_filled(history):
    (gap,) = plot.draw_run([history], "row4").axes[1].collections
    assert gap.get_label() == "gap"
    assert {15, 20, 45, 60} <= set(gap.get_paths()[0].vertices[:, 1])


def test_further_metrics_have_a_panel_each(history):
    for epoch in history["epochs"]:
        epoch |= {"train_gradient_norm": 1.0 + epoch["epoch"]}
    figure = plot.draw_run([history], "row4")
    *_, norm, batches = figure.axes
    assert norm.get_ylabel() == "gradient norm"
    assert values(norm) == {"training": [2, 3, 4]}
    assert texts(norm) == ["4.00"]


def test_the_loss_of_every_batch_is_drawn(history):
    batches = plot.draw_run([history], "row4").axes[2]
    (losses,) = batches.collections
    assert losses.get_label() == "each batch"
    assert set(history["batch_losses"]) <= set(losses.get_paths()[0].vertices[:, 1])
    assert values(batches)["mean of 2"] == pytest.approx([2.15, 1.75, 1.35])


def test_huge_first_losses_do_not_flatten_the_others(history):
    history["batch_losses"] = [80.0] + [1.0] * 999
    batches = plot.draw_run([history], "row4").axes[2]
    assert batches.get_ylim()[1] < 2
    assert batches.get_title(loc="left") == "above: up to 80"


def test_a_metric_that_one_of_several_seeds_lacks_has_no_panel(history):
    other = changed(history, "row4-seed1", seed=1)
    for epoch in other["epochs"]:
        epoch["train_grad_norm"] = 2.0
    for row in ([history, other], [other, history]):
        assert len(plot.draw_run(row, "row4").axes) == 3


def test_several_seeds_are_drawn_as_their_mean_and_range(history):
    figure = plot.draw_run([history, changed(history, "row4-seed1", 47.0, seed=1)], "row4")
    accuracy = figure.axes[1]
    assert figure.get_suptitle() == "row4, mean and range of 2 seeds"
    assert values(accuracy)["validation"] == [15, 30, 46]
    _, band, _ = accuracy.collections
    assert {45, 47} <= set(band.get_paths()[0].vertices[:, 1])


@pytest.mark.parametrize("seeds, name", [((1,), "row4-seed1"), ((1, 2), "row4")])
def test_the_picture_of_several_seeds_has_the_rows_name(history, seeds, name, tmp_path):
    runs = [changed(history, f"row4-seed{seed}", seed=seed) for seed in seeds]
    assert draw(*save(tmp_path, *runs)) == 0
    assert pictures(tmp_path) == [f"{name}.png"]


def test_an_unfinished_run_is_drawn_as_far_as_it_got(history):
    history |= {"finished": False, "epochs": history["epochs"][:2]}
    figure = plot.draw_run([history], "row4")
    assert figure.get_suptitle() == "row4 (unfinished, epoch 2 of 3)"
    assert values(figure.axes[1])["validation"] == [15, 30]


def test_a_run_without_an_epoch_is_named_and_left_out(history, tmp_path, capsys):
    begun = history | {"name": "begun", "epochs": [], "batch_losses": [], "finished": False}
    assert draw(*save(tmp_path, history, begun)) == 0
    assert pictures(tmp_path) == ["row4.png"]
    assert "begun.json is left out: it has no epoch yet" in capsys.readouterr().err
    assert "begun.json is left out: it has no epoch yet" in draw(tmp_path / "begun.json")


def test_the_comparison_shows_reported_and_measured_accuracy_of_each_row(history):
    rows = group([history, changed(history, "wide", 70.0, arch=[32])])
    dots, curves = plot.draw_comparison(rows, "").axes
    assert [label.get_text() for label in dots.get_yticklabels()] == ["row4", "wide"]
    shown = {(line.get_label(), *line.get_xdata()[:1]) for line in dots.lines}
    assert {("reported", 61.0), ("measured", 45.0), ("measured", 70.0)} <= shown
    assert values(curves) == {"row4": [15, 30, 45], "wide": [15, 30, 70]}
    rows[0][0]["config"]["holdout"], rows[1][0]["finished"] = 5000, False
    dots, _ = plot.draw_comparison(rows, "").axes
    names = [label.get_text() for label in dots.get_yticklabels()]
    assert names == ["row4 (held out)", "wide (unfinished, epoch 3 of 3)"]
    rings = [list(line.get_ydata()) for line in dots.lines if line.get_label() == "reported"]
    assert rings == [[1]]  # what the report tested is compared with tests alone


def test_every_row_of_the_comparison_is_in_its_legend(history):
    rows = group([changed(history, "_base"), changed(history, "wide", arch=[32])])
    _, curves = plot.draw_comparison(rows, "").axes
    assert [text.get_text().strip() for text in curves.get_legend().get_texts()] == [
        "_base",
        "wide",
    ]


def test_rows_are_compared_over_minutes(history):
    for epoch in history["epochs"]:
        epoch["seconds"] = 90.0
    rows = group([history, changed(history, "wide", 70.0, arch=[32])])
    figure = plot.draw_comparison(rows, "", minutes=True)
    figure.draw_without_rendering()
    _, curves = figure.axes
    assert curves.get_xlabel() == "minutes"
    assert list(curves.lines[0].get_xdata()) == [1.5, 3, 4.5]
    labels = {label.get_text() for label in curves.get_xticklabels(which="both")}
    assert labels >= {"2", "3", "4"}
    assert not any("$" in label for label in labels)


def test_the_confusion_matrix_has_counts_and_shares_of_all_classes(test):
    confusion, classes, calibration = gallery.draw_test(test, "row4").axes
    assert len(texts(confusion)) == 100
    assert texts(confusion)[0] == "4\n100.0%"
    for labels in (confusion.get_xticklabels(), confusion.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(test["per_class"])
    assert [bar.get_width() for bar in classes.patches] == [100] * 10


def test_the_reliability_diagram_has_a_bar_of_each_bin_with_images(test):
    calibration = gallery.draw_test(test, "row4").axes[2]
    (bar,) = calibration.containers[0]
    assert bar.get_x() + bar.get_width() == pytest.approx(100)
    assert bar.get_height() == 100
    assert "3.00 %" in calibration.get_title()


@pytest.mark.parametrize("k, blocks", [(1, 2), (3, 2), (5, 6)])
def test_the_gates_of_every_block_are_drawn(test, k, blocks):
    gate = {"mean_per_class": [[1 / k] * k] * 10, "quantiles": [[0, 0.1, 0.2, 0.3, 2]] * k}
    test["gates"] = [{"block": f"block{number + 1}"} | gate for number in range(blocks)]
    axes = gallery.draw_gates(test, "row4").axes
    assert [a.get_ylabel() for a in axes[::2]] == [g["block"] for g in test["gates"]]
    assert texts(axes[0]) == [f"{1 / k:.2f}"] * 10 * k


def test_the_gates_of_some_blocks_are_drawn_alone(history, test, tmp_path, monkeypatch):
    drawn = Mock(wraps=gallery.draw_gates)
    monkeypatch.setattr(plot, "draw_gates", drawn)
    (path,) = save(tmp_path, history | {"test": test})
    assert draw(path, "--blocks", "2") == 0
    assert [axes.get_ylabel() for axes in gallery.draw_gates(*drawn.call_args.args).axes[::2]] == [
        "block2"
    ]
    assert "--blocks 2 3: 2 blocks have gates" in draw(path, "--blocks", "2", "3")


def test_the_similarity_of_a_blocks_kernels_stands_beside_its_name(test):
    test["gates"][0]["similarity"], test["gates"][1]["similarity"] = 0.9, None  # of k = 1
    labels = [axes.get_ylabel() for axes in gallery.draw_gates(test, "row4").axes[::2]]
    assert labels == ["block1\ncos 0.90", "block2"]


def test_one_row_leaves_the_table_of_many(history, tmp_path):
    (tmp_path / "results.md").write_text("many")
    assert draw(*save(tmp_path, history)) == 0
    assert (tmp_path / "results.md").read_text() == "many"


def test_wrong_images_are_drawn_with_true_and_predicted_names():
    wrong = [{"index": 7, "true": "cat", "predicted": "dog", "confidence": 99.0}] * 7
    axes = gallery.draw_wrong(np.zeros((7, 32, 32, 3), np.uint8), wrong, "row4").axes
    assert [a.get_title() for a in axes] == ["cat →\ndog, 99 %"] * 7 + [""] * 5
    assert gallery.draw_wrong([], [], "row4").texts[-1].get_text().startswith("no test image")


def test_a_tested_run_has_two_pictures_more(history, test, tmp_path):
    assert draw(*save(tmp_path, history | {"test": test})) == 0
    assert pictures(tmp_path) == ["row4-gates.png", "row4-test.png", "row4.png"]


def test_networks_without_a_choice_have_no_picture_of_gates(history, test, tmp_path):
    path = save(tmp_path, history | {"test": test | {"gates": []}})
    assert draw(*path) == 0
    assert pictures(tmp_path) == ["row4-test.png", "row4.png"]
    assert "--blocks 1: 0 blocks have gates" in draw(*path, "--blocks", "1")


def test_damaged_test_figures_are_named_and_the_rest_drawn(history, test, tmp_path):
    damaged = test | {"confusion": "?", "gates": "?"}
    problems = draw(*save(tmp_path, history | {"test": damaged}))
    assert problems.count("is not drawn: ") == 2
    assert (tmp_path / "row4.png").exists()


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_come_in_other_formats(history, suffix, start, tmp_path):
    title = "half $ of it"
    assert draw(*save(tmp_path, history), "--format", suffix, "--title", title) == 0
    picture = (tmp_path / f"row4.{suffix}").read_bytes()
    assert picture.startswith(start)
    assert suffix == "pdf" or title.encode() in picture


def test_two_pictures_never_share_a_file(history, test, tmp_path):
    tested = history | {"test": test}
    paths = save(tmp_path / "a", tested) + save(tmp_path / "b", changed(tested, "row4", k=2))
    assert "another picture is called so" in draw(*paths, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["caf\udce9", "two\nlines", "\x07", "$x", "|"])
def test_a_run_may_be_called_anything_that_a_file_can_be(history, name, tmp_path):
    assert draw(*save(tmp_path, changed(history, name, k=2), history), "--format", "svg") == 0
    assert len(list(tmp_path.glob("*.svg"))) == 3  # with the comparison
    assert (tmp_path / "results.md").read_text("utf-8").count("\n") == 4


def test_a_picture_that_cannot_be_written_keeps_nothing_else_from_it(history, tmp_path):
    (tmp_path / "row4.png").mkdir()
    problems = draw(*save(tmp_path, history, changed(history, "wide", arch=[32])))
    assert problems.startswith(f"plot.py: error: {tmp_path / 'row4.png'} is not drawn: ")
    assert pictures(tmp_path) == ["comparison.png", "row4.png", "wide.png"]
    assert (tmp_path / "results.md").exists()


def test_pictures_and_table_are_written_beside_the_histories(history, tmp_path, capsys):
    assert draw(*save(tmp_path, history, changed(history, "x" * 60, arch=[8]))) == 0
    assert pictures(tmp_path) == ["comparison.png", "row4.png", "x" * 60 + ".png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in tmp_path.glob("*.png"))
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_one_bad_history_does_not_keep_the_others_from_being_drawn(history, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json" in draw(tmp_path / "bad.json", *save(tmp_path, history))
    assert (tmp_path / "row4.png").exists()


def test_plot_never_imports_torch():
    code = "import plot, sys; sys.exit('torch' in sys.modules)"
    assert execute(sys.executable, "-c", code).returncode == 0


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


def test_of_seeds_one_of_which_died_there_is_no_mean(history):
    row = [history, changed(history, "row4-seed1", 10.0, seed=1)]
    assert cells(*row)[1][4:6] == ["10.00, 45.00 %", ""]
    dots, curves = plot.draw_comparison([row, [changed(history, "wide", arch=[32])]], "").axes
    measured = [list(line.get_xdata()) for line in dots.lines if line.get_label() == "measured"]
    assert measured == [[45.0, 10.0], [45.0]]
    assert [line.get_ydata()[-1] for line in curves.lines] == [45.0, 10.0, 45.0]
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == ["row4", "wide"] and not curves.collections  # no band


def test_the_table_says_what_is_not_finished_and_prefers_test_figures(history):
    running = changed(history, "running", arch=[1]) | {"finished": False}
    _, tested, unfinished = cells(history | {"test": {"accuracy": 44.0}}, running)
    assert tested[4] == "44.00 %"
    assert unfinished[4] == "45.00 % (unfinished, epoch 3 of 3)"


def test_unfinished_seeds_are_compared_at_the_last_epoch_that_all_have(history):
    running = changed(history, "row4", seed=0) | {"finished": False}
    begun = changed(history, "row4-seed1", seed=1) | {"finished": False}
    begun["epochs"] = begun["epochs"][:2]
    (row4,) = cells(running, begun)[1:]
    assert row4[4] == "30.00 % ± 0.00 (n = 2) (unfinished, epoch 2 of 3)"


def test_unfinished_runs_are_named_and_left_out_beside_finished_ones(history, tmp_path, capsys):
    running = changed(history, "row4-seed1", 10.0, seed=1) | {"finished": False}
    (row4,) = cells(history, running)[1:]
    assert row4[4] == "45.00 %"
    assert draw(*save(tmp_path, history, running)) == 0
    err = capsys.readouterr().err
    assert "row4-seed1.json is left out: others of its row are finished" in err


def test_a_row_is_compared_with_all_figures_that_its_runs_were_given(history):
    other = changed(history, "row4-seed1", seed=1) | {"reported": [62.0, 61.0]}
    (row4,) = cells(history, other)[1:]
    assert row4[3] == "61.00 %, 62.00 %"


def test_the_table_is_aligned_for_the_terminal(history):
    table = tabulate(group([history, changed(history, "a|long|name", arch=[32])]))
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "a\\|long\\|name" in table


def grouped(*paths):
    """The rows of some files, as the paths of each."""
    runs, problems, left_out = plot.read_runs(paths)
    assert not problems + left_out
    return [[run["path"] for run in row] for row in group(runs)]


def save_seeds(folder, history, *seeds):
    names = [f"row4-seed{seed}" if seed else "row4" for seed in seeds]
    return save(folder, *(changed(history, name, seed=s) for name, s in zip(names, seeds)))


def test_seeds_of_several_machines_are_one_row(history, tmp_path):
    cpu, gpu = save_seeds(tmp_path / "cpu", history, 2, 0), save_seeds(tmp_path / "gpu", history, 1)
    assert grouped(*cpu, *gpu) == [[cpu[1], gpu[0], cpu[0]]]


def test_where_a_seed_is_there_twice_runs_named_alike_in_a_folder_are_a_row(history, tmp_path):
    cpu = save_seeds(tmp_path / "cpu", history, 0)
    gpu = save_seeds(tmp_path / "gpu", history, 0, 1, 2)
    again = save(
        tmp_path / "cpu", changed(history, "again"), changed(history, "again-seed1", seed=1)
    )
    assert grouped(*cpu, *gpu, *again) == [cpu, gpu, again]
    assert grouped(*gpu, *again, *cpu) == [gpu, again, cpu]


def test_a_row_has_a_seed_once_whatever_its_runs_are_called(history, tmp_path):
    seeds = save_seeds(tmp_path, history, 0, 1)
    again = save(tmp_path, changed(history, "row4-seed0"))
    assert grouped(*seeds, *again) == [seeds, again]


def test_rows_that_are_called_alike_have_their_folders_before_their_names(history, tmp_path):
    paths = save_seeds(tmp_path / "a", history, 0, 1) + save_seeds(tmp_path / "b", history, 0)
    draw(*paths, *save(tmp_path / "b", changed(history, "wide", k=2)), "--out", tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [f"{tmp_path}/a/row4", f"{tmp_path}/b/row4", "wide"]


def test_rows_of_a_folder_that_are_called_alike_have_their_seeds_behind_their_names(
    history, tmp_path
):
    first = save_seeds(tmp_path, history, 0)
    short = save(
        tmp_path, *(changed(history, f"row4-seed{seed}", seed=seed, epochs=2) for seed in (1, 2))
    )
    assert draw(*first, *short) == 0
    lines = (tmp_path / "results.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [f"{tmp_path}/row4", f"{tmp_path}/row4-seeds1-2"]
    assert pictures(tmp_path) == ["comparison.png", "row4-seeds1-2.png", "row4.png"]


@pytest.mark.parametrize("lacking", ["seconds", "val_accuracy", "val_loss"])
def test_a_history_that_lacks_a_metric_is_refused_and_the_others_are_drawn(
    history, tmp_path, lacking
):
    cut = changed(history, "cut")
    del cut["epochs"][0][lacking]
    paths = save(tmp_path, history, cut)
    assert f"{paths[1]} is not a history that train.py wrote" in draw(*paths)
    assert pictures(tmp_path) == ["row4.png"]


def test_a_test_without_gates_is_drawn_without_them(history, tmp_path, test):
    del test["gates"]
    assert draw(*save(tmp_path, history | {"test": test})) == 0
    assert pictures(tmp_path) == ["row4-test.png", "row4.png"]


def test_a_seed_trained_today_joins_its_published_row(history, tmp_path):
    published = sorted(ROOT.glob("results/rows/row4*.json"))
    _, _, *words = read_history(published[0])["command"].split()
    config = vars(parse_args([*words, "--seed", "3"])) | {"out": "runs", "data_dir": "data"}
    today = save(tmp_path, history | {"name": "row4-seed3", "config": config})
    assert grouped(*published, *today) == [published + today]


def test_held_out_accuracies_are_not_compared_with_the_report(history):
    (row4,) = cells(changed(history, "row4", holdout=5000))[1:]
    assert row4[4:6] == ["45.00 % on held-out images", ""]


@pytest.mark.parametrize("tested", [0, 1])
def test_seeds_are_compared_by_the_same_images(history, tested):
    seeds = [changed(history, f"row4-seed{seed}", holdout=5000, seed=seed) for seed in (0, 1)]
    seeds[tested]["test"] = {"accuracy": 50.0}
    assert cells(*seeds)[1][4] == "45.00 % ± 0.00 (n = 2) on held-out images"


def test_the_backend_of_a_notebook_does_not_matter():
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = execute(sys.executable, "plot.py", "--help", **backend)
    assert result.returncode == 0, result.stderr
