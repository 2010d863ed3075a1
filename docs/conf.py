"""Sphinx configuration of the documentation, which `make docs` builds."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect as sphinx_inspect

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
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are listed in their class, not a second time
napoleon_attr_annotations = False  # their types are in the signature

# Files of the repository's root that are pages of the site too: page name to file.
ROOT_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

# Packages of the API reference, with modules whose names the package itself does not export. Packages without `__all__`
# are described module by module.
PACKAGES: dict[str, tuple[str, ...]] = {
    "structures": ("resize",),
    "systems": (),
    "blocks": (),
    "ops": (),
    "data": ("formats",),
    "checkpoints": (),
    "evaluation": ("tasks", "measuring"),
    "training": (),
    "inference": (),
    "options": (),
    "errors": (),
}


def insert_root_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces stub pages by files of the repository's root, and links to those files by links to the pages."""
    text = source[0]
    if docname in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[docname]).read_text("utf-8").replace("](docs/", "](")
    for page, file in ROOT_PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)*{file}", f"](/{page}.md", text)
    source[0] = text


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def page_of(package: str) -> str:
    """The reStructuredText of the page of one package."""
    name = f"maskwright.{package}"
    module = importlib.import_module(name)
    inheritance = "   :show-inheritance:\n" if package == "errors" else ""
    parts = [heading(name, "="), f".. automodule:: {name}\n{inheritance}"]
    for each in PACKAGES[package]:
        parts.append(heading(f"{name}.{each}", "-") + f"\n.. automodule:: {name}.{each}\n")
    if package == "systems":
        from maskwright.systems import REGISTRY

        parts.append(heading("Systems of the registry", "-"))
        for target in REGISTRY.values():
            path, kind = target.split(":")
            parts.append(heading(kind, "~") + f"\n.. autoclass:: {name}.{path}.{kind}\n   :show-inheritance:\n")
    elif not hasattr(module, "__all__") and hasattr(module, "__path__"):
        for each in pkgutil.iter_modules(module.__path__):
            if not each.name.startswith("_"):
                parts.append(heading(each.name, "-") + f"\n.. automodule:: {name}.{each.name}\n")
    return "\n".join(parts)


def write_api_pages(app: Sphinx) -> None:
    """Writes one page for each package, unless it is there with the same text."""
    folder = Path(app.srcdir, "api", "generated")
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path, text = folder / f"{package}.rst", page_of(package)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def show_constructor(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, None] | None:
    """The signature of a system is that of its constructor; `System.__new__`, which checks options, takes anything."""
    from maskwright.systems import System

    if (
        what != "class"
        or not (isinstance(value, type) and issubclass(value, System))
        or value.__init__ is System.__init__
    ):
        return None
    shown = sphinx_inspect.signature(value.__init__, bound_method=True)
    return sphinx_inspect.stringify_signature(shown, unqualified_typehints=True), None


def skip_tuple_fields(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which are listed in the class."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    from sphinx.domains.python import PyObject

    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("source-read", insert_root_pages)
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-signature", show_constructor)
