"""How fast is the annotation page: from a click to the visible mask, and frames per second of zoom and pan.

    python benchmarks/annotating.py                               # 0 and 500 objects, masks from a stand-in at no cost
    python benchmarks/annotating.py --weights W --objects 0 500   # with a promptable system
    python benchmarks/annotating.py --weights mobile-sam --place page --clicks 20    # random weights
    python benchmarks/annotating.py --images 60000                # the list of images while it is scrolled

Needs playwright and the system's Chromium. The server is a process of its own. Clicks are real mouse events with the
preview switched off, each on an object that has no mask yet; their time runs from the release of the button to the
frame in which the mask is drawn. Zoom and pan are wheel events in every frame.

The time of a click is also given by stages, each with its median, its 95th percentile, and its mean in the slowest
tenth of the clicks, which says what the slow ones waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1600, 1200)
CELL = 44  # pixels between the centres of neighbouring discs

# Wheel events at every frame for some seconds; the intervals between frames.
FRAMES = """async ([seconds, zooming]) => {
  const stage = document.getElementById('stage'), box = stage.getBoundingClientRect(), times = [];
  const start = performance.now();
  for (let now = start, i = 0; now - start < 1000 * seconds; i++) {
    const way = Math.floor(i / 40) % 2 ? 1 : -1;
    stage.dispatchEvent(new WheelEvent('wheel', {
      deltaY: zooming ? 25 * way : 0, deltaX: zooming ? 0 : 12 * way, shiftKey: !zooming, bubbles: true,
      clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, cancelable: true,
    }));
    now = await new Promise(requestAnimationFrame);
    times.push(now);
  }
  return times.slice(1).map((time, i) => time - times[i]);
}"""


def places() -> list[tuple[int, int, int]]:
    """Centres and radii of discs in rows, in a random but fixed order."""
    rng = random.Random(0)
    rows = [
        (x, y, rng.randrange(9, 20))
        for y in range(CELL // 2, SIZE[1] - CELL // 2, CELL)
        for x in range(CELL // 2, SIZE[0] - CELL // 2, CELL)
    ]
    rng.shuffle(rows)
    return rows


def make_folder(folder: Path, objects: int) -> None:
    """A COCO data set of one image with many discs, of which the first ones are annotated."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, (38, 44, 52))
    pen, annotations = ImageDraw.Draw(image), list[dict[str, Any]]()
    for number, (x, y, r) in enumerate(places()):
        colour = (90 + number * 37 % 150, 120 + number * 61 % 120, 100 + number * 89 % 140)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if number < objects:
            corners = [(x - r, y - r / 2), (x - r / 2, y - r), (x + r / 2, y - r), (x + r, y - r / 2)]
            corners += [(2 * x - a, 2 * y - b) for a, b in corners]
            annotations.append(
                {"id": number + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 3 * r * r}
                | {"bbox": [x - r, y - r, 2 * r, 2 * r], "segmentation": [[v for corner in corners for v in corner]]}
            )
    folder.mkdir(parents=True)
    image.save(folder / "image.png")
    document = {
        "images": [{"id": 1, "file_name": "image.png", "width": SIZE[0], "height": SIZE[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))


def serve_stand_in(folder: Path, port: int) -> None:
    """Serve with the assistant of the tests, whose masks cost nothing."""
    sys.path.insert(0, str(ROOT))
    from tests.page.running import Running

    Running(folder, ("cell",), port=port)
    while True:
        time.sleep(3600)


@contextmanager
def server(folder: Path, weights: str | None, threads: int | None = None) -> Iterator[str]:
    """The address of a server process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--stand-in-server", str(folder), "--port", str(port)]
    if weights is not None:
        command = [sys.executable, "-m", "maskwright", "annotate", str(folder), "--weights", weights]
        command += ["--no-browser", "--port", str(port)]
        command += [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        until = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"{address}api/project", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


CHILDREN = ("server", "browser")


def cpu_seconds() -> list[float]:
    """The CPU time of the server and of the browser so far; it depends little on what else the machine does."""
    parents, spent, is_server = dict[int, int](), dict[int, float](), dict[int, bool]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            number = int(stat.parent.name)
            parents[number] = int(fields[1])
            spent[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            is_server[number] = b"annotat" in (stat.parent / "cmdline").read_bytes()

    def ours(number: int) -> bool:
        while number > 1:
            number = parents.get(number, 0)
            if number == os.getpid():
                return True
        return False

    found = [0.0, 0.0]
    for number in filter(ours, spent):
        found[0 if is_server[number] else 1] += spent[number]
    return found


# Resolved when one more click is seen than a number.
SEEN = """n => new Promise((resolve) => {
  const until = performance.now() + 20000;
  const look = () => {
    const seen = performance.getEntriesByName('click-to-visible').length > n;
    if (seen || performance.now() > until) resolve();
    else setTimeout(look, 10);
  };
  look();
})"""

# The list of images, scrolled by some pixels in every frame; the intervals between frames, and the share of the rows in
# sight whose name was not there yet.
SCROLL = """async ([seconds, by]) => {
  const list = document.getElementById('images'), times = [];
  let rows = 0, empty = 0;
  list.scrollTop = 0;
  const start = performance.now();
  for (let now = start; now - start < 1000 * seconds;) {
    list.scrollTop += by;
    now = await new Promise(requestAnimationFrame);
    times.push(now);
    for (const row of list.querySelectorAll('.row:not([hidden])')) {
      rows++;
      if (!row.querySelector('bdi').textContent) empty++;
    }
  }
  return [times.slice(1).map((time, i) => time - times[i]), empty / rows];
}"""

# Of each click the milliseconds of its stages, in their order.
STAGES = """() => {
  const of = (name) => performance.getEntriesByName(name);
  return of('click-to-visible').flatMap(({ startTime, duration, detail: { drawing } }) => {
    const end = startTime + duration;
    const answer = of('click-answer').findLast((entry) => entry.startTime >= startTime && entry.startTime < end);
    const taken = of('click-taken').findLast((entry) => entry.startTime >= startTime && entry.startTime < end);
    if (!answer || !taken) return [];
    const { ms, stages } = answer.detail, arrived = answer.startTime + answer.duration;
    return [{
      'click': duration,
      'page: until it asks': answer.startTime - startTime,
      ...(ms === undefined ? { 'page: decodes': answer.duration } : {
        'on the way, both directions': answer.duration - ms,
        'server: until it computes': stages[0],
        'server: networks': stages[1],
        'server: mask of the image': stages[2],
        'server: rest': ms - stages[0] - stages[1] - stages[2],
      }),
      'page: takes the mask': taken.startTime - arrived,
      'page: until the next frame': drawing - taken.startTime,
      'page: draws': end - drawing,
    }];
  });
}"""


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def weights_of(name: str | None, folder: Path) -> str | None:
    """A file of weights; for the name of a system, weights at random."""
    if name is None or Path(name).exists():
        return name
    import maskwright as mw

    path = folder / f"{name}.safetensors"
    mw.save(mw.create(name), path)
    return str(path)


def measure(
    browser: Any, address: str, objects: int, clicks: int, seconds: float, shot: Path | None, place: str = "server"
) -> dict[str, Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.add_init_script(f"localStorage.setItem('maskwright-decoder', '{place}')")
    page.goto(address)
    page.wait_for_selector("#assist:has-text('ready')", timeout=600_000)
    page.wait_for_selector(f"#assist[data-place={place}]", timeout=600_000)
    page.uncheck("#hover")
    page.check("#single")
    page.wait_for_timeout(1500)  # until all objects are drawn sharply
    view = page.evaluate("() => ({...document.getElementById('stage').dataset})")
    box = page.locator("#stage").bounding_box()
    zoom, left, top = (float(view[name]) for name in ("zoom", "left", "top"))
    spent = cpu_seconds()
    page.keyboard.down("Control")  # a new object also where there is one; random weights cover much of the image
    for number, (x, y, _) in enumerate(places()[objects : objects + clicks]):
        page.mouse.click(box["x"] + left + x * zoom, box["y"] + top + y * zoom)
        page.evaluate(SEEN, number)
        page.wait_for_timeout(60)
    spent = [after - before for before, after in zip(spent, cpu_seconds(), strict=True)]
    page.keyboard.up("Control")
    taken = page.evaluate("() => performance.getEntriesByName('click-to-visible').map(entry => entry.duration)")
    stages = page.evaluate(STAGES)
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    result: dict[str, Any] = {"objects": objects, "clicks": len(taken)}
    result |= {"click p50 ms": statistics.median(taken), "click p95 ms": percentile(taken, 0.95)}
    if Path("/proc/self/stat").exists():
        result |= {f"{name} CPU ms": 1000 * used / max(1, clicks) for name, used in zip(CHILDREN, spent, strict=True)}
    for name, zooming in (("zoom", True), ("pan", False)):
        gaps = page.evaluate(FRAMES, [seconds, zooming])
        result[f"{name} frames/s"] = 1000 / statistics.mean(gaps)
        result[f"{name} p95 ms"] = percentile(gaps, 0.95)
    if shot is not None:
        page.keyboard.press("f")
        page.wait_for_timeout(1500)
        page.screenshot(path=str(shot / f"objects_{objects}.png"))
    page.close()
    return result | {"stages": by_stage(stages)}


def measure_list(browser: Any, address: str, seconds: float) -> None:
    """Scroll the list of images slowly, a page per frame, and through all of it."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.goto(address)
    page.wait_for_selector("#images .row:not([hidden])", timeout=600_000)
    page.wait_for_timeout(2000)
    total = page.evaluate("() => document.getElementById('images').scrollHeight")
    for name, by in (("24 pixels a frame", 24), ("a page a frame", 500), ("all of it", total / (60 * seconds))):
        gaps, empty = page.evaluate(SCROLL, [seconds, by])
        rows = page.locator("#images .row").count()
        print(f"load {os.getloadavg()[0]:.1f}  scrolling {name}: {1000 / statistics.mean(gaps):.1f} frames/s", end=", ")
        print(f"95 % within {percentile(gaps, 0.95):.1f} ms, longest {max(gaps):.0f} ms", end=", ")
        print(f"{100 * empty:.0f} % of rows without a name yet, {rows} rows in the page", flush=True)
    page.close()


def many(folder: Path, count: int) -> None:
    """A folder of many images, which are links to a few files."""
    from PIL import Image

    folder.mkdir(parents=True)
    for n in range(count):
        path = folder / f"{n:06d}.jpg"
        if n % 1000:
            os.link(folder / f"{n - n % 1000:06d}.jpg", path)
        else:
            Image.new("RGB", (640, 480), (90, n // 1000, 60)).save(path)


def by_stage(clicks: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each stage the median, the 95th percentile, and the mean in the slowest tenth of clicks."""
    slow = sorted(clicks, key=lambda click: -click["click"])[: max(1, len(clicks) // 10)]
    found: dict[str, list[float]] = {}
    for name in clicks[0] if clicks else ():
        values = [click[name] for click in clicks]
        found[name] = [statistics.median(values), percentile(values, 0.95), statistics.mean(one[name] for one in slow)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", help="a promptable system, or its name for weights at random; without, masks come from a stand-in"
    )
    parser.add_argument("--place", choices=("server", "page"), default="server", help="where clicks are answered")
    parser.add_argument("--objects", type=int, nargs="+", default=[0, 500])
    parser.add_argument("--clicks", type=int, default=40)
    parser.add_argument("--images", type=int, default=0, help="measure the list of a folder of so many images instead")
    parser.add_argument("--seconds", type=float, default=3.0, help="of zooming and of panning")
    parser.add_argument("--threads", type=int, help="of the server; default: PyTorch's")
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--stand-in-server", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stand_in_server is not None:
        serve_stand_in(options.stand_in_server, options.port)
    sys.path.insert(0, str(ROOT))
    from playwright.sync_api import sync_playwright

    from tests.page.running import FLAGS, chromium

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with sync_playwright() as running, tempfile.TemporaryDirectory() as temporary:
        browser = running.chromium.launch(executable_path=chromium(), args=list(FLAGS), headless=True)
        if options.images:
            many(Path(temporary) / "many", options.images)
            with server(Path(temporary) / "many", options.weights) as address:
                measure_list(browser, address, options.seconds)
            options.objects = []
        for objects in options.objects:
            folder = Path(tempfile.mkdtemp(dir=temporary)) / "images"
            make_folder(folder, objects)
            with server(folder, weights_of(options.weights, Path(temporary)), options.threads) as address:
                result = measure(
                    browser, address, objects, options.clicks, options.seconds, options.screenshots, options.place
                )
            stages = result.pop("stages")
            print(f"load {os.getloadavg()[0]:.1f}  " + "  ".join(
                f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in result.items()))  # fmt: skip
            print(f"  {'ms':28}{'median':>8}{'95 %':>8}{'slowest':>9}")
            for name, (middle, high, slow) in stages.items():
                print(f"  {name:28}{middle:8.1f}{high:8.1f}{slow:9.1f}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
