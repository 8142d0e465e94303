"""Exact likelihood of data under a Gaussian model, along the probability-flow ODE.

In the coordinates of ``process.ode``, y = x / scale over u, and with w = log u, the ODE and the instantaneous change of
variables are, on every process,

    dy/dw = y - x0_hat(x, t),    d log p(y) / dw = -(D - scale tr J),    J = d x0_hat / d x,

so ``log p(x_0) = log p_1(x_1) + D log(scale_1 / scale_0) + int (D - scale tr J) dw`` from the first time to t=1, where
p_1 is the prior that runs start from. Nothing in it is singular: D - scale tr J is about D near the prior, and near the
data the number of directions in which they are narrower than the noise.

x is integrated by the classical Runge-Kutta method with equal steps of w, and the trace, which x does not depend on, by
Simpson's rule over the same nodes: both are of fourth order, and the trace, which is nearly all of the cost, is taken
once a step instead of four times. Everything but the network is in float64.

The trace comes from central differences of ``denoise``, ``v . (x0_hat(x + h v) - x0_hat(x - h v)) / 2h``, because they
need nothing but evaluations: automatic differentiation in forward mode does not get through the attention of every
network, and denoisers may run without gradients. The displacement ``|h v|`` is ``DISPLACEMENT`` times sigma. x0_hat
changes over distances of about sigma, so the relative error is about ``DISPLACEMENT^2 / 6``; and a network in float32
rounds, which on the embedded models makes 0.03 the best: against reverse-mode differentiation one trace of 64 is then
off by 0.001 to 0.02, ten times less than with 0.003. An exact model in float64 can take less.

Reference: Chen et al. 2018, "Neural Ordinary Differential Equations", theorem 1; Grathwohl et al. 2019, "FFJORD"
(Hutchinson's estimator); Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
section 4.3 and appendix D.2; Theis et al. 2016, "A note on the evaluation of generative models" (dequantisation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.noise import RowNoise
from tasks.types import Model

DISPLACEMENT = 0.03


@dataclass(frozen=True)
class Likelihood:
    """The parts of a log-likelihood in nats; every number is a row's own, (B,) float64.

    Attributes:
        total: log p(x_0), the prior's part and the change.
        prior: log p_1(x_1).
        change: log of the volume by which the ODE shrinks from the data to x_1.
        x1: where the ODE carried the data at t=1, (B, *shape) float64.
    """

    total: Tensor
    prior: Tensor
    change: Tensor
    x1: Tensor


def evaluations(steps: int, probes: int, dim: int) -> int:
    """Network evaluations of one row: four a step, and two for every direction at every node."""
    return 4 * steps + 2 * (steps + 1) * (probes or dim)


def check(process: Any, steps: int, probes: int, t_min: float | None = None) -> None:
    """Refuse what cannot be computed.

    Raises:
        ValueError: says which number is wrong and what is allowed.
    """
    if process.kind != "gaussian":
        raise ValueError(
            f"a likelihood along the probability-flow ODE needs a Gaussian process, but the model's is {process.kind}. "
            "Choose another model."
        )
    if steps < 2 or steps % 2:
        raise ValueError(f"steps must be an even number of at least 2 (Simpson's rule), got {steps}.")
    if probes < 0:
        raise ValueError(f"probes must be at least 1, or 0 for the exact trace, got {probes}.")
    if t_min is not None and not 0 < t_min < 1:
        raise ValueError(
            f"t_min must lie between 0 and 1, got {t_min}. Leave it out for the process's own, {process.t_min}."
        )


def log_likelihood(
    model: Model,
    x0: Tensor,
    cond: Tensor | None,
    noise: RowNoise | None = None,
    steps: int = 40,
    probes: int = 1,
    t_min: float | None = None,
    displacement: float = DISPLACEMENT,
) -> Tensor:
    """log p(x_0) in nats, (B,) float64; see :func:`likelihood`."""
    return likelihood(model, x0, cond, noise, steps, probes, t_min, displacement).total


def likelihood(
    model: Model,
    x0: Tensor,
    cond: Tensor | None,
    noise: RowNoise | None = None,
    steps: int = 40,
    probes: int = 1,
    t_min: float | None = None,
    displacement: float = DISPLACEMENT,
) -> Likelihood:
    """The log-likelihood of data and its parts.

    The density is that of ``t_min``, smoothed by noise of sigma(t_min), at the data as they are; and it is the law of
    the ODE that starts from the prior, which differs a little from the data's where the process ends only near the
    prior (VP, EDM).

    Args:
        model: a denoiser of a Gaussian process, guided or not; float32 or float64.
        x0: data, (B, *shape).
        cond: labels, (B,) int64 (``num_classes`` means none), or None.
        noise: the streams that probes are drawn from; not needed for the exact trace.
        steps: number of steps, even.
        probes: number of Rademacher vectors of Hutchinson's estimator, the same along a row's whole path, so that the
            estimate is unbiased for the number that the exact trace would give; 0 takes the exact trace, D directions.
        t_min: where the ODE starts; the process's own when left out.
        displacement: length of the differences for the trace, in units of sigma.

    Raises:
        ValueError: the model or a number does not fit.
    """
    process = model.process
    check(process, steps, probes, t_min)
    if not displacement > 0:
        raise ValueError(f"displacement must be above 0, got {displacement}. Leave it out for {DISPLACEMENT}.")
    if probes and noise is None:
        raise ValueError(f"probes={probes} need noise to be drawn from. Give noise, or probes=0 for the exact trace.")
    start = process.t_min if t_min is None else t_min
    shape = tuple(x0.shape[1:])
    dim = math.prod(shape)
    drawn = None if noise is None or not probes else _rademacher(noise, (probes, *shape), x0)
    (scale_0, u_0), (scale_1, u_1) = process.ode(start), process.ode(1.0)
    step = (math.log(u_1) - math.log(u_0)) / steps
    y = x0.double() / scale_0
    traces = []
    for n in range(steps + 1):
        t = start if n == 0 else 1.0 if n == steps else _time(process, math.log(u_0) + n * step)
        traces.append(_trace(model, y, t, cond, drawn, displacement))
        if n < steps:
            # Nodes meet exactly: the last stage of a step is at the time of the next one's first.
            middle = _time(process, math.log(u_0) + (n + 0.5) * step)
            after = 1.0 if n + 1 == steps else _time(process, math.log(u_0) + (n + 1) * step)
            y = _runge_kutta(model, y, (t, middle, after), step, cond)
    weights = [1.0, *([4.0, 2.0] * (steps // 2))[:-1], 1.0]
    mass = torch.stack([weight * trace for weight, trace in zip(weights, traces, strict=True)]).sum(dim=0) * (step / 3)
    x1 = scale_1 * y
    std = process.prior_std(1.0)
    prior = -0.5 * (x1 / std).flatten(1).square().sum(dim=1) - dim * (math.log(std) + 0.5 * math.log(2 * math.pi))
    change = dim * math.log(scale_1 / scale_0) + mass
    return Likelihood(prior + change, prior, change, x1)


def bits_per_dim(log_likelihood: Any, dim: int, bin_width: float) -> Any:
    """Bits that a dimension costs when the density is read as the probability of a bin.

    ``-log p / (D log 2) - log2(bin_width)``. For 8-bit images in [-1, 1] the bin is 2/256 wide and the offset 7; for
    the digits, whose 17 levels lie in [-1, 1], it is 2/16 and 3. It bounds the code length of discrete data from above
    only where log p was averaged over the bins (:func:`dequantise`); read at the levels themselves it may be negative.

    Args:
        log_likelihood: log p in nats: a number, an array or a tensor.
        dim: number of dimensions D.
        bin_width: width of a bin in the units of the data; 1 leaves the density as it is.

    Raises:
        ValueError: a bin without width.
    """
    if not bin_width > 0:
        raise ValueError(f"bin_width must be above 0, got {bin_width}.")
    return -log_likelihood / (dim * math.log(2.0)) - math.log2(bin_width)


def dequantise(x0: Tensor, bin_width: float, noise: RowNoise) -> Tensor:
    """Data spread evenly over their bins, in float64: the mean of log p there is at most log P of the bins (Jensen)."""
    return x0.double() + bin_width * (noise.uniform(tuple(x0.shape[1:]), purpose="dequantise").to(x0.device) - 0.5)


def _time(process: Any, w: float) -> float:
    return math.exp(w) if process.kind_of_path == "linear" else process.time(-w)


def _rademacher(noise: RowNoise, shape: tuple[int, ...], like: Tensor) -> Tensor:
    signs = 2 * (noise.uniform(shape, purpose="probe") < 0.5) - 1
    return signs.to(like.device, torch.float64)


def _runge_kutta(
    model: Model, y: Tensor, times: tuple[float, float, float], step: float, cond: Tensor | None
) -> Tensor:
    def slope(y: Tensor, t: float) -> Tensor:
        return y - model.denoise(model.process.ode(t)[0] * y, t, cond)

    t, middle, after = times
    k1 = slope(y, t)
    k2 = slope(y + 0.5 * step * k1, middle)
    k3 = slope(y + 0.5 * step * k2, middle)
    k4 = slope(y + step * k3, after)
    return y + (step / 6) * (k1 + 2 * (k2 + k3) + k4)


def _trace(
    model: Model, y: Tensor, t: float, cond: Tensor | None, probes: Tensor | None, displacement: float
) -> Tensor:
    """D - scale tr J at (y, t), (B,), by central differences; ``probes`` are (B, P, *shape), or None for every axis."""
    scale, _ = model.process.ode(t)
    x, (rows, *shape) = scale * y, y.shape
    dim = math.prod(shape)
    count = dim if probes is None else probes.shape[1]
    h = displacement * model.process.sigma(t) / (1.0 if probes is None else math.sqrt(dim))
    twice = None if cond is None else torch.cat([cond, cond])
    total = torch.zeros(rows, dtype=torch.float64, device=y.device)
    for number in range(count):
        if probes is None:
            v = torch.zeros_like(x).flatten(1)
            v[:, number] = 1.0
            v = v.view_as(x)
        else:
            v = probes[:, number]
        up, down = model.denoise(torch.cat([x + h * v, x - h * v]), t, twice).split(rows)
        total += (v * (up.double() - down.double())).flatten(1).sum(dim=1) / (2 * h)
    return dim - scale * (total if probes is None else total / count)
