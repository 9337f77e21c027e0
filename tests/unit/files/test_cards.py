import sys

import pytest

from evac_jax.errors import DataError
from evac_jax.files import cards


def test_card_tells_the_command_without_the_folders_of_this_machine(monkeypatch):
    arguments = ["--config.policy.checkpoint=/home/me/weights", "--out", "/home/me/new", "--lr=0.1"]
    monkeypatch.setattr(sys, "argv", ["/home/me/repo/launch.py", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    told = cards.card(steps=3)
    assert told["command"] == (
        "python launch.py --config.policy.checkpoint=weights --out new --lr=0.1"
    )
    assert told["steps"] == 3


@pytest.mark.parametrize("text", ["[]", '[["a", 1]]', "1", "{"])
def test_card_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(DataError, match=r"card\.json: expected a JSON object"):
        cards.read(tmp_path)


def test_card_of_bytes_that_are_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "card.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"card\.json: expected a JSON object .*can't decode"):
        cards.read(tmp_path)
