"""Slots: the memory through which frames go from the simulator to the trainer.

The trainer owns K >= 2 slots per simulator. Each holds

    sequence  uint64                       request whose frames are complete in here; 0 = none
    frames    uint8 [B V H W 3]            last frame of the chunk
    clip      uint8 [clip_envs K V H W 3]  every frame of the chunk, for videos

and has one owner at a time: the simulator between a request and its reply, then the trainer until
it releases the slot. The sequence number is written after the payload, so that frames of a
simulator that died half-way are never taken for complete ones.

Host memory is one anonymous file (memfd) that the worker inherits. It has no name, so nothing can
be left behind in /dev/shm when a process is killed. It does not count against the size of /dev/shm,
and passing it needs no rights beyond those of a parent. Linux only. On one GPU the payload is in
CUDA IPC blocks instead (`CudaSlots`), and only the sequence numbers are in the file.

Both processes import this; torch is imported where a tensor is asked for, JAX never.
"""

import mmap
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from evac_jax.bridge.types import EnvSpec
from evac_jax.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Page alignment also satisfies XLA, which aliases host memory only at multiples of 64 bytes.
_PAGE = mmap.PAGESIZE


def available_bytes() -> int:
    """Return the memory that this machine can give without swapping."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


@dataclass(frozen=True)
class SlotLayout:
    """Where things lie in a slot; both processes derive it from the environment's facts."""

    frames_shape: tuple[int, ...]
    clip_shape: tuple[int, ...]

    @classmethod
    def of(cls, env: EnvSpec) -> "SlotLayout":
        """Return the layout for an environment."""
        clip = (env.clip_envs, env.action.chunk, *env.image_shape)
        return cls((env.num_envs, *env.image_shape), clip)

    @property
    def clip_offset(self) -> int:
        """Bytes from the first frame to the clip."""
        return _pages(prod(self.frames_shape))

    @property
    def payload_bytes(self) -> int:
        """Bytes of frames and clip together, whole pages."""
        return self.clip_offset + _pages(prod(self.clip_shape))


