"""The command that opens the annotation page: `annotate`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from maskwright.cli.arguments import ClassNames, Device, Directory, Dtype, Integer, Name, Weights, device_named
from maskwright.cli.serving import TOKEN
from maskwright.terminal import print_line


def annotate(
    source: Annotated[str, arg(metavar="DIR")],
    /,
    *,
    weights: Weights = None,
    suggest: Annotated[str | None, arg(metavar="FILE|NAME")] = None,
    suggest_threshold: float = 0.5,
    train: Annotated[str | None, arg(metavar="SYSTEM|FILE")] = None,
    classes: ClassNames = None,
    out: Directory = None,
    split: Name = None,
    format: Name = None,
    images: Directory = None,
    clip: bool = False,
    user: Name = None,
    host: str = "127.0.0.1",
    port: Integer = None,
    token: Name = None,
    no_browser: bool = False,
    max_pixels: int = 1 << 27,
    cache_bytes: int = 4 << 30,
    threads: Integer = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    commercial_ok: bool = False,
) -> int:
    """Annotate images or a clip in a page of the browser, with clicks, boxes, polygons and a brush.

    DIR is a folder of images, a video file, or a data set in any format that is read, whose annotations are loaded.
    Every edit is on the disk when the page shows it, in DIR/.maskwright; the data set itself is never changed. The page
    exports to every format that convert-data writes.

    With the weights of a promptable system a click gives a mask. With --suggest, the objects that another system finds
    are shown to be accepted or corrected, least certain images first.

    Only this machine can reach the server unless --host is given; then a token is needed, which is printed with the
    address.

    Examples:
      maskwright annotate photos/ --classes cat,dog
      maskwright annotate photos/ --weights mobile_sam.pt --suggest runs/first/best.safetensors
      maskwright annotate clip.mp4 --weights sam2.1_hiera_tiny.pt --classes person
      maskwright annotate my-coco/ --split val --user alice

    Args:
        source: A folder of images, a video file (needs the extra video), or a data set.
        weights: A promptable system such as SAM: a file, or a name of the catalogue (`maskwright checkpoints`);
            default: the one that is installed with this library, if there is one; none: masks are drawn by hand.
        suggest: A trained system whose objects are suggested.
        suggest_threshold: Objects with lower scores are not suggested.
        train: What the page trains on the labelled images: a system, a preset, or weights to continue from; default:
            those of --suggest, or mask-rcnn-small.
        classes: Names of classes, in addition to those of the data set and of earlier sessions.
        out: Folder of the annotations and of exports; default: DIR/.maskwright.
        split: Open only this split of a data set.
        format: The format of the data set, if several fit.
        images: The folder of the images of a data set, if they are elsewhere.
        clip: The images of DIR are the frames of a clip.
        user: Your name, for the record of who made each mask.
        host: Address to listen on.
        port: Its port; default: 8765, or a free one.
        token: Value that the address of the page must have; default: none, or random if --host is given.
        no_browser: Do not open a browser.
        max_pixels: Most pixels of an image.
        cache_bytes: Most bytes of stored image embeddings.
        threads: Threads of the networks on a CPU; default: PyTorch's.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the promptable system.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.web.guard import is_loopback
    from maskwright.web.starting import Plan, run

    secret = token or os.environ.get(TOKEN) or (None if is_loopback(host) else secrets.token_urlsafe(24))
    plan = Plan(
        source=source,
        weights=weights,
        suggest=suggest,
        threshold=suggest_threshold,
        train=train,
        classes=tuple(name for name in (classes or "").split(",") if name.strip()),
        out=None if out is None else Path(out),
        split=split,
        format=format,
        images=images,
        clip=clip,
        user=user,
        host=host,
        port=port,
        token=secret,
        browser=not no_browser,
        max_pixels=max_pixels,
        cache_bytes=cache_bytes,
        threads=threads,
        device=device_named(device),
        dtype=dtype,
        commercial_ok=commercial_ok,
    )
    run(plan, print_line)
    return 0
