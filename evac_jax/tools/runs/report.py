r"""Writes the report of one run, or of several side by side, as one self-contained HTML file.

    python -m evac_jax.tools.runs.report runs/NAME
    python -m evac_jax.tools.runs.report runs/NAME runs/OTHER --out comparison.html

A run may still be under way. Runs that differ in their seed only are drawn as one curve: their
mean, within their range. docs/watch.md explains the page.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from evac_jax.errors import ConfigError
from evac_jax.telemetry import report
from evac_jax.telemetry.pages import run_report
from evac_jax.tools.command_line import Parser, run_tool


def destination(folders: Sequence[Path]) -> Path:
    """Return where a report goes that was given no place: into the run, or above all of them."""
    if len(folders) == 1:
        return folders[0] / run_report.REPORT_FILE
    above = os.path.commonpath([folder.absolute().parent for folder in folders])
    return Path(above) / run_report.REPORT_FILE


def check_replaceable(out: Path, folders: Sequence[Path]) -> None:
    """Refuse to write over anything but a report.

    Raises:
        ConfigError: there is something else.
    """
    if out.is_dir():
        raise ConfigError(f"--out: expected a file such as report.html, got the folder {out}")
    # A run's own may be of an older version.
    own = [(folder / run_report.REPORT_FILE).absolute() for folder in folders]
    if out.exists() and out.absolute() not in own and not run_report.is_report(out):
        raise ConfigError(
            f"--out: expected a new file or an earlier report of runs, got {out}, which is "
            "something else; name another file, or remove it"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("runs.report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="HTML file; default: report.html in or above them")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(args.runs))
    out = args.out or destination(folders)
    check_replaceable(out, folders)
    said = run_report.write(folders, out)
    report.show("\n".join([*said, "", str(out)]))


if __name__ == "__main__":
    run_tool(main)
