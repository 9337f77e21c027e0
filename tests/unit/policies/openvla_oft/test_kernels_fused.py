"""cuDNN's attention gets what it accepts, and the policy gets the same numbers."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from policies.activations import activations_at
from policies.openvla_oft import kernels, layers, llama
from policies.openvla_oft.config import VisionTowerConfig
from policies.openvla_oft.import_hf import abstract_model
from policies.openvla_oft.kernels import attend_fused
from policies.openvla_oft.layers import is_fused
from tests.unit.policies.tiny import CONFIG, make_model, make_obs

HALF = dataclasses.replace(CONFIG, compute_dtype="bfloat16", siglip=VisionTowerConfig(16, 3, 2, 20))


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (6, 7), (7, 7), (4, 8)])
@pytest.mark.parametrize("counted", [False, True])
def test_lengths_that_jax_refuses_are_padded_and_change_no_number(queries, keys, counted):
    random = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8)]
    parts = [jax.random.normal(key, shape) for key, shape in zip(random, shapes, strict=True)]
    seen = jnp.asarray([keys, 4], jnp.int32) if counted else None
    mask = (jnp.arange(keys) < seen[:, None])[:, None, None] if counted else None
    fused = partial(attend_fused, seen=seen, implementation="xla")
    plain = partial(jax.nn.dot_product_attention, mask=mask)
    np.testing.assert_allclose(fused(*parts), plain(*parts), atol=1e-6)
    ours, golden = (
        jax.grad(lambda *qkv, f=f: jnp.sum(f(*qkv) ** 2), argnums=(0, 1, 2))(*parts)
        for f in (fused, plain)
    )
    for mine, own in zip(ours, golden, strict=True):
        np.testing.assert_allclose(mine, own, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"scan_layers": False}, {"keep_stop_token": True}])
def test_policy_has_the_same_outputs_when_its_attention_is_fused(changes, monkeypatch):
    model, obs = make_model(**changes), make_obs()
    pixels = model.pixel_values(obs.images)

    def forward(collect):
        found = model.forward(pixels, obs.prompt_tokens, obs.prompt_mask, collect=collect)
        return found.slots, found.stages

    golden, stages = forward(False)[0], forward(True)[1]
    for module in (layers, llama):
        monkeypatch.setattr(module, "is_fused", lambda config, width: True)
    monkeypatch.setattr(kernels, "attend_fused", partial(attend_fused, implementation="xla"))
    np.testing.assert_allclose(forward(False)[0], golden, atol=1e-5)
    slots, found = forward(True)
    np.testing.assert_allclose(slots, golden, atol=1e-5)
    valid = np.asarray(stages["mm_attention_mask"])
    for name in ("hidden_states", "last_hidden_states"):  # those of pads mean nothing
        np.testing.assert_allclose(
            found[name][..., valid, :], stages[name][..., valid, :], atol=1e-5
        )


@pytest.mark.parametrize("what", ["sample", "update", "update of copies"])
def test_program_for_a_gpu_holds_cudnns_kernel_and_no_scores(what, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)  # the library is not here
    obs = make_obs()

    def program(attention):
        config = dataclasses.replace(HALF, attention=attention, remat="full")
        graphdef, params, rest = nnx.split(abstract_model(config), nnx.Param, ...)

        def slots(params, obs):
            model = nnx.merge(graphdef, params, rest)
            pixels = model.pixel_values(obs.images)
            return model.forward(pixels, obs.prompt_tokens, obs.prompt_mask).slots

        function, rows = slots, obs
        if what != "sample":
            function = jax.grad(lambda params, obs: jnp.sum(slots(params, obs)))
        if what == "update of copies":
            function = jax.vmap(function, (None, 0))
            rows = jax.tree.map(lambda x: x[None], obs)
        traced = jax.jit(function).trace(params, rows)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def scores(text):  # of the DINOv2, with its prefix, and of the Llama
        return {length for length in (7, 26) if f"x{length}x{length}xf32" in text}

    assert scores(program("xla")) == {7, 26}
    fused = program("cudnn")
    assert not scores(fused)
    assert "__cudnn$fmhaSoftmax" in fused
    assert ("__cudnn$fmhaSoftmaxBackward" in fused) == (what != "sample")


@pytest.mark.parametrize(
    ("attention", "dtype", "head", "platform", "fused"),
    [
        ("auto", "bfloat16", 128, "gpu", True),
        ("auto", "bfloat16", 72, "gpu", True),
        ("auto", "float32", 128, "gpu", False),
        ("auto", "bfloat16", 12, "gpu", False),
        ("auto", "bfloat16", 256, "gpu", False),
        ("auto", "bfloat16", 128, "tpu", False),
        ("auto", "bfloat16", 128, "cpu", False),
        ("xla", "bfloat16", 128, "gpu", False),
        ("cudnn", "bfloat16", 128, "gpu", True),
    ],
)
def test_platform_of_the_mesh_decides(attention, dtype, head, platform, fused):
    config = dataclasses.replace(HALF, attention=attention, compute_dtype=dtype)
    with activations_at(SimpleNamespace(device_set=[SimpleNamespace(platform=platform)])):
        assert is_fused(config, head) == fused
    if attention == "auto":
        assert not is_fused(config, head)  # no mesh


def test_cudnn_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="'cudnn' needs bfloat16 and heads of 8, 16"):
        dataclasses.replace(CONFIG, attention="cudnn")
    mesh = SimpleNamespace(device_set=[SimpleNamespace(platform="cpu")])
    with (
        activations_at(mesh),
        pytest.raises(ValueError, match=r"policy\.attention: 'cudnn' needs NVIDIA GPUs"),
    ):
        is_fused(dataclasses.replace(HALF, attention="cudnn"), 8)
