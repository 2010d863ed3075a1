"""Does it learn: Mask R-CNN from random weights on real images, ours beside torchvision's, paired.

    python benchmarks/learning.py DATA [DATA ...]          # folders in COCO layout, with a train and a val part
    python benchmarks/learning.py DATA --seeds 0 --steps 50 --short 160

    python benchmarks/learning.py DATA --seeds 0 --repeats 4   # each side again with other samples drawn
    python benchmarks/learning.py DATA --seeds 0 --control 10  # how fast rounding alone parts two runs

For each data set and seed both sides get the same initial weights (torchvision's, through the checkpoint path), the
same batches in the same order, mirrored alike, the same optimizer, schedule and stream of random numbers, and one
evaluator. What differs is the code: both draw the same proposals until rounding has made two of them change places, and
then go their own ways. `--control` shows that torchvision leaves itself as fast when its initial weights are moved by
one part in ten million. What samples alone scatter is seen when a side is trained again from the same start on the same
batches with another stream (`--repeats`). What torchvision trained is measured in both. The network is a
ResNet-18 with feature pyramid and batch norm, trained by torchvision's rules on both sides, with fewer proposals (500
before suppression, 200 after it), 128 sampled of them, and a quarter of the width in pyramid and heads, so that a CPU
can do it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import maskwright as mw
from maskwright.data import Augment, Dataset, Sample, make_loader, open_dataset
from maskwright.evaluation import Evaluator
from maskwright.structures import Batch, Instances, Masks
from maskwright.systems.mask_rcnn import MaskRCNN

PROPOSALS, SAMPLE, WIDTH = (500, 200), 128, 64
SIZES = (16, 32, 64, 128, 256)  # of anchors, per level


def networks(classes: tuple[str, ...], seed: int, short: int, device: str) -> tuple[Any, mw.System]:
    from torchvision.models import resnet18
    from torchvision.models.detection import MaskRCNN as Theirs
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    torch.manual_seed(seed)
    outputs = len(classes) + 1
    stages = {f"layer{n + 1}": str(n) for n in range(4)}
    trunk = BackboneWithFPN(resnet18(weights=None), stages, [64, 128, 256, 512], WIDTH)
    # Batches arrive resized and normalised: torchvision's own transform only pads and must change nothing.
    theirs = Theirs(
        trunk, rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in SIZES), ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(WIDTH * 49, 4 * WIDTH), box_predictor=FastRCNNPredictor(4 * WIDTH, outputs),
        mask_head=MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), 1), mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, outputs),
        min_size=1, max_size=1, image_mean=[0.0] * 3, image_std=[1.0] * 3, rpn_pre_nms_top_n_train=PROPOSALS[0],
        rpn_post_nms_top_n_train=PROPOSALS[1], box_batch_size_per_image=SAMPLE,
    )  # fmt: skip
    theirs.transform.resize = lambda image, target=None: (image, target)
    return theirs.to(device), weights_of(theirs, classes, short).to(device)


def weights_of(theirs: Any, classes: tuple[str, ...], short: int) -> MaskRCNN:
    """Our network with torchvision's weights, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "theirs.pth")
        system = mw.load(
            Path(folder) / "theirs.pth", backbone={"frozen": 0}, resize={"short": short, "long": short * 2},
            proposals={"anchor_sizes": SIZES, "before": (PROPOSALS[0], 1000), "after": (PROPOSALS[1], 1000)},
        )  # fmt: skip
    assert isinstance(system, MaskRCNN)
    system.box_rules = replace(system.box_rules, sample=SAMPLE)
    system.classes = classes
    return system


class Kept(Dataset):
    """A small data set whose images are decoded once."""

    def __init__(self, inner: Dataset):
        self.inner, self.name, self.classes, self.category_ids = inner, inner.name, inner.classes, inner.category_ids
        self.samples = [inner[index] for index in range(len(inner))]
        self.sizes, self.image_ids, self.targets, self.areas = inner.sizes, inner.image_ids, inner.targets, inner.areas

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def train(side: Any, ours: bool, loader: Any, steps: int, adam: bool, lr: float, seed: int, device: str) -> float:
    """Seconds of all steps."""
    parameters = [p for p in side.parameters() if p.requires_grad]
    if adam:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
    warm = min(100, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warm) * (0.1 if s > 0.8 * steps else 1.0)
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    for _ in learn(side, ours, loader, steps, optimizer, device):
        schedule.step()
    return time.perf_counter() - start


def learn(side: Any, ours: bool, loader: Any, steps: int, optimizer: Any, device: str) -> Iterator[torch.Tensor]:
    """So many steps; yields the loss of each once the weights have moved."""
    parameters = [p for p in side.parameters() if p.requires_grad]
    side.train()
    done, epoch = 0, 0
    while done < steps:
        loader.set_epoch(epoch)
        for batch in loader:
            batch = batch.to(device)
            terms = side.losses(side(batch.images), batch.targets) if ours else side(*for_torchvision(batch))
            total = sum(terms.values(), torch.zeros((), device=device))
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            yield total.detach()
            done += 1
            if done == steps:
                break
        epoch += 1


