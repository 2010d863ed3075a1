"""Commands about data sets: `check` and `convert-data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from maskwright.cli.arguments import Name
from maskwright.terminal import print_error, print_line


def check(
    source: Annotated[str, arg(metavar="DIR")],
    /,
    *,
    fix: Annotated[Path | None, arg(metavar="OUT")] = None,
    split: Name = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    link: bool = False,
    follow_links: bool = False,
    bands: tuple[int, ...] = (),
) -> int:
    """Check a data set before training; every finding names its file and annotation.

    The exit code is 0 if the data set can be trained on, perhaps without what is skipped; 1 if `train` would refuse it;
    2 if it could not be checked. With --fix, the copy is checked too and decides. The data set is never changed.

    Examples:
      maskwright check my-images
      maskwright check my-images --fix my-images-repaired
      maskwright check yolo:my-images

    Args:
        source: A data set in any format (see convert-data), or one annotation file.
        fix: Write a repaired copy into this folder.
        split: Check this split only; default: every split, and whether there is one to train on.
        images: The folder of the images; default: searched for.
        link: Make hard links to the images instead of copies; editing an image then changes both.
        follow_links: Copy images that symbolic links outside of the image folder point to, which are omitted otherwise.
        bands: Bands that will be read from images with other bands than RGB, from 1 (train --option resize.bands).
    """
    from maskwright.data import check as run

    findings = run(
        source, fix=fix, split=split, images=images, bands=bands or None, link=link, follow_links=follow_links
    )
    print_line(str(findings))
    return 0 if findings.usable else 1


Format = Literal["coco", "coco-panoptic", "yolo", "labelme", "via", "cvat", "voc", "cityscapes", "label-maps"]


def convert_data(
    source: Annotated[str, arg(metavar="DIR")],
    out: Annotated[Path, arg(metavar="OUT")],
    /,
    *,
    to: Annotated[Format, arg(metavar="FORMAT")],
    split: Name = None,
    val: Annotated[str | None, arg(metavar="SHARE|DIR")] = None,
    seed: int = 0,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    allow_loss: bool = False,
    link: bool = False,
) -> int:
    """Write a data set, or the predictions of `predict`, in another format.

    All formats can be read: coco, coco-panoptic, yolo (segmentation, data.yaml), labelme, via, cvat (for images, XML),
    voc (SegmentationObject), cityscapes, label-maps (PNG or TIFF with object numbers). The format of DIR is detected;
    FORMAT:DIR selects it where several fit.

    What FORMAT cannot hold is listed, object by object, before anything is written; without --allow-loss, nothing is
    written then. OUT appears complete or not at all. The source is never changed.

    Examples:
      maskwright convert-data my-images my-yolo --to yolo
      maskwright convert-data exported.xml my-coco --to coco --images frames --val 0.2
      maskwright convert-data found/results.json suggestions --to labelme

    Args:
        source: A data set in any format, an annotation file, or the results.json of predict.
        out: The new folder.
        to: The format to write.
        split: Write this split only; default: all.
        val: Share of the images for validation, divided by class (0.2), or another data set that becomes the split val.
        seed: Seed of the division.
        images: The folder of the images; default: searched for.
        allow_loss: Write although objects lose something.
        link: Make hard links to the images instead of copies; editing an image then changes both.
    """
    from maskwright.data.convert import LossError
    from maskwright.data.convert import convert_data as run
    from maskwright.data.splitting import share_or_source

    share = None if val is None else share_or_source(val)
    try:
        result = run(
            source, out, to, split=split, val=share, seed=seed, images=images, allow_loss=allow_loss, link=link
        )  # fmt: skip
    except LossError as error:  # one line for each object
        for line in str(error).split("\n"):
            print_error(line)
        return 2
    print_line(str(result))
    return 0
