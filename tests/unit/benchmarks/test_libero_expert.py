"""What is counted of scripted players, with a stand-in for the simulator."""

import dataclasses

import pytest

from benchmarks.libero_expert import expert_success, share
from tests.unit.sim import libero_fakes


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return libero_fakes.write(tmp_path)


def test_episodes_are_counted_once_and_only_for_the_same_protocol(config, tmp_path):
    def begun():
        return len(libero_fakes.asked(tmp_path, "seed"))

    out = tmp_path / "episodes.jsonl"
    found = expert_success(config, out=out)
    assert [start for start, _, _ in found[libero_fakes.TASKS[0]]] == [0, 2]
    assert list(found) == [libero_fakes.TASKS[0]]  # scripts close no drawer
    assert begun() == 2
    assert expert_success(config, out=out) == found
    assert begun() == 2
    expert_success(dataclasses.replace(config, action_repeat=2), per_task=1, out=out)
    assert begun() == 3
    expert_success(config, seed=1, per_task=1, out=out)
    assert begun() == 4


def test_share_is_over_the_episodes_of_all_tasks():
    found = {"a": [(0, True, 5)], "b": [(1, False, 9), (3, True, 7), (5, True, 7)]}
    assert share(found) == 0.75
