"""Records and arrays in, matplotlib figures out. No torch, no display, no global state of pyplot.

A figure of one panel is one call; a figure of several gives each call the axes to draw on:

    figure = curves(losses, "epoch", "training loss", "Depth hurts the plain net")

    figure, (left, right) = panels(2, "Skip connections at equal depth")
    curves(losses, "epoch", "training loss", "Training loss", ax=left)
    bars(accuracies, "test accuracy", "Test accuracy", percent=True, ax=right)

    save(figure, run_dir / "skip_connections.png")

The n-th series always has the n-th colour, so panels that list the same names in the same order
agree.
matplotlib is imported when the first figure is made, so that `--help` does not wait for it.
"""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.engine.files import write_atomically
from common.engine.report import DPI, PALETTE
from common.engine.verdicts import LEVEL, OverSeeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from common.engine.records import EpochRecord, Evaluation

INK, FAINT, MISSING = "#222222", "#DDDDDD", "#EEEEEE"
CROWD = 20  # points of a scatter plot that may all have names
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 13, 11, 9.5  # points; a panel is about 6 inches wide
WORDS = {"size": TEXT_SIZE, "color": INK, "parse_math": False}  # names may have a $ in them


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure as PNG, whole or not at all, and free its memory."""
    path = Path(path)
    _enlarge_small_text(figure)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in a script that none of the fonts here has: boxes, but no warning for
        # each letter of each figure.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(png, format="png", dpi=DPI)
    figure.clear()
    write_atomically(path, png.getvalue())
    return path


def _smallest_text(width: float, height: float) -> float:
    """Points: 1/60 of a 16:9 screen that a figure of so many inches fills, for the last row."""
    return max(height, width * 9 / 16) * 72 / 60


def _enlarge_small_text(figure: Figure) -> None:
    from matplotlib.text import Text

    smallest = _smallest_text(*figure.get_size_inches())
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = axis.get_ticklabels()
            if labels and labels[0].get_size() < smallest:
                axis.set_tick_params(labelsize=smallest)  # for the ticks that are to come, too
    for text in figure.findobj(Text):
        text.set_size(max(text.get_size(), smallest))


def panels(
    count: int,
    heading: str = "",
    *,
    columns: int | None = None,
    widths: Sequence[float] | None = None,
    size: tuple[float, float] = (6.2, 4.4),
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` empty panels and their axes, to be handed on as `ax=`.

    Args:
        heading: one line above all panels.
        columns: panels per row; by default up to three side by side, and four as two and two.
        widths: relative widths of the columns.
        size: width and height of one panel, inches.
    """
    columns = columns or (len(widths) if widths else 2 if count == 4 else min(count, 3))
    rows = -(-count // columns)
    figure = _figure(size[0] * columns, size[1] * rows)
    grid = figure.add_gridspec(rows, columns, width_ratios=widths)
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    if heading:
        _heading(figure, heading)
    return figure, axes


def _figure(width: float, height: float, h_pad: float = 0.1) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=h_pad)
    return figure


# -------------------------------------------------------------------------- what every lesson draws


def learning_curves(history: Sequence[EpochRecord]) -> Figure:
    """Loss, accuracy and learning rate, epoch by epoch, with the best validation epoch marked."""

    def column(field: str) -> list[float]:
        return [getattr(record, field) for record in history]

    figure, (loss, accuracy, rate) = panels(3, widths=(3, 3, 2), size=(5.0, 4.2))
    draw = partial(curves, xlabel="epoch", x=column("epoch"))
    losses = {"train": column("train_loss"), "validation": column("val_loss")}
    # While BatchNorm's statistics settle, a first validation loss can be 50 and flatten the rest.
    spiked = np.nanmax([*losses["validation"], 0]) > 3 * np.nanmax([*losses["train"], 0])
    draw(losses, ylabel="loss", title="Loss", log_y=spiked, ax=loss)
    # As `fit` chooses: the lower loss where two epochs are equally accurate.
    best = max(history, key=lambda r: (np.nan_to_num(r.val_top1, nan=-1.0), -r.val_loss))
    known = np.isfinite(best.val_top1)
    of_best = f": best on validation {best.val_top1:.1%}, epoch {best.epoch}" if known else ""
    shares = {"train": column("train_top1"), "validation": column("val_top1")}
    title = f"Accuracy{of_best}"
    draw(shares, ylabel="top-1 accuracy", title=title, percent=True, ax=accuracy)
    if known:
        ring = {"ms": 9, "mfc": "none", "mec": PALETTE[1], "mew": 2, "clip_on": False}
        accuracy.plot(best.epoch, best.val_top1, "o", **ring)
    draw({"": column("lr")}, ylabel="learning rate", title="Learning rate", ax=rate)
    return figure


