"""What the parts of a world say about themselves, and whether they agree.

A fact, such as the size of frames, may be told by several files. `Facts` remembers who says what,
so that a message can name the two that disagree.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.config.schema import PolicyConfig
from evac_jax.config.world import Card
from evac_jax.errors import CheckpointError, ConfigError, EvacJaxError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model_folders import CONFIG_FILE, WEIGHTS_FILE, load_model
from evac_jax.files import cards, libero_facts
from evac_jax.files.instructions import numbers_in
from evac_jax.policy_import import check_policy, told_by
from evac_jax.sim.initial_states import InitialStates
from evac_jax.sim.pose_model import PoseModel

MODELS = {"world_model": "EvacModel", "reward": "RewardNet", "pose_model": "PoseModel"}
STATISTICS_FILE = "dataset_statistics.json"
DRAWN = ("oversample", "reflections")  # of LIBERO, in the card's ground truth
POSES_COMPARED = 16


class Facts:
    """Facts, and who tells them.

    Attributes:
        told: {fact: {who: value}}, plain values.
    """

    def __init__(self) -> None:
        self.told: dict[str, dict[str, Any]] = {}

    def add(self, who: str, **facts: Any) -> None:
        """Note what `who` says; a fact of None is not said."""
        for name, value in facts.items():
            if value is not None:
                plain = list(value) if isinstance(value, tuple) else value
                self.told.setdefault(name, {})[who] = plain

    def value(self, name: str) -> Any:
        """Return what the first says who tells it; None if nobody does."""
        return next(iter(self.told.get(name, {}).values()), None)

    def disagreements(self) -> list[str]:
        """Return one line for each fact on which not all agree; it names the first two."""
        lines = []
        for name, told in self.told.items():
            (who, value), *others = told.items()
            for other, different in others:
                if different != value:
                    lines.append(f"{name}: {who} says {value!r}, {other} says {different!r}")
                    break
        return lines


def of_networks(folders: Mapping[str, Path]) -> Facts:
    """Return what the folders of the networks say.

    Args:
        folders: {"world_model", "reward", "pose_model", "policy": folder}; some may be absent.

    Raises:
        CheckpointError: one holds something else.
        DataError: a card is damaged.
    """
    facts = Facts()
    for part, folder in folders.items():
        card = cards.read(folder)
        sizes = sizes_of(part, folder) if part in MODELS else {}
        if part == "world_model":
            model = EvacConfig.from_dict(sizes)
            who = f"{part}/{CONFIG_FILE}"
            facts.add(who, image_size=model.image_size, views=model.n_view, chunk=model.chunk)
        if part == "policy":
            _add_policy(facts, folder, card)
        scores, sampling = card.get("scores") or {}, card.get("sampling") or {}
        who = f"{part}/card.json"
        if part == "reward":
            frames = {name: scores.get(name) for name in ("success_frames", "threshold")}
            facts.add(who, judged_frames=card.get("judged_frames"), chunk=card.get("chunk"))
            facts.add(who, **frames)
        facts.add(who, steps=sampling.get("steps"), eta=sampling.get("eta"))
        add_libero(facts, who, card if "libero" in card else card.get("data") or card)
    return facts


def sizes_of(part: str, folder: Path) -> dict[str, Any]:
    """Return the sizes in the config.json of a network's folder.

    Raises:
        CheckpointError: there is none, or it is that of another network.
    """
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_text())
        model, sizes = description["model"], description["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{part}: {folder} holds no network of evac_jax ({error!r}); expected {CONFIG_FILE} "
            f"with the sizes of {MODELS[part]}"
        ) from error
    if model != MODELS[part]:
        raise CheckpointError(f"{part}: {folder} holds {model}, expected {MODELS[part]}")
    return sizes


def weights_file(folder: Path) -> str:
    """Return the name of a network's file of weights."""
    return cards.read_json(folder / CONFIG_FILE).get("weights", WEIGHTS_FILE)


