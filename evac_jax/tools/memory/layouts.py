"""Where the memory of trainer and simulators is: on which devices, and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.memory import trainer
from evac_jax.memory.parts import Part, peak, table
from evac_jax.tools.memory import simulator
from evac_jax.tools.memory.setup import Setup

# Resident size of a process without data, with the CPU builds of torch and JAX: 0.24 GB with JAX,
# 0.52 GB with torch, rounded up. CUDA builds take more.
BARE_PROCESS = 0.6e9
# Memory of a process on a GPU for its CUDA context. A usual value, not measured here.
CUDA_CONTEXT = Part("CUDA context (assumed)", 0.5e9)
# Title, parts of one process, number of such processes.
Held = tuple[str, tuple[Part, ...], int]
COLLOCATED, SEPARATED = "collocated", "separated"


@dataclass(frozen=True)
class Place:
    """A device, or the host, and the processes on it.

    Attributes:
        name: for the table.
        held: (title, parts, number of such processes). Peaks are added, because no process gives
            back the memory of its peak.
    """

    name: str
    held: tuple[Held, ...]

    @property
    def num_bytes(self) -> float:
        """Memory that the place needs."""
        return sum(peak(parts)[0] * count for _, parts, count in self.held)

    def describe(self) -> str:
        """Return its tables."""
        times = {1: ""}
        tables = [
            table(f"{self.name}, {title}{times.get(count, f' (each of {count})')}", parts)
            for title, parts, count in self.held
        ]
        return "\n".join(tables)


@dataclass(frozen=True)
class Layout:
    """How a run is placed on a machine.

    Attributes:
        name: `COLLOCATED` or `SEPARATED`.
        devices: one place for each kind of device; none without devices.
        host: the machine's memory.
        mesh: data x fsdp of the devices that train.
    """

    name: str
    devices: tuple[Place, ...]
    host: Place
    mesh: tuple[int, int]

    @property
    def device_bytes(self) -> float:
        """Memory of the fullest device."""
        return max((place.num_bytes for place in self.devices), default=0.0)

    @property
    def line(self) -> str:
        """The memory of every place, in one line."""
        places = (*self.devices, self.host)
        return ", ".join(f"{p.name} {p.num_bytes / 1e9:.1f} GB" for p in places)


def layouts(setup: Setup, devices: int) -> list[Layout]:
    """Return the possible layouts: all on all devices; with two or more, also half and half.

    Args:
        devices: accelerators of one host; 0 = everything on the host.
    """
    on_gpu = setup.imagines and setup.config.simulator.devices[0] != "cpu"
    found = [layout(setup, devices, COLLOCATED)]
    if devices > 1 and on_gpu and devices % 2 == 0:
        found.append(layout(setup, devices, SEPARATED))
    return found


def layout(setup: Setup, devices: int, name: str) -> Layout:
    """Return one layout; see `layouts`.

    Raises:
        ConfigError: batches are not divisible by this number of devices.
    """
    training = devices // 2 if name == SEPARATED else max(devices, 1)
    setup = setup.on(training)
    config = setup.config
    imagining = devices - training if name == SEPARATED else max(devices, 1)
    if problems := indivisible(config, training):
        raise ConfigError("\n".join(problems))
    processes = config.simulator.processes if setup.imagines else 0
    on_gpu = devices > 0 and config.simulator.devices[0] != "cpu"
    platform = setup.platform if devices else "cpu"
    trains = tuple(trainer.trainer_parts(config, setup.sizes, setup.episode, training, platform))
    imagines = _simulator(setup) if processes else ()
    slots = _slots(setup) if processes else Part("frame slots", 0)
    mesh = sharding.resolved(config.mesh.data, config.mesh.fsdp, training)
    shared = on_gpu and name == COLLOCATED  # slots are on the GPU if both use the same one
    host: list[Held] = [
        ("bare processes and what they read", tuple(_host(setup, processes, on_gpu)), 1)
    ]
    if not (on_gpu and shared):
        host.append(("frame slots", (slots,), processes))
    if devices == 0:
        host += [("trainer", trains, 1), ("simulator process", imagines, processes)]
        return Layout(name, (), _place("host", host), mesh)
    train_here = [("trainer", (*trains, CUDA_CONTEXT), 1)]
    if not on_gpu:
        host.append(("simulator process", imagines, processes))
        return Layout(name, (_place("device", train_here),), _place("host", host), mesh)
    imagine_here = (
        "simulator process",
        (*imagines, CUDA_CONTEXT, *((slots,) if shared else ())),
        -(-processes // imagining),
    )
    if name == COLLOCATED:
        places = (_place("device", [*train_here, imagine_here]),)
    else:
        places = (
            _place("training device", train_here),
            _place("imagining device", [imagine_here]),
        )
    return Layout(name, places, _place("host", host), mesh)


def indivisible(config: TrainConfig, devices: int) -> list[str]:
    """Return the trainer's objections to a mesh of this many devices."""
    micro = config.algo.micro_batch or config.algo.global_batch
    return [
        f"config.{field}: must be a multiple of the {devices} training devices, got {count}"
        for field, count in (("env.num_envs", config.env.num_envs), ("algo.micro_batch", micro))
        if count % devices
    ]


def _place(name: str, held: Sequence[Held]) -> Place:
    return Place(name, tuple(one for one in held if one[1] and one[2]))


def _simulator(setup: Setup) -> tuple[Part, ...]:
    config, model = setup.config, setup.world_model
    return tuple(
        simulator.simulator_parts(
            model,
            envs=config.env.num_envs // config.simulator.processes,
            capacity=setup.episode.chunks,
            dtype=config.simulator.dtype,
            decoded=config.reward.judged_frames or model.chunk,
            classifiers=0 if setup.own_judge else config.reward.checkpoint.count(",") + 1,
        )
    )


def _slots(setup: Setup) -> Part:
    config = setup.config
    views, height, width, _ = setup.episode.image_shape
    envs = config.env.num_envs // config.simulator.processes
    films = min(config.video.episodes, envs) if config.video.save else 0
    frames = envs + films * setup.world_model.chunk
    return Part("frame slots", config.simulator.slots * frames * views * height * width * 3)


def _host(setup: Setup, processes: int, on_gpu: bool) -> list[Part]:
    reading = ("reading weights",)
    tensor = trainer.import_bytes(setup.sizes)
    parts = [
        Part(f"{1 + processes} bare processes", BARE_PROCESS * (1 + processes)),
        Part("policy tensor being read, and its cast", tensor, reading),
    ]
    if processes and on_gpu:
        tensors = simulator.reading_bytes(setup.world_model) * processes
        parts.append(Part("world-model tensors being read, and their casts", tensors, reading))
    return parts
