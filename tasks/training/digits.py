"""Train the embedded image models of handwritten digits: ``digits``, ``digits_dit`` (eps), ``digits_flow`` (velocity).

They are a class-conditional diffusers ``UNet2DModel``, or a ``DiTTransformer2DModel``, with label dropout, so that
classifier-free guidance works, and are saved the way diffusers saves a pipeline: ``unet/`` or ``transformer/``,
``scheduler/``, and a ``training.json`` with the command, the seed and the loss curve.

The noise schedule of ``digits`` and ``digits_dit`` is scaled-linear from 0.00085 to 0.016, whose terminal
sqrt(alpha_bar) is 0.033: small enough for the prior to be Gaussian, large enough for the clean prediction x - sigma eps
over alpha to stay finite in the first step of a multistep solver. A plain cosine table ends at 5e-5, and there those
solvers blow up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks.data import digits
from tasks.processes import VP, Flow, GaussianProcess
from tasks.training.course import Course, average_in, warm_cosine

NUM_CLASSES = 10
PROCESS = VP("scaled_linear", 0.00085, 0.016, 1000)


def network() -> Any:
    """The UNet of both models: 16 and 48 channels, attention at 4x4, 11 class embeddings (the last is "no label")."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=NUM_CLASSES + 1,
    )


def transformer() -> Any:
    """The DiT of ``digits_dit``: 16 patches of 2x2, 6 blocks of 48 channels and 3 heads, 11 class embeddings."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8,
        in_channels=1,
        patch_size=2,
        num_layers=6,
        num_attention_heads=3,
        attention_head_dim=16,
        num_embeds_ada_norm=NUM_CLASSES,
    )


def train(
    name: str,
    folder: Path,
    *,
    steps: int = 8000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    ema_decay: float = 0.9995,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Train ``digits``, ``digits_dit`` or ``digits_flow`` and save it under ``folder``.

    The loss is the plain mean squared error of the prediction; times are stratified over the batch, which lowers the
    variance of the gradient at no cost. AdamW, linear warm-up then cosine decay, an exponential moving average of the
    weights is what is saved.

    Returns:
        what is written to ``training.json``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow = name == "digits_flow"
    process: GaussianProcess = Flow() if flow else PROCESS
    images = torch.from_numpy(digits.images())
    labels = torch.from_numpy(digits.labels())
    # Every block of a DiT embeds the labels, and in training mode each would drop other ones: they are dropped here.
    net = transformer().eval() if name == "digits_dit" else network()
    averaged = {key: value.detach().clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    course = Course(name, steps, points=60, report=report)
    for step in range(1, steps + 1):
        rate = learning_rate * warm_cosine(step, steps, warmup=200)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        x0, label = images[pick], labels[pick].clone()
        label[torch.rand(batch_size, generator=generator) < label_dropout] = NUM_CLASSES
        uniform = (torch.randperm(batch_size, generator=generator) + torch.rand(batch_size, generator=generator)) / (
            batch_size
        )
        if flow:
            t = uniform.clamp(1e-4, 1.0)
        else:
            t = (torch.floor(uniform * 1000).clamp(0, 999) + 1) / 1000
        alpha = process.alpha(t).float().view(-1, 1, 1, 1)
        sigma = process.sigma(t).float().view(-1, 1, 1, 1)
        eps = torch.randn(x0.shape, generator=generator)
        target = eps - x0 if flow else eps
        prediction = net(alpha * x0 + sigma * eps, process.model_time(t).float(), label).sample
        loss = torch.nn.functional.mse_loss(prediction, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average_in(averaged, net, step, ema_decay)
        course.after(step, loss)
    net.load_state_dict(averaged)
    save(net, name, folder)
    return course.record(
        folder,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        ema_decay=ema_decay,
    )


def save(net: Any, name: str, folder: Path) -> None:
    """Write the network as a diffusers pipeline folder with its scheduler."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    net.save_pretrained(folder / ("transformer" if name == "digits_dit" else "unet"), safe_serialization=True)
    scheduler: Any
    if name == "digits_flow":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    else:
        scheduler = DDPMScheduler(
            beta_schedule=PROCESS.schedule,
            beta_start=PROCESS.beta_start,
            beta_end=PROCESS.beta_end,
            num_train_timesteps=PROCESS.num_train_steps,
            prediction_type="epsilon",
            clip_sample=False,
        )
    scheduler.save_pretrained(folder / "scheduler")
