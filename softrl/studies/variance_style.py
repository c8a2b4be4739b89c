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
_SHADES = 4  # of each colour towards white, in a PNG's palette
# Offsets of a label's lower edge from its point, in points.
_AWAY = ((6, 2), (6, -11), (-6, 2), (-6, -11), (0, 7), (0, -16), (12, 9), (12, -18), (-12, 9), (-12, -18))

Box = tuple[float, float, float, float]  # left, bottom, right, top


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


def png(figure: Any, dpi: int = 80) -> bytes:
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
    pixels = axis.transData.transform(points)
    taken = [(x - 5.0, y - 5.0, x + 5.0, y + 5.0) for x, y in pixels]
    frame = axis.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    for at, pixel, text in zip(points, pixels, texts, strict=True):
        measured = _label(axis, text, at, (6.0, 4.0), size, False)
        extent = measured.get_window_extent(figure.canvas.get_renderer())
        measured.remove()
        away, box = _free_place(pixel, (extent.width, extent.height), taken, inside, figure.dpi / 72.0)
        taken.append(box)
        _label(axis, text, at, away, size, max(map(abs, away)) > 15.0)


def _free_place(
    point: Sequence[float], extent: tuple[float, float], taken: list[Box], inside: Box, pixels: float
) -> tuple[tuple[float, float], Box]:
    """Where a label of that extent overlaps least: its offset in points, and its box in pixels."""
    best: tuple[float, tuple[float, float], Box] | None = None
    for reach in (1.0, 1.7, 2.6, 3.8, 5.2, 7.0, 9.0):
        for dx, dy in _AWAY:
            away = (dx * reach, dy * reach)
            left = point[0] + away[0] * pixels - extent[0] * (0.0 if dx > 0 else 1.0 if dx < 0 else 0.5)
            bottom = point[1] + away[1] * pixels
            box = (left, bottom, left + extent[0], bottom + extent[1])
            cost = 10.0 * _outside(box, inside) + sum(_overlap(box, other) for other in taken)
            if best is None or cost < best[0]:
                best = (cost, away, box)
            if cost == 0.0:
                return away, box
    assert best is not None
    return best[1:]


def _label(axis: Any, text: str, at: tuple[float, float], away: tuple[float, float], size: float, leader: bool) -> Any:
    from matplotlib.patheffects import withStroke

    line = {"arrowstyle": "-", "color": "0.65", "linewidth": 0.6, "shrinkA": 0.0, "shrinkB": 2.0}
    return axis.annotate(
        text, at, away, textcoords="offset points", fontsize=size, color="0.1", va="bottom",
        path_effects=[withStroke(linewidth=2.0, foreground="white")],
        ha="left" if away[0] > 0 else "right" if away[0] < 0 else "center", annotation_clip=False,
        arrowprops=line if leader else None, zorder=5,
    )  # fmt: skip


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Box, frame: Box) -> float:
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
