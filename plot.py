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

import os
import statistics
import sys
import textwrap
import time
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np

import history
from gallery import BLUE, COLOURS, ORANGE, draw_gates, draw_test, save, start_figure, style

DASHES = ("-", "--", "-.", ":")
WATCH_SECONDS = 3  # between two looks at a run
TESTED = {  # pictures of a run's test metrics: what draws them, and which metrics
    "test": (draw_test, "images", "per_class", "confusion", "calibration"),
    "gates": (draw_gates, "per_class", "gates", "kernels"),
}


def draw_all(args):
    """Write every picture and the table. Returns what could not be read or drawn, a line each."""
    runs, problems = {}, []
    for path in args.histories:
        try:
            runs[path] = history.read_history(path)
        except (OSError, ValueError) as error:
            problems.append(error)
    rows = history.group(runs.values())
    pictures = list_pictures(args, runs, rows)
    for target, (draw, *what) in pictures.items():
        try:
            save(draw(*what), target)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problems.append(f"{target} is not drawn: its metrics are damaged ({error})")
    if rows:
        results = history.tabulate(rows)
        print(results, end="")
    if len(rows) > 1:
        history.write_text(list(pictures)[-1].with_name("results.md"), results)
    return problems


def list_pictures(args, runs, rows):
    """What draws each picture, by its file: (function, arguments ...); ValueError if two share."""
    pictures, paths = {}, {id(run): path for path, run in runs.items()}
    title = args.title if len(rows) == 1 else None

    def add(path, name, *what):
        target = choose_target(args, path, name)
        if target in pictures:
            raise ValueError(f"{target} would be two pictures: draw the histories one by one")
        pictures[target] = what

    for row in rows:
        path = paths[id(row[0])]
        add(path, history.name_row(row, path.stem), draw_run, row, title)
    for path, run in runs.items():
        for name, (draw, *needed) in TESTED.items():
            if set(needed) <= run.get("test", {}).keys():
                add(path, f"{path.stem}-{name}", draw, run["test"], title or run["name"])
    if len(rows) > 1:
        add(next(iter(runs)), "comparison", draw_comparison, rows, args.title)
    return pictures


def draw_run(row, title=None):
    """A Figure of a row, one run or several seeds: loss and accuracy per epoch, loss per batch."""
    batch_losses = [run["batch_losses"] for run in row if run["batch_losses"]]
    seeds = f", mean and range of {len(row)} seeds" if len(row) > 1 else ""
    title = title or history.name_row(row) + seeds
    figure = start_figure(title + history.note_unfinished(row), 5.4 if batch_losses else 3)
    batch_panel = [["batches", "batches"]] if batch_losses else []
    axes = figure.subplot_mosaic([["loss", "accuracy"], *batch_panel])
    draw_epochs(axes["loss"], row, "loss", "loss")
    draw_epochs(axes["accuracy"], row, "accuracy", "accuracy (%)")
    if batch_losses:
        draw_batches(axes["batches"], batch_losses)
    return figure


