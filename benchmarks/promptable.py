"""Speed of SAM and SAM 2 beside transformers', on the same random weights in one run.

    python benchmarks/promptable.py                                   # SAM 2.1 tiny and SAM ViT-B, on the CPU
    python benchmarks/promptable.py --device cuda --dtype bfloat16 float32 --only sam2
    python benchmarks/promptable.py --rounds 5 --memories 7 --json promptable.json

Needs transformers. Both sides get the same preprocessed tensors and alternate; the median of the rounds is printed, and
the largest relative difference of the answers:

- image: the image encoder, one image;
- prompts: 64 single points on one embedding, three masks each (and transformers with 20 points: the aim is that 64 of
  ours take as long as these);
- frame: a frame of a video with one object and as many memories as are read at most (SAM 2), image encoder included;
- everything: an image of 768 x 1024 pixels, `--side` x `--side` points with three masks each (SAM). Every mask passes
  the thresholds, up to the suppression of duplicates, because scores of random weights mean nothing. The difference is
  that of the numbers of objects.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maskwright as mw
from maskwright.inference.preparing import prepare
from maskwright.structures import Placement, Prompts
from maskwright.systems.kinds.video import Memory

SIDE = 1024


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds, and on a GPU peak GiB, of each call; the calls alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = dict.fromkeys(calls, 0.0)
    for number in range(rounds + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 2**30)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}, peaks


def difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double().cpu().flatten(), theirs.detach().double().cpu().flatten()
    return float((ours - theirs).norm() / theirs.norm())


def loaded(model: Any, folder: str, device: str, dtype: str) -> Any:
    """Our system with the weights of a model of transformers, read from its own files."""
    model.save_pretrained(folder)
    return prepare(mw.load(folder), device, dtype)


def points_of(count: int) -> Tensor:
    """Points on a grid over the input."""
    side = torch.arange(count, dtype=torch.float32)
    return torch.stack([(side * 37 + 11) % SIDE, (side * 91 + 29) % SIDE], 1)


def compare_images(
    name: str, model: Any, system: Any, arguments: argparse.Namespace, dtype: str
) -> list[dict[str, Any]]:
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    image = torch.randn(1, 3, SIDE, SIDE, device=arguments.device, dtype=kind)
    place = [Placement.identity((SIDE, SIDE))]
    rows = []
    embedding, theirs = system.embed(image, place)[0], model.get_image_embeddings(image)
    times, peaks = timed(
        {"ours": lambda: system.embed(image, place), "theirs": lambda: model.get_image_embeddings(image)},
        arguments.rounds, arguments.device,
    )  # fmt: skip
    last = theirs[-1] if isinstance(theirs, list | tuple) else theirs
    rows.append(
        {"what": "image", **ratio(times), "peak": peaks, "difference": difference(embedding.tensors["image"], last)}
    )

    def answer(count: int) -> Any:
        points = points_of(count).to(arguments.device)[None, :, None]
        labels = torch.ones(points.shape[:3], dtype=torch.int32, device=arguments.device)
        return model(image_embeddings=theirs, input_points=points.to(kind), input_labels=labels, multimask_output=True)

    prompts = Prompts((SIDE, SIDE), points_of(64)[:, None], torch.ones(64, 1, dtype=torch.int64))
    budget = 1 << 34 if arguments.device == "cuda" else 1 << 32
    found = system.segment(embedding, prompts, answers=3, budget=budget)
    wanted = answer(64).pred_masks[0]
    times, peaks = timed(
        {
            "ours": lambda: system.segment(embedding, prompts, answers=3, budget=budget), "theirs": lambda: answer(64),
            "20": lambda: answer(20),
        },
        arguments.rounds, arguments.device,
    )  # fmt: skip
    rows.append({"what": "64 prompts", **ratio(times), "theirs, 20 prompts": times["20"], "peak": peaks,
                 "difference": difference(found.logits, wanted)})  # fmt: skip
    return [{"system": name, "dtype": dtype, **row} for row in rows]


def compare_frames(model: Any, system: Any, arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    kind, device, count = getattr(torch, dtype), arguments.device, arguments.memories
    torch.manual_seed(0)
    video = torch.randn(count + 1, 3, SIDE, SIDE, dtype=kind)
    session = Sam2VideoInferenceSession(
        video=video, video_height=SIDE, video_width=SIDE, inference_device=device, inference_state_device=device,
        video_storage_device=device, dtype=kind,
    )  # fmt: skip
    row = session.obj_id_to_idx(1)
    point = {"point_coords": torch.tensor([[[[300.0, 400.0]]]]), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    session.add_point_inputs(row, 0, point)
    session.obj_with_new_inputs.append(1)
    place = [Placement.identity((SIDE, SIDE))]
    memory, prompts = Memory(fill_holes=0, length=count + 1), Prompts.from_points((SIDE, SIDE), [(300.0, 400.0)])
    for frame in range(count):
        model(session, frame_idx=frame)
        embedding = system.embed(video[frame : frame + 1], place)[0]
        _, memory = system.track(embedding, memory, prompts if frame == 0 else None)
    frame = video[count:]

    def ours() -> Any:
        return system.track(system.embed(frame, place)[0], memory, index=count)[0]

    def theirs() -> Any:
        session.cache.clear_all()
        return model(session, frame_idx=count)

    found, wanted = ours().logits[:, 0], theirs().pred_masks[:, 0]
    times, peaks = timed({"ours": ours, "theirs": theirs}, arguments.rounds, device)
    return [{"system": "sam2.1-hiera-tiny", "dtype": dtype, "what": f"frame, {count} memories", **ratio(times),
             "peak": peaks, "difference": difference(found, wanted)}]  # fmt: skip


def ratio(times: dict[str, float]) -> dict[str, float]:
    return {"ours": times["ours"], "theirs": times["theirs"], "ratio": times["ours"] / times["theirs"]}


def compare_everything(model: Any, system: Any, arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    from PIL import Image
    from transformers import MaskGenerationPipeline, SamImageProcessor

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(768, 1024), mode="bicubic").clamp(0, 1)[0] * 255
    image = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
    pipeline = MaskGenerationPipeline(
        model=model, image_processor=SamImageProcessor(), device=arguments.device, dtype=getattr(torch, dtype)
    )
    counts = dict[str, int]()

    def ours() -> None:
        counts["ours"] = len(
            system.predict(
                image, points_per_side=arguments.side, score_threshold=0.0, stability_score_thresh=0.0
            ).instances
        )

    def theirs() -> None:
        found = pipeline(
            image, points_per_batch=64, points_per_crop=arguments.side, pred_iou_thresh=0.0, stability_score_thresh=0.0
        )
        counts["theirs"] = len(found["masks"])

    times, peaks = timed({"ours": ours, "theirs": theirs}, max(1, arguments.rounds // 3), arguments.device)
    apart = abs(counts["ours"] - counts["theirs"]) / max(1, counts["theirs"])
    what = f"everything, {arguments.side**2} points"
    return [
        {"system": "sam-vit-b", "dtype": dtype, "what": what, **ratio(times), "peak": peaks, "difference": apart,
         "objects": counts}
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=["sam", "sam2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memories", type=int, default=7, help="frames before the one that is timed")
    parser.add_argument("--side", type=int, default=16, help="points along a side of the grid of everything")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel, SamConfig, SamModel

    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype:
        kind = getattr(torch, dtype)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            if arguments.only != "sam2":
                torch.manual_seed(0)
                model = SamModel(SamConfig()).eval()
                model.mask_decoder.iou_prediction_head.proj_out.bias += 0.5  # predicted IoUs are positive
                system = loaded(model, folder, arguments.device, dtype)
                rows += compare_images("sam-vit-b", model.to(arguments.device, kind), system, arguments, dtype)
                rows += compare_everything(model, system, arguments, dtype)
            if arguments.only != "sam":
                torch.manual_seed(0)
                video = Sam2VideoModel(Sam2VideoConfig()).eval()
                for value in video.parameters():
                    if not value.any():
                        value.normal_(std=0.02)
                system = loaded(video, folder, arguments.device, dtype)
                model = Sam2Model(Sam2Config()).eval()
                model.load_state_dict(video.state_dict(), strict=False)
                rows += compare_images("sam2.1-hiera-tiny", model.to(arguments.device, kind), system, arguments, dtype)
                rows += compare_frames(video.to(arguments.device, kind), system, arguments, dtype)
    print(f"{'system':18} {'dtype':9} {'what':20} {'ours':>8} {'theirs':>8} {'ratio':>6}  difference")
    for row in rows:
        extra = f"  (theirs with 20: {row['theirs, 20 prompts']:.3f} s)" if "theirs, 20 prompts" in row else ""
        peak = "".join(f"  {k} {v:.2f} GiB" for k, v in row["peak"].items() if v)
        print(
            f"{row['system']:18} {row['dtype']:9} {row['what']:20} {row['ours']:7.3f}s {row['theirs']:7.3f}s "
            f"{row['ratio']:6.2f}  {row['difference']:.1e}{extra}{peak}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
