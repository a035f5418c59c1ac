"""Pictures of what a trained network does, and the style that all pictures share.

figure = draw_test(history["test"], "row4")
save(figure, Path("runs/row4-test.png"))
"""

import math
import os
import sys
import textwrap
import unicodedata
import warnings

os.environ.pop("MPLBACKEND", None)  # notebooks set it to one of their own; none is used here
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from history import write_atomically

# Fonts of Linux, macOS and Windows that have the East Asian letters of names.
EAST_ASIAN = (
    "Noto Sans CJK SC,Noto Sans CJK JP,WenQuanYi Micro Hei,WenQuanYi Zen Hei,Droid Sans Fallback,"
    "PingFang SC,PingFang HK,Hiragino Sans GB,Arial Unicode MS,Microsoft YaHei,Malgun Gothic"
).split(",")


def choose_fonts():
    """Return the families of all text: matplotlib's own, then for letters that it lacks those of
    the user's matplotlibrc and the East Asian ones, as far as they are installed."""
    family, installed = matplotlib.rcParams["font.family"], font_manager.get_font_names()
    named = [name for one in family for name in matplotlib.rcParams.get(f"font.{one}", [one])]
    own = matplotlib.rcParamsDefault["font.sans-serif"]
    others = [name for name in (*named, *EAST_ASIAN) if name in installed and name not in own]
    return ["sans-serif", *dict.fromkeys(others)]


fonts = choose_fonts()
matplotlib.rcdefaults()  # whatever else the user's matplotlibrc says
matplotlib.rc("font", family=fonts)
matplotlib.rc("text", parse_math=False)  # a name may hold dollar signs
matplotlib.rc("svg", fonttype="none")  # text stays text
matplotlib.rc("figure", titlesize=11, dpi=200)
matplotlib.rc("axes", grid=True, axisbelow=True)
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc("grid", alpha=0.25)
matplotlib.rc("legend", frameon=False, fontsize=8)

# Okabe and Ito's colours, which the colour-blind can tell apart; in grey the dashes do.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, ORANGE = COLOURS[:2]
SHADES = "Blues"  # light is little: in grey the same
WIDTH = 7.2  # inches, a printed page between its margins
COLUMNS = 6  # of the misclassified images


def start_figure(title, height):
    """An empty Figure under its title, of a page's width and that height (inches)."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(to_drawable(" ".join(title.split())), 80))
    return figure


def to_drawable(name):
    """Return a name, of a file say, on one line: what neither a picture nor a table can show, such
    as bytes that are not UTF-8, is spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def shorten(name):
    """Return a name as it fits above a photo: East Asian letters are as wide as two others."""
    widths = np.cumsum([2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in name])
    return name if sum(widths[-1:]) <= 28 else name[: sum(widths <= 27)] + "…"


def save(figure, path):
    """Write a Figure to a file, the suffix gives the format, and name it on stderr.
    The folder is made if it is missing. OSError if the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:]))
    print(path, file=sys.stderr)


def draw_test(test, title):
    """A Figure of test metrics: confusion matrix, per-class accuracy, calibration."""
    title = f"{title}: {test['images']:,} test images, {test['accuracy']:.2f} % right"
    figure = start_figure(title, 9.2)
    places = [["confusion"] * 2, ["classes", "calibration"]]
    panels = figure.subplot_mosaic(places, height_ratios=[5.6, 3])
    names, accuracies = zip(*test["per_class"].items())
    draw_confusion(panels["confusion"], test["confusion"], names)
    draw_bars(panels["classes"], names, accuracies, accuracies, "accuracy (%)")
    draw_calibration(panels["calibration"], test["calibration"])
    return figure


def draw_confusion(axes, confusion, names):
    """Counts and row percentages of a confusion matrix, its rows the true classes."""
    counts = np.array(confusion)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    pairs = zip(counts.flat, shares.flat)
    texts = [f"{count:,}\n{share:.1f}%" if count else "0" for count, share in pairs]
    draw_heat_map(axes, shares, texts, 0, 100, names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true: count, share of the row")


def draw_heat_map(axes, values, texts, low, high, columns):
    """An array in shades from low to high, with the text of each cell, names below its columns."""
    axes.imshow(values, cmap=SHADES, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    for ((row, column), value), text in zip(np.ndenumerate(values), texts):
        dark = value - low > 0.57 * (high - low)
        colour = "white" if dark else "grey" if text == "0" else "black"
        axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")


def draw_bars(axes, classes, percentages, best, label):
    """A bar for each class's percentage, blue and with its number where that is among the best."""
    colours = [BLUE if value in best else "lightgrey" for value in percentages]
    numbers = [f"{value:.1f}" if value in best else "" for value in percentages]
    bars = axes.barh(classes, percentages, color=colours)
    axes.bar_label(bars, numbers, padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel=label)  # room for the number of 100
    axes.grid(False, axis="y")


