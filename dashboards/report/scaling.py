"""What more compute at inference time buys: strategies at equal cost, best of k and pass@k, the best split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dashboards.report import figures
from dashboards.report.study import GONE, Section, StudyView
from dashboards.report.view import TOLERANCE, Row, cost, costs, unequal
from dashboards.report.won import Judge, interval
from orchestrator import measure, rows
from tasks import registry
from tasks.coverage_laws import CoverageLaw, fit_coverage
from tasks.estimators import Estimate, best_of_k, best_split, choose, fit_scaling, jackknife, pass_at_k
from tasks.intervals import Z95, holm, two_sided


def sections(view: StudyView) -> list[Section]:
    """Empty unless some trial has another strategy than ``single``."""
    done = [row for row in view.complete if not row.stopped]
    if all(row.recipe["strategy"]["name"] == "single" for row in done):
        return []
    found = [_compared(done, view)] if len(done) > 1 else []
    pools = [(row, pool) for row in done if (pool := _pool(row, view)) is not None]
    return found + ([_curves(pools)] if pools else [])


def _compared(done: list[Row], view: StudyView) -> Section:
    """Trials in groups of equal evaluations a sample, best first reward first; what else they cost; what to take."""
    rewards = [name for name in view.names if name.startswith("reward/")]
    lines = []
    for group in groups(done):
        ranked = sorted(group, key=lambda row: row.value(rewards[0]) or 0.0, reverse=True) if rewards else group
        lines.append(f"At {cost(ranked[0], 'nfe'):.4g} evaluations a sample (to {TOLERANCE:.0%}):")
        for row in ranked:
            values = ", ".join(f"{name} {interval(row, name)}" for name in rewards if row.value(name) is not None)
            line = f"{_way(row)} [{row.gives}]: {values}; {costs(row)}."
            warning = unequal(ranked[0], row)
            lines.append(line + (f" {warning}." if warning else ""))
        if rewards and len(group) > 1:
            lines += recommendation(group, rewards[0], view)
    text = (
        "Strategies at equal network evaluations a sample; a warning says what other cost differs by more than 5 %. "
        "[sample] draws from a tilted law; [best] is an optimiser, biased by design, and of no law."
    )
    return Section("Strategies at equal cost", text, lines)


def _way(row: Row) -> str:
    return f"{row.strategy}, {row.solver}, {len(row.times) - 1} steps"


def _named(row: Row) -> str:
    """With the trial's number: two settings of one strategy may read alike."""
    return f"{_way(row)} (trial {row.data['number']})"


def recommendation(group: Sequence[Row], name: str, view: StudyView) -> list[str]:
    """Which of some trials at equal cost to take, how sure that is, and what cannot be told apart from it.

    Chosen on random halves of the samples and valued on the others; rivals by the paired difference of the same sample
    indices, with Holm's correction for their number. Empty where the rows are gone or are not those of one range.
    """
    judge = Judge(name, view)
    same = [row for row in group if row.span == group[0].span and row.value(name) is not None]
    try:
        effects = {_named(row): judge.effects(row) for row in same}
    except GONE:
        return []
    values = {way: found.value + found.independent for way, found in effects.items()}
    if len(values) < 2 or not _comparable(list(values.values())):
        return []
    way, estimate, votes = choose(values)
    others = [other for other in values if other != way]
    apart = [two_sided(*measure.paired_difference(effects[way], effects[other])) for other in others]
    alike = [other for other, adjusted in zip(others, holm(apart), strict=True) if adjusted > 0.05]
    lines = [
        f"Recommended at this cost: {way}. {100 * votes[way] / sum(votes.values()):.0f} % of random halves of the "
        f"samples choose it; on the samples that did not choose, the choice is worth {estimate.value:.4g} ± "
        f"{Z95 * estimate.error:.2g}. "
        + (f"Not told apart from it: {'; '.join(sorted(alike))}." if alike else "All others are worse.")
        + " (Paired by sample index, 5 % after Holm's correction.)"
    ]
    kinds = {_named(row): row.gives for row in same}
    drawn = {other: value for other, value in values.items() if kinds[other].startswith("sample")}
    if kinds[way] == "best" and len(drawn) > 1:
        lines.append(f"Where draws from a law are wanted and not an optimum: {choose(drawn)[0]}.")
    return lines


def _comparable(values: list[np.ndarray]) -> bool:
    """Whether all have the same four samples or more, and no holes (samples that a failure put aside)."""
    return len({len(v) for v in values}) == 1 and len(values[0]) >= 4 and all(np.isfinite(v).all() for v in values)


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
                f"{high:.3g}, power {power[0]:.2g} to {power[1]:.2g}, fitted on k = {fit.x_low:g} to {fit.x_high:g}; "
                f"misfit {fit.misfit:.2g} standard errors)."
            )
        spec = row.recipe.get("reward")
        threshold = getattr(registry.rewards.build(spec), "passing", None) if spec else None
        if threshold is not None:
            right = (pool >= threshold).sum(axis=1)
            passed[label] = [(k, jackknife(pass_at_k(right, n, k))) for k in ks]
            lines += _laws(label, right, n)
    same = {name: pool for name, pool in arms.items() if len(pool) == len(next(iter(arms.values())))}
    if len(same) > 1:
        top = min(spent[name] * pool.shape[1] for name, pool in same.items())  # all pools reach so far
        for budget in sorted({b for name in same if (b := 2 * spent[name]) <= top} | {top}):
            found = best_split(same, spent, budget)
            chosen = 100 * found.votes[found.name] / sum(found.votes.values())
            lines.append(
                f"Best split of {budget:g} evaluations: best of {found.k} at {found.name}, reward "
                f"{found.estimate.value:.4g} ± {Z95 * found.estimate.error:.2g} on samples that did not choose it "
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


def _laws(label: str, right: np.ndarray, n: int) -> list[str]:
    """Laws of coverage of one pool, the one with the smallest BIC first; or why none shows."""
    try:
        laws = fit_coverage(right, n, resamples=50)
    except ValueError as error:
        return [f"{label}: {error}"]
    best = laws[0]
    said = "; ".join(f"{_law(law)}, BIC {law.bic - best.bic:+.1f}, misfit {law.misfit:.2g}" for law in laws)
    unreached = next(law for law in laws if law.name == "saturating beta")
    low, high = unreached.intervals.get("p0", (math.nan, math.nan))
    return [
        f"{label}: pass@k by BIC (fitted on k = {best.k_low} to {best.k_high}): {said}. At k = {10 * n} that is "
        + ", ".join(f"{law(10 * n):.3g} ({law.name})" for law in laws)
        + f", an extrapolation; the share that no number of candidates reaches is {unreached.parameters['p0']:.2g} "
        f"({low:.2g} to {high:.2g})."
    ]


def _law(law: CoverageLaw) -> str:
    """A law with the intervals of its parameters."""
    found = [
        f"{name} {value:.3g}" + (" ({:.3g} to {:.3g})".format(*law.intervals[name]) if name in law.intervals else "")
        for name, value in law.parameters.items()
    ]
    return f"{law.name}: {', '.join(found)}"
