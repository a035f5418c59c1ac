"""The JSON record of a run, runs/NAME.json: read, written, compared, tabulated.

    history = read_history("runs/row4.json")
    write_history("runs/row4.json", history)
    print(tabulate(group([history])))

Runs that differ in nothing but their seed make one row of the results table. This file needs no
PyTorch: whoever only draws does not wait for it.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from pathlib import Path

# Options that do not change what a run computes: they may differ when it is resumed.
NOT_HYPERPARAMETERS = set("data_dir name out device mix compile resume overwrite reported".split())

EPOCH_METRICS = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
HEADER = "  epoch        lr  train loss  acc. %    val loss  acc. %     time  images/s"
COLUMNS = ("row", "hyperparameters", "parameters", "reported", "measured", "difference", "seconds")


def read_history(path):
    """The history in a file, as a dict. OSError or ValueError say what is wrong with the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        history = json.loads(text, parse_constant=int)  # int("NaN") is an error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    problem = _find_problem(history)
    if problem:
        raise ValueError(f"{path} is not a history that train.py wrote: {problem}")
    history.setdefault("reported", None)
    return history


def _find_problem(history):
    """What keeps a parsed file from being a history, in a few words; None where nothing does."""
    kinds = {"name": str, "config": dict, "epochs": list, "batch_losses": list, "finished": bool}
    for key, kind in kinds.items():
        if not isinstance(_get(history, key), kind):
            return f"{key!r} is missing or no {kind.__name__}"
    reported, test = history.get("reported"), history.get("test", {"accuracy": 0})
    numbers = {"'reported'": 0 if reported is None else reported}
    numbers |= {"its test accuracy": _get(test, "accuracy")}
    numbers |= {f"the loss of batch {n}": v for n, v in enumerate(history["batch_losses"], start=1)}
    for number, epoch in enumerate(history["epochs"], start=1):
        numbers |= {f"{name!r} of epoch {number}": _get(epoch, name) for name in EPOCH_METRICS}
    for what, value in numbers.items():  # an integer of JSON may be longer than any float
        if type(value) not in (int, float) or abs(value) > 1e300:
            return f"{what} is no number"
    return None if isinstance(history["config"].get("seed", 0), int) else "its seed is no integer"


def _get(mapping, key):
    """The value of a key; None where it is missing, or where there is no mapping."""
    return mapping.get(key) if isinstance(mapping, dict) else None


def write_history(path, history):
    """Write a history as strict JSON: ValueError if it holds NaN, OSError as the disk says."""
    write_text(path, json.dumps(history, indent=1, allow_nan=False) + "\n")


def write_text(path, text):
    """Write a text file as write_atomically does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path, write):
    """Let write(file) fill a file beside `path`, then rename it: readers see the old or the new.
    OSError, which names `path`, leaves what was there in place."""
    part = Path(f"{path}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def hyperparameters(config):
    """Those options of a history's config that decide what the run computes."""
    return {name: value for name, value in config.items() if name not in NOT_HYPERPARAMETERS}


def refuse_other_options(before, now, path):
    """ValueError if two configs have other hyperparameters; it names them.
    A run without a schedule may have more epochs: it is the same as far as it has come."""
    before, now = hyperparameters(before), hyperparameters(now)
    differ = [key for key in now if before.get(key) != now[key]]
    longer = differ == ["epochs"] and now["epochs"] > before["epochs"]
    if not differ or (longer and now["schedule"] == "none"):
        return
    differences = ", ".join(f"{key} {before.get(key)} (now {now[key]})" for key in differ)
    reason = f"; its {now['schedule']} schedule depends on the number of epochs" if longer else ""
    raise ValueError(f"{path} was made with other options, {differences}{reason}: give those, "
                     "another --name or --out, or --overwrite")  # fmt: skip


def group(histories):
    """Histories grouped into rows: runs of one reported figure, alike but for the seed; of two with
    the same seed the finished one, or the first."""
    rows = {}
    for history in histories:
        options = hyperparameters(history["config"]) | {"seed": None}
        key = json.dumps([options, history["reported"]], sort_keys=True)
        runs, seed = rows.setdefault(key, {}), history["config"].get("seed", 0)
        runs[seed] = max(runs.get(seed, history), history, key=lambda run: run["finished"])
    return [[row[seed] for seed in sorted(row)] for row in rows.values()]


