"""How many clicks an annotator needs, with and without suggestions, and how long a click takes.

    python benchmarks/annotator.py clicks DATA --weights FILE                        # clicks to an IoU of 0.9
    python benchmarks/annotator.py clicks DATA --weights FILE --suggest FILE         # the same with suggestions
    python benchmarks/annotator.py latency --weights FILE [--side 1024]              # with 0 and with 500 masks
    python benchmarks/annotator.py folder [--count 60000]                            # a large folder
    python benchmarks/annotator.py kills [--count 200]                               # kill -9 at random moments

A server runs in a process of its own, as `maskwright annotate` starts it, and is asked over its WebSocket.

The simulated annotator labels every object of an image (crowd regions are left out): a click on the pixel farthest
from the object's border, then clicks in the middle of the largest region that is wrong, until the IoU with the
annotation is 0.9; after 20 clicks the object counts as 20 (the usual "NoC@90"). With suggestions, accepting one costs a
click, further ones correct it, and dismissing a wrong one costs a click too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clicks import iou, largest_error, middle
from websockets.sync.client import ClientConnection, connect

import maskwright as mw
from maskwright.data import open_dataset
from maskwright.structures import Masks

GOOD = 0.9
COUNT = 60_000
MOST = 20
ACCEPTED = 0.5  # IoU from which a suggestion is taken and corrected

Mask = np.ndarray[Any, Any]


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "maskwright", "annotate", str(folder), "--no-browser", "--port", "0", *options]
        begin = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip # noqa: E501
        assert self.process.stdout is not None
        self.address = ""
        for line in self.process.stdout:
            if line.startswith("http://"):
                self.address = line.strip().removeprefix("http://").strip("/")
                break
        if not self.address:
            raise SystemExit("the server did not start")
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                break
            time.sleep(0.02)
        self.started = time.perf_counter() - begin

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=600) as answer:
            return json.loads(answer.read())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    @contextlib.contextmanager
    def live(self) -> Iterator[Live]:
        with connect(f"ws://{self.address}/api/live", max_size=1 << 26, ping_timeout=None) as socket:
            yield Live(socket)


class Live:
    """One connected page."""

    def __init__(self, socket: ClientConnection):
        self.socket, self.number = socket, 0

    def open(self, image: int) -> float:
        self.socket.send(json.dumps({"op": "open", "image": image}))
        while (message := json.loads(self.socket.recv()))["event"] not in ("embedded", "no-assist"):
            pass
        return float(message.get("ms", 0))

    def ask(self, **fields: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({**fields, "request": self.number}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("request") == self.number and message["event"] != "propagated":
                if message["event"] == "error":
                    raise SystemExit(message["error"])
                return message


# ---- clicks ----------------------------------------------------------------------------------------------------------


def plane(code: dict[str, Any]) -> Mask:
    return Masks.from_rle([code]).dense()[0].numpy()


def click(live: Live, image: int, truth: Mask, start: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """Click until a mask is good; returns the number of clicks and the mask."""
    points: list[list[float]] = []
    rle, found = start, plane(start) if start is not None else np.zeros_like(truth)
    best = (iou(found, truth), rle)
    while len(points) < MOST:
        wrong = largest_error(found, truth) if rle is not None else (middle(truth), 1)
        assert wrong is not None  # otherwise the mask is good
        (row, column), label = wrong
        points.append([column + 0.5, row + 0.5, label])
        answer = live.ask(op="prompt", image=image, points=points, box=None, rle=rle, hover=False)
        rle, found = answer["rle"], plane(answer["rle"])
        best = max(best, (iou(found, truth), rle), key=lambda pair: pair[0])
        if best[0] >= GOOD:
            return len(points), best[1] or rle
    return MOST, best[1] or answer["rle"]


def label(live: Live, server: Server, image: int, truths: list[Mask], wait: bool) -> tuple[list[int], int, int]:
    """Label an image; returns clicks for each object, and numbers of suggestions that were taken and dismissed."""
    live.open(image)
    objects = server.get(f"/api/images/{image}/objects")
    suggestions = objects["suggestions"]
    while wait and server.get("/api/project")["suggest"]["done"] < len(server.get("/api/images?count=1000")["items"]):
        time.sleep(0.5)
        suggestions = server.get(f"/api/images/{image}/objects")["suggestions"]
    if wait:
        suggestions = server.get(f"/api/images/{image}/objects")["suggestions"]
    planes = [plane(one["rle"]) for one in suggestions]
    taken: dict[int, int] = {}
    for number, truth in enumerate(truths):
        scores = [0.0 if n in taken.values() else iou(own, truth) for n, own in enumerate(planes)]
        if scores and max(scores) >= ACCEPTED:
            taken[number] = int(np.argmax(scores))
    clicks: list[int] = []
    for number, truth in enumerate(truths):
        start = suggestions[taken[number]]["rle"] if number in taken else None
        cost, rle = int(start is not None), start
        if start is None or iou(plane(start), truth) < GOOD:
            further, rle = click(live, image, truth, start)
            cost = min(MOST, cost + further)
        clicks.append(cost)
        id = suggestions[taken[number]]["id"] if number in taken else str(uuid.uuid4())
        made = [{"by": "simulated", "how": "click", "clicks": cost}]
        if plane(rle).any():
            object = {"id": id, "label": None, "rle": rle, "made": made}
            live.ask(op="edit", image=image, base=0, what="add", edits=[{"do": "add", "object": object}])
    dismissed = [one["id"] for n, one in enumerate(suggestions) if n not in taken.values()]
    edits: list[dict[str, Any]] = [{"do": "done", "value": True}]
    if dismissed:
        edits.append({"do": "dismiss", "ids": dismissed, "value": True})
    live.ask(op="edit", image=image, base=0, what="done", edits=edits)
    return clicks, len(taken), len(dismissed)


def measure_clicks(options: argparse.Namespace) -> dict[str, Any]:
    dataset = open_dataset(options.data, options.split)
    order = np.random.default_rng(0).permutation(len(dataset))[: options.images]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        truths: list[list[Mask]] = []
        for number, index in enumerate(order.tolist()):
            file = dataset.paths()[index]
            assert file is not None
            shutil.copy(file, folder / f"{number:04d}{file.suffix}")
            target = dataset.targets(index)
            assert target.masks is not None
            own = target[~target.crowd] if target.crowd is not None else target
            chosen = np.random.default_rng(index).permutation(len(own))[: options.objects].tolist()
            truths.append([own.masks[n : n + 1].dense()[0].numpy() for n in chosen])
        found: dict[str, Any] = {"images": len(order), "objects": sum(map(len, truths))}
        for name, further in (("alone", ()), ("suggested", ("--suggest", options.suggest or ""))):
            if name == "suggested" and options.suggest is None:
                continue
            shutil.rmtree(folder / ".maskwright" / "suggestions", ignore_errors=True)
            (folder / ".maskwright" / "journal.jsonl").unlink(missing_ok=True)
            server = Server(folder, "--weights", options.weights, "--threads", str(options.threads), *further)
            try:
                with server.live() as live:
                    results = [label(live, server, n, own, bool(further)) for n, own in enumerate(truths)]
            finally:
                server.stop()
            clicks = [cost for own, _, _ in results for cost in own]
            dismissed = sum(count for _, _, count in results)
            found[name] = {
                "clicks per object": round(statistics.mean(clicks), 2),
                "with those that dismiss": round((sum(clicks) + dismissed) / max(1, len(clicks)), 2),
                "median": statistics.median(clicks),
                "not reached": round(sum(cost >= MOST for cost in clicks) / max(1, len(clicks)), 3),
                "taken": sum(count for _, count, _ in results),
                "dismissed": dismissed,
            }
    return found


# ---- times -----------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    return {"p50": round(float(np.percentile(values, 50)), 1), "p95": round(float(np.percentile(values, 95)), 1)}


def squares(count: int, side: int) -> list[dict[str, Any]]:
    """Objects of 24 x 24 pixels on a grid, as edits."""
    places = [(x, y) for y in range(4, side - 28, 32) for x in range(4, side - 28, 32)][:count]
    crop = torch.ones(24, 24, dtype=torch.bool)
    masks = Masks.from_crops([crop] * len(places), torch.tensor(places), (side, side))
    made = [{"by": "simulated", "how": "brush", "clicks": 1}]
    return [
        {"do": "add", "object": {"id": f"m{n}", "label": None, "made": made,
         "rle": {"size": [side, side], "counts": code["counts"].decode()}}}
        for n, code in enumerate(masks.rle())
    ]  # fmt: skip


def measure_latency(options: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    found: dict[str, Any] = {"side": options.side}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        scenes = mw.data.Scenes(1, (options.side, options.side), seed=0)
        pixels = scenes[0].image.permute(1, 2, 0).numpy()
        for n in range(2):
            Image.fromarray(pixels).save(folder / f"{n}.png")
        server = Server(folder, "--weights", options.weights, "--threads", str(options.threads))
        try:
            with server.live() as live:
                edits = squares(500, options.side)
                live.ask(op="edit", image=1, base=0, what="add", edits=edits)
                names = {0: "0 masks", 1: f"{len(edits)} masks"}
                for image, name in names.items():
                    found[f"encoding, {name}"] = live.open(image)
                time.sleep(options.settle)
                times: dict[int, list[float]] = {0: [], 1: []}
                inside: dict[int, list[float]] = {0: [], 1: []}
                rng = np.random.default_rng(0)
                for number in range(2 * options.clicks + 10):  # alternating, so that other load falls on both
                    x, y = rng.uniform(8, options.side - 8, 2).round(1).tolist()
                    image, begin = number % 2, time.perf_counter()
                    answer = live.ask(op="prompt", image=image, points=[[x, y, 1]], box=None, rle=None, hover=False)
                    times[image].append(1000 * (time.perf_counter() - begin))
                    inside[image].append(answer["ms"])
                for image, name in names.items():
                    found[f"click, {name}, ms"] = spread(times[image][5:])
                    found[f"of it in the server, {name}, ms"] = spread(inside[image][5:])
                saves: list[float] = []
                for n in range(50):
                    object = {**edits[n]["object"], "id": f"new{n}"}
                    begin = time.perf_counter()
                    live.ask(op="edit", image=1, base=0, what="add", edits=[{"do": "add", "object": object}])
                    saves.append(1000 * (time.perf_counter() - begin))
                found["saving an object among 500"] = spread(saves)
                begin = time.perf_counter()
                server.get("/api/images/1/objects")
                found["reading 550 objects"] = round(1000 * (time.perf_counter() - begin), 1)
        finally:
            server.stop()
    return found


def measure_folder(options: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    found: dict[str, Any] = {"images": options.count}
    with tempfile.TemporaryDirectory(dir=options.place) as temporary:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / "000000.jpg")
        for n in range(1, options.count):
            os.link(folder / f"{n - n % 1000 - 1000 * (n % 1000 == 0):06d}.jpg", folder / f"{n:06d}.jpg") if n % 1000 else shutil.copy(folder / "000000.jpg", folder / f"{n:06d}.jpg")  # fmt: skip # noqa: E501
        for name in ("first start", "second start"):
            server = Server(folder, "--weights", "none")
            found[f"{name}, s"] = round(server.started, 1)
            try:
                for path in (
                    "/api/images",
                    f"/api/images?start={options.count - 300}",
                    "/api/images?only=todo&start=30000",
                ):
                    begin = time.perf_counter()
                    server.get(path)
                    found[f"{name}, {path}, ms"] = round(1000 * (time.perf_counter() - begin), 1)
                with server.live() as live:
                    image = options.count - 1 if name == "first start" else options.count // 2
                    add = squares(1, 48)[0]
                    add["object"]["rle"] = {"size": [48, 64], "counts": Masks.from_crops([torch.ones(9, 9, dtype=torch.bool)], torch.tensor([[3, 3]]), (48, 64)).rle()[0]["counts"].decode()}  # fmt: skip # noqa: E501
                    begin = time.perf_counter()
                    live.ask(op="edit", image=image, base=0, what="add", edits=[add])
                    found[f"{name}, edit, ms"] = round(1000 * (time.perf_counter() - begin), 1)
                status = Path(f"/proc/{server.process.pid}/status")
                if status.exists():
                    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                    found[f"{name}, peak MiB"] = int(peak.split()[1]) // 1024
            finally:
                server.stop()
    return found


# ---- kills -----------------------------------------------------------------------------------------------------------


def serve_forked(folder: Path, port: int) -> int:
    """Serve a folder in a forked process, which need not import anything; returns its number."""
    import uvicorn

    from maskwright.web import project as module
    from maskwright.web.annotating import AnnotationServer
    from maskwright.web.datasets import open_source
    from maskwright.web.project import Project, default_folder

    uvicorn.Config(AnnotationServer, factory=False, lifespan="on", ws="websockets-sansio").load()  # imports
    child = os.fork()
    if child:
        return child
    module.COMPACT_ABOVE = 1 << 12  # journals of a benchmark are short, but are to be compacted too
    project = Project(open_source(folder), default_folder(folder), ("cell",), "ann")
    config = uvicorn.Config(
        AnnotationServer(project).app, port=port, log_level="error", ws="websockets-sansio", lifespan="on"
    )
    uvicorn.Server(config).run()
    os._exit(0)


def measure_kills(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the server while edits are under way, and compare what the next one has with what was answered.

    The edits of one connection are applied in their order, so the state after a kill must be that after some of them:
    all that were answered, and perhaps those that were sent and not answered.
    """
    import random
    import signal
    import socket

    from PIL import Image
    from websockets.exceptions import ConnectionClosed

    rng, counts = random.Random(0), {"kills": 0, "edits": 0, "answered": 0, "applied": 0, "sent": 0, "lost": 0}
    shapes = [one["object"]["rle"] for one in squares(40, 256)]
    made = [{"by": "simulated", "how": "brush", "clicks": 1}]
    count = 200 if options.count == COUNT else options.count
    with tempfile.TemporaryDirectory(dir=options.place) as temporary, socket.socket() as probe:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        for n in range(3):
            Image.new("RGB", (256, 256), (90, 120, 60)).save(folder / f"{n}.png")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        known: dict[tuple[int, str], str] = {}  # of each object its mask, as far as it is certain
        under_way: list[tuple[int, str, str | None]] = []  # sent and not answered; no mask: removed
        sizes = list[int]()
        while True:
            child = serve_forked(folder, port)
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                    break
                time.sleep(0.01)
            there: dict[tuple[int, str], str] = {}
            revisions: dict[tuple[int, str], int] = {}
            for image in range(3):
                address = f"http://127.0.0.1:{port}/api/images/{image}/objects"
                with urllib.request.urlopen(address, timeout=60) as answer:
                    for one in json.loads(answer.read())["objects"]:
                        there[image, one["id"]] = one["rle"]["counts"]
                        revisions[image, one["id"]] = one["revision"]
            possible = [dict(known)]
            for image, name, mask in under_way:
                further = dict(possible[-1])
                if mask is None:
                    further.pop((image, name), None)
                else:
                    further[image, name] = mask
                possible.append(further)
            if there in possible:
                counts["applied"] += possible.index(there)
            else:
                counts["lost"] += 1
            known, under_way = there, []
            sizes.append((folder / ".maskwright" / "journal.jsonl").stat().st_size)
            if counts["kills"] == count:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            deadline = time.perf_counter() + rng.uniform(0, 0.7)
            killed = False
            with connect(f"ws://127.0.0.1:{port}/api/live", max_size=1 << 26, ping_timeout=None) as live:
                while not killed:
                    while len(under_way) < 4:
                        names = [key for key in known if key not in {(i, n) for i, n, _ in under_way}]
                        if names and rng.random() < 0.6:
                            image, name = rng.choice(names)
                            remove = rng.random() < 0.3
                        else:
                            image, name, remove = rng.randrange(3), uuid.uuid4().hex[:12], False
                        mask = None if remove else rng.choice(shapes)
                        edit: dict[str, Any] = {"do": "remove", "id": name, "was": revisions.get((image, name), 0)}
                        if mask is not None:
                            edit = {"do": "add", "object": {"id": name, "label": 0, "rle": mask, "made": made}}
                            if (image, name) in known:
                                edit = {**edit, "do": "replace", "id": name, "was": revisions[image, name]}
                        counts["edits"] += 1
                        text = json.dumps({"op": "edit", "request": counts["edits"], "image": image, "edits": [edit]})
                        under_way.append((image, name, None if mask is None else mask["counts"]))
                        live.send(text)
                    try:
                        message = json.loads(live.recv(timeout=max(0.0, deadline - time.perf_counter())))
                    except TimeoutError:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                        killed = True
                        with contextlib.suppress(ConnectionClosed, OSError):  # answers that were sent before
                            while True:
                                message = json.loads(live.recv(timeout=5))
                                known = answered(message, known, revisions, under_way, counts)
                        break
                    known = answered(message, known, revisions, under_way, counts)
            counts["kills"] += 1
            if counts["kills"] % 20 == 0:
                print(counts, file=sys.stderr, flush=True)
            counts["sent"] += len(under_way)
    return {**counts, "compactions": sum(b < a for a, b in itertools.pairwise(sizes)), "journal": max(sizes)}


