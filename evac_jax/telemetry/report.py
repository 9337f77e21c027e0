"""The summary of a run: what training changed, where the time went, where the files are."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files.atomic import keep
from evac_jax.files.cards import write_json
from evac_jax.telemetry.json_lines import METRICS_FILE, read_metrics

SUMMARY_FILE = "summary.json"
EVALUATION_FILE = "evaluation.json"
PLACES = ("imagined", "ground_truth")  # where policies are evaluated
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

# {place: (successes, episodes)}
Outcome = Mapping[str, tuple[int, int] | list[int]]


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate, (0, 1) when nothing was tried.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = successes / n. Unlike p ± z·sd it
    stays within [0, 1] and is not empty at 0 or n successes.

    Source: Wilson 1927, Journal of the American Statistical Association 22(158).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p, square = successes / n, z * z
    centre = p + square / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    scale = 1 + square / n
    # At the ends the exact bound is 0 or 1, which rounding misses by an ulp.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def newcombe_interval(
    after: tuple[int, int], before: tuple[int, int], z: float = Z_95
) -> tuple[float, float]:
    """Return the score interval of the difference of two success rates, after minus before, -1..1.

    With rates p, q and their Wilson intervals (a, b), (c, d) it is
    p - q - √((p - a)² + (d - q)²) to p - q + √((b - p)² + (q - c)²), for independent samples. If
    both are of the same starts and these differ in how hard they are, it is rather too wide.

    Args:
        after, before: (successes, n) of each, n > 0.

    Raises:
        ValueError: nothing was tried on one side, or the counts are impossible.

    Source: Newcombe 1998, Statistics in Medicine 17(8) 873-890, method 10.
    """
    if not (after[1] and before[1]):
        raise ValueError(f"expected trials on both sides, got {after} and {before}")
    (p, (a, b)), (q, (c, d)) = ((s / n, wilson_interval(s, n, z)) for s, n in (after, before))
    return p - q - math.hypot(p - a, d - q), p - q + math.hypot(b - p, q - c)


def rates(outcome: Outcome) -> dict[str, float]:
    """Return the success rate of each place, 0..1."""
    return {place: successes / n for place, (successes, n) in outcome.items() if n}


def _cell(successes: int, n: int) -> str:
    low, high = wilson_interval(successes, n)
    rate = successes / n if n else math.nan
    return f"{rate:6.1%} [{low:5.1%}, {high:6.1%}] n={n}"


def _grid(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, the first flush left, the others flush right.

    Cells hold instructions, which come from files: what is not printable is escaped.
    """
    rows = [
        ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in r) for r in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def table(columns: Mapping[str, Outcome]) -> str:
    """Return success rates with 95 % intervals: one row per place, one column per outcome."""
    places = list(dict.fromkeys(place for outcome in columns.values() for place in outcome))
    rows = [["", *columns]]
    for place in places:
        cells = [_cell(*o[place]) if place in o else "not evaluated" for o in columns.values()]
        rows.append([place.replace("_", " "), *cells])
    return _grid(rows) if places else "not evaluated"


def by_task(
    instructions: Sequence[str], task: np.ndarray, success: np.ndarray
) -> dict[str, list[int]]:
    """Return instruction -> [successes, episodes] of tasks [n] and successes, bool [n].

    Tasks of the same text are one: suites such as libero_90 ask for the same in several scenes.
    """
    found: dict[str, list[int]] = {}
    for number, text in enumerate(instructions):
        mine = task == number
        if mine.any():
            successes, episodes = found.get(text, (0, 0))
            found[text] = [successes + int(success[mine].sum()), episodes + int(mine.sum())]
    return found


def task_tables(by_task: Mapping[str, Outcome]) -> list[str]:
    """Return a table for each place, success rates with 95 % intervals: one row per task."""
    return [
        _grid([[f"{place.replace('_', ' ')}, by task", "success"], *rows])
        for place, tasks in by_task.items()
        if (rows := [[text, _cell(*count)] for text, count in tasks.items()])
    ]


def _phase_table(seconds: Mapping[str, float], wall_seconds: float) -> str:
    """Return seconds by phase; "a/b" is a part of "a" and is indented under it."""
    total = seconds.get("step", 0.0)
    phases = {name: value for name, value in seconds.items() if name != "step"}
    rows = [["", "seconds", "share"]]
    for name in sorted(phases):
        label = "  " * (1 + name.count("/")) + name.rsplit("/", 1)[-1]
        rows.append([label, f"{phases[name]:.1f}", f"{phases[name] / total:.1%}" if total else ""])
    rest = total - sum(value for name, value in phases.items() if "/" not in name)
    if phases:
        rows.append(["  rest", f"{rest:.1f}", f"{rest / total:.1%}" if total else ""])
    rows.insert(1, ["all iterations", f"{total:.1f}", "100.0%" if total else ""])
    rows.append(["this process, with start-up and evaluation", f"{wall_seconds:.1f}", ""])
    return _grid(rows)


