import numpy as np

from evac_jax.files.held_out import is_held_out


def test_a_scene_is_on_one_side_of_the_split_only():
    frames = np.random.default_rng(0).integers(0, 256, (400, 1, 4, 4, 3), dtype=np.uint8)
    sides = [is_held_out(frame, "go") for frame in frames]
    assert sides == [is_held_out(frame, "go") for frame in frames]
    assert 20 < sum(sides) < 60
