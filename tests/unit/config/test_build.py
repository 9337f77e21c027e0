import pytest

from configs import grpo, ppo
from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.config.checks import validate_serving
from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.errors import ConfigError


@pytest.mark.parametrize("preset", [grpo, ppo])
def test_miniature_preset_is_valid_and_round_trips(preset):
    config = from_config_dict(preset.get_config().to_dict())
    assert from_config_dict(to_dict(config)) == config


def test_all_problems_come_in_one_message():
    values = grpo.get_config().to_dict()
    values["algo"]["clip_hihg"] = 0.3
    values["env"]["num_envs"] = 8.5
    values["trian"] = {}
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    message = str(error.value)
    assert "algo.clip_hihg" in message
    assert "clip_high" in message
    assert "env.num_envs: expected int, got 8.5" in message
    assert "Did you mean 'train'" in message


def test_all_missing_paths_are_named_when_a_real_preset_is_asked_for():
    with pytest.raises(ConfigError) as error:
        from_config_dict(grpo.get_config("libero_spatial").to_dict())
    for name in ("policy", "world_model", "reward"):
        assert f"config.{name}.checkpoint" in str(error.value)
    assert "config.env.initial_states_path" in str(error.value)
    assert "config.env.pose_model" in str(error.value)


def test_serving_needs_a_policy_and_no_simulator(tmp_path):
    values = grpo.get_config("libero_spatial").to_dict()
    with pytest.raises(ConfigError, match=r"config\.policy\.checkpoint: needed") as error:
        from_config_dict(values, validate_serving)
    assert "world_model" not in str(error.value)
    values["policy"]["checkpoint"] = str(tmp_path)
    assert from_config_dict(values, validate_serving).serve.frame_shapes == ((224, 224), (256, 256))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"image_keys": ()}, "one key per camera"),
        ({"prompt_key": "observation/image"}, r"given twice: \['observation/image'\]"),
        ({"image_sizes": ()}, "HEIGHTxWIDTH"),
        ({"image_sizes": ("224",)}, "HEIGHTxWIDTH"),
        ({"image_sizes": ("0x224",)}, "HEIGHTxWIDTH"),
        ({"image_sizes": ("224x224x3",)}, "HEIGHTxWIDTH"),
        ({"port": 65536}, r"config\.serve\.port: expected 0\.\.65535"),
    ],
)
def test_served_keys_and_sizes_are_checked(changes, why):
    values = grpo.get_config().to_dict()
    values["serve"] |= changes
    with pytest.raises(ConfigError, match=why):
        from_config_dict(values, validate_serving)


def test_groups_must_stay_whole():
    values = grpo.get_config().to_dict()
    values["env"]["num_envs"] = 12
    with pytest.raises(ConfigError, match=r"multiple of algo\.group_size x simulator\.processes"):
        from_config_dict(values)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'libero_spatial'"):
        grpo.get_config("libero_spacial")


def test_learning_in_the_ground_truth_needs_one_and_no_weights_of_simulators():
    values = grpo.get_config().to_dict()
    values["env"]["simulator"] = "ground_truth"
    values["world_model"]["checkpoint"] = values["reward"]["checkpoint"] = ""
    values["eval"] |= {"episodes": 0, "ground_truth": "none"}
    with pytest.raises(ConfigError, match=r"config\.eval\.ground_truth: names the environment"):
        from_config_dict(values)
    values["eval"] |= {"episodes": 4, "ground_truth": "miniature"}
    with pytest.raises(ConfigError, match=r"config\.eval\.episodes: nothing is imagined"):
        from_config_dict(values)
    values["eval"]["episodes"] = 0
    assert from_config_dict(values).env.simulator == "ground_truth"


def test_replays_in_another_ground_truth_need_its_own_states(tmp_path):
    values = grpo.get_config().to_dict()
    values["eval"]["twin_fraction"] = 0.5
    values["env"] |= {"initial_states": "recording", "initial_states_path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"starts that the ground truth \('miniature'\) can be"):
        from_config_dict(values)
    values["env"] |= {"initial_states": "npy", "keyframes": 0.5, "keyframe_data": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"config\.env\.keyframes: .*expected 0\.0, got 0\.5"):
        from_config_dict(values)


def test_values_and_missing_files_come_in_one_message():
    values = grpo.get_config().to_dict()
    values["world_model"] |= {"solver": "ddin", "checkpoint": ""}
    values["algo"] |= {"group_size": 1, "clip_ratio_c": 0.5}
    values["optim"] |= {"lr": float("nan"), "betas": (0.9, 1.0)}
    values["reward"]["coefficient"] = float("-inf")
    values["train"] |= {"iterations": 0, "max_staleness": 2}
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "config.algo.group_size: expected at least 2, got 1",
        "config.algo.clip_ratio_c: expected None or > 1, got 0.5",
        "config.optim.lr: expected a finite number, got nan",
        "config.optim.betas: expected a number in [0, 1), got 1.0",
        "config.world_model.solver: expected one of ('ddim', 'dpm++', 'unipc'), got 'ddin'. "
        "Did you mean 'ddim'?",
        "config.reward.coefficient: expected a finite number, got -inf",
        "config.train.iterations: expected at least 1, got 0",
        "config.train.max_staleness: expected one of (0, 1), got 2",
        "config.world_model.checkpoint: needed, the folder of the EVAC weights; set "
        "--config.world_model.checkpoint=PATH, or --config.world=DIR for all parts",
    ]


def test_unknown_algorithm_names_the_nearest():
    with pytest.raises(ConfigError, match=r"config\.algorithm: .*Did you mean 'grpo'"):
        from_config_dict({"algorithm": "grop"})


@pytest.mark.parametrize(
    ("field", "part", "why"),
    [
        ("reward.checkpoint", "policy", "kind RewardNet, got '.*policy' of kind openvla"),
        ("world_model.checkpoint", "reward", "kind EvacModel, got '.*reward' of kind RewardNet"),
        ("env.pose_model", "world_model", "kind PoseModel, got '.*world_model' of kind EvacModel"),
    ],
)
def test_folder_of_another_model_is_refused_before_anything_starts(field, part, why):
    values = grpo.get_config().to_dict()
    section, name = field.split(".")
    values[section][name] = f"{MINIATURE_WEIGHTS}/{part}"
    with pytest.raises(ConfigError, match=f"config.{field}: expected a folder of {why}$"):
        from_config_dict(values)


def test_vision_language_model_as_classifier_is_told_the_flag_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    values = grpo.get_config().to_dict()
    values["reward"]["checkpoint"] = str(tmp_path)
    with pytest.raises(ConfigError, match="kind smolvlm; .* --config.reward.judge=vlm"):
        from_config_dict(values)


@pytest.mark.parametrize("path", ["hf:/owner/name", "https://huggingface.co/owner/name"])
def test_address_in_another_form_is_told_the_right_one(path):
    values = grpo.get_config().to_dict()
    values["policy"]["checkpoint"] = path
    with pytest.raises(ConfigError, match="does not exist.* is hf://OWNER/NAME"):
        from_config_dict(values)
