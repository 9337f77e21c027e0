import math

import pytest

from evac_jax.errors import TrainingError
from evac_jax.tools.finite import check_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figure_that_is_not_finite_ends_a_training_with_step_value_and_advice(value):
    with pytest.raises(TrainingError) as told:
        check_finite(3, "Try a lower --lr", loss=0.5, norm_of_the_gradient=value)
    assert str(told.value) == f"step 3: the norm of the gradient is {value}. Try a lower --lr"


def test_finite_figures_are_no_reason_to_end():
    check_finite(1, "", loss=1e30, norm=0.0)