def draw_epochs(axes, row, quantity, label):
    """Training and validation of a quantity over the epochs, grey where the two part company."""
    train = draw_metric(axes, row, f"train_{quantity}", "o-", BLUE, "training")
    val = draw_metric(axes, row, f"val_{quantity}", "s--", ORANGE, "validation")
    epochs = np.arange(1, len(train) + 1)
    if len(epochs):
        axes.fill_between(epochs, train, val, color="black", alpha=0.1, linewidth=0, label="gap")
        above = train[-1] >= val[-1]  # so that the two numbers do not overlap
        for last, colour, upper in ((train[-1], BLUE, above), (val[-1], ORANGE, not above)):
            axes.annotate(f"{last:.2f}", (epochs[-1], last), xytext=(6, 0), color=colour,
                          textcoords="offset points", va="bottom" if upper else "top",
                          fontsize=8)  # fmt: skip
        axes.legend(frameon=False, fontsize=8)
        axes.margins(y=0.12)  # for the numbers
    else:
        axes.text(0.5, 0.5, "no epoch yet", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    style(axes, "epoch", label)


def draw_metric(axes, row, metric, line, colour, label):
    """A row's mean metric over the epochs, with a band over its seeds. Returns the means."""
    means, low, high = spread([[epoch[metric] for epoch in run["epochs"]] for run in row])
    epochs = np.arange(1, len(means) + 1)
    every = max(1, len(epochs) // 15)  # enough to tell two lines apart in grey
    axes.plot(epochs, means, line, color=colour, markersize=3.5, markevery=every, linewidth=1.4,
              label=label)  # fmt: skip
    if len(row) > 1:
        axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return means


def draw_batches(axes, batch_losses):
    """The training loss of every batch, and its running mean; of several runs, mean and band."""
    shortest = min(map(len, batch_losses))
    window = min(shortest, max(2, shortest // 50))
    weights = np.full(window, 1 / window)
    means, low, high = spread([np.convolve(run, weights, "valid") for run in batch_losses])
    middles = np.arange(len(means)) + (window + 1) / 2
    losses = np.concatenate(batch_losses)
    if len(batch_losses) == 1:
        axes.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, alpha=0.35, linewidth=0.5,
                  label="each batch")  # fmt: skip
    else:
        axes.fill_between(middles, low, high, color=BLUE, alpha=0.35, linewidth=0)
    axes.plot(middles, means, color="black", linewidth=1.2, label=f"mean of {window}")
    usual, highest = np.percentile(losses, 99), losses.max()
    if highest > 3 * usual > 0:  # the first batches: they would flatten all others
        axes.set_ylim(0, 1.2 * usual)
        axes.set_title(f"above: up to {highest:.3g}", loc="left", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    style(axes, "batch", "training loss")


def draw_comparison(rows, title=None):
    """A Figure of all rows: reported beside measured accuracy, and accuracy over the epochs."""
    notes = [history.note_unfinished(history.choose_settled(row)) for row in rows]
    names = [textwrap.fill(history.name_row(row) + note, 36) for row, note in zip(rows, notes)]
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
    """Reported and measured accuracy of each row as dots; several seeds as ticks on a line."""
    for place, row in enumerate(rows):
        values = history.last_accuracies(row)
        if len(values) > 1:
            axes.plot(sorted(values), [place] * len(values), "|-", color=BLUE, label="seeds")
        if row[0]["reported"] is not None:
            axes.plot(row[0]["reported"], place, "o", color=ORANGE, fillstyle="none",
                      markersize=9, markeredgewidth=1.5, label="reported")  # fmt: skip
        if values:
            mean = statistics.fmean(values)
            axes.plot(mean, place, "D", color=BLUE, markersize=4.5, label="measured")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    labelled = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
    axes.legend(labelled.values(), labelled.keys(), frameon=False, fontsize=8, ncols=3,
                loc="lower center", bbox_to_anchor=(0.5, 1))  # fmt: skip
    style(axes, "accuracy (%)", "")


def spread(series):
    """(means, lowest, highest) of several lists of numbers, place by place, as arrays.
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
            run, drawn = history.read_history(path), changed
            save(draw_run([run], args.title), choose_target(args, path, path.stem))
        else:
            time.sleep(WATCH_SECONDS)


def choose_target(args, path, name):
    """The file that a picture of that name goes to, beside its history unless --out says else."""
    return (args.out or path.parent) / f"{name}.{args.format}"


def parse_args(argv=None):
    """The options, checked; usage errors exit with 2."""
    parser = history.make_parser(__doc__)
    add = parser.add_argument
    add("histories", nargs="+", type=Path, help="runs/NAME.json")
    add("--out", type=Path, help="folder to write to; None: that of the histories")
    add("--format", choices=("png", "svg", "pdf"), default="png", help="of the pictures")
    add("--title", help="of the pictures; of several rows, of their comparison; None: the name")
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
    try:
        problems = watch(args) if args.watch else draw_all(args)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(0 if args.watch else 130)  # Ctrl-C is how a watch ends
    sys.exit("\n".join(f"plot.py: error: {problem}" for problem in problems or ()) or 0)


if __name__ == "__main__":
    main()
