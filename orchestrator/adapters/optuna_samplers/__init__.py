"""Our own Optuna samplers: they propose whole points of a search space.

``S3Sampler`` is a predictor-guided evolution of solver schedules, ``AutoDiffusionSampler`` an evolution of time nodes
and skipped layers, ``TurboSampler`` a Gaussian process around the best point, ``CoordinateSampler`` a refinement of
that point. All are made anew for every trial, with the space and the seed of the search, and decide from the trials
that their study has.
"""

from orchestrator.adapters.optuna_samplers.autodiffusion import AutoDiffusionSampler
from orchestrator.adapters.optuna_samplers.coordinate import CoordinateSampler
from orchestrator.adapters.optuna_samplers.least_squares import LeastSquaresSampler
from orchestrator.adapters.optuna_samplers.s3 import S3Sampler
from orchestrator.adapters.optuna_samplers.turbo import TurboSampler

__all__ = ["AutoDiffusionSampler", "CoordinateSampler", "LeastSquaresSampler", "S3Sampler", "TurboSampler"]
