"""``solvus likelihood``: the numbers it prints, and what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tasks import likelihood as exact
from tasks.models.gmm import GMM

Solvus = Callable[..., Any]


def test_the_numbers_are_those_of_the_exact_density(solvus: Solvus) -> None:
    done = solvus("likelihood", "model=gmm", "model.process=flow", "num_samples=100", "--exact", "--steps=80", "--json")
    assert done.code == 0, done.err
    spec = GMM(process="flow")
    x0 = torch.from_numpy(spec.reference()[0][:100]).double()
    nats = spec.load("cpu").log_density(x0, spec.noising.t_min).numpy()
    found = done.data
    assert (found["num_samples"], found["dim"], found["trace"], found["probes"]) == (100, 2, "exact", 0)
    assert found["log_likelihood"] == pytest.approx(nats.mean(), abs=1e-3)
    assert found["log_likelihood_se"] == pytest.approx(nats.std(ddof=1) / 10, rel=1e-2)
    assert found["bits_per_dim"] == pytest.approx(-nats.mean() / (2 * math.log(2)), abs=1e-3)
    assert found["bits_per_dim_se"] == pytest.approx(found["log_likelihood_se"] / (2 * math.log(2)))
    assert (found["bin_width"], found["dequantised"]) == (1.0, False)
    assert found["nfe"] == exact.evaluations(80, 0, 2)


def test_digits_are_dequantised_by_their_bins_and_read_as_they_are_only_on_request(solvus: Solvus) -> None:
    argv = ["likelihood", "model=digits", "num_samples=4", "batch_size=4", "--steps=8", "--json"]
    spread, bare = solvus(*argv).data, solvus(*argv, "--as-is").data
    for found, dequantised in ((spread, True), (bare, False)):
        assert (found["bin_width"], found["dequantised"], found["dim"]) == (0.125, dequantised, 64)
        assert found["bits_per_dim"] == pytest.approx(exact.bits_per_dim(found["log_likelihood"], 64, 2 / 16))
    assert bare["log_likelihood"] > spread["log_likelihood"]
    finer = solvus(*argv, "--as-is", "--bin-width=0.0078125").data
    assert finer["bits_per_dim"] == pytest.approx(bare["bits_per_dim"] + 4)


def test_the_range_may_be_cut_in_any_way(solvus: Solvus) -> None:
    argv = ["likelihood", "model=gmm", "batch_size=16", "--steps=4", "--json"]
    whole = solvus(*argv, "num_samples=40").data["log_likelihood"]
    parts = [solvus(*argv, f"num_samples={n}", f"first_index={i}").data["log_likelihood"] for i, n in ((0, 7), (7, 33))]
    assert np.average(parts, weights=[7, 33]) == pytest.approx(whole, rel=1e-12)


def test_labels_and_guidance_are_those_of_the_study(solvus: Solvus) -> None:
    argv = ["likelihood", "model=gmm", "model.labels=true", "num_samples=50", "--exact", "--steps=20", "--json"]
    given, free = solvus(*argv).data, solvus(*argv, "labels=null").data
    assert (given["labels"], free["labels"]) == ("cycle", None)
    assert given["log_likelihood"] > free["log_likelihood"]  # a label tells something about its sample
    guided = solvus(*argv, "guidance=cfg", "guidance.scale=1.0").data
    assert guided["log_likelihood"] == pytest.approx(given["log_likelihood"], rel=1e-9)
    assert guided["nfe"] == 2 * given["nfe"]


def test_it_prints_for_people_too_and_keeps_progress_off_standard_output(solvus: Solvus) -> None:
    done = solvus("likelihood", "model=gmm", "num_samples=20", "--steps=4", "--probes=2")
    assert done.code == 0
    assert done.out.startswith("gmm: 20 reference samples of 2 dimensions\n  log-likelihood  ")
    assert "+-" in done.out and "bits/dim" in done.out and "2 random probe(s)" in done.out
    assert "20 of 20 samples" in done.err and "20 of 20 samples" not in done.out
    one = solvus("likelihood", "model=gmm", "num_samples=1", "--steps=4", "--json")
    assert one.data["log_likelihood_se"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps=7"], "steps must be an even number of at least 2"),
        (["--probes=0"], "--probes must be at least 1, got 0. Use --exact"),
        (["--exact", "--probes=3"], "--exact takes no probes, but --probes is 3"),
        (["--bin-width=0"], "--bin-width must be above 0, got 0.0"),
        (["--t-min=2"], "t_min must lie between 0 and 1, got 2.0"),
        (["first_index=10000"], "first_index must be below the 10000 reference samples"),
        (["model=table", "solver=ancestral"], "needs a Gaussian process, but the model's is masked"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_is_allowed(solvus: Solvus, argv: list[str], message: str) -> None:
    done = solvus("likelihood", "num_samples=4", *argv)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err


def test_the_configuration_can_be_looked_at_and_nothing_runs(solvus: Solvus) -> None:
    done = solvus("likelihood", "model=gmm", "model.process=edm", "--cfg", "--json")
    assert done.code == 0
    assert done.data["model"]["process"] == "edm"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, orchestrator.cli as cli\n"
        "try: cli.main(['likelihood', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--exact" in done.stdout
