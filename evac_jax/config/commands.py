"""Commands of a run, made from the one that started it, as lists of arguments."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

RESTORING = ("config.checkpoint.restore", "config.checkpoint.step")


def given() -> list[str]:
    """Return the command of this process."""
    return [sys.executable, *sys.argv]


def without(command: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return a command without some flags, named as "mode", in either spelling."""
    kept, skip = [], False
    for argument in command:
        flag, has_value, _ = argument.partition("=")
        if skip:
            skip = False
        elif flag.startswith("-") and flag.lstrip("-") in flags:
            skip = not has_value  # its value is the next argument
        else:
            kept.append(argument)
    return kept


def going_on(command: Sequence[str], run: Path, iterations: int | None = None) -> list[str]:
    """Return the command that goes on with a run from its newest checkpoint.

    Args:
        command: that started it.
        run: its folder.
        iterations: new total; None = as before.
    """
    longer = () if iterations is None else ("config.train.iterations",)
    again = without(command, (*RESTORING, *longer))
    again.append(f"--config.checkpoint.restore={run}")
    return again + [f"--{field}={iterations}" for field in longer]


def following(
    command: Sequence[str], run: Path, *, done: int, iterations: int, finished: bool
) -> dict[str, list[str]]:
    """Return {what to do: command} of what usually comes after a run.

    Args:
        command: that started it.
        run: its folder.
        done: how many iterations it has.
        iterations: how many it was to have.
        finished: whether it has them; if so, going on means twice as many.
    """
    python, *_ = command
    restored = [*without(command, (*RESTORING, "mode")), f"--config.checkpoint.restore={run}"]
    out = f"{run}-policy-{done}"  # a run that goes on is exported again
    export = [python, "-m", "evac_jax.tools.policy.export", f"--run={run}", f"--out={out}"]
    return {
        "evaluate": [*restored, "--mode=eval"],
        "go on": going_on(command, run, 2 * iterations if finished else None),
        "export": export,
        "serve": [*restored, "--mode=serve"],
        "report": [python, "-m", "evac_jax.tools.runs.report", str(run)],
    }
