"""Whether a scheduler from disk makes Solvus's own samples."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

from orchestrator.export.candidates import Candidate, prediction_of
from orchestrator.export.point import Point

TOLERANCE = 1e-5
ROWS = 8


class Check:
    """Solvus's own samples, and what a scheduler from disk makes of the same starting noise."""

    def __init__(self, p: Point) -> None:
        import torch

        from tasks.noise import RowNoise
        from tasks.run import load_model, use_one_thread
        from tasks.sampler import CountedModel, Sampler

        use_one_thread()
        self.p, recipe = p, p.recipe
        self.model = load_model(recipe)
        indices = torch.arange(ROWS, device=recipe.device)
        self.labels: Any = None
        if self.model.num_classes:
            self.labels = torch.tensor([recipe.label(i) for i in range(ROWS)], device=recipe.device)
        guided = p.parts.guidance.wrap(CountedModel(self.model, recipe.batch_size))
        grid, stock_steps = p.grid
        sampler = Sampler(guided, p.parts.solver, grid, self.labels, stock_steps, p.parts.initial)
        self.rows = cast(Any, RowNoise(recipe.seed, indices))
        with torch.no_grad():
            state = sampler.start(self.rows)
            self.start = state.x
            self.is_random = p.solver is not None and p.schedule.stochastic
            noise: Any = Stream(ROWS, recipe.device) if self.is_random else self.rows
            for _ in range(sampler.num_steps):
                state = sampler.step(state, noise)
        self.end = state.x
        self.compared = f"{ROWS} rows in float32, from the same starting noise" + (
            " and with the same generator for fresh noise" if self.is_random or p.solver is None else ""
        )

    def difference(self, candidate: Candidate, folder: Path) -> tuple[float, str]:
        """The largest difference over all entries of all rows, and in words what is wrong with it."""
        import torch

        from tasks.scheduler import UnifiedScheduler

        cls: Any = type(candidate.scheduler)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                end = self._loop(cls.from_pretrained(str(folder)), candidate.call)
        except Exception as error:  # whatever a stock class raises on what it cannot do
            if cls is UnifiedScheduler:
                raise
            return math.inf, f"it raised {error!r}"
        if not torch.isfinite(end).all():
            return math.inf, "its samples are not finite"
        gap = float((end - self.end).abs().max())
        return gap, f"it differs by {gap:.3g}"

    def _loop(self, scheduler: Any, call: dict[str, Any]) -> Any:
        """The denoising loop of every pipeline."""
        import inspect

        import torch

        p, device = self.p, self.p.recipe.device
        network = self._network(scheduler)
        scheduler.set_timesteps(**call, device=device)
        # Flow-matching classes have neither a scale of the noise nor one of the input.
        x = self.start * (float(getattr(scheduler, "init_noise_sigma", 1.0)) / p.process.prior_std(p.grid[0][0]))
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        stream = torch.Generator(device).manual_seed(0)
        stride = max(len(scheduler.timesteps) // (len(p.grid[0]) - 1), 1)
        generators: Any = None
        with torch.no_grad():
            for k, t in enumerate(scheduler.timesteps):
                if p.solver is None and (k % stride == 0 or generators is None):
                    seeds = self.rows.at(k // stride).integers("scheduler")
                    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
                options = {"generator": stream if p.solver is not None else generators} if takes_generator else {}
                seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(network(seen, t), t, x, **options, return_dict=False)[0]
        return x

    def _network(self, scheduler: Any) -> Any:
        """The call that a pipeline makes: the UNet itself where there is one, guided as the recipe says."""
        import torch

        from tasks import registry
        from tasks.checkpoint import UNetDenoiser
        from tasks.scheduler import Network, UnifiedScheduler

        if isinstance(self.model, UNetDenoiser):
            raw: Any = self.model.network
        else:
            p = self.p
            plan = None if p.solver is None else registry.solvers.build(p.solver).plan(p.process, p.grid[0])
            kind = scheduler.config.prediction_type if isinstance(scheduler, UnifiedScheduler) else prediction_of(p)
            raw = Network(self.model, kind, () if plan is None else [*plan.starts, *plan.times])
        guidance, labels = self.p.recipe.guidance, self.labels
        if guidance["name"] == "none":
            return lambda x, t: raw(x, t, labels).sample
        nothing = torch.full_like(labels, self.model.num_classes)

        def guided(x: Any, t: Any) -> Any:
            without = raw(x, t, nothing).sample
            return without + guidance["scale"] * (raw(x, t, labels).sample - without)

        return guided


class Stream:
    """Draws of one generator in the order in which they are asked for, as a pipeline's are."""

    def __init__(self, num_rows: int, device: str) -> None:
        import torch

        self.num_rows, self.device = num_rows, device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, shape: tuple[int, ...], purpose: str) -> Any:
        """Standard normal draws, (B, *shape)."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((self.num_rows, *shape), generator=self._generator, device=_device(self.device))

    def at(self, step: int) -> Stream:
        """The same: the order is all."""
        return self


def _device(name: str) -> Any:
    import torch

    return torch.device(name)
