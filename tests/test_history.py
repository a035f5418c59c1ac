import io
import json
import sys

import pytest
from conftest import ROOT

from history import expand_patterns, harden_output, read_history, write_history


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


def test_what_nobody_can_read_any_more_is_dropped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # every write to it fails
    harden_output()
    print("a line", flush=True)
    print("another")
    sys.stdout.flush()


def test_patterns_that_a_shell_left_are_expanded(tmp_path):
    for name in ("b.json", "a.json", "c[1].json", "a.png"):
        (tmp_path / name).touch()
    named = [tmp_path / "gone.json", tmp_path / "c[1].json"]
    assert expand_patterns([tmp_path / "[ab].json", *named]) == [
        tmp_path / "a.json",
        tmp_path / "b.json",
        *named,
    ]


@pytest.mark.parametrize("script", ["train", "evaluate", "plot", "bench"])
def test_every_script_hardens_its_output(script):
    *_, last = (ROOT / f"{script}.py").read_text().partition('if __name__ == "__main__":\n')
    assert last == "    harden_output()\n    main()\n"
