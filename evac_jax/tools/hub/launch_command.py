"""Writes a command of launch.py with its flags, one a line."""

import shlex
from collections.abc import Mapping


def launch_command(preset: str, values: Mapping[str, object]) -> str:
    """Return the command that starts a run.

    Args:
        preset: of `--config`.
        values: field -> value that differs from the preset.
    """
    flags = map(shlex.quote, flags_of(values))
    return " \\\n    ".join([f"python launch.py --config={preset}", *flags])


def flags_of(values: Mapping[str, object]) -> list[str]:
    """Return the flags that set fields to values, as launch.py gets them."""
    return [f"--config.{field}={_text(value)}" for field, value in values.items()]


def _text(value: object) -> str:
    """Return a value as launch.py reads it."""
    return repr(value) if isinstance(value, tuple) else str(value)
