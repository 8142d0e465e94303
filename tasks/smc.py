"""Sequential Monte Carlo: weighted particles in groups, how they are resampled, and what they say at the end.

A row of a batch is a group of K particles, rows outermost. Weights live in the logarithm and in float64. When a group
is resampled its weights become equal and ``log Z`` grows by ``log mean exp`` of the old ones; a group that is not keeps
its weights. So Z is unbiased for any K and any potentials and schedule that were fixed beforehand (ESS triggers
included), and every group decides for itself: nothing looks across rows.

Reference: Doucet, de Freitas and Gordon 2001, "Sequential Monte Carlo Methods in Practice"; Douc and Cappé 2005,
"Comparison of resampling schemes for particle filtering"; Gerber, Chopin and Whiteley 2019, "Negative association,
ordering and convergence of resampling methods" (SSP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks.registry import unknown
from tasks.types import Noise, Samples, State, reindex

SCHEMES = ("systematic", "stratified", "residual", "multinomial", "ssp")
TRIGGERS = ("always", "ess", "never")
OUTPUTS = ("sample", "all", "best")


# --- weights of groups -----------------------------------------------------------------------------------------------


def normalised(log_w: Tensor) -> Tensor:
    """Weights of every group that sum to 1, (B, K)."""
    return torch.softmax(log_w, dim=1)


def log_mean_exp(values: Tensor) -> Tensor:
    """log of the mean of exp along dimension 1, (B, K) -> (B,)."""
    return torch.logsumexp(values, dim=1) - math.log(values.shape[1])


def effective_size(log_w: Tensor) -> Tensor:
    """Effective sample size 1 / sum W^2 of every group, between 1 and K, (B,)."""
    return 1.0 / normalised(log_w).square().sum(1)


# --- resampling ------------------------------------------------------------------------------------------------------


def ancestors(scheme: str, weights: Tensor, noise: Noise) -> Tensor:
    """Which particle each slot continues, (B, K) int64; every scheme has ``E[count] = K W``.

    Args:
        scheme: systematic and ssp keep every count within 1 of K W; stratified within 2; residual keeps its floor;
            multinomial draws independently and has the largest variance.
        weights: normalised, (B, K) float64.
        noise: streams of the groups (not of the particles), at the step of the decision.
    """
    groups, count = weights.shape
    if scheme == "systematic":
        offsets = noise.uniform((1,), "resample").expand(groups, count)
    else:
        offsets = noise.uniform((count,), "resample")
    if scheme == "ssp":
        return _from_counts(_ssp_counts(weights, offsets))
    if scheme == "residual":
        return _residual(weights, offsets)
    if scheme == "multinomial":
        return invert(weights, offsets)
    places = torch.arange(count, dtype=torch.float64, device=weights.device)
    return invert(weights, (places + offsets) / count)


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative weights, (B, K) and uniforms (B, M) -> (B, M); what has no weight is never chosen."""
    cumulative = weights.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    found = torch.searchsorted(cumulative.contiguous(), uniforms.contiguous(), right=True)
    return found.clamp_(max=weights.shape[1] - 1)


def _from_counts(counts: Tensor) -> Tensor:
    """Ancestors in order of their slots, for counts (B, K) that sum to K."""
    ends = counts.cumsum(1)
    places = torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
    return torch.searchsorted(ends.contiguous(), places.contiguous(), right=True)


