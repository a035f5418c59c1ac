import json

import pytest
from conftest import ROOT

from history import read_history, write_history


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
