import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from policies.openvla_oft import lora, peft
from policies.openvla_oft.export_hf import create_policy_folder, export_policy
from policies.openvla_oft.import_hf import load_policy
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model, make_obs

SETTINGS = {"unnorm_key": "tiny", "max_prompt_length": 24, "chunk": 2, "num_images": 2}
RANK = {"lora_rank": 2, "lora_alpha": 6.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "base"
    model = make_model(value_type="none")
    return create_policy_folder(model, folder, tasks=TASKS, norm_stats=NORM_STATS)


def _load(folder, **more):
    return load_policy(folder, **SETTINGS, **more).model


def _logits(model):
    obs = make_obs()
    forward = model.forward(model.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask)
    return np.asarray(model.action_logits(forward.slots))


def _trained(folder):
    """A policy whose adapters have left zero."""
    model = _load(folder, **RANK)
    rng = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, lora.LoraParam):
            drawn = 0.2 * rng.standard_normal(parameter.shape)
            parameter.set_value(jnp.asarray(drawn, jnp.float32))
    return model


def test_fresh_adapters_change_nothing(base):
    np.testing.assert_array_equal(_logits(_load(base)), _logits(_load(base, **RANK)))


def test_policy_gives_the_same_logits_when_its_adapters_are_merged(base, tmp_path):
    model = _trained(base)
    before = _logits(model)
    assert np.abs(before - _logits(_load(base))).max() > 0.05
    merged = export_policy(model, tmp_path / "merged", source=base)
    np.testing.assert_allclose(_logits(_load(merged)), before, atol=2e-4)


def test_adapter_goes_on_bit_equal_when_saved_and_loaded(base, tmp_path):
    model = _trained(base)
    folder = peft.save_adapter(model, tmp_path / "adapter", base=base)
    again = _load(base, **RANK, lora_adapter=folder)
    for one, other in zip(
        jax.tree.leaves(nnx.state(model, lora.LoraParam)),
        jax.tree.leaves(nnx.state(again, lora.LoraParam)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    # Without adapters of its own the policy has the pairs merged instead.
    np.testing.assert_allclose(_logits(_load(base, lora_adapter=folder)), _logits(model), atol=2e-4)


def test_saved_adapter_is_laid_out_as_peft_has_it(base, tmp_path):
    folder = peft.save_adapter(_trained(base), tmp_path / "adapter", base=base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    tensors = load_file(folder / "adapter_model.safetensors")
    down = "base_model.model.language_model.model.layers.1.mlp.down_proj"
    assert tensors[f"{down}.lora_A.weight"].shape == (2, CONFIG.intermediate_size)
    assert tensors[f"{down}.lora_B.weight"].shape == (CONFIG.hidden_size, 2)
    patch = "base_model.model.vision_backbone.featurizer.patch_embed.proj"
    size = CONFIG.patch_size
    assert tensors[f"{patch}.lora_A.weight"].shape == (2, 3, size, size)
    assert tensors[f"{patch}.lora_B.weight"].shape == (CONFIG.dinov2.width, 2, 1, 1)


def test_only_adapters_and_value_head_are_parameters_and_change_in_a_step(base):
    model = _load(base, **RANK, value_type="action_level")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert names
    assert all("lora" in name or name.startswith("value_head") for name in names)
    obs = make_obs()

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        forward = model.forward(model.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask)
        return model.action_logits(forward.slots)[..., 0].sum()

    gradient = jax.grad(loss)(params)
    optimizer = optax.adam(1e-2)
    updates, _ = optimizer.update(gradient, optimizer.init(params))
    after = nnx.merge(graphdef, optax.apply_updates(params, updates), rest)
    assert np.abs(_logits(after) - _logits(model)).max() > 1e-3
    frozen = [jax.tree.leaves(nnx.state(m, lora.FrozenParam)) for m in (model, after)]
    assert frozen[0]
    for one, other in zip(*frozen, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4, "lora_alpha": 6.0}, "lora_rank is 4, the adapter's rank 2"),
        ({"lora_rank": 2, "lora_alpha": 2.0}, "set lora_alpha to 6"),
        (RANK | {"lora_targets": ("q_proj",)}, "modules of the adapter that the policy does not"),
    ],
)
def test_adapter_of_other_settings_is_refused_with_what_differs(base, tmp_path, changes, message):
    folder = peft.save_adapter(_trained(base), tmp_path / "adapter", base=base)
    with pytest.raises(ValueError, match=message):
        _load(base, **changes, lora_adapter=folder)


def test_adapter_for_another_base_is_refused(base, tmp_path):
    wider = make_model(value_type="none", intermediate_size=48)
    other = create_policy_folder(wider, tmp_path / "other", tasks=TASKS, norm_stats=NORM_STATS)
    folder = peft.save_adapter(_trained(other), tmp_path / "adapter", base=other)
    with pytest.raises(ValueError, match="training cannot go on from this adapter"):
        _load(base, **RANK, lora_adapter=folder)
    with pytest.raises(ValueError, match="do not fit"):
        _load(base, lora_adapter=folder)


def test_policy_without_adapters_saves_none(base, tmp_path):
    with pytest.raises(ValueError, match="lora_rank is 0"):
        peft.save_adapter(_load(base), tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="lora_targets"):
        dataclasses.replace(CONFIG, lora_rank=2, lora_targets=("q_projection",))
