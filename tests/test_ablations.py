import json
import os
import shutil
import sys

import pytest
from conftest import ROOT, execute

import bench
from model import DEFAULTS
from train import parse_args

# A stand-in for python: notes its arguments, and leaves what the real scripts would.
STUB = """#!{python}
import argparse, json, os, pathlib, sys
path, *options = sys.argv[1:]
script = os.path.basename(path)
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([script, *options]) + "\\n")
if script == "train.py":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--name", "--seed", "--out"):
        parser.add_argument(option)
    args, _ = parser.parse_known_args(options)
    if args.name in os.environ.get("FAIL", "").split():
        sys.exit(1)
    name = args.name + ("-seed" + args.seed if args.seed not in (None, "0") else "")
    for suffix in (".json", ".pt"):
        path = pathlib.Path(args.out).expanduser() / (name + suffix)
        if not path.exists():
            path.write_text(name)
"""


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def replay(tmp_path):
    """replay(argument, ...): run a script with a stand-in for python; (result, its calls)."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    write_program(programs / "python", STUB.format(python=sys.executable))
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}

    def run(*arguments, script=ROOT / "ablations.sh", out=tmp_path, **more):
        calls.write_text("")
        dashes = [] if "--" in arguments else ["--"]
        command = ["bash", script, *arguments, *dashes, *(["--out", out] if out else [])]
        result = execute(*command, **environment | more)
        return result, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def trained(calls):
    """The options of each training run, as train.py's own parser reads them."""
    return [vars(parse_args(words)) for script, *words in calls if script == "train.py"]


def expected(rows, *common):
    """What `trained` gives of rows that differ from the report's final model by some options."""
    commands = [f"{FINAL} {row} --name {name}".split() for name, row in rows.items()]
    return [vars(parse_args([*words, *common])) for words in commands]


FINAL = (
    "--dataset cifar10 --batch-size 128 --arch 64 128 256 512 --k 3 --gate softmax --block-relu "
    "--norm none --pool adaptive --fc 3 --hidden 4096 --dropout 0.5 --logit-scale 1 "
    "--init he --optimizer adamw --lr 0.001 --no-nesterov --schedule cosine --label-smoothing 0 "
    "--epochs 15 --holdout 0 --seed 0"
)
EARLY = "--init default --schedule none --epochs 30"
REPORT = {
    "row1": f"{EARLY} --arch 64 128 256 --k 2 --no-block-relu --fc 1 --pool avg --reported 52",
    "row2": f"{EARLY} --arch 64 128 256 --k 2 --fc 1 --reported 72",
    "row3": f"{EARLY} --reported 82.01",
    "row4": f"{EARLY} --arch 16 8 4 --fc 1 --reported 61",
    "row5": f"{EARLY} --epochs 15 --dropout 0 --reported 79.34",
    "final": "--reported 82.97 82.84",
    "sgd": "--optimizer sgd --reported 10",
    "adam": "--optimizer adam",
    "gate-relu": "--gate relu",
}
NETWORK = (
    "--k 2 --fc 1 --norm batch --downsample 1 3 5 --init default --batch-size 1024 "
    "--optimizer sgd --momentum 0.85 --nesterov"
)
PARTS = {
    "whitening": "--whiten",
    "identity": "--init dirac",
    "max-pool": "--pool max",
    "logit-scale": "--logit-scale 0.111",
    "augment": "--augment crop flip",
    "smoothing": "--label-smoothing 0.2",
    "onecycle": "--schedule onecycle",
    "decay": "--weight-decay 1.33e-3",
}
RECIPE = " ".join([NETWORK, *PARTS.values()])
BEST = f"{RECIPE} --arch 128 128 384 384 384 384 --lr 1.3 --weight-decay 1.5e-3 --epochs 32"
QUICK = f"{RECIPE} --arch 64 64 256 256 256 256 --lr 1.5 --epochs 20"
BASE = f"{RECIPE} --arch 32 32 128 128 128 128 --lr 1.5 --epochs 12 --holdout 5000"


