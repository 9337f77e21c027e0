"""Who may import what (docs/architecture.md), by syntax tree and by what `import` really loads."""

import ast
import functools
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 450
# Tables with one short entry per kind of golden vector; cutting them would only hide entries.
LONG_TABLES = ("tests/parity/rl_ops.py", "tests/parity/openvla.py")
SOURCES = ("policies", "algos", "configs", "evac_jax", "benchmarks", "tests")

TORCH_SIDE = ("torch", "torchvision", "diffusers", "open_clip", "numpy", "safetensors", "absl")
SIMULATOR = (
    "evac_jax.evac",
    "evac_jax.sim",
    "evac_jax.miniature",
    "evac_jax.bridge",
    "evac_jax.dataset",
    "evac_jax.errors",
    "evac_jax.libero_config",  # plain settings, for both sides
    "policies.spec",
)
# What the rules below are about; a file that is moved away must not take its rule with it.
REQUIRED = {
    "policies": "spec types base openvla_oft/model openvla_oft/import_hf openvla_oft/export_hf",
    "algos": "types advantages losses metrics grpo ppo update optim",
    "configs": "common grpo ppo",
    "evac_jax": "config sharding train rollout learner evaluate checkpoint report twin errors",
    "evac_jax/telemetry": "writers progress video",
    "evac_jax/bridge": "slots protocol client server",
    "evac_jax/evac": "unet attention conditioning resampler image_tower autoencoder schedule "
    "sampler model checkpoint",
    "evac_jax/sim": "env initial_states actions reward worker base",
    "evac_jax/miniature": "scene render tasks expert env",
    "evac_jax/tools": "collect train_world_model train_reward train_action_model train_policy "
    "validate_world_model",
}
TRAINER = ("jax", "flax", "optax", "numpy", "absl")

# File pattern -> everything outside the standard library that such a file may import, by prefix.
# The first pattern that matches a file counts; a file without one fails the test.
LAYERS = {
    "policies/*": (
        *("jax", "flax", "chex", "numpy", "jaxtyping", "tokenizers", "safetensors", "PIL"),
        "policies",
    ),
    "algos/*": ("jax", "flax", "optax", "chex", "numpy", "jaxtyping", "algos", "policies.types"),
    "configs/*": (
        "ml_collections",
        "evac_jax.config",
        "evac_jax.config_checks",
        "evac_jax.errors",
        "configs",
    ),
    "launch.py": ("absl", "ml_collections", "evac_jax"),
    "evac_jax/evac/*": (*TORCH_SIDE, "evac_jax.evac", "evac_jax.errors", "policies.spec"),
    # Plain sizes of the miniature's networks, those of the policy among them; no JAX behind it.
    "evac_jax/miniature/sizes.py": ("evac_jax.evac.config", "policies.openvla_oft.config"),
    # Runs in the interpreter that has LIBERO, which may have no torch.
    "evac_jax/sim/libero_worker.py": ("numpy", "libero"),
    "evac_jax/libero_config.py": (),
    "evac_jax/sim/*": (*TORCH_SIDE, *SIMULATOR),
    "evac_jax/miniature/*": (*TORCH_SIDE, *SIMULATOR),
    # The two files in which torch and JAX meet, for DLPack only.
    "evac_jax/bridge/client.py": ("jax", "torch", "numpy", "evac_jax.bridge", "evac_jax.errors"),
    "evac_jax/bridge/exchange.py": ("jax", "torch", "numpy", "evac_jax.bridge", "evac_jax.errors"),
    "evac_jax/bridge/*": (
        *("torch", "numpy", "absl"),
        *("evac_jax.bridge", "evac_jax.errors", "evac_jax.sim.base", "policies.spec"),
    ),
    # Tools serve either side; see the test below.
    "evac_jax/tools/*": (
        *TORCH_SIDE,
        *TRAINER,
        "PIL",
        "matplotlib",
        "pyarrow",
        "evac_jax",
        "policies",
    ),
    "evac_jax/telemetry/*": (
        *("jax", "numpy", "jaxtyping", "absl", "rich", "av", "PIL", "tensorboard", "wandb"),
        *("evac_jax.telemetry", "evac_jax.config", "evac_jax.errors"),
    ),
    # In Ray's driver; its trainers are processes like any other.
    "evac_jax/ray_cluster.py": ("ray", "absl", "evac_jax"),
    "evac_jax/*.py": (
        *(*TRAINER, "jaxtyping", "chex", "orbax", "ml_collections"),
        *("algos", "policies", "evac_jax"),
    ),
}
# Taken from the last rule: simulators are reached through the bridge, as processes. What a world
# model's sizes are, its config.json tells anyone.
TRAINER_NEVER = ("evac_jax.evac", "evac_jax.sim", "evac_jax.miniature", "evac_jax.tools")
TRAINER_MAY = ("evac_jax.evac.config",)


def _python_files(*folders: str) -> list[str]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


@functools.cache
def _nodes(file: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse((ROOT / file).read_text())))


@functools.cache
def _imports(file: str) -> frozenset[str]:
    """Dotted names of everything a file imports, also inside functions, own names included."""
    names = set()
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(n for n in names if n.split(".")[0] not in sys.stdlib_module_names)


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_modules_are_where_the_rules_expect_them():
    files = [f"{folder}/{name}.py" for folder, names in REQUIRED.items() for name in names.split()]
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert not missing


