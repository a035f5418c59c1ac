"""Draw runs: histories in, pictures and the results table out.

python plot.py runs/row4.json               # runs/row4.png: loss and accuracy over the epochs
python plot.py runs/*.json                  # all of them, runs/comparison.png and runs/results.md
python plot.py runs/row4*.json              # several seeds of a row in one picture
python plot.py runs/row4.json --format pdf --title "Row 4 of the report"
python plot.py runs/final.json runs/best.json --minutes     # compared over time, not over epochs

Runs that differ in nothing but their seed make one row: their mean, and a band from the lowest to
the highest. If these end more than 10 points apart, table and comparison have each run instead.
Where a seed is there twice, as of two machines, a row is of those that are named alike in a folder.
It is of its finished runs; if none has finished, of all. A run that evaluate.py tested has two
pictures more, runs/row4-test.png and runs/row4-gates.png.
"""

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections import Counter
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np

from gallery import BLUE, COLOURS, ORANGE, draw_gates, draw_test, save, start_figure, to_drawable
from history import (
    expand_patterns,
    harden_output,
    hyperparameters,
    read_history,
    to_path,
    write_atomically,
)

DASHES = ("-", "--", "-.", ":")
PARTS = {"train": ("training", "o-", BLUE), "val": ("validation", "s--", ORANGE)}
FAR_APART = 10  # points between the seeds of a row, one of which died: a mean says nothing of them
COLUMNS = ("row", "hyperparameters", "parameters", "reported", "measured", "difference", "seconds")


def draw_all(args):
    """Write every picture and the table. Return what could not be read or drawn, a line each; what
    is left out is named on stderr."""
    runs, problems, left_out = read_runs(args.histories)
    rows = group(runs)
    name_apart(rows)
    shown = {run["path"] for row in rows for run in row}
    hidden = [run["path"] for run in runs if run["path"] not in shown]
    left_out += [f"{path} is left out: others of its row are finished" for path in hidden]
    if not runs:
        return problems + left_out
    for line in left_out:
        print(f"plot.py: {line}", file=sys.stderr)
    drawn = set()
    for path, name, draw, *what in list_pictures(runs, rows, args):
        target = (args.out or path.parent) / f"{Path(name).name}.{args.format}"
        try:
            if target in drawn:
                raise ValueError("another picture is called so; draw the histories one by one")
            save(draw(*what), target)
            drawn.add(target)
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as e:
            problems.append(f"{target} is not drawn: {type(e).__name__}: {e}")
    results = tabulate(rows)
    if len(rows) > 1:
        target = (args.out or runs[0]["path"].parent) / "results.md"
        try:
            write_atomically(target, lambda file: file.write(results.encode()))
        except OSError as error:
            problems.append(error)
    print(results, end="")
    return problems


def read_runs(paths):
    """Return the histories that have an epoch, with the `path`, `folder` and `name` of their files,
    then what could not be read and what has no epoch, a line each."""
    runs, problems, begun = [], [], []
    for path in dict.fromkeys(paths):  # each once
        try:
            shown = Path(to_drawable(str(path)))
            names = {"name": shown.stem, "folder": shown.parent, "path": path}
            run = read_history(path) | names
            if run["epochs"]:
                runs.append(run)
            else:
                begun.append(f"{path} is left out: it has no epoch yet")
        except (OSError, ValueError) as error:
            problems.append(error)
    return runs, problems, begun


def list_pictures(runs, rows, args):
    """Yield of each picture: a history that it lies beside, its name, the function that draws it,
    the arguments of that."""
    one_title = args.title if len(rows) == 1 else None
    for row in rows:
        yield row[0]["path"], name_row(row), draw_run, row, one_title or name_row(row)
    for run in runs:
        if "test" in run:
            what = run["test"], one_title or run["name"]
            yield run["path"], f"{run['name']}-test", draw_test, *what
            if run["test"].get("gates") or args.blocks:  # k = 1 has none
                yield run["path"], f"{run['name']}-gates", draw_gates, *what, args.blocks
    if len(rows) > 1:
        compared = rows, args.title or "", args.minutes
        yield runs[0]["path"], "comparison", draw_comparison, *compared


