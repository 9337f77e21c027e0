"""The trust report's picture: bars with intervals, curves over time, film strips. Pillow only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evac_jax.telemetry.files import replacing
from evac_jax.tools.filmstrip import compare
from evac_jax.tools.trust_replay import FALSE, MISSED, NOTHING, RIGHT, Film

PANEL = (500, 280)  # pixels
MARGIN = (52, 12, 30, 40)  # left, right, top, bottom of a panel's axes
FINER = 2  # drawn this much larger, then averaged: smooth lines without a plotting library
WHITE, INK, GREY, PALE = (255, 255, 255), (30, 30, 34), (120, 120, 126), (224, 224, 228)
COLORS = ((38, 98, 178), (222, 132, 38), (56, 148, 84), (178, 52, 64), (118, 88, 168))
STRIP_SCALE = 64  # pixels that a frame's shorter side is enlarged to at least
FILMS_PER_VERDICT = 2
TITLES = {
    RIGHT: "right: success in both",
    NOTHING: "right: success in neither",
    FALSE: "false: success in imagination only",
    MISSED: "missed: success in truth only",
}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most`, 1, 2 or 5 x 10^n apart."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / most))
    while span / step > most - 1:
        # 1 -> 2 -> 5 -> 10
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Panel:
    """One small chart.

    Attributes:
        title: says what is shown and in which unit.
        x: range of the horizontal axis.
        y: range of the vertical axis.
        x_label: below the axis; "" for none.
    """

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    image: Image.Image = field(init=False)

    def __post_init__(self):
        self.image = Image.new("RGB", (PANEL[0] * FINER, PANEL[1] * FINER), WHITE)
        self._draw = ImageDraw.Draw(self.image)
        left, right, top, bottom = (FINER * m for m in MARGIN)
        self._box = (left, top, self.image.width - right, self.image.height - bottom)
        self._text((left, top // 2), self.title, "lm", 15, INK)
        for value in ticks(*self.y):
            at = self._at(self.x[0], value)[1]
            self._draw.line((self._box[0], at, self._box[2], at), PALE, FINER)
            self._text((left - 5 * FINER, at), f"{value:g}", "rm")
        if self.x_label:
            for value in ticks(*self.x):
                self._text((self._at(value, 0)[0], self._box[3] + 7 * FINER), f"{value:g}", "mt")
            middle = (self._box[0] + self._box[2]) / 2
            self._text((middle, self.image.height - 4 * FINER), self.x_label, "mb")

    def _at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        y = min(max(y, self.y[0]), self.y[1])
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def _text(self, at, text: str, anchor: str, size: int = 12, color=GREY) -> None:
        font = ImageFont.load_default(size * FINER)
        self._draw.text(at, text, font=font, fill=color, anchor=anchor)

    def line(self, values: Sequence[float | None], color) -> None:
        """Draw values at x = 1, 2, ..; a None leaves a gap."""
        before = None
        for x, value in enumerate(values, start=1):
            here = None if value is None else self._at(x, value)
            if before and here:
                self._draw.line((*before, *here), color, 2 * FINER)
            before = here

    def bar(self, x: float, width: float, share: Mapping, color) -> None:
        """Draw a share with its interval (see `trust_scores.share`), in per cent, at `x`."""
        if share["rate"] is None:
            self._text(self._at(x, self.y[0]), "none", "mb", 10)
            return
        low, high = (100 * end for end in share["interval_95"])
        left, top = self._at(x - width / 2, 100 * share["rate"])
        right, bottom = self._at(x + width / 2, self.y[0])
        self._draw.rectangle((left, top, right, bottom), color)
        for value in (low, high):
            self._draw.line(
                (*self._at(x - width / 5, value), *self._at(x + width / 5, value)), INK, FINER
            )
        self._draw.line((*self._at(x, low), *self._at(x, high)), INK, FINER)

    def name(self, x: float, text: str) -> None:
        """Write a bar's name below the axis."""
        self._text((self._at(x, self.y[0])[0], self._box[3] + 4 * FINER), text, "mt", 11)

    def level(self, y: float, color) -> None:
        """Draw a thin line across, for a value to compare with."""
        ends = (*self._at(self.x[0], y), *self._at(self.x[1], y))
        self._draw.line(ends, color, FINER)

    def upright(self, x: float, color) -> None:
        """Draw a thin line upwards."""
        ends = (*self._at(x, self.y[0]), *self._at(x, self.y[1]))
        self._draw.line(ends, color, FINER)

    def legend(self, names: Sequence[str], colors: Sequence[tuple]) -> None:
        """Write names with a square of their colour, from the right, above the axes."""
        x, y = self._box[2], self._box[1] - 7 * FINER
        for name, color in reversed(list(zip(names, colors, strict=True))):
            self._text((x, y), name, "rm", 11)
            x -= ImageFont.load_default(11 * FINER).getlength(name) + 5 * FINER
            self._draw.rectangle((x - 9 * FINER, y - 5 * FINER, x, y + 5 * FINER), color)
            x -= 18 * FINER

    def finished(self) -> Image.Image:
        """Return the chart at its size."""
        return self.image.resize(PANEL, Image.LANCZOS)


