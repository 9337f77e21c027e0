"""A world: one folder with all that a policy is trained in, and a card that says what it is.

    world.json   world_model/   reward/   pose_model/   policy/   starts/

`tools.world.pack` makes one. `--config.world=DIR` fills every field of the configuration that the
folder knows. A value comes from the last of these that names it: default of the schema, preset,
world, flag. What the parts were trained for is no matter of taste: `problems` tells what
contradicts it.
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from evac_jax.config import hub
from evac_jax.config.fields import Kind, hints
from evac_jax.config.libero import LiberoConfig, Suite
from evac_jax.config.schema import LIBERO_SMALL_WEIGHTS
from evac_jax.errors import ConfigError, DataError, nearest
from policies.ranges import Count, CountOrZero, Positive, Range, Share

CARD_FILE, FORMAT = "world.json", 1
PARTS = ("world_model", "reward", "pose_model", "policy")
STARTS = "starts"  # a part where they lie in the folder
# Fields that name the parts.
PATHS = (
    *("world_model.checkpoint", "reward.checkpoint", "env.pose_model", "policy.checkpoint"),
    "env.initial_states_path",
)
# Fields of `libero` on which the meaning of frames and actions depends, as `libero_facts.ALIKE`.
ALIKE = ("image_size", "crop", "oversample", "reflections", "action_repeat")
SHOWN = 5  # names in a message
Size = Annotated[int, Range(8)]
High = Annotated[int, Range(-1)]


@dataclass(frozen=True)
class Camera:
    """One view of a frame.

    Attributes:
        size: height and width, pixels.
        crop: left, right, top and bottom end of what it shows of the camera's picture, as shares.
    """

    size: tuple[Size, Size]
    crop: tuple[Share, Share, Share, Share] = (0.0, 1.0, 0.0, 1.0)


@dataclass(frozen=True)
class GroundTruth:
    """Where policies can be evaluated for real.

    Attributes:
        name: as of `eval.ground_truth`; "none" where no program can play it, as with a robot.
        suite, tasks, extra_states, oversample, reflections: of LIBERO, as of the same fields of
            `libero`. The rest of its settings is the camera's and `action_repeat`.
    """

    name: Literal["miniature", "libero", "none"]
    suite: Suite = "libero_spatial"
    tasks: tuple[CountOrZero, ...] = ()
    extra_states: bool = False
    oversample: Annotated[int, Range(0, 8)] = 0
    reflections: bool = True


@dataclass(frozen=True)
class Imagining:
    """How the world model is sampled, in training as when the classifier was made."""

    steps: Count
    eta: Share
    solver: Literal["ddim", "dpm++", "unipc"] = "ddim"


@dataclass(frozen=True)
class Judging:
    """What the classifier was calibrated for; as of the fields of `reward`."""

    success_frames: Count
    judged_frames: CountOrZero
    threshold: Annotated[float, Range(0, 1, open="low")] = 0.5


@dataclass(frozen=True)
class Policy:
    """How the start policy is read and sampled; `prompt_length` is `policy.max_prompt_length`."""

    unnorm_key: str
    prompt_length: Count
    temperature: Positive = 1.0
    keep_stop_token: bool = False


@dataclass(frozen=True)
class Starts:
    """Where episodes begin.

    Attributes:
        source: as of `env.initial_states`: "npy" for the folder starts/, "miniature" for the
            built-in scenes.
        train, eval: [low, high) ranges of start ids; high -1 = up to the last one.
    """

    source: Literal["npy", "miniature"]
    train: tuple[CountOrZero, High]
    eval: tuple[CountOrZero, High]


@dataclass(frozen=True)
class Card:
    """What world.json says.

    Attributes:
        format: of this file.
        instructions: tasks that the starts ask for.
        cameras: one for each view of a frame, all of one size.
        chunk: actions that are decided and imagined at once.
        action_repeat: how often each action of the policy is played.
        horizon: actions of an episode, a multiple of the chunk.
        gripper: what the policy's gripper entry means; as of `env.gripper`.
        ground_truth, imagining, judging, policy, starts: see their classes.
        sha256: {part: {file: hash}} of every file of the parts.
    """

    format: Literal[1]
    instructions: tuple[str, ...]
    cameras: tuple[Camera, ...]
    chunk: Count
    action_repeat: Count
    horizon: Count
    gripper: Literal["libero", "binary", "none"]
    ground_truth: GroundTruth
    imagining: Imagining
    judging: Judging
    policy: Policy
    starts: Starts
    sha256: dict[str, dict[str, str]]

    def to_json(self) -> str:
        """Return the text of the file."""
        values = dataclasses.asdict(self)
        if self.ground_truth.name != "libero":
            values["ground_truth"] = {"name": self.ground_truth.name}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Card":
        """Read the text of the file.

        Args:
            where: path of the file, for messages.

        Raises:
            ConfigError: names everything that is wrong with it.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{where}: expected JSON ({error}); pack the world again") from error
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise ConfigError(
                f"{where}: has format {values['format']!r}, this version reads {FORMAT}; update "
                "evac_jax, or pack the world again with this version"
            )
        problems: list[str] = []
        card: Card | None = _read(cls, values, "", problems)
        if card is not None:
            problems += card.problems()
        if card is None or problems:
            told = "\n".join(f"  {problem.removeprefix('config.')}" for problem in problems)
            raise ConfigError(f"{where} is not a world's card:\n{told}")
        return card

    def problems(self) -> list[str]:
        """Return what does not fit together within the card."""
        found = []
        if not self.instructions or not self.cameras:
            found.append("instructions, cameras: expected at least one of each")
        if len({camera.size for camera in self.cameras}) > 1:
            found.append("cameras: expected views of one size")
        if self.horizon % self.chunk:
            found.append(
                f"horizon: expected a multiple of the chunk of {self.chunk}, got {self.horizon}"
            )
        if self.ground_truth.name == "libero" and self.cameras:
            (height, width), views = self.cameras[0].size, len(self.cameras)
            if height != width or views > 1:
                found.append(
                    f"cameras: LIBERO shows one square view, got {views} of {height} x {width}"
                )
        expected = {*PARTS, *[STARTS] * (self.starts.source == "npy")}
        if set(self.sha256) != expected:
            found.append(f"sha256: expected {sorted(expected)}, got {sorted(self.sha256)}")
        for part, files in self.sha256.items():
            if not files:
                found.append(f"sha256.{part}: expected files, got none")
            for name, digest in files.items():
                pure = PurePosixPath(name)
                inside = name and not pure.is_absolute() and ".." not in pure.parts
                if not (inside and re.fullmatch("[0-9a-f]{64}", digest)):
                    found.append(f"sha256.{part}: expected files and hashes, got {name!r}")
        return found


