"""Memory of a simulator process, computed from shapes alone; part of `tools.memory`.

The networks are built on torch's meta device and run there, and every allocation is followed. So
the peaks are those of the real code, but nothing is computed. They are for one environment and then
multiplied, because the networks treat all environments alike. Attention counts as CUDA's fused
kernel, which never holds the scores. Memory of cuDNN and of the allocator is not included.
"""

import functools
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.memory.parts import Part
from evac_jax.sim.reward import CLASSIFIER_BATCH, RewardConfig, RewardNet

DRAW, DENOISE, DECODE, CLASSIFY = "encoding of maps", "denoising", "decoding", "classification"


def simulator_parts(
    model: EvacConfig,
    *,
    envs: int,
    capacity: int,
    dtype: str,
    decoded: int,
    classifiers: int,
) -> list[Part]:
    """Return the memory of one simulator process on its device.

    Args:
        envs: environments of the process.
        capacity: chunks of an episode.
        dtype: of the world model's networks.
        decoded: frames of a chunk that are decoded.
        classifiers: success classifiers; 0 = something else judges, which is left out.
    """
    size = getattr(torch, dtype).itemsize
    height, width = model.latent_size
    views, frames = envs * model.n_view, envs * model.n_view * decoded
    places = model.n_previous + capacity * model.chunk
    latents = places * model.autoencoder.latent_channels * height * width
    tokens = 2 * model.image_tokens * model.unet.context_dim
    pixels = 3 * model.image_size[0] * model.image_size[1] * size
    at_once = model.autoencoder.max_batch or max(frames, views * model.chunk)
    encode, decode, denoise = _activations(model, dtype)
    judged = min(frames, CLASSIFIER_BATCH)
    return [
        Part("world model", weight_bytes(model) * size / 4),
        Part("success classifiers", classifiers * _classifier()[0]),
        Part("history of latents and image tokens", (latents + tokens) * views * size),
        Part("encoder", encode * min(at_once, views * model.chunk), (DRAW,)),
        Part("denoiser", denoise * envs, (DENOISE,)),
        Part("decoder", decode * min(at_once, frames), (DECODE,)),
        Part("decoded frames", pixels * frames, (DECODE, CLASSIFY)),
        Part("classifier", _classifier()[1] * judged * bool(classifiers), (CLASSIFY,)),
    ]


@functools.lru_cache
def weight_bytes(model: EvacConfig) -> int:
    """Return the bytes of a world model in float32."""
    return _bytes(_build(model, "float32"))


def reading_bytes(model: EvacConfig) -> int:
    """Return the host's bytes while a world model is read: its largest tensor and the cast."""
    return 2 * max(tensor.nbytes for tensor in _build(model, "float32").state_dict().values())


@functools.lru_cache
def _build(model: EvacConfig, dtype: str) -> EvacModel:
    with torch.device("meta"):
        return EvacModel(model).eval().to(getattr(torch, dtype))


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@functools.lru_cache
def _activations(config: EvacConfig, dtype: str) -> tuple[int, int, int]:
    """Return peak bytes of encoding a frame, of decoding one, and of denoising an environment."""
    model, views = _build(config, dtype), config.n_view
    latent, (height, width) = config.autoencoder.latent_channels, config.latent_size

    def empty(*shape, kind=dtype):
        return torch.empty(*shape, dtype=getattr(torch, kind), device="meta")

    def denoise():
        tokens = empty(
            views, config.image_tokens + config.unet.action_tokens, config.unet.context_dim
        )
        context = model.unet.prepare_context(tokens, views)
        others = config.unet.in_channels - latent
        shape = (config.frames, height, width)
        model.velocity(
            empty(views, latent, *shape),
            empty(views, kind="int64"),
            empty(views, others, *shape),
            context,
        )

    return (
        peak_bytes(lambda: model.encode(empty(1, 3, *config.image_size))),
        peak_bytes(lambda: model.decode(empty(1, latent, height, width))),
        peak_bytes(denoise),
    )


@functools.lru_cache
def _classifier() -> tuple[int, int]:
    """Return (bytes of the weights, peak bytes of judging one 256-pixel frame)."""
    with torch.device("meta"):
        network = RewardNet(RewardConfig()).eval()
        frame = torch.empty(1, 3, 256, 256)
    return _bytes(network), peak_bytes(lambda: network.probability(frame))


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the largest number of bytes that tensors made inside `function` hold at once."""
    with torch.no_grad(), _Allocations() as allocations, _FusedAttention():
        function()
    return allocations.most


def traffic_bytes(function: Callable[[], object]) -> int:
    """Return the bytes that operations inside `function` read and write.

    Each operation reads its inputs and writes its results once, and views are free. So it is what
    an uncompiled program moves; a compiler that fuses operations moves less.
    """
    with torch.no_grad(), _Traffic() as traffic, _FusedAttention(traffic.add):
        function()
    return traffic.num_bytes


class _Traffic(TorchDispatchMode):
    """Adds up what operations read and write."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def add(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are read or written; those with repeated entries as they are held."""
        self.num_bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        known = {t.untyped_storage()._cdata for t in given}
        views = all(t.untyped_storage()._cdata in known for t in made)
        if given and not (views and not func._schema.is_mutable) and "empty" not in func.__name__:
            self.add(*given, *made)
        return result


class _Allocations(TorchDispatchMode):
    """Follows the storages that operations allocate, until they are freed."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.held -= num_bytes


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _FusedAttention(TorchFunctionMode):
    """Attention that allocates only its result; on the meta device it would hold all scores.

    Args:
        seen: called with queries, keys, values and result.
    """

    def __init__(self, seen: Callable[..., None] | None = None):
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, keys, values = args[:3]
            result = query.new_empty(*query.shape[:-1], values.shape[-1])
            if self._seen is not None:
                self._seen(query, keys, values, result)
            return result
        return func(*args, **(kwargs or {}))
