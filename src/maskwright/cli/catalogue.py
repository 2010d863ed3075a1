"""Commands about systems and published weights: `systems`, `checkpoints` and `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

from tyro.conf import Positional, arg

from maskwright.cli.arguments import Name
from maskwright.terminal import choose, print_line


def systems(name: Annotated[str | None, Positional, arg(metavar="[NAME]")] = None) -> int:
    """List the systems and their presets; with a NAME, its publication, capabilities and options.

    Examples:
      maskwright systems
      maskwright systems mask-rcnn

    Args:
        name: A system or preset.
    """
    from maskwright.options import groups_of, parameters_of, plain
    from maskwright.systems import describe, find, names, system_class

    if name is None:
        width = max(map(len, names()))
        for each in names():
            kind = system_class(each)
            print_line(f"{each:{width}}  {kind.card.title} (arXiv {kind.card.arxiv})")
            for preset, known in kind.presets.items():
                scores = ", ".join(f"{s.what} {s.value:g}" for s in known.published)
                print_line(f"  {preset:34} {scores or known.note}")
        print_line("more: maskwright systems NAME; weights to start from: maskwright checkpoints")
        return 0
    kind, _ = find(name)
    card = kind.card
    print_line(f"{kind.name}: {card.title}\n  paper: {card.paper}, arXiv {card.arxiv}")
    print_line(f"  code:  {card.code} ({card.code_licence})")
    system = describe(name)
    predicts, needs = ", ".join(sorted(system.outputs)), ", ".join(sorted({"boxes", *system.needs}))
    print_line(f"  predicts {predicts}; needs {needs} in training; tasks: {', '.join(sorted(system.tasks))}")
    print_line("options (train --option KEY=VALUE):")
    groups = groups_of(kind.__init__)
    for option, parameter in parameters_of(kind.__init__).items():
        value = system.options[option]
        if option in groups and isinstance(value, dict):
            for field, own in cast(dict[str, Any], value).items():
                print_line(f"  {option}.{field}={json.dumps(own, default=str)}")
        elif option != "classes":
            print_line(f"  {option}={json.dumps(value, default=str)}    {parameter.annotation}")
    for recipe, changes in kind.recipes.items():
        print_line(f"recipe {recipe} (train --recipe {recipe}): {json.dumps(dict(changes))}")
    for table, ablation in kind.ablations.items():
        print_line(f"table {table} (maskwright ablate {kind.name} {table}): {ablation.title}")
    for preset, known in kind.presets.items():
        if name in (preset, kind.name):
            print_line(f"preset {preset}: {json.dumps(plain(known.options), default=str)} {known.note}".rstrip())
            for score in known.published:
                print_line(f"  {score.what} {score.value:g}: {score.protocol} ({score.source})")
    return 0


def checkpoints(
    name: Annotated[str | None, Positional, arg(metavar="[NAME]")] = None,
    *,
    system: Name = None,
    commercial_ok: bool = False,
) -> int:
    """List the weights that can be named instead of a file, and their licences: installed ones, then published ones.

    With a NAME: its address, terms and published scores, or its model card. Nothing is downloaded here. When a command
    downloads a file, the terms are shown first, an interrupted download resumes, and the file is verified.

    Examples:
      maskwright checkpoints --commercial-ok
      maskwright checkpoints mask-rcnn-r50-fpn-3x
      maskwright predict photo.jpg --weights mask-rcnn-r50-fpn-3x

    Args:
        name: One of the listed names; shipped: the installed weights that find objects without prompts.
        system: Only weights of this system.
        commercial_ok: Only weights whose licence allows commercial use.
    """
    from maskwright.checkpoints.catalogue import allows_commercial, list_checkpoints
    from maskwright.checkpoints.shipping import (
        SHIPPED,
        elsewhere,
        find_shipped,
        fitting,
        how_to_install,
        of_system,
        shipped,
    )
    from maskwright.systems import names

    if system is not None:
        choose(system, names(), "system")
    entries = {entry.name: entry for entry in list_checkpoints(commercial_ok, system)}
    installed = {entry.name: entry for entry in shipped() if system in (None, entry.system)}
    absent = {each: owner for each, owner in elsewhere().items() if all(each != entry.name for entry in shipped())}
    if name is not None:
        if name in absent:
            find_shipped(name)  # raises: states how to install them
        if name == SHIPPED:
            name = (fitting() if system is None else of_system(system)).name
        choose(name, {SHIPPED: None, **installed, **absent, **entries}, "name of weights")
        print_line(installed[name].card() if name in installed else entries[name].terms())  # the order of `load`
        return 0
    width = max(map(len, {*entries, *installed, *absent}), default=0)
    for own in installed.values():
        figures = "; ".join(f"{figure.what} {figure.value:g}" for figure in own.figures[:2])
        use = "yes" if allows_commercial(own.licence) else "no"
        if use == "yes" or not commercial_ok:
            print_line(f"{own.name:{width}}  {figures:30}  commercial use: {use}; {own.licence}; installed")
    for each, owner in absent.items() if system is None else ():
        print_line(f"{each:{width}}  not installed; {how_to_install(owner)}")
    for entry in entries.values():
        scores = ", ".join(f"{score.what} {score.value:g}" for score in entry.published)
        use = {"yes": "yes", "attribution": "on conditions"}.get(entry.commercial, "no")
        print_line(f"{entry.name:{width}}  {scores:30}  commercial use: {use}; {entry.weights_licence}")
    if not entries and not installed:
        which = f" of {system}" if system else ""
        print_line(f"the catalogue has no weights{which}; a downloaded file is passed as --weights FILE")
    return 0


def convert(
    source: Annotated[str, arg(metavar="OFFICIAL")],
    /,
    *,
    out: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    variant: Name = None,
) -> int:
    """Convert an official checkpoint (.pth, .pkl, a catalogue name) to a .safetensors file of maskwright.

    Only tensors are read; a file that would execute code is refused.

    Examples:
      maskwright convert mask_rcnn_R_50_FPN_3x.pkl -o mask-rcnn.safetensors

    Args:
        source: The official file.
        out: The new file.
        variant: The published variant, if the file's keys fit more than one.
    """
    from maskwright.checkpoints import convert as run

    run(source, out, variant=variant)
    print_line(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0
