"""Saves models to folders, loads them, and checks whether the weights of a file fit a model.

A folder holds `config.json` ({"model": class name, "config": sizes}) and `model.safetensors`;
`evac_jax.tools.world_model.import_evac` makes one from a public file. Or write `config.json` beside
a public file and name that file under "weights": it is read unchanged, see `weight_files`. The
comparison is strict: a key that the model lacks must be in the short list of unused keys.
"""

import importlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evac_jax.errors import CheckpointError
from evac_jax.evac.config import JsonConfig
from evac_jax.evac.weight_files import FLOATS, SHOWN, cast, find_file, read_weights, write_weights
from evac_jax.files.atomic import replacing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Class name -> import strings of the class and of its configuration.
MODELS = {
    "EvacModel": ("evac_jax.evac.model:EvacModel", "evac_jax.evac.config:EvacConfig"),
    "Autoencoder": (
        "evac_jax.evac.autoencoder:Autoencoder",
        "evac_jax.evac.config:AutoencoderConfig",
    ),
    "RewardNet": ("evac_jax.sim.reward:RewardNet", "evac_jax.sim.reward:RewardConfig"),
    "PoseModel": ("evac_jax.sim.pose_model:PoseModel", "evac_jax.sim.pose_model:PoseModelConfig"),
}
# Keys of public checkpoints that no computation here reads.
UNUSED = {
    "noise schedule, recomputed from the configuration": re.compile(
        r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
        r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
        r"|scale_arr"
    ),
    "text side of CLIP": re.compile(
        r"embedder\.model\.(positional_embedding|text_projection|logit_scale"
        r"|token_embedding\.weight|ln_final\.(weight|bias))"
    ),
}


@dataclass
class Fit:
    """How the keys of a file and of a model compare.

    Attributes:
        missing: keys of the model that the file lacks.
        unexpected: keys of the file that the model lacks and that are not known to be unused.
        mismatched: key -> (shape in the file, shape in the model).
        mistyped: key -> (type in the file, type in the model), if only one of them is an integer.
        unused: keys of the file that are known and not needed.
        hints: likely causes of the differences.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    mistyped: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the weights can be loaded."""
        return not (self.missing or self.unexpected or self.mismatched or self.mistyped)

    def describe(self) -> str:
        """The problems, one per line."""
        differing = {**self.mismatched, **self.mistyped}
        told = {k: f"{k} (file {f}, model {m})" for k, (f, m) in differing.items()}
        lines = [
            _listing("missing in the file", self.missing),
            _listing("unknown to the model", self.unexpected),
            _listing("of another shape", list(self.mismatched), told),
            _listing("of another type", list(self.mistyped), told),
        ]
        return "\n".join([line for line in lines if line] + self.hints)


def _listing(what: str, keys: list[str], told: Mapping[str, str] | None = None) -> str:
    """One line: the first keys as examples, and how many there are in each part of the model."""
    if not keys:
        return ""
    line = f"  {len(keys)} {what}: {', '.join((told or {}).get(key, key) for key in keys[:SHOWN])}"
    if len(keys) > SHOWN:
        parts = Counter(".".join(key.split(".")[:2]) for key in keys).most_common(SHOWN)
        line += ", ...; " + ", ".join(f"{count} in {part}" for part, count in parts)
    return line


