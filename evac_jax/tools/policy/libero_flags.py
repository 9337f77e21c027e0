"""Prints the flags with which LIBERO shows a policy what it was trained on.

    python -m evac_jax.tools.policy.libero_flags FOLDER --suite libero_spatial

The card of a policy that was trained on recordings of LIBERO tells how frames were drawn, how often
actions were played, how long episodes were and of which tasks. Nothing is printed for a policy
whose card tells nothing: the official protocol is the default. `make libero-check` calls this.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from evac_jax.config.libero import MAX_STEPS
from evac_jax.errors import CheckpointError
from evac_jax.files import cards, libero_facts
from evac_jax.tools.command_line import Parser, run_tool


def flags(policy: Path, suite: str) -> list[str]:
    """Return the flags for a policy's folder; tasks and length only for the suite it learned.

    Raises:
        CheckpointError: there is no such folder.
        DataError: its card is damaged.
    """
    if not policy.is_dir():
        raise CheckpointError(f"{policy}: expected the folder of a policy")
    known = libero_facts.told(cards.read(policy))
    values = {name: known[name] for name in libero_facts.ALIKE if name in known}
    if known.get("suite") == suite:
        names = {"max_steps": "episode_steps", "tasks": "tasks", "extra_states": "extra_states"}
        values |= {field: known[name] for field, name in names.items() if known.get(name)}
    return [f"--config.libero.{name}={_shown(value)}" for name, value in values.items()]


def _shown(value: int | list[float]) -> str:
    """Return a value as a flag takes it; without spaces and brackets, no shell needs quotes."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("policy.libero_flags", __doc__)
    parser.add_argument("policy", type=Path, help="folder of the policy")
    parser.add_argument("--suite", choices=MAX_STEPS, default="libero_spatial", help="played")
    args = parser.parse_args(argv)
    sys.stdout.write(" ".join(flags(args.policy, args.suite)) + "\n")


if __name__ == "__main__":
    run_tool(main)