def group(runs):
    """Group histories into rows of runs that are alike but for the seed: of the finished ones, if
    there are any. Where a seed is there twice, as of two machines, runs that are named alike in a
    folder make a row. Whatever they are called, a row has a seed once."""

    def options(run):
        return json.dumps(hyperparameters(run["config"]) | {"seed": None}, sort_keys=True)

    def files(run):
        return run.get("folder"), name_less_seed(run)

    rows = []
    for alike in gather(runs, options):
        alike = [run for run in alike if run["finished"]] or alike
        alike.sort(key=get_seed)
        once = len(gather(alike, get_seed)) == len(alike)
        for family in [alike] if once else gather(alike, files):
            layers = zip_longest(*gather(family, get_seed))
            rows += [[run for run in layer if run] for layer in layers]
    return rows


def gather(runs, key):
    """Return a list of the runs for each value of key(run), in their order."""
    lists = {}
    for run in runs:
        lists.setdefault(key(run), []).append(run)
    return list(lists.values())


def get_seed(run):
    """Return the seed of a run, 0 if its history does not say."""
    return run["config"].get("seed", 0)


def name_less_seed(run):
    """Return a run's name without the -seedN at its end."""
    return run["name"].removesuffix(f"-seed{get_seed(run)}")


def name_row(row):
    """Return what a row is called: its first run's name, less the seed of several runs."""
    return name_less_seed(row[0]) + row[0].get("seeds", "") if len(row) > 1 else row[0]["name"]


def name_apart(rows):
    """Put their folders before the names of rows that are called alike, and their seeds behind
    those of one folder."""
    for row in called_alike(rows):
        for run in row:
            run["name"] = str(run["folder"] / run["name"])
    for row in called_alike(rows):
        row[0]["seeds"] = f"-seeds{'-'.join(str(get_seed(run)) for run in row)}"


def called_alike(rows):
    """Return the rows that are called as another one is."""
    names = Counter(map(name_row, rows))
    return [row for row in rows if names[name_row(row)] > 1]


def reported_accuracies(row):
    """Return the published accuracies (%) of a row: all that its runs were given."""
    return list(dict.fromkeys(accuracy for run in row for accuracy in run["reported"]))


def count_epochs(row):
    """Return how many epochs all runs of a row have: they differ where it is unfinished."""
    return min(len(run["epochs"]) for run in row)


def last_accuracies(row):
    """Return the accuracies (%) that a row's runs end with: evaluate.py's if all were tested, else
    those of the last epoch that all have."""
    if all("test" in run for run in row):
        return [run["test"]["accuracy"] for run in row]
    return [run["epochs"][count_epochs(row) - 1]["val_accuracy"] for run in row]


def are_far_apart(values):
    """Whether accuracies of several seeds are to be shown each, without their mean."""
    return max(values) - min(values) > FAR_APART


def is_held_out(row):
    """Whether what last_accuracies gives is of images held out of training."""
    return bool(row[0]["config"].get("holdout")) and not all("test" in run for run in row)


def note_unfinished(row):
    """Return ' (unfinished, epoch 3 of 15)' if a row is, else nothing."""
    if row[0]["finished"]:
        return ""
    return f" (unfinished, epoch {count_epochs(row)} of {row[0]['config'].get('epochs')})"


