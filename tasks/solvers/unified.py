"""Any solver schedule: a preset with changes, or free choices at every step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from tasks import integrator, presets
from tasks.integrator import Plan
from tasks.presets import Settings
from tasks.registry import hooks as hook_registry
from tasks.registry import solvers
from tasks.schedule import SolverSchedule, Step, evaluations, parse_steps
from tasks.types import Conditioned, Noise, State


@solvers.register("unified")
@dataclass(frozen=True)
class Unified:
    """One exponential-integrator step with free choices at every step; most fast solvers are presets of it.

    ``x_s = A x_b + sum_d c_d D_d + std z``: the base, the prediction that is expanded (data, noise, velocity), the
    variable, the order, the points behind every derivative, their scales, the corrector and the stochasticity may all
    differ from step to step. Give a ``preset`` (fields left at null keep its values), or ``steps``: one record a step,
    as in ``tasks/schedule.py`` and in the JSON that ``solvus show schedule`` reads.

    Args:
        preset: ddim, dpm_solver_1/2/3/2m/3m, dpmpp_2m/3m/2s/3s/2m_sde, dpmpp_3m_published, deis, deis_rho, deis_log,
            unipc, unipc_bh1, pndm, f_pndm, heun, velocity_2m. Ignored when ``steps`` are given.
        steps: records of the steps, one for every step of the grid.
        max_order: the preset's order p.
        prediction: x0, eps, v, or ode (v on a flow, eps elsewhere).
        variable: lam, rho, t, u or index.
        relax: none, bh1 or bh2.
        corrector: none, pseudo or implicit.
        singlestep: blocks of p evaluations instead of history.
        interleaved: blocks of p nodes of the grid itself.
        lower_order_final: end on lower orders.
        kappa: 0 is the ODE, 1 the reverse SDE.
        eta: DDIM's eta, instead of kappa.
        churn: EDM's S_churn; with churn_min and churn_max in units of sigma / alpha, and s_noise on the fresh noise.
        churn_min: S_min.
        churn_max: S_max; null is no limit.
        s_noise: S_noise.
        window: [first, last + 1] of the steps that are stochastic; the others follow the ODE (MixGRPO).
        first: model, or noise for the analytical first step, which costs nothing.
        implicit_start: number of first steps with an implicit corrector.
        half_second: halve the second-difference term of order 3, as the published 3M does.
        leading: number of first steps that cost one evaluation where the others cost more.
        hooks: specs of hooks that change what the network is told or answered (``solvus list hook``).

    Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models".
    Cost and order: one evaluation a step, two with an implicit corrector; of the preset's order.
    Identities: with order 1 this is DDIM; with dpmpp_2m it is ``dpmpp_2m``; with heun it is ``heun``.
    """

    preset: str = "dpmpp_2m"
    steps: tuple[dict[str, Any], ...] | None = None
    max_order: int | None = None
    prediction: str | None = None
    variable: str | None = None
    relax: str | None = None
    corrector: str | None = None
    singlestep: bool | None = None
    interleaved: bool | None = None
    lower_order_final: bool | None = None
    kappa: float | None = None
    eta: float | None = None
    churn: float | None = None
    churn_min: float | None = None
    churn_max: float | None = None
    s_noise: float = 1.0
    window: tuple[int, ...] | None = None
    first: str | None = None
    implicit_start: int | None = None
    half_second: bool | None = None
    leading: int | None = None
    hooks: tuple[dict[str, Any], ...] = ()

    process = "gaussian"

    def __post_init__(self) -> None:
        _ = self.settings, self.records, self.hook_objects
        if self.s_noise < 0:
            raise ValueError(f"solver.s_noise must not be negative, got {self.s_noise}.")
        if self.steps is not None:
            changed = [name for name in _SETTINGS if getattr(self, name) is not None]
            if changed:
                raise ValueError(
                    f"solver.steps says everything, so solver.{changed[0]} must be null. Change the steps."
                )

    @cached_property
    def settings(self) -> Settings:
        """The preset with its changes."""
        changes = {name: getattr(self, name) for name in _SETTINGS} | {"order": self.max_order}
        return presets.settings(self.preset, changes)

    @cached_property
    def records(self) -> tuple[Step, ...] | None:
        """The steps, if they were given one by one."""
        return None if self.steps is None else parse_steps(self.steps)

    @cached_property
    def hook_objects(self) -> tuple[Any, ...]:
        """The hooks."""
        return tuple(hook_registry.build(spec) for spec in self.hooks)

    @property
    def order(self) -> int:
        """Order of accuracy; 0, meaning not declared, where steps are free or hooks change them."""
        return 0 if self.records is not None or self.hooks else presets.declared_order(self.settings)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        if self.records is not None:
            return any(step.kappa > 0 or step.churn > 0 for step in self.records)
        return self.settings.kappa > 0 or self.settings.eta > 0 or self.settings.churn > 0

    def nfe(self, num_steps: int) -> int:
        """Evaluations of a run that ends at t=0."""
        if self.records is None:
            return presets.nfe(self.settings, num_steps)
        last = self.records[-1]
        return sum(map(evaluations, self.records)) - (last.corrector == "implicit")

    def nfe_before_data(self, num_steps: int) -> int:
        """Evaluations of a run that stops before t=0, where the last step may be of full order too."""
        if self.records is None:
            return presets.nfe(self.settings, num_steps, to_data=False)
        return sum(map(evaluations, self.records))

    def step_nfe(self, num_steps: int, to_data: bool) -> list[int]:
        """Evaluations of each step of the grid."""
        if self.records is not None:
            spent = list(map(evaluations, self.records))
            spent[-1] -= to_data and self.records[-1].corrector == "implicit"
            return spent
        ends = [
            k if k == 0 else presets.nfe(self.settings, k, to_data and k == num_steps) for k in range(num_steps + 1)
        ]
        return [b - a for a, b in zip(ends, ends[1:], strict=False)]

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """The steps that spend ``nfe``."""
        if self.records is not None:
            spent = self.nfe(len(self.records))
            if spent != nfe:
                raise ValueError(
                    f"solver.steps spend {spent} evaluations, not {nfe}. Change the steps or leave nfe out."
                )
            return {}, len(self.records)
        return presets.fit(self.settings, nfe)

    def plan(self, process: Any, times: tuple[float, ...]) -> Plan:
        """The schedule over a grid, with all its numbers.

        Raises:
            ValueError: the schedule cannot run on this grid or process.
        """
        return _plan(self.settings, self.records, self.preset, process, times)

    def schedule(self, process: Any, times: tuple[float, ...]) -> SolverSchedule:
        """What will be done over a grid, as data."""
        return self.plan(process, times).schedule

    def check(self, process: Any, times: tuple[float, ...]) -> None:
        """Refuse, when planning, a schedule that cannot run."""
        plan = self.plan(process, times)
        for hook in self.hook_objects:
            if hasattr(hook, "check"):
                hook.check(plan)

    def prefix(self, process: Any, times: tuple[float, ...]) -> list[Any]:
        """What each step of the grid adds to what determines the state at its end; empty where hooks change it."""
        if self.hooks:
            return []
        plan, found = self.plan(process, times), []
        for group in plan.groups:
            steps = [plan.steps[i].to_data() for i in group]
            nodes = [plan.times[i] for i in group] + [plan.times[group.stop]]
            found.append([nodes, steps, self.s_noise])
        return found

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """The memory before the first step."""
        return integrator.start(self.plan(process, times), self.hook_objects)

    def spent(self, state: State) -> Tensor | None:
        """Evaluations of every row, (B,) int64, where a hook lets them differ; else None."""
        pairs = zip(self.hook_objects, state.memory["hooks"], strict=True)
        return next((hook.spent(memory) for hook, memory in pairs if hasattr(hook, "spent")), None)

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        return integrator.run_group(model, state, noise, self.hook_objects, self.s_noise)


_SETTINGS = tuple(f.name for f in fields(Settings) if f.name != "order")


@lru_cache(maxsize=256)
def _plan(
    settings: Settings, records: tuple[Step, ...] | None, preset: str, process: Any, times: tuple[float, ...]
) -> Plan:
    if records is None:
        return Plan(process, *presets.build(settings, process, times, preset))
    if len(records) != len(times) - 1:
        raise ValueError(
            f"solver.steps has {len(records)} steps but the grid has {len(times) - 1}. Give as many, or the times that "
            "belong to them: times=explicit."
        )
    return Plan(process, SolverSchedule(times, records))
