r"""Packs a world: one folder with all that a policy is trained in, `--config.world=DIR`.

    python -m evac_jax.tools.world.pack --world_model DIR --reward DIR --pose_model DIR \
        --policy DIR --starts RECORDING .. --horizon 32 --ground_truth none --out WORLD
    python -m evac_jax.tools.world.pack --base WORLD --policy DIR --out WORLD2

What the parts' own files say is taken from there, and must agree; what none of them says is asked
for, all at once. --starts are recordings, whose first frames are stored: those of training episodes
for training, those of held-out ones for evaluation. Or it is a folder of start frames, or
"miniature" for the built-in scenes; these need --train_starts and --eval_starts. With --base, the
parts and values that are not given are those of another world. The folder appears when it is whole.
"""

import argparse
import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from absl import logging

from evac_jax.config import hub
from evac_jax.config.world import (
    CARD_FILE,
    FORMAT,
    PARTS,
    STARTS,
    Camera,
    Card,
    GroundTruth,
    Imagining,
    Judging,
    Policy,
    Starts,
    World,
)
from evac_jax.errors import ConfigError
from evac_jax.evac.model_folders import CONFIG_FILE
from evac_jax.files import cards, libero_facts, recordings, start_frames
from evac_jax.files.atomic import whole_folder
from evac_jax.files.libero_facts import NUMBERING
from evac_jax.policy_import import told_as_checkpoint_error
from evac_jax.sim.initial_states import InitialStates, make_initial_states, pack_starts
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.world import parts
from evac_jax.tools.world.options import HELP, parse
from policies.openvla_oft.prompt import PromptTokenizer

MINIATURE: Final = "miniature"
ANY_LENGTH = 10**6
TO_COME = {"to come": "0" * 64}
# Facts that somebody must tell; --<name> does where no file does. Those of LIBERO's frames are
# needed where it is the ground truth; elsewhere frames are whole and actions are played once.
NEEDED = (
    *("gripper", "unnorm_key", "keep_stop_token", "success_frames", "judged_frames", "threshold"),
    *("steps", "eta"),
)
OF_LIBERO = {"crop": [0.0, 1.0, 0.0, 1.0], "action_repeat": 1, "oversample": 0, "reflections": True}
# Part -> facts that hold only as long as it is the same.
BELONGS_TO = {
    "policy": ("gripper", "unnorm_key", "keep_stop_token", "prompt_length"),
    "reward": ("success_frames", "judged_frames", "threshold", "steps", "eta", "solver"),
    STARTS: ("train_starts", "eval_starts"),
}


@dataclass(frozen=True)
class Origin:
    """Where start frames come from.

    Attributes:
        kind: as of `env.initial_states`.
        source: reads them.
        folder: whose files are copied; None = its starts are written anew, or none are needed.
        card: of the recording or the folder.
        train, eval: ranges of start ids, as far as they are known.
        states: start ids of the ground truth that the frames are of, -1 = unknown; () = all are.
    """

    kind: Literal["npy", "miniature"]
    source: InitialStates
    folder: Path | None
    card: dict[str, Any]
    train: Sequence[int] | None = None
    eval: Sequence[int] | None = None
    states: Sequence[int] = ()

    @classmethod
    def of(cls, names: Sequence[str]) -> "Origin":
        """Return the origin that --starts names.

        Raises:
            ConfigError: several folders that are no recordings.
            DataError: one cannot be read.
        """
        if list(names) == [MINIATURE]:
            return cls(MINIATURE, make_initial_states(MINIATURE), None, {})
        folders = [Path(hub.local(name)) for name in names]
        if missing := [str(folder) for folder in folders if not folder.is_dir()]:
            raise ConfigError(
                f"--starts: {', '.join(missing)}: no folder; expected recordings, a folder of "
                f"start frames, or {MINIATURE!r}"
            )
        if all((folder / "frames.npy").is_file() for folder in folders):
            data = recordings.load(*folders)
            count = int((~data.held_out).sum())
            ends = (0, count), (count, data.num_episodes)
            data.both_parts()  # refuses a recording that has only one of them
            data = data.select(np.argsort(data.held_out, kind="stable"))  # those of training first
            return cls("npy", RecordedStarts(data), None, data.card, *ends, data.start.tolist())
        if len(folders) > 1:
            raise ConfigError(
                f"--starts: expected recordings or one folder of start frames, got {list(names)}"
            )
        folder, source = folders[0], make_initial_states("npy", str(folders[0]))
        card = cards.read(folder)
        return cls("npy", source, folder, card, card.get("train_starts"), card.get("eval_starts"))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(Parser("world.pack", __doc__), argv)
    logging.set_verbosity(logging.INFO)
    out = Path(args.out)
    refuse_existing(out)
    world = pack(args, out)
    report.show(
        f"{out}: a world of {', '.join(world.card.sha256)}\n"
        f"check it:    python -m evac_jax.tools.world.check {out}\n"
        f"train in it: python launch.py --config=configs/grpo.py:own --config.world={out}"
    )


