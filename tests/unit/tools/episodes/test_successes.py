import re
from types import SimpleNamespace

import numpy as np

from evac_jax.tools.episodes.successes import show_successes


def test_success_is_told_by_player_and_task(capsys):
    data = SimpleNamespace(
        instructions=("pick", "push"),
        sources=("expert", "idle", "random"),
        task=np.array([1, 1, 0]),
        source=np.array([0, 0, 2]),
        success_once=lambda: np.array([True, False, True]),
    )
    show_successes(data)
    expert, random = capsys.readouterr().out.strip().split("\n\n")
    assert expert.startswith("expert, by task")
    assert re.search(r"push +50\.0% .* n=2$", expert)
    assert random.startswith("random, by task")
    assert re.search(r"pick +100\.0% .* n=1$", random)