def answered(
    message: dict[str, Any],
    known: dict[tuple[int, str], str],
    revisions: dict[tuple[int, str], int],
    under_way: list[tuple[int, str, str | None]],
    counts: dict[str, int],
) -> dict[tuple[int, str], str]:
    """What is known after a message of the server."""
    if message["event"] != "saved":
        if message["event"] in ("error", "conflict"):
            raise SystemExit(str(message))
        return known
    image, name, mask = under_way.pop(0)
    counts["answered"] += 1
    known = {key: value for key, value in known.items() if key != (image, name)}
    if mask is not None:
        known[image, name] = mask
        revisions[image, name] = next(one["revision"] for one in message["objects"] if one["id"] == name)
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clicks", "latency", "folder", "kills"))
    parser.add_argument("data", nargs="?", help="a data set with masks, for clicks")
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", help="a promptable system")
    parser.add_argument("--suggest", help="a trained system")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--objects", type=int, default=1000, help="most objects of an image")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--clicks", type=int, default=100, help="clicks on each image")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds for images that are encoded ahead")
    parser.add_argument("--count", type=int, default=COUNT, help="images of the folder; kills, 200 by default")
    parser.add_argument("--place", help="folder for temporary files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    measures = {"clicks": measure_clicks, "latency": measure_latency, "folder": measure_folder, "kills": measure_kills}
    found = {"load": round(os.getloadavg()[0], 1), **measures[options.what](options)}
    print(json.dumps(found, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
