"""Wrong invocations: one clear line on stderr, the right exit code, and nothing lost."""

import json
import shutil
import zipfile

import pytest
import torch
from conftest import CIFAR10, TINY, needs_cifar10

import evaluate
import plot
import train
from checkpoint import OLD_FORMAT, write_checkpoint
from model import build_model

USAGE = [
    (["--dataset", "cifar100"], "cifar100"),
    (["--arch"], "--arch"),
    (["--arch", "16", "-8"], "-8 is out of range"),
    (["--arch", "16", "0"], "0 is out of range"),
    (["--arch", "16,8"], "invalid int value: '16,8'"),
    (["--k", "0"], "0 is out of range: it must be at least 1"),
    (["--k", "2.5"], "invalid int value: '2.5'"),
    (["--gate", "tanh"], "tanh"),
    (["--pool", "max"], "max"),
    (["--fc", "0"], "--fc"),
    (["--hidden", "-4096"], "--hidden"),
    (["--dropout", "1.5"], "1.5 is out of range: it must be at least 0 and at most 1"),
    (["--init", "xavier"], "xavier"),
    (["--optimizer", "lion"], "lion"),
    (["--lr", "0"], "0 is out of range: it must be more than 0"),
    (["--lr", "nan"], "nan is out of range"),
    (["--lr", "inf"], "inf is out of range"),
    (["--weight-decay", "-1"], "--weight-decay"),
    (["--momentum", "0.9"], "--momentum 0.9 is for --optimizer sgd, not adamw"),
    (["--nesterov"], "--nesterov is for --optimizer sgd with a --momentum above 0"),
    (["--optimizer", "sgd", "--momentum", "0", "--nesterov"], "--nesterov"),
    (["--schedule", "linear"], "linear"),
    (["--label-smoothing", "2"], "2 is out of range: it must be at least 0 and at most 1"),
    (["--ema", "1"], "1 is out of range: it must be at least 0 and at most 0.9999"),
    (["--norm", "layer"], "layer"),
    (["--downsample", "--arch", *"4 8 4 8 4 8".split()], "--arch 4 8 4 8 4 8 change 5 times"),
    (["--epochs", "0"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"),
    (["--limit", "0"], "--limit"),
    (["--batch-size", str(2**63)], "at most 9223372036854775807"),
    (["--hidden", str(2**70)], "out of range"),
    (["--seed", str(2**64)], "out of range"),
    (["--hold", "500"], "unrecognized arguments: --hold"),
    (["--augment", "rotate"], "rotate"),
    (["--seed", "-1"], "--seed"),
    (["--reported", "101"], "--reported"),
    (["--precision", "float16"], "float16"),
    (["--mix", "both"], "both"),
    (["--name", "a/b"], "--name 'a/b'"),
    (["--name", ".."], "--name '..'"),
    (["--name", "x.state"], "another run's file"),
    (["--name", "x-test"], "another run's file or picture"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--depth", "3"], "--depth"),
]

FAILURES = [
    (["--device", "cuda:99"], "--device cuda:99 does not work here"),
    (["--device", "meta"], "--device meta does not work here"),
    (["--device", "abacus"], "--device abacus does not work here"),
    (["--holdout", "15"], "--holdout 15: not a multiple of the 10 classes"),
    (["--holdout", "10000"], "--holdout 10000"),
    (["--limit", "10001"], "--limit 10001: there are 10000 training images"),
    (
        ["--dataset", "cifar10", "--data-dir", "MISSING"],
        "cifar-10-batches-py/data_batch_1 is missing or damaged",
    ),
    (["--dataset", "cifar10", "--data-dir", "EMPTY"], "--dataset shapes"),
    (["--dataset", "cifar10", "--data-dir", "BATCH"], "data_batch_1 is missing or damaged"),
    (["--dataset", "cifar10", "--data-dir", "FILE"], "no CIFAR-10 in"),
    (["--out", "FILE"], "FILE"),
    (["--arch", "4000000000", "4000000000"], "no model with --arch"),
]


def identify(value):
    """Options as a test's name; their message is not part of it."""
    return " ".join(value) if isinstance(value, list) else ""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and a file to name by mistake; the current folder is theirs."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BATCH" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "BATCH" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    (tmp_path / "FILE").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    """The content of every file below a folder, but for the locks of runs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths}


def refused(main, arguments, capsys):
    """Run a script that should fail; (its exit code, its one line on stderr)."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code, err = stopped.value.code, capsys.readouterr().err
    if isinstance(code, str):  # what Python prints itself as it exits with 1
        code, err = 1, err + code + "\n"
    lines = [line for line in err.splitlines() if not line.startswith((" ", "usage:"))]
    assert len(lines) == 1, err
    return code, lines[0]


@pytest.mark.parametrize("options, message", USAGE, ids=identify)
def test_wrong_options_are_usage_errors(options, message, places, capsys):
    before = files(places)
    code, line = refused(train.main, [*TINY, *options], capsys)
    assert code == 2
    assert message in line
    assert files(places) == before


@pytest.mark.parametrize("options, message", FAILURES, ids=identify)
def test_what_cannot_be_done_is_a_failure(options, message, places, capsys):
    before = files(places)
    code, line = refused(train.main, [*TINY, *options], capsys)
    assert code == 1
    assert line.startswith("train.py: error: ")
    assert message in line
    assert files(places) == before


@needs_cifar10
def test_a_truncated_cifar10_batch_is_named(places, capsys):
    shutil.copytree(CIFAR10 / "cifar-10-batches-py", places / "cut" / "cifar-10-batches-py")
    batch = places / "cut" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    options = ["--dataset", "cifar10", "--data-dir", "cut"]
    code, line = refused(train.main, [*TINY, *options], capsys)
    assert code == 1
    assert "data_batch_3 is missing or damaged" in line


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "go on with it by --resume, replace it by --overwrite"),
        (["--resume", "--k", "3"], "made with other options, k 2 (now 3)"),
        (["--resume", "--dataset", "cifar10"], "dataset shapes (now cifar10)"),
    ],
)
def test_a_run_never_destroys_another(run, tmp_path, capsys, options, message):
    run()
    before = files(tmp_path)
    capsys.readouterr()
    code, line = refused(lambda arguments: run(*arguments), options, capsys)
    assert code == 1
    assert message in line
    assert files(tmp_path) == before


