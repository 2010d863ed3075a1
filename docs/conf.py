"""Sphinx configuration of the documentation, which `make docs` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from maskwright import __version__  # noqa: E402

project = "maskwright"
author = "The maskwright authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
default_role = "literal"  # single backticks in docstrings are code, as in Markdown

myst_heading_anchors = 4  # links to headings work as on a code-hosting site

html_theme = "furo"
html_title = f"maskwright {version}"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are listed in their class, not a second time

# Files of the repository's root that are pages of the site too: page name to file.
ROOT_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def insert_root_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces stub pages by files of the repository's root, and links to those files by links to the pages."""
    text = source[0]
    if docname in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[docname]).read_text("utf-8").replace("](docs/", "](")
    for page, file in ROOT_PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)*{file}", f"](/{page}.md", text)
    source[0] = text


def setup(app: Sphinx) -> None:
    app.connect("source-read", insert_root_pages)
