"""How figures of the variance laboratory look: an estimator's colour and marker, labels kept apart, small PNGs."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours without yellow, too light on white, and a brown and a grey that stay apart from them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F5539", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
LINES = ("-", "--", ":")
_SHADES = 12  # of each colour towards white, in a PNG's palette
_AWAY = ((6, 4), (6, -9), (-6, 4), (-6, -9), (0, 9), (0, -15), (12, 12), (12, -17), (-12, 12), (-12, -17))


@dataclass(frozen=True)
class Style:
    """One estimator's in every figure of a report."""

    colour: str
    marker: str
    line: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """By label, in order of appearance: neighbours differ in colour and marker, and 99 labels differ in either."""
    return {
        label: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


def pyplot() -> Any:
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any, dpi: int = 110) -> bytes:
    """The figure as a PNG with a palette of our colours and their shades, a third of the size of one without.

    The figure is closed.
    """
    from PIL import Image

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=dpi)
    pyplot().close(figure)
    inks = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS]
    shades = [255 - (255 - part) * k // _SHADES for ink in inks for k in range(_SHADES + 1) for part in ink]
    greys = [level for level in range(255, -1, -15) for _ in range(3)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(shades + greys)
    picture = Image.open(whole).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    return small.getvalue()


def place_labels(axis: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], size: float = 7.5) -> None:
    """Write texts beside points: each in the first free place round its point, further out if there is none near.

    Call it when the axis has its limits; points are in data coordinates.
    """
    figure = axis.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # what is laid out stays there, whatever the labels measure
    pixels = axis.transData.transform(points)
    dots = [(x - 5.0, y - 5.0, x + 5.0, y + 5.0) for x, y in pixels]
    taken: list[tuple[float, float, float, float]] = []
    frame = axis.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    for (x, y), text in zip(points, texts, strict=True):
        best = None
        for reach in (1.0, 1.7, 2.6, 3.8, 5.2, 7.0, 9.0):
            for dx, dy in _AWAY:
                label = _label(axis, text, (x, y), (dx * reach, dy * reach), size, reach > 1.0)
                box = _box(label, figure)
                cost = _outside(box, inside) * 10.0 + sum(_overlap(box, other) for other in (*taken, *dots))
                if best is None or cost < best[0]:
                    best = (cost, (dx * reach, dy * reach), reach, box)
                label.remove()
                if cost == 0.0:
                    break
            if best is not None and best[0] == 0.0:
                break
        assert best is not None
        taken.append(best[3])
        _label(axis, text, (x, y), best[1], size, best[2] > 1.0)


def _label(axis: Any, text: str, at: tuple[float, float], away: tuple[float, float], size: float, leader: bool) -> Any:
    line = {"arrowstyle": "-", "color": "0.65", "linewidth": 0.6, "shrinkA": 0.0, "shrinkB": 2.0}
    from matplotlib.patheffects import withStroke

    return axis.annotate(
        text, at, away, textcoords="offset points", fontsize=size, color="0.1",
        path_effects=[withStroke(linewidth=2.0, foreground="white")],
        ha="left" if away[0] > 0 else "right" if away[0] < 0 else "center", annotation_clip=False,
        arrowprops=line if leader else None, zorder=5,
    )  # fmt: skip


def _box(label: Any, figure: Any) -> tuple[float, float, float, float]:
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    label.update_positions(renderer)
    extent = Text.get_window_extent(label, renderer)  # the text alone, without the leader
    return extent.x0, extent.y0, extent.x1, extent.y1


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: tuple[float, ...], frame: tuple[float, ...]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)


def plain_log_ticks(axis: Any, values: Sequence[float]) -> None:
    """A log scale with plain numbers where values span more than a factor of four, else a linear one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [value for value in values if value > 0.0]
    if not known or max(known) / min(known) < 4.0:
        return
    axis.set_yscale("log")
    decades = math.log10(max(known) / min(known))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
