"""Image autoencoder: encodes frames in [-1, 1] to latents of an eighth of their size, and back.

The network is diffusers' `AutoencoderKL`. Public EVAC checkpoints name its weights as the latent
diffusion code did. So `Autoencoder.state_dict()` uses those names, and `load_state_dict` accepts
both. The names of diffusers are used only in this file.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from evac_jax.evac.config import AutoencoderConfig
from evac_jax.evac.lean_imports import lean_imports

with lean_imports("diffusers"):
    from diffusers import AutoencoderKL

# Values in the largest feature map of a call. On a CPU small maps are faster. On a GPU the map is
# 1 GB in bfloat16, or 32 frames of the full-size model.
CPU_VALUES, GPU_VALUES = 2**22, 2**29
LOGVAR_RANGE = (-30.0, 20.0)  # the log variance is clamped to this, as in training
# Latent-diffusion name against diffusers name, applied to whole dotted parts, in this order.
# "#" stands for a number that is kept, "@" for a level that is counted from the other end.
_RENAMES = (
    ("encoder.down.#.block.#", "encoder.down_blocks.#.resnets.#"),
    ("encoder.down.#.downsample.conv", "encoder.down_blocks.#.downsamplers.0.conv"),
    ("decoder.up.@.block.#", "decoder.up_blocks.@.resnets.#"),
    ("decoder.up.@.upsample.conv", "decoder.up_blocks.@.upsamplers.0.conv"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
)


def _renamer(source: int, levels: int) -> Callable[[str], str]:
    """A function that renames keys from column `source` of `_RENAMES` to the other column."""
    rules = []
    for pair in _RENAMES:
        pattern = re.escape(pair[source]).replace(r"\#", r"(\d+)").replace("@", r"(?P<level>\d+)")
        rules.append((re.compile(rf"(?:^|(?<=\.)){pattern}(?=\.)"), pair[1 - source]))

    def rename(key: str) -> str:
        for pattern, target in rules:
            match = pattern.search(key)
            if match:
                numbers = iter(match.groups())
                parts = re.split("([#@])", target)
                for i, part in enumerate(parts):
                    if part == "#":
                        parts[i] = next(numbers)
                    elif part == "@":
                        parts[i] = str(levels - 1 - int(next(numbers)))
                key = key[: match.start()] + "".join(parts) + key[match.end() :]
        return key

    return rename


def _is_attention_matrix(diffusers_key: str) -> bool:
    projection = re.search(r"attentions\.0\.to_(q|k|v|out\.0)\.weight$", diffusers_key)
    return projection is not None


def ldm_to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename latent-diffusion weights; the attention's 1x1 convolutions become matrices.

    Args:
        state: weights without prefix; keys that already have diffusers' names are unchanged.
        levels: entries of `channel_mult`; the decoder counts its levels from the other end.
    """
    rename, renamed = _renamer(0, levels), {}
    for key, value in state.items():
        key = rename(key)
        renamed[key] = value.flatten(1) if _is_attention_matrix(key) else value
    return renamed


def diffusers_to_ldm(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Inverse of `ldm_to_diffusers`."""
    rename, renamed = _renamer(1, levels), {}
    for key, value in state.items():
        renamed[rename(key)] = value[:, :, None, None] if _is_attention_matrix(key) else value
    return renamed


class Autoencoder(nn.Module):
    """Frames to latents and back, all frames of a call in one batch.

    Difference from the reference: the posterior mean is available as well as a sample. The
    reference always samples, which makes its conditioning random.

    Source: AgibotTech/EnerVerse-AC `AutoencoderKL`; CompVis/latent-diffusion, the KL-f8 model.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        levels = len(config.channel_mult)
        self.kl = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.channels * m for m in config.channel_mult),
            layers_per_block=config.num_res_blocks,
            norm_num_groups=config.norm_groups,
            latent_channels=config.latent_channels,
        )
        self.register_load_state_dict_pre_hook(_load_either_naming)
        self.register_state_dict_post_hook(_save_ldm_naming)

    @property
    def decoder_output_weight(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, where adaptive training losses are balanced."""
        return self.kl.decoder.conv_out.weight

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [N, C, H/f, W/f] and unscaled, of frames [N, 3, H, W]."""
        moments = self._batched(lambda x: self.kl.quant_conv(self.kl.encoder(x)), frames)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [N, 3, H, W], about [-1, 1] and not clamped, of unscaled latents."""
        return self._batched(lambda z: self.kl.decoder(self.kl.post_quant_conv(z)), latents)

    def encode_mean_scaled(self, frames: Tensor) -> Tensor:
        """Posterior means times the scale factor: the latents that the UNet works on."""
        return self.config.scale_factor * self.encode(frames)[0]

    def encode_sample_scaled(
        self,
        frames: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A posterior sample times the scale factor; `noise`, given or drawn, is unit normal."""
        mean, logvar = self.encode(frames)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device).to(mean)
        return self.config.scale_factor * (mean + (logvar / 2).exp() * noise)

    def decode_scaled(self, latents: Tensor) -> Tensor:
        """`decode` of latents that are multiplied by the scale factor."""
        return self.decode(latents / self.config.scale_factor)

    def forward(self, frames: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and log variance, as needed in training."""
        mean, logvar = self.encode(frames)
        noise = torch.randn_like(mean) if noise is None else noise
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar

    def _batched(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        size = self.config.max_batch or frames_per_call(self.config, x)
        if size >= len(x):
            return network(x)
        return torch.cat([network(part) for part in x.split(size)])


def frames_per_call(config: AutoencoderConfig, x: Tensor) -> int:
    """How many frames or latents of x [N, C, H, W] go into one network call, to bound memory."""
    cells = x.shape[-2] * x.shape[-1]
    pixels = cells if x.shape[1] == 3 else cells * config.factor**2
    # The widest map: the decoder's second level, after its upsampling.
    widest = pixels * config.channels * config.channel_mult[min(1, len(config.channel_mult) - 1)]
    return max(1, (CPU_VALUES if x.device.type == "cpu" else GPU_VALUES) // widest)


def _load_either_naming(module: Autoencoder, state: dict, prefix: str, *_):
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    own = {key.removeprefix(prefix).removeprefix("kl."): value for key, value in own.items()}
    renamed = ldm_to_diffusers(own, len(module.config.channel_mult))
    state.update({f"{prefix}kl.{key}": value for key, value in renamed.items()})


def _save_ldm_naming(module: Autoencoder, state: dict, prefix: str, _metadata):
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    own = {key.removeprefix(prefix).removeprefix("kl."): value for key, value in own.items()}
    renamed = diffusers_to_ldm(own, len(module.config.channel_mult))
    state.update({f"{prefix}{key}": value for key, value in renamed.items()})
