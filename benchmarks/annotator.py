"""How many clicks an annotator needs, with and without suggestions, and how long a click takes.

    python benchmarks/annotator.py clicks DATA [--weights FILE]                      # clicks to an IoU of 0.9
    python benchmarks/annotator.py clicks DATA [--weights FILE] --suggest FILE       # the same with suggestions
    python benchmarks/annotator.py latency --weights FILE [--side 1024]              # with 0 and with 500 masks
    python benchmarks/annotator.py folder [--count 60000]                            # a large folder
    python benchmarks/annotator.py kills [--count 200]                               # kill -9 at random moments

The simulated annotator labels the objects of an image (crowd regions and objects of fewer than 16 pixels are left
out): a click on the pixel farthest from the object's border, then clicks in the middle of the largest region that is
wrong, until the IoU with the annotation is 0.9; after 20 clicks the object counts as 20 (the usual "NoC@90"). With
suggestions, accepting one costs a click, further ones correct it (a click changes the part of a suggestion around it,
as in the page), and dismissing a wrong one costs a click too. Images are encoded once, and the objects of an image are
clicked together; each has the answers that it would have alone.

For the other measurements a server runs in a process of its own, as `maskwright annotate` starts it, and is asked over
its WebSocket.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clicks import iou, largest_error, middle, usable
from scipy import ndimage
from websockets.sync.client import ClientConnection, connect

import maskwright as mw
from maskwright.data import open_dataset
from maskwright.inference.preparing import prepare
from maskwright.inference.prompting import promptable
from maskwright.structures import Embedding, Masks, Prompts
from maskwright.systems import System
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.web.assistant import default_weights, encoded
from maskwright.web.proposing import answers_by_box

GOOD = 0.9
COUNT = 60_000
MOST = 20
TOGETHER = 32  # objects that are clicked at a time
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


@dataclass
class Job:
    """An object that is labelled.

    Attributes:
        truth: Its annotation.
        found: Its mask so far.
        points: x, y and 1 or 0 of the clicks so far.
        logits: Of the last answer; None: none yet, or the mask was not an answer as it is.
        clicks: Number of clicks; accepting a suggestion is one.
        quality: The best IoU so far.
        by_hand: Whether it began as a suggestion, of which a click changes the part around it only, as in the page.
        after: The best IoU after each click.
    """

    truth: Mask
    found: Mask
    points: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])
    logits: torch.Tensor | None = None
    clicks: int = 0
    quality: float = 0.0
    by_hand: bool = False
    after: list[float] = field(default_factory=list[float])

    def judge(self) -> None:
        """Note how good the mask is."""
        self.clicks += 1
        window = around(self.truth | self.found)
        self.quality = max(self.quality, iou(self.truth[window], self.found[window]))
        self.after.append(self.quality)

    def aim(self) -> None:
        """Choose the place of the next click."""
        window = around(self.truth | self.found)
        truth, found = self.truth[window], self.found[window]
        error = largest_error(found, truth) if self.points or self.by_hand else (middle(truth), 1)
        assert error is not None  # otherwise the mask is good
        (row, column), kind = error
        self.points.append((window[1].start + column + 0.5, window[0].start + row + 0.5, kind))

    def take(self, answer: Mask, logits: torch.Tensor) -> None:
        """Take an answer as the page does (page/src/editor.ts)."""
        if not self.by_hand:
            self.found, self.logits = answer, logits
            return
        x, y, kind = self.points[-1]
        parts, _ = ndimage.label(answer & ~self.found if kind else self.found & ~answer)
        number = parts[int(y), int(x)]
        if number:
            self.found = np.where(parts == number, bool(kind), self.found)


def around(mask: Mask) -> tuple[slice, slice]:
    """The rows and columns of a mask; results there are those of the whole plane, since all around is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def answer_all(system: PromptableSystem, embedding: Embedding, jobs: list[Job]) -> None:
    """One more click for each of some objects of an image, answered together."""
    for job in jobs:
        job.aim()
    size = embedding.image_size
    places = [[[x, y] for x, y, _ in job.points] for job in jobs]
    prompts = Prompts.from_points(size, places, [[kind for _, _, kind in job.points] for job in jobs])
    if system.reads_masks:
        if any(job.logits is not None for job in jobs):
            like = next(job.logits for job in jobs if job.logits is not None)
            nothing = torch.full_like(like, torch.nan)
            planes = [nothing if job.logits is None else job.logits for job in jobs]
            prompts = replace(prompts, logits=torch.stack(planes))
        if any(job.by_hand for job in jobs):
            drawn = np.stack([job.found if job.by_hand else np.zeros_like(job.found) for job in jobs])
            prompts = replace(prompts, masks=Masks.from_dense(torch.from_numpy(drawn)))
    choices = system.segment(embedding, prompts)
    masks = choices.best().masks
    assert masks is not None
    for job, answer, logits in zip(jobs, masks.dense().numpy(), choices.logits[:, 0], strict=True):
        job.take(answer, logits)
        job.judge()


