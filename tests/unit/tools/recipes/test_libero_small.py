import re

import pytest

from benchmarks import libero_states
from evac_jax.tools.episodes.collect import parse_mix
from evac_jax.tools.recipes import libero_small as build
from evac_jax.tools.recipes.shipping import run
from evac_jax.tools.recipes.stages import stamps


def test_interrupted_recording_loses_one_piece_at_most():
    pieces = [stage for stage in build.make_stages() if stage.name.startswith("base_")]
    assert len(pieces) == build.COUNTS["base"] / build.PIECE
    shown = [stage.shown for stage in pieces]
    assert all(f"collect.episodes={build.PIECE}" in text for text in shown)
    assert [int(re.search(r"config\.seed=(\d+)", text)[1]) for text in shown] == list(
        range(len(pieces))
    )
    assert (build.END - build.FIRST) % build.PIECE  # so that players get other starts in each


def test_no_stage_begins_in_a_state_that_is_reported():
    used = [libero_states.of_command(stage.shown) for stage in build.make_stages()]
    assert set().union(*used) == set(range(200, 400))


@pytest.mark.parametrize(
    ("episodes", "expected"), [(8, (356, 364)), (40, (328, 368)), (100, (280, 380))]
)
def test_short_recording_also_has_held_out_states(episodes, expected):
    assert build.starts_of(episodes) == expected
    assert build.starts_of(build.COUNTS["base"]) == (build.FIRST, build.END)


def test_larger_build_differs_in_pixels_and_sizes_alone():
    small, large = (build.make_stages(1, pixels) for pixels in (64, 128))
    assert [stage.name for stage in small] == [stage.name for stage in large]
    for one, other in zip(small, large, strict=True):
        shown = other.shown.replace("image_size=128", "image_size=64")
        assert shown.replace("libero_128", "libero_small") == one.shown
    assert any("libero_128" in stage.shown for stage in large)


def test_larger_build_is_not_shipped(capsys):
    with pytest.raises(SystemExit):
        run(build.recipe(), ["--ship", "--pixels", "128"])
    assert "weights for 64 pixels are shipped" in capsys.readouterr().err


def test_last_world_knows_what_was_learned_in_the_first():
    commands = {stage.name: stage.shown for stage in build.make_stages()}
    assert "--config.world={work}/world_1 " in commands["trial"]
    assert "policy:{work}/tried@0=" in commands["trials_00"]
    for name in ("pose_model", "world_model_tuned", "reward", "trust"):
        assert "{work}/trials_00" in commands[name]
        assert "{work}/trials_00" not in commands[f"{name}_1"]


def test_shares_of_the_players_are_whole():
    assert sum(parse_mix(build.MIX).values()) == pytest.approx(1)


def test_longer_training_of_the_world_model_leaves_recordings_and_policies(monkeypatch):
    before = stamps(build.make_stages())
    monkeypatch.setitem(build.COUNTS, "world_model", 12001)
    after = stamps(build.make_stages())
    changed = {name for name in before if before[name] != after[name]}
    late = {"world_model_full", "imagined_base_1", "reward", "trial", "trials_00", "world"}
    assert late <= changed
    assert not {name for name in changed if name.startswith(("base", "rollouts", "policy"))}
    assert "autoencoder" not in changed