def tabulate(rows):
    """Return the results as aligned Markdown: a line per row, with the options that not all
    share."""
    configs = [hyperparameters(row[0]["config"]) for row in rows]
    shared = {key for key in configs[0] if all(c.get(key) == configs[0][key] for c in configs)}
    hidden = (shared - {"arch", "k"}) | {"seed"}
    lines = [COLUMNS]
    for row, config in zip(rows, configs):
        options = []
        for key, value in config.items():
            if key not in hidden:
                values = value if isinstance(value, list) else [value]
                options.append(f"{key} {' '.join(map(str, values)) or 'none'}")
        cells = [name_row(row), ", ".join(options).replace("_", " "), *describe_results(row)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    formats = [f"{'<' if i < 2 else '>'}{w}" for i, w in enumerate(widths)]
    return "".join(f"| {' | '.join(map(format, line, formats))} |\n" for line in lines)


def describe_results(row):
    """Return a row's cells in the table from "parameters" on."""
    reported, values = reported_accuracies(row), last_accuracies(row)
    cells = [f"{row[0]['parameters']:,}", ", ".join(f"{x:.2f} %" for x in reported)]
    mean = statistics.fmean(values)
    result, difference = f"{mean:.2f} %", ", ".join(f"{mean - x:+.2f}" for x in reported)
    if are_far_apart(values):
        result, difference = f"{', '.join(f'{x:.2f}' for x in sorted(values))} %", ""
    elif len(values) > 1:
        result += f" ± {statistics.stdev(values):.2f} (n = {len(values)})"
    if is_held_out(row):
        result, difference = f"{result} on held-out images", ""
    seconds = statistics.fmean(sum(e["seconds"] for e in run["epochs"]) for run in row)
    return [*cells, result + note_unfinished(row), difference, f"{seconds:,.1f}"]


def draw_run(row, title):
    """Return a Figure of a row, one run or several seeds: each metric per epoch, loss per batch."""
    seeds = f", mean and range of {len(row)} seeds" if len(row) > 1 else ""
    epochs = [epoch for run in row for epoch in run["epochs"]]
    metrics = [key for key in epochs[0] if all(key in epoch for epoch in epochs)]
    names = [key.partition("_")[2] for key in metrics if key.startswith(("train_", "val_"))]
    names = list(dict.fromkeys(["loss", "accuracy", *names]))  # each once
    places = [[left, right or left] for left, right in zip_longest(names[::2], names[1::2])]
    places += [["batches", "batches"]]
    figure = start_figure(title + seeds + note_unfinished(row), 0.3 + 2.6 * len(places))
    axes = figure.subplot_mosaic(places)
    for name in names:
        draw_epochs(axes[name], row, name, metrics)
    draw_batches(axes["batches"], [run["batch_losses"] for run in row])
    return figure


def draw_epochs(axes, row, name, metrics):
    """Draw a metric of training and validation, what there is of it in `metrics`, over the epochs,
    grey between the two."""
    curves = {}  # the means, by colour
    for part, (label, line, colour) in PARTS.items():
        metric = f"{part}_{name}"
        if metric in metrics:
            curves[colour] = draw_metric(axes, row, metric, line, colour, label)
    if len(curves) == 2:
        train, val = curves.values()
        epochs = np.arange(1, len(train) + 1)
        axes.fill_between(epochs, train, val, color="black", alpha=0.1, linewidth=0, label="gap")
    lowest_first = sorted(curves.items(), key=lambda curve: curve[1][-1])
    for (colour, means), va in zip(lowest_first, ("top", "bottom")):  # numbers never overlap
        text, where = f"{means[-1]:.2f}", {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(text, (len(means), means[-1]), **where, color=colour, va=va, fontsize=8)
    axes.legend()
    axes.margins(y=0.12)  # for the numbers
    label = "accuracy (%)" if name == "accuracy" else name.replace("_", " ")
    axes.set(xlabel="epoch", ylabel=label)


def draw_metric(axes, row, metric, line, colour, label, minutes=False):
    """Draw a row's mean metric over the epochs, or the minutes of training and validation, with a
    band over its seeds; return the means."""
    means, low, high = spread([[epoch[metric] for epoch in run["epochs"]] for run in row])
    if minutes:
        seconds, _, _ = spread([[epoch["seconds"] for epoch in run["epochs"]] for run in row])
        x = seconds.cumsum() / 60
    else:
        x = np.arange(1, len(means) + 1)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    every = max(1, len(x) // 15)  # enough to tell two lines apart in grey
    dots = {"markersize": 3.5, "markevery": every}
    axes.plot(x, means, line, color=colour, linewidth=1.4, label=label, **dots)
    if len(row) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    return means


def draw_batches(axes, batch_losses):
    """Draw every batch's training loss and its running mean; of several runs, mean and band."""
    losses, low, high = spread(batch_losses)
    window = min(len(losses), max(2, len(losses) // 50))
    numbers, thin = np.arange(1, len(losses) + 1), {"alpha": 0.35, "linewidth": 0.5}
    axes.fill_between(numbers, low, high, color=BLUE, label="each batch", **thin)
    means = np.convolve(losses, np.full(window, 1 / window), "valid")
    middles = np.arange(len(means)) + (window + 1) / 2
    axes.plot(middles, means, color="black", linewidth=1.2, label=f"mean of {window}")
    usual, highest = np.percentile(high, 99), high.max()
    if highest > 3 * usual > 0:  # the first batches: they would flatten all others
        axes.set_ylim(0, 1.2 * usual)
        axes.set_title(f"above: up to {highest:.3g}", loc="left", fontsize=8)
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set(xlabel="batch", ylabel="training loss")


def draw_comparison(rows, title, minutes=False):
    """Return a Figure of all rows: reported beside measured accuracy, accuracy over the epochs or
    the minutes."""
    notes = [" (held out)" if is_held_out(row) else "" for row in rows]
    names = [name_row(row) + note + note_unfinished(row) for row, note in zip(rows, notes)]
    names = [textwrap.fill(name, 36) for name in names]
    lines = sum(name.count("\n") + 1 for name in names)
    heights = 1.2 + 0.2 * lines, max(3, 0.4 + 0.15 * lines)
    figure = start_figure(title, sum(heights))
    parts = figure.subfigures(2, 1, height_ratios=heights)
    dots, curves = (part.subplots() for part in parts)  # each as wide as its names allow
    draw_dots(dots, rows, names)
    for name, row, dash, colour in zip(names, rows, cycle(DASHES), cycle(COLOURS)):
        marker = "o" if max(len(run["epochs"]) for run in row) == 1 else ""
        label = re.sub("^_", " _", name)  # Matplotlib hides what begins with an underscore
        for seeds in [[run] for run in row] if are_far_apart(last_accuracies(row)) else [row]:
            draw_metric(curves, seeds, "val_accuracy", marker + dash, colour, label, minutes)
            label = ""  # once in the legend
    if minutes:
        curves.set_xscale("log")
        curves.minorticks_off()
        curves.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        curves.xaxis.set_major_formatter("{x:g}")
    curves.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    curves.set(xlabel="minutes" if minutes else "epoch", ylabel="validation accuracy (%)")
    return figure


def draw_dots(axes, rows, names):
    """Draw reported and measured accuracy of each row as dots, of a held-out one only the latter;
    several seeds as ticks on a line, and those far apart as dots each."""
    for place, row in enumerate(rows):
        values = last_accuracies(row)
        if len(values) > 1:
            axes.plot(sorted(values), [place] * len(values), "|-", color=BLUE, label="seeds")
        for reported in [] if is_held_out(row) else reported_accuracies(row):
            ring = {"fillstyle": "none", "markersize": 9, "markeredgewidth": 1.5}
            axes.plot(reported, place, "o", color=ORANGE, label="reported", **ring)
        dots = values if are_far_apart(values) else [statistics.fmean(values)]
        axes.plot(dots, [place] * len(dots), "D", color=BLUE, markersize=4.5, label="measured")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3}
    axes.legend(labelled.values(), labelled.keys(), **above)
    axes.set_xlabel("accuracy (%)")


def spread(series):
    """Return (means, lowest, highest) of several lists of numbers, place by place, as arrays.
    Where some lists have ended they are those of the others."""
    places = np.array(list(zip_longest(*series, fillvalue=np.nan)))
    return np.nanmean(places, 1), np.nanmin(places, 1), np.nanmax(places, 1)


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
    add("--format", choices=("png", "svg", "pdf"), default="png", help="of pictures (default: png)")
    add("--title", help="title, of several rows of their comparison (default: the name)")
    add("--minutes", action="store_true", help="compare over minutes instead of epochs")
    blocks = "draw the gates of these blocks alone, counted from 1"
    add("--blocks", type=int, nargs="+", metavar="N", help=blocks)
    args = parser.parse_args(argv)
    if min(args.blocks or [1]) < 1:
        parser.error(f"--blocks {' '.join(map(str, args.blocks))}: the first is 1")
    args.histories = expand_patterns(args.histories)
    return args


def main(argv=None):
    """Draw what the options say; failures exit with 1 and a line each."""
    args = parse_args(argv)
    try:
        problems = draw_all(args)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit("\n".join(f"plot.py: error: {problem}" for problem in problems) or 0)


if __name__ == "__main__":
    harden_output()
    main()
