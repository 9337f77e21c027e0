"""Arrays that policies, algorithms and the trainer pass to one another.

Dimension letters, used in every signature of the project:
B episodes or samples, T chunk steps, K actions per chunk, A action dimensions, V views,
H W image height and width, P proprioception, L prompt tokens, S sequence, D width.
The batch axis is always first, because it is the one that is sharded.
"""

import chex
from jaxtyping import Array, Bool, Float, Int, UInt8


@chex.dataclass(frozen=True)
class ObsBatch:
    """What a policy sees before it decides on one chunk.

    Attributes:
        images: camera frames, 0..255, upright as the policy was trained to see them.
        prompt_tokens: tokenised instruction, padded as `policies.openvla_oft.prompt` describes.
        prompt_mask: True on real prompt tokens.
    """

    images: UInt8[Array, "B V H W 3"]
    prompt_tokens: Int[Array, "B L"]
    prompt_mask: Bool[Array, "B L"]


@chex.dataclass(frozen=True)
class PolicyOutput:
    """One sampled chunk.

    Attributes:
        actions: un-normalised actions in the units of the checkpoint's statistics.
        tokens: absolute token ids.
        log_probs: log-probability (nats) of each token under the distribution it was drawn from.
        values: value estimates, [B 1] (chunk level), [B K] (action level) or None without a head.
    """

    actions: Float[Array, "B K A"]
    tokens: Int[Array, "B K A"]
    log_probs: Float[Array, "B K A"]
    values: Float[Array, "B v"] | None


@chex.dataclass(frozen=True)
class PolicyEvaluation:
    """Given tokens, evaluated by the current policy.

    Attributes:
        log_probs: log-probability of the given tokens, nats.
        entropy: entropy of each token's distribution, nats.
        values: as in `PolicyOutput`.
    """

    log_probs: Float[Array, "B K A"]
    entropy: Float[Array, "B K A"]
    values: Float[Array, "B v"] | None
