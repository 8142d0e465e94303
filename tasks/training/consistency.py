"""Distil the embedded diffusion model of handwritten digits into ``digits_consistency``, which needs one step.

Heun's method carries noise along the teacher's conditional probability-flow ODE, unguided, over a Karras grid. The
student learns the consistency function from these trajectories: whatever node of one it is shown, it answers with the
node at the data's end. It begins with the teacher's weights and a second output (``tasks/models/digits_consistency.py``
says why there are two), so near the data it is right from the start.

The target is the true end of the trajectory and not, as in Song et al.'s algorithm 2, the answer of a slow copy of the
student one node nearer to the data. Both have the same solution. But in minutes the answers do not travel all the way:
with the same network and no less time the slow copy gave Fréchet distances of 11.0, 6.5 and 9.2 at one, two and four
steps of multistep consistency sampling, the true ends 4.9, 4.9 and 5.3. Keeping trajectories also saves the three
further evaluations that a training step would cost.

Reference: Song et al. 2023, "Consistency Models", definition 1 and algorithm 2; Luhman and Luhman 2021, "Knowledge
Distillation in Iterative Generative Models" (trajectory ends as targets); Song and Dhariwal 2023 (pseudo-Huber loss).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.data import digits
from tasks.models.digits import Digits
from tasks.models.digits_consistency import consistency
from tasks.processes import expand
from tasks.training.course import Course, average_in, warm_cosine
from tasks.training.digits import NUM_CLASSES, save


def grid(process: Any, nodes: int, rho: float = 7.0) -> Tensor:
    """Increasing times, (nodes,) float64, whose sigma / alpha is Karras et al.'s grid from t_min to 1."""
    ramp = np.linspace(math.exp(-process.lam(process.t_min) / rho), math.exp(-process.lam(1.0) / rho), nodes)
    return process.time(torch.from_numpy(-rho * np.log(ramp)))


def heun(teacher: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """Heun's step of the teacher's probability-flow ODE from times t (B,) to s > 0 (B,); (B, C, H, W)."""
    process = teacher.process

    def slope(state: Tensor, when: Tensor) -> Tensor:
        x0 = teacher.denoise(state, when, labels)
        return (state - expand(process.alpha(when), state) * x0) / expand(process.sigma(when), state)

    y, scale = x / expand(process.alpha(t), x), expand(process.alpha(s), x)
    change = expand(process.sigma(s) / process.alpha(s) - process.sigma(t) / process.alpha(t), x)
    first = slope(x, t)
    second = slope(scale * (y + change * first), s)
    return scale * (y + change * 0.5 * (first + second))


@torch.no_grad()
def trajectories(teacher: Any, times: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The teacher's trajectories at increasing times, from fresh noise at the last: (nodes, B, C, H, W)."""
    x = torch.randn((len(labels), *teacher.shape), generator=generator)
    nodes = [x]
    for t, s in zip(times.flip(0)[:-1], times.flip(0)[1:], strict=True):
        parts = zip(x.split(256), labels.split(256), strict=True)
        x = torch.cat([heun(teacher, a, t.expand(len(a)), s.expand(len(a)), b) for a, b in parts])
        nodes.append(x)
    return torch.stack(nodes[::-1])


def student(checkpoint: Any) -> Any:
    """The teacher's network with a second output, which says 0 until it is trained."""
    from diffusers import UNet2DModel

    weights = checkpoint.network("cpu").state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])])
    known = {name: value for name, value in checkpoint.config.items() if not name.startswith("_")}
    net: Any = UNet2DModel(**known | {"out_channels": 2})
    net.load_state_dict(weights)
    return net


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 3200,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    num_trajectories: int = 8000,
    nodes: int = 18,
    huber: float = 0.03,
    label_dropout: float = 0.1,
    ema_decay: float = 0.998,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Distil ``digits`` into ``digits_consistency`` and save it under ``folder``.

    The loss is ``sqrt(mean square + huber^2) - huber`` of every image, at nodes drawn so that 63 in 100 lie in the
    noisier half of the grid: near the data there is little to learn. AdamW, linear warm-up then cosine decay, an
    exponential moving average of the weights is what is saved.

    Returns:
        what is written to ``training.json``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    spec = Digits()
    teacher = spec.load("cpu")
    process = teacher.process
    sigma_data = float(digits.images().std())
    course = Course(name, steps, points=60, report=report)
    times = grid(process, nodes)
    labels = torch.randint(NUM_CLASSES, (num_trajectories,), generator=generator)
    labels[torch.rand(num_trajectories, generator=generator) < label_dropout] = NUM_CLASSES
    paths = trajectories(teacher, times, labels, generator)
    ends = paths[0] / process.alpha(process.t_min)
    report(f"{name} {num_trajectories} trajectories of the teacher")
    net = student(spec.checkpoint)
    averaged = {key: value.detach().clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        rate = learning_rate * warm_cosine(step, steps, warmup=100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        uniform = torch.randperm(batch_size, generator=generator) + torch.rand(batch_size, generator=generator)
        node = ((uniform / batch_size) ** 0.7 * (nodes - 1)).long().clamp(max=nodes - 2) + 1
        pick = torch.randint(num_trajectories, (batch_size,), generator=generator)
        answer = consistency(net, process, sigma_data, paths[node, pick], times[node], labels[pick])
        square = (answer - ends[pick]).square().flatten(1).mean(1)
        loss = (torch.sqrt(square + huber**2) - huber).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average_in(averaged, net, step, ema_decay)
        course.after(step, loss)
    net.load_state_dict(averaged)
    save(net, name, folder)
    # The schedule is the teacher's. What the network says is neither noise nor velocity: no stock class can step it.
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text()) | {"prediction_type": "sample", "sigma_data": sigma_data}
    path.write_text(json.dumps(schedule, indent=2) + "\n")
    return course.record(
        folder,
        teacher=spec.revision,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        num_trajectories=num_trajectories,
        nodes=nodes,
        huber=huber,
        label_dropout=label_dropout,
        ema_decay=ema_decay,
    )
