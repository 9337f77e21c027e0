"""Times judgements of a vision-language model, and compares them with transformers' own call.

    python -m benchmarks.vlm_reward [--model DIR] [--episodes 8] [--frames 8] [--batches 1,4,8]

Without --model a tiny Qwen3-VL with random weights is made: it shows that the numbers are right and
what everything around the network costs, not what a pretrained model is worth or takes. Episodes
are random frames; every second one is shorter, so that prompts are padded. The direct call gives
one episode at a time, without padding, and the answer as part of the text. A judged frame is a
judgement: the last frame of a chunk, for which all frames shown are read. The last line is the
largest difference of the log-probabilities.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from evac_jax.config.vlm import BLANK, PROMPT, VlmConfig
from evac_jax.evac.lean_imports import ensure_torchvision
from evac_jax.sim.vlm import VlmJudge
from evac_jax.tools.command_line import KINDS

TASKS = ("pick up the red block", "put the blue block on the plate and go back")
MARKS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
IMAGE = MARKS[0] + MARKS[1] + MARKS[3]
# As Qwen's own template writes a user's turn with images and a text.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def tiny_tokenizer(texts: tuple[str, ...] = (PROMPT, *TASKS)):
    """Return a byte-level tokenizer whose words are those of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(MARKS),
    )


def write_tiny(folder: Path, seed: int = 0) -> str:
    """Write a Qwen3-VL with random weights and its processor; return the folder."""
    ensure_torchvision()
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer()
    start, image, video, end = tokenizer.convert_tokens_to_ids(list(MARKS))
    edges = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    parts = {"patch_size": 16, "size": edges}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**parts),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**parts),
        chat_template=TEMPLATE,
    )
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            # Large, so that frames and words change what it says.
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@torch.inference_mode()
def direct(model, processor, frames: list[np.ndarray], instruction: str) -> float:
    """Return the log-probability of the prompt's last token by transformers alone.

    Args:
        model, processor: of transformers.
        frames: uint8 [H W 3] each.
        instruction: the task.
    """
    text = PROMPT.replace(BLANK, instruction)
    content = [{"type": "image"}] * len(frames) + [{"type": "text", "text": text}]
    turn = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    turn = turn[: turn.index(text) + len(text)]
    inputs = processor(text=[turn], images=[frames], return_tensors="pt").to(model.device)
    logits = model(**inputs).logits[0, -2].float()
    return float(logits.log_softmax(-1)[inputs["input_ids"][0, -1]])


def random_episodes(count: int, frames: int, size: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Return episodes of random frames; every second one has half as many."""
    rng = np.random.default_rng(seed)
    lengths = [frames if number % 2 == 0 else max(1, frames // 2) for number in range(count)]
    return [list(rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)) for n in lengths]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder; '' = a tiny one is made")
    parser.add_argument("--episodes", type=KINDS["count"], default=8)
    parser.add_argument("--frames", type=KINDS["count"], default=8, help="shown of an episode")
    parser.add_argument("--size", type=KINDS["count"], default=64, help="pixels of a frame's side")
    parser.add_argument("--batches", default="1,4,8", help="episodes per call")
    parser.add_argument("--repeats", type=KINDS["count"], default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=KINDS["count"], default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_tiny(Path(folder) / "vlm")
        measure(args, model)


def measure(args: argparse.Namespace, folder: str) -> None:
    """Time every batch size, compare every number."""
    machine.show(machine.describe((args.threads,), ("transformers", "torchvision")))
    episodes = random_episodes(args.episodes, args.frames, args.size)
    texts = [TASKS[number % len(TASKS)] for number in range(args.episodes)]
    worst, expected = 0.0, None
    for batch in map(int, args.batches.split(",")):
        config = VlmConfig(batch=batch, dtype=args.dtype, frames=args.frames)
        judge = VlmJudge.load(folder, TASKS, config, args.device)
        if expected is None:
            pairs = zip(episodes, texts, strict=True)
            expected = torch.tensor([direct(judge.model, judge.processor, *pair) for pair in pairs])
        seconds = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            found = judge.log_probability(episodes, texts)
            seconds.append(time.perf_counter() - began)
        difference = float((found - expected).abs().max())
        worst = max(worst, difference)
        each = 1000 * float(np.median(seconds[1:])) / args.episodes
        print(
            f"batch {batch}: {each:.1f} ms per judged frame, largest difference {difference:.1e}",
            flush=True,
        )
    print(f"log-probabilities {expected.min():.3f} to {expected.max():.3f}")
    print(f"max_abs_diff={worst:.3g}")


if __name__ == "__main__":
    main()
