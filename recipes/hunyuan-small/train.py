"""Teach the reduced model to read pages of handwritten digits, so that its scores have margins, as those of a trained model do.

Run `python recipes/hunyuan-small/train.py`; it takes some minutes on one core, and writes weights.safetensors beside itself:
the trained parameters, rounded to float16.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import torch
from model import build, embed, language, vision
from pages import SEED, held_out, pages, split
from reading import AFTER, BEFORE, positions
from safetensors.torch import save_file

WEIGHTS = Path(__file__).resolve().parent / "weights.safetensors"
STEPS = 1200
BATCH = 48
SIZES = ((2, 3), (2, 2), (3, 2))


def scores(model: torch.nn.Module, page: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the scores [N, L, vocabulary] of every token of the text that belongs to a page, given those before it."""
    before, after = (embed(model)(torch.tensor([ids])).expand(len(page), -1, -1) for ids in (BEFORE, AFTER))
    states = torch.cat([before, vision(model)(page), after, embed(model)(tokens[:, :-1])], dim=1)
    prompt = torch.from_numpy(positions(1, page.shape[2], page.shape[4]))
    follow = torch.arange(prompt.shape[2], states.shape[1]).expand(4, 1, -1)
    part = language(model)
    rotation = part.language.rotary_emb(states, torch.cat([prompt, follow], dim=2).expand(-1, len(page), -1))
    mask = torch.full((states.shape[1], states.shape[1]), -1e4).triu(1)[None, None]
    for layer in part.language.layers:
        states = layer(states, attention_mask=mask, use_cache=False, position_embeddings=rotation)
    return part.head(part.language.norm(states[:, -tokens.shape[1] :]))


def train() -> None:
    """Train, write the weights, and report what is read of held-out digits, the true tokens being given."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # small operators: a second thread waits more than it works
    draw, digits = np.random.default_rng(SEED), split()[1]
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS, pct_start=0.1)
    begin = time.perf_counter()
    for step, size in zip(range(1, STEPS + 1), itertools.cycle(SIZES), strict=False):
        page, tokens = (torch.from_numpy(value) for value in pages(digits, BATCH, size, draw).values())
        loss = torch.nn.functional.cross_entropy(scores(model, page, tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"{step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
    model.eval()
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file({name: value.clone().contiguous() for name, value in state.items()}, WEIGHTS)
    model.load_state_dict(state)
    for size in SIZES:
        page, tokens = (torch.from_numpy(value) for value in held_out(256, *size).values())
        with torch.inference_mode():
            right = scores(model, page, tokens).argmax(-1) == tokens
        print(f"{size}: {right.all(1).float().mean():.4f} of pages, {right.float().mean():.4f} of tokens")


if __name__ == "__main__":
    train()
