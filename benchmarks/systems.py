"""Every system's latency and memory at its paper's input size, beside Mask R-CNN's, in one run.

    python benchmarks/systems.py --json systems.json                      # the whole table: some five minutes a row
    python benchmarks/systems.py --filled DIR --fill-only --learn 900     # on busy cores; then without it
    python benchmarks/systems.py --device cuda --dtype bfloat16           # on a GPU
    python benchmarks/systems.py yolact-r101 mask-rcnn-r101-fpn --rounds 5

A row for each preset of PAPERS, and for each system of the registry that has none there its first preset. Nobody's
weights are needed. Random ones, though, would give numbers that explode or vanish, and a decoder nothing to do, so a
first process fills a network:

1. Every batch norm takes its statistics from an image, layer by layer, as trained ones have them.
2. The raw output itself is learnt by heart (`--learn` seconds, by the system's own losses): a hundred objects of the
   sizes that images have, so that each decoder has the same ones to find, by its default thresholds.
3. Where that is not possible in that time (systems that learn in a second stage), the classes' biases are raised until
   the default thresholds let a hundred objects pass; their masks are then what random weights make of them.

Columns `objects`, `pixels` (mean area of a mask; those to be found have about 2900) and `filled` say how far it came:
compare times with decoding only between rows where these are alike.

A second process (on a GPU, whose start takes longer than a row, one for all rows) measures: the network, then decoding
up to compact masks on the image's own grid of 600 x 800; the fastest of several rounds. `peak MiB` is what forward
and decode need beyond weights and input: on the host the growth of the resident size at its highest (the kernel's own
mark, set back before), on a GPU what is allocated at most. `products` are multiplications (each with an addition) of
convolutions and matrix products, network and decoding together.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskwright.blocks.layers import FrozenBatchNorm
from maskwright.data import Scenes
from maskwright.evaluation.measuring import run_network
from maskwright.evaluation.speed import Stopwatch
from maskwright.inference import prepare
from maskwright.inference.preparing import PRECISIONS
from maskwright.structures import Instances, Masks
from maskwright.systems import create, names, system_class

SIZE, WANTED = (600, 800), 100

# preset: what its authors say, frames per second on which card
PAPERS = {
    "mask-rcnn-r50-fpn": "",
    "mask-rcnn-r101-fpn": "8.6 (Titan Xp, YOLACT's table)",
    "tensormask-r50": "2.6 with R101 (V100, third-party note)",
    "yolact-r101": "33.5 (Titan Xp)",
    "yolact-r50": "42.5 (Titan Xp)",
    "yolact-darknet53": "40.0 (Titan Xp)",
    "yolact-plus-r50": "33.5 (Titan Xp)",
    "yolact-plus-r101": "27.3 (Titan Xp)",
    "solo-r50": "12.1 (V100; 77 ms in its repository)",
    "decoupled-solo-r50": "85 ms in its repository",
    "solov2-r50": "54 ms in its repository",
    "solov2-light-448-r50": "24 ms in its repository",
    "embedmask-r50": "",
    "polarmask-r50": "17.2 (V100, paper); 23.9 in its repository",
    "ese-seg-darknet53": "38.5 (26 ms)",
    "fouriernet-r50": "",
    "deepsnake-sbd": "32.3 (1080 Ti)",
}


def rows() -> list[str]:
    """The presets of the table, in the order of the registry."""
    found = []
    for name in names():
        own = system_class(name).presets
        found += [preset for preset in PAPERS if preset in own] or list(own)[:1]
    return found


# ---- filling a network -----------------------------------------------------------------------------------------------


def fill(preset: str, device: str, seconds: float, path: Path, pipe: Any) -> None:
    """Writes weights, and a raw output if one could be learnt, to `path`; sends how it came about."""
    torch.manual_seed(0)
    system = made(preset).to(device).eval()
    batch = system.preprocess.collate([Scenes(1, size=SIZE, seed=5)[0].image])
    begun = time.perf_counter()
    with torch.no_grad(), statistics_taken(system):
        raw = run_network(system, batch, torch.device(device), torch.float32)
    learnt, how = None, "not tried"
    if seconds > 0:
        try:
            learnt, how = by_heart(system, raw, batch, seconds)
        except Exception as error:  # what it learns from is not in this image
            how = f"{type(error).__name__}: {error}"
    if learnt is None:
        system.load_state_dict(made(preset).state_dict(), strict=False)  # what half a lesson has left is undone
        with torch.no_grad(), statistics_taken(system):
            run_network(system, batch, torch.device(device), torch.float32)
        how = f"biases, {raised(system, batch, torch.device(device)):+.1f} (by heart: {how})"
    content = {"weights": system.state_dict(), "raw": mapped(learnt, lambda v: v.cpu()), "how": how}
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    pipe.send({"filled": how, "filling s": round(time.perf_counter() - begun)})


def made(preset: str) -> Any:
    torch.manual_seed(0)
    return create(preset, classes=tuple(f"class {i}" for i in range(80)))


class statistics_taken:
    """Inside, each batch norm (frozen ones too) that an image passes keeps the image's statistics."""

    def __init__(self, system: nn.Module):
        self.norms = [m for m in system.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm))]

    def __enter__(self) -> None:
        self.hooks = [norm.register_forward_pre_hook(self.look) for norm in self.norms]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def look(norm: Any, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0].float(), [d for d in range(inputs[0].ndim) if d != 1], correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def objects(classes: int, seed: int = 0) -> Instances:
    """A hundred lumps of many sizes, side by side."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    columns = round((WANTED * width / height) ** 0.5)
    cell = np.array([width / columns, height / -(-WANTED // columns)])
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rings = []
    for number in range(WANTED):
        middle = (np.array([number % columns, number // columns]) + 0.5) * cell
        radius = 0.5 * cell.min() * np.exp(rng.uniform(-0.7, 0.3))
        radius = radius * (1 + 0.25 * np.sin(angle * rng.integers(2, 5) + rng.uniform(0, 6)))
        stretch = np.exp(rng.uniform(-0.3, 0.3) * np.array([1, -1]))
        points = middle + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) * stretch
        rings.append([points.clip(0, (width, height))])
    masks = Masks.from_polygons(rings, SIZE)
    return Instances(SIZE, masks.boxes(), torch.from_numpy(rng.integers(0, classes, WANTED)), masks.pack())


def by_heart(system: Any, raw: Any, batch: Any, seconds: float) -> tuple[Any, str]:
    """A raw output that says those objects, learnt by the system's losses, with what of the system reads it; None if
    that was not to be done in time. And how long it took."""
    target, placement = objects(len(system.classes)), batch.placements[0]
    size = (batch.images.shape[-2], batch.images.shape[-1])
    assert target.masks is not None
    frames, crops = target.masks.place(placement).crops()
    masks = Masks.from_crops(crops, frames[:, :2], size)  # padding included
    truth = Instances(size, placement.boxes_to_input(target.boxes), target.labels, masks).to(leaves(raw)[0].device)
    raw = mapped(raw, lambda v: v.detach().float().clone().requires_grad_())
    heads = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": leaves(raw), "lr": 0.1}, {"params": heads, "lr": 1e-3}])
    begun, area, steps, slowest = time.perf_counter(), float(target.masks.areas().float().mean()), 0, 0.0
    while time.perf_counter() - begun + slowest < seconds and slowest < seconds / 8:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(system.losses(raw, [truth]).values())).sum().backward()
        optimizer.step()
        steps += 1
        if steps % 8 == 0:
            found = system.decode(mapped(raw, Tensor.detach), [placement])[0]
            if len(found) >= WANTED and 0.7 * area < mean_area(found) < 1.4 * area:
                return mapped(raw, Tensor.detach), f"by heart, {steps} steps"
        slowest = max(slowest, time.perf_counter() - start)
    found = system.decode(mapped(raw, Tensor.detach), [placement])[0]
    kept = len(found) >= 0.9 * WANTED and 0.3 * area < mean_area(found) < 3 * area
    return mapped(raw, Tensor.detach) if kept else None, f"{steps} steps, {len(found)} of {mean_area(found):.0f} pixels"


def raised(system: Any, batch: Any, device: torch.device) -> float:
    """Raises the classes' biases until the default thresholds let the wanted number of objects pass; by how much.

    Priors in other biases are taken away, so that a mask has its half above the threshold. Where some classifiers
    know a background, these decide; trunk and neck are computed once."""
    rows, parameters = system.class_rows(), dict(system.named_parameters()) | dict(system.named_buffers())
    some = any(row.background_last for row in rows.values())
    chosen = {k: r for k, r in rows.items() if k.endswith("bias") and (r.background_last or not some)}
    starts = {k: parameters[k].detach().clone() for k in chosen}
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith("bias") and name not in chosen and value.numel() > 1 and bool((value == value[0]).all()):
                value.zero_()
    still = [m for part in ("backbone", "neck") for m in system.groups().get(part, [])]
    for module in still:
        module.forward = remembered(module.forward)

    def count(shift: float) -> int:
        with torch.no_grad():
            for name, row in chosen.items():
                more = torch.full_like(starts[name].unflatten(0, (row.repeats, -1)), shift)
                if row.background_last:
                    more[:, -row.per_class :] = 0
                parameters[name].copy_(starts[name] + more.flatten())
            raw = run_network(system, batch, device, torch.float32)
            return len(system.decode(raw, batch.placements)[0])

    low, high = -8.0, 24.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if count(middle) >= WANTED else (middle, high)
    count(high)
    for module in still:
        del module.forward
    return high


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which from its second call on gives what it gave first."""
    given: list[Any] = []

    def first(*inputs: Any) -> Any:
        if not given:
            given.append(function(*inputs))
        return given[0]

    return first


def leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, lambda v: (found.append(v), v)[1])
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A raw output with each of its tensors of fractions changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        )
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    return {k: mapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def mean_area(found: Instances) -> float:
    return float(found.masks.areas().float().mean()) if found.masks is not None and len(found) else 0.0


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_apart(*arguments: Any) -> None:
    """`measure` for `in_process`."""
    *arguments, pipe = arguments
    pipe.send(measure(*arguments))


def measure(preset: str, dtype: str, device: str, rounds: int, compile: bool, path: Path) -> dict[str, Any]:
    filled = torch.load(path, weights_only=False)  # written by the process before this one
    system = made(preset)
    system.load_state_dict(filled["weights"])
    system = prepare(system, device, dtype, compile)
    place, kind = torch.device(device), PRECISIONS[dtype]
    batch = system.preprocess.collate([Scenes(1, size=SIZE, seed=5)[0].image])
    learnt = filled.pop("raw")
    if learnt is not None:
        learnt = mapped(learnt, lambda v: v.to(place, kind))
    del filled
    done = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    times, found = [], None
    with torch.no_grad():
        for number in range(rounds + 2):
            if number == 1:  # after one round that loads whatever is loaded once, a round for the memory alone
                before = reset_peak(place)
            begun = time.perf_counter()
            raw = run_network(system, batch, place, kind)
            done()
            between = time.perf_counter()
            found = system.decode(raw if learnt is None else learnt, batch.placements)[0]
            done()
            ended = time.perf_counter()
            del raw
            if number == 1:
                peak = peak_since(place, before)  # pyright: ignore[reportPossiblyUnboundVariable]
            if number > 1 or rounds == 0:
                times.append((between - begun, ended - between))
        watch = Stopwatch(place)
        with watch.watching(system):
            for _ in range(max(1, rounds)):
                with watch.batch(1):
                    raw = run_network(system, batch, place, kind)
                    system.decode(raw if learnt is None else learnt, batch.placements)
        stages = watch.speed(0).stages
        with FlopCounterMode(display=False) as counter:
            system.decode(run_network(system, batch, place, kind) if learnt is None else learnt, batch.placements)
            if learnt is not None:
                run_network(system, batch, place, kind)
    assert found is not None
    network, decoding = min(t[0] for t in times), min(t[1] for t in times)
    return {
        "input": "x".join(map(str, batch.images.shape[-2:])),
        "network ms": round(1e3 * network, 1),
        "decode ms": round(1e3 * decoding, 1),
        "of which ms": ", ".join(f"{name} {value:.1f}" for name, value in stages.items()),
        "frames per second": round(1 / (network + decoding), 2),
        "peak MiB": round(peak),  # pyright: ignore[reportPossiblyUnboundVariable]
        "objects": len(found),
        "pixels": round(mean_area(found)),
        "parameters / 1e6": round(sum(p.numel() for p in system.parameters()) / 1e6, 1),
        "products / 1e9": round(counter.get_total_flops() / 2e9, 1),
    }


def reset_peak(device: torch.device) -> float:
    """Sets the mark of the highest use back to the present one, and says that, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the kernel, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return resident("VmRSS")


def peak_since(device: torch.device, before: float) -> float:
    highest = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident("VmHWM")
    return highest - before if before == before else -1  # -1: this system does not tell


def resident(mark: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(mark))


# ---- the table -------------------------------------------------------------------------------------------------------


def in_process(function: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What `function` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": function.__name__}
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=f"default: {', '.join(rows())}")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learn", type=float, default=240, help="seconds at most; 0: biases alone")
    parser.add_argument("--filled", type=Path, help="folder: networks filled by an earlier run are taken from there")
    parser.add_argument("--fill-only", action="store_true", help="fill, do not measure: that can be done on busy cores")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too, after every row")
    chosen = parser.parse_args()
    card = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in chosen.presets or rows():
            path = Path(chosen.filled or folder) / f"{preset}.pt"
            if chosen.filled and path.exists():
                row = {"preset": preset, "filled": torch.load(path, weights_only=False, mmap=True)["how"]}
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                row = {"preset": preset} | in_process(fill, preset, chosen.device, chosen.learn, path)
            if "failed" not in row and not chosen.fill_only:
                how = (preset, chosen.dtype, chosen.device, chosen.rounds, chosen.compile, path)
                row |= measure(*how) if chosen.device.startswith("cuda") else in_process(measure_apart, *how)
            row["its authors"] = PAPERS.get(preset, "")
            table.append(row)
            print(json.dumps(row), flush=True)
            if chosen.json:
                figures = {"torch": torch.__version__, "on": card, "dtype": chosen.dtype, "rows": table}
                chosen.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
