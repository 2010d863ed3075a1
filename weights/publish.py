"""Adds trained weights to those that ship: in float16, with hash and model card.

    python weights/publish.py /tmp/weights/mask-rcnn.safetensors --name mask-rcnn-scenes --preset mask-rcnn-small \
        --role instances --data "8,000 x 4 generated images (contours)" --seed 0 --core \
        --figure "mask AP" 32.1 "pedestrians, 300 steps, 3 seeds" --limits "Finds objects without classes."

With --core the file belongs to the wheel of maskwright (src/maskwright/weights), otherwise to the distribution
maskwright-weights (weights/src/maskwright_weights). The same name again replaces the file; --figure and --limits alone
(without FILE) change the card.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskwright import __version__
from maskwright.checkpoints import list_checkpoints, load, save
from maskwright.checkpoints.shipping import (
    DISTRIBUTION,
    FORMAT,
    MANIFEST,
    SCENES,
    SHIPPED,
    Figure,
    Role,
    Shipped,
    parsed_entry,
)
from maskwright.data.contour_scenes import PREFIX
from maskwright.errors import CheckpointError, UsageError
from maskwright.files import write_bytes, write_json, write_text
from maskwright.systems import names, presets

ROOT = Path(__file__).parents[1]
CORE = ROOT / "src/maskwright/weights"
EXTRA = ROOT / "weights/src/maskwright_weights"
LARGEST = 25_000_000  # bytes of a file


def publish(
    source: Path, folder: Path, *, name: str, preset: str, role: Role, data: str, seed: int, command: str = "",
    date: str = "", code: str = "", figures: Sequence[Figure] = (), limits: str = "",
) -> Shipped:  # fmt: skip
    """Writes weights, their entry in the manifest and their model card into a folder.

    Args:
        source: A checkpoint of this library.
        folder: A folder with a manifest, or an empty one.
        name: The name for `load`.
        preset: The preset that was trained.
        role: What the weights are for.
        data: What they were trained on.
        seed: Seed of the training.
        command: The command that makes them again; default: the one in the file.
        date: Day of the training; default: that of the file.
        code: Commit; default: that of the repository.
        figures: Measured figures.
        limits: What they are not good for.

    Returns:
        The entry.
    """
    taken = {*presets(), *names(), SHIPPED, SCENES, *(entry.name for entry in list_checkpoints())}
    if name in taken or not name.isascii() or not name.replace("-", "").replace(".", "").isalnum():
        raise UsageError(f"{name}: must be a new name of letters, digits and hyphens")
    if preset not in presets():
        raise UsageError(f"{preset}: is not a preset")
    system = load(source)
    if presets()[preset] != system.name:
        raise UsageError(f"{preset}: is a preset of {presets()[preset]}, the file holds {system.name}")
    known = system.source or {}
    about: dict[str, Any] = {"name": name, "origin": known.get("origin", "maskwright"), "data": data,
                             "weights_licence": "Apache-2.0", "code_licence": "Apache-2.0", "commercial": "yes",
                             "command": command or known.get("command", "")}  # fmt: skip
    generated = all(each.startswith(PREFIX) for each in system.classes)
    if not generated and tuple(system.classes) != ("object",):
        raise UsageError(f"{source}: classes must be generated ones or 'object', got {', '.join(system.classes[:5])}")
    if generated or role == "instances":
        about["classless"] = True
    system.source = about
    system.half()
    for key, value in system.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UsageError(f"{source}: {key} does not fit into float16")
    target = folder / f"{name}.safetensors"
    with tempfile.TemporaryDirectory() as temporary:  # what is published already stays as it is if this one is refused
        first = Path(temporary, target.name)
        save(system, first)
        content = first.read_bytes()
    if len(content) > LARGEST:
        raise UsageError(f"{target}: has {len(content)} bytes, at most {LARGEST} are allowed")
    write_bytes(target, content, CheckpointError)
    made = datetime.date.fromtimestamp(source.stat().st_mtime).isoformat()
    entry = Shipped(
        name, target.name, hashlib.sha256(content).hexdigest(), len(content), system.name, preset, role, data,
        "Apache-2.0", about["command"], seed, date or made, __version__, code or commit(), tuple(figures), limits,
        folder,
    )  # fmt: skip
    register(entry)
    return entry


def register(entry: Shipped) -> None:
    """Writes an entry into the manifest of its folder, and its model card."""
    manifest = read(entry.folder)
    listed = manifest["weights"]
    place = next((k for k, value in enumerate(listed) if value["name"] == entry.name), len(listed))
    listed[place : place + 1] = [entry.to_dict()]
    write_json(entry.folder / MANIFEST, manifest, indent=2)
    write_text(entry.folder / f"{entry.name}.md", entry.card())


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder."""
    path = folder / MANIFEST
    return json.loads(path.read_text("utf-8")) if path.exists() else {"format": FORMAT, "weights": []}


def list_elsewhere(core: Path, extra: Path) -> None:
    """States in the manifest of the library what the second distribution holds."""
    manifest = read(core)
    names = [value["name"] for value in read(extra)["weights"]]
    manifest["elsewhere"] = {DISTRIBUTION: names} if names else {}
    write_json(core / MANIFEST, manifest, indent=2)


def commit() -> str:
    """The commit of the repository; "unknown" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--name", required=True)
    parser.add_argument("--preset")
    parser.add_argument("--role", choices=("instances", "prompts", "video"))
    parser.add_argument("--data", help="what the weights were trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default="")
    parser.add_argument("--date", default="")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--figure", nargs=3, action="append", default=[], metavar=("WHAT", "VALUE", "PROTOCOL"))
    parser.add_argument("--limits", default="")
    arguments = parser.parse_args()
    folder, other = (CORE, EXTRA) if arguments.core else (EXTRA, CORE)
    if any(value["name"] == arguments.name for value in read(other)["weights"]):
        parser.error(f"{other / MANIFEST} has {arguments.name} already")
    figures = tuple(Figure(what, float(value), protocol) for what, value, protocol in arguments.figure)
    if arguments.file is None:
        listed = {value["name"]: value for value in read(folder)["weights"]}
        if arguments.name not in listed:
            parser.error(f"{folder / MANIFEST} has no {arguments.name}")
        entry = parsed_entry(listed[arguments.name], folder, "")
        entry = replace(entry, figures=figures or entry.figures, limits=arguments.limits or entry.limits)
        register(entry)
    else:
        for required in ("preset", "role", "data"):
            if getattr(arguments, required) is None:
                parser.error(f"--{required} is required with a file")
        entry = publish(
            arguments.file, folder, name=arguments.name, preset=arguments.preset, role=arguments.role,
            data=arguments.data, seed=arguments.seed, command=arguments.command, date=arguments.date, figures=figures,
            limits=arguments.limits,
        )  # fmt: skip
    list_elsewhere(CORE, EXTRA)
    print(f"{entry.path}: {entry.bytes / 1e6:.1f} MB, sha256 {entry.sha256}")


if __name__ == "__main__":
    main()
