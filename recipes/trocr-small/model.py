"""TrOCR at a small size, in three graphs: image encoder, first step and later steps of decoding.

The decoder's cache enters and leaves as plain tensors: a key and a value for each layer, [batch, heads, past, size of a head].
Keys and values of the image are computed from the encoder's states in each step, so that they need no tensors of their own.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import TrOCRConfig, TrOCRForCausalLM, ViTConfig, ViTModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

LAYERS, HEADS, HIDDEN, VOCABULARY = 2, 4, 64, 32
HEIGHT, WIDTH, PATCH = 32, 128, 16


class Small(nn.Module):
    """A ViT encoder and a TrOCR decoder, as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        vision = ViTConfig(
            **sizes,
            intermediate_size=4 * HIDDEN,
            image_size=(HEIGHT, WIDTH),
            patch_size=PATCH,
            initializer_range=0.1,
        )
        text = TrOCRConfig(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            cross_attention_hidden_size=HIDDEN,
            decoder_layers=LAYERS,
            decoder_attention_heads=HEADS,
            decoder_ffn_dim=4 * HIDDEN,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.1,
        )
        vision._attn_implementation = text._attn_implementation = "eager"  # noqa: SLF001  the library's own way to choose
        self.vision = ViTModel(vision, add_pooling_layer=False)
        self.text = TrOCRForCausalLM(text)


class Encoder(nn.Module):
    """Image to states."""

    def __init__(self, model: Small) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, 32, 128] float32 -> [N, 17, 64] float32."""
        return self.vision(pixel_values).last_hidden_state


class Decoder(nn.Module):
    """Tokens, the encoder's states and what earlier steps left, to scores and what later steps need."""

    def __init__(self, model: Small) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, input_ids: Tensor, states: Tensor, **past: Tensor) -> tuple[Tensor, ...]:
        """[N, T] int64 and [N, 17, 64] float32 (and key_L, value_L [N, 4, P, 16]) -> scores [N, T, 32], keys and values."""
        own = DynamicCache()
        for layer in range(LAYERS if past else 0):
            own.update(past[f"key_{layer}"], past[f"value_{layer}"], layer)
        found = self.text(
            input_ids=input_ids,
            encoder_hidden_states=states,
            past_key_values=EncoderDecoderCache(own, DynamicCache()),
            use_cache=True,
        )
        kept = found.past_key_values.self_attention_cache
        return (found.logits, *(tensor for layer in kept.layers for tensor in (layer.keys, layer.values)))


def build() -> nn.Module:
    """Return the model; recipes/trocr-small.yaml names this function."""
    return Small()


def encoder(model: Small) -> nn.Module:
    """Return the part `encoder`."""
    return Encoder(model)


def decoder(model: Small) -> nn.Module:
    """Return the parts `first` and `step`, which differ in their inputs."""
    return Decoder(model)
