import torch

from evac_jax.evac.config import (
    ResamplerConfig,
)
from evac_jax.evac.resampler import Resampler


def test_resampler_ignores_order_when_actions_are_permuted():
    torch.manual_seed(0)
    config = ResamplerConfig(
        dim=8, depth=2, dim_head=4, heads=3, num_queries=2, embedding_dim=14, output_dim=6
    )
    resampler = Resampler(config)
    actions = torch.randn(3, 5, 14)
    tokens = resampler(actions)
    assert tokens.shape == (3, 2, 6)
    torch.testing.assert_close(resampler(actions.flip(1)), tokens, atol=1e-5, rtol=1e-5)
    assert resampler(actions[:, :1]).shape == tokens.shape
    assert Resampler(config, num_queries=7)(actions).shape == (3, 7, 6)
