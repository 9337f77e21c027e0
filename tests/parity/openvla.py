"""Golden vectors of OpenVLA-OFT: our policy, imported from the folder's checkpoint, against them.

Everything runs through the model's own `sample`, `evaluate` and `forward`, with scanned and
rematerialised layers. Sizes, seeds, numbers of images and chunk lengths come from the folder.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from policies.openvla_oft import action_tokens, hf_keys
from policies.openvla_oft.import_hf import load_policy
from policies.openvla_oft.layers import Maker, UnusedParam
from policies.openvla_oft.model import OpenVLAOFT, ValueHead
from policies.types import ObsBatch
from tests.parity import openvla_static
from tests.parity.action_codec import tokens_to_actions
from tests.parity.report import VectorResult, compare

# Tensors that the reference was given, not what it computed.
GIVEN = re.compile(
    r"inputs/raw_images|.*/params/.*|train/(surviving_)?action_tokens"
    r"|rollout/sampled_[^/]+/action_tokens"
)


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of all golden outputs: tensors, prompts, preprocessing, gradient norms, key lists."""
    names = {name for name in manifest["tensors"] if not GIVEN.fullmatch(name)}
    return names | openvla_static.vectors(folder, manifest) | set(_norm_names(folder))


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Compare every vector of the folder."""
    with jax.default_matmul_precision("highest"):
        yield from openvla_static.check(folder, manifest)
        # A reduced folder may lack the weights; vectors that need them then count as not covered.
        if "inputs/raw_images" in manifest["tensors"]:
            yield from Checker(folder, manifest).run()


def _norm_names(folder: Path) -> dict[str, float | None]:
    """{"grad_mixed/norm/<parameter>": golden norm} of all `*_grad_norms.json`."""
    return {
        f"{path.stem.removesuffix('_grad_norms')}/norm/{key}": norm
        for path in sorted(folder.glob("*_grad_norms.json"))
        for key, norm in json.loads(path.read_text()).items()
    }


@functools.partial(jax.jit, static_argnames=("graphdef", "method", "static"))
def _run(graphdef, state, pixels, method, static, *args):
    """Compile method(model, *args, **static) once per model structure, as the trainer does.

    Args:
        pixels: stands in for the model's preprocessing; None = the model preprocesses itself.
    """
    model = nnx.merge(graphdef, state)
    if pixels is not None:
        model.pixel_values = lambda images: pixels
    return method(model, *args, **dict(static))


def _sample_greedy(model: OpenVLAOFT, obs: ObsBatch):
    # The reference returns greedy log-probs without temperature.
    return model.sample(obs, jax.random.key(0), temperature=1.0, greedy=True)


def _evaluate(model: OpenVLAOFT, obs: ObsBatch, tokens, temperature, *, top_k, topk_order):
    return model.evaluate(obs, tokens, temperature=temperature, top_k=top_k, topk_order=topk_order)


def _collect(model: OpenVLAOFT, obs: ObsBatch) -> dict[str, jax.Array]:
    forward = model.forward(
        model.pixel_values(obs.images), obs.prompt_tokens, obs.prompt_mask, collect=True
    )
    heads = {
        "slots": forward.slots,
        "action_logits": model.action_logits(forward.slots),
        "logits": model.llama.logits(forward.slots),
    }
    if model.value_head is not None:
        heads["values"] = model.values(forward)
    return forward.stages | heads


def _loss_and_gradients(model: OpenVLAOFT, obs: ObsBatch, tokens, temperature, weights):
    """Weighted sum of mean log-prob, mean entropy and mean squared value, and its gradient."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    given = model.pixel_values(obs.images)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        model.pixel_values = lambda images: given
        evaluation = model.evaluate(obs, tokens, temperature=temperature)
        values = 0.0 if evaluation.values is None else jnp.mean(evaluation.values**2)
        terms = jnp.stack([jnp.mean(evaluation.log_probs), jnp.mean(evaluation.entropy), values])
        return weights @ terms

    return jax.value_and_grad(loss)(params)


