import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import vlm_reward
from evac_jax.config.vlm import PROMPT, VlmConfig
from evac_jax.errors import CheckpointError, ConfigError, SimulatorError
from evac_jax.evac.lean_imports import ensure_torchvision
from evac_jax.sim.env import WorldModelEnv
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.reward import make_judge, watch
from evac_jax.sim.vlm import VlmJudge
from tests.unit.sim.fakes import FakePose, FakeStarts, FakeWorldModel

TASKS = vlm_reward.TASKS
FLOAT = VlmConfig(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_reward.write_tiny(tmp_path_factory.mktemp("vlm") / "tiny")


@pytest.fixture(scope="module")
def judge(folder):
    return VlmJudge.load(folder, TASKS, FLOAT)


@pytest.fixture(scope="module")
def asked():
    """Episodes with 4, 2, 4 and 2 frames, and their tasks: no two prompts are equally long."""
    return vlm_reward.random_episodes(4, 4, 48), [TASKS[0], TASKS[1], TASKS[1], TASKS[0]]


def test_log_probability_is_that_of_transformers_own_call(judge, asked):
    found = judge.log_probability(*asked)
    pairs = zip(*asked, strict=True)
    expected = [vlm_reward.direct(judge.model, judge.processor, *pair) for pair in pairs]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    assert found.std() > 0.01  # frames and words matter
    assert found.max() < 0


def test_batch_and_padding_change_no_number(folder, judge, asked):
    single = VlmJudge.load(folder, TASKS, VlmConfig(dtype="float32", batch=1))
    together, alone = judge.log_probability(*asked), single.log_probability(*asked)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def write_llava(folder):
    """Write a tiny LLaVA: other marks of images, another encoder, another language model."""
    import transformers as hf

    tokenizer = vlm_reward.tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    layers = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, image_size=32, patch_size=16, initializer_factor=5.0, **layers
        ),
        text_config=hf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.3, **layers
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vlm_reward.TEMPLATE.replace(vlm_reward.IMAGE, "<image>"),
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_model_of_another_family_is_asked_in_its_own_marks(asked, tmp_path):
    ensure_torchvision()
    judge = VlmJudge.load(write_llava(tmp_path), TASKS, FLOAT)
    pairs = zip(*asked, strict=True)
    expected = [vlm_reward.direct(judge.model, judge.processor, *pair) for pair in pairs]
    found = judge.log_probability(*asked)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    assert found.std() > 0.01


def test_prompt_is_a_turn_that_is_not_closed(judge):
    prompt = judge.prompt_of(2, "pick up the red block")
    assert prompt.startswith("<|im_start|>user\n" + 2 * vlm_reward.IMAGE + "The above images")
    assert prompt.endswith("task: pick up the red block. " + PROMPT[PROMPT.index("Decide") : -5])


def test_half_precision_gives_nearly_the_same(folder, judge, asked):
    half = VlmJudge.load(folder, TASKS, VlmConfig()).log_probability(*asked)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, judge.log_probability(*asked), rtol=0, atol=0.5)


class Saying:
    """A judge whose judgements are told, and which remembers the frames that it was shown."""

    def __init__(self, config, *said):
        self.config, self.instructions = config, ("even", "odd")
        self._said, self.shown, self.texts = list(said), [], []

    def log_probability(self, episodes, instructions):
        self.shown += [[int(frame[0, 0, 0]) for frame in frames] for frames in episodes]
        self.texts += instructions
        return torch.tensor([self._said.pop(0) for _ in episodes])

    watch = VlmJudge.watch


def pictures(*grey):
    return np.stack([np.full((2, 2, 3), g, np.uint8) for g in grey])


def verdicts(config, said, chunks):
    """The verdicts of one episode, and what was shown."""
    judge = Saying(config, *said)
    watching = judge.watch(1, chunks)
    watching.start(np.array([0]), pictures(0))
    means = [watching.means(np.array([0]), pictures(n + 1), ["even"]).item() for n in range(chunks)]
    return means, judge.shown


def test_verdict_is_the_mean_of_the_last_judgements_once_there_are_enough():
    means, _ = verdicts(VlmConfig(), [-1.0, -2.0, -6.0, -1.0], 4)
    assert means == [-np.inf, -np.inf, -3.0, -3.0]


