"""Mean average precision of detections, as COCO defines it, counted by pycocotools.

Source: https://cocodataset.org/#detection-eval, primary metric: the mean over classes, over ten thresholds of overlap (IoU 0.50 to
0.95), and over recall of the precision, with at most 100 detections of one image.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tasks.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]
# COCO counts that many detections of an image at most, the surest first.
MOST: Final = 100


def mean_average_precision(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return COCO's average precision (0 to 1) of all outputs of a detector.

    Outputs: "boxes" [samples, detections, 4] as x1, y1, x2, y2; "scores", either [samples, detections] with "classes" of that
    shape (integers, negative ones filling up), or [samples, detections, classes], where each pair of box and class is a
    detection. Labels: [samples, objects, 5] as x1, y1, x2, y2, class, rows of class -1 filling up; a sixth column that is not 0
    marks a crowd, whose detections count for nothing. Boxes of both are in one unit (pixels, or shares of the image).
    Raises BackendError("bad data") for other names and shapes, and for labels without an object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes, scores, classes = _found(outputs)
    if labels.ndim != 3 or labels.shape[-1] not in (5, 6) or len(labels) != len(boxes):
        raise _bad(f"labels have shape {list(labels.shape)}, the boxes {list(boxes.shape)}")
    truth, detections = _objects(labels.astype(np.float64)), _detections(boxes, scores, classes)
    if not any(not entry["iscrowd"] for entry in truth):
        raise BackendError("bad data", "map: no label has an object", "rows of class -1 fill up; use others")
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints tables
        known = COCO()
        known.dataset = {
            "images": [{"id": index} for index in range(len(labels))],
            "annotations": truth,
            "categories": [{"id": index} for index in sorted({entry["category_id"] for entry in truth})],
        }
        known.createIndex()
        evaluation = COCOeval(known, _with_detections(COCO(), known, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return max(0.0, float(evaluation.stats[0]))


def _found(outputs: Mapping[str, Array]) -> tuple[Array, Array, Array | None]:
    missing = [name for name in ("boxes", "scores") if name not in outputs]
    if missing:
        raise _bad(f"no output {' and '.join(map(repr, missing))} (there: {', '.join(sorted(outputs))})")
    boxes, scores, classes = outputs["boxes"], outputs["scores"], outputs.get("classes")
    shape = boxes.shape[:2]
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or scores.shape[:2] != shape:
        raise _bad(f"boxes have shape {list(boxes.shape)}, scores {list(scores.shape)}")
    if scores.ndim == 3:
        return boxes, scores, None
    if classes is None or classes.shape != shape or scores.shape != shape:
        there = "are not there" if classes is None else f"have shape {list(classes.shape)}"
        raise _bad(f"boxes have shape {list(boxes.shape)}, scores {list(scores.shape)}, and classes {there}")
    return boxes, scores, classes


def _objects(labels: Array) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for image, rows in enumerate(labels):
        for row in rows[rows[:, 4] >= 0]:
            box = _sides(row)
            found.append(
                {
                    "id": len(found) + 1,  # pycocotools takes 0 for no match
                    "image_id": image,
                    "category_id": int(row[4]),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(len(row) > 5 and row[5] != 0),
                }
            )
    return found


def _detections(boxes: Array, scores: Array, classes: Array | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for image in range(len(boxes)):
        sure = scores[image].reshape(-1).astype(np.float64)
        if classes is not None:
            sure = np.where(classes[image] >= 0, sure, np.nan)
        count, kinds = 0, scores.shape[2] if classes is None else 1
        for place in np.argsort(-sure, kind="stable"):  # NaN last
            at, kind = divmod(int(place), kinds)
            box = boxes[image, at].astype(np.float64)
            if count == MOST or not np.isfinite(sure[place]):
                break
            if not np.isfinite(box).all():
                continue
            count, sides = count + 1, _sides(box)
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image,
                    "category_id": kind if classes is None else int(classes[image, at]),
                    "bbox": sides,
                    "area": sides[2] * sides[3],
                    "iscrowd": 0,
                    "score": float(sure[place]),
                }
            )
    return found


def _with_detections(made: Any, known: Any, detections: list[dict[str, Any]]) -> Any:
    # COCO.loadRes refuses an empty list, which is what a detector may find.
    made.dataset = {**known.dataset, "annotations": detections}
    made.createIndex()
    return made


def _sides(box: Array) -> list[float]:
    left, top, right, bottom = (float(value) for value in box[:4])
    return [left, top, max(0.0, right - left), max(0.0, bottom - top)]


def _bad(found: str) -> BackendError:
    return BackendError(
        "bad data",
        f"map: {found}",
        "give boxes [samples, detections, 4] (x1, y1, x2, y2), scores [samples, detections] with classes, or scores "
        "[samples, detections, classes]; labels are [samples, objects, 5]: x1, y1, x2, y2, class",
    )
