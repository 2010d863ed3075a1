"""Weights that owe nothing to photographs: each by one command, from generated images (and nuclei, which are CC0).

    python benchmarks/pretraining.py mask-rcnn --out weights            # in the background; again: continues
    python benchmarks/pretraining.py sam --nuclei DATA --out weights
    python benchmarks/pretraining.py mask-rcnn --steps 500 --out /tmp/try

OUT/NAME/ is the run folder, OUT/NAME.safetensors the result in float16 with its recipe. The same command on the same
kind of machine gives the same file, bit for bit. Arithmetic is in bfloat16 where the processor has instructions for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import maskwright as mw
from benchmarks.dense import Dense, Guided, Kept, prepared, taken
from maskwright.checkpoints import read_state, save
from maskwright.data import ContourScenes, Dataset, Mixture, Scenes, open_dataset
from maskwright.data.views import View
from maskwright.files import write_json
from maskwright.inference.preparing import has_bfloat16
from maskwright.structures import Instances
from maskwright.systems.eomt import EoMT


@dataclass(frozen=True)
class Recipe:
    """How one file is made.

    Attributes:
        preset: The system.
        options: Changes of the preset.
        size: Side of the generated images.
        steps: Training steps.
        changes: Fields of the training recipe.
        classes: Whether outlines are classes; otherwise every object is "object".
        learning: Groups of options while learning, such as the size of the input; the file has those of the preset.
        kept: Number of classes that stay in the file, see `condensed`; None: all.
        then: A second stage that goes on with the result: its options, steps and fields of the training recipe. In it
            every object is "object": a score that is divided among hundreds of classes is not one of an object.
        start: Installed weights whose backbone is the start; None: random weights.
        before: Stages before the first, of a query system on a ViT (`dense.py`): `Dense` and `Guided`; their steps and
            fields of the training recipe.
        contours: Options of the generated images of outlines, but not for `Dense`.
        least: Area in pixels below which objects are ignored, except by `Dense`; 0: none. Losses of queries are means
            over the objects of a batch, half of which would be smaller than 10 x 10 pixels.
        repeats: How often each image is seen in all but the last stage; generating one may take as long as learning it.
    """

    preset: str
    options: Mapping[str, Any]
    size: int
    steps: int
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    classes: bool = True
    learning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    kept: int | None = None
    then: tuple[Mapping[str, Any], int, Mapping[str, Any]] | None = None
    start: str | None = None
    before: Sequence[tuple[int, Mapping[str, Any]]] = ()
    contours: Mapping[str, Any] = field(default_factory=dict[str, Any])
    least: int = 0
    repeats: int = 1

    def more(self, steps: int) -> int:
        """Steps of the second stage after `steps` of the first, in proportion to the recipe."""
        return max(1, self.then[1] * steps // self.steps) if self.then is not None else 0

    def earlier(self, steps: int) -> list[int]:
        """Steps of the stages before the first, in the same proportion."""
        return [max(1, count * steps // self.steps) for count, _ in self.before]


# Narrower than the presets: a file is at most 25 MB, and ResNet-18 alone has 22.4.
NARROW = {"neck_width": 64, "boxes": {"width": 256}, "masks": {"width": 64}}
FEWER = {"decoder": {"layers": 3, "hidden": 256}, "encoder_hidden": 256}
SQUARE = {"resize": {"short": 224, "long": 224}}
CONVOLUTIONS = {"lr": 5e-4, "ema": 0.998}
POINTS = {"points": 512}  # a mask of 40 x 40 has no use for 2,048 points, which take most of the time
QUERIES = {"ema": 0.998}
SECOND = {"warmup": 50, "ema": 0.99}
RECIPES = {
    "mask-rcnn": Recipe("mask-rcnn-small", NARROW, 192, 4000, {**CONVOLUTIONS, "batch": 4}, learning=SQUARE,
                         kept=100),
    "solov2": Recipe("solov2-small", {"neck_width": 64}, 192, 4000, {**CONVOLUTIONS, "batch": 4},
                     learning=SQUARE, then=({}, 400, {**CONVOLUTIONS, **SECOND, "batch": 4, "lr": 2e-4})),
    # The backbone is trained already, with classes: the decoders learn first, at less cost, from objects without them.
    "mask2former": Recipe("mask2former-small", FEWER, 160, 2600,
                          {**QUERIES, "batch": 8, "lr": 4e-4, "warmup": 100, "freeze": ["backbone"]}, classes=False,
                          learning={"resize": {"short": 160, "long": 160}, "loss": POINTS},
                          then=({}, 250, {**QUERIES, **SECOND, "batch": 8, "lr": 1e-4}), start="mask-rcnn-scenes"),
    "eomt": Recipe("eomt-small", {"table": 20}, 160, 1000,
                   {**QUERIES, "batch": 8, "lr": 5e-4, "warmup": 100}, classes=False,
                   learning={"resize": {"canvas": [160, 160]}, "loss": POINTS},
                   # Attention over the tokens of the preset's canvas is learnt for a while too.
                   then=({"resize": {"canvas": [320, 320]}}, 80,
                         {**QUERIES, **SECOND, "batch": 4, "lr": 1e-4}),
                   before=((1400, {"batch": 16, "lr": 1e-3, "warmup": 50, "ema": 0.99, "weight_decay": 0.02}),
                           (600, {"batch": 8, "lr": 5e-4, "warmup": 50, "ema": 0.99})),
                   contours={"objects": 16, "crowd": 0.0}, least=80, repeats=3),
    # Small objects have few cells of the mask's grid, of a quarter of a patch: the second stage sees images enlarged.
    "sam": Recipe("sam-small",
                  {"resize": {"canvas": [256, 256]}, "simulation": {"objects": 10, "points": 2, "repeats": 0}},
                  192, 1800,
                  {"batch": 4, "lr": 6e-4, "warmup": 200, "ema": 0.998, "amp": "no",
                   "augment": {"flip": 0.5, "jitter": [0.5, 1.6]}},
                  classes=False,
                  then=({"resize": {"canvas": [512, 512]}}, 640,
                        {"batch": 2, "lr": 2e-4, "warmup": 50, "ema": 0.99, "amp": "no",
                         "augment": {"flip": 0.5, "jitter": [0.35, 1.3]}})),
}  # fmt: skip


class LargeOnly(View):
    """Objects below an area are marked as crowds, which losses ignore.

    Args:
        inner: The data set.
        least: The area in pixels.
    """

    def __init__(self, inner: Dataset, least: int):
        super().__init__(inner)
        self.least = least

    def apply(self, target: Instances) -> Instances:
        assert target.masks is not None
        return replace(target, crowd=target.masks.areas() < self.least)


def images(
    recipe: Recipe, classes: bool, count: int, seed: int, nuclei: str | None, contours: Mapping[str, Any] | None = None
) -> Dataset:
    """The images to learn from; with or without classes."""
    outlines = ContourScenes(count, (recipe.size, recipe.size), seed=seed, **(contours or {}))
    if classes:
        return outlines
    scenes = Scenes(count, (recipe.size, recipe.size), seed=seed, difficulty=0.7)
    people = Scenes(count, (recipe.size, recipe.size), seed=seed, difficulty=0.7, keypoints=True)
    parts: list[tuple[Any, float]] = [(outlines, 0.5), (scenes, 0.15), (people, 0.2)]
    if nuclei is not None:
        parts.append((open_dataset(nuclei, "train"), 0.15))
    return Mixture(parts, count, seed)


def stated(group: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a group of options that have a value."""
    return {name: value for name, value in group.items() if value is not None}


