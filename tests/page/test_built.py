"""The committed page belongs to its sources, and has nothing that a strict Content-Security-Policy forbids."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import maskwright

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "page"
BUILT = Path(maskwright.__file__).parent / "web" / "page"
WASM = "ort-wasm-simd-threaded.wasm"


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def digest(files: Iterable[tuple[str, str]]) -> str:
    """Hash of names and texts, as page/build.mjs computes it."""
    value = hashlib.sha256()
    for name, content in files:
        data = content.encode()
        value.update(f"{name}\n{len(data)}\n".encode() + data)
    return value.hexdigest()


def sources() -> list[tuple[str, str]]:
    names = [path.relative_to(SOURCES).as_posix() for path in (SOURCES / "src").rglob("*.*") if path.is_file()]
    names += ["build.mjs", "onnxruntime.LICENSE", "package.json", "tsconfig.json"]
    return [(name, text(SOURCES / name)) for name in sorted(names)]


def banner() -> tuple[str, str, str]:
    """Hash of the sources and of the results, and the script without them."""
    first, _, script = text(BUILT / "app.js").partition("\n")
    found = re.fullmatch(r"/\* maskwright annotate\. sources (\w{64}) results (\w{64}) \*/", first)
    assert found is not None
    return found[1], found[2], script


@pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the sources of the page, which are not installed")
def test_built_page_belongs_to_its_sources():
    assert banner()[0] == digest(sources()), "run `make page` and commit src/maskwright/web/page"


def test_built_files_are_as_built():
    names = ("index.html", "icon.svg", "app.css", "decoder.js", "ort-wasm-simd-threaded.mjs")
    runtime = hashlib.sha256(gzip.decompress((BUILT / f"{WASM}.gz").read_bytes())).hexdigest()
    results = [*((name, text(BUILT / name)) for name in names), (WASM, runtime), ("app.js", banner()[2])]
    assert banner()[1] == digest(results), "run `make page`; the files in src/maskwright/web/page are made by it alone"
    assert {path.name for path in BUILT.iterdir()} == {*names, f"{WASM}.gz", "app.js"}


def test_runtime_of_the_decoder_is_small_and_has_its_license():
    assert (BUILT / f"{WASM}.gz").stat().st_size < 4_000_000
    assert (BUILT / "decoder.js").stat().st_size < 100_000
    for name in ("decoder.js", "ort-wasm-simd-threaded.mjs"):
        assert "Copyright (c) Microsoft Corporation" in text(BUILT / name)[:400], name


@pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the sources of the page, which are not installed")
def test_text_never_becomes_html():
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser"
        r"|\beval\(|new Function"
    )
    for name, content in sources():
        if name.endswith(".ts"):
            assert not re.search(sinks, content), name


def test_page_needs_no_inline_code_and_no_other_server():
    page = text(BUILT / "index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>", page) == ['<script src="/app.js" defer>']
    for name in ("index.html", "app.css", "app.js"):
        addresses = set(re.findall(r"https?://[\w.]+", text(BUILT / name)))
        assert addresses <= {"http://www.w3.org"}, name  # the name of SVG's elements, never loaded


def test_every_control_has_a_name():
    page = text(BUILT / "index.html")
    for button in re.findall(r"<button(.*?)</button>", page, re.DOTALL):
        words = re.sub(r"<[^>]*>", "", f"<button{button}").strip()
        assert words or "aria-label=" in button or 'id="class-add"' in button, button
    for tag in re.findall(r"<input[^>]*>", page):
        identity = re.search(r'id="([\w-]+)"', tag)
        assert identity is not None
        labelled = "aria-label=" in tag or re.search(
            rf"<label[^>]*>(?:(?!</label>).)*{re.escape(tag)}", page, re.DOTALL
        )
        assert labelled, tag
