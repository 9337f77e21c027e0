"""The matrix of faults that `benchmarks.faults` tries: which process fails, where, and how."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where a phase of the trainer is, and which call of it: the third iteration's, where there is one.
TRAINER = {
    "start": ("evac_jax.learner:Learner.__init__", 1),
    "reset": ("evac_jax.simulators:Simulators.send_reset", 5),
    "step": ("evac_jax.simulators:Simulators.send_step", 9),
    "update": ("evac_jax.learner:Learner.start_update", 3),
    "evaluation": ("evac_jax.evaluate:Evaluators.run", 2),
    "save": ("evac_jax.checkpoint:Checkpoints.save", 3),
}
SIMULATOR = {
    "start": ("evac_jax.bridge.server:build_environments", 1),
    "reset": ("evac_jax.sim.env:WorldModelEnv.reset", 3),
    "step": ("evac_jax.sim.env:WorldModelEnv.step", 6),
    "evaluation": ("evac_jax.sim.env:WorldModelEnv.step", 1),
}
GROUND_TRUTH = {
    "start": ("evac_jax.bridge.server:build_environments", 1),
    "reset": ("evac_jax.miniature.env:GroundTruthEnv.reset", 2),
    "step": ("evac_jax.miniature.env:GroundTruthEnv.step", 3),
}


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: process-phase-fault.
        fault: what `fault_hook` reads, without the stamp; None = a damaged checkpoint.
        hosts: trainers of the run.
        disk: the run's folder lies on a small disk of its own.
        damage: changes the newest checkpoint's folder.
        harmless: the run goes on by itself and ends with status 0.
        settings: more of the configuration, as flags without "--config.".
    """

    name: str
    fault: dict[str, Any] | None = None
    hosts: int = 1
    disk: bool = False
    damage: Callable[[Path], None] | None = None
    harmless: bool = False
    settings: tuple[str, ...] = ()


# --- damaged checkpoints --------------------------------------------------------------------------


def _largest(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _cut(step: Path) -> None:
    path = _largest(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zeros(step: Path) -> None:
    path = _largest(step)
    path.write_bytes(bytes(path.stat().st_size))


def _gone(step: Path) -> None:
    _largest(step).unlink()


def _metadata(step: Path) -> None:
    for path in step.rglob("_METADATA"):
        path.write_text("{")


def _empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _meta(step: Path) -> None:
    for path in (step / "meta").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0")


DAMAGES = {
    "cut": _cut, "zeros": _zeros, "gone": _gone, "metadata": _metadata, "empty": _empty,
    "meta": _meta,
}  # fmt: skip


def cases() -> list[Case]:
    """Return the whole matrix."""
    found = []

    def add(role: str, phase: str, do: str, place: tuple[str, int], **more: Any) -> None:
        flags = more.pop("flags", ())
        fault = {"role": role, "at": place[0], "call": place[1], "do": do, "flags": flags}
        where = "host1" if flags else role
        found.append(Case(f"{where}-{phase}-{do.partition(':')[0]}", fault, **more))

    for phase, place in TRAINER.items():
        for do in ("kill", "error"):
            add("trainer", phase, do, place)
    for role, places in (("simulator", SIMULATOR), ("ground_truth", GROUND_TRUTH)):
        for phase, place in places.items():
            for do in ("kill", "error"):
                add(role, phase, do, place)
        add(role, "step", "stop", places["step"])
    for phase in ("update", "save"):
        fault = dict(zip(("at", "call"), TRAINER[phase], strict=True))
        fault |= {"role": "trainer", "do": "kill:simulator"}
        found.append(Case(f"simulator-{phase}-kill", fault))
    for do in ("kill", "stop"):
        fault = dict(zip(("at", "call"), TRAINER["step"], strict=True))
        fault |= {"role": "trainer", "do": f"{do}:simulator"}
        again = {"harmless": True, "settings": ("simulator.restarts=1",)}
        found.append(Case(f"simulator-step-{do}-restarts", fault, **again))
    for phase in ("step", "update", "save"):
        flags = ("--config.cluster.node=1",)
        add("trainer", phase, "kill", TRAINER[phase], hosts=2, flags=flags)
    add("trainer", "update", "stop", TRAINER["update"], hosts=2, flags=("--config.cluster.node=1",))
    add("trainer", "update", "term", TRAINER["update"])
    add("trainer", "step", "memory", TRAINER["step"])
    add("simulator", "step", "memory", SIMULATOR["step"])
    add("trainer", "update", "clock", TRAINER["update"], harmless=True)
    for do in ("fill", "readonly"):
        add("trainer", "update", do, TRAINER["update"], disk=True)
    add("trainer", "update", "remove", TRAINER["update"])
    found += [Case(f"checkpoint-{name}", damage=damage) for name, damage in DAMAGES.items()]
    return found
