"""Any stock diffusers scheduler, by its class name."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks.processes import EDM, VP, Flow, from_x0
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

# Two-evaluation schedulers list every evaluation in ``timesteps``; the others list one entry a step.
_EVALUATIONS = {"HeunDiscreteScheduler": 2, "FlowMatchHeunDiscreteScheduler": 2}
# What the model's process says of the schedule, whatever else is configured.
_SCHEDULE = {"self", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "sigma_min",
             "sigma_max", "trained_betas", "use_flow_sigmas"}  # fmt: skip
_GRID = {"shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
         "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas",
         "shift_terminal"}  # fmt: skip
_EVALUATIONS |= {"KDPM2DiscreteScheduler": 2, "KDPM2AncestralDiscreteScheduler": 2}


@solvers.register("diffusers")
@dataclass(frozen=True)
class DiffusersScheduler:
    """A stock diffusers scheduler, unchanged: its own grid with ``times=stock``, or ours where its class takes one.

    The noise schedule always is the model's; ``config`` holds the rest of the scheduler's configuration
    (timestep_spacing, use_karras_sigmas, solver_order, …); prediction_type is what the scheduler is given (and, of
    several steps, remembers). What it leaves out is as the own configuration of a saved pipeline or UNet has it, as
    with diffusers' ``from_config``, and the class's default where that says nothing. Noise that a scheduler draws comes
    from one generator per row, so rows stay functions of their index.

    Args:
        scheduler: class name in ``diffusers``.
        config: configuration fields that override the pipeline's and the class's defaults.

    Reference: von Platen et al., diffusers; each scheduler names its paper.
    Cost: the scheduler's own number of evaluations.
    """

    scheduler: str = "UniPCMultistepScheduler"
    config: dict[str, Any] = field(default_factory=dict)

    process = "gaussian"
    order = 0  # depends on the class; not measured by the conformance suite
    stochastic = False

    def __post_init__(self) -> None:
        if not self.scheduler.isidentifier():
            raise ValueError(f"solver.scheduler must be a class name in diffusers, got {self.scheduler!r}.")

    @cached_property
    def cls(self) -> Any:
        """The scheduler class."""
        import diffusers

        try:
            found = getattr(diffusers, self.scheduler, None)
            usable = hasattr(found, "set_timesteps")
        except ImportError as error:
            raise ValueError(f"{self.scheduler} cannot be used here: {str(error).strip()}") from None
        if not usable:
            known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
            raise unknown("diffusers scheduler", self.scheduler, known, "Known")
        return found

    def beside(self, model: Any) -> DiffusersScheduler:
        """Itself for a model: with what the model's own configuration says of schedulers, where it is a pipeline."""
        found = copy.copy(self)
        found.__dict__["_stock"] = getattr(model, "stock_schedule", None)
        return found

    def inherited(self, lays_grid: bool) -> dict[str, Any]:
        """What a pipeline's configuration says that this one does not: it determines the rows too.

        Args:
            lays_grid: whether the scheduler lays its own grid; else nothing is inherited that moves given times.
        """
        if (stock := self.__dict__.get("_stock")) is None:
            return {}
        known, without = inspect.signature(self.cls.__init__).parameters, _SCHEDULE | set(self.config)
        without |= set() if lays_grid else _GRID
        return {k: v for k, v in stock.config.items() if k in known and k not in without and v != known[k].default}

    def handed(self, process: Any, steps: int) -> dict[str, Any]:
        """What the stock pipeline hands to the scheduler to lay its grid, beside a number of steps: plain data.

        It determines the rows as the configuration does, and is no part of it.
        """
        return self._handed(self.build(process, steps), steps) if self.__dict__.get("_stock") else {}

    def _handed(self, scheduler: Any, steps: int) -> dict[str, Any]:
        if (stock := self.__dict__.get("_stock")) is None:
            return {}
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        return {k: v for k, v in stock.options(dict(scheduler.config), steps).items() if k in accepted}

    def build(self, process: Any, steps: int | tuple[float, ...]) -> Any:
        """The scheduler with its grid set.

        Args:
            process: the model's noising process.
            steps: a number of steps for the stock grid, or explicit times ending at 0.

        Raises:
            ValueError: the class does not fit the process, refuses the configuration, or takes no explicit times.
        """
        step = getattr(self.cls, "step", None)
        if step is None or list(inspect.signature(step).parameters)[1:4] != ["model_output", "timestep", "sample"]:
            raise ValueError(f"{self.scheduler} does not step like other schedulers. Choose another.")
        if "Inverse" in self.scheduler:
            raise ValueError(f"{self.scheduler} runs from data to noise. Choose the class without Inverse.")
        accepted = set(inspect.signature(self.cls.__init__).parameters)
        inherited = self.inherited(isinstance(steps, int))
        base: dict[str, Any] = {}
        if isinstance(process, VP):
            base = {"beta_schedule": process.schedule, "num_train_timesteps": process.num_train_steps}
            base |= {"beta_start": process.beta_start, "beta_end": process.beta_end}
            base |= {"prediction_type": inherited.get("prediction_type", "epsilon")}
            if "beta_schedule" not in accepted:
                raise ValueError(
                    f"{self.scheduler} has no beta schedule, so it does not fit a variance-preserving model."
                )
        elif isinstance(process, Flow):
            base = {"num_train_timesteps": process.num_train_steps}
            if "FlowMatch" not in self.scheduler:
                if "use_flow_sigmas" not in accepted:
                    raise ValueError(f"{self.scheduler} has no use_flow_sigmas, so it does not fit a flow model.")
                base |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        elif isinstance(process, EDM):
            if not self.scheduler.startswith("EDM"):
                raise ValueError(f"{self.scheduler} does not fit an EDM model; take EDMEulerScheduler or solver=euler.")
            base = {"sigma_min": process.sigma_min, "sigma_max": process.sigma_max, "prediction_type": "epsilon"}
        wrong = sorted(set(self.config) - accepted)
        if wrong:
            raise unknown(f"field of {self.scheduler}:", wrong[0], sorted(accepted - {"self"}), "Fields")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = self.cls(**(inherited | base | dict(self.config)))
                self._set_grid(scheduler, process, steps)
        except Exception as error:  # whatever a stock class raises on a configuration that it cannot use
            if isinstance(error, ValueError) and str(error).startswith(self.scheduler):
                raise
            raise ValueError(f"{self.scheduler} refuses this configuration: {error!r}") from None
        return scheduler

    def _set_grid(self, scheduler: Any, process: Any, steps: int | tuple[float, ...]) -> None:
        if isinstance(steps, int):
            options = self._handed(scheduler, steps)
            scheduler.set_timesteps(**(options if "sigmas" in options else {"num_inference_steps": steps} | options))
            return
        accepted, nodes = inspect.signature(scheduler.set_timesteps).parameters, steps[:-1]
        if "timesteps" in accepted and not isinstance(process, EDM):
            entries = [process.model_time(t) for t in nodes]
            if isinstance(process, VP):
                entries = [round(n) for n in entries]
            if "FlowMatch" in self.scheduler:
                scheduler.set_timesteps(timesteps=entries, sigmas=[t for t in nodes])
            else:
                scheduler.set_timesteps(timesteps=entries)
        elif "sigmas" in accepted and isinstance(process, Flow):
            scheduler.set_timesteps(sigmas=list(nodes))
        else:  # EDM classes take a ramp in [0, 1] for sigmas
            raise ValueError(f"{self.scheduler} takes no explicit times. Use times=stock, or a Solvus solver.")
        found = self._times(scheduler, process)[:-1]
        if isinstance(process, Flow) and _EVALUATIONS.get(self.scheduler, 1) == 1:
            found += tuple(float(s) for s in scheduler.sigmas[:-1])
            nodes = nodes + nodes
        tolerance = 0.51 / process.num_train_steps if isinstance(process, VP) else 1e-6
        if len(found) != len(nodes) or any(abs(a - b) > tolerance for a, b in zip(found, nodes, strict=True)):
            raise ValueError(
                f"{self.scheduler} does not follow explicit times with this configuration. Use times=stock."
            )

    def grid(self, process: Any, num_steps: int) -> tuple[float, ...]:
        """The start of every step of the scheduler's own grid, then 0."""
        return self._times(self.build(process, num_steps), process)

    def check(self, process: Any, steps: int | tuple[float, ...]) -> None:
        """Refuse, when planning, a class or configuration that cannot run."""
        self.build(process, steps)

    def _times(self, scheduler: Any, process: Any) -> tuple[float, ...]:
        stride = _EVALUATIONS.get(self.scheduler, 1)
        if isinstance(process, EDM):
            entries = [float(s) / process.sigma_max for s in scheduler.sigmas[:-1]]
        elif isinstance(process, Flow):
            entries = [float(n) / process.num_train_steps for n in scheduler.timesteps]
        else:
            entries = [(float(n) + 1) / process.num_train_steps for n in scheduler.timesteps]
        return (*entries[::stride], 0.0)

    def nfe(self, num_steps: int) -> int:
        """The number of entries in the scheduler's list of timesteps."""
        known = self.inherited(lays_grid=False) | self.config
        return _count(self.scheduler, _text({k: v for k, v in known.items() if k not in _GRID}), num_steps)

    def step_nfe(self, num_steps: int, to_data: bool) -> list[int]:
        """Entries of the list that each step takes."""
        entries, stride = self.nfe(num_steps), _EVALUATIONS.get(self.scheduler, 1)
        return [min(stride, entries - first) for first in range(0, entries, stride)]

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """The number of steps that costs exactly ``nfe``.

        Raises:
            ValueError: the scheduler cannot spend that number.
        """
        for steps in range(1, nfe + 1):
            try:
                if self.nfe(steps) == nfe:
                    return {}, steps
            except ValueError:  # too few steps for this class
                continue
        raise ValueError(f"{self.scheduler} cannot spend exactly {nfe} evaluations. Choose another nfe.")

    def start(self, process: Any, times: tuple[float, ...], stock_steps: int | None = None) -> _Running:
        """A fresh scheduler for one batch."""
        return _Running(self.build(process, stock_steps if stock_steps is not None else times), None, 0)

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """One step of the scheduler: one or two of its entries."""
        process = model.process
        running = state.memory.fork()
        scheduler, sample = running.scheduler, running.sample
        if sample is None:
            # The scheduler works in its own coordinates, which for the sigma-space classes are x / alpha.
            sample = state.x * (float(getattr(scheduler, "init_noise_sigma", 1.0)) / process.prior_std(t))
        options = {}
        if _takes_generator(self.cls):
            seeds = noise.integers("scheduler")  # type: ignore[attr-defined]
            options["generator"] = [torch.Generator(sample.device).manual_seed(seed) for seed in seeds]
        x0_hat = state.x0_hat
        stride = _EVALUATIONS.get(self.scheduler, 1)
        for entry in range(running.position, min(running.position + stride, len(scheduler.timesteps))):
            n = scheduler.timesteps[entry]
            time = self._time(scheduler, process, n, entry)
            x = scheduler.scale_model_input(sample, n) if hasattr(scheduler, "scale_model_input") else sample
            if isinstance(process, EDM):
                x = sample
            x0_hat = model.denoise(x, time)
            kind = "flow" if isinstance(process, Flow) else "epsilon"
            if isinstance(process, VP):  # PNDM combines what it is given, and v is no multiple of eps
                kind = scheduler.config.get("prediction_type", "epsilon")
            output = from_x0(kind, x, x0_hat, process.alpha(time), process.sigma(time))
            if isinstance(process, EDM):
                # EDM schedulers apply their preconditioning to a raw output; invert it so that x0_hat comes back.
                output = _edm_raw_output(scheduler, sample, x0_hat, process.sigma(time))
            sample = scheduler.step(output, n, sample, **options, return_dict=False)[0]
        running.sample, running.position = sample, running.position + stride
        return State(sample, x0_hat, running, state.step + 1)

    def _time(self, scheduler: Any, process: Any, n: Tensor, entry: int) -> float:
        if isinstance(process, EDM):
            return float(scheduler.sigmas[entry]) / process.sigma_max
        if isinstance(process, Flow):
            return float(n) / process.num_train_steps
        return (float(n) + 1) / process.num_train_steps


