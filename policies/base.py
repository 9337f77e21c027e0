"""The interface of a policy, as the trainer uses it. A protocol: policies need not inherit it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int

from policies.spec import ActionSpec
from policies.types import ObsBatch, PolicyEvaluation, PolicyOutput


@runtime_checkable
class Policy(Protocol):
    """An NNX module that samples action chunks and evaluates given ones.

    Both methods are pure: under `nnx.split` / `nnx.merge` and `jax.jit` the results depend only on
    the arguments and the parameters. With the same parameters, observation, tokens, temperature
    and top_k, `evaluate` returns the log-probs that `sample` returned.
    """

    @property
    def action_spec(self) -> ActionSpec:
        """Shape and meaning of the actions, compared with the simulator's at start-up."""
        ...

    def sample(
        self,
        obs: ObsBatch,
        key: jax.Array,
        *,
        rows: Int[Array, " B"] | None = None,
        temperature: float | Array = 1.0,
        top_k: int = -1,
        greedy: bool = False,
    ) -> PolicyOutput:
        """Draw one chunk per row (the likeliest one if greedy).

        `rows` gives each row a number; None = 0 .. B - 1. The draw of a row depends only on the key
        and on this number, so the actions do not change when a batch is divided.
        """
        ...

    def evaluate(
        self,
        obs: ObsBatch,
        tokens: Int[Array, "B K A"],
        *,
        temperature: float | Array = 1.0,
        top_k: int = -1,
    ) -> PolicyEvaluation:
        """Return log-probs, entropies and values of given tokens."""
        ...


class Tokenizer(Protocol):
    """Turns task descriptions into the prompt arrays of an `ObsBatch`."""

    def encode(self, tasks: list[str]) -> tuple[Any, Any]:
        """Return (prompt_tokens [n L] int32, prompt_mask [n L] bool)."""
        ...


class LoadedPolicy(Protocol):
    """What a loader returns.

    Attributes:
        model: the policy, an NNX module.
        tokenizer: makes its prompts.
        notes: messages about the import for the user, one line each.
    """

    model: Policy
    tokenizer: Tokenizer
    notes: Sequence[str]
