import dataclasses
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
from PIL import Image

from evac_jax.config.build import default_config
from evac_jax.telemetry import video, writers


def _lines(folder):
    return [json.loads(line) for line in (folder / writers.METRICS_FILE).read_text().splitlines()]


def _config(**log):
    config = default_config("grpo")
    return dataclasses.replace(config, log=dataclasses.replace(config.log, **log))


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_line_is_on_disk_when_write_returns(tmp_path):
    writer = writers.JsonlWriter(tmp_path / writers.METRICS_FILE)
    writer.write(1, {"actor/loss": np.float32(0.5)})
    assert _lines(tmp_path) == [{"iteration": 1, "actor/loss": 0.5}]
    writer.write(2, {"actor/loss": 0.25})
    assert [line["iteration"] for line in _lines(tmp_path)] == [1, 2]
    writer.close()


def test_line_is_completed_when_an_iteration_is_written_twice(tmp_path):
    writer = writers.JsonlWriter(tmp_path / writers.METRICS_FILE)
    writer.write(1, {"a": math.nan, "b": 1.0})
    writer.write(1, {"c": 2.0, "a": 3.0, "d": math.inf})
    writer.write(2, {"a": 4.0})
    assert _lines(tmp_path) == [
        {"iteration": 1, "a": 3.0, "b": 1.0, "c": 2.0, "d": None, "non_finite": ["d"]},
        {"iteration": 2, "a": 4.0},
    ]
    writer.close()


