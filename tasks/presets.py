"""Named solvers as settings of one builder of schedules.

A preset is a handful of uniform settings; ``build`` lays them over a grid: orders that start up and end low, the extra
nodes of singlestep blocks, and first-order steps where a log-SNR is infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tasks.coefficients import highest_order, is_usable
from tasks.registry import unknown
from tasks.schedule import MAX_ORDER, SolverSchedule, Step


@dataclass(frozen=True)
class Settings:
    """What a preset sets for a whole run.

    Attributes:
        order: order p, reached as soon as there is history.
        prediction, variable, relax, corrector: as in :class:`tasks.schedule.Step`; prediction ``ode`` is the velocity
            on a flow (in its time) and the noise elsewhere.
        singlestep: every step of the grid becomes a block of ``order`` evaluations with nodes of its own between,
            equally spaced in log-SNR; no history is used beyond the block.
        interleaved: the nodes of the grid themselves are the nodes of singlestep blocks, as stock diffusers lays them.
        lower_order_final: the last steps have at most the order of what is left.
        half_second: halves the second-difference term of order 3, as the published 3M code does.
        kappa: how stochastic every step is.
        eta: the same as DDIM's eta, translated into kappa; excludes kappa. A first step from alpha = 0 has no kappa
            that means
            an eta between 0 and 1: it is deterministic there.
        churn: EDM's S_churn: sigma is raised by min(churn / N, sqrt(2) - 1) where it lies between churn_min and
            churn_max.
        window: first and last + 1 of the steps that are stochastic, the rest being deterministic; null means all.
        first: "model", or "noise" for the analytical first step.
        implicit_start: number of first steps with an implicit corrector, in place of a low-order start.
        leading: number of first steps that cost one evaluation where the others cost more, so that any number can be
            spent.
    """

    order: int = 1
    prediction: str = "x0"
    variable: str = "lam"
    relax: str = "none"
    corrector: str = "none"
    singlestep: bool = False
    interleaved: bool = False
    lower_order_final: bool = False
    half_second: bool = False
    kappa: float = 0.0
    eta: float = 0.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    window: tuple[int, int] | None = None
    first: str = "model"
    implicit_start: int = 0
    leading: int = 0


PRESETS: dict[str, Settings] = {
    # Song et al. 2021; every first-order form is the same update.
    "ddim": Settings(),
    # Lu et al. 2022, DPM-Solver: noise prediction, singlestep (algorithms 1, 4, 5) and multistep.
    "dpm_solver_1": Settings(prediction="eps"),
    "dpm_solver_2": Settings(order=2, prediction="eps", singlestep=True, relax="bh2"),
    "dpm_solver_3": Settings(order=3, prediction="eps", singlestep=True),
    "dpm_solver_2m": Settings(order=2, prediction="eps", relax="bh2"),
    "dpm_solver_3m": Settings(order=3, prediction="eps"),
    # Lu et al. 2022, DPM-Solver++: data prediction. The published 3M halves its second difference, which makes it
    # second order; the name without suffix has the full one.
    "dpmpp_2m": Settings(order=2, relax="bh2"),
    "dpmpp_3m": Settings(order=3),
    "dpmpp_3m_published": Settings(order=3, relax="bh2", half_second=True),
    "dpmpp_2s": Settings(order=2, singlestep=True, relax="bh2"),
    "dpmpp_3s": Settings(order=3, singlestep=True),
    "dpmpp_2m_sde": Settings(order=2, relax="bh2", kappa=1.0),
    # Zhang and Chen 2023, DEIS: noise prediction, polynomials in t (tAB), sigma / alpha (rhoAB) or log-SNR (what stock
    # diffusers calls DEIS).
    "deis": Settings(order=3, prediction="ode", variable="t"),
    "deis_rho": Settings(order=3, prediction="eps", variable="rho"),
    "deis_log": Settings(order=3, prediction="eps", variable="lam"),
    # Zhao et al. 2023, UniPC: multistep data prediction with the free corrector.
    "unipc": Settings(order=3, relax="bh2", corrector="pseudo", lower_order_final=True),
    "unipc_bh1": Settings(order=3, relax="bh1", corrector="pseudo", lower_order_final=True),
    # Liu et al. 2022, PNDM: constant fourth-order weights on the noise, started low (F-PNDM without Runge-Kutta) or by
    # one implicit step (what stock diffusers calls PLMS).
    "f_pndm": Settings(order=4, prediction="ode", variable="index"),
    "pndm": Settings(order=4, prediction="ode", variable="index", implicit_start=1),
    # Karras et al. 2022, EDM: Euler in sigma / alpha, corrected by the trapezoid.
    "heun": Settings(order=1, prediction="ode", variable="rho", corrector="implicit"),
    # Adams-Bashforth on the velocity of a flow, or along the angle of a VP process.
    "velocity_2m": Settings(order=2, prediction="v", variable="u"),
}


def settings(preset: str, changes: dict[str, Any]) -> Settings:
    """A preset with some settings replaced; None means the preset's own.

    Raises:
        ValueError: an unknown preset, or settings that exclude each other.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, sorted(PRESETS), "Allowed")
    found = replace(PRESETS[preset], **{k: v for k, v in changes.items() if v is not None})
    if found.kappa < 0 or found.leading < 0 or found.implicit_start < 0:
        raise ValueError(
            "solver.kappa, leading and implicit_start must not be negative, got "
            f"{found.kappa}, {found.leading} and {found.implicit_start}."
        )
    highest = 3 if found.singlestep or found.interleaved else MAX_ORDER
    if not 1 <= found.order <= highest:
        raise ValueError(f"solver.max_order must be between 1 and {highest} here, got {found.order}.")
    if found.singlestep and (found.corrector != "none" or found.implicit_start):
        raise ValueError("singlestep blocks take no corrector and no implicit start. Set corrector=none.")
    if found.eta and found.kappa:
        raise ValueError(f"solver.eta and solver.kappa say the same thing, got {found.eta} and {found.kappa}. Set one.")
    if not 0 <= found.eta <= 1:
        raise ValueError(f"solver.eta must be between 0 and 1, got {found.eta}.")
    if (found.eta or found.kappa) and found.corrector != "none":
        raise ValueError("a corrector needs an ODE: set solver.corrector=none with kappa or eta above 0.")
    if found.singlestep and found.interleaved:
        raise ValueError("solver.singlestep and solver.interleaved exclude each other. Set one.")
    if found.window is not None and (len(found.window) != 2 or not 0 <= found.window[0] <= found.window[1]):
        raise ValueError(f"solver.window must be [first, last + 1] with first <= last + 1, got {list(found.window)}.")
    if found.churn < 0:
        raise ValueError(f"solver.churn must not be negative, got {found.churn}.")
    uniform_step(found)  # refuses unknown words
    return found


