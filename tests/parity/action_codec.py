"""Actions to tokens and back, in float64 on the host, for tests to compare with."""

import numpy as np

from policies.openvla_oft.action_tokens import ActionStatistics, action_table


def tokens_to_actions(
    tokens: np.ndarray, statistics: ActionStatistics, first_token: int, num_bins: int = 256
) -> np.ndarray:
    """Return the actions of tokens [.. A] in float64, on the host."""
    table = action_table(statistics, num_bins)
    return table[np.asarray(tokens) - first_token, np.arange(table.shape[1])]


def actions_to_tokens(
    actions: np.ndarray, statistics: ActionStatistics, first_token: int, num_bins: int = 256
) -> np.ndarray:
    """Return the tokens [.. A] of actions [.. A], for supervised fine-tuning; int32.

    Normalise, clip to [-1, 1], digitize against the edges. The inverse of `tokens_to_actions` up
    to the width of a bin.
    """
    low, high, mask = (np.asarray(x) for x in (statistics.low, statistics.high, statistics.mask))
    actions = np.asarray(actions, np.float64)
    normalised = np.where(mask, 2 * (actions - low) / (high - low + 1e-8) - 1, actions)
    digits = np.digitize(np.clip(normalised, -1.0, 1.0), np.linspace(-1.0, 1.0, num_bins))
    return (first_token + num_bins - digits).astype(np.int32)