def _residual(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Whole parts of K W for certain, the rest by independent draws from the fractions."""
    count = weights.shape[1]
    whole = torch.floor(count * weights + 1e-12).long()
    rest = (count * weights - whole).clamp(min=0)
    certain = whole.sum(1, keepdim=True)
    places = torch.arange(count, device=weights.device).expand_as(whole)
    fixed = torch.searchsorted(whole.cumsum(1).contiguous(), places.contiguous(), right=True)
    drawn = invert(torch.where(certain < count, rest, torch.ones_like(rest)), uniforms)
    return torch.where(places < certain, fixed, drawn)


def _ssp_counts(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Srinivasan sampling: the fractions of K W meet in pairs until each is 0 or 1.

    One fraction a stays open. Against the next one b: when a + b < 1, one of them takes both, in proportion to its
    size; else one of them rounds up to 1, each with the probability that keeps its mean, and the other keeps the rest.
    """
    groups, count = weights.shape
    scaled = count * weights
    counts = torch.floor(scaled).long()
    fractions = scaled - counts
    rows = torch.arange(groups, device=weights.device)
    at, a = torch.zeros_like(rows), fractions[:, 0]
    for j in range(1, count):
        b, u = fractions[:, j], uniforms[:, j]
        total = a + b
        low = total < 1
        stays = torch.where(low, u * total < a, u * (2 - total) < 1 - a)
        counts[rows[~low], torch.where(stays, j, at)[~low]] += 1  # in the upper case the loser of the place is full
        a = torch.where(low, total, total - 1)
        at = torch.where(stays, at, torch.full_like(at, j))
    counts[rows, at] += count - counts.sum(1)  # 0 or 1, up to rounding
    return counts


@dataclass(frozen=True)
class Resampling:
    """When and how groups are resampled.

    Attributes:
        scheme: systematic, stratified, residual, multinomial or ssp.
        trigger: always, ess (when the effective size falls below ``threshold`` K), or never.
        threshold: share of K.
    """

    scheme: str = "systematic"
    trigger: str = "always"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("resampling scheme", self.scheme, list(SCHEMES), "Allowed")
        if self.trigger not in TRIGGERS:
            raise unknown("trigger", self.trigger, list(TRIGGERS), "Allowed")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"strategy.threshold is a share of the particles in (0, 1], got {self.threshold}.")


# --- particles -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParticleState:
    """Particles of B groups of K. Everything that belongs to a particle moves through one indexing.

    Attributes:
        num_particles: K.
        state: the trajectories, with the particle axis (B K) first.
        log_w: weights since the last resampling, (B K,) float64.
        lineage: slot at the start that a particle descends from, (B K,) int64.
        ancestor: slot before the last resampling, (B K,) int64.
        log_z: log normaliser so far, of every group, (B,) float64.
        ess: effective sizes at every weighing, each (B,).
        cache: whatever else belongs to particles: rewards, predictions, gradients, spent potentials.
    """

    num_particles: int
    state: State
    log_w: Tensor
    lineage: Tensor
    ancestor: Tensor
    log_z: Tensor
    ess: tuple[Tensor, ...] = ()
    cache: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grouped(self) -> Tensor:
        """The weights by group, (B, K)."""
        return self.log_w.view(-1, self.num_particles)

    def reindex(self, index: Tensor) -> ParticleState:
        """Keep, drop or copy particles."""
        moved = {name: reindex(getattr(self, name), index) for name in ("state", "log_w", "lineage", "cache")}
        return replace(self, ancestor=index % self.num_particles, **moved)

    def put(self, **values: Any) -> ParticleState:
        """With some entries of the cache replaced."""
        return replace(self, cache={**self.cache, **values})

    def weigh(self, log_potential: Tensor) -> ParticleState:
        """Multiply the weights by a potential, (B K,).

        Raises:
            ValueError: a group without any finite weight.
        """
        log_w = self.log_w + log_potential.double()
        grouped = log_w.view(-1, self.num_particles)
        usable = torch.isfinite(grouped).any(1) & ~(torch.isnan(grouped) | (grouped == torch.inf)).any(1)
        if not usable.all():
            row = int((~usable).nonzero()[0])
            raise ValueError(
                f"the weights of row {row} of a batch are {grouped[row].tolist()[:4]} ...: the potential is infinite. "
                "Lower strategy.strength, or use more steps."
            )
        return replace(self, log_w=log_w, ess=(*self.ess, effective_size(grouped)))

    def resample(self, how: Resampling, noise: Noise) -> ParticleState:
        """Resample the groups whose trigger says so; the others carry their weights on.

        Args:
            how: scheme and trigger.
            noise: streams of the groups at the step of the decision.
        """
        if how.trigger == "never" or self.num_particles == 1:
            return self
        due = torch.ones(len(self.log_z), dtype=torch.bool, device=self.log_z.device)
        if how.trigger == "ess":
            due = effective_size(self.grouped) < how.threshold * self.num_particles
        return self.moved_to(ancestors(how.scheme, normalised(self.grouped), noise), due, log_mean_exp(self.grouped))

    def moved_to(self, chosen: Tensor, due: Tensor, gain: Tensor) -> ParticleState:
        """The particles that slots continue in the groups that are due; their weights are spent on ``log_z``.

        Args:
            chosen: slots, (B, K).
            due: which groups, (B,) bool.
            gain: what each adds to its log Z, (B,).
        """
        count = self.num_particles
        places = torch.arange(count, device=chosen.device).expand_as(chosen)
        chosen = torch.where(due[:, None], chosen, places)
        first = torch.arange(len(chosen), device=chosen.device)[:, None] * count
        moved = self.reindex((first + chosen).flatten())
        kept = torch.where(due[:, None], torch.zeros_like(moved.grouped), moved.grouped).flatten()
        return replace(moved, log_w=kept, log_z=self.log_z + torch.where(due, gain, torch.zeros_like(gain)))

    def total_log_z(self) -> Tensor:
        """log Z with the weights that were not yet spent, (B,)."""
        return self.log_z + log_mean_exp(self.grouped)


