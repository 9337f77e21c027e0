"""Whether a training tool's saved progress is that of the run that wants to go on from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evac_jax.errors import CheckpointError


def check_same_run(path: Path, saved: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Refuse progress that was made with other arguments: going on would be another run.

    Args:
        path: of the progress, for the message.
        saved: what its run was started with.
        setup: the same of this run.

    Raises:
        CheckpointError: names every argument that differs, with both values.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is {setup.get(name)!r}"
        for name in sorted({*saved, *setup})
        if saved.get(name) != setup.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing)}. Run with the same arguments "
            "to go on, or remove the file to start anew"
        )
