import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evac_jax.evac.lean_imports import ensure_torchvision
from policies.openvla_oft import hf_keys
from policies.openvla_oft.cpu_attention import attend_on_cpu
from policies.openvla_oft.layers import gelu, swiglu
from tests.unit.policies.tiny import CONFIG, make_model

torch = pytest.importorskip("torch")
ensure_torchvision()  # transformers imports it, and its build may not fit torch's
transformers = pytest.importorskip("transformers")


def test_hidden_states_equal_those_of_transformers_when_the_mask_is_bidirectional():
    model = make_model(num_kv_heads=2)
    config = model.config
    reference = transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    weights = {}
    for path, variable in hf_keys.parameters(nnx.state(model)):
        source = hf_keys.source_of(path, config)
        for index, key in enumerate(source.keys):
            array = np.asarray(variable[...])
            tensor = source.to_hf(array[index] if source.stacked else array)
            weights[key] = torch.from_numpy(tensor.copy())
    prefix = "language_model.model."
    reference.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, config.hidden_size)).astype(np.float32)
    mask = np.ones((2, 9), bool)
    mask[1, 3:6] = False
    positions = np.cumsum(mask, 1) - 1
    hidden, _ = model.llama(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(positions))
    additive = np.where(mask[:, None, None, :], 0.0, np.finfo(np.float32).min)
    additive = np.broadcast_to(additive, (2, 1, 9, 9)).astype(np.float32)
    with torch.no_grad():
        golden = reference(
            inputs_embeds=torch.from_numpy(x),
            attention_mask=torch.from_numpy(additive.copy()),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        ).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden, golden, atol=2e-5)
    assert dataclasses.replace(CONFIG, num_kv_heads=2) == config


@pytest.mark.parametrize("remat", ["none", "full"])
def test_columns_that_are_read_are_those_of_the_whole_sequence(remat):
    model = make_model(scan_layers=False, remat=remat)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, model.config.hidden_size)), jnp.float32)
    mask = jnp.ones((2, 9), bool).at[1, 3:6].set(False)
    positions = jnp.cumsum(mask, 1) - 1
    whole, _ = model.llama(x, mask, positions)
    same, _ = model.llama(x, mask, positions, read=np.arange(4, 7))
    np.testing.assert_allclose(same, whole[:, 4:7], atol=1e-6)
    per_row = jnp.asarray([[1, 2], [5, 6]])
    rows, _ = model.llama(x, mask, positions, read=per_row)
    np.testing.assert_allclose(rows[1], whole[1, 5:7], atol=1e-6)


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
def test_merged_projections_give_the_same_states_and_gradients(adapters):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, CONFIG.hidden_size)), jnp.float32)
    mask, positions = jnp.ones((2, 9), bool), jnp.tile(jnp.arange(9), (2, 1))
    found = []
    for merge in (False, True):
        model = make_model(scan_layers=False, num_kv_heads=2, merge_projections=merge, **adapters)
        graphdef, params, rest = nnx.split(model.llama, nnx.Param, ...)
        # Fresh adapters add nothing; shifted by the same amount everywhere, these do.
        params = jax.tree.map(lambda leaf: leaf + 0.01, params)

        def loss(params, graphdef=graphdef, rest=rest):
            llama = nnx.merge(graphdef, params, rest)
            states, _ = llama(x, mask, positions, read=np.arange(4, 7))
            return jnp.sum(states**3), states

        found.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    (gradients, states), (merged_gradients, merged_states) = found
    np.testing.assert_allclose(merged_states, states, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-12),
        merged_gradients,
        gradients,
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
