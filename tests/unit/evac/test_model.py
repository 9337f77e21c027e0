import pytest
import torch

from evac_jax.evac.model import Camera, EvacModel, history_places
from tests.unit.evac.tiny import TINY, camera, poses, start_frames, tiny_model

SETTINGS = {"steps": 2, "eta": 0.0}
WINDOW = TINY.frames
SHAPE = (1, 4, TINY.chunk, 8, 8)  # V, channels, chunk, h, w


@pytest.fixture(scope="module")
def model() -> EvacModel:
    return tiny_model()


def noise(batch: int, seed: int = 0, n_view: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n_view, *SHAPE[1:], generator=generator)


def play(model, state, chunks, batch, **settings):
    frames = []
    for k in range(chunks):
        window = poses(batch, WINDOW + chunks)[:, k : k + WINDOW]
        state, new = model.imagine(
            state, window, camera(), noise=noise(batch, k), **(SETTINGS | settings)
        )
        frames.append(new)
    return state, frames


def test_children_carry_the_checkpoint_prefixes(model):
    prefixes = {key.split(".")[0] for key in model.state_dict()}
    assert prefixes == {
        "model",
        "first_stage_model",
        "cond_stage_model",
        "image_proj_model",
        "embedder",
    }
    assert any(key.startswith("model.diffusion_model.") for key in model.state_dict())


def test_history_places_spread_over_the_past_and_end_with_the_last():
    assert history_places(torch.tensor([12, 20, 0]), 4).tolist() == [
        [0, 4, 8, 11],
        [0, 6, 13, 19],
        [0, 0, 0, 0],
    ]


def test_first_chunk_reads_only_the_start_frame(model):
    state = model.start(start_frames(2), 2)
    given = model.condition(state, poses(2, WINDOW), camera())
    latent = model.encode(start_frames(2))
    expected = latent[:, :, :, None].expand_as(given.history)
    torch.testing.assert_close(given.history, expected)
    tokens = model.image_tokens(start_frames(2))
    torch.testing.assert_close(given.context[:, :, : TINY.image_tokens], tokens)


def test_later_chunks_use_reconstructed_start_and_stored_frames(model):
    state, _ = play(model, model.start(start_frames(2), 3), 2, 2)
    assert state.length.tolist() == [9, 9]
    given = model.condition(state, poses(2, WINDOW), camera())
    expected = state.latents[:, [0, 4, 8]].permute(0, 2, 3, 1, 4, 5)
    assert torch.equal(given.history, expected)
    again = model.decode(model.encode(start_frames(2))).clamp(-1, 1)
    torch.testing.assert_close(given.context[:, :, : TINY.image_tokens], model.image_tokens(again))


def test_imagined_frames_have_the_stated_shape_and_match_the_store(model):
    state, (frames,) = play(model, model.start(start_frames(2), 1), 1, 2)
    assert frames.shape == (2, 1, TINY.chunk, 3, 32, 32)
    stored = state.latents[:, TINY.n_previous :].transpose(1, 2)
    torch.testing.assert_close(frames, model.decode(stored), atol=1e-5, rtol=1e-4)


