"""Fills Jinja2 templates: one HTML file that needs no network, no script and no other file.

Everything is escaped; `base.html` also forbids the browser to run or fetch anything.
"""

import base64
import io
from pathlib import Path

from PIL import Image

from evac_jax.files.atomic import replacing

SHARED = Path(__file__).parent  # base.html, charts.html


def write(path: Path, template: Path, **values: object) -> None:
    """Write a page that is whole or not there.

    Args:
        path: the HTML file.
        template: it may extend "base.html" and import "charts.html".
        values: what it names; a name that is missing is an error.
    """
    import jinja2  # only here: the trainer writes no page before its first evaluation

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template.name).render(values)
    with replacing(path) as temporary:
        # Names of files may hold bytes that are no text.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def embedded(picture: Image.Image | Path) -> str:
    """Return a picture, or a PNG file, as an address that holds all of it."""
    if isinstance(picture, Path):
        data = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
