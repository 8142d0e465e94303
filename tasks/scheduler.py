"""UnifiedScheduler: any solver schedule as a diffusers scheduler, so that pipelines can run what a study found.

The formulas are those of ``tasks.integrator``; this file only turns the loop around: the pipeline evaluates the
network and ``step`` carries the state from one evaluation to the next. Every entry of ``timesteps`` is one evaluation,
so a step with an implicit corrector has two entries, and one that does not call the network has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tasks import calibration, integrator, registry
from tasks.adapt import shortened
from tasks.integrator import Plan
from tasks.processes import EDM, VP, Flow, GaussianProcess, from_x0, to_x0
from tasks.registry import unknown
from tasks.schedule import SolverSchedule
from tasks.types import State

PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction", "flow_prediction": "flow"}
PROCESSES = ("vp", "flow", "edm")


class UnifiedScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A preset over a grid, or a whole :class:`tasks.schedule.SolverSchedule`, as a diffusers scheduler.

    With a preset, ``set_timesteps(n)`` lays it over the grid anew for any n, and over given ``timesteps`` or, on a
    flow, ``sigmas``. With a ``schedule`` there is one number of steps. States are those of the process itself:
    ``scale_model_input`` changes nothing (but where the first step of a schedule needs no evaluation: then it makes
    that step).

    Args:
        num_train_timesteps: number of training steps T.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: linear, scaled_linear or squaredcos_cap_v2.
        trained_betas: the betas themselves, instead of the three above.
        prediction_type: what the network says: epsilon, sample, v_prediction, or flow_prediction (noise - data).
        process: vp; flow (the network is told t T); edm (it is told sigma, and says the clean state: "sample").
        use_flow_sigmas: the same as process="flow", as stock configurations say it.
        sigma_min: smallest noise level of process="edm".
        sigma_max: largest.
        preset: name in ``tasks.presets.PRESETS``.
        settings: what changes of the preset: fields of ``solver=unified``, such as max_order, kappa, eta, churn.
        grid: name or spec of a grid of times, such as uniform (diffusers calls it trailing), karras, logsnr.
        schedule: a solver schedule as data, instead of preset, settings and grid.
        hooks: specs of hooks that need no access to the network: dual_fast, heavy_ball, compensation with its ratios.
        rescale_betas_zero_snr: not supported; here so that a configuration which sets it is refused.

    Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models";
    diffusers' scheduler protocol.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        process: str = "vp",
        use_flow_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        preset: str = "dpmpp_2m",
        settings: dict[str, Any] | None = None,
        grid: str | dict[str, Any] = "uniform",
        schedule: dict[str, Any] | None = None,
        hooks: list[dict[str, Any]] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise unknown("prediction_type", prediction_type, list(PREDICTIONS), "Allowed")
        if process not in PROCESSES:
            raise unknown("process", process, list(PROCESSES), "Allowed")
        if rescale_betas_zero_snr:
            raise ValueError(
                "rescale_betas_zero_snr is True, which changes the betas in a way not supported here. Set it to False."
            )
        kind = "flow" if use_flow_sigmas else process
        if kind == "flow" and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type epsilon says nothing about the data at the start of a flow, where they have no share. "
                "Allowed there: flow_prediction, v_prediction, sample."
            )
        self._process: GaussianProcess
        if kind == "flow":
            self._process = Flow(num_train_timesteps)
        elif kind == "edm":
            self._process = EDM(
                0.002 if sigma_min is None else float(sigma_min), 80.0 if sigma_max is None else float(sigma_max)
            )
        elif trained_betas is not None:
            betas = tuple(float(b) for b in trained_betas)
            self._process = Trained("trained", betas[0], betas[-1], len(betas), betas)
        else:
            self._process = VP(beta_schedule, beta_start, beta_end, num_train_timesteps)
            self._process.alpha(0.5)  # refuses an unknown schedule
        if isinstance(self._process, VP):  # trainers and some pipelines read these
            steps = torch.arange(1, self._process.num_train_steps + 1, dtype=torch.float64)
            kept = self._process.alpha(steps / self._process.num_train_steps).square()
            self.alphas_cumprod = kept.float()
            self.betas = (1.0 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])).float()
        self._prediction = PREDICTIONS[prediction_type]
        self._fixed = None if schedule is None else SolverSchedule.from_data(schedule)
        self._solver = _solver(preset, settings, self._fixed, hooks)
        self._grid = None if self._fixed is not None else _grid(grid)

        self.init_noise_sigma = self._process.prior_std(1.0)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._plan: Plan | None = None
        self._entries: list[tuple[str, int]] = []  # ("start" or "end" of a step, which step) for every evaluation
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._state: State | None = None
        self._first = 0  # the step of the schedule that is number 0 of the plan
        self._was_led = False
        self._hooks: tuple[Any, ...] = self._solver.hook_objects

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of a configuration; that of a FlowMatch class, which names no process, is one of a flow."""
        if isinstance(config, Mapping) and "shift" in config and "beta_schedule" not in config:
            kwargs = {"process": "flow", "prediction_type": "flow_prediction"} | kwargs
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # --- what pipelines look at --------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """Entries of ``timesteps`` that one step takes, where all but the last take the same number; else 1."""
        if self._fixed is not None:
            inner = {step.corrector for step in self._fixed.steps[:-1]}
            return 2 if inner == {"implicit"} else 1
        s = self._solver.settings
        if s.leading:
            return 1
        return 2 if s.corrector == "implicit" else s.order if s.singlestep else 1

    @property
    def step_index(self) -> int | None:
        """The entry of ``timesteps`` that comes next; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The entry at which a run begins, where a pipeline has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at another entry than the first, as image-to-image pipelines do."""
        self._begin_index = begin_index

    @property
    def solver_schedule(self) -> SolverSchedule:
        """What is done between the times, as data.

        Raises:
            ValueError: ``set_timesteps`` was not called.
        """
        return self._planned().schedule

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample; where the schedule begins with steps that need no evaluation, the state after them."""
        if self._plan is None or not self._has_lead or self._step_index is not None or self._begin_index:
            return sample
        self._was_led = True
        state = self._ahead(self._started(sample.to(_working(sample))), 0, None)
        return state.x.to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x_0 + sigma eps`` at training steps, which may be fractions; (B, *shape)."""
        told = torch.as_tensor(timesteps, dtype=torch.float64).cpu().flatten()
        t = torch.clamp(_time(self._process, told), 0.0, 1.0)
        wide = (-1, *[1] * (original_samples.dim() - 1))
        alpha, sigma = (
            v.to(original_samples.device, original_samples.dtype).view(wide)
            for v in (self._process.alpha(t), self._process.sigma(t))
        )
        return alpha * original_samples + sigma * noise

    # --- the times ---------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay the solver over a grid and forget every run before.

        Args:
            num_inference_steps: number of steps; with a ``schedule`` that of its steps, or None.
            device: where ``timesteps`` are to lie.
            timesteps: where the steps start, in training steps, decreasing; the last step ends at the data.
            sigmas: the same as times of a flow, between 1 and 0.

        Raises:
            ValueError: a number of steps, or times, that this scheduler cannot do.
        """
        times = self._times(num_inference_steps, timesteps, sigmas)
        plan = self._solver.plan(self._process, times)
        for hook in self._solver.hook_objects:
            if hasattr(hook, "check"):
                hook.check(plan)
        entries: list[tuple[str, int]] = []
        for i, step in enumerate(plan.steps):
            entries += [("start", i)] if step.call == "model" else []
            entries += [("end", i)] if integrator.is_corrected(plan, i) else []
        if not entries:
            raise ValueError("this schedule never evaluates the network. Let a step have call=model.")
        first = entries[0][1]
        if plan.starts[first] != plan.times[first] or any(u.std > 0 for u in plan.updates[:first]):
            raise ValueError(
                f"step {first} comes before the first evaluation and draws noise, for which a pipeline has no place. "
                "Begin at t=1, or set its churn and kappa to 0."
            )
        seen = [plan.starts[i] if kind == "start" else plan.times[i + 1] for kind, i in entries]
        told = [self._process.model_time(t) for t in seen]
        whole = isinstance(self._process, VP) and all(abs(n - round(n)) < 1e-9 * len(self) for n in told)
        self.timesteps = torch.tensor(
            [round(n) for n in told] if whole else told, dtype=torch.int64 if whole else torch.float32, device=device
        )
        self.num_inference_steps = len(times) - 1
        self.init_noise_sigma = self._process.prior_std(times[0])
        self._plan, self._entries = plan, entries
        self._forget()

    def _times(self, num_steps: Any, timesteps: Any, sigmas: Any) -> tuple[float, ...]:
        given = [name for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None]
        if self._fixed is not None:
            count = len(self._fixed.steps)
            if given:
                raise ValueError(
                    f"this scheduler follows a schedule with times of its own and takes no {given[0]}. Leave them out, "
                    "or use a preset."
                )
            if num_steps not in (None, count):
                raise ValueError(
                    f"this scheduler follows a schedule of {count} steps, got num_inference_steps={num_steps}. "
                    f"Allowed: {count} or None. For other numbers use a preset or another schedule."
                )
            return self._fixed.times
        if len(given) + (num_steps is not None) != 1:
            raise ValueError(
                "set_timesteps needs exactly one of num_inference_steps, timesteps and sigmas, got "
                f"{', '.join([*(['num_inference_steps'] if num_steps is not None else []), *given]) or 'none'}."
            )
        if num_steps is not None:
            return self._laid(num_steps)
        if sigmas is not None and not isinstance(self._process, Flow):
            raise ValueError("sigmas are times of a flow, but this process is none. Give timesteps instead.")
        raw = sigmas if timesteps is None else timesteps
        values = torch.as_tensor(raw, dtype=torch.float64).cpu().flatten()
        values = _time(self._process, values) if sigmas is None else values
        times = [float(v) for v in values]
        times = times if times and times[-1] == 0 else [*times, 0.0]
        # A training step has a name of its own; float32 steps are only near it.
        if times[0] > 1 and times[0] < 1 + 1e-6:
            times[0] = 1.0
        if len(times) < 2 or not all(a > b for a, b in zip(times, times[1:], strict=False)) or times[0] > 1:
            raise ValueError(f"{given[0]} must decrease from at most pure noise to the data, got {list(raw)}.")
        return tuple(times)

    def _laid(self, num_steps: Any) -> tuple[float, ...]:
        if isinstance(num_steps, bool) or int(num_steps) != num_steps or num_steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {num_steps!r}.")
        spec = self._grid
        assert spec is not None
        if "num_steps" in spec:
            spec = spec | {"num_steps": int(num_steps)}
        grid = registry.times.build(spec)
        if grid.num_steps != num_steps:
            raise ValueError(
                f"grid {spec['name']} has {grid.num_steps} steps, got num_inference_steps={num_steps}. Use another "
                "grid, for example uniform."
            )
        return grid(self._process)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The entry of a timestep; of several the one at which a step starts.

        Raises:
            ValueError: no entry is that timestep.
        """
        entries = (self.timesteps if schedule_timesteps is None else schedule_timesteps).cpu()
        value = float(timestep)
        found = [int(k) for k in (entries.double() == float(torch.tensor(value, dtype=torch.float32))).nonzero()]
        if not found:
            raise ValueError(
                f"timestep {value:g} is none of {entries.tolist()}. Give those of scheduler.timesteps, in their order."
            )
        starts = [k for k in found if schedule_timesteps is not None or self._is_start(k)]
        return (starts or found)[0]

    def _is_start(self, k: int) -> bool:
        return not self._entries or self._entries[k][0] == "start"

    # --- the run -----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From one evaluation of the network to the state of the next.

        Args:
            model_output: the network's answer, (B, *shape).
            timestep: the entry of ``timesteps``; looked up at the first step only, later ones follow in order.
            sample: the state that the network saw.
            generator: for schedules that draw noise.
            return_dict: False returns a tuple.

        Raises:
            ValueError: no grid is set, all entries are done, or the shapes differ.
        """
        plan = self._planned()
        if self._step_index is not None and self._step_index >= len(self._entries):
            raise ValueError(
                f"all {len(self._entries)} entries of timesteps are done. Call set_timesteps before the next loop."
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, but the sample {tuple(sample.shape)}. Keep the "
                "prediction alone where the network says its variance too."
            )
        dtype = _working(sample)
        noise: Any = _Drawn(sample, generator, dtype)
        x, output = sample.to(dtype), model_output.to(dtype)
        if self._step_index is None:
            self._begin(timestep)
            plan = self._planned()
            state = self._started(x)
            if not self._first:
                state = self._ahead(state, 0, noise)
        else:
            assert self._state is not None
            state = replace(self._state, x=x)
        index = self._step_index
        assert index is not None
        kind, i = self._entries[index][0], self._entries[index][1] - self._first
        if kind == "start":
            x0 = to_x0(self._prediction, state.x, output, plan.alpha[i], plan.sigma[i])
            state = integrator.predict(plan, i, state, x0, self._hooks)
        else:
            end = plan.times[i + 1]
            x0 = to_x0(self._prediction, state.x, output, self._process.alpha(end), self._process.sigma(end))
            state = integrator.correct(plan, i, state, x0)
        if kind == "end" or not integrator.is_corrected(plan, i):
            state = integrator.finish(plan, i, state, noise, hooks=self._hooks)
            state = self._ahead(state, i + 1, noise)
        self._step_index = index + 1
        self._state = state if self._step_index < len(self._entries) else None
        moved = state.x.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _planned(self) -> Plan:
        if self._plan is None:
            raise ValueError("no times are set. Call set_timesteps before the loop.")
        return self._plan

    def _forget(self) -> None:
        """Every trace of a run."""
        self._step_index = self._begin_index = self._state = None
        self._first, self._was_led = 0, False
        self._hooks = self._solver.hook_objects

    @property
    def _has_lead(self) -> bool:
        return self._entries[0] != ("start", 0)

    def _started(self, x: Tensor) -> State:
        assert self._plan is not None
        return State(x, None, integrator.start(self._plan, self._hooks), 0)

    def _begin(self, timestep: Any) -> None:
        """Find the first entry. A run that begins later has no history, so its first orders are lower."""
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if not 0 <= index < len(self._entries):
            raise ValueError(f"begin_index must be between 0 and {len(self._entries) - 1}, got {index}.")
        if index == 0 and self._has_lead and not self._was_led:
            raise ValueError(
                "the first step of this schedule is made by scale_model_input, which was not called. Call it on every "
                "input of the network."
            )
        kind, first = self._entries[index]
        if index > 0:
            if kind == "end":
                raise ValueError(
                    f"entry {index} of timesteps is the second evaluation of a step, where no run can begin. Use "
                    f"begin_index={index + 1} or {index - 1}."
                )
            assert self._plan is not None
            self._plan, self._first = Plan(self._process, shortened(self._plan.schedule, first)), first
            self._hooks = tuple(_later(hook, first) for hook in self._hooks)
        self._step_index = index

    def _ahead(self, state: State, i: int, noise: Any) -> State:
        """From the start of step i to where the network must be asked next, or to the end."""
        plan, s_noise = self._plan, self._solver.s_noise
        assert plan is not None
        while i < len(plan.steps):
            if noise is not None:
                state = integrator.churn(plan, i, state, noise, s_noise=s_noise)
            x0 = integrator.unasked(plan, i, state.x, state.memory["entries"])
            if x0 is None:
                return state
            state = integrator.predict(plan, i, state, x0, self._hooks)
            if integrator.is_corrected(plan, i):
                return state
            state = integrator.finish(plan, i, state, noise, hooks=self._hooks)
            i += 1
        return state


@dataclass(frozen=True)
class Trained(VP):
    """A variance-preserving process given by all of its betas.

    Args:
        betas: one a training step.
    """

    betas: tuple[float, ...] = ()

    @cached_property
    def _table(self) -> np.ndarray:
        return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-np.asarray(self.betas, dtype=np.float64)))])


class Network(torch.nn.Module):
    """A Solvus model with the call of a diffusers UNet, for models that are none: ``(x, timestep, labels).sample``.

    Args:
        model: a loaded model of a Gaussian process.
        prediction_type: what it says; "sample" is what such a model knows, without a rounding on the way.
        times: the times that timesteps stand for, where their float32 is too coarse: an exact model tells them apart.
    """

    def __init__(self, model: Any, prediction_type: str = "sample", times: Sequence[float] = ()) -> None:
        super().__init__()
        self.model, self.prediction_type, self.times = model, prediction_type, tuple(times)

    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None) -> Any:
        """Its answer at a training step."""
        process = self.model.process
        t = float(_time(process, torch.as_tensor(timestep, dtype=torch.float64)))
        nearest = min(self.times, key=lambda known: abs(known - t), default=t)
        t = nearest if abs(nearest - t) < 1e-6 else t
        x0 = self.model.denoise(sample, t, class_labels)
        kind = PREDICTIONS[self.prediction_type]
        return SimpleNamespace(sample=from_x0(kind, sample, x0, process.alpha(t), process.sigma(t)))


def process_config(process: GaussianProcess) -> dict[str, Any]:
    """The noise schedule of a process in the words of a scheduler's configuration.

    Raises:
        ValueError: there is none.
    """
    if isinstance(process, Flow):
        return {"process": "flow", "num_train_timesteps": process.num_train_steps}
    if isinstance(process, EDM):
        return {"process": "edm", "sigma_min": process.sigma_min, "sigma_max": process.sigma_max}
    if isinstance(process, VP):
        return {
            "beta_schedule": process.schedule,
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "num_train_timesteps": process.num_train_steps,
        }
    raise ValueError(f"a diffusers scheduler steps VP, flow and EDM processes, not {type(process).__name__}.")


def _solver(preset: str, settings: Any, fixed: SolverSchedule | None, hooks: Any) -> Any:
    """The unified solver that does the work.

    Raises:
        ValueError: unknown settings, or hooks that need the network.
    """
    spec: dict[str, Any] = {"name": "unified", "hooks": list(hooks or ())} | dict(settings or {})
    if fixed is not None and any(step.skip for step in fixed.steps):
        raise ValueError(
            "the schedule leaves out blocks of the network, which a scheduler cannot: it never sees the network. Set "
            "skip to 0 in every step."
        )
    if fixed is not None and any(step.time_shift for step in fixed.steps):
        raise ValueError(
            "the schedule tells the network other times (time_shift), which a scheduler cannot: the pipeline tells it "
            "the grid's. Set time_shift to 0 in every step."
        )
    if fixed is None:
        spec |= {"preset": preset}
    else:
        spec |= {"steps": [step.to_data() for step in fixed.steps]}
    solver = registry.solvers.build(spec)
    for hook in solver.hook_objects:
        refuse_hook(hook)
    return solver


def refuse_hook(hook: Any) -> None:
    """Refuse a hook that no scheduler can carry.

    Raises:
        ValueError: it changes what the network is told, or has to look at the model first.
    """
    if any(hasattr(hook, name) for name in ("adapt_time", "transform_output", "answer")):
        raise ValueError(
            f"hook {hook.name} changes what the network is told, which a diffusers scheduler cannot do. Leave it out; "
            "allowed: dual_fast, heavy_ball, compensation with its ratios."
        )
    if calibration.needs_calibration(hook):
        raise ValueError(f"hook {hook.name} has to look at the model first. Give what it found, for example ratios.")


def _grid(grid: Any) -> dict[str, Any]:
    """The completed spec of a grid that needs no look at the model.

    Raises:
        ValueError: another grid.
    """
    spec = registry.times.complete(dict(grid) if isinstance(grid, Mapping) else grid)
    plugin = registry.times.build(spec)
    if calibration.needs_calibration(plugin) or getattr(plugin, "travels", False) or spec["name"] == "stock":
        raise ValueError(
            f"grid {spec['name']} cannot be laid by a scheduler. Use one such as uniform, karras or logsnr, or give a "
            "schedule."
        )
    return spec


def _time(process: GaussianProcess, told: Tensor) -> Tensor:
    """The times of training steps: the inverse of ``model_time``."""
    if isinstance(process, VP):
        return (told + 1.0) / process.num_train_steps
    return told / (process.num_train_steps if isinstance(process, Flow) else process.sigma_max)


def _working(sample: Tensor) -> torch.dtype:
    """Half precision is too coarse for differences of predictions; states are returned in their own dtype."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _later(hook: Any, first: int) -> Any:
    """A hook whose steps are numbered from a later one."""
    ratios = getattr(hook, "ratios", None)
    return hook if ratios is None else replace(hook, ratios=ratios[first:])


class _Drawn:
    """Fresh noise from a pipeline's generator."""

    def __init__(self, sample: Tensor, generator: Any, dtype: torch.dtype) -> None:
        self._sample, self._generator, self._dtype = sample, generator, dtype

    def normal(self, shape: tuple[int, ...], purpose: str) -> Tensor:
        """Standard normal draws, (B, *shape)."""
        return randn_tensor(
            (len(self._sample), *shape), generator=self._generator, device=self._sample.device, dtype=self._dtype
        )