def uniform_step(s: Settings, process: Any = None) -> Step:
    """The step that the settings describe, before history and ends are looked at."""
    prediction, variable = s.prediction, s.variable
    if prediction == "ode":
        linear = process is not None and process.kind_of_path == "linear"
        prediction = "v" if linear else "eps"
        variable = "u" if linear and variable != "index" else variable
    return Step(1, prediction, variable, 1, None, (), s.relax, s.corrector, max(s.kappa, s.eta), s.churn, s.first)


def declared_order(s: Settings) -> int:
    """The order of accuracy of the deterministic run, from its uniform settings; 0 where there is none to declare.

    Multistep runs of order 3 and more begin with lower orders. At high noise, where the prediction hardly changes, that
    costs nothing; a run that begins elsewhere is of second order unless ``implicit_start`` begins it better.
    """
    if s.interleaved and s.order > 2:
        return 0  # its blocks depend on where the grid's nodes happen to lie
    if s.half_second or s.variable == "index":
        return min(s.order, 2)  # constant weights are exact on an equally spaced grid only
    full = s.order + (s.corrector != "none")
    # With lower orders at the end the last step alone is of first order, with a local error of second order.
    return min(full, 2) if s.lower_order_final else full


def nfe(s: Settings, num_steps: int, to_data: bool = True) -> int:
    """Evaluations of a run over ``num_steps`` steps of the grid; ``to_data`` says that it ends at t=0."""
    full = num_steps - to_data  # steps that do not end at the data, where every form is of first order
    leading = min(s.leading, full)
    blocks = (s.order if s.singlestep else 1) * (full - leading) + leading + to_data
    stochastic = s.kappa > 0 or s.eta > 0
    implicit = full - leading if s.corrector == "implicit" else 0 if stochastic else min(s.implicit_start, full)
    return blocks + implicit - (s.first == "noise")


