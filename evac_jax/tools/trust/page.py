"""The trust report in words, charts and film strips: what its figures mean for training in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from evac_jax.telemetry.pages import page
from evac_jax.telemetry.pages.charts import Chart, Curve, Share, bars, lines
from evac_jax.tools.trust.replay import FALSE, MISSED, NOTHING, RIGHT, Film
from evac_jax.tools.world_model.filmstrip import compare

# Limits for a world model that is good enough for training; also used for the miniature's own.
LEAST_AGREEMENT, MOST_FALSE = 0.85, 0.15
STRIP_SCALE = 64  # pixels; the shorter side of a frame is enlarged to at least this
FILMS_PER_VERDICT = 2
TITLES = {
    RIGHT: "right: success in both",
    NOTHING: "right: success in neither",
    FALSE: "false: success in imagination only",
    MISSED: "missed: success in truth only",
}
SHARES = {
    "imagined_success": "imagined success",
    "real_success": "real success",
    "agreement": "agreement",
    "false_success": "false, of imagined",
    "missed_success": "missed, of real",
}
SUCCESS = {"imagined_success": "imagined", "real_success": "real"}
VERDICTS = {
    "agreement": "agree",
    "false_success": "false, of imagined",
    "missed_success": "missed, of real",
}


def percent(share: Mapping) -> str:
    """Return a share (see `scores.share`) with its interval, in per cent."""
    if share["rate"] is None:
        return "none"
    low, high = (100 * end for end in share["interval_95"])
    return f"{100 * share['rate']:.0f} % [{low:.0f}, {high:.0f}]"


def judge(overall: Mapping) -> tuple[str, str]:
    """Return ("good", "unsure" or "bad") and the sentence that says so.

    "good" if both intervals are on the right side of `LEAST_AGREEMENT` and `MOST_FALSE`; "bad" if
    one of the estimates is on the wrong side.
    """
    agreement, false = overall["agreement"], overall["false_success"]
    bar = f"at least {LEAST_AGREEMENT:.0%} agreement, at most {MOST_FALSE:.0%} false successes"
    if false["rate"] is None:
        return "bad", (
            "Nothing succeeded in imagination, so there is no reward to learn from. Look at the "
            "threshold and at the film strips."
        )
    if agreement["rate"] < LEAST_AGREEMENT or false["rate"] > MOST_FALSE:
        return "bad", (
            f"Not fit to be believed alone (asked for: {bar}). A policy can gain here by what "
            "only looks right: measure every gain in the ground truth, and improve the simulator "
            "first, with recordings of the policy that fails it, hard negatives for the classifier "
            "or a higher threshold."
        )
    if agreement["interval_95"][0] < LEAST_AGREEMENT or false["interval_95"][1] > MOST_FALSE:
        return "unsure", (
            f"Fit to learn in by the estimates ({bar}), but these episodes are too few, or the "
            "simulator too close to the bar, to be sure of it."
        )
    return "good", f"Fit to learn in: {bar}, with 95 % confidence for each."


def findings(report: Mapping) -> list[str]:
    """Return what the figures mean, in one or two plain sentences each."""
    overall, kinds = report["overall"], report["kinds"]
    said = [
        f"Of {overall['episodes']} episodes, imagination and truth agree about success in "
        f"{percent(overall['agreement'])}.",
        _false(overall["false_success"]),
        f"It misses {percent(overall['missed_success'])} of the {overall['missed_success']['of']} "
        "real successes."
        if overall["missed_success"]["of"]
        else "No episode of the recording succeeds, so none could be missed.",
        f"Success looks like {percent(overall['imagined_success'])} and is "
        f"{percent(overall['real_success'])}.",
    ]
    if len(kinds) > 1:
        worst = min(kinds, key=lambda name: kinds[name]["agreement"]["rate"])
        said.append(
            f"It is least right about {worst!r}: {percent(kinds[worst]['agreement'])} agreement."
        )
    if second := report.get("second_reward"):
        shares = second["overall"]
        said.append(
            f"Judged by {second['name']} instead, they agree in {percent(shares['agreement'])}; "
            f"false: {percent(shares['false_success'])} of its successes, missed: "
            f"{percent(shares['missed_success'])} of the real ones."
        )
    said.append(_ranking(report["ranking"]))
    said += _images(report)
    return said


def _false(share: Mapping) -> str:
    if share["rate"] is None:
        return "It never shows a success."
    return f"When it shows a success, that is false in {percent(share)} of {share['of']} cases."


def _ranking(ranking: Mapping) -> str:
    if ranking["spearman"] is None:
        return (
            f"Whether it tells better players from worse cannot be said: {ranking['of']} kind(s) "
            "of episodes with different success are too few for a rank correlation."
        )
    return (
        f"The order of the {ranking['of']} kinds of players by imagined success correlates with "
        f"the real order by {ranking['spearman']:.2f} (Spearman; 1 is the same order)."
    )


def _images(report: Mapping) -> list[str]:
    chunks, mm = report["overall"]["per_chunk"], report["drift"]["end_effector_mm"]
    psnr = [value for value in chunks["psnr"] if value is not None]
    said = [
        f"Pictures: PSNR {psnr[0]:.1f} dB in the first chunk, {psnr[-1]:.1f} dB in the last. The "
        f"end effector is off by {mm[-1]:.1f} mm after the last step."
    ]
    lost = [value for value in chunks.get("blocks_lost", ()) if value is not None]
    px = [value for value in chunks.get("block_px", ()) if value is not None]
    if lost and px:
        said.append(
            f"Blocks that are found lie {px[-1]:.1f} pixels off in the last chunk; {lost[-1]:.0%} "
            "of those to be seen are lost."
        )
    return said


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _success_table(report: Mapping) -> tuple[list[str], list[list[str]]]:
    groups = report["kinds"] | {"all": report["overall"]}
    if second := report.get("second_reward"):
        groups |= {f"all, judged by {second['name']}": second["overall"]}
    rows = [
        [kind, str(group["episodes"]), *(percent(group[name]) for name in SHARES)]
        for kind, group in groups.items()
    ]
    return ["episodes of", "n", *SHARES.values()], rows


def _chunk_table(report: Mapping) -> tuple[list[str], list[list[str]]]:
    digits = {
        "psnr": ("PSNR, dB", 1),
        "ssim": ("SSIM", 3),
        "end_effector_mm": ("end effector, mm", 1),
        "block_px": ("blocks off by, px", 2),
        "blocks_lost": ("blocks lost, share", 3),
        "gripper_px": ("gripper off by, px", 2),
    }
    rows = []
    for kind, group in (report["kinds"] | {"all": report["overall"]}).items():
        for name, (title, places) in digits.items():
            if name in group["per_chunk"]:
                values = (_number(value, places) for value in group["per_chunk"][name])
                rows.append([f"{kind}: {title}", *values])
    chunks = len(report["overall"]["per_chunk"]["psnr"])
    return ["", *(f"chunk {n + 1}" for n in range(chunks))], rows


def _shares(title: str, report: Mapping, names: Mapping[str, str]) -> Chart | None:
    """Return bars of the shares `names` {figure: label} of every kind of episode."""
    kinds = report["kinds"] | {"all": report["overall"]}

    def one(share: Mapping) -> Share | None:
        if share["rate"] is None:
            return None
        low, high = share["interval_95"]
        return Share(share["rate"], (low, high), percent(share))

    return bars(
        title,
        {
            kind: {label: one(figures[figure]) for figure, label in names.items()}
            for kind, figures in kinds.items()
        },
    )


def _drift(drift: Mapping) -> list[Chart | None]:
    """Return the errors over the steps 1, 2 .. of an episode."""
    panels = {
        "PSNR, dB": {"psnr": ""},
        "End effector off by, mm": {"end_effector_mm": ""},
        "Seen off by, pixels": {"block_px": "blocks", "gripper_px": "gripper"},
        "Blocks lost, share": {"blocks_lost": ""},
    }
    return [
        lines(
            title,
            [
                Curve(label, range(1, len(drift[name]) + 1), drift[name])
                for name, label in curves.items()
                if name in drift
            ],
            x_label="step",
            from_zero="psnr" not in curves,
        )
        for title, curves in panels.items()
    ]


def strips(films: Sequence[Film]) -> list[tuple[str, Image.Image]]:
    """Return film strips with their captions, imagined above, real below, verdict by verdict."""
    chosen = []
    for verdict in (RIGHT, FALSE, MISSED):
        found = [film for film in films if film.verdict == verdict]
        if verdict == RIGHT and not found:
            found = [film for film in films if film.verdict == NOTHING]
        chosen += found[:FILMS_PER_VERDICT]
    pictures = []
    for film in chosen:
        scale = max(1, round(STRIP_SCALE / min(film.real.shape[2:4])))
        picture = compare(film.real[None], film.imagined[None, 1:], len(film.real), scale)
        pictures.append((f"{TITLES[film.verdict]} ({film.source})", picture))
    return pictures


def write(path: Path, report: Mapping, films: Sequence[Film]) -> None:
    """Write the report as one self-contained HTML file."""
    page.write(
        path,
        Path(__file__).with_suffix(".html"),
        title="Trust report",
        report=report,
        verdict=judge(report["overall"]),
        findings=findings(report),
        success=[_shares("Success", report, SUCCESS), _shares("Verdicts", report, VERDICTS)],
        success_table=_success_table(report),
        drift=_drift(report["drift"]),
        chunk_table=_chunk_table(report),
        strips=[(caption, page.embedded(picture)) for caption, picture in strips(films)],
    )
