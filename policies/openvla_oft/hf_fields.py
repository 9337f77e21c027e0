"""Fields of config.json, preprocessor_config.json and adapter_config.json, one by one.

Each field is either used, or changes no number here (idle), or may only have the values that this
code computes with (fixed). A field that is none of these is refused, also one that is false, 0 or
empty: `do_normalize` is none the less for being off. A null counts as a field that is not there.
The lists hold all that transformers 4.40 to 5.23, PEFT 0.10 to 0.21 and RLinf write.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PREPROCESSOR_FILE = "preprocessor_config.json"


class Kind(NamedTuple):
    """What a used field must be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


COUNT = Kind("a whole number above 0", lambda v: type(v) is int and v > 0)
INDEX = Kind("one whole number, 0 or more", lambda v: type(v) is int and v >= 0)
NUMBER = Kind("a finite number above 0", lambda v: _is_number(v) and v > 0)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
PAIR = Kind("a list of 2", lambda v: isinstance(v, list) and len(v) == 2)
SIZES = Kind("two sizes in pixels", lambda v: PAIR.fits(v) and all(map(COUNT.fits, v)))
TRIPLE = Kind(
    "3 finite numbers", lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_number, v))
)
POSITIVE_TRIPLE = Kind("3 finite numbers above 0", lambda v: TRIPLE.fits(v) and min(v) > 0)
TEXT = Kind("a text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))


@dataclass(frozen=True)
class Fields:
    """The known fields of one file, or of one object in it.

    Attributes:
        used: field -> what it must be.
        fixed: field -> the values that this code computes with.
        idle: fields that change no number here.
    """

    used: dict[str, Kind]
    fixed: dict[str, tuple] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    def problems(self, values: dict[str, Any], prefix: str = "") -> list[str]:
        """Return a line for every field that cannot be taken as it is."""
        lines = []
        for name, value in values.items():
            told = f"{prefix}{name} = {_shown(value)}"
            if value is None:
                continue
            if kind := self.used.get(name):
                if not kind.fits(value):
                    lines.append(f"{told}: expected {kind.words}")
            elif name in self.fixed:
                # True == 1, so types count too.
                if not any(type(v) is type(value) and v == value for v in self.fixed[name]):
                    expected = " or ".join(map(repr, self.fixed[name]))
                    lines.append(f"{told} is not supported; expected {expected}")
            elif name not in self.idle:
                lines.append(f"{told}: not known here; remove the field if it changes no result")
        return lines


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What every configuration of transformers may hold: bookkeeping, training, text generation.
TRANSFORMERS = _names(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    is_decoder is_encoder_decoder label2id length_penalty low_cpu_mem_usage max_length
    max_position_embeddings min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version trust_remote_code
    typical_p use_bfloat16 use_cache
    """
)
# Networks that none of OpenVLA's parts is.
OTHER_NETWORKS: dict[str, tuple] = {"add_cross_attention": (False,), "pruned_heads": ({},)}
# Names of OpenVLA's parts, which its tensors tell, and settings of the run that RLinf writes along.
# Its `center_crop` is true in nearly all of them and crops nothing: no policy of RLinf reads it.
OPENVLA = _names(
    """
    add_value_head center_crop ckpt_path hf_llm_id hidden_size image_size is_lora llm_backbone_id
    llm_max_length lora_path lora_rank max_prompt_length model_path output_projector_states
    policy_setup precision proprio_dim tie_word_embeddings use_wrist_image value_type vh_mode
    vision_backbone_id
    """
)
# Layouts of RLinf -> whether they keep the stop token.
VERSIONS = {"rlinf": False, "official": True}
# Settings of the training -> the field of `OpenVLAOFTConfig` that they are, and who sets it here.
SETTINGS = {
    "action_dim": ("action_dim", "the action statistics (policy.unnorm_key) or the recording"),
    "implement_version": ("keep_stop_token", "policy.keep_stop_token or --keep_stop_token"),
    "num_action_chunks": ("chunk", "the simulator, serve.chunk or --chunk"),
    "num_images_in_input": ("num_images", "the cameras of the simulator or of serve.image_keys"),
}
CONFIG = Fields(
    used={
        "action_dim": COUNT,
        "image_sizes": SIZES,
        "implement_version": Kind(
            f"one of {[*VERSIONS]}", lambda v: isinstance(v, str) and v in VERSIONS
        ),
        "n_action_bins": COUNT,
        "norm_stats": OBJECT,
        "num_action_chunks": COUNT,
        "num_images_in_input": COUNT,
        "pad_to_multiple_of": INDEX,
        "pad_token_id": INDEX,
        "text_config": OBJECT,
        "timm_model_ids": Kind(
            "a list of 2 texts", lambda v: PAIR.fits(v) and all(map(TEXT.fits, v))
        ),
        "tiny_vision_overrides": Kind(
            "a list of 2 objects", lambda v: PAIR.fits(v) and all(map(OBJECT.fits, v))
        ),
        "unnorm_key": TEXT,
        "vocab_size": COUNT,
    },
    fixed=OTHER_NETWORKS
    | {
        "arch_specifier": ("no-align+fused-gelu-mlp",),
        "image_resize_strategy": ("resize-naive",),
        "model_type": ("openvla", "openvla_oft"),
        "timm_override_act_layers": ([None, None],),
        "use_film": (False,),
        "use_fused_vision_backbone": (True,),
        "use_proprio": (False,),
    },
    idle=TRANSFORMERS | OPENVLA,
)
LLAMA = Fields(
    used={
        "eos_token_id": INDEX,
        "head_dim": COUNT,
        "hidden_size": COUNT,
        "intermediate_size": COUNT,
        "num_attention_heads": COUNT,
        "num_hidden_layers": COUNT,
        "num_key_value_heads": COUNT,
        "pad_token_id": INDEX,
        "rms_norm_eps": NUMBER,
        "rope_parameters": OBJECT,
        "rope_scaling": OBJECT,
        "rope_theta": NUMBER,
        "vocab_size": COUNT,
    },
    fixed=OTHER_NETWORKS
    | {
        "attention_bias": (False,),
        "attention_dropout": (0.0, 0),
        "hidden_act": ("silu",),
        "mlp_bias": (False,),
        "model_type": ("llama",),
        "partial_rotary_factor": (1.0, 1),
        "tie_word_embeddings": (False,),
    },
    idle=TRANSFORMERS,
)
TOWER = Fields(
    {"embed_dim": COUNT, "depth": COUNT, "num_heads": COUNT, "mlp_ratio": NUMBER,
     "patch_size": COUNT, "reg_tokens": INDEX}
)  # fmt: skip
ROPE = Fields(
    used={"rope_theta": NUMBER},
    fixed={
        "rope_type": ("default",),
        "type": ("default",),
        "partial_rotary_factor": (1.0, 1),
    },
)
PREPROCESSOR = Fields(
    used={"means": PAIR, "stds": PAIR, "tvf_normalize_params": PAIR, "input_sizes": PAIR,
          "tvf_crop_params": PAIR, "tvf_resize_params": PAIR},
    fixed={
        "do_center_crop": (False,),
        "do_normalize": (True,),
        "do_rescale": (True,),
        "do_resize": (True,),
        "image_resize_strategy": ("resize-naive",),
        "interpolations": (["bicubic", "bicubic"],),
        "tvf_do_letterbox": (False,),
        "use_fused_vision_backbone": (True,),
    },
    idle=frozenset(
        ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class",
         "tvf_letterbox_fill")
    ),
)  # fmt: skip
# Initialisations that leave the base's weights as they are. Others change them (their first B A is
# taken out of the base, or their A comes from it), so the pairs do not fit the base that is read.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
ADAPTER = Fields(
    used={"r": COUNT, "lora_alpha": NUMBER, "use_rslora": FLAG, "base_model_name_or_path": TEXT,
          "init_lora_weights": Kind(
              f"one of {PLAIN_STARTS}: others change the base's weights. Convert the adapter with "
              "PEFT where it was trained (save_pretrained with path_initial_model_for_weight_"
              "conversion writes true)",
              lambda v: any(type(v) is type(one) and v == one for one in PLAIN_STARTS))},
    fixed={
        "alpha_pattern": ({},),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        "layer_replication": ([],),
        "lora_bias": (False,),
        "modules_to_save": ([],),
        "peft_type": ("LORA",),
        "rank_pattern": ({},),
        "target_parameters": ([],),
        "trainable_token_indices": ([], {}),
        "use_dora": (False,),
        "use_qalora": (False,),
    },
    # Which modules have a pair, the file of tensors tells.
    idle=_names(
    """
        auto_mapping corda_config ensure_weight_tying eva_config exclude_modules inference_mode
        layers_pattern layers_to_transform loftq_config lora_dropout megatron_config megatron_core
        peft_version qalora_group_size revision runtime_config target_modules task_type
        """
),
)  # fmt: skip


def refuse(file: str, problems: Iterable[str]) -> None:
    """Raise a ValueError that lists all problems of a file, if there are any."""
    if problems := list(problems):
        raise ValueError(f"{file} cannot be used as it is:\n  " + "\n  ".join(problems))


def read_config(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and its text_config without nulls; the latter with a plain `rope_theta`.

    transformers 5 writes `rope_parameters` where older versions write `rope_theta`, and perhaps
    `rope_scaling`.

    Raises:
        ValueError: fields that cannot be taken as they are; all are listed.
    """
    if not any(name in values for name in ("model_type", "text_config", "timm_model_ids")):
        raise ValueError(
            "config.json: expected the configuration of an OpenVLA checkpoint (model_type, "
            f"text_config, timm_model_ids ..), got {sorted(values) or 'an empty one'}"
        )
    config, problems = _without_nulls(values), CONFIG.problems(values)
    text = config.get("text_config", {})
    if isinstance(text, dict):
        text = _without_nulls(text)
        problems += LLAMA.problems(text, "text_config.")
        problems += _rope_problems(text)
        if {"head_dim", "hidden_size", "num_attention_heads"} <= text.keys() and not problems:
            width = text["hidden_size"] / text["num_attention_heads"]
            if text["head_dim"] != width:
                problems.append(
                    f"text_config.head_dim = {text['head_dim']} is not supported; expected "
                    f"hidden_size / num_attention_heads = {width:g}"
                )
    refuse("config.json", problems)
    if "rope_theta" in text.get("rope_parameters", {}):
        text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    return config, text


def read_settings(config: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `OpenVLAOFTConfig` that config.json tells as settings of the training.

    Args:
        config: of `read_config`.
        asked: fields that the caller sets; where config.json tells them, they must be the same.

    Raises:
        ValueError: they are not; all are listed.
    """
    told, problems = {}, []
    for name, (own, by) in SETTINGS.items():
        if name not in config:
            continue
        told[own] = VERSIONS[config[name]] if name == "implement_version" else config[name]
        if (got := asked.get(own, told[own])) != told[own]:
            problems.append(
                f"{name} = {config[name]!r}: expected {own} = {told[own]}, got {got} by {by}; "
                "change that, or this field if the policy is to learn it anew"
            )
    refuse("config.json", problems)
    return told


def _rope_problems(text: dict[str, Any]) -> list[str]:
    problems, thetas = [], {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if isinstance(rope, dict):
            problems += ROPE.problems(rope, f"text_config.{name}.")
            thetas[name] = rope.get("rope_theta")
    thetas["rope_theta"] = text.get("rope_theta")
    told = {name: theta for name, theta in thetas.items() if theta is not None}
    if len(set(map(repr, map(_as_float, told.values())))) > 1:
        problems.append(f"text_config: rope_theta differs: {told}")
    return problems


def _as_float(value: Any) -> Any:
    return float(value) if _is_number(value) else value


def read_normalization(
    values: dict[str, Any], size: int
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Return (mean, std) of both towers; `tvf_normalize_params` wins over `means` and `stds`.

    Args:
        values: of preprocessor_config.json.
        size: pixels per side that the towers see.

    Raises:
        ValueError: another preprocessing than the one that is implemented; all is listed.
    """
    values = _without_nulls(values)
    refuse(PREPROCESSOR_FILE, PREPROCESSOR.problems(values))
    if "tvf_normalize_params" in values:
        pairs = values["tvf_normalize_params"]
    elif {"means", "stds"} <= values.keys():
        both = zip(values["means"], values["stds"], strict=True)
        pairs = [{"mean": mean, "std": std} for mean, std in both]
    else:
        raise ValueError(f"{PREPROCESSOR_FILE} lacks tvf_normalize_params, or means and stds")
    steps = {
        "input_sizes": Fields({}, {"size": ([3, size, size],)}),
        "tvf_crop_params": Fields({}, {"output_size": ([size, size],)}),
        "tvf_normalize_params": Fields(
            {"mean": TRIPLE, "std": POSITIVE_TRIPLE}, idle=frozenset(["inplace"])
        ),
        "tvf_resize_params": Fields(
            {}, {"antialias": (True,), "interpolation": (3,), "size": ([size, size],)}
        ),
    }
    sizes = [{"size": entry} for entry in values.get("input_sizes", ())]
    problems = []
    for name, entries in (values | {"input_sizes": sizes, "tvf_normalize_params": pairs}).items():
        for n, entry in enumerate(entries if name in steps else ()):
            if isinstance(entry, dict):
                problems += steps[name].problems(entry, f"{name}[{n}].")
            else:
                problems.append(f"{name}[{n}] = {_shown(entry)}: expected an object")
    if any(not {"mean", "std"} <= p.keys() for p in pairs if isinstance(p, dict)):
        problems.append("tvf_normalize_params: expected mean and std for both towers")
    refuse(PREPROCESSOR_FILE, problems)
    return [(tuple(pair["mean"]), tuple(pair["std"])) for pair in pairs]


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
