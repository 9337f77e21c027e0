"""RLinf's configuration becomes a command that launch.py accepts; no key is passed over."""

import functools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from evac_jax.config.build import from_config_dict
from evac_jax.config.fields import walk
from evac_jax.config.flags import read_preset
from evac_jax.errors import ConfigError
from evac_jax.tools.hub import from_rlinf
from evac_jax.tools.hub.rlinf_keys import ROWS
from evac_jax.tools.hub.rlinf_kinds import KINDS
from evac_jax.tools.hub.rlinf_row import DIFFERENT, MAPPED, NO_MEANING, UNSUPPORTED
from evac_jax.tools.hub.rlinf_values import PLACEMENT
from tests.unit.docs import pages

pytest.importorskip("hydra", reason="hydra-core is not installed (requirements-dev.txt)")

CONFIG = Path(__file__).parent / "rlinf_configs" / "config" / "evac_grpo.yaml"


@functools.cache
def composed(*overrides):
    return from_rlinf.flat(from_rlinf.compose(CONFIG, overrides))


def lines_of(changes=(), *overrides, weights="weights"):
    """Lines of the file with Hydra's overrides, some of its values changed after that."""
    return from_rlinf.translate(composed(*overrides) | dict(changes), weights)


def line(key, changes=()):
    (found,) = (line for line in lines_of(changes) if line.key == key)
    return found


@pytest.fixture
def config_of(tmp_path):
    """Make what launch.py makes of the printed command, with folders that exist."""
    for name in ("policy", "starts", "weights/world_model", "weights/reward", "weights/pose_model"):
        (tmp_path / name).mkdir(parents=True)
    paths = {
        "actor.checkpoint_load_path": f"{tmp_path}/policy",
        "rollout.model_dir": f"{tmp_path}/policy",
        "actor.tokenizer.tokenizer_model": f"{tmp_path}/policy",
        "env.train.initial_image_path": f"{tmp_path}/starts",
    }

    def config(changes=(), *overrides):
        lines = lines_of(paths | dict(changes), *overrides, weights=f"{tmp_path}/weights")
        assert not [line for line in lines if line.verdict == UNSUPPORTED]
        command = from_rlinf.command_of(lines).replace("\\\n", "")
        python, launch, preset, *flags = shlex.split(command)
        assert (python, launch) == ("python", "launch.py")
        return from_config_dict(read_preset(preset.removeprefix("--config="), flags).to_dict())

    return config


def test_published_run_becomes_the_preset_when_it_is_composed(config_of, tmp_path):
    config = config_of()
    preset = read_preset("configs/grpo.py:libero_spatial").to_dict()
    preset["policy"]["checkpoint"] = f"{tmp_path}/policy"
    preset["env"]["initial_states_path"] = f"{tmp_path}/starts"
    for name in ("world_model", "reward"):
        preset[name]["checkpoint"] = f"{tmp_path}/weights/{name}"
    preset["env"]["pose_model"] = f"{tmp_path}/weights/pose_model"
    preset["policy"]["unnorm_key"] = "libero_spatial_no_noops"
    preset["log"] |= {"dir": "../results", "wandb_project": "rlinf"}
    preset["algo"]["micro_batch"] = 256  # 32 on each of 8 GPUs; the preset has less
    assert config == from_config_dict(preset)


def test_every_key_of_the_file_is_in_the_table():
    lines = lines_of()
    assert {found.verdict for found in lines} == {MAPPED, NO_MEANING, DIFFERENT}
    assert len(lines) > 200
    text = from_rlinf.report(lines)
    for found in lines:
        assert f"    {found.key} = " in text


def test_table_has_a_reason_and_a_true_field_for_every_key(config_of):
    for key, row in ROWS.items():
        assert row.verdict in (MAPPED, NO_MEANING, DIFFERENT), key
        assert len(row.reason) > 3, key
        assert row.verdict != DIFFERENT or re.search("switch|--config|the same", row.reason)
    known = {field.name for field in walk(config_of())}
    for found in lines_of():
        assert set(found.fields) <= known, found


