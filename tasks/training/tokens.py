"""Train the token models of handwritten digits: ``digits_tokens`` (masked) and ``digits_tokens_ar`` (autoregressive).

Both are the same transformer over the 64 grey levels of a digit, class-conditional with label dropout. They train on
four fifths of the digits (``tasks.data.digits.held_out`` names the others) and write into ``training.json``, beside the
command and the loss curve, their cross-entropy on both parts and that of the class marginals: a model that does not
look at its context has the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks import token_network
from tasks.data import digits
from tasks.token_network import SHIFTS, TokenNetwork, TokenNetworkConfig
from tasks.training.course import Course, average_in, warm_cosine

NUM_CLASSES = 10
MOVES = sorted(((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)), key=lambda move: move != (0, 0))
assert len(MOVES) == SHIFTS


def masked_at_random(tokens: Tensor, counts: Tensor, mask: int, generator: torch.Generator) -> Tensor:
    """Hide ``counts`` tokens of each row at random places, (B, L) int64."""
    ranks = torch.rand(tokens.shape, generator=generator).argsort(dim=1).argsort(dim=1)
    return torch.where(ranks < counts[:, None], mask, tokens)


def cross_entropy(network: TokenNetwork, tokens: Tensor, label: Tensor, seen: Tensor, shift: Tensor | None) -> Tensor:
    """Mean over the hidden tokens of each row (all, when causal) of -log p in nats, (B,)."""
    logits = network(seen, label, shift)
    each = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    hidden = (seen == network.config.vocabulary) | network.config.causal
    return (each * hidden).sum(dim=1) / hidden.sum(dim=1)


def _spread(batch: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers, one in each of ``batch`` equal parts of [0, 1), in random order."""
    return (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch


def _optimizers(net: TokenNetwork, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest: half as many steps as AdamW alone, measured here."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"training token models needs the optimizer Muon of torch 2.9 or newer, got {torch.__version__}."
        )
    names = [n for n, p in net.named_parameters() if n.startswith("blocks") and n.endswith("weight") and p.dim() == 2]
    inner = [p for n, p in net.named_parameters() if n in names]
    outer = [p for n, p in net.named_parameters() if n not in names]
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 900,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    label_dropout: float = 0.1,
    shifted: float = 0.25,
    ema_decay: float = 0.998,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Train ``digits_tokens`` or ``digits_tokens_ar`` and save it under ``folder``.

    The masked model hides n tokens of a picture, n uniform in 1..64 and stratified over the batch, and the loss is the
    mean over the hidden ones: with these weights it is an unbiased estimate of the negative evidence bound in nats a
    token, the one with weights 1/t but with less variance. The autoregressive loss is the exact negative
    log-likelihood.

    A share ``shifted`` of the pictures is moved by a pixel, and the network is told how; samples are asked without.

    Returns:
        what is written to ``training.json``.

    Reference: Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 10 (bound); Hoogeboom et
        al. 2022, "Autoregressive Diffusion Models" (the number of hidden tokens instead of a time).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.from_numpy(digits.tokens()), torch.from_numpy(digits.labels())
    train_rows = torch.from_numpy(~digits.held_out())
    tokens, labels = tokens[train_rows], labels[train_rows]
    net = TokenNetwork(TokenNetworkConfig(causal=name == "digits_tokens_ar"))
    config, averaged = net.config, TokenNetwork(net.config)
    averaged.load_state_dict(net.state_dict())
    optimizers = _optimizers(net, learning_rate)
    course = Course(name, steps, points=60, report=report)
    for step in range(1, steps + 1):
        rate = learning_rate * warm_cosine(step, steps, warmup=100)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        pick = torch.randint(len(tokens), (batch_size,), generator=generator)
        label = labels[pick].clone()
        label[torch.rand(batch_size, generator=generator) < label_dropout] = NUM_CLASSES
        shift = torch.randint(1, SHIFTS, (batch_size,), generator=generator)
        shift[torch.rand(batch_size, generator=generator) >= shifted] = 0
        clean = move(tokens[pick], shift)
        seen = clean
        if not config.causal:
            counts = (_spread(batch_size, generator) * config.length).floor().long() + 1
            seen = masked_at_random(clean, counts, config.vocabulary, generator)
        loss = cross_entropy(net, clean, label, seen, shift).mean()
        net.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average_in(averaged.state_dict(), net, step, ema_decay)
        course.after(step, loss)
    token_network.save(averaged, folder)
    record = course.record(
        folder,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        shifted=shifted,
        ema_decay=ema_decay,
        held_out_images=int((~train_rows).sum()),
        nats_per_token=measured(token_network.load(folder, "cpu")),
    )
    report(f"{name} nats per token {record['nats_per_token']}")
    return record


def move(tokens: Tensor, shift: Tensor) -> Tensor:
    """Pictures (B, 64) moved by the pixels that ``shift`` (B,) numbers; paper comes in at the edge."""
    framed = functional.pad(tokens.view(-1, digits.SIDE, digits.SIDE), (1, 1, 1, 1))
    index = torch.arange(digits.SIDE)
    dy, dx = torch.tensor(MOVES)[shift].unbind(dim=1)
    rows, columns = 1 + index - dy[:, None], 1 + index - dx[:, None]
    return framed[torch.arange(len(tokens))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


# --- what it reached -------------------------------------------------------------------------------------------------


def class_marginals() -> np.ndarray:
    """log p of every level at every place of each class, from the training part, (10, 64, 17).

    The pseudo-count 0.1 is near the best for the held-out part: the comparison favours the marginals.
    """
    tokens, labels = digits.tokens()[~digits.held_out()], digits.labels()[~digits.held_out()]
    counts = np.full((NUM_CLASSES, digits.SIDE**2, digits.LEVELS), 0.1)
    np.add.at(counts, (labels[:, None], np.arange(digits.SIDE**2), tokens), 1.0)
    return np.log(counts / counts.sum(axis=2, keepdims=True))


def measured(network: TokenNetwork, passes: int = 2) -> dict[str, float]:
    """Cross-entropy in nats a token on the held-out and the training part, beside the class marginals'.

    For the masked model this is the evidence bound, estimated with ``passes`` random sets of hidden tokens of every
    picture, spread over all numbers of them.
    """
    held_out = digits.held_out()
    tokens, labels = digits.tokens(), digits.labels()
    found = {}
    for part, rows in (("held_out", held_out), ("train", ~held_out)):
        values = [
            bound(network, torch.from_numpy(tokens[rows]), torch.from_numpy(labels[rows]), seed).mean().item()
            for seed in range(1 if network.config.causal else passes)
        ]
        found[part] = round(float(np.mean(values)), 5)
    marginal = class_marginals()[labels[held_out][:, None], np.arange(tokens.shape[1]), tokens[held_out]]
    return found | {"class_marginals_held_out": round(float(-marginal.mean()), 5)}


def bound(network: TokenNetwork, tokens: Tensor, label: Tensor, seed: int, hidden: float | None = None) -> Tensor:
    """Cross-entropy of the hidden tokens of every row, (B,) nats; ``hidden`` is their share, else spread over all."""
    generator, config = torch.Generator().manual_seed(seed), network.config
    counts = (_spread(len(tokens), generator) * config.length).floor().long() + 1
    if hidden is not None:
        counts = torch.full_like(counts, max(1, round(hidden * config.length)))
    seen = tokens if config.causal else masked_at_random(tokens, counts, config.vocabulary, generator)
    with torch.no_grad():
        parts = zip(tokens.split(256), label.split(256), seen.split(256), strict=True)
        return torch.cat([cross_entropy(network, *part, None) for part in parts])
