import math

import pytest

from evac_jax.telemetry.pages import charts
from evac_jax.telemetry.pages.charts import Curve, Share


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 8, [0, 2, 4, 6, 8]),
        (2.91, 2.97, [2.92, 2.94, 2.96]),
        (0, 1.1e-6, [0, 5e-7, 1e-6]),
        (-3, 120, [0, 50, 100]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected, abs=0)


def test_points_lie_where_their_values_say():
    chart = charts.lines(
        "success", [Curve("a", [0, 4, 8], [0.0, 0.5, 1.0], dots=True)], shares=True
    )
    assert [(mark.x, mark.y) for mark in chart.dots] == [
        (chart.left, chart.bottom),
        ((chart.left + chart.right) / 2, (chart.top + chart.bottom) / 2),
        (chart.right, chart.top),
    ]
    assert [text for _, text in chart.x_ticks] == ["0", "2", "4", "6", "8"]
    assert chart.dots[1].note == "a, iteration 4: 50 %"


def test_whisker_or_band_shows_the_spread():
    spread = [(0.0, 1.0), (0.25, 0.75)]
    dots = charts.lines("", [Curve("a", [0, 1], [0.5, 0.5], spread, dots=True)], shares=True)
    assert dots.dots[0].whisker == (dots.left, dots.bottom, dots.left, dots.top)
    assert not dots.bands
    band = charts.lines("", [Curve("a", [0, 1], [0.5, 0.5], spread)], shares=True)
    ((path, _),) = band.bands
    assert path == "M52 8L428 47.5L428 126.5L52 166Z"
    assert not band.dots


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_line_is_broken_where_a_value_is_missing(gap):
    chart = charts.lines("", [Curve("a", range(5), [1.0, 2.0, gap, 2.0, 1.0])])
    assert len(chart.lines) == 2


def test_evaluations_are_joined_when_other_iterations_were_not_evaluated():
    chart = charts.lines(
        "", [Curve("train", range(9), range(9)), Curve("eval", [0, 8], [1.0, 2.0])]
    )
    assert len(chart.lines) == 2


def test_single_point_is_a_dot_and_a_flat_line_has_an_axis():
    chart = charts.lines("", [Curve("a", [3], [0.0])])
    assert len(chart.dots) == 1
    assert [text for _, text in chart.x_ticks] == ["3"]
    flat = charts.lines("", [Curve("a", [1, 2], [1e-6, 1e-6])])
    assert len(flat.y_ticks) > 1


def test_curves_beyond_the_colours_are_dashed():
    count = len(charts.COLORS) + 1
    chart = charts.lines("", [Curve(f"{n}", [0, 1], [n, n]) for n in range(count)])
    assert [name for name, _ in chart.legend][-1] == f"{count - 1} (dashed)"
    assert [dashes for *_, dashes in chart.lines] == ["none"] * (count - 1) + ["6 3"]
    assert chart.lines[0][1] == chart.lines[-1][1]


def test_ticks_have_the_digits_that_tell_them_apart():
    chart = charts.lines("", [Curve("a", [0, 1], [5.517, 5.5192])])
    assert [text for _, text in chart.y_ticks] == ["5.517", "5.5175", "5.518", "5.5185", "5.519"]
    chart = charts.lines("", [Curve("a", [0, 1], [0.0, 1.0])], shares=True)
    assert [text for _, text in chart.y_ticks][:2] == ["0 %", "20 %"]


def test_nothing_is_drawn_when_there_is_no_value():
    assert charts.lines("", [Curve("a", [1, 2], [None, math.nan])]) is None
    assert charts.lines("", []) is None
    assert charts.bars("", {}) is None


def test_bar_is_as_long_as_its_share_and_says_none_when_there_is_none():
    chart = charts.bars("", {"expert": {"agree": Share(0.5, (0.25, 0.75), "50 %"), "false": None}})
    half, none = chart.bars
    length = chart.right - chart.left
    assert half.x - chart.left == pytest.approx(length / 2)
    assert half.whisker[0] - chart.left == pytest.approx(length / 4)
    assert (none.whisker, none.note) == (None, "expert, false: none")
    assert [name for name, _ in chart.legend] == ["agree", "false"]
