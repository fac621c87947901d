from __future__ import annotations

import numpy as np
import pytest

from tasks.errors import BackendError
from tasks.metrics import built_in

# Two images: objects as x1, y1, x2, y2, class, in pixels, filled up with rows of class -1.
LABELS = np.array(
    [
        [[0, 0, 10, 10, 0], [20, 20, 40, 40, 1], [0, 0, 0, 0, -1]],
        [[5, 5, 15, 25, 0], [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]],
    ],
    np.float32,
)
BOXES, CLASSES = LABELS[..., :4].copy(), LABELS[..., 4].astype(np.int64)
SURE = np.full((2, 3), 0.9, np.float32)


def score(boxes=BOXES, scores=SURE, classes=CLASSES, labels=LABELS):
    outputs = {"boxes": boxes, "scores": scores} | ({} if classes is None else {"classes": classes})
    return built_in("map")(outputs, labels)


def test_what_is_found_exactly_is_right():
    assert score() == pytest.approx(1.0)
    assert score(BOXES / 640, labels=np.concatenate([LABELS[..., :4] / 640, LABELS[..., 4:]], -1)) == pytest.approx(1.0)


def test_each_threshold_of_overlap_counts():
    boxes = BOXES.copy()
    boxes[0, 1] = [20, 20, 40, 32.4]  # 0.62 of the only object of class 1: right at 0.50, 0.55 and 0.60
    assert score(boxes) == pytest.approx((1 + 0.3) / 2, abs=1e-6)


def test_a_class_not_found_and_one_found_wrongly_cost_precision():
    classes = CLASSES.copy()
    classes[0, 1] = 7
    assert score(classes=classes) == pytest.approx(0.5)
    sure = SURE.copy()
    sure[1, 0] = 0.1  # a false alarm of class 0 before the second right one: 1.0 up to a recall of half, then 2/3
    classes = CLASSES.copy()
    classes[0, 2] = 0
    assert score(scores=sure, classes=classes) == pytest.approx((1 + (51 * 1 + 50 * 2 / 3) / 101) / 2, abs=1e-6)


def test_nothing_found_is_nothing():
    assert score(classes=np.full_like(CLASSES, -1)) == 0.0
    assert score(np.full_like(BOXES, np.nan)) == 0.0


def test_scores_by_class_make_each_pair_a_detection():
    scores = np.zeros((2, 3, 2), np.float32)
    scores[0, 0, 0] = scores[0, 1, 1] = scores[1, 0, 0] = 0.9
    assert score(scores=scores, classes=None) == pytest.approx(1.0)


def test_of_one_image_the_hundred_surest_count():
    boxes = np.concatenate([BOXES, np.tile([50, 50, 60, 60], (2, 100, 1))], 1)
    classes = np.concatenate([CLASSES, np.zeros((2, 100), np.int64)], 1)
    scores = np.concatenate([np.full((2, 3), 0.1), np.full((2, 100), 0.9)], 1)
    assert score(boxes, scores, classes) == 0.0


def test_a_crowd_is_no_object_and_costs_nothing():
    labels = np.concatenate([LABELS, np.zeros((2, 3, 1), np.float32)], -1)
    labels[0, 1, 5] = 1
    assert score(labels=labels) == pytest.approx(1.0)
    with pytest.raises(BackendError, match="no label has an object"):
        score(labels=np.concatenate([LABELS, np.ones((2, 3, 1), np.float32)], -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES[..., :3]}, r"boxes have shape \[2, 3, 3\]"),
        ({"classes": None}, "and classes are not there"),
        ({"classes": CLASSES[:, :2]}, r"classes have shape \[2, 2\]"),
        ({"labels": LABELS[..., :4]}, r"labels have shape \[2, 3, 4\], the boxes \[2, 3, 4\]"),
        ({"labels": LABELS[:1]}, r"labels have shape \[1, 3, 5\]"),
        ({"labels": np.full_like(LABELS, -1)}, "no label has an object"),
    ],
)
def test_other_shapes_are_refused_with_what_is_expected(change, message):
    with pytest.raises(BackendError, match=message):
        score(**change)


def test_other_outputs_are_refused_by_name():
    with pytest.raises(BackendError, match=r"no output 'boxes' and 'scores' \(there: logits\)"):
        built_in("map")({"logits": SURE}, LABELS)
