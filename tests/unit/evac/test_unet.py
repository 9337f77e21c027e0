import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evac_jax.evac import attention
from evac_jax.evac.config import UNetConfig
from evac_jax.evac.unet import CausalConv, UNet, sinusoidal_embedding

CONFIG = UNetConfig(
    in_channels=5,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 1),
    num_head_channels=4,
    init_heads=2,
    context_dim=6,
    action_tokens=2,
    num_domains=3,
    norm_groups=4,
)
IMAGE_TOKENS, FRAMES, HISTORY = 3, 4, 2


def make_unet(config: UNetConfig = CONFIG) -> UNet:
    """A UNet whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return unet


def make_inputs(batch: int, views: int = 1) -> dict:
    generator = torch.Generator().manual_seed(1)
    rows = batch * views
    tokens = IMAGE_TOKENS + CONFIG.action_tokens
    return {
        "x": torch.randn(rows, CONFIG.in_channels, FRAMES, 4, 4, generator=generator),
        "timesteps": torch.arange(batch).repeat_interleave(views) * 300 + 50,
        "context": torch.randn(rows, tokens, CONFIG.context_dim, generator=generator),
        "fps": torch.full((rows,), 2),
        "domain_id": torch.arange(batch).repeat_interleave(views) % CONFIG.num_domains,
    }


@torch.no_grad()
def run(unet: UNet, inputs: dict, views: int = 1) -> torch.Tensor:
    return unet(**inputs, n_history=HISTORY, n_view=views)


def test_output_is_zero_when_freshly_initialised():
    torch.manual_seed(0)
    assert not run(UNet(CONFIG), make_inputs(1)).any()


def test_output_is_the_same_when_context_is_prepared():
    unet, inputs = make_unet(), make_inputs(2)
    expected = run(unet, inputs)
    inputs["context"] = unet.prepare_context(inputs["context"])
    torch.testing.assert_close(run(unet, inputs), expected)


@pytest.mark.parametrize("views", [1, 2])
def test_environments_do_not_see_each_other_when_batched(views):
    unet, inputs = make_unet(), make_inputs(2, views)
    together = run(unet, inputs, views)
    for b in range(2):
        alone = {key: value[b * views : (b + 1) * views] for key, value in inputs.items()}
        expected = run(unet, alone, views)
        torch.testing.assert_close(
            together[b * views : (b + 1) * views], expected, atol=1e-4, rtol=1e-4
        )


def test_views_swap_in_the_output_when_swapped_in_the_input():
    unet, inputs = make_unet(), make_inputs(1, views=2)
    inputs["context"][1, IMAGE_TOKENS:] = inputs["context"][0, IMAGE_TOKENS:]
    swapped = {key: value.flip(0) for key, value in inputs.items()}
    expected = run(unet, inputs, 2).flip(0)
    torch.testing.assert_close(run(unet, swapped, 2), expected, atol=1e-4, rtol=1e-4)


def test_second_view_reaches_the_first_when_its_image_tokens_change():
    unet, inputs = make_unet(), make_inputs(1, views=2)
    before = run(unet, inputs, 2)
    inputs["context"][1, IMAGE_TOKENS:] += 1  # action tokens of view 1: nobody reads them
    torch.testing.assert_close(run(unet, inputs, 2), before)
    inputs["context"][1, :IMAGE_TOKENS] += 1
    assert not torch.allclose(run(unet, inputs, 2)[0], before[0], atol=1e-3)


@torch.no_grad()
def test_transformers_see_one_tall_picture_when_there_are_two_views():
    unet = make_unet()
    x = torch.randn(2, FRAMES, 2, 3, 4, CONFIG.model_channels)
    tall = x.flatten(2, 3).unsqueeze(2)  # views joined along the height
    _, spatial, temporal = unet.input_blocks[1]
    keys_values = spatial.keys_values(torch.randn(2, 3, CONFIG.context_dim))
    for layer, arguments in ((spatial, (keys_values,)), (temporal, ())):
        expected = layer(tall, *arguments).view(x.shape)
        torch.testing.assert_close(layer(x, *arguments), expected)


@torch.no_grad()
def test_residual_blocks_keep_views_apart_when_there_are_two():
    unet = make_unet()
    block = unet.input_blocks[1][0]
    embedding = unet.embed(torch.tensor([5]), torch.tensor([2]), None, HISTORY, FRAMES, 1)
    x = torch.randn(2, FRAMES, 2, 3, 4, CONFIG.model_channels)
    apart = [block(x[:, :, v : v + 1], embedding) for v in range(2)]
    torch.testing.assert_close(block(x, embedding), torch.cat(apart, 2), atol=1e-5, rtol=1e-5)


def test_one_row_stands_for_all_when_conditions_are_shared():
    unet, inputs = make_unet(), make_inputs(2)
    inputs |= {"timesteps": torch.tensor([70, 70]), "domain_id": torch.tensor([1, 1])}
    expected = run(unet, inputs)
    for key in ("timesteps", "fps", "domain_id"):
        inputs[key] = inputs[key][:1]
    torch.testing.assert_close(run(unet, inputs), expected)


def test_history_frames_keep_time_zero_when_the_time_changes():
    unet = make_unet()
    arguments = torch.tensor([2]), torch.tensor([0]), HISTORY, FRAMES, 1
    early, late = (unet.embed(torch.tensor([t]), *arguments) for t in (0, 900))
    torch.testing.assert_close(early.rows[..., 0, :], late.rows[..., 0, :])
    torch.testing.assert_close(early.rows[..., 0, :], early.rows[..., 1, :])
    assert not torch.allclose(late.rows[..., 0, :], late.rows[..., 1, :])
    assert late.kind.tolist() == [0, 0, 1, 1]


def test_fps_is_truncated_when_it_has_a_fraction():
    unet, inputs = make_unet(), make_inputs(1)
    expected = run(unet, inputs)
    inputs["fps"] = torch.tensor([2.9])
    torch.testing.assert_close(run(unet, inputs), expected)


def test_every_read_weight_gets_a_gradient_when_trained():
    unet, inputs = make_unet(), make_inputs(1)
    unet(**inputs, n_history=HISTORY).square().mean().backward()
    without = {name for name, p in unet.named_parameters() if p.grad is None}
    kinds = [block.kind for block in unet.spatial_transformers()]
    assert kinds == ["tp", "ip", "tp", "ip", "tp", "ip", "tp"]  # 2 down, 1 middle, 4 up
    # Per spatial transformer: the text pair, and the pair of the tokens it does not read.
    assert len(without) == 4 * len(kinds)
    assert all(".attn2.to_" in name for name in without)


def test_gradients_are_the_same_when_checkpointed():
    gradients = []
    for config in (CONFIG, CONFIG.replace(gradient_checkpointing=True)):
        unet = make_unet(config)
        unet(**make_inputs(1), n_history=HISTORY).square().mean().backward()
        gradients.append([p.grad for p in unet.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_dropout_acts_when_training_only():
    unet, inputs = make_unet(CONFIG.replace(dropout=0.5)), make_inputs(1)
    torch.testing.assert_close(run(unet, inputs), run(unet, inputs))
    unet.train()
    assert not torch.allclose(run(unet, inputs), run(unet, inputs))


def test_causal_conv_equals_a_3d_convolution_when_the_first_frame_is_repeated():
    torch.manual_seed(0)
    conv, x = CausalConv(4), torch.randn(2, 5, 1, 3, 2, 4)
    frames = x.squeeze(2).permute(0, 4, 1, 2, 3)  # [B C T H W]
    padded = torch.cat((frames[:, :, :1], frames[:, :, :1], frames), 2)
    expected = F.conv3d(padded, conv.weight, conv.bias).permute(0, 2, 3, 4, 1).unsqueeze(2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # a CPU's way, and a GPU's
def test_norm_is_the_library_s_when_features_are_channel_last(dtype):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6, dtype=dtype)
    x = torch.randn(3, 4, 5, 2, 6, dtype=dtype) * 3 + 10
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = norm(x.movedim(-1, 1)).movedim(1, -1)
    found = attention.group_norm(x, norm)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_feed_forward_is_the_same_when_cut_into_cached_parts(monkeypatch):
    torch.manual_seed(0)
    layer, x = attention.FeedForward(4), torch.randn(3, 7, 4)
    expected = layer(x)
    monkeypatch.setattr(attention, "CACHED_VALUES", 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_sinusoidal_embedding_starts_with_cosine_when_value_is_zero():
    assert sinusoidal_embedding(torch.tensor([0]), 6).tolist() == [[1, 1, 1, 0, 0, 0]]
