"""TrackEval's figures for objects given as `Instances`; used by the tests of the metrics of clips.

Its data sets read files; here the dictionaries are made that they give to the metrics.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskwright.data.youtube_vis import tracks_of
from maskwright.structures import Instances


def _with_disk() -> None:
    """TrackEval takes one function, `disk`, from scikit-image."""
    try:
        import skimage.morphology  # noqa: F401
    except ImportError:
        module, package = types.ModuleType("skimage.morphology"), types.ModuleType("skimage")

        def disk(radius: float) -> Any:
            line = np.arange(-radius, radius + 1)
            return (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(np.uint8)

        module.disk = disk  # type: ignore[attr-defined]
        package.morphology = module  # type: ignore[attr-defined]
        sys.modules |= {"skimage": package, "skimage.morphology": module}


def codes(objects: Instances) -> list[dict[str, Any]]:
    return [dict(code) for code in objects.masks.rle()]


def sequence(truth: Sequence[Instances], found: Sequence[Instances]) -> dict[str, Any]:
    """A clip after the preprocessing of MOTSChallenge, with one class; crowd regions are ignore regions."""
    import trackeval.datasets.mots_challenge as mots
    from pycocotools import mask as coco_mask

    raw: dict[str, Any] = {name: [] for name in (
        "gt_ids", "gt_classes", "gt_dets", "gt_ignore_region", "tracker_ids", "tracker_classes", "tracker_dets",
        "similarity_scores")}  # fmt: skip
    dataset = mots.MOTSChallenge.__new__(mots.MOTSChallenge)
    dataset.class_name_to_class_id = {"pedestrian": 2}
    for one, two in zip(truth, found, strict=True):
        crowd = np.zeros(len(one), bool) if one.crowd is None else one.crowd.numpy()
        real = codes(one[~crowd])
        raw["gt_ids"].append(one.ids.numpy()[~crowd])
        raw["gt_classes"].append(np.full(len(real), 2))
        raw["gt_dets"].append(real)
        raw["gt_ignore_region"].append(coco_mask.merge(codes(one[crowd]), intersect=False))
        raw["tracker_ids"].append(two.ids.numpy())
        raw["tracker_classes"].append(np.full(len(two), 2))
        raw["tracker_dets"].append(codes(two))
        raw["similarity_scores"].append(dataset._calculate_similarities(real, codes(two)))
    raw |= {"num_timesteps": len(truth), "seq": "clip"}
    return dataset.get_preprocessed_seq_data(raw, "pedestrian")


def metrics(clips: Sequence[tuple[Sequence[Instances], Sequence[Instances]]]) -> dict[str, float]:
    """HOTA, CLEAR and identity figures of clips together."""
    from trackeval.metrics import CLEAR, HOTA, Identity

    quiet = {"PRINT_CONFIG": False}
    sequences = [sequence(truth, found) for truth, found in clips]
    results: dict[str, Any] = {}
    for metric in (HOTA(), CLEAR(quiet), Identity(quiet)):
        results |= metric.combine_sequences({str(n): metric.eval_sequence(s) for n, s in enumerate(sequences)})
    names = {"sMOTSA": "sMOTA", "FP": "CLR_FP", "FN": "CLR_FN"}
    wanted = (
        "HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "MOTA", "MOTP", "sMOTSA", "IDSW", "FP",
        "FN", "Frag", "MT", "PT", "ML", "IDF1", "IDP", "IDR",
    )  # fmt: skip
    return {name: float(np.mean(results[names.get(name, name)])) for name in wanted}


def davis(clips: Sequence[tuple[Sequence[Instances], Sequence[Instances]]], by: str = "J") -> dict[str, float]:
    """J&F of clips together, with tracks assigned to objects."""
    _with_disk()
    from trackeval.metrics import JAndF

    metric = JAndF()
    metric.optim_type = by
    results: dict[str, Any] = {}
    for number, (truth, found) in enumerate(clips):
        data = sequence(truth, found)
        data["gt_dets"], data["tracker_dets"] = list(data["gt_dets"]), [list(d) for d in data["tracker_dets"]]
        results[str(number)] = metric.eval_sequence(data)
    combined = metric.combine_sequences(results)
    names = {"J": "J-Mean", "J recall": "J-Recall", "J decay": "J-Decay", "F": "F-Mean", "F recall": "F-Recall",
             "F decay": "F-Decay", "J&F": "J&F"}  # fmt: skip
    return {name: float(combined[theirs]) for name, theirs in names.items()}


def contours(truth: Sequence[Instances], found: Sequence[Instances], number: int) -> Any:
    """F of the object `number` in each frame, predicted under the same id."""
    _with_disk()
    from pycocotools import mask as coco_mask
    from trackeval.metrics import JAndF

    nothing = coco_mask.encode(np.zeros(truth[0].image_size, np.uint8, order="F"))
    rows = [[(codes(o[o.ids == number]) or [nothing])[0]] for part in (truth, found) for o in part]
    return JAndF._compute_f(rows[: len(truth)], rows[len(truth) :], 0, 0, 0.008)


def track_ap(clips: Sequence[tuple[Sequence[Instances], Sequence[Instances]]], labels: int) -> dict[str, float]:
    """AP of tracks of clips together. Ids of tracks begin with 1, because TrackEval takes 0 for an unmatched track."""
    from trackeval.metrics import TrackMAP

    config = {"PRINT_CONFIG": False, "USE_TIME_RANGES": False, "MAX_DETECTIONS": 100,
              "AREA_RANGES": [[0, 128**2], [128**2, 256**2], [256**2, 1e10]]}  # fmt: skip
    per_limit = {}
    for limit in (100, 1, 10):
        metric = TrackMAP({**config, "MAX_DETECTIONS": limit})
        per_class = {}
        for label in range(labels):
            results = {}
            for number, (truth, found) in enumerate(clips):
                parts = []
                for part in (truth, found):
                    tracks = tracks_of(list(enumerate(part)), len(part))
                    own = sorted((t for t in tracks.values() if t.label == label), key=lambda t: -t.score)
                    areas = [[a for a in t.areas if a] for t in own]
                    parts.append((own, [float(np.mean(a)) if a else 0.0 for a in areas]))
                (true, true_areas), (guessed, guessed_areas) = parts
                results[str(number)] = metric.eval_sequence({
                    "gt_track_ids": list(range(1, len(true) + 1)), "dt_track_ids": list(range(1, len(guessed) + 1)),
                    "gt_tracks": [dict(enumerate(t.segmentations)) for t in true],
                    "dt_tracks": [dict(enumerate(t.segmentations)) for t in guessed],
                    "gt_track_areas": true_areas, "dt_track_areas": guessed_areas,
                    "gt_track_iscrowd": [int(t.crowd) for t in true],
                    "dt_track_scores": np.array([t.score for t in guessed]), "iou_type": "mask",
                })  # fmt: skip
            per_class[str(label)] = metric.combine_sequences(results)
        per_limit[limit] = metric.combine_classes_class_averaged(per_class)

    def mean(values: Any) -> float:
        values = np.asarray(values)
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    every = per_limit[100]
    return {
        "AP": mean(every["AP_all"]), "AP50": float(every["AP_all"][0]), "AP75": float(every["AP_all"][5]),
        "APs": mean(every["AP_area_s"]), "APm": mean(every["AP_area_m"]), "APl": mean(every["AP_area_l"]),
        "AR1": mean(per_limit[1]["AR_all"]), "AR10": mean(per_limit[10]["AR_all"]),
    }  # fmt: skip