def begin(sampler: Any, particles: int, noise: Any) -> ParticleState:
    """Particles at the first time, equally weighted.

    Args:
        sampler: of the B K trajectories.
        particles: K.
        noise: their streams.
    """
    state = sampler.start(noise)
    total = noise.num_rows
    slots = torch.arange(particles, device=state.x.device).repeat(total // particles)
    zeros = torch.zeros(total, dtype=torch.float64, device=state.x.device)
    return ParticleState(particles, state, zeros, slots, slots, zeros[: total // particles])


def check_output(output: str) -> None:
    """Refuse an output that does not exist."""
    if output not in OUTPUTS:
        raise unknown("output", output, list(OUTPUTS), "Allowed")


def outcome(
    particles: ParticleState, x0: Tensor, rewards: Tensor | None, noise: Noise, output: str, decoded: Tensor | None
) -> Samples:
    """One sample a group and what the particles say about it.

    ``sample`` draws a particle in proportion to its weight (slots are not exchangeable after resampling, so no fixed
    slot will do). ``all`` adds every particle in the column ``candidates``, for self-normalised estimates. ``best``
    takes the largest reward, an optimiser and no draw.

    Args:
        particles: at the end.
        x0: their clean states, (B K, *shape).
        rewards: their rewards, (B K,), or None.
        noise: streams of the groups at the step of the decision.
        output: sample, all or best.
        decoded: their decoded states, for ``all``.

    Returns:
        samples with columns ``log_z`` (B,), ``ess`` (B, number of weighings), ``log_weights`` (B, K) normalised,
        ``slot`` (B,), ``unique_ancestors`` (B,), and ``candidate_rewards`` (B, K) where there are rewards.
    """
    count = particles.num_particles
    weights = normalised(particles.grouped)
    if output == "best":
        assert rewards is not None
        slot = rewards.view(-1, count).argmax(1)
    else:
        slot = invert(weights, noise.uniform((1,), "select"))[:, 0]
    lineage = particles.lineage.view(-1, count).sort(1).values
    columns = {
        "log_z": particles.total_log_z(),
        "ess": torch.stack(particles.ess, dim=1),
        "log_weights": torch.log_softmax(particles.grouped, dim=1),
        "slot": slot,
        "unique_ancestors": 1 + (lineage[:, 1:] != lineage[:, :-1]).sum(1),
    }
    if rewards is not None:
        columns["candidate_rewards"] = rewards.view(-1, count)
    if output == "all":
        assert decoded is not None
        columns["candidates"] = decoded.reshape(len(slot), count, -1)
    rows = torch.arange(len(slot), device=slot.device) * count + slot
    return Samples(reindex(x0, rows), columns)
