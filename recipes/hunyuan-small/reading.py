"""Reading pages through the parts of the model, as a server does: one greedy step after the other, with a key and value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

BEFORE, AFTER = [5], [7, 8, 9]
DIGIT, END = 10, 2  # the token of the digit 0, and the one that ends a text
Call = Callable[..., Mapping[str, np.ndarray]]


def read(parts: Mapping[str, Call], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `tokens` int64 [N, R C + 1] of pages `image` [N, 3, R, 32, C, 32]: a digit for each cell, and the end.

    After an end, -1 fills up.
    """
    image = inputs["image"]
    seen = parts["vision"](image=image)["embeddings"]
    before, after = (_embedded(parts, np.full((len(image), len(ids)), ids, np.int64)) for ids in (BEFORE, AFTER))
    prompt = np.concatenate([before, seen, after], axis=1)
    found = parts["prompt"](embeddings=prompt, positions=positions(len(image), image.shape[2], image.shape[4]))
    tokens: list[np.ndarray] = []
    for step in range(image.shape[2] * image.shape[4] + 1):
        tokens.append(found["scores"].argmax(-1)[:, None])
        past = {name.removeprefix("new_"): value for name, value in found.items() if name.startswith("new_")}
        place = np.full((4, len(image), 1), prompt.shape[1] + step, np.int64)
        found = parts["step"](embeddings=_embedded(parts, tokens[-1]), positions=place, **past)
    read_ = np.concatenate(tokens, axis=1).astype(np.int64)
    ended = np.cumsum(read_ == END, axis=1) - (read_ == END) > 0
    return {"tokens": np.where(ended, -1, read_)}


def positions(count: int, rows: int, columns: int) -> np.ndarray:
    """Return the positions int64 [4, N, T] of a prompt with one page, as `get_rope_index` of transformers has them."""
    line = np.arange(len(BEFORE) + rows * (columns + 1) + 2 + len(AFTER))
    found = np.stack([line] * 4)
    grid = slice(len(BEFORE) + 1, len(BEFORE) + 1 + rows * (columns + 1))
    found[1, grid] = np.tile(np.arange(columns + 1), rows)
    found[2, grid] = np.arange(rows).repeat(columns + 1)
    found[3, grid] = 0
    return np.broadcast_to(found[:, None], (4, count, len(line))).astype(np.int64)


def _embedded(parts: Mapping[str, Call], tokens: np.ndarray) -> np.ndarray:
    return parts["embed"](input_ids=tokens.astype(np.int64))["embeddings"]