def _read(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """Return a dataclass from JSON values; None, and lines in `problems`, if it cannot be."""
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.') or 'the file'}: expected an object, got {values!r}")
        return None
    declared, before = hints(cls), len(problems)
    problems += [
        f"{prefix}{key}: unknown.{nearest(key, declared)}" for key in values if key not in declared
    ]
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        path, hint = prefix + field.name, declared[field.name]
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                problems.append(f"{path}: missing")
            continue
        arguments[field.name] = _value(hint, values[field.name], path, problems)
    return cls(**arguments) if len(problems) == before else None


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read(hint, value, f"{path}.", problems)
    inner = typing.get_args(hint)[:1]
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(inner[0]):
        entries = value if isinstance(value, list) else [value]
        kind = typing.cast(type, inner[0])
        return tuple(_read(kind, entry, f"{path}.", problems) for entry in entries)
    if typing.get_origin(hint) is dict:
        sound = isinstance(value, dict) and all(
            isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
            for files in value.values()
        )
        if not sound:
            problems.append(f"{path}: expected {{part: {{file: hash}}}}, got {value!r}")
        return value
    kind, before = Kind.of(hint), len(problems)
    converted = kind.convert(value, path, problems)
    if len(problems) == before:
        problems += kind.problems(converted, path)
    return converted


class Bound(NamedTuple):
    """A field whose value the parts were made for.

    Attributes:
        field: of the configuration.
        parts: fields that name those parts; the bond ends where none of them names the world's.
    """

    field: str
    parts: tuple[str, ...]


_SEEN = ("world_model.checkpoint", "policy.checkpoint")
BOUND = (
    Bound("env.gripper", ("policy.checkpoint",)),
    Bound("reward.success_frames", ("reward.checkpoint",)),
    Bound("reward.judged_frames", ("reward.checkpoint",)),
    *(Bound(f"libero.{name}", _SEEN) for name in ALIKE),
)


@dataclass(frozen=True)
class World:
    """A world's folder.

    Attributes:
        root: its path, or its address on the Hugging Face Hub with the commit.
        card: what its world.json says.
    """

    root: str
    card: Card

    @classmethod
    def read(cls, text: str) -> "World":
        """Read the card of a folder or an address; nothing else is downloaded or hashed.

        Raises:
            ConfigError: it is no world, its card is wrong, files of it are missing, or some are
                there that are not its own.
            DataError: an address cannot be had.
        """
        if hub.is_address(text):
            hub.parse(text)  # of the world itself: with the card's name behind it, any text fits
            return _from_hub(f"{text.rstrip('/')}/{CARD_FILE}")
        if gone := absent(text):
            raise ConfigError(gone)
        path = Path(text).expanduser() / CARD_FILE
        world = cls(str(path.parent), Card.from_json(path.read_bytes(), str(path)))
        if differences := world.misplaced():
            more = len(differences) - SHOWN
            told = differences[:SHOWN] + ([f"... and {more} more"] if more > 0 else [])
            raise ConfigError(
                f"config.world: {text!r} is not the folder that its {CARD_FILE} describes:\n  "
                + "\n  ".join(told)
            )
        return world

    def part(self, name: str) -> str:
        """Return the path or address of a part; "" if the folder has none of this name."""
        return f"{self.root}/{name}" if name in self.card.sha256 else ""

    def misplaced(self) -> list[str]:
        """Return which files are missing, are not in the card, or lie outside of the folder."""
        root = Path(self.root)
        home, found = hub.home_of(root), []
        for part, files in self.card.sha256.items():
            there = [path for path in (root / part).rglob("*") if not path.is_dir()]
            names = {path.relative_to(root / part).as_posix(): path for path in there}
            found += [
                f"{part}/{name}: missing"
                for name in sorted(files)
                if not (root / part / name).is_file()
            ]
            found += [f"{part}/{name}: not in the card" for name in sorted(set(names) - set(files))]
            found += [
                f"{part}/{name}: a link out of the folder, to {path.resolve()}"
                for name, path in sorted(names.items())
                if not path.resolve().is_relative_to(home)
            ]
        return found

    def settings(self) -> dict[str, Any]:
        """Return {field: value} of every field that a world knows; of all worlds the same ones."""
        card, libero = self.card, LiberoConfig()
        truth = dataclasses.asdict(card.ground_truth)
        if truth.pop("name") == "libero":
            libero = LiberoConfig(
                **truth,
                image_size=card.cameras[0].size[0],
                crop=card.cameras[0].crop,
                action_repeat=card.action_repeat,
            )
        known = ("suite", "tasks", "extra_states", *ALIKE)
        return {
            "policy.checkpoint": self.part("policy"),
            "policy.unnorm_key": card.policy.unnorm_key,
            "policy.max_prompt_length": card.policy.prompt_length,
            "policy.temperature": card.policy.temperature,
            "policy.keep_stop_token": card.policy.keep_stop_token,
            "world_model.checkpoint": self.part("world_model"),
            "world_model.steps": card.imagining.steps,
            "world_model.eta": card.imagining.eta,
            "world_model.solver": card.imagining.solver,
            "reward.checkpoint": self.part("reward"),
            "reward.success_frames": card.judging.success_frames,
            "reward.judged_frames": card.judging.judged_frames,
            "reward.threshold": card.judging.threshold,
            "env.pose_model": self.part("pose_model"),
            "env.gripper": card.gripper,
            "env.max_episode_steps": card.horizon,
            "env.initial_states": card.starts.source,
            "env.initial_states_path": self.part(STARTS),
            "env.train_starts": card.starts.train,
            "eval.starts": card.starts.eval,
            "eval.ground_truth": card.ground_truth.name,
            **{f"libero.{name}": getattr(libero, name) for name in known},
        }


def absent(text: str) -> str:
    """Return why a folder is no world, and how one is made; "" if it is, or lies on the Hub."""
    folder = Path(text).expanduser()
    if hub.is_address(text) or (folder / CARD_FILE).is_file():
        return ""
    if folder.is_file():
        return f"config.world: expected a folder, got the file {text!r}; name the folder with it"
    how = "world.pack` makes one (docs/own_simulator.md)"
    if text == LIBERO_SMALL_WEIGHTS:
        how = "recipes.libero_small --ship` makes it, in hours (docs/libero_small.md)"
    what = f"{text!r} is no world's folder, as it has no {CARD_FILE}"
    return f"config.world: {what}; `python -m evac_jax.tools.{how}"


@functools.cache  # a branch may move on, and a process trains in one world
def _from_hub(address: str) -> World:
    path = hub.local(address)
    root = hub.address_of(path).removesuffix(f"/{CARD_FILE}")
    return World(root, Card.from_json(Path(path).read_bytes(), address))


def fill(config: Any, given: Collection[str] = ()) -> None:
    """Set every field of a ConfigDict that its `world` knows, except for those that a flag gave.

    Args:
        config: of a preset; `world` names the folder.
        given: "section.field" of the flags.

    Raises:
        ConfigError, DataError: see `World.read`.
    """
    world = World.read(config.world)
    config.world = world.root
    for name, value in world.settings().items():
        if name not in given:
            section, field = name.split(".")
            config[section][field] = value


def problems(config: Any) -> list[str]:
    """Return one line for every field that contradicts what the parts of its world were made for.

    A part that the configuration takes from elsewhere is not bound to the world's values.

    Args:
        config: a `TrainConfig`.
    """

    def value(field: str) -> Any:
        return attrgetter(field)(config)

    if not config.world:
        return []
    try:
        world = World.read(config.world)
    except (ConfigError, DataError) as error:
        return [str(error)]
    expected, found = world.settings(), []
    plays_libero = {config.eval.ground_truth, world.card.ground_truth.name} == {"libero"}
    for field, parts in BOUND:
        own = [name for name in parts if _same_place(value(name), expected[name])]
        bound = own and (plays_libero or not field.startswith("libero."))
        if bound and value(field) != expected[field]:
            found.append(
                f"config.{field}: {own[0].replace('.checkpoint', '')} of the world {world.root} "
                f"was made for {expected[field]!r}, got {value(field)!r}; leave this flag out, "
                f"name another --config.{own[0]}, or unbind all with --config.world="
            )
    return found


def _same_place(one: str, other: str) -> bool:
    """Whether two paths or addresses name the same folder."""
    return hub.address_of(hub.absolute(one)) == hub.address_of(hub.absolute(other))