def test_the_options_are_the_reports_final_models_by_default():
    defaults = vars(parse_args([]))
    assert defaults == vars(parse_args(FINAL.split()))
    assert defaults["downsample"] == defaults["augment"] == []
    assert {defaults[name] for name in ("weight_decay", "momentum", "limit")} == {None}


def test_every_row_has_the_reports_options(replay, tmp_path):
    result, calls = replay()
    assert result.returncode == 0, result.stderr
    assert trained(calls) == expected(REPORT, "--out", str(tmp_path), "--resume")


def test_each_row_is_trained_then_evaluated_and_all_are_plotted_last(replay, tmp_path):
    _, calls = replay()
    assert [call[0] for call in calls] == ["train.py", "evaluate.py"] * 9 + ["plot.py"]
    assert calls[1] == ["evaluate.py", str(tmp_path / "row1.pt"), "--once"]
    assert calls[-1][1:] == [str(tmp_path / f"{name}.json") for name in REPORT]


def test_named_rows_run_alone_with_the_options_after_the_dashes(replay, tmp_path):
    _, calls = replay("row4", "final", "--", "--device", "cpu")
    rows = {name: REPORT[name] for name in ("row4", "final")}
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert trained(calls) == expected(rows, *options, "--resume")


@pytest.mark.parametrize("words", [["--device", "cuda:1"], ["--device=cuda:1"]])
def test_a_row_is_tested_on_the_device_that_it_is_trained_on(replay, tmp_path, words):
    _, calls = replay("row4", "--", *words)
    assert calls[1] == ["evaluate.py", str(tmp_path / "row4.pt"), "--once", *words]


def test_overwrite_is_not_contradicted(replay):
    (options,) = trained(replay("row4", "--", "--overwrite")[1])
    assert options["overwrite"] and not options["resume"]


@pytest.mark.parametrize("out", ["~", "~/runs"])
def test_the_home_folder_is_found_as_train_py_finds_it(replay, tmp_path, out):
    place = tmp_path if out == "~" else tmp_path / "runs"
    place.mkdir(exist_ok=True)
    _, calls = replay("row4", "--", f"--out={out}", out=None, HOME=str(tmp_path))
    assert calls[1] == ["evaluate.py", str(place / "row4.pt"), "--once"]


def test_a_symbolic_link_to_the_script_will_do(replay, tmp_path):
    (tmp_path / "link").symlink_to(ROOT / "ablations.sh")
    result, calls = replay("row4", script=tmp_path / "link")
    assert result.returncode == 0, result.stderr
    assert calls[0][0] == "train.py"


def test_a_signal_reaches_the_training(replay, tmp_path):
    kill = '#!/bin/sh\ntrap "exit 143" TERM\nkill $PPID\nsleep 1 >&- 2>&- & wait\nexit 1\n'
    write_program(tmp_path / "bin" / "launcher", kill)
    result, calls = replay("row4", "row5", LAUNCH="launcher")
    assert result.returncode == 143
    assert calls == []


def test_another_seed_is_another_run_beside_the_first(replay, tmp_path):
    replay("row4", "--", "--seed", "0")
    _, calls = replay("row4", "--", "--seed", "1")
    assert [options["name"] for options in trained(calls)] == ["row4-seed1"]
    both = ("row4", "row4-seed1")
    assert calls[1] == ["evaluate.py", *[str(tmp_path / f"{name}.pt") for name in both], "--once"]
    assert calls[-1][1:] == [str(tmp_path / f"{name}.json") for name in both]


def test_the_recipe_is_trained_and_each_part_left_out_and_other_gates(replay, tmp_path):
    common = ["--seed", "1", "--out", str(tmp_path)]
    result, calls = replay("--", *common, script=ROOT / "recipe.sh", out=None)
    assert result.returncode == 0, result.stderr
    rows = {"best": BEST, "best-k1": f"{BEST} --k 1", "quick": QUICK, "quick-k1": f"{QUICK} --k 1"}
    rows |= {"base": f"{BASE} --k 1", "k2": BASE, "k3": f"{BASE} --k 3"}
    rows |= {f"gate-{gate}": f"{BASE} --gate {gate}" for gate in ("mean", "sigmoid")}
    for name, part in PARTS.items():
        rows[f"without-{name}"] = f"{BASE.replace(part, '')} --k 1"
    assert trained(calls) == expected(rows, *common, "--resume")


