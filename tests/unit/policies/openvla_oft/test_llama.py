import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evac_jax.evac.lean_imports import ensure_torchvision
from policies.openvla_oft import hf_keys
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

    @nnx.jit
    def states(llama):
        reads = (None, np.arange(4, 7), jnp.asarray([[1, 2], [5, 6]]))
        return [llama(x, mask, positions, read=read)[0] for read in reads]

    whole, same, rows = states(model.llama)
    np.testing.assert_allclose(same, whole[:, 4:7], atol=1e-6)
    np.testing.assert_allclose(rows[1], whole[1, 5:7], atol=1e-6)
