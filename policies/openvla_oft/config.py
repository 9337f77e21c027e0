"""All sizes and switches of OpenVLA-OFT, and how they are read from a Hugging Face config.json.

The defaults are the public 7B checkpoints. A miniature is the same class with other numbers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from policies.openvla_oft import hf_fields

VALUE_TYPES = ("none", "chunk_level", "action_level")
REMAT_POLICIES = ("none", "full", "dots")
RESIZE_RULES = ("float", "fixed_point")
# Last part of the names of checkpoint modules that RLinf adapts: every linear layer of towers,
# projector and Llama, both patch embeddings and the output head.
LORA_TARGETS = (
    *("proj", "qkv", "fc1", "fc2", "q", "kv", "fc3", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
)


@dataclass(frozen=True)
class VisionTowerConfig:
    """One ViT.

    Attributes:
        width, depth, heads, mlp_width: sizes; depth counts the last block, which exists in
            checkpoints but is never computed.
        class_token: whether a class token is put in front of the patches.
        register_tokens: register tokens after the class token.
        layer_scale: whether each residual branch has a learned per-channel scale.
        attention_pool: whether checkpoints hold an attention pooling head (never computed).
        mean, std: per-channel normalisation of pixels in 0..1. The defaults of the presets are
            the published ones rounded to bfloat16, which is what the published
            preprocessor_config.json holds under `tvf_normalize_params`.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    class_token: bool = False
    register_tokens: int = 0
    layer_scale: bool = False
    attention_pool: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        return int(self.class_token) + self.register_tokens


DINOV2_LARGE = VisionTowerConfig(
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    class_token=True,
    register_tokens=4,
    layer_scale=True,
    mean=(0.484375, 0.455078125, 0.40625),
    std=(0.228515625, 0.2236328125, 0.224609375),
)
SIGLIP_SO400M = VisionTowerConfig(
    width=1152, depth=27, heads=16, mlp_width=4304, attention_pool=True
)
TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2_LARGE,
    "vit_so400m_patch14_siglip_224": SIGLIP_SO400M,
}


