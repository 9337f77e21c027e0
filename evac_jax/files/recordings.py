"""Episodes on disk: one `.npy` file per field and a data card; docs/episodes.md is the format.

The steps of all episodes lie one after another, so episodes may differ in length. `.npy` because it
can be mapped into memory: training reads a few frames of each episode at random. NumPy only, and
nothing is ever unpickled.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files import cards, libero_facts
from evac_jax.files.atomic import whole_folder
from evac_jax.files.held_out import is_held_out
from evac_jax.files.instructions import numbers_in
from evac_jax.files.meaning import check_actions, check_poses
from evac_jax.files.restricted_npy import load_array, map_array

CARD = "card.json"
ACTION_DIM, POSE_DIM = 7, 8

# Field -> type and shape; N episodes, F frames of all together, V views of H x W pixels.
PER_FRAME = {
    "frames": (np.uint8, "F V H W 3"),
    "actions": (np.float32, "F 7"),
    "poses": (np.float32, "F 8"),
    "success": (np.bool_, "F"),
}
PER_EPISODE = {
    "first": (np.int64, "N"),
    "length": (np.int64, "N"),
    "task": (np.int32, "N"),
    "source": (np.int32, "N"),
    "start": (np.int64, "N"),
    "held_out": (np.bool_, "N"),
}
# Few simulators and players tell these; a file is missing where it would say nothing.
OPTIONAL = {"objects": (np.float32, "F 3 3"), "intended": (np.float32, "F 7")}
OBJECTS = ("taken", "place", "alike")  # what a task moves, where to, and what looks like it
STORED = PER_FRAME | OPTIONAL | PER_EPISODE
SHARED = {"intrinsic": (np.float32, "V 3 3"), "c2w": (np.float32, "V 4 4")}


@dataclass(frozen=True)
class Episodes:
    """N recorded episodes; one of T actions has T + 1 frames. F frames in all.

    Attributes:
        frames: uint8 [F V H W 3]; action t of an episode is decided on its frame t.
        actions: as the environment executed them, float32 [F 7] in [-1, 1], gripper -1 opens and
            +1 closes; zero at an episode's last frame.
        poses: xyz (m), quaternion xyzw, gripper opening 0..1, float32 [F 8].
        success: task done in the frame, bool [F].
        first: row of an episode's first frame, int64 [N].
        length: actions of an episode, int64 [N].
        task: index into `instructions`, int32 [N].
        source: who played, index into `sources`, int32 [N].
        start: start id that a ground truth can be reset to, -1 = unknown, int64 [N].
        held_out: no training may see it, bool [N]; as the recorder said, else by hash of first
            frame and instruction; one scene is never on both sides.
        intrinsic: in pixels at the frames' size, float32 [V 3 3].
        c2w: camera to world, +Z forward, float32 [V 4 4]; cameras are at rest.
        objects: xyz (m) of `OBJECTS`, float32 [F 3 3], NaN where that is not known. It tells where
            to look in a picture; no policy and no world model sees it.
        intended: what the player would have done without its noise, as `actions`; NaN where that is
            not known. Policies learn it.
        card: the data card.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    success: np.ndarray
    first: np.ndarray
    length: np.ndarray
    task: np.ndarray
    source: np.ndarray
    start: np.ndarray
    held_out: np.ndarray
    intrinsic: np.ndarray
    c2w: np.ndarray
    objects: np.ndarray
    intended: np.ndarray
    card: dict = field(default_factory=dict)

    @property
    def num_episodes(self) -> int:
        """Episodes, N."""
        return len(self.first)

    @property
    def lessons(self) -> np.ndarray:
        """What a policy should learn to do, float32 [F 7]: `intended`, or `actions`."""
        return np.where(np.isnan(self.intended), self.actions, self.intended)

    @property
    def instructions(self) -> tuple[str, ...]:
        """What `task` points into."""
        return tuple(self.card["instructions"])

    @property
    def sources(self) -> tuple[str, ...]:
        """What `source` points into."""
        return tuple(self.card["sources"])

    @property
    def asked(self) -> tuple[str, ...]:
        """The instructions that occur in these episodes, each once, in the order of the card."""
        return tuple(dict.fromkeys(self.instructions[task] for task in np.unique(self.task)))

    def numbered_as(self, instructions: Sequence[str]) -> "Episodes":
        """Return the same episodes with `instructions` as the list that `task` points into.

        Raises:
            ConfigError: an instruction that occurs is not among them.
        """
        task = numbers_in(instructions, [self.instructions[t] for t in self.task], "the list")
        card = self.card | {"instructions": list(instructions)}
        return dataclasses.replace(self, task=task, card=card)

    def select(self, which: np.ndarray | slice) -> "Episodes":
        """Return the episodes of numbers, a mask or a slice; frames are shared, not copied."""
        chosen = {name: getattr(self, name)[which] for name in PER_EPISODE}
        return dataclasses.replace(self, **chosen)

    def split(self) -> tuple["Episodes", "Episodes"]:
        """Return training and held-out episodes."""
        return self.select(~self.held_out), self.select(self.held_out)

    def both_parts(self) -> tuple["Episodes", "Episodes"]:
        """`split`, for what trains on the one part and is judged on the other.

        Raises:
            DataError: one of them is empty.
        """
        training, held_out = self.split()
        if not (training.num_episodes and held_out.num_episodes):
            raise DataError(
                f"{training.num_episodes} training and {held_out.num_episodes} held-out episodes; "
                "both are needed: record more"
            )
        return training, held_out

    def rows(self, episodes: np.ndarray | int, steps: np.ndarray) -> np.ndarray:
        """Return the flat rows of frame `steps` of `episodes`; the two are broadcast.

        Raises:
            DataError: a step outside of its episode.
        """
        episodes, steps = np.broadcast_arrays(episodes, steps)
        if (steps < 0).any() or (steps > self.length[episodes]).any():
            raise DataError("a frame outside of its episode was asked for")
        return self.first[episodes] + steps

    def stacked(self, name: str, steps: int | None = None) -> np.ndarray:
        """Return a per-frame field as [N T+1 ...], T = `steps` or the common length.

        Raises:
            DataError: episodes differ in length, or are shorter than `steps`.
        """
        lengths = np.unique(self.length)
        if steps is None:
            if len(lengths) > 1:
                raise DataError(
                    f"expected episodes of one length, got {lengths[0]}..{lengths[-1]} actions; "
                    "say how many steps of each are wanted"
                )
            steps = int(lengths[0]) if len(lengths) else 0
        return getattr(self, name)[
            self.rows(np.arange(self.num_episodes)[:, None], np.arange(steps + 1))
        ]

    def success_once(self) -> np.ndarray:
        """Return which episodes were successful in at least one frame, bool [N]."""
        total = np.concatenate(([0], np.cumsum(self.success)))
        return total[self.first + self.length + 1] > total[self.first]


