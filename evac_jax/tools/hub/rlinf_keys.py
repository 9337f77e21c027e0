"""What every key of RLinf's EVAC configuration is here: one table, by the YAML's dotted path.

Source: libero_spatial_evac_grpo_openvlaoft.yaml, env/train and env/eval/libero_spatial_evac.yaml of
RLinf at commit c9f1d8471, and the code that reads them there. `rlinf_values` has the conversions,
`rlinf_world_model` the rows below env.train.world_model_cfg.
"""

from evac_jax.tools.hub import rlinf_values as convert
from evac_jax.tools.hub.rlinf_row import DIFFERENT, MAPPED, NO_MEANING, Row, To
from evac_jax.tools.hub.rlinf_world_model import WORLD_MODEL

WORKERS = Row(NO_MEANING, "names of RLinf's worker processes and of their queues")
POINTED_TO = Row(NO_MEANING, "only read through the key of the same name below env.train")
IN_THE_FOLDER = Row(NO_MEANING, "the policy folder's own files tell")
LOADING = Row(NO_MEANING, "how Python loads the model; no code of a checkpoint is run here")
TORCH_FSDP = Row(NO_MEANING, "tunes PyTorch's FSDP; here the compiler places arrays (mesh)")
NOT_READ = Row(NO_MEANING, "RLinf's EVAC environment does not read it")
GROUPS = Row(
    DIFFERENT,
    "RLinf's EvacEnv draws another start for every slot, so a group mixes starts; here a group "
    "shares its start, and no switch brings mixed groups back",
)
IN_LIBERO = Row(
    DIFFERENT,
    "RLinf evaluates in LIBERO; here imagination is evaluated, and LIBERO as well with "
    "--config.eval.ground_truth=libero --config.libero.root=.. --config.libero.states=.. "
    "(docs/libero.md)",
)
ONE_CRITIC = Row(NO_MEANING, "of models other than the policy, which RLinf's EVAC run has not")
ONE_SEED = Row(NO_MEANING, "all random numbers come from seed, see actor.seed")

CLUSTER = {
    "cluster.num_nodes": Row(MAPPED, "hosts; several are started by Ray, as there", convert.nodes),
    "cluster.component_placement": Row(
        MAPPED, "GPUs of every host; one simulator process for each of env's", convert.placement
    ),
}

RUNNER = {
    "runner.task_type": Row(NO_MEANING, "the only task here", only=("embodied",)),
    "runner.logger.log_path": Row(MAPPED, "folder of all runs", To("log.dir")),
    "runner.logger.project_name": Row(MAPPED, "of Weights & Biases", To("log.wandb_project")),
    "runner.logger.experiment_name": Row(
        MAPPED,
        "name of the run's folder on several hosts; else it is made of algorithm and date",
        convert.run_name,
    ),
    "runner.logger.logger_backends": Row(MAPPED, "where metrics go", convert.backends),
    "runner.max_epochs": Row(
        MAPPED, "the smaller of it and runner.max_steps", convert.iterations, absent=1
    ),
    "runner.max_steps": Row(MAPPED, "with runner.max_epochs; -1 = no limit"),
    "runner.only_eval": Row(NO_MEANING, "for True: launch.py --mode=eval", only=(False,)),
    "runner.val_check_interval": Row(
        DIFFERENT,
        "RLinf evaluates before the rollout of every n-th iteration, here after its update; no "
        "switch",
        convert.eval_interval,
    ),
    "runner.save_interval": Row(MAPPED, "iterations between checkpoints", convert.save_interval),
    "runner.seq_length": Row(NO_MEANING, "only the longest prompt matters"),
    "runner.max_prompt_length": Row(
        MAPPED, "tokens to which prompts are padded", To("policy.max_prompt_length")
    ),
    "runner.resume_dir": Row(
        NO_MEANING, "RLinf's checkpoints cannot be continued here", only=(None,)
    ),
}

