"""Train the small network of one-more-step sampling on the digits.

At zero signal the velocity is minus the clean image, so the network is asked for it given noise and a label: a tenth of
the labels are dropped, as for the model beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tasks.data import digits
from tasks.side_network import FILE, SideNetwork
from tasks.training.course import Course


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    label_dropout: float = 0.1,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Train it by the mean squared error of the velocity, with a learning rate that falls to 0, and save it.

    Returns:
        what is written to ``training.json``.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(digits.images()), torch.from_numpy(digits.labels())
    net = SideNetwork()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = Course(name, steps, points=20, report=report)
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        label = labels[pick].clone()
        label[torch.rand(batch_size, generator=generator) < label_dropout] = 10
        velocity = net(torch.randn(images[pick].shape, generator=generator), label)
        loss = torch.nn.functional.mse_loss(velocity, -images[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        course.after(step, loss)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / FILE)
    return course.record(
        folder, batch_size=batch_size, seed=seed, learning_rate=learning_rate, label_dropout=label_dropout
    )