def summary(
    *,
    before: Outcome,
    after: Outcome,
    seconds: Mapping[str, float],
    wall_seconds: float,
    places: Mapping[str, Path | None],
    notes: Sequence[str] = (),
    alarms: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> str:
    """Return the summary of a run as plain text.

    Args:
        before: successes and episodes before training.
        after: the same at the end.
        seconds: by phase, summed over all iterations of all processes of the run; "step" is all
            of an iteration, "env/reward" a part of "env".
        wall_seconds: duration of this process.
        places: {what: path} of files; None is left out.
        notes: what the success rates depend on, in lines.
        alarms: what is wrong with the run, one sentence each.
        commands: {what to do next: command}.
    """
    lies = [[f"{what}:", str(where)] for what, where in places.items() if where is not None]
    width = max((len(what) for what, _ in lies), default=0)
    return "\n".join(
        [
            "Success rate [95 % Wilson interval]",
            table({"before": before, "after": after}),
            *notes,
            *(["", "Look at this first", *alarms] if alarms else ()),
            "",
            "Time",
            _phase_table(seconds, wall_seconds),
            "",
            *(f"{what.ljust(width)}  {where}" for what, where in lies),
            *(f"\n{what}:\n  {command}" for what, command in (commands or {}).items()),
        ]
    )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        place: {
            "successes": successes,
            "episodes": n,
            "rate": successes / n if n else None,
            "interval_95": list(wilson_interval(successes, n)),
        }
        for place, (successes, n) in outcome.items()
    }


def finish(
    folder: Path,
    *,
    iteration: int,
    before: Outcome,
    after: Outcome,
    seconds: Mapping[str, float],
    wall_seconds: float,
    places: Mapping[str, Path | None],
    notes: Sequence[str] = (),
    alarms: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> str:
    """Write summary.json into the run's folder; show and return the summary.

    Arguments are those of `summary`.

    An earlier summary of the run is kept beside it, as summary_1.json and so on.

    Args:
        iteration: whose policy `after` is of.
    """
    values = {
        "iteration": iteration,
        "success": {"before": _as_json(before), "after": _as_json(after)},
        "notes": list(notes),
        "alarms": list(alarms),
        "seconds": dict(seconds),
        "wall_seconds": wall_seconds,
        "places": {what: str(where) for what, where in places.items() if where is not None},
    }
    keep(folder / SUMMARY_FILE)
    write_json(folder / SUMMARY_FILE, values)
    text = summary(
        before=before,
        after=after,
        seconds=seconds,
        wall_seconds=wall_seconds,
        places=places,
        notes=notes,
        alarms=alarms,
        commands=commands,
    )
    show(text)
    return text


def finish_evaluation(
    folder: Path,
    *,
    whose: Mapping[str, Any],
    outcome: Outcome,
    by_task: Mapping[str, Outcome],
    settings: Mapping[str, Any],
) -> None:
    """Write evaluation.json into the folder and show the success rates, and whose they are.

    Args:
        whose: "policy" that was imported, its "lora_adapter", the "run" it was restored from, ""
            = none, and that run's "iteration".
        by_task: {place: {instruction: (successes, episodes)}}.
        settings: what else the figures depend on, plain values.
    """
    values = {**whose, **settings, "success": _as_json(outcome)}
    values["by_task"] = {place: _as_json(tasks) for place, tasks in by_task.items()}
    write_json(folder / EVALUATION_FILE, values)
    name = f"iteration {whose['iteration']} of {whose['run']}"
    if not whose["run"]:
        parts = (whose["policy"], whose["lora_adapter"])
        name = f"start policy {' with '.join(filter(None, parts))}"
    facts = "  ".join(f"{key}: {value}" for key, value in settings.items())
    head = f"{name}\n{facts}\nwritten to {folder / EVALUATION_FILE}"
    show("\n\n".join([head, *task_tables(by_task), table({"success": outcome})]))


def success_curve(folder: Path) -> dict[int, float]:
    """Return {iteration: success rate in the ground truth} of a run; 0 is its start policy.

    Raises:
        DataError: the run was never evaluated in the ground truth.
    """
    name = "eval/ground_truth/success_rate"
    lines = read_metrics(folder)
    found = {line["iteration"]: line[name] for line in lines if line.get(name) is not None}
    if not found:
        raise DataError(f"{folder / METRICS_FILE} has no {name!r}; set --config.eval.ground_truth")
    return found


def evaluated(folder: Path, iteration: int) -> dict[str, tuple[int, int]]:
    """Return {place: (successes, episodes)} of an iteration of a run; {} if none was logged."""
    found = {}
    for line in read_metrics(folder):
        for place in PLACES if line["iteration"] == iteration else ():
            rate, n = (line.get(f"eval/{place}/{k}") for k in ("success_rate", "num_trajectories"))
            if rate is not None and n:
                found[place] = round(rate * n), round(n)
    return found


def best_iteration(folder: Path) -> int:
    """Return the iteration of a run with the best ground-truth success, the earliest among equals.

    Raises:
        DataError: see `success_curve`.
    """
    found = success_curve(folder)
    return min(found, key=lambda iteration: (-found[iteration], iteration))


def show(text: str) -> None:
    """Write a result to standard output, which is used for nothing else."""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()