ALGORITHM = {
    "algorithm.auto_reset": POINTED_TO,
    "algorithm.ignore_terminations": POINTED_TO,
    "algorithm.reward_coef": POINTED_TO,
    "algorithm.max_episode_steps": POINTED_TO,
    "algorithm.num_group_envs": POINTED_TO,
    "algorithm.specific_reset_id": NOT_READ,
    "algorithm.use_fixed_reset_state_ids": NOT_READ,
    "algorithm.use_ordered_reset_state_ids": NOT_READ,
    "algorithm.normalize_advantages": Row(
        DIFFERENT,
        "without effect in GRPO; in PPO RLinf normalises over a rank and does not pass False on, "
        "here it is over the iteration, and False has its effect; no switch",
        To("algo.normalize_advantages"),
        absent=True,
    ),
    "algorithm.kl_penalty": Row(NO_MEANING, "RLinf's embodied runs have no KL penalty"),
    "algorithm.kl_beta": Row(
        DIFFERENT,
        "RLinf's embodied runs ignore it, so the command has 0; here --config.algo.kl_beta acts",
        convert.no_kl,
    ),
    "algorithm.group_size": Row(MAPPED, "episodes of a group", convert.group_size, absent=8),
    "algorithm.n_chunk_steps": Row(
        NO_MEANING, "follows from env.max_episode_steps and the chunk", convert.check_chunks
    ),
    "algorithm.n_eval_chunk_steps": IN_LIBERO,
    "algorithm.rollout_epoch": Row(MAPPED, "episodes per environment", To("rollout.epochs")),
    "algorithm.reward_type": Row(MAPPED, "level of rewards", To("algo.reward_type")),
    "algorithm.logprob_type": Row(MAPPED, "level of ratios", To("algo.logprob_type")),
    "algorithm.entropy_type": Row(MAPPED, "level of the entropy", To("algo.entropy_type")),
    "algorithm.adv_type": Row(MAPPED, "chooses the preset", convert.algorithm),
    "algorithm.loss_type": Row(
        MAPPED, "goes with algorithm.adv_type: grpo has actor, gae actor_critic", convert.loss
    ),
    "algorithm.loss_agg_func": Row(
        NO_MEANING, "RLinf's embodied runs ignore it: episodes are weighted by their length"
    ),
    "algorithm.entropy_bonus": Row(
        DIFFERENT,
        "0 is the same; RLinf's other values give NaN gradients, here they act",
        To("algo.entropy_bonus"),
        absent=0,
    ),
    "algorithm.clip_ratio_high": Row(MAPPED, "upper clip", To("algo.clip_high")),
    "algorithm.clip_ratio_low": Row(MAPPED, "lower clip", To("algo.clip_low")),
    "algorithm.clip_ratio_c": Row(
        DIFFERENT,
        "RLinf does not pass it on for OpenVLA-OFT, so the command leaves the dual clip off; "
        "--config.algo.clip_ratio_c turns it on",
    ),
    "algorithm.value_clip": Row(MAPPED, "of the value loss (PPO)", To("algo.value_clip")),
    "algorithm.huber_delta": Row(MAPPED, "of the value loss (PPO)", To("algo.huber_delta")),
    "algorithm.gamma": Row(MAPPED, "discount (PPO)", To("algo.gamma"), absent=1.0),
    "algorithm.gae_lambda": Row(MAPPED, "trace decay (PPO)", To("algo.gae_lambda"), absent=1.0),
    "algorithm.update_epoch": Row(
        MAPPED, "passes over the samples", To("algo.update_epochs"), absent=1
    ),
    "algorithm.filter_rewards": Row(
        MAPPED, "drops groups", To("algo.filter_rewards"), absent=False
    ),
    "algorithm.rewards_lower_bound": Row(MAPPED, "lowest mean return", To("algo.filter_low")),
    "algorithm.rewards_upper_bound": Row(MAPPED, "highest mean return", To("algo.filter_high")),
    "algorithm.sampling_params.use_greedy": Row(
        NO_MEANING, "training samples, always", only=(False,)
    ),
    "algorithm.sampling_params.temperature_train": Row(
        MAPPED, "in rollouts and in updates", To("policy.temperature")
    ),
    "algorithm.sampling_params.temperature_eval": Row(
        MAPPED, "0 or less = greedy", convert.eval_temperature
    ),
    "algorithm.sampling_params.top_k": Row(
        DIFFERENT,
        "-1 and 0 are the same; with others RLinf's update filters before it masks, so its ratios "
        "are wrong; here both filter alike, no switch",
        convert.top_k,
    ),
    "algorithm.sampling_params.top_p": Row(NO_MEANING, "RLinf does not use it", only=(1.0,)),
    "algorithm.sampling_params.repetition_penalty": Row(
        NO_MEANING, "RLinf does not use it", only=(1.0,)
    ),
    "algorithm.length_params.max_new_token": Row(NO_MEANING, "a chunk has a fixed length"),
    "algorithm.length_params.max_length": Row(NO_MEANING, "a chunk has a fixed length"),
    "algorithm.length_params.min_length": Row(NO_MEANING, "a chunk has a fixed length"),
}

