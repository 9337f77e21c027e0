"""Rows of RLinf's keys below env.train.world_model_cfg: the world model's file and its sizes.

Source: env/train/libero_spatial_evac.yaml of RLinf at commit c9f1d8471.
"""

from typing import Any

from evac_jax.tools.hub import rlinf_values as convert
from evac_jax.tools.hub.rlinf_row import MAPPED, NO_MEANING, Row

_SIZE = (
    "fixed by the weights; the imported folder's config.json has it (other sizes: "
    "tools.world_model.import_evac --config)"
)
_TRAINING = "of training the world model: tools.world_model.train has options of its own"

# Class names, sizes and the kind of diffusion: these values are what is implemented.
FIXED: dict[str, Any] = {
    "auto_padzero_input_block": False,
    "auto_padrand_input_block": False,
    "target": "lvdm.models.ddpm3d.ACWMLatentDiffusion",
    "params.rescale_betas_zero_snr": True,
    "params.parameterization": "v",
    "params.linear_start": 0.00085,
    "params.linear_end": 0.012,
    "params.num_timesteps_cond": 1,
    "params.timesteps": 1000,
    "params.first_stage_key": ["video", "traj"],
    "params.cond_stage_key": "delta_action",
    "params.conditioning_key": "hybrid",
    "params.image_size": [32, 32],
    "params.channels": 4,
    "params.scale_by_std": False,
    "params.scale_factor": 0.18215,
    "params.use_ema": False,
    "params.use_dynamic_rescale": True,
    "params.base_scale": 0.7,
    "params.fps_condition_type": "fps",
    "params.perframe_ae": True,
    "params.chunk": 8,
    "params.n_view": 1,
    "params.use_raymap_dir": True,
    "params.use_raymap_origin": True,
    "params.use_cat_mask": True,
    "params.sparse_memory": True,
    "params.ddim_num_chunk": 1,
    "params.unet_config.target": "lvdm.modules.networks.openaimodel3dcausal.UNetModel",
    "params.unet_config.params.in_channels": 19,
    "params.unet_config.params.out_channels": 4,
    "params.unet_config.params.model_channels": 320,
    "params.unet_config.params.attention_resolutions": [4, 2, 1],
    "params.unet_config.params.num_res_blocks": 2,
    "params.unet_config.params.channel_mult": [1, 2, 4, 4],
    "params.unet_config.params.num_head_channels": 64,
    "params.unet_config.params.transformer_depth": 1,
    "params.unet_config.params.context_dim": 1024,
    "params.unet_config.params.use_linear": True,
    "params.unet_config.params.temporal_conv": True,
    "params.unet_config.params.temporal_attention": True,
    "params.unet_config.params.temporal_selfatt_only": True,
    "params.unet_config.params.temporal_batch_size": -1,
    "params.unet_config.params.use_causal_attention": False,
    "params.unet_config.params.temporal_length": 12,
    "params.unet_config.params.addition_attention": True,
    "params.unet_config.params.image_cross_attention": True,
    "params.unet_config.params.traj_cross_attention": True,
    "params.unet_config.params.default_fs": 30,
    "params.unet_config.params.fs_condition": True,
    "params.unet_config.params.resblock_updown": False,
    "params.unet_config.params.chunk": 8,
    "params.unet_config.params.n_view": 1,
    "params.unet_config.params.causal_temp_conv": True,
    "params.unet_config.params.use_block_idx": True,
    "params.unet_config.params.use_domain_embedding": True,
    "params.unet_config.params.adapt_to_mvt": True,
    "params.first_stage_config.target": "lvdm.models.autoencoder.AutoencoderKL",
    "params.first_stage_config.params.embed_dim": 4,
    "params.first_stage_config.params.ddconfig.double_z": True,
    "params.first_stage_config.params.ddconfig.z_channels": 4,
    "params.first_stage_config.params.ddconfig.resolution": 256,
    "params.first_stage_config.params.ddconfig.in_channels": 3,
    "params.first_stage_config.params.ddconfig.out_ch": 3,
    "params.first_stage_config.params.ddconfig.ch": 128,
    "params.first_stage_config.params.ddconfig.ch_mult": [1, 2, 4, 4],
    "params.first_stage_config.params.ddconfig.num_res_blocks": 2,
    "params.first_stage_config.params.ddconfig.attn_resolutions": [],
    "params.first_stage_config.params.ddconfig.dropout": 0.0,
    "params.cond_stage_config.target": "lvdm.modules.encoders.resampler.Resampler",
    "params.cond_stage_config.params.dim": 1024,
    "params.cond_stage_config.params.depth": 4,
    "params.cond_stage_config.params.dim_head": 64,
    "params.cond_stage_config.params.heads": 12,
    "params.cond_stage_config.params.num_queries": 16,
    "params.cond_stage_config.params.embedding_dim": 14,
    "params.cond_stage_config.params.output_dim": 1024,
    "params.cond_stage_config.params.ff_mult": 4,
    "params.img_cond_stage_config.target": (
        "lvdm.modules.encoders.condition.FrozenOpenCLIPImageEmbedderV2"
    ),
    "params.image_proj_stage_config.target": "lvdm.modules.encoders.resampler.Resampler",
    "params.image_proj_stage_config.params.dim": 1024,
    "params.image_proj_stage_config.params.depth": 4,
    "params.image_proj_stage_config.params.dim_head": 64,
    "params.image_proj_stage_config.params.heads": 12,
    "params.image_proj_stage_config.params.num_queries": 16,
    "params.image_proj_stage_config.params.embedding_dim": 1280,
    "params.image_proj_stage_config.params.output_dim": 1024,
    "params.image_proj_stage_config.params.ff_mult": 4,
    "params.image_proj_stage_config.params.video_length": 8,
}
TRAINING = (
    *("base_learning_rate", "scale_lr", "params.log_every_t", "params.cond_stage_trainable"),
    *("params.image_proj_model_trainable", "params.traj_prompt_proj_model_trainable"),
    *("params.uncond_prob", "params.uncond_type", "params.rand_cond_frame"),
    *("params.unet_config.params.dropout", "params.unet_config.params.use_checkpoint"),
    *("params.first_stage_config.params.monitor", "params.img_cond_stage_config.params.freeze"),
)
OTHERS = {
    "pretrained_checkpoint": Row(
        MAPPED,
        "import it: tools.world_model.import_evac --weights FILE --out .., or tools.hub.fetch",
        convert.imported("world_model.checkpoint", "world_model"),
    ),
    "params.ae_batch_size": Row(NO_MEANING, "frames that RLinf encodes at once: memory only"),
    "params.views_name_wo_imgcat": Row(NO_MEANING, "views of a model with several"),
    "params.img_cond_stage_config.params.abspath": Row(
        NO_MEANING,
        "the checkpoint holds the image tower; if not, tools.world_model.import_evac --open_clip",
    ),
}
WORLD_MODEL = {
    f"env.train.world_model_cfg.{name}": row
    for name, row in (
        *((name, Row(NO_MEANING, _SIZE, only=(value,))) for name, value in FIXED.items()),
        *((name, Row(NO_MEANING, _TRAINING)) for name in TRAINING),
        *OTHERS.items(),
    )
}
