"""Records and arrays in, matplotlib figures out. No torch, no display, no global state of pyplot.

A figure of one panel is one call; a figure of several gives each call the axes to draw on:

    figure = curves(losses, "epoch", "training loss", "Depth hurts the plain net")

    figure, (left, right) = panels(2, "Skip connections at equal depth")
    curves(losses, "epoch", "training loss", "Training loss", ax=left)
    bars(accuracies, "test accuracy", "Test accuracy", percent=True, colors=PALETTE, ax=right)

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
from collections.abc import Mapping, Sequence
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


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure as PNG, whole or not at all, and free its memory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """1/60 of the height of a 16:9 screen that a figure of so many inches fills, in points: it's to
    be read from the last row.
    """
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
    from matplotlib.figure import Figure

    columns = columns or (len(widths) if widths else 2 if count == 4 else min(count, 3))
    rows = -(-count // columns)
    figure = Figure((size[0] * columns, size[1] * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(rows, columns, width_ratios=widths)
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    if heading:
        _heading(figure, heading)
    return figure, axes


# -----------------------------------------------------------------------------------------------
# What every lesson draws
# -----------------------------------------------------------------------------------------------


def learning_curves(history: Sequence[EpochRecord]) -> Figure:
    """Loss, accuracy and learning rate, epoch by epoch, with the best validation epoch marked."""
    figure, (loss, accuracy, rate) = panels(3, widths=(3, 3, 2), size=(5.0, 4.2))
    epochs = [r.epoch for r in history]
    losses = {"train": [r.train_loss for r in history], "validation": [r.val_loss for r in history]}
    # While BatchNorm's statistics settle, a first validation loss can be 50 and flatten the rest.
    spiked = np.nanmax([*losses["validation"], 0]) > 3 * np.nanmax([*losses["train"], 0])
    curves(losses, "epoch", "loss", "Loss", x=epochs, log_y=bool(spiked), ax=loss)
    val_top1 = np.array([r.val_top1 for r in history], dtype=float)
    title = "Accuracy"
    if np.isfinite(val_top1).any():
        # As `fit` chooses: the lower loss where two epochs are equally accurate.
        best = max(
            range(len(history)),
            key=lambda i: (np.nan_to_num(val_top1[i], nan=-1.0), -history[i].val_loss),
        )
        title = f"Accuracy: best on validation {val_top1[best]:.1%}, epoch {epochs[best]}"
    curves(
        {"train": [r.train_top1 for r in history], "validation": val_top1},
        "epoch", "top-1 accuracy", title, x=epochs, percent=True, ax=accuracy,
    )  # fmt: skip
    if np.isfinite(val_top1).any():
        accuracy.plot(
            epochs[best],
            val_top1[best],
            "o",
            ms=9,
            mfc="none",
            mec=PALETTE[1],
            mew=2,
            clip_on=False,
        )
    curves(
        {"": [r.lr for r in history]}, "epoch", "learning rate", "Learning rate", x=epochs, ax=rate
    )
    return figure


def confusion_matrix(
    evaluation: Evaluation, class_names: Sequence[str], *, ax: Axes | None = None
) -> Figure:
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

    written = classes <= 20
    if ax is None:
        side = 5.2 + 0.2 * min(classes, 20)
        _, (ax,) = panels(1, size=(side + 0.9, side))
    wrong = counts - np.diag(np.diag(counts))
    title = f"{evaluation.top1:.1%} of {len(evaluation.targets):,} images are right"
    if wrong.max() > 1:
        true, guess = np.unravel_index(wrong.argmax(), wrong.shape)
        title += (
            f"\nmost often wrong: {_short(class_names[true])} taken for "
            f"{_short(class_names[guess])} ({wrong[true, guess]} of {totals[true, 0]})"
        )
    text = [[f"{n:,}" if n else "" for n in row] for row in counts] if written else None
    _draw_matrix(
        ax, shares, class_names, class_names, text, limits=(0, 1), gamma=1 if written else 0.4
    )
    _colorbar(ax, "share of the true class", percent=True)
    ax.set_xlabel("predicted class", size=TEXT_SIZE, color=INK)
    ax.set_ylabel("true class", size=TEXT_SIZE, color=INK)
    _title(ax, title)
    return ax.figure


def filters(weights: np.ndarray, *, most: int = 128) -> Figure:
    """First-layer filters, (out, in, kh, kw), each scaled by its own largest weight; middle gray
    is zero.

    Three input channels are shown as red, green and blue, any other number as its mean in gray.
    """
    weights = np.asarray(weights, dtype=float)
    total, in_channels, height, width = weights.shape
    weights = weights[:most]
    if in_channels != 3:
        weights = weights.mean(axis=1, keepdims=True).repeat(3, axis=1)
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + 0.5 * weights / np.where(largest > 0, largest, 1)
    columns = min(len(tiles), 16 if len(tiles) > 32 else 8)
    canvas = _tile(tiles.transpose(0, 2, 3, 1), columns)
    scale = 10 / 16 if columns > 8 else 1
    figure, (ax,) = panels(
        1, size=(max(6.2, 0.6 + columns * scale), 1.1 + -(-len(tiles) // columns) * scale)
    )
    ax.imshow(canvas, interpolation="nearest")
    ax.set_axis_off()
    shown = f"{total}" if total == len(tiles) else f"{len(tiles)} of {total}"
    colours = (
        "colours are the weights of R, G, B" if in_channels == 3 else "mean over input channels"
    )
    _heading(figure, f"First layer: {shown} filters of {height}×{width}; {colours}, gray is zero")
    return figure


def activations(image: np.ndarray, maps: Mapping[str, np.ndarray], *, most: int = 8) -> Figure:
    """What each stage passes on: beside the input, (H, W, 3) in [0, 1], the `most` channels of
    highest mean of each stage's (C, h, w), each stage on its own scale.
    """
    from matplotlib.figure import Figure

    rows = max(1, len(maps))
    figure = Figure((3.4 + 1.15 * most, 0.9 + 1.55 * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    grid = figure.add_gridspec(rows, 2, width_ratios=(2.2, 1.15 * most))
    ax = figure.add_subplot(grid[:, 0])
    ax.imshow(np.clip(image, 0, 1), interpolation="nearest")
    ax.set_anchor("N")
    label = f"input, {image.shape[0]}×{image.shape[1]}"
    ax.set_title(label, size=TEXT_SIZE, color=INK, loc="left")
    _bare(ax)
    for row, (name, stage) in enumerate(maps.items()):
        ax = figure.add_subplot(grid[row, 1])
        chosen = np.argsort(-stage.mean(axis=(1, 2)), kind="stable")[:most]
        low, high = stage[chosen].min(), stage[chosen].max()
        for column, channel in enumerate(chosen):
            left = 1.06 * column
            ax.imshow(
                stage[channel], cmap="viridis", vmin=low, vmax=high, extent=(left, left + 1, 0, 1)
            )
            ax.text(
                left + 0.5,
                -0.04,
                f"{channel}",
                size=SMALL_SIZE - 1,
                color=INK,
                ha="center",
                va="top",
            )
        ax.set(xlim=(0, 1.06 * most - 0.06), ylim=(-0.2, 1.03))
        channels, height, width = stage.shape
        ax.set_anchor("NW")
        label = f"{name}: {channels} channels of {height}×{width}"
        ax.set_title(label, size=TEXT_SIZE, color=INK, loc="left", pad=3, parse_math=False)
        _bare(ax)
    shown = f"the {most} channels of highest mean" if maps else "no stages"
    _heading(figure, f"What each stage passes on: {shown}, numbered below")
    return figure


def grad_cam(
    images: np.ndarray,
    heatmaps: np.ndarray,
    titles: Sequence[str],
    *,
    heading: str = "Grad-CAM: bright is what spoke for the predicted class",
) -> Figure:
    """Each image, (N, H, W, 3) in [0, 1], beside itself under its heatmap, (N, h, w) in [0, 1]."""
    if len(images) == 0:
        return _message("Grad-CAM: no images to show")
    height, width = heatmaps.shape[1:]
    heading += f" (feature map of {height}×{width})"
    from matplotlib import colormaps

    pairs = []
    for image, heat in zip(images, heatmaps):
        image = np.clip(image, 0, 1)
        # Small images are enlarged first, so that the heatmap is smooth on them too.
        zoom = max(1, 112 // max(image.shape[:2]))
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        height, width = image.shape[:2]
        heat = np.clip(_resize(np.asarray(heat, dtype=float), height, width), 0, 1)
        gray = image @ np.array([0.299, 0.587, 0.114])
        overlay = 0.45 * gray[..., None] + 0.55 * colormaps["inferno"](heat)[..., :3]
        gap = np.ones((height, max(1, width // 24), 3))
        pairs.append(np.concatenate([image, gap, overlay], axis=1))
    return _grid(pairs, titles, heading, columns=min(len(pairs), 4), width=2.9)


def fields(seen: Mapping[str, tuple[np.ndarray, int]], heading: str, *, columns: int = 4) -> Figure:
    """What an activation sees: where its gradient is, (H, W), with the computed field, a square of
    so many pixels, drawn around it.
    """
    rows = -(-len(seen) // columns)
    figure, axes = panels(rows * columns, heading, columns=columns, size=(3.3, 3.7))
    for ax, (name, (gradient, side)) in zip(axes, seen.items()):
        # The root brings out the faint rim.
        ax.imshow(np.sqrt(gradient / gradient.max()), cmap="inferno", interpolation="nearest")
        (top, bottom), (left, right) = (
            [(places.min() + places.max() + sign * side) / 2 for sign in (-1, 1)]
            for places in gradient.nonzero()
        )
        ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#5FB7E5")
        ax.set_title(f"{name} pixels", size=11, loc="left")
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
    if len(images) == 0:
        return _message(f"{heading}: none")
    columns = -(-len(images) // -(-len(images) // 6))  # rows of up to 6, equally long
    return _grid([np.clip(i, 0, 1) for i in images], titles, heading, columns, width=1.75)


# -----------------------------------------------------------------------------------------------
# What the lessons' experiments are made of
# -----------------------------------------------------------------------------------------------


def curves(
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    smooth: int = 0,
    x: Sequence[float] | None = None,
    percent: bool = False,
    colors: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One line per series, its name at its end. Series may differ in length and hold NaN.

    Args:
        series: values by name; of shape (points,), or (runs, points): then the mean of the runs, in
            a band from the lowest to the highest.
        log_x: a logarithmic axis of positive `x`.
        log_y: a logarithmic axis; values of 0 and less are left out.
        smooth: width, in points, of a moving average; the raw values stay behind it, faint.
        x: where the points lie; 1, 2, 3, ... by default. A shorter series takes the first of them.
        percent: the values are fractions, the axis shows percent.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax = ax or panels(1, size=(7.6, 4.6))[1][0]
    colors = colors or PALETTE
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ends, seen, whole = [], [], True
    for i, (name, values) in enumerate(series.items()):
        color, style = colors[i % len(colors)], ["-", "--", ":"][i // len(colors) % 3]
        runs = np.atleast_2d(np.asarray(values, dtype=float))
        runs = np.where(np.isfinite(runs) & ((runs > 0) | (not log_y)), runs, np.nan)
        points = runs.shape[1]
        where = np.arange(1, points + 1) if x is None else np.asarray(x, dtype=float)[:points]
        whole = whole and np.all(where == np.round(where))
        mean = _column_mean(runs)
        if smooth > 1:
            ax.plot(where, mean, color=color, alpha=0.2, lw=0.8)
            mean = _moving_average(mean, smooth)
        elif len(runs) > 1:
            low, high = np.fmin.reduce(runs), np.fmax.reduce(runs)
            ax.fill_between(where, low, high, color=color, alpha=0.18, lw=0)
        finite = np.flatnonzero(np.isfinite(mean))
        seen.extend(mean[finite])
        # A line needs two neighbours: points that stand alone get a marker.
        alone = (
            [k for k in finite if k - 1 not in finite and k + 1 not in finite]
            if points < 999
            else []
        )
        ax.plot(where, mean, style, color=color, lw=2.2, marker="o", ms=6, markevery=alone)
        if name and len(finite):
            ends.append((name, where[finite[-1]], mean[finite[-1]], color))
        elif name:
            ends.append((f"{name} (no values)", np.nan, np.nan, color))
    if not seen:
        _say_empty(ax)
    elif log_y:
        _plain_log_ticks(ax.yaxis, seen)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if log_x and seen:
        _plain_log_ticks(ax.xaxis, where)
    elif whole and seen:
        ax.xaxis.set_major_locator(
            MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
        )
    _look(ax, xlabel, f"{ylabel}, mean over {smooth}" if smooth > 1 else ylabel)
    ax.margins(x=0.02)
    _label_ends(ax, ends)
    _title(ax, title)
    return ax.figure


def bars(
    values: Mapping[str, float],
    ylabel: str,
    title: str,
    errors: Mapping[str, float] | None = None,
    *,
    fmt: str = "{:.3g}",
    percent: bool = False,
    log_y: bool = False,
    colors: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One bar per name, its value written at its end; they lie down where the names are too long to
    stand.

    Args:
        values: NaN is written as "n/a".
        errors: half-widths of the error bars, by name; what they are belongs in the title or in
            `ylabel`.
        fmt: how a value is written; `percent` has its own.
        log_y: for values that differ by orders of magnitude.
        colors: PALETTE to match the curves beside it; one colour for all by default.
    """
    from matplotlib.ticker import PercentFormatter

    names = list(values)
    lying = len(names) > 8 or any(len(name) > 64 // max(1, len(names)) for name in names)
    ax = ax or panels(1, size=(7.6, 1.6 + 0.36 * len(names) if lying else 4.6))[1][0]
    colors = colors or PALETTE[:1]
    heights = np.array([values[name] for name in names], dtype=float)
    spread = np.array([(errors or {}).get(name, np.nan) for name in names], dtype=float)
    where = np.arange(len(names))
    drawn = np.where(np.isfinite(heights), heights, 0.0)
    base = (
        drawn[drawn > 0].min(initial=1) if log_y else 0.0
    )  # where the text of an empty bar stands
    face = [colors[i % len(colors)] for i in where]
    error = {}
    if np.isfinite(spread).any():
        line = {"ecolor": INK, "capsize": 4, "lw": 1.3}
        error = {"xerr" if lying else "yerr": spread, "error_kw": line}
    (ax.barh if lying else ax.bar)(where, drawn, 0.72, color=face, **error)

    for i, (height, half) in enumerate(zip(heights, np.nan_to_num(spread))):
        text = (
            "n/a" if not np.isfinite(height) else f"{height:.1%}" if percent else fmt.format(height)
        )
        end = height + np.copysign(half, height) if np.isfinite(height) else base
        end = max(end, base) if log_y else end
        side = 1 if end >= 0 else -1
        if lying:
            place = {"xy": (end, i), "xytext": (4 * side, 0), "va": "center"}
            place["ha"] = "left" if side > 0 else "right"
        else:
            place = {"xy": (i, end), "xytext": (0, 3 * side), "ha": "center"}
            place["va"] = "bottom" if side > 0 else "top"
        ax.annotate(text, textcoords="offset points", size=TEXT_SIZE, color=INK, **place)

    value_axis, name_axis = (ax.xaxis, ax.yaxis) if lying else (ax.yaxis, ax.xaxis)
    name_axis.set_ticks(where, [_short(name, 36) for name in names], parse_math=False)
    _look(ax, ylabel if lying else "", "" if lying else ylabel, grid="x" if lying else "y")
    name_axis.set_tick_params(length=0)
    if log_y:
        (ax.set_xscale if lying else ax.set_yscale)("log")
    if percent:
        value_axis.set_major_formatter(PercentFormatter(1))
    ax.margins(**({"x": 0.16} if lying else {"y": 0.12}))
    if lying:
        ax.set_ylim(len(names) - 0.4, -0.6)  # the first name on top
    if not names:
        _say_empty(ax)
    if (drawn < 0).any():
        (ax.axvline if lying else ax.axhline)(0, color=INK, lw=0.8)
    _title(ax, title)
    return ax.figure


def seeds(
    values: Mapping[str, Sequence[float | None]],
    xlabel: str,
    title: str = "",
    *,
    percent: bool = False,
    log_x: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """One line per name: every seed as a point, their mean as a bar and its 95% interval (Student's
    t). Names stand at the left, so that they may be long.

    Args:
        values: None for a seed without a value.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax = ax or panels(1, size=(7.6, 1.6 + 0.42 * len(values)))[1][0]
    for i, numbers in enumerate(values.values()):
        known = [v for v in numbers if v is not None and np.isfinite(v)]
        color = PALETTE[i % len(PALETTE)]
        if len(known) > 1:
            low, high = OverSeeds(known).interval(LEVEL)
            if np.isfinite(low):
                low = max(low, min(known) / 2) if log_x else low
                low, high = np.clip((low, high), 0, 1) if percent else (low, high)
                ax.plot([low, high], [i, i], color=color, lw=6, alpha=0.25, solid_capstyle="butt")
        if known:
            ax.plot([np.mean(known)] * 2, [i - 0.22, i + 0.22], color=color, lw=2.5)
        ax.plot(known, [i] * len(known), "o", ms=6, mfc="white", mec=color, mew=1.6)
    ax.set_yticks(range(len(values)), [_short(name, 30) for name in values], parse_math=False)
    ax.set_ylim(len(values) - 0.4, -0.6)  # the first name on top
    _look(ax, xlabel, "", grid="x")
    ax.yaxis.set_tick_params(length=0)
    if log_x:
        ax.set_xscale("log")
    if percent:
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _title(ax, title)
    return ax.figure


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
    from matplotlib.ticker import PercentFormatter

    ax = ax or panels(1, size=(8.6, 5.6))[1][0]
    kept = [
        (n, x, y)
        for n, x, y in points
        if np.isfinite(x) and np.isfinite(y) and (x > 0 or not log_x)
    ]
    lost = [n for n, *_ in points if n not in {k[0] for k in kept}]
    if log_x:
        ax.set_xscale("log")
    on_front = sorted((p for p in kept if p[0] in (front or ())), key=lambda p: (p[1], p[2]))
    if on_front:
        ax.plot(
            [p[1] for p in on_front], [p[2] for p in on_front], color=PALETTE[0], lw=1.4, zorder=2
        )
    plain = "#8A8A8A" if front is not None else PALETTE[0]
    strong = [front is not None and p[0] in front for p in kept]
    if kept:
        # Drawn in order: the front last, so that no gray point hides one of it.
        order = sorted(range(len(kept)), key=lambda i: strong[i])
        x, y = [kept[i][1] for i in order], [kept[i][2] for i in order]
        ax.scatter(
            x, y, s=52, c=[PALETTE[0] if strong[i] else plain for i in order], zorder=3, lw=0
        )
    else:
        _say_empty(ax)
    _look(ax, xlabel, ylabel, grid="both")
    if log_x and kept:
        _plain_log_ticks(ax.xaxis, [p[1] for p in kept])
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.margins(0.12)
    _label_points(ax, kept, strong, on_front)
    _title(ax, title if not lost else f"{title} (not shown: {', '.join(lost)})")
    return ax.figure


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
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A matrix in colour, (rows, columns), with its numbers written where there is room; NaN is
    left gray.

    Args:
        label: what a colour means, with its unit, beside the colour bar.
        fmt: how a value is written; `percent` has its own.
        limits: values of the first and the last colour; the matrix's own by default.
    """
    matrix = np.asarray(matrix, dtype=float)
    rows, columns = matrix.shape
    if ax is None:
        width, height = (np.clip(2.6 + 0.72 * columns, 5, 11), np.clip(1.8 + 0.5 * rows, 3, 9))
        _, (ax,) = panels(1, size=(float(width), float(height)))
    text = None
    if rows <= 20 and columns <= 20:
        text = [
            ["–" if np.isnan(v) else f"{v:.0%}" if percent else fmt.format(v) for v in r]
            for r in matrix
        ]
    _draw_matrix(ax, matrix, row_labels, column_labels, text, limits, aspect="auto")
    _colorbar(ax, label, percent)
    ax.set_xlabel(xlabel, size=TEXT_SIZE, color=INK)
    ax.set_ylabel(ylabel, size=TEXT_SIZE, color=INK)
    _title(ax, title)
    return ax.figure


# -----------------------------------------------------------------------------------------------
# The look
# -----------------------------------------------------------------------------------------------


def _look(ax: Axes, xlabel: str, ylabel: str, grid: str = "y") -> None:
    """Two thin spines, a faint grid behind the data, text of lecture size; rcParams stay alone."""
    ax.set_facecolor("white")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.set_axisbelow(True)
    ax.grid(False)
    ax.grid(True, axis=grid, color=FAINT, lw=0.8, ls="-")
    ax.tick_params(which="both", labelsize=TEXT_SIZE - 0.5, color="#999999", labelcolor=INK)
    ax.set_xlabel(xlabel, size=TEXT_SIZE, color=INK, parse_math=False)
    ax.set_ylabel(ylabel, size=TEXT_SIZE, color=INK, parse_math=False)


def _bare(ax: Axes) -> None:
    """An image without ticks or frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _say_empty(ax: Axes) -> None:
    """Words in place of data, and no scale that would pretend there is some."""
    ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", size=TEXT_SIZE, color=INK)
    ax.set(xticks=[], yticks=[])


def _title(ax: Axes, text: str) -> None:
    """A title that starts at the panel's left edge and breaks at its right: matplotlib would start
    it at the axis and run it into the next panel.
    """
    text = _wrap(text, _panel_width(ax) - 0.4, TITLE_SIZE)
    title = ax.set_title(text, size=TITLE_SIZE, color=INK, loc="left", pad=10, parse_math=False)

    def flush_left(renderer: Any) -> None:
        labels, box = ax.yaxis.get_tightbbox(renderer), ax.get_window_extent(renderer)
        title.set_x((labels.x0 - box.x0) / box.width if labels else 0)

    ax.add_artist(_before_drawing(flush_left))


def _panel_width(ax: Axes) -> float:
    """Inches that the axes and their labels have side by side with the others of the figure."""
    spec = ax.get_subplotspec()
    if spec is None:
        return ax.figure.get_figwidth()
    ratios = np.asarray(spec.get_gridspec().get_width_ratios(), dtype=float)
    share = ratios[spec.colspan.start : spec.colspan.stop].sum() / ratios.sum()
    return float(ax.figure.get_figwidth() * share)


def _heading(figure: Figure, text: str) -> None:
    text = _wrap(text, figure.get_figwidth() - 0.3, TITLE_SIZE + 1)
    figure.suptitle(text, size=TITLE_SIZE + 1, color=INK, x=0.01, ha="left", parse_math=False)


def _wrap(text: str, inches: float, points: float) -> str:
    letters = max(10, int(inches * 72 / (0.54 * points)))  # a letter is 0.54 em wide on average
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters))


def _short(name: str, most: int = 18) -> str:
    """A long name without its middle."""
    return name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def _message(text: str) -> Figure:
    """A figure with nothing but words."""
    figure, (ax,) = panels(1, size=(6.2, 1.6))
    ax.set_axis_off()
    text = _wrap(text, 5.6, TITLE_SIZE)
    centred = {"ha": "center", "va": "center", "parse_math": False}
    ax.text(0.5, 0.5, text, size=TITLE_SIZE, color=INK, **centred)
    return figure


# -----------------------------------------------------------------------------------------------
# Matrices and images
# -----------------------------------------------------------------------------------------------


def _draw_matrix(
    ax: Axes,
    matrix: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    text: Sequence[Sequence[str]] | None,
    limits: tuple[float, float] | None = None,
    gamma: float = 1,
    aspect: str = "equal",
) -> None:
    from matplotlib.colors import PowerNorm

    rows, columns = matrix.shape
    if (len(row_labels), len(column_labels)) != (rows, columns):
        raise ValueError(
            f"{len(row_labels)} row and {len(column_labels)} column labels for a matrix of "
            f"{rows}×{columns}"
        )
    finite = matrix[np.isfinite(matrix)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0, 1))
    norm = PowerNorm(gamma, low, high if high > low else low + 1, clip=True)
    ax.set_facecolor(MISSING)
    ax.imshow(
        np.ma.masked_invalid(matrix),
        cmap="Blues",
        norm=norm,
        aspect=aspect,
        interpolation="nearest",
    )
    if text:
        cell = 0.72 * 72 * _panel_width(ax) / columns  # points, roughly
        longest = max(len(t) for row in text for t in row)
        size = float(np.clip(cell / (0.7 * max(1, longest)), 5, TEXT_SIZE))
        for (i, j), value in np.ndenumerate(matrix):
            dark = np.isfinite(value) and norm(value) > 0.55
            color = "white" if dark else INK
            ax.text(
                j, i, text[i][j], size=size, color=color, ha="center", va="center", parse_math=False
            )
    for axis, labels in ((ax.xaxis, column_labels), (ax.yaxis, row_labels)):
        steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        step = next((n for n in steps if len(labels) <= n * (30 if text else 12)), 2000)
        ticks = range(0, len(labels), step)
        axis.set_ticks(list(ticks), [_short(str(labels[i])) for i in ticks], parse_math=False)
    ax.tick_params(length=0, labelsize=TEXT_SIZE, labelcolor=INK)
    longest = max(len(_short(str(name))) for name in column_labels)
    if longest * 0.62 * TEXT_SIZE * len(ax.get_xticks()) > 0.72 * 72 * _panel_width(ax):
        for tick in ax.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")
    ax.spines[:].set_visible(False)
    ax.grid(False)


def _colorbar(ax: Axes, label: str, percent: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    # A colour bar's own ticks go one beyond its ends, and are drawn there as if they were the end.
    low, high = ax.images[0].get_clim()
    ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
    style = {"ticks": ticks, "format": "{x:.0%}" if percent else None}
    bar = ax.figure.colorbar(ax.images[0], ax=ax, shrink=0.85, pad=0.02, **style)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL_SIZE, labelcolor=INK, length=0)
    bar.set_label(label, size=SMALL_SIZE + 0.5, color=INK)


def _grid(
    images: Sequence[np.ndarray], titles: Sequence[str], heading: str, columns: int, width: float
) -> Figure:
    """Images in rows, each under its title; measured in inches, on the axes of one panel, since
    axes for each take three times as long to draw.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images")
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
        place = (left, left + width, bottom, top)
        ax.imshow(image, interpolation="nearest", extent=place)
        style = {"size": size, "color": INK, "ha": "center", "va": "bottom", "parse_math": False}
        ax.text(left + width / 2, top - 0.05, text, **style)
    ax.set(xlim=(0, columns * cell), ylim=(rows * height, 0))
    _bare(ax)
    _heading(figure, heading)
    return figure


def _tile(tiles: np.ndarray, columns: int) -> np.ndarray:
    """(N, h, w, 3) -> one image, `columns` tiles a row, white between them."""
    count, height, width, _ = tiles.shape
    rows, gap = -(-count // columns), 1
    zoom = max(1, 12 // max(height, width))  # a gap of one pixel is thin beside 3x3 filters too
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = height * zoom, width * zoom
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) -> (height, width), larger, bilinear, pixel centres aligned."""
    from PIL import Image

    picture = Image.fromarray(image.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


# -----------------------------------------------------------------------------------------------
# Series
# -----------------------------------------------------------------------------------------------


def _column_mean(runs: np.ndarray) -> np.ndarray:
    """Mean over the runs that have a value; NaN where none has."""
    return np.ma.masked_invalid(runs).mean(axis=0).filled(np.nan)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` points around each, fewer at the ends. NaN stays and isn't counted."""
    known, after = np.isfinite(values), (width - 1) // 2
    total, count = (
        np.convolve(v, np.ones(width))[after : after + len(values)]
        for v in (np.where(known, values, 0), known)
    )
    return np.where(known, total / np.maximum(count, 1), np.nan)


# -----------------------------------------------------------------------------------------------
# Labels that keep clear of each other
# -----------------------------------------------------------------------------------------------


_LEADER = {
    "arrowstyle": "-",
    "lw": 0.8,
    "alpha": 0.6,
    "shrinkA": 1,
    "shrinkB": 3,
}  # from label to point


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each series' name beside its last point, outside the axes, in its colour."""
    from matplotlib.text import Text

    labels = []
    for name, x, y, color in ends:
        known = np.isfinite(x)
        label = ax.annotate(
            _short(name, 26),
            (x, y) if known else (1, 0.5),
            xycoords="data" if known else "axes fraction",
            xytext=(1.03, 0.5),
            textcoords="axes fraction",
            arrowprops={"relpos": (0, 0.5), **_LEADER, "color": color} if known else None,
            size=TEXT_SIZE if len(ends) <= 10 else SMALL_SIZE,
            color=color,
            va="center",
            annotation_clip=False,
            parse_math=False,
        )  # fmt: skip
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
        ax.add_artist(_before_drawing(place))


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
    strong: Sequence[bool],
    line: Sequence[tuple[str, float, float]],
) -> None:
    """Write each point's name where it covers no other name, no point and little of the line."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    size = TEXT_SIZE if len(points) <= 15 else SMALL_SIZE
    crowd = len(points) > CROWD and any(strong)
    named = [i for i in range(len(points)) if strong[i] or not crowd]
    labels = [
        ax.annotate(
            _short(points[i][0], 26),
            points[i][1:],
            xytext=(0, 0),
            textcoords="offset pixels",
            arrowprops={"color": "#999999", **_LEADER},
            size=size,
            color=INK if strong[i] or not any(strong) else "#666666",
            weight="bold" if strong[i] and not crowd else "normal",
            ha="center",
            va="center",
            parse_math=False,
        )
        for i in named
    ]
    for label in labels:
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        label.set_in_layout(False)  # it will move inside the axes, so the axes need not make room

    def place(renderer: Any) -> None:
        pixel = renderer.points_to_pixels(1)
        area = ax.get_window_extent(renderer)
        spots = ax.transData.transform([(x, y) for _, x, y in points])
        sizes = [Text.get_window_extent(label, renderer) for label in labels]  # without their lines
        sizes = np.array([(box.width + 4 * pixel, box.height + 1 * pixel) for box in sizes])
        obstacles = [_boxes(spots, 9 * pixel, 9 * pixel)]
        if len(line) > 1:
            path = ax.transData.transform([(x, y) for _, x, y in line])
            steps = [np.linspace(a, b, 40) for a, b in itertools.pairwise(path)]
            obstacles.append(_boxes(np.concatenate(steps), 3 * pixel, 3 * pixel))
        obstacles = np.concatenate(obstacles)
        step = 7 * pixel
        offsets = _clear_offsets(spots[named], sizes, obstacles, area.extents, step)
        for label, offset, (width, height) in zip(labels, offsets, sizes):
            label.xyann = tuple(offset)
            # A line to the point, where the name has moved away from it.
            gap = np.hypot(*np.maximum(np.abs(offset) - (width / 2, height / 2), 0))
            label.arrow_patch.set_visible(bool(gap >= 1.6 * step))

    if labels:
        ax.add_artist(_before_drawing(place))


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
        boxes = np.concatenate(
            [spots[i] + places - sizes[i] / 2, spots[i] + places + sizes[i] / 2], axis=1
        )
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


def _boxes(centres: np.ndarray, width: float, height: float) -> np.ndarray:
    """(N, 2) -> (N, 4), boxes of one size around points."""
    half = np.array([width, height]) / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def _before_drawing(action: Any) -> Any:
    """An invisible artist that calls `action(renderer)` when its axes are drawn, before the labels
    are: only then is it known how many pixels there are, however the figure was laid out.
    """
    from matplotlib.artist import Artist

    class Before(Artist):
        zorder = -1

        def draw(self, renderer: Any) -> None:
            action(renderer)

    artist = Before()
    artist.set_in_layout(False)
    return artist


def _plain_log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10, ...; over many decades, powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    few = max(values) / min(values) < 1000
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
