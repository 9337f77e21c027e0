import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from policies.openvla_oft import lora, peft
from policies.openvla_oft.export_hf import create_policy_folder, export_policy
from policies.openvla_oft.import_hf import load_config, load_policy
from policies.openvla_oft.model import OpenVLAOFT
from tests.unit.full_disk import full_disk
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model, make_obs

GOLDENS = Path(__file__).parents[3] / "goldens" / "openvla_oft"
SETTINGS = {"unnorm_key": "tiny", "max_prompt_length": 24, "chunk": 2, "num_images": 2}
RANK = {"lora_rank": 2, "lora_alpha": 6.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "base"
    model = make_model(value_type="none")
    return create_policy_folder(model, folder, tasks=TASKS, norm_stats=NORM_STATS)


def _load(folder, **more):
    return load_policy(folder, **SETTINGS, **more).model


def _forward(model, obs):
    forward = model.forward(model.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask)
    return model.action_logits(forward.slots)


_compiled_forward = nnx.jit(_forward)


def _logits(model):
    return np.asarray(_compiled_forward(model, make_obs()))


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
    np.testing.assert_allclose(_logits(_load(merged)), before, rtol=1e-5, atol=1e-5)


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
    np.testing.assert_allclose(
        _logits(_load(base, lora_adapter=folder)), _logits(model), rtol=1e-5, atol=1e-5
    )


def test_saved_adapter_is_laid_out_as_peft_has_it(tmp_path):
    # Names, shapes and settings of the golden adapter, which PEFT saved.
    layout = json.loads((GOLDENS / "lora_layout.json").read_text())
    golden = layout["config"]
    config = load_config(
        GOLDENS / "checkpoint", lora_rank=golden["r"], lora_alpha=float(golden["lora_alpha"])
    )
    folder = peft.save_adapter(OpenVLAOFT(config, rngs=None), tmp_path / "adapter", base="base")
    saved = load_file(folder / "adapter_model.safetensors")
    expected = {name: tuple(shape) for name, shape in layout["tensors"].items()}
    # PEFT saves the head's own weight along; a checkpoint holds it anyway.
    head = {name for name in expected if name.endswith(peft.BASE_LAYER)}
    assert len(head) == 1
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: shape for name, shape in expected.items() if name not in head
    }
    told = json.loads((folder / "adapter_config.json").read_text())
    assert set(told.pop("target_modules")) == set(golden["target_modules"])
    assert told.pop("base_model_name_or_path") == "base"
    assert told == {name: golden[name] for name in told}


def test_only_adapters_and_value_head_are_parameters_and_change_in_a_step(base):
    # No adapters in the towers: their gradients take long to compile.
    targets = ("q_proj", "down_proj", "lm_head")
    model = _load(base, **RANK, value_type="action_level", lora_targets=targets)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert names
    assert all("lora" in name or name.startswith("value_head") for name in names)
    obs = make_obs()

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return _forward(nnx.merge(graphdef, params, rest), obs)[..., 0].sum()

    gradient = gradient_of(params)
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
    with pytest.raises(ValueError, match="LoRA pairs that do not fit"):
        _load(base, lora_adapter=folder)


def test_full_disk_is_told_and_leaves_no_adapter(base, tmp_path):
    model = _trained(base)
    with pytest.raises(OSError, match=f"File too large: '{tmp_path}/adapter'"), full_disk(2_000):
        peft.save_adapter(model, tmp_path / "adapter", base=base)
    assert not list(tmp_path.iterdir())


def test_policy_without_adapters_saves_none(base, tmp_path):
    with pytest.raises(ValueError, match="lora_rank is 0"):
        peft.save_adapter(_load(base), tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="lora_targets"):
        dataclasses.replace(CONFIG, lora_rank=2, lora_targets=("q_projection",))
