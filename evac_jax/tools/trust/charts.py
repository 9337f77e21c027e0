"""The trust report's picture: bars with intervals, curves over time, film strips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType
from PIL import Image

from evac_jax.files.atomic import replacing
from evac_jax.tools.trust.replay import FALSE, MISSED, NOTHING, RIGHT, Film
from evac_jax.tools.world_model.filmstrip import compare

STYLE: dict[RcKeyType, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "font.size": 8,
    "legend.frameon": False,
    "savefig.dpi": 120,
}
PANEL = (4.2, 2.4)  # inches
STRIP_SCALE = 64  # pixels; the shorter side of a frame is enlarged to at least this
FILMS_PER_VERDICT = 2
TITLES = {
    RIGHT: "right: success in both",
    NOTHING: "right: success in neither",
    FALSE: "false: success in imagination only",
    MISSED: "missed: success in truth only",
}


def bars(axes: Axes, title: str, kinds: Mapping[str, Mapping], names: Mapping[str, str]) -> None:
    """Draw grouped bars with intervals: the shares `names` {figure: label} of every kind, in %.

    A share with n = 0, such as false successes without imagined successes, is shown as "none".
    """
    width = 0.8 / len(names)
    for number, (figure, shown) in enumerate(names.items()):
        shares = [figures[figure] for figures in kinds.values()]
        x = np.arange(len(kinds)) + (number - (len(names) - 1) / 2) * width
        rates = np.array([100 * (share["rate"] or 0.0) for share in shares])
        ends = 100 * np.array([share["interval_95"] or (0.0, 0.0) for share in shares])
        known = [share["rate"] is not None for share in shares]
        away = np.abs(ends - rates[:, None]).T * known
        axes.bar(x, rates, 0.9 * width, yerr=away, capsize=2, error_kw={"lw": 0.8}, label=shown)
        for place in np.flatnonzero(~np.array(known)):
            axes.text(x[place], 1, "none", ha="center", va="bottom", rotation=90)
    axes.set(title=title, ylim=(0, 118), yticks=range(0, 101, 20), xticks=range(len(kinds)))
    axes.set_xticklabels([kind.replace(":", ":\n") for kind in kinds])
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=len(names), fontsize=7, loc="upper left")


def lines(
    axes: Axes, title: str, curves: Mapping[str, Sequence], chunk: int, *, from_zero: bool = True
) -> None:
    """Draw curves over the steps 1, 2 .. of an episode; a None leaves a gap.

    The ticks are the ends of the chunks.
    """
    steps = max(map(len, curves.values()))
    for name, values in curves.items():
        heights = np.array([np.nan if value is None else value for value in values], float)
        axes.plot(np.arange(1, len(values) + 1), heights, label=name)
    axes.set(title=title, xlabel="step", xticks=range(0, steps + 1, chunk))
    if from_zero:
        axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend()


def charts(report: Mapping, path: Path) -> None:
    """Write the panels of a report (see `__main__`) as a PNG file."""
    everyone = report["kinds"] | {"all": report["overall"]}
    drift, chunk = report["drift"], report["settings"]["chunk"]
    objects = "block_px" in drift
    with mpl.rc_context(STYLE):
        rows = 3 if objects else 2
        figure = Figure((2 * PANEL[0], rows * PANEL[1]), layout="constrained")
        panels = figure.subplots(rows, 2).flat
        success = {"imagined_success": "imagined", "real_success": "real"}
        bars(next(panels), "Success, %", everyone, success)
        verdicts = {"agreement": "agree", "false_success": "false", "missed_success": "missed"}
        bars(next(panels), "Verdicts, %", everyone, verdicts)
        lines(next(panels), "PSNR, dB", {"": drift["psnr"]}, chunk, from_zero=False)
        lines(next(panels), "End effector off by, mm", {"": drift["end_effector_mm"]}, chunk)
        if objects:
            seen = {"blocks": drift["block_px"], "gripper": drift["gripper_px"]}
            lines(next(panels), "Seen off by, pixels", seen, chunk)
            lines(next(panels), "Blocks lost, share", {"": drift["blocks_lost"]}, chunk)
        figure.savefig(path, format="png")


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


def draw_films(films: Sequence[Film], path: Path) -> None:
    """Write the film strips one below another as a PNG file."""
    pages = strips(films)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        inches = [page.height / page.width * 2 * PANEL[0] + 0.25 for _, page in pages]
        figure = Figure((2 * PANEL[0], sum(inches)), layout="constrained")
        rows = figure.subplots(len(pages), 1, height_ratios=inches, squeeze=False)[:, 0]
        for axes, (title, page) in zip(rows, pages, strict=True):
            axes.imshow(page, interpolation="nearest")
            axes.set_title(title, loc="left")
            axes.axis("off")
        figure.savefig(path, format="png")


def draw(folder: Path, report: Mapping, films: Sequence[Film]) -> list[Path]:
    """Write report.png, and films.png if there are films; return their paths."""
    paths = [folder / "report.png"]
    with replacing(paths[0]) as temporary:
        charts(report, temporary)
    if films:
        paths.append(folder / "films.png")
        with replacing(paths[1]) as temporary:
            draw_films(films, temporary)
    return paths
