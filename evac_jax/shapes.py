"""Shapes of a run's frames, actions and batches, known before anything is imagined."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from algos.types import RolloutBatch
from evac_jax.bridge.types import EnvSpec
from evac_jax.config.algorithms import load_algorithm
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError
from evac_jax.evac.config import EvacConfig
from policies.openvla_oft.config import OpenVLAOFTConfig


@dataclass(frozen=True)
class EpisodeShapes:
    """An episode's shapes.

    Attributes:
        image_shape: (views, height, width, 3) of a frame.
        chunk: actions of one decision.
        max_steps: actions after which the episode is cut off.
    """

    image_shape: tuple[int, int, int, int]
    chunk: int
    max_steps: int

    @property
    def chunks(self) -> int:
        """Decisions of an episode."""
        return -(-self.max_steps // self.chunk)

    @classmethod
    def of(cls, env: EnvSpec) -> "EpisodeShapes":
        """Return the shapes that a running simulator reports."""
        return cls(env.image_shape, env.action.chunk, env.max_episode_steps)

    @classmethod
    def imagined_by(cls, model: EvacConfig, max_steps: int) -> "EpisodeShapes":
        """Return the episodes of a world model of these sizes."""
        return cls((model.n_view, *model.image_size, 3), model.chunk, max_steps)


def expected_episode(config: TrainConfig) -> EpisodeShapes | None:
    """Return what the run's simulators will report, read from the world model's config.json.

    None if the file does not tell: in the ground truth, and if it is not that of a world model; the
    simulator then reports the mistake with a better message.
    """
    if config.env.simulator != "world_model":
        return None
    try:
        text = Path(config.world_model.checkpoint, "config.json").read_text()
        model = EvacConfig.from_dict(json.loads(text)["config"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return EpisodeShapes.imagined_by(model, config.env.max_episode_steps)


def batch_shapes(
    config: TrainConfig, sizes: OpenVLAOFTConfig, episode: EpisodeShapes
) -> RolloutBatch:
    """Return one iteration's batch, of all hosts, as `jax.ShapeDtypeStruct`s."""

    def shape(*after, dtype):
        return jax.ShapeDtypeStruct((config.episodes_per_iteration, *after), dtype)

    chunks, chunk = episode.chunks, episode.chunk
    tokens = (chunks, chunk, sizes.action_dim)
    values = None
    if sizes.num_values:
        values = shape(chunks + 1, sizes.num_values, dtype=jnp.float32)
    return RolloutBatch(
        images=shape(chunks, *episode.image_shape, dtype=jnp.uint8),
        prompt_tokens=shape(sizes.max_prompt_length, dtype=jnp.int32),
        prompt_mask=shape(sizes.max_prompt_length, dtype=jnp.bool_),
        tokens=shape(*tokens, dtype=jnp.int32),
        log_probs=shape(*tokens, dtype=jnp.float32),
        values=values,
        rewards=shape(chunks, chunk, dtype=jnp.float32),
        terminated=shape(chunks, chunk, dtype=jnp.bool_),
        truncated=shape(chunks, chunk, dtype=jnp.bool_),
    )


def check_sizes(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    rollout_mesh: jax.sharding.Mesh,
    episode: EpisodeShapes,
) -> None:
    """Check what depends on the devices and on the world model's chunk.

    Raises:
        ConfigError: batches cannot be cut as configured; all reasons in one message.
    """
    problems = []
    if episode.max_steps % episode.chunk:
        problems.append(
            f"config.env.max_episode_steps: must be a multiple of the world model's chunk of "
            f"{episode.chunk} actions, got {episode.max_steps}"
        )
    if config.env.simulator == "world_model" and config.reward.judge == "vlm":
        problems += config.reward.vlm.too_long_for(episode.chunks)
    samples = config.episodes_per_iteration * episode.chunks
    algorithm = load_algorithm(config.algorithm)
    problems += algorithm.problems(
        config.algo, num_samples=samples, reward_coefficient=config.reward.coefficient
    )
    micro_batch = config.algo.micro_batch or config.algo.global_batch
    part = config.env.num_envs // config.rollout.pipeline_stages
    for name, count, grid, what in (
        ("env.num_envs / rollout.pipeline_stages", part, rollout_mesh, "decide"),
        ("env.num_envs x rollout.epochs", config.episodes_per_iteration, mesh, "learn"),
        ("algo.micro_batch", micro_batch, mesh, "learn"),
    ):
        if count % grid.size:
            problems.append(
                f"config.{name}: must be a multiple of the {grid.size} devices that {what}, got "
                f"{count}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
