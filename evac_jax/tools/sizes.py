"""Sizes of networks that are trained from scratch: by the name of a setting, or from a file."""

import json
from pathlib import Path
from typing import Any

from evac_jax.errors import ConfigError
from evac_jax.evac.config import EvacConfig
from evac_jax.libero_small import sizes as libero_small
from evac_jax.libero_small import sizes_128 as libero_128
from evac_jax.miniature import sizes as miniature
from policies.openvla_oft.config import OpenVLAOFTConfig

NAMED = {"miniature": miniature, "libero_small": libero_small, "libero_128": libero_128}
DEFAULT = "miniature"
HELP = f"from scratch: {', '.join(NAMED)}, or a JSON file of"


def world_model(named: str | None) -> EvacConfig:
    """Return the sizes of a new world model or autoencoder.

    Args:
        named: a key of `NAMED`; a JSON file of an `EvacConfig`, or the config.json of a model's
            folder, whose `consistent_scale` is true unless it says otherwise, since what is
            trained now is sampled as it is trained; None = `DEFAULT`.

    Raises:
        ConfigError: there is no such file, or it is not a configuration.
    """
    if (known := named or DEFAULT) in NAMED:
        return NAMED[known].WORLD_MODEL
    values = _read(known)
    values = values.get("config", values) if isinstance(values, dict) else values
    if isinstance(values, dict):
        values = {"consistent_scale": True} | values
    return EvacConfig.from_dict(values)


def policy(named: str) -> OpenVLAOFTConfig:
    """Return the sizes of a new policy.

    Args:
        named: a key of `NAMED`, or the config.json of a policy's folder.

    Raises:
        ConfigError: there is no such file, or it is not a configuration.
    """
    if named in NAMED:
        return NAMED[named].POLICY
    try:
        return OpenVLAOFTConfig.from_hf(_read(named))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"--sizes={named}: not the config.json of a policy ({error})") from error


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--sizes={path}: expected {', '.join(NAMED)}, or a readable JSON file ({error})"
        ) from error
