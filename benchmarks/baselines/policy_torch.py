"""OpenVLA-OFT in plain PyTorch: timm's towers and the Llama of transformers.

Modules have the names of the checkpoint's tensors, so all weights of our policy can be loaded. The
module does the work of the public references: it computes every block of the towers, although the
output of the last one is discarded, and logits of the whole vocabulary at every position, from
which it takes the 256 bins. (In the references the gradient of the entropy is NaN. Here the entropy
is computed but not differentiated.)
"""

from collections.abc import Mapping

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig


def make_tower(config: OpenVLAOFTConfig, tower: VisionTowerConfig) -> VisionTransformer:
    """Return one ViT in timm's own class."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=tower.width,
        depth=tower.depth,
        num_heads=tower.heads,
        # The half keeps int(width * ratio) from falling below a width that is whole.
        mlp_ratio=(tower.mlp_width + 0.5) / tower.width,
        class_token=tower.class_token,
        reg_tokens=tower.register_tokens,
        no_embed_class=True,
        init_values=1.0 if tower.layer_scale else None,
        global_pool="map" if tower.attention_pool else ("token" if tower.class_token else "avg"),
        fc_norm=False,
        num_classes=0,
    )


class TwoTowers(nn.Module):
    """Both towers on every image, up to their second-to-last block."""

    def __init__(self, config: OpenVLAOFTConfig):
        super().__init__()
        self.towers = (config.dinov2, config.siglip)
        self.featurizer = make_tower(config, config.dinov2)
        self.fused_featurizer = make_tower(config, config.siglip)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B H W 3] -> features [B P F]."""
        scaled = images.permute(0, 3, 1, 2).float() / 255
        features = []
        for tower, net in zip(self.towers, (self.featurizer, self.fused_featurizer), strict=True):
            mean, std = (torch.tensor(x)[:, None, None] for x in (tower.mean, tower.std))
            (patches,) = net.get_intermediate_layers((scaled - mean) / std, n={tower.depth - 2})
            features.append(patches)
        return torch.cat(features, dim=-1)


class Projector(nn.Module):
    """Three linear layers with exact GELU between."""

    def __init__(self, config: OpenVLAOFTConfig):
        super().__init__()
        fused = config.dinov2.width + config.siglip.width
        self.fc1 = nn.Linear(fused, 4 * fused)
        self.fc2 = nn.Linear(4 * fused, config.hidden_size)
        self.fc3 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B P F] -> [B P D]."""
        gelu = nn.functional.gelu
        return self.fc3(gelu(self.fc2(gelu(self.fc1(x)))))


class ValueHead(nn.Module):
    """Hidden state to values."""

    def __init__(self, config: OpenVLAOFTConfig):
        super().__init__()
        first, second = config.value_widths
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, first),
            nn.GELU(),
            nn.Linear(first, second),
            nn.GELU(),
            nn.Linear(second, config.num_values, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B D] -> [B v]."""
        return self.mlp(x)


class TorchOpenVLAOFT(nn.Module):
    """Prompt layout `BOS, patches, pads, words, action slots`, one image, a value head.

    Args:
        config: sizes; `num_images` 1 and no `keep_stop_token`.
        weights: NumPy arrays by the checkpoint's names.
    """

    def __init__(self, config: OpenVLAOFTConfig, weights: Mapping[str, np.ndarray]):
        super().__init__()
        self.config = config
        self.vision_backbone = TwoTowers(config)
        self.projector = Projector(config)
        self.language_model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                vocab_size=config.vocab_size,
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        self.value_head = ValueHead(config)
        # timm's name. Checkpoints use another one, because transformers used to rename "gamma".
        tensors = {
            name.replace(".scale_factor", ".gamma"): torch.tensor(array)
            for name, array in weights.items()
        }
        self.load_state_dict(tensors, strict=True)

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the action slots over the whole vocabulary [B N vocab], values [B v].

        Args:
            images: uint8 [B H W 3] of the towers' size.
            tokens: int64 [B L].
            mask: bool [B L], False on pads.
        """
        patches = self.projector(self.vision_backbone(images))
        count = self.config.num_action_tokens
        words = self.language_model.get_input_embeddings()(tokens)
        slots = words.new_zeros(len(words), count, words.shape[-1])
        x = torch.cat([words[:, :1], patches, words[:, 1:], slots], dim=1)
        always = [mask.new_ones(part.shape[:2]) for part in (patches, slots)]
        valid = torch.cat([mask[:, :1], always[0], mask[:, 1:], always[1]], dim=1)
        # An additive mask, the same for every query: bidirectional among valid keys.
        bias = torch.where(valid, 0.0, torch.finfo(x.dtype).min)[:, None, None, :]
        hidden = self.language_model.model(
            inputs_embeds=x,
            attention_mask=bias.expand(-1, 1, x.shape[1], -1),
            position_ids=valid.long().cumsum(-1) - 1,
        ).last_hidden_state
        logits = self.language_model.lm_head(hidden)
        return logits[:, -count - 1 : -1].float(), self.value_head(hidden[:, -count - 1])

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return log-probabilities over the vocabulary, -inf beyond the action tokens."""
        first, stop = self.config.first_action_token, self.config.tokenizer_vocab
        masked = torch.full_like(logits, -torch.inf)
        masked[..., first:stop] = logits[..., first:stop]
        return torch.log_softmax(masked / temperature, dim=-1)

    @torch.no_grad()
    def sample(
        self, images: Tensor, tokens: Tensor, mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return drawn token ids [B N], their log-probs [B N] and values [B v]."""
        logits, values = self(images, tokens, mask)
        log_dist = self.log_distribution(logits, temperature)
        drawn = torch.multinomial(log_dist.exp().flatten(0, 1), 1).view(log_dist.shape[:2])
        return drawn, log_dist.gather(-1, drawn[..., None])[..., 0], values

    def evaluate(
        self, images: Tensor, tokens: Tensor, mask: Tensor, actions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs of given token ids [B N], entropies [B N] (no gradient), values."""
        logits, values = self(images, tokens, mask)
        log_dist = self.log_distribution(logits, temperature)
        with torch.no_grad():
            probs = log_dist.exp()
            entropy = -torch.where(probs > 0, probs * log_dist, 0.0).sum(-1)
        return log_dist.gather(-1, actions[..., None])[..., 0], entropy, values