def test_environments_do_not_influence_each_other(model):
    state, frames = play(model, model.start(start_frames(3), 2), 2, 3)
    alone = model.start(start_frames(3)[1:2], 2)
    for k in range(2):
        window = poses(3, WINDOW + 2)[1:2, k : k + WINDOW]
        alone, new = model.imagine(alone, window, camera(), noise=noise(3, k)[1:2], **SETTINGS)
        torch.testing.assert_close(new, frames[k][1:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.latents, state.latents[1:2], atol=1e-4, rtol=1e-4)


def test_restart_begins_again_only_where_masked(model):
    state, frames = play(model, model.start(start_frames(2), 3), 1, 2)
    before = state.latents[1].clone()
    state = model.restart(state, start_frames(2), torch.tensor([True, False]))
    assert state.length.tolist() == [0, 6]
    assert torch.equal(state.latents[1], before)
    window = poses(2, WINDOW + 1)[:, :WINDOW]
    state, again = model.imagine(state, window, camera(), noise=noise(2), **SETTINGS)
    torch.testing.assert_close(again[0], frames[0][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(again[1], frames[0][1], atol=1e-2)
    assert state.length.tolist() == [6, 9]


def test_rows_imagine_a_part_of_the_batch(model):
    whole, frames = play(model, model.start(start_frames(3), 1), 1, 3)
    state = model.start(start_frames(3), 1)
    rows = torch.tensor([2, 0])
    window = poses(3, WINDOW + 1)[rows, :WINDOW]
    state, part = model.imagine(
        state, window, camera(), noise=noise(3)[rows], rows=rows, **SETTINGS
    )
    assert state.length.tolist() == [6, 0, 6]
    torch.testing.assert_close(part, frames[0][rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.latents[2], whole.latents[2], atol=1e-4, rtol=1e-4)


def test_moving_camera_is_remembered_along_the_history(model):
    moving = camera().c2w[:, :, None].repeat(1, 1, WINDOW, 1, 1)
    moving[..., 0, 3] = torch.arange(WINDOW) * 0.01
    state = model.start(start_frames(1), 2)
    view = Camera(camera().intrinsic, moving)
    state, _ = model.imagine(state, poses(1, WINDOW), view, noise=noise(1), **SETTINGS)
    given = model.condition(state, poses(1, WINDOW), view)
    origins = given.concat[0, 0, 12, :, 0, 0]  # x of the ray origins
    expected = torch.tensor([0.0, 0.03, 0.05, 0.03, 0.04, 0.05])
    torch.testing.assert_close(origins, expected)


def test_generator_makes_a_chunk_repeatable_and_eta_needs_it(model):
    def run(seed, eta):
        generator = torch.Generator().manual_seed(seed)
        state = model.start(start_frames(1), 1)
        return model.imagine(
            state, poses(1, WINDOW), camera(), steps=2, eta=eta, generator=generator
        )[1]

    for eta in (0.0, 1.0):
        assert torch.equal(run(0, eta), run(0, eta))
        assert not torch.equal(run(0, eta), run(1, eta))


def test_guidance_uses_a_blank_image_and_no_image_condition(model):
    state = model.start(start_frames(2), 1)
    given = model.condition(state, poses(2, WINDOW), camera())
    other = model.unconditional(given)
    blank = model.image_tokens(torch.zeros(1, 1, 3, 32, 32))
    count, past = TINY.image_tokens, TINY.n_previous
    torch.testing.assert_close(other.context[1:, :, :count], blank)
    assert torch.equal(other.context[:, :, count:], given.context[:, :, count:])
    assert (other.concat[:, :, :5, past:] == 0).all()
    assert torch.equal(other.concat[:, :, 5:], given.concat[:, :, 5:])
    assert torch.equal(other.concat[:, :, :, :past], given.concat[:, :, :, :past])
    _, guided = model.imagine(
        state, poses(2, WINDOW), camera(), noise=noise(2), guidance=4.0, **SETTINGS
    )
    assert torch.isfinite(guided).all()


def test_several_views_see_each_other_and_keep_their_own_pictures():
    model = tiny_model(n_view=2)
    state = model.start(start_frames(2, 2), 2)
    for k in range(2):
        state, frames = model.imagine(
            state, poses(2, WINDOW), camera(2), noise=noise(2, k, 2), **SETTINGS
        )
    assert frames.shape == (2, 2, TINY.chunk, 3, 32, 32)
    assert not torch.allclose(frames[:, 0], frames[:, 1])


def test_imagining_beyond_the_capacity_is_refused(model):
    state, _ = play(model, model.start(start_frames(1), 1), 1, 1)
    with pytest.raises(ValueError, match="capacity_chunks"):
        model.imagine(state, poses(1, WINDOW), camera(), noise=noise(1), **SETTINGS)