def draw_calibration(axes, calibration):
    """A reliability diagram: how many of the images in each bin of confidence are right."""
    bins = calibration["bins"]
    edges = np.linspace(0, 100, len(bins) + 1)
    lefts, heights = zip(*((x, part["accuracy"]) for x, part in zip(edges, bins) if part["count"]))
    bars = {"width": edges[1], "align": "edge", "edgecolor": "white"}
    axes.bar(lefts, heights, color=BLUE, label="right", **bars)
    axes.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="if calibrated")
    counts = np.array([part["count"] for part in bins])
    shares = 100 * counts / counts.sum()
    axes.stairs(shares, edges, color=ORANGE, linewidth=1.5, label="share of all images")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="images (%)")
    axes.set_title(f"expected calibration error {calibration['ece']:.2f} %", fontsize=9)
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=7, loc="upper left")


def draw_gates(test, title, blocks=None):
    """A Figure of the gates' coefficients a_1 ... a_k of every block, or of those whose numbers,
    from 1 on, are given; from test metrics."""
    gates, names = test["gates"], list(test["per_class"])
    if blocks:
        if not set(blocks) <= set(range(1, len(gates) + 1)):
            numbers = " ".join(map(str, blocks))
            raise ValueError(f"--blocks {numbers}: {len(gates)} blocks have gates")
        gates = [gates[number - 1] for number in blocks]
    height = 1.2 + len(gates) * (0.35 + 0.25 * len(gates[0]["quantiles"]))
    figure = start_figure(f"{title}: coefficients of the gates", height)
    grid = {"squeeze": False, "sharex": "col", "sharey": "row", "width_ratios": [2, 1]}
    axes = figure.subplots(len(gates), 2, **grid)
    for (means, spread), gate in zip(axes, gates):
        draw_coefficients(means, spread, gate, names)
    axes[0, 0].set_title("mean coefficient of the test images of each class", fontsize=9)
    axes[0, 1].set_title("all: quartiles, extremes", fontsize=9)
    axes[-1, 1].set_xlabel("coefficient")
    return figure


def draw_coefficients(means, spread, gate, names):
    """One block's gate: a heat map of its mean coefficients, a box for each over all images."""
    shown = np.array(gate["mean_per_class"]).T  # (k, classes)
    low, high = min(0, shown.min()), shown.max()
    texts = [f"{v:.2f}" if abs(v) < 10 else f"{v:.3g}" for v in shown.flat]
    draw_heat_map(means, shown, texts, low, high, names)
    means.set_yticks(range(len(shown)), [f"a{number}" for number in range(1, len(shown) + 1)])
    similarity = gate.get("similarity")  # not of old histories, nor of k = 1
    means.set_ylabel(gate["block"] + (f"\ncos {similarity:.2f}" if similarity is not None else ""))
    least, first, middle, third, most = np.array(gate["quantiles"]).T
    places = np.arange(len(least))
    spread.hlines(places, least, most, color="black", linewidth=1)
    spread.barh(places, third - first, 0.6, first, color="white", edgecolor="black")
    spread.vlines(middle, places - 0.3, places + 0.3, color=ORANGE, linewidth=2)
    spread.locator_params(axis="x", nbins=4)
    spread.tick_params(axis="y", labelleft=False)


def draw_wrong(images, wrong, title):
    """A Figure of misclassified images, uint8 (N, 32, 32, 3), and what the test says of them."""
    rows = max(1, math.ceil(len(wrong) / COLUMNS))
    title = f"{title}: most confidently wrong (true → predicted, confidence)"
    figure = start_figure(title, 0.5 + 1.5 * rows)
    hidden = {"frame_on": False, "xticks": [], "yticks": []}
    grid = figure.subplots(rows, COLUMNS, squeeze=False, subplot_kw=hidden)
    for axes, image, one in zip(grid.flat, images, wrong):
        axes.imshow(image)
        names = f"{one['true']} →\n{one['predicted']}, {one['confidence']:.0f} %"
        axes.set_title(names, fontsize=7.5)
    if not wrong:
        figure.text(0.5, 0.4, "no test image is misclassified", ha="center")
    return figure


def draw_predictions(predictions, classes, title):
    """A Figure of (name, photo, what the network saw, probabilities in %) of each photo.
    The two images are arrays (H, W, 3) and (32, 32, 3), the probabilities one of each class."""
    figure = start_figure(title, 0.4 + 1.9 * len(predictions))
    panels = figure.subplots(len(predictions), 3, squeeze=False, width_ratios=[1, 1, 1.4])
    for (photo, seen, bars), (name, image, small, probabilities) in zip(panels, predictions):
        photo.imshow(image)
        photo.set_title(shorten(to_drawable(name)), fontsize=8)
        seen.imshow(small, interpolation="nearest")
        seen.set_title("what the network saw", fontsize=8)
        for axes in (photo, seen):
            axes.set_axis_off()
        best = sorted(probabilities)[-3:]
        draw_bars(bars, classes, probabilities, best, "probability (%)")
        bars.tick_params(labelsize=7)
    return figure
