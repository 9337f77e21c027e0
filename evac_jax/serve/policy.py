"""The policy that is served: decides on chunks as an evaluation does."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Float, UInt8

from evac_jax import checkpoint
from evac_jax.config import world
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, DataError
from evac_jax.policy_import import check_card, import_policy
from evac_jax.shapes import expected_episode
from evac_jax.tools.policy import export
from policies.base import Tokenizer
from policies.types import ObsBatch

# The rules of `env.gripper`, as `evac_jax.sim.actions` has them for simulators, in PyTorch.
GRIPPER_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "libero": lambda gripper: -np.sign(2 * gripper - 1),
    "binary": lambda gripper: (gripper > 0.5).astype(gripper.dtype),
    "none": lambda gripper: gripper,
}
MAX_SEEN = 1000  # instructions that are remembered, as clients may send any
WARM_UP = "warm up"  # an instruction as any other; its actions go nowhere


class ServedPolicy:
    """A policy on one device, asked for one chunk at a time. Not safe for several threads at once.

    Args:
        model: an NNX module, `policies.base.Policy`.
        tokenizer: makes its prompts.
        config: reads `policy.eval_temperature`, `policy.top_k`, `env.gripper` and `seed`.
        iteration: of the run that it comes from; None = it is a policy folder.
        taught: instructions of the world that it learned in, () if that is not known. Others are
            answered too, but each is warned of once.

    Attributes:
        chunk: actions per decision, K.
        dim: entries of an action, A.
        iteration: see Args.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: TrainConfig,
        iteration: int | None = None,
        taught: Sequence[str] = (),
    ):
        self.chunk, self.dim = model.action_spec.chunk, model.action_spec.dim
        self.iteration = iteration
        self._tokenizer, self._decisions = tokenizer, 0
        self._taught = tuple(taught)
        # Prompts are in lower case, so an instruction is the same in capitals.
        self._seen = {text.lower() for text in taught}
        self._key = jax.random.key(config.seed)
        self._gripper = GRIPPER_RULES[config.env.gripper]
        graphdef, self._state = nnx.split(model)
        self._temperature, top_k = config.policy.eval_temperature, config.policy.top_k

        # The parameters are an argument: JAX copies what a jitted function closes over.
        def act(state, obs, key, temperature, greedy):
            model = nnx.merge(graphdef, state)
            out = model.sample(obs, key, temperature=temperature, top_k=top_k, greedy=greedy)
            return out.actions

        self._act = jax.jit(act, static_argnames="greedy")

    def decide(
        self, frames: UInt8[np.ndarray, "V H W 3"], instruction: str
    ) -> Float[np.ndarray, "K A"]:
        """Return the next actions, float32, in the units of the policy's action statistics.

        The gripper entry is converted by `env.gripper`. Preprocessing (size, crop) is the policy's
        own, so `frames` are what a simulator would give: upright as in training, RGB, 0..255.
        With a temperature the draw depends on `seed` and on the number of decisions before.

        Raises:
            DataError: the instruction cannot be a prompt of this policy, such as a longer one.
        """
        key = jax.random.fold_in(self._key, self._decisions)
        actions = self._decide(frames, instruction, key)
        self._decisions += 1
        self._warn_of_unknown(instruction)
        return actions

    def _warn_of_unknown(self, instruction: str) -> None:
        text = instruction.lower()
        if not self._taught or text in self._seen or len(self._seen) > MAX_SEEN:
            return
        self._seen.add(text)
        logging.warning("%r is none of the policy's world; that has %s", instruction, self._taught)

    def warm_up(self, num_images: int, shapes: tuple[tuple[int, int], ...]) -> None:
        """Compile for frames of `shapes` (height, width), so that no request waits for it."""
        for height, width in shapes:
            logging.info("compiling for frames of %d x %d pixels", height, width)
            self._decide(np.zeros((num_images, height, width, 3), np.uint8), WARM_UP, self._key)

    def _decide(self, frames: np.ndarray, instruction: str, key: jax.Array) -> np.ndarray:
        try:
            tokens, mask = self._tokenizer.encode([instruction])
        except ValueError as error:
            raise DataError(f"the server's policy: {error}") from error
        obs = ObsBatch(
            images=jnp.asarray(frames[None]),
            prompt_tokens=jnp.asarray(tokens),
            prompt_mask=jnp.asarray(mask),
        )
        temperature = self._temperature
        out = self._act(self._state, obs, key, temperature or 1.0, greedy=temperature == 0)
        actions = np.array(out[0])
        actions[:, -1] = self._gripper(actions[:, -1])
        return actions


