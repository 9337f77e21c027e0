"""Conversions of RLinf's values into fields of the configuration, for `rlinf_keys`.

Each takes a key's value and all values by path, and returns fields. Several keys that make one
field together share a conversion. What has no counterpart raises ValueError, which says why.
"""

from collections.abc import Mapping
from typing import Any

from evac_jax.config.cluster import parse_devices
from evac_jax.tools.hub.rlinf_row import Convert

Values = Mapping[str, Any]
Fields = dict[str, Any]
WEIGHTS = "--weights"  # in `Values`: folder of what was imported
COMPONENTS = ("env", "rollout", "actor")
PLACEMENT, NODES = "cluster.component_placement", "cluster.num_nodes"
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "32": "float32"}


def nodes(value: int, values: Values) -> Fields:
    """Hosts; several are started by Ray."""
    return {"cluster.num_nodes": value, "cluster.engine": "ray" if value > 1 else "local"}


def _devices(values: Values) -> dict[str, tuple[int, ...]]:
    """Return {component: its GPUs, counted over all hosts}."""
    found: dict[str, tuple[int, ...]] = {}
    if not isinstance(values[PLACEMENT], Mapping):
        raise ValueError(f"expected GPUs of env, rollout and actor, got {values[PLACEMENT]!r}")
    for names, text in values[PLACEMENT].items():
        for name in str(names).split(","):
            found[name.strip()] = parse_devices(str(text))  # a ValueError for "all" and the like
    if missing := [name for name in COMPONENTS if not found.get(name)]:
        raise ValueError(f"expected GPUs of env, rollout and actor; none of {missing}")
    if surplus := sorted(found.keys() - set(COMPONENTS)):
        raise ValueError(f"no such component here: {surplus}")
    return found


def _hosts_devices(values: Values) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return {component: its GPUs on every host}, and the GPUs of a host."""
    devices, hosts = _devices(values), values.get(NODES, 1)
    gpus, rest = divmod(1 + max(max(numbers) for numbers in devices.values()), hosts)
    result = {}
    for name, numbers in devices.items():
        by_host = [sorted(n % gpus for n in numbers if n // gpus == host) for host in range(hosts)]
        if rest or any(of_host != by_host[0] for of_host in by_host):
            raise ValueError(
                f"{name} has GPUs {numbers} on {hosts} hosts; here all hosts do the same with the "
                "same GPUs"
            )
        result[name] = tuple(by_host[0])
    return result, gpus


def placement(value: Mapping, values: Values) -> Fields:
    """GPUs of simulators, sampler and learner."""
    devices, gpus = _hosts_devices(values)
    processes = {"simulator.processes": len(devices["env"])}
    if all(numbers == tuple(range(gpus)) for numbers in devices.values()):
        every = tuple(f"cuda:{number}" for number in devices["env"])
        return processes | {"simulator.devices": every}
    texts = {f"cluster.placement.{name}": ",".join(map(str, devices[name])) for name in COMPONENTS}
    return processes | {"simulator.devices": ("cuda",)} | texts


def run_name(value: str, values: Values) -> Fields:
    """Name of the run: only several hosts need one."""
    return {"log.run": value} if values.get(NODES, 1) > 1 else {}


def backends(value: list[str] | str, values: Values) -> Fields:
    """Where metrics go."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or [n for n in names if n not in ("tensorboard", "wandb")]:
        raise ValueError(f"expected tensorboard, wandb; got {value}")
    return {
        "log.tensorboard": "tensorboard" in names,
        "log.wandb": "online" if "wandb" in names else "disabled",
    }


def iterations(value: int, values: Values) -> Fields:
    """The smaller limit."""
    most = values.get("runner.max_steps", -1)
    return {"train.iterations": value if most < 0 else min(value, most)}


def eval_interval(value: int, values: Values) -> Fields:
    """Never is 0 here."""
    return {"eval.interval": max(value, 0)}


def save_interval(value: int, values: Values) -> Fields:
    """RLinf can save never; a run here always can go on."""
    if value < 1:
        raise ValueError("a run saves checkpoints; expected 1 or more iterations")
    return {"checkpoint.interval": value}


def algorithm(value: str, values: Values) -> Fields:
    """The preset; `from_rlinf` chooses it."""
    if value not in ("grpo", "gae"):
        raise ValueError("expected grpo or gae")
    return {}


def loss(value: str, values: Values) -> Fields:
    """Nothing: it follows from the algorithm."""
    expected = {"grpo": "actor", "gae": "actor_critic"}.get(str(values.get("algorithm.adv_type")))
    if value != expected:
        raise ValueError(f"with this algorithm.adv_type expected {expected}")
    return {}


def no_kl(value: float, values: Values) -> Fields:
    """What RLinf does with it."""
    return {"algo.kl_beta": 0.0}


def group_size(value: int, values: Values) -> Fields:
    """Of actor and environment alike."""
    other = values.get("env.train.group_size", value)
    if other != value:
        raise ValueError(f"env.train.group_size is {other}; expected the same")
    return {"algo.group_size": value}


def check_chunks(value: int, values: Values) -> Fields:
    """Nothing, if it is what follows."""
    steps, chunk = values["env.train.max_episode_steps"], values["actor.model.num_action_chunks"]
    if value != steps // chunk:
        raise ValueError(f"expected {steps} // {chunk}: episodes are played to their end")
    return {}


