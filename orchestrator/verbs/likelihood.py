"""``solvus likelihood``: how likely a model finds its reference data."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit, is_shown
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """How it is integrated, and of what."""
    parser.add_argument("--exact", action="store_true", help="the exact trace, D directions instead of random ones")
    parser.add_argument("--probes", type=int, help="random directions of Hutchinson's estimator (default 1)")
    parser.add_argument("--steps", type=int, default=40, help="integration steps, even (default 40)")
    parser.add_argument("--t-min", type=float, metavar="T", help="where the ODE starts (default the process's own)")
    parser.add_argument("--bin-width", type=float, metavar="W", help="of the data (default 2/16 for the digits)")
    parser.add_argument("--as-is", action="store_true", help="the density at the data as they are, not dequantised")


def call(args: Any) -> int:
    """``solvus likelihood``: log-likelihood in nats and bits per dimension of the model's reference data."""
    from orchestrator import config

    data = config.compose(args.overrides, args.config_dir)
    if is_shown(args, data):
        return COMPLETE
    found = _measure(config.study(data), args)
    emit(args, found, _text(found))
    return COMPLETE


def _measure(study: Any, args: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    from tasks import likelihood as exact
    from tasks.noise import RowNoise
    from tasks.run import load_model, use_one_thread
    from tasks.sampler import CountedModel
    from tasks.types import sample_shape

    recipe, spec = study.recipe, study.recipe.parts.model
    if args.exact and args.probes is not None:
        raise ValueError(f"--exact takes no probes, but --probes is {args.probes}. Leave one of them out.")
    probes = 0 if args.exact else 1 if args.probes is None else args.probes
    if not args.exact and probes < 1:
        raise ValueError(f"--probes must be at least 1, got {probes}. Use --exact for the exact trace.")
    exact.check(spec.noising, args.steps, probes, args.t_min)
    recipe.check()
    bin_width = _bin_width(spec) if args.bin_width is None else args.bin_width
    if bin_width is not None and not (math.isfinite(bin_width) and bin_width > 0):
        raise ValueError(f"--bin-width must be above 0, got {bin_width}. Leave it out for the model's own data.")
    if sample_shape(spec) != tuple(spec.shape):
        raise ValueError(
            f"a likelihood is that of data under a model of the same shape, but model {spec.name} has states of shape "
            f"{tuple(spec.shape)} and samples of shape {sample_shape(spec)}. Use a model without a decoder."
        )
    samples, labels = spec.reference()
    first, stop = study.first_index, min(study.first_index + study.num_samples, len(samples))
    if not 0 <= first < stop:
        raise ValueError(f"first_index must be below the {len(samples)} reference samples of the model, got {first}.")

    use_one_thread()
    counted = CountedModel(load_model(recipe), recipe.batch_size)
    if getattr(recipe.parts.guidance, "limited", False):
        raise ValueError(
            "a likelihood is not computed for guidance on an interval. Set guidance.sigma_low and sigma_high to null."
        )
    model = recipe.parts.guidance.wrap(counted)
    values = []
    for low in range(first, stop, recipe.batch_size):
        high = min(low + recipe.batch_size, stop)
        x0 = torch.from_numpy(np.asarray(samples[low:high])).to(recipe.device, getattr(torch, recipe.dtype))
        noise = RowNoise(recipe.seed, torch.arange(low, high, device=recipe.device))
        if bin_width is not None and not args.as_is:
            x0 = exact.dequantise(x0, bin_width, noise)
        cond = torch.from_numpy(np.asarray(labels[low:high])).to(recipe.device) if spec.num_classes else None
        if cond is not None and recipe.labels != "cycle":
            cond = torch.full_like(cond, spec.num_classes if recipe.labels is None else recipe.labels)
        with torch.no_grad():
            values.append(exact.log_likelihood(model, x0, cond, noise, args.steps, probes, args.t_min).cpu().numpy())
        print(f"{high - first:,} of {stop - first:,} samples", file=sys.stderr, flush=True)
    nats = np.concatenate(values)
    if not np.isfinite(nats).all():
        raise ValueError(
            f"the log-likelihood of reference sample {first + int(np.argmin(np.isfinite(nats)))} is not finite. Take "
            "more --steps, or a larger --t-min."
        )
    dim, count = math.prod(spec.shape), len(nats)
    error = float(nats.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return {
        "model": recipe.model["name"],
        "revision": spec.revision,
        "num_samples": count,
        "first_index": first,
        "labels": recipe.labels if spec.num_classes else None,
        "guidance": recipe.guidance["name"],
        "t_min": spec.noising.t_min if args.t_min is None else args.t_min,
        "steps": args.steps,
        "probes": probes,
        "trace": "exact" if args.exact else "hutchinson",
        "bin_width": 1.0 if bin_width is None else bin_width,
        "dequantised": bin_width is not None and not args.as_is,
        "dim": dim,
        "nfe": exact.evaluations(args.steps, probes, dim) * recipe.parts.guidance.evaluations,
        "log_likelihood": float(nats.mean()),
        "log_likelihood_se": error if count > 1 else None,
        "bits_per_dim": float(exact.bits_per_dim(nats.mean(), dim, bin_width or 1.0)),
        "bits_per_dim_se": error / (dim * math.log(2.0)) if count > 1 else None,
    }


def _bin_width(spec: Any) -> float | None:
    """How far apart the levels of the reference data are; None where they are continuous."""
    from tasks.data.digits import LEVELS

    return 2.0 / (LEVELS - 1) if spec.kind == "image" else None


def _text(found: dict[str, Any]) -> str:
    def with_error(name: str) -> str:
        error = found[f"{name}_se"]
        return f"{found[name]:.4f}" + ("" if error is None else f" +- {error:.4f}")

    trace = "exact trace" if found["trace"] == "exact" else f"{found['probes']} random probe(s) a sample"
    given = "" if found["labels"] is None else ", given their labels"
    how = "dequantised uniformly" if found["dequantised"] else "the density at the data as they are"
    return (
        f"{found['model']}: {found['num_samples']:,} reference samples of {found['dim']} dimensions{given}\n"
        f"  log-likelihood  {with_error('log_likelihood')} nats a sample\n"
        f"  bits/dim        {with_error('bits_per_dim')} (bin width {found['bin_width']:g}, {how})\n"
        f"  cost            {found['nfe']:,} evaluations a sample ({found['steps']} steps from t={found['t_min']:g}, "
        f"{trace})"
    )


VERB = Verb(
    "how likely a model finds its reference data, in nats and in bits per dimension",
    call,
    options,
    takes_settings=True,
    composes=True,
)
