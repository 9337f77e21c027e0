"""Imports the configured policy; progress is shown, every failure is a CheckpointError."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from evac_jax.config.schema import PolicyConfig, TrainConfig
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.files import cards, libero_facts
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.telemetry.reading import ReadProgress
from policies import POLICIES
from policies.base import LoadedPolicy
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import NO_NOOPS, load_config, read_norm_stats

# Facts in the card of a policy, or in that of the policy it was trained from.
OF_CARD = ("gripper", "unnorm_key", "chunk", "keep_stop_token")


def check_policy(policy: PolicyConfig, tasks: Sequence[str] = ()) -> None:
    """Check that `policy` can be imported, as far as possible without reading weights.

    Args:
        policy: of the configuration.
        tasks: instructions that it will be asked for, as far as they are known.

    Raises:
        CheckpointError: it cannot, or its actions would have no units; says why.
    """
    # Whether a value head fits depends on the simulator's chunk, which is not known yet.
    options = _options(policy) | {"value_type": "none"}
    with told_as_checkpoint_error(_what(policy)):
        _module().check_policy(policy.checkpoint, tasks=tasks, **options)
    _check_units(policy)


def _check_units(policy: PolicyConfig) -> None:
    with told_as_checkpoint_error(_what(policy)):
        known = [] if policy.unnorm_key else list(read_norm_stats(policy.checkpoint))
    if known:
        raise CheckpointError(
            f"config.policy.unnorm_key: actions of {policy.checkpoint!r} are un-normalised by its "
            f"statistics; expected a key of them, one of {known}, got ''"
        )


def known_tasks(config: TrainConfig) -> list[str]:
    """Return the instructions of a run as far as they are known before anything starts.

    The miniature and LIBERO have their own, others are told by the cards of the run's folders.
    Further sources, such as code of the user's own, tell theirs when they run.

    Raises:
        ConfigError: LIBERO's table of tasks cannot be read.
        DataError: a card is damaged.
    """
    texts: list[str] = []
    imagined = config.env.simulator == "world_model"
    if "miniature" in (config.eval.ground_truth, config.env.initial_states if imagined else ""):
        texts += INSTRUCTIONS
    if config.eval.ground_truth == "libero":
        texts += config.libero.instructions
    folders = [config.env.keyframe_data] if config.env.keyframes else []
    if imagined and config.env.initial_states_path:
        folders.append(config.env.initial_states_path)
    for folder in folders:
        texts += cards.read(Path(folder)).get("instructions", ())
    return list(dict.fromkeys(texts))


def check_libero(config: TrainConfig) -> None:
    """Check that a run's policy and start frames belong to the LIBERO that it is evaluated in.

    Only cards that tell of LIBERO are compared; published policies have none.

    Raises:
        ConfigError: frames or actions would mean something else than in training.
    """
    if config.eval.ground_truth != "libero":
        return
    for field, folder in (
        ("policy.checkpoint", config.policy.checkpoint),
        ("env.initial_states_path", config.env.initial_states_path),
    ):
        known = libero_facts.told(cards.read(Path(folder))) if folder else {}
        if known and (unlike := libero_facts.differences(known, config.libero.facts())):
            raise ConfigError(
                f"config.{field}: {folder!r} was made for another LIBERO than config.libero: "
                f"{unlike}. `python -m evac_jax.tools.policy.libero_flags FOLDER` prints the flags "
                "for it"
            )


def told_by(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a policy's card says of how it was trained, or the card of what it started from.

    Args:
        card: of the policy's folder, {} if it has none.

    Returns:
        {name: value} of those of `OF_CARD` that are told.
    """
    found = {}
    for name in OF_CARD:
        one: Any = card
        while isinstance(one, Mapping) and one.get(name) is None:
            one = one.get("start")
        if isinstance(one, Mapping):
            found[name] = one[name]
    return found


