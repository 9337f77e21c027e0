import numpy as np
import pytest
import torch

from evac_jax.miniature import render, scene
from evac_jax.miniature.expert import Expert, demonstrate
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.reward import make_judge

SETTINGS = WorldModelEnvConfig(judge="examples.colour_judge:make")


def test_judge_agrees_with_the_ground_truth_on_its_frames():
    _, states = demonstrate(scene.sample_scenes(np.arange(30)), Expert(), 32)
    judge = make_judge(SETTINGS, INSTRUCTIONS)
    said, true = [], []
    for scenes in states[::2]:
        frames = torch.from_numpy(render.render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
        task = torch.from_numpy(scenes.task.astype(np.int64))
        said.append(judge.probability(frames, task).numpy() > 0.5)
        true.append(scene.is_success(scenes))
    said, true = np.concatenate(said), np.concatenate(true)
    assert 0.1 < true.mean() < 0.9
    assert (said == true).mean() > 0.93
    assert said[true].mean() > 0.9


def test_instruction_without_a_colour_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        make_judge(SETTINGS, ("open the drawer",))
