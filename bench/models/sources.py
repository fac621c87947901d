"""The four models of issue 3 with seeded weights, as PyTorch modules, and their export to ONNX opset 17.

No weights are downloaded. ResNet-50 and Swin-Tiny get batch statistics and a classifier fitted in closed form on synthetic
classes, so that top-1 means something; the encoders keep their initialisation. Random weights lack the outliers of trained
ones: they show speed, and that a graph is computed as it is written, but not what int8 costs a trained model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

CLASSES = 100
OPSET = 17


@dataclasses.dataclass(frozen=True)
class Source:
    """A model: what builds it, the size of its square images, the name of its output, whether it classifies."""

    build: Callable[[bool], nn.Module]
    size: int
    classifier: bool
    channels_last: bool = False


def resnet50(small: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"hidden_sizes": [32, 64], "depths": [2, 2], "embedding_size": 16} if small else {}
    return _Logits(ResNetForImageClassification(ResNetConfig(num_labels=CLASSES if small else 1000, **sizes)))


def swin_tiny(small: bool) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes: dict[str, Any] = {"depths": [2, 2], "num_heads": [3, 6]} if small else {}
    return _Logits(SwinForImageClassification(SwinConfig(num_labels=CLASSES if small else 1000, **sizes)))


def trocr_encoder(small: bool) -> nn.Module:
    """TrOCR-base's encoder: ViT-B/16 at 384, without the bias of q, k and v, without a pooler."""
    from transformers import ViTConfig, ViTModel

    depth = {"num_hidden_layers": 2} if small else {}
    return _Hidden(ViTModel(ViTConfig(image_size=384, qkv_bias=False, **depth), add_pooling_layer=False))


def padded_encoder(small: bool) -> nn.Module:
    return PaddedTokens(trocr_encoder(small).model, 640)


def hunyuan_encoder(small: bool) -> nn.Module:
    sizes = {"layers": 2} if small else {}
    return HunyuanVision(**sizes)


def hunyuan_four_layers(_small: bool) -> nn.Module:
    return HunyuanVision(layers=4)


def hunyuan_wide_heads(_small: bool) -> nn.Module:
    return HunyuanVision(layers=4, head=80)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image).logits


class _Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image).last_hidden_state


class PaddedTokens(nn.Module):
    """A ViT encoder that computes on a multiple of 64 tokens, of which those too many are seen by none; for exploration."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.model.embeddings(image)
        count = x.shape[1]
        x = functional.pad(x, (0, 0, 0, self.length - count))
        mask = torch.zeros(1, 1, 1, self.length, dtype=x.dtype, device=x.device)
        mask[..., count:] = -30000.0
        for layer in self.model.layers if hasattr(self.model, "layers") else self.model.encoder.layer:
            x = layer(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.model.layernorm(x)[:, :count]


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.dtype
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(kind)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, inner: int, eps: float, head: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        wide = heads * (head or hidden // heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, wide) for _ in range(3))
        self.o_proj = nn.Linear(wide, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.layer_norm1(x)
        q, k, v = (
            layer(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.fc2(functional.gelu(self.fc1(self.layer_norm2(x))))


class HunyuanVision(nn.Module):
    """The vision tower of transformers' `hunyuan_vl` (HunyuanOCR) for square images of one size, several at once.

    The same arithmetic as HunYuanVLVisionTransformer with one grid for all images, whose position table is interpolated
    once. `tests/unit/test_bench_models.py` compares the two.
    """

    def __init__(
        self,
        image: int = 512,
        hidden: int = 1152,
        inner: int = 4304,
        layers: int = 27,
        heads: int = 16,
        text: int = 1024,
        edge: int = 128,
        eps: float = 1e-5,
        head: int | None = None,
    ) -> None:
        super().__init__()
        self.grid = image // 16
        self.patch_embedding = nn.Conv2d(3, hidden, 16, 16)
        table = torch.randn(1, hidden, edge, edge) * 0.02
        grid = functional.interpolate(table, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        self.position = nn.Parameter(grid.flatten(2).transpose(1, 2).contiguous())
        self.layers = nn.ModuleList([Block(hidden, heads, inner, eps, head) for _ in range(layers)])
        self.before_rms, self.after_rms = RMSNorm(hidden, eps), RMSNorm(text, eps)
        self.proj_conv = nn.Conv2d(hidden, hidden * 2, 2, 2)
        self.proj_out = nn.Conv2d(hidden * 2, hidden * 4, 1)
        self.mlp = nn.Linear(hidden * 4, text)
        self.image_newline = nn.Parameter(torch.randn(hidden * 4) * 0.02)
        self.image_begin, self.image_end = (nn.Parameter(torch.randn(text) * 0.02) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embedding(image).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        count = x.shape[0]
        x = self.before_rms(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = self.proj_out(functional.gelu(self.proj_conv(x)))
        newline = self.image_newline.reshape(1, -1, 1, 1).expand(count, -1, x.shape[2], 1)
        x = self.mlp(torch.cat([x, newline], dim=-1).flatten(2).transpose(1, 2))
        begin, end = (edge.reshape(1, 1, -1).expand(count, 1, -1) for edge in (self.image_begin, self.image_end))
        return self.after_rms(torch.cat([begin, x, end], dim=1))


SOURCES = {
    "resnet50": Source(resnet50, 224, classifier=True, channels_last=True),
    "swin": Source(swin_tiny, 224, classifier=True),
    "vit": Source(trocr_encoder, 384, classifier=False),
    "hunyuan": Source(hunyuan_encoder, 512, classifier=False),
    # For exploration: what other shapes would bring.
    "vit640": Source(padded_encoder, 384, classifier=False),
    "hunyuan4": Source(hunyuan_four_layers, 512, classifier=False),
    "hunyuan4w": Source(hunyuan_wide_heads, 512, classifier=False),
}


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Let transformers' ViT make no mask where it would hide nothing.

    When it is compiled or traced it makes one all the same, and PyTorch then has no fused attention for 577 tokens: its
    products run in fp32 and the scores go through memory. Who knows that leaves the mask out, so the times do.
    """
    from transformers.models.vit import modeling_vit

    made = getattr(modeling_vit, "create_bidirectional_mask", None)
    if made is None:
        yield
        return
    modeling_vit.create_bidirectional_mask = lambda *_args, **_options: None
    try:
        yield
    finally:
        modeling_vit.create_bidirectional_mask = made