ENV = {
    "env.group_name": WORKERS,
    "env.channel.name": WORKERS,
    "env.channel.queue_name": WORKERS,
    "env.channel.queue_size": WORKERS,
    "env.enable_offload": Row(
        MAPPED, "the world model leaves the GPU during updates", convert.offload, absent=False
    ),
    "env.train.simulator_type": Row(
        NO_MEANING, "the presets for LIBERO in EVAC", only=("world_model_libero",)
    ),
    "env.train.task_suite_name": Row(MAPPED, "suite of LIBERO", To("libero.suite")),
    "env.train.auto_reset": Row(
        MAPPED, "environments restart within a rollout", To("algo.auto_reset")
    ),
    "env.train.ignore_terminations": Row(
        MAPPED, "episodes go on after success", To("algo.ignore_terminations")
    ),
    "env.train.max_episode_steps": Row(
        MAPPED, "actions of an episode", To("env.max_episode_steps")
    ),
    "env.train.use_rel_reward": Row(
        DIFFERENT,
        "True is the same; for False RLinf forgets the coefficient, so the command has 1",
        convert.relative,
    ),
    "env.train.reward_coef": Row(MAPPED, "reward for success", convert.coefficient),
    "env.train.only_eval": Row(NO_MEANING, "an environment to train in", only=(False,)),
    "env.train.seed": ONE_SEED,
    "env.train.num_group": Row(MAPPED, "groups played at once", convert.num_envs),
    "env.train.group_size": GROUPS,
    "env.train.num_envs": Row(MAPPED, "of all GPUs together", convert.num_envs),
    "env.train.use_fixed_reset_state_ids": Row(
        NO_MEANING, f"{NOT_READ.reason}; here --config.env.start_order=fixed does it"
    ),
    "env.train.use_ordered_reset_state_ids": Row(
        NO_MEANING, f"{NOT_READ.reason}; here --config.env.start_order=ordered does it"
    ),
    "env.train.use_wrist_image": Row(NO_MEANING, "EVAC has one view", only=(False,)),
    "env.train.video_cfg.save_video": Row(
        DIFFERENT,
        "evaluations are filmed, not rollouts; no switch",
        To("video.save"),
    ),
    "env.train.video_cfg.info_on_video": Row(MAPPED, "text in films", To("video.overlay")),
    "env.train.video_cfg.video_base_dir": Row(
        NO_MEANING, "films lie in the run's folder; --config.video.dir names another"
    ),
    "env.train.model_type": Row(NO_MEANING, "the only world model here", only=("evac",)),
    "env.train.gen_num_image_each_step": Row(NO_MEANING, "EVAC's chunk tells", only=(8,)),
    "env.train.chunk": Row(NO_MEANING, "the world model's config.json tells", only=(8,)),
    "env.train.n_previous": Row(NO_MEANING, "the world model's config.json tells", only=(4,)),
    "env.train.n_view": Row(NO_MEANING, "the world model's config.json tells", only=(1,)),
    "env.train.sample_size": Row(
        NO_MEANING, "the world model's config.json tells", only=([256, 256],)
    ),
    "env.train.initial_image_path": Row(MAPPED, "RLinf's .npy episodes", convert.starts),
    **WORLD_MODEL,
    "env.train.reward_model_cfg.target": Row(
        NO_MEANING, "the classifier's class", only=("reward_model.classifier.RewModel",)
    ),
    "env.train.reward_model_cfg.pretrained_checkpoint": Row(
        MAPPED,
        "import it: tools.world_model.import_evac --weights FILE --out .., or tools.hub.fetch",
        convert.imported("reward.checkpoint", "reward"),
    ),
    "env.train.action_predictor_cfg.target": Row(
        *(NO_MEANING, "the network's class"),
        only=("action_model.action_predictor.ActionPredictorMLP",),
    ),
    "env.train.action_predictor_cfg.pretrained_checkpoint": Row(
        DIFFERENT,
        "import it as the classifier. RLinf calls it without its normalisation and writes poses "
        "one place too early; --config.world_model.reference_compat=True brings both back",
        convert.imported("env.pose_model", "pose_model"),
    ),
    "env.train.init_params.camera_heights": NOT_READ,
    "env.train.init_params.camera_widths": NOT_READ,
    "env.train.fps": Row(NO_MEANING, "of films: --config.video.fps"),
    **{
        f"env.eval.{name}": IN_LIBERO
        for name in (
            *("simulator_type", "task_suite_name", "auto_reset", "ignore_terminations"),
            *("max_episode_steps", "use_rel_reward", "reward_coef", "only_eval", "seed"),
            *("num_group", "group_size", "use_fixed_reset_state_ids", "use_wrist_image"),
            *("num_envs", "video_cfg.save_video", "video_cfg.info_on_video"),
            *("video_cfg.video_base_dir", "init_params.camera_heights"),
            *("init_params.camera_widths", "use_ordered_reset_state_ids", "specific_reset_id"),
        )
    },
}

