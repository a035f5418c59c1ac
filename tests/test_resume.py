import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import RECIPE, at_batch, ended, ending, files, without_times

import evaluate
import fast
import train
from checkpoint import load_checkpoint, write_checkpoint
from history import read_history

NETWORKS = {
    "report": "--augment crop flip",
    "recipe": " ".join(RECIPE),
    "others": "--k 3 --mix outputs --batch-size 24 --holdout 500 --schedule none --optimizer adam",
}
LAYOUTS = torch.contiguous_format, torch.channels_last  # of CPUs, of GPUs
INTERRUPTED = {  # within an epoch, at its end, in validation, after the first epoch
    f"{name}, batch {batches}": (f"{options} --epochs 3", batches)
    for name, options in NETWORKS.items()
    for batches in (2, 4, 6, 13)
}


@pytest.mark.parametrize("options, batches", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupted_run_goes_on_to_the_same_end(run, stop, tmp_path, options, batches):
    run(options)
    whole = ending(tmp_path)
    assert stop(batches, options, "--overwrite") == 128 + 15
    assert "state" in load_checkpoint(tmp_path / "run.pt")
    resumed = run(options, "--resume")
    assert ending(tmp_path) == whole
    longer = resumed["config"]["schedule"] == "none"  # may be asked for
    assert ("state" in load_checkpoint(tmp_path / "run.pt")) == longer


def test_a_validation_in_which_a_run_was_stopped_does_not_count_as_training(run, monkeypatch):
    clock, passed = time.perf_counter, [0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))

    def stop_after_an_hour():
        passed.append(3600)
        os.kill(os.getpid(), signal.SIGTERM)

    with at_batch(6, stop_after_an_hour):
        assert ended(run) == 128 + 15
    first, *_ = run("--resume")["epochs"]
    assert first["seconds"] > 3600
    assert first["images_per_second"] > 1


@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]], ids=str)
def test_a_run_goes_on_where_tensors_lie_in_memory_otherwise(run, stop, monkeypatch, layouts):
    whole, layouts = run()["batch_losses"], iter(layouts)
    monkeypatch.setattr(fast, "memory_format", lambda device, precision: next(layouts))
    assert stop(2, "--overwrite") == 128 + 15
    assert run("--resume")["batch_losses"] == pytest.approx(whole, rel=1e-4)


def test_a_signal_that_comes_while_processes_agree_is_not_lost(run, monkeypatch):
    def agree_late(tensor, operation=None):
        if operation:
            os.kill(os.getpid(), signal.SIGTERM)
        return tensor

    monkeypatch.setattr("run.all_reduce", agree_late)
    monkeypatch.setattr("run.WORLD_SIZE", 2)
    assert ended(run) == 128 + 15


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    run()
    before = files(tmp_path)
    assert ended(run, "--resume") == 0
    assert files(tmp_path) == before


def test_a_run_without_a_schedule_can_be_given_more_epochs(run):
    longer = without_times(run("--schedule none --epochs 3"))
    run("--schedule none --epochs 2 --overwrite")
    assert without_times(run("--schedule none --epochs 3 --resume")) == longer


@pytest.mark.parametrize(
    "lost, now, message",
    [
        (None, "", "go on with it by --resume, replace it by --overwrite"),
        (None, "--resume --k 3", "made with other options, k 2 (now 3)"),
        (None, "--resume --epochs 3", "epochs 2 (now 3)"),
        ("run.pt", "--resume", "run.pt is gone"),
        ("run.json", "--resume --lr 7", "run.pt was made with other options, lr 0.001 (now 7"),
    ],
)
def test_what_is_there_of_a_run_is_never_lost(run, tmp_path, refused, lost, now, message):
    run()
    if lost:
        (tmp_path / lost).unlink()
    before = files(tmp_path)
    assert message in refused(run, now)
    assert files(tmp_path) == before


@pytest.mark.parametrize("lost", [True, False])
def test_the_checkpoint_alone_is_enough_to_go_on(run, stop, tmp_path, monkeypatch, lost):
    whole = without_times(run())
    stop(11, "--overwrite")
    history = tmp_path / "run.json"
    history.unlink() if lost else history.write_bytes(history.read_bytes()[:-20])
    validate = Mock(wraps=train.predict)
    monkeypatch.setattr(train, "predict", validate)
    assert without_times(run("--resume")) == whole
    assert validate.call_count == 1  # the first epoch is not repeated


def test_a_run_goes_on_whatever_options_came_and_went_since(run, stop, tmp_path, refused):
    whole = without_times(run())
    stop(3, "--overwrite")
    saved = load_checkpoint(tmp_path / "run.pt")
    del saved["config"]["logit_scale"]
    saved["config"]["ema"] = None
    write_checkpoint(tmp_path / "run.pt", saved)
    assert "logit_scale None (now 2.0)" in refused(run, "--resume --logit-scale 2")
    assert without_times(run("--resume")) == whole


