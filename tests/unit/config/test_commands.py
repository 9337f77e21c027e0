from pathlib import Path

import pytest

from evac_jax.config import commands

COMMAND = ["python", "launch.py", "--config=configs/ppo.py", "--config.seed=3"]
RUN = Path("/runs/one two")


@pytest.mark.parametrize(
    "more",
    [
        ["--config.checkpoint.restore=latest", "--config.checkpoint.step=4"],
        ["--config.checkpoint.restore", "latest", "-config.checkpoint.step", "4"],
    ],
)
def test_flags_are_taken_out_in_either_spelling(more):
    assert commands.without([*COMMAND, *more], commands.RESTORING) == COMMAND


def test_run_goes_on_with_its_own_flags():
    expected = [*COMMAND, f"--config.checkpoint.restore={RUN}"]
    assert commands.going_on(COMMAND, RUN) == expected
    assert commands.going_on([*expected, "--config.train.iterations=8"], RUN, 16) == [
        *expected,
        "--config.train.iterations=16",
    ]


def test_finished_run_goes_on_for_twice_as_long():
    follow = commands.following(COMMAND, RUN, done=8, iterations=8, finished=True)
    assert follow["go on"][-1] == "--config.train.iterations=16"
    follow = commands.following(COMMAND, RUN, done=4, iterations=8, finished=False)
    assert follow["go on"] == commands.going_on(COMMAND, RUN)


def test_what_comes_next_uses_the_run():
    follow = commands.following(
        [*COMMAND, "--mode", "train", "--config.checkpoint.restore=auto"],
        RUN,
        done=8,
        iterations=8,
        finished=True,
    )
    for mode in ("eval", "serve"):
        name = "evaluate" if mode == "eval" else mode
        restored = f"--config.checkpoint.restore={RUN}"
        assert follow[name] == [*COMMAND, restored, f"--mode={mode}"]
    assert follow["export"][1:] == [
        *("-m", "evac_jax.tools.policy.export", f"--run={RUN}", f"--out={RUN}-policy-8")
    ]
    assert follow["report"][1:] == ["-m", "evac_jax.tools.runs.report", str(RUN)]