def name_row(row, name=None):
    """What a row is called: its first run's name (or file name), less the seed of several runs."""
    name, seed = name or row[0]["name"], row[0]["config"].get("seed")
    return name.removesuffix(f"-seed{seed}") if len(row) > 1 else name


def choose_settled(row):
    """The runs that a row's accuracy is of: its finished ones, or all where none is."""
    return [history for history in row if history["finished"]] or row


def last_accuracies(row):
    """The accuracies (%) that a row's settled runs end with: evaluate.py's if all were tested, else
    the last epochs'. A run without an epoch has none."""
    settled = choose_settled(row)
    if all("test" in run for run in settled):
        return [run["test"]["accuracy"] for run in settled]
    return [run["epochs"][-1]["val_accuracy"] for run in settled if run["epochs"]]


def note_unfinished(row):
    """' (unfinished, epoch 3 of 15)' of the first run of a row that is, else nothing."""
    notes = (f" (unfinished, epoch {len(run['epochs'])} of {run['config'].get('epochs', '?')})"
             for run in row if not run["finished"])  # fmt: skip
    return next(notes, "")


def tabulate(rows):
    """The results as aligned Markdown: a line per row, with the options that not all share."""
    configs = [hyperparameters(row[0]["config"]) for row in rows]
    shared = {key for key in configs[0] if all(c.get(key) == configs[0][key] for c in configs)}
    lines = [list(COLUMNS)]
    for row, config in zip(rows, configs):
        shown = ({"arch", "k"} | (config.keys() - shared)) - {"seed"}
        words = [f"{key.replace('_', ' ')} {_words(config[key])}" for key in config if key in shown]
        cells = [name_row(row), ", ".join(words), *_make_cells(row)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    lines.insert(1, rule)
    formats = [f"<{width}" for width in widths[:2]] + [f">{width}" for width in widths[2:]]
    return "".join(f"| {' | '.join(map(format, line, formats))} |\n" for line in lines)


def _make_cells(row):
    """A row's cells in the table from "parameters" on."""
    row = choose_settled(row)
    reported, parameters = row[0]["reported"], row[0].get("parameters")
    cells = [f"{parameters:,}" if isinstance(parameters, int) else "",
             "" if reported is None else f"{reported:.2f} %"]  # fmt: skip
    values = last_accuracies(row)
    if not values:
        return [*cells, "not yet" + note_unfinished(row), "", ""]
    mean = statistics.fmean(values)
    result = f"{mean:.2f} %"
    if len(values) > 1:
        result += f" ± {statistics.stdev(values):.2f} (n = {len(values)})"
    held_out = row[0]["config"].get("holdout") and not all("test" in run for run in row)
    result += " on held-out images" if held_out else ""
    difference = "" if reported is None or held_out else f"{mean - reported:+.2f}"
    seconds = [math.fsum(e["seconds"] for e in run["epochs"]) for run in row if run["epochs"]]
    return [*cells, result + note_unfinished(row), difference, f"{statistics.fmean(seconds):,.1f}"]


def _words(value):
    """An option's value in words."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    words = {"True": "yes", "False": "no", "None": "default"}
    return words.get(str(value), str(value))


def format_epoch(epoch, epochs):
    """An epoch of the history as a line under HEADER."""
    return (
        f"{epoch['epoch']:>3}/{epochs:<3} {epoch['lr']:>9.6f}"
        f"  {epoch['train_loss']:>10.4f}  {epoch['train_accuracy']:>6.2f}"
        f"  {epoch['val_loss']:>10.4f}  {epoch['val_accuracy']:>6.2f}"
        f"  {format_seconds(epoch['seconds']):>7}  {epoch['images_per_second']:>8,.0f}"
    )


def format_seconds(seconds):
    """Seconds as 4.2s, 3m20s or 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f}s" if seconds < 10 else f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def make_parser(doc):
    """A script's argument parser: its module docstring as the manual, every default in --help.
    From now on any text can be printed, whatever characters stdout has."""
    with contextlib.suppress(AttributeError):  # where stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    summary, _, manual = doc.partition("\n")
    return argparse.ArgumentParser(description=summary, epilog=manual, allow_abbrev=False,
                                   formatter_class=HelpFormatter)  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the examples as they are written."""


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int64 or float of at least low (`above`: more), at most high."""
    high = min(high, 2**63 - 1) if kind is int else high

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            least = f"more than {low}" if above else f"at least {low}"
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {least}{most}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where kind(text) fails
    return parse
