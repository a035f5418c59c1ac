"""Runs as rows of the results table, those that differ in nothing but their seed as one."""

import json
import statistics

from history import hyperparameters, read_history

HEADER = "row hyperparameters parameters reported measured difference seconds".split()


def read(path):
    """The history in a file, its figures checked too. OSError or ValueError say what is wrong."""
    history = read_history(path)
    figures = {"reported": history.setdefault("reported", None)}
    if "test" in history:
        test = history["test"] if isinstance(history["test"], dict) else {}
        figures["test accuracy"] = test.get("accuracy", "missing")
        if "tta" in test:
            tta = test["tta"] if isinstance(test["tta"], dict) else {}
            figures["accuracy with test-time augmentation"] = tta.get("accuracy", "missing")
    for name, value in figures.items():
        if not isinstance(value, (int, float)) and (name, value) != ("reported", None):
            raise ValueError(f"{path} is not a history that train.py wrote: {name} is no number")
    return history


def measured(history):
    """The accuracy (%) a run ends with: evaluate.py's, else the last epoch's, else None."""
    if "test" in history:
        return history["test"]["accuracy"]
    return history["epochs"][-1]["val_accuracy"] if history["epochs"] else None


def rows_of(histories):
    """Histories grouped into rows: lists of runs of one reported figure, alike but for the seed."""
    rows = {}
    for history in histories:
        options = hyperparameters(history["config"])
        options |= {"seed": None, "reported": history.get("reported")}
        rows.setdefault(json.dumps(options, sort_keys=True), []).append(history)
    for row in rows.values():
        row.sort(key=lambda history: history["config"].get("seed", 0))
    return list(rows.values())


def row_name(row, name=None):
    """What a row is called: its first run's name (or file name), less the seed of several runs."""
    name, seed = name or row[0]["name"], row[0]["config"].get("seed")
    if len(row) > 1:
        name = name.removesuffix(f"-seed{seed}").removesuffix(f"-seed-{seed}")
    return name


def settled(row):
    """The runs that a row's figures are of: its finished ones, or all where none is."""
    return [history for history in row if history["finished"]] or row


def finals(row):
    """The accuracies (%) that the settled runs of a row end with; none of one without an epoch."""
    return [value for value in map(measured, settled(row)) if value is not None]


def unfinished(row):
    """' (unfinished, epoch 3 of 15)' of the first run of a row that is, else nothing."""
    for history in row:
        if not history["finished"]:
            epochs = history["config"].get("epochs", "?")
            return f" (unfinished, epoch {len(history['epochs'])} of {epochs})"
    return ""


def markdown(rows):
    """The results as aligned Markdown: a line per row, with the options that not all share."""
    configs = [hyperparameters(row[0]["config"]) for row in rows]
    shared = {key for key in configs[0] if all(c.get(key) == configs[0][key] for c in configs)}
    lines = [HEADER]
    for row, config in zip(rows, configs):
        shown = ({"arch", "k"} | (config.keys() - shared)) - {"seed"}
        words = [f"{key.replace('_', ' ')} {plain(config[key])}" for key in config if key in shown]
        cells = [row_name(row), ", ".join(words), *figure_cells(row)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    lines.insert(1, rule)
    for line in lines:
        line[:] = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure_cells(row):
    """A row's cells in the table from "parameters" on."""
    parameters, reported, values = row[0].get("parameters"), row[0]["reported"], finals(row)
    mean = statistics.fmean(values) if values else None
    result = "not yet" if mean is None else f"{mean:.2f} %"
    if len(values) > 1:
        result += f" ± {statistics.stdev(values):.2f} (n = {len(values)})"
    tested = [history["test"] for history in settled(row) if "test" in history]
    augmented = [test["tta"]["accuracy"] for test in tested if "tta" in test]
    if augmented and len(augmented) == len(values):
        result += f" (with flip TTA {statistics.fmean(augmented):.2f} %)"
    known = mean is not None and reported is not None
    seconds = [sum(epoch["seconds"] for epoch in run["epochs"]) for run in settled(row)]
    return [
        f"{parameters:,}" if isinstance(parameters, int) else "",
        "" if reported is None else f"{reported:.2f} %",
        result + unfinished(row),
        f"{mean - reported:+.2f}" if known else "",
        f"{statistics.fmean(seconds):,.1f}" if mean is not None else "",
    ]


def plain(value):
    """An option's value in words."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    words = {"True": "yes", "False": "no", "None": "default"}
    return words.get(str(value), str(value))
