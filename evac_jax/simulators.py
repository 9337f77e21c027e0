"""All simulator processes of a run as one batch of environments.

Environments are divided among the processes in contiguous blocks, so groups stay whole. Frames
arrive by DLPack (`bridge`); with one process and one device they are never copied on the way.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging

from evac_jax.bridge.client import Exchange, SimulatorClient
from evac_jax.bridge.types import StepResult
from evac_jax.config import vlm_card
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.devices.placement import env_devices
from evac_jax.errors import SimulatorError
from evac_jax.starts import noise_seed


@dataclasses.dataclass
class BatchStep:
    """One exchange with every process, as if there were only one.

    Attributes:
        frames: uint8 [B V H W 3] on the mesh; may alias the slots until `release`, None after.
        result: the processes' results joined along the batch axis.
        instructions: what the result's task numbers mean.
        clips: uint8 [n K V H W 3] on the host: whole chunks of the first environments of the
            first process, for videos.
    """

    frames: jax.Array | None
    result: StepResult
    instructions: tuple[str, ...]
    clips: np.ndarray
    exchanges: Sequence[Exchange]

    def release(self, *computed) -> None:
        """Give the slots back once everything computed from `frames` is ready."""
        self.frames = None
        for exchange in self.exchanges:
            exchange.release(*computed)


def _join(results: Sequence[StepResult]) -> StepResult:
    """Concatenate results of the processes; phase times are of the slowest process."""
    if len(results) == 1:
        return results[0]

    def cat(name):
        return np.concatenate([getattr(result, name) for result in results])

    names = ("task", "proprio", "rewards", "terminated", "truncated", "success")
    return StepResult(
        **{name: cat(name) for name in names},
        episode={
            key: np.concatenate([result.episode[key] for result in results])
            for key in results[0].episode
        },
        seconds={
            key: max(result.seconds.get(key, 0.0) for result in results)
            for key in results[0].seconds
        },
    )


class Simulators:
    """This host's pool of simulator processes, driven in lockstep.

    The constructor starts them; call `wait_until_ready` before anything else.

    Args:
        specs: one JSON-able worker spec per process (see `sim.worker`).
        mesh: where the frames go, cut along the batch; this host's part of it is used.
        config: time limits and slots.
        host: number of this host, and so of its block of the run's environments.

    Attributes:
        rows: per part (pipeline stage), which of this host's environments it holds, int64. Every
            process holds a block of them and a share of each part.
        first: number, among all hosts' environments, of this host's first one.
    """

    def __init__(
        self, specs: Sequence[dict], mesh: jax.sharding.Mesh, config: TrainConfig, host: int = 0
    ):
        sim, mesh = config.simulator, sharding.local_mesh(mesh)
        self._mesh = mesh
        # One process's frames go straight to the mesh; those of several are joined first.
        direct = sharding.batch_sharding(mesh) if len(specs) == 1 and mesh.size > 1 else None
        self._clients: list[SimulatorClient] = []
        try:
            for spec in specs:
                self._clients.append(
                    SimulatorClient(
                        spec,
                        num_slots=sim.slots,
                        timeout_s=sim.timeout_s,
                        start_timeout_s=sim.start_timeout_s,
                        restarts=sim.restarts,
                        sharding=direct,
                    )
                )
        except BaseException:
            self.close()
            raise
        self._host = host

    def wait_until_ready(self) -> "Simulators":
        """Wait for the processes and return this pool; all pools' processes start in parallel.

        Raises:
            SimulatorError: one did not start, or they disagree.
        """
        for client in self._clients:
            client.wait_until_ready()
        self.spec = self._clients[0].env_spec
        if any(client.env_spec != self.spec for client in self._clients):
            raise SimulatorError("the simulator processes disagree about their environment")
        for note in self.spec.notes:
            logging.warning("%s", note)
        parts, processes = self._clients[0].parts, len(self._clients)
        every = np.arange(processes * parts * self.spec.num_envs)
        self.rows = list(every.reshape(processes, parts, -1).swapaxes(0, 1).reshape(parts, -1))
        self.first, self._first_rank = self._host * len(every), self._host * processes
        return self

    @property
    def num_envs(self) -> int:
        """Environments of this host, all processes and parts together."""
        return sum(len(rows) for rows in self.rows)

    def send_reset(self, starts: np.ndarray, seed: int, part: int = 0) -> None:
        """Ask to start an episode in the environments `rows[part]`, without waiting.

        Args:
            starts: int64 [len(rows[part])]; `IDLE` leaves an environment out.
            seed: of the noise, the same for all parts of a batch.
        """
        if starts.shape != self.rows[part].shape:
            raise ValueError(f"starts: expected shape {self.rows[part].shape}, got {starts.shape}")
        blocks = np.split(starts, len(self._clients))
        for rank, (client, block) in enumerate(zip(self._clients, blocks, strict=True)):
            client.send_reset(block, noise_seed(seed, self._first_rank + rank), part)

    def send_step(self, actions: np.ndarray, part: int = 0) -> None:
        """Ask to play one chunk in the environments `rows[part]`: `actions` float32 [n K A]."""
        blocks = np.split(actions, len(self._clients))
        for client, block in zip(self._clients, blocks, strict=True):
            client.send_step(block, part)

    def reset(self, starts: np.ndarray, seed: int) -> BatchStep:
        """`send_reset`, then `receive`."""
        self.send_reset(starts, seed)
        return self.receive()

    def step(self, actions: np.ndarray) -> BatchStep:
        """`send_step`, then `receive`."""
        self.send_step(actions)
        return self.receive()

    def receive(self) -> BatchStep:
        """Return the answers to the oldest request that has none yet."""
        exchanges = [client.receive() for client in self._clients]
        return BatchStep(
            frames=sharding.joined(self._mesh, [exchange.frames for exchange in exchanges]),
            result=_join([exchange.result for exchange in exchanges]),
            instructions=self.spec.instructions,
            clips=exchanges[0].clip,
            exchanges=exchanges,
        )

    def park(self) -> None:
        """Let the simulators leave their devices until the next reset; no episode goes on."""
        for client in self._clients:
            client.send_park()

    def close(self) -> None:
        """End every process."""
        for client in self._clients:
            client.close()


def world_model_specs(config: TrainConfig) -> list[dict]:
    """Return the worker specs of a host's imagining processes, one per process."""
    env, sim = config.env, config.simulator
    share, stages = config.envs_per_process, config.rollout.pipeline_stages
    settings = {
        "world_model": config.world_model.checkpoint,
        "judge": config.reward.judge,
        "reward": config.reward.checkpoint,
        "vlm": dataclasses.asdict(config.reward.vlm),
        "veto": config.reward.veto,
        "pose_model": env.pose_model,
        "initial_states": env.initial_states,
        "initial_states_path": env.initial_states_path,
        "keyframe_data": env.keyframe_data if env.keyframes else "",
        "num_envs": share,
        "steps": config.world_model.steps,
        "eta": config.world_model.eta,
        "solver": config.world_model.solver,
        "compile": config.world_model.compile,
        # Every other number of environments would be compiled anew.
        "skip_finished": not config.world_model.compile,
        "reference_compat": config.world_model.reference_compat,
        "max_episode_steps": env.max_episode_steps,
        "coefficient": config.reward.coefficient,
        "relative": config.reward.relative,
        "threshold": config.reward.threshold,
        "success_frames": config.reward.success_frames,
        "judged_frames": config.reward.judged_frames,
        "auto_reset": config.algo.auto_reset,
        "ignore_terminations": config.algo.ignore_terminations,
        "gripper": env.gripper,
        "clip_envs": min(config.video.episodes, share // stages) if config.video.save else 0,
        "dtype": sim.dtype,
    }
    if config.reward.judge == "vlm":
        settings |= vlm_card.simulated(config.reward.checkpoint)
    return [
        {
            "environment": "evac_jax.sim.env:make",
            "config": settings,
            "device": device,
            "parts": stages,
            "threads": sim.threads,
        }
        for device in env_devices(config)
    ]


GROUND_TRUTHS = {
    "miniature": "evac_jax.miniature.env:make",
    "libero": "evac_jax.sim.libero:make",
}


def ground_truth_specs(config: TrainConfig) -> list[dict]:
    """Return the worker spec of a host's ground-truth process for evaluation."""
    return [_ground_truth_spec(config, config.eval.ground_truth_envs // config.cluster.num_nodes)]


def training_specs(config: TrainConfig) -> list[dict]:
    """Return the worker specs of the simulators in which the policy learns, see `env.simulator`."""
    if config.env.simulator == "world_model":
        return world_model_specs(config)
    processes, share, algo = config.simulator.processes, config.envs_per_process, config.algo
    ends = {"auto_reset": algo.auto_reset, "ignore_terminations": algo.ignore_terminations}
    stages = config.rollout.pipeline_stages
    spec = _ground_truth_spec(config, share, stages, **ends)
    return [spec | {"parts": stages} for _ in range(processes)]


def _ground_truth_spec(config: TrainConfig, num_envs: int, stages: int = 1, **settings) -> dict:
    name = config.eval.ground_truth
    settings |= {
        "num_envs": num_envs,
        "coefficient": config.reward.coefficient,
        "relative": config.reward.relative,
        "gripper": config.env.gripper,
        "clip_envs": min(config.video.episodes, num_envs // stages) if config.video.save else 0,
    }
    if name == "libero":  # the benchmark says how long its episodes are
        settings["libero"] = dataclasses.asdict(config.libero)
    else:
        settings["keyframe_data"] = config.env.keyframe_data if config.env.keyframes else ""
        settings["max_episode_steps"] = config.env.max_episode_steps
    environment = GROUND_TRUTHS.get(name, name)  # the user's own is an import string already
    return {"environment": environment, "config": settings, "device": "cpu", "threads": 1}


@contextlib.contextmanager
def started(
    config: TrainConfig, mesh: jax.sharding.Mesh, *, learning: bool = True
) -> Iterator[tuple[Simulators, Simulators | None]]:
    """Start all simulator processes of this host, unawaited; end them whatever happens.

    Args:
        mesh: where the frames go.
        learning: False starts nothing that only learning needs.

    Yields:
        The simulators of training, and the ground truth or None. Where nothing is imagined and
        nothing is learned, both are the one pool of the ground truth.
    """
    with contextlib.ExitStack() as stack:

        def start(specs: list[dict]) -> Simulators:
            pool = Simulators(specs, mesh, config, jax.process_index())
            stack.callback(pool.close)
            return pool

        imagined = real = None
        if learning or config.env.simulator == "world_model":
            imagined = start(training_specs(config))
        if config.eval.ground_truth != "none":
            real = start(ground_truth_specs(config))
        pool = imagined or real
        assert pool is not None, "env.simulator='ground_truth' needs a ground truth: checks.py"
        yield pool, real
