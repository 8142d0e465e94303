"""Adaptive Dormand-Prince integration of the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.processes import expand
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State

# Dormand and Prince 1980, table 2 (RK5(4)7M). The last row of A is the fifth-order solution, so the seventh slope of an
# accepted step is the first one of the next. E is the difference between the fifth- and the fourth-order weights.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_STAGES = 6  # evaluations of one attempt; the first slope is known
_SAFETY, _SHRINK, _GROW, _MOST = 0.9, 0.2, 5.0, 0.5


@solvers.register("dopri5")
@dataclass(frozen=True)
class Dopri5:
    """Dormand-Prince 5(4) on the probability-flow ODE, with a step size for every row.

    The state is ``y = x / scale`` over u of ``process.ode``: (x / alpha, sigma / alpha), or (x, t) on a linear path; in
    both ``dy/du = (y - x0_hat) / u``. A step from u to u - h is accepted where the root mean square over a row of
    ``error / (atol + rtol max(|y|, |y_new|))`` is at most 1. The next attempt's share h / u is this one's times
    ``0.9 norm^(-1/5)``, a factor between 0.2 and 5 and at most 1 after a rejection; a share never exceeds 1/2, because
    slopes are divided by u, and a tolerance that is easy to meet far from the data would lead into that pole.

    Times of the grid are stops on the way: t=1 and t=0 are enough, and the share and the last slope are carried from
    one to the next. A step to t=0 is integrated to ``process.t_min``, the earliest time that networks are trained at,
    and ends on the clean prediction there, the first-order transfer, which costs nothing.

    Every row has its own time and step size. A batch is always evaluated whole: rows that are done wait for the
    slowest and their evaluations are thrown away, so that a row's bits never depend on its neighbours; the evaluations
    counted for a block are those of its slowest row. Arithmetic is in float64 whatever the dtype of the states.

    Args:
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step, in the coordinate y.
        max_evaluations: the most evaluations that a row may need along its trajectory.

    Reference: Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae"; Hairer, Norsett and Wanner 1993,
        section II.4 (step size); Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
        Equations", section 4.3 (tolerances).
    Cost and order: one evaluation, then six for every attempted step; adaptive, of fifth order in the step size;
        deterministic.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 1000

    process = "gaussian"
    order = 5
    stochastic = False
    adaptive = True

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not value > 0:
                raise ValueError(f"solver.{name} must be above 0, got {value}.")
        if self.max_evaluations < 1 + _STAGES:
            raise ValueError(
                f"solver.max_evaluations must be at least {1 + _STAGES}, got {self.max_evaluations}: one slope and one "
                "step cost as many."
            )

    def nfe(self, num_steps: int) -> int:
        """The fewest that a run to t=0 can need: a step is free when it starts at or below ``process.t_min``."""
        return 1 + _STAGES * (num_steps - 1)

    def nfe_before_data(self, num_steps: int) -> int:
        """The fewest that a run can need that stops before t=0."""
        return 1 + _STAGES * num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """Refused: the error tolerance decides what is spent."""
        raise ValueError(
            f"dopri5 adapts its steps, so it cannot spend exactly {nfe} evaluations. Set solver.rtol and solver.atol "
            "instead of nfe, or choose a solver with fixed steps, for example solver=heun."
        )

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process = model.process
        to_data = process.sigma(s) == 0
        end = min(t, process.t_min) if to_data else s
        scale, first = process.ode(t)
        end_scale, last = process.ode(end)
        place = _Place.at(model, state, t, scale, first)
        if last < first:
            place = self._integrate(model, place, last)
        x0_hat = place.y - last * place.slope
        x = (x0_hat if to_data else end_scale * place.y).to(state.x.dtype)
        memory = None if to_data else place.memory(x, s)
        return State(x, x0_hat.to(state.x.dtype), memory, state.step + 1)

    def _integrate(self, model: Conditioned, place: _Place, last: float) -> _Place:
        """All rows from ``place.u`` to ``last``."""
        y, u, slope, q, spent = place.y, place.u, place.slope, place.q, place.spent
        if q is None:
            # Hairer's first guess, a hundredth of the time in which y changes by itself; the second evaluation that
            # would refine it is not spent, because a step too long costs little more.
            size = self.atol + self.rtol * y.abs()
            q = 0.01 * _norm(y / size) / _norm(slope / size) / u
            q = torch.where(torch.isfinite(q), q, torch.ones_like(q)).clamp(1e-6, _MOST)
        retried = torch.zeros_like(u, dtype=torch.bool)
        active = u > last
        while bool(active.any()):
            spent = spent + _STAGES * active
            if bool((spent > self.max_evaluations).any()):
                self._give_up(model.process, spent, u, q)
            stop = q * u >= u - last  # this attempt would reach the end
            tried = torch.where(stop, (u - last) / u, q)
            new_y, new_slope, error = _attempt(model, y, u, slope, tried * u)
            norm = _norm(error / (self.atol + self.rtol * torch.maximum(y.abs(), new_y.abs())))
            accepted = active & (norm <= 1)  # false where the norm is not a number
            # A norm that is no number is a rejected attempt: taken as infinite, it shrinks the step instead of hiding.
            factor = (_SAFETY * torch.nan_to_num(norm, nan=torch.inf).pow(-1 / 5)).clamp(_SHRINK, _GROW)
            factor = torch.where(accepted & ~retried, factor, factor.clamp(max=1.0))
            # An attempt that was cut short at the end says little against the longer one that was meant.
            meant = torch.where(accepted & stop, torch.maximum(q, factor * tried), factor * tried)
            q = torch.where(active, meant.clamp(max=_MOST), q)
            u = torch.where(accepted, torch.where(stop, torch.full_like(u, last), u - tried * u), u)
            rows = expand(accepted, y).bool()
            y, slope = torch.where(rows, new_y, y), torch.where(rows, new_slope, slope)
            retried = active & ~accepted
            active = u > last
        return _Place(y, u, slope, q, spent)

    def _give_up(self, process: Any, spent: Tensor, u: Tensor, q: Tensor) -> None:
        row = int((spent > self.max_evaluations).nonzero()[0])
        raise ValueError(
            f"dopri5 needs more than solver.max_evaluations={self.max_evaluations} evaluations for row {row} of a "
            f"batch: it stands at t={float(_time(process, u)[row]):.6g} with steps of {float(q[row]):.3g} u. Raise "
            f"solver.rtol={self.rtol:g} and solver.atol={self.atol:g}, or raise solver.max_evaluations."
        )


