"""Weights in and out: public EVAC checkpoints, and our own folders.

Public files come as Lightning (`state_dict`), DeepSpeed (`module`), bare state dicts or
safetensors. All are read without executing anything from them and fitted strictly: a key that the
model lacks must be on the short list of those known to be unused.

A folder of ours is `config.json` ({"model": class name, "config": sizes}) beside
`model.safetensors`. To use a public file, write such a `config.json` beside it and name the file
under "weights".
"""

import importlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evac_jax.errors import CheckpointError

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
DEEPSPEED_PREFIX = "_forward_module."
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
SHOWN = 8  # keys listed per problem in an error


@dataclass
class Fit:
    """How the keys of a file and of a model compare.

    Attributes:
        missing: keys of the model that the file lacks.
        unexpected: keys of the file that the model lacks and that are not known to be unused.
        mismatched: key -> (shape in the file, shape in the model).
        unused: keys of the file that are left out knowingly.
        hints: what the differences suggest.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the weights can be loaded."""
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """The problems, one per line."""
        shapes = [f"{k} (file {f}, model {m})" for k, (f, m) in self.mismatched.items()]
        lines = [
            _listing("missing in the file", self.missing),
            _listing("unknown to the model", self.unexpected),
            _listing("of another shape", shapes),
        ]
        return "\n".join([line for line in lines if line] + self.hints)


def _listing(what: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  {len(names)} {what}: {', '.join(names[:SHOWN])}{more}" if names else ""


def fit(model: nn.Module, shapes: Mapping[str, Iterable[int]]) -> Fit:
    """Compare the keys and shapes of a file with those of a model, which may be on "meta"."""
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(shape) for key, shape in shapes.items()}
    result = Fit(missing=sorted(set(ours) - set(theirs)))
    for key in sorted(set(theirs) - set(ours)):
        known = any(pattern.fullmatch(key) for pattern in UNUSED.values())
        (result.unused if known else result.unexpected).append(key)
    result.mismatched = {
        key: (theirs[key], ours[key])
        for key in sorted(set(ours) & set(theirs))
        if ours[key] != theirs[key]
    }
    latents = result.mismatched.get("image_proj_model.latents")
    if latents:
        result.hints.append(_variant_hint(model, *(shape[1] for shape in latents)))
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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a file in any of the known containers, on the CPU.

    Raises:
        CheckpointError: if there is no such file, it is damaged, it holds more than plain
            tensors (nothing is ever unpickled that could run code), or no weights at all.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        # Only the zip format can be mapped; mapping spares a copy of the 9 GB public files.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a file of plain tensors. Only weights are read, never pickled objects; "
            f"if you trust the file, convert it to .safetensors where it was made. ({error})"
        ) from error
    return unwrap(content, str(path))


def unwrap(content: Any, name: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside a container, DeepSpeed's prefix removed where a key has it.

    Args:
        content: Lightning ("state_dict"), DeepSpeed ("module"), action predictor
            ("model_state_dict" beside its statistics), or a bare state dict.
        name: for the error message.
    """
    state = content
    if isinstance(content, Mapping):
        if isinstance(content.get("model_state_dict"), Mapping):
            state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            state.update(content["model_state_dict"])
        else:
            for key in ("state_dict", "module"):
                if isinstance(content.get(key), Mapping):
                    state = content[key]
                    break
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        found = sorted(map(str, content))[:SHOWN] if isinstance(content, Mapping) else type(content)
        raise CheckpointError(
            f"{name}: expected a state dict, bare or under 'state_dict' or 'module', got {found}"
        )
    return {key.removeprefix(DEEPSPEED_PREFIX): value for key, value in state.items()}


def load_weights(model: nn.Module, path: str | Path) -> Fit:
    """Load a file into a model, strictly; parameters keep the model's dtype.

    A model built on "meta" takes the file's tensors as they are, so it is never held twice.

    Raises:
        CheckpointError: with every key that does not fit.
    """
    state = read_weights(path)
    result = fit(model, {key: value.shape for key, value in state.items()})
    if not result.ok:
        kind = type(model).__name__
        raise CheckpointError(f"{path} does not fit {kind}:\n{result.describe()}")
    ours = model.state_dict()
    state = {key: state[key].to(ours[key].dtype) for key in ours}
    model.load_state_dict(state, assign=any(value.is_meta for value in ours.values()))
    return result


def save_model(folder: str | Path, model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a model and its configuration; an interrupted call leaves the old files in place.

    Args:
        folder: created if missing; other files in it stay.
        model: an instance of one of `MODELS`.
        dtype: store floating-point weights in this type to save space.

    Raises:
        CheckpointError: if the class is not in `MODELS`.
    """
    kind = type(model).__name__
    if kind not in MODELS:
        raise CheckpointError(f"cannot save a {kind}; known models are {sorted(MODELS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for key, value in model.state_dict().items():
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        state[key] = value.detach().to("cpu", kept).contiguous()
    text = json.dumps({"model": kind, "config": model.config.to_dict()}, indent=2) + "\n"
    with _replacing(folder / WEIGHTS_FILE) as path:
        save_file(state, path)
    with _replacing(folder / CONFIG_FILE) as path:
        path.write_text(text)


class _replacing:  # noqa: N801 - a context manager, read as a verb
    """Gives a temporary path that takes the real one's place if the block succeeds."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def load_model(folder: str | Path, *, kind: str | None = None, device="cpu") -> nn.Module:
    """A model in eval mode from a folder.

    Args:
        folder: holds `config.json` and the weights, see the module's docstring.
        kind: class name expected, a key of `MODELS`; None takes any.
        device: where to put it.

    Raises:
        CheckpointError: if the folder is incomplete, of another kind, or its weights do not fit.
        ConfigError: if the sizes in it are not valid.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        description = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a model folder: cannot read {CONFIG_FILE}"
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    name = description.get("model")
    if name not in MODELS or (kind is not None and name != kind):
        expected = kind or " or ".join(sorted(MODELS))
        raise CheckpointError(f"{path}: expected a model of kind {expected}, got {name!r}")
    cls, config_cls = map(_imported, MODELS[name])
    config = config_cls.from_dict(description.get("config", {}))
    with torch.device("meta"):  # no time spent on initial values that are replaced at once
        model = cls(config)
    load_weights(model, path.with_name(description.get("weights", WEIGHTS_FILE)))
    return model.to(device).eval()


def _imported(reference: str):
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)
