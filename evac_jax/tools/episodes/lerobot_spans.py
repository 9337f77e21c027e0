"""Where the episodes of a LeRobot dataset (v3.0) are in its videos, also if a file is misnamed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from evac_jax.errors import DataError


@dataclass(eq=False)
class Span:
    """An episode's frames in a video.

    Attributes:
        episode: its number in the dataset.
        file: `chunk_index` and `file_index` of the video.
        begin: its first frame.
        end: the frame after its last one.
    """

    episode: int
    file: dict[str, int]
    begin: int
    end: int

    def meets(self, other: "Span") -> bool:
        """Whether both share more than the one frame that rounding can make, in one file."""
        return min(self.end, other.end) - max(self.begin, other.begin) > 1


def separate(spans: Sequence[Span], folder: Path, path_of: Callable[[dict], str]) -> None:
    """Move episodes that share frames of a video with another one to the video beside it.

    Files follow the order of episodes: of two that meet, only the first can belong to the file
    before, only the second to the one after. One is moved if just one of these files is there and
    has the frames free. Whether a video is long enough, its reader tells.

    Args:
        spans: of one view; changed in place.
        folder: the dataset.
        path_of: fields of a video's path -> the path in the dataset.

    Raises:
        DataError: episodes share frames, and none of them or either could be moved.
    """
    files: dict[str, list[Span]] = {}
    for span in spans:
        files.setdefault(path_of(span.file), []).append(span)
    for path in list(files):
        while pair := _meeting(files[path]):
            ways = []
            for span, step in zip(pair, (-1, 1), strict=True):
                file = span.file | {"file_index": span.file["file_index"] + step}
                beside = path_of(file)
                is_free = not any(span.meets(other) for other in files.get(beside, ()))
                if is_free and (folder / beside).is_file():
                    ways.append((span, file, beside))
            if len(ways) != 1:
                first, second = pair
                raise DataError(
                    f"{folder}: meta/episodes puts episode {first.episode} into frames "
                    f"{first.begin}..{first.end - 1} of {path}, episode {second.episode} into "
                    f"{second.begin}..{second.end - 1}; expected frames of their own, and the "
                    f"files beside it that could hold one are {[beside for *_, beside in ways]}"
                )
            span, file, beside = ways[0]
            told = "episode %s: meta/episodes names %s, its pictures are taken from %s"
            logging.warning(told, span.episode, path, beside)
            files[path].remove(span)
            files.setdefault(beside, []).append(span)
            span.file = file


def _meeting(spans: Sequence[Span]) -> tuple[Span, Span] | None:
    """Return two spans of a file that meet, in the order of episodes; None if there are none."""
    for pair in itertools.pairwise(sorted(spans, key=lambda span: span.begin)):
        if pair[0].meets(pair[1]):
            first, second = sorted(pair, key=lambda span: span.episode)
            return first, second
    return None
