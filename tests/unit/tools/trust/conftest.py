import numpy as np
import pytest

from evac_jax.files import recordings
from evac_jax.miniature import scene
from evac_jax.miniature.expert import Expert, demonstrate
from evac_jax.miniature.render import camera, render
from evac_jax.miniature.tasks import INSTRUCTIONS


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two expert and two noisy episodes; one of each kind is shorter than four chunks."""
    out = tmp_path_factory.mktemp("data") / "recording"
    intrinsic, c2w = camera(64)
    writer = recordings.EpisodeWriter(
        out,
        image_shape=(1, 64, 64, 3),
        instructions=INSTRUCTIONS,
        sources=["expert", "noisy"],
        intrinsic=intrinsic[None],
        c2w=c2w[None],
        facts={"command": "a test", "versions": {}},
    )
    with writer:
        for seed in range(4):
            source, steps = seed % 2, 32 if seed < 2 else 12
            player = Expert(("expert", "noisy")[source], np.random.default_rng(seed))
            scenes = scene.sample_scenes(np.array([seed]))
            actions, states = demonstrate(scenes, player, steps)
            writer.add(
                frames=np.stack([render(state) for state in states]),
                actions=actions[0],
                poses=np.concatenate([state.pose for state in states]),
                success=np.concatenate([scene.is_success(state) for state in states]),
                task=int(scenes.task[0]),
                source=source,
                start=seed,
            )
    return recordings.load(out)
