"""Charts as plain geometry; `charts.html` draws them as inline SVG, without script or library.

Lengths are in units of the drawing, which the page scales to the width that there is.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

WIDTH, HEIGHT = 440.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 8.0, 34.0
BAR, BAR_GAP, LABEL = 11.0, 3.0, 16.0  # heights in a chart of bars
# Can be told apart by colour-blind readers. Source: Okabe & Ito 2008, "Color Universal Design".
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c5c5c")

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values over iterations or steps.

    Attributes:
        name: for the legend.
        x, y: equally many; a y that is None or not finite leaves a gap.
        spread: (low, high) around each point, None where there is none; () = around none.
        dots: mark each point, with its spread as a whisker; else the spread is a band.
        notes: of each point, shown when the pointer rests on its dot; () = x and y.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[Interval | None] = ()
    dots: bool = False
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Share:
    """A rate in 0..1 with its interval and what to say of it."""

    rate: float
    interval: Interval
    note: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dot at (x, y), or a bar from x = `LEFT` to x; the whisker is (x1, y1, x2, y2) or None."""

    x: float
    y: float
    color: str
    note: str
    whisker: tuple[float, float, float, float] | None = None


@dataclasses.dataclass
class Chart:
    """What `charts.html` draws.

    Ticks are (place, text), bands (SVG path, colour), lines the same with the lengths of dashes.
    """

    title: str
    x_label: str = ""
    height: float = HEIGHT
    x_ticks: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    y_ticks: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    bands: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    lines: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    dots: list[Mark] = dataclasses.field(default_factory=list)
    bars: list[Mark] = dataclasses.field(default_factory=list)
    labels: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    legend: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    width: float = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bar: float = BAR

    @property
    def bottom(self) -> float:
        """Where the x axis lies."""
        return self.height - BOTTOM


def percent(value: float, digits: int = 3) -> str:
    """Return "37.5 %" of 0.375."""
    return f"{100 * value:.{digits}g} %"


def number(value: float, digits: int = 4) -> str:
    """Return a value with so many digits."""
    return f"{value:.{digits}g}"


def _apart(values: Sequence[float], show: Callable[[float, int], str]) -> list[str]:
    """Return the values as texts of as few digits as tell them apart."""
    digits, texts = 2, [""]
    while len(set(texts)) < len(values) and digits < 12:
        digits += 1
        texts = [show(value, digits) for value in values]
    return texts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between `low` and `high`, at steps of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Through text, so that 3 * 0.1 is 0.3.
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str = "iteration",
    shares: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """Return a chart of curves; None if there is no point to draw.

    Args:
        title: above it.
        curves: one colour each, in their order.
        x_label: below it.
        shares: values are in 0..1; the axis shows all of that, in per cent.
        from_zero: the axis begins at 0, or below.
    """
    points = [list(_points(curve)) for curve in curves]
    if not any(points):
        return None
    every = [point for own in points for point in own]
    heights = [value for _, y, spread, _ in every for value in (y, *(spread or ()))]
    low, high = (0.0, 1.0) if shares else _range(heights, from_zero)
    first, last = min(x for x, *_ in every), max(x for x, *_ in every)
    if first == last:
        first, last = first - 0.5, last + 0.5
    chart = Chart(title, x_label)

    def across(x: float) -> float:
        return round(chart.left + (x - first) / (last - first) * (chart.right - chart.left), 1)

    def down(y: float) -> float:
        return round(chart.bottom - (y - low) / (high - low) * (chart.bottom - chart.top), 1)

    show = percent if shares else number
    whole = [x for x in ticks(first, last) if x == int(x)]
    chart.x_ticks = [(across(x), f"{int(x)}") for x in whole]
    levels = ticks(low, high)
    texts = _apart(levels, show)
    chart.y_ticks = [(down(y), text) for y, text in zip(levels, texts, strict=True)]
    for index, (curve, own) in enumerate(zip(curves, points, strict=True)):
        color = COLORS[index % len(COLORS)]
        if not own:
            continue
        again = index // len(COLORS) % 2  # colours are used twice
        chart.legend.append((curve.name + " (dashed)" * again, color))
        for part in _unbroken(curve, own):
            path = _path([(across(x), down(y)) for x, y, _, _ in part])
            chart.lines.append((path, color, "6 3" if again else "none"))
            around = [(x, spread) for x, _, spread, _ in part if spread]
            if around and not curve.dots:
                upper = [(across(x), down(top)) for x, (_, top) in around]
                lower = [(across(x), down(end)) for x, (end, _) in reversed(around)]
                chart.bands.append((_path(upper + lower) + "Z", color))
        for x, y, spread, note in own if curve.dots or len(own) == 1 else ():
            here = across(x)
            whisker = (here, down(spread[0]), here, down(spread[1])) if spread else None
            text = note or f"{x_label} {number(x)}: {show(y)}"
            chart.dots.append(Mark(here, down(y), color, f"{curve.name}, {text}", whisker))
    return chart


def bars(title: str, rows: Mapping[str, Mapping[str, Share | None]]) -> Chart | None:
    """Return a chart of shares with intervals; None if there is no row.

    Args:
        title: above it.
        rows: {row: {name of a bar: share, None where it does not exist}}; all have the same names.
    """
    names = list(next(iter(rows.values()), {}))
    if not names:
        return None
    own = LABEL + len(names) * (BAR + BAR_GAP) + 2 * BAR_GAP
    chart = Chart(title, height=TOP + len(rows) * own + BOTTOM, left=RIGHT)
    length = chart.right - chart.left
    at = [round(chart.left + share * length, 1) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    chart.x_ticks = [(x, f"{25 * n} %") for n, x in enumerate(at)]
    chart.legend = [(name, COLORS[index % len(COLORS)]) for index, name in enumerate(names)]
    for row, (label, values) in enumerate(rows.items()):
        top = TOP + row * own
        chart.labels.append((top + LABEL - 5, label))
        for index, (name, color) in enumerate(chart.legend):
            y, share = top + LABEL + index * (BAR + BAR_GAP), values[name]
            if share is None:
                chart.bars.append(Mark(chart.left, y, color, f"{label}, {name}: none"))
                continue
            low, high = (round(chart.left + end * length, 1) for end in share.interval)
            middle = y + BAR / 2
            note = f"{label}, {name}: {share.note}"
            end = round(chart.left + share.rate * length, 1)
            chart.bars.append(Mark(end, y, color, note, (low, middle, high, middle)))
    return chart


Point = tuple[float, float, Interval | None, str]


def _points(curve: Curve) -> Iterator[Point]:
    """Yield (x, y, spread, note) of the points that exist."""
    for index, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
        if y is not None and math.isfinite(y):
            spread = curve.spread[index] if curve.spread else None
            yield x, y, spread, curve.notes[index] if curve.notes else ""


def _unbroken(curve: Curve, points: list[Point]) -> Iterator[list[Point]]:
    """Yield the runs of points without a gap between them."""
    there = {x for x, *_ in points}
    gaps = [x for x in curve.x if x not in there]
    part: list[Point] = []
    for point in points:
        if part and any(part[-1][0] < gap < point[0] for gap in gaps):
            yield part
            part = []
        part.append(point)
    yield part


def _range(values: Sequence[float], from_zero: bool) -> Interval:
    """Return the ends of an axis around `values`."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Return the SVG path through `points`."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