def test_overrides_change_the_command_when_hydra_applies_them(config_of):
    config = config_of(
        {},
        *("algorithm.group_size=4", "algorithm.num_group_envs=16", "actor.micro_batch_size=8"),
        *("actor.optim.lr=1e-5", "actor.model.is_lora=True", "runner.max_steps=7"),
        *("algorithm.sampling_params.temperature_eval=-1", "runner.val_check_interval=-1"),
        *("actor.model.gradient_checkpointing=False", "algorithm.reward_coef=2"),
        *("+algorithm.update_epoch=2", "actor.optim.adam_beta2=0.95", "env.enable_offload=True"),
    )
    assert (config.algo.group_size, config.env.num_envs, config.algo.micro_batch) == (4, 64, 64)
    assert (config.optim.lr, config.optim.betas) == (1e-5, (0.9, 0.95))
    assert (config.policy.lora_rank, config.policy.lora_alpha) == (32, 32.0)
    assert (config.train.iterations, config.eval.interval) == (7, 0)
    assert (config.policy.eval_temperature, config.policy.remat) == (0.0, "none")
    assert (config.reward.coefficient, config.algo.update_epochs) == (2.0, 2)
    assert config.cluster.offload == ("simulator",)


def test_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.adv_type: expected one of \['grpo', 'gae'\]"):
        lines_of({"algorithm.adv_type": "reinforce"})


def test_ppo_takes_its_preset_with_rlinfs_values(config_of):
    config = config_of(
        {},
        *("algorithm.adv_type=gae", "algorithm.loss_type=actor_critic", "algorithm.group_size=1"),
        *("actor.model.add_value_head=True", "algorithm.reward_type=chunk_level"),
        *("algorithm.num_group_envs=16", "algorithm.filter_rewards=False", "algorithm.gamma=0.9"),
    )
    assert config.algorithm == "ppo"
    assert (config.policy.value_head, config.algo.reward_type) == ("chunk_level", "chunk_level")
    assert (config.algo.gamma, config.algo.critic_warmup_updates) == (0.9, 0)
    assert not config.algo.filter_rewards


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ({"actor,rollout,env": "0-3"}, (4, ("cuda:0", "cuda:1", "cuda:2", "cuda:3"), "", "", "")),
        ({"env": "0-3", "rollout,actor": "4-7"}, (4, ("cuda",), "0,1,2,3", "4,5,6,7", "4,5,6,7")),
    ],
)
def test_gpus_are_placed_as_in_the_file(config_of, placement, expected):
    config = config_of({PLACEMENT: placement})
    place = config.cluster.placement
    found = (place.env, place.rollout, place.actor)
    assert (config.simulator.processes, config.simulator.devices, *found) == expected


def test_several_hosts_are_started_by_ray(config_of):
    config = config_of(
        {"cluster.num_nodes": 2, PLACEMENT: {"actor,rollout,env": "0-15"}},
        *("algorithm.num_group_envs=16", "actor.global_batch_size=512"),
        "runner.logger.experiment_name=two",
    )
    assert (config.cluster.num_nodes, config.cluster.engine, config.log.run) == (2, "ray", "two")
    assert config.simulator.processes == 8


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("env.train.simulator_type", "libero", "expected 'world_model_libero'"),
        ("env.train.world_model_cfg.params.timesteps", 500, "expected 1000"),
        ("actor.model.use_proprio", True, "expected False"),
        ("actor.model.precision", "fp16", "expected one of"),
        ("runner.save_interval", -1, "expected 1 or more"),
        ("runner.logger.logger_backends", ["swanlab"], "['swanlab']"),
        ("rollout.model_dir", "/other", "expected the folder of actor.checkpoint_load_path"),
        ("env.train.num_envs", 7, "num_group x group_size = 16"),
        ("algorithm.n_chunk_steps", 3, "expected 256 // 8"),
        ("actor.fsdp_config.sharding_strategy", "some", "expected one of ['full_shard'"),
    ],
)
def test_value_without_a_counterpart_is_listed_as_not_supported(key, value, told):
    found = line(key, {key: value})
    assert found.verdict == UNSUPPORTED
    assert told in found.reason


