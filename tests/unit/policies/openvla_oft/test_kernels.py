"""Kernels compute what JAX's own functions do, and each platform gets its own way of them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from policies.activations import activations_at
from policies.openvla_oft.kernels import (
    attend,
    attend_on_cpu,
    by_platform,
    embed,
    gelu,
    matmul,
    swiglu,
)


@pytest.mark.parametrize(("kv_heads", "first_hidden"), [(2, 4), (4, 4), (4, 0)])
def test_attention_on_a_cpu_is_that_of_jax(kv_heads, first_hidden):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8)]
    parts = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    mask = jnp.ones((2, 1, 1, 7), bool).at[1, ..., first_hidden:].set(False)
    golden = jax.nn.dot_product_attention(*parts, mask=mask)
    np.testing.assert_allclose(attend_on_cpu(*parts, mask), golden, atol=1e-6)
    ours, theirs = (
        jax.grad(lambda *qkv, f=f: jnp.sum(f(*qkv) ** 2), argnums=(0, 1, 2))(*parts)
        for f in (
            lambda *qkv: attend_on_cpu(*qkv, mask),
            lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask),
        )
    )
    for mine, golden in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, golden, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("activation", "plain", "inputs"),
    [
        (gelu, lambda x: jax.nn.gelu(x, approximate=False), 1),
        (swiglu, lambda gate, up: jax.nn.silu(gate) * up, 2),
    ],
)
def test_activations_and_their_gradients_are_jaxs_own(activation, plain, inputs, dtype):
    rng = np.random.default_rng(0)
    values = [jnp.asarray(3 * rng.normal(size=(64, 8)), dtype) for _ in range(inputs)]
    values[0] = values[0].at[0, 0].set(-100).at[0, 1].set(100)  # nothing overflows
    weight = rng.normal(size=(64, 8)).astype(np.float32)

    def loss(function, *values):
        return jnp.sum(weight * function(*values).astype(jnp.float32))

    every = tuple(range(1, 1 + inputs))
    found = (activation(*values), *jax.grad(loss, argnums=every)(activation, *values))
    wide = [value.astype(jnp.float32) for value in values]
    exact = (plain(*wide), *jax.grad(loss, argnums=every)(plain, *wide))
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    for mine, own in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), own, **rounding)


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("float32", "bfloat16")])
def test_embedding_is_exact_and_has_the_same_gradient_on_every_platform(stored, dtype):
    table = jax.random.normal(jax.random.key(0), (32, 8), stored)
    tokens = jnp.asarray([[0, 31, 5], [5, 5, 7]])
    devices = [SimpleNamespace(platform=platform) for platform in ("cpu", "gpu")]
    found = []
    for device in devices:
        with activations_at(SimpleNamespace(device_set=[device])):
            rows, back = jax.vjp(lambda table: embed(table, tokens, jnp.dtype(dtype)), table)
        found.append((rows, *back(jnp.ones_like(rows))))
    assert found[0][0].dtype == dtype
    np.testing.assert_array_equal(found[0][0], table[tokens].astype(dtype))
    for mine, other in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, other)


def sum_of(kernel):
    return lambda *args: jnp.sum(kernel(*args))


# Operation, shapes, and what only the program for a CPU holds, and only the one for others.
WAYS = [
    (matmul, [(2, 3, 4), (4, 5)], "tensor<6x4xf32>", "contracting_dims = [2] x [0]"),
    (jax.grad(sum_of(gelu)), [(8,)], "dense<-0.707", "dense<0.707"),
    (jax.grad(sum_of(swiglu)), [(8,), (8,)], "stablehlo.minimum", "stablehlo.negate"),
    (attend, [(2, 5, 4, 8)] * 3, "stablehlo.while", "tensor<2x4x5x1x5xf32>"),
]


def program(function, shapes, platform: str) -> str:
    """Lower `function` for a platform that need not be here."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("kernel", "shapes", "on_cpu", "elsewhere"), WAYS, ids=["matmul", "gelu", "swiglu", "attend"]
)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_program_holds_the_way_of_the_platform_it_is_lowered_for(
    kernel, shapes, on_cpu, elsewhere, platform
):
    text = program(kernel, shapes, platform)
    assert (on_cpu in text, elsewhere in text) == (platform == "cpu", platform != "cpu")


def test_way_is_that_of_the_platform_when_a_gradient_of_a_mapped_loop_is_lowered():
    def loss(x, layers):
        def step(x, kernel):
            heads = jax.vmap(matmul, (0, None))(x, kernel).reshape(2, 3, 1, 4)
            return attend(heads, heads, heads).reshape(x.shape), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, layers)[0])

    shapes = [(2, 3, 4), (5, 4, 4)]
    loops = [program(jax.grad(loss), shapes, p).count("stablehlo.while") for p in ("cuda", "cpu")]
    assert loops == [2, 5]  # layers to and fro; on a CPU their heads to, again, and fro
    rng = np.random.default_rng(0)
    args = [jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    found = jax.jit(jax.grad(loss))(*args)
    with activations_at(SingleDeviceSharding(jax.devices("cpu")[0])):
        golden = jax.jit(jax.grad(loss))(*args)
    np.testing.assert_allclose(found, golden, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_named_mesh_decides_and_nothing_else_is_traced(platform):
    traced = []
    mesh = SimpleNamespace(device_set=[SimpleNamespace(platform=platform)])

    def way(name):
        return lambda x: traced.append(name) or x + 1

    with activations_at(mesh):
        found = jax.jit(lambda x: by_platform(x, cpu=way("cpu"), default=way("default")))(1.0)
    assert found == 2
    assert traced == (["cpu"] if platform == "cpu" else ["default"])
