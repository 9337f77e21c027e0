"""Episodes as mp4 files, GIFs and film strips. Frames are always uint8 [T H W 3]."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from evac_jax.errors import DataError
from evac_jax.files.atomic import replacing

MIN_SIZE = 256  # pixels; smaller frames are too small for a browser and have no room for text
STRIP_HEIGHT = 128  # pixels; enough to see on a page what happens
TEXT_SIZE = 15
MARGIN = 6
BORDER = 5
GREEN = (34, 160, 70)
RED = (190, 50, 45)
BAND = (24, 24, 28)
WHITE = (240, 240, 240)
GREY = (170, 170, 175)

Frames = UInt8[np.ndarray, "T H W 3"]
# What is known of a film, by which it can be found: place, instruction, success, return.
Facts = Mapping[str, str | float | bool]
NOTHING: Facts = {}


@dataclass(frozen=True)
class Overlay:
    """The text that is drawn above an episode's frames.

    Attributes:
        instruction: the task in words.
        reward_so_far: sum of the rewards up to and including each frame, [T].
        success: whether the episode has succeeded by each frame, bool [T]; sets the border colour.
    """

    instruction: str
    reward_so_far: Float[np.ndarray, " T"]
    success: Bool[np.ndarray, " T"]


def upscale(frames: Frames, min_size: int = MIN_SIZE) -> Frames:
    """Repeat pixels by the smallest whole factor that makes the shorter side >= `min_size`."""
    factor = max(math.ceil(min_size / min(frames.shape[1:3])), 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def annotate(frames: Frames, overlay: Overlay) -> Frames:
    """Return larger frames, with text above and a border that turns green at success.

    The last line of the text shows the step (the start frame is step 0), the reward so far and the
    success flag.

    Raises:
        ValueError: the overlay has another number of steps than the episode.
    """
    count, height, width, _ = frames.shape
    for name in ("reward_so_far", "success"):
        shape = np.shape(getattr(overlay, name))
        if shape != (count,):
            raise ValueError(f"overlay.{name}: expected shape ({count},), got {shape}")
    font = ImageFont.load_default(TEXT_SIZE)
    lines = _wrap(overlay.instruction, font, width - 2 * MARGIN)
    line_height = TEXT_SIZE + 4
    band = (len(lines) + 1) * line_height + MARGIN
    top = BORDER + band
    out = np.empty((count, top + height + BORDER, width + 2 * BORDER, 3), np.uint8)
    for t in range(count):
        success = bool(overlay.success[t])
        canvas = Image.new("RGB", (out.shape[2], out.shape[1]), GREEN if success else RED)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((BORDER, BORDER, BORDER + width - 1, top - 1), fill=BAND)
        left, y = BORDER + MARGIN, BORDER + MARGIN // 2
        for line in lines:
            draw.text((left, y), line, font=font, fill=WHITE)
            y += line_height
        status = f"step {t}/{count - 1}   reward {overlay.reward_so_far[t]:.2f}"
        draw.text((left, y), status, font=font, fill=GREY)
        if success:
            right = BORDER + width - MARGIN
            draw.text((right, y), "success", font=font, fill=GREEN, anchor="ra")
        canvas.paste(Image.fromarray(frames[t]), (BORDER, top))
        out[t] = np.asarray(canvas)
    return out


def _wrap(text: str, font, width: int) -> list[str]:
    """Break `text` between words into lines of at most `width` pixels; words are not divided."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def tile(episodes: Sequence[Frames], columns: int | None = None) -> Frames:
    """Return episodes side by side in a grid; a shorter episode repeats its last frame.

    Args:
        episodes: frames of one size; lengths may differ.
        columns: None makes the grid as square as possible.

    Raises:
        ValueError: no episodes, or frames of different sizes.
    """
    sizes = {episode.shape[1:] for episode in episodes}
    if len(sizes) != 1:
        raise ValueError(f"tile: expected episodes of one frame size, got {sorted(sizes)}")
    columns = columns or math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    length = max(len(episode) for episode in episodes)
    height, width, _ = sizes.pop()
    grid = np.zeros((length, rows * height, columns * width, 3), np.uint8)
    for index, episode in enumerate(episodes):
        y, x = (index // columns) * height, (index % columns) * width
        last = np.minimum(np.arange(length), len(episode) - 1)
        grid[:, y : y + height, x : x + width] = episode[last]
    return grid


def write_mp4(
    path: Path,
    frames: Frames,
    *,
    fps: int,
    overlay: Overlay | None = None,
    min_size: int = MIN_SIZE,
) -> None:
    """Write an episode as H.264 (MPEG-4 part 2 if PyAV was built without x264), atomically.

    Frames are enlarged to `min_size`. Colour is 4:2:0, because many players support nothing else.

    Raises:
        ValueError: frames are not uint8 [T H W 3] with T >= 1.
    """
    frames = upscale(_checked(frames), min_size)
    if overlay is not None:
        frames = annotate(frames, overlay)
    # 4:2:0 halves both sides, so for odd sizes the last row or column is repeated.
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, odd, mode="edge")
    h264 = "libx264" in av.codecs_available
    with replacing(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264" if h264 else "mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"} if h264 else {"qscale": "3"}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def write_strip(path: Path, frames: Frames, *, height: int = STRIP_HEIGHT) -> None:
    """Write a film strip as PNG, atomically; larger frames are made `height` pixels high."""
    strip = filmstrip(frames)
    if strip.height > height:
        strip = strip.resize((round(strip.width * height / strip.height), height), Image.LANCZOS)
    with replacing(Path(path)) as temporary:
        strip.save(temporary)


def read_mp4(path: Path) -> tuple[Frames, float]:
    """Return all frames of a video and its frames per second."""
    with av.open(str(path)) as file:
        fps = file.streams.video[0].average_rate
        assert fps is not None, f"{path} has no frame rate"
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return np.stack(frames), float(fps)


def decode_mp4(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, uint8 [H W 3], one by one; a long video may exceed memory.

    Raises:
        DataError: the file is damaged or no video.
    """
    try:
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: no video track
        raise DataError(f"{path}: not a readable video ({error})") from error


def encode_gif(frames: Frames, *, fps: float) -> bytes:
    """Return a GIF that repeats endlessly; READMEs and TensorBoard show it without a player."""
    images = [Image.fromarray(frame) for frame in _checked(frames)]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    return buffer.getvalue()


def filmstrip(frames: Frames, count: int = 8, *, gap: int = 2) -> Image.Image:
    """Return `count` frames at equal distances, including the first and the last, as one row."""
    frames = _checked(frames)
    picked = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    _, height, width, _ = picked.shape
    strip = Image.new("RGB", (len(picked) * (width + gap) - gap, height), "white")
    for index, frame in enumerate(picked):
        strip.paste(Image.fromarray(frame), (index * (width + gap), 0))
    return strip


def _checked(frames: np.ndarray) -> Frames:
    """Return contiguous frames.

    Raises:
        ValueError: wrong type or shape, or no frame at all.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(
            f"frames: expected uint8 [T H W 3] with T >= 1, got {frames.dtype} {frames.shape}"
        )
    return np.ascontiguousarray(frames)