def fit(s: Settings, evaluations: int) -> tuple[dict[str, Any], int]:
    """Settings and the number of steps that cost exactly ``evaluations``, with as few simplified steps as possible.

    Raises:
        ValueError: no number of steps costs that many.
    """
    cost = max(s.order if s.singlestep else 1, 2 if s.corrector == "implicit" else 1)
    for leading in range(cost):
        for steps in range(leading + 1, evaluations + 2):
            if nfe(replace(s, leading=leading), steps) == evaluations:
                return ({"leading": leading} if cost > 1 else {}), steps
    raise ValueError(f"this solver cannot spend exactly {evaluations} evaluations. Choose another nfe.")


def build(s: Settings, process: Any, grid: tuple[float, ...], note: str = "") -> tuple[SolverSchedule, tuple[int, ...]]:
    """The schedule over a grid, and how many of its steps each step of the grid became."""
    num_steps = len(grid) - 1
    times: list[float] = [grid[0]]
    steps: list[Step] = []
    sizes: list[int] = []
    for i in range(num_steps):
        t, end = grid[i], grid[i + 1]
        base = uniform_step(s, process)
        base = replace(base, call="model" if i else s.first, churn=_churn(s, process, i, t, num_steps))
        base = replace(base, kappa=_kappa(s, process, i, t, end))
        if i < s.leading:
            base = replace(base, corrector="none" if base.corrector == "implicit" else base.corrector)
        if base.kappa:
            base = replace(base, corrector="none")
        elif s.corrector == "none" and i < s.implicit_start:
            base = replace(base, corrector="implicit")
        ends_at_data = process.sigma(end) == 0
        if ends_at_data or (i == num_steps - 1 and base.corrector == "pseudo"):
            base = replace(base, corrector="none")
        # No step that starts at alpha = 0 can be corrected in a form that is infinite there.
        if base.corrector == "implicit" and highest_order(process, base, t, end) == 1:
            raise ValueError(
                f"an implicit corrector in prediction {base.prediction} and variable {base.variable} cannot start at "
                "alpha = 0. Use prediction=ode variable=rho on flows."
            )
        if base.corrector == "pseudo" and (
            highest_order(process, base, t, end) == 1 or _churn(s, process, i + 1, end, num_steps) > 0
        ):
            base = replace(base, corrector="none")
        if s.singlestep and i < s.leading:
            made = [(replace(base, order=1), end)]
        elif s.singlestep:
            made = _singlestep(s, base, process, t, end)
        else:
            made = [(_multistep(s, base, process, times, steps, i, num_steps, end), end)]
        for step, target in made:
            steps.append(step)
            times.append(target)
        sizes.append(len(made))
    return SolverSchedule(tuple(times), tuple(steps), note), tuple(sizes)


def _churn(s: Settings, process: Any, i: int, t: float, num_steps: int) -> float:
    level = process.sigma(t) / process.alpha(t) if process.alpha(t) > 0 else math.inf
    if s.window is not None and not s.window[0] <= i < s.window[1]:
        return 0.0
    if not s.churn or not s.churn_min <= level <= s.churn_max or math.isinf(level):
        return 0.0
    return min(s.churn / num_steps, math.sqrt(2.0) - 1.0)


