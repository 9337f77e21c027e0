"""`python -m tests.house`: the order of the house, measured from the source.

Prints the modules of every package, each file over 450 lines with its reason and each function over
80 lines, and ends with one line of figures. `LAYERS` is the one table of who may import what;
tests/unit/test_house.py holds figures and table.
"""

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SHIPPED = ("policies", "algos", "evac_jax", "configs")
SOURCES = (*SHIPPED, "benchmarks", "examples", "tests")
MAX_LINES, MAX_FUNCTION_LINES = 450, 80
# File -> why it is longer.
LONG_FILES = {
    "tests/parity/rl_ops.py": "a table with one short entry per kind of golden vector",
    "tests/parity/openvla.py": "a table with one short entry per kind of golden vector",
}

TORCH = ("torch", "torchvision", "diffusers", "open_clip", "numpy", "safetensors", "absl")
JAX = ("jax", "flax", "optax", "numpy", "absl")
PLAIN = ("evac_jax.errors", "policies.spec", "evac_jax.config.import_string")
LIBERO = ("evac_jax.config.libero", "evac_jax.config.libero_files")
SIMULATOR = (*PLAIN, *LIBERO, "evac_jax.config.vlm", "evac_jax.files", "evac_jax.bridge")


class Layer(NamedTuple):
    """One row: files, and all that they may import besides the standard library and each other.

    Attributes:
        files: pattern of paths. The first row that fits a file decides.
        outside: packages of others.
        inside: packages and modules of ours; all stand in higher rows of the table.
        rank: rows of equal rank are one layer and may import one another.
    """

    rank: int
    files: str
    outside: tuple[str, ...]
    inside: tuple[str, ...] = ()


# The lowest layer comes first; an import from a lower into a higher one is upward, and an error.
LAYERS = (
    Layer(0, "evac_jax/errors.py", ()),
    Layer(
        1,
        "policies/*",
        ("jax", "flax", "chex", "numpy", "jaxtyping", "tokenizers", "safetensors", "PIL"),
    ),
    Layer(
        *(2, "algos/*", ("jax", "flax", "optax", "chex", "numpy", "jaxtyping")),
        ("policies.types", "policies.ranges"),
    ),
    # Plain settings that the simulators' side reads as well, without JAX behind them.
    Layer(3, "evac_jax/config/libero*.py", (), ("evac_jax.errors", "policies.ranges")),
    Layer(3, "evac_jax/config/vlm.py", (), ("policies.ranges",)),
    Layer(3, "evac_jax/config/import_string.py", (), ("evac_jax.errors",)),
    Layer(3, "evac_jax/config/hub.py", ("absl", "huggingface_hub"), ("evac_jax.errors",)),
    Layer(
        *(3, "evac_jax/config/*", ("absl", "ml_collections")),
        ("evac_jax.errors", "algos", "policies.ranges"),
    ),
    Layer(4, "evac_jax/files/*", ("numpy", "absl"), ("evac_jax.errors",)),
    Layer(
        5,
        "evac_jax/telemetry/*",
        (
            *("jax", "numpy", "jaxtyping", "absl", "rich", "av", "PIL", "tensorboard", "wandb"),
            "jinja2",
        ),
        ("evac_jax.errors", "evac_jax.config", "evac_jax.files"),
    ),
    Layer(
        *(6, "evac_jax/devices/*", ("jax", "numpy", "absl")),
        ("evac_jax.errors", "evac_jax.config", "algos.types"),
    ),
    # The two files in which torch and JAX meet, for DLPack only.
    Layer(7, "evac_jax/bridge/client.py", ("jax", "torch", "numpy", "absl"), PLAIN),
    Layer(7, "evac_jax/bridge/exchange.py", ("jax", "torch", "numpy"), PLAIN),
    Layer(
        *(7, "evac_jax/bridge/*", ("torch", "numpy", "absl")),
        (*PLAIN, "evac_jax.devices.malloc"),
    ),
    Layer(8, "evac_jax/evac/*", TORCH, (*PLAIN, "evac_jax.files")),
    # Runs in the interpreter that has LIBERO, which may have no torch.
    Layer(9, "evac_jax/sim/libero_worker.py", ("numpy", "mujoco", "libero")),
    Layer(9, "evac_jax/sim/libero_picture.py", ("numpy", "mujoco")),
    # The only file that may load a model of transformers.
    Layer(9, "evac_jax/sim/vlm.py", (*TORCH, "transformers"), (*SIMULATOR, "evac_jax.evac")),
    Layer(9, "evac_jax/sim/*", TORCH, (*SIMULATOR, "evac_jax.evac")),
    # Plain sizes of the miniature's networks, those of the policy among them.
    Layer(
        10,
        "evac_jax/miniature/sizes.py",
        (),
        ("evac_jax.evac.config", "policies.openvla_oft.config"),
    ),
    Layer(
        10,
        "evac_jax/libero_small/*",
        (),
        ("evac_jax.evac.config", "evac_jax.miniature.sizes", "policies.openvla_oft.config"),
    ),
    Layer(10, "evac_jax/miniature/*", TORCH, (*SIMULATOR, "evac_jax.evac", "evac_jax.sim")),
    # In Ray's driver; its trainers are processes like any other.
    Layer(
        *(11, "evac_jax/ray_cluster.py", ("ray", "absl")),
        ("evac_jax.errors", "evac_jax.config", "evac_jax.devices"),
    ),
    # Simulators are reached through the bridge, as processes. What a world model's sizes are, its
    # config.json tells anyone; what the miniature's tasks are, a table does.
    Layer(
        11,
        "evac_jax/*.py",
        (*JAX, "jaxtyping", "chex", "orbax", "ml_collections"),
        (
            *("evac_jax.errors", "policies", "algos", "evac_jax.config", "evac_jax.files"),
            *("evac_jax.telemetry", "evac_jax.devices", "evac_jax.bridge", "evac_jax.evac.config"),
            "evac_jax.miniature.tasks",
        ),
    ),
    Layer(
        *(11, "evac_jax/memory/*", ("jax", "flax", "absl")),
        ("evac_jax", "algos", "policies"),
    ),
    # RLinf's files are composed by what RLinf composes them with.
    Layer(
        *(12, "evac_jax/tools/hub/from_rlinf.py", ("hydra", "omegaconf", "yaml")),
        ("evac_jax.config", "evac_jax.errors", "evac_jax.tools"),
    ),
    # Tools serve either side; none that trains imports both torch and JAX.
    Layer(
        12,
        "evac_jax/tools/*",
        (*TORCH, *JAX, "PIL", "pyarrow", "h5py", "huggingface_hub"),
        ("evac_jax", "algos", "policies"),
    ),
    # Robots reach the policy through it; nothing that trains may need it.
    Layer(
        *(13, "evac_jax/serve/*", (*JAX, "jaxtyping", "websockets", "msgpack")),
        (
            *("evac_jax.errors", "evac_jax.config", "evac_jax.devices", "evac_jax.checkpoint"),
            *("evac_jax.policy_import", "evac_jax.shapes", "evac_jax.tools.policy.export"),
            "policies",
        ),
    ),
    Layer(14, "configs/*", ("ml_collections",), ("evac_jax.config", "evac_jax.errors")),
    Layer(15, "launch.py", ("absl", "ml_collections"), ("evac_jax", "configs")),
)


