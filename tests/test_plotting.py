"""Figures say what the data says, with labels that can be read, for awkward data too."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn import metrics

from common import plotting
from common.engine.records import EpochRecord, Evaluation

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# A glyph, a layout or a scale that matplotlib complains of, a mean of nothing in numpy.
pytestmark = pytest.mark.filterwarnings(
    "error::UserWarning", "error::RuntimeWarning", "ignore::DeprecationWarning"
)

ROOT = Path(__file__).parent.parent
MODELS = [
    (row["model"], float(row["gmacs"]), float(row["imagenet_top1"]) / 100)
    for row in csv.DictReader((ROOT / "tests/imagenet_models.csv").open(encoding="utf-8"))
]
NAN = math.nan


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


def make_history(epochs: int) -> list[EpochRecord]:
    return [
        EpochRecord(e, 0.1 / e, 2.0 / e, 1 - 0.8 / e, 2.2 / e, 1 - 0.9 / e, 3, 900)
        for e in range(1, epochs + 1)
    ]


def make_evaluation(classes: int, images: int, wrong: float = 0.2) -> Evaluation:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, classes, images)
    guesses = np.where(
        generator.random(images) < wrong, generator.integers(0, classes, images), targets
    )
    probabilities = np.full((images, classes), 0.1, dtype=np.float32)
    probabilities[np.arange(images), guesses] = 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Evaluation(0.5, float((guesses == targets).mean()), 1.0, targets, probabilities)


def draw(figure: Figure) -> Figure:
    """Lay the figure out and draw it, as `save` does, without the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text()]


def boxes(labels: list) -> list[Bbox]:
    from matplotlib.text import Text

    return [Text.get_window_extent(label) for label in labels]


