"""The command that checks and repairs data sets: `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from maskwright.cli.arguments import Name
from maskwright.terminal import print_line


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

    Args:
        source: A folder with annotations/ and images, or one COCO file.
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
