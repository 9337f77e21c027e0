"""OpenVLA-OFT as a policy: one forward pass, all action tokens at once.

All K * A tokens come from the same pass and are independent given the observation. The action
slots hold zero vectors and differ only in their positions. The token of slot j is predicted one
position earlier, so the outputs that are read start at the last token of the prompt.

Source: RLinf openvla_oft, `implement_version: rlinf` (revision a3816b5). Deliberate differences:
1. 256 logits per slot instead of the whole vocabulary (same numbers with top-k off).
2. In `evaluate` as in `sample`, top-k is applied after the restriction to the 256 bins. The
   reference applies top-k first in training (`topk_order="reference"`), which can exclude a token
   that was sampled.
3. The temperature also applies to greedy log-probs, so that they agree with `evaluate`.
4. The entropy's gradient is finite.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from policies.openvla_oft import action_tokens, lora, preprocess
from policies.openvla_oft.action_tokens import ActionStatistics
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.kernels import gelu
from policies.openvla_oft.layers import Linear, Maker
from policies.openvla_oft.llama import Llama, columns
from policies.openvla_oft.vision import Projector, VisionBackbone
from policies.spec import ActionSpec
from policies.types import ObsBatch, PolicyEvaluation, PolicyOutput

TOPK_ORDERS = ("mask_first", "reference")


class ValueHead(nnx.Module):
    """Maps the hidden state of the prompt's last token to values; float32 throughout.

    Initial weights are N(0, 0.02) and biases 0, which is the effect of the reference's loading.
    """

    def __init__(self, config: OpenVLAOFTConfig, make: Maker):
        first, second = config.value_widths
        self.fc1 = Linear(make, config.hidden_size, first, std=0.02)
        self.fc2 = Linear(make, first, second, std=0.02)
        self.fc3 = Linear(make, second, config.num_values, use_bias=False, std=0.02)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... v"]:
        return self.fc3(gelu(self.fc2(gelu(self.fc1(hidden.astype(jnp.float32))))))


@dataclasses.dataclass(frozen=True)
class Forward:
    """The results of one forward pass that the heads need.

    Attributes:
        slots: hidden states that predict the action tokens, [B N D].
        stages: intermediate results by name; empty unless collected.
    """

    slots: jax.Array
    stages: dict[str, jax.Array]


class OpenVLAOFT(nnx.Module):
    """Two ViTs, a projector and a bidirectional Llama over `BOS, patches, prompt, action slots`.

    Args:
        config: sizes and switches.
        statistics: un-normalisation of the actions; without it they stay in -1..1.
        rngs: for the weights of a fresh model; None = zeros, for shapes inside `nnx.eval_shape`.
    """

    def __init__(
        self,
        config: OpenVLAOFTConfig,
        statistics: ActionStatistics | None = None,
        *,
        rngs: nnx.Rngs | None,
    ):
        statistics = statistics or ActionStatistics.identity(config.action_dim)
        if len(statistics.low) != config.action_dim:
            raise ValueError(
                f"action statistics have {len(statistics.low)} dimensions, the policy's "
                f"action_dim is {config.action_dim}"
            )
        self.config, self.statistics = config, statistics
        make = Maker.create(config, rngs)
        base = dataclasses.replace(make, variable=lora.FrozenParam) if config.lora_rank else make
        self.vision = VisionBackbone(config, base)
        self.projector = Projector(config, base)
        self.llama = Llama(config, base)
        self.value_head = ValueHead(config, make) if config.num_values else None
        if config.lora_rank:
            lora.attach(self, make)

    @property
    def action_spec(self) -> ActionSpec:
        """Shape and meaning of the actions."""
        config = self.config
        return ActionSpec(config.action_dim, config.chunk, config.action_convention)

    def sample(
        self,
        obs: ObsBatch,
        key: jax.Array,
        *,
        rows: Array | None = None,
        temperature: float | Array = 1.0,
        top_k: int = -1,
        greedy: bool = False,
    ) -> PolicyOutput:
        """Draw a chunk per row: every token from softmax(logits / temperature) over its bins.

        Args:
            key: PRNG key; unused if greedy.
            rows: int [B], a number for each row. The draw of a row depends only on the key and on
                this number, not on the rest of the batch. None = 0 .. B - 1.
            temperature: > 0; may be traced.
            top_k: bins kept, ties included; <= 0 keeps all.
            greedy: take the likeliest bin instead.
        """
        forward = self.forward(self.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask)
        logits = self.action_logits(forward.slots)
        log_dist = action_tokens.log_distribution(logits, temperature, top_k)
        if greedy:
            bins = jnp.argmax(logits, axis=-1)
        else:
            names = jnp.arange(len(logits)) if rows is None else rows
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names)
            bins = jax.vmap(jax.random.categorical)(keys, log_dist)
        table = action_tokens.action_table(self.statistics, self.config.num_bins)
        bins = self._by_action(bins.astype(jnp.int32))  # [B K A]
        log_dist = self._by_action(log_dist)
        return PolicyOutput(
            actions=jnp.asarray(table, jnp.float32)[bins, np.arange(self.config.action_dim)],
            tokens=bins + self.config.first_action_token,
            log_probs=jnp.take_along_axis(log_dist, bins[..., None], axis=-1)[..., 0],
            values=self.values(forward),
        )

    def evaluate(
        self,
        obs: ObsBatch,
        tokens: Int[Array, "B K A"],
        *,
        temperature: float | Array = 1.0,
        top_k: int = -1,
        topk_order: str = "mask_first",
    ) -> PolicyEvaluation:
        """Return log-probs of given tokens, entropies and values.

        Args:
            tokens: absolute ids, first_action_token .. + 255.
            temperature, top_k: as in `sample`.
            topk_order: "mask_first": top-k among the bins, as when sampling. "reference": top-k
                over the whole vocabulary, then the restriction to the bins; a token that top-k
                excludes has log-prob -inf. For comparison with RLinf only.

        Raises:
            ValueError: unknown topk_order.
        """
        if topk_order not in TOPK_ORDERS:
            raise ValueError(f"topk_order: expected one of {TOPK_ORDERS}, got {topk_order!r}")
        forward = self.forward(self.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask)
        if topk_order == "reference" and top_k > 0:
            logits = action_tokens.keep_top_k(self.llama.logits(forward.slots) / temperature, top_k)
            log_dist = jax.nn.log_softmax(self._action_range(logits))
        else:
            logits = self.action_logits(forward.slots)
            log_dist = action_tokens.log_distribution(logits, temperature, top_k)
        log_dist = self._by_action(log_dist)
        bins = tokens - self.config.first_action_token
        return PolicyEvaluation(
            log_probs=jnp.take_along_axis(log_dist, bins[..., None], axis=-1)[..., 0],
            entropy=action_tokens.entropy(log_dist),
            values=self.values(forward),
        )

    def pixel_values(self, images: UInt8[Array, "B V H W 3"]) -> Float[Array, "B V size size 6"]:
        """Return preprocessed frames in the compute dtype.

        Raises:
            ValueError: the number of images is not the one that the policy was built for.
        """
        if images.ndim != 5 or images.shape[1] != self.config.num_images:
            raise ValueError(
                f"images: expected [B, {self.config.num_images}, H, W, 3], got {images.shape}; "
                f"the policy's num_images sets the number of cameras"
            )
        pixels = preprocess.pixel_values(images, self.config)
        return pixels.astype(jnp.dtype(self.config.compute_dtype))

    def forward(
        self,
        pixels: Float[Array, "B V size size 6"],
        prompt_tokens: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        *,
        collect: bool = False,
    ) -> Forward:
        """Run the network up to the heads; with `collect`, keep the intermediate results."""
        features, stages = self.vision(pixels, collect=collect)
        patches = self.projector(features)
        x, valid, positions = self.sequence(patches, prompt_tokens, prompt_mask)
        slots = self._slot_indices(valid)
        read = None if collect else slots
        hidden, layers = self.llama(x, valid, positions, read=read, collect=collect)
        outputs = columns(hidden, slots) if collect else hidden
        if layers is not None:
            stages |= {
                "projector_output": patches,
                "mm_embeddings": x,
                "mm_attention_mask": valid,
                "mm_position_ids": positions,
                "hidden_states": jnp.concatenate([x[None], layers]),
                "last_hidden_states": hidden,
            }
        return Forward(slots=outputs, stages=stages)

    def sequence(
        self,
        patches: Float[Array, "B P D"],
        prompt_tokens: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"], Int[Array, "B S"]]:
        """Return (embeddings, validity mask, positions) of the Llama's input.

        The sequence is `BOS, patches, PAD * k, words, N zero vectors`. Positions count valid tokens
        only, so a row does not depend on its padding. With `keep_stop_token` a stop token follows,
        and the pads come last, at position 1.
        """
        config, batch = self.config, patches.shape[0]
        words = self.llama.embed(prompt_tokens)
        prompt_mask = prompt_mask.astype(bool)
        empty = jnp.zeros((batch, config.num_action_tokens, config.hidden_size), words.dtype)
        parts = [words[:, :1], patches.astype(words.dtype), words[:, 1:], empty]
        masks = [
            prompt_mask[:, :1],
            jnp.ones(patches.shape[:2], bool),
            prompt_mask[:, 1:],
            jnp.ones(empty.shape[:2], bool),
        ]
        if config.keep_stop_token:
            parts.append(self.llama.embed(jnp.full((batch, 1), config.stop_token_id)))
            masks.append(jnp.ones((batch, 1), bool))
        x, valid = jnp.concatenate(parts, axis=1), jnp.concatenate(masks, axis=1)
        if config.keep_stop_token:
            order = jnp.argsort(~valid, axis=1, stable=True)
            x = jnp.take_along_axis(x, order[..., None], axis=1)
            valid = jnp.take_along_axis(valid, order, axis=1)
            positions = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, 1)
        else:
            positions = jnp.cumsum(valid, axis=1) - 1
        return x, valid, positions

    def _slot_indices(self, valid: Bool[Array, "B S"]) -> np.ndarray | jax.Array:
        """Return the columns that predict the action tokens: [N] on the host, or [B N]."""
        count = self.config.num_action_tokens
        if self.config.keep_stop_token:
            first = jnp.sum(valid, axis=1, keepdims=True) - 1 - count - 1
            return first + jnp.arange(count)
        return valid.shape[1] - count - 1 + np.arange(count)

    def action_logits(self, slots: Float[Array, "B N D"]) -> Float[Array, "B N bins"]:
        """Return float32 logits of the action tokens, lowest id first."""
        return self.llama.logits(slots, self.config.first_action_token, self.config.num_bins)

    def values(self, forward: Forward) -> Float[Array, "B v"] | None:
        """Return the value estimates, read at the position that predicts the first action token."""
        return None if self.value_head is None else self.value_head(forward.slots[:, 0])

    def _action_range(self, logits: Float[Array, "... vocab"]) -> Float[Array, "... bins"]:
        first = self.config.first_action_token
        return logits[..., first : first + self.config.num_bins]

    def _by_action(self, x: Array) -> Array:
        """[B N ..] -> [B K A ..]; slots are ordered by action, then by dimension."""
        return x.reshape(x.shape[0], self.config.chunk, self.config.action_dim, *x.shape[2:])
