"""Sequential Monte Carlo and reverse kernels against exact laws."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import GAUSS, GM1D, Denoiser, ExactKernel, log_mean, uniform, weighted_moments

from tasks import kernels, smc
from tasks.noise import RowNoise
from tasks.processes import EDM, VP, Flow
from tasks.registry import models, solvers
from tasks.sampler import Sampler
from tasks.smc import Resampling
from tasks.types import State

MEAN, VARIANCE, LOG_Z = GM1D.tilted()


def streams(rows, seed=0):
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def model(law=GM1D):
    return Denoiser(law, Flow())


def test_the_oracle_is_the_plug_in():
    plugin = models.build(GM1D.spec()).load("cpu")
    x = streams(50).normal((1,), "x") * 2
    for t in (1.0, 0.6, 0.1):
        assert torch.allclose(plugin.denoise(x, t), model().denoise(x, t), rtol=1e-12, atol=1e-12)
    assert GM1D.moments() == pytest.approx((-0.35, 3.4265))
    assert GM1D.tilted() == pytest.approx((1.2497, 0.6311, -1.5910), abs=1e-4)
    assert GAUSS.tilted() == pytest.approx((2.0714, 0.1905, -2.2604), abs=1e-4)


def steer(rows, count, steps, how, potential, seed=0):
    """SMC with a twist at every node, on the exact kernel."""
    noise = streams(rows, seed)
    wide = noise.repeat(count)
    sampler = Sampler(model(), ExactKernel(GM1D), uniform(steps))
    particles = smc.begin(sampler, count, wide)
    value = potential(sampler.model.process, particles.state.x, 1.0)
    particles = particles.put(value=value).weigh(value).resample(how, noise.at(-1))
    for i in range(steps):
        particles = replace(particles, state=sampler.step(particles.state, wide))
        value = potential(sampler.model.process, particles.state.x, sampler.times[i + 1])
        particles = particles.weigh(value - particles.cache["value"]).put(value=value)
        if i < steps - 1:
            particles = particles.resample(how, noise.at(i))
    return particles


# --- the exact twist -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["always", "ess"])
@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_the_optimal_twist_reaches_the_tilted_law(scheme, trigger):
    rows, count = 1000, 64
    end = steer(rows, count, 5, Resampling(scheme, trigger), GM1D.value)
    mean, variance = weighted_moments(end.state.x[:, 0].view(rows, count), end.grouped)
    log_z, error = log_mean(end.total_log_z())
    assert abs(mean.mean() - MEAN) < 0.012 and mean.std() / math.sqrt(rows) < 0.005
    assert abs(variance.mean() - VARIANCE) < 0.03
    assert abs(log_z - LOG_Z) < 0.02 and error < 0.006


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("how", [Resampling(), Resampling("multinomial", "ess"), Resampling(trigger="never")], ids=str)
def test_the_normaliser_is_unbiased_with_four_particles(steps, how):
    rows = 8000 if steps == 5 else 3000
    log_z, error = log_mean(steer(rows, 4, steps, how, GM1D.value).total_log_z())
    assert error < 0.014
    assert abs(log_z - LOG_Z) < 5 * error


def test_the_normaliser_is_unbiased_for_a_wrong_twist_too():
    def wrong(process, x, t):
        return GM1D.value(process, x, 0.0 if t == 0 else t) * (1.0 if t == 0 else 0.5)

    log_z, error = log_mean(steer(20000, 4, 5, Resampling(trigger="ess"), wrong).total_log_z())
    assert abs(log_z - LOG_Z) < 5 * error and error < 0.02


def test_a_group_that_is_not_due_carries_its_weights():
    particles = smc.begin(Sampler(model(), ExactKernel(GM1D), uniform(2)), 4, streams(2).repeat(4))
    even, skewed = torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 9.0])
    weighed = particles.weigh(torch.cat([even + 0.3, skewed]))
    after = weighed.resample(Resampling(trigger="ess"), streams(2))
    assert torch.equal(after.grouped[0], weighed.grouped[0])
    assert torch.equal(after.grouped[1], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(after.total_log_z(), weighed.total_log_z())
    assert torch.equal(after.state.x[:4], weighed.state.x[:4])
    assert (after.lineage[4:] == 3).all()


def test_everything_that_belongs_to_a_particle_moves_with_it():
    particles = smc.begin(Sampler(model(), ExactKernel(GM1D), uniform(2)), 3, streams(2).repeat(3))
    marks = torch.arange(6.0)
    memory = {"history": (marks, [marks + 1]), "step": 2}
    state = State(marks[:, None], marks[:, None] * 2, memory, 1)
    particles = replace(particles, state=state).put(gradient=marks, spent={"total": marks}).weigh(marks)
    moved = particles.reindex(torch.tensor([2, 2, 0, 5, 4, 3]))
    wanted = torch.tensor([2.0, 2, 0, 5, 4, 3])
    for tensor in (
        moved.state.x[:, 0],
        moved.state.x0_hat[:, 0] / 2,
        moved.state.memory["history"][0],
        moved.state.memory["history"][1][0] - 1,
        moved.cache["gradient"],
        moved.cache["spent"]["total"],
        moved.log_w,
    ):
        assert torch.equal(tensor.double(), wanted.double())
    assert torch.equal(moved.ancestor, torch.tensor([2, 2, 0, 2, 1, 0]))
    assert moved.state.memory["step"] == 2 and torch.equal(moved.log_z, particles.log_z)


def test_groups_do_not_look_at_one_another():
    many = steer(6, 8, 5, Resampling(trigger="ess"), GM1D.value)
    first = steer(3, 8, 5, Resampling(trigger="ess"), GM1D.value)
    assert torch.equal(many.state.x[:24], first.state.x)
    assert torch.equal(many.total_log_z()[:3], first.total_log_z())


def test_weights_that_are_no_numbers_are_refused_with_their_row():
    particles = smc.begin(Sampler(model(), ExactKernel(GM1D), uniform(2)), 2, streams(2).repeat(2))
    with pytest.raises(ValueError, match="the weights of row 1 of a batch are"):
        particles.weigh(torch.tensor([0.0, 0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="the weights of row 0 of a batch are"):
        particles.weigh(torch.tensor([-math.inf, -math.inf, 0.0, 1.0]))
    assert particles.weigh(torch.tensor([-math.inf, 0.0, 0.0, 1.0])).total_log_z().isfinite().all()


# --- resampling schemes ----------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.31, 0.02, 0.17, 0.08, 0.22, 0.05, 0.15], dtype=torch.float64)
SPREAD = {"systematic": 1.50, "ssp": 1.50, "stratified": 2.24, "residual": 3.38}


def counts(scheme, rows=40000, weights=WEIGHTS):
    chosen = smc.ancestors(scheme, weights.expand(rows, -1), streams(rows))
    assert chosen.min() >= 0 and chosen.max() < len(weights)
    return torch.nn.functional.one_hot(chosen, len(weights)).sum(1).double()


@pytest.mark.parametrize("scheme", smc.SCHEMES)
def test_every_scheme_expects_k_w_copies(scheme):
    found = counts(scheme, 160000 if scheme in ("systematic", "ssp") else 40000)
    assert torch.equal(found.sum(1), torch.full((len(found),), 7.0, dtype=torch.float64))
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - 7 * WEIGHTS).abs() < 5 * error + 1e-9).all()
    assert scheme not in ("systematic", "ssp") or ((found.mean(0) - 7 * WEIGHTS).abs() < 0.005).all()


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_counts_stay_within_one_of_k_w(scheme):
    assert ((counts(scheme) - 7 * WEIGHTS).abs() < 1).all()
    even = counts(scheme, 100, torch.full((8,), 0.125, dtype=torch.float64))
    assert (even == 1).all()


def test_multinomial_counts_have_the_multinomial_variance_and_the_others_less():
    variance = {scheme: float(counts(scheme).var(0).sum()) for scheme in smc.SCHEMES}
    exact = float((7 * WEIGHTS * (1 - WEIGHTS)).sum())
    assert abs(variance["multinomial"] - exact) < 0.05 * exact
    for scheme in ("systematic", "ssp", "stratified", "residual"):
        assert variance[scheme] < 0.8 * exact
    fractions = 7 * WEIGHTS - torch.floor(7 * WEIGHTS)
    bernoulli = float((fractions * (1 - fractions)).sum())  # the least that unbiased counts can have
    assert abs(variance["systematic"] - bernoulli) < 0.02 and abs(variance["ssp"] - bernoulli) < 0.02
    left = fractions.sum()
    assert abs(variance["residual"] - float((fractions * (1 - fractions / left)).sum())) < 0.05


@pytest.mark.parametrize("scheme", smc.SCHEMES)
def test_a_particle_without_weight_is_never_kept(scheme):
    weights = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    found = counts(scheme, 2000, weights)
    assert (found[:, [0, 2, 4]] == 0).all()
    alone = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert (counts(scheme, 50, alone)[:, 2] == 3).all()


def test_resampling_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown resampling scheme 'systemic', did you mean 'systematic'"):
        Resampling(scheme="systemic")
    with pytest.raises(ValueError, match="unknown trigger 'sometimes'"):
        Resampling(trigger="sometimes")
    with pytest.raises(ValueError, match="share of the particles in \\(0, 1\\], got 1.5"):
        Resampling(threshold=1.5)


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_log_densities_are_those_of_a_normal_summed_over_dimensions():
    mean, x = streams(5).normal((2, 3), "mean"), streams(5).normal((2, 3), "x")
    found = kernels.Kernel(mean, 0.7).log_prob(x)
    exact = torch.distributions.Normal(mean, 0.7).log_prob(x).sum((1, 2))
    assert torch.allclose(found, exact, rtol=1e-12)


def test_the_ratio_of_two_kernels_is_the_difference_of_their_densities():
    base = kernels.Kernel(streams(6).normal((4,), "mean"), 0.3)
    proposal = base.twisted(streams(6).normal((4,), "gradient"))
    assert torch.allclose(proposal.mean - base.mean, 0.09 * streams(6).normal((4,), "gradient"))
    x = proposal.draw(streams(6))
    exact = base.log_prob(x) - proposal.log_prob(x)
    assert torch.allclose(kernels.log_ratio(base, proposal, x), exact, rtol=1e-10)
    flat = kernels.Kernel(base.mean, 0.0)
    assert torch.equal(kernels.log_ratio(flat, flat, x), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("spec", [{"name": "ddim", "eta": 1.0}, {"name": "ddim", "eta": 0.4}, {"name": "flow_sde"}])
def test_a_solvers_kernel_is_the_law_of_its_own_step(spec):
    solver = solvers.build(spec)
    sampler = Sampler(model(), solver, uniform(6))
    noise = streams(50)
    state = sampler.start(noise)
    for i in range(6):
        after = sampler.step(state, noise)
        kernel = kernels.kernel_of(sampler, state.x, after.x0_hat, i)
        assert torch.allclose(kernel.draw(noise.at(i)), after.x, rtol=0, atol=1e-14)
        assert (kernel.std > 0) == (i < 5)
        state = after


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_the_kernel_of_a_single_density_with_unit_noise_is_ancestral(process):
    x, x0 = streams(4).normal((3,), "x"), streams(4).normal((3,), "x0")
    for t, s in ((1.0, 0.6), (0.5, 0.2), (0.2, 0.0)):
        mean, std = kernels.tempered(process, x, x0, t, s, 1.0, 1.0)
        wanted, wanted_std = kernels.ddim(process, x, x0, t, s, 1.0)
        assert torch.allclose(mean, wanted, rtol=1e-12, atol=1e-12)
        assert std == pytest.approx(wanted_std, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("total", "zeta2"), [(2.0, 3.0), (2.0, 1.0), (1.0, 2.0), (0.5, 1.0), (0.3, 1.0)])
def test_the_kernel_of_a_product_solves_its_linear_equation(total, zeta2):
    # Against many small Euler steps of dy = (1 + zeta^2) / 2 (X - B y) / u |du| + zeta sqrt(|du|) z.
    process, t, s = VP(), 0.7, 0.5
    u = torch.linspace((process.sigma(t) / process.alpha(t)) ** 2, (process.sigma(s) / process.alpha(s)) ** 2, 20001)
    y, variance, blend = 1.3, 0.0, 0.4
    for a, b in zip(u.double().tolist(), u.double().tolist()[1:], strict=False):
        middle, step = 0.5 * (a + b), a - b
        rate = (1 + zeta2) / 2 / middle
        y, variance = (
            y + rate * (blend - total * y) * step,
            variance * (1 - total * rate * step) ** 2 + zeta2 * step,
        )
    x = torch.tensor([[1.3 * process.alpha(t)]], dtype=torch.float64)
    mean, std = kernels.tempered(process, x, torch.full_like(x, blend), t, s, total, zeta2)
    assert float(mean) / process.alpha(s) == pytest.approx(y, rel=1e-3)
    assert std / process.alpha(s) == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_a_primed_model_answers_only_where_it_was_asked():
    asked = []

    class Watched:
        process = Flow()

        def denoise(self, x, t, cond):
            asked.append(x)
            return x * 0.5

    x = torch.ones(3, 1)
    known = kernels.Primed(Watched(), x, x * 9)
    assert torch.equal(known.denoise(x, 0.5, None), x * 9) and not asked
    assert torch.equal(known.denoise(x.clone(), 0.5, None), x * 0.5) and len(asked) == 1
    assert known.process == Flow()


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "flow_sde", "eta": 3.0, "diffusion": "quadratic"},
        {"name": "flow_sde", "eta": 0.7, "diffusion": "grpo"},
        {"name": "flow_sde", "eta": 0.3, "diffusion": "constant"},
    ],
    ids=lambda s: s["diffusion"],
)
def test_the_flow_sde_keeps_the_marginals_in_the_limit_of_many_steps(spec):
    rows = 20000
    x = Sampler(model(), solvers.build(spec), uniform(500)).run(Fast(rows)).x[:, 0]
    assert abs(x.mean() + 0.35) < 5 * 1.85 / math.sqrt(rows)
    assert abs(x.var() - 3.41) < 0.05 + 3 * 0.022  # 0.022 is the standard error of a variance of 20,000 draws
    few = Sampler(model(), solvers.build(spec), uniform(10)).run(Fast(rows)).x[:, 0].var()
    # Published, but for grpo: an independent simulation of its formula gives 3.093; the note's 3.839 has no recipe.
    wanted = {"quadratic": 3.199, "constant": 2.814, "grpo": 3.1}[spec["diffusion"]]
    assert abs(few - wanted) < 0.1


class Fast:
    """Draws of one library generator: many rows at little cost, where nothing is keyed."""

    def __init__(self, rows):
        self.num_rows, self.generator = rows, torch.Generator().manual_seed(7)

    def at(self, step):
        return self

    def normal(self, shape, purpose):
        return torch.randn(self.num_rows, *shape, generator=self.generator, dtype=torch.float64)
