"""The documents: links, commands, options, names and generated tables in them are correct."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import maskwright
from maskwright import cli
from maskwright.blocks.backbones import Backbone, Use
from maskwright.checkpoints import list_checkpoints, shipped
from maskwright.checkpoints.shipping import elsewhere
from maskwright.data import Scenes, formats, open_dataset
from maskwright.options import nested, resolve
from maskwright.systems import names, presets, system_class

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), ROOT / "weights/README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
)


def blocks(path: Path, language: str = r"\w*") -> list[str]:
    """The contents of the fenced code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The words of each maskwright command in a document's code blocks."""
    text = "".join(blocks(path)).replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\$ )?(?:\.venv/bin/)?maskwright (.+)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("--help")]


@functools.cache
def help_of(verb: str) -> str:
    """The help text of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    return out.getvalue()


@pytest.mark.fast
@every_document
def test_every_link_to_a_file_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} points to {target}"


@pytest.mark.fast
@every_document
def test_every_command_exists_with_its_options(path):
    for verb, *rest in commands(path):
        assert verb in cli.VERBS or verb.isupper(), f"{path.name}: maskwright {verb}"
        for option in (word.split("=")[0] for word in rest if re.match("--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(verb)), f"{path.name}: {verb} has no {option}"


@pytest.mark.fast
@every_document
def test_every_system_and_published_checkpoint_in_a_command_exists(path):
    catalogue = {"shipped", *elsewhere(), *(entry.name for entry in (*list_checkpoints(), *shipped()))}
    known = {*names(), *presets(), *catalogue}
    for verb, *rest in commands(path):
        if verb == "train" and not rest[0].startswith("-"):
            assert rest[0] in known or not re.fullmatch("[a-z0-9-]+", rest[0]), f"{path.name}: train {rest[0]}"
        for option, value in itertools.pairwise(rest):
            if option in ("--weights", "-w") and re.fullmatch("[a-z0-9-]+", value):
                assert value in catalogue, f"{path.name}: {value} is not in the catalogue"


@pytest.mark.fast
@every_document
def test_every_network_option_in_a_command_exists_and_takes_the_value(path):
    for verb, *rest in commands(path):
        if verb != "train" or rest[0] not in {*names(), *presets()}:
            continue
        pairs, given = [], False
        for word in rest[1:]:
            given = word == "--option" or (given and not word.startswith("-"))
            if given and word != "--option":
                key, _, text = word.partition("=")
                with contextlib.suppress(ValueError):
                    text = json.loads(text)
                pairs.append((key, text))
        kind = system_class(presets().get(rest[0], rest[0]))
        base = kind.presets[rest[0]].options if rest[0] in kind.presets else {}
        resolve(kind.__init__, kind.with_options(base, nested(pairs)), f"{path.name}: {rest[0]}")


@pytest.mark.fast
@every_document
def test_python_examples_parse_and_use_existing_names(path):
    for code in blocks(path, "python"):
        ast.parse(textwrap.dedent(code))
    for name in re.findall(r"\bmw\.(\w+)", path.read_text("utf-8")):
        assert name in maskwright.__all__ or hasattr(maskwright, name), f"{path.name}: mw.{name}"


@pytest.mark.fast
def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in [*DOCUMENTS, ROOT / ".ci/run", *(ROOT / ".github").rglob("*.yml")]:
        for target in re.findall(r"(?:^|`|run: )make ([a-z]+)", path.read_text("utf-8"), re.MULTILINE):
            assert target in targets, f"{path.name}: make {target}"
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.fast
@every_document
def test_every_option_of_a_benchmark_exists(path):
    text = re.sub(r"\s+", " ", path.read_text("utf-8"))
    for name, options in re.findall(r"`(?:python )?(?:benchmarks/)?([a-z_]+)\.py ([^`]*)`", text):
        script = ROOT / "benchmarks" / f"{name}.py"
        assert script.exists(), f"{path.name}: {script.name}"
        for option in re.findall(r"(?<!\S)--[a-z-]+", options):
            assert f'"{option}"' in script.read_text("utf-8"), f"{path.name}: {script.name} has no {option}"


def test_the_tables_of_systems_are_current():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path, pages in tables.DOCUMENTS.items():
        text = path.read_text("utf-8")
        assert tables.updated(text, pages) == text, f"{path.name}: run make tables"


def run_blocks(path: Path, count: int) -> dict[str, Any]:
    """Executes the first `count` Python blocks of a document, joined, and returns the names that they define."""
    module = ModuleType(f"documents_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # dataclasses and type hints look their module up
    exec(compile("\n".join(blocks(path, "python")[:count]), str(path), "exec"), module.__dict__)
    return module.__dict__


def test_the_system_of_the_how_to_trains_and_predicts(tmp_path):
    kinds = ("disc", "box")
    cells = run_blocks(ROOT / "docs/how-to/write-a-system.md", 1)["Cells"]
    system = cells(kinds, backbone={"name": "resnet18", "width": 8}, resize={"short": 64, "long": 64}, width=16)
    best = maskwright.train(
        system, Scenes(8, (64, 64), classes=kinds), val=False, out=tmp_path, steps=2, batch=4, workers=0, device="cpu",
        tensorboard=False,
    )  # fmt: skip
    assert set(system.networks()) == {"backbone", "head"}
    assert set(load_file(best)) == set(system.state_dict())
    objects = maskwright.predict(system, Scenes(1, (50, 70), classes=kinds)[0].image, score_threshold=0.0).instances
    assert 0 < len(objects) <= 100
    assert objects.scores.diff().le(0).all()
    assert objects.image_size == objects.masks.size == (50, 70)


@pytest.mark.fast
def test_the_backbone_of_the_how_to_has_the_levels_that_it_declares():
    family = run_blocks(ROOT / "docs/how-to/add-a-backbone.md", 1)["FAMILY"]
    spec = Backbone(width=4)
    levels = family.levels(spec, Use())
    network = family.build(spec, 3, Use())
    maps = network(torch.zeros(1, 3, 64, 96))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(*levels, strict=True)
    ]


def test_the_data_set_of_the_how_to_is_read_and_trained_on(tmp_path):
    page = ROOT / "docs/how-to/use-other-data.md"
    for split, seed in (("train", 0), ("val", 1)):
        for folder in ("images", "masks"):
            (tmp_path / split / folder).mkdir(parents=True)
        for index, sample in enumerate(Scenes(4, (64, 96), classes=("disc",), seed=seed, empty=0.0)):
            planes = sample.target.masks.dense()
            numbers = (
                (planes * torch.arange(1, len(planes) + 1)[:, None, None]).amax(0) if len(planes) else planes.sum(0)
            )
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(tmp_path / split / f"images/{index}.png")
            Image.fromarray(numbers.byte().numpy()).save(tmp_path / split / f"masks/{index}.png")
    code = blocks(page, "python")
    module = ModuleType("documents_mask_folder")
    sys.modules[module.__name__] = module
    exec(compile(code[0] + code[2], str(page), "exec"), module.__dict__)
    formats.register_format("mask-folder", module.__name__)
    try:
        dataset = open_dataset(tmp_path, "val")
        assert dataset.origin == "val/masks (folder of masks)"
        assert dataset.sizes() == [(64, 96)] * 4
        assert all(len(sample.target) and sample.target.masks.areas().gt(0).all() for sample in dataset)
        maskwright.evaluate(maskwright.create("yolact-small", classes=("object",)), tmp_path, detections=5)
    finally:
        del formats.FORMATS["mask-folder"]
