"""The package as a whole: import time, public names, layers, dependencies and the wheel."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import maskwright
from maskwright.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# Packages that `import maskwright` must not import: large, optional, or needed by one command only.
HEAVY = {
    "torchvision",
    "lightning_fabric",
    "vernier",
    "rich",
    "supervision",
    "timm",
    "tensorboard",
    "pyarrow",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_little_beyond_torch():
    code = (
        "import json, time, torch, numpy\n"
        "start = time.perf_counter()\n"
        "import maskwright\n"
        "alone = time.perf_counter() - start\n"
        "for name in maskwright.__all__: getattr(maskwright, name)\n"
        "print(json.dumps([alone, time.perf_counter() - start]))"
    )
    runs = [json.loads(python(code)) for _ in range(3)]
    assert min(alone for alone, _ in runs) < 0.3


def test_importing_imports_no_large_packages():
    code = (
        "import json, sys\n"
        "import maskwright\n"
        "bare = sorted({name.split('.')[0] for name in sys.modules})\n"
        "for name in maskwright.__all__: getattr(maskwright, name)\n"
        "print(json.dumps([bare, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    bare, loaded = json.loads(python(code))
    assert {"torch", *HEAVY} & set(bare) == set(), "import maskwright alone costs nothing"
    assert HEAVY & set(loaded) <= {"rich"}, "and all it offers, little more than torch"


@pytest.mark.fast
def test_every_public_name_is_there():
    for name in maskwright.__all__:
        assert getattr(maskwright, name) is not None
    assert set(maskwright.__all__) == set(dir(maskwright))
    with pytest.raises(AttributeError, match="has no attribute 'segment'"):
        maskwright.segment  # noqa: B018


@pytest.mark.fast
@pytest.mark.parametrize(
    "subpackage", ["structures", "systems", "data", "checkpoints", "evaluation", "training", "inference"]
)
def test_every_subpackage_exports_its_names(subpackage):
    module = importlib.import_module(f"maskwright.{subpackage}")
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_module_has_a_docstring():
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text("utf-8")
        if text.strip():
            tree = ast.parse(text)
            assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("module", "extra", "action"),
    [
        ("lightning_fabric", "train", lambda: maskwright.train("mask-rcnn", "scenes", out="nowhere")),
        ("supervision", "viz", lambda: maskwright.Instances.empty((4, 4)).to_supervision()),
    ],
)
def test_a_missing_extra_is_one_sentence_with_the_command(module, extra, action, monkeypatch):
    honest = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return honest(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError) as caught:
        action()
    assert f"pip install 'maskwright[{extra}]'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_dependencies_have_lower_bounds_only():
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (r for part in lists for r in part if not r.startswith("maskwright")):
        assert ">=" in requirement, requirement
        # vernier is young and computes the published numbers; only its version has an upper bound.
        assert "<" not in requirement or requirement.startswith("vernier"), requirement


@pytest.mark.fast
def test_the_constraints_are_names_and_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(r for group in PROJECT["dependency-groups"].values() for r in group),
    ]
    wanted += [r for part in extras.values() for r in part if not r.startswith("maskwright")]
    names = {re.split(r"[<>=\[; ]", r)[0].lower() for r in wanted}
    assert names <= pinned


@pytest.mark.skipif(sys.platform != "linux", reason="the constraints name what is installed on Linux")
def test_the_constraints_cover_what_the_extras_install():
    project, lines = PROJECT["project"], (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if "==" in line}
    groups = [*project["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()]
    waiting = [Requirement(r) for part in (project["dependencies"], *groups) for r in part]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        key = (_plain(wanted.name), frozenset(wanted.extras))
        if key in seen or key[0] == "maskwright":
            continue
        seen.add(key)
        with contextlib.suppress(metadata.PackageNotFoundError):
            inner = [Requirement(text) for text in metadata.requires(wanted.name) or []]
            waiting += [
                r for r in inner if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in {"", *key[1]})
            ]
    platform = re.compile("nvidia|cuda|triton|setuptools")  # left to torch
    assert sorted(name for name, _ in seen if name not in pinned and not platform.match(name)) == []


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.fast
def test_the_documents_name_every_extra_and_what_all_leaves_out():
    extras = PROJECT["project"]["optional-dependencies"]
    page = (ROOT / "docs/getting-started.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[a-z`, ]+`) \| (.*) \|$", page, re.MULTILINE)
    named = {name: text for cell, text in rows for name in re.findall("[a-z]+", cell)}
    assert {*named} == {*extras} - {"all"}
    inside = set(re.findall("[a-z]+", extras["all"][0])) - {"maskwright"}
    assert {name for name, text in named.items() if "not part of `all`" in text} == {*extras} - {"all"} - inside


def test_imports_point_downwards():
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed beside this Python")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_is_pure_and_whole(tmp_path):
    copy = tmp_path / "copy"
    wanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "src", copy / "src", ignore=wanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("connection|No matching distribution|Temporary failure", done.stderr):
        pytest.skip("the build backend could not be fetched: no network")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"maskwright-{maskwright.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
        weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
        assert len(weights) <= 2
        assert all(size <= 25_000_000 for size in weights)
        runtime = [size for name, size in sizes.items() if "/web/page/ort-" in name]  # ONNX Runtime of the page
        assert len(runtime) == 2
        assert sum(runtime) < 4_000_000
        assert sum(sizes.values()) - sum(weights) - sum(runtime) < 2_000_000
        names = set(archive.namelist())
    assert f"maskwright-{maskwright.__version__}.dist-info/licenses/LICENSE" in names
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/maskwright").rglob("*") if p.is_file()}
    assert {s for s in sources if "__pycache__" not in s} <= names, "every source, template and py.typed is inside"
