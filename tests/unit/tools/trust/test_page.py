import numpy as np
import pytest

from evac_jax.tools.trust import page, scores
from evac_jax.tools.trust.replay import FALSE, MISSED, RIGHT, Film


def _overall(agreement: tuple[int, int], false: tuple[int, int]) -> dict:
    return {
        "agreement": scores.share(*agreement),
        "false_success": scores.share(*false),
    }


@pytest.mark.parametrize(
    ("agreement", "false", "expected"),
    [
        ((500, 512), (5, 200), "good"),
        ((450, 512), (25, 200), "unsure"),
        ((500, 512), (40, 200), "bad"),
        ((400, 512), (5, 200), "bad"),
        ((500, 512), (0, 0), "bad"),
    ],
)
def test_words_follow_the_figures_when_they_are_judged(agreement, false, expected):
    assert page.judge(_overall(agreement, false))[0] == expected


def test_film_strips_show_each_verdict_when_there_is_one():
    frames = np.zeros((9, 1, 64, 64, 3), np.uint8)
    films = [Film(verdict, "expert", frames, frames) for verdict in (MISSED, FALSE, RIGHT, RIGHT)]
    titles = [title.split(":")[0] for title, _ in page.strips([*films, films[-1]])]
    assert titles == ["right", "right", "false", "missed"]
