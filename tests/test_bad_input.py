import json
import random
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, ended, files

import evaluate
import plot
import train
from checkpoint import FORMAT, load_checkpoint
from history import write_history

NO_CHOICE = "dataset gate pool init optimizer norm schedule augment precision mix".split()
OUT_OF_RANGE = (
    "--arch 16 0, --k 0, --fc 0, --hidden -4096, --dropout 1.5, --lr nan, --lr inf, "
    "--weight-decay -1, --epochs 0, --batch-size 0, --limit 0, --seed -1, --reported 101"
).split(", ")
USAGE = {f"--{option} x": "invalid choice: 'x'" for option in NO_CHOICE}
for wrong in OUT_OF_RANGE:
    option, *_, value = wrong.split()
    USAGE[wrong] = f"argument {option}: {value} is not from"
USAGE |= {
    "--arch": "--arch: expected at least one",
    "--arch 16,8": "invalid int value: '16,8'",
    f"--batch-size {2**31 + 1}": "2147483649 is not from 1 to 2147483648",
    "--momentum 0.9": "--optimizer adamw: ",
    "--nesterov": "argument 'nesterov'",
    "--optimizer sgd --momentum 0 --nesterov": "Nesterov momentum requires a momentum",
    "--downsample 3": "--downsample 3: --arch has blocks 1 to 2",
    "--arch 4 4 4 4 4 4 --downsample 1 2 3 4 5 6": "at most 5 of which can halve the images",
    "--arch 4 4 4 4 4 --downsample 1 2 3 4 5 --whiten": "at most 4 of which can halve the images",
    "--name a/b": "--name 'a/b'",
    "--name=": "--name ''",
    "--out=": "--out: it is empty",
    "--data-dir=": "--data-dir: it is empty",
    "--name ..": "--name '..'",
    "--name a\udcff": "--name 'a\\udcff'",
    "--resume --overwrite": "give one of them",
    "--hold 500": "unrecognized arguments: --hold",
}
HALVED = "--arch 4 4 4 4 4 --downsample 1 2 3 4 5 --norm batch"  # to one pixel
WHITENED = "--arch 4 4 4 4 --downsample 1 2 3 4 --norm batch --whiten"  # from 31 pixels
FAILURES = {
    "--device cuda:99": "--device cuda:99 does not work here",
    "--device meta": "--device meta does not work here",
    "--device hpu": "--device hpu does not work here",
    "--device abacus": "--device abacus does not work here",
    "--limit 10001": "--limit 10001: there are 10000 training images",
    "--holdout 15": "--holdout 15: not a multiple of the 10 classes",
    "--dataset cifar10 --data-dir GONE": "cifar-10-batches-py is missing or damaged",
    "--dataset cifar10 --data-dir BATCH": "--dataset shapes",
    "--dataset cifar10 --data-dir FILE": "FILE/cifar-10-batches-py is missing or damaged",
    "--dataset cifar10 --data-dir ARCHIVE": "cifar-10-python.tar.gz is damaged, and a download",
    "--out FILE": "FILE",
    f"{HALVED} --limit 97": "--batch-size 32: the last batch of 97 images has 1, and --norm batch",
    f"{HALVED} --batch-size 1": "--batch-size 1: the last batch",
    f"{WHITENED} --limit 97": "--batch-size 32: the last batch of 97 images has 1",
    "--arch 2000000000 2000000000": "a smaller network",
}
WRONG = [(2, *usage) for usage in USAGE.items()] + [(1, *failure) for failure in FAILURES.items()]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and a file to name by mistake; the current folder is theirs."""
    (tmp_path / "BATCH" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "BATCH" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    (tmp_path / "ARCHIVE").mkdir()
    (tmp_path / "ARCHIVE" / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    (tmp_path / "FILE").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


@pytest.mark.parametrize("code, options, message", WRONG)
def test_wrong_options_end_in_a_line_and_leave_no_file(code, options, message, places, refused):
    before = files(places)
    line = refused(train.main, [*TINY, *options.split()], code=code)
    assert line.startswith("train.py: error: ")
    assert message in line
    assert files(places) == before


@pytest.mark.parametrize("main", [evaluate.main, plot.main])
def test_no_arguments_are_a_usage_error(main, refused):
    assert "required: " in refused(main, [], code=2)


def test_plot_names_a_folder_it_cannot_write_to(history, places, refused):
    write_history(places / "run.json", history)
    assert "FILE" in refused(plot.main, ["run.json", "--out", "FILE"])


SMALL = {"arch": [4], "fc": 0, "dataset": "shapes", "data_dir": "data", "epochs": 1}
PART = "is not a whole checkpoint of train.py"


def other_program(path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def older(path):
    torch.save({"format": "gated multi-convolution checkpoint 2"}, path)


def compressed(path):
    other_program(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", "text")


def flipped(path):
    other_program(path)
    path.write_bytes(path.read_bytes().replace(b"state_dict", b"State_dict"))  # one bit


def of(config, **weights):
    return whole({"config": config, "weights": weights})


def whole(changes):
    """Writes a checkpoint with changed parts, whose history and other parts are right."""
    history = {"name": "run", "config": {}, "parameters": 1, "finished": True}
    history |= {"reported": [], "epochs": [], "batch_losses": []}
    parts = {"format": FORMAT, "precision": "float32", "history": json.dumps(history)}
    parts |= {"config": SMALL, "weights": {}}
    return lambda path: torch.save(parts | changes, path)


@pytest.mark.parametrize(
    "write, message",
    [
        (other_program, PART),
        (compressed, "is compressed or a folder"),
        (flipped, "a checksum does not match"),
        (older, "its format is 'gated multi-convolution checkpoint 2', now it is"),
        (lambda path: None, "No such file"),
        (of(SMALL, weight=torch.zeros(3)), "its weights do not fit its options"),
        (of(SMALL | {"residual": True}), "--residual: blocks no longer add"),
        (of(SMALL | {"fc": 10**7}), "10,000,001 layers, but 0 tensors of weights"),
        (of(SMALL, w=torch.zeros(1).expand(10**12)), "w is larger than what is stored of it"),
    ],
)
def test_a_wrong_checkpoint_is_refused(write, message, places, refused):
    write(places / "run.pt")
    line = refused(evaluate.main, ["run.pt"])
    assert line.startswith("evaluate.py: error: ")
    assert "run.pt" in line
    assert message in line


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(places, refused, as_zip):
    class Hostile:
        def __reduce__(self):  # as it is loaded without care, a file is created
            return Path.touch, (places / "ran",)

    checkpoint = {"format": FORMAT, "config": Hostile()}
    torch.save(checkpoint, "run.pt", _use_new_zipfile_serialization=as_zip)
    assert "run.pt is not a whole checkpoint" in refused(evaluate.main, ["run.pt"])
    assert not (places / "ran").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config": ["arch"]}, "TypeError: its config is no dict"),
        ({"config": {"arch": [4], "epochs": 2}}, "KeyError: 'data_dir'"),
        ({"config": SMALL | {"data_dir": 5}}, "TypeError: its data_dir is no str"),
        ({"weights": [1]}, "TypeError: its weights is no dict"),
        ({"weights": {"w": 1}}, "TypeError: its weights are no tensors"),
        ({"history": {}}, "TypeError: its history is no str"),
        ({"history": "{}"}, "KeyError: 'parameters'"),
    ],
)
@pytest.mark.parametrize(
    "main, command",
    [
        (evaluate.main, "run.pt"),
        (evaluate.main, "run.pt --export new.pt"),
        (train.main, "--dataset shapes --schedule none --out . --name run --resume"),
    ],
)
def test_a_crafted_checkpoint_is_refused_by_all(main, command, changes, reason, places, refused):
    whole(changes)(places / "run.pt")
    line = refused(main, command.split())
    assert "run.pt is not a whole checkpoint" in line and reason in line
    assert not (places / "new.pt").exists()


def test_a_flipped_bit_in_a_checkpoint_is_found_or_harmless(tmp_path):
    path = tmp_path / "run.pt"
    of(SMALL, w=torch.arange(60), b=torch.arange(6))(path)
    good, content = repr(load_checkpoint(path)), path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    chance = random.Random(0)
    bits = list(range(8 * directory, 8 * len(content)))
    bits += [chance.randrange(8 * directory) for _ in range(2000)]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert repr(load_checkpoint(path)) == good  # a harmless one: the time of an entry
        except ValueError as error:
            assert str(path) in str(error)


def test_a_damaged_checkpoint_is_named_and_kept_when_resuming(run, tmp_path):
    run()
    path = tmp_path / "run.pt"
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    assert str(path) in ended(run, "--resume")
    assert path.read_bytes() == before


def test_a_state_of_another_network_is_refused(run, tmp_path):
    run("--schedule none")
    saved = load_checkpoint(tmp_path / "run.pt")
    saved["weights"]["classifier.2.weight"] = torch.zeros(3, 3)
    torch.save(saved, tmp_path / "run.pt")
    longer = "--schedule none --epochs 3 --resume"
    assert "run.pt is of another run" in ended(run, longer)


HEAD = b'{"name": "x", "config": {}, "finished": true, "parameters": 1, "reported": [], '
BEGUN = HEAD + b'"epochs": [], "batch_losses": [], '
NOT_OURS = "is not a history that train.py wrote"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not JSON", NOT_OURS),
        (b"\xff\xfe\x00", NOT_OURS),
        (b'{"name": NaN}', "NaN"),
        (b"[1, 2]", NOT_OURS),
        (HEAD + b'"epochs": [{}], "batch_losses": []}', "train_loss"),
        (HEAD + b'"epochs": {}, "batch_losses": []}', NOT_OURS),
        (HEAD + b'"epochs": [], "batch_losses": ["a"]}', NOT_OURS),
        (HEAD + b'"epochs": [], "batch_losses": [1e999]}', "a number is infinite"),
        (BEGUN + b'"reported": "61"}', NOT_OURS),
        (BEGUN + b'"reported": %i}' % 10**400, NOT_OURS),
        (BEGUN + b'"test": {}}', "accuracy"),
        (BEGUN + b'"test": []}', NOT_OURS),
    ],
)
def test_a_wrong_history_is_refused(content, message, places, refused):
    (places / "run.json").write_bytes(content)
    line = refused(plot.main, ["run.json"])
    assert line.startswith("plot.py: error: run.json")
    assert message in line


def test_evaluate_keeps_a_history_that_is_not_ours(run, places, refused):
    run()
    (places / "run.json").write_text('{"name": "something else"}')
    assert "is not a history that train.py wrote" in refused(evaluate.main, ["run.pt"])
    assert (places / "run.json").read_text() == '{"name": "something else"}'
