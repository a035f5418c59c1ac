"""Draw runs: histories in, pictures and the results table out.

python plot.py runs/row4.json               # runs/row4.png: loss and accuracy over the epochs
python plot.py runs/*.json                  # all of them, runs/comparison.png and runs/results.md
python plot.py results/*.json --out docs    # the same into another folder

Runs that differ in nothing but their seed make one row: their mean, and its spread. An unfinished
run is drawn as far as it got.
"""

import argparse
import json
import statistics
import sys
import textwrap
from itertools import cycle, product
from pathlib import Path

from matplotlib.figure import Figure

from history import hyperparameters, read_history, write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart; in grey the dashes do.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, ORANGE = COLOURS[:2]
DASHES = ("-", "--", "-.", ":")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("histories", nargs="+", type=Path, help="runs/NAME.json")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the histories')")
    return parser.parse_args(argv)


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


def draw_run(history):
    """A Figure of one run: loss and accuracy per epoch, and the loss of every batch if kept."""
    panels = 3 if history["batch_losses"] else 2
    figure = Figure(figsize=(4 * panels, 3.5), layout="constrained")
    figure.suptitle(history["name"])
    loss, accuracy, *batch = figure.subplots(1, panels)
    draw_epochs(loss, history["epochs"], "loss", "loss")
    draw_epochs(accuracy, history["epochs"], "accuracy", "accuracy (%)")
    if batch:
        losses = history["batch_losses"]
        batch[0].plot(losses, color=BLUE, alpha=0.3, linewidth=0.5, label="each batch")
        window = max(1, len(losses) // 50)
        starts = range(0, len(losses) - window + 1, window)
        means = [statistics.fmean(losses[start : start + window]) for start in starts]
        middles = [window * (i + 0.5) for i in range(len(means))]
        batch[0].plot(middles, means, color=BLUE, label=f"mean of {window}")
        batch[0].legend(frameon=False)
        style(batch[0], "batch", "training loss")
    return figure


def draw_epochs(axes, epochs, quantity, label):
    """Training and validation of a quantity over the epochs, the last values written beside."""
    numbers = [epoch["epoch"] for epoch in epochs]
    for kind, name, colour, dash in (
        ("train", "training", BLUE, "-"),
        ("val", "validation", ORANGE, "--"),
    ):
        values = [epoch[f"{kind}_{quantity}"] for epoch in epochs]
        marker = "o" if len(values) <= 30 else None
        axes.plot(numbers, values, dash, color=colour, marker=marker, markersize=3, label=name)
        if values:
            upper = values[-1] == max(
                epochs[-1][f"{other}_{quantity}"] for other in ("train", "val")
            )
            side = "bottom" if upper else "top"  # so that the two numbers do not overlap
            axes.annotate(f" {values[-1]:.2f}", (numbers[-1], values[-1]), color=colour, va=side)
    axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.12)
    style(axes, "epoch", label)


def draw_comparison(rows):
    """A Figure of all rows: reported beside measured accuracy, and accuracy over the epochs."""
    height = max(4, 1.5 + 0.4 * len(rows))
    figure = Figure(figsize=(13, height), layout="constrained")
    dots, curves = figure.subplots(1, 2)
    names = [textwrap.fill(row[0]["name"], 30) for row in rows]
    for place, row in enumerate(rows):
        reported, values = row[0]["reported"], finals(row)
        if reported is not None:
            dots.plot(reported, place, "o", color=ORANGE, fillstyle="none", label="reported")
        if values:
            dots.plot(values, [place] * len(values), "-", color=BLUE)
            mean = statistics.fmean(values)
            dots.plot(mean, place, "D", color=BLUE, markersize=5, label="measured")
    dots.set_yticks(range(len(rows)), names)
    dots.invert_yaxis()
    labelled = dict(zip(*reversed(dots.get_legend_handles_labels())))  # each label once
    dots.legend(labelled.values(), labelled.keys(), frameon=False)
    style(dots, "accuracy (%)", "")
    for name, row, (dash, colour) in zip(names, rows, cycle(product(DASHES, COLOURS))):
        for number, history in enumerate(row):
            epochs = [epoch["epoch"] for epoch in history["epochs"]]
            values = [epoch["val_accuracy"] for epoch in history["epochs"]]
            label = None if number else name
            curves.plot(epochs, values, dash, color=colour, linewidth=1.2, label=label)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    style(curves, "epoch", "validation accuracy (%)")
    return figure


def style(axes, x_label, y_label):
    """What all axes share."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def finals(row):
    """The accuracies that the runs of a row end with, those without an epoch left out."""
    return [value for value in map(measured, row) if value is not None]


def table(rows):
    """The results as Markdown: a line per row, with the hyperparameters that not all share."""
    configs = [hyperparameters(row[0]["config"]) for row in rows]
    shared = {key for key in configs[0] if all(c.get(key) == configs[0][key] for c in configs)}
    lines = [
        "| row | hyperparameters | reported | measured | difference |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row, config in zip(rows, configs):
        shown = ({"arch", "k"} | (config.keys() - shared)) - {"seed"}
        options = ", ".join(
            f"{key.replace('_', ' ')} {plain(config[key])}" for key in config if key in shown
        )
        reported, values = row[0]["reported"], finals(row)
        mean = statistics.fmean(values) if values else None
        result = "not yet" if mean is None else f"{mean:.2f} %"
        if len(values) > 1:
            result += f" ± {statistics.stdev(values):.2f} (n = {len(values)})"
        if not all(history["finished"] for history in row):
            result += f" (unfinished, epoch {len(row[-1]['epochs'])} of {config['epochs']})"
        known = mean is not None and reported is not None
        cells = (
            row[0]["name"],
            options,
            "" if reported is None else f"{reported:.2f} %",
            result,
            f"{mean - reported:+.2f}" if known else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plain(value):
    """An option's value in words."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    words = {"True": "yes", "False": "no", "None": "default"}
    return words.get(str(value), str(value))


def main(argv=None):
    args = parse_args(argv)
    histories, failed = [], False
    for path in args.histories:
        try:
            histories.append((path, read_history(path)))
        except (OSError, ValueError) as error:
            print(f"plot.py: error: {error}", file=sys.stderr)
            failed = True
    try:
        if histories:
            draw_all(histories, args.out)
    except OSError as error:
        sys.exit(f"plot.py: error: {error}")
    sys.exit(failed)


def draw_all(histories, out):
    """Write a picture of each (path, history), the table, and of several also the comparison."""
    for path, history in histories:
        save(draw_run(history), (out or path.parent) / f"{path.stem}.png")
    folder = out or histories[0][0].parent
    rows = rows_of([history for _, history in histories])
    if len(rows) > 1:
        save(draw_comparison(rows), folder / "comparison.png")
    results = table(rows)
    write_atomically(folder / "results.md", lambda file: file.write(results.encode()))
    print(results, end="")


def save(figure, path):
    """Write a Figure to a file of its own folder, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
