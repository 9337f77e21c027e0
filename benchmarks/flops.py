"""Floating-point operations of the networks, computed from their configurations.

A multiplication with its addition counts as 2. Only convolutions, matrix products and attention
count. tests/unit/benchmarks/test_cost_model.py compares these formulae with the counts of torch and
XLA. Letters: n tokens, w width, t frames.
"""

from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    ResamplerConfig,
    UNetConfig,
)
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig


def linear(tokens: float, inputs: float, outputs: float) -> float:
    """A matrix product with `tokens` rows."""
    return 2 * tokens * inputs * outputs


def conv(cells: float, inputs: int, outputs: int, taps: int = 9) -> float:
    """A convolution with `cells` output cells and `taps` kernel entries."""
    return 2 * cells * taps * inputs * outputs


def attention(queries: float, keys: float, width: int) -> float:
    """Scores and weighted sums of one sequence, all heads together."""
    return 4 * queries * keys * width


# The world model, one environment.


def _res_block(cfg: UNetConfig, inputs: int, width: int, frames: int, cells: int, views: int):
    n = frames * cells
    total = conv(n, inputs, width) + conv(n, width, width) + 4 * conv(n, width, width, 3)
    if inputs != width:
        total += conv(n, inputs, width, 1)
    return total + linear(2 * views, 4 * cfg.model_channels, width)  # history and chunk frames


def _transformers(cfg: UNetConfig, width: int, context: int, frames: int, cells: int) -> float:
    """The spatial and the temporal transformer behind a residual block."""
    n, inner = frames * cells, width // cfg.num_head_channels * cfg.num_head_channels
    # Self-attention has 4 products, cross-attention 2, feed-forward 12, each inner x inner.
    spatial = 2 * linear(n, width, inner) + linear(n, inner, 18 * inner)
    spatial += frames * attention(cells, cells + context, inner)
    return spatial + _temporal(width, inner, frames, cells)


def _temporal(width: int, inner: int, frames: int, cells: int) -> float:
    """Two self-attentions over the frames of each cell, and the feed-forward layer."""
    n = frames * cells
    products = 2 * linear(n, width, inner) + linear(n, inner, 20 * inner)
    return products + 2 * cells * attention(frames, frames, inner)


def unet(config: EvacConfig) -> float:
    """One pass of the denoiser, without keys and values of the context (see `context`)."""
    cfg, frames, views = config.unet, config.frames, config.n_view
    tokens = (cfg.action_tokens, config.image_tokens * views)
    sizes = [tuple(config.latent_size)]
    for _ in cfg.channel_mult[1:]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    cells = [views * height * width for height, width in sizes]
    base, embed = cfg.model_channels, 4 * cfg.model_channels
    total = (2 * views + 1) * (linear(1, base, embed) + linear(1, embed, embed))
    total += conv(frames * cells[0], cfg.in_channels, base)
    total += _temporal(base, cfg.init_heads * cfg.num_head_channels, frames, cells[0])
    spatial = 0

    def block(inputs: int, level: int, attend: bool) -> float:
        nonlocal spatial
        width = base * cfg.channel_mult[level]
        cost = _res_block(cfg, inputs, width, frames, cells[level], views)
        if attend:
            cost += _transformers(cfg, width, tokens[spatial % 2], frames, cells[level])
            spatial += 1
        return cost

    channels, skips, last = base, [base], len(cfg.channel_mult) - 1
    for level, mult in enumerate(cfg.channel_mult):
        for _ in range(cfg.num_res_blocks):
            total += block(channels, level, 2**level in cfg.attention_resolutions)
            channels = base * mult
            skips.append(channels)
        if level < last:
            total += conv(frames * cells[level + 1], channels, channels)
            skips.append(channels)
    total += block(channels, last, True) + block(channels, last, False)
    for level in reversed(range(last + 1)):
        for i in range(cfg.num_res_blocks + 1):
            attend = 2**level in cfg.attention_resolutions
            total += block(channels + skips.pop(), level, attend)
            channels = base * cfg.channel_mult[level]
            if level and i == cfg.num_res_blocks:
                total += conv(frames * 4 * cells[level], channels, channels)
    return total + conv(frames * cells[0], channels, cfg.out_channels)


def context(config: EvacConfig) -> float:
    """Keys and values of all cross-attentions, once per chunk."""
    cfg, total = config.unet, 0.0
    tokens = (cfg.action_tokens, config.image_tokens * config.n_view)
    down = [m for i, m in enumerate(cfg.channel_mult) if 2**i in cfg.attention_resolutions]
    # One transformer in the middle, and one more block per level on the way up.
    mults = [m for m in down for _ in range(cfg.num_res_blocks)] + [cfg.channel_mult[-1]]
    mults += [m for m in reversed(down) for _ in range(cfg.num_res_blocks + 1)]
    for index, mult in enumerate(mults):
        inner = cfg.model_channels * mult // cfg.num_head_channels * cfg.num_head_channels
        total += linear(tokens[index % 2], cfg.context_dim, 2 * inner)
    return total


def _vae_levels(cfg: AutoencoderConfig, cells: list[int], blocks: int, first: int, up: bool):
    """Residual blocks and resampling of one half, from `first` channels."""
    total, channels, last = 0.0, first, len(cells) - 1
    for level in reversed(range(last + 1)) if up else range(last + 1):
        width = cfg.channels * cfg.channel_mult[level]
        for _ in range(blocks):
            total += conv(cells[level], channels, width) + conv(cells[level], width, width)
            total += conv(cells[level], channels, width, 1) if channels != width else 0
            channels = width
        if up and level:
            total += conv(cells[level - 1], width, width)
        elif not up and level < last:
            total += conv(cells[level + 1], width, width)
    return total


