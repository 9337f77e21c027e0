r"""Trains one run after another, with every seed and every combination of settings; compares them.

    python -m evac_jax.tools.runs.sweep --seeds 0 1 2 --set algo.clip_high=0.2,0.3
    python -m evac_jax.tools.runs.sweep --config configs/ppo.py --out runs/lr --seeds 0 1 \
        --set optim.lr=1e-4,3e-4 --config.train.iterations=4

Flags of the form --config.SECTION.FIELD=VALUE go to every run. The same command goes on where a
stopped one was; more seeds and values may be added, and as long as no run has begun, other flags
be given. A run that fails does not keep the others from their turn. At the end OUT/report.html
shows all runs side by side (docs/watch.md).
"""

import contextlib
import dataclasses
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import DEFAULT_PRESET, read_preset
from evac_jax.errors import ConfigError, EvacJaxError
from evac_jax.files import cards, claim
from evac_jax.telemetry import json_lines, report
from evac_jax.telemetry.pages import run_report
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.resume import check_same_run

LAUNCH = Path(__file__).parents[3] / "launch.py"
PLAN_FILE = "sweep.json"
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Fields that tell the runs apart, so the sweep sets them.
OWN = (
    *("seed", "log.dir", "log.run", "checkpoint.dir", "checkpoint.restore", "checkpoint.step"),
    "video.dir",
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: the name of its folder, and the flags in which it differs from the others."""

    name: str
    flags: tuple[str, ...]


def split(text: str) -> tuple[str, list[str]]:
    """Return ("algo.clip_high", ["0.2", "0.3"]) of "algo.clip_high=0.2,0.3".

    A comma within brackets or quotes belongs to a value.

    Raises:
        ConfigError: there is no field or no value.
    """
    field, _, values = text.partition("=")
    found = re.findall(r"(?:[^,(\[\"']|\([^)]*\)|\[[^\]]*\]|\"[^\"]*\"|'[^']*')+", values)
    if not field or not found or ",".join(found) != values:
        raise ConfigError(f"--set: expected FIELD=VALUE,VALUE, got {text!r}")
    return field.removeprefix("--").removeprefix("config."), found


def trials(seeds: Sequence[int], settings: Sequence[str]) -> list[Trial]:
    """Return a run for every combination of the settings' values, with every seed.

    Args:
        seeds: of the runs.
        settings: "section.field=value,value" each.

    Raises:
        ConfigError: a field comes twice, is one that the sweep sets, or two runs get one name.
    """
    axes = [split(text) for text in settings]
    fields = [field for field, _ in axes]
    if wrong := [f for f in fields if f in OWN or fields.count(f) > 1]:
        raise ConfigError(f"--set: the sweep sets {wrong[0]!r} itself, or it was given twice")
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        pairs = list(zip(fields, values, strict=True))
        parts = [f"{field.rpartition('.')[2]}={value}" for field, value in pairs]
        for seed in seeds:
            name = re.sub(r"[^\w.=+-]+", "_", "-".join([*parts, f"seed={seed}"]))
            flags = [f"--config.{field}={value}" for field, value in [*pairs, ("seed", seed)]]
            found.append(Trial(name, tuple(flags)))
    names = [trial.name for trial in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--seeds, --set: two runs would have the folder {twice[0]!r}")
    return found


def check(preset: str, common: Sequence[str], runs: Sequence[Trial]) -> None:
    """Refuse what launch.py would refuse, before the first run begins.

    Raises:
        ConfigError: names the run and what is wrong.
    """
    for trial in runs:
        try:
            from_config_dict(read_preset(preset, [*common, *trial.flags]).to_dict())
        except ConfigError as error:
            raise ConfigError(f"run {trial.name}: {error}") from error


@contextlib.contextmanager
def _passed_on(asked: list[int]) -> Iterator[list[subprocess.Popen]]:
    """Pass signals on to the process that is put into the yielded list; note them in `asked`."""
    running: list[subprocess.Popen] = []

    def receive(number: int, frame: object) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(number)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(out: Path, preset: str, common: Sequence[str], runs: Sequence[Trial]) -> list[str]:
    """Train the runs that have no summary yet; return the names of those that failed.

    Raises:
        SystemExit: a signal came; the run under way has saved what is complete.
    """
    failed, asked = [], []
    with _passed_on(asked) as running:
        for number, trial in enumerate(runs, start=1):
            which = f"run {number} of {len(runs)}, {trial.name}"
            if (out / trial.name / report.SUMMARY_FILE).is_file():
                logging.info("%s: done already", which)
                continue
            logging.info("%s", which)
            own = (f"log.dir={out}", f"log.run={trial.name}", "checkpoint.restore=auto")
            flags = [*common, *trial.flags, *(f"--config.{setting}" for setting in own)]
            command = [sys.executable, str(LAUNCH), f"--config={preset}", *flags]
            # In a session of its own: Ctrl-C would reach it twice otherwise, and end it at once.
            process = subprocess.Popen(command, start_new_session=True)
            running[:] = [process]
            if asked:  # while it started
                process.send_signal(asked[0])
            status = process.wait()
            running.clear()
            if asked:
                sys.stderr.write("\nThe sweep was stopped; the same command goes on.\n")
                sys.exit(128 + asked[0])
            if status:
                logging.error("%s: failed with status %d", which, status)
                failed.append(trial.name)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("runs.sweep", __doc__)
    parser.add_argument("--config", default=DEFAULT_PRESET, help="preset, as launch.py takes it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    parser.add_argument(
        *("--set", "-s"),
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="values of a field; of several fields all combinations",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs")
    args, common = parser.parse_known_args(argv)
    logging.set_verbosity(logging.INFO)
    for flag in common:
        field = flag.partition("=")[0].removeprefix("--config.")
        if not re.match(r"--config\.[^=]+=", flag):
            parser.error(f"expected --config.SECTION.FIELD=VALUE, got {flag!r}")
        if field in OWN:
            parser.error(f"{flag}: the sweep sets {field} itself; see --seeds and --out")
        if field in [split(text)[0] for text in args.set]:
            parser.error(f"{flag}: --set gives {field} its values; leave one of the two out")
    runs = trials(args.seeds, args.set)
    check(args.config, common, runs)
    with claim.claimed(args.out) as out:
        plan = {"config": args.config, "flags": sorted(common)}
        saved = cards.read_json(out / PLAN_FILE) if (out / PLAN_FILE).is_file() else plan
        if any(out.glob(f"*/{json_lines.METRICS_FILE}")):  # else nothing was made by them
            check_same_run(out / PLAN_FILE, saved, plan)
        cards.write_json(out / PLAN_FILE, plan)
        failed = train(out.absolute(), args.config, common, runs)
        begun = [out / t.name for t in runs if (out / t.name / json_lines.METRICS_FILE).is_file()]
        if begun:
            said = run_report.write(begun, out / run_report.REPORT_FILE)
            report.show("\n".join([*said, "", str(out / run_report.REPORT_FILE)]))
    if failed:
        raise EvacJaxError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. Their messages are "
            "above; the same command tries them again"
        )


if __name__ == "__main__":
    run_tool(main)
