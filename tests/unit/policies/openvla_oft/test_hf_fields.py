import json
from pathlib import Path

import pytest

from policies.openvla_oft import hf_fields
from policies.openvla_oft.config import OpenVLAOFTConfig

GOLDENS = Path(__file__).parents[3] / "goldens" / "openvla_oft"
CONFIG = {"model_type": "openvla"}
PREPROCESSOR = json.loads((GOLDENS / "checkpoint" / "preprocessor_config.json").read_text())
SMALL = CONFIG | {"image_sizes": [56, 56]}
# What `to_dict` of transformers 4.40 to 5 writes as false, 0 or empty, in both objects.
FALSE = """
    _attn_implementation_autoset add_cross_attention do_sample early_stopping is_decoder
    is_encoder_decoder output_attentions output_hidden_states output_scores remove_invalid_values
    return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
"""
ZERO = """
    chunk_size_feed_forward diversity_penalty encoder_no_repeat_ngram_size min_length
    no_repeat_ngram_size
"""
OFF = {
    **dict.fromkeys(FALSE.split(), False),
    **dict.fromkeys(ZERO.split(), 0),
    "_name_or_path": "",
    "pruned_heads": {},
}
# What RLinf writes along: the whole `actor.model` of its configuration.
RLINF = {
    "model_type": "openvla_oft",
    "implement_version": "rlinf",
    "precision": "bf16",
    "value_type": "action_level",
    "action_dim": 7,
    "num_action_chunks": 8,
    "use_proprio": False,
    "use_film": False,
    "unnorm_key": "libero_10_no_noops",
    "center_crop": True,
    "max_prompt_length": 50,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "add_value_head": False,
    "image_size": [224, 224],
    "is_lora": False,
    "lora_rank": 32,
    "lora_path": None,
    "num_images_in_input": 2,
    "attn_implementation": "flash_attention_2",
    "low_cpu_mem_usage": True,
    "trust_remote_code": True,
    "policy_setup": "widowx_bridge",
}
# What PEFT 0.10 to 0.21 writes of an ordinary LoRA; nulls are left out.
PEFT = {
    "alpha_pattern": {},
    "bias": "none",
    "ensure_weight_tying": False,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": ["q_proj"],
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


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
        ({"use_rope": False}, "text_config.use_rope = False: not known here"),
        ({"is_causal": False}, "text_config.is_causal = False: not known here"),
        ({"_attn_scale": 3.0}, "text_config._attn_scale = 3.0: not known here"),
        ({"pruned_heads": {"0": [1]}}, "text_config.pruned_heads"),
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
        ("use_new_trick", False),
        ("_x", 4),
        ("add_cross_attention", True),
        ("vocab_size", 128256),
        ("implement_version", "mine"),
        ("num_action_chunks", 0),
    ],
)
def test_config_is_refused_by_the_field_that_cannot_be_taken(field, value):
    with pytest.raises(ValueError, match=field):
        OpenVLAOFTConfig.from_hf(CONFIG | {field: value})


def test_all_problems_are_told_at_once():
    values = CONFIG | {"use_film": True, "text_config": {"mlp_bias": True, "vocab_size": 0}}
    with pytest.raises(ValueError, match="use_film = True(.|\n)*mlp_bias(.|\n)*vocab_size"):
        OpenVLAOFTConfig.from_hf(values)


def test_a_field_that_is_null_counts_as_absent():
    plain = OpenVLAOFTConfig.from_hf(CONFIG)
    nulls = {"text_config": None, "norm_stats": None, "pad_token_id": None, "use_new_trick": None}
    assert OpenVLAOFTConfig.from_hf(CONFIG | nulls) == plain
    assert read(num_key_value_heads=None, rope_scaling=None, sliding_window=None) == plain


def test_defaults_that_libraries_write_are_known():
    plain = OpenVLAOFTConfig.from_hf(CONFIG)
    assert OpenVLAOFTConfig.from_hf(CONFIG | OFF | {"text_config": OFF}) == plain
    assert hf_fields.ADAPTER.problems(PEFT) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("scaling_on", False), ("_x", 4), ("rank_pattern", {"q_proj": 4}), ("use_dora", True)],
)
def test_adapter_is_refused_by_the_field_that_is_not_done_here(field, value):
    (line,) = hf_fields.ADAPTER.problems(PEFT | {field: value})
    assert line.startswith(f"{field} = ")


def test_settings_of_the_training_are_taken_from_the_file_that_tells_them():
    config = OpenVLAOFTConfig.from_hf(RLINF | {"num_action_chunks": 25})
    assert (config.chunk, config.num_images, config.action_dim) == (25, 2, 7)
    assert not config.keep_stop_token
    assert not config.center_crop  # RLinf does not crop, whatever it writes
    assert OpenVLAOFTConfig.from_hf(RLINF | {"implement_version": "official"}).keep_stop_token
    same = {"chunk": 8, "num_images": 2, "action_dim": 7, "keep_stop_token": False}
    assert OpenVLAOFTConfig.from_hf(RLINF, **same).chunk == 8


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"chunk": 4}, "num_action_chunks = 8: expected chunk = 8, got 4 by the simulator"),
        ({"num_images": 1}, "num_images_in_input = 2: expected num_images = 2, got 1"),
        ({"action_dim": 14}, "action_dim = 7: expected action_dim = 7, got 14"),
        ({"keep_stop_token": True}, "implement_version = 'rlinf': expected keep_stop_token = Fal"),
        ({"chunk": 4, "num_images": 1}, "num_action_chunks(.|\n)*num_images_in_input"),
    ],
)
def test_settings_of_the_training_are_refused_when_the_caller_contradicts_them(asked, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAOFTConfig.from_hf(RLINF, **asked)


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
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_resize", False),
        ("_x", 4),
    ],
)
def test_preprocessor_is_refused_by_the_field_that_is_not_done_here(field, value):
    with pytest.raises(ValueError, match=rf"preprocessor_config.json(.|\n)*{field}"):
        OpenVLAOFTConfig.from_hf(SMALL, PREPROCESSOR | {field: value})