def suggested(system: System, assistant: PromptableSystem, image: torch.Tensor, threshold: float) -> Masks:
    """What the page would suggest for an image, the highest scores first."""
    found = mw.predict(system, image, score_threshold=threshold).found()
    if found.masks is None:
        found = answers_by_box(assistant, encoded(assistant, image), found.boxes)
    assert found.masks is not None
    assert found.scores is not None
    masks = found.masks[found.scores.argsort(descending=True)]
    same = masks.iou(masks) > 0.8
    kept = [n for n in range(len(masks)) if not bool(same[n, :n].any())]
    return masks[torch.tensor(kept, dtype=torch.int64)]


def matched(suggestions: Masks, truths: Masks) -> dict[int, int]:
    """For each object that is suggested the number of its suggestion."""
    taken: dict[int, int] = {}
    if not len(suggestions):
        return taken
    for number, scores in enumerate(truths.iou(suggestions)):
        scores[list(taken.values())] = 0
        if float(scores.max()) >= ACCEPTED:
            taken[number] = int(scores.argmax())
    return taken


def label(
    system: PromptableSystem, embedding: Embedding, truths: Masks, starts: dict[int, Mask]
) -> tuple[list[Job], int]:
    """Label the objects of an image; returns them, and the number of prompts."""
    prompts, done = 0, list[Job]()
    for rows in torch.arange(len(truths)).split(TOGETHER):
        jobs = [Job(truth, np.zeros_like(truth)) for truth in truths[rows].dense().numpy()]
        for job, row in zip(jobs, rows.tolist(), strict=True):
            if row in starts:
                job.found, job.by_hand = starts[row], True
                job.judge()
        while left := [job for job in jobs if job.quality < GOOD and job.clicks < MOST]:
            answer_all(system, embedding, left)
            prompts += len(left)
        done += jobs
    return done, prompts


def measure_clicks(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.data, options.split)
    order = np.random.default_rng(0).permutation(len(dataset))[: options.images].tolist()
    weights = options.weights or default_weights()
    if weights is None:
        raise SystemExit("there are no installed weights; give --weights")
    system = promptable(prepare(promptable(mw.load(weights)), torch.device("cpu"), "float32"))
    suggest = None if options.suggest is None else mw.load(options.suggest).eval()
    ways: dict[str, list[Job]] = {"alone": []} | ({} if suggest is None else {"suggested": []})
    dismissed, taken, spent, begin = 0, 0, {"images": 0.0, "suggestions": 0.0, "clicks": 0.0}, time.process_time()
    prompts = 0

    def lap(name: str) -> None:
        nonlocal begin
        begin, before = time.process_time(), begin
        spent[name] += begin - before

    for count, index in enumerate(order):
        example = dataset[index]
        rows = np.random.default_rng(index).permutation(usable(example.target))[: options.objects]
        every = example.target.masks
        assert every is not None
        truths = every[torch.from_numpy(np.sort(rows).astype(np.int64))]
        embedding = encoded(system, example.image)
        lap("images")
        starts: dict[int, Mask] = {}
        if suggest is not None:
            found = suggested(suggest, system, example.image, options.threshold)
            chosen = matched(found, truths)
            starts = {number: found[n : n + 1].dense()[0].numpy() for number, n in chosen.items()}
            # One that lies on an object that is not among the chosen ones is not wrong.
            wrong = set(range(len(found))) - set(matched(found, every).values()) - set(chosen.values())
            share = len(truths) / max(1, len(usable(example.target)))
            taken, dismissed = taken + len(chosen), dismissed + share * len(wrong)
            lap("suggestions")
        for name, jobs in ways.items():
            own, number = label(system, embedding, truths, starts if name == "suggested" else {})
            jobs += own
            prompts += number
        lap("clicks")
        print(f"{count + 1} of {len(order)} images, {len(ways['alone'])} objects", file=sys.stderr, flush=True)
    found = {"weights": Path(weights).name, "images": len(order), "objects": len(ways["alone"])}
    found |= {name: summary(jobs) for name, jobs in ways.items()}
    if suggest is not None:
        total = sum(job.clicks if job.quality >= GOOD else MOST for job in ways["suggested"]) + dismissed
        found["suggested"] |= {
            "taken": taken,
            "dismissed": round(dismissed),
            "clicks per object with those that dismiss": round(total / max(1, len(ways["suggested"])), 2),
        }
    found["CPU seconds"] = {name: round(value) for name, value in spent.items()}
    found["CPU ms per prompt"] = round(1000 * spent["clicks"] / max(1, prompts), 1)
    return found


def summary(jobs: list[Job]) -> dict[str, Any]:
    """Clicks for each object, and how many objects became good."""
    clicks = [job.clicks if job.quality >= GOOD else MOST for job in jobs]
    reached = [job.quality >= GOOD for job in jobs]
    few = [count for count, good in zip(clicks, reached, strict=True) if good]
    found: dict[str, Any] = {
        "clicks per object": round(statistics.mean(clicks), 2),
        "median": statistics.median(clicks),
        "reached": round(statistics.mean(reached), 3),
        "clicks of those": round(statistics.mean(few), 2) if few else None,
    }
    for number in (1, 3, 5, 10, 20):
        after = [job.after[min(number, len(job.after)) - 1] for job in jobs]
        found[f"after {number}"] = {
            "IoU": round(statistics.mean(after), 3),
            "reached": round(statistics.mean(value >= GOOD for value in after), 3),
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
    parser.add_argument("--weights", help="a promptable system; for clicks, the installed one by default")
    parser.add_argument("--suggest", help="a trained system")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a suggestion")
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