class Definition(NamedTuple):
    """A name that a module defines at its top level, or a method of its classes."""

    file: str
    name: str
    line: int
    is_method: bool


def python_files(*folders: str) -> list[str]:
    """Return the paths of all Python files below `folders`, relative to the root."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


def shipped_files() -> list[str]:
    """Return the files that a user runs."""
    return [*python_files(*SHIPPED), "launch.py"]


def module_of(file: str) -> str:
    """Return the dotted name of a file."""
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@functools.cache
def nodes(file: str) -> tuple[ast.AST, ...]:
    """Return every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse((ROOT / file).read_text())))


@functools.cache
def imports(file: str) -> frozenset[str]:
    """Return dotted names of all that a file imports, in functions and under guards too."""
    names = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}:{node.lineno}: relative import; write the whole name")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(n for n in names if n.split(".")[0] not in sys.stdlib_module_names)


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def layer_of(file: str) -> Layer | None:
    """Return the first row of `LAYERS` that fits a file."""
    return next((layer for layer in LAYERS if _fits(file, layer.files)), None)


def _fits(file: str, pattern: str) -> bool:
    """Whether a path is `pattern`: "a/*" is all below a, "a/*.py" only the files in a itself."""
    if pattern.endswith("/*"):
        return file.startswith(pattern[:-1])
    return PurePosixPath(file).match(pattern)


def _file_of(name: str) -> str | None:
    """Return our file that a dotted name, or the part before its last dot, stands for."""
    for module in (name, name.rpartition(".")[0]):
        path = module.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if module and (ROOT / file).is_file():
                return file
    return None


def import_graph() -> dict[str, set[str]]:
    """Return {file: files of ours that it imports}, of the shipped files."""
    files = shipped_files()
    return {
        file: {found for name in imports(file) if (found := _file_of(name)) in files} - {file}
        for file in files
    }


