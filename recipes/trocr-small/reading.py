"""Reading lines through the parts of the model, as a server does: one greedy step after the other, with a key and value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

START, END, DIGIT, LONGEST = (
    2,
    1,
    10,
    4,
)  # what a text begins with, what ends it, the token of the digit 0, digits of a line
Call = Callable[..., Mapping[str, np.ndarray]]


def read(parts: Mapping[str, Call], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `tokens` int64 [N, 5] of lines `pixel_values` [N, 3, 32, 128]: a digit for each, the end, and -1 after it."""
    states = parts["encoder"](**inputs)["states"]
    ids = np.full((len(states), 1), START, np.int64)
    found = parts["first"](input_ids=ids, states=states)
    tokens: list[np.ndarray] = []
    for place in range(LONGEST + 1):
        ids = found["scores"][:, -1:].argmax(-1)
        tokens.append(ids)
        if place < LONGEST:
            past = {name.removeprefix("new_"): value for name, value in found.items() if name.startswith("new_")}
            found = parts["step"](input_ids=ids, states=states, **past)
    return {"tokens": ended(np.concatenate(tokens, axis=1).astype(np.int64))}


def ended(tokens: np.ndarray) -> np.ndarray:
    """Return tokens [N, T] with -1 after the one that ends a text."""
    return np.where(np.cumsum(tokens == END, axis=1) - (tokens == END) > 0, -1, tokens)