def _vae_middle(width: int, cells: int) -> float:
    return (
        4 * conv(cells, width, width)
        + linear(cells, width, 4 * width)
        + attention(cells, cells, width)
    )


def autoencoder(cfg: AutoencoderConfig, size: tuple[int, int]) -> tuple[float, float]:
    """Encoding and decoding of one frame of `size` (height, width)."""
    cells = [(size[0] >> level) * (size[1] >> level) for level in range(len(cfg.channel_mult))]
    first, last = cfg.channels * cfg.channel_mult[0], cfg.channels * cfg.channel_mult[-1]
    latent, middle = cfg.latent_channels, _vae_middle(last, cells[-1])
    encode = conv(cells[0], 3, cfg.channels) + middle + conv(cells[-1], last, 2 * latent)
    encode += _vae_levels(cfg, cells, cfg.num_res_blocks, cfg.channels, up=False)
    encode += conv(cells[-1], 2 * latent, 2 * latent, 1)
    decode = conv(cells[-1], latent, latent, 1) + conv(cells[-1], latent, last) + middle
    decode += _vae_levels(cfg, cells, cfg.num_res_blocks + 1, last, up=True)
    return encode, decode + conv(cells[0], first, 3)


def resampler(cfg: ResamplerConfig, tokens: int, queries: int) -> float:
    """A resampler from `tokens` tokens to `queries` queries."""
    inner, dim = cfg.heads * cfg.dim_head, cfg.dim
    layer = linear(queries, dim, 2 * inner) + linear(tokens + queries, dim, 2 * inner)
    layer += attention(queries, tokens + queries, inner) + linear(
        queries, dim, 2 * dim * cfg.ff_mult
    )
    ends = linear(tokens, cfg.embedding_dim, dim) + linear(queries, dim, cfg.output_dim)
    return ends + cfg.depth * layer


def image_tower(cfg: ImageTowerConfig) -> float:
    """One start frame through the tower, without preprocessing."""
    patches, width = (cfg.image_size // cfg.patch_size) ** 2, cfg.width
    n = patches + 1
    layer = linear(n, width, 4 * width) + attention(n, n, width)
    layer += 2 * linear(n, width, int(width * cfg.mlp_ratio))
    return linear(patches, 3 * cfg.patch_size**2, width) + cfg.layers * layer


def classifier(width: int, size: tuple[int, int]) -> float:
    """One frame through the success classifier, a ResNet-18 with `width` first channels."""
    cells = size[0] * size[1] / 4
    total = conv(cells, 3, width, 49)
    cells /= 4
    total += 4 * conv(cells, width, width)
    for _ in range(3):
        cells /= 4
        total += conv(cells, width, 2 * width, 9 + 1) + 3 * conv(cells, 2 * width, 2 * width)
        width *= 2
    return total + linear(1, width, 1)


def chunk(config: EvacConfig, steps: int, *, decoded: int = 0, classifier_width: int = 64) -> float:
    """One chunk of one environment, from actions to success probabilities.

    Args:
        steps: denoising steps.
        decoded: frames decoded and judged; 0 = all of the chunk.
    """
    encode, decode = autoencoder(config.autoencoder, config.image_size)
    frames = config.n_view * (decoded or config.chunk)
    actions = resampler(config.action_resampler, config.chunk, config.unet.action_tokens)
    total = steps * unet(config) + context(config) + actions
    total += config.n_view * config.chunk * encode + frames * decode
    return total + frames / config.n_view * classifier(classifier_width, config.image_size)


# The policy, one decision.


def _tower(cfg: OpenVLAOFTConfig, tower: VisionTowerConfig) -> float:
    n, width = cfg.num_patches + tower.prefix_tokens, tower.width
    layer = linear(n, width, 4 * width) + attention(n, n, width)
    layer += 2 * linear(n, width, tower.mlp_width)
    return linear(cfg.num_patches, 3 * cfg.patch_size**2, width) + (tower.depth - 1) * layer


def sequence_length(cfg: OpenVLAOFTConfig) -> int:
    """Tokens of one decision."""
    patches = cfg.num_images * cfg.num_patches
    return cfg.max_prompt_length + patches + cfg.num_action_tokens + cfg.keep_stop_token


def layers(cfg: OpenVLAOFTConfig) -> float:
    """The repeated layers of one forward pass, which remat computes once more."""
    n, width = sequence_length(cfg), cfg.hidden_size
    kv = width // cfg.num_heads * cfg.num_kv_heads
    queried = 2 * width + 3 * cfg.intermediate_size  # outputs of products for queries only

    def layer(queries: int) -> float:
        return (
            linear(n, width, 2 * kv)
            + linear(queries, width, queried)
            + attention(queries, n, width)
        )

    # If layers are unrolled, the last one computes only the columns that are read.
    last = layer(n if cfg.scan_layers else cfg.num_action_tokens)
    llama = (cfg.num_layers - 1) * layer(n) + last
    return llama + cfg.num_images * (_tower(cfg, cfg.dinov2) + _tower(cfg, cfg.siglip))


def forward(cfg: OpenVLAOFTConfig) -> float:
    """One decision, for frames that already have the policy's size."""
    fused, width = cfg.dinov2.width + cfg.siglip.width, cfg.hidden_size
    n = cfg.num_images * cfg.num_patches
    projector = linear(n, fused, 4 * fused) + linear(n, 4 * fused, width) + linear(n, width, width)
    head = linear(cfg.num_action_tokens, width, cfg.num_bins)
    if cfg.num_values:
        first, second = cfg.value_widths
        head += linear(1, width, first) + linear(1, first, second)
        head += linear(1, second, cfg.num_values)
    return layers(cfg) + projector + head
