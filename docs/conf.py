"""Sphinx's settings: `make docs` builds the pages of this repository as a site.

The pages stay plain Markdown that a code host shows as it is: the navigation stands here, and is
added to the start page only while the site is built.
"""

from pathlib import Path

# Caption -> pages in the order of the sidebar; "title <page>" where the page's own is not meant.
NAVIGATION = {
    "Start": ("docs/install",),
    "Tutorials: who are you?": (
        "Newcomer <docs/tutorials/first_run>",
        "Lab with a checkpoint <docs/tutorials/checkpoint>",
        "World-model builder <docs/own_simulator>",
        "Algorithm author <docs/tutorials/algorithm>",
        "Robot owner <docs/tutorials/robot>",
    ),
    "Guides": (
        *("docs/presets", "docs/watch", "docs/it_does_not_learn", "docs/reward_hacking"),
        *("docs/episodes", "docs/bring_your_policy", "docs/bring_your_world_model"),
        *("docs/from_rlinf", "docs/libero", "docs/lora", "docs/plug_in", "docs/serve"),
        *("docs/cluster", "docs/checkpoints", "docs/miniature"),
        "docs/libero_small",
    ),
    "Reference": ("docs/config", "docs/metrics", "docs/memory", "docs/architecture"),
    "Reliability": ("docs/reliability",),
    "Performance": (
        *("docs/performance", "docs/policy_speed", "docs/world_model_speed", "docs/scaling"),
        *("docs/full_size", "docs/tried"),
    ),
    "Project": ("docs/comparison", "CONTRIBUTING", "CHANGELOG", "中文 <README.zh>"),
}

project = "evac_jax"
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/tutorials/*.md"]
exclude_patterns = [".*", "runs", "data", "site"]  # not even searched
extensions = ["myst_parser"]
myst_heading_anchors = 6  # links to headings, with the names that GitHub gives them
highlight_language = "text"  # of blocks that name none
html_theme = "furo"
html_title = "evac_jax"
html_show_copyright = False
html_copy_source = False


def _add_navigation(app, page: str, source: list[str]) -> None:
    if page != root_doc:
        return
    for caption, pages in NAVIGATION.items():
        lines = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def _add_index(app, error: Exception | None) -> None:
    if error is None:
        redirect = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(redirect)


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_index)
