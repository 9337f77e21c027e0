"""Where a run computes: hosts, devices and what they do. Plain data."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from policies.ranges import Count, CountOrZero, Range


@dataclass(frozen=True)
class MeshConfig:
    """The trainer's devices as a grid; -1 = what is left.

    Attributes:
        data: devices that hold whole copies of the parameters.
        fsdp: devices that parameters and optimiser state are cut over.
    """

    data: Annotated[int, Range(-1)] = 1
    fsdp: Annotated[int, Range(-1)] = -1


@dataclass(frozen=True)
class PlacementConfig:
    """Which devices of every host do what: "0-3", "0,2" or "" for all of them.

    Devices with several parts take turns; parts with devices of their own work side by side.

    Attributes:
        env: CUDA devices of the simulator processes, which are dealt out to them in blocks; "" = as
            simulator.devices says.
        rollout: the trainer's devices that decide on actions. Where they are not those of `actor`
            they hold a copy of the policy, renewed after every update.
        actor: the trainer's devices that learn, laid out as `mesh` says.
    """

    env: str = ""
    rollout: str = ""
    actor: str = ""


@dataclass(frozen=True)
class ClusterConfig:
    """Devices and hosts (docs/scaling.md).

    Attributes:
        engine: "local": this command is the trainer, on each host the same command is started by
            hand or by a job scheduler; "ray": this command places one trainer on every host of a
            Ray cluster (requirements-ray.txt) and waits for them.
        num_nodes: hosts. Each has simulator.processes simulators and an equal share of the
            environments; all share log.dir.
        node: number of this host, 0 .. num_nodes - 1; set by Ray where that is the engine.
        coordinator: "address:port" of host 0, where the trainers meet; likewise.
        placement: which devices do what.
        offload: what leaves its devices while it has nothing to do, of "simulator" (the world
            model, during updates), "optimizer" (its state, during rollouts) and "sampler" (the
            copy of the policy that decides, during updates).
        memory_fraction: share of a GPU's memory that JAX takes at once; 0 = half where
            simulators share its GPUs, JAX's own default elsewhere. What
            XLA_PYTHON_CLIENT_MEM_FRACTION or XLA_PYTHON_CLIENT_PREALLOCATE say goes first.
        compilation_cache: folder in which compiled programs are kept for the next start;
            "auto" = <log.dir>/.compiled, "" = none. JAX_COMPILATION_CACHE_DIR goes first.
        cpu_beside_gpu: let a policy of more than 1e9 parameters be computed on the CPU although
            the host has a GPU.
    """

    engine: Literal["local", "ray"] = "local"
    num_nodes: Count = 1
    node: CountOrZero = 0
    coordinator: str = ""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    offload: tuple[Literal["simulator", "optimizer", "sampler"], ...] = ()
    memory_fraction: Annotated[float, Range(0, 1, open="high")] = 0.0
    compilation_cache: str = "auto"
    cpu_beside_gpu: bool = False


def parse_devices(text: str) -> tuple[int, ...]:
    """Return the numbers of "0-3,6", in their order; () for "".

    Raises:
        ValueError: no such list, or a number comes twice.
    """
    numbers: list[int] = []
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f'expected devices such as "0-3" or "0,2", got {text!r}')
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"expected every device once, got {text!r}")
    return tuple(numbers)