def control(theirs: Any, system: mw.System, loader: Any, steps: int, seed: int, device: str) -> None:
    """Prints by how much each step's loss differs: between the two sides, and of each from itself, moved a little."""

    def moved(side: Any, stream: int) -> Any:
        draw, copied = torch.Generator().manual_seed(stream), copy.deepcopy(side)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=draw).to(device))
        return copied

    def losses(side: Any, ours: bool) -> torch.Tensor:
        side = copy.deepcopy(side)
        optimizer = torch.optim.SGD(side.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        torch.manual_seed(seed)
        return torch.stack(list(learn(side, ours, loader, steps, optimizer, device)))

    first, second = losses(theirs, False), losses(system, True)
    pairs = {"torchvision, ours": (first, second)}
    for stream in (1, 2):
        pairs[f"torchvision, itself moved ({stream})"] = (first, losses(moved(theirs, stream), False))
        pairs[f"ours, itself moved ({stream})"] = (second, losses(moved(system, stream), True))
    for name, (one, other) in pairs.items():
        print(f"{name:32}", " ".join(f"{float(x):.0e}" for x in (one - other).abs() / one))


def for_torchvision(batch: Batch) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [i[:, : p.size[0], : p.size[1]] for i, p in zip(batch.images, batch.placements, strict=True)]
    goals = []
    for target in batch.targets or []:
        planes = (
            target.masks.dense(batch.images.device) if target.masks is not None else torch.zeros(0, *target.image_size)
        )
        goals.append({"boxes": target.boxes, "labels": target.labels + 1, "masks": planes.byte()})
    return images, goals


def on_image(theirs: Any, image: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What torchvision finds in an image that came resized, on the size's grid as its own transform pastes it."""
    paste = theirs.transform.postprocess
    theirs.transform.postprocess = lambda found, sizes, _: paste(found, sizes, [size])
    try:
        return theirs([image])[0]
    finally:
        del theirs.transform.postprocess


@torch.no_grad()
def score(side: Any, system: mw.System, ours: bool, dataset: Any, device: str) -> dict[str, float]:
    side.eval()
    evaluator = Evaluator(dataset)
    for index in range(len(dataset)):
        batch = system.preprocess.collate([dataset[index].image]).to(device)
        if ours:
            found = system.decode(system(batch.images), batch.placements)[0]
        else:
            placement = batch.placements[0]
            answer = on_image(side, batch.images[0, :, : placement.size[0], : placement.size[1]], placement.image_size)
            masks = Masks.from_dense(answer["masks"][:, 0] >= 0.5)
            found = Instances(placement.image_size, answer["boxes"], answer["labels"] - 1, masks, answer["scores"])
        evaluator.add_at(index, found.to("cpu"))
    summary = evaluator.result(examples=0).summary
    return {k: round(100 * float(summary[k]), 2) for k in ("segm/AP", "segm/AP50", "bbox/AP")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each side and seed, each with samples of its own"
    )
    parser.add_argument("--control", type=int, default=0, metavar="STEPS", help="compare that many steps' losses alone")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--short", type=int, default=256)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="adamw")
    parser.add_argument("--lr", type=float, help="default: 0.01 with SGD, 0.0005 with AdamW")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    adam = arguments.optimizer == "adamw"
    lr = arguments.lr or (5e-4 if adam else 0.01)
    rows = []
    for folder in arguments.data:
        learn, judge = Kept(open_dataset(folder, "train")), Kept(open_dataset(folder, "val"))
        for seed in arguments.seeds:
            theirs, system = networks(learn.classes, seed, arguments.short, arguments.device)
            loader = make_loader(
                learn,
                system.preprocess,
                batch_size=arguments.batch,
                training=True,
                augment=Augment(flip=0.5),
                seed=seed,
            )
            if arguments.control:
                control(theirs, system, loader, arguments.control, seed, arguments.device)
                continue
            begin = {"torchvision": (theirs, theirs.state_dict()), "ours": (system, system.state_dict())}
            begin = {name: (side, copy.deepcopy(state)) for name, (side, state) in begin.items()}
            for repeat in range(arguments.repeats):
                stream = seed + 1000 * repeat
                for name, (side, state) in begin.items():
                    own = name == "ours"
                    side.load_state_dict(state)
                    seconds = train(side, own, loader, arguments.steps, adam, lr, stream, arguments.device)
                    row = {"data": folder.name, "seed": seed, "stream": stream, "side": name}
                    row |= {"seconds": round(seconds, 1)} | score(side, system, own, judge, arguments.device)
                    if not own:
                        reader = weights_of(side, learn.classes, arguments.short).to(arguments.device)
                        row["read by ours"] = score(reader, reader, True, judge, arguments.device)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
        for name in ("torchvision", "ours") if not arguments.control else ():
            values = [r["segm/AP"] for r in rows if r["data"] == folder.name and r["side"] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{folder.name}, {name}: mask AP {statistics.mean(values):.1f} +/- {spread:.1f} ({len(values)} runs)")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"options": {**vars(arguments), "data": [], "json": None}, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
