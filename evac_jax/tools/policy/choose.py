"""Chooses a start policy: the first that succeeds often enough to learn from, but not too often.

    python -m evac_jax.tools.policy.choose --evaluations DIR DIR2 .. --between 0.15 0.5 --out DIR3

Reinforcement learning compares episodes that begin alike. A policy that never succeeds, or always
does, learns nothing from them. Each folder is that of `launch.py --mode=eval`; the policy that it
evaluated in the ground truth is copied if its success lies in the range.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from evac_jax.errors import DataError
from evac_jax.files.atomic import whole_folder
from evac_jax.telemetry.report import EVALUATION_FILE
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool


def success_of(folder: Path) -> tuple[str, float]:
    """Return the policy that an evaluation is of, and its success in the ground truth, 0..1.

    Raises:
        DataError: the folder holds no such evaluation, or that of a run's policy.
    """
    try:
        values = json.loads((folder / EVALUATION_FILE).read_text())
        rate = values["success"]["ground_truth"]["rate"]
        policy, run, adapter = (values[name] for name in ("policy", "run", "lora_adapter"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: expected the folder of `launch.py --mode=eval` with success in the ground "
            f"truth ({error!r})"
        ) from error
    if run or adapter:
        raise DataError(
            f"{folder}: is of {run or adapter}, expected a policy's folder; export it first "
            "(tools.policy.export)"
        )
    return policy, rate


def choose(evaluations: Sequence[Path], low: float, high: float) -> str:
    """Return the first policy whose success is from `low` to `high`.

    Raises:
        DataError: there is none; it names the success of each.
    """
    found = [success_of(folder) for folder in evaluations]
    for policy, rate in found:
        if low <= rate <= high:
            return policy
    told = ", ".join(f"{policy}: {rate:.3f}" for policy, rate in found)
    raise DataError(
        f"no policy succeeds in {low:g} to {high:g} of its episodes ({told}); train it longer or "
        "shorter, or widen --between"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("policy.choose", __doc__)
    add = parser.add_argument
    add("--evaluations", required=True, nargs="+", type=Path, help="in order of preference")
    text = "least and most success, shares"
    add("--between", nargs=2, type="share", default=[0.15, 0.5], metavar=("LOW", "HIGH"), help=text)
    add("--out", required=True, type=Path, help="new folder, a copy of the chosen policy")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    refuse_existing(args.out)
    chosen = choose(args.evaluations, *args.between)
    logging.info("%s", chosen)
    with whole_folder(args.out) as folder:
        shutil.copytree(chosen, folder)


if __name__ == "__main__":
    run_tool(main)
