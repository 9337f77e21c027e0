import numpy as np
import pytest
import torch

from evac_jax.config.checks import SOLVER_ETAS
from evac_jax.errors import ConfigError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.sampler import SOLVERS, check_solver, ddim_update, guide, sample, solve
from evac_jax.evac.schedule import checkpoint_tables, ddim_table

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


@pytest.mark.parametrize(("solver", "eta"), [("dpm++", 0.0), ("dpm++", 1.0), ("unipc", 0.0)])
@pytest.mark.parametrize("base_scale", [1.0, 0.7])
def test_solvers_recover_the_clean_chunk_when_the_denoiser_is_perfect(solver, eta, base_scale):
    config = CONFIG.replace(base_scale=base_scale)
    clean, history = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 2, 2, 2)
    table, seen = ddim_table(config, 10, 0.0), []
    scale = dict(zip(table.timesteps.tolist(), table.scale.tolist(), strict=True))

    def denoise(x, timesteps):
        seen.append(int(timesteps[0]))
        return perfect_denoiser(clean * scale[seen[-1]], config, 10)(x, timesteps)

    noise = torch.randn_like(clean)
    result = solve(solver, config, denoise, history, noise, steps=10, eta=eta)
    torch.testing.assert_close(result, clean * float(table.scale[0]), atol=0.15, rtol=0)
    assert seen == table.timesteps[::-1].tolist()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("consistent", [True, False])
def test_two_steps_end_with_clean_latents_only_where_the_scale_is_consistent(solver, consistent):
    config = CONFIG.replace(base_scale=0.7, consistent_scale=consistent)
    clean, history = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 2, 2, 2)
    table, pasts = ddim_table(config, 2, 0.0), []
    assert table.scale.tolist() == pytest.approx([0.7, 0.7])

    def denoise(x, timesteps):
        pasts.append(x[:, :, :2])
        return perfect_denoiser(0.7 * clean, config, 2)(x, timesteps)

    result = solve(solver, config, denoise, history, torch.randn_like(clean), steps=2, eta=0.0)
    if consistent:
        torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)
    else:  # and the noise of timestep 0
        torch.testing.assert_close(result, 0.7 * clean, atol=0.15, rtol=0)
    expected = 0.7 * history if consistent else history  # `diffusion_loss` shows the former
    assert len(pasts) == 2
    for past in pasts:
        torch.testing.assert_close(past, expected)


def gaussian_denoiser(config: EvacConfig, mean: float, spread: float):
    """The exact v for clean latents of N(mean, spread^2), which a perfect network would give."""
    tables = checkpoint_tables(config)

    def denoise(x, timesteps):
        time = int(timesteps[0])
        kept, scale = float(tables["alphas_cumprod"][time]), float(tables["scale_arr"][time])
        signal, noise = kept**0.5 * scale, (1 - kept) ** 0.5
        gain = signal * spread**2 / (signal**2 * spread**2 + noise**2)
        clean = scale * (mean + gain * (x - signal * mean))
        eps = (x - kept**0.5 * clean) / noise
        return kept**0.5 * eps - noise * clean

    return denoise


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("base_scale", [1.0, 0.7])
def test_solvers_come_closer_than_ddim_when_steps_are_few(solver, base_scale):
    config, noise = CONFIG.replace(base_scale=base_scale), torch.linspace(-2, 2, 16)
    noise = noise.reshape(1, 4, 1, 2, 2)
    denoise, history = gaussian_denoiser(config, mean=1.0, spread=0.5), torch.zeros(1, 4, 1, 2, 2)

    def imagined(name, steps):
        return solve(name, config, denoise, history, noise, steps=steps, eta=0.0)

    # The flow carries a start z to mean + spread * z; the returned latents keep the last scale.
    exact = 1.0 + 0.5 * noise
    errors = {}
    for name in ("ddim", solver):
        scale = float(ddim_table(config, 10, 0.0).scale[0])
        errors[name] = (imagined(name, 10) / scale - exact).abs().max().item()
    assert errors[solver] < 0.85 * errors["ddim"]


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_solvers_are_ddim_when_there_is_one_step(solver):
    denoise, history = gaussian_denoiser(CONFIG, mean=1.0, spread=0.5), torch.zeros(1, 4, 1, 2, 2)
    noise = torch.randn(1, 4, 1, 2, 2)
    results = [
        solve(name, CONFIG, denoise, history, noise, steps=1, eta=0.0) for name in ("ddim", solver)
    ]
    torch.testing.assert_close(*results, atol=2e-3, rtol=0)


def test_stochastic_solver_takes_the_noise_it_is_given():
    history, noise = torch.zeros(1, 4, 1, 2, 2), torch.randn(1, 4, 2, 2, 2)
    drawn = []

    def source(index):
        drawn.append(index)
        return torch.zeros_like(noise)

    solve(
        "dpm++",
        CONFIG,
        lambda x, t: 0.1 * x,
        history,
        noise,
        steps=3,
        eta=1.0,
        generator=source,
    )
    assert drawn == [2, 1, 0]


@pytest.mark.parametrize(
    ("solver", "eta", "message"),
    [("euler", 0.0, "ddim.*got 'euler'"), ("unipc", 1.0, "needs eta 0"), ("dpm++", 0.5, "0 or 1")],
)
def test_solver_is_refused_when_it_does_not_exist_or_has_no_such_eta(solver, eta, message):
    with pytest.raises(ConfigError, match=message):
        check_solver(solver, eta)


def test_configuration_refuses_what_the_sampler_refuses():
    for solver, etas in SOLVER_ETAS.items():
        for eta in (0.0, 0.5, 1.0):
            if not etas or eta in etas:
                check_solver(solver, eta)
            else:
                with pytest.raises(ConfigError, match="needs eta"):
                    check_solver(solver, eta)
