"""pycocotools by the book: COCO JSON, `loadRes`, `summarize`. Shares nothing with the code it judges."""

from __future__ import annotations

import contextlib
import io
import json

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = {
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
NAMES["bbox"] = NAMES["segm"]


def annotation_file(data, path):
    """The data set as a COCO JSON file at `path`."""
    annotations = []
    for i, image_id in enumerate(data.image_ids()):
        target = data.targets(i)
        areas = data.areas(i) if hasattr(data, "areas") else target.masks.areas().tolist()
        for record, area, crowd in zip(target.to_coco(image_id, data.category_ids), areas, target.crowd, strict=True):
            points = {}
            if "keypoints" in record:
                points = {"num_keypoints": sum(v > 0 for v in record["keypoints"][2::3])}
            annotations.append({**record, **points, "id": len(annotations) + 1, "area": area, "iscrowd": int(crowd)})
    images = [{"id": d, "height": h, "width": w} for d, (h, w) in zip(data.image_ids(), data.sizes(), strict=True)]
    names = zip(data.category_ids, data.classes, strict=True)
    categories = [{"id": c, "name": n} for c, n in names]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories, "info": {}}))
    return path


def verdict(data, predictions, kind, folder):
    """{"segm/AP": ...} for one set of Instances per image."""
    records = [
        record
        for image_id, instances in zip(data.image_ids(), predictions, strict=True)
        for record in instances.to_coco(image_id, data.category_ids)
    ]
    return verdict_of_files(annotation_file(data, folder / "truth.json"), records, kind, folder)


def verdict_of_files(annotations, records, kind, folder):
    """The same for an annotation file and COCO result records; of each record only what `kind` is about is used."""
    keep = {"segm": "segmentation", "bbox": "bbox", "keypoints": "keypoints"}[kind]
    wanted = ("image_id", "category_id", "score", keep)
    results = folder / "judged.json"
    results.write_text(json.dumps([{k: v for k, v in record.items() if k in wanted} for record in records]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        engine = COCOeval(truth, truth.loadRes(str(results)), kind)
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
    return {f"{kind}/{name}": float(v) for name, v in zip(NAMES[kind], engine.stats, strict=True)}