def test_options_that_do_not_change_the_result_may_differ(run, stop):
    whole = run("--device cpu")
    stop(3, "--device cpu --overwrite")
    resumed = run("--resume --device auto --data-dir elsewhere --reported 50")
    assert without_times(resumed) == without_times(whole)


def test_a_finished_run_whose_history_is_lost_gets_it_back(run, tmp_path, capsys):
    whole = run()
    (tmp_path / "run.json").unlink()
    assert ended(run, "--resume") == 0
    assert read_history(tmp_path / "run.json") == whole
    assert "run.json is written again" in capsys.readouterr().err


def test_a_finished_run_takes_another_reported_figure_and_keeps_its_test(run, tmp_path, capsys):
    run("--reported 40")
    evaluate.main([str(tmp_path / "run.pt")])
    tested = read_history(tmp_path / "run.json")
    assert ended(run, "--resume --reported 50") == 0
    assert read_history(tmp_path / "run.json") == tested | {"reported": [50]}
    assert capsys.readouterr().err.splitlines()[-2].endswith("run.json is written again")


def test_an_unfinished_run_can_be_tested(stop, tmp_path, capsys):
    stop(6)
    evaluate.main([str(tmp_path / "run.pt")])
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].startswith("Final Model Test Accuracy: ")
    assert "run.json is not there, not finished or of other weights" in output.err


def test_a_resumed_run_keeps_the_environment_of_its_last_start(run, stop, monkeypatch):
    stop(2, "--reported 40")
    another = {"device": "another", "precision": "float32"}
    monkeypatch.setattr("run.describe_environment", lambda *_: another)
    history = run("--resume --reported 50")
    assert history["reported"] == [50]
    assert history["environment"]["device"] == "another"


def test_a_reported_figure_that_is_not_given_again_is_not_lost(run, stop):
    stop(2, "--reported 40 50")
    assert run("--resume")["reported"] == [40, 50]


def test_a_run_goes_on_in_the_precision_it_began_in(run, stop, tmp_path, monkeypatch):
    monkeypatch.setattr("fast.has_bfloat16", lambda: True)
    run("--precision auto")
    whole = ending(tmp_path)
    stop(6, "--precision auto --overwrite")
    monkeypatch.setattr("fast.has_bfloat16", lambda: False)
    assert run("--precision auto --resume")["environment"]["precision"] == "bfloat16"
    assert ending(tmp_path) == whole
    assert load_checkpoint(tmp_path / "run.pt")["precision"] == "bfloat16"  # of tests, too


class Killed(BaseException):
    """What ends a run as kill -9 would: nothing is saved any more."""


def die(*_):
    raise Killed


@pytest.fixture
def kill(run, monkeypatch):
    """kill(suffix, option, ...): a run that is killed as it replaces its file of that suffix, for
    the first time or as it finishes."""

    def run_and_die(suffix, *options, finished=False):
        replace = os.replace

        def replace_or_die(new, old):
            if Path(old).suffix == suffix and (
                not finished or b'"finished": true' in new.read_bytes()
            ):
                die()
            replace(new, old)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace_or_die)
            run(*options)

    return run_and_die


def test_a_run_that_was_killed_before_anything_was_saved_begins_again(run, tmp_path):
    whole = without_times(run())
    with at_batch(1, die), pytest.raises(Killed):
        run("--overwrite")
    assert read_history(tmp_path / "run.json")["finished"] is False
    assert without_times(run("--resume")) == whole


def test_an_overwrite_that_cannot_begin_leaves_everything(run, tmp_path):
    run()
    before = files(tmp_path)
    assert "a smaller network" in ended(run, "--overwrite --arch 2000000000 2000000000")
    assert files(tmp_path) == before


@pytest.mark.parametrize("suffix, kept, other", [(".pt", 0.001, 0.1), (".json", 0.1, 0.001)])
def test_a_killed_overwrite_never_mixes_two_runs(run, kill, tmp_path, suffix, kept, other):
    run()
    kill(suffix, "--lr 0.1 --overwrite")
    assert set(files(tmp_path)) == {"run.pt"}
    assert f"lr {kept} (now {other})" in ended(run, f"--lr {other} --resume")


def test_a_kill_at_the_very_end_repeats_nothing(run, kill, tmp_path):
    whole = run()
    kill(".json", "--overwrite", finished=True)
    assert not read_history(tmp_path / "run.json")["finished"]
    assert ended(run, "--resume") == 0
    assert without_times(read_history(tmp_path / "run.json")) == without_times(whole)


def test_a_killed_runs_half_written_files_go_with_the_next_start(run, tmp_path):
    for name in ("run.pt.123.part", "run.json.123.part", "run.other.pt.123.part"):
        (tmp_path / name).touch()
    run()
    assert set(files(tmp_path)) == {"run.json", "run.other.pt.123.part", "run.pt"}
