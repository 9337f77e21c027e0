"""A run whose reward is a vision-language model's, from the threshold on."""

import json

import pytest

from benchmarks import vlm_reward
from evac_jax.config.vlm import VlmConfig
from evac_jax.config.vlm_card import VlmCard


@pytest.mark.slow  # tests/unit/sim/test_vlm.py covers each part
def test_run_is_rewarded_by_a_vision_language_model(launcher, tmp_path):
    model = vlm_reward.write_tiny(tmp_path / "model")
    (tmp_path / "vlm").mkdir()
    # Everything is a success to it, after the second chunk.
    card = VlmCard.make(model, -80.0, 8, VlmConfig(average=2, frames=2, dtype="float32"))
    card.write(tmp_path / "vlm")
    flags = ["threshold=-80", "success_frames=1", "judged_frames=1", "vlm.average=2"]
    flags += ["vlm.frames=2", "vlm.dtype=float32", "judge=vlm", f"checkpoint={tmp_path / 'vlm'}"]
    launcher.run(
        *(f"--config.reward.{flag}" for flag in flags),
        "--config.eval.twin_fraction=0",
        "--config.eval.ground_truth=none",
        "--config.train.iterations=1",
        f"--config.log.dir={tmp_path}/runs",
        cwd=tmp_path,
    )
    (run,) = (tmp_path / "runs").glob("grpo-*")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["env/success_rate"] == 1
    assert json.loads((run / "config.json").read_text())["reward"]["vlm"]["average"] == 2


def test_folder_that_is_no_model_ends_with_one_message(launcher, tmp_path):
    output = launcher.run("--config.reward.judge=vlm", status=2, cwd=tmp_path)
    assert "expected the folder of an image-text-to-text model" in output
    assert "Traceback" not in output
