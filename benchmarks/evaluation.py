"""Times our evaluator and run-length code against pycocotools, side by side in one run, on the same data.

    python benchmarks/evaluation.py                       # 5,000 images x 100 detections: minutes, nearly all theirs
    python benchmarks/evaluation.py --images 200        # a quick look

The data are made here: ellipses on images of 480 x 640, 7 annotated and 100 predicted per image (COCO's val2017 has
7.3 and most systems give 100), sizes spread as COCO's are, 80 classes as rare and common as there; the same for the
same seed. Predictions are the annotations disturbed and rescaled, and ellipses out of nothing. One thread each; every
side runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from maskwright.evaluation import Evaluator
from maskwright.structures import Instances, Masks, rle

SIZE = (480, 640)
CLASSES = 80


@dataclass
class Made:
    """A data set in memory: what an evaluator asks of one."""

    objects: list[Instances]
    name: str = "ellipses"
    classes: tuple[str, ...] = tuple(f"class {i}" for i in range(CLASSES))
    category_ids: tuple[int, ...] = tuple(range(1, CLASSES + 1))

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError("there are no images")

    def image_ids(self) -> list[int]:
        return list(range(1, len(self.objects) + 1))

    def targets(self, index: int) -> Instances:
        return self.objects[index]

    def sizes(self) -> list[tuple[int, int]]:
        return [SIZE] * len(self.objects)


# ---- data ------------------------------------------------------------------------------------------------------------


def ellipse_codes(shapes: np.ndarray) -> list[bytes]:
    """Run-length strings of ellipses given as centre x, y, half axes a, b and turn: drawn column by column, exactly."""
    height, width = SIZE
    codes = []
    for x, y, a, b, turn in shapes:
        cos, sin = np.cos(turn), np.sin(turn)
        half = np.hypot(a * cos, b * sin)
        columns = np.arange(max(0, int(x - half)), min(width, int(x + half) + 1))
        u = columns + 0.5 - x
        # in a column: quadratic in v with its roots at the ellipse' border
        p = (sin / a) ** 2 + (cos / b) ** 2
        q = u * sin * cos * (1 / a**2 - 1 / b**2)
        r = (u * cos / a) ** 2 + (u * sin / b) ** 2 - 1
        root = np.sqrt(np.maximum(q * q - p * r, 0)) / p
        low = np.clip(np.ceil(y - q / p - root - 0.5), 0, height).astype(np.int64)
        high = np.clip(np.floor(y - q / p + root - 0.5) + 1, 0, height).astype(np.int64)
        solid = high > low
        start, end = columns[solid] * height + low[solid], columns[solid] * height + high[solid]
        codes.append(rle.from_runs(start, end, height * width))
    return codes


def make(images: int, detections: int, seed: int = 0) -> tuple[Made, list[Instances]]:
    """Annotations and predictions; no object is empty."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, CLASSES + 1)
    frequency /= frequency.sum()

    def shapes(count: int) -> np.ndarray:
        radius = np.exp(rng.normal(3.1, 0.9, count)).clip(3, 200)  # median 22 pixels: 40 % small, 25 % large
        aspect = np.exp(rng.normal(0, 0.35, count))
        centre = rng.uniform(0, 1, (count, 2)) * (SIZE[1], SIZE[0])
        return np.column_stack([centre, radius * aspect, radius / aspect, rng.uniform(0, np.pi, count)])

    def objects(forms: np.ndarray, labels: np.ndarray, scores: np.ndarray | None) -> Instances:
        masks = Masks("rle", ellipse_codes(forms), SIZE)
        boxes = masks.boxes()
        there = boxes[:, 2] > boxes[:, 0]
        told = None if scores is None else torch.from_numpy(scores)[there].float()
        return Instances(SIZE, boxes[there], torch.from_numpy(labels)[there], masks[there], told)

    truths, found = [], []
    for _ in range(images):
        count = 1 + rng.poisson(6.3)
        forms, labels = shapes(count), rng.choice(CLASSES, count, p=frequency)
        truths.append(objects(forms, labels, None))
        # each object is found a few times, ever less well; the rest is out of nothing, of the image's own classes
        again = rng.integers(0, count, detections // 2)
        worse = rng.exponential(0.3, len(again))[:, None]
        near = forms[again]
        near[:, :2] += rng.normal(0, 1, (len(again), 2)) * near[:, 2:4] * worse
        near[:, 2:4] *= np.exp(rng.normal(0, 1, (len(again), 2)) * worse)
        near[:, 2:4] = near[:, 2:4].clip(2, 300)
        kinds = np.concatenate([labels[again], rng.choice(CLASSES, detections - len(again), p=frequency)])
        scores = np.concatenate([np.exp(-4 * worse[:, 0]), rng.beta(0.6, 4, detections - len(again))])
        scores = (scores * rng.uniform(0.6, 1, detections)).round(3)  # ties included
        found.append(objects(np.concatenate([near, shapes(detections - len(again))]), kinds, scores))
    return Made(truths), found


# ---- the two sides ---------------------------------------------------------------------------------------------------


def ours(data: Made, found: list[Instances], backend: str) -> dict[str, Any]:
    evaluator = Evaluator(data, ("segm", "bbox"), backend=backend)  # type: ignore[arg-type]
    start = time.perf_counter()
    for image_id, instances in zip(data.image_ids(), found, strict=True):
        evaluator.add(image_id, instances)
    added = time.perf_counter() - start
    result = evaluator.result(examples=0)
    took = time.perf_counter() - start
    seconds = {"add": added, "everything": took}
    start = time.perf_counter()
    for kind in evaluator.kinds:
        evaluator._curves(evaluator._annotations(), evaluator._predictions(), kind)  # AP alone, annotations at hand
    return {"seconds": {**seconds, "AP alone": time.perf_counter() - start}, "summary": result.summary}


def theirs(data: Made, found: list[Instances], _: str) -> dict[str, Any]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    start = time.perf_counter()
    truth: Any = COCO()
    annotations: list[dict[str, Any]] = []
    for image_id, target in zip(data.image_ids(), data.objects, strict=True):
        areas = target.masks.areas().tolist() if target.masks else []
        for record, area in zip(target.to_coco(image_id), areas, strict=True):
            annotations.append({**record, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in data.image_ids()],
        "categories": [{"id": c, "name": n} for c, n in zip(data.category_ids, data.classes, strict=True)],
        "annotations": annotations,
    }
    summary: dict[str, float] = {}
    records = [r for i, one in zip(data.image_ids(), found, strict=True) for r in one.to_coco(i)]
    made = time.perf_counter() - start
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        for kind, key in (("segm", "segmentation"), ("bbox", "bbox")):
            keep = ("image_id", "category_id", "score", key)
            engine = COCOeval(truth, truth.loadRes([{k: r[k] for k in keep} for r in records]), kind)
            engine.evaluate()
            engine.accumulate()
            engine.summarize()
            names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
            summary |= {f"{kind}/{n}": float(v) for n, v in zip(names, engine.stats, strict=True)}
    took = time.perf_counter() - start
    return {"seconds": {"making the records": made, "everything": took, "AP alone": took}, "summary": summary}


def measured(side: Callable[..., dict[str, Any]], store: str, backend: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    with Path(store).open("rb") as file:
        data, found = pickle.load(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = side(data, found, backend)
    outcome["peak"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pipe.send(outcome)


def apart(*arguments: Any) -> dict[str, Any]:
    """Runs one side in a fresh process and gives what it measured."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measured, args=(*arguments, there))
    process.start()
    outcome = here.recv()
    process.join()
    return outcome


# ---- run-length code -------------------------------------------------------------------------------------------------


def fastest(call: Callable[[], Any], rounds: int = 5) -> float:
    """Milliseconds of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def run_lengths(seed: int = 3) -> list[tuple[str, float, float]]:
    """(what, our ms, their ms) for 100 masks of 480 x 640, and of 3000 x 4000 where planes are the issue."""
    torch.set_num_threads(1)
    _, found = make(2, 100, seed)
    masks, others = found[0].masks, found[1].masks
    assert masks is not None
    assert others is not None
    planes = masks.dense()
    texts = [code["counts"] for code in masks.rle()]
    fortran = np.asfortranarray(planes.permute(1, 2, 0).numpy().astype(np.uint8))
    codes: Any = masks.rle()
    more: Any = others.rle()
    none = [False] * len(more)
    boxes = masks.boxes().long().tolist()
    crops = [planes[i, y0:y1, x0:x1] for i, (x0, y0, x1, y1) in enumerate(boxes)]
    corners = torch.tensor([box[:2] for box in boxes])
    large = (3000, 4000)
    spread = corners * 6

    def planes_then_encode() -> None:
        for crop, (x, y) in zip(crops, spread.tolist(), strict=True):
            plane = np.zeros((*large, 1), np.uint8, order="F")
            h, w = min(crop.shape[0], large[0] - y), min(crop.shape[1], large[1] - x)
            plane[y : y + h, x : x + w, 0] = crop[:h, :w].numpy()
            coco_mask.encode(plane)

    theirs_encoded = fastest(lambda: coco_mask.encode(fortran))
    theirs_decoded = fastest(lambda: coco_mask.decode(codes))
    return [
        ("encode planes, 480 x 640", fastest(lambda: Masks.from_dense(planes).pack()), theirs_encoded),
        ("encode crops, 480 x 640", fastest(lambda: Masks.from_crops(crops, corners, SIZE)), theirs_encoded),
        (
            "encode crops, 3000 x 4000",
            fastest(lambda: Masks.from_crops(crops, spread, large)),
            fastest(planes_then_encode, 2),
        ),
        ("decode to planes", fastest(masks.dense), theirs_decoded),
        ("decode to crops", fastest(masks.crops), theirs_decoded),
        ("check a stranger's strings", fastest(lambda: Masks.from_rle(texts, SIZE)), float("nan")),
        ("areas", fastest(masks.areas), fastest(lambda: coco_mask.area(codes))),
        ("boxes", fastest(masks.boxes), fastest(lambda: coco_mask.toBbox(codes))),
        ("overlaps 100 x 100", fastest(lambda: masks.iou(others)), fastest(lambda: coco_mask.iou(codes, more, none))),
    ]


def compare(counts: tuple[int, int], both: bool) -> dict[str, dict[str, Any]]:
    """Prints a line for each side as it finishes, and gives what each measured."""
    sides = [("ours on vernier", ours, "vernier")] if _version("vernier") != "not installed" else []
    sides += [("ours on pycocotools", ours, "pycocotools")] if both or not sides else []
    sides += [("pycocotools alone", theirs, "")]
    outcomes = {}
    print(f"{'':22}{'AP alone':>12}{'everything':>12}{'memory':>12}{'mask AP':>10}{'box AP':>10}")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "data.pickle"
        with store.open("wb") as file:
            pickle.dump(make(*counts), file)
        for title, side, backend in sides:
            outcome = outcomes[title] = apart(side, str(store), backend)
            seconds, summary = outcome["seconds"], outcome["summary"]
            print(
                f"{title:22}{seconds['AP alone']:>10.1f} s{seconds['everything']:>10.1f} s{outcome['peak']:>8.0f} MiB"
                f"{100 * summary['segm/AP']:>10.3f}{100 * summary['bbox/AP']:>10.3f}",
                flush=True,
            )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--both", action="store_true", help="also our evaluator without vernier, which takes minutes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes that are started from here
    counts = (arguments.images, arguments.detections)
    versions = {name: _version(name) for name in ("vernier", "pycocotools", "numpy", "torch")}
    print(f"{counts[0]:,} images of {SIZE[0]} x {SIZE[1]}, {counts[1]} predictions each, {CLASSES} classes; masks and")
    print(f"boxes; one thread; {', '.join(f'{n} {v}' for n, v in versions.items())}; maxDets 100; no images are read\n")

    outcomes = compare(counts, arguments.both)
    judge = outcomes["pycocotools alone"]["summary"]
    worst = max(abs(o["summary"][name] - value) for o in outcomes.values() for name, value in judge.items())
    print(f"\nlargest difference of any of the {len(judge)} figures to pycocotools': {worst:.1e}")
    print("everything: ours also counts confusions, per-class figures and the quality of each image;")
    print("memory: peak on top of the data\n")

    rows = run_lengths()
    print(f"{'100 masks':32}{'ours':>12}{'pycocotools':>14}")
    for what, mine, other in rows:
        print(f"{what:32}{mine:>9.2f} ms{other:>11.2f} ms")
    if arguments.json:
        values = {"counts": counts, "versions": versions, "sides": outcomes, "run lengths": rows}
        arguments.json.write_text(json.dumps(values, indent=1))
    return 0 if worst <= 1e-6 else 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
