"""Who sits where, from what the configuration says."""

import pytest

from evac_jax.config.build import from_config_dict
from evac_jax.config.cluster import parse_devices
from evac_jax.config.flags import load_preset
from evac_jax.devices.placement import Placement, rollout_fsdp
from evac_jax.errors import ConfigError


def make_config(repository, **changes):
    values = load_preset(str(repository / "configs/grpo.py"))
    for name, value in changes.items():
        *path, last = name.split("__")
        node = values
        for part in path:
            node = node[part]
        node[last] = value
    return from_config_dict(values.to_dict())


def test_ranges_and_single_numbers_are_read_in_their_order():
    assert parse_devices("0-3") == (0, 1, 2, 3)
    assert parse_devices("6, 1-2") == (6, 1, 2)
    assert parse_devices("") == ()


@pytest.mark.parametrize("text", ["3-1", "a", "0,,1", "-1", "0-2,1"])
def test_what_is_no_list_of_devices_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_devices(text)


def test_everything_is_everywhere_when_nothing_is_said(repository):
    placed = Placement.of(make_config(repository), 2)
    assert placed.rollout == placed.actor == (0, 1)
    assert not placed.separate
    assert str(placed).splitlines()[:2] == [
        "device 0: rollout, actor",
        "device 1: rollout, actor",
    ]
    assert str(placed).endswith("cpu: simulator x2")


def test_picture_shows_simulators_dealt_out_in_blocks(repository):
    config = make_config(
        repository,
        env__num_envs=64,
        simulator__processes=4,
        simulator__devices=("cuda",),
        cluster__placement__env="0-1",
        cluster__placement__rollout="1",
        cluster__placement__actor="2",
    )
    placed = Placement.of(config, 4)
    assert placed.env == ("cuda:0", "cuda:0", "cuda:1", "cuda:1")
    assert placed.separate
    assert placed.pick("actor", "abcd") == ["c"]
    assert str(placed).splitlines() == [
        "device 0: simulator x2",
        "device 1: simulator x2, rollout",
        "device 2: actor",
        "device 3: nothing",
    ]


def test_devices_that_are_not_there_are_named_together(repository):
    config = make_config(
        repository, cluster__placement__rollout="0-3", cluster__placement__actor="7"
    )
    with pytest.raises(ConfigError) as told:
        Placement.of(config, 2)
    assert "placement.rollout: there is no device 2; the trainer sees 2" in str(told.value)
    assert "placement.actor: there is no device 7" in str(told.value)


def test_simulators_that_cannot_be_dealt_out_are_refused(repository):
    config = make_config(repository, simulator__devices=("cuda",), cluster__placement__env="0-2")
    with pytest.raises(ConfigError, match=r"simulator.processes: must be a multiple of the 3"):
        Placement.of(config, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cluster__placement__actor": "1-0"}, r"placement.actor: expected devices such as"),
        ({"cluster__placement__env": "0"}, r"placement.env: names CUDA devices"),
        ({"cluster__offload": ("policy",)}, r"cluster.offload: expected one of"),
        ({"cluster__engine": "slurm"}, r"cluster.engine: expected one of"),
        ({"cluster__num_nodes": 2}, r"cluster.coordinator: where the trainers"),
        ({"cluster__num_nodes": 2}, r"log.run: runs on several hosts need a name"),
        ({"cluster__node": 1}, r"cluster.node: expected 0 to 0"),
        ({"train__max_staleness": 1}, r"algo.decoupled: .*expected True"),
        (
            {
                "train__max_staleness": 1,
                "algo__decoupled": True,
                "cluster__offload": ("simulator",),
            },
            r"cluster.offload: simulator work during updates",
        ),
        (
            {
                "cluster__num_nodes": 2,
                "cluster__coordinator": "a:1",
                "log__run": "x",
                "rollout__refill": 1,
            },
            r"rollout.refill: .*one host",
        ),
    ],
)
def test_what_no_machine_can_do_is_refused_at_once(repository, changes, told):
    with pytest.raises(ConfigError, match=told):
        make_config(repository, **changes)


def test_copy_that_decides_is_cut_as_the_learner_where_it_fits():
    assert rollout_fsdp(4, 8) == 4
    assert rollout_fsdp(6, 4) == 2
    assert rollout_fsdp(3, 4) == 1


def test_hosts_share_the_environments(repository):
    config = make_config(
        repository,
        env__num_envs=64,
        cluster__num_nodes=2,
        cluster__coordinator="host:1234",
        log__run="wide",
    )
    assert config.envs_per_process == 16
    with pytest.raises(ConfigError, match="cluster.num_nodes = "):
        make_config(
            repository,
            env__num_envs=24,
            cluster__num_nodes=2,
            cluster__coordinator="host:1234",
            log__run="wide",
        )
