"""Training of one model by several processes: `torchrun --nproc_per_node N -m -- evac_jax...`.

Gradients are averaged directly. DistributedDataParallel is not used, because the world model's loss
is not its `forward`, and some of its weights (see `ImageTowerConfig.embed_dim`) get no gradient.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from evac_jax.errors import ConfigError

BUCKET = 25_000_000  # gradient entries per message


@dataclass(frozen=True)
class Ranks:
    """This process and the other processes of a run.

    Attributes:
        rank: 0..world - 1.
        world: number of processes.
        device: the device of this process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: str) -> "Ranks":
        """Join the processes that torchrun started; without torchrun there is only this one.

        Args:
            device: "cpu" or "cuda"; torchrun's local rank chooses the GPU.

        Raises:
            ConfigError: there is no such device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device=cuda: PyTorch sees no GPU; use --device=cpu")
        rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        here = torch.device(device)
        if device == "cuda":
            here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(here)
        if world > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(rank, world, here)

    def leave(self) -> None:
        """End the group that `join` made."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def agree(self, flag: bool) -> bool:
        """Return the flag of the first process, in all processes."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.broadcast(value, 0)
        return bool(value)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = self.mean(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


ALONE = Ranks()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