class SharedSlots:
    """Slots in an anonymous shared file: one page for the sequence numbers, then the payloads.

    Args:
        fd: the file; the caller keeps it and closes it.
        layout: of one slot.
        num_slots: how many.
        create: size the file and reserve its memory; the trainer does, the worker maps it.

    Raises:
        ConfigError: if the machine has not enough memory for the slots.
    """

    def __init__(self, fd: int, layout: SlotLayout, num_slots: int, *, create: bool = False):
        self.layout, self.num_slots = layout, num_slots
        size = self._offset(num_slots)
        if create:
            if size > (available := available_bytes()):
                raise ConfigError(
                    f"expected {size / 2**20:.0f} MiB of free memory for {num_slots} slots, got "
                    f"{available / 2**20:.0f} MiB; lower env.num_envs, simulator.slots or the "
                    "episodes filmed"
                )
            # Reserved now rather than at the first frames, where a failure would surprise. Never
            # without the check above: the kernel would kill processes to find the pages.
            os.posix_fallocate(fd, 0, size)
        # Views keep the map alive: memory goes back to the system with the last of them.
        self._map = mmap.mmap(fd, size)
        self._sequence = np.frombuffer(self._map, np.uint64, num_slots)

    def _offset(self, slot: int) -> int:
        return _PAGE + slot * self.layout.payload_bytes

    def sequence(self, slot: int) -> int:
        """Return the request whose payload is complete in `slot`, 0 if none is."""
        return int(self._sequence[slot])

    def begin(self, slot: int) -> None:
        """Mark the payload as incomplete, before the first byte of it changes."""
        self._sequence[slot] = 0

    def publish(self, slot: int, request: int) -> None:
        """Mark the payload as that of `request`, after its last byte was written."""
        self._sequence[slot] = request

    def frames(self, slot: int) -> "np.ndarray | _DeviceView":
        """Return the frames as a new array over the slot's memory, uint8 [B V H W 3].

        Each call makes a new object, so that the end of its life tells the end of one loan.
        """
        return self._view(self._offset(slot), self.layout.frames_shape)

    def clip(self, slot: int) -> np.ndarray:
        """Return the clip as an array over the slot's memory, uint8 [clip_envs K V H W 3]."""
        return self._view(self._offset(slot) + self.layout.clip_offset, self.layout.clip_shape)

    def _view(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        count = prod(shape)
        if not count:
            return np.zeros(shape, np.uint8)
        return np.frombuffer(self._map, np.uint8, count, offset).reshape(shape)

    def tensors(self, slot: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return frames and clip as the torch tensors that the simulator writes."""
        import torch

        frames = self._view(self._offset(slot), self.layout.frames_shape)
        return torch.from_numpy(frames), torch.from_numpy(self.clip(slot))

    def finish(self) -> None:
        """Wait until what was written is visible to the trainer: at once in host memory."""

    def handles(self) -> tuple[dict[str, Any], ...]:
        """Return what the worker needs beyond the file: nothing."""
        return ()


class _DeviceView:
    """Memory of a CUDA tensor as an object of its own, whose end of life can be watched."""

    def __init__(self, tensor: "torch.Tensor"):
        self._tensor = tensor  # keeps the memory

    @property
    def __cuda_array_interface__(self):
        return self._tensor.__cuda_array_interface__


class CudaSlots(SharedSlots):
    """Slots in GPU memory that trainer and simulator share through CUDA IPC.

    The trainer allocates and exports, so a dead simulator takes no frames with it, and the blocks
    outlive every restart. Requests go out only after the trainer has released a slot, and replies
    only after `finish`, so no CUDA event needs to cross. NOT tested without a GPU: the tests of
    this class carry the `gpu` mark.

    Args:
        fd: the shared file, here for the sequence numbers only.
        layout: of one slot.
        num_slots: how many.
        device: torch device, the same GPU for both processes.
        handles: what the trainer's `handles` gave; None in the trainer, which allocates.

    Raises:
        ConfigError: if torch's allocator is set so that blocks cannot be exported safely.

    Source: torch/multiprocessing/reductions.py (PyTorch 2.13), the same two storage calls.
    """

    def __init__(
        self,
        fd: int,
        layout: SlotLayout,
        num_slots: int,
        *,
        device: str,
        handles: tuple[dict[str, Any], ...] | None = None,
    ):
        import torch

        nothing = SlotLayout((0,), (0,))
        super().__init__(fd, nothing, num_slots, create=handles is None)
        self.layout = layout
        self._device = torch.device(device)
        if handles is None:
            settings = (
                os.environ.get("PYTORCH_ALLOC_CONF", "")
                + ","
                + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
            )
            if "expandable_segments:true" in settings.replace(" ", "").lower():
                # Such blocks cross through pidfd_getfd, which containers refuse.
                raise ConfigError(
                    "expected expandable_segments off in the trainer, which exports CUDA blocks, "
                    f"got {settings.strip(',')!r}; change PYTORCH_CUDA_ALLOC_CONF"
                )
            blocks = [
                torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(num_slots)
            ]
            torch.cuda.synchronize(self._device)
        else:
            blocks = [self._open(handle) for handle in handles]
        self._blocks = blocks

    def _open(self, handle: dict[str, Any]) -> "torch.Tensor":
        import torch

        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(
            self._device.index or 0,
            bytes.fromhex(handle["storage"]),
            handle["bytes"],
            handle["offset"],
            bytes.fromhex(handle["counter"]),
            handle["counter_offset"],
            bytes.fromhex(handle["event"]),
            handle["event_needed"],
        )
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def handles(self) -> tuple[dict[str, Any], ...]:
        """Return one CUDA IPC handle per slot as plain values; exported anew on every call."""
        names = (
            *("device", "storage", "bytes", "offset"),
            *("counter", "counter_offset", "event", "event_needed"),
        )
        exports = []
        for block in self._blocks:
            handle = dict(zip(names, block.untyped_storage()._share_cuda_(), strict=True))
            del handle["device"]  # the worker may number its devices differently
            exports.append({k: v.hex() if isinstance(v, bytes) else v for k, v in handle.items()})
        return tuple(exports)

    def tensors(self, slot: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return frames and clip as tensors on the GPU."""
        block, layout = self._blocks[slot], self.layout
        clip = block[layout.clip_offset :][: prod(layout.clip_shape)]
        frames = block[: prod(layout.frames_shape)]
        return frames.view(layout.frames_shape), clip.view(layout.clip_shape)

    def frames(self, slot: int) -> _DeviceView:
        """Return the frames' memory as a new object that torch can wrap (`torch.as_tensor`)."""
        return _DeviceView(self.tensors(slot)[0])

    def clip(self, slot: int) -> np.ndarray:
        """Return a host copy of the clip."""
        return self.tensors(slot)[1].cpu().numpy()

    def finish(self) -> None:
        """Wait for the stream that made the frames; the trainer reads on one of its own."""
        import torch

        torch.cuda.current_stream(self._device).synchronize()
