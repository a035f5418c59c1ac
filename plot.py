"""Draw runs: histories in, pictures and the results table out.

python plot.py runs/row4.json               # runs/row4.png: loss and accuracy over the epochs
python plot.py runs/*.json                  # all of them, runs/comparison.png and runs/results.md
python plot.py runs/row4*.json              # several seeds of a row in one picture
python plot.py runs/row4.json --format pdf --title "Row 4 of the report"
python plot.py runs/row4.json --watch       # again whenever it changes, until it is finished

Runs that differ in nothing but their seed make one row: their mean, and a band from the lowest to
the highest. An unfinished run is drawn as far as it got; a row's accuracy is that of its finished
runs, if it has any. A run that evaluate.py tested has two pictures more, runs/row4-test.png and
runs/row4-gates.png. --watch rewrites the picture: an image viewer that reloads shows it live.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import textwrap
import time
from itertools import cycle, zip_longest

import numpy as np

from gallery import BLUE, COLOURS, ORANGE, draw_gates, draw_test, save, start_figure, style
from history import hyperparameters, read_history, to_path, write_atomically

DASHES = ("-", "--", "-.", ":")
WATCH_SECONDS = 3  # between two looks at a run
TESTED = {  # pictures of a run's test metrics: what draws them, and which metrics
    "test": (draw_test, "images", "per_class", "confusion", "calibration"),
    "gates": (draw_gates, "per_class", "gates", "kernels"),
}
COLUMNS = ("row", "hyperparameters", "parameters", "reported", "measured", "difference", "seconds")


def draw_all(args):
    """Write every picture and the table. Return what could not be read or drawn, a line each."""
    runs, problems = {}, []
    for path in args.histories:
        try:
            runs[path] = read_history(path)
        except (OSError, ValueError) as error:
            problems.append(error)
    rows = group(runs.values())
    pictures = list_pictures(args, runs, rows)
    for target, (draw, *what) in pictures.items():
        try:
            save(draw(*what), target)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problems.append(f"{target} is not drawn: its metrics are damaged ({error})")
    if rows:
        results = tabulate(rows)
        print(results, end="")
    if len(rows) > 1:
        target = list(pictures)[-1].with_name("results.md")
        write_atomically(target, lambda file: file.write(results.encode()))
    return problems


def list_pictures(args, runs, rows):
    """Return what draws each picture, by its file: (function, arguments ...). ValueError if two
    pictures share a file."""
    pictures, paths = {}, {id(run): path for path, run in runs.items()}
    title = args.title if len(rows) == 1 else None

    def add(path, name, *what):
        target = choose_target(args, path, name)
        if target in pictures:
            raise ValueError(f"{target} would be two pictures: draw the histories one by one")
        pictures[target] = what

    for row in rows:
        path = paths[id(row[0])]
        add(path, name_row(row, path.stem), draw_run, row, title)
    for path, run in runs.items():
        for name, (draw, *needed) in TESTED.items():
            if set(needed) <= run.get("test", {}).keys():
                add(path, f"{path.stem}-{name}", draw, run["test"], title or run["name"])
    if len(rows) > 1:
        add(next(iter(runs)), "comparison", draw_comparison, rows, args.title)
    return pictures


def group(histories):
    """Group histories into rows: runs of the same reported figures, alike but for the seed; of two
    with the same seed the finished one, or the first."""
    rows = {}
    for history in histories:
        options = hyperparameters(history["config"]) | {"seed": None}
        key = json.dumps([options, history["reported"]], sort_keys=True)
        runs, seed = rows.setdefault(key, {}), history["config"].get("seed", 0)
        runs[seed] = max(runs.get(seed, history), history, key=lambda run: run["finished"])
    return [[row[seed] for seed in sorted(row)] for row in rows.values()]


def name_row(row, name=None):
    """Return what a row is called: its first run's name (or file name), less the seed of several
    runs."""
    name, seed = name or row[0]["name"], row[0]["config"].get("seed")
    return name.removesuffix(f"-seed{seed}") if len(row) > 1 else name


def choose_settled(row):
    """Return the finished runs of a row, or all if none has finished."""
    return [history for history in row if history["finished"]] or row


def last_accuracies(row):
    """Return the accuracies (%) that a row's settled runs end with: evaluate.py's if all were
    tested, else the last epochs'. A run without an epoch has none."""
    settled = choose_settled(row)
    if all("test" in run for run in settled):
        return [run["test"]["accuracy"] for run in settled]
    return [run["epochs"][-1]["val_accuracy"] for run in settled if run["epochs"]]


def note_unfinished(row):
    """Return ' (unfinished, epoch 3 of 15)' of the first run of a row that is, else nothing."""
    for run in row:
        if not run["finished"]:
            return (
                f" (unfinished, epoch {len(run['epochs'])} of {run['config'].get('epochs', '?')})"
            )
    return ""


