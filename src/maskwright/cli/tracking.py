"""The command `track`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from maskwright.cli.arguments import ClassNames, Device, Dtype, Integer, Output, Tracker, Weights, device_named
from maskwright.errors import UsageError
from maskwright.terminal import print_error, print_line


def track(
    video: Annotated[str, arg(metavar="VIDEO")],
    /,
    *,
    out: Output = Path("tracked"),
    weights: Weights = None,
    points: Annotated[tuple[str, ...], arg(metavar="X,Y")] = (),
    boxes: Annotated[tuple[str, ...], arg(metavar="X0,Y0,X1,Y1")] = (),
    prompts: Annotated[str | None, arg(metavar="FILE")] = None,
    from_: Annotated[str | None, arg(name="from", metavar="FILE|NAME")] = None,
    tracker: Annotated[Tracker | None, arg(metavar="{iou,bytetrack,sort,ocsort}")] = None,
    classes: ClassNames = None,
    frame: int = 0,
    count: Integer = None,
    every: Integer = None,
    score_threshold: float = 0.5,
    format: tuple[Literal["masks", "coco", "drawn", "video"], ...] = ("masks", "coco"),
    overlap: bool = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compile: bool = False,
    commercial_ok: bool = False,
) -> int:
    """Follow objects through a video. VIDEO is a video file or a folder of frames.

    SAM 2 follows the objects of prompts, or those that another system detects (--from). With --tracker, any image
    system detects objects in every frame, and a tracker gives them ids.

    OUT/masks/NAME.png       the id of the object of each pixel, indexed as in DAVIS (0 is background)
    OUT/results.json         COCO results with track_id; OUT/frames.json lists the frames that image ids refer to
    OUT/drawn/NAME.jpg       the frame with its objects drawn over it
    OUT/tracked.mp4          the same as a video

    Results are written frame by frame. If the video is damaged or ends early, the results before are kept, and the exit
    code is 1.

    Examples:
      maskwright track clip.mp4 --weights sam2.1_hiera_tiny.pt --points 210,340 '90,80;120,60,0' --boxes 90,80,400,390
      maskwright track frames/ -w sam2.1_hiera_tiny.pt --prompts prompts.json --format masks video
      maskwright track clip.mp4 -w sam2.1_hiera_tiny.pt --from runs/first/best.safetensors --every 30
      maskwright track street.mp4 -w mask-rcnn-r50-fpn-3x --tracker iou --classes person,car --format coco video

    Args:
        video: A video file (needs the extra video), or a folder of images, in the order of the numbers in their names.
        out: Folder for the results.
        weights: Weights of SAM 2, or with --tracker those of any image system; or a name of the catalogue (`maskwright
            checkpoints`).
        points: Prompts, an object each: X,Y, or several points X,Y;X,Y,0 of which those with 0 are outside of the
            object.
        boxes: Prompts, an object each.
        prompts: JSON file of prompts: a list of objects, or a mapping from frames to such lists, see the documentation.
        from_: Weights of any image system (shipped: installed ones), whose detections in the frame become the objects;
            or a file with detections (results.json of predict, or a COCO file). Classes are kept.
        tracker: Track what the image system of --weights detects: iou associates by the IoU of masks; the others are
            those of the library trackers, which associate boxes (extra track).
        classes: Names of the classes to detect, separated by commas; default: all.
        frame: The frame of the prompts, counted from 0, in which tracking begins.
        count: Maximum number of frames.
        every: With weights in --from, look for new objects in every N-th frame.
        score_threshold: Detections of --from that score less are left out. With --tracker, they begin no track.
        format: What to write, one or more.
        overlap: Let masks of different objects overlap. Detections of --tracker always may, except in the maps of ids.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network.
        compile: Compile the network first: slower to start, faster per frame.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.checkpoints.shipping import resolved
    from maskwright.inference.following import (
        DetectedStart,
        follow,
        follow_detections,
        prompt_from_book,
        prompt_from_file,
    )
    from maskwright.inference.frames import open_frames
    from maskwright.inference.prompting import read_detections, written_prompts
    from maskwright.inference.selecting import split_names
    from maskwright.inference.track_output import TrackWriter
    from maskwright.inference.tracking import LOWEST, detection_tracker
    from maskwright.inference.video import VideoSession

    if weights is None:
        raise UsageError("track requires --weights: a file, or a name in the catalogue, such as sam2.1-hiera-tiny")
    if bool(points or boxes) + (prompts is not None) + (from_ is not None) + (tracker is not None) != 1:
        raise UsageError(
            "track requires prompts: --points and --boxes, or --prompts, or --from; or --tracker, with which "
            "any image system detects the objects"
        )
    if frame < 0 or (count is not None and count < 1):
        raise UsageError(f"--frame must be at least 0 and --count at least 1, got {frame} and {count}")
    if classes is not None and tracker is None and (from_ is None or from_.endswith(".json")):
        raise UsageError("--classes needs an image system: weights in --from, or --tracker")
    if every is not None and (every < 1 or from_ is None or from_.endswith(".json")):
        raise UsageError("--every needs the weights of an image system in --from, and a number of at least 1")

    def names(known: Sequence[str]) -> list[str] | None:
        return None if classes is None else split_names([classes], known)

    place = device_named(device)
    with open_frames(video) as frames:
        role = "video" if tracker is None else "instances"
        system = load(str(resolved(weights, role)), commercial_ok=commercial_ok)
        if tracker is not None:
            if "masks" in format and "masks" not in system.outputs:
                raise UsageError(f"{system.name} predicts no masks; choose from --format coco drawn video")
            follower = detection_tracker(tracker, score_threshold, frames.rate)
            with TrackWriter(out, format, rate=frames.rate, classes=system.classes) as writer:
                problem = follow_detections(
                    system, frames, writer, follower, first=frame, count=count, classes=names(system.classes),
                    score_threshold=min(LOWEST, score_threshold), device=place, dtype=dtype, compile=compile,
                )  # fmt: skip
            found = writer.ids
        else:
            session = VideoSession(system, frames, device=place, dtype=dtype, compile=compile, overlap=overlap)
            if prompts is not None:
                start = prompt_from_file(session, prompts, frame)
            elif from_ is not None and not from_.endswith(".json"):
                detector = load(str(resolved(from_)), commercial_ok=commercial_ok)
                options = {"device": place, "classes": names(detector.classes)}
                start = DetectedStart(session, detector, score_threshold, options)
                if start.detect(frame) is None:
                    raise UsageError(f"{from_}: finds nothing in frame {frame} (--score-threshold {score_threshold:g})")
            else:
                book = read_detections(from_) if from_ is not None else written_prompts(points, boxes)
                start = prompt_from_book(session, frame, book, score_threshold)
            first = frame if prompts is None else session.first
            with TrackWriter(out, format, rate=frames.rate, classes=start.classes, labels=start.labels) as writer:
                problem = follow(session, writer, start, first, count=count, every=every)
            found = session.ids
    done, objects = len(writer.frames), len(found)
    print_line(f"{objects} object{'s' * (objects != 1)} in {done} frame{'s' * (done != 1)}: {out}")
    if problem is not None:
        print_error(f"maskwright: {problem}; the results of {done} frames are kept")
    return 1 if problem is not None else 0
