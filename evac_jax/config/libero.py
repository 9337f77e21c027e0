"""Settings of LIBERO (MuJoCo) as the ground truth, and what it needs; used by JAX and PyTorch."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from evac_jax.config.libero_files import PACKAGES, LiberoFiles, instruction_of, packages
from evac_jax.errors import ConfigError
from policies.ranges import Count, CountOrZero, Range, Share

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
# Actions of an episode, by suite. Source: moojink/openvla-oft, run_libero_eval.py (213c5ff).
MAX_STEPS: dict[Suite, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# Fields whose other values depart from the official protocol.
PROTOCOL = (
    *("tasks", "extra_states", "image_size", "crop", "oversample", "reflections"),
    *("action_repeat", "max_steps", "wait_steps", "seed"),
)


@dataclass(frozen=True)
class LiberoConfig:
    """LIBERO as ground truth (`eval.ground_truth = "libero"`); docs/libero.md has the protocol.

    Attributes:
        suite: which set of tasks of the benchmark.
        tasks: numbers of the suite's tasks that are played, from 0 in the benchmark's order; () =
            all. Start ids count these alone: id % number of tasks.
        extra_states: after the initial states of the benchmark, number the others that LIBERO made
            and left out, from its `.init` files: policies can be trained in these, and evaluated in
            all of the benchmark's.
        root: folder libero/libero of a checkout of LIBERO, with its assets; "" = the package that
            `libero.python` has installed.
        states: folder of the initial states, <suite>/<task>.pruned_init or .pruned_init.npz; "" =
            those that come with LIBERO.
        python: interpreter that has LIBERO installed; "" = the one that runs evac_jax.
        renderer: "egl" (GPU, or software by Mesa) or "osmesa" (software); MuJoCo's MUJOCO_GL.
        image_size: height and width of the camera frames, pixels.
        crop: left, right, top and bottom end of the part of the camera's picture that is seen, as
            shares of it; squeezed into a square.
        oversample: draw frames this many times as large, without multisampling, and average: half
            the time without a GPU; 0 = as LIBERO itself draws.
        reflections: draw what shiny things mirror. Without it drawing takes half the time, as
            MuJoCo draws all of a scene a second time for one mirror.
        action_repeat: how often each action of the policy is played; 2 = the policy acts at 10 Hz.
        max_steps: actions of an episode; 0 = the usual number of the suite, divided by
            `action_repeat`.
        wait_steps: actions without motion before an episode begins, while objects settle.
        seed: seed of LIBERO's random numbers at a reset; the number of the initial state is added.
        camera: the camera that is written to recordings: "true", the real one, or "reference", the
            fixed one with which the public EVAC weights were trained.
    """

    suite: Suite = "libero_spatial"
    tasks: tuple[CountOrZero, ...] = ()
    extra_states: bool = False
    root: str = ""
    states: str = ""
    python: str = ""
    renderer: Literal["egl", "osmesa"] = "egl"
    image_size: Annotated[int, Range(8)] = 256
    crop: tuple[Share, Share, Share, Share] = (0.0, 1.0, 0.0, 1.0)
    oversample: Annotated[int, Range(0, 8)] = 0
    reflections: bool = True
    action_repeat: Count = 1
    max_steps: CountOrZero = 0
    wait_steps: CountOrZero = 10
    seed: CountOrZero = 0
    camera: Literal["true", "reference"] = "true"

    def __post_init__(self):
        for name in ("crop", "tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list when it was JSON

    @property
    def episode_steps(self) -> int:
        """The policy's actions of an episode."""
        return self.max_steps or -(-MAX_STEPS[self.suite] // self.action_repeat)

    @property
    def files(self) -> LiberoFiles:
        """Where LIBERO's files lie.

        Raises:
            ConfigError: nowhere.
        """
        return LiberoFiles.find(self.root, self.states, self.python)

    @property
    def instructions(self) -> list[str]:
        """Instructions of the tasks that are played.

        Raises:
            ConfigError: LIBERO's table of tasks cannot be read.
        """
        names = self.files.tasks(self.suite)
        return [instruction_of(names[number]) for number in self.tasks or range(len(names))]

    @property
    def departures(self) -> list[str]:
        """What departs from the official protocol, in words; [] where nothing does."""
        official = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in PROTOCOL if getattr(self, name) != official[name]]
        return [f"{name} {getattr(self, name)} instead of {official[name]}" for name in changed]

    @property
    def notes(self) -> tuple[str, ...]:
        """The departures as a sentence for tables and logs; () where there are none."""
        told = "; ".join(self.departures)
        return (f"LIBERO is not played by the official protocol: {told}",) if told else ()

    def facts(self) -> dict[str, Any]:
        """Return what results and recordings depend on, as plain values for a card or a table."""
        names = ("suite", "episode_steps", *PROTOCOL)
        facts = {name: getattr(self, name) for name in names if name != "max_steps"}
        return facts | {"departures": self.departures or "none: the official protocol"}


def problems(config: LiberoConfig) -> list[str]:
    """Return which files and packages of LIBERO are missing, [] if there are none."""
    found = _missing_packages(config)
    left, right, top, bottom = config.crop
    if not (left < right and top < bottom):
        found.append(
            f"config.libero.crop: expected left < right and top < bottom, got {config.crop}"
        )
    if config.camera == "reference" and config.crop != (0.0, 1.0, 0.0, 1.0):
        found.append(
            "config.libero.camera: the reference's camera sees the whole picture; with "
            f"libero.crop {config.crop} set it to 'true'"
        )
    try:
        found += config.files.problems(config.suite, config.extra_states) or _unknown_tasks(config)
    except ConfigError as error:
        found.append(str(error))
    return list(dict.fromkeys(found))


def _unknown_tasks(config: LiberoConfig) -> list[str]:
    known, tasks = len(config.files.tasks(config.suite)), config.tasks
    if len(set(tasks)) == len(tasks) and all(task < known for task in tasks):
        return []
    return [f"config.libero.tasks: expected different numbers of {config.suite}'s tasks, "
            f"0..{known - 1}, got {tasks}"]  # fmt: skip


def _missing_packages(config: LiberoConfig) -> list[str]:
    try:
        missing = [name for name in PACKAGES if name not in packages(config.python)]
    except ConfigError as error:
        return [str(error)]
    if not missing:
        return []
    who = f"{config.python!r} has" if config.python else "this Python has"
    return [
        f"config.libero.python: {who} no {', '.join(missing)}; `make libero` makes an environment "
        "with them, whose interpreter is .venv-libero/bin/python"
    ]