def _top_k(name: str) -> int:
    """Read k from a vector's name: "topk50" -> 50, "topk_off" -> -1."""
    match = re.search(r"topk(\d+)", name)
    return int(match[1]) if match else -1


class Checker:
    """One folder: its tensors, its policy, and one method per group of vectors."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.settings = folder, manifest, manifest["settings"]
        self.golden = {}
        for file in sorted({t["file"] for t in manifest["tensors"].values()}):
            self.golden |= load_file(folder / file)
        self.tolerances = manifest["tolerances"]
        self.model, self.tokenizer = self._load()
        tokens, mask = self.tokenizer.encode(manifest["task_descriptions"])
        self.obs = ObsBatch(
            images=jnp.asarray(self.golden["inputs/raw_images"]),
            prompt_tokens=jnp.asarray(tokens),
            prompt_mask=jnp.asarray(mask),
        )
        self.pixels = self._given_pixels()
        config = self.model.config
        self.action_shape = (len(tokens), config.chunk, config.action_dim)

    def _load(self, **overrides) -> tuple[OpenVLAOFT, object]:
        settings = self.settings
        loaded = load_policy(
            self.folder / "checkpoint",
            unnorm_key=settings["unnorm_key"],
            **{
                "value_type": settings.get("value_type", "none"),
                "max_prompt_length": settings["max_prompt_length"],
                "chunk": settings["num_action_chunks"],
                "num_images": settings["num_images_in_input"],
                "action_dim": settings["action_dim"],
                "remat": "full",
            }
            | overrides,
        )
        return loaded.model, loaded.tokenizer

    def _given_pixels(self) -> jax.Array | None:
        """The reference's pixels, if a rounding tie makes one of ours differ by a level."""
        golden = self.golden["inputs/pixel_values"]
        ours = _channels_first(self.model.pixel_values(self.obs.images))
        if np.abs(ours - golden).max() <= 1e-6:
            return None
        b, channels, h, w = golden.shape
        return jnp.asarray(golden.reshape(b, channels // 6, 6, h, w).transpose(0, 1, 3, 4, 2))

    def _call(self, model: OpenVLAOFT, method: Callable, *args, **static):
        graphdef, state = nnx.split(model)
        return _run(graphdef, state, self.pixels, method, tuple(static.items()), *args)

    def _has(self, prefix: str) -> list[str]:
        return sorted(
            name
            for name in self.manifest["tensors"]
            if name.startswith(prefix) and not GIVEN.fullmatch(name)
        )

    def _compare(self, name: str, ours, kind: str = "logits_logprobs_entropy_values"):
        golden = self.golden[name]
        if np.issubdtype(golden.dtype, np.integer) or golden.dtype == bool:
            return compare(name, ours, golden, atol=0.0)
        tolerance = self.tolerances[kind]
        atol = tolerance["atol"]
        if isinstance(atol, str):  # "1e-4 * max|g| of the tensor"
            atol = float(atol.split("*")[0]) * float(np.abs(golden).max(initial=0.0))
        return compare(name, np.asarray(ours), golden, atol=atol, rtol=tolerance.get("rtol", 0.0))

    def run(self) -> Iterator[VectorResult]:
        """Yield the results of all groups that the folder holds."""
        yield from self._inputs()
        yield from self._forward()
        yield from self._rollout()
        yield from self._train()
        yield from self._gradients()
        yield from self._value_heads()
        yield from self._stop_variant()
        yield from self._lora()

    def _inputs(self) -> Iterator[VectorResult]:
        yield openvla_static.compare_pixels(
            "inputs/pixel_values",
            _channels_first(self.model.pixel_values(self.obs.images)),
            self.golden["inputs/pixel_values"],
            self.model.config,
            atol=self.tolerances["pixel_values"]["atol"],
        )

    @functools.cached_property
    def _stages(self) -> dict[str, np.ndarray]:
        return jax.device_get(self._call(self.model, _collect, self.obs))

    def _forward(self) -> Iterator[VectorResult]:
        stages = self._stages
        for name in self._has("stage/"):
            key = name.removeprefix("stage/")
            if key == "attention_allowed":
                valid = stages["mm_attention_mask"][:, None, None, :]
                ours = np.broadcast_to(valid, (*valid.shape[:2], valid.shape[-1], valid.shape[-1]))
            elif match := re.fullmatch(r"hidden_states_(\d+)", key):
                ours = stages["hidden_states"][int(match[1])]
            else:
                ours = stages[key]
            yield self._compare(name, ours, "default")
        logits, first = stages["logits"], self.model.config.first_action_token
        others = np.delete(logits, np.s_[first : first + self.model.config.num_bins], axis=-1)
        derived = {
            "rollout/action_logits": stages["action_logits"],
            "rollout/other_logits_max": others.max(-1),
            "rollout/logsumexp_full_vocab": jax.nn.logsumexp(logits, axis=-1),
            "rollout/value_input_hidden": stages["slots"][:, 0],
            # Without a value head the reference's rollout returns zeros.
            "rollout/values": stages.get("values", np.zeros((len(logits), 1))),
        }
        for name in self._has("rollout/"):
            if name in derived:
                yield self._compare(name, derived[name])
            elif name.endswith("/log_probs_256"):
                temperature = self.settings["temperature"]
                ours = action_tokens.log_distribution(
                    stages["action_logits"], temperature, _top_k(name)
                )
                yield self._compare(name, ours)

    def _evaluate(self, tokens_name: str, top_k=-1, order="mask_first", model=None):
        """Return {"logprobs": [B N], "entropy": [B N], "values": [B v] or None}."""
        tokens = jnp.asarray(self.golden[tokens_name]).reshape(self.action_shape)
        evaluation = self._call(
            model or self.model,
            _evaluate,
            self.obs,
            tokens,
            self.settings["temperature"],
            top_k=top_k,
            # The order means nothing when nothing is cut; the same name compiles once.
            topk_order=order if top_k > 0 else "mask_first",
        )
        flat = (len(tokens), -1)
        return {
            "logprobs": np.asarray(evaluation.log_probs).reshape(flat),
            "entropy": np.asarray(evaluation.entropy).reshape(flat),
            "values": evaluation.values,
        }

    def _actions(self, tokens: np.ndarray) -> np.ndarray:
        model = self.model
        return tokens_to_actions(
            tokens.reshape(self.action_shape),
            model.statistics,
            model.config.first_action_token,
            model.config.num_bins,
        )

    def _rollout(self) -> Iterator[VectorResult]:
        output = self._call(self.model, _sample_greedy, self.obs)
        yield self._greedy_tokens(np.asarray(output.tokens).reshape(len(output.tokens), -1))
        golden_tokens = self.golden["rollout/greedy_action_tokens"]
        yield self._compare(
            "rollout/greedy_logprobs", np.reshape(output.log_probs, golden_tokens.shape)
        )
        actions = self._actions(golden_tokens)
        yield self._compare("rollout/greedy_actions", actions, "actions")
        yield compare(
            "rollout/greedy_actions as sampled, float32",
            output.actions,
            self._actions(np.asarray(output.tokens)),
            atol=0.0,
            rtol=2.0**-23,
        )
        if "rollout/greedy_actions_libero" in self.golden:
            import torch

            from evac_jax.sim.actions import apply_gripper_rule

            ours = apply_gripper_rule(torch.from_numpy(actions), "libero").numpy()
            yield self._compare("rollout/greedy_actions_libero", ours, "actions")
        for name in self._has("rollout/sampled_"):
            prefix, leaf = name.rsplit("/", 1)
            tokens_name = f"{prefix}/action_tokens"
            if leaf == "actions":
                yield self._compare(name, self._actions(self.golden[tokens_name]), "actions")
                continue
            order = "reference" if leaf.startswith("train_") else "mask_first"
            results = self._evaluate(tokens_name, _top_k(name), order)
            yield self._compare(name, results[leaf.removeprefix("train_")])

    def _greedy_tokens(self, ours: np.ndarray) -> VectorResult:
        """Exact, except where the reference's own two logits lie within the logits' tolerance."""
        name = "rollout/greedy_action_tokens"
        golden, logits = self.golden[name], self.golden["rollout/action_logits"]
        first = self.model.config.first_action_token
        gap = np.take_along_axis(logits, golden[..., None] - first, -1) - np.take_along_axis(
            logits, ours[..., None] - first, -1
        )
        tie = (ours != golden) & (gap[..., 0] < 2 * self._logits_atol)
        result = compare(name, np.where(tie, golden, ours), golden, atol=0.0)
        return dataclasses.replace(result, note=f"{tie.sum()} ties" if tie.any() else "")

    @property
    def _logits_atol(self) -> float:
        return self.tolerances["logits_logprobs_entropy_values"]["atol"]

    def _train(self) -> Iterator[VectorResult]:
        chunks = self.action_shape[:2]
        for name in self._has("train/"):
            leaf = name.rsplit("/", 1)[1]
            surviving = leaf.startswith("surviving_")
            tokens_name = "train/surviving_action_tokens" if surviving else "train/action_tokens"
            results = self._evaluate(tokens_name, _top_k(name), "reference")
            quantity, _, level = leaf.removeprefix("surviving_").partition("_")
            ours = results[quantity]
            if level == "action_level":
                ours = ours.reshape(*chunks, -1).sum(-1)
            elif level == "chunk_level":
                ours = ours.sum(-1)
            yield self._compare(name, ours)

    def _gradients(self) -> Iterator[VectorResult]:
        # Of mean log-prob, mean entropy, mean squared value.
        losses = {"grad_mean_logprob": [1.0, 0.0, 0.0], "grad_mixed": [-1.0, -0.1, 0.5]}
        norms = _norm_names(self.folder)
        tokens = jnp.asarray(self.golden["train/action_tokens"]).reshape(self.action_shape)
        for group, weights in losses.items():
            names = self._has(f"{group}/")
            if not names:
                continue
            value, state = self._call(
                self.model,
                _loss_and_gradients,
                self.obs,
                tokens,
                self.settings["temperature"],
                jnp.array(weights),
            )
            gradients = self._as_hf(state)
            for name in names:
                yield self._gradient(name, group, value, gradients)
            for name, golden in norms.items():
                if name.startswith(f"{group}/norm/"):
                    yield self._norm(name, name.removeprefix(f"{group}/norm/"), golden, gradients)

    def _norm(self, name, key, golden, gradients) -> VectorResult:
        """Norm of a parameter's gradient; null in the reference = not reached by the loss."""
        if match := re.fullmatch(r"lm_head rows outside (\d+)\.\.(\d+)", key):
            rows = gradients["language_model.lm_head.weight"]
            gradient = np.delete(rows, np.s_[int(match[1]) : int(match[2]) + 1], axis=0)
        elif key in gradients:
            gradient = gradients[key]
        elif key in self._unused:
            gradient = np.zeros(1)
        else:
            return VectorResult(name, np.inf, 0.0, False, "no such parameter")
        ours = np.linalg.norm(gradient.astype(np.float64))
        rtol = self.tolerances["gradients"]["rtol"]
        return compare(name, ours, np.float64(golden or 0.0), atol=1e-7, rtol=rtol)

    @functools.cached_property
    def _unused(self) -> set[str]:
        """Checkpoint keys that the forward pass does not read, so that they have no gradient."""
        keys = set()
        for path, variable in hf_keys.parameters(self.model):
            if isinstance(variable, UnusedParam):
                keys.update(hf_keys.source_of(path, self.model.config).keys)
        return keys

    def _as_hf(self, state) -> dict[str, np.ndarray]:
        tensors = {}
        for path, variable in hf_keys.parameters(state):
            source = hf_keys.source_of(path, self.model.config)
            array = np.asarray(variable[...])
            for index, key in enumerate(source.keys):
                tensors[key] = source.to_hf(array[index] if source.stacked else array)
        return tensors

    def _gradient(self, name, group, value, gradients) -> VectorResult:
        key = name.removeprefix(f"{group}/grad/")
        row_ids = np.unique(np.asarray(self.obs.prompt_tokens))
        if name == f"{group}/loss":
            return self._compare(name, value)
        if key == "embed_tokens_row_ids":
            return self._compare(name, row_ids)
        if key == "embed_tokens_rows":
            ours = gradients["language_model.model.embed_tokens.weight"][row_ids]
        elif match := re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key):
            ours = gradients[match[1]][int(match[2]) : int(match[3])]
        else:
            ours = gradients[key]
        return self._compare(name, ours, "gradients")

    def _value_heads(self) -> Iterator[VectorResult]:
        """Value heads whose weights are not in the checkpoint: "value_head_<type>/"."""
        for name in self._has("value_head_"):
            group = name.split("/")[0]
            config = dataclasses.replace(
                self.model.config, value_type=group.removeprefix("value_head_")
            )
            head = ValueHead(config, Maker.create(config, None))
            for path, variable in hf_keys.parameters(head):
                source = hf_keys.source_of(f"value_head/{path}", config)
                key = source.keys[0].removeprefix("value_head.")
                tensor = self.golden[f"{group}/params/{key}"]
                variable[...] = jnp.asarray(source.from_hf(tensor))
            yield self._compare(name, head(self._stages["slots"][:, 0]))

    def _stop_variant(self) -> Iterator[VectorResult]:
        names = self._has("variant_stop/")
        if not names:
            return
        model, _ = self._load(keep_stop_token=True)
        stages = jax.device_get(self._call(model, _collect, self.obs))
        results = self._evaluate("train/action_tokens", model=model)
        # The reference counts the value's place from the end, pads included.
        place = -(model.config.num_action_tokens + 1)
        hidden = stages["last_hidden_states"][:, place]
        plain_ids, plain_mask = _left_padded(self.obs, self.tokenizer.pad_id)
        ours = results | {
            "input_ids": plain_ids,
            "attention_mask": plain_mask,
            "action_logits": stages["action_logits"],
            "values": None if model.value_head is None else model.value_head(hidden),
        }
        for name in names:
            key = name.removeprefix("variant_stop/")
            if key in ours:
                yield self._compare(name, ours[key])
            else:
                yield self._compare(name, stages[key], "default")

    def _lora(self) -> Iterator[VectorResult]:
        names = self._has("lora/")
        if not names:
            return
        model, _ = self._load(lora_adapter=self.folder / "lora_adapter")
        results = self._evaluate("train/action_tokens", model=model)
        merged = self._as_hf(nnx.state(model))
        for name in names:
            key = name.removeprefix("lora/")
            if key.startswith("merged/"):
                yield self._compare(name, merged[key.removeprefix("merged/")], "default")
            else:
                yield self._compare(name, results[key])


def _channels_first(pixels) -> np.ndarray:
    """[B V H W 6] -> [B 6V H W]."""
    pixels = np.moveaxis(np.asarray(pixels), -1, 2)
    return pixels.reshape(pixels.shape[0], -1, *pixels.shape[3:])


def _left_padded(obs: ObsBatch, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Move BOS from column 0 to directly before the words."""
    tokens, mask = np.array(obs.prompt_tokens), np.array(obs.prompt_mask)
    for row, valid in zip(tokens, mask, strict=True):
        pads = int((~valid).sum())
        if pads:
            bos = row[0]
            row[0], row[pads] = pad_id, bos
            valid[0], valid[pads] = False, True
    return tokens, mask
