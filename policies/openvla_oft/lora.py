"""LoRA adapters in PEFT's folder layout, merged into the weights while these are read."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors import safe_open

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer.weight"


class LoraAdapter:
    """An adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

    The file may also hold base weights of adapted modules (`*.base_layer.weight`, which PEFT saves
    for the output head); they are skipped, because the merge starts from the checkpoint's.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a PEFT feature that merging here does not cover, or unknown tensors.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self._path = folder / "adapter_model.safetensors"
        for path in (folder / "adapter_config.json", self._path):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: a LoRA adapter folder must hold this file")
        config = json.loads((folder / "adapter_config.json").read_text())
        unsupported = [
            name
            for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
            if config.get(name)
        ]
        if config.get("bias", "none") != "none":
            unsupported.append("bias")
        if unsupported:
            raise ValueError(f"{folder}: adapter_config.json sets unsupported {unsupported}")
        rank = config["r"]
        self.scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.modules: set[str] = set()
        unknown = []
        with safe_open(self._path, "numpy") as file:
            names = set(file.keys())
        for name in names:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            if name == f"{PREFIX}{module}.lora_A.weight" and (
                f"{PREFIX}{module}.lora_B.weight" in names
            ):
                self.modules.add(module)
            elif not (
                name.endswith(BASE_LAYER) or name.replace(".lora_B.", ".lora_A.") in names - {name}
            ):
                unknown.append(name)
        if unknown:
            raise ValueError(f"{self._path}: tensors that are no LoRA pair: {sorted(unknown)[:8]}")

    def merge(self, key: str, weight: np.ndarray) -> np.ndarray:
        """Return W + scale * B A in float32 if the adapter has a pair for `key`, else `weight`.

        Args:
            key: checkpoint key of the weight, such as "projector.fc1.weight".
            weight: [out in], or [out in h w] of a convolution.

        Raises:
            ValueError: the pair's shapes do not fit the weight's.
        """
        module = key.removesuffix(".weight")
        if module not in self.modules or not key.endswith(".weight"):
            return weight
        with safe_open(self._path, "numpy") as file:
            a = file.get_tensor(f"{PREFIX}{module}.lora_A.weight").astype(np.float32)
            b = file.get_tensor(f"{PREFIX}{module}.lora_B.weight").astype(np.float32)
        rank = a.shape[0]
        if b.size != weight.shape[0] * rank or a.size != rank * weight[0].size:
            raise ValueError(
                f"LoRA pair of {module}: A {a.shape} and B {b.shape} do not fit {weight.shape}"
            )
        delta = b.reshape(-1, rank) @ a.reshape(rank, -1)
        return weight.astype(np.float32) + self.scale * delta.reshape(weight.shape)