def _kappa(s: Settings, process: Any, i: int, t: float, end: float) -> float:
    if s.window is not None and not s.window[0] <= i < s.window[1]:
        return 0.0
    if s.kappa or not s.eta:
        return s.kappa
    h = process.lam(end) - process.lam(t)
    if s.eta == 1.0 or not math.isfinite(h):
        return 1.0 if s.eta == 1.0 else 0.0
    return math.sqrt(-math.log1p(-(s.eta**2) * -math.expm1(-2 * h)) / (2 * h))


def _scaled(s: Settings, step: Step) -> Step:
    return replace(step, scale=(1.0, 0.5)) if s.half_second and step.order == 3 else step


def _multistep(
    s: Settings, base: Step, process: Any, times: list[float], steps: list[Step], i: int, num_steps: int, end: float
) -> Step:
    order = s.order
    if s.interleaved:
        return _node_of_block(s, base, process, times, i, num_steps, end)
    if s.lower_order_final:
        order = min(order, num_steps - i)
    order = min(order, highest_order(process, replace(base, order=order), times[i], end))
    # Evaluations whose place in the chosen variable is finite, from the latest backwards.
    usable = 0
    # Fresh noise makes differences of earlier predictions meaningless.
    while (
        not base.churn
        and usable < i
        and not steps[i - usable - 1].churn
        and is_usable(process, base.variable, times[i - 1 - usable])
    ):
        usable += 1
    step = replace(base, order=min(order, usable + 1))
    return replace(step, scale=(1.0, 0.5)) if s.half_second and step.order == 3 else step


def _node_of_block(
    s: Settings, base: Step, process: Any, times: list[float], i: int, num_steps: int, end: float
) -> Step:
    """Node i of singlestep blocks that use the nodes of the grid itself."""
    order = _orders(s.order, num_steps)[i]
    step = replace(base, order=min(order, 2), start=order)
    if order == 1 or highest_order(process, step, times[i - order + 1], end) == 1:
        return replace(base, order=1)
    # Order 3 takes its derivative from its latest evaluation alone, with the exact weight.
    return replace(step, points=((2,),), relax="none") if order == 3 else step


def _orders(order: int, num_steps: int) -> list[int]:
    """The orders of the nodes when blocks follow each other; the last step is of first order, as stock has it."""
    if order == 3 and num_steps % 3 == 0:
        return [1, 2, 3] * (num_steps // 3 - 1) + [1, 2, 1]
    orders = [1 + i % order for i in range(num_steps)]
    return [*orders[:-1], 1] if order == 2 and num_steps % 2 == 0 else orders


def _singlestep(s: Settings, base: Step, process: Any, t: float, end: float) -> list[tuple[Step, float]]:
    """A block of ``order`` evaluations between t and end, with nodes equally spaced in log-SNR.

    The last of the block restarts from its beginning. Order 3 estimates its derivative from the latest node alone, at
    two thirds of the way, which is what makes two points enough (Lu et al. 2022, algorithm 2).
    """
    if s.order == 1 or process.sigma(end) == 0:
        return [(replace(base, order=1), end)]
    is_start = process.alpha(t) == 0  # where log-SNR is infinite: nodes from a little later, first-order steps
    last = process.lam(end)
    first = min(process.lam(1.0 - process.t_min), last - 1.0) if is_start else process.lam(t)
    nodes = [process.time(first + (last - first) * j / s.order) for j in range(1, s.order)] + [end]
    made = []
    for j, node in enumerate(nodes, 1):
        inner = replace(
            base, corrector="none", churn=base.churn if j == 1 else 0.0, call=base.call if j == 1 else "model"
        )
        if j == 1 or is_start:
            made.append((replace(inner, order=1, kappa=base.kappa if is_start and j == len(nodes) else 0.0), node))
        else:
            final = replace(inner, order=2, start=j, points=((j - 1,),), kappa=base.kappa if j == len(nodes) else 0.0)
            made.append((final, node))
    return made
