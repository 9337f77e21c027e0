"""LoRA adapters in PEFT's folder layout: read, merged while a checkpoint is read, written."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save

from policies.openvla_oft import hf_fields, hf_keys
from policies.openvla_oft.checkpoint_files import FLOATS, entries, read_json, read_tensor
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.hf_keys import PEFT_PREFIX

BASE_LAYER = ".base_layer.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraAdapter:
    """An adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

    The file may also hold base weights of adapted modules (`*.base_layer.weight`, which PEFT saves
    for the output head). They are skipped, because those of the checkpoint are used.

    Attributes:
        rank, scale: r, and the factor of B A.
        modules: checkpoint modules that have a pair (A, B).

    Raises:
        FileNotFoundError: one of the two files is missing; says where an adapter lies instead.
        ValueError: a PEFT feature that is not covered here, no pair, unknown tensors, or a damaged
            file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._path = self.folder / WEIGHTS
        for path in (self.folder / CONFIG, self._path):
            if not path.is_file():
                raise FileNotFoundError(_why_no_adapter(self.folder, path))
        config = read_json(self.folder / CONFIG) or {}
        problems = hf_fields.ADAPTER.problems(config)
        problems += [f"{n}: needed" for n in ("r", "lora_alpha") if config.get(n) is None]
        hf_fields.refuse(str(self.folder / CONFIG), problems)
        self._base = Path(config.get("base_model_name_or_path") or "").name
        self.rank = config["r"]
        root = math.sqrt(self.rank) if config.get("use_rslora") else self.rank
        self.scale = config["lora_alpha"] / root
        self.modules: set[str] = set()
        unknown = []
        stored = entries(self._path)
        self._stored = {PEFT_PREFIX + hf_keys.plain_key(name): name for name in stored}
        self._entries = {name: stored[old] for name, old in self._stored.items()}
        names = set(self._entries)
        for name in sorted(names):
            module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            if name == f"{PEFT_PREFIX}{module}.lora_A.weight" and (
                f"{PEFT_PREFIX}{module}.lora_B.weight" in names
            ):
                self.modules.add(module)
            elif not (
                name.endswith(BASE_LAYER) or name.replace(".lora_B.", ".lora_A.") in names - {name}
            ):
                unknown.append(name)
        if unknown:
            raise ValueError(f"{self._path}: tensors that are no LoRA pair: {sorted(unknown)[:8]}")
        if not self.modules:
            raise ValueError(
                f"{self._path}: expected pairs {PEFT_PREFIX}<module>.lora_A.weight and "
                f".lora_B.weight, got none among {len(names)} tensors; it would change nothing"
            )

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in float32."""
        return read_tensor(self._path, self._stored[name]).astype(np.float32)

    def other_base(self, folder: Path) -> str:
        """Return a note if the adapter names a base other than `folder`, else ""."""
        if self._base in ("", folder.resolve().name):
            return ""
        return f"the adapter {self.folder} names {self._base!r} as its base, here it meets {folder}"

    def misfits(self, weights: dict[str, tuple[int, ...]]) -> list[str]:
        """Return one line per pair that cannot be merged into these weights.

        Args:
            weights: checkpoint key -> shape of every weight of the policy.
        """
        lines = []
        for module in sorted(self.modules):
            if (weight := weights.get(f"{module}.weight")) is None:
                lines.append(f"{module}: the policy has no such weight")
                continue
            a, b = (self._entries[f"{PEFT_PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
            width_in = math.prod(weight[1:])
            if (math.prod(a.shape), math.prod(b.shape)) != (
                self.rank * width_in,
                self.rank * weight[0],
            ):
                lines.append(
                    f"{module}: A {a.shape} and B {b.shape} of rank {self.rank} do not fit {weight}"
                )
            elif not {a.dtype, b.dtype} <= set(FLOATS):
                lines.append(f"{module}: expected {', '.join(FLOATS)}, got {a.dtype} and {b.dtype}")
        return lines

    def merge(self, key: str, weight: np.ndarray) -> np.ndarray:
        """Return W + scale * B A in float32 if the adapter has a pair for `key`, else `weight`.

        Args:
            key: checkpoint key of the weight, such as "projector.fc1.weight".
            weight: [out in], or [out in h w] of a convolution; `misfits` has checked its shape.
        """
        module = key.removesuffix(".weight")
        if module not in self.modules or not key.endswith(".weight"):
            return weight
        a, b = (self.read(f"{PEFT_PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        delta = b.reshape(-1, self.rank) @ a.reshape(self.rank, -1)
        return weight.astype(np.float32) + self.scale * delta.reshape(weight.shape)

    def check_continues(self, shapes: dict[str, tuple[int, ...]], config: OpenVLAOFTConfig) -> None:
        """Raise if training with this configuration cannot continue from the adapter.

        Args:
            shapes: the policy's adapters as PEFT's file would hold them, name -> shape.

        Raises:
            ValueError: rank, scale, modules or sizes differ; all are listed at once.
        """
        lines = []
        if self.rank != config.lora_rank:
            lines.append(f"lora_rank is {config.lora_rank}, the adapter's rank {self.rank}")
        elif not math.isclose(self.scale, config.lora_scale, rel_tol=1e-6):
            lines.append(
                f"lora_alpha gives a scale of {config.lora_scale:g}, the adapter's is "
                f"{self.scale:g}; set lora_alpha to {self.scale * self.rank:g}"
            )
        wanted = {n.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for n in shapes}
        for title, modules in (
            ("modules that the adapter lacks (see lora_targets)", wanted - self.modules),
            ("modules of the adapter that the policy does not adapt", self.modules - wanted),
        ):
            if modules:
                lines.append(f"{len(modules)} {title}: {', '.join(sorted(modules)[:8])}")
        if not lines:
            held = {name: self._entries[name].shape for name in shapes}
            wrong = [f"{n}: expected {s}, got {held[n]}" for n, s in shapes.items() if held[n] != s]
            lines += wrong[:8]
        if lines:
            listed = "\n  ".join(lines)
            raise ValueError(f"{self.folder}: training cannot go on from this adapter:\n  {listed}")


def find_adapter(folder: Path) -> Path | None:
    """Return the folder of an adapter at `folder`, or one level below it; None = there is none."""
    found = [folder / CONFIG, *sorted(folder.glob(f"*/{CONFIG}"))]
    return next((path.parent for path in found if path.is_file()), None)


def base_of(adapter: Path) -> str:
    """Return what an adapter folder names as its base."""
    return (read_json(adapter / CONFIG) or {}).get("base_model_name_or_path") or "it names none"


def _why_no_adapter(folder: Path, missing: Path) -> str:
    if pickles := sorted(path.name for path in folder.glob("adapter_model.bin")):
        return (
            f"{folder}: holds only a PyTorch pickle ({pickles[0]}), which is not read because "
            f"unpickling runs code. Where you trust it, load the adapter with PEFT once and call "
            f"save_pretrained(NEW, safe_serialization=True)"
        )
    found = find_adapter(folder)
    if found not in (None, folder):
        return f"{folder}: the adapter lies in its sub-folder; give {found}"
    return f"{missing}: a LoRA adapter folder must hold this file"


def save_adapter(model: nnx.Module, folder: str | Path, *, base: str | Path) -> Path:
    """Write a policy's adapters as PEFT does, complete or not at all; return the folder.

    It does not contain the value head; an export of the policy and a run's checkpoint do.

    Args:
        model: an `OpenVLAOFT` with `lora_rank` > 0.
        base: checkpoint folder that the adapters belong to; its name is written down.

    Raises:
        FileExistsError: `folder` exists already.
        OSError: it cannot be written, such as to a full disk.
        ValueError: the policy has no adapters.
    """
    folder, config = Path(folder), model.config
    if not config.lora_rank:
        raise ValueError("the policy has no LoRA adapters: its lora_rank is 0")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
    tensors = {}
    for path, variable in hf_keys.parameters(model):
        if hf_keys.is_adapter(path):
            source, array = hf_keys.source_of(path, config), np.asarray(variable[...])
            for index, key in enumerate(source.keys):
                layer = array[index] if source.stacked else array
                tensors[key] = np.ascontiguousarray(source.to_hf(layer))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / CONFIG).write_text(json.dumps(_adapter_config(config, base), indent=2))
        # Not by `save_file`, whose error of a full disk is no OSError.
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk's names none
        raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return folder


def _adapter_config(config: OpenVLAOFTConfig, base: str | Path) -> dict[str, Any]:
    alpha = config.lora_scale * config.lora_rank
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": Path(base).name,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": "gaussian",
        "target_modules": list(config.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
    }