def load(*folders: str | Path) -> Episodes:
    """Return the episodes of one folder, mapped into memory, or of several, copied into it.

    Instructions and sources of several folders are merged by their text.

    Raises:
        DataError: a file is missing or damaged, or the folders do not fit together.
    """
    if not folders:
        raise DataError("expected at least one folder of episodes, got none")
    parts = [_load_one(Path(folder)) for folder in folders]
    return parts[0] if len(parts) == 1 else _join(parts, folders)


def verify(folder: str | Path) -> None:
    """Compare every file of a recording with the hash in its card.

    Raises:
        DataError: names the files that differ.
    """
    folder = Path(folder)
    told = _read_card(folder)["sha256"]
    found = digests(folder)
    if changed := sorted(name for name in found if told.get(name) != found[name]):
        raise DataError(f"{folder}: {', '.join(changed)} changed since the recording; record anew")


class EpisodeWriter:
    """Writes a recording, episode by episode; it appears under its name when it is complete.

    Args:
        out: new folder.
        image_shape: (V, H, W, 3).
        instructions, sources: texts that `task` and `source` of the episodes point into.
        intrinsic, c2w: [V 3 3] and [V 4 4].
        facts: more entries of the data card, JSON values.

    Raises:
        DataError: `out` exists, or an episode does not fit.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        image_shape: tuple[int, int, int, int],
        instructions: list[str] | tuple[str, ...],
        sources: list[str] | tuple[str, ...],
        intrinsic: np.ndarray,
        c2w: np.ndarray,
        facts: dict[str, Any],
    ):
        self._out = Path(out)
        if self._out.exists():
            raise DataError(f"{self._out} exists; choose another folder or remove it")
        self._folder = contextlib.ExitStack()
        self._partial = self._folder.enter_context(whole_folder(self._out))
        self._partial.mkdir()
        self._image_shape = tuple(image_shape)
        self._card: dict[str, Any] = {
            **facts,
            "instructions": list(instructions),
            "sources": list(sources),
        }
        views = self._image_shape[0]
        self._shared = {
            "intrinsic": np.asarray(intrinsic, np.float32).reshape(views, 3, 3),
            "c2w": np.asarray(c2w, np.float32).reshape(views, 4, 4),
        }
        # Frames go to disk as they come; the header, which holds their number, is written last.
        self._frames = (self._partial / "frames.raw").open("wb")
        self._count = 0
        self._parts: dict[str, list] = {n: [] for n in STORED if n != "frames"}

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._frames.close()
            self._folder.__exit__(kind, error, trace)

    def add(
        self,
        *,
        frames: np.ndarray,
        actions: np.ndarray,
        poses: np.ndarray,
        success: np.ndarray,
        task: int,
        source: int,
        start: int = -1,
        held_out: bool | None = None,
        objects: np.ndarray | None = None,
        intended: np.ndarray | None = None,
    ) -> None:
        """Append one episode of T actions: frames [T+1 V H W 3], actions and intended [T 7], poses
        [T+1 8], success [T+1], objects [T+1 3 3]; see `Episodes`. `held_out` None: by hash.
        """  # noqa: D205
        steps, where = len(actions), f"{self._out}: episode {len(self._parts['first'])}"
        frames, poses = np.asarray(frames), np.asarray(poses, np.float32)
        objects = _unknown("objects", steps + 1) if objects is None else objects
        intended = _unknown("intended", steps) if intended is None else intended
        shapes = {
            "frames": (frames.shape, (steps + 1, *self._image_shape)),
            "actions": (np.shape(actions), (steps, ACTION_DIM)),
            "poses": (poses.shape, (steps + 1, POSE_DIM)),
            "success": (np.shape(success), (steps + 1,)),
            "objects": (np.shape(objects), (steps + 1, len(OBJECTS), 3)),
            "intended": (np.shape(intended), (steps, ACTION_DIM)),
        }
        wrong = [f"{n}: expected {b}, got {a}" for n, (a, b) in shapes.items() if a != b]
        if frames.dtype != np.uint8:
            wrong.append(f"frames: expected uint8, got {frames.dtype}")
        for name, index in (("instructions", task), ("sources", source)):
            if not 0 <= index < len(self._card[name]):
                wrong.append(f"{name}: there are {len(self._card[name])}, got index {index}")
        if wrong:
            raise DataError(f"{where}: {'; '.join(wrong)}")
        check_poses(poses, where)
        check_actions(np.asarray(actions), where)
        if held_out is None:
            held_out = is_held_out(frames[0], self._card["instructions"][task])
        self._frames.write(np.ascontiguousarray(frames).data)
        values = {
            "actions": np.concatenate((np.asarray(actions), np.zeros((1, ACTION_DIM)))),
            "poses": poses,
            "success": np.asarray(success, np.bool_),
            "objects": objects,
            "intended": np.concatenate((intended, _unknown("intended", 1))),
            "first": self._count,
            "length": steps,
            "task": task,
            "source": source,
            "start": start,
            "held_out": held_out,
        }
        for name, value in values.items():
            self._parts[name].append(value)
        self._count += steps + 1

    def close(self) -> None:
        """Write headers, hashes and the data card; give the folder its name.

        Raises:
            DataError: no episode was added.
        """
        with self._folder:
            self._finish()

    def _finish(self) -> None:
        self._frames.close()
        if not self._count:
            raise DataError(f"{self._out}: there is no episode to write")
        arrays: dict[str, np.ndarray] = {
            name: np.concatenate(self._parts[name]).astype(dtype)
            for name, (dtype, _) in (PER_FRAME | OPTIONAL).items()
            if name != "frames"
        }
        arrays = {n: a for n, a in arrays.items() if n not in OPTIONAL or not np.isnan(a).all()}
        arrays |= {n: np.array(self._parts[n], dtype) for n, (dtype, _) in PER_EPISODE.items()}
        for name, array in (arrays | self._shared).items():
            np.save(self._partial / f"{name}.npy", array, allow_pickle=False)
        self._add_header(self._partial / "frames.raw", self._partial / "frames.npy")
        once = np.logical_or.reduceat(arrays["success"], arrays["first"])
        card = self._card
        for index, source in enumerate(card["sources"]):
            mine = once[arrays["source"] == index]
            card.setdefault("episodes", {})[source] = len(mine)
            card.setdefault("success_once", {})[source] = float(mine.mean()) if len(mine) else 0.0
        card["sha256"] = digests(self._partial)
        (self._partial / CARD).write_text(json.dumps(card, indent=2) + "\n")

    def _add_header(self, raw: Path, npy: Path) -> None:
        facts = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._image_shape)}
        with npy.open("wb") as out, raw.open("rb") as frames:
            np.lib.format.write_array_header_1_0(out, facts)
            shutil.copyfileobj(frames, out, 1 << 24)
        raw.unlink()


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every array file in `folder`, by name."""
    return {path.name: cards.sha256(path) for path in sorted(folder.glob("*.npy"))}


