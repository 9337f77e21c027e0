"""Converts LIBERO's initial states, pickles in torch files, to plain `.npz`, once.

    python -m evac_jax.tools.episodes.import_libero_states --root LIBERO_ROOT --out FOLDER

LIBERO_ROOT holds `init_files`, and the order of the tasks in `benchmark/libero_suite_task_map.py`,
which is read and not run. The pickles go through an unpickler that admits NumPy only.
"""

import ast
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from evac_jax.config.libero import MAX_STEPS
from evac_jax.errors import DataError
from evac_jax.files.restricted_npy import unpickle
from evac_jax.sim.libero_tasks import save_suite
from evac_jax.tools.command_line import Parser, run_tool

TASK_MAP = "benchmark/libero_suite_task_map.py"


def read_states(path: Path) -> np.ndarray:
    """Return the states of a `.pruned_init` file, float64 [n d], without running what it holds.

    Raises:
        DataError: the file is missing or damaged, or its pickle asks for more than NumPy.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise DataError(f"{path}: expected one pickle in the file, got {len(names)}")
            content = archive.read(names[0])
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable torch file: {error}") from error
    states = unpickle(io.BytesIO(content), path)
    if not isinstance(states, np.ndarray) or states.dtype != np.float64 or states.ndim != 2:
        raise DataError(f"{path}: expected an array of states, float64 [n d]")
    return np.ascontiguousarray(states)


def read_tasks(root: Path) -> dict[str, list[str]]:
    """Return the names of every suite's tasks in the benchmark's order.

    Raises:
        DataError: there is no task map, or it is not a plain table.
    """
    path = root / TASK_MAP
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign):
                return {
                    str(k): [str(t) for t in v] for k, v in ast.literal_eval(node.value).items()
                }
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"--root: cannot read {path}: {error}") from error
    raise DataError(f"--root: {path} holds no table of tasks")


def convert(root: Path, out: Path, suites: Sequence[str]) -> dict[str, int]:
    """Write <out>/<suite>.npz for every suite; return the number of states of each.

    Raises:
        DataError: a suite, or some of its files, are missing or damaged.
    """
    tasks = read_tasks(root)
    if unknown := sorted(set(suites) - set(tasks)):
        raise DataError(f"--suites: no {unknown}; {root / TASK_MAP} has {sorted(tasks)}")
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for suite in suites:
        folder = root / "init_files" / suite
        states = [read_states(folder / f"{task}.pruned_init") for task in tasks[suite]]
        save_suite(out / f"{suite}.npz", tasks[suite], states)
        counts[suite] = sum(map(len, states))
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("episodes.import_libero_states", __doc__)
    add = parser.add_argument
    add("--root", required=True, type=Path, help="libero/libero of LIBERO's repository or package")
    add("--out", required=True, type=Path, help="folder for the .npz files")
    add("--suites", nargs="+", default=sorted(MAX_STEPS), help="which suites")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    for suite, count in convert(args.root, args.out, args.suites).items():
        logging.info("%s: %d initial states", suite, count)


if __name__ == "__main__":
    run_tool(main)
