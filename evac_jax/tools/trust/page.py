"""The trust report in words: what its figures mean for training in the world model."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from evac_jax.files.atomic import replacing

# Limits for a world model that is good enough for training; also used for the miniature's own.
LEAST_AGREEMENT, MOST_FALSE = 0.85, 0.15

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1e1e22 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .small { color: #666; font-size: .85rem }
.verdict { font-size: 1.15rem; padding: .7rem 1rem; border-left: .4rem solid #888 }
.good { border-color: #389454 } .unsure { border-color: #de8426 } .bad { border-color: #b23440 }
"""


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _success_table(report: Mapping) -> str:
    names = {
        "imagined_success": "imagined success",
        "real_success": "real success",
        "agreement": "agreement",
        "false_success": "false, of imagined",
        "missed_success": "missed, of real",
    }
    groups = report["kinds"] | {"all": report["overall"]}
    rows = [
        [kind, str(group["episodes"]), *(percent(group[name]) for name in names)]
        for kind, group in groups.items()
    ]
    return _table(["episodes of", "n", *names.values()], rows)


def _chunk_table(report: Mapping) -> str:
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
    return _table(["", *(f"chunk {n + 1}" for n in range(chunks))], rows)


def write(path: Path, report: Mapping, pictures: Sequence[Path]) -> None:
    """Write the report as one self-contained HTML file."""
    color, sentence = judge(report["overall"])
    encoded = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    shown = "".join(f'<img alt="" src="data:image/png;base64,{data}">' for data in encoded)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report["notes"])
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    body = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Trust report</title><style>{STYLE}</style>
<h1>How far to trust this simulator</h1>
<p class="verdict {color}">{html.escape(sentence)}</p>
<ul>{"".join(f"<li>{html.escape(text)}</li>" for text in findings(report))}</ul>
{notes}
<p>Every episode was imagined from its first frame by its actions alone, the way training does it,
and compared with what the same actions really led to. In brackets: 95 % Wilson intervals.</p>
<h2>Success</h2>{_success_table(report)}
<h2>Pictures and poses</h2>{_chunk_table(report)}
<p class="small">Pictures of {report["overall"]["pictures"]} of
{report["overall"]["episodes"]} episodes, verdicts of all. PSNR of all pixels of a chunk together;
SSIM of the first view's luminance. Blocks and gripper are found in both frames by
their colour and darkness.</p>
{shown}
<p class="small">{html.escape(report["command"])}<br>{html.escape(settings)}</p></html>
"""
    with replacing(path) as temporary:
        temporary.write_text(body)
