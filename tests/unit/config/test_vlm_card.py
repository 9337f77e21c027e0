import dataclasses
import json

import pytest

from configs import grpo
from evac_jax.config import vlm_card
from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.config.schema import MINIATURE_WEIGHTS, RewardConfig
from evac_jax.config.vlm import VlmConfig
from evac_jax.config.vlm_card import VlmCard
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.simulators import world_model_specs


@pytest.fixture
def model(tmp_path):
    """A folder that nobody opens."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    return str(folder)


@pytest.fixture
def measured(tmp_path, model):
    """A folder of vlm_threshold."""
    folder = tmp_path / "measured"
    folder.mkdir()
    VlmCard.make(model, -1.5, 8, VlmConfig(every=2, batch=5)).write(folder)
    return str(folder)


def config_of(vlm=None, **reward):
    values = grpo.get_config().to_dict()
    values["reward"] |= {"judge": "vlm", "success_frames": 1, "judged_frames": 1} | reward
    values["reward"]["vlm"] |= vlm or {}
    return from_config_dict(values)


def refused(**reward):
    with pytest.raises(ConfigError) as error:
        config_of(**reward)
    return str(error.value)


def test_folder_of_a_classifier_is_told_before_all_that_follows_from_it():
    told = refused(checkpoint=f"{MINIATURE_WEIGHTS}/reward", success_frames=2)
    assert "expected the folder of an image-text-to-text model" in told
    assert "success_frames" not in told


@pytest.mark.parametrize("prompt", ["{instruction} and {task}", "{instruction}: True."])
def test_answer_is_a_plain_word(model, prompt):
    told = refused(checkpoint=model, threshold=-1.0, vlm={"prompt": prompt})
    assert "config.reward.vlm.prompt: expected {instruction} once" in told


def test_model_and_threshold_reach_the_simulators(model):
    config = config_of(checkpoint=model, threshold=-2.0, vlm={"every": 3})
    settings = world_model_specs(config)[0]["config"]
    assert (settings["judge"], settings["reward"], settings["threshold"]) == ("vlm", model, -2.0)
    assert settings["vlm"] == dataclasses.asdict(VlmConfig(every=3))
    assert from_config_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"threshold": 0.5}, 'config.reward.threshold: needed with reward.judge = "vlm"'),
        ({"success_frames": 2}, "config.reward.success_frames: success that holds is reward.vlm"),
        ({"judged_frames": 2}, "config.reward.judged_frames: a vision-language model judges"),
        ({"veto": 0.5}, "config.reward.veto: compares classifiers"),
        (
            {"vlm": {"prompt": "Is it done? True"}},
            "reward.vlm.prompt: expected {instruction} once",
        ),
        ({"vlm": {"every": 0}}, "config.reward.vlm.every: expected at least 1"),
        ({"checkpoint": ""}, "config.reward.checkpoint: needed, the folder of the vision-language"),
        ({"judge": "classifier"}, "config.reward.threshold: expected a probability in (0, 1]"),
    ],
)
def test_contradictions_are_refused(model, reward, problem):
    assert problem in refused(**{"checkpoint": model, "threshold": -1.0} | reward)


def test_several_models_are_refused(model):
    message = refused(checkpoint=f"{model},{model}", threshold=-1.0)
    assert "config.reward.checkpoint: one vision-language model judges" in message


def test_run_uses_the_model_of_a_measured_threshold(measured, model):
    config = config_of(checkpoint=measured, threshold=-1.5, vlm={"every": 2})
    settings = world_model_specs(config)[0]["config"]
    assert (settings["reward"], settings["vlm_chunk"]) == (model, 8)
    assert to_dict(config)["reward"]["checkpoint"] == measured


def test_other_settings_than_those_measured_with_are_refused_with_the_flags_that_mend_it(measured):
    message = refused(checkpoint=measured, success_frames=2)
    flags = "--config.reward.threshold=-1.5 --config.reward.success_frames=1 "
    assert f"add {flags}--config.reward.vlm.every=2, or name" in message


def test_flags_quote_a_prompt_for_the_shell(measured):
    card = dataclasses.replace(vlm_card.read(measured), prompt="Done: {instruction}? Yes")
    assert "'--config.reward.vlm.prompt=Done: {instruction}? Yes'" in card.flags(RewardConfig())


def test_folder_of_a_model_has_no_card(model):
    assert vlm_card.read(model) is None
    assert vlm_card.simulated(model) == {"reward": model}


def test_another_model_in_the_place_of_the_measured_one_is_refused(measured, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"other": 1}')
    with pytest.raises(CheckpointError, match=r"found for other files .*\(config\.json\)"):
        vlm_card.simulated(measured)


def test_lost_model_is_named(measured, model, tmp_path):
    (tmp_path / "model").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"names the model '{model}', which does not exist"):
        vlm_card.simulated(measured)


@pytest.mark.parametrize("text", ["[1]", "{", '{"model": "a"}', None])
def test_damaged_card_is_refused(measured, tmp_path, text):
    path = tmp_path / "measured" / "vlm.json"
    if text is None:
        text = json.dumps(json.loads(path.read_text()) | {"every": "two"})
    path.write_text(text)
    with pytest.raises(DataError, match=r"vlm\.json: .*write it anew"):
        vlm_card.read(measured)
    assert "vlm.json: " in refused(checkpoint=measured, threshold=-1.5)
