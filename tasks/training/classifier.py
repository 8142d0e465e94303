"""Train the digit classifier that rewards and features use, on four fifths of the digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tasks.classifier import DigitClassifier
from tasks.data import digits
from tasks.training.course import Course


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Train it with light noise and one-pixel shifts, report its accuracy on the held-out fifth, and save it."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(digits.images()), torch.from_numpy(digits.labels())
    test = torch.from_numpy(digits.held_out())
    train_images, train_labels = images[~test], labels[~test]
    net = DigitClassifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    course = Course(name, steps, points=30, report=report)
    for step in range(1, steps + 1):
        pick = torch.randint(len(train_images), (batch_size,), generator=generator)
        x = train_images[pick]
        shift = torch.randint(-1, 2, (2,), generator=generator)
        x = torch.roll(x, (int(shift[0]), int(shift[1])), dims=(2, 3)) if step % 4 == 0 else x
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        loss = torch.nn.functional.cross_entropy(net(x), train_labels[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        course.after(step, loss)
    net.eval()
    with torch.no_grad():
        accuracy = (net(images[test]).argmax(-1) == labels[test]).float().mean().item()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    report(f"{name} accuracy on {int(test.sum())} held-out images: {accuracy:.4f}")
    return course.record(
        folder,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        held_out_accuracy=round(accuracy, 5),
        held_out_images=int(test.sum()),
    )
