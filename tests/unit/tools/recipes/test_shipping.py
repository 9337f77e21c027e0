"""Every recipe: its stages fit together, and its commands exist."""

import re
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from evac_jax.config.flags import check_flags
from evac_jax.errors import DataError
from evac_jax.tools.recipes import libero_small, miniature, shipping
from evac_jax.tools.recipes.stages import check
from evac_jax.tools.world_model import options

RECIPES = [pytest.param(recipe, id=recipe.__name__) for recipe in (miniature, libero_small)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_names_every_recording_and_weight_that_a_command_reads(recipe):
    stages = recipe.make_stages()
    check(stages)
    names = {stage.name for stage in stages}
    for stage in stages:
        used = set(re.findall(r"\{work\}/(\w+)", " ".join(stage.command))) & names
        assert used - {stage.name} == set(stage.inputs), stage.name


def _options(tool: str) -> set[str]:
    """Options in the source of a tool and of the modules beside it that hold options."""
    path = Path(shipping.__file__).parents[3] / tool.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    beside = (path.with_name(name) for name in ("options.py", "calibration.py"))
    source = "".join(file.read_text() for file in (path, *beside) if file.is_file())
    shared = re.findall(r"parser\.add_(device|threads|seed|image_size)\(", source)
    return {*re.findall(r"\"--([\w-]+)\"", source), *shared}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_flag_of_the_recipe_exists(recipe):
    for stage in recipe.make_stages():
        command = stage.command
        if command[1] == "torch.distributed.run":
            module, *rest = command[command.index("--") + 1 :]
            ours = torchrun.parse_args(command[2:])
            assert (ours.training_script, ours.training_script_args) == (module, rest)
            command = ("-m", module, *rest)
        if command[0] == "launch.py":
            check_flags(command[1:])
        else:
            used = {part.split("=")[0][2:] for part in command if part.startswith("--")}
            assert used <= _options(command[1]), stage.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_world_models_are_told_what_goes_together(recipe):
    tool = "evac_jax.tools.world_model.train"
    commands = [stage.command for stage in recipe.make_stages() if tool in stage.command]
    trained = [options.parse(list(words[words.index(tool) + 1 :])) for words in commands]
    assert trained
    assert all(Path(args.out).name.startswith("world_model") for args in trained)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_makes_what_is_shipped_and_scored(recipe):
    stages, told = recipe.make_stages(), recipe.recipe()
    made = {stage.output for stage in stages}
    assert {source.split("/")[0] for source in told.shipped.values()} <= made
    assert set(told.scored) <= made
    assert stages[-1].name == "world"


def test_existing_folder_is_not_replaced_by_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(shipping.signal, "signal", lambda *_: None)
    (tmp_path / "mine").mkdir()
    arguments = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "mine")]
    with pytest.raises(DataError, match="--out: .*mine exists"):
        shipping.run(miniature.recipe(), arguments)
    assert not (tmp_path / "work").exists()
