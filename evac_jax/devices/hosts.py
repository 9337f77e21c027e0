"""Devices and hosts of a run: joins the trainers, keeps compiled programs, builds the meshes."""

import collections
import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from evac_jax.config.cluster import ClusterConfig
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding, together
from evac_jax.devices.found import check_devices
from evac_jax.devices.malloc import keep_freed_memory
from evac_jax.devices.placement import Placement, env_devices, rollout_fsdp
from evac_jax.errors import ConfigError, EvacJaxError, HostError, StoppedError

JOIN_TIMEOUT_S = 300
THREADS_PER_DEVICE = 8  # a program has several collectives under way at once
MIN_COMPILE_S = 0.05  # a program that compiles faster is not worth a file


def start(config: TrainConfig) -> None:
    """Prepare this process: memory, compilation cache, the other hosts' trainers; log the devices.

    Call before anything asks JAX for its devices.

    Raises:
        ConfigError: the other hosts cannot be reached, or are set up in another way.
    """
    _limit_memory(config)
    keep_programs(config)
    if config.cluster.num_nodes > 1:
        _join(config.cluster)
    if config.train.max_staleness:
        widen_cpu_pool()
    else:  # an update would block the rollout beside it
        keep_freed_memory()
    together.check_same(config)
    imagines = config.env.simulator == "world_model"
    check_devices(config, env_devices(config) if imagines else ("cpu",))


def keep_programs(config: TrainConfig) -> None:
    """Keep compiled programs on disk, where `cluster.compilation_cache` says."""
    folder = config.cluster.compilation_cache
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        if folder == "auto":
            folder = Path(config.log.dir, ".compiled")
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def widen_cpu_pool() -> None:
    """Give virtual CPU devices threads enough for an update and a rollout beside it.

    XLA's pool has a thread per core or device. A thread in a collective waits for the other
    devices; two programs at once can so take all threads, and both would wait for ever.
    """
    told = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(told[1]) if told else jax.config.read("jax_num_cpu_devices")
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS_PER_DEVICE * devices))


def _join(cluster: ClusterConfig) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices only
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from us
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_nodes,
            cluster.node,
            # Under Slurm or MPI JAX would otherwise take one device per process: the first GPU of
            # each host, since there is one trainer per host.
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"config.cluster: host {cluster.node} of {cluster.num_nodes} could not join the others "
            f"at cluster.coordinator = {cluster.coordinator!r} within {JOIN_TIMEOUT_S} s: {error}"
        ) from error


def _limit_memory(config: TrainConfig) -> None:
    """Tell JAX how much of a GPU to take, before it takes it."""
    settings = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    fraction = memory_share(config)
    if fraction and not any(name in os.environ for name in settings):
        os.environ[settings[0]] = str(fraction)


def memory_share(config: TrainConfig) -> float:
    """Return the share of a GPU's memory that the trainer takes; 0 = JAX's default."""
    shared = any(device.startswith("cuda") for device in config.simulator.devices)
    return config.cluster.memory_fraction or (0.5 if shared else 0.0)


class Compilations:
    """Counts the programs that JAX builds or takes from the compilation cache from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def is_first_host() -> bool:
    """Whether this process writes logs, videos and reports; every host writes checkpoints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_for_all(config: TrainConfig, how_to_go_on: Callable[[], str]):
    """End this host's trainer with one message when it, or another host's, fails.

    The trainers compute every step together, so none can go on, or save, without the others. They
    notice when a connection closes. JAX's own watch over the hosts takes up to two minutes and then
    ends the process with a message of its own; if host 0 is lost it ends the process at once.

    Args:
        how_to_go_on: makes the end of the message.

    Raises:
        HostError: with Ray, which ends the others' processes; otherwise this one ends, status 2.
    """
    try:
        yield
    except Exception as error:  # JAX tells of a closed connection by several types
        if jax.process_count() == 1 or isinstance(error, StoppedError):
            raise
        kind = "" if isinstance(error, EvacJaxError) else "another host may be gone, see its log: "
        logging.debug("cause", exc_info=True)
        message = (
            f"host {jax.process_index()} of {jax.process_count()} stopped, and with it the run; "
            f"{kind}{error}\n{how_to_go_on()}"
        )
        if config.cluster.engine == "ray":
            raise HostError(message) from error
        sys.stdout.flush()
        sys.stderr.write(f"\n{HostError.__name__}: {message}\n")
        sys.stderr.flush()
        os._exit(2)  # a usual exit waits for the hosts that are gone; simulators end by themselves


def devices_for(config: TrainConfig, task: str) -> list:
    """Return the devices of all hosts for a task of the trainer, "actor" or "rollout".

    Raises:
        ConfigError: impossible placement.
    """
    placement = Placement.of(config, jax.local_device_count())
    hosts = collections.defaultdict(list)
    for device in jax.devices():
        hosts[device.process_index].append(device)
    return [device for own in hosts.values() for device in placement.pick(task, own)]


def make_meshes(config: TrainConfig) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    """Return the meshes of the devices that learn and of those that decide.

    Every host contributes the devices of the same numbers.

    Raises:
        ConfigError: impossible placement or mesh.
    """
    placement = Placement.of(config, jax.local_device_count())
    logging.info("placement on each of %d hosts:\n%s", jax.process_count(), placement)
    learning = devices_for(config, "actor")
    actor = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, learning)
    if not placement.separate:
        return actor, actor
    devices = devices_for(config, "rollout")
    fsdp = rollout_fsdp(len(devices), sharding.fsdp_size(actor))
    return actor, sharding.make_mesh(-1, fsdp, devices)
