"""Settings of LIBERO (MuJoCo) as the ground truth, and what it needs; used by JAX and PyTorch."""

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from policies.ranges import CountOrZero, Range

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
# Actions of an episode, by suite. Source: moojink/openvla-oft, run_libero_eval.py (213c5ff).
MAX_STEPS: dict[Suite, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
PACKAGES = ("libero", "robosuite", "mujoco", "bddl")
_TOLD = "docs/libero.md tells what to install and to fetch"


@dataclass(frozen=True)
class LiberoConfig:
    """LIBERO as ground truth (`eval.ground_truth = "libero"`); docs/libero.md has the protocol.

    Attributes:
        suite: which set of tasks of the benchmark.
        root: folder that holds LIBERO's `assets` and `bddl_files`.
        states: folder of <suite>.npz, made by evac_jax.tools.episodes.import_libero_states.
        python: interpreter that has LIBERO installed; "" = the one that runs evac_jax.
        renderer: "egl" (GPU, or software by Mesa) or "osmesa" (software); MuJoCo's MUJOCO_GL.
        image_size: height and width of the camera frames, pixels.
        max_steps: actions of an episode; 0 = the usual number of the suite.
        wait_steps: actions without motion before an episode begins, while objects settle.
        seed: seed of LIBERO's random numbers at a reset; the number of the initial state is added.
        camera: the camera that is written to recordings: "true", the real one, or "reference", the
            fixed one with which the public EVAC weights were trained.
    """

    suite: Suite = "libero_spatial"
    root: str = ""
    states: str = ""
    python: str = ""
    renderer: Literal["egl", "osmesa"] = "egl"
    image_size: Annotated[int, Range(8)] = 256
    max_steps: CountOrZero = 0
    wait_steps: CountOrZero = 10
    seed: CountOrZero = 0
    camera: Literal["true", "reference"] = "true"

    @property
    def episode_steps(self) -> int:
        """Actions of an episode."""
        return self.max_steps or MAX_STEPS[self.suite]

    @property
    def states_file(self) -> Path:
        """The suite's initial states."""
        return Path(self.states) / f"{self.suite}.npz"


def problems(config: LiberoConfig) -> list[str]:
    """Return which files and packages of LIBERO are missing, [] if there are none."""
    return _missing_files(config) + _missing_packages(config)


def _missing_files(config: LiberoConfig) -> list[str]:
    found = []
    if not config.root:
        found.append(
            "config.libero.root: needed, the folder that holds LIBERO's assets and bddl_files "
            f"(libero/libero of its repository); {_TOLD}"
        )
    else:
        for name in ("assets", f"bddl_files/{config.suite}"):
            if not (Path(config.root) / name).is_dir():
                found.append(f"config.libero.root: {config.root!r} has no folder {name!r}; {_TOLD}")
    if not (config.states and config.states_file.is_file()):
        where = f"{str(config.states_file)!r} does not exist" if config.states else "needed"
        found.append(
            f"config.libero.states: {where}; make the folder once by python -m "
            "evac_jax.tools.episodes.import_libero_states --root LIBERO_ROOT --out FOLDER"
        )
    return found


def _missing_packages(config: LiberoConfig) -> list[str]:
    """Look for the packages without importing them; a command asks another interpreter."""
    if not config.python:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        who = "this Python has"
    else:
        who = f"{config.python!r} has"
        code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util."
        code += "find_spec(n) is None))"
        try:
            done = subprocess.run(
                [config.python, "-c", code, *PACKAGES],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return [f"config.libero.python: {config.python!r} cannot be run: {error}"]
        missing = done.stdout.split()
    if not missing:
        return []
    return [
        f"config.libero.python: {who} no {', '.join(missing)}; make an environment with "
        "requirements-libero.txt (its first lines say how) and name its interpreter here"
    ]
