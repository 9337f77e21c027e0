from pathlib import Path

import pytest

from evac_jax.config.flags import read_preset
from evac_jax.config.presets import differences


def test_only_what_differs_is_told_with_both_values():
    preset = {"seed": 0, "optim": {"lr": 1e-4, "betas": (0.9, 0.999)}, "log": {"run": ""}}
    config = {"seed": 0, "optim": {"lr": 3e-4, "betas": [0.9, 0.999]}, "log": {"run": "x"}}
    assert differences(preset, config) == {"optim.lr": [1e-4, 3e-4], "log.run": ["", "x"]}


def test_path_is_the_same_when_it_is_spelled_otherwise():
    here = str(Path("weights/a").absolute())
    preset = {"reward": {"checkpoint": "weights/a,hf://o/n"}, "log": {"dir": "weights/a"}}
    config = {"reward": {"checkpoint": f"{here},hf://o/n"}, "log": {"dir": here}}
    assert differences(preset, config) == {}
    preset["log"]["dir"] = "weights/b"
    assert list(differences(preset, config)) == ["log.dir"]


def test_field_that_one_of_them_lacks_is_none_there():
    assert differences({"eval": {"old": 1}}, {"eval": {}, "serve": {"port": 2}}) == {
        "eval.old": [1, None],
        "serve.port": [None, 2],
    }


@pytest.mark.parametrize("file", ["configs/grpo.py", "configs/ppo.py"])
def test_frozen_base_under_adapters_is_cut_no_more_than_it_must(file):
    mesh = read_preset(f"{file}:lora", []).mesh
    assert (mesh.data, mesh.fsdp) == (0, -1)