def test_only_every_kth_chunk_is_judged():
    means, shown = verdicts(VlmConfig(every=2, average=1), [-1.0, -2.0], 5)
    assert means == [-np.inf, -1.0, -np.inf, -2.0, -np.inf]
    assert shown == [[0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("frames", "expected"), [(1, [6]), (2, [0, 6]), (4, [0, 2, 4, 6])])
def test_frames_are_shown_at_equal_distances_up_to_now(frames, expected):
    _, shown = verdicts(VlmConfig(frames=frames, average=1), [-1.0] * 6, 6)
    assert shown[-1] == expected


def test_new_episode_forgets_the_old_one():
    judge = Saying(VlmConfig(average=2), -1.0, -1.0, -5.0, -1.0)
    watching = judge.watch(2, 4)
    rows = np.array([0, 1])
    watching.start(rows, pictures(1, 2))
    watching.means(rows, pictures(3, 4), ["even", "odd"])
    watching.start(np.array([1]), pictures(9))
    means = watching.means(rows, pictures(5, 6), ["even", "odd"])
    assert means.tolist() == [-3.0, -np.inf]
    assert judge.shown[-2:] == [[1, 3, 5], [9, 6]]


def test_nothing_is_asked_when_no_chunk_is_due(judge):
    assert judge.log_probability([], []).shape == (0,)


def test_episode_too_short_for_a_verdict_is_refused():
    with pytest.raises(ConfigError, match=r"every x average = 2 x 3 chunks, an episode has 4"):
        Saying(VlmConfig(every=2)).watch(1, 4)


def environment(judge, monkeypatch, **settings):
    settings = {"judge": "vlm", "threshold": -2.0, "max_episode_steps": 8, "gripper": "none"} | (
        settings
    )
    config = WorldModelEnvConfig(num_envs=2, judged_frames=1, **settings)
    monkeypatch.setattr("evac_jax.sim.env.watch", lambda judge, *sizes: judge.watch(*sizes))
    return WorldModelEnv(FakeWorldModel(), judge, FakePose(), FakeStarts(), config)


def test_environment_ends_an_episode_when_the_mean_reaches_the_threshold(monkeypatch):
    judge = Saying(VlmConfig(average=2), -1.0, -9.0, -2.5, -9.0, -1.0, -1.0)
    env = environment(judge, monkeypatch)
    frames = torch.zeros(2, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(0, 2, *env.spec.image_shape, dtype=torch.uint8)
    env.reset(np.array([2, 3]), 0, frames, clip)
    ends = []
    for _ in range(4):
        result = env.step(np.zeros((2, 2, 7), np.float32), frames, clip)
        ends.append(result.terminated.tolist())
    # Means of the first one: none, -1.75; of the second: none, -9, -5, -1.
    assert ends == [[False, False], [True, False], [True, False], [True, True]]
    assert judge.texts == ["even", "odd", "even", "odd", "odd", "odd"]
    assert result.episode["success_once"].tolist() == [1, 1]
    assert [len(shown) for shown in judge.shown] == [2, 2, 3, 3, 4, 5]


def test_threshold_of_other_chunks_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"for chunks of 8 frames.* imagines 2; .*--chunk=2"):
        environment(Saying(VlmConfig()), monkeypatch, vlm_chunk=8)


def test_settings_name_the_model_and_the_environment_watches_with_it(folder):
    settings = WorldModelEnvConfig.from_dict(
        {
            "judge": "vlm",
            "reward": folder,
            "threshold": -2.5,
            "vlm": {"dtype": "float32", "average": 1, "frames": 2},
            "world_model": folder,
            "pose_model": folder,
        }
    )
    assert settings.rules.threshold == pytest.approx(np.exp(-2.5))
    judge = make_judge(settings, TASKS)
    watching = watch(judge, 1, 4)
    first, second = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    watching.begin(np.array([0]), first)
    chances = watching.judge(np.array([0]), second[:, None], np.array([1]))
    shown = [((f + 1) / 2 * 255).to(torch.uint8).movedim(1, -1)[0].numpy() for f in (first, second)]
    expected = judge.log_probability([shown], [TASKS[1]]).exp()
    torch.testing.assert_close(chances, expected[None])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"threshold": 0.5}, "threshold: expected a log-probability"),
        ({"success_frames": 2}, "success_frames: expected 1"),
        ({"veto": 0.2}, "veto: expected 0"),
        ({"reference_compat": True}, "reference_compat: expected False"),
        ({"vlm": VlmConfig(prompt="Done? Yes")}, "vlm.prompt: expected {instruction} once"),
    ],
)
def test_settings_that_contradict_a_vlm_are_refused(settings, problem):
    with pytest.raises(ConfigError) as error:
        WorldModelEnvConfig(**{"judge": "vlm", "threshold": -1.0} | settings)
    assert problem in str(error.value)


def test_answer_of_several_tokens_is_refused(folder):
    prompt = "Is this done: {instruction}? The answer is: Zwölf"
    with pytest.raises(ConfigError, match=r"must be one token of the model, but 'Zwölf' is \["):
        VlmJudge.load(folder, TASKS, VlmConfig(prompt=prompt))


def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"image-text-to-text model.*no config\.json"):
        VlmJudge.load(str(tmp_path), TASKS, FLOAT)


def test_language_model_that_sees_nothing_is_refused(tmp_path):
    vlm_reward.tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="takes no images"):
        VlmJudge.load(str(tmp_path), TASKS, FLOAT)


def test_folder_of_another_kind_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path)
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="expected the folder of an image-text-to-text model"):
        VlmJudge.load(str(copy), TASKS, FLOAT)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*processor*", "*tokenizer*"), "cannot load its processor"),
        (("chat_template*",), "chat template cannot place images"),
        (("*.safetensors",), "expected the folder of an image-text-to-text model"),
    ],
)
def test_missing_files_are_named(folder, tmp_path, patterns, message):
    copy = copied(folder, tmp_path)
    for pattern in patterns:
        for path in copy.glob(pattern):
            path.unlink()
    with pytest.raises((CheckpointError, ConfigError), match=message):
        VlmJudge.load(str(copy), TASKS, FLOAT)


def test_missing_weights_are_refused_instead_of_drawn(folder, tmp_path):
    copy = copied(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights of .* are missing, such as .*up_proj"):
        VlmJudge.load(str(copy), TASKS, FLOAT)


def test_numbers_that_are_not_finite_are_refused(folder, asked):
    judge = VlmJudge.load(folder, TASKS, FLOAT)
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(SimulatorError, match=r"reward\.vlm\.dtype=float32 \(it is float32\)"):
        judge.log_probability(*asked)