def pack(args: argparse.Namespace, out: Path) -> World:
    """Write the folder of a world and return it.

    Args:
        args: of the command line.
        out: a new folder.

    Raises:
        ConfigError: parts disagree, or something is not known; names all of it.
        DataError, CheckpointError: a part cannot be read.
    """
    base = World.read(hub.local(args.base)) if args.base else None
    folders = {part: _folder(args, base, part) for part in PARTS}
    if args.starts:
        origin = Origin.of(args.starts)
    else:
        assert base is not None  # the parser says so
        origin = Origin.of([base.part(STARTS) or MINIATURE])
    facts = parts.joined(
        (
            parts.of_networks(folders),
            parts.of_starts(origin.source, STARTS, origin.card),
            _given(args, origin),
        )
    )
    parts.refuse(facts.disagreements(), "these parts do not belong together")
    if base:
        _add_base(facts, base, args)
    card = _card(facts, origin, folders["policy"])
    parts.refuse(parts.misfits(card, folders, origin.source), "these parts make no world")
    with whole_folder(out) as partial:
        partial.mkdir()
        for part, folder in folders.items():
            _copy(folder, _files(part, folder), partial / part, link=args.link)
        if origin.folder is not None:
            _copy(origin.folder, _files(STARTS, origin.folder), partial / STARTS, link=args.link)
        elif origin.kind == "npy":
            _write_starts(origin, card, partial / STARTS)
        digests = {path.name: _digests(path) for path in sorted(partial.iterdir())}
        card = dataclasses.replace(card, sha256=digests)
        (partial / CARD_FILE).write_text(card.to_json())  # last: without it there is no world
        World.read(str(partial))
    return World.read(str(out))


def _folder(args: argparse.Namespace, base: World | None, part: str) -> Path:
    given = getattr(args, part)
    folder = Path(hub.local(given)) if given else Path(base.part(part) if base else "")
    if not folder.is_dir():
        raise ConfigError(f"--{part}: {str(folder)!r} is no folder")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"--{part}: {str(folder)!r} is a LoRA adapter; pack its base policy and train with "
            "--config.policy.lora_adapter, or export the run without --adapter"
        )
    return folder


def _given(args: argparse.Namespace, origin: Origin) -> parts.Facts:
    """What the command line says, and where the starts divide."""
    facts = parts.Facts()
    for name in (*NEEDED, *OF_LIBERO, "prompt_length", "temperature", "solver"):
        facts.add(f"--{name}", **{name: getattr(args, name)})
    if args.train_starts is None:
        facts.add(STARTS, train_starts=origin.train)
    if args.eval_starts is None:
        facts.add(STARTS, eval_starts=origin.eval)
    facts.add("--train_starts", train_starts=args.train_starts)
    facts.add("--eval_starts", eval_starts=args.eval_starts)
    known = libero_facts.told(origin.card)
    for name in NUMBERING:
        given = getattr(args, name)
        who, what = (STARTS, known.get(name)) if given is None else (f"--{name}", given)
        facts.add(who, **{name: what})
    facts.add("--horizon", horizon=args.horizon)
    facts.add("--ground_truth", ground_truth=args.ground_truth)
    return facts


def _add_base(facts: parts.Facts, base: World, args: argparse.Namespace) -> None:
    """Take what nobody told from another world, unless the part that it belongs to is replaced."""
    replaced = {name for part in BELONGS_TO if getattr(args, part) for name in BELONGS_TO[part]}
    card = base.card
    known = {name: parts.of_card(card).value(name) for name in (*NEEDED, *OF_LIBERO)}
    known |= {
        "prompt_length": card.policy.prompt_length,
        "temperature": card.policy.temperature,
        "solver": card.imagining.solver,
        "train_starts": card.starts.train,
        "eval_starts": card.starts.eval,
        "horizon": card.horizon,
        "ground_truth": card.ground_truth.name,
        **{name: getattr(card.ground_truth, name) for name in NUMBERING},
    }
    for name, value in known.items():
        if name not in facts.told and name not in replaced:
            facts.add("--base", **{name: value})


