"""TensorBoard event files, without JAX or PyTorch, because both the trainer and tools use them."""

import io
import math
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from evac_jax.telemetry import video


def finite(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return the finite figures; viewers would draw the others as gaps."""
    return {name: float(value) for name, value in scalars.items() if math.isfinite(value)}


class TensorBoardWriter:
    """Writes event files with TensorBoard's own writer.

    It does not use torch.utils.tensorboard or tensorboardX, as is common, because both import torch
    and the trainer must not import it.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor = event_pb2, summary_pb2, tensor_pb2
        self._writer = EventFileWriter(str(directory))
        # A START event makes viewers hide what earlier sessions wrote from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
        )

    def _add(self, step: int, values: list) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the finite figures."""
        value = self._summary.Summary.Value
        self._add(step, [value(tag=k, simple_value=v) for k, v in finite(scalars).items()])

    def text(self, name: str, text: str) -> None:
        """Add a text to the Text tab, without formatting."""
        metadata = self._summary.SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code block
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[indented.encode()])
        self._add(0, [self._summary.Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def page(self, name: str, path: Path) -> None:
        """Do nothing: TensorBoard shows no pages."""

    def video(self, name: str, path: Path, step: int, facts: video.Facts = video.NOTHING) -> None:
        """Add the video as an animated GIF, because TensorBoard cannot play mp4."""
        frames, fps = video.read_mp4(path)
        self._add_image(name, frames.shape[1:3], video.encode_gif(frames, fps=fps), step)

    def checkpoint(self, path: Path, step: int) -> None:
        """Do nothing: TensorBoard shows no folders."""

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        """Add a picture."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        self._add_image(name, (picture.height, picture.width), buffer.getvalue(), step)

    def _add_image(self, name: str, size: tuple[int, int], encoded: bytes, step: int) -> None:
        image = self._summary.Summary.Image(
            height=size[0], width=size[1], colorspace=3, encoded_image_string=encoded
        )
        self._add(step, [self._summary.Summary.Value(tag=name, image=image)])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
