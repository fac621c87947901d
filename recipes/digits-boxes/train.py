"""Train the detector on scikit-learn's handwritten digits, pasted on canvases, and write what recipes/digits-boxes.yaml needs.

Run `python recipes/digits-boxes/train.py`; it takes about a minute on two cores. It writes, beside itself:

* weights.safetensors  the trained parameters
* calibration.npz      `pixel_values` float32 [N, 1, 64, 64] in 0..1: canvases of training digits, for int8 ranges
* heldout.npz          the same of digits that training never saw, and `label` float32 [N, 4, 5]: x1, y1, x2, y2 in pixels and
                       class of each digit, rows of class -1 filling up
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from model import CELL, CLASSES, build
from safetensors.torch import save_file
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
SEED = 20
CANVAS, MOST = 64, 4
HELD_OUT = 450
STEPS = 600
BATCH = 32
Canvases = tuple[np.ndarray, np.ndarray]


def canvases(images: np.ndarray, labels: np.ndarray, count: int, draw: np.random.Generator) -> Canvases:
    """Return canvases [N, 1, 64, 64] of one to four digits that do not overlap, two or three times their size, and labels."""
    found = np.zeros((count, 1, CANVAS, CANVAS), np.float32)
    objects = np.full((count, MOST, 5), -1, np.float32)
    for canvas, rows in zip(found[:, 0], objects, strict=True):
        taken = np.zeros((CANVAS, CANVAS), bool)
        for row in rows[: draw.integers(1, MOST + 1)]:
            for _attempt in range(20):
                index, times = draw.integers(len(images)), draw.integers(2, 4)
                size = 8 * times
                top, left = draw.integers(0, CANVAS - size + 1, 2)
                if not taken[top : top + size, left : left + size].any():
                    taken[top : top + size, left : left + size] = True
                    canvas[top : top + size, left : left + size] = images[index].repeat(times, 0).repeat(times, 1)
                    row[:] = (left, top, left + size, top + size, labels[index])
                    break
    return found, objects


def targets(objects: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return maps: 1 at the cell of a digit's middle and less around it [N, 10, h, w], that cell [N, h, w], its four sides."""
    cells = CANVAS // CELL
    heat = np.zeros((len(objects), CLASSES, cells, cells), np.float32)
    middle = np.zeros((len(objects), cells, cells), bool)
    sides = np.zeros((len(objects), 4, cells, cells), np.float32)
    at = np.arange(cells) * CELL + CELL / 2
    for index, rows in enumerate(objects):
        for left, top, right, bottom, label in rows[rows[:, 4] >= 0]:
            x, y = (left + right) / 2, (top + bottom) / 2
            column, row = int(x // CELL), int(y // CELL)
            near = np.exp(-((at - at[row])[:, None] ** 2 + (at - at[column])[None] ** 2) / (2 * 3.0**2))
            heat[index, int(label)] = np.maximum(heat[index, int(label)], near)
            middle[index, row, column] = True
            sides[index, :, row, column] = at[column] - left, at[row] - top, right - at[column], bottom - at[row]
    return torch.from_numpy(heat), torch.from_numpy(middle), torch.from_numpy(sides)


def loss_of(model: torch.nn.Module, inputs: np.ndarray, objects: np.ndarray) -> torch.Tensor:
    """Return CenterNet's focal loss of the scores (arXiv:1904.07850, equation 1), and the sides' distance in pixels."""
    logits, sides = model.maps(torch.from_numpy(inputs))
    heat, middle, wanted = targets(objects)
    score = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    right = ((1 - score) ** 2 * score.log())[heat == 1].sum()
    wrong = ((1 - heat) ** 4 * score**2 * (1 - score).log())[heat < 1].sum()
    apart = (sides - wanted).abs().permute(0, 2, 3, 1)[middle].sum()
    return (0.1 * apart - right - wrong) / middle.sum()


def precision(model: torch.nn.Module, seen: Canvases) -> float:
    """Return the mean average precision on canvases, as the recipe's gate measures it."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tasks.metrics import built_in

    model.eval()
    with torch.inference_mode():
        scores, boxes = model(torch.from_numpy(seen[0]))
    model.train()
    return built_in("map")({"scores": scores.numpy(), "boxes": boxes.numpy()}, seen[1])


def train() -> None:
    """Train, report the mean average precision on held-out digits, and write the files."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # small operators: a second thread waits more than it works
    draw = np.random.default_rng(SEED)
    digits = load_digits()
    images, labels = (digits.images / 16.0).astype(np.float32), digits.target
    order = draw.permutation(len(labels))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    seen = canvases(images[held], labels[held], 128, draw)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=STEPS, pct_start=0.2)
    begin = time.perf_counter()
    for step in range(1, STEPS + 1):
        loss = loss_of(model, *canvases(images[kept], labels[kept], BATCH, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{step}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    model.eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, HERE / "weights.safetensors")
    calibration, _objects = canvases(images[kept], labels[kept], 128, draw)
    np.savez_compressed(HERE / "calibration.npz", pixel_values=calibration)
    np.savez_compressed(HERE / "heldout.npz", pixel_values=seen[0], label=seen[1])
    print(
        f"{sum(value.numel() for value in model.parameters())} parameters, held out: map {precision(model, seen):.4f}"
    )


if __name__ == "__main__":
    train()
