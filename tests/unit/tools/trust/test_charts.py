import numpy as np

from evac_jax.tools.trust import charts
from evac_jax.tools.trust.replay import FALSE, MISSED, RIGHT, Film


def test_film_strips_show_each_verdict_when_there_is_one():
    frames = np.zeros((9, 1, 64, 64, 3), np.uint8)
    films = [Film(verdict, "expert", frames, frames) for verdict in (MISSED, FALSE, RIGHT, RIGHT)]
    titles = [title.split(":")[0] for title, _ in charts.strips([*films, films[-1]])]
    assert titles == ["right", "right", "false", "missed"]