def _card(facts: parts.Facts, origin: Origin, policy: Path) -> Card:
    """Return the card, whose hashes are still to come.

    Raises:
        ConfigError: names all that nobody tells, or all that is out of its range.
    """
    is_libero = facts.value("ground_truth") == "libero"
    needed = [*NEEDED, "horizon", "ground_truth", "train_starts", "eval_starts"]
    needed += [*OF_LIBERO, "suite"] if is_libero else []
    parts.refuse(
        [f"--{name}: {HELP[name]}" for name in needed if facts.value(name) is None],
        "no file tells what these say, and --base does not for a part that is replaced; give them",
    )

    def value(name: str, default: Any = None) -> Any:
        known = facts.value(name)
        return default if known is None else known

    height, width = value("image_size")
    camera = Camera((height, width), tuple(value("crop", OF_LIBERO["crop"])))
    truth = GroundTruth(value("ground_truth"))
    if is_libero:
        truth = GroundTruth(
            "libero",
            suite=value("suite"),
            tasks=tuple(value("tasks", ())),
            extra_states=value("extra_states", False),
            oversample=value("oversample"),
            reflections=value("reflections"),
        )
    instructions = tuple(origin.source.instructions)
    card = Card(
        format=FORMAT,
        instructions=instructions,
        cameras=(camera,) * value("views"),
        chunk=value("chunk"),
        action_repeat=value("action_repeat", OF_LIBERO["action_repeat"]),
        horizon=value("horizon"),
        gripper=value("gripper"),
        ground_truth=truth,
        imagining=Imagining(value("steps"), value("eta"), value("solver", "ddim")),
        judging=Judging(value("success_frames"), value("judged_frames"), value("threshold")),
        policy=Policy(
            value("unnorm_key"),
            value("prompt_length") or _longest_prompt(policy, instructions),
            value("temperature", 1.0),
            value("keep_stop_token"),
        ),
        starts=Starts(origin.kind, tuple(value("train_starts")), tuple(value("eval_starts"))),
        sha256=dict.fromkeys((*PARTS, *[STARTS] * (origin.kind == "npy")), TO_COME),
    )
    return Card.from_json(card.to_json(), "what was told")


def _longest_prompt(policy: Path, instructions: Sequence[str]) -> int:
    with told_as_checkpoint_error("--policy"):
        tokenizer = PromptTokenizer(policy, ANY_LENGTH)
        return max(len(tokenizer.prompt_ids(text)) for text in instructions)


def _files(part: str, folder: Path) -> list[str]:
    """Return the names of the files that a run reads of a part, and its card."""
    if part in parts.MODELS:
        names = [CONFIG_FILE, "card.json", parts.weights_file(folder)]
    elif part == "policy":
        names = [path.name for path in folder.iterdir() if path.name[0] != "."]
    elif start_frames.is_packed(folder):
        names = [start_frames.IMAGES_FILE, start_frames.POSES_FILE]
        names += [start_frames.TASKS_FILE, start_frames.CARD_FILE]
    else:
        names = ["card.json", *(path.name for path in start_frames.episode_files(folder))]
    return sorted(name for name in names if (folder / name).is_file())


def _copy(source: Path, names: Sequence[str], out: Path, *, link: bool) -> None:
    for name in names:
        original = (source / name).resolve()
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.link(original, out / name)
        else:
            shutil.copyfile(original, out / name)


def _write_starts(origin: Origin, card: Card, out: Path) -> None:
    """Store first frames; the card says which are for what, and which states of what LIBERO."""
    starts = {"train_starts": card.starts.train, "eval_starts": card.starts.eval}
    told = libero_facts.told(origin.card)
    facts = starts | {"libero": told, start_frames.STATES: list(origin.states)}
    ids = np.arange(origin.source.num_starts, dtype=np.int64)
    pack_starts(origin.source, ids, out, **cards.card(**facts))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): cards.sha256(path) for path in files}


if __name__ == "__main__":
    run_tool(main)