def condensed(system: mw.System, count: int) -> mw.System:
    """A Mask R-CNN with the mean of all classes' boxes and masks, and with `count` of the classes, evenly spread.

    Where classes do not matter it finds more than the whole one (the mean of many predictions of the same box, and
    fewer classes that an object's probability is divided among), and its file is smaller.
    """
    options = {name: value for name, value in system.options.items() if name != "classes"}
    options |= {name: {**options[name], "agnostic": True} for name in ("boxes", "masks")}
    total = len(system.classes)
    rows = [number * total // count for number in range(count)]
    smaller = mw.create(system.name, classes=[system.classes[row] for row in rows], **options)
    state = dict(system.state_dict())
    for name in ("boxes.classes.weight", "boxes.classes.bias"):
        state[name] = state[name][[*rows, total]]  # the background is last
    for name, outputs in (("boxes.deltas", 4), ("masks.logits", 1)):
        for part in ("weight", "bias"):
            value = state[f"{name}.{part}"]
            state[f"{name}.{part}"] = value.view(total, outputs, *value.shape[1:]).mean(0)
    smaller.load_state_dict(state)
    return smaller


def keep_to(options: Mapping[str, Any], path: Path) -> None:
    """Writes the options of a folder's first call into a file, and refuses to continue with others.

    Finished parts are not repeated, so that the result would not be that of the options stated with it.

    Raises:
        SystemExit: If the file has other values.
    """
    if not path.exists():
        write_json(path, dict(options), indent=1)
        return
    before = json.loads(path.read_text("utf-8"))
    other = [f"{name} {before.get(name)}, not {value}" for name, value in options.items() if before.get(name) != value]
    if other:
        raise SystemExit(f"{path}: was begun with {', '.join(other)}; give another folder with --out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--nuclei", help="a data set of nuclei to learn from too (the promptable system)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", choices=("bf16", "no"), help="default: bf16 where the processor has instructions")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error("--steps must be at least 1")
    recipe = RECIPES[arguments.name]
    fast = "bf16" if has_bfloat16(torch.device("cpu")) else "no"
    amp = arguments.amp or recipe.changes.get("amp", fast)
    steps = arguments.steps or recipe.steps
    given = {"steps": steps, "seed": arguments.seed, "amp": amp, "nuclei": arguments.nuclei}
    keep_to(given, arguments.out / f"{arguments.name}.json")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)

    def learned(
        start: Any,
        classes: bool,
        folder: Path,
        steps: int,
        seed: int,
        changes: Mapping[str, Any],
        repeats: int,
        **options: Any,
    ) -> Path:
        count = steps * changes["batch"]
        contours = None if isinstance(start, Dense) else recipe.contours
        learn = images(recipe, classes, max(changes["batch"], count // repeats), seed, arguments.nuclei, contours)
        if repeats > 1:
            learn = Kept(learn)
        if isinstance(start, Dense):
            prepared(start, learn)
        elif recipe.least:
            learn = LargeOnly(learn, recipe.least)
        return mw.train(
            start, learn, val=False, out=folder, steps=steps, seed=seed, workers=arguments.workers, tensorboard=False,
            resume=(folder / "last.ckpt").exists(), save_minutes=5.0, **{**changes, "amp": amp}, **options,
        )  # fmt: skip

    folder = arguments.out / arguments.name
    learning = {**recipe.options, **recipe.learning}
    file: Path | None = None
    for place, (count, (_, changes)) in enumerate(zip(recipe.earlier(steps), recipe.before, strict=True)):
        torch.manual_seed(arguments.seed)
        whole = mw.create(recipe.preset, **learning).options
        start = Dense.made(whole) if file is None else taken(Guided, whole, read_state(file)[0])
        file = learned(start, False, arguments.out / f"{arguments.name}-before-{place}", count,
                       arguments.seed + 2 + place, changes, recipe.repeats)  # fmt: skip
    if file is None:
        kind = learned(recipe.preset, recipe.classes, folder, steps, arguments.seed, recipe.changes, recipe.repeats,
                       options=learning, pretrained=recipe.start)  # fmt: skip
    else:
        start = taken(EoMT, mw.create(recipe.preset, **learning).options, read_state(file)[0])
        kind = learned(start, False, folder, steps, arguments.seed, recipe.changes, recipe.repeats)
    if recipe.then is not None:
        options, _, changes = recipe.then
        torch.manual_seed(arguments.seed)  # of new rows: the first stage may have ended in another process
        first = mw.load(kind, classes=("object",) if recipe.classes else None, **options)
        kind = learned(
            first, False, arguments.out / f"{arguments.name}-2", recipe.more(steps), arguments.seed + 1, changes, 1
        )
    published = mw.create(recipe.preset, **recipe.options).options
    system = mw.load(kind, **{name: stated(published[name]) for name in recipe.learning})
    if recipe.kept is not None:
        system = condensed(system, recipe.kept)
    source = {
        "origin": "maskwright: trained on generated images" + (" and CC0 nuclei" if arguments.nuclei else ""),
        "licence": "Apache-2.0",
        "command": f"benchmarks/pretraining.py {arguments.name} --steps {steps} --seed {arguments.seed} --amp {amp}"
        + (" --nuclei DATA" if arguments.nuclei else ""),
    }  # fmt: skip
    target = arguments.out / f"{arguments.name}.safetensors"
    system.source = source
    save(system.half(), target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(json.dumps({"file": str(target), "MB": round(target.stat().st_size / 1e6, 1), "sha256": digest} | source))


if __name__ == "__main__":
    main()