def _edm_raw_output(scheduler: Any, sample: Tensor, x0: Tensor, sigma: float) -> Tensor:
    data = scheduler.config.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / (sigma**2 + data**2) ** 0.5
    return (x0 - skip * sample) / out


@lru_cache(maxsize=256)
def _takes_generator(cls: Any) -> bool:
    return "generator" in inspect.signature(cls.step).parameters


def _text(config: dict[str, Any]) -> str:
    """A configuration as text, to be a cache key."""
    return json.dumps(config, sort_keys=True)


@lru_cache(maxsize=1024)
def _count(scheduler: str, config: str, num_steps: int) -> int:
    solver = DiffusersScheduler(scheduler, json.loads(config))
    process: Any = Flow() if "FlowMatch" in scheduler else EDM() if scheduler.startswith("EDM") else VP()
    return len(solver.build(process, num_steps).timesteps)


@dataclass
class _Running:
    """A scheduler in mid-run with the sample in its own coordinates."""

    scheduler: Any
    sample: Tensor | None
    position: int

    def fork(self) -> _Running:
        """An independent copy: a step must not change the state it started from."""
        config = self.scheduler.config  # never changes, and most of what a copy would cost
        return _Running(copy.deepcopy(self.scheduler, {id(config): config}), self.sample, self.position)

    def reindex(self, index: Tensor) -> _Running:
        """Keep, drop or copy particles in every tensor that the scheduler remembers."""
        forked = self.fork()
        rows = 0 if self.sample is None else len(self.sample)
        for name, value in vars(forked.scheduler).items():
            setattr(forked.scheduler, name, _reindex(value, index, rows))
        forked.sample = None if self.sample is None else self.sample[index]
        return forked


def _reindex(value: Any, index: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows:
        return value[index]
    if isinstance(value, list):
        return [_reindex(v, index, rows) for v in value]
    return value