ROLLOUT = {
    "rollout.group_name": WORKERS,
    "rollout.channel.name": WORKERS,
    "rollout.channel.queue_name": WORKERS,
    "rollout.channel.queue_size": WORKERS,
    "rollout.mode": Row(NO_MEANING, "cluster.component_placement says who shares GPUs"),
    "rollout.generation_backend": Row(NO_MEANING, "one way to sample", only=("huggingface",)),
    "rollout.model_dir": Row(
        NO_MEANING, "actors give the sampler their weights before it samples", convert.same_model
    ),
    "rollout.precision": Row(
        NO_MEANING, "sampler and learner compute alike", convert.same_precision
    ),
    "rollout.enable_offload": Row(
        MAPPED, "a sampler of its own leaves its GPUs during updates", convert.offload, absent=False
    ),
    "rollout.pipeline_stage_num": Row(
        MAPPED, "parts into which environments are divided", To("rollout.pipeline_stages")
    ),
}

ACTOR = {
    "actor.group_name": WORKERS,
    "actor.channel.name": WORKERS,
    "actor.channel.queue_name": WORKERS,
    "actor.channel.queue_size": WORKERS,
    "actor.training_backend": Row(NO_MEANING, "mesh lays arrays over GPUs", only=("fsdp",)),
    "actor.checkpoint_load_path": Row(
        MAPPED, "folder or hf:// address of the start policy", To("policy.checkpoint")
    ),
    "actor.checkpoint_save_path": Row(
        NO_MEANING, "checkpoints lie in the run's folder; --config.checkpoint.dir names another"
    ),
    "actor.micro_batch_size": Row(
        DIFFERENT,
        "times the actor's GPUs, because here it is of all. RLinf averages in every micro-batch, "
        "here the global batch is averaged; --config.algo.reference_micro_batch_mean=True averages "
        "as there",
        convert.micro_batch,
    ),
    "actor.global_batch_size": Row(
        MAPPED, "samples of an optimiser step, of all GPUs", To("algo.global_batch")
    ),
    "actor.seed": Row(
        DIFFERENT, "the seed, of other generators: no switch draws the same numbers", To("seed")
    ),
    "actor.enable_offload": Row(
        DIFFERENT,
        "the optimiser's state leaves the GPU during rollouts, RLinf's weights too; no switch",
        convert.offload,
        absent=False,
    ),
    "actor.model.model_name": Row(NO_MEANING, "the only policy here", only=("openvla_oft",)),
    "actor.model.value_type": Row(
        MAPPED, "level of the value head, if there is one", convert.value_head
    ),
    "actor.model.add_value_head": Row(MAPPED, "for PPO", convert.value_head, absent=False),
    "actor.model.action_dim": Row(NO_MEANING, "the policy's files tell", only=(7,)),
    "actor.model.num_action_chunks": Row(NO_MEANING, "the world model's chunk", only=(8,)),
    "actor.model.use_proprio": Row(NO_MEANING, "the policy sees frames only", only=(False,)),
    "actor.model.unnorm_key": Row(MAPPED, "action statistics", To("policy.unnorm_key")),
    "actor.model.center_crop": Row(NO_MEANING, "RLinf reads it nowhere: frames are not cropped"),
    "actor.model.precision": Row(
        DIFFERENT,
        "layers compute in it; RLinf stores the weights in it too, here they are float32; "
        "--config.policy.param_dtype=bfloat16 stores them as there",
        convert.precision,
    ),
    "actor.model.add_bias_linear": IN_THE_FOLDER,
    "actor.model.add_qkv_bias": IN_THE_FOLDER,
    "actor.model.vocab_size": IN_THE_FOLDER,
    "actor.model.hidden_size": IN_THE_FOLDER,
    "actor.model.policy_setup": Row(NO_MEANING, "of ManiSkill's robots; LIBERO reads it not"),
    "actor.model.image_size": Row(NO_MEANING, IN_THE_FOLDER.reason, only=([224, 224],)),
    "actor.model.is_lora": Row(MAPPED, "trains adapters only", convert.lora, absent=False),
    "actor.model.lora_rank": Row(MAPPED, "of the adapters, at a scale of 1", convert.lora),
    "actor.model.lora_path": Row(MAPPED, "adapters to begin with", convert.adapter),
    "actor.model.use_wrist_image": Row(NO_MEANING, "EVAC has one view", only=(False,)),
    "actor.model.attn_implementation": Row(
        NO_MEANING, "RLinf does not apply it; attention sees both ways there and here"
    ),
    "actor.model.low_cpu_mem_usage": LOADING,
    "actor.model.trust_remote_code": LOADING,
    "actor.model.gradient_checkpointing": Row(
        MAPPED, "True recomputes every layer in the backward pass", convert.remat, absent=False
    ),
    "actor.optim.lr": Row(MAPPED, "learning rate", To("optim.lr")),
    "actor.optim.value_lr": Row(MAPPED, "of the value head", To("optim.value_lr")),
    "actor.optim.adam_beta1": Row(MAPPED, "of Adam", convert.betas),
    "actor.optim.adam_beta2": Row(MAPPED, "of Adam", convert.betas),
    "actor.optim.adam_eps": Row(MAPPED, "of Adam", To("optim.eps")),
    "actor.optim.clip_grad": Row(MAPPED, "largest norm", To("optim.clip_grad")),
    "actor.optim.critic_warmup_steps": Row(
        MAPPED, "steps of the value head alone", convert.critic_warmup, absent=0
    ),
    "actor.optim.warmup_style": Row(
        MAPPED, "schedule, by iterations there too", convert.schedule, absent="constant"
    ),
    "actor.optim.lr_warmup_steps": Row(MAPPED, "iterations to the peak", convert.warmup),
    "actor.optim.lr_warmup_steps_ratio": Row(
        MAPPED, "the same as a share", To("optim.warmup_ratio")
    ),
    "actor.optim.total_training_steps": Row(
        MAPPED, "length of the schedule", To("optim.total_iterations")
    ),
    "actor.optim.min_lr_ratio": Row(
        NO_MEANING,
        "RLinf hands it to a cosine that takes no such argument; --config.optim.min_lr_rate",
        only=(0.0, 0),
    ),
    "actor.optim.num_cycles": Row(MAPPED, "of the cosine", To("optim.num_cycles")),
    "actor.tokenizer.tokenizer_type": IN_THE_FOLDER,
    "actor.tokenizer.tokenizer_model": Row(
        NO_MEANING, "the tokenizer is the policy folder's", convert.same_model
    ),
    "actor.tokenizer.use_fast": IN_THE_FOLDER,
    "actor.tokenizer.trust_remote_code": LOADING,
    "actor.tokenizer.padding_side": Row(NO_MEANING, "positions skip padding", only=("right",)),
    "actor.fsdp_config.strategy": Row(NO_MEANING, TORCH_FSDP.reason, only=("fsdp", "fsdp2")),
    "actor.fsdp_config.sharding_strategy": Row(MAPPED, "how arrays are laid out", convert.mesh),
    "actor.fsdp_config.fsdp_size": Row(MAPPED, "GPUs of a copy, for hybrid_shard", convert.mesh),
    "actor.fsdp_config.cpu_offload": Row(
        NO_MEANING, "for True: --config.cluster.offload", only=(False,)
    ),
    **{
        f"actor.fsdp_config.{name}": TORCH_FSDP
        for name in (
            *("offload_pin_memory", "reshard_after_forward", "enable_gradient_accumulation"),
            *("forward_prefetch", "limit_all_gathers", "backward_prefetch", "use_orig_params"),
            *("use_liger_kernel", "amp.precision", "amp.use_grad_scaler"),
        )
    },
    "actor.fsdp_config.amp.enabled": Row(NO_MEANING, "see actor.model.precision", only=(False,)),
    **{
        f"actor.fsdp_config.mixed_precision.{name}": Row(
            DIFFERENT,
            "layers compute in actor.model.precision; gradients are summed in float32 here; no "
            "switch",
        )
        for name in ("param_dtype", "reduce_dtype", "buffer_dtype")
    },
}

OTHER_MODELS = {
    "reward.use_reward_model": Row(NO_MEANING, ONE_CRITIC.reason, only=(False,)),
    "critic.use_critic_model": Row(NO_MEANING, ONE_CRITIC.reason, only=(False,)),
}

ROWS = CLUSTER | RUNNER | ALGORITHM | ENV | ROLLOUT | ACTOR | OTHER_MODELS
