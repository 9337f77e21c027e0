import re

import jinja2
import pytest
from PIL import Image

from evac_jax.telemetry.pages import page
from evac_jax.telemetry.pages.charts import Curve, lines

EVIL = '"><script>alert(1)</script>'


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "own.html"
    path.write_text(
        '{% extends "base.html" %}{% import "charts.html" as charts %}'
        '{% block body %}<p class="{{ text }}">{{ text }}</p>{{ charts.draw(chart) }}{% endblock %}'
    )
    return path


def _chart(name="a"):
    return lines(name, [Curve(name, [0, 1], [1.0, 2.0], dots=True)])


def test_everything_is_escaped_when_names_hold_markup(tmp_path, template):
    page.write(tmp_path / "out.html", template, title=EVIL, text=EVIL, chart=_chart(EVIL))
    text = (tmp_path / "out.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 5  # title, attribute, text, chart and its dots


def test_page_fetches_nothing(tmp_path, template):
    picture = page.embedded(Image.new("RGB", (2, 2)))
    page.write(tmp_path / "out.html", template, title="t", text=picture, chart=_chart())
    text = (tmp_path / "out.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert picture.startswith("data:image/png;base64,iVBOR")


def test_name_that_is_no_text_is_written_when_a_file_has_one(tmp_path, template):
    name = b"run-\xff".decode(errors="surrogateescape")
    page.write(tmp_path / "out.html", template, title="t", text=name, chart=None)
    assert r"run-\udcff" in (tmp_path / "out.html").read_text()


def test_page_that_was_there_stays_when_a_value_is_missing(tmp_path, template):
    (tmp_path / "out.html").write_text("before")
    with pytest.raises(jinja2.UndefinedError, match="text"):
        page.write(tmp_path / "out.html", template, title="t", chart=None)
    assert (tmp_path / "out.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "own.html"]
