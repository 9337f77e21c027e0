"""Plays a policy folder in the tabletop's ground truth, as reinforcement learning would ask it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evac_jax.config.schema import PolicyConfig
from evac_jax.errors import CheckpointError
from evac_jax.miniature import scene as world
from evac_jax.miniature.render import render
from evac_jax.miniature.scene import Scenes
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.policy_import import import_policy, told_as_checkpoint_error
from policies.openvla_oft import peft
from policies.openvla_oft.import_hf import read_norm_stats
from policies.types import ObsBatch

SETTINGS = PolicyConfig(max_prompt_length=28)  # where no configuration tells


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
        policy: how it is imported and sampled. `checkpoint` is the Hugging Face folder of a policy
            for the miniature, or a LoRA adapter in PEFT's layout whose base lies beside it under
            the name that the adapter gives; `temperature` 0 = greedy. `unnorm_key` may be "" where
            the folder has statistics of one name only.

    Raises:
        CheckpointError: the folder holds no policy that can be loaded, or not these statistics.
    """

    def __init__(self, policy: PolicyConfig):
        with told_as_checkpoint_error(f"cannot load a policy from {policy.checkpoint!r}"):
            base, adapter = _base_and_adapter(Path(policy.checkpoint))
            keys = [policy.unnorm_key] if policy.unnorm_key else list(read_norm_stats(base))
        if len(keys) != 1:
            raise CheckpointError(
                f"config.policy.unnorm_key: expected one of {keys}, the action statistics of "
                f"{str(base)!r}, got ''; set it, or --unnorm_key of tools.episodes.collect"
            )
        loaded = import_policy(
            dataclasses.replace(
                policy,
                checkpoint=str(base),
                lora_adapter=str(adapter or policy.lora_adapter),
                unnorm_key=keys[0],
                value_head="none",
            ),
            seed=0,
        )
        temperature, top_k = policy.temperature, policy.top_k
        self._image_size = loaded.model.config.image_size
        self._chunk = loaded.model.action_spec.chunk
        self._prompts = [jnp.asarray(x) for x in loaded.tokenizer.encode(list(INSTRUCTIONS))]
        graphdef, self._state = nnx.split(loaded.model)

        def act(state, obs, key):
            model = nnx.merge(graphdef, state)
            return model.sample(
                obs, key, temperature=temperature or 1.0, top_k=top_k, greedy=temperature == 0
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
