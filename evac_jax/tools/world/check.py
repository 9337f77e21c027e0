"""Checks a world as a whole: every file, and whether its parts belong together.

    python -m evac_jax.tools.world.check DIR

compares each file with its SHA-256 in world.json, and what world.json and the cards of the parts
say: frames, chunk, gripper rule, judged frames, sampling, tasks, poses. DIR may be an address
(hf://OWNER/NAME). Nothing is changed; the status is 2 if anything is wrong.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import logging

from evac_jax.config import hub
from evac_jax.config.world import PARTS, STARTS, World
from evac_jax.errors import EvacJaxError
from evac_jax.files import cards
from evac_jax.sim.initial_states import make_initial_states
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.world import parts


def problems(world: World) -> list[str]:
    """Return what is wrong with a world on this machine, [] if nothing is.

    Files that changed come alone: what such files say means nothing.
    """
    root, card = Path(world.root), world.card
    changed = [
        f"{part}/{name}: changed since the world was packed"
        for part, files in card.sha256.items()
        for name, digest in files.items()
        if cards.sha256(root / part / name) != digest
    ]
    if changed:
        return changed
    try:
        folders = {part: root / part for part in PARTS}
        source = make_initial_states(card.starts.source, world.part(STARTS))
        facts = parts.joined(
            (
                parts.of_networks(folders),
                parts.of_starts(source, STARTS, cards.read(root / STARTS)),
                parts.of_card(card),
            )
        )
        return facts.disagreements() + parts.misfits(card, folders, source)
    except EvacJaxError as error:
        return [str(error)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world.check", __doc__)
    parser.add_argument("world", help="folder or address")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    world = World.read(hub.local(args.world))
    parts.refuse(problems(world), f"{args.world} is not whole")
    files = [Path(world.root, part, name) for part in world.card.sha256 for name in
             world.card.sha256[part]]  # fmt: skip
    size = sum(path.stat().st_size for path in files) / 1e6
    report.show(f"{args.world}: its {len(files)} files ({size:.1f} MB) are whole, its parts agree")


if __name__ == "__main__":
    run_tool(main)
