"""The order of the house (docs/architecture.md): by source, and by what `import` really loads."""

import ast
import subprocess
import sys

import pytest

from tests import house


def test_imports_are_allowed_when_read_from_the_source():
    assert not house.forbidden_imports()


def test_no_import_goes_upwards_or_in_a_circle():
    graph = house.import_graph()
    assert not house.upward_imports(graph)
    assert not house.circles(graph)


def test_circle_is_found_when_modules_import_one_another():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert house.circles(graph) == [["b", "c"]]


def test_upward_import_is_found_when_errors_import_the_loop():
    low, high = "evac_jax/errors.py", "evac_jax/train.py"
    assert house.upward_imports({low: {high}, high: {low}}) == [f"{low} imports {high}"]


def test_every_row_of_the_table_has_files_and_rows_stand_in_order():
    files = house.shipped_files()
    used = {house.layer_of(file) for file in files}
    assert used == set(house.LAYERS)
    assert [row.rank for row in house.LAYERS] == sorted(row.rank for row in house.LAYERS)


def test_root_holds_the_loop_alone():
    root = [file for file in house.python_files("evac_jax") if file.count("/") == 1]
    assert len(root) - 1 <= 16  # __init__ does not count


def test_public_names_are_used_by_more_than_tests():
    assert not house.dead_names()


def test_long_files_have_a_reason():
    assert set(house.long_files()) == set(house.LONG_FILES)


def test_tool_uses_one_framework_when_it_trains():
    for file in house.python_files("evac_jax/tools"):
        torch_side = any(house.under(n, ("torch", "evac_jax.evac")) for n in house.imports(file))
        names = ("jax", "flax", "optax", "algos")
        jax_side = any(house.under(name, names) for name in house.imports(file))
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
    ("evac_jax.telemetry.report", ("torch", "ray")),
    ("evac_jax.devices.found", ("torch", "ray")),
    (
        "evac_jax.train",
        (
            *("torch", "ray", "transformers", "jinja2"),
            *("evac_jax.sim", "evac_jax.evac.model", "evac_jax.serve"),
        ),
    ),
    ("evac_jax.serve.run", ("torch", "ray", "transformers", "evac_jax.sim")),
]
SIMULATOR_STEPS = [
    ("policies.spec", ("numpy", "jax", "torch")),
    ("evac_jax.sim.libero_worker", ("evac_jax.errors", "evac_jax.bridge", "torch", "libero")),
    ("evac_jax.bridge.protocol", ("jax", "algos", "torch")),
    ("evac_jax.sim.worker", ("jax", "algos", "torch")),
    ("evac_jax.sim.libero_pool", ("jax", "algos", "torch", "libero")),
    ("evac_jax.miniature.env", ("jax", "algos")),
    ("evac_jax.sim.env", ("jax", "algos", "evac_jax.config.schema", "transformers")),
    ("evac_jax.evac.diffusion_loss", ("jax", "algos")),
    ("evac_jax.tools.episodes.collect", ("jax", "algos")),
    ("evac_jax.tools.world_model.train", ("jax", "algos")),
    ("evac_jax.tools.reward.train", ("jax", "algos")),
    ("evac_jax.tools.world_model.train_pose_model", ("jax", "algos")),
]


@pytest.mark.parametrize("steps", [TRAINER_STEPS, SIMULATOR_STEPS], ids=["trainer", "simulator"])
def test_nothing_foreign_is_loaded_when_modules_are_imported(steps):
    lines = ["import importlib, sys", f"sys.path.insert(0, {str(house.ROOT)!r})"]
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


# Files that lay the mesh of a configuration over devices.
MESHES = (
    "evac_jax/devices/hosts.py",
    "evac_jax/tools/episodes/collect_libero.py",
    "evac_jax/tools/memory/compiler.py",
)


def test_mesh_is_named_in_one_file_when_arrays_are_placed():
    for file in house.python_files("policies", "algos", "evac_jax"):
        used = {n.attr for n in house.nodes(file) if isinstance(n, ast.Attribute)}
        used |= {name.rsplit(".", 1)[-1] for name in house.imports(file)}
        placed = used & {"PartitionSpec", "NamedSharding", "make_mesh"}
        if file in MESHES:
            placed -= {"make_mesh"}  # sharding.make_mesh, from the configured sizes
        assert not placed or file == "evac_jax/devices/sharding.py", f"{file} uses {sorted(placed)}"


def test_packages_import_nothing_when_they_are_named():
    for file in house.python_files("policies", "algos", "configs", "evac_jax"):
        if file.endswith("__init__.py"):
            assert not house.imports(file), f"{file} must stay light: every module beneath it pays"


def test_no_pickle_is_trusted_when_files_are_loaded():
    problems = []
    for file in house.python_files("policies", "algos", "evac_jax", "benchmarks"):
        for node in house.nodes(file):
            if not isinstance(node, ast.Call):
                continue
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            function = ast.unparse(node.func)
            if function == "torch.load" and options.get("weights_only") != "True":
                problems.append(f"{file}:{node.lineno}: torch.load without weights_only=True")
            if function == "np.load" and options.get("allow_pickle", "False") != "False":
                problems.append(f"{file}:{node.lineno}: np.load of pickles")
    assert not problems, "\n".join(problems)


def test_tree_of_unit_tests_mirrors_the_code():
    """test_<module>[_<what>].py lies where the module does, without evac_jax/ before it."""
    for test in (house.ROOT / "tests/unit").rglob("test_*.py"):
        folder = test.relative_to(house.ROOT / "tests/unit").parent
        places = [house.ROOT / top / folder for top in ("evac_jax", "", "tests")]
        tested = {folder.name} | {path.stem for place in places for path in place.glob("[!_]*.*")}
        name = test.stem.removeprefix("test_")
        assert any(name == of or name.startswith(f"{of}_") for of in tested - {""}), test
