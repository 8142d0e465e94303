"""Train output heads and uncertainty probes after the blocks of ``digits_dit``, for early exits (guidance deediff).

The network stays as it is. Of every block but the last, head and probe learn

    sum_i mean((1 - u_i) (g_i(h_i) - eps)^2)  +  sum_i mean((u_i - tanh|g_i(h_i) - eps|)^2),

the uncertainty-aware layer-wise loss of the heads and the loss of the probes. Gradients of the first do not reach the
probes, which could lower it by being sure of nothing, and gradients of the second do not reach the heads. The weights
1 - u_i depend on the hidden states alone, so the best head is still the mean of the noise given these.

Reference: Tang et al. 2023, "DeeDiff".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import dit
from tasks.checkpoint import Checkpoint
from tasks.data import digits
from tasks.early_exit import FILE, Exits, save
from tasks.training.course import Course


def errors(network: Any, exits: Exits, process: Any, x0: Tensor, eps: Tensor, step: Tensor, labels: Tensor) -> Any:
    """What the heads predict wrongly, and what the probes say of it.

    Args:
        network: a DiTTransformer2DModel that predicts noise.
        exits: after its blocks.
        process: of the network.
        x0: images, (B, C, H, W).
        eps: noise, likewise.
        step: times in (0, 1], (B,).
        labels: (B,) int64.

    Returns:
        errors and estimated uncertainties, (N - 1, B, T, P) each, T tokens of P numbers.
    """
    alpha, sigma = (f(step).float().view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    told = process.model_time(step).float()
    with torch.no_grad():
        hidden = network.pos_embed(alpha * x0 + sigma * eps)
        embedded, target = dit.embedding(network, told, labels, hidden.dtype), dit.patches(network, eps)
    wrong, unsure = [], []
    for block, way_out in zip(network.transformer_blocks, exits, strict=False):
        with torch.no_grad():
            hidden = block(hidden, timestep=told, class_labels=labels)
        wrong.append(way_out.prediction(hidden, embedded) - target)  # type: ignore[operator]
        unsure.append(way_out.uncertainty(hidden, embedded))  # type: ignore[operator]
    return torch.stack(wrong), torch.stack(unsure)


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    label_dropout: float = 0.1,
    seed: int = 0,
    network: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Train heads and probes with a learning rate that falls to 0, and save them.

    Args:
        name: for the record.
        folder: where they are saved.
        steps: of the optimiser.
        batch_size: images of a step.
        learning_rate: the first.
        label_dropout: share of the images without a label.
        seed: of everything drawn.
        network: folder of another DiT of the digits; that of digits_dit when left out.
        report: told of the progress.

    Returns:
        what is written to ``training.json``.
    """
    from tasks.models.digits_dit import DigitsDiT

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    checkpoint: Checkpoint = DigitsDiT(None if network is None else str(network)).checkpoint
    process, net = checkpoint.process, checkpoint.network("cpu")
    images, labels = torch.from_numpy(digits.images()), torch.from_numpy(digits.labels())
    exits = Exits.of(net)
    optimizer = torch.optim.AdamW(exits.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = Course(name, steps, points=20, report=report, terms=("loss of heads", "of probes"))
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        label = labels[pick].clone()
        label[torch.rand(batch_size, generator=generator) < label_dropout] = checkpoint.num_classes
        drawn = torch.randperm(batch_size, generator=generator) + torch.rand(batch_size, generator=generator)
        when = (torch.floor(drawn / batch_size * 1000).clamp(0, 999) + 1) / 1000
        eps = torch.randn(images[pick].shape, generator=generator)
        wrong, unsure = errors(net, exits, process, images[pick], eps, when, label)
        heads = ((1 - unsure.detach()) * wrong.square()).mean(dim=(1, 2, 3)).sum()
        probes = (unsure - wrong.detach().abs().tanh()).square().mean(dim=(1, 2, 3)).sum()
        optimizer.zero_grad(set_to_none=True)
        (heads + probes).backward()
        optimizer.step()
        schedule.step()
        course.after(step, heads, probes)
    folder.mkdir(parents=True, exist_ok=True)
    save(exits, folder / FILE, checkpoint.revision)
    return course.record(
        folder,
        network=checkpoint.revision,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
    )
