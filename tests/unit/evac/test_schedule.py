import numpy as np
import pytest
import torch

from evac_jax.evac.config import EvacConfig
from evac_jax.evac.schedule import (
    Schedule,
    checkpoint_tables,
    ddim_table,
    input_scale,
    zero_snr_betas,
)


def test_last_step_has_no_signal_and_first_is_unchanged():
    kept = np.cumprod(1 - zero_snr_betas(1000))
    assert kept[-1] == 0
    assert kept[0] == pytest.approx(1 - 0.00085)
    assert (np.diff(kept) < 0).all()


def test_input_scale_falls_linearly_then_rests():
    scale = input_scale(EvacConfig(base_scale=0.5, turning_step=3, num_timesteps=4))
    np.testing.assert_allclose(scale, [1, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_every_checkpoint_table_is_finite_except_the_undefined_logarithm():
    for name, table in checkpoint_tables(EvacConfig()).items():
        assert table.dtype == np.float32
        assert np.isfinite(table).all(), name


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [(50, [19, 39, 59], [959, 979, 999]), (27, [36, 73, 110], [925, 962, 999]), (1, [999], [999])],
)
def test_ddim_timesteps_trail_uniformly(steps, first, last):
    timesteps = ddim_table(EvacConfig(), steps, 0.0).timesteps
    assert len(timesteps) == steps
    assert timesteps[:3].tolist() == first
    assert timesteps[-3:].tolist() == last


def test_sigma_is_zero_without_eta_and_scale_has_no_jump_at_the_end():
    table = ddim_table(EvacConfig(), 10, 0.0)
    assert (table.sigmas == 0).all()
    assert table.scale_prev[0] == table.scale[0]
    assert (ddim_table(EvacConfig(), 10, 1.0).sigmas > 0).all()


@pytest.mark.parametrize(("steps", "eta"), [(0, 0.0), (1001, 0.0), (5, -0.1)])
def test_ddim_refuses_impossible_settings(steps, eta):
    with pytest.raises(ValueError, match="DDIM needs"):
        ddim_table(EvacConfig(), steps, eta)


def test_v_and_diffusion_are_a_rotation():
    schedule = Schedule.create(EvacConfig())
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    t = torch.tensor([0, 500, 999])
    x, v = schedule.diffuse(clean, noise, t), schedule.v_target(clean, noise, t)
    signal, spread = schedule.signal[t][:, None], schedule.noise[t][:, None]
    torch.testing.assert_close(signal * x - spread * v, clean)
    torch.testing.assert_close(spread * x + signal * v, noise)
