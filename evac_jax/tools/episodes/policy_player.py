"""Plays a policy folder in the tabletop's ground truth, as reinforcement learning would ask it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evac_jax.errors import CheckpointError
from evac_jax.miniature import scene as world
from evac_jax.miniature.render import render
from evac_jax.miniature.scene import Scenes
from evac_jax.miniature.tasks import INSTRUCTIONS
from policies.openvla_oft import peft
from policies.openvla_oft.import_hf import load_policy
from policies.types import ObsBatch

MAX_PROMPT_LENGTH = 28


def _base_and_adapter(folder: Path) -> tuple[Path, Path | str]:
    """Return the folder of a policy and the adapter to merge into it, "" if there is none."""
    config = folder / peft.CONFIG
    if not config.is_file():
        return folder, ""
    name = json.loads(config.read_text())["base_model_name_or_path"]
    return folder.with_name(Path(name).name), folder


class PolicyPlayer:
    """A policy that is asked once per chunk.

    Args:
        folder: Hugging Face folder of a policy for the miniature, or a LoRA adapter in PEFT's
            layout whose base lies beside it under the name that the adapter gives.
        temperature: of sampling; 0 = greedy.

    Raises:
        CheckpointError: the folder holds no policy that can be loaded.
    """

    def __init__(self, folder: str | Path, *, temperature: float):
        try:
            base, adapter = _base_and_adapter(Path(folder))
            statistics = json.loads((base / "dataset_statistics.json").read_text())
            if not isinstance(statistics, dict) or not statistics:
                raise ValueError("dataset_statistics.json holds no statistics")
            loaded = load_policy(
                base,
                unnorm_key=next(iter(statistics)),
                max_prompt_length=MAX_PROMPT_LENGTH,
                lora_adapter=adapter,
            )
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"cannot load a policy from {str(folder)!r}: {error}") from error
        self._image_size = loaded.model.config.image_size
        self._chunk = loaded.model.action_spec.chunk
        self._prompts = [jnp.asarray(x) for x in loaded.tokenizer.encode(list(INSTRUCTIONS))]
        graphdef, self._state = nnx.split(loaded.model)

        def act(state, obs, key):
            model = nnx.merge(graphdef, state)
            return model.sample(
                obs, key, temperature=temperature or 1.0, greedy=temperature == 0
            ).actions

        self._act = jax.jit(act)

    def play(self, scenes: Scenes, steps: int, *, seed: int) -> tuple[np.ndarray, list[Scenes]]:
        """Return the executed actions [N steps 7], gripper -1 opens, and the steps + 1 states."""
        states, actions, chunk = [scenes], [], np.empty(0)
        tokens, mask = (part[scenes.task] for part in self._prompts)
        for t in range(steps):
            if t % self._chunk == 0:
                images = jnp.asarray(render(states[-1], self._image_size))[:, None]
                obs = ObsBatch(images=images, prompt_tokens=tokens, prompt_mask=mask)
                chunk = np.array(self._act(self._state, obs, jax.random.key(seed + t)))
                chunk[..., 6] = -np.sign(2 * chunk[..., 6] - 1)  # the "libero" gripper rule
            actions.append(chunk[:, t % self._chunk])
            states.append(world.step(states[-1], actions[-1]))
        return np.stack(actions, 1), states