def tabulate(rows):
    """Return the results as aligned Markdown: a line per row, with the options that not all
    share."""
    configs = [hyperparameters(row[0]["config"]) for row in rows]
    shared = {key for key in configs[0] if all(c.get(key) == configs[0][key] for c in configs)}
    lines = [list(COLUMNS)]
    for row, config in zip(rows, configs):
        shown = ({"arch", "k"} | (config.keys() - shared)) - {"seed"}
        words = [f"{key.replace('_', ' ')} {_words(config[key])}" for key in config if key in shown]
        cells = [name_row(row), ", ".join(words), *_make_cells(row)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    formats = [f"{'<' if i < 2 else '>'}{w}" for i, w in enumerate(widths)]
    return "".join(f"| {' | '.join(map(format, line, formats))} |\n" for line in lines)


def _make_cells(row):
    """Return a row's cells in the table from "parameters" on."""
    row = choose_settled(row)
    reported, parameters, values = (
        row[0]["reported"],
        row[0].get("parameters"),
        last_accuracies(row),
    )
    cells = [
        f"{parameters:,}" if isinstance(parameters, int) else "",
        ", ".join(f"{figure:.2f} %" for figure in reported),
    ]
    if not values:
        return [*cells, "no epoch yet" + note_unfinished(row), "", ""]
    mean = statistics.fmean(values)
    result = f"{mean:.2f} %"
    if len(values) > 1:
        result += f" ± {statistics.stdev(values):.2f} (n = {len(values)})"
    held_out = row[0]["config"].get("holdout") and not all("test" in run for run in row)
    result += " on held-out images" if held_out else ""
    difference = "" if held_out else ", ".join(f"{mean - figure:+.2f}" for figure in reported)
    seconds = [sum(e["seconds"] for e in run["epochs"]) for run in row if run["epochs"]]
    cells += [result + note_unfinished(row), difference, f"{statistics.fmean(seconds):,.1f}"]
    return cells


def _words(value):
    """Return an option's value in words."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    words = {"True": "yes", "False": "no", "None": "default"}
    return words.get(str(value), str(value))


def draw_run(row, title=None):
    """Return a Figure of a row, one run or several seeds: each metric per epoch, loss per batch."""
    batch_losses = [run["batch_losses"] for run in row if run["batch_losses"]]
    seeds = f", mean and range of {len(row)} seeds" if len(row) > 1 else ""
    title = (title or name_row(row) + seeds) + note_unfinished(row)
    names = list_metrics(row)
    places = [[name, names[min(i + 1, len(names) - 1)]] for i, name in enumerate(names)][::2]
    places += [["batches", "batches"]] if batch_losses else []
    figure = start_figure(title, 0.3 + 2.6 * len(places))
    axes = figure.subplot_mosaic(places)
    for name in names:
        draw_epochs(axes[name], row, name)
    if batch_losses:
        draw_batches(axes["batches"], batch_losses)
    return figure


def list_metrics(row):
    """Return the metrics of training or validation that the epochs of a row have."""
    keys = row[0]["epochs"][0] if row[0]["epochs"] else ()
    parts = (key.partition("_") for key in keys)
    names = ["loss", "accuracy", *(name for part, _, name in parts if part in ("train", "val"))]
    return list(dict.fromkeys(names))


def draw_epochs(axes, row, name):
    """Draw a metric of training and validation over the epochs, grey between the two."""
    ends = []
    for part, line, colour in (("train", "o-", BLUE), ("val", "s--", ORANGE)):
        if all(f"{part}_{name}" in epoch for run in row for epoch in run["epochs"]):
            label = {"train": "training", "val": "validation"}[part]
            ends.append((draw_metric(axes, row, f"{part}_{name}", line, colour, label), colour))
    if any(run["epochs"] for run in row):
        if len(ends) == 2:
            (train, _), (val, _) = ends
            epochs, faint = np.arange(1, len(train) + 1), {"alpha": 0.1, "linewidth": 0}
            axes.fill_between(epochs, train, val, color="black", label="gap", **faint)
        ends.sort(key=lambda end: end[0][-1])  # so that the two numbers do not overlap
        for (means, colour), va in zip(ends, ("top", "bottom")):
            text, where = f"{means[-1]:.2f}", {"xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(text, (len(means), means[-1]), **where, color=colour, va=va, fontsize=8)
        axes.legend(frameon=False, fontsize=8)
        axes.margins(y=0.12)  # for the numbers
    else:
        axes.text(0.5, 0.5, "no epoch yet", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    style(axes, "epoch", "accuracy (%)" if name == "accuracy" else name.replace("_", " "))


def draw_metric(axes, row, metric, line, colour, label):
    """Draw a row's mean metric over the epochs, with a band over its seeds; return the means."""
    means, low, high = spread([[epoch[metric] for epoch in run["epochs"]] for run in row])
    epochs = np.arange(1, len(means) + 1)
    every = max(1, len(epochs) // 15)  # enough to tell two lines apart in grey
    dots = {"markersize": 3.5, "markevery": every}
    axes.plot(epochs, means, line, color=colour, linewidth=1.4, label=label, **dots)
    if len(row) > 1:
        axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return means


def draw_batches(axes, batch_losses):
    """Draw every batch's training loss and its running mean; of several runs, mean and band."""
    shortest = min(map(len, batch_losses))
    window = min(shortest, max(2, shortest // 50))
    weights = np.full(window, 1 / window)
    means, low, high = spread([np.convolve(run, weights, "valid") for run in batch_losses])
    middles = np.arange(len(means)) + (window + 1) / 2
    losses = np.concatenate(batch_losses)
    if len(batch_losses) == 1:
        numbers, thin = np.arange(1, len(losses) + 1), {"alpha": 0.35, "linewidth": 0.5}
        axes.plot(numbers, losses, color=BLUE, label="each batch", **thin)
    else:
        axes.fill_between(middles, low, high, color=BLUE, alpha=0.35, linewidth=0)
    axes.plot(middles, means, color="black", linewidth=1.2, label=f"mean of {window}")
    usual, highest = np.percentile(losses, 99), losses.max()
    if highest > 3 * usual > 0:  # the first batches: they would flatten all others
        axes.set_ylim(0, 1.2 * usual)
        axes.set_title(f"above: up to {highest:.3g}", loc="left", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style(axes, "batch", "training loss")


def draw_comparison(rows, title=None):
    """Return a Figure of all rows: reported beside measured accuracy, accuracy over the epochs."""
    notes = [note_unfinished(choose_settled(row)) for row in rows]
    names = [textwrap.fill(name_row(row) + note, 36) for row, note in zip(rows, notes)]
    lines = sum(name.count("\n") + 1 for name in names)
    heights = 1.2 + 0.2 * lines, max(3, 0.4 + 0.15 * lines)
    figure = start_figure(title or "", sum(heights))
    parts = figure.subfigures(2, 1, height_ratios=heights)
    dots, curves = (part.subplots() for part in parts)  # each as wide as its names allow
    draw_dots(dots, rows, names)
    for name, row, dash, colour in zip(names, rows, cycle(DASHES), cycle(COLOURS)):
        marker = "o" if max(len(run["epochs"]) for run in row) == 1 else ""
        draw_metric(curves, row, "val_accuracy", marker + dash, colour, name)
    curves.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    style(curves, "epoch", "validation accuracy (%)")
    return figure


def draw_dots(axes, rows, names):
    """Draw reported and measured accuracy of each row as dots; several seeds as ticks on a line."""
    for place, row in enumerate(rows):
        values = last_accuracies(row)
        if len(values) > 1:
            axes.plot(sorted(values), [place] * len(values), "|-", color=BLUE, label="seeds")
        for figure in row[0]["reported"]:
            ring = {"fillstyle": "none", "markersize": 9, "markeredgewidth": 1.5}
            axes.plot(figure, place, "o", color=ORANGE, label="reported", **ring)
        if values:
            mean = statistics.fmean(values)
            axes.plot(mean, place, "D", color=BLUE, markersize=4.5, label="measured")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3}
    axes.legend(labelled.values(), labelled.keys(), frameon=False, fontsize=8, **above)
    style(axes, "accuracy (%)", "")


def spread(series):
    """Return (means, lowest, highest) of several lists of numbers, place by place, as arrays.
    Where some lists have ended they are those of the others."""
    places = [[v for v in place if v is not None] for place in zip_longest(*series)]
    return [np.array([of(place) for place in places]) for of in (statistics.fmean, min, max)]


def watch(args):
    """Draw a run's curves whenever its history changes, until it is finished."""
    (path,) = args.histories
    run, drawn = {"finished": False}, None
    while not run["finished"]:
        changed = path.stat().st_mtime_ns
        if changed != drawn:
            run, drawn = read_history(path), changed
            save(draw_run([run], args.title), choose_target(args, path, path.stem))
        else:
            time.sleep(WATCH_SECONDS)


def choose_target(args, path, name):
    """Return the file of a picture of that name, beside its history unless --out says else."""
    return (args.out or path.parent) / f"{name}.{args.format}"


def parse_args(argv=None):
    """Return the options. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("histories", nargs="+", type=to_path, help="runs/NAME.json")
    add("--out", type=to_path, help="folder to write to (default: that of the histories)")
    formats = "of the pictures (default: %(default)s)"
    add("--format", choices=("png", "svg", "pdf"), default="png", help=formats)
    add("--title", help="of the picture; of several rows, of their comparison (default: the name)")
    add("--watch", action="store_true", help="follow one run's curves until it is finished")
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as device.py has it, which loads PyTorch
        parser.error("one process draws: start it without torchrun")
    args.histories = list(dict.fromkeys(args.histories))
    if args.watch and len(args.histories) > 1:
        parser.error(f"--watch follows one run, not {len(args.histories)}: give one history")
    return args


def main(argv=None):
    """Draw or watch what the options say; failures exit with 1 and a line each."""
    args = parse_args(argv)
    with contextlib.suppress(AttributeError):  # where stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have any characters
    try:
        problems = watch(args) if args.watch else draw_all(args)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(0 if args.watch else 130)  # Ctrl-C is how a watch ends
    sys.exit("\n".join(f"plot.py: error: {problem}" for problem in problems or ()) or 0)


if __name__ == "__main__":
    main()
