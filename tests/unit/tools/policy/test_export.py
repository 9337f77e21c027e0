import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging
from flax import nnx
from safetensors import safe_open

from evac_jax import checkpoint
from evac_jax.config import hub
from evac_jax.config.build import default_config, to_dict
from evac_jax.errors import CheckpointError, StorageError
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.tools.policy import export as export_policy
from evac_jax.tools.policy.train import NORM_STATS, UNNORM_KEY
from policies.openvla_oft.checkpoint_files import SINGLE
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy
from policies.openvla_oft.lora import LoraParam
from policies.openvla_oft.model import OpenVLAOFT
from tests.integration.tiny_weights import SMALL_POLICY as SMALL
from tests.unit.full_disk import full_disk


def _params(model):
    return nnx.split(model, nnx.Param, ...)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two checkpoints: the start policy times 2 and times 3."""
    folder = tmp_path_factory.mktemp("run")
    model = OpenVLAOFT(SMALL, rngs=nnx.Rngs(0))
    create_policy_folder(model, folder / "start", tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
    _write_run(folder, model)
    return folder


def _write_run(folder, model, **changes):
    config = to_dict(default_config("grpo"))
    config["policy"] |= {
        "checkpoint": str(folder / "start"),
        "unnorm_key": UNNORM_KEY,
        "max_prompt_length": SMALL.max_prompt_length,
        "scan_layers": SMALL.scan_layers,
        **changes,
    }
    # An export needs none of the simulators' files.
    config["world_model"]["checkpoint"] = "gone"
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps(config))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=None)
    for iteration in (1, 2):
        params = jax.tree.map(lambda leaf, n=iteration: (n + 1) * leaf, _params(model))
        checkpoints.save(iteration, {"params": params, "step": np.zeros(3)}, {})
    checkpoints.close()


def _same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def _load(folder, **more):
    return load_policy(folder, unnorm_key=UNNORM_KEY, scan_layers=False, **more).model


def test_start_policy_is_found_where_its_address_leads(run, monkeypatch, tmp_path):
    config = json.loads((run / checkpoint.CONFIG_FILE).read_text())
    config["policy"]["checkpoint"] = "hf://me/policy@v1"
    (tmp_path / checkpoint.CONFIG_FILE).write_text(json.dumps(config))
    start = str(run / "start")
    monkeypatch.setattr(hub, "local", {"hf://me/policy@v1": start}.__getitem__)
    assert export_policy.find_run(tmp_path).policy.checkpoint == start


def test_exported_folder_holds_the_parameters_of_the_asked_iteration(run, monkeypatch, tmp_path):
    out = tmp_path / "out"
    argv = ["export_policy", "--run", str(run), "--out", str(out), "--step", "1"]
    argv += ["--license", "mit"]
    monkeypatch.setattr(sys, "argv", argv)
    export_policy.main()
    _same(_params(_load(out)), jax.tree.map(lambda leaf: 2 * leaf, _params(_load(run / "start"))))
    card = json.loads((out / "card.json").read_text())
    assert (card["iteration"], card["algorithm"]) == (1, "grpo")
    assert (card["gripper"], card["unnorm_key"]) == ("libero", UNNORM_KEY)
    readme = (out / "README.md").read_text()
    assert "\nlicense: mit\n" in readme
    assert "1 iterations of `grpo`" in readme
    assert "This policy was not evaluated." in readme
    assert str(run) not in readme


@pytest.mark.parametrize(
    ("source", "step"),
    [("", -1), ("checkpoints", -1), ("checkpoints/1", 1), ("checkpoints/2", 2)],
)
def test_run_and_checkpoint_folders_name_the_same_run(run, source, step):
    found = export_policy.find_run(run / source)
    assert (found.checkpoints, found.step) == (run / "checkpoints", step)
    assert found.policy.unnorm_key == UNNORM_KEY


def test_newest_checkpoint_is_taken_when_no_iteration_is_named(run):
    _, _, iteration = export_policy.trained_policy(export_policy.find_run(run))
    assert iteration == 2


def test_missing_checkpoint_is_refused_and_those_there_are_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of iteration 7; there are \[1, 2\]"):
        export_policy.export(run / "checkpoints" / "7", tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected a run, a checkpoint of a run"):
        export_policy.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_told_with_those_that_can_be_exported(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken")
    for value_head in ("none", "action_level"):  # whose outputs are read from the checkpoint
        config = json.loads((run / checkpoint.CONFIG_FILE).read_text())
        config["policy"]["value_head"] = value_head
        (broken / checkpoint.CONFIG_FILE).write_text(json.dumps(config))
        os.truncate(broken / "checkpoints" / "2" / "state" / "_METADATA", 100)
        with pytest.raises(CheckpointError, match=r"2 cannot be read: .*\n.*: \[1\]; .*step"):
            export_policy.export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_launch_exports_the_iteration_of_checkpoint_step(run, tmp_path):
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, checkpoint=str(run)),
        checkpoint=dataclasses.replace(config.checkpoint, step=1),
    )
    export_policy.run(config, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "card.json").read_text())["iteration"] == 1


def test_full_disk_is_told_and_leaves_no_folder(run, tmp_path):
    told = f"'{tmp_path}/out': cannot write .*File too large"
    with pytest.raises(StorageError, match=told), full_disk(100_000):
        export_policy.export(run / "start", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folder_that_exists_is_never_written_to(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_policy.export(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_folder_that_cannot_be_made_is_told_before_weights_are_read(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(export_policy, "trained_policy", None)
    with pytest.raises(CheckpointError, match=f"cannot write the new folder {tmp_path}/file/out"):
        export_policy.export(run, tmp_path / "file" / "out")


def test_log_names_the_iteration_and_warns_when_it_is_the_start(run, tmp_path, monkeypatch):
    told = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *words: told.append(text % words))
    export_policy.export(run, tmp_path / "newest")
    assert told[-1].startswith(f"{run} at iteration 2, ")
    export_policy.export(run, tmp_path / "start", step=0)
    assert f"{run}: iteration 0 is the start policy, untrained" in told


def test_adapter_and_other_models_are_told_apart_from_policies(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    with pytest.raises(CheckpointError, match=r"LoRA adapter, no policy .*\(the/base\)"):
        export_policy.export(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model": "EvacModel"}')
    with pytest.raises(CheckpointError, match="expected the configuration of an OpenVLA"):
        export_policy.export(tmp_path, tmp_path / "out")


def test_value_head_of_a_longer_chunk_is_exported_in_its_own_file(tmp_path):
    model = OpenVLAOFT(SMALL, rngs=nnx.Rngs(0))
    create_policy_folder(model, tmp_path / "start", tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
    chunk = {"chunk": 11, "value_type": "action_level"}
    _write_run(tmp_path, _load(tmp_path / "start", **chunk), value_head="action_level")
    export_policy.export(tmp_path, tmp_path / "out")
    start = tmp_path / "start" / SINGLE
    with safe_open(tmp_path / "out" / SINGLE, "numpy") as one, safe_open(start, "numpy") as other:
        assert one.keys() == other.keys()
    assert _load(tmp_path / "out", **chunk).value_head.fc3.kernel.shape == (128, 11)


def test_lora_run_is_exported_merged_or_as_its_adapter(tmp_path):
    model = OpenVLAOFT(SMALL, rngs=nnx.Rngs(0))
    create_policy_folder(model, tmp_path / "start", tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
    rank = {"lora_rank": 2, "lora_alpha": 4.0}
    tuned = _load(tmp_path / "start", **rank)
    for _, parameter in nnx.iter_graph(tuned):
        if isinstance(parameter, LoraParam):
            parameter.set_value(jax.numpy.full(parameter.shape, 0.01))
    _write_run(tmp_path, tuned, **rank)
    before = (tmp_path / "start" / SINGLE).read_bytes()
    export_policy.export(tmp_path, tmp_path / "merged", step=1)
    export_policy.export(tmp_path, tmp_path / "adapter", step=1, adapter=True)
    assert (tmp_path / "start" / SINGLE).read_bytes() == before
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    from_adapter = _load(tmp_path / "start", lora_adapter=tmp_path / "adapter")
    merged = _load(tmp_path / "merged")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        _params(merged),
        _params(from_adapter),
    )
    changed = np.abs(merged.llama.lm_head[...] - tuned.llama.lm_head[...]).max()
    # 4 / 2 of two ranks times (2 x 0.01) squared.
    assert changed == pytest.approx(2 * 2 * 0.02**2, rel=1e-3)


def _launch(repository, *flags):
    return subprocess.run(
        [sys.executable, "launch.py", "--mode=export", *flags],
        cwd=repository,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_launch_exports_a_checkpoint_bit_equal(run, tmp_path):
    repository = Path(__file__).parents[4]
    source = run / "start"
    done = _launch(
        repository, f"--config.policy.checkpoint={source}", f"--export_dir={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / SINGLE).read_bytes() == (source / SINGLE).read_bytes()


def test_launch_ends_with_one_message_when_the_checkpoint_is_damaged(run, tmp_path):
    repository = Path(__file__).parents[4]
    broken = shutil.copytree(run / "start", tmp_path / "broken")
    (broken / SINGLE).write_bytes((broken / SINGLE).read_bytes()[:-100])
    done = _launch(
        repository, f"--config.policy.checkpoint={broken}", f"--export_dir={tmp_path / 'out'}"
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "CheckpointError: policy to export: " in done.stderr
    assert "not a whole safetensors file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