def bars(title: str, kinds: Mapping[str, Mapping], names: Mapping[str, str], level=()) -> Panel:
    """Return grouped bars: for every kind its shares `names` {figure: shown as}, per cent.

    Args:
        title: of the chart.
        kinds: {kind: figures}.
        names: which figures.
        level: values to draw a line at, one per figure at most.
    """
    panel = Panel(title, (0, len(kinds)), (0, 100))
    for value, color in zip(level, COLORS, strict=False):
        panel.level(value, color)
    width = 0.8 / len(names)
    for place, (kind, figures) in enumerate(kinds.items()):
        for number, figure in enumerate(names):
            x = place + 0.1 + (number + 0.5) * width
            panel.bar(x, 0.9 * width, figures[figure], COLORS[number])
        panel.name(place + 0.5, kind)
    panel.legend(list(names.values()), COLORS[: len(names)])
    return panel


def lines(
    title: str, curves: Mapping[str, Sequence], chunk: int, *, from_zero: bool = True, factor=1.0
) -> Panel:
    """Return curves over the steps of an episode, with a mark at the end of every chunk."""
    curves = {
        name: [None if value is None else factor * value for value in values]
        for name, values in curves.items()
    }
    known = [value for values in curves.values() for value in values if value is not None] or [0]
    low = 0.0 if from_zero else math.floor(min(known))
    steps = max(map(len, curves.values()))
    panel = Panel(title, (0, steps), (low, max(known) * 1.05 or 1.0), "step")
    for step in range(chunk, steps + 1, chunk):
        panel.upright(step, PALE)
    for values, color in zip(curves.values(), COLORS, strict=False):
        panel.line(values, color)
    if len(curves) > 1:
        panel.legend(list(curves), COLORS[: len(curves)])
    return panel


def charts(report: Mapping) -> list[Image.Image]:
    """Return the panels of a report (see `validate_world_model`)."""
    everyone = report["kinds"] | {"all": report["overall"]}
    drift, chunk = report["drift"], report["settings"]["chunk"]
    panels = [
        bars(
            "Success, %",
            everyone,
            {"imagined_success": "imagined", "real_success": "real"},
        ),
        bars(
            "Verdicts, %",
            everyone,
            {"agreement": "agree", "false_success": "false", "missed_success": "missed"},
        ),
        lines("PSNR, dB", {"": drift["psnr"]}, chunk, from_zero=False),
        lines("End effector off by, mm", {"": drift["end_effector_mm"]}, chunk),
    ]
    if "block_px" in drift:
        found = {"blocks": drift["block_px"], "gripper": drift["gripper_px"]}
        panels += [
            lines("Seen off by, pixels", found, chunk),
            lines("Blocks lost, %", {"": drift["blocks_lost"]}, chunk, factor=100),
        ]
    return [panel.finished() for panel in panels]


def strips(films: Sequence[Film]) -> list[tuple[str, Image.Image]]:
    """Return film strips with their captions, imagined above, real below, verdict by verdict."""
    chosen = []
    for verdict in (RIGHT, FALSE, MISSED):
        found = [film for film in films if film.verdict == verdict]
        if verdict == RIGHT and not found:
            found = [film for film in films if film.verdict == NOTHING]
        chosen += found[:FILMS_PER_VERDICT]
    pages = []
    for film in chosen:
        scale = max(1, round(STRIP_SCALE / min(film.real.shape[2:4])))
        page = compare(film.real[None], film.imagined[None, 1:], len(film.real), scale)
        pages.append((f"{TITLES[film.verdict]}   ({film.source})", page))
    return pages


def draw(path: Path, report: Mapping, films: Sequence[Film]) -> None:
    """Write the picture of a report: the charts two by two, then the film strips."""
    panels, pages = charts(report), strips(films)
    gap, caption = 10, 22
    film_height = sum(caption + page.height + gap for _, page in pages)
    rows = -(-len(panels) // 2)
    width = max([2 * PANEL[0] + gap, *(page.width + 2 * gap for _, page in pages)])
    heading = 28 if pages else 0
    height = rows * (PANEL[1] + gap) + heading + film_height + gap
    canvas = Image.new("RGB", (width, height), WHITE)
    for index, panel in enumerate(panels):
        canvas.paste(panel, ((index % 2) * (PANEL[0] + gap), (index // 2) * (PANEL[1] + gap)))
    draw_on, top = ImageDraw.Draw(canvas), rows * (PANEL[1] + gap)
    if pages:
        text = "Episodes: imagined above, what really happened below"
        draw_on.text((gap, top + 4), text, font=ImageFont.load_default(15), fill=INK)
    top += heading
    for title, page in pages:
        draw_on.text((gap, top + 2), title, font=ImageFont.load_default(13), fill=GREY)
        canvas.paste(page, (gap, top + caption))
        top += caption + page.height + gap
    with replacing(path) as temporary:
        canvas.save(temporary)
