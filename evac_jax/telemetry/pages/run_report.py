"""The report of one run, or of several side by side: `report.html`.

Runs that differ in their seed only are drawn as one curve, their mean, within their range.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evac_jax.config import commands
from evac_jax.telemetry.pages import page, signals
from evac_jax.telemetry.pages.charts import Chart, Curve, lines
from evac_jax.telemetry.pages.record import (
    EVALUATIONS,
    TRAINING,
    TWINS,
    Group,
    Measure,
    Rate,
    Record,
    grouped,
    read,
)

REPORT_FILE = "report.html"
MARK = b'<meta name="generator" content="evac_jax report of runs">'  # in a report's head
HEAD_BYTES = 1000
MOST_DOTS = 60  # of a curve; more are a line
MOST_WARNINGS = 50  # shown of a run, the last ones
FILMS = 3  # shown of an evaluation
# What a folder, a seed and a name say is no setting to compare runs by.
UNTOLD = ("seed", "log.dir", "log.run", "checkpoint.restore", "checkpoint.step")


def write(folders: Sequence[Path], path: Path) -> list[str]:
    """Write the report of the runs in `folders` to `path`; return what came of them, in sentences.

    Raises:
        DataError: one of them is no run.
    """
    records = [read(folder) for folder in folders]
    groups = grouped(records)
    headlines = [headline(group) for group in groups]
    page.write(
        path,
        Path(__file__).with_suffix(".html"),
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        headlines=[_state(records[0])] if len(records) == 1 else headlines,
        table=_table(records),
        success=_success(groups),
        signals=_signals(groups),
        strips=[
            (group.name, strips)
            for group in groups
            if (strips := _strips(group.records[0], every=len(records) == 1))
        ],
        phases=_phases(groups),
        names=[group.name for group in groups],
        settings=_settings(groups),
        runs=[_details(record) for record in records],
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    return headlines


def is_report(path: Path) -> bool:
    """Whether a file is a report that `write` wrote."""
    with path.open("rb") as file:
        return MARK in file.read(HEAD_BYTES)


def headline(group: Group) -> str:
    """Return what came of a group of runs, in one sentence."""
    runs = group.records
    told = []
    for measure in EVALUATIONS:
        rates = [found for record in runs if (found := record.rates(measure))]
        if rates:
            before, after = [own[0] for own in rates], [own[-1] for own in rates]
            ends = [_mean(before), _mean(after)]
            told.append(f"{measure.title} {' to '.join(dict.fromkeys(ends))}")
    done = dict.fromkeys((min(r.done for r in runs), max(r.done for r in runs)))
    count = f"{' to '.join(map(str, done))} of {runs[0].iterations} iterations"
    success = f"success: {'; '.join(told)}" if told else "not evaluated yet"
    return f"{group.name}: {count}, {success}"


def _state(record: Record) -> str:
    """Return how far a run is."""
    state = "" if record.finished else ", not finished"
    seed = record.setting("seed", "not known")
    return f"{record.done} of {record.iterations} iterations{state}; seed {seed}"


def _mean(rates: Sequence[Rate]) -> str:
    """Return one rate with its interval, or the mean of several with their range."""
    if len(rates) == 1:
        return str(rates[0])
    values = [100 * rate.rate for rate in rates]
    mean = sum(values) / len(values)
    return f"{mean:.1f} % (mean of {len(values)} runs, {min(values):.1f} to {max(values):.1f})"


def _table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: success before and after, of one run by place, of several by run."""
    measures = [m for m in EVALUATIONS if any(record.rates(m) for record in records)]
    if len(records) == 1:
        ends = [(m.title, rates[0], rates[-1]) for m in measures if (rates := records[0].rates(m))]
        return ["", "before", "after"], [[place, str(a), str(b)] for place, a, b in ends]
    head = ["run", "seed", "iterations"]
    head += [f"{m.title}, {when}" for m in measures for when in ("before", "after")]
    rows = []
    for record in records:
        done = f"{record.done} of {record.iterations}"
        ends = []
        for measure in measures:
            rates = record.rates(measure)
            ends += [r.short for r in (rates[0], rates[-1])] if rates else ["not evaluated"] * 2
        rows.append([record.name, str(record.setting("seed", "")), done, *ends])
    return head, rows


def _success(groups: Sequence[Group]) -> list[Chart | None]:
    """Return the charts of success: by measure, or all in two where there is one group."""
    if len(groups) == 1:
        sets = {"Success": [*EVALUATIONS, TRAINING], "Twins: the same actions in both": TWINS}
        return [
            lines(
                title,
                [_rates(groups[0], m, m.title) for m in measures if _has(groups, m)],
                shares=True,
            )
            for title, measures in sets.items()
        ]
    return [
        lines(
            f"Success: {m.title}", [_rates(group, m, group.name) for group in groups], shares=True
        )
        for m in (*EVALUATIONS, TRAINING, *TWINS)
    ]


def _has(groups: Sequence[Group], measure: Measure) -> bool:
    return any(record.rates(measure) for group in groups for record in group.records)


def _rates(group: Group, measure: Measure, name: str) -> Curve:
    """Return a group's success over iterations, with one run's interval or several runs' range."""
    own = [{rate.iteration: rate for rate in r.rates(measure)} for r in group.records]
    x = sorted({iteration for rates in own for iteration in rates})
    at = [[rates[i] for rates in own if i in rates] for i in x]
    notes = [f"iteration {i}: {_mean(rates)}" for i, rates in zip(x, at, strict=True)]
    dots = len(x) <= MOST_DOTS and measure is not TRAINING
    if len(own) == 1:
        spread = [rates[0].interval if dots else None for rates in at]
        return Curve(name, x, [rates[0].rate for rates in at], spread, dots, notes)
    values = [[rate.rate for rate in rates] for rates in at]
    return Curve(name, x, *_mean_and_range(values), dots=dots, notes=notes)


