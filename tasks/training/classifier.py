"""Train the digit classifier that rewards and features use, on four fifths of the digits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tasks.classifier import DigitClassifier
from tasks.data import digits


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
    curve: list[tuple[int, float]] = []
    running, started = 0.0, time.perf_counter()
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
        running += loss.item()
        if step % max(1, steps // 30) == 0 or step == steps:
            curve.append((step, round(running / max(1, steps // 30), 5)))
            report(f"{name} step {step}/{steps} loss {running / max(1, steps // 30):.4f}")
            running = 0.0
    net.eval()
    with torch.no_grad():
        accuracy = (net(images[test]).argmax(-1) == labels[test]).float().mean().item()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    record = {
        "command": f"solvus train {name} --steps {steps} --batch-size {batch_size} --seed {seed}",
        "model": name,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "held_out_accuracy": round(accuracy, 5),
        "held_out_images": int(test.sum()),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "loss_curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    report(f"{name} accuracy on {int(test.sum())} held-out images: {accuracy:.4f}")
    return record