def test_bench_times_the_networks_of_the_rows():
    rows = (REPORT["row4"], REPORT["row2"], REPORT["final"], BEST)
    for row, timed in zip(rows, bench.ROWS.values(), strict=True):
        expected, options = (vars(parse_args(o.split())) for o in (f"{FINAL} {row}", timed))
        assert all(options[name] == expected[name] for name in (*DEFAULTS, "batch_size"))


def test_a_failing_row_does_not_stop_the_others_and_is_named(replay):
    result, calls = replay("row1", "row2", "row4", FAIL="row1 row4")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ablations.sh: error: failed: row1 row4"
    assert ["evaluate.py", "plot.py"] == [call[0] for call in calls if call[0] != "train.py"]


@pytest.mark.parametrize("row", ["row7", "row.", "row"])
def test_an_unknown_row_is_refused_before_anything_runs(replay, row):
    result, calls = replay("row4", row)
    assert result.returncode == 2
    assert f"there is no row '{row}'" in result.stderr
    assert calls == []


@pytest.mark.parametrize("option", [["--name", "mine"], ["--name=mine"]])
def test_a_name_is_refused_since_rows_have_their_own(replay, option):
    result, calls = replay("row4", "--", *option)
    assert result.returncode == 2
    assert "rows have names of their own" in result.stderr
    assert calls == []


@pytest.mark.parametrize("launch", ["python3.99", "nice -n 1 python3.99"])
def test_the_interpreter_of_the_launcher_runs_all_scripts(replay, tmp_path, launch):
    (tmp_path / "bin" / "python").rename(tmp_path / "bin" / "python3.99")
    write_program(tmp_path / "bin" / "python", "#!/bin/sh\nexit 1\n")
    result, calls = replay("row4", LAUNCH=launch)
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["train.py", "evaluate.py", "plot.py"]


def test_where_there_is_no_python_python3_will_do(replay, tmp_path):
    programs = tmp_path / "bin"
    (programs / "python").rename(programs / "python3")
    for name in ("bash", "basename", "dirname", "readlink", "env"):
        (programs / name).symlink_to(shutil.which(name))
    result, calls = replay("row4", PATH=str(programs))
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["train.py", "evaluate.py", "plot.py"]


def test_the_path_of_python_may_have_spaces(replay, tmp_path):
    spaced = (tmp_path / "bin").rename(tmp_path / "my programs")
    result, calls = replay("row4", PATH=f"{spaced}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in calls] == ["train.py", "evaluate.py", "plot.py"]


def test_a_launcher_that_is_not_there_is_refused_before_anything_runs(replay):
    result, calls = replay("row4", LAUNCH="torchrunn --standalone")
    assert result.returncode == 1
    assert "there is no program 'torchrunn'" in result.stderr
    assert calls == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_the_scripts_keep_their_line_ends_in_a_clone_as_windows_makes_it(tmp_path):
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", str(ROOT), str(tmp_path / "clone")]
    assert execute(*clone).returncode == 0
    for script in (tmp_path / "clone").glob("*.sh"):
        assert b"\r" not in script.read_bytes()


def test_another_launcher_trains(replay, tmp_path):
    launch = '#!/bin/sh\necho launched "$1" >&2\nshift\nexec python "$@"\n'
    write_program(tmp_path / "bin" / "launcher", launch)
    result, _ = replay("row4", LAUNCH="launcher --all")
    assert result.returncode == 0
    assert "launched --all" in result.stderr


def test_a_row_goes_from_training_to_the_table_for_real(tmp_path):
    options = "--dataset shapes --limit 256 --epochs 1 --out".split()
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    result = execute("bash", "ablations.sh", "row4", "--", *options, tmp_path, PATH=path)
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "row4.json").read_text())
    assert f"Final Model Test Accuracy: {history['test']['accuracy']:.2f}%" in result.stdout
    assert "| row4 | " in result.stdout
    assert (tmp_path / "row4.png").exists()
