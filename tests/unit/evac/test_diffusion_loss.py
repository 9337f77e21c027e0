import dataclasses

import pytest
import torch

from evac_jax.evac.diffusion_loss import (
    PLAIN,
    LossOptions,
    condition_dropout,
    noise_history,
    training_loss,
)
from evac_jax.evac.schedule import Schedule
from tests.unit.evac.tiny import TINY, camera, encode_batch, poses, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def batch(model):
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(2, 1, TINY.frames, 3, 32, 32, generator=generator) * 2 - 1
    return encode_batch(model, frames, poses(2, TINY.frames), camera())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_encoded_batch_has_the_documented_shapes(batch):
    assert batch.latents.shape == (2, 1, 4, 6, 8, 8)
    assert batch.map_latents.shape == (2, 1, 4, 3, 8, 8)
    assert batch.rays.shape == (1, 1, 6, 6, 8, 8)
    assert batch.deltas.shape == (2, 3, 14)
    assert batch.images.shape == (2, 1, 3, 3, 32, 32)


def test_loss_is_a_pure_function_of_the_generator(model, batch):
    losses = [training_loss(model, batch, generator=generator(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_loss_is_the_v_error_when_the_network_says_nothing(model, batch):
    silent = tiny_model()
    silent.unet.out[2].weight.data.zero_()
    silent.unet.out[2].bias.data.zero_()
    t, noise = torch.tensor([100, 700]), torch.randn(batch.latents.shape, generator=generator())
    loss = training_loss(
        silent, batch, options=PLAIN, timesteps=t, noise=noise, generator=generator()
    )
    tables = Schedule.create(TINY)
    clean = batch.latents * tables.scale[t].reshape(2, 1, 1, 1, 1, 1)
    target = tables.v_target(clean, noise, t)[:, :, :, TINY.n_previous :]
    torch.testing.assert_close(loss, target.square().mean())


def test_weights_act_on_the_chunk_frames(model, batch):
    settings = {"options": PLAIN, "timesteps": torch.tensor([5, 5])}
    plain = training_loss(model, batch, generator=generator(), **settings)
    ones = torch.ones(1, 1, 1, TINY.chunk, 1, 1)
    for factor in (0.0, 1.0, 3.0):
        weighted = training_loss(
            model, batch, generator=generator(), weight=factor * ones, **settings
        )
        torch.testing.assert_close(weighted, factor * plain)


def test_gradients_reach_denoiser_and_resamplers_but_not_frozen_parts(model, batch):
    model.first_stage_model.requires_grad_(False)
    training_loss(model, batch, options=PLAIN, generator=generator()).backward()
    for name in ("model", "image_proj_model", "cond_stage_model", "embedder"):
        grads = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        assert any(g.abs().max() > 0 for g in grads), name
    assert all(p.grad is None for p in model.first_stage_model.parameters())
    model.zero_grad()


def test_every_part_of_the_conditioning_can_be_dropped():
    drop = condition_dropout(torch.tensor([0.02, 0.07, 0.12, 0.17, 0.22, 0.27, 0.32, 0.4]), 0.1)
    expected = {
        "actions": [1, 1, 1, 1, 0, 0, 0, 0],
        "image": [0, 0, 1, 1, 1, 1, 0, 0],
        "condition": [1, 0, 1, 0, 0, 1, 1, 0],
        "maps": [0, 1, 1, 0, 0, 0, 0, 0],
    }
    assert {name: mask.int().tolist() for name, mask in drop.items()} == expected


def test_nothing_is_dropped_when_p_is_zero():
    drop = condition_dropout(torch.tensor([0.0, 0.5]), 0.0)
    assert not any(mask.any() for mask in drop.values())


def test_history_noise_grows_towards_the_present():
    class Draw:
        def uniform(self, shape):
            return torch.tensor([[1.0, 0.0, 0.75]])

        def integers(self, low, high, shape):
            return torch.tensor([4])

        def normal(self, shape):
            return torch.ones(shape)

    schedule = Schedule.create(TINY)
    noisy = noise_history(torch.zeros(1, 1, 4, 3, 1, 1), 1000, schedule, Draw())
    times = torch.tensor([0, 73, 250])  # 250 (1 - cos a) for a = 0, pi/4, pi/2
    torch.testing.assert_close(noisy[0, 0, 0, :, 0, 0], schedule.noise[times])


def test_actions_change_the_loss_unless_dropped(model, batch):
    moved = dataclasses.replace(batch, deltas=batch.deltas + 1)
    settings = {"timesteps": torch.tensor([500, 500])}

    def difference(options):
        pair = (
            training_loss(model, b, generator=generator(), options=options, **settings)
            for b in (batch, moved)
        )
        return abs(next(pair) - next(pair)).item()

    assert difference(PLAIN) > 1e-6
    # p = 0.5 drops the actions of every sample: u < 2p always holds.
    assert difference(LossOptions(dropout=0.5, history_noise=False)) == 0


def test_parts_of_a_batch_draw_what_the_whole_would(model, batch):
    whole = training_loss(model, batch, generator=generator())
    parts = []
    for first in range(2):
        row = slice(first, first + 1)
        part = dataclasses.replace(
            batch,
            latents=batch.latents[row],
            map_latents=batch.map_latents[row],
            deltas=batch.deltas[row],
            images=batch.images[row],
        )
        parts.append(training_loss(model, part, generator=generator(), share=(first, 2)))
    assert abs(parts[0] - parts[1]) > 1e-4
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)