def _read_card(folder: Path) -> dict:
    try:
        card = json.loads((folder / CARD).read_text())
        wanted = {"instructions": list, "sources": list, "sha256": dict}
        missing = [n for n, kind in wanted.items() if not isinstance(card.get(n), kind)]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder}: not a recording ({error}); docs/episodes.md tells how"
        ) from error
    if missing:
        raise DataError(f"{folder}/{CARD} lacks {', '.join(missing)}")
    return card


def _load_one(folder: Path) -> Episodes:
    card, arrays, problems = _read_card(folder), {}, []
    sizes: dict[str, int] = {"3": 3, "7": 7, "8": 8, "4": 4}
    for name, (dtype, axes) in (STORED | SHARED).items():
        path = folder / f"{name}.npy"
        if name in OPTIONAL and not path.exists():
            continue
        try:
            array = (map_array if name == "frames" else load_array)(path)  # frames fill memories
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        names = axes.split()
        fits = array.dtype == dtype and array.ndim == len(names)
        if fits:
            fits = all(sizes.setdefault(a, n) == n for a, n in zip(names, array.shape, strict=True))
        if not fits:
            found = f"{array.dtype} {list(array.shape)}"
            problems.append(f"{name}: expected {np.dtype(dtype)} [{axes}], got {found}")
        arrays[name] = array
    if not problems:
        ends = arrays["first"] + arrays["length"] + 1
        if (arrays["length"] < 0).any() or (arrays["first"] < 0).any() or (ends > sizes["F"]).any():
            problems.append("first and length point outside of the frames")
        for name, texts in (("task", "instructions"), ("source", "sources")):
            if ((arrays[name] < 0) | (arrays[name] >= len(card[texts]))).any():
                problems.append(f"{name}: points outside of the {len(card[texts])} {texts}")
    if problems:
        raise DataError(f"{folder}: not a complete recording: {'; '.join(problems)}")
    check_poses(arrays["poses"], f"{folder}: poses")
    check_actions(arrays["actions"], str(folder))
    return Episodes(**{n: _unknown(n, sizes["F"]) for n in OPTIONAL} | arrays, card=card)


