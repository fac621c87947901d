"""Teach the small model to read lines of handwritten digits, so that its scores have margins, as those of a trained model do.

Run `python recipes/trocr-small/train.py`; it takes some minutes on one core, and writes weights.safetensors beside itself:
the trained parameters, rounded to float16.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from lines import SEED, held_out, lines, split
from model import build
from reading import START
from safetensors.torch import save_file

WEIGHTS = Path(__file__).resolve().parent / "weights.safetensors"
STEPS = 1500
BATCH = 32


def scores(model: torch.nn.Module, line: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the scores [N, T, vocabulary] of every token of the text of a line, given those before it."""
    states = model.vision(line).last_hidden_state
    given = torch.cat([torch.full((len(tokens), 1), START), tokens[:, :-1].clamp(min=0)], dim=1)
    return model.text(input_ids=given, encoder_hidden_states=states, use_cache=False).logits


def train() -> None:
    """Train, write the weights, and report what is read of held-out digits, the true tokens being given."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # small operators: a second thread waits more than it works
    draw, digits = np.random.default_rng(SEED), split()[1]
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS, pct_start=0.1)
    begin = time.perf_counter()
    for step in range(1, STEPS + 1):
        line, tokens = (torch.from_numpy(value) for value in lines(digits, BATCH, draw).values())
        found = scores(model, line, tokens).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(found, tokens.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
    model.eval()
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file({name: value.clone().contiguous() for name, value in state.items()}, WEIGHTS)
    model.load_state_dict(state)
    line, tokens = (torch.from_numpy(value) for value in held_out(256).values())
    with torch.inference_mode():
        right = (scores(model, line, tokens).argmax(-1) == tokens) | (tokens < 0)
    print(f"{right.all(1).float().mean():.4f} of lines, {right[tokens >= 0].float().mean():.4f} of tokens")


if __name__ == "__main__":
    train()