def _add_policy(facts: Facts, folder: Path, card: Mapping[str, Any]) -> None:
    facts.add("policy/card.json", **told_by(card))
    path = folder / STATISTICS_FILE
    known = cards.read_json(path) if path.is_file() else {}
    if len(known) == 1 and not facts.told.get("unnorm_key"):
        facts.add(f"policy/{STATISTICS_FILE}", unnorm_key=next(iter(known)))


def add_libero(facts: Facts, who: str, card: Mapping[str, Any]) -> None:
    """Note what a card, or the one that it started from, says about LIBERO's frames and pace."""
    known = libero_facts.told(card)
    size = known.get("image_size")
    facts.add(who, image_size=None if size is None else [size, size])
    facts.add(who, **{name: known.get(name) for name in libero_facts.ALIKE if name != "image_size"})


def of_starts(source: InitialStates, who: str, card: Mapping[str, Any]) -> Facts:
    """Return what start frames say: their pictures, and the card of where they come from."""
    facts = Facts()
    views, height, width = source.load(np.zeros(1, np.int64)).images.shape[1:4]
    # Tasks are known by their texts: sources list them in orders of their own.
    asked = sorted(source.instructions)
    facts.add(who, image_size=[height, width], views=views, instructions=asked)
    add_libero(facts, who, card)
    return facts


def of_card(card: Card) -> Facts:
    """Return what a world's card says."""
    facts, camera, truth = Facts(), card.cameras[0], card.ground_truth
    is_libero = truth.name == "libero"
    facts.add(
        "world.json",
        instructions=sorted(card.instructions),
        image_size=camera.size,
        views=len(card.cameras),
        crop=camera.crop,
        chunk=card.chunk,
        action_repeat=card.action_repeat,
        gripper=card.gripper,
        unnorm_key=card.policy.unnorm_key,
        keep_stop_token=card.policy.keep_stop_token,
        **{name: getattr(truth, name) if is_libero else None for name in DRAWN},
        **dataclasses.asdict(card.judging),
        **{name: getattr(card.imagining, name) for name in ("steps", "eta")},
    )
    return facts


def joined(parts: Iterable[Facts]) -> Facts:
    """Return the facts of several as one."""
    result = Facts()
    for part in parts:
        for name, told in part.told.items():
            for who, value in told.items():
                result.add(who, **{name: value})
    return result


def misfits(card: Card, folders: Mapping[str, Path], source: InitialStates) -> list[str]:
    """Return what would keep a run from beginning: tasks, prompts or poses that a part cannot take.

    Args:
        card: of the world.
        folders: of its networks, by part.
        source: its start frames.
    """
    found = []
    known = cards.read(folders["reward"]).get("instructions") or ()
    asked = sizes_of("reward", folders["reward"]).get("num_instructions", 0)
    if asked and len(known) != asked:
        found.append(
            f"reward/card.json lists {len(known)} instructions, reward/{CONFIG_FILE} says that the "
            f'classifier is told which of {asked}; write "instructions" in the order of its '
            "training into the card"
        )
    ends = [end for ends in (card.starts.train, card.starts.eval) for end in ends]
    if max(ends) > source.num_starts:
        found.append(f"starts: there are {source.num_starts}, ranges go up to {max(ends)}")

    def instructions() -> None:
        if known and asked:
            numbers_in(known, source.instructions, "reward/card.json")

    def policy() -> None:
        own = card.policy
        settings = PolicyConfig(
            checkpoint=str(folders["policy"]),
            unnorm_key=own.unnorm_key,
            max_prompt_length=own.prompt_length,
            keep_stop_token=own.keep_stop_token,
        )
        check_policy(settings, source.instructions)

    def poses() -> None:
        model = load_model(folders["pose_model"], kind="PoseModel")
        assert isinstance(model, PoseModel)
        ids = np.arange(min(POSES_COMPARED, source.num_starts), dtype=np.int64)
        model.check_poses(source.load(ids).poses)

    for check in (instructions, policy, poses):
        try:
            check()
        except EvacJaxError as error:
            found.append(str(error))
    return found


def refuse(problems: list[str], what: str) -> None:
    """Raise one ConfigError with all `problems`, if there are any."""
    if problems:
        raise ConfigError(f"{what}:\n" + "\n".join(f"  {problem}" for problem in problems))
