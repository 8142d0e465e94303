"""What solvers of token sequences share: draws from filtered probabilities, and choices among masked places.

Shapes: B rows of L places, V real tokens; the mask is token number V. Class probabilities are (B, L, V). Filters act on
normalised log-probabilities over the last axis, in the order of their specs; temperature comes before truncation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks.processes import categorical
from tasks.registry import Spec, filters, unknown

PRECISIONS = ("float32",)


@lru_cache(maxsize=64)
def _built(specs: str) -> tuple[Any, ...]:
    return tuple(filters.build(spec) for spec in json.loads(specs))


def filter_objects(specs: Sequence[Spec]) -> tuple[Any, ...]:
    """The filters of some specs, in order."""
    return _built(json.dumps(specs, sort_keys=True))


def completed(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """Filter specs with every field filled in, checked.

    Raises:
        ValueError: an unknown filter or field, or a temperature after a truncation.
    """
    found = tuple(filters.complete(spec) for spec in specs)
    cut = ""
    for spec, plugin in zip(found, filter_objects(found), strict=True):
        if plugin.truncates:
            cut = spec["name"]
        elif cut:
            raise ValueError(
                f"solver.filters has {spec['name']} after {cut}: temperature acts before truncation, because a cut is "
                f"made on the law that is drawn from. Put {spec['name']} before {cut}."
            )
    return found


def check_filters(specs: Sequence[Spec], vocabulary: int) -> None:
    """Refuse filters that leave no token of a flat, a geometric or a one-sided law over V tokens.

    Raises:
        ValueError: names the filter.
    """
    steps = torch.arange(vocabulary, dtype=torch.float64)
    laws = torch.stack([torch.zeros_like(steps), -steps, torch.where(steps > 0, -40.0, 0.0)])
    filtered(torch.softmax(laws, dim=-1), specs)


def filtered(probabilities: Tensor, specs: Sequence[Spec]) -> Tensor:
    """Class probabilities after the filters, (…, V) to (…, V) float64; the same numbers where there are none.

    Raises:
        ValueError: a filter that leaves no token of some law.
    """
    if not specs:
        return probabilities.double()
    logs = torch.log(probabilities.double())
    for spec, plugin in zip(specs, filter_objects(specs), strict=True):
        logs = plugin(torch.log_softmax(logs, dim=-1))
        if bool(torch.isneginf(logs).all(dim=-1).any()):
            raise ValueError(
                f"filter {spec['name']} removed every token of a place; a filter must keep at least one. Its settings "
                f"are {spec}. Loosen them, or leave the filter out."
            )
    return torch.softmax(logs, dim=-1)


def choose(keys: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The places with the largest keys of every row, as many as its count; (B, L) bool.

    Args:
        keys: (B, L) float; of equal ones the first place wins.
        eligible: places that may be chosen, (B, L) bool.
        counts: how many of each row, (B,) int64; all of them where fewer are eligible.
    """
    order = torch.where(eligible, keys, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    # A key of -inf is not told from a place that is not eligible, so eligible places come first whatever their keys.
    place = eligible.long().gather(1, order).cumsum(1).gather(1, ranks)
    return eligible & (place <= counts[:, None])


def check_gumbel(gumbel: str | None) -> None:
    """Refuse precisions other than null (exact draws) and float32."""
    if gumbel is not None and gumbel not in PRECISIONS:
        raise unknown("gumbel", gumbel, ["null", *PRECISIONS], "Allowed")


def draw(probabilities: Tensor, noise: Any, purpose: str, gumbel: str | None = None) -> Tensor:
    """One token a place, (B, M, V) probabilities to (B, M) int64.

    Args:
        probabilities: of each token; they need not be normalised.
        noise: of the B rows.
        purpose: of the draw.
        gumbel: null inverts the distribution function in float64; "float32" is the defective draw of
            :func:`float32_gumbel`.
    """
    shape = tuple(probabilities.shape[1:])
    if gumbel is None:
        return categorical(probabilities, noise.uniform(shape[:-1], purpose=purpose))
    return float32_gumbel(torch.log(probabilities), noise.uniform(shape, purpose=purpose))


def float32_gumbel(logits: Tensor, uniforms: Tensor) -> Tensor:
    """``argmax(logits + Gumbel)`` as it is often written in float32: biased, for comparison only; (…, V) to (…) int64.

    A float32 uniform is a multiple of 2^-24, so no Gumbel exceeds log 2^24 = 16.6 (1e-10 inside the logarithms does not
    help): an unlikely token can never win against one that is likelier by a larger factor. The effect is that of a
    lower temperature, and of too few masks revealed where the mask is one of the classes.
    """
    coarse = (torch.floor(uniforms * 2.0**24) * 2.0**-24).float()
    noise = -torch.log(-torch.log(coarse + 1e-10) + 1e-10)
    return (logits.float() + noise).argmax(dim=-1)


def reveal(x: Tensor, x0_hat: Tensor, rate: Any, specs: Sequence[Spec], mask: int, noise: Any) -> Tensor:
    """Reveal each masked token with probability ``rate``, drawn from its filtered probabilities; (B, L) int64.

    ``rate`` is a number or (B, L). Whether a token is revealed and what it becomes are two draws.
    """
    revealed = (x == mask) & (noise.uniform(tuple(x.shape[1:]), purpose="reveal") < rate)
    return torch.where(revealed, draw(filtered(x0_hat, specs), noise, "token"), x)