def fit(
    model: nn.Module,
    shapes: Mapping[str, Iterable[int]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Fit:
    """Compare the keys, shapes and, if given, types of a file with those of a model.

    The model may be on "meta". Precisions may differ, but integers must be integers in both.
    """
    ours = model.state_dict()
    theirs = {key: tuple(shape) for key, shape in shapes.items()}
    result = Fit(missing=sorted(set(ours) - set(theirs)))
    for key in sorted(set(theirs) - set(ours)):
        known = any(pattern.fullmatch(key) for pattern in UNUSED.values())
        (result.unused if known else result.unexpected).append(key)
    for key in sorted(set(ours) & set(theirs)):
        if theirs[key] != (shape := tuple(ours[key].shape)):
            result.mismatched[key] = theirs[key], shape
        kind = ours[key].dtype
        if dtypes and (dtypes[key] in FLOATS) != kind.is_floating_point:
            result.mistyped[key] = dtypes[key], kind
    if latents := result.mismatched.get("image_proj_model.latents"):
        result.hints.append(_variant_hint(model, *(shape[1] for shape in latents)))
    if any(shape == (0,) for shape, _ in result.mismatched.values()):
        result.hints.append(
            "  Empty tensors are the traces of DeepSpeed's ZeRO-3, which keeps the weights in "
            "other files; join them where they were made, with zero_to_fp32.py."
        )
    return result


def _variant_hint(model: nn.Module, in_file: int, in_model: int) -> str:
    hint = f"  The file was made for {in_file} image tokens, the model is sized for {in_model}"
    config = getattr(model, "config", None)
    if config is None:
        return hint + "."
    per_frame = config.image_resampler.num_queries
    hint += f" ({per_frame} for each of {config.chunk} frames)"
    if in_file % per_frame == 0:
        hint += (
            f": it is the {in_file // per_frame}-frame variant; set chunk={in_file // per_frame}"
        )
    return hint + "."


def require_fit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> Fit:
    """The `fit` of a state dict, read from the file `name`.

    Raises:
        CheckpointError: with every key that does not fit.
    """
    shapes = {key: value.shape for key, value in state.items()}
    result = fit(model, shapes, {key: value.dtype for key, value in state.items()})
    if not result.ok:
        raise CheckpointError(f"{name} does not fit {type(model).__name__}:\n{result.describe()}")
    return result


def load_weights(
    model: nn.Module,
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Fit:
    """Load a file into a model, strictly; parameters keep the model's dtype.

    A model on "meta" takes the tensors of the file itself, so memory holds them only once.

    Args:
        model: on any device; `device` and `dtype` matter only for "meta".
        path: the file.
        device: each tensor is moved there as soon as it is read, so the host holds one at a time.
        dtype: of the floating-point tensors, instead of the model's.

    Raises:
        CheckpointError: with every key that does not fit, or a weight that is not finite.
    """
    state = read_weights(path)
    result = require_fit(model, state, str(path))
    ours = model.state_dict()
    for key, value in ours.items():
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        state[key] = cast(state[key], kind, f"{path}: {key}").to(device)
    state = {key: state[key] for key in ours}
    model.load_state_dict(state, assign=any(value.is_meta for value in ours.values()))
    return result


def save_model(folder: str | Path, model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a model and its configuration; an interrupted call keeps the old files.

    Args:
        folder: created if missing; other files in it are kept.
        model: an instance of one of `MODELS`.
        dtype: store floating-point weights in this type to save space.

    Raises:
        CheckpointError: if the class is not in `MODELS`, or a weight is not finite.
    """
    kind = type(model).__name__
    if kind not in MODELS:
        raise CheckpointError(f"cannot save a {kind}; known models are {sorted(MODELS)}")
    save_weights(folder, kind, model.config, model.state_dict(), dtype)


def save_weights(
    folder: str | Path,
    kind: str,
    config: JsonConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model from its state dict, without building it; see `save_model`.

    Args:
        folder: created if missing.
        kind: a key of `MODELS`.
        config: its sizes.
        state: its state dict, read one tensor after another.
        dtype: store floating-point weights in this type; None = as they are.
        progress: called with (bytes written, bytes in all).
    """
    folder = Path(folder)
    text = json.dumps({"model": kind, "config": config.to_dict()}, indent=2) + "\n"
    with replacing(folder / WEIGHTS_FILE) as path:
        write_weights(path, state, dtype, progress)
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(text)


def load_model(
    folder: str | Path,
    *,
    kind: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model in eval mode from a folder.

    Args:
        folder: holds `config.json` and the weights, see the module's docstring.
        kind: expected class name, a key of `MODELS`; None = any.
        device: of the model.
        dtype: of its floating-point weights; None = float32.

    Raises:
        CheckpointError: if the folder is incomplete, of another kind, or its weights do not fit.
        ConfigError: if the sizes in it are not valid.
    """
    path = Path(folder) / CONFIG_FILE
    description = _described(path)
    name = description.get("model") if isinstance(description, dict) else None
    if name not in MODELS or (kind is not None and name != kind):
        expected = kind or " or ".join(sorted(MODELS))
        told = f"{path}: expected a model of kind {expected}, got {reprlib.repr(name)}"
        raise CheckpointError(told + _foreign_hint(description, kind))
    weights = _weights_beside(path, description)
    cls, config_cls = map(_imported, MODELS[name])
    config = config_cls.from_dict(description.get("config", {}))
    try:
        with torch.device("meta"):  # initial values would be replaced, so none are computed
            model = cls(config)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:  # torch's words about a size
        raise CheckpointError(f"{path}: no {name} has the sizes {config}: {error}") from error
    load_weights(model, weights, device, dtype)
    return model.to(device).eval()


def weights_file(folder: str | Path) -> Path:
    """Return the file of weights that the `config.json` of a model folder names.

    Raises:
        CheckpointError: it is no model folder, or that file is not in it.
    """
    path = Path(folder) / CONFIG_FILE
    return find_file(_weights_beside(path, _described(path)))


def _described(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is not a model folder: cannot read {CONFIG_FILE}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def _weights_beside(path: Path, description: Any) -> Path:
    told = description.get("weights", WEIGHTS_FILE) if isinstance(description, dict) else None
    if not isinstance(told, str) or told != Path(told).name:
        raise CheckpointError(f'{path}: "weights": expected a file\'s name, got {told!r}')
    return path.with_name(told)


def _foreign_hint(description: object, kind: str | None) -> str:
    """Return what to do with a config.json of transformers where a classifier is expected."""
    if kind != "RewardNet" or not isinstance(description, dict) or "model_type" not in description:
        return ""
    return (
        f": a model of transformers ({reprlib.repr(description['model_type'])}). Such a "
        "vision-language model judges success with a threshold: `python -m "
        "evac_jax.tools.reward.vlm_threshold --model FOLDER --data EPISODES --out OUT` finds it; "
        "then give OUT"
    )


def _imported(reference: str):
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)