def check_card(policy: PolicyConfig, **asked: tuple[str, Any]) -> None:
    """Check that a policy is asked as its card says it was trained; published ones have no card.

    Args:
        policy: of the configuration. The card of its adapter counts before that of the checkpoint.
        asked: name of `OF_CARD` -> (field that sets it, value), beyond what `policy` itself says.

    Raises:
        ConfigError: names every field that differs.
        DataError: the card is damaged.
    """
    folder = Path(policy.lora_adapter or policy.checkpoint)
    if not cards.read(folder):
        folder = Path(policy.checkpoint)
    asked |= {"keep_stop_token": ("policy.keep_stop_token", policy.keep_stop_token)}
    if policy.unnorm_key:  # else `_check_units` tells which there are
        asked |= {"unnorm_key": ("policy.unnorm_key", policy.unnorm_key)}
    known, problems = told_by(cards.read(folder)), []
    for name, (field, value) in asked.items():
        expected = known.get(name, value)
        if _plain(expected) != _plain(value):
            problems.append(
                f"config.{field}: expected {name} {expected!r}, with which the policy was trained "
                f"({folder}/card.json), got {value!r}; change the field, or the card if it is wrong"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _plain(value: Any) -> Any:
    return value.removesuffix(NO_NOOPS) if isinstance(value, str) else value


def import_policy(
    policy: PolicyConfig, *, seed: int, acts: bool = True, **more: Any
) -> LoadedPolicy:
    """Return the loader's result for `policy`.

    Args:
        seed: of parameters that start fresh.
        acts: False if only the weights are used, so that no statistics are needed.
        more: further arguments of the loader (chunk, num_images, shardings ..).

    Raises:
        CheckpointError: the checkpoint or the adapter cannot be imported; says why.
    """
    options = _options(policy) | more
    if acts:
        _check_units(policy)
    with told_as_checkpoint_error(_what(policy)), ReadProgress("policy weights") as progress:
        loaded = _module().load_policy(policy.checkpoint, seed=seed, progress=progress, **options)
    for note in loaded.notes:
        logging.info("policy import: %s", note)
    return loaded


def read_sizes(policy: PolicyConfig, **more: Any) -> OpenVLAOFTConfig:
    """Return the sizes of a policy as the run imports it, from its config.json alone.

    Args:
        more: fields that the simulator tells (chunk, num_images).

    Raises:
        CheckpointError: the file cannot be read, or it tells other settings than `more`.
    """
    with told_as_checkpoint_error(_what(policy)):
        return policy_sizes(policy, load_config(policy.checkpoint, **more), **more)


def policy_sizes(
    policy: PolicyConfig, published: OpenVLAOFTConfig, **more: Any
) -> OpenVLAOFTConfig:
    """Return the sizes that a policy was published with, with the settings of a run."""
    fields = {field.name for field in dataclasses.fields(OpenVLAOFTConfig)}
    settings = {name: value for name, value in _options(policy).items() if name in fields}
    return dataclasses.replace(published, **settings, **more)


def _module() -> Any:
    return importlib.import_module(POLICIES["openvla_oft"])


def _what(policy: PolicyConfig) -> str:
    return f"config.policy.checkpoint: cannot import {policy.checkpoint!r}"


def _options(policy: PolicyConfig) -> dict[str, Any]:
    """Return what the configuration says to a loader."""
    return {
        "unnorm_key": policy.unnorm_key,
        "value_type": policy.value_head,
        "param_dtype": policy.param_dtype,
        "compute_dtype": policy.compute_dtype,
        "max_prompt_length": policy.max_prompt_length,
        "lora_rank": policy.lora_rank,
        "lora_alpha": policy.lora_alpha,
        "lora_adapter": policy.lora_adapter,
        "keep_stop_token": policy.keep_stop_token,
        "remat": policy.remat,
        "scan_layers": policy.scan_layers,
        "attention": policy.attention,
    }


@contextlib.contextmanager
def told_as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn what policies/ raise about files into a CheckpointError that begins with `what`."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise CheckpointError(f"{what}: {text}") from error
