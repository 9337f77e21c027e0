import json
from pathlib import Path

import pytest

from policies.openvla_oft.config import OpenVLAOFTConfig

GOLDENS = Path(__file__).parents[3] / "goldens" / "openvla_oft"
CONFIG = {"model_type": "openvla"}
PREPROCESSOR = json.loads((GOLDENS / "checkpoint" / "preprocessor_config.json").read_text())
SMALL = CONFIG | {"image_sizes": [56, 56]}


def read(**text):
    return OpenVLAOFTConfig.from_hf(CONFIG | {"text_config": text})


@pytest.mark.parametrize(
    "text",
    [
        {"rope_theta": 100.0},
        {"rope_parameters": {"rope_theta": 100, "rope_type": "default"}},
        {"rope_theta": 100, "rope_parameters": {"rope_theta": 100.0}},
        {"rope_theta": 100.0, "rope_scaling": {"type": "default"}, "rope_parameters": None},
    ],
)
def test_theta_is_read_where_any_version_of_transformers_writes_it(text):
    assert read(**text).rope_theta == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type = 'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta differs"),
        ({"rope_theta": float("nan")}, "a finite number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; expected 'silu'"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"head_dim": 64, "hidden_size": 96, "num_attention_heads": 4}, "head_dim = 64"),
        ({"eos_token_id": [2, 3]}, "expected one whole number"),
        ({"hidden_size": "4096"}, "hidden_size = '4096': expected a whole number"),
        ({"logit_soft_cap": 30.0}, "text_config.logit_soft_cap = 30.0: not known here"),
    ],
)
def test_text_config_is_refused_when_it_asks_for_what_is_not_computed(text, message):
    with pytest.raises(ValueError, match=message):
        read(**text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timm_override_act_layers", ["quick_gelu", None]),
        ("use_fused_vision_backbone", False),
        ("image_resize_strategy", "letterbox"),
        ("arch_specifier", "no-align+gelu-mlp"),
        ("quantization_config", {"bits": 4}),
        ("use_proprio", True),
        ("timm_model_ids", [["a"], "b"]),
        ("text_config", []),
        ("model_type", "llava"),
    ],
)
def test_config_is_refused_by_the_field_that_cannot_be_taken(field, value):
    with pytest.raises(ValueError, match=field):
        OpenVLAOFTConfig.from_hf(CONFIG | {field: value})


def test_all_problems_are_told_at_once():
    values = CONFIG | {"use_film": True, "text_config": {"mlp_bias": True, "vocab_size": 0}}
    with pytest.raises(ValueError, match="use_film = True(.|\n)*mlp_bias(.|\n)*vocab_size"):
        OpenVLAOFTConfig.from_hf(values)


def test_a_field_that_is_off_counts_as_absent():
    plain = OpenVLAOFTConfig.from_hf(CONFIG)
    nulls = {"text_config": None, "norm_stats": None, "pad_token_id": None, "use_new_trick": False}
    assert OpenVLAOFTConfig.from_hf(CONFIG | nulls) == plain
    assert read(num_key_value_heads=None, rope_scaling=None, sliding_window=None) == plain


def test_an_empty_config_is_refused():
    with pytest.raises(ValueError, match="got an empty one"):
        OpenVLAOFTConfig.from_hf({})


def test_published_preprocessor_is_read():
    towers = OpenVLAOFTConfig.from_hf(SMALL, PREPROCESSOR)
    assert towers.dinov2.mean == (0.484375, 0.455078125, 0.40625)
    means = {k: v for k, v in PREPROCESSOR.items() if k != "tvf_normalize_params"}
    assert OpenVLAOFTConfig.from_hf(SMALL, means).dinov2.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interpolations", ["bilinear", "bilinear"]),
        ("tvf_do_letterbox", True),
        ("image_resize_strategy", "resize-crop"),
        ("input_sizes", [[3, 224, 224]] * 2),
        ("tvf_crop_params", [{"output_size": [50, 50]}] * 2),
        ("tvf_resize_params", [{"size": [56, 56], "interpolation": 2}] * 2),
        ("tvf_normalize_params", [{"mean": [0.5] * 3, "std": [0.0] * 3}] * 2),
        ("tvf_normalize_params", [{"mean": [0.5] * 3}] * 2),
        ("tvf_normalize_params", [0.5, 0.5]),
        ("do_center_crop", True),
    ],
)
def test_preprocessor_is_refused_by_the_field_that_is_not_done_here(field, value):
    with pytest.raises(ValueError, match=rf"preprocessor_config.json(.|\n)*{field}"):
        OpenVLAOFTConfig.from_hf(SMALL, PREPROCESSOR | {field: value})
