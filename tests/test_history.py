import io
import json
import re
import shlex
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT

from checkpoint import load_checkpoint
from history import (
    NOT_HYPERPARAMETERS,
    expand_patterns,
    harden_output,
    hyperparameters,
    read_history,
    write_history,
)
from train import parse_args

COMMITTED = [path for path in sorted(ROOT.glob("results/**/*.json")) if path.parent.name != "bench"]
TODAY = vars(parse_args([]))
GONE = {"--residual", "--bias-lr"}  # what some committed histories were trained with


def test_a_file_has_an_epoch_a_line_and_all_batch_losses_in_one(history, tmp_path):
    write_history(tmp_path / "run.json", history)
    lines = (tmp_path / "run.json").read_text().splitlines()
    epochs = [line for line in lines if '"epoch"' in line]
    assert [json.loads(line.strip().rstrip(",")) for line in epochs] == history["epochs"]
    assert ' "batch_losses": [2.3, 2.0, 1.5, 1.2]' in lines


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/**/*.json")), ids=lambda path: path.stem)
def test_committed_files_are_as_they_would_be_written(path, tmp_path):
    bench = path.parent.name == "bench"
    content = json.loads(path.read_text()) if bench else read_history(path)
    losses = content.get("batch_losses", [])
    assert all(loss == float(f"{loss:.6g}") for loss in losses)
    write_history(tmp_path / "again.json", content)
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_characters_that_the_outputs_encoding_lacks_are_escaped(monkeypatch):
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="cp1252"))
    harden_output()
    print("a.jpg ± 猫.jpg \udcff")
    assert bytes_out.getvalue() == b"a.jpg \xb1 \\u732b.jpg \\udcff\n"


def test_a_notebooks_output_will_do(monkeypatch):
    class Output(io.TextIOBase):  # has no reconfigure, nor have ipykernel's and IDLE's
        write = Mock()

    monkeypatch.setattr(sys, "stdout", Output())
    harden_output()
    print("a line")
    Output.write.assert_any_call("a line")


def test_what_nobody_can_read_any_more_is_dropped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # every write to it fails
    harden_output()
    print("a line", flush=True)
    print("another")
    sys.stdout.flush()


def test_patterns_that_a_shell_left_are_expanded(tmp_path):
    for name in ("b.json", "a.json", "c[1].json", "d1.json", "a.png"):
        (tmp_path / name).touch()
    too_long = tmp_path / ("a" * 300)  # for a question to its file system
    named = [tmp_path / "gone.json", tmp_path / "c[1].json", tmp_path / "d[1].json", too_long]
    assert expand_patterns([tmp_path / "?.json", *named]) == [
        tmp_path / "a.json",
        tmp_path / "b.json",
        *named,
    ]


@pytest.mark.parametrize("script", ["train", "evaluate", "plot", "bench"])
def test_every_script_hardens_its_output(script):
    *_, last = (ROOT / f"{script}.py").read_text().partition('if __name__ == "__main__":\n')
    assert last == "    harden_output()\n    main()\n"


def committed_texts():
    for path in ROOT.glob("results/**/*.json"):
        yield path, path.read_text()
    path = ROOT / "weights/best.pt"
    checkpoint = load_checkpoint(path)
    yield path, json.dumps([checkpoint["config"], json.loads(checkpoint["history"])])


def test_committed_files_name_no_folder_of_the_machine_they_were_made_on():
    places = r'["\s=](~|/|[A-Z]:\\)'  # where a word begins
    assert not [path for path, text in committed_texts() if re.search(places, text)]


def test_a_committed_command_is_what_one_types_here():
    commands = [read_history(path)["command"] for path in COMMITTED]
    commands.append(json.loads(load_checkpoint(ROOT / "weights/best.pt")["history"])["command"])
    assert {command[: command.index(" -")] for command in commands} == {"python train.py"}


def test_every_option_that_a_history_may_lack_does_nothing_by_default():
    known = set.intersection(*(set(read_history(path)["config"]) for path in COMMITTED))
    assert hyperparameters(TODAY).keys() <= known  # NEUTRAL is where a new option belongs
    assert NOT_HYPERPARAMETERS <= TODAY.keys()


@pytest.mark.parametrize(
    "unknown, further",
    [
        ([], {}),
        (["logit_scale"], {"downsample": False, "bias_decay": True, "ema": None}),
        (["whiten"], {"residual": False, "bias_lr": None}),
    ],
)
def test_what_an_era_did_not_know_or_no_longer_does_makes_no_difference(unknown, further):
    config = {name: value for name, value in TODAY.items() if name not in unknown} | further
    assert hyperparameters(config) == hyperparameters(TODAY)


@pytest.mark.parametrize("option", [{"ema": 0.99}, {"bias_decay": False}, {"logit_scale": 0.5}])
def test_what_did_something_makes_a_difference_whether_it_is_gone_or_not(option):
    assert hyperparameters(TODAY | option) != hyperparameters(TODAY)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_run_has_the_options_of_its_command_today(path):
    history = read_history(path)
    _, _, *words = shlex.split(history["command"])
    if GONE & set(words):
        pytest.skip("train.py can no longer do that")
    assert hyperparameters(history["config"]) == hyperparameters(vars(parse_args(words)))
