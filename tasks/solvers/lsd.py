"""Learnable sampler distillation for masked diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tasks import registry, unmasking
from tasks.registry import solvers, unknown
from tasks.trajectories import shortest_path
from tasks.types import Conditioned, Noise, State

LEARNED = ("both", "coefficients", "nothing")
_ROWS = 64


@solvers.register("lsd")
@dataclass(frozen=True)
class LSD:
    """LSD: tau-leaping whose steps have learned coefficients on the concrete score (LSD+: and learned times).

    Step k reveals a mask with probability ``1 - exp(-Phi_k (t - s) / t)``. A teacher, ancestral sampling with
    ``num_fine`` steps, says what the rates of the student's steps should have been: with the concrete score per time,
    ``r_m = p(v | x_m) w_m / dt_m`` at the teacher's states (w_m the integral of 1/t over a fine step), and the
    student's held one, ``r = p(v | x_i) / t_i``,

        Phi = sum_m dt_m <r_m, r> / sum_m dt_m <r, r>,

    means over places that are still masked at m, which is the least-squares coefficient in closed form. LSD+ also
    chooses the times: the path over the fine nodes with the least expected divergence ``KL(p(. | x_m) || p(. | x_i))``
    summed over the tokens that the teacher reveals. By the chain rule that is what few steps lose to many, and since
    predictions are martingales it is a difference of mean entropies, so steps are short where entropies fall fast.

    Deviations from the paper: least squares in closed form and dynamic programming instead of gradient descent; student
    and teacher start every step from the same state (no relaxed start, which gradient descent needs). Where the model
    ignores the time a scalar cannot change which token is drawn, only how many are: the distilled sampler approaches
    few-step ancestral sampling on the best grid, not the exact law. Total variation at 4 steps on the tests' table:
    tau-leaping .178, LSD .170, ancestral .170; its best grid is the uniform one, and LSD+ gains nothing. On strings of
    nearly always equal tokens, where the first ones matter most, LSD+ is far ahead (tests/tasks/test_lsd.py).

    Args:
        learn: both (LSD+), coefficients (LSD, on the recipe's times) or nothing (tau-leaping).
        num_fine: steps of the teacher.
        num_samples: trajectories that are fitted to.
        filters: specs of filters of the token probabilities, in order; teacher and student both have them.
        artifact: file with coefficients made before.

    Reference: Fu et al. 2025, "Learnable Sampler Distillation for Discrete Diffusion Models".
    Cost and order: one evaluation a step; first order; stochastic. The calibration costs num_fine evaluations for each
        of num_samples, once for a model, guidance and grid.
    Identities: with learn=nothing this is ``tau_leaping``, draw for draw.
    """

    learn: str = "both"
    num_fine: int = 64
    num_samples: int = 512
    filters: tuple[dict[str, Any], ...] = ()
    artifact: str = ""

    process = "masked"
    order = 1
    stochastic = True
    calibrated_on: ClassVar[tuple[str, ...]] = ("guidance", "times", "labels", "seed", "dtype")
    calibration_revision: ClassVar[str] = "3"

    def __post_init__(self) -> None:
        if self.learn not in LEARNED:
            raise unknown("learn", self.learn, list(LEARNED), "Allowed")
        if self.num_fine < 2 or self.num_samples < 1:
            raise ValueError(
                f"lsd needs num_fine >= 2 and num_samples >= 1, got {self.num_fine} and {self.num_samples}."
            )
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    @property
    def is_calibrated_here(self) -> bool:
        """Plain tau-leaping needs no look at the model."""
        return self.learn != "nothing"

    @property
    def own_pace(self) -> bool:
        """Whether the model is asked at learned times."""
        return self.learn == "both"

    @property
    def asks_once(self) -> bool:
        """Whether the model is asked at the grid's own times."""
        return self.learn != "both"

    @property
    def restarts(self) -> bool:
        """Learned coefficients are those of one falling grid."""
        return self.learn == "nothing"

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token, and no more steps than the teacher has."""
        unmasking.check_filters(self.filters, process.vocabulary)
        if self.learn != "nothing" and len(times) - 1 > self.num_fine:
            raise ValueError(
                f"lsd distils {self.num_fine} steps of its teacher into fewer, but the grid has {len(times) - 1}. Use "
                "fewer steps, or raise solver.num_fine."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {name: getattr(self, name) for name in ("learn", "num_fine", "num_samples", "filters")}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """``coefficients`` (N,), of which the last, whose step reveals all, is 1; and ``times`` (N + 1,)."""
        times = bench.sampler(1).times
        steps = len(times) - 1
        if self.learn == "both":
            fine = [times[0] + (times[-1] - times[0]) * m / self.num_fine for m in range(self.num_fine + 1)]
            nodes = list(range(self.num_fine + 1))
        else:
            parts = -(-self.num_fine // steps)
            fine = [t + (s - t) * m / parts for t, s in zip(times, times[1:], strict=False) for m in range(parts)]
            fine, nodes = [*fine, times[-1]], list(range(0, steps * parts + 1, parts))
        found = _teacher(self, bench, tuple(fine))
        if self.learn == "both":
            nodes = list(shortest_path(found.costs(), steps))
        pairs = list(zip(nodes, nodes[1:], strict=False))
        return {
            "coefficients": np.array([found.coefficient(i, j) for i, j in pairs]),
            "times": np.array([fine[node] for node in nodes]),
        }

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s, or between the learned times of the same number.

        Raises:
            ValueError: an artifact file for another number of steps.
        """
        factor = 1.0
        if self.learn != "nothing":
            found: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
            if state.step >= len(found["coefficients"]):
                raise ValueError(
                    f"artifact {self.artifact!r} has {len(found['coefficients'])} steps, fewer than the grid. Leave it "
                    "out and one is made for this number."
                )
            t, s = float(found["times"][state.step]), float(found["times"][state.step + 1])
            factor = float(found["coefficients"][state.step])
        x0_hat = model.denoise(state.x, t)
        rate = 1.0 if s == 0 else -math.expm1(-factor * (t - s) / t)
        return State(
            unmasking.reveal(state.x, x0_hat, rate, self.filters, model.process.mask, noise),
            x0_hat,
            None,
            state.step + 1,
        )


@dataclass(frozen=True)
class _Teacher:
    """What a many-step run says about every pair of its nodes i <= m; arrays are (M, M), upper triangles.

    Attributes:
        times: M + 1 fine times.
        masks: masked places a row at node m, (M,).
        held: mean of ``||p_i||^2`` over the places masked at m.
        both: mean of ``<p_m, p_i>`` over the same places.
        entropy: mean entropy of p_i over the same places, nats.
    """

    times: tuple[float, ...]
    masks: np.ndarray
    held: np.ndarray
    both: np.ndarray
    entropy: np.ndarray

    def coefficient(self, i: int, j: int) -> float:
        """Phi of one step from node i to node j; 1 where it ends at the data."""
        t = np.array(self.times[i : j + 1])
        if t[-1] == 0:
            return 1.0
        weights, lengths = np.log(t[:-1] / t[1:]), t[:-1] - t[1:]
        return float(t[0] * (weights @ self.both[i, i:j]) / (lengths @ self.held[i, i:j]))

    def costs(self) -> np.ndarray:
        """Expected divergence of the held predictions at the tokens that are revealed, nats a row, (M + 1, M + 1)."""
        last = len(self.masks)
        t = np.array(self.times)
        revealed = self.masks * (t[:-1] - t[1:]) / t[:-1]
        error = np.maximum(self.entropy - np.diagonal(self.entropy), 0.0) * revealed
        found = np.full((last + 1, last + 1), np.inf)
        for i in range(last):
            found[i, i + 1 :] = np.cumsum(error[i, i:])
        return found


def _teacher(solver: LSD, bench: Any, fine: tuple[float, ...]) -> _Teacher:
    """Run ancestral sampling along the fine times and compare its predictions."""
    teacher = registry.solvers.build({"name": "ancestral", "filters": list(solver.filters)})
    noise = bench.noise(solver.num_samples)
    sampler = bench.sampler(solver.num_samples, times=fine, stock_steps=None, solver=teacher)
    state, predictions, masked = sampler.start(noise), [], []
    for _ in range(len(fine) - 1):
        masked.append(state.x == bench.process.mask)
        state = sampler.step(state, noise)
        assert state.x0_hat is not None
        predictions.append(unmasking.filtered(state.x0_hat, solver.filters).float())  # all are kept: half the memory
    where, p = torch.stack(masked), torch.stack(predictions)  # (M, B, L) and (M, B, L, V)
    norms = torch.zeros(len(p), len(p), dtype=torch.float64, device=p.device)
    products, entropies = torch.zeros_like(norms), torch.zeros_like(norms)
    for first in range(0, p.shape[1], _ROWS):  # every pair of nodes by matrix products, some rows at a time in float64
        some, among = p[:, first : first + _ROWS].double(), where[:, first : first + _ROWS].double()
        norms += some.square().sum(-1).flatten(1) @ among.flatten(1).T
        entropies += torch.special.entr(some).sum(-1).flatten(1) @ among.flatten(1).T
        products += some.flatten(1) @ (some * among[..., None]).flatten(1).T
    places = where.flatten(1).sum(1).clamp(min=1)
    means = [(found / places).triu().cpu().numpy() for found in (norms, products, entropies)]
    masks = where.sum(-1).double().mean(1).cpu().numpy()
    return _Teacher(fine, masks, *means)
