import numpy as np
import pytest
import torch

from evac_jax.evac.config import EvacConfig
from evac_jax.evac.sampler import ddim_update, guide, sample
from evac_jax.evac.schedule import ddim_table

CONFIG = EvacConfig(base_scale=1.0)  # no input scale: plain DDIM


def perfect_denoiser(clean: torch.Tensor, config: EvacConfig, steps: int):
    """Knows the clean chunk, so its v is exact at any timestep."""
    table = ddim_table(config, steps, 0.0)
    alphas = dict(zip(table.timesteps.tolist(), table.alphas.tolist(), strict=True))

    def denoise(x, timesteps):
        alpha = alphas[int(timesteps[0])]
        past = x.shape[2] - clean.shape[2]
        eps = (x[:, :, past:] - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        v = alpha**0.5 * eps - (1 - alpha) ** 0.5 * clean
        return torch.cat((torch.zeros_like(x[:, :, :past]), v), 2)

    return denoise


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_recovers_the_clean_chunk_when_the_denoiser_is_perfect(eta):
    clean, history = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 2, 2, 2)
    table = ddim_table(CONFIG, 10, eta)
    result = sample(perfect_denoiser(clean, CONFIG, 10), history, torch.randn_like(clean), table)
    # The last step leaves the noise of timestep 0, sqrt(1 - a_0) = 0.03.
    torch.testing.assert_close(result, clean, atol=0.15, rtol=0)


def test_denoiser_always_sees_the_clean_history():
    history, noise, seen = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 4, 3, 2, 2), []

    def denoise(x, timesteps):
        seen.append((x[:, :, :2].clone(), timesteps.tolist()))
        return torch.randn_like(x)

    sample(denoise, history, noise, ddim_table(CONFIG, 4, 1.0))
    assert [t for _, t in seen] == [[999], [749], [499], [249]]
    assert all(torch.equal(h, history) for h, _ in seen)


def test_generator_makes_ancestral_sampling_repeatable():
    history, noise = torch.zeros(1, 4, 1, 2, 2), torch.randn(1, 4, 2, 2, 2)
    results = [
        sample(
            lambda x, t: 0.1 * x,
            history,
            noise,
            ddim_table(CONFIG, 3, 1.0),
            torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_input_scale_multiplies_the_prediction():
    config = EvacConfig(base_scale=0.5, turning_step=1000)
    table = ddim_table(config, 4, 0.0)
    x, v = torch.ones(1, 1), torch.zeros(1, 1)
    _, clean = ddim_update(x, v, 2, table)
    expected = np.sqrt(table.alphas[2]) * table.scale[1] / table.scale[2]
    assert clean.item() == pytest.approx(float(expected), rel=1e-6)


def test_first_step_is_finite_when_signal_is_zero_and_eta_one():
    for steps in (5, 10, 27, 50):
        table = ddim_table(CONFIG, steps, 1.0)
        x = torch.randn(2, 3)
        moved, clean = ddim_update(x, -x, steps - 1, table, torch.randn(2, 3))
        assert torch.isfinite(moved).all()
        torch.testing.assert_close(clean, x)


def test_update_asks_for_noise_when_sigma_is_positive():
    with pytest.raises(ValueError, match="needs noise"):
        ddim_update(torch.ones(1), torch.ones(1), 1, ddim_table(CONFIG, 4, 1.0))


def test_guidance_of_one_changes_nothing_and_rescale_keeps_the_spread():
    v, other = torch.randn(2, 50), torch.randn(2, 50)
    torch.testing.assert_close(guide(v, other, 1.0), v)
    strong = guide(v, other, 7.5, rescale=1.0)
    torch.testing.assert_close(strong.std(1), v.std(1))
    torch.testing.assert_close(guide(v, other, 2.0, rescale=0.0), 2 * v - other)
