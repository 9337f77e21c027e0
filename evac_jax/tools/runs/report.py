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


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("runs.report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="HTML file; default: report.html in or above them")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(args.runs))
    if args.out and args.out.is_dir():
        raise ConfigError(f"--out: expected a file such as report.html, got the folder {args.out}")
    out = args.out or destination(folders)
    said = run_report.write(folders, out)
    report.show("\n".join([*said, "", str(out)]))


if __name__ == "__main__":
    run_tool(main)
