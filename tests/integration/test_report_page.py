"""The report in a real browser, on a narrow and on a wide screen."""

import io

import pytest
from PIL import Image

from evac_jax.telemetry.pages import run_report
from tests.integration import browser
from tests.unit.telemetry.pages.run_folders import add_films, make_run, write_lines

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not browser.PROGRAM, reason=f"no browser: none of {browser.NAMES} is installed"
    ),
]
EVIL = "<script>document.title = 'taken'; console.log('taken')</script>" + "W" * 300
# Of each chart: its size, how many marks it has, and how far one reaches out of the drawing.
CHARTS = """
[...document.querySelectorAll("figure.chart svg")].map(svg => {
  const frame = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("path, circle, rect")].map(m => m.getBoundingClientRect());
  const out = marks.map(m => Math.max(
    frame.left - m.left, m.right - frame.right, frame.top - m.top, m.bottom - frame.bottom));
  return {left: frame.left, top: frame.top, width: frame.width, height: frame.height,
          marks: marks.length, out: Math.max(...out)};
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three runs, whose texts are long and hold markup."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / f"seed{seed}", iterations=6, seed=seed) for seed in (0, 1)]
    runs.append(make_run(folder / "other", iterations=4, of=6, policy__checkpoint=EVIL))
    for run in runs:
        add_films(run, 4, {"imagined": [1, 2], "ground_truth": [2, 1]}, shared=True)
        write_lines(run / "warnings.jsonl", [{"time": "then", "level": "warning", "text": EVIL}])
    run_report.write(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def opened():
    with browser.Browser() as found:
        yield found


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1400, 900)], ids=["narrow", "wide"])
def test_report_can_be_read_on_every_screen(opened, page, width, height):
    assert opened.open(page, width, height) == []  # nothing on the console
    assert opened.value("document.title") == "3 runs"
    assert opened.value("document.scripts.length") == 0
    assert opened.value("document.documentElement.scrollWidth") <= width
    assert opened.value("performance.getEntriesByType('resource').length") == 0

    charts = opened.value(CHARTS)
    assert len(charts) >= 3
    for chart in charts:
        assert chart["width"] > 300
        assert chart["height"] > 100
        assert chart["marks"] > 0
        assert chart["out"] <= 1
    beside = charts[0]["top"] == charts[1]["top"] and charts[0]["left"] < charts[1]["left"]
    assert beside == (width > 800)

    widths = opened.value("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
    assert len(widths) == 8  # two pairs of both groups
    assert all(natural > 0 and shown > 100 for natural, shown in widths)


def test_colours_of_the_curves_are_seen_in_a_picture(opened, page):
    opened.open(page, 1400, 900)
    with Image.open(io.BytesIO(opened.picture())) as shot:
        colors = {color for _, color in shot.convert("RGB").getcolors(2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors
