"""What more compute at inference time buys: strategies at equal cost, best of k and pass@k, the best split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dashboards.report import figures
from dashboards.report.study import GONE, Section, StudyView
from dashboards.report.view import TOLERANCE, Row, cost, costs, unequal
from dashboards.report.won import interval
from orchestrator import rows
from tasks import registry
from tasks.estimators import Estimate, best_of_k, best_split, fit_scaling, jackknife, pass_at_k


def sections(view: StudyView) -> list[Section]:
    """Empty unless some trial has another strategy than ``single``."""
    done = [row for row in view.complete if not row.stopped]
    if all(row.recipe["strategy"]["name"] == "single" for row in done):
        return []
    found = [_compared(done, view.names)] if len(done) > 1 else []
    pools = [(row, pool) for row in done if (pool := _pool(row, view)) is not None]
    return found + ([_curves(pools)] if pools else [])


def _compared(done: list[Row], names: list[str]) -> Section:
    """Trials in groups of equal evaluations a sample, best first reward first; what else they cost."""
    rewards = [name for name in names if name.startswith("reward/")]
    lines = []
    for group in groups(done):
        ranked = sorted(group, key=lambda row: row.value(rewards[0]) or 0.0, reverse=True) if rewards else group
        lines.append(f"At {cost(ranked[0], 'nfe'):.4g} evaluations a sample (to {TOLERANCE:.0%}):")
        for row in ranked:
            values = ", ".join(f"{name} {interval(row, name)}" for name in rewards if row.value(name) is not None)
            line = f"{row.strategy}, {row.solver}, {len(row.times) - 1} steps: {values}; {costs(row)}."
            warning = unequal(ranked[0], row)
            lines.append(line + (f" {warning}." if warning else ""))
    text = "Strategies at equal network evaluations a sample; a warning says what other cost differs by more than 5 %."
    return Section("Strategies at equal cost", text, lines)


def groups(done: Sequence[Row]) -> list[list[Row]]:
    """Trials whose evaluations a sample are within 5 % of the cheapest one's, cheapest first."""
    found: list[list[Row]] = []
    for row in sorted(done, key=lambda row: cost(row, "nfe")):
        if found and cost(row, "nfe") <= (1 + TOLERANCE) * cost(found[-1][0], "nfe"):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _pool(row: Row, view: StudyView) -> np.ndarray | None:
    """The rewards of all candidates of each sample, (P, N), where these were drawn independently and are all there."""
    if row.recipe["strategy"]["name"] != "best_of_n" or row.particles < 2:
        return None
    first, count = row.span
    try:
        parts = list(view.store.read("rows", row.data["key"], first, first + count, ["candidate_rewards"]))
    except GONE:
        return None  # quarantined or collected meanwhile
    return np.concatenate([rows.to_numpy(part["candidate_rewards"]) for part in parts])


def _curves(pools: list[tuple[Row, np.ndarray]]) -> Section:
    """Best of k and pass@k of every pool, its law, and the best split of each budget over the pools."""
    best: dict[str, list[tuple[int, Estimate]]] = {}
    passed: dict[str, list[tuple[int, Estimate]]] = {}
    lines: list[str] = []
    arms: dict[str, np.ndarray] = {}
    spent: dict[str, float] = {}
    laws: dict[str, Any] = {}
    for row, pool in pools:
        n, label = pool.shape[1], f"{row.solver}, {row.grid}, {row.nfe:g} evaluations a candidate"
        if label in arms and arms[label].shape[1] >= n:
            continue  # candidate k is the same for every N > k: the largest pool says it all
        ks = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
        each = {k: best_of_k(pool, k) for k in ks}
        best[label] = [(k, jackknife(each[k])) for k in ks]
        arms[label], spent[label] = pool, float(row.nfe)
        if len(ks) >= 4:
            fit = fit_scaling(ks, np.stack([each[k] for k in ks], axis=1))
            laws[label] = fit
            (low, high), power = fit.intervals["limit"], fit.intervals["power"]
            lines.append(
                f"{label}: best of k follows {fit.limit:.3g} - {fit.gain:.3g} k^-{fit.power:.2g} (limit {low:.3g} to "
                f"{high:.3g}, power {power[0]:.2g} to {power[1]:.2g}, fitted on k = {fit.x_low:g} to {fit.x_high:g})."
            )
        spec = row.recipe.get("reward")
        threshold = getattr(registry.rewards.build(spec), "passing", None) if spec else None
        if threshold is not None:
            right = (pool >= threshold).sum(axis=1)
            passed[label] = [(k, jackknife(pass_at_k(right, n, k))) for k in ks]
    same = {name: pool for name, pool in arms.items() if len(pool) == len(next(iter(arms.values())))}
    if len(same) > 1:
        top = min(spent[name] * pool.shape[1] for name, pool in same.items())  # all pools reach so far
        for budget in sorted({b for name in same if (b := 2 * spent[name]) <= top} | {top}):
            found = best_split(same, spent, budget)
            chosen = 100 * found.votes[found.name] / sum(found.votes.values())
            lines.append(
                f"Best split of {budget:g} evaluations: best of {found.k} at {found.name}, reward "
                f"{found.estimate.value:.4g} ± {1.96 * found.estimate.error:.2g} on samples that did not choose it "
                f"({chosen:.0f} % of the choices)."
            )
    charts = [figures.curves("best_of_k", best, "best of k", "expected reward of the best of k", laws)]
    if passed:
        charts.append(figures.curves("pass_at_k", passed, "pass@k", "probability that one of k passes"))
    text = (
        "Unbiased estimates from all subsets of each pool of candidates, with 95 % intervals over samples. The reward "
        "that selects always rises: see the other rewards too."
    )
    return Section("What candidates buy", text, lines, charts=charts)
