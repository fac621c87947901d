"""Train the digits network on scikit-learn's handwritten digits and write everything that the recipes need.

Run `python recipes/digits/train.py`; it takes about half a minute on two cores. It writes, beside itself:

* weights.safetensors  the trained parameters
* calibration.npz      `image` float32 [N, 1, 8, 8] in 0..1: training samples, for int8 ranges
* heldout.npz          `image` and `label` int64 [N]: samples that training never saw, for the acceptance gate
* digits.onnx          the same network as an ONNX file with a dynamic batch, for recipes/digits-onnx.yaml
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from model import build
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, pad

HERE = Path(__file__).resolve().parent
SEED = 20
HELD_OUT = 450
CALIBRATION = 512
EPOCHS = 60
BATCH = 64


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images and labels, then held-out ones; the split is a seeded permutation."""
    digits = load_digits()
    images = torch.from_numpy((digits.images / 16.0).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(SEED)).permutation(len(labels)))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    return images[kept], labels[kept], images[held], labels[held]


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each image by up to one pixel in each direction."""
    padded = pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images)), generator=generator).tolist()
    crops = [image[:, y : y + 8, x : x + 8] for image, y, x in zip(padded, rows, columns, strict=True)]
    return torch.stack(crops)


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose highest score is their label's."""
    model.eval()
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


def train() -> None:
    """Train, report the held-out accuracy, and write the files."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    generator = torch.Generator().manual_seed(SEED)
    images, labels, held_images, held_labels = split()
    model = build()
    steps = EPOCHS * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _epoch in range(EPOCHS):
        model.train()
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = cross_entropy(model(shifted(images[chosen], generator)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, held-out accuracy {accuracy(model, held_images, held_labels):.4f}")

    model.eval()
    save_file(model.state_dict(), HERE / "weights.safetensors")
    np.savez_compressed(HERE / "calibration.npz", image=images[:CALIBRATION].numpy())
    np.savez_compressed(HERE / "heldout.npz", image=held_images.numpy(), label=held_labels.numpy())
    torch.onnx.export(
        model,
        (held_images[:2],),
        HERE / "digits.onnx",
        input_names=["image"],
        output_names=["logits"],
        opset_version=13,
        dynamo=False,
        dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
    )


if __name__ == "__main__":
    train()