def text(path):
    path.write_text("not a checkpoint")


def picture(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def other_program(path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def truncated(path):
    other_program(path)
    path.write_bytes(path.read_bytes()[:-100])


GOOD = {"arch": [4], "k": 2, "fc": 1, "dataset": "shapes", "data_dir": "data"}


def with_config(config, **weights):
    """A function that writes an old checkpoint, which has no digest, of that config."""
    return lambda path: torch.save(
        {"format": OLD_FORMAT, "config": config, "weights": weights}, path
    )


def compressed(path):
    other_program(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def flipped(path):
    write_checkpoint(path, GOOD, build_model(GOOD).state_dict())
    saved = torch.load(path, weights_only=True)
    saved["weights"]["classifier.2.bias"][3] += 1
    torch.save(saved, path)


few = dict.fromkeys("abcdefghijkl", torch.zeros(3))
huge = {"w": torch.zeros(1).expand(10**10)}  # a small file


def nothing(path):
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "make, message",
    [
        (text, "is not a whole checkpoint of train.py"),
        (picture, "is not a whole checkpoint of train.py"),
        (other_program, "is not a whole checkpoint of train.py"),
        (truncated, "is not a whole checkpoint of train.py"),
        (compressed, "it is compressed"),
        (flipped, "its digest is that of other weights"),
        (with_config(GOOD, **huge), "its weights are larger than the file"),
        (with_config(GOOD, **few), "its weights do not fit its options"),
        (with_config(["arch"]), "its weights do not fit its options"),
        (with_config(GOOD | {"fc": 10**7}, **few), "it has more layers than weights"),
        (with_config(GOOD | {"mix": "both"}, **few), "its weights do not fit its options"),
        (nothing, "No such file"),
    ],
)
def test_a_wrong_checkpoint_is_refused(make, message, places, capsys):
    make(places / "run.pt")
    code, line = refused(evaluate.main, ["run.pt"], capsys)
    assert code == 1
    assert line.startswith("evaluate.py: error: run.pt") or "run.pt" in line
    assert message in line


def test_evaluate_keeps_a_history_that_is_not_ours(run, tmp_path, capsys):
    run()
    (tmp_path / "run.json").write_text('{"name": "something else"}')
    code, line = refused(evaluate.main, [str(tmp_path / "run.pt")], capsys)
    assert code == 1
    assert "is not a history that train.py wrote" in line
    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "something else"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not JSON", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "it is not an object"),
        (b"{}", "'name' is missing"),
        (b'{"name": NaN}', "NaN"),
        (b'{"name": "x", "config": {}, "epochs": [{}], "batch_losses": [], "finished": true}',
         "epoch 1 has no number 'lr'"),
        (b'{"name": "x", "config": {}, "epochs": [], "batch_losses": ["a"], "finished": true}',
         "'batch_losses' holds something that is not a number"),
    ],
)  # fmt: skip
def test_a_wrong_history_is_refused(content, message, places, capsys):
    (places / "run.json").write_bytes(content)
    code, line = refused(plot.main, ["run.json"], capsys)
    assert code == 1
    assert line.startswith("plot.py: error: run.json")
    assert message in line


@pytest.mark.parametrize("main", [evaluate.main, plot.main])
def test_no_arguments_are_a_usage_error(main, capsys):
    code, _ = refused(main, [], capsys)
    assert code == 2


def test_plot_names_a_folder_it_cannot_write_to(run, tmp_path, capsys):
    run()
    (tmp_path / "FILE").write_text("a file")
    capsys.readouterr()
    arguments = [str(tmp_path / "run.json"), "--out", str(tmp_path / "FILE")]
    code, line = refused(plot.main, arguments, capsys)
    assert code == 1
    assert "FILE" in line
