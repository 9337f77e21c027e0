"""Settings of a vision-language model that judges success; used by the trainer and by PyTorch."""

from dataclasses import dataclass
from typing import Literal

from policies.ranges import Count

BLANK = "{instruction}"
PROMPT = (
    "The above images show a robot manipulation trajectory that completes the following task: "
    f"{BLANK}. Decide whether the above statement is True or not. The answer is: True"
)


@dataclass(frozen=True)
class VlmConfig:
    """A vision-language model (VLM) that judges success (`reward.judge = "vlm"`).

    Attributes:
        prompt: what is said after the frames; {instruction} becomes the task. Its last word is the
            answer whose log-probability is read, and must be one token of the model.
        frames: most frames that are shown, at equal distances from the episode's first one to now;
            each chunk adds its last one.
        every: judge after every so many chunks of an episode.
        average: success is judged by the mean log-probability of this many latest judgements of an
            episode; there is no success before that many.
        batch: episodes per call of the model; bounds memory, changes results by rounding only.
        dtype: type in which the model computes.
    """

    prompt: str = PROMPT
    frames: Count = 8
    every: Count = 1
    average: Count = 3
    batch: Count = 8
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"

    @property
    def question_and_answer(self) -> tuple[str, str]:
        """The prompt without its last word, and that word."""
        question, _, answer = self.prompt.rpartition(" ")
        return question, answer

    def too_long_for(self, chunks: int) -> list[str]:
        """Return why no episode of so many chunks can succeed, [] if one can."""
        if chunks >= self.every * self.average:
            return []
        return [
            f"config.reward.vlm: a verdict needs every x average = {self.every} x {self.average} "
            f"chunks, an episode has {chunks}; lower one of them, or lengthen "
            "env.max_episode_steps"
        ]

    def problems(self) -> list[str]:
        """Return what is wrong with the prompt, one line each."""
        question, answer = self.question_and_answer
        if self.prompt.count(BLANK) == 1 and BLANK in question and answer.isalnum():
            return []
        return [
            f"prompt: expected {BLANK} once and the answer, a plain word, at the end, got "
            f"{self.prompt!r}"
        ]
