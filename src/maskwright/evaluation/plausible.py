"""Whether predictions read from a file fit the objects of the images and classes that their ids stand for.

Ids that are all known may still stand for something else: images counted by file name, labels instead of category ids,
another split that counts from 1 too. Predictions then overlap objects of other images, or of other classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from maskwright.data.findings import DataWarning
from maskwright.errors import AnnotationError
from maskwright.evaluation.result_ids import Id, Reference
from maskwright.ops.boxes import pairwise_iou
from maskwright.structures import Instances

SAMPLED = 60  # images that are compared
LEAST = 4  # objects that a conclusion needs

Targets = Callable[[Id], Instances]


def check_images(
    path: Path, found: Mapping[Id, Instances], reference: Reference, targets: Targets, *, certain: bool = True
) -> None:
    """Compares the boxes of predictions with those of the annotated objects, whatever their class.

    Args:
        path: The file of the predictions, for messages.
        found: Predictions by image id.
        reference: The images of the data set.
        targets: Annotated objects by image id.
        certain: Whether image ids are those of the data set; False if they were matched by the names of files.

    Raises:
        AnnotationError: If the predictions fit other images far better, under a usual way of counting images; or if
            they score high, but lie on the objects of their own images no more often than on those of others.

    Warns:
        DataWarning: If they do so with low scores.
    """
    sampled = _sampled(found)
    hits, total = _hits([(found[i], targets(i)) for i in sampled], reference)
    if total < LEAST or hits > total / 2:
        return
    for how, numbers in _numberings(reference):
        others = [(i, numbers[i]) for i in sampled if i in numbers and numbers[i] in reference.sizes]
        right, all_there = _hits([(found[i], targets(j)) for i, j in others], reference)
        if len(others) == len(sampled) and right >= 0.8 * all_there and all_there >= LEAST and right >= 2 * hits:
            raise AnnotationError(
                f"{path}: {right} of {all_there} predictions lie on objects if image ids count {how}, but only {hits} "
                f"of {total} with the ids of the annotation file; write the data set's own ids "
                "(`maskwright predict --data`)"
            )
    if not certain and hits <= total / 10:
        raise AnnotationError(
            f"{path}: image ids are no ids of the data set; taken as names of files, only {hits} of {total} "
            "predictions lie on an object; the results are probably of another split"
        )
    if total < 12 or hits > total / 3:
        return
    chance = _chance([(found[i], targets(i)) for i in sampled], reference) * total
    if hits > chance + 2 * math.sqrt(chance + 1) and hits > total / 20:
        return
    sentence = (
        f"{path}: only {hits} of {total} predictions lie on an object (box IoU of at least 0.5), which is no more than "
        "on the objects of other images; the results are probably of another split"
    )
    if _mean_score([found[i] for i in sampled]) >= 0.5:  # a system that has learned nothing is not that certain
        raise AnnotationError(sentence)
    warnings.warn(f"{sentence}, or of a system that has learned nothing", DataWarning, stacklevel=4)


def check_classes(path: Path, found: Mapping[Id, Instances], reference: Reference, targets: Targets) -> None:
    """Compares the classes of predictions with those of the objects that they lie on.

    Args:
        path: The file of the predictions, for messages.
        found: Predictions by image id, with the labels of the data set.
        reference: The classes of the data set.
        targets: Annotated objects by image id.

    Raises:
        AnnotationError: If the classes consistently stand for others, such as the next in the list.
    """
    count = len(reference.category_ids)
    table = np.zeros((count, count), np.int64)  # predicted, annotated
    for image_id in _sampled(found):
        truth = _objects(targets(image_id))
        best = _best(found[image_id], len(truth))
        if len(best) and len(truth):
            overlap, nearest = pairwise_iou(best.boxes.float(), truth.boxes.float()).max(1)
            on = (overlap >= 0.5) & (best.labels >= 0)
            np.add.at(table, (best.labels[on].numpy(), truth.labels[nearest[on]].numpy()), 1)
    total, right = int(table.sum()), int(table.trace())
    used: list[int] = table.sum(1).nonzero()[0].tolist()
    partner: list[int] = table.argmax(1)[used].tolist()
    agreeing = int(table[used, partner].sum())
    one_to_one = len(set(partner)) == len(used)
    enough = total >= LEAST if len(used) > 1 else total >= 8 and not right
    if enough and one_to_one and right <= total / 10 and agreeing >= 0.8 * total:
        ids = reference.category_ids
        shown = ", ".join(f"{ids[a]} for {_class(reference, b)}" for a, b in zip(used[:3], partner[:3], strict=True))
        raise AnnotationError(
            f"{path}: category ids consistently stand for other classes than in the annotation file ({shown}): "
            f"{agreeing} of {total} predictions that lie on an object; write `category_ids[label]` of the data set"
        )


def _numberings(reference: Reference) -> Iterator[tuple[str, dict[Id, Id]]]:
    """Usual ways of counting images: what they are called, and the id in the data set of each number."""
    orders: dict[str, Sequence[Id]] = {"in the order of the annotation file": list(reference.sizes)}
    if len(reference.paths) == len(reference.sizes):
        orders["in the order of file names"] = sorted(reference.paths, key=lambda i: str(reference.paths[i]))
    for name, order in orders.items():
        for first in (1, 0):
            yield f"{name} from {first}", dict(enumerate(order, first))
    for shift in (1, -1):
        moved: dict[Id, Id] = {i: i + shift for i in reference.sizes if isinstance(i, int)}
        yield f"from {'one less' if shift == 1 else 'one more'} than those of the file", moved


def _hits(pairs: Sequence[tuple[Instances, Instances]], reference: Reference) -> tuple[int, int]:
    """Number of predictions that lie on an object, and of those compared: the best, as many as there are objects."""
    hits = total = 0
    for predicted, target in pairs:
        truth = _objects(target)
        best = _best(predicted, len(truth))
        total += len(best)
        if len(best) and len(truth) and predicted.image_size == target.image_size:
            hits += int((pairwise_iou(best.boxes.float(), truth.boxes.float()).amax(1) >= 0.5).sum())
    return hits, total


def _chance(pairs: Sequence[tuple[Instances, Instances]], reference: Reference) -> float:
    """Share of the predictions that lie on an object of another image."""
    hits = total = 0
    for shift in range(1, min(len(pairs), 6)):
        others = [(pairs[k][0], pairs[(k + shift) % len(pairs)][1]) for k in range(len(pairs))]
        others = [pair for pair in others if pair[0].image_size == pair[1].image_size]
        right, count = _hits(others, reference)
        hits, total = hits + right, total + count
    return hits / max(1, total)


def _mean_score(predictions: Sequence[Instances]) -> float:
    """Mean of the best score of each image."""
    best = [float(each.scores.max()) for each in predictions if each.scores is not None and len(each)]
    return sum(best) / max(1, len(best))


def _objects(target: Instances) -> Instances:
    return target if target.crowd is None else target[~target.crowd]


def _best(predicted: Instances, count: int) -> Instances:
    assert predicted.scores is not None
    return predicted[predicted.scores.argsort(descending=True, stable=True)[:count]]


def _sampled(found: Mapping[Id, Instances]) -> list[Id]:
    ids = list(found)
    count = min(SAMPLED, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def _class(reference: Reference, label: int) -> str:
    return repr(reference.classes[label]) if reference.classes else f"category {reference.category_ids[label]}"