def forbidden_imports() -> list[str]:
    """Return "file imports name" for every import that the table does not allow."""
    problems = []
    for file in shipped_files():
        layer = layer_of(file)
        if layer is None:
            problems.append(f"{file} belongs to no layer; add a row to LAYERS in tests/house.py")
            continue
        own = {row.files for row in LAYERS if row.rank == layer.rank}
        for name in sorted(imports(file)):
            target = _file_of(name)
            inner = target is not None and any(_fits(target, pattern) for pattern in own)
            if not (inner or under(name, (*layer.outside, *layer.inside))):
                problems.append(f"{file} (layer {layer.files}) imports {name}")
    return problems


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return "file imports file" for every import into a higher layer."""
    ranks = {file: layer.rank if (layer := layer_of(file)) else -1 for file in graph}
    return [
        f"{file} imports {other}"
        for file, others in sorted(graph.items())
        for other in sorted(others)
        if ranks[other] > ranks[file]
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of files that import one another, directly or by others."""
    reach = {file: set(others) for file, others in graph.items()}
    for middle in graph:  # Warshall's transitive closure
        for file in graph:
            if middle in reach[file]:
                reach[file] |= reach[middle]
    groups = {
        tuple(sorted(o for o in reach[file] if file in reach[o]))
        for file in graph
        if file in reach[file]
    }
    return [list(group) for group in sorted(groups)]


def long_files() -> dict[str, int]:
    """Return {file: lines} of all files over `MAX_LINES`."""
    counts = {
        file: len((ROOT / file).read_text().splitlines())
        for file in [*python_files(*SOURCES), "launch.py"]
    }
    return {file: count for file, count in counts.items() if count > MAX_LINES}


def function_lengths() -> dict[str, int]:
    """Return {"file:function": lines} of every function outside tests."""
    return {
        f"{file}:{node.name}": node.end_lineno - node.lineno + 1
        for file in [*shipped_files(), *python_files("benchmarks")]
        for node in nodes(file)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _definitions(file: str) -> Iterator[Definition]:
    """Yield the public names of a file: functions, classes, constants, and methods of classes."""
    tree = ast.parse((ROOT / file).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield Definition(file, node.name, node.lineno, False)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n for target in targets for n in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield Definition(file, name.id, node.lineno, False)
        if isinstance(node, ast.ClassDef) and not node.bases:
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield Definition(file, part.name, part.lineno, True)


@functools.cache
def _uses(file: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return names that a file loads, attributes that it reads, and "module.name"s it imports."""
    loaded, attributes = set(), set()
    for node in nodes(file):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            loaded.add(node.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\S+", str(node.value)):
            words = set(re.findall(r"[A-Za-z_]\w*", str(node.value)))  # prose has spaces
            attributes |= words  # "module:name", getattr
            loaded |= words  # annotations in quotes
    return frozenset(loaded), frozenset(attributes), imports(file)


def dead_names() -> list[str]:
    """Return "file:line name" of public names that nothing but tests uses.

    A name is used where its own file reads it, where another file (benchmarks count) imports it or
    reads an attribute of that name, and where a string names it ("module:name").
    """
    users = [*shipped_files(), *python_files("benchmarks")]
    imported = frozenset().union(*(_uses(file)[2] for file in users))
    attributes = frozenset().union(*(_uses(file)[1] for file in users))
    dead = []
    for file in shipped_files():
        for found in _definitions(file):
            if found.name.startswith("_") or found.name in ("main", "get_config", "forward"):
                continue
            used = found.name in attributes
            if not found.is_method:
                used |= found.name in _uses(file)[0]
                used |= f"{module_of(file)}.{found.name}" in imported
            if not used:
                dead.append(f"{file}:{found.line} {found.name}")
    return dead


def main() -> None:
    """Print the house and its figures."""
    packages = defaultdict(list)
    for file in shipped_files():
        folder, _, name = file.rpartition("/")
        if name != "__init__.py":
            packages[folder or "."].append(name.removesuffix(".py"))
    for folder, names in sorted(packages.items()):
        print(f"{folder:32} {len(names):3}  {' '.join(names)}")
    graph, long = import_graph(), long_files()
    rings, upward, dead = circles(graph), upward_imports(graph), dead_names()
    lengths = function_lengths()
    lines = [f"{n} lines: {file} ({LONG_FILES.get(file, 'no reason')})" for file, n in long.items()]
    lines += [f"{n} lines: {f}" for f, n in lengths.items() if n > MAX_FUNCTION_LINES]
    lines += [f"circle: {' '.join(ring)}" for ring in rings]
    lines += [f"upward: {line}" for line in upward] + [f"dead: {line}" for line in dead]
    print("\n".join(["", *lines, ""]))
    print(
        f"modules={sum(map(len, packages.values()))} root_modules={len(packages['evac_jax'])} "
        f"circles={len(rings)} upward={len(upward)} over_450={len(long)} "
        f"longest_function={max(lengths.values())} dead={len(dead)}"
    )


if __name__ == "__main__":
    main()