def _unknown(name: str, frames: int) -> np.ndarray:
    dtype, axes = OPTIONAL[name]
    return np.full((frames, *map(int, axes.split()[1:])), np.nan, dtype)


def _join(parts: list[Episodes], folders: tuple) -> Episodes:
    one = parts[0]
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        cameras = all(np.array_equal(getattr(one, n), getattr(part, n)) for n in SHARED)
        if part.frames.shape[1:] != one.frames.shape[1:] or not cameras:
            raise DataError(
                f"{folder}: frames {part.frames.shape[1:]} or cameras differ from those of "
                f"{folders[0]}, {one.frames.shape[1:]}; record both alike"
            )
    joined = {n: np.concatenate([getattr(p, n) for p in parts]) for n in STORED}
    offsets = np.cumsum([0, *(len(p.success) for p in parts[:-1])])
    counts = [p.num_episodes for p in parts]
    joined["first"] = joined["first"] + np.repeat(offsets, counts)
    card: dict[str, Any] = {"joined": [part.card for part in parts]}
    for name, texts in (("task", "instructions"), ("source", "sources")):
        merged = list(dict.fromkeys(text for part in parts for text in part.card[texts]))
        maps = [np.array([merged.index(t) for t in p.card[texts]], np.int32) for p in parts]
        pairs = zip(maps, parts, strict=True)
        joined[name] = np.concatenate([m[getattr(p, name)] for m, p in pairs])
        card[texts] = merged
    card["sha256"] = {"joined": [part.card["sha256"] for part in parts]}
    card["libero"] = libero_facts.common([part.card for part in parts])
    return dataclasses.replace(one, **joined, card=card)
