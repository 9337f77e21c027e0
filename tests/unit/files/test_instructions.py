import pytest

from evac_jax.errors import ConfigError
from evac_jax.files.instructions import numbers_in


def test_numbers_are_those_of_the_known_list_whatever_the_order():
    known = ("open", "close", "push", "close")
    assert numbers_in(known, ("push", "open", "close", "push"), "it").tolist() == [2, 0, 1, 2]
    assert numbers_in(known, (), "it").shape == (0,)


def test_every_unknown_text_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError) as error:
        numbers_in(("open the drawer", "push"), ("push", "open a drawer", "zzz"), "the card of X")
    assert "the card of X knows the instructions ['open the drawer', 'push']" in str(error.value)
    assert "'open a drawer'. Did you mean 'open the drawer'?" in str(error.value)
    assert "'zzz'." in str(error.value)
