"""`cluster.engine = "ray"`: one trainer on every host of a Ray cluster, and a watch over them.

Ray places the trainers and notices when one dies; each starts its host's simulators itself. Frames
stay on their host and gradients go through JAX's own collectives; Ray carries neither.
Every host needs this project and its environment at the same path, and the same log.dir.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from absl import logging

from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, EvacJaxError, HostError, StoppedError

PLACEMENT_TIMEOUT_S = 120
POLL_S = 1.0
PASSED_ON = (
    *("JAX_", "XLA_", "NCCL_", "TF_CPP_", "WANDB_", "HF_", "OMP_", "LD_LIBRARY_PATH"),
    "PYTHONPATH",  # the user's own modules: trainers begin in folders of their own
)


def run(config: TrainConfig, mode: str) -> None:
    """Train or evaluate on all hosts of the Ray cluster that RAY_ADDRESS or Ray itself names.

    Without a cluster, Ray starts one that consists of this host only.

    Raises:
        ConfigError: Ray is not installed, or the cluster has too few hosts.
        HostError: a trainer failed or its host was lost; the others are ended.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    ray = _import_ray()
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=True)
    try:
        _run(ray, config, mode)
    finally:
        if own:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.util  # placement groups
    except ImportError as error:
        raise ConfigError(
            f'config.cluster.engine: "ray" needs Ray, which cannot be imported ({error}); '
            "install it with all other requirements in one pip command (docs/cluster.md), or use "
            '"local"'
        ) from None
    return ray


def _run(ray: Any, config: TrainConfig, mode: str) -> None:
    hosts = config.cluster.num_nodes
    group = _reserve(ray, config)
    environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    gpus = int(group.bundle_specs[0].get("GPU", 0))
    trainer = ray.remote(num_cpus=1, num_gpus=gpus)(Trainer)
    trainers = [
        trainer.options(
            placement_group=group,
            placement_group_bundle_index=host,
            runtime_env={"env_vars": environment},
        ).remote()
        for host in range(hosts)
    ]
    try:
        names = ray.get([t.name.remote() for t in trainers])
        first = ray.get(trainers[0].process.remote())
        address = ray.get(trainers[0].address.remote())
        values = to_dict(config)
        jobs = {
            t.run.remote(values, mode, host, address, sys.argv): host
            for host, t in enumerate(trainers)
        }
        asked = _signals()
        waiting, passed_on = list(jobs), False
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_S)
            for job in done:
                _check(ray, job, jobs[job], names, config)
            if asked and not passed_on:  # to one host, which tells the others
                passed_on = True
                kill = ray.remote(num_cpus=0)(os.kill).options(
                    placement_group=group, placement_group_bundle_index=0
                )
                kill.remote(first, asked[0])
    finally:
        for t in trainers:
            ray.kill(t)
        ray.util.remove_placement_group(group)


def _signals() -> list[int]:
    """Return a list that gets the first signal to end the run; a second one ends this process."""
    asked: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if asked:
            os._exit(128 + asked[0])  # Ray ends the trainers of a driver that is gone
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, receive)
    return asked


def _reserve(ray: Any, config: TrainConfig) -> Any:
    """Reserve all GPUs of as many hosts as the run needs."""
    hosts = config.cluster.num_nodes
    alive = [node for node in ray.nodes() if node["Alive"]]
    gpus = min(int(node["Resources"].get("GPU", 0)) for node in alive)
    bundle = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    strategy = "STRICT_SPREAD" if hosts > 1 else "PACK"
    group = ray.util.placement_group([bundle] * hosts, strategy=strategy)
    if len(alive) < hosts or not group.wait(PLACEMENT_TIMEOUT_S):
        there = "\n".join(f"  {n['NodeManagerAddress']}: {n['Resources']}" for n in alive)
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"config.cluster.num_nodes: {hosts} hosts with {bundle} free are wanted, the Ray "
            f"cluster has:\n{there}"
        )
    return group


def _check(ray: Any, job: Any, host: int, names: list[str], config: TrainConfig) -> None:
    """Raise the error that ended a trainer, if one failed."""
    where = f"host {host} of {len(names)} ({names[host]})"
    try:
        ray.get(job)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StoppedError):
            raise StoppedError(str(error.cause), error.cause.signal) from None
        if isinstance(error.cause, EvacJaxError):
            raise HostError(f"{where}: {error.cause}") from None
        raise HostError(f"{where} failed:\n{error}") from None
    except ray.exceptions.RayActorError as error:
        from evac_jax import (  # and Orbax, which the driver does not need otherwise
            checkpoint,
            stopping,
        )

        folder = Path(config.log.dir, config.log.run)
        if config.checkpoint.restore not in ("", "auto"):
            folder = checkpoint.named_run(config)
        advice = stopping.how_to_go_on(folder, checkpoint.folder_of(config, folder))
        reason = str(error).strip().splitlines()[0]
        raise HostError(f"{where} was lost, and so the run ended: {reason}\n{advice}") from None


class Trainer:
    """A host's trainer process."""

    def name(self) -> str:
        """Return the host's name."""
        return socket.gethostname()

    def process(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    def address(self) -> str:
        """Return "address:port" of this host, free for the trainers to meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(
        self, values: dict[str, Any], mode: str, host: int, coordinator: str, argv: list[str]
    ) -> None:
        """Do this host's part, see `evac_jax.train`."""
        from evac_jax import train  # and JAX, which the driver does not need

        sys.argv = argv  # messages name the command that goes on
        logging.set_verbosity(logging.INFO)
        values["cluster"] |= {"node": host, "coordinator": coordinator}
        config = from_config_dict(values)

        {"train": train.run, "eval": train.evaluate_only}[mode](config)
