"""Placement of a run: the devices that imagine, decide and learn, and how the log shows it.

Numbers are those of a host's own devices, as JAX and CUDA count them; every host is set up alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from evac_jax.config.cluster import parse_devices
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Devices of the parts of a run, on this host.

    Attributes:
        env: torch device of each simulator process.
        rollout, actor: numbers of the trainer's devices that decide and that learn.
        count: devices that the trainer sees.
    """

    env: tuple[str, ...]
    rollout: tuple[int, ...]
    actor: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, config: TrainConfig, count: int) -> "Placement":
        """Place a run where the trainer has `count` devices.

        Raises:
            ConfigError: a device does not exist, or simulators cannot be divided evenly.
        """
        wanted, problems = config.cluster.placement, []
        every = tuple(range(count))
        parts = {}
        for name in ("rollout", "actor"):
            parts[name] = parse_devices(getattr(wanted, name)) or every
            if missing := [n for n in parts[name] if n >= count]:
                problems.append(
                    f"config.cluster.placement.{name}: there is no device {missing[0]}; the "
                    f"trainer sees {count}, numbered from 0"
                )
        env, processes = parse_devices(wanted.env), config.simulator.processes
        if env and processes % len(env):
            problems.append(
                f"config.simulator.processes: must be a multiple of the {len(env)} devices of "
                f"cluster.placement.env, so that each has equally many; got {processes}"
            )
        if problems:
            raise ConfigError("\n".join(problems))
        return cls(env=env_devices(config), **parts, count=count)

    @property
    def separate(self) -> bool:
        """Whether deciding and learning use different devices, so that the policy is copied."""
        return set(self.rollout) != set(self.actor)

    def pick(self, part: str, devices: Sequence[T]) -> list[T]:
        """Return the devices of "rollout" or "actor" among all that the trainer sees."""
        return [devices[n] for n in getattr(self, part)]

    def __str__(self) -> str:
        """One line per device: what it does."""
        cuda = [int(name.partition(":")[2] or 0) for name in self.env if name.startswith("cuda")]
        lines = []
        for n in range(max([self.count, *(number + 1 for number in cuda)])):
            roles = ["simulator" + f" x{cuda.count(n)}" * (cuda.count(n) > 1)] * (n in cuda)
            roles += [part for part in ("rollout", "actor") if n in getattr(self, part)]
            lines.append(f"device {n}: {', '.join(roles) or 'nothing'}")
        if others := [name for name in self.env if not name.startswith("cuda")]:
            lines.append(f"{others[0]}: simulator x{len(others)}")
        return "\n".join(lines)


def env_devices(config: TrainConfig) -> tuple[str, ...]:
    """Return the torch device of each simulator process."""
    processes, devices = config.simulator.processes, config.simulator.devices
    if env := parse_devices(config.cluster.placement.env):
        # Neighbours share a device: an environment's block stays on one.
        share = max(processes // len(env), 1)
        return tuple(f"cuda:{env[p // share]}" for p in range(processes))
    return tuple(devices) * (processes if len(devices) == 1 else 1)


def rollout_fsdp(rollout_devices: int, actor_fsdp: int) -> int:
    """Return how many devices the policy's copy is cut over: as many as the actor if possible."""
    return math.gcd(rollout_devices, actor_fsdp)