def test_later_lines_are_moved_aside_when_a_run_resumes(tmp_path, caplog):
    path = tmp_path / writers.METRICS_FILE
    first = writers.JsonlWriter(path)
    for step in range(5):
        first.write(step, {"a": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"iteration": 5, "a"')  # killed while writing
    with caplog.at_level("INFO", logger="absl"):
        second = writers.JsonlWriter(path, resume_step=2)
    assert [line["iteration"] for line in _lines(tmp_path)] == [0, 1, 2]
    kept = tmp_path / f"{writers.METRICS_FILE}.later"
    assert f"metrics of iterations 3 to 4 are kept in {kept}" in caplog.text
    second.write(2, {"b": 7.0})
    second.write(3, {"a": 30.0})
    second.close()
    assert _lines(tmp_path)[2:] == [
        {"iteration": 2, "a": 2.0, "b": 7.0},
        {"iteration": 3, "a": 30.0},
    ]
    writers.JsonlWriter(path, resume_step=1).close()
    writers.JsonlWriter(path, resume_step=1).close()
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [
        {"iteration": 3, "a": 3.0},
        {"iteration": 4, "a": 4.0},
        {"iteration": 2, "a": 2.0, "b": 7.0},  # of the second time
        {"iteration": 3, "a": 30.0},
    ]


def test_non_finite_figures_are_counted_and_named_when_they_come(tmp_path):
    writer = writers.make_writer(tmp_path, _config())
    writer.write(1, {"actor/loss": math.nan, "actor/ratio": 1.0})
    writer.write(1, {"eval/imagined/return": math.inf})
    writer.write(2, {"actor/loss": 0.5})
    writer.close()
    first, second = _lines(tmp_path)
    assert first["actor/loss"] is None
    assert first["non_finite"] == ["actor/loss", "eval/imagined/return"]
    assert first[writers.NON_FINITE] == 2.0
    assert second[writers.NON_FINITE] == 0.0
    events = _events(tmp_path)
    assert [e.step for e in events.Scalars("actor/loss")] == [2]
    assert [e.value for e in events.Scalars(writers.NON_FINITE)] == [1.0, 2.0, 0.0]


def test_tensorboard_shows_text_and_moving_pictures_when_given(tmp_path):
    path = tmp_path / "episode.mp4"
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frames[2:] = 200
    video.write_mp4(path, frames, fps=8)
    writer = writers.make_writer(tmp_path, _config())
    writer.video("imagined/0", path, 3)
    writer.text("note", "one\ntwo")
    writer.close()
    events = _events(tmp_path)
    (image,) = events.Images("imagined/0")
    assert image.step == 3
    assert image.encoded_image_string.startswith(b"GIF89a")
    assert (image.width, image.height) == (256, 256)
    assert "group_size" in events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert (tmp_path / "note.txt").read_text() == "one\ntwo"


def test_earlier_events_are_hidden_when_a_run_resumes(tmp_path):
    first = writers.TensorBoardWriter(tmp_path / "tensorboard")
    for step in range(1, 5):
        first.write(step, {"a": 1.0})
    first.close()
    second = writers.TensorBoardWriter(tmp_path / "tensorboard", resume_step=2)
    second.write(3, {"a": 2.0})
    second.close()
    # Both files may carry one time stamp; the viewer reads them in the order of their names.
    assert [(e.step, e.value) for e in _events(tmp_path).Scalars("a")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


def test_event_files_are_left_out_when_tensorboard_is_off(tmp_path):
    writers.make_writer(tmp_path, _config(tensorboard=False)).close()
    assert [path.name for path in tmp_path.iterdir()] == [writers.METRICS_FILE]


WANDB_OFFLINE = """
import sys, pathlib
from evac_jax.telemetry.writers import WandbWriter
folder = pathlib.Path(sys.argv[1])
writer = WandbWriter(folder, "test", "offline", {"seed": 0})
writer.write(1, {"actor/loss": 0.5, "bad": float("nan")})
writer.text("note", "text")
writer.close()
assert "torch" not in sys.modules
"""


def test_wandb_files_stay_in_the_run_folder_when_offline(tmp_path, repository):
    # In a process of its own: W&B leaves a service process and hooks behind.
    folder = tmp_path / "run"
    folder.mkdir()
    environment = os.environ | {"WANDB_DATA_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_OFFLINE, str(folder)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((folder / "wandb_id").read_text()) == 8
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


WANDB_MORE = """
import sys, pathlib
import numpy as np
from evac_jax.telemetry import video
from evac_jax.telemetry.writers import WandbWriter
folder, more = pathlib.Path(sys.argv[1]), sys.argv[2:]
(folder / "checkpoints" / "1").mkdir(parents=True)
(folder / "checkpoints" / "1" / "weights").write_bytes(b"0" * 1000)
path = folder / "film.mp4"
video.write_mp4(path, np.full((3, 64, 64, 3), 100, np.uint8), fps=8)
writer = WandbWriter(folder, "test", "offline", {}, more)
for step in (0, 1):
    facts = {"place": "imagined", "instruction": "open the drawer", "success": step == 1}
    writer.video("imagined/0", path, step, facts)
    writer.write(step, {"eval/imagined/success_rate": float(step)})
writer.text("summary", "Success <90 %>")
(folder / "report.html").write_text("<p>Success &lt;90 %&gt;</p>")
writer.page("report", folder / "report.html")
writer.checkpoint(folder / "checkpoints" / "1", 1)
writer.close()
"""


def wandb_offline(tmp_path, repository, *more):
    """Return the record of an offline run, and the JSON of its tables."""
    folder = tmp_path / "a run"
    folder.mkdir()
    # The user's home must stay as it is.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path / "home"), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_MORE, str(folder), *more],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").glob("**/*.mp4"))
    (run,) = (folder / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in sorted(run.rglob("*.table.json"))]
    return next(run.glob("*.wandb")).read_bytes(), tables, run


def test_wandb_gets_report_table_and_checkpoint_when_they_are_asked_for(tmp_path, repository):
    record, tables, run = wandb_offline(tmp_path, repository, "report", "videos", "checkpoint")
    assert tables[-1]["columns"][:4] == ["iteration", "name", "place", "instruction"]
    assert [row[:5] for row in tables[-1]["data"]] == [
        [0, "imagined/0", "imagined", "open the drawer", False],
        [1, "imagined/0", "imagined", "open the drawer", True],
    ]
    assert b"media/videos/" in record  # the films lie beside the table
    assert b"a-run-checkpoint" in record
    (page,) = run.rglob("*.html")
    assert "Success &lt;90 %&gt;" in page.read_text()


def test_wandb_gets_single_films_and_nothing_more_by_default(tmp_path, repository):
    record, tables, run = wandb_offline(tmp_path, repository)
    assert not tables
    assert not list(run.rglob("*.html"))
    assert b"checkpoint" not in record
    assert len(list(run.rglob("*.mp4"))) == 2


def test_picture_reaches_tensorboard_as_it_was_drawn(tmp_path):
    picture = Image.new("RGB", (5, 3), (10, 200, 30))
    writer = writers.TensorBoardWriter(tmp_path / "tensorboard")
    writer.image("rollouts", picture, 7)
    writer.close()
    (entry,) = _events(tmp_path).Images("rollouts")
    assert (entry.step, entry.width, entry.height) == (7, 5, 3)
    assert Image.open(io.BytesIO(entry.encoded_image_string)).getpixel((4, 2)) == (10, 200, 30)
