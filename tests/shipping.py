"""Tiny weights that are published and registered as those that ship, for tests."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import maskwright as mw
from tests.systems.tiny import tiny_options

ROOT = Path(__file__).parents[1]
CLASSES = tuple(f"contour-{number:03d}" for number in range(5))


def publisher() -> ModuleType:
    """The script `weights/publish.py`, which a clone has."""
    spec = importlib.util.spec_from_file_location("publish", ROOT / "weights/publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Distribution:
    """A distribution of weights in a temporary folder, which looks installed while the folder is on the path.

    Attributes:
        folder: The folder of the files.
    """

    def __init__(self, root: Path, name: str = "test-weights"):
        package = name.replace("-", "_")
        self.root, self.folder, self.made = root, root / package, root / "made"
        self.folder.mkdir(parents=True)
        self.made.mkdir()
        (self.folder / "__init__.py").write_text('"""Weights."""\n')
        about = root / f"{package}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[maskwright.weights]\n{name} = {package}\n")

    def add(self, name: str, system: mw.System, role: str = "instances", **more: Any) -> Any:
        """Publishes a system; the entry of the manifest."""
        source = self.made / f"{name}.safetensors"
        mw.save(system, source)
        about = {"preset": f"{system.name}-small", "data": "generated images", "seed": 0, "command": "make", **more}
        return publisher().publish(source, self.folder, name=name, role=role, **about)

    def install(self, patch: Any) -> None:
        """Puts the folder on the path until the test ends."""
        patch.syspath_prepend(str(self.root))
        importlib.invalidate_caches()


def mask_rcnn(**options: Any) -> mw.System:
    """A tiny Mask R-CNN with generated classes."""
    return mw.create("mask-rcnn-small", **{**tiny_options("mask-rcnn"), "classes": CLASSES, **options})


def sam() -> mw.System:
    """A tiny promptable system."""
    return mw.create("sam-small", **tiny_options("sam"))