def _mean_and_range(
    values: Sequence[Sequence[float]],
) -> tuple[list[float], list[tuple[float, float] | None]]:
    """Return the mean of each entry, and its range where it has several values."""
    means = [sum(own) / len(own) for own in values]
    return means, [(min(own), max(own)) if len(own) > 1 else None for own in values]


def _signals(groups: Sequence[Group]) -> list[tuple[Chart, str]]:
    """Return the charts of the learning signals, each with what to look for."""
    found = []
    for signal in signals.SIGNALS:
        curves = [_signal(group, signal.metric) for group in groups]
        if chart := lines(signal.title, curves, from_zero=signal.from_zero):
            found.append((chart, signal.look))
    return found


def _signal(group: Group, metric: str) -> Curve:
    own = [record.series(metric) for record in group.records]
    x = sorted({iteration for values in own for iteration in values})
    at = [[v for values in own if (v := values.get(i)) is not None] for i in x]
    known = [values or [float("nan")] for values in at]
    return Curve(group.name, x, *_mean_and_range(known))


def _strips(record: Record, *, every: bool) -> list[dict[str, Any]]:
    """Return film strips of the last evaluation, and of the first if `every`."""
    with_films = [films for films in record.films if films["films"]]
    chosen = with_films[-1:]
    if every and len(with_films) > 1:
        chosen = [with_films[0], *chosen]
    return [
        {"iteration": films["iteration"], "pairs": _pairs(record, films)[:FILMS]}
        for films in chosen
    ]


def _pairs(record: Record, films: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return films of the same start together; start ids of two sources mean different things."""
    places: dict[str, dict[int, Any]] = {}
    for film in films["films"]:
        strip = record.videos / film["strip"]
        if strip.is_file():
            shown = film | {"picture": page.embedded(strip)}
            places.setdefault(film["place"], {})[film["start"]] = shown
    imagined, real = (places.get(place, {}) for place in ("imagined", "ground_truth"))
    if films["shared_starts"]:
        starts = dict.fromkeys((*imagined, *real))
        found = [(imagined.get(start), real.get(start)) for start in starts]
    else:
        found = [(film, None) for film in imagined.values()]
        found += [(None, film) for film in real.values()]
    return [{"imagined": dream, "real": truth} for dream, truth in found]


def _phases(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return rows of mean seconds of an iteration, by phase; "a/b" is a part of "a"."""
    means = []
    for group in groups:
        runs = [seconds for record in group.records if (seconds := record.seconds())]
        names = dict.fromkeys(name for seconds in runs for name in seconds)
        means.append({n: sum(s.get(n, 0.0) for s in runs) / len(runs) for n in names})
    rest = [
        own.get("step", 0.0) - sum(v for n, v in own.items() if n != "step" and "/" not in n)
        for own in means
    ]
    names = sorted({name for own in means for name in own} - {"step"})
    rows = [("the whole iteration", [own.get("step") for own in means], 0)] if names else []
    rows += [
        (name.rsplit("/", 1)[-1], [own.get(name) for own in means], 1 + name.count("/"))
        for name in names
    ]
    rows += [("rest", rest, 1)] if names else []
    return [
        {
            "name": name,
            "depth": depth,
            "cells": [
                None if value is None or not own.get("step") else (value, value / own["step"])
                for value, own in zip(values, means, strict=True)
            ],
        }
        for name, values, depth in rows
    ]


def _settings(groups: Sequence[Group]) -> dict[str, Any]:
    """Return rows of settings that differ from the preset, one column per group."""
    firsts = [group.records[0] for group in groups]
    last = [record.launches[-1] if record.launches else {} for record in firsts]
    alone = len(firsts) == 1
    changed = [launch.get("changed", {}) for launch in last]
    fields = dict.fromkeys(f for own in changed for f in own if alone or f not in UNTOLD)
    rows = []
    for field in fields:
        before = next(own[field][0] for own in changed if field in own)
        values = [own[field][1] if field in own else before for own in changed]
        rows.append([field, *map(_value, (before, *values))])
    presets = [launch.get("preset", "") for launch in last]
    unknown = [r.name for r, preset in zip(firsts, presets, strict=True) if not preset]
    return {"presets": list(dict.fromkeys(filter(None, presets))), "rows": rows, "unknown": unknown}


def _value(value: Any) -> str:
    return '""' if value == "" else str(value)


def _details(record: Record) -> dict[str, Any]:
    """Return what is told of one run: what went wrong, and its commands."""
    launches = record.launches
    going_on = {}
    if launches:
        command = launches[-1]["command"]
        going_on = commands.following(
            command,
            record.path.absolute(),
            done=record.done,
            iterations=record.iterations,
            finished=record.finished,
        )
    return {
        "name": record.name,
        "path": str(record.path.absolute()),
        "alarms": signals.alarms(record),
        "warnings": record.warnings[-MOST_WARNINGS:],
        "more_warnings": max(0, len(record.warnings) - MOST_WARNINGS),
        "launches": [{**launch, "command": shlex.join(launch["command"])} for launch in launches],
        "commands": {what: shlex.join(command) for what, command in going_on.items()},
    }