def load(config: TrainConfig) -> ServedPolicy:
    """Return the policy that `checkpoint.restore` or `policy.checkpoint` names.

    Both name a run or its checkpoint folder, and `checkpoint.step` the iteration;
    `policy.checkpoint` may also be RUN/checkpoints/<iteration> or a Hugging Face folder. How a
    run's policy was imported is the run's own setting; how it decides is this configuration's.

    Raises:
        CheckpointError: there is none, or it cannot be imported.
        ConfigError: the run had another chunk or another number of cameras, or the policy's card
            says that it was trained otherwise.
    """
    serve = config.serve
    options: dict[str, Any] = {"num_images": len(serve.image_keys), "chunk": serve.chunk}
    source, run = find(config)
    if run is None:
        gripper = ("env.gripper", config.env.gripper)
        check_card(config.policy, gripper=gripper, chunk=("serve.chunk", serve.chunk))
        # A value head decides nothing.
        start = dataclasses.replace(config.policy, value_head="none")
        loaded = import_policy(start, seed=config.seed, **options)
        return ServedPolicy(loaded.model, loaded.tokenizer, config, taught=_taught(source.parent))
    if config.checkpoint.restore:
        run = dataclasses.replace(run, checkpoints=checkpoint.folder_of(config, source))
    _check_run(run, config)
    model, tokenizer, iteration = export.trained_policy(run, **options)
    if model.action_spec.chunk != serve.chunk:  # its value head tells
        raise _other_chunk(model.action_spec.chunk, serve.chunk)
    return ServedPolicy(model, tokenizer, config, iteration, _taught(run.folder))


def find(config: TrainConfig) -> tuple[Path, export.Run | None]:
    """Return where the served policy lies, and the run there, None for a Hugging Face folder.

    Raises:
        CheckpointError: there is neither.
    """
    source = Path(config.policy.checkpoint)
    if config.checkpoint.restore:
        source = checkpoint.named_run(config)
    return source, export.find_run(source, config.checkpoint.step)


def _taught(folder: Path) -> tuple[str, ...]:
    """Return the instructions of the world whose card lies in a folder, () without a card."""
    card = folder / world.CARD_FILE
    if not card.is_file():
        return ()
    return world.Card.from_json(card.read_bytes(), str(card)).instructions


def _check_run(run: export.Run, config: TrainConfig) -> None:
    """Compare with the settings of a run: refuse other shapes, warn of other decisions."""
    saved, serve = run.saved, config.serve
    simulator, world_model = saved["env"]["simulator"], saved["world_model"]["checkpoint"]
    theirs = dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, simulator=simulator),
        world_model=dataclasses.replace(config.world_model, checkpoint=world_model),
    )
    if episode := expected_episode(theirs):
        if episode.chunk != serve.chunk:
            raise _other_chunk(episode.chunk, serve.chunk)
        if episode.image_shape[0] != len(serve.image_keys):
            raise ConfigError(
                f"config.serve.image_keys: the run's world model has {episode.image_shape[0]} "
                f"cameras, expected a key for each, got {serve.image_keys}"
            )
    elif simulator == "world_model":
        logging.warning(
            "config.serve.chunk: taken to be %d; the run's world model is not at %r any more",
            serve.chunk,
            world_model,
        )
    differences = (
        ("policy.eval_temperature", config.policy.eval_temperature, run.policy.eval_temperature),
        ("policy.top_k", config.policy.top_k, run.policy.top_k),
        ("env.gripper", config.env.gripper, saved["env"]["gripper"]),
    )
    for field, value, before in differences:
        if value != before:
            logging.warning(
                "config.%s: served with %r, the run was evaluated with %r", field, value, before
            )


def _other_chunk(theirs: int, ours: int) -> ConfigError:
    return ConfigError(
        f"config.serve.chunk: the run's policy decides on {theirs} actions at once, expected the "
        f"same, got {ours}"
    )
