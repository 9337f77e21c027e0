"""Sizes and constants of an EVAC world model; they determine every network completely.

The defaults are the full-size model as RLinf runs it on LIBERO: 256x256 images, 8 frames per
chunk. A miniature uses the same classes with smaller numbers. The classes are frozen and convert
to and from JSON (`EvacConfig.from_dict`, `to_dict`), so a folder of weights describes itself.

Source: the public configurations of AgibotTech/EnerVerse-AC and jzndd/EnerVerse-AC.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Self

from evac_jax.errors import ConfigError

# Statistics of single-frame end-effector deltas in AgiBot World, the data the public weights were
# trained on: x y z (metres), three Euler angles (radians), left arm then right arm.
AGIBOTWORLD_DELTA_MEAN = (
    2.9493694455595687e-05, -2.470397886256137e-09, -3.2145206205314025e-05,
    -0.0001048886333592236, 6.125598702055868e-06, 9.914418478729203e-05,
    2.5206249119946733e-05, 2.3864370746196073e-07, -3.6538443964673206e-05,
    -0.00011700510367518291, 9.653312190494034e-06, -0.0001260203425772488,
)  # fmt: skip
AGIBOTWORLD_DELTA_STD = (
    0.0008946039597503841, 0.001101485569961369, 0.0010237522656098008,
    0.010402864776551723, 0.004935376811772585, 0.010759416967630386,
    0.0009436214459128678, 0.001378210261464119, 0.0011818999191746116,
    0.007539297919720411, 0.004320257809013128, 0.008149676956236362,
)  # fmt: skip


class JsonConfig:
    """Dataclass mixin that converts to and from plain JSON values and rejects unknown keys."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of JSON values; tuples become lists."""

        def plain(value):
            if isinstance(value, JsonConfig):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`'s output; keys left out keep their defaults.

        Raises:
            ConfigError: for a key this class does not have, or a value of another type.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__}: expected an object with its sizes, got {data!r}")
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise ConfigError(
                f"{cls.__name__}: unknown keys {unknown}; it has {sorted(hints)}. "
                "Remove them from the JSON file or use the version that wrote it."
            )

        def rebuild(kind, value):
            if isinstance(kind, type) and issubclass(kind, JsonConfig):
                return kind.from_dict(value)
            return _tuples(value)

        values = {name: rebuild(hints[name], value) for name, value in data.items()}
        if wrong := [
            f"{name}: expected {hints[name]}, got {value!r}"
            for name, value in values.items()
            if not _fits(hints[name], value)
        ]:
            raise ConfigError(f"{cls.__name__}: {'; '.join(wrong)}")
        return cls(**values)

    def replace(self, **changes) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type; a whole number serves as a real one."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if typing.get_origin(kind) is not tuple:
        return type(value) is kind
    entries = typing.get_args(kind)
    if not isinstance(value, tuple):
        return False
    if entries[-1] is Ellipsis:
        entries = entries[:1] * len(value)
    return len(entries) == len(value) and all(map(_fits, entries, value))


@dataclass(frozen=True)
class UNetConfig(JsonConfig):
    """Video UNet.

    Attributes:
        in_channels: noisy latent 4, image condition 4, mask 1, trajectory latent 4, rays 6; latents
            have as many channels as the autoencoder's.
        out_channels: latent channels predicted.
        model_channels: width of level 0; a multiple of `num_head_channels` and `norm_groups`.
        channel_mult: width of each level, in units of `model_channels`.
        num_res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: downsampling factors at which transformers sit.
        num_head_channels: width of one attention head.
        init_heads: heads of the temporal transformer behind the first convolution.
        context_dim: width of the context tokens.
        action_tokens: number of action tokens, at the end of the context; the others are image
            tokens.
        num_domains: rows of the embodiment table.
        norm_groups: groups of every group norm. Public weights need 32. At a width of 32 this would
            be one channel per group, which erases the time embedding, so a miniature has fewer.
        dropout: in [0, 1), inside residual blocks and attention outputs, in training only.
        gradient_checkpointing: recompute blocks in the backward pass; less memory, more time.
    """

    in_channels: int = 19
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_head_channels: int = 64
    init_heads: int = 8
    context_dim: int = 1024
    action_tokens: int = 16
    num_domains: int = 30
    norm_groups: int = 32
    dropout: float = 0.0
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class AutoencoderConfig(JsonConfig):
    """KL autoencoder; every level except the last halves the image.

    Attributes:
        channels: width of level 0; a multiple of `norm_groups`.
        channel_mult: width of each level, in units of `channels`.
        num_res_blocks: residual blocks per level of the encoder; one more in the decoder.
        norm_groups: groups of every group normalisation.
        latent_channels: channels of a latent.
        scale_factor: latents are stored multiplied by this.
        max_batch: frames per network call, to bound memory; 0 = chosen by
            `autoencoder.frames_per_call`. Frames are independent, so results do not depend on it.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    latent_channels: int = 4
    scale_factor: float = 0.18215
    max_batch: int = 0

    @property
    def factor(self) -> int:
        """Pixels per latent cell, per axis."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class ResamplerConfig(JsonConfig):
    """Perceiver resampler: maps any number of input tokens to a fixed number of context tokens.

    Attributes:
        dim: width inside.
        depth: layers.
        dim_head: width of one head.
        heads: attention heads; `heads * dim_head` need not equal `dim`.
        num_queries: output tokens; for the image resampler, per frame of a chunk.
        ff_mult: hidden width of the feed-forward layers, in units of `dim`.
        embedding_dim: width of the input tokens.
        output_dim: width of the output tokens; the UNet's `context_dim`.
    """

    dim: int = 1024
    depth: int = 4
    dim_head: int = 64
    heads: int = 12
    num_queries: int = 16
    ff_mult: int = 4
    embedding_dim: int = 1280
    output_dim: int = 1024


@dataclass(frozen=True)
class ImageTowerConfig(JsonConfig):
    """CLIP vision transformer; the defaults are ViT-H-14.

    Attributes:
        width: token width.
        layers: transformer blocks.
        head_width: width of one head.
        patch_size: pixels per patch and axis.
        image_size: pixels per axis after preprocessing; a multiple of `patch_size`.
        mlp_ratio: hidden width of the MLP, in units of `width`.
        embed_dim: width of CLIP's joint space; only the shape of an unused weight.
    """

    width: int = 1280
    layers: int = 32
    head_width: int = 80
    patch_size: int = 14
    image_size: int = 224
    mlp_ratio: float = 4.0
    embed_dim: int = 1024


@dataclass(frozen=True)
class MapConfig(JsonConfig):
    """Trajectory maps.

    Attributes:
        renderer: "fork" (RLinf's path: left pose only, camera along -Z, mirrored) or "upstream"
            (both arms, camera along +Z).
        radius: of the disc, pixels; the public models use 50 at every image size.
        thickness: of the axis lines, pixels.
        axis_length: of the drawn axes, metres.
        tool_offset: metres along the hand's z from the pose to the drawn point; upstream only.
        tool_yaw: radians by which the drawn frames turn about their own z axis, left arm
            negative, right arm positive; "upstream" only, where the public model uses 0.5236.
        gripper_range: readings at the two ends of the colour table; the public models use
            (-1, 1) with "fork" and (0, 120) with "upstream".
        arms: arms drawn by "upstream", 1 or 2.
        wrist_view: "fork" with several views draws view 1 as a camera fixed to the hand.
    """

    renderer: str = "fork"
    radius: int = 50
    thickness: int = 8
    axis_length: float = 0.1
    tool_offset: float = 0.23
    tool_yaw: float = 0.0
    gripper_range: tuple[float, float] = (-1.0, 1.0)
    arms: int = 2
    wrist_view: bool = True


@dataclass(frozen=True)
class EvacConfig(JsonConfig):
    """A whole world model.

    Attributes:
        image_size: (height, width) in pixels; multiples of the autoencoder's factor.
        chunk: frames imagined at once.
        n_previous: history frames in front of them, at least 2.
        n_view: cameras.
        base_scale: final value of the input scale, in (0, 1].
        turning_step: diffusion steps over which the scale falls from 1 to `base_scale`.
        consistent_scale: sampling treats the scale as training does: the history is multiplied by
            the scale of every step, and what is imagined is divided by the last one. False is the
            public model's convention: history is taken as it is, and latents are decoded and
            remembered with the scale (and the noise) of the smallest timestep. Of 50 steps that is
            .986; of two it is `base_scale`, which makes pictures visibly worse.
        num_timesteps: diffusion steps of training.
        fps: frame-rate conditioning value, truncated to an integer.
        domain_id: row of the embodiment table; 11 is AgiBot World.
        delta_mean, delta_std: 12 statistics of the pose deltas (metres, radians).
        delta_std_factor: mean and standard deviation are multiplied by this before deltas are
            normalised, because frames of the training data were up to this many steps apart.
        gripper_scale: the gripper reading is divided by this in the delta actions.
        unet, autoencoder, action_resampler, image_resampler, image_tower, maps: the parts.
    """

    image_size: tuple[int, int] = (256, 256)
    chunk: int = 8
    n_previous: int = 4
    n_view: int = 1
    base_scale: float = 0.7
    turning_step: int = 400
    consistent_scale: bool = False
    num_timesteps: int = 1000
    fps: float = 2
    domain_id: int = 11
    delta_mean: tuple[float, ...] = AGIBOTWORLD_DELTA_MEAN
    delta_std: tuple[float, ...] = AGIBOTWORLD_DELTA_STD
    delta_std_factor: float = 3.0
    gripper_scale: float = 120.0
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    action_resampler: ResamplerConfig = field(
        default_factory=lambda: ResamplerConfig(embedding_dim=14)
    )
    image_resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    maps: MapConfig = field(default_factory=MapConfig)

    @property
    def frames(self) -> int:
        """Frames the UNet sees: history and chunk."""
        return self.n_previous + self.chunk

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of a latent."""
        height, width = self.image_size
        return height // self.autoencoder.factor, width // self.autoencoder.factor

    @property
    def image_tokens(self) -> int:
        """Image tokens in the context."""
        return self.image_resampler.num_queries * self.chunk

    def __post_init__(self):
        """Raise one error that lists all sizes that do not fit together."""
        unet, tower, latent = self.unet, self.image_tower, self.autoencoder.latent_channels
        width = self.action_resampler.output_dim
        checks = {
            f"image_size {self.image_size} must be multiples of the autoencoder's factor "
            f"{self.autoencoder.factor}": any(n % self.autoencoder.factor for n in self.image_size),
            f"unet.context_dim {unet.context_dim}, action_resampler.output_dim {width} and "
            f"image_resampler.output_dim {self.image_resampler.output_dim} must be equal": (
                not unet.context_dim == width == self.image_resampler.output_dim
            ),
            f"unet.in_channels {unet.in_channels} and out_channels {unet.out_channels} must be "
            f"{3 * latent + 7} and {latent}, for latents of {latent} channels": (
                (unet.in_channels, unet.out_channels) != (3 * latent + 7, latent)
            ),
            f"unet.action_tokens {unet.action_tokens} must be action_resampler.num_queries "
            f"{self.action_resampler.num_queries}": (
                unet.action_tokens != self.action_resampler.num_queries
            ),
            f"image_resampler.embedding_dim {self.image_resampler.embedding_dim} must be "
            f"image_tower.width {tower.width}": self.image_resampler.embedding_dim != tower.width,
            "chunk, n_view must be at least 1 and n_previous at least 2": (
                self.chunk < 1 or self.n_view < 1 or self.n_previous < 2
            ),
            f"unet.model_channels {unet.model_channels} must be a multiple of num_head_channels "
            f"{unet.num_head_channels} and of norm_groups {unet.norm_groups}": (
                unet.model_channels % unet.num_head_channels > 0
                or unet.model_channels % unet.norm_groups > 0
            ),
            f"action_resampler.embedding_dim {self.action_resampler.embedding_dim} must be 14": (
                self.action_resampler.embedding_dim != 14
            ),
            f"delta_mean and delta_std need 12 entries, got {len(self.delta_mean)} and "
            f"{len(self.delta_std)}": (len(self.delta_mean), len(self.delta_std)) != (12, 12),
            f"maps.renderer {self.maps.renderer!r} must be 'fork' or 'upstream'": (
                self.maps.renderer not in ("fork", "upstream")
            ),
            f"domain_id {self.domain_id} must be in [0, {unet.num_domains})": (
                not 0 <= self.domain_id < unet.num_domains
            ),
        }
        problems = [text for text, wrong in checks.items() if wrong]
        if problems:
            raise ConfigError("EvacConfig: " + "; ".join(problems))