def test_imports_are_allowed_when_read_from_the_source():
    problems = []
    for file in [*_python_files("policies", "algos", "configs", "evac_jax"), "launch.py"]:
        layer = next((pattern for pattern in LAYERS if fnmatch(file, pattern)), None)
        if layer is None:
            problems.append(f"{file} belongs to no layer; add it to LAYERS")
            continue
        wrong = {name for name in _imports(file) if not _under(name, LAYERS[layer])}
        if layer == "evac_jax/*.py":
            foreign = {name for name in _imports(file) if _under(name, TRAINER_NEVER)}
            wrong |= {name for name in foreign if not _under(name, TRAINER_MAY)}
        problems += [f"{file} (layer {layer}) imports {name}" for name in sorted(wrong)]
    assert not problems, "\n".join(problems)


def test_tool_uses_one_framework_when_it_trains():
    for file in _python_files("evac_jax/tools"):
        torch_side = any(_under(name, ("torch", "evac_jax.evac")) for name in _imports(file))
        jax_side = any(_under(n, ("jax", "flax", "optax", "algos")) for n in _imports(file))
        assert not (torch_side and jax_side), file


# Imported one after another in one fresh process; after each step none of these may be loaded.
TRAINER_STEPS = [
    ("policies.spec", ("numpy", "jax", "torch")),
    ("policies.types", ("algos", "evac_jax", "torch", "transformers")),
    ("policies.openvla_oft.model", ("algos", "evac_jax", "torch", "transformers")),
    ("policies.openvla_oft.import_hf", ("algos", "evac_jax", "torch", "transformers")),
    ("policies.openvla_oft.export_hf", ("algos", "evac_jax", "torch", "transformers")),
    ("algos.grpo", ("evac_jax", "torch", "transformers")),
    ("algos.ppo", ("evac_jax", "torch", "transformers")),
    ("launch", ("torch", "ray", "transformers", "evac_jax.train", "evac_jax.sim")),
    ("evac_jax.telemetry.writers", ("torch", "ray", "wandb", "tensorboard")),
    ("tensorboard.summary.writer.event_file_writer", ("torch", "tensorflow")),
    ("wandb", ("torch", "tensorflow")),
    ("evac_jax.report", ("torch", "ray")),
    ("evac_jax.train", ("torch", "ray", "transformers", "evac_jax.sim", "evac_jax.evac.model")),
]
SIMULATOR_STEPS = [
    ("policies.spec", ("numpy", "jax", "torch")),
    ("evac_jax.sim.libero_worker", ("evac_jax.errors", "evac_jax.bridge", "torch", "libero")),
    ("evac_jax.bridge.protocol", ("jax", "algos", "torch")),
    ("evac_jax.sim.worker", ("jax", "algos", "torch")),
    ("evac_jax.sim.libero_pool", ("jax", "algos", "torch", "libero")),
    ("evac_jax.miniature.env", ("jax", "algos")),
    ("evac_jax.sim.env", ("jax", "algos", "evac_jax.config")),
    ("evac_jax.evac.training", ("jax", "algos")),
    ("evac_jax.tools.collect", ("jax", "algos")),
    ("evac_jax.tools.train_world_model", ("jax", "algos")),
    ("evac_jax.tools.train_reward", ("jax", "algos")),
    ("evac_jax.tools.train_action_model", ("jax", "algos")),
]


@pytest.mark.parametrize("steps", [TRAINER_STEPS, SIMULATOR_STEPS], ids=["trainer", "simulator"])
def test_nothing_foreign_is_loaded_when_modules_are_imported(steps):
    lines = ["import importlib, sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    for module, never in steps:
        lines += [
            f"importlib.import_module({module!r})",
            f"loaded = [name for name in {never!r} if name in sys.modules]",
            f"assert not loaded, f'import {module} loads {{loaded}}'",
        ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_mesh_is_named_in_one_file_when_arrays_are_placed():
    for file in _python_files("policies", "algos", "evac_jax"):
        used = {n.attr for n in _nodes(file) if isinstance(n, ast.Attribute)}
        used |= {name.rsplit(".", 1)[-1] for name in _imports(file)}
        placed = used & {"PartitionSpec", "NamedSharding", "make_mesh"}
        if file in ("evac_jax/cluster.py", "evac_jax/tools/collect_libero.py"):
            placed -= {"make_mesh"}  # sharding.make_mesh, from the configured sizes
        assert not placed or file == "evac_jax/sharding.py", f"{file} uses {sorted(placed)}"


def test_packages_import_nothing_when_they_are_named():
    for file in _python_files("policies", "algos", "configs", "evac_jax"):
        if file.endswith("__init__.py"):
            assert not _imports(file), f"{file} must stay light: every module beneath it pays"


def test_no_pickle_is_trusted_when_files_are_loaded():
    problems = []
    for file in _python_files("policies", "algos", "evac_jax", "benchmarks"):
        for node in _nodes(file):
            if not isinstance(node, ast.Call):
                continue
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            function = ast.unparse(node.func)
            if function == "torch.load" and options.get("weights_only") != "True":
                problems.append(f"{file}:{node.lineno}: torch.load without weights_only=True")
            if function == "np.load" and options.get("allow_pickle", "False") != "False":
                problems.append(f"{file}:{node.lineno}: np.load of pickles")
    assert not problems, "\n".join(problems)


def test_files_stay_short_when_counted_in_lines():
    counts = {
        file: len((ROOT / file).read_text().splitlines())
        for file in [*_python_files(*SOURCES), "launch.py"]
    }
    long = {
        file: count
        for file, count in counts.items()
        if count > MAX_LINES and file not in LONG_TABLES
    }
    assert not long, f"over {MAX_LINES} lines; cut them where their ideas part: {long}"