def overlapping(labels: list, slack: float = 1.0) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than `slack` pixels both ways."""
    found = []
    for (a, box_a), (b, box_b) in combinations(zip(labels, boxes(labels)), 2):
        width = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        height = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        if width > slack and height > slack:
            found.append((a.get_text(), b.get_text()))
    return found


def test_importing_plotting_loads_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, common.plotting\n"
        "sys.exit(bool({'matplotlib', 'torch', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_saved_figures_are_whole_and_freed(tmp_path: Path) -> None:
    figure = plotting.curves({"a": [1, 2]}, "x", "y", "t")
    path = plotting.save(figure, str(tmp_path / "curves.png"))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    assert not figure.axes and [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_figures_need_no_display_and_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from common import plotting\n"
        "path = Path(sys.argv[1]) / 'new' / 'bars.png'\n"
        "plotting.save(plotting.bars({'a': 1.0}, 'y', 't'), path)\n"
        "assert path.read_bytes().startswith(b'\\x89PNG'), path\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bars.png"]


AWKWARD = {
    "one epoch": lambda: plotting.learning_curves(make_history(1)),
    "diverged": lambda: plotting.learning_curves(
        [EpochRecord(1, 0.1, NAN, 0.1, NAN, NAN, 1, 1)] * 2
    ),
    "two classes, hostile names": lambda: plotting.confusion_matrix(
        make_evaluation(2, 30), ["$x_1 <script>", "a long name with many words in it $"]
    ),
    "100 classes": lambda: plotting.confusion_matrix(
        make_evaluation(100, 900), [f"c{i}" for i in range(100)]
    ),
    "a class without images": lambda: plotting.confusion_matrix(
        Evaluation(0.1, 1.0, 1.0, np.array([0]), np.array([[0.9, 0.1]])), ["seen", "unseen"]
    ),
    "dead filters": lambda: plotting.filters(np.zeros((2, 3, 3, 3))),
    "gray filters, too many": lambda: plotting.filters(random(300, 1, 7, 7) - 0.5),
    "8x8 image, 1x1 maps": lambda: plotting.activations(
        random(8, 8, 3), {"a": random(3, 8, 8), "b": np.zeros((9, 1, 1))}
    ),
    "no stages": lambda: plotting.activations(random(8, 8, 3), {}),
    "1x1 heatmaps": lambda: plotting.grad_cam(
        random(3, 8, 8, 3), random(3, 1, 1), ["8 as 3, 97%"] * 3
    ),
    "no heatmaps": lambda: plotting.grad_cam(random(0, 8, 8, 3), random(0, 4, 4), []),
    "no images": lambda: plotting.image_grid(random(0, 8, 8, 3), [], "Most confidently wrong"),
    "one image, long title": lambda: plotting.image_grid(
        random(1, 32, 32, 3), ["long name " * 9], "Wrong"
    ),
    "no series": lambda: plotting.curves({}, "x", "y", "t"),
    "nothing to take the log of": lambda: plotting.curves(
        {"a": [0, -1, NAN]}, "x", "y", "t", log_y=True
    ),
    "gaps": lambda: plotting.curves(
        {"a": [1], "b": [1, NAN, math.inf, 2], "c": [NAN]}, "x", "y", "t"
    ),
    "no bars": lambda: plotting.bars({}, "y", "t"),
    "odd bars": lambda: plotting.bars({"a": -1.0, "b": NAN, "c": 0.0}, "y", "t"),
    "no points": lambda: plotting.scatter([("a", 0.0, NAN)], "x", "y", "t", log_x=True),
    "one cell": lambda: plotting.heatmap([[1.0]], ["a"], ["b"], "t"),
    "empty cells": lambda: plotting.heatmap(np.full((2, 3), NAN), "ab", "xyz", "t"),
    "large matrix": lambda: plotting.heatmap(
        random(30, 90), [f"row {i}" for i in range(30)], [f"column {i}" for i in range(90)], "t"
    ),
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_data_makes_a_figure_whose_titles_fit(make: Callable[[], Figure]) -> None:
    figure = draw(make())
    for ax in figure.axes:
        title = ax._left_title if ax._left_title.get_text() else ax.title
        (box,) = boxes([title])
        assert box.x0 >= figure.bbox.x0 - 1 and box.x1 <= figure.bbox.x1 + 1, title.get_text()
        assert box.y1 <= figure.bbox.y1 + 1, title.get_text()
    texts_drawn = [t for ax in figure.axes for t in ax.texts] + (
        [figure._suptitle] if figure._suptitle else []
    )
    assert figure.axes and (any(ax.has_data() for ax in figure.axes) or texts_drawn), (
        "an empty figure says so"
    )


def three_panels() -> Figure:
    figure, axes = plotting.panels(3, "Three panels side by side")
    for ax in axes:
        plotting.curves({"one": [1, 2], "two": [2, 1]}, "epoch", "loss", "Title", ax=ax)
    return figure


LARGE = {
    **AWKWARD,
    "three panels": three_panels,
    "learning curves": lambda: plotting.learning_curves(make_history(12)),
    "20 classes": lambda: plotting.confusion_matrix(
        make_evaluation(20, 900), [str(i) for i in range(20)]
    ),
    "seven stages": lambda: plotting.activations(
        random(8, 8, 3), {f"stage {i}": random(64, 4, 4) for i in range(7)}
    ),
    "20 bars": lambda: plotting.bars({f"bar {i}": i for i in range(20)}, "y", "t"),
    "all models": lambda: plotting.scatter(MODELS, "GMACs", "accuracy", "t", log_x=True),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_saved_text_is_at_least_a_sixtieth_of_the_screen(
    make: Callable[[], Figure], tmp_path: Path
) -> None:
    from matplotlib.text import Text

    figure = make()
    figure.clear = lambda: None
    plotting.save(figure, tmp_path / "figure.png")
    draw(figure)
    width, height = figure.get_size_inches()
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            assert text.get_size() >= 72 * max(height, width * 9 / 16) / 60 - 1e-6, text.get_text()
    for ax in figure.axes:
        assert not overlapping(ax.get_xticklabels()) or ax.get_xticklabels()[0].get_rotation()
        assert not overlapping(ax.get_yticklabels())


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; they act on linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS.keys())
def test_colours_are_told_apart_by_the_colour_blind(sight: list[list[float]]) -> None:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )

    def linear(color: str) -> np.ndarray:
        rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    def lab(rgb: np.ndarray) -> np.ndarray:
        t = to_xyz @ rgb.clip(0, 1) / (to_xyz @ np.ones(3))
        x, y, z = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    seen = [lab(np.asarray(sight) @ linear(color)) for color in plotting.PALETTE]
    for (i, a), (j, b) in combinations(enumerate(seen), 2):
        assert np.linalg.norm(a - b) >= 25, (plotting.PALETTE[i], plotting.PALETTE[j])
    for color in plotting.PALETTE:
        assert 1.05 / (to_xyz[1] @ linear(color) + 0.05) >= 3, f"{color} on white (WCAG 2.1)"


def test_learning_curves_plot_the_history_and_name_the_best_epoch() -> None:
    history = make_history(12)
    loss, accuracy, rate = draw(plotting.learning_curves(history)).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [
        [r.train_loss for r in history],
        [r.val_loss for r in history],
    ]
    assert list(rate.lines[0].get_ydata()) == [r.lr for r in history]
    assert list(accuracy.lines[0].get_xdata()) == list(range(1, 13))
    assert (
        accuracy.get_title(loc="left").replace("\n", " ")
        == "Accuracy: best on validation 92.5%, epoch 12"
    )
    assert texts(loss) == ["train", "validation"] and not overlapping(loss.texts)


def test_confusion_matrix_agrees_with_scikit_learn() -> None:
    evaluation = make_evaluation(10, 500)
    names = [f"class {i}" for i in range(10)]
    ax = draw(plotting.confusion_matrix(evaluation, names)).axes[0]
    counts = metrics.confusion_matrix(evaluation.targets, evaluation.predictions)
    assert [text.get_text() for text in ax.texts] == [f"{n}" if n else "" for n in counts.ravel()]
    shares = metrics.confusion_matrix(evaluation.targets, evaluation.predictions, normalize="true")
    np.testing.assert_allclose(ax.images[0].get_array(), shares)
    wrong = counts - np.diag(np.diag(counts))
    true, guess = np.unravel_index(wrong.argmax(), wrong.shape)
    title = ax.get_title(loc="left").replace("\n", " ")
    assert f"class {true} taken for class {guess} ({wrong.max()} of {counts[true].sum()})" in title
    with pytest.raises(ValueError, match="3 class names for probabilities of 10 classes"):
        plotting.confusion_matrix(evaluation, names[:3])


def test_confusion_matrix_of_many_classes_has_no_text_and_few_ticks() -> None:
    figure = plotting.confusion_matrix(
        make_evaluation(100, 900), [f"class {i}" for i in range(100)]
    )
    ax = draw(figure).axes[0]
    assert not texts(ax)
    assert list(ax.get_xticks()) == list(range(0, 100, 10))
    assert not overlapping(ax.get_yticklabels())


def test_filters_are_scaled_each_by_itself_with_zero_in_the_middle() -> None:
    weights = np.zeros((2, 3, 1, 1))
    weights[0, :, 0, 0] = [4.0, 0.0, -4.0]
    weights[1, :, 0, 0] = [0.001, 0.0005, 0.0]
    (image,) = draw(plotting.filters(weights)).axes[0].images
    pixels = np.asarray(image.get_array())
    np.testing.assert_allclose(pixels[0, 0], [1, 0.5, 0])
    np.testing.assert_allclose(pixels[0, -1], [1, 0.75, 0.5])


def test_activations_show_the_channels_of_highest_mean() -> None:
    maps = np.zeros((5, 2, 2)) + np.array([3, 1, 5, 2, 4])[:, None, None]
    ax = draw(plotting.activations(random(8, 8, 3), {"stage 1": maps}, most=3)).axes[1]
    assert texts(ax) == ["2", "4", "0"]
    assert ax.get_title(loc="left") == "stage 1: 5 channels of 2×2"


def test_heatmaps_are_enlarged_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    for shape, size in (((3, 5), (32, 20)), ((1, 1), (4, 4)), ((7, 7), (224, 224))):
        heat = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.interpolate(heat[None, None], size, mode="bilinear")[0, 0]
        np.testing.assert_allclose(plotting._resize(heat.numpy(), *size), expected, atol=1e-6)


def test_images_and_titles_must_agree() -> None:
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        plotting.image_grid(random(2, 8, 8, 3), ["one"], "Wrong")
    with pytest.raises(ValueError, match="1 row and 3 column labels"):
        plotting.heatmap(random(2, 3), ["a"], "xyz", "t")


def test_image_grid_titles_do_not_run_into_each_other() -> None:
    titles = [f"automobile number {i} as airplane, 97%" for i in range(12)]
    figure = draw(plotting.image_grid(random(12, 8, 8, 3), titles, "Most confidently wrong"))
    (ax,) = figure.axes
    assert [label.get_text().replace("\n", " ") for label in ax.texts] == titles
    assert not overlapping([*ax.texts, figure._suptitle])


def test_several_runs_are_drawn_as_their_mean_in_a_band_of_their_range() -> None:
    runs = [[1.0, 2.0, 6.0], [3.0, NAN, 0.0]]
    ax = draw(plotting.curves({"a": runs}, "x", "y", "t")).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2, 2, 3])
    heights = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices.tolist()}
    assert {(1.0, 1.0), (1.0, 3.0), (2.0, 2.0), (3.0, 0.0), (3.0, 6.0)} <= heights


def test_runs_that_stopped_early_are_drawn_as_far_as_they_go() -> None:
    ax = draw(plotting.curves({"a": [[4.0, 2.0], [2.0, 0.0, 6.0]]}, "x", "y", "t")).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [3, 1, 6])


@pytest.mark.parametrize("count", [2, 6, 12])
def test_names_at_the_ends_of_curves_that_meet_do_not_overlap(count: int) -> None:
    series = {f"series number {i}": np.linspace(i, 1 + 0.001 * i, 20) for i in range(count)}
    figure, axes = plotting.panels(2, "Two panels")
    for ax in axes:
        plotting.curves(series, "epoch", "loss", "They all end at one", ax=ax)
    draw(figure)
    for ax in axes:
        assert len(ax.texts) == count and not overlapping(ax.texts)
        ends = [label.get_window_extent() for label in ax.texts]
        heights = [(end.y0 + end.y1) / 2 for end in ends]
        assert heights == sorted(heights), "the order of the names is that of the ends"
    assert not overlapping([*axes[0].texts, axes[1].yaxis.label, *axes[1].get_yticklabels()])


def test_spread_keeps_the_gap_and_moves_as_little_as_can_be() -> None:
    np.testing.assert_allclose(plotting._spread([50, 10, 90], 10, 0, 100), [50, 10, 90])
    np.testing.assert_allclose(plotting._spread([50, 50], 10, 0, 100), [45, 55])
    np.testing.assert_allclose(plotting._spread([99, 98], 10, 0, 100), [100, 90])
    np.testing.assert_allclose(plotting._spread([0, 0, 0], 80, 0, 100), [0, 50, 100])
    generator = np.random.default_rng(0)
    for _ in range(20):
        wanted = np.sort(generator.uniform(20, 80, 4))
        placed = plotting._spread(wanted, 8, 0, 100)
        assert np.diff(placed).min() >= 8 - 1e-9
        cost = ((placed - wanted) ** 2).sum()
        for rival in placed + generator.normal(0, 1, (400, 4)):
            if np.diff(rival).min() >= 8:
                assert ((rival - wanted) ** 2).sum() >= cost


@pytest.mark.parametrize("lying", [False, True])
def test_bars_write_their_values(lying: bool) -> None:
    suffix = ", a name too long to stand beside another" if lying else ""
    values = {f"a{suffix}": 0.5, f"b{suffix}": 0.25}
    ax = draw(plotting.bars(values, "accuracy", "t", percent=True)).axes[0]
    assert texts(ax) == ["50.0%", "25.0%"]
    patches = [bar.get_width() if lying else bar.get_height() for bar in ax.patches]
    assert patches == [0.5, 0.25]
    assert not overlapping([*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()])


@pytest.mark.parametrize("case", ["all models", "with front", "identical points", "small panel"])
def test_scatter_labels_cover_neither_each_other_nor_a_point_and_stay_inside(case: str) -> None:
    points, front, ax = MODELS, None, None
    if case == "with front":
        front = [n for n, x, y in MODELS if not any(u <= x and v > y for _, u, v in MODELS)]
    elif case == "identical points":
        points = [(f"model {i}", 1.0, 0.5) for i in range(6)] + [("far away", 3.0, 0.9)]
    elif case == "small panel":
        points, ax = MODELS[:12], plotting.panels(2)[1][1]
    figure = plotting.scatter(
        points, "GMACs", "accuracy", "t", log_x=True, percent=True, front=front, ax=ax
    )
    ax = draw(figure).axes[-1]
    crowd = front is not None and len(points) > plotting.CROWD  # then only the front has names
    named = [name for name, *_ in points if not crowd or name in front]
    assert [label.get_text() for label in ax.texts] == named
    assert not overlapping(ax.texts)
    spots = ax.transData.transform([(x, y) for _, x, y in points])
    for label, box in zip(ax.texts, boxes(ax.texts)):
        assert not any(box.contains(*spot) for spot in spots), label.get_text()
        assert ax.bbox.padded(1).contains(*box.min) and ax.bbox.padded(1).contains(*box.max), (
            label.get_text()
        )


def test_scatter_says_what_it_cannot_show() -> None:
    ax = plotting.scatter(
        [("a", 1, 1), ("b", 0, 1), ("c", 2, NAN)], "x", "y", "t", log_x=True
    ).axes[0]
    assert ax.get_title(loc="left") == "t (not shown: b, c)"


def test_heatmap_writes_numbers_that_stand_out_from_their_cells() -> None:
    from matplotlib.colors import to_rgb

    matrix = np.array([[0.0, 0.5, 1.0], [0.2, NAN, 0.9]])
    ax = draw(plotting.heatmap(matrix, "ab", "xyz", "t", percent=True)).axes[0]
    assert texts(ax) == ["0%", "50%", "100%", "20%", "–", "90%"]
    image = ax.images[0]

    def luminance(color: np.ndarray) -> float:  # WCAG 2.1
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for text, value in zip(ax.texts, matrix.ravel()):
        cell = np.array(
            to_rgb(plotting.MISSING) if np.isnan(value) else image.cmap(image.norm(value))[:3]
        )
        dark, light = sorted((luminance(cell), luminance(np.array(to_rgb(text.get_color())))))
        assert (light + 0.05) / (dark + 0.05) >= 4, (value, text.get_color())


def test_readers_stand_in_columns_over_the_sources_that_they_can_read() -> None:
    figure = draw(plotting.readers([[[1.0], [0.5, 1.5]], [[1.0], [1.2, 0.8]]]))
    first, second = figure.axes[:2]
    assert texts(first) == ["100", "50", "–", "150"]
    assert texts(second) == ["100", "120", "–", "80"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "T"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["1", "C"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (50, 150)


def test_panels_share_one_figure_and_long_titles_stay_in_their_own() -> None:
    figure, axes = plotting.panels(3, "What happened")
    title = "a title of many words that would run into the panel beside it if nobody broke it"
    plotting.curves({"a": [1, 2]}, "x", "y", title, ax=axes[0])
    plotting.bars({"a": 1.0}, "y", title, ax=axes[1])
    plotting.heatmap(random(3, 3), ["a row with a name"] * 3, "xyz", title, ax=axes[2])
    draw(figure)
    assert all(ax.figure is figure for ax in axes)
    assert not overlapping([*(ax._left_title for ax in axes), figure._suptitle])


def test_a_colour_bar_says_nothing_beyond_its_ends() -> None:
    """matplotlib's own ticks of 2.3 to 12.7 go to 14, drawn where 12.7 is."""
    figure = plotting.heatmap(np.array([[2.3, 12.7]]), ["a"], ["b", "c"], "title")
    bar = figure.axes[1]
    assert len(bar.get_yticks()) >= 4
    assert all(2.3 <= tick <= 12.7 for tick in bar.get_yticks())
