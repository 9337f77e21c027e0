"""Rules of upstream's `inference` that golden vectors hold and that nothing here uses."""

from torch import Tensor
from torch.nn import functional as F

from evac_jax.evac.conditioning import delta_actions
from evac_jax.evac.config import EvacConfig


def sequence_deltas(poses: Tensor, config: EvacConfig, *, normalize: bool = True) -> Tensor:
    """[B, n - 1, 14] deltas of a whole trajectory [B, n, 16] (upstream's rule).

    Upstream puts n_previous - 1 copies of the first pose in front and skips as many results,
    which is the same as plain consecutive differences.
    """
    return delta_actions(poses, config, normalize=normalize)


def upstream_delta_slice(deltas: Tensor, index: int, config: EvacConfig) -> Tensor:
    """The rows of `sequence_deltas` that upstream's `inference` gives to chunk `index`.

    Reference behaviour, kept for its golden vectors: from the second chunk on the rows are
    shifted by n_previous - 1 against the frames, are one more than the frames, and run out at the
    end of the trajectory. `window_deltas` of the chunk's own poses is the corrected rule.
    """
    chunk, shift = config.chunk, config.n_previous - 1
    if index == 0:
        return deltas[:, :chunk]
    return deltas[:, index * chunk + shift : (index + 1) * chunk + shift + 1]


def resize_memory(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Memory frames [N, 3, H, W] in [0, 1] at another size, in [-1, 1].

    Bilinear with antialiasing, the rule of torchvision's Resize on tensors.
    """
    if tuple(frames.shape[-2:]) != tuple(size):
        frames = F.interpolate(frames, size=tuple(size), mode="bilinear", antialias=True)
    return (frames - 0.5) / 0.5