@pytest.mark.parametrize(
    ("placement", "told"),
    [
        ({"env": "0-3", "rollout": "4-7", "actor": "8-15"}, "all hosts do the same"),
        ({"actor,rollout,env": "all"}, "expected devices such as"),
        ({"actor,rollout": "0-7"}, "none of ['env']"),
        ({"actor,rollout,env,reward": "0-7"}, "no such component here: ['reward']"),
    ],
)
def test_gpus_without_a_counterpart_are_not_supported(placement, told):
    found = line(PLACEMENT, {"cluster.num_nodes": 2, PLACEMENT: placement})
    assert found.verdict == UNSUPPORTED
    assert told in found.reason


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("algorithm.clip_ratio_c", "--config.algo.clip_ratio_c"),
        ("algorithm.kl_beta", "the command has 0"),
        ("actor.micro_batch_size", "reference_micro_batch_mean"),
        ("env.train.group_size", "mixes starts"),
        ("env.train.action_predictor_cfg.pretrained_checkpoint", "reference_compat"),
    ],
)
def test_what_differs_names_the_switch(key, told):
    found = line(key)
    assert found.verdict == DIFFERENT
    assert told in found.reason


def test_unknown_key_makes_the_status_1_unless_it_is_allowed(capsys):
    arguments = [str(CONFIG), "+algorithm.clip_ratio_hihg=0.3"]
    with pytest.raises(SystemExit) as ended:
        from_rlinf.main(arguments)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "unknown (1)" in out
    assert "Did you mean 'algorithm.clip_ratio_high'?" in out
    assert "algorithm.clip_ratio_hihg" in err
    from_rlinf.main([*arguments, "--allow_unknown"])
    assert "python launch.py --config=configs/grpo.py:libero_spatial" in capsys.readouterr().out


def test_composed_file_is_read_as_it_is(tmp_path):
    from omegaconf import OmegaConf

    composed = tmp_path / "composed.yaml"
    OmegaConf.save(OmegaConf.create(from_rlinf.compose(CONFIG)), composed)
    assert from_rlinf.flat(from_rlinf.compose(composed)) == from_rlinf.flat(
        from_rlinf.compose(CONFIG)
    )


def test_search_path_of_the_environment_is_followed(tmp_path, monkeypatch):
    elsewhere = tmp_path / "mine"
    elsewhere.mkdir()
    (elsewhere / "run.yaml").write_text(CONFIG.read_text())
    with pytest.raises(ConfigError, match="EMBODIED_PATH"):
        from_rlinf.compose(elsewhere / "run.yaml")
    monkeypatch.setenv("EMBODIED_PATH", str(CONFIG.parents[1]))
    assert from_rlinf.compose(elsewhere / "run.yaml") == from_rlinf.compose(CONFIG)


def test_missing_hydra_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hydra", None)
    with pytest.raises(ConfigError, match=r"-m pip install hydra-core==1\.3\.2"):
        from_rlinf.compose(CONFIG)


def test_pip_command_names_the_pinned_version(repository):
    assert from_rlinf.HYDRA in (repository / "requirements-dev.txt").read_text()


def mistakes_of(*overrides) -> str:
    with pytest.raises(ConfigError) as told:
        lines_of((), *overrides)
    return str(told.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm.group_size=abc", "algorithm.group_size: expected int, got 'abc'"),
        ("algorithm.group_size=-3", "algorithm.group_size: expected at least 1, got -3"),
        ("algorithm.group_size=2.5", "algorithm.group_size: expected int, got 2.5"),
        ("actor.optim.lr=fast", "actor.optim.lr: expected float, got 'fast'"),
        ("actor.seed=null", "actor.seed: expected int, got None"),
        ("actor.model.is_lora=maybe", "actor.model.is_lora: expected bool, got 'maybe'"),
        ("algorithm.gamma=x", "algorithm.gamma: expected float, got 'x'"),
        ("algorithm.adv_type=[1]", "algorithm.adv_type: expected str, got [1]"),
        ("actor.optim=5", "actor.optim: expected a section, got 5"),
    ],
)
def test_value_of_another_type_is_refused_by_its_key(override, told):
    assert told in mistakes_of(override)


def test_all_values_of_another_type_are_refused_at_once():
    told = mistakes_of("actor.optim.adam_beta1=a", "actor.seed=b", "runner.max_epochs=c")
    assert len(told.splitlines()) == 4