@dataclass(frozen=True)
class _Place:
    """Where the rows stand: y (B, *shape), u (B,), dy/du there, the next share h / u (B,), evaluations spent (B,)."""

    y: Tensor
    u: Tensor
    slope: Tensor
    q: Tensor | None
    spent: Tensor

    @staticmethod
    def at(model: Conditioned, state: State, t: float, scale: float, first: float) -> _Place:
        """The place of a state at t: carried from the step before, row by row, where nobody moved it in between."""
        y = state.x.double() / scale
        u = torch.full((len(y),), first, dtype=torch.float64, device=y.device)
        carried = state.memory if state.memory is not None and state.memory["time"] == t else None
        if carried is None:
            slope, spent = _slope(model, y, u), torch.ones(len(y), dtype=torch.int64, device=y.device)
            return _Place(y, u, slope, None, spent)
        same = (state.x == carried["x"]).flatten(1).all(dim=1)
        spent = carried["spent"]
        slope = carried["slope"]
        rows = expand(same, y).bool()
        y = torch.where(rows, carried["y"], y)
        if not bool(same.all()):
            slope, spent = torch.where(rows, slope, _slope(model, y, u)), spent + ~same
        return _Place(y, u, slope, carried["q"], spent)

    def memory(self, x: Tensor, s: float) -> dict[str, Any]:
        """What the next step continues from; x in the dtype of the states tells it whether x is still the same."""
        return {"x": x, "time": s, "y": self.y, "slope": self.slope, "q": self.q, "spent": self.spent}


def _time(process: Any, u: Tensor) -> Tensor:
    """The times (B,) at which the ODE's variable is u."""
    return u if process.kind_of_path == "linear" else process.time(-torch.log(u))


def _slope(model: Conditioned, y: Tensor, u: Tensor) -> Tensor:
    """dy/du, with one time a row."""
    process = model.process
    t = _time(process, u)
    x = y if process.kind_of_path == "linear" else expand(process.alpha(t), y) * y
    return (y - model.denoise(x, t)) / expand(u, y)


def _attempt(model: Conditioned, y: Tensor, u: Tensor, slope: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of size h (B,) towards smaller u: the state, the slope there, and the estimate of the error."""
    slopes, wide = [slope], expand(-h, y)
    new_y = y
    for c, weights in zip(_C[1:], _A[1:], strict=True):
        new_y = y + wide * _sum(weights, slopes)
        slopes.append(_slope(model, new_y, u - c * h))
    return new_y, slopes[-1], wide * _sum(_E, slopes)


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total


def _norm(x: Tensor) -> Tensor:
    """Root mean square of every row, (B,)."""
    return x.flatten(1).square().mean(dim=1).sqrt()
