"""Frames on loan: a JAX array over a slot's memory, and a check that nobody reads it any more.

`jax.dlpack.from_dlpack` aliases: the simulator's next chunk would show through the "immutable"
array, even inside a computation that is already running. So a slot goes back only when JAX itself
has dropped its last reference to the memory, which running computations and NumPy views of the
array hold too. That moment is observed, not assumed: each loan wraps the slot in an object of its
own and waits for the end of that object's life.

On the CPU the slot is exported by NumPy, whose DLPack export is the same protocol as torch's, so
that the trainer needs no torch; on CUDA torch exports it.
"""

import functools
import threading
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from evac_jax.bridge.types import StepResult

RELEASE_TIMEOUT_S = (
    60.0  # longer than any computation on frames: a later reader is a forgotten view
)


class SlotOwnershipError(RuntimeError):
    """A slot was used by a side that does not own it: a mistake in the calling code."""


def shard_frames(view: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return `view` as one global array on `sharding`, each device reading its own part.

    On CPU devices a part aliases the view where it is contiguous and 64-byte aligned; on others
    it is one copy to the device. The caller must treat the result as an alias either way.

    Args:
        view: the whole batch, uint8 [B V H W 3].
        sharding: over devices of this process, usually a `NamedSharding` that cuts the batch.

    Raises:
        ValueError: if the sharding spans other processes.
    """
    if not sharding.is_fully_addressable:
        raise ValueError(f"frames stay on this process's devices, got {sharding}")
    parts = [
        jax.device_put(view[index], device)
        for device, index in sharding.addressable_devices_indices_map(view.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(view.shape, sharding, parts)


def _import(view, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if not isinstance(view, np.ndarray):
        import torch  # only where the slot is GPU memory

        array = jax.dlpack.from_dlpack(torch.as_tensor(view))
        return array if sharding is None else jax.device_put(array, sharding)
    return jax.dlpack.from_dlpack(view) if sharding is None else shard_frames(view, sharding)


class Exchange:
    """One answer of the simulator, and the loan of the slot that its frames lie in.

    Made while the simulator still works, so that wrapping host memory costs no time of its own;
    `arrive` completes it. Valid until `release` or `owned`; afterwards reading `frames` raises, and
    so does every other name for the same JAX array, because it is deleted.

    Attributes:
        result: everything but the frames; plain NumPy arrays, yours to keep.
        slot: number of the slot.
        request: number of the request that this answers.
    """

    def __init__(
        self,
        view,
        clip: Callable[[], np.ndarray],
        *,
        slot: int,
        request: int,
        give_back: Callable[[], object],
        sharding: jax.sharding.Sharding | None = None,
    ):
        self.slot, self.request = slot, request
        self._give_back, self._read_clip = give_back, clip
        self._clip: np.ndarray | None = None
        self._unread = threading.Event()  # set from whichever thread drops the last reference
        self._watch = weakref.ref(view, lambda _, unread=self._unread: unread.set())
        self.released = False
        self._frames: jax.Array | None = None
        self._import = functools.partial(_import, view, sharding)
        if isinstance(view, np.ndarray) and sharding is None:  # an alias, of whatever comes
            self._frames = self._import()

    def arrive(self, result: StepResult) -> "Exchange":
        """Take the answer, whose frames are complete; return this exchange."""
        self.result = result
        if self._frames is None:
            self._frames = self._import()
        del self._import  # it holds on to the slot's memory
        return self

    def _check(self, what: str) -> None:
        if self.released:
            raise SlotOwnershipError(
                f"{what} of request {self.request} used after release: slot {self.slot} belongs "
                "to the simulator again; read before release(), or keep a copy with owned()"
            )

    @property
    def frames(self) -> jax.Array:
        """Last frame of the chunk, uint8 [B V H W 3]; aliases the slot until `release`."""
        self._check("frames")
        assert self._frames is not None, "read before `arrive`"
        return self._frames

    @property
    def clip(self) -> np.ndarray:
        """Every frame of the chunk, uint8 [clip_envs K V H W 3]; a copy, made when first read."""
        if self._clip is None:
            self._check("clip")
            self._clip = np.array(self._read_clip())
        return self._clip

    def release(self, *computed) -> None:
        """Give the slot back to the simulator; does nothing the second time.

        Waits for `computed`, then for everything else that still reads the frames, and deletes
        the frames.

        Args:
            computed: arrays or pytrees computed from the frames. On a GPU name them all, since
                JAX may let go of memory when its reader is queued but not done. On the CPU the
                slot is safe without; naming them makes their errors surface here.

        Raises:
            SlotOwnershipError: if something still holds the memory after `RELEASE_TIMEOUT_S`,
                such as a NumPy view of the frames. The slot stays with the trainer.
        """
        jax.block_until_ready(computed)
        if self.released:
            return
        if self._frames is not None:
            self._frames.delete()
            self._frames = None
        if not self._unread.wait(RELEASE_TIMEOUT_S):
            raise SlotOwnershipError(
                f"slot {self.slot} (request {self.request}) is still read {RELEASE_TIMEOUT_S:g} s "
                "after release(): a NumPy view such as np.asarray(exchange.frames) is alive; "
                "copy it with np.array instead"
            )
        self.released = True
        self._give_back()

    def owned(self) -> jax.Array:
        """Return a copy of the frames that is yours to keep, and release the slot."""
        # jnp.array copies; from_dlpack(copy=True) and device_put do not (JAX 0.10.2, CPU).
        copy = jnp.array(self.frames, copy=True)
        self.release(copy)
        return copy
