"""One image in every form of a system on this processor, beside the fastest peer: seconds and processor seconds.

    python benchmarks/exported.py                                  # all systems at their published sizes
    python benchmarks/exported.py mask-rcnn --size 240x320 --repeats 3 --small
    python benchmarks/exported.py mask-rcnn yolact --forms eager onnx openvino int8 --out exported.json

Forms: eager float32, bfloat16 (where the processor has instructions for it), compiled (weights frozen), ONNX Runtime,
and OpenVINO in float32, bfloat16, int8, and int8 with the rest in bfloat16. Peers: torchvision's Mask R-CNN, RetinaNet
and FCOS, and transformers' Mask2Former and EoMT, with random weights of the same layers; the time of these networks
does not depend on the values, except that the number of candidate objects does. Every figure is for one image from
8-bit pixels to masks on the image: preprocessing and decoding included. Wall time depends on what else runs: processor
seconds and the load average are printed beside it. int8 is calibrated on generated scenes here, in all layers, so its
accuracy says nothing; `maskwright export --int8` measures accuracy on your data, and quantises less if it must.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import maskwright as mw
from maskwright.data.scenes import Scenes
from maskwright.inference.exporting import quantising, writing
from maskwright.inference.preparing import has_bfloat16, prepare

SYSTEMS = {
    "mask-rcnn": ("mask-rcnn-r50-fpn-torchvision", "mask-rcnn-small"),
    "yolact": ("yolact-r50", "yolact-small"),
    "mask2former": ("mask2former-r50", "mask2former-small"),
    "eomt": ("eomt-s-panoptic-640", "eomt-small"),
    "retinanet": ("retinanet-r50-fpn-torchvision", "retinanet-small"),
    "fcos": ("fcos-r50-torchvision", "fcos-small"),
}
FORMS = ("peer", "eager", "bfloat16", "compiled", "onnx", "openvino", "openvino-bfloat16", "int8", "int8-bfloat16")


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median wall and processor seconds of `repeats` calls, after one that is not counted."""
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    wall, processor = [], []
    for _ in range(repeats):
        begin, own = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - own)
    return {
        "seconds": statistics.median(wall), "cpu_seconds": statistics.median(processor), "first": first,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def peer(name: str, small: bool) -> Callable[[np.ndarray], Any] | None:
    """The fastest other implementation of a system, from pixels to masks; None if none is installed, or for `small`."""
    if small:
        return None
    if name in ("mask-rcnn", "retinanet", "fcos"):
        from torchvision.models import detection

        make = {
            "mask-rcnn": detection.maskrcnn_resnet50_fpn, "retinanet": detection.retinanet_resnet50_fpn,
            "fcos": detection.fcos_resnet50_fpn,
        }[name]  # fmt: skip
        network = make(weights=None, weights_backbone=None).eval()
        return lambda image: network([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    try:
        import transformers
    except ImportError:
        return None
    if name == "mask2former":
        backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        network: Any = transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(backbone_config=backbone)
        ).eval()
        processor: Any = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})
    elif name == "eomt" and hasattr(transformers, "EomtForUniversalSegmentation"):
        config = transformers.EomtConfig(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=640)
        network = transformers.EomtForUniversalSegmentation(config).eval()
        processor = transformers.EomtImageProcessor(size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True)
    else:
        return None

    def run(image: np.ndarray) -> Any:
        inputs = processor(images=image, return_tensors="pt")
        outputs = network(**{k: v for k, v in inputs.items() if k in ("pixel_values", "pixel_mask", "patch_offsets")})
        return processor.post_process_instance_segmentation(outputs, target_sizes=[image.shape[:2]])

    return run


def rows_of(name: str, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Every form of one system."""
    preset = SYSTEMS[name][int(options.small)]
    things = {"stuff": ()} if name in ("eomt", "mask2former") else {}
    system = mw.create(preset, classes=[f"class {n}" for n in range(options.classes)], **things).eval()
    height, width = (int(side) for side in options.size.split("x"))
    scenes = Scenes(8, (height, width), seed=5)
    image = scenes[0].image
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    rows: dict[str, dict[str, float]] = {}
    # That of the peers. Random weights find no object with it; with a lower one their masks are noise, which takes
    # longer to encode than masks of objects.
    threshold: dict[str, Any] = {"score_threshold": 0.5} if name in ("eomt", "mask2former") else {}

    def add(form: str, function: Callable[[], Any]) -> None:
        if form in options.forms:
            with torch.no_grad():
                rows[form] = measure(function, options.repeats)
            print(f"  {form:18} {rows[form]['seconds']:8.3f} s {rows[form]['cpu_seconds']:8.3f} s of the processor",
                  flush=True)  # fmt: skip

    def predicting(ready: mw.System, **more: Any) -> Callable[[], Any]:
        return lambda: mw.predict(ready, image, device="cpu", **threshold, **more).found()

    print(f"{name} ({preset}, {height} x {width})", flush=True)
    other = peer(name, options.small) if "peer" in options.forms else None
    if other is not None:
        add("peer", lambda: other(pixels))
    add("eager", predicting(prepare(system, "cpu")))
    if has_bfloat16(torch.device("cpu")):
        add("bfloat16", predicting(prepare(system, "cpu", "bfloat16"), dtype="bfloat16"))
    if "compiled" in options.forms:
        add("compiled", predicting(prepare(system, "cpu", compile="frozen"), compile="frozen"))
    if "onnx" in options.forms:
        writing.export(system, folder / f"{name}.onnx", check=False)
        add("onnx", predicting(mw.load(folder / f"{name}.onnx")))
    if {"openvino", "openvino-bfloat16", "int8", "int8-bfloat16"} & set(options.forms):
        writing.export(system, folder / f"{name}.xml", check=False)
        plain = mw.load(folder / f"{name}.xml")
        add("openvino", predicting(plain))
        if has_bfloat16(torch.device("cpu")):
            add("openvino-bfloat16", predicting(plain, dtype="bfloat16"))
        if {"int8", "int8-bfloat16"} & set(options.forms):
            plain = mw.load(folder / f"{name}.xml")
            quantising.record(plain, scenes, folder / f"{name}-feeds")
            quantising.quantise(plain, folder / f"{name}-feeds", "every", folder / f"{name}-int8.xml")
            smaller = mw.load(folder / f"{name}-int8.xml")
            add("int8", predicting(smaller))
            if has_bfloat16(torch.device("cpu")):
                add("int8-bfloat16", predicting(smaller, dtype="bfloat16"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--size", default="480x640", help="of the image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--small", action="store_true", help="the small presets, without peers")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    flags = [
        k for k in ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if torch.cpu.get_capabilities().get(k)
    ]
    print(f"{platform.processor() or platform.machine()}: {', '.join(flags)}; {options.threads} threads; torch "
          f"{torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.systems:
            found[name] = rows_of(name, options, Path(folder))
            best = min(found[name].items(), key=lambda row: row[1]["cpu_seconds"])
            base = found[name].get("peer", found[name].get("eager"))
            if base is not None:
                share = best[1]["cpu_seconds"] / base["cpu_seconds"]
                print(
                    f"  best: {best[0]}, {share:.2f} of {'the peer' if 'peer' in found[name] else 'eager'}", flush=True
                )
    print("\n| system | " + " | ".join(options.forms) + " |\n|---|" + "--:|" * len(options.forms))
    for name, rows in found.items():
        cells = [f"{rows[form]['cpu_seconds']:.3f}" if form in rows else "" for form in options.forms]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.out is not None:
        options.out.write_text(json.dumps({"flags": flags, "threads": options.threads, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
