"""Distil the embedded diffusion model of handwritten digits into ``digits_consistency``, which needs one step.

Consistency distillation: the student's answer at a node of a Karras grid is pulled towards the answer of a slow copy of
itself one node nearer to the data, where Heun's method on the teacher's conditional probability-flow ODE has carried
the same noised image. At the first training step the answer is the state itself, so the ends of whole trajectories
travel node by node up to pure noise.

The student has the teacher's architecture and begins with its weights. The teacher predicts eps, from which a clean
image at high noise would be sigma / alpha times a small difference; the student's output F is scaled to unit variance
instead (see ``tasks/models/digits_consistency.py``). So the first steps only teach it to say what the teacher says in
the new scale: the clean image, by mean squared error.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.data import digits
from tasks.models.digits import Digits
from tasks.models.digits_consistency import coefficients
from tasks.processes import expand, transfer
from tasks.training.digits import NUM_CLASSES, save


def grid(process: Any, nodes: int, rho: float = 7.0) -> Tensor:
    """Increasing times, (nodes,) float64, whose sigma / alpha is Karras et al.'s grid from t_min to 1."""
    ramp = np.linspace(math.exp(-process.lam(process.t_min) / rho), math.exp(-process.lam(1.0) / rho), nodes)
    return process.time(torch.from_numpy(-rho * np.log(ramp)))


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    nodes: int = 18,
    warm_fraction: float = 0.15,
    huber: float = 0.0,
    label_dropout: float = 0.1,
    target_decay: float = 0.9,
    ema_decay: float = 0.998,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    spec = Digits()
    teacher = spec.load("cpu")
    process = teacher.process
    images = torch.from_numpy(digits.images())
    labels = torch.from_numpy(digits.labels())
    sigma_data = float(images.std())
    net = spec.checkpoint.network("cpu").requires_grad_(True)
    target_net = spec.checkpoint.network("cpu")
    averaged = {key: value.detach().clone() for key, value in net.state_dict().items()}
    times = grid(process, nodes)

    def answer(network: Any, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        skip, out = coefficients(process, t, sigma_data)
        return expand(skip, x) * x + expand(out, x) * network(x, process.model_time(t).float(), label).sample

    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    warm = round(warm_fraction * steps)
    ramp = min(100, max(1, steps // 10))
    curve: list[tuple[int, float]] = []
    running, since = 0.0, 0
    started = time.perf_counter()
    for step in range(1, steps + 1):
        fraction = min(step / ramp, 0.5 * (1 + math.cos(math.pi * max(0, step - ramp) / max(1, steps - ramp))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(fraction, 1e-3)
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        x0, label = images[pick], labels[pick].clone()
        label[torch.rand(batch_size, generator=generator) < label_dropout] = NUM_CLASSES
        uniform = (torch.randperm(batch_size, generator=generator) + torch.rand(batch_size, generator=generator)) / (
            batch_size
        )
        node = (uniform * (nodes - 1)).long().clamp(max=nodes - 2)
        t, s = times[node + 1], times[node]
        x = expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * torch.randn(
            x0.shape, generator=generator
        )
        if step <= warm:
            target = x0
        else:
            with torch.no_grad():
                x_s = heun(teacher, x, t, s, label)
                target = answer(target_net, x_s, s, label)
        distance = (answer(net, x, t, label) - target).square().flatten(1).mean(1)
        if huber > 0 and step > warm:
            distance = torch.sqrt(distance + huber**2) - huber
        loss = distance.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in net.state_dict().items():
                averaged[key].lerp_(value, 1 - decay)
            for slow, fast in zip(target_net.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, 1 - target_decay)
        running, since = running + loss.item(), since + 1
        if step % max(1, steps // 60) == 0 or step == steps:
            curve.append((step, round(running / since, 5)))
            elapsed = time.perf_counter() - started
            report(f"{name} step {step}/{steps} loss {running / since:.4f} {elapsed:.0f} s")
            running, since = 0.0, 0
    net.load_state_dict(averaged)
    record = {
        "command": f"solvus train {name} --steps {steps} --batch-size {batch_size} --seed {seed}",
        "model": name,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "loss_curve": curve,
    }
    save(net, name, folder, record)
    path = folder / "scheduler" / "scheduler_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"prediction_type": "sample", "sigma_data": sigma_data}, indent=2) + "\n")
    return record


def heun(teacher: Any, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
    """Heun's step of the teacher's probability-flow ODE from times t to s > 0, one a row; (B, C, H, W)."""
    process = teacher.process

    def slope(state: Tensor, time: Tensor) -> Tensor:
        x0 = teacher.denoise(state, time, label)
        return (state - expand(process.alpha(time), state) * x0) / expand(process.sigma(time), state)

    y, u_t, u_s = (
        x / expand(process.alpha(t), x),
        process.sigma(t) / process.alpha(t),
        process.sigma(s) / process.alpha(s),
    )
    first = slope(x, t)
    scale = expand(process.alpha(s), x)
    guess = scale * (y + expand(u_s - u_t, x) * first)
    return scale * (y + expand(u_s - u_t, x) * 0.5 * (first + slope(guess, s)))
