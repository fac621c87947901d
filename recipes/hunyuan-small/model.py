"""The HunyuanOCR architecture of transformers (hunyuan_vl) at a reduced size and random weights, in four graphs.

What had to be written anew so that no size depends on a value (the library's code takes `grid_thw`, a tensor, and turns it into
Python numbers with `tolist` and `split`):

* vision: the image enters as an image, not as flat patches with a grid. Its height and width are axes; every image of a batch has
  the same. Positions are interpolated to the size of the feature map, attention runs over each image of the batch.
* prompt: embeddings of text and image are put together by the caller (`masked_scatter` in the library), who also computes the
  positions on four axes (`get_rope_index` loops over tokens); the causal mask is made of positions.
* step: one token, with the cache of earlier ones as plain tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration
from transformers.cache_utils import DynamicCache

LAYERS = 2
IMAGE_TOKEN = 120
# exp(-1e4) is 0 in every type, and -1e4 fits fp16.
MASKED = -1e4

REDUCED = {
    "text": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2], "factor": 1.0,
        },
    },
    "vision": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "max_image_size": 1024, "text_hidden_size": 64, "out_hidden_size": 64,
    },
}  # fmt: skip


class Vision(nn.Module):
    """Image to the embeddings that stand for it in a prompt."""

    def __init__(self, model: HunYuanVLForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, R, 32, C, 32] float32, which is an image [N, 3, 32 R, 32 C] -> [N, R (C + 1) + 2, hidden] float32."""
        batch, channels, rows, patch, columns, _patch = image.shape
        image = image.reshape(batch, channels, rows * patch, columns * patch)
        embeddings = self.tower.embeddings
        found = embeddings.patch_embedding(image)
        height, width = found.shape[2], found.shape[3]
        found = found.flatten(2).transpose(1, 2)
        states = found + embeddings.interpolate_pos_encoding(found, height, width)
        for layer in self.tower.layers:
            states = states + self._attention(layer.self_attn, layer.layer_norm1(states))
            states = states + layer.mlp(layer.layer_norm2(states))
        return self.tower.patch_merger(states, size=(height, width))

    def _attention(self, attention: nn.Module, states: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            batch, tokens, _width = projected.shape
            return projected.view(batch, tokens, attention.num_heads, attention.head_dim).transpose(1, 2)

        query, key, value = (
            heads(project(states)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) * attention.scaling, dim=-1)
        return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))


class Embed(nn.Module):
    """Tokens to embeddings."""

    def __init__(self, model: HunYuanVLForConditionalGeneration) -> None:
        super().__init__()
        self.embed = model.model.language_model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        """[N, T] int64 -> [N, T, hidden] float32."""
        return self.embed(input_ids)


class Language(nn.Module):
    """A piece of text (with images in it) after what the cache holds, to scores of the next token and the longer cache."""

    def __init__(self, model: HunYuanVLForConditionalGeneration) -> None:
        super().__init__()
        self.language, self.head = model.model.language_model, model.lm_head

    def forward(self, embeddings: Tensor, positions: Tensor, **past: Tensor) -> tuple[Tensor, ...]:
        """[N, T, hidden] float32, [4, N, T] int64 (and key_L, value_L [N, 2, P, 16]) -> [N, vocabulary], keys and values."""
        cache = DynamicCache()
        for layer in range(LAYERS if past else 0):
            cache.update(past[f"key_{layer}"], past[f"value_{layer}"], layer)
        new, old = embeddings.shape[1], past["key_0"].shape[2] if past else 0
        rows, columns = torch.arange(new)[:, None] + old, torch.arange(old + new)[None, :]
        mask = torch.where(columns <= rows, 0.0, MASKED)[None, None]
        states, rotation = embeddings, self.language.rotary_emb(embeddings, positions)
        for layer in self.language.layers:
            states = layer(
                states, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=rotation
            )
        scores = self.head(self.language.norm(states[:, -1]))
        return (scores, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def build() -> nn.Module:
    """Return the model; recipes/hunyuan-small.yaml names this function."""
    config = HunYuanVLConfig(
        text_config=dict(REDUCED["text"]),
        vision_config=dict(REDUCED["vision"]),
        image_token_id=IMAGE_TOKEN,
        im_start_id=121,
        im_end_id=122,
        im_newline_id=123,
        attn_implementation="eager",
    )
    return HunYuanVLForConditionalGeneration(config)


def vision(model: HunYuanVLForConditionalGeneration) -> nn.Module:
    """Return the part `vision`."""
    return Vision(model)


def embed(model: HunYuanVLForConditionalGeneration) -> nn.Module:
    """Return the part `embed`."""
    return Embed(model)


def language(model: HunYuanVLForConditionalGeneration) -> nn.Module:
    """Return the parts `prompt` and `step`, which differ in their inputs."""
    return Language(model)
