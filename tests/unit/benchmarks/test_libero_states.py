"""What is known of the states in which a world's episodes began, and what is refused."""

import json

import numpy as np
import pytest

from benchmarks import libero_states
from benchmarks.libero_states import CHOICE, REPORT, TRAINING, check, of_command
from evac_jax.errors import DataError
from evac_jax.files import start_frames
from evac_jax.files.recordings import EpisodeWriter

LAUNCH = "python launch.py --config=configs/grpo.py"
NUMBERING = ["libero_spatial", [0, 2, 3, 7], True]


def record(folder, starts, numbering=NUMBERING):
    facts = dict(zip(libero_states.NUMBERING, numbering, strict=True))
    with EpisodeWriter(
        folder,
        image_shape=(1, 8, 8, 3),
        instructions=["push"],
        sources=["a test"],
        intrinsic=np.eye(3)[None],
        c2w=np.eye(4)[None],
        facts={"libero": facts},
    ) as writer:
        for start in starts:
            writer.add(
                frames=np.zeros((2, 1, 8, 8, 3), np.uint8),
                actions=np.zeros((1, 7)),
                poses=np.tile([0.1, 0, 0.2, 0, 0, 0, 1, 1.0], (2, 1)),
                success=np.zeros(2, bool),
                task=0,
                source=0,
                start=start,
            )
    return folder


def write(folder, states=None, commands=()):
    """Write the cards of a world's folder."""
    (folder / "starts").mkdir(parents=True)
    if states is not None:
        (folder / "starts" / "card.json").write_text(json.dumps({start_frames.STATES: states}))
    if commands:
        stages = [{"name": f"stage_{n}", "command": text} for n, text in enumerate(commands)]
        (folder / "card.json").write_text(json.dumps({"stages": stages}))
    return folder


def test_states_are_divided_without_a_rest():
    parts = [set(range(*ends)) for ends in (REPORT, TRAINING, CHOICE)]
    assert set.union(*parts) == set(range(*libero_states.ALL))
    assert sum(map(len, parts)) == 400


@pytest.mark.parametrize(
    ("command", "states"),
    [
        (f"{LAUNCH} --mode=collect --config.env.train_starts=(200,360)", range(200, 360)),
        (f"{LAUNCH} --mode=collect --config.env.train_starts=(360, -1)", range(360, 400)),
        (f"{LAUNCH} --mode=collect --config.eval.ground_truth_starts=(360,400)", range(400)),
        (
            f"{LAUNCH} --mode=eval --config.env.train_starts=(0,360) "
            "--config.eval.ground_truth_starts=(360,400)",
            range(360, 400),
        ),
        (
            f"{LAUNCH} --config.env.train_starts=(0,5) --config.eval.ground_truth_starts=(9,10)",
            [*range(5), 9],
        ),
        (f"{LAUNCH} --mode=eval", range(400)),
        (f"{LAUNCH} --mode=train --config.world=world_1 --config.eval.ground_truth=none", []),
        ("python -m evac_jax.tools.policy.train --data base_00", []),
    ],
)
def test_command_uses_the_states_that_it_names_or_all(command, states):
    assert of_command(command) == set(states)


def test_world_and_recordings_without_a_reported_state_are_taken(tmp_path):
    collect = f"{LAUNCH} --mode=collect --config.env.train_starts=(200,360)"
    world = write(tmp_path / "world", [200, 359, 360], [collect, "python -m evac_jax.tools.trust"])
    data = record(tmp_path / "base", [250, 399])
    assert check(world, [data], NUMBERING) == {
        str(world / "starts"): {200, 359, 360},
        f"{world / 'card.json'}, stage stage_0": set(range(200, 360)),
        str(data): {250, 399},
    }


def test_every_place_with_a_reported_state_is_named(tmp_path):
    collect = f"{LAUNCH} --mode=collect --config.env.train_starts=(0,360)"
    world = write(tmp_path / "world", [199, 200], [collect])
    data = record(tmp_path / "base", [7, 250, 3])
    with pytest.raises(DataError) as error:
        check(world, [data], NUMBERING)
    message = str(error.value)
    assert f"{world / 'starts'}: has 1 of them, such as 199" in message
    assert "stage stage_0: has 200 of them, such as 0, 1, 2" in message
    assert f"{data}: has 2 of them, such as 3, 7" in message


def test_episodes_of_unknown_states_are_refused(tmp_path):
    world = write(tmp_path / "world", [200, -1])
    with pytest.raises(DataError, match="starts: does not tell where all of its episodes begin"):
        check(world)
    with pytest.raises(DataError, match="neither its starts nor a recipe's card tell"):
        check(write(tmp_path / "silent"))
    assert check(tmp_path / "silent", [record(tmp_path / "base", [300])], NUMBERING)


@pytest.mark.parametrize("other", [["libero_spatial", [0, 2], True], [None, None, None]])
def test_recordings_whose_start_ids_mean_other_states_are_refused(other, tmp_path):
    data = record(tmp_path / "base", [300], other)
    with pytest.raises(DataError, match=r"base: numbers states by suite, tasks, extra_states = "):
        check(write(tmp_path / "world", [200]), [data], NUMBERING)
