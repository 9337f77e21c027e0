"""Settings for hosts and devices, and which device does what. Plain data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from policies.ranges import Count, CountOrZero, Range


@dataclass(frozen=True)
class MeshConfig:
    """The trainer's devices as a grid, data x fsdp; -1 = all that remain.

    Attributes:
        data: number of copies of the parameters (data parallelism); 0 = as many as fit, by the
            estimate of `evac_jax.tools.memory`. The log says which and why; fsdp must be -1 then.
        fsdp: devices over which each copy of parameters and optimiser state is sharded.
    """

    data: Annotated[int, Range(-1)] = 1
    fsdp: Annotated[int, Range(-1)] = -1


@dataclass(frozen=True)
class PlacementConfig:
    """Which devices of every host do what: "0-3", "0,2", or "" for all devices.

    Tasks that share a device take turns; tasks on different devices run at the same time.

    Attributes:
        env: CUDA devices of the simulator processes, assigned in blocks; "" = simulator.devices.
        rollout: devices of the trainer that decide on actions. If they differ from `actor`, they
            hold a copy of the policy, which is renewed after every update.
        actor: devices of the trainer that learn, arranged as in `mesh`.
    """

    env: str = ""
    rollout: str = ""
    actor: str = ""


@dataclass(frozen=True)
class ClusterConfig:
    """Devices and hosts (docs/scaling.md).

    Attributes:
        engine: "local": this command is the trainer; with several hosts, start it on each, by hand
            or by a job scheduler. "ray": this command starts one trainer on every host of a Ray
            cluster (requirements-ray.txt) and waits for them.
        num_nodes: hosts. Each has simulator.processes simulators and an equal share of the
            environments; all share log.dir.
        node: number of this host, 0 .. num_nodes - 1; with the engine "ray", Ray sets it.
        coordinator: "address:port" of host 0, where the trainers connect; with the engine "ray",
            Ray sets it.
        placement: which devices do what.
        offload: what is moved off its devices while it is not in use: "simulator" (the world model,
            during updates), "optimizer" (its state, during rollouts) and "sampler" (the copy of
            the policy that decides, during updates).
        memory_fraction: share of a GPU's memory that JAX takes at the start; 0 = half if any
            simulator computes on CUDA (simulator.devices), else JAX's default. The variables
            XLA_PYTHON_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_PREALLOCATE take precedence.
        compilation_cache: folder in which compiled programs are kept for the next start;
            "auto" = <log.dir>/.compiled, "" = none. JAX_COMPILATION_CACHE_DIR takes precedence.
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


def device_problems(devices: Iterable[str]) -> list[str]:
    """Return one line if any of `simulator.devices` is no torch device that simulators know."""
    unknown = [d for d in devices if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", d)]
    if not unknown:
        return []
    return [
        'config.simulator.devices: expected "cpu", "cuda" or "cuda:N" with N from 0, got '
        f"{unknown}; set it as in --config.simulator.devices='(\"cuda:0\",)'"
    ]


def parse_devices(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "0-3,6", in that order; () for "".

    Raises:
        ValueError: the text is not such a list, or a number occurs twice.
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
