"""Maps each of our parameters to its checkpoint tensors; used by import and export."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flax import nnx

from policies.openvla_oft.config import OpenVLAOFTConfig

# The first match is used. Patterns are applied to our path, joined by "/".
MODULES = (
    (r"^vision/dinov2/", "vision_backbone.featurizer."),
    (r"^vision/siglip/", "vision_backbone.fused_featurizer."),
    (r"^llama/(lm_head)$", r"language_model.\1.weight"),
    (r"^llama/(embed_tokens)$", r"language_model.model.\1.weight"),
    (r"^llama/", "language_model.model."),
    (r"^value_head/fc1/", "value_head.mlp.0."),
    (r"^value_head/fc2/", "value_head.mlp.2."),
    (r"^value_head/fc3/", "value_head.mlp.4."),
)
LM_HEAD = "llama/lm_head"
PEFT_PREFIX = "base_model.model."
# What wrappers put in front of a key: PEFT, DistributedDataParallel, DeepSpeed; and, at any depth,
# torch.compile and FSDP.
PREFIXES = (PEFT_PREFIX, "module.", "_forward_module.")
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.")
ROOTS = ("vision_backbone.", "projector.", "language_model.", "value_head.")
# Ours: "<module>/lora/a", of the output head "llama/lm_head_lora/a".
ADAPTER = re.compile(r"(.+)[/_]lora/([ab])")
LLAMA_GROUPS: dict[str, tuple[str, ...]] = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Source:
    """How one parameter is made from checkpoint tensors.

    Attributes:
        keys: names of the tensors: one, or one per layer of a stacked parameter.
        stacked: whether the tensors are stacked along a leading layer axis.
        axes: transposition from the checkpoint's axes to ours; None = no change.
    """

    keys: tuple[str, ...]
    stacked: bool
    axes: tuple[int, ...] | None

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Checkpoint tensor -> our layout, one layer."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our layout, one layer -> checkpoint tensor."""
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each checkpoint tensor, given our parameter's."""
        shape = shape[1:] if self.stacked else shape
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))


def plain_key(key: str) -> str:
    """Return a tensor's name without what wrappers and newer versions of transformers add to it.

    transformers from 4.52 on may call `language_model.model.*` "model.language_model.*" and put
    `lm_head` outermost.
    """
    for wrapper in INSERTED:
        key = key.replace(wrapper, "")
    while wrapper := next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""):
        key = key.removeprefix(wrapper)
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    if key.removeprefix("model.").startswith(ROOTS):
        key = key.removeprefix("model.")
    return re.sub(
        r"^language_model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1.", key
    )


def path_name(path: tuple) -> str:
    """Path of an NNX variable as "llama/layers/q_proj/kernel"."""
    return "/".join(map(str, path))


def is_adapter(path: str) -> bool:
    """Whether `path` is a factor of a LoRA adapter."""
    return ADAPTER.fullmatch(path) is not None


def adapter_path(path: str, factor: str) -> str:
    """Return the path of factor "a" or "b" of the adapter beside the weight at `path`."""
    if path == LM_HEAD:
        return f"{path}_lora/{factor}"
    return f"{path.removesuffix('/kernel')}/lora/{factor}"


def _adapter_source(module: str, factor: str, config: OpenVLAOFTConfig) -> Source:
    """Tensors of an adapter in PEFT's file; its factors are transposed as the weight is."""
    base = source_of(module if module == LM_HEAD else f"{module}/kernel", config)
    tail = f".lora_{factor.upper()}.weight"
    keys = tuple(PEFT_PREFIX + key.removesuffix(".weight") + tail for key in base.keys)
    return dataclasses.replace(base, keys=keys, axes=base.axes or (1, 0))


def source_of(path: str, config: OpenVLAOFTConfig) -> Source:
    """Return the checkpoint tensors of the parameter at `path`."""
    if match := ADAPTER.fullmatch(path):
        return _adapter_source(*match.groups(), config)
    leaf = path.rsplit("/", 1)[-1]
    axes = None
    if leaf == "kernel":
        # torch: linear [out in], convolution [out in h w]; ours: [in out], [h w in out].
        axes = (2, 3, 1, 0) if "/patch_embed/" in path else (1, 0)
        path = path.replace("/patch_embed/", "/patch_embed/proj/")
    path = path.replace("/patch_embed/bias", "/patch_embed/proj/bias")
    depth, stacked = 0, False
    for tower in ("dinov2", "siglip"):
        if path.startswith(f"vision/{tower}/"):
            depth = getattr(config, tower).depth - 1
            path = path.replace("/last_block/", f"/blocks/{depth}/")
    if "/blocks/" in path and not re.search(r"/blocks/\d+/", path):
        stacked, path = True, path.replace("/blocks/", "/blocks/{layer}/")
    if path.startswith("llama/layers/"):
        depth, stacked = config.num_layers, True
        path = path.replace("llama/layers/", "llama/layers/{layer}/")
        for group, names in LLAMA_GROUPS.items():
            path = re.sub(rf"/({'|'.join(names)})/", rf"/{group}/\1/", path)
    for pattern, replacement in MODULES:
        path, count = re.subn(pattern, replacement, path)
        if count:
            break
    key = re.sub(r"\.(kernel|scale)$", ".weight", path.replace("/", "."))
    keys = tuple(key.replace("{layer}", str(i)) for i in range(depth)) if stacked else (key,)
    return Source(keys=keys, stacked=stacked, axes=axes)


def parameters(model: nnx.Module | nnx.State) -> Iterator[tuple[str, nnx.Variable]]:
    """Yield (path, variable) of every parameter of a model or state, unused ones included."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    for path, variable in nnx.to_flat_state(state):
        yield path_name(path), variable
