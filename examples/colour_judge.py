"""A reward of your own: the miniature's success, judged by colours instead of a network.

    python launch.py --config=configs/grpo.py --config.reward.judge=examples.colour_judge:make

A frame shows success if enough of what surrounds the named block is plate, and no gripper is near.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RING = 2  # pixels around the block that are looked at
ENOUGH = 0.4  # share of the ring that must be plate
COLOURS = ("red", "blue")


def masks(frames: Tensor) -> dict[str, Tensor]:
    """Return where frames [N 3 H W] in [-1, 1] show each thing, bool [N H W]."""
    red, green, blue = ((frames + 1) / 2).unbind(1)
    return {
        "red": (red > green + 0.25) & (red > blue + 0.25),
        "blue": (blue > red + 0.25) & (blue > green + 0.15),
        "gripper": (green > red + 0.15) & (green > blue + 0.1),
        "plate": torch.minimum(torch.minimum(red, green), blue) > 0.68,
    }


def grown(mask: Tensor, pixels: int) -> Tensor:
    """Return a mask [N H W] that reaches so many pixels farther."""
    return F.max_pool2d(mask[:, None].float(), 2 * pixels + 1, 1, pixels)[:, 0] > 0


class ColourJudge:
    """Judges frames; `task` counts the instructions, each of which names one colour.

    Raises:
        ValueError: an instruction names no colour, or both.
    """

    def __init__(self, instructions: Sequence[str]):
        named = [[colour for colour in COLOURS if colour in text.split()] for text in instructions]
        if any(len(colours) != 1 for colours in named):
            raise ValueError(f"expected one of {COLOURS} in each of {list(instructions)}")
        self._colours = [colours[0] for colours in named]

    def to(self, device: str) -> "ColourJudge":
        """Do nothing: there are no weights to move."""
        return self

    def probability(self, frames: Tensor, task: Tensor) -> Tensor:
        """Return 1.0 where a frame [N 3 H W] shows success, else 0.0, [N]."""
        seen = masks(frames)
        colours = torch.stack([seen[colour] for colour in self._colours])  # [tasks N H W]
        block = colours[task, torch.arange(len(frames), device=frames.device)]
        ring = grown(block, RING) & ~block
        plate = (ring & seen["plate"]).sum((1, 2)) / ring.sum((1, 2)).clamp(min=1)
        # Closed fingers come out of the block's top; open ones beside it have not left it yet.
        beside = (block.any(2).cumsum(1) > RING)[:, :, None]
        above = ~grown(~block.any(1, keepdim=True), RING)
        held = (ring & (beside | above) & seen["gripper"]).any(2).any(1)
        return ((plate > ENOUGH) & ~held).float()


def make(checkpoint: str, instructions: Sequence[str], device: str) -> ColourJudge:
    """Return the judge; `checkpoint` is reward.checkpoint, which this one does not need."""
    return ColourJudge(instructions)
