"""Which initial states of LIBERO are for what, and whether a world keeps them apart.

Of the small LIBERO's four tasks with 100 states each, `id % 4` is the task and `id // 4` the state.
States 0..49 are those of the benchmark, the others those that LIBERO made and left out of it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from evac_jax.errors import DataError
from evac_jax.files import cards, libero_facts, recordings, start_frames
from evac_jax.files.libero_facts import NUMBERING

ALL = (0, 400)
REPORT = (0, 200)  # all of the benchmark's states: in no recording, no training, no choice
TRAINING = (200, 360)
CHOICE = (360, 400)
# Mode of launch.py -> fields that say in which states of LIBERO it begins.
BEGINS_IN = {
    "collect": ("env.train_starts",),
    "eval": ("eval.ground_truth_starts",),
    "train": ("env.train_starts", "eval.ground_truth_starts"),
}
SHOWN = 3  # ids in a message


def of_command(command: str) -> set[int]:
    """Return the states in which a recipe's command begins episodes of LIBERO.

    One that does not tell may use all of them; one that is not launch.py, or that only imagines,
    uses none by itself: it begins in the starts of a world, whose card tells.
    """
    words = command.split()
    if "launch.py" not in words or "--config.eval.ground_truth=none" in words:
        return set()
    mode = re.search(r"--mode=(\w+)", command)
    found: set[int] = set()
    for field in BEGINS_IN[mode[1] if mode else "train"]:
        ends = re.search(rf"--config\.{re.escape(field)}=\(?(\d+),\s*(-?\d+)\)?", command)
        low, high = map(int, ends.groups()) if ends else (0, -1)
        found |= set(range(low, ALL[1] if high == -1 else high))
    return found


def told(world: Path, data: Sequence[Path] = ()) -> dict[str, set[int]]:
    """Return {where: states} of all that tells where a world's episodes began; -1 = not known.

    Args:
        world: its folder; the card of its starts tells, and the card of a recipe beside world.json.
        data: recordings, whose episodes tell.
    """
    found = {}
    starts = world / "starts"
    if states := cards.read(starts).get(start_frames.STATES):
        found[str(starts)] = set(states)
    for stage in cards.read(world).get("stages", ()):
        if states := of_command(stage["command"]):
            found[f"{world / 'card.json'}, stage {stage['name']}"] = states
    return found | {str(folder): set(recordings.load(folder).start.tolist()) for folder in data}


def check(
    world: Path, data: Sequence[Path] = (), numbering: Sequence[object] = ()
) -> dict[str, set[int]]:
    """Return what `told` does, if none of these states is reported on.

    Args:
        world, data: see `told`.
        numbering: what `NUMBERING` is in the world; the cards of `data` must tell the same.

    Raises:
        DataError: one is, or there are episodes of which nobody tells where they began.
    """
    found = told(world, data)
    if not found:
        raise DataError(
            f"{world}: neither its starts nor a recipe's card tell which states of LIBERO they are "
            "from, so nobody knows whether the reported ones are among them; name the recordings "
            "with --data, or pack the world again (tools.world.pack)"
        )
    problems = []
    for folder in data:
        facts = libero_facts.told(cards.read(folder))
        other = [facts.get(name) for name in NUMBERING]
        if other != list(numbering):
            problems.append(
                f"{folder}: numbers states by {', '.join(NUMBERING)} = {other}, the world by "
                f"{list(numbering)}"
            )
    for where, states in found.items():
        if -1 in states:
            problems.append(f"{where}: does not tell where all of its episodes begin")
        if common := sorted(states & set(range(*REPORT))):
            shown = ", ".join(map(str, common[:SHOWN]))
            problems.append(f"{where}: has {len(common)} of them, such as {shown}")
    if problems:
        raise DataError(
            f"reported are the start ids {REPORT[0]}..{REPORT[1] - 1} of LIBERO, which nothing "
            "else may use:\n  " + "\n  ".join(problems) + "\nmake the world again from "
            f"{TRAINING[0]}..{TRAINING[1] - 1}, with choices on {CHOICE[0]}..{CHOICE[1] - 1} "
            "(docs/libero_small.md)"
        )
    return found