def test_every_key_behind_a_field_has_a_kind():
    assert set(KINDS) <= set(ROWS)
    # Their conversions look at the value themselves, or do not use it.
    free = {
        *("cluster.component_placement", "runner.logger.logger_backends", "algorithm.kl_beta"),
        *("algorithm.loss_type", "actor.model.value_type", "actor.model.precision"),
        *("actor.optim.warmup_style", "actor.fsdp_config.sharding_strategy"),
        "env.train.world_model_cfg.pretrained_checkpoint",
        "env.train.reward_model_cfg.pretrained_checkpoint",
        "env.train.action_predictor_cfg.pretrained_checkpoint",
    }
    for found in lines_of():
        if found.fields and found.key not in free:
            wrong = object()
            with pytest.raises(ConfigError, match=re.escape(f"{found.key}: expected")):
                lines_of({found.key: wrong})


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("actor.optim.lr", -1.0, "expected > 0, got -1.0"),
        ("actor.optim.adam_beta1", 1.5, "got 1.5"),
        ("algorithm.reward_type", "word_level", "expected one of ('action_level'"),
        ("actor.model.precision", [1], "expected one of"),
        ("runner.logger.logger_backends", 5, "expected tensorboard, wandb; got 5"),
        (PLACEMENT, "all", "expected GPUs of env, rollout and actor, got 'all'"),
    ],
)
def test_value_that_no_field_can_have_is_listed_as_not_supported(key, value, told):
    found = line(key, {key: value})
    assert (found.verdict, found.fields) == (UNSUPPORTED, {})
    assert told in found.reason


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["algorithm.num_group_envs=3"],
            ["config.env.num_envs: must be a multiple", "\n  env.train.num_group = 3"],
        ),
        (
            ["+actor.optim.warmup_style=cosine"],
            ["total_iterations: 'cosine' needs", "actor.optim.total_training_steps, which is not"],
        ),
        (["actor.checkpoint_load_path=hf://abc"], ["expected hf://OWNER/NAME", "got 'hf://abc'"]),
    ],
)
def test_command_that_launch_would_refuse_is_not_printed(overrides, told, capsys):
    with pytest.raises(ConfigError) as refused:
        from_rlinf.main([str(CONFIG), *overrides])
    assert [part for part in told if part not in str(refused.value)] == []
    out = capsys.readouterr().out
    assert "mapped (" in out
    assert "launch.py" not in out.splitlines()[-1]
    assert "The command:" not in out


def test_file_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, or a file .*: expected UTF-8 text"):
        from_rlinf.compose(tmp_path / "run.yaml")


def test_file_whose_value_holds_itself_is_told(tmp_path):
    (tmp_path / "run.yaml").write_text("a: &a [*a]\n")
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be composed: a value of it holds"):
        from_rlinf.compose(tmp_path / "run.yaml")


@pytest.mark.parametrize(("text", "got"), [("", "none"), ("model: {size: 1}\n", "model")])
def test_file_of_something_else_is_refused_with_the_keys_that_it_lacks(tmp_path, text, got):
    (tmp_path / "run.yaml").write_text(text)
    values = from_rlinf.flat(from_rlinf.compose(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match=f"keys cluster, runner, .*; got {got}; missing cluster"):
        from_rlinf.translate(values, "weights")


def test_folder_is_refused_as_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder; expected RLinf's \.yaml file"):
        from_rlinf.compose(tmp_path)


def test_only_the_file_is_asked_for_when_there_are_no_arguments(capsys):
    with pytest.raises(SystemExit):
        from_rlinf.main([])
    assert capsys.readouterr().err.endswith("arguments are required: config\n")


def test_command_of_the_page_ends_well_when_the_file_names_the_policy_three_times(
    repository, tmp_path, capsys
):
    shutil.copytree(CONFIG.parent, tmp_path / "config")
    file = tmp_path / "config" / CONFIG.name
    file.write_text(file.read_text().replace("${actor.checkpoint_load_path}", "/path/to/model/"))
    (words,) = (
        words
        for words in pages.commands(repository / "docs/from_rlinf.md")
        if "evac_jax.tools.hub.from_rlinf" in words
    )
    _, (_, *overrides) = pages.module_and_arguments(words)
    from_rlinf.main([str(file), *overrides])  # status 0
    assert "--config.policy.checkpoint=POLICY" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        from_rlinf.main([str(file), "actor.checkpoint_load_path=POLICY"])
    assert "unknown or not supported: rollout.model" in capsys.readouterr().err
