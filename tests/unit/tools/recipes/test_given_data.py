import numpy as np
import pytest

from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.errors import ConfigError, DataError
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.episodes import collect
from evac_jax.tools.recipes import coevolve, given_data
from tests.unit.tools import tiny_recording


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    """The tiny world model, of which `tiny_recording` writes episodes."""
    return tiny_recording.write_model(tmp_path_factory.mktemp("model"))


def _recording(folder, name="given", **changes):
    return str(tiny_recording.write(folder / name, **changes))


def test_recordings_that_fit_pass(tmp_path, world_model):
    both = [_recording(tmp_path, name, seed=seed) for seed, name in enumerate("ab")]
    given_data.check(world_model, both, more_of_miniature=False)


def test_recordings_of_the_miniature_fit_those_that_the_rounds_add(tmp_path):
    collect.collect(tmp_path / "own", 24, {"expert": 1.0}, steps=8)
    shipped = coevolve.ROOT / MINIATURE_WEIGHTS / "world_model"
    given_data.check(shipped, [str(tmp_path / "own")], more_of_miniature=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"views": 2}, "given: the world model takes 1 view.* the episodes have 2 of 32x32"),
        ({"count": 1}, r"--data: expected .* at least 3 actions .*, the longest have \d and \d"),
        ({"lengths": (2,)}, "the longest have 2 and 2"),
    ],
)
def test_recordings_that_do_not_fit_the_world_model_are_refused(
    tmp_path, world_model, changes, told
):
    with pytest.raises(DataError, match=told):
        given_data.check(world_model, [_recording(tmp_path, **changes)], more_of_miniature=False)


def test_recordings_of_other_cameras_are_refused(tmp_path, world_model):
    first, other = (_recording(tmp_path, name) for name in ("a", "b"))
    with pytest.raises(DataError, match="a: its cameras are not those of the miniature"):
        given_data.check(world_model, [first], more_of_miniature=True)
    np.save(tmp_path / "b" / "c2w.npy", 2 * np.load(tmp_path / "b" / "c2w.npy"))
    with pytest.raises(DataError, match="b: its cameras are not those of .*/a; give"):
        given_data.check(world_model, [first, other], more_of_miniature=False)


def test_folder_without_a_world_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config.world_model.checkpoint: .* got '.*/none'"):
        given_data.check(tmp_path / "none", [_recording(tmp_path)], more_of_miniature=False)


def test_rounds_do_not_begin_when_a_folder_is_no_recording(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    argv = ["coevolve", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        run_tool(coevolve.main)
    assert ended.value.code == 2
    assert f"DataError: {tmp_path}/runs: not a recording" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