def eval_temperature(value: float, values: Values) -> Fields:
    """0 or less is greedy."""
    return {"policy.eval_temperature": max(float(value), 0.0)}


def top_k(value: int, values: Values) -> Fields:
    """0 and -1 are both off."""
    return {"policy.top_k": value if value > 0 else -1}


def offload(value: bool, values: Values) -> Fields:
    """Collect the three switches. Where all share GPUs, the sampler has no weights of its own."""
    named = {"env": "simulator", "actor": "optimizer", "rollout": "sampler"}
    if PLACEMENT in values:
        devices = _devices(values)
        if devices["rollout"] == devices["actor"]:
            del named["rollout"]
    return {
        "cluster.offload": tuple(
            ours for theirs, ours in named.items() if values.get(f"{theirs}.enable_offload")
        )
    }


def relative(value: bool, values: Values) -> Fields:
    """Changes of the score, or the score."""
    return {"reward.relative": value}


def coefficient(value: float, values: Values) -> Fields:
    """The reward; RLinf multiplies only changes of the score."""
    is_relative = values.get("env.train.use_rel_reward", False)
    return {"reward.coefficient": float(value) if is_relative else 1.0}


def num_envs(value: int, values: Values) -> Fields:
    """Groups times members, which must be the number of environments."""
    groups, size = values["env.train.num_group"], values["env.train.group_size"]
    if values["env.train.num_envs"] != groups * size:
        raise ValueError(f"expected num_group x group_size = {groups * size} environments")
    return {"env.num_envs": groups * size}


def starts(value: str, values: Values) -> Fields:
    """A folder of .npy episodes."""
    return {"env.initial_states": "npy", "env.initial_states_path": value}


def imported(field: str, name: str) -> Convert:
    """Return the conversion of a published file to the folder that it is imported to."""
    return lambda value, values: {field: f"{values[WEIGHTS]}/{name}"}


def same_model(value: str, values: Values) -> Fields:
    """Nothing, if it is the start policy."""
    if value != values["actor.checkpoint_load_path"]:
        raise ValueError("expected the folder of actor.checkpoint_load_path; override both")
    return {}


def same_precision(value: str, values: Values) -> Fields:
    """Nothing, if it is the learner's."""
    if value != values["actor.model.precision"]:
        raise ValueError("expected that of actor.model.precision")
    return {}


def micro_batch(value: int, values: Values) -> Fields:
    """Of all GPUs together."""
    return {"algo.micro_batch": value * len(_devices(values)["actor"])}


def value_head(value: object, values: Values) -> Fields:
    """The head's level, if there is one."""
    level = values.get("actor.model.value_type", "action_level")
    has = values.get("actor.model.add_value_head", False)
    if has and level not in ("action_level", "chunk_level"):
        raise ValueError("expected action_level or chunk_level")
    return {"policy.value_head": level if has else "none"}


def precision(value: str, values: Values) -> Fields:
    """In which layers compute; weights are float32."""
    if str(value) not in DTYPES:
        raise ValueError(f"expected one of {sorted(DTYPES)}")
    return {"policy.compute_dtype": DTYPES[str(value)], "policy.param_dtype": "float32"}


def lora(value: object, values: Values) -> Fields:
    """Rank and a scale of 1, if adapters are trained."""
    rank = values.get("actor.model.lora_rank", 32) if values.get("actor.model.is_lora") else 0
    return {"policy.lora_rank": rank, "policy.lora_alpha": float(rank)}


def adapter(value: str | None, values: Values) -> Fields:
    """Adapters to go on with; RLinf reads the path only where it trains adapters."""
    return {"policy.lora_adapter": value if value and values.get("actor.model.is_lora") else ""}


def remat(value: bool, values: Values) -> Fields:
    """Recompute all or nothing."""
    return {"policy.remat": "full" if value else "none"}


def betas(value: float, values: Values) -> Fields:
    """Both of Adam's."""
    names = ("actor.optim.adam_beta1", "actor.optim.adam_beta2")
    return {"optim.betas": tuple(values[name] for name in names)}


def critic_warmup(value: int | None, values: Values) -> Fields:
    """RLinf warms up a value head only."""
    has = values.get("actor.model.add_value_head", False)
    return {"algo.critic_warmup_updates": (value or 0) if has else 0}


def schedule(value: str, values: Values) -> Fields:
    """Of the learning rate."""
    if value not in ("constant", "cosine"):
        raise ValueError("expected constant or cosine")
    return {"optim.schedule": value}


def warmup(value: int, values: Values) -> Fields:
    """Iterations; less than 0 = by the share."""
    return {"optim.warmup_iterations": max(value, -1)}


def mesh(value: object, values: Values) -> Fields:
    """Copies of the parameters, and GPUs that share one."""
    strategy = values.get("actor.fsdp_config.sharding_strategy", "full_shard")
    size = values.get("actor.fsdp_config.fsdp_size", -1)
    grids = {
        "full_shard": (1, -1),
        "shard_grad_op": (1, -1),
        "no_shard": (-1, 1),
        "hybrid_shard": (1, -1) if size < 1 else (-1, size),
    }
    if strategy not in grids:
        raise ValueError(f"expected one of {sorted(grids)}")
    return dict(zip(("mesh.data", "mesh.fsdp"), grids[strategy], strict=True))