def confusion_matrix(evaluation: Evaluation, class_names: Sequence[str]) -> Figure:
    """True classes down, predicted classes across. Colour is the share of the row, text the number
    of images.

    Above 20 classes the numbers give way to a colour scale that brings out small shares.
    """
    classes = evaluation.probabilities.shape[1]
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for probabilities of {classes} classes")
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (evaluation.targets, evaluation.predictions), 1)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    title = f"{evaluation.top1:.1%} of {len(evaluation.targets):,} images are right"
    wrong = counts - np.diag(np.diag(counts))
    if wrong.max() > 1:
        true, guess = np.unravel_index(wrong.argmax(), wrong.shape)
        title += (
            f"\nmost often wrong: {_short(class_names[true])} taken for "
            f"{_short(class_names[guess])} ({wrong[true, guess]} of {totals[true, 0]})"
        )
    written = classes <= 20
    side = 5.2 + 0.2 * min(classes, 20)
    _, (ax,) = panels(1, size=(side + 0.9, side))
    figure = heatmap(
        shares, class_names, class_names, title, xlabel="predicted class", ylabel="true class",
        label="share of the true class", percent=True, limits=(0, 1), ax=ax,
        text=[[f"{n:,}" if n else "" for n in row] for row in counts] if written else None,
        gamma=1 if written else 0.4,
    )  # fmt: skip
    ax.set_aspect("equal")
    return figure