def build(name: str, device: str, *, small: bool = False, fitted: bool = True) -> nn.Module:
    """Return the model in fp32, in evaluation mode, with weights of one seed; unless `fitted`, others replace them."""
    torch.manual_seed(0)
    model = SOURCES[name].build(small).eval()
    model.requires_grad_(False)
    _calm(model)
    model = model.to(device)
    if SOURCES[name].classifier and fitted:
        _set_statistics(model, SOURCES[name].size, device, small=small)
        _fit_classifier(model, SOURCES[name].size, device, small=small)
    return model


def images(size: int, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return one image NCHW float32 for each label: the pattern of its class (smooth, fixed) with noise and a shift."""
    pattern = torch.Generator().manual_seed(1234)
    coarse = torch.randn(CLASSES, 3, 7, 7, generator=pattern)
    noise = torch.Generator().manual_seed(seed)
    found = functional.interpolate(coarse[labels], size=(size, size), mode="bicubic", align_corners=False)
    shifts = torch.randint(-size // 28, size // 28 + 1, (len(labels), 2), generator=noise)
    found = torch.stack([image.roll(tuple(shift.tolist()), (1, 2)) for image, shift in zip(found, shifts, strict=True)])
    texture = torch.randn(len(labels), 3, size // 4, size // 4, generator=noise)
    return found + 0.5 * functional.interpolate(texture, size=(size, size), mode="bilinear", align_corners=False)


def _calm(model: nn.Module) -> None:
    """Make the residual branches of a ResNet smaller than its shortcuts, as training does.

    At 1, its initial value, each block doubles the variance, and rounding grows on the way through 16 of them: TF32 alone
    was 7 % away from fp32.
    """
    for module in model.modules():
        if type(module).__name__ == "ResNetBottleNeckLayer":
            module.layer[-1].normalization.weight.fill_(0.3)


@torch.inference_mode()
def _set_statistics(model: nn.Module, size: int, device: str, *, small: bool) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    for seed in range(2 if small else 4):
        labels = torch.randint(0, CLASSES, (8 if small else 32,), generator=torch.Generator().manual_seed(seed))
        model(images(size, labels, 100 + seed).to(device))
    model.eval()


@torch.inference_mode()
def _fit_classifier(model: nn.Module, size: int, device: str, *, small: bool) -> None:
    """Fit the last layer to the classes by ridge regression on the features that it gets."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    features: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, given: features.append(given[0].float()))
    targets = []
    for seed in range(4 if small else 10):
        labels = torch.randint(0, CLASSES, (16 if small else 64,), generator=torch.Generator().manual_seed(500 + seed))
        model(images(size, labels, 200 + seed).to(device))
        targets.append(functional.one_hot(labels, head.out_features).to(device, torch.float32))
    hook.remove()
    x, y = torch.cat(features).double(), torch.cat(targets).double()
    mean = x.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    ridge = gram + torch.eye(len(gram), device=device, dtype=torch.float64) * gram.diagonal().mean() * 0.1
    weight = torch.linalg.solve(ridge, centred.T @ (y - y.mean(0)))
    head.weight.copy_((weight.T * 10).float())
    head.bias.copy_(((y.mean(0) - mean @ weight) * 10).float())


def export(model: nn.Module, size: int, batch: int, target: Path) -> dict[str, Any]:
    """Export a static graph by the TorchScript exporter, and return what was written."""
    example = torch.zeros(batch, 3, size, size, device=next(model.parameters()).device)
    target.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    torch.onnx.export(
        model,
        (example,),
        held,
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["out"],
        do_constant_folding=True,
    )
    target.with_suffix(".tmp").write_bytes(held.getvalue())
    target.with_suffix(".tmp").rename(target)
    return {"bytes": target.stat().st_size}


@torch.inference_mode()
def write_data(model: nn.Module, name: str, device: str, folder: Path, *, count: int, calibration: int) -> None:
    """Write `data.npz`: held-out images, labels and the fp32 outputs on them; and `calibration.npz`: other images."""
    size = SOURCES[name].size
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(9))
    held = images(size, labels, 900)
    found = [model(part.to(device)).float().cpu() for part in held.split(8)]
    np.savez(folder / "data.npz", image=held.numpy(), label=labels.numpy(), out=torch.cat(found).numpy())
    labels = torch.randint(0, CLASSES, (calibration,), generator=torch.Generator().manual_seed(10))
    np.savez(folder / "calibration.npz", image=images(size, labels, 901).numpy())


def describe(model: nn.Module, name: str) -> dict[str, Any]:
    return {"parameters": sum(value.numel() for value in model.parameters()), "image": SOURCES[name].size}


if __name__ == "__main__":
    print(json.dumps({name: describe(build(name, "cpu", small=True), name) for name in SOURCES}, indent=1))
