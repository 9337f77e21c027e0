"""What every tool checks before it works: its recordings are there, and its output can be made."""

import pytest

from evac_jax.errors import DataError, StorageError
from evac_jax.files.claim import written_alone
from evac_jax.tools.episodes import collect, import_starts
from evac_jax.tools.policy import train as train_policy
from evac_jax.tools.reward import train as train_reward
from evac_jax.tools.reward import vlm_threshold
from evac_jax.tools.trust import __main__ as trust
from evac_jax.tools.world_model import (
    filmstrip,
    gate,
    imagine_dataset,
    import_evac,
    train_autoencoder,
    train_pose_model,
)
from evac_jax.tools.world_model import train as train_world_model
from tests.unit.tools import tiny_recording

# Tool -> its arguments in front of a recording.
READERS = {
    train_world_model: ("--start", "{model}", "--data"),
    train_autoencoder: ("--data",),
    imagine_dataset: ("--world_model", "{model}", "--data"),
    filmstrip: ("--world_model", "{model}", "--data"),
    gate: ("--autoencoder", "{model}", "--data"),
    train_pose_model: ("--data",),
    train_reward: ("--data",),
    vlm_threshold: ("--model", "{model}", "--data"),
    trust: ("--data",),
    train_policy: ("--sizes", "miniature", "--unnorm_key", "robot", "--data"),
}
# Tool -> its arguments without a recording.
OTHERS = {
    train_policy: (),
    collect: (),
    import_evac: ("--weights", "nowhere"),
    import_starts: ("--camera", "libero", "--source", "nowhere"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_recording.write(folder / "data")
    tiny_recording.write_model(folder / "model")
    return folder


def _named(tools):
    return [pytest.param(*pair, id=pair[0].__name__.removeprefix("evac_jax.")) for pair in tools]


def _command(inputs, arguments, out):
    return [part.format(model=inputs / "model") for part in arguments] + ["--out", str(out)]


@pytest.mark.parametrize(("tool", "arguments"), _named(READERS.items()))
def test_recording_that_is_not_there_is_refused(tool, arguments, inputs, tmp_path):
    missing = tmp_path / "nowhere"
    command = _command(inputs, (*arguments, str(missing)), tmp_path / "out.png")
    with pytest.raises(DataError, match=f"{missing}: not a recording"):
        tool.main(command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tool", "arguments"), _named([*READERS.items(), *OTHERS.items()]))
def test_output_below_a_file_is_refused_before_anything_is_read(tool, arguments, inputs, tmp_path):
    (tmp_path / "file").touch()
    if arguments[-1:] == ("--data",):
        arguments = (*arguments, "nowhere")
    with pytest.raises(StorageError, match="file' is a file, where a folder is needed"):
        tool.main(_command(inputs, arguments, tmp_path / "file" / "x" / "out.png"))


@pytest.mark.parametrize(
    ("tool", "arguments"),
    _named(
        (tool, READERS[tool])
        for tool in (train_world_model, train_autoencoder, train_pose_model, train_policy)
    ),
)
def test_output_that_another_process_writes_is_refused(tool, arguments, inputs, tmp_path):
    out = tmp_path / "out"
    command = _command(inputs, (*arguments, str(inputs / "data")), out)
    with (
        written_alone(out),
        pytest.raises(StorageError, match="out' is written to by another process"),
    ):
        tool.main(command)
    assert not list(tmp_path.iterdir())