def filters(weights: np.ndarray, *, most: int = 128) -> Figure:
    """First-layer filters, (out, in, kh, kw), each scaled by its own largest weight; middle gray
    is zero.

    Three input channels are shown as red, green and blue, any other number as its mean in gray.
    """
    weights = np.asarray(weights, dtype=float)
    total, in_channels, height, width = weights.shape
    weights, meaning = weights[:most], "colours are the weights of R, G, B"
    if in_channels != 3:
        weights = weights.mean(axis=1, keepdims=True).repeat(3, axis=1)
        meaning = "mean over input channels"
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + 0.5 * weights / np.where(largest > 0, largest, 1)
    columns = min(len(tiles), 16 if len(tiles) > 32 else 8)
    scale = 10 / 16 if columns > 8 else 1  # inches for a tile
    rows = -(-len(tiles) // columns)
    figure, (ax,) = panels(1, size=(max(6.2, 0.6 + columns * scale), 1.1 + rows * scale))
    ax.imshow(_tile(tiles.transpose(0, 2, 3, 1), rows, columns), interpolation="nearest")
    ax.set_axis_off()
    shown = f"{total}" if total == len(tiles) else f"{len(tiles)} of {total}"
    _heading(figure, f"First layer: {shown} filters of {height}×{width}; {meaning}, gray is zero")
    return figure


def _tile(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(N, h, w, 3) -> one image, `columns` tiles a row, white between them."""
    zoom = max(1, 12 // max(tiles.shape[1:3]))  # a gap of one pixel is thin beside 3x3 filters too
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    more = rows * columns - len(tiles)
    tiles = np.pad(tiles, ((0, more), (0, 1), (0, 1), (0, 0)), constant_values=1)
    _, height, width, _ = tiles.shape
    grid = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, 3)[:-1, :-1]


def activations(image: np.ndarray, maps: Mapping[str, np.ndarray], *, most: int = 8) -> Figure:
    """What each stage passes on: beside the input, (H, W, 3) in [0, 1], the `most` channels of
    highest mean of each stage's (C, h, w), each stage on its own scale.
    """
    rows = max(1, len(maps))
    figure = _figure(3.4 + 1.15 * most, 0.9 + 1.55 * rows, h_pad=0.08)
    grid = figure.add_gridspec(rows, 2, width_ratios=(2.2, 1.15 * most))
    ax = figure.add_subplot(grid[:, 0])
    ax.imshow(np.clip(image, 0, 1), interpolation="nearest")
    ax.set_anchor("N")
    ax.set_title(f"input, {image.shape[0]}×{image.shape[1]}", loc="left", **WORDS)
    _bare(ax)
    number = {"size": SMALL_SIZE - 1, "color": INK, "ha": "center", "va": "top"}
    for row, (name, stage) in enumerate(maps.items()):
        ax = figure.add_subplot(grid[row, 1])
        chosen = np.argsort(-stage.mean(axis=(1, 2)), kind="stable")[:most]
        scale = {"vmin": stage[chosen].min(), "vmax": stage[chosen].max()}
        for left, channel in zip(1.06 * np.arange(most), chosen):
            ax.imshow(stage[channel], cmap="viridis", extent=(left, left + 1, 0, 1), **scale)
            ax.text(left + 0.5, -0.04, f"{channel}", **number)
        ax.set(xlim=(0, 1.06 * most - 0.06), ylim=(-0.2, 1.03))
        ax.set_anchor("NW")
        channels, height, width = stage.shape
        label = f"{name}: {channels} channels of {height}×{width}"
        ax.set_title(label, loc="left", pad=3, **WORDS)
        _bare(ax)
    shown = f"the {most} channels of highest mean" if maps else "no stages"
    _heading(figure, f"What each stage passes on: {shown}, numbered below")
    return figure


def grad_cam(images: np.ndarray, heatmaps: np.ndarray, titles: Sequence[str]) -> Figure:
    """Each image, (N, H, W, 3) in [0, 1], beside itself under its heatmap, (N, h, w) in [0, 1]."""
    from matplotlib import colormaps

    heading = "Grad-CAM: bright is what spoke for the predicted class "
    heading += "(feature map of {}×{})".format(*heatmaps.shape[1:])
    pairs = []
    for image, heat in zip(images, heatmaps):
        image = np.clip(image, 0, 1)
        # Small images are enlarged first, so that the heatmap is smooth on them too.
        zoom = max(1, 112 // max(image.shape[:2]))
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        height, width, _ = image.shape
        heat = np.clip(_resize(heat, height, width), 0, 1)
        gray = image @ np.array([0.299, 0.587, 0.114])
        overlay = 0.45 * gray[..., None] + 0.55 * colormaps["inferno"](heat)[..., :3]
        gap = np.ones((height, max(1, width // 24), 3))
        pairs.append(np.concatenate([image, gap, overlay], axis=1))
    return _grid(pairs, titles, heading, columns=min(len(pairs), 4), width=2.9)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) -> (height, width), larger, bilinear, pixel centres aligned."""
    from PIL import Image

    picture = Image.fromarray(image.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def fields(seen: Mapping[str, tuple[np.ndarray, int]], heading: str) -> Figure:
    """What activations see: where the gradient is, (H, W), and around it the computed square."""
    columns = 4
    count = -(-len(seen) // columns) * columns
    figure, axes = panels(count, heading, columns=columns, size=(3.3, 3.7))
    for ax, (name, (gradient, side)) in zip(axes, seen.items()):
        # The root brings out the faint rim.
        ax.imshow(np.sqrt(gradient / gradient.max()), cmap="inferno", interpolation="nearest")
        (top, bottom), (left, right) = (
            [(places.min() + places.max() + sign * side) / 2 for sign in (-1, 1)]
            for places in gradient.nonzero()
        )
        ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#5FB7E5")
        ax.set_title(f"{name} pixels", size=TEXT_SIZE, loc="left")
        ax.set(xticks=[], yticks=[])
    return figure


def readers(blocks: Sequence[Sequence[Sequence[float]]]) -> Figure:
    """Who reads whom in each dense block: a column for each reader, a row for each of its sources.

    The last reader of a block follows it: a transition, or the classifier after the last block.
    """
    heading = "Who reads whom: mean absolute weight, in percent of the reader's average"
    figure, axes = panels(len(blocks), heading)
    every = [100 * value for columns in blocks for column in columns for value in column]
    for i, (columns, ax) in enumerate(zip(blocks, axes), 1):
        layers = [str(layer) for layer in range(1, len(columns))]
        last = "T: the transition" if i < len(blocks) else "C: the classifier"
        percent = 100 * np.array([*itertools.zip_longest(*columns)], dtype=float)  # NaN: not yet
        heatmap(
            percent, ["input", *layers], [*layers, last[0]], f"Block {i}",
            xlabel=f"reading layer ({last})", ylabel="layer whose maps are read", fmt="{:.0f}",
            limits=(min(every), max(every)), ax=ax,
        )  # fmt: skip
    return figure


def image_grid(images: np.ndarray, titles: Sequence[str], heading: str) -> Figure:
    """Images, (N, H, W, 3) in [0, 1], each under its title. No image: a figure that says so."""
    rows = max(1, -(-len(images) // 6))
    columns = -(-len(images) // rows)  # rows of up to 6, equally long
    return _grid(np.clip(images, 0, 1), titles, heading, columns, width=1.75)


# -------------------------------------------------------- what the lessons' experiments are made of


def curves(
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    x: Sequence[float] | None = None,
    percent: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """One line per series, its name at its end. Series may differ in length and hold NaN.

    Args:
        series: values by name; of shape (points,), or (runs, points): then the mean of the runs, in
            a band from the lowest to the highest.
        log_x: a logarithmic axis of positive `x`.
        log_y: a logarithmic axis; values of 0 and less are left out.
        x: where the points lie; 1, 2, 3, ... by default. A shorter series takes the first of them.
        percent: the values are fractions, the axis shows percent.
    """
    from matplotlib.ticker import MaxNLocator

    ax = ax or panels(1, size=(7.6, 4.6))[1][0]
    ax.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    ends, seen, whole = [], [], True
    for i, (name, values) in enumerate(series.items()):
        color = PALETTE[i % len(PALETTE)]
        style = ["-", "--", ":"][i // len(PALETTE) % 3]
        if len(values) and np.ndim(values[0]):  # runs, some of which may have stopped early
            values = [*zip(*itertools.zip_longest(*values, fillvalue=np.nan))]
        runs = np.atleast_2d(np.asarray(values, dtype=float))
        runs = np.where(np.isfinite(runs) & ((runs > 0) | (not log_y)), runs, np.nan)
        points = runs.shape[1]
        where = np.arange(1, points + 1) if x is None else np.asarray(x, dtype=float)[:points]
        whole = whole and np.all(where == np.round(where))
        mean = np.ma.masked_invalid(runs).mean(axis=0).filled(np.nan)
        if len(runs) > 1:
            low, high = np.fmin.reduce(runs), np.fmax.reduce(runs)
            ax.fill_between(where, low, high, color=color, alpha=0.18, lw=0)
        known = np.isfinite(mean)
        seen.extend(mean[known])
        # A line needs two neighbours: points that stand alone get a marker.
        before, after = np.pad(known, 1)[:-2], np.pad(known, 1)[2:]
        alone = np.flatnonzero(known & ~before & ~after).tolist()
        ax.plot(where, mean, style, color=color, lw=2.2, marker="o", ms=6, markevery=alone)
        if name and known.any():
            ends.append((name, where[known][-1], mean[known][-1], color))
        elif name:
            ends.append((f"{name} (no values)", np.nan, np.nan, color))
    if not seen:
        _say_empty(ax)
    elif log_y:
        _plain_log_ticks(ax.yaxis, seen)
    if log_x and seen:
        _plain_log_ticks(ax.xaxis, where)
    elif whole and seen:
        ticks = MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
        ax.xaxis.set_major_locator(ticks)
    ax.margins(x=0.02)
    _label_ends(ax, ends)
    return _look(ax, xlabel, ylabel, title, percent="y" if percent else "")


def bars(
    values: Mapping[str, float],
    ylabel: str,
    title: str,
    *,
    fmt: str = "{:.3g}",
    percent: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """One bar per name, its value written at its end; they lie down where the names are too long to
    stand.

    Args:
        values: NaN is written as "n/a".
        fmt: how a value is written; `percent` has its own.
    """
    names = list(values)
    lying = len(names) > 8 or any(len(name) > 64 // len(names) for name in names)
    ax = ax or panels(1, size=(7.6, 1.6 + 0.36 * len(names) if lying else 4.6))[1][0]
    lengths = np.array([*values.values()], dtype=float)
    known, where = np.isfinite(lengths), range(len(names))
    draw, along, padding = (ax.barh, "x", 4) if lying else (ax.bar, "y", 3)
    drawn = draw(where, np.where(known, lengths, 0), 0.72, color=PALETTE[0])
    fmt = "{:.1%}" if percent else fmt
    texts = [fmt.format(v) if ok else "n/a" for v, ok in zip(lengths, known)]
    ax.bar_label(drawn, texts, padding=padding, size=TEXT_SIZE, color=INK)
    if (lengths < 0).any():
        (ax.axvline if lying else ax.axhline)(0, color=INK, lw=0.8)
    name_axis = ax.yaxis if lying else ax.xaxis
    name_axis.set_ticks(where, [_short(name, 36) for name in names], parse_math=False)
    name_axis.set_tick_params(length=0)
    if lying:
        ax.margins(x=0.16)
        ax.set_ylim(len(names) - 0.4, -0.6)  # the first name on top
    else:
        ax.margins(y=0.12)
    if not names:
        _say_empty(ax)
    labels = (ylabel, "") if lying else ("", ylabel)
    return _look(ax, *labels, title, grid=along, percent=along if percent else "")


def seeds(
    values: Mapping[str, Sequence[float | None]],
    xlabel: str,
    title: str = "",
    *,
    percent: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """One line per name: every seed as a point, their mean as a bar and its 95% interval (Student's
    t). Names stand at the left, so that they may be long.

    Args:
        values: None for a seed without a value.
    """
    from matplotlib.ticker import MaxNLocator

    ax = ax or panels(1, size=(7.6, 1.6 + 0.42 * len(values)))[1][0]
    for i, numbers in enumerate(values.values()):
        known = [v for v in numbers if v is not None and np.isfinite(v)]
        color = PALETTE[i % len(PALETTE)]
        if len(known) > 1:
            low, high = OverSeeds(known).interval(LEVEL)
            if np.isfinite(low):
                low, high = np.clip((low, high), 0, 1) if percent else (low, high)
                ax.plot([low, high], [i, i], color=color, lw=6, alpha=0.25, solid_capstyle="butt")
        if known:
            ax.plot([np.mean(known)] * 2, [i - 0.22, i + 0.22], color=color, lw=2.5)
        ax.plot(known, [i] * len(known), "o", ms=6, mfc="white", mec=color, mew=1.6)
    ax.set_yticks(range(len(values)), [_short(name, 30) for name in values], parse_math=False)
    ax.set_ylim(len(values) - 0.4, -0.6)  # the first name on top
    ax.yaxis.set_tick_params(length=0)
    if percent:
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return _look(ax, xlabel, "", title, grid="x", percent="x" if percent else "")


def scatter(
    points: Sequence[tuple[str, float, float]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    log_x: bool = False,
    front: Sequence[str] | None = None,
    percent: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Named points (name, x, y), labelled so that no label covers another or a point. Of more than
    CROWD points with a front only the front is named: the others' names would cover all.

    Args:
        front: names to emphasise and to join, in order of x: the Pareto front, say. The others turn
            gray.
        percent: y is a fraction, its axis shows percent.
    """
    ax, front = ax or panels(1, size=(8.6, 5.6))[1][0], front or ()
    kept = [p for p in points if np.isfinite(p[1:]).all() and (p[1] > 0 or not log_x)]
    lost = [p[0] for p in points if p not in kept]
    on_front = sorted((p for p in kept if p[0] in front), key=lambda p: p[1:])
    others = [p for p in kept if p not in on_front]
    if log_x:
        ax.set_xscale("log")
    if on_front:
        x, y = [p[1] for p in on_front], [p[2] for p in on_front]
        ax.plot(x, y, color=PALETTE[0], lw=1.4, zorder=2)
    drawn = [*others, *on_front]  # the front last, so that no gray point hides one of it
    colors = ["#8A8A8A" if front else PALETTE[0]] * len(others) + PALETTE[:1] * len(on_front)
    ax.scatter([p[1] for p in drawn], [p[2] for p in drawn], s=52, c=colors, zorder=3, lw=0)
    if not kept:
        _say_empty(ax)
    if log_x and kept:
        _plain_log_ticks(ax.xaxis, [p[1] for p in kept])
    ax.margins(0.12)
    _label_points(ax, kept, on_front)
    title += f" (not shown: {', '.join(lost)})" if lost else ""
    return _look(ax, xlabel, ylabel, title, grid="both", percent="y" if percent else "")


def heatmap(
    matrix: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    *,
    xlabel: str = "",
    ylabel: str = "",
    label: str = "",
    fmt: str = "{:.2g}",
    percent: bool = False,
    text: Sequence[Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    gamma: float = 1,
    ax: Axes | None = None,
) -> Figure:
    """A matrix in colour, (rows, columns), with its numbers written where there is room; NaN is
    left gray.

    Args:
        label: what a colour means, with its unit, beside the colour bar.
        fmt: how a value is written; `percent` has its own.
        text: what is written in place of the values.
        limits: values of the first and the last colour; the matrix's own by default.
        gamma: below 1 it brings out small values.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    matrix = np.asarray(matrix, dtype=float)
    rows, columns = matrix.shape
    if (len(row_labels), len(column_labels)) != (rows, columns):
        raise ValueError(
            f"{len(row_labels)} row and {len(column_labels)} column labels for a matrix of "
            f"{rows}×{columns}"
        )
    if ax is None:
        width, height = np.clip(2.6 + 0.72 * columns, 5, 11), np.clip(1.8 + 0.5 * rows, 3, 9)
        _, (ax,) = panels(1, size=(width, height))
    if text is None and rows <= 20 and columns <= 20:
        fmt = "{:.0%}" if percent else fmt
        text = [["–" if np.isnan(v) else fmt.format(v) for v in row] for row in matrix]
    finite = matrix[np.isfinite(matrix)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0, 1))
    norm = PowerNorm(gamma, low, high if high > low else low + 1, clip=True)
    ax.set_facecolor(MISSING)
    shown = np.ma.masked_invalid(matrix)
    image = ax.imshow(shown, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    room = 0.72 * 72 * _panel_width(ax)  # points for all columns, roughly
    if text:
        longest = max(1, *(len(t) for row in text for t in row))
        size = np.clip(room / columns / (0.7 * longest), 5, TEXT_SIZE)
        centred = {**WORDS, "size": size, "ha": "center", "va": "center"}
        for (i, j), value in np.ndenumerate(matrix):
            dark = np.isfinite(value) and norm(value) > 0.55
            ax.text(j, i, text[i][j], **{**centred, "color": "white" if dark else INK})
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    for axis, labels in ((ax.xaxis, column_labels), (ax.yaxis, row_labels)):
        step = next((n for n in steps if len(labels) <= n * (30 if text else 12)), 2000)
        axis.set_ticks(range(0, len(labels), step), map(_short, labels[::step]), parse_math=False)
    ax.tick_params(length=0, labelsize=TEXT_SIZE, labelcolor=INK)
    longest = max(len(_short(name)) for name in column_labels)
    if longest * 0.62 * TEXT_SIZE * len(ax.get_xticks()) > room:
        for tick in ax.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")
    ax.spines[:].set_visible(False)
    ax.set_xlabel(xlabel, **WORDS)
    ax.set_ylabel(ylabel, **WORDS)
    # A colour bar's own ticks go one beyond its ends, and are drawn there as if they were the end.
    low, high = image.get_clim()
    ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
    bar = ax.figure.colorbar(
        image, ax=ax, shrink=0.85, pad=0.02, ticks=ticks, format="{x:.0%}" if percent else None
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL_SIZE, labelcolor=INK, length=0)
    bar.set_label(label, size=SMALL_SIZE + 0.5, color=INK)
    _title(ax, title)
    return ax.figure


# ----------------------------------------------------------------------------------------- the look


def _look(
    ax: Axes, xlabel: str, ylabel: str, title: str, *, grid: str = "y", percent: str = ""
) -> Figure:
    """Two thin spines, a faint grid behind the data, text of lecture size; rcParams stay alone."""
    from matplotlib.ticker import PercentFormatter

    ax.set_facecolor("white")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.set_axisbelow(True)
    ax.grid(False)
    ax.grid(True, axis=grid, color=FAINT, lw=0.8, ls="-")
    ax.tick_params(which="both", labelsize=TEXT_SIZE - 0.5, color="#999999", labelcolor=INK)
    ax.set_xlabel(xlabel, **WORDS)
    ax.set_ylabel(ylabel, **WORDS)
    if percent:
        axis = ax.xaxis if percent == "x" else ax.yaxis
        axis.set_major_formatter(PercentFormatter(1, decimals=None))
    _title(ax, title)
    return ax.figure


def _bare(ax: Axes) -> None:
    """An image without ticks or frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _plain_log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10, ...; over many decades, powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    few = max(values) / min(values) < 1000
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _say_empty(ax: Axes) -> None:
    """Words in place of data, and no scale that would pretend there is some."""
    ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", **WORDS)
    ax.set(xticks=[], yticks=[])


def _title(ax: Axes, text: str) -> None:
    """A title within the panel: matplotlib's begins at the axis and runs into the next panel."""
    text = _wrap(text, _panel_width(ax) - 0.4, TITLE_SIZE)
    title = ax.set_title(text, loc="left", pad=10, **{**WORDS, "size": TITLE_SIZE})

    def flush_left(renderer: Any) -> None:
        labels, box = ax.yaxis.get_tightbbox(renderer), ax.get_window_extent(renderer)
        title.set_x((labels.x0 - box.x0) / box.width if labels else 0)

    _before_drawing(ax, flush_left)


def _panel_width(ax: Axes) -> float:
    """Inches that the axes and their labels have side by side with the others of the figure."""
    spec = ax.get_subplotspec()
    ratios = np.asarray(spec.get_gridspec().get_width_ratios(), dtype=float)
    share = ratios[spec.colspan.start : spec.colspan.stop].sum() / ratios.sum()
    return ax.figure.get_figwidth() * share


def _heading(figure: Figure, text: str) -> None:
    text = _wrap(text, figure.get_figwidth() - 0.3, TITLE_SIZE + 1)
    figure.suptitle(text, x=0.01, ha="left", **{**WORDS, "size": TITLE_SIZE + 1})


def _wrap(text: str, inches: float, points: float) -> str:
    letters = max(10, int(inches * 72 / (0.54 * points)))  # a letter is 0.54 em wide on average
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters))


def _short(name: str, most: int = 18) -> str:
    """A long name without its middle."""
    return name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def _grid(
    images: Sequence[np.ndarray], titles: Sequence[str], heading: str, columns: int, width: float
) -> Figure:
    """Images in rows, each under its title, or words that there is none; measured in inches, on the
    axes of one panel, since axes for each take three times as long to draw.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images")
    centred = {**WORDS, "ha": "center"}
    if len(images) == 0:
        figure, (ax,) = panels(1, size=(6.2, 1.6))
        ax.set_axis_off()
        text = _wrap(f"{heading}: none", 5.6, TITLE_SIZE)
        ax.text(0.5, 0.5, text, **{**centred, "size": TITLE_SIZE, "va": "center"})
        return figure
    rows, cell = -(-len(images) // columns), max(width + 0.25, 6.2 / columns)  # for the heading
    shape = max(image.shape[0] / image.shape[1] for image in images)
    size = max(SMALL_SIZE, _smallest_text(columns * cell, rows * (width * shape + 0.6) + 0.6))
    texts = [_wrap(title, cell - 0.15, size) for title in titles]
    above = 0.1 + 1.25 * size / 72 * max(text.count("\n") + 1 for text in texts)
    height = above + width * shape + 0.1
    figure, (ax,) = panels(1, size=(columns * cell, rows * height + 0.6))
    for i, (image, text) in enumerate(zip(images, texts)):
        left, top = i % columns * cell + (cell - width) / 2, i // columns * height + above
        bottom = top + width * image.shape[0] / image.shape[1]
        ax.imshow(image, interpolation="nearest", extent=(left, left + width, bottom, top))
        ax.text(left + width / 2, top - 0.05, text, **{**centred, "size": size, "va": "bottom"})
    ax.set(xlim=(0, columns * cell), ylim=(rows * height, 0))
    _bare(ax)
    _heading(figure, heading)
    return figure


# ------------------------------------------------------------- labels that keep clear of each other

# The line from a label to its point.
_LEADER = {"arrowstyle": "-", "lw": 0.8, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each series' name beside its last point, outside the axes, in its colour."""
    from matplotlib.text import Text

    labels = []
    size = TEXT_SIZE if len(ends) <= 10 else SMALL_SIZE
    for name, x, y, color in ends:
        known = np.isfinite(x)
        label = ax.annotate(
            _short(name, 26),
            (x, y) if known else (1, 0.5),
            xycoords="data" if known else "axes fraction",
            xytext=(1.03, 0.5),
            textcoords="axes fraction",
            arrowprops={"relpos": (0, 0.5), **_LEADER, "color": color} if known else None,
            va="center",
            annotation_clip=False,
            **{**WORDS, "size": size, "color": color},
        )
        labels.append(label)

    def place(renderer: Any) -> None:
        box = ax.get_window_extent(renderer)
        wanted = [
            ax.transData.transform(label.xy)[1] if label.xycoords == "data" else box.y0
            for label in labels
        ]
        gap = 1.15 * max(Text.get_window_extent(label, renderer).height for label in labels)
        for label, y in zip(labels, _spread(wanted, gap, box.y0, box.y1)):
            label.xyann = (1.03, (y - box.y0) / box.height)

    if labels:
        _before_drawing(ax, place)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least `gap` apart in [low, high], nearest to the wanted ones by least squares.

    With y_i = z_i + i * gap, "apart" means that z never falls: isotonic regression.
    """
    from sklearn.isotonic import isotonic_regression

    wanted = np.asarray(wanted, dtype=float)
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order, steps = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    result = np.empty(len(wanted))
    result[order] = steps + isotonic_regression(
        wanted[order] - steps, y_min=low, y_max=high - gap * (len(wanted) - 1)
    )
    return result


def _label_points(
    ax: Axes,
    points: Sequence[tuple[str, float, float]],
    front: Sequence[tuple[str, float, float]],
) -> None:
    """Write each point's name where it covers no other, no point and little of the front's line."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    size = TEXT_SIZE if len(points) <= 15 else SMALL_SIZE
    crowd = len(points) > CROWD and bool(front)
    named = [i for i, point in enumerate(points) if point in front or not crowd]
    labels = []
    for i in named:
        strong = points[i] in front
        label = ax.annotate(
            _short(points[i][0], 26),
            points[i][1:],
            xytext=(0, 0),
            textcoords="offset pixels",
            arrowprops={"color": "#999999", **_LEADER},
            weight="bold" if strong and not crowd else "normal",
            ha="center",
            va="center",
            **{**WORDS, "size": size, "color": INK if strong or not front else "#666666"},
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        label.set_in_layout(False)  # it will move inside the axes, so the axes need not make room
        labels.append(label)

    def place(renderer: Any) -> None:
        pixel = renderer.points_to_pixels(1)
        area = ax.get_window_extent(renderer)
        spots = ax.transData.transform([point[1:] for point in points])
        sizes = [Text.get_window_extent(label, renderer) for label in labels]  # without their lines
        sizes = np.array([(box.width + 4 * pixel, box.height + 1 * pixel) for box in sizes])
        obstacles = [_boxes(spots, 9 * pixel)]
        path = [ax.transData.transform(point[1:]) for point in front]
        for a, b in itertools.pairwise(path):
            obstacles.append(_boxes(np.linspace(a, b, 40), 3 * pixel))
        step = 7 * pixel
        offsets = _clear_offsets(spots[named], sizes, np.concatenate(obstacles), area.extents, step)
        for label, offset, extent in zip(labels, offsets, sizes):
            label.xyann = tuple(offset)
            # A line to the point, where the name has moved away from it.
            gap = np.hypot(*np.maximum(np.abs(offset) - extent / 2, 0))
            label.arrow_patch.set_visible(bool(gap >= 1.6 * step))

    if labels:
        _before_drawing(ax, place)


def _clear_offsets(
    spots: np.ndarray, sizes: np.ndarray, obstacles: np.ndarray, area: Sequence[float], step: float
) -> np.ndarray:
    """Where to centre each label, from its point: near, and on top of as little as can be.

    Args:
        spots: (N, 2) points, pixels.
        sizes: (N, 2) widths and heights of their labels.
        obstacles: (M, 4) boxes (left, bottom, right, top) that no label should cover.
        area: the box that labels should stay in.
        step: distance of the nearest ring of places; the others lie at multiples of it.
    """
    angles = np.deg2rad([0, 90, 270, 180, 45, 315, 135, 225, 22, 338, 158, 202])
    rings = np.array([1, 1.7, 2.6, 4, 6, 8.5, 11.5, 15])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    farness = np.repeat(rings, len(angles)) + 0.03 * np.tile(np.arange(len(angles)), len(rings))
    distances = np.linalg.norm(spots[:, None] - spots[None], axis=-1)
    # Points with close neighbours choose first, having the least room; then all may choose again.
    crowded = np.argsort(np.sort(distances, axis=1)[:, :4].sum(axis=1), kind="stable")
    offsets, labels = np.zeros((len(spots), 2)), np.full((len(spots), 4), np.nan)
    for i in np.tile(crowded, 3):
        reach = np.sign(np.round(directions, 6)) * sizes[i] / 2
        places = (reach[None] + rings[:, None, None] * step * directions[None]).reshape(-1, 2)
        boxes = _boxes(spots[i] + places, sizes[i])
        taken = np.concatenate([obstacles, np.delete(labels, i, axis=0)])
        corner = np.maximum(boxes[:, None, :2], taken[None, :, :2])
        sides = np.maximum(np.minimum(boxes[:, None, 2:], taken[None, :, 2:]) - corner, 0)
        overlap = np.nansum(sides.prod(axis=-1), axis=1)
        outside = np.maximum([area[:2] - boxes[:, :2], boxes[:, 2:] - area[2:]], 0).sum(axis=(0, 2))
        # Without a line to its point, a label would be read as that of another point as near.
        gaps = np.maximum(np.maximum(boxes[:, None, :2] - spots, spots - boxes[:, None, 2:]), 0)
        gaps = np.hypot(gaps[..., 0], gaps[..., 1])  # (places, points)
        misread = np.where(distances[i] > 1, gaps, np.inf).min(axis=1) < 1.3 * gaps[:, i]
        misread &= gaps[:, i] < 1.6 * step
        best = (overlap + 50 * outside + step * (farness + 14 * misread)).argmin()
        offsets[i], labels[i] = places[best], boxes[best]
    return offsets


def _boxes(centres: np.ndarray, size: float | np.ndarray) -> np.ndarray:
    """(N, 2) -> (N, 4), boxes of one size around points."""
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _before_drawing(ax: Axes, action: Callable[[Any], None]) -> None:
    """Have `action(renderer)` called when the axes are drawn, before their labels are: only then is
    it known how many pixels there are, however the figure was laid out.
    """
    from matplotlib.artist import Artist

    class Before(Artist):
        zorder = -1

        def draw(self, renderer: Any) -> None:
            action(renderer)

    ax.add_artist(Before()).set_in_layout(False)
