"""The Llama of OpenVLA-OFT: bidirectional attention with a key mask; no cache, no generation loop.

Source: transformers 4.40.1 `LlamaModel` with moojink/transformers-openvla-oft's one change,
bidirectional attention in the SDPA path.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.kernels import embed, swiglu
from policies.openvla_oft.layers import Linear, Maker, RMSNorm, attend, is_fused, run_layers

# Adjacent columns of a sequence: [N] on the host if they are the same for all rows, else [B N].
Columns = np.ndarray | jax.Array


def rotary_tables(
    config: OpenVLAOFTConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S 1 D"], Float[Array, "B S 1 D"]]:
    """Return (cos, sin) of the rotary embedding; both halves of the head dimension are equal.

    The angles are theta^(-2j/D) * position in float32. They are looked up in tables that are made
    on the host. XLA would compute them again wherever they are used, in every layer and head.

    Args:
        positions: 0 .. S - 1.
    """
    dim = config.hidden_size // config.num_heads
    frequencies = np.float32(config.rope_theta) ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
    if config.reference_rope_rounding:
        frequencies = frequencies.astype(jnp.bfloat16).astype(np.float32)
    angles = np.arange(positions.shape[1], dtype=np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    dtype = jnp.dtype(config.compute_dtype)
    tables = (np.cos(angles).astype(dtype), np.sin(angles).astype(dtype))
    cos, sin = (jnp.take(table, positions, axis=0, mode="clip")[:, :, None] for table in tables)
    return cos, sin


def rotate(x: Float[Array, "B S Q D"], cos: Array, sin: Array) -> Float[Array, "B S Q D"]:
    """Apply the rotary embedding in the "rotate half" layout."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def columns(x: Float[Array, "B S ..."], read: Columns) -> Float[Array, "B N ..."]:
    """Return columns of x, the same in every row or given per row."""
    if read.ndim == 1:
        return x[:, read[0] : read[-1] + 1]  # neighbours
    return jnp.take_along_axis(x, read.reshape(*read.shape, *[1] * (x.ndim - 2)), axis=1)


class LlamaLayer(nnx.Module):
    """Pre-norm attention and SiLU-gated MLP, no biases."""

    def __init__(self, config: OpenVLAOFTConfig, make: Maker):
        self.config = config
        width, mlp = config.hidden_size, config.intermediate_size
        kv_width = width // config.num_heads * config.num_kv_heads
        self.input_layernorm = RMSNorm(make, width, config.rms_norm_eps)
        self.q_proj = Linear(make, width, width, use_bias=False)
        self.k_proj = Linear(make, width, kv_width, use_bias=False)
        self.v_proj = Linear(make, width, kv_width, use_bias=False)
        self.o_proj = Linear(make, width, width, use_bias=False)
        self.post_attention_layernorm = RMSNorm(make, width, config.rms_norm_eps)
        self.gate_proj = Linear(make, width, mlp, use_bias=False)
        self.up_proj = Linear(make, width, mlp, use_bias=False)
        self.down_proj = Linear(make, mlp, width, use_bias=False)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Array,
        sin: Array,
        seen: Bool[Array, "B S"] | Int[Array, " B"],
        read: Columns | None = None,
    ) -> Float[Array, "B N D"]:
        """Return the new states, only of the columns `read` if they are given; see `attend`."""
        config, normed = self.config, self.input_layernorm(x)
        keys, values, turns = self.k_proj(normed), self.v_proj(normed), (cos, sin)
        if read is not None:
            x, normed, *turns = (columns(part, read) for part in (x, normed, cos, sin))
        queries, keys, values = (
            y.reshape(*y.shape[:2], -1, cos.shape[-1]) for y in (self.q_proj(normed), keys, values)
        )
        queries, keys = rotate(queries, *turns), rotate(keys, cos, sin)
        x = x + self.o_proj(attend(config, queries, keys, values, seen))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(swiglu(self.gate_proj(normed), self.up_proj(normed)))


class Llama(nnx.Module):
    """Embedding, layers, final norm, output head (untied)."""

    def __init__(self, config: OpenVLAOFTConfig, make: Maker):
        self.config = config
        self.embed_tokens = make.normal((config.vocab_size, config.hidden_size), 0.02)
        self.layers = LlamaLayer(config, make.stacked(config.num_layers))
        self.norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps)
        # One row per token, as on disk, so that the action tokens are one contiguous block.
        self.lm_head = make.normal((config.vocab_size, config.hidden_size), 0.02)
        self.lm_head_lora: nnx.Module | None = nnx.data(None)

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Return token embeddings in the compute dtype."""
        return embed(self.embed_tokens[...], tokens, jnp.dtype(self.config.compute_dtype))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        key_mask: Bool[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        read: Columns | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "depth B S D"] | None]:
        """Return hidden states after the final norm and, with `collect`, after every layer.

        Args:
            read: columns whose final states are needed; None = all. If the layers are unrolled, the
                last layer computes only these columns, which saves most of its work.
        """
        cos, sin = rotary_tables(self.config, positions)
        place, seen = None, key_mask
        if is_fused(self.config, cos.shape[-1]):
            # The kernel sees the first keys of a row. So pads move to its end, and back afterwards:
            # a state depends on its position in `cos` and `sin`, not on its column.
            order = jnp.argsort(~key_mask, axis=1, stable=True)
            x, cos, sin = (columns(part, order) for part in (x, cos, sin))
            seen = jnp.sum(key_mask, axis=1, dtype=jnp.int32)
            place = jnp.argsort(order, axis=1)
            read = place if read is None else columns(place, read)
        early = read is not None and not collect and not self.config.scan_layers
        x, outputs = run_layers(
            self.config,
            self.layers,
            x,
            cos,
            sin,
            seen,
            collect=collect,
            of_last={"read": read} if early else {},
        )
        if read is not None and not early:
            x = columns(x, read)
        if place is not None and outputs is not None:
            outputs = jax.vmap(columns, (0, None))(outputs, place)
        return self.norm(x), outputs

    def logits(
        self, hidden: Float[Array, "... D"], first: int = 0, count: int | None = None
    ) -> Float[Array, "... tokens"]:
        """Return float32 logits of tokens first .. first + count - 1 (all by default).

        Difference from the reference: in bfloat16 runs the products accumulate and stay in float32;
        the reference rounds them to bfloat16.
        """
        stop = self.config.vocab_size if count is None else first + count
        rows = jax.lax.slice_in_dim(self.lm_head[...], first, stop)
        logits = jnp.einsum(
            "...d,td->...t", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        if self.lm_head_lora is not None:
            logits = logits + self.lm_head_lora(hidden, slice(first, stop))
        return logits
