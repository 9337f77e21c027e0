"""What the rehearsal at full size says; that its stages work, tests/integration tests."""

import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import full_size
from benchmarks.full_size import FILES, PARTS, POLICY, WORLD_MODEL, Outcome, verdict
from benchmarks.peaks import COMMAND, SIMULATOR
from evac_jax.config.flags import read_preset
from evac_jax.errors import ConfigError

SOUND = {"actor/loss": -0.05, "actor/grad_norm": 0.2, "actor/skipped_updates": 0}
MODULE = "base_model.model.projector.fc1"


def _adapter(folder, b=0.5):
    folder.mkdir()
    pair = {"A": np.ones((2, 4), np.float32), "B": np.full((4, 2), b, np.float32)}
    tensors = {f"{MODULE}.lora_{factor}.weight": value for factor, value in pair.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "ok"),
        ({"actor/loss": None}, "not_finite"),
        ({"actor/grad_norm": math.inf}, "not_finite"),
        ({"actor/grad_norm": 0.0}, "no_gradient"),
        ({"actor/skipped_updates": 1}, "not_updated"),
    ],
)
def test_iteration_is_sound_or_a_word_says_why_not(changes, word, tmp_path):
    assert verdict(SOUND | changes, _adapter(tmp_path / "one"), None) == word


def test_adapter_must_have_changed_and_come_back_with_the_same_bytes(tmp_path):
    fresh, one, same, other = (
        _adapter(tmp_path / name, b)
        for name, b in {"fresh": 0.0, "one": 0.5, "same": 0.5, "other": 0.25}.items()
    )
    assert verdict(SOUND, fresh, None) == "unchanged"
    assert verdict(SOUND, one, same) == "ok"
    assert verdict(SOUND, one, other) == "not_equal"


def test_last_line_tells_both_iterations_and_the_worse_estimate():
    outcomes = {
        WORLD_MODEL: Outcome(
            *("ok", 0.7),
            peaks={COMMAND: 2_000_000_000, SIMULATOR: 6_000_000_000},
            estimates={COMMAND: 1e9, SIMULATOR: 5e9},
        ),
        POLICY: Outcome(
            *("ok", 0.25),
            peaks={COMMAND: 19_000_000_000, SIMULATOR: 1_000_000_000},
            estimates={COMMAND: 20e9, SIMULATOR: 1e9},
        ),
    }
    assert full_size.last_line(outcomes, 12.34) == (
        "policy_iteration=ok world_model_iteration=ok policy_peak_gb=20.00 "
        "world_model_peak_gb=8.00 grad_norm=0.25 memory_ratio=0.75 minutes=12.3"
    )
    rows = [line.split() for line in full_size.table(outcomes).splitlines()[1:]]
    assert [row[:4] for row in rows] == [
        ["world_model", "trainer", "2.00", "1.00"],
        ["world_model", "simulator", "6.00", "5.00"],
        ["policy", "trainer", "19.00", "20.00"],
        ["policy", "simulator", "1.00", "1.00"],
    ]


def test_part_that_is_left_out_or_failed_is_told():
    words = full_size.last_line({POLICY: Outcome("failed")}, 1.0).split()
    assert words[:2] == ["policy_iteration=failed", "world_model_iteration=skipped"]
    assert words[2] == "policy_peak_gb=nan"


@pytest.mark.parametrize("sizes", ["full", "tiny"])
def test_stages_of_a_part_are_those_that_it_needs(sizes):
    stages = full_size.make_stages(sizes)
    needed = {part: full_size.stages_of(stages, [part]) for part in PARTS}
    assert set().union(*needed.values()) == {stage.name for stage in stages}
    assert not any("iteration" in name for name in needed[FILES])
    assert not any("policy" in name for name in needed[WORLD_MODEL])
    assert needed[POLICY] == {
        "policy_weights",
        "policy_iteration",
        "policy_adapter",
        "policy_again",
    }


@pytest.mark.parametrize("part", [WORLD_MODEL, POLICY])
def test_iteration_has_settings_that_exist(part):
    flags = [f"--config.{name}={value}" for name, value in full_size.settings(part).items()]
    config = read_preset(full_size.PRESET, flags)
    assert config.env.num_envs * config.env.max_episode_steps == 16
    assert config.algo.entropy_bonus > 0
    assert config.policy.lora_rank == 32


def test_too_little_disk_is_told_before_anything_is_written(monkeypatch, tmp_path):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(50e9, 20e9, 30e9))
    with pytest.raises(ConfigError, match=r"expected 40 GB of free disk at .*, got 30"):
        full_size.main(["--work", str(tmp_path / "work")])
    assert not list((tmp_path / "work").iterdir())
    # What an earlier call wrote counts.
    monkeypatch.setitem(full_size.DISK_GB, "full", 30.0001)
    (tmp_path / "work" / "weights").write_bytes(bytes(200_000))
    full_size.refuse_too_little_room(tmp_path / "work", "full", [FILES])


def test_too_little_memory_is_told_with_the_part_that_needs_less(monkeypatch, tmp_path):
    monkeypatch.setitem(full_size.MEMORY_GB["tiny"], POLICY, 1e6)
    with pytest.raises(ConfigError, match="leave out --parts policy"):
        full_size.refuse_too_little_room(tmp_path, "tiny", PARTS)
    full_size.refuse_too_little_room(tmp_path, "tiny", [FILES, WORLD_MODEL])
