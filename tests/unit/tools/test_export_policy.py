import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from evac_jax import checkpoint
from evac_jax.config import default_config, to_dict
from evac_jax.errors import CheckpointError
from evac_jax.miniature.sizes import POLICY
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.tools import export_policy
from evac_jax.tools.train_policy import NORM_STATS, UNNORM_KEY
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy
from policies.openvla_oft.model import OpenVLAOFT

SMALL = dataclasses.replace(POLICY, num_layers=1, hidden_size=32, intermediate_size=32)


def _params(model):
    return nnx.split(model, nnx.Param, ...)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two checkpoints: the start policy times 2 and times 3."""
    folder = tmp_path_factory.mktemp("run")
    model = OpenVLAOFT(SMALL, rngs=nnx.Rngs(0))
    create_policy_folder(model, folder / "start", tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
    config = to_dict(default_config("grpo"))
    config["policy"] |= {
        "checkpoint": str(folder / "start"),
        "unnorm_key": UNNORM_KEY,
        "max_prompt_length": SMALL.max_prompt_length,
        "scan_layers": SMALL.scan_layers,
    }
    # Needs no weights of simulators.
    config["env"]["simulator"] = "ground_truth"
    config["eval"] |= {"ground_truth": "miniature", "episodes": 0}
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps(config))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=None)
    for iteration in (1, 2):
        params = jax.tree.map(lambda leaf, n=iteration: (n + 1) * leaf, _params(model))
        checkpoints.save(iteration, {"params": params, "step": np.zeros(3)}, {})
    checkpoints.close()
    return folder


def test_exported_folder_holds_the_parameters_of_the_asked_iteration(run, monkeypatch):
    argv = ["export_policy", "--run", str(run), "--out", str(run / "out"), "--step", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    export_policy.main()
    exported, start = (
        _params(load_policy(run / name, unnorm_key=UNNORM_KEY, scan_layers=False).model)
        for name in ("out", "start")
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), exported, start)
    assert json.loads((run / "out" / "card.json").read_text())["iteration"] == 1


def test_newest_checkpoint_is_taken_when_no_iteration_is_named(run):
    _, iteration = export_policy.trained_model(run)
    assert iteration == 2


def test_missing_checkpoint_is_refused_and_those_there_are_named(run):
    with pytest.raises(CheckpointError, match=r"no checkpoint of iteration 7; there are \[1, 2\]"):
        export_policy.trained_model(run, 7)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        export_policy.trained_model(run / "checkpoints")
