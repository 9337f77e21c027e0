"""The run whose memory is asked for: its configuration, and the sizes of its networks."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts
from evac_jax.errors import ConfigError
from evac_jax.evac.config import EvacConfig
from evac_jax.memory.mesh import fitting
from evac_jax.policy_import import policy_sizes
from evac_jax.shapes import EpisodeShapes
from policies.openvla_oft.config import OpenVLAOFTConfig

# Share of a device that JAX takes of its own accord.
JAX_SHARE = {"cuda": 0.75, "tpu": 1.0}


@dataclass(frozen=True)
class Setup:
    """A run and the sizes of its networks.

    Attributes:
        config: of the run.
        published: the policy's sizes before the run's settings.
        world_model: sizes.
        platform: of the accelerators, "cuda" or "tpu".
        device_bytes: memory of one.
    """

    config: TrainConfig
    published: OpenVLAOFTConfig
    world_model: EvacConfig
    platform: str = "cuda"
    device_bytes: float = 80e9

    def on(self, devices: int) -> "Setup":
        """Return the run with the mesh that it would choose on so many devices that learn."""
        share = hosts.memory_share(self.config) or JAX_SHARE[self.platform]
        limit = share * self.device_bytes
        config, _ = fitting(self.config, self.sizes, self.episode, devices, self.platform, limit)
        return dataclasses.replace(self, config=config)

    @property
    def sizes(self) -> OpenVLAOFTConfig:
        """The sizes of the policy as the run would import it."""
        views, chunk = self.episode.image_shape[0], self.episode.chunk
        return policy_sizes(self.config.policy, self.published, chunk=chunk, num_images=views)

    @property
    def episode(self) -> EpisodeShapes:
        """Shapes of the policy's inputs and actions."""
        return EpisodeShapes.imagined_by(self.world_model, self.config.env.max_episode_steps)

    @property
    def own_judge(self) -> bool:
        """Whether something else than classifiers judges, whose memory is not known."""
        return self.config.reward.judge != "classifier"

    @property
    def imagines(self) -> bool:
        """Whether there are simulator processes with networks."""
        return self.config.env.simulator == "world_model"


def read_setup(config: TrainConfig, policy_file: str, world_model_file: str) -> Setup:
    """Return the run with its networks' sizes, from config.json files or as published.

    Raises:
        ConfigError: a named file cannot be read.
    """
    policy = _json(policy_file, config.policy.checkpoint)
    world_model = _json(world_model_file, config.world_model.checkpoint)
    try:
        return Setup(
            config,
            OpenVLAOFTConfig.from_hf(policy) if policy else OpenVLAOFTConfig(),
            EvacConfig.from_dict(world_model.get("config", world_model)),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--policy_config or --world_model_config: {error}") from error


def _json(file: str, folder: str) -> dict[str, Any]:
    path = Path(file) if file else Path(folder or "") / "config.json"
    if not file and (not folder or not path.is_file()):
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