@dataclass(frozen=True)
class OpenVLAOFTConfig:
    """Sizes, switches and numerics of one OpenVLA-OFT.

    Attributes:
        dinov2, siglip: the two towers.
        image_size, patch_size: pixels per side that both towers see; frames of another size are
            resized.
        hidden_size .. rope_theta: Llama sizes. `rms_norm_eps` is 1e-6 unless the checkpoint's
            text_config says otherwise (published ones omit it; the library default applies).
        vocab_size: rows of embedding and output head, padding included.
        vocab_padding: rows beyond the tokenizer's vocabulary (`pad_to_multiple_of`).
        num_bins: action bins; their token ids are the last ones of the tokenizer's vocabulary.
        stop_token_id, pad_token_id: ids; the second one is for the tokenizer's use.
        action_dim, chunk, num_images: A, K and V of the type letters.
        action_convention: meaning of an action, see `ActionSpec`.
        max_prompt_length: tokens that prompts are padded to, L.
        value_type: "none", "chunk_level" (one value per decision) or "action_level" (one per
            action of the chunk).
        value_widths: hidden widths of the value head.
        keep_stop_token: False: RLinf's layout, the stop token is dropped. True: the layout of
            OpenVLA-OFT itself and of SimpleVLA-RL, a stop token after the action slots that every
            token attends to, pads moved behind it. A checkpoint should run as it was fine-tuned.
        reference_rope_rounding: round the rotary frequencies to bfloat16, as RLinf's cast of the
            whole module does in bfloat16 runs (phase errors of half a radian at position 440).
            False: exact frequencies.
        resize_rule: "float": antialiased bicubic accumulated in float (RLinf); "fixed_point":
            Pillow's 8-bit arithmetic (OpenVLA-OFT's own processor).
        center_crop: crop the centred 0.9 of the area first, as OpenVLA-OFT's evaluation does.
        param_dtype, compute_dtype: "float32" or "bfloat16". Softmaxes, norms, logits,
            log-probs and values are float32 always.
        remat: what the backward pass recomputes per layer: "none" keeps all activations, "full"
            recomputes the layer, "dots" keeps the results of its matrix products.
        scan_layers: loop over stacked layers with one compiled body; False unrolls them. The
            parameters have the same layout in both.
        attention: "cudnn": cuDNN's fused kernel, which holds no scores in memory. "xla": products
            and a softmax. "auto": by the platform of the mesh: our own one on a CPU (see
            `kernels`), cuDNN's on GPUs for what it accepts (`can_fuse`), else XLA's.
        lora_rank: rank of the adapters, which train while the base is frozen; 0 = no adapters: all
            weights train.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank; 0 = lora_rank, a scale of 1.
        lora_targets: modules that get an adapter, by the last part of their checkpoint name.
    """

    dinov2: VisionTowerConfig = DINOV2_LARGE
    siglip: VisionTowerConfig = SIGLIP_SO400M
    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    vocab_size: int = 32064
    vocab_padding: int = 64
    num_bins: int = 256
    stop_token_id: int = 2
    pad_token_id: int = 32000
    action_dim: int = 7
    chunk: int = 8
    num_images: int = 1
    action_convention: str = "delta_ee_7"
    max_prompt_length: int = 128
    value_type: str = "none"
    value_widths: tuple[int, int] = (512, 128)
    keep_stop_token: bool = False
    reference_rope_rounding: bool = False
    resize_rule: str = "float"
    center_crop: bool = False
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        problems = []
        for name, allowed in (
            ("value_type", VALUE_TYPES),
            ("remat", REMAT_POLICIES),
            ("resize_rule", RESIZE_RULES),
            ("param_dtype", ("float32", "bfloat16")),
            ("compute_dtype", ("float32", "bfloat16")),
            ("attention", ("auto", "xla", "cudnn")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.image_size % self.patch_size:
            problems.append(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for name, width, heads in (
            ("dinov2", self.dinov2.width, self.dinov2.heads),
            ("siglip", self.siglip.width, self.siglip.heads),
            ("llama", self.hidden_size, self.num_heads),
        ):
            if width % heads:
                problems.append(f"{name}: width {width} is not a multiple of {heads} heads")
            elif self.attention == "cudnn" and not self.can_fuse(width // heads):
                problems.append(
                    f"attention: 'cudnn' needs bfloat16 and heads of 8, 16 .. 128 channels, {name} "
                    f"has {self.compute_dtype} and {width // heads}; use 'auto'"
                )
        if self.lora_rank < 0 or self.lora_alpha < 0:
            problems.append(
                f"lora_rank {self.lora_rank} and lora_alpha {self.lora_alpha} must be >= 0"
            )
        if unknown := sorted(set(self.lora_targets) - set(LORA_TARGETS)):
            problems.append(f"lora_targets: {unknown} are no modules; known are {LORA_TARGETS}")
        if min(self.dinov2.depth, self.siglip.depth) < 2:
            problems.append("a tower needs a depth of 2 at least: its last block is not computed")
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads {self.num_heads} / num_kv_heads {self.num_kv_heads}")
        if problems:
            raise ValueError("OpenVLAOFTConfig cannot work:\n  " + "\n  ".join(problems))

    @property
    def tokenizer_vocab(self) -> int:
        """Size of the tokenizer's vocabulary without added tokens; 32000 for Llama-2."""
        return self.vocab_size - self.vocab_padding

    @property
    def first_action_token(self) -> int:
        """Lowest action token id, which stands for the largest action; 31744 for Llama-2."""
        return self.tokenizer_vocab - self.num_bins

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_action_tokens(self) -> int:
        """Action slots of one decision, K * A."""
        return self.chunk * self.action_dim

    @property
    def lora_scale(self) -> float:
        """Factor of the adapters, alpha / r; 0 without adapters."""
        return (self.lora_alpha or self.lora_rank) / self.lora_rank if self.lora_rank else 0.0

    @property
    def num_values(self) -> int:
        """Outputs of the value head; 0 without one."""
        return {"none": 0, "chunk_level": 1, "action_level": self.chunk}[self.value_type]

    def can_fuse(self, head_width: int) -> bool:
        """Return whether cuDNN's fused attention accepts heads of this width.

        Source: `check_layout` and `check_is_flash_attention` of JAX 0.10.2, for GPUs since Ampere.
        """
        return self.compute_dtype == "bfloat16" and head_width <= 128 and head_width % 8 == 0

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], preprocessor: dict[str, Any] | None = None, **overrides
    ) -> "OpenVLAOFTConfig":
        """Read a checkpoint's config.json and preprocessor_config.json.

        `tiny_vision_overrides` (a list of two, DINOv2 first; absent in public checkpoints) may set
        embed_dim, depth, num_heads, mlp_ratio, patch_size and reg_tokens of the towers.
        `overrides` are fields of this class that config.json does not have (chunk, value_type ..).

        Every field is used, known to change nothing, or refused: see `hf_fields`.

        Raises:
            ValueError: an architecture that this code does not have, an unknown field, or an
                override that contradicts a setting of the training (`hf_fields.SETTINGS`).
        """
        config, text = hf_fields.read_config(config)
        ids = config.get("timm_model_ids", list(TIMM_TOWERS))
        unknown = [name for name in ids if name not in TIMM_TOWERS]
        if unknown:
            raise ValueError(
                f"config.json: timm_model_ids {ids} are not supported; expected {list(TIMM_TOWERS)}"
            )
        sizes = config.get("image_sizes", [cls.image_size] * 2)
        if len(set(sizes)) != 1:
            raise ValueError(f"config.json: image_sizes {sizes} must be equal for both towers")
        hidden = text.get("hidden_size", cls.hidden_size)
        heads = text.get("num_attention_heads", cls.num_heads)
        changes = config.get("tiny_vision_overrides", [{}, {}])
        for change in changes:
            hf_fields.refuse(
                "config.json", hf_fields.TOWER.problems(change, "tiny_vision_overrides: ")
            )
        changes = [{k: v for k, v in change.items() if v is not None} for change in changes]
        towers = [
            _override_tower(TIMM_TOWERS[name], change)
            for name, change in zip(ids, changes, strict=True)
        ]
        patches = {change.get("patch_size", cls.patch_size) for change in changes}
        if len(patches) != 1:
            raise ValueError(f"tiny_vision_overrides: patch_size differs: {sorted(patches)}")
        if preprocessor is not None:
            pairs = hf_fields.read_normalization(preprocessor, sizes[0])
            towers = [
                dataclasses.replace(tower, mean=mean, std=std)
                for tower, (mean, std) in zip(towers, pairs, strict=True)
            ]
        vocab = text.get("vocab_size", cls.vocab_size)
        padding = config.get("pad_to_multiple_of", cls.vocab_padding)
        if config.get("vocab_size", vocab) not in (vocab, vocab - padding):
            raise ValueError(
                f"config.json: vocab_size = {config['vocab_size']}: expected {vocab} of text_config"
                f", or {vocab - padding} without its padding"
            )
        fields = {
            "dinov2": towers[0],
            "siglip": towers[1],
            "image_size": sizes[0],
            "patch_size": patches.pop(),
            "hidden_size": hidden,
            "intermediate_size": text.get("intermediate_size", cls.intermediate_size),
            "num_layers": text.get("num_hidden_layers", cls.num_layers),
            "num_heads": heads,
            "num_kv_heads": text.get("num_key_value_heads", heads),
            "rms_norm_eps": text.get("rms_norm_eps", cls.rms_norm_eps),
            "rope_theta": text.get("rope_theta", cls.rope_theta),
            "vocab_size": vocab,
            "vocab_padding": padding,
            "num_bins": config.get("n_action_bins", cls.num_bins),
            "stop_token_id": text.get("eos_token_id", cls.stop_token_id),
            "pad_token_id": config.get("pad_token_id", text.get("pad_token_id", vocab - padding)),
        }
        return cls(**(fields | hf_fields.read_settings(config, overrides) | overrides))

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that `from_hf` reads back to the same sizes.

        It leaves out fields that a checkpoint does not determine (chunk, value_type, dtypes ..).
        """
        towers = (self.dinov2, self.siglip)
        return {
            "arch_specifier": "no-align+fused-gelu-mlp",
            "architectures": ["OpenVLAForActionPrediction"],
            "image_resize_strategy": "resize-naive",
            "image_sizes": [self.image_size] * 2,
            "model_type": "openvla",
            "n_action_bins": self.num_bins,
            "pad_to_multiple_of": self.vocab_padding,
            "pad_token_id": self.pad_token_id,
            "text_config": {
                "model_type": "llama",
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_key_value_heads": self.num_kv_heads,
                "rms_norm_eps": self.rms_norm_eps,
                "rope_theta": self.rope_theta,
                "eos_token_id": self.stop_token_id,
                "pad_token_id": self.pad_token_id,
                "vocab_size": self.vocab_size,
                "torch_dtype": self.param_dtype,
            },
            "timm_model_ids": list(TIMM_TOWERS),
            "tiny_vision_overrides": [
                {
                    "embed_dim": tower.width,
                    "depth": tower.depth,
                    "num_heads": tower.heads,
                    # The 0.5 makes int(width * ratio) give the width itself despite rounding.
                    "mlp_ratio": (tower.mlp_width + 0.5) / tower.width,
                    "patch_size": self.patch_size,
                    "reg_tokens": tower.register_tokens,
                }
                for tower in towers
            ],
            "torch_dtype": self.param_dtype,
            "use_fused_vision_backbone": True,
            "vision_backbone_id": "dinosiglip-vit-so-224px",
        }

    def preprocessor_to_hf(self) -> dict[str, Any]:
        """Return the preprocessor_config.json that goes with `to_hf`."""
        size = [self.image_size] * 2
        towers = (self.dinov2, self.siglip)
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, *size]] * 2,
            "interpolations": ["bicubic"] * 2,
            "means": [list(tower.mean) for tower in towers],
            "stds": [list(tower.std) for tower in towers],
            "tvf_normalize_params": [
                {"inplace": False, "mean": list(tower.mean), "std": list(tower.std)}
                for tower in towers
            ],
            "use_fused_vision_backbone": True,
        }


def _override_tower(tower: VisionTowerConfig, change: dict[str, Any]) -> VisionTowerConfig:
    width = change.get("embed_dim", tower.width)
    mlp_width = int(width * change["mlp_ratio"]) if "mlp_ratio" in change else tower.mlp_width
    return dataclasses.replace(
        tower,
        width=width,
        depth=change.get("depth", tower.depth),
        heads=change.get("num_heads", tower.heads),
        mlp_width=mlp_width,
        register_tokens=change.get("reg_tokens", tower.register_tokens),
    )
