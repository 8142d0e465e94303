"""Metrics: merging, closed forms, and standard errors against repeated simulation."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from tasks import moments as moments_module
from tasks import registry
from tasks.moments import Moments, frechet_distance, frechet_influence

exactly = settings(derandomize=True, deadline=None, database=None, max_examples=100)
DIM = 4


def rows_of(count, seed=0):
    """Every column that some metric reads."""
    rng = np.random.default_rng(seed)
    return {
        "sample_id": np.arange(count),
        "position": np.arange(count),
        "nfe": rng.integers(1, 50, count).astype(np.int32),
        "reward_calls": rng.integers(0, 5, count).astype(np.int32),
        "decodes": rng.integers(0, 5, count).astype(np.int32),
        "work": np.linspace(0.5, 5.0, count),
        "ink": rng.normal(3.0, 0.1, count).astype(np.float32),
        "class_log_prob": -rng.exponential(1.0, count).astype(np.float32),
        "class_correct": (rng.random(count) < 0.8).astype(np.float32),
        "classifier": rng.normal(2.0, 1.0, (count, DIM)).astype(np.float32),
        "identity": rng.normal(1.0, 1.0, (count, DIM)).astype(np.float32),
        "label": np.arange(count) % 3,
        "tokens": rng.binomial(30, rng.uniform(0.1, 0.9, (count, 1)), (count, 16)).astype(np.float32),
        "token_log_prob": rng.normal(-80.0, 9.0, count).astype(np.float32),
        "half": np.arange(count) % 2,
        "classifier_logits": rng.normal(0.0, 1.0, (count, DIM)).astype(np.float32),
        "trajectory_variance": rng.exponential(0.1, count),
        "trajectory_distance": rng.exponential(0.1, (count, 1)).astype(np.float32),
        "acceleration_distance": rng.exponential(0.1, (count, 1)).astype(np.float32),
    }


def tokens_of(count, probabilities, seed=0):
    """Rows of three binary tokens drawn from a table of eight."""
    strings = np.array([[int(b) for b in f"{i:03b}"] for i in range(8)])
    pick = np.random.default_rng(seed).choice(8, size=count, p=probabilities)
    return {"identity": strings[pick].astype(np.float32), "position": np.arange(count)}


def take(rows, start, stop):
    return {name: column[start:stop] for name, column in rows.items()}


def fold(metric, rows, edges):
    parts = [metric.summarize(take(rows, a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    return functools.reduce(metric.merge, parts)


REFERENCE_ROWS = rows_of(300, seed=9)


def reference_of(metric):
    """What a metric compares with, made the way it makes it itself."""
    if metric.name == "total_variation":
        model = registry.models.build({"name": "table", "vocabulary": 2, "length": 3})
        return metric.reference(model, None)

    class Data:
        def reference(self):
            return (REFERENCE_ROWS["identity"], REFERENCE_ROWS["label"])

    return metric.reference(Data(), lambda spec, samples, labels: REFERENCE_ROWS[spec["name"]])


SPECS = [
    {"name": "frechet", "features": "identity"},
    {"name": "frechet"},
    {"name": "diversity", "features": "identity"},
    {"name": "diversity"},
    {"name": "kid", "features": "identity"},
    {"name": "kid", "features": "identity", "max_samples": 50},
    {"name": "mean_reward", "reward": "ink"},
    {"name": "class_accuracy"},
    {"name": "cost"},
    {"name": "total_variation"},
    {"name": "trajectory"},
    {"name": "perplexity"},
    {"name": "token_entropy"},
    {"name": "distinct_n"},
    {"name": "distinct_n", "n": 3},
    {"name": "pass_at_k", "k": 1},
    {"name": "pass_at_k"},
    {"name": "frechet_infinity", "features": "identity"},
    {"name": "cmmd", "features": "identity"},
    {"name": "prdc", "features": {"name": "identity"}, "k": 3},
    {"name": "inception_score", "splits": 2},
    {"name": "memorisation", "features": "identity", "level": 0.5},
    {"name": "conditional_diversity", "features": "identity"},
    {"name": "conditional_diversity", "features": "identity", "by": "half", "relative": False},
    {"name": "hallucination"},
    {"name": "hallucination", "threshold": 0.1},
    {"name": "acceleration"},
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(str(v) for v in s.values()))
ROWS, TOKENS = rows_of(120), tokens_of(120, np.full(8, 1 / 8))


def setting(spec):
    metric = registry.metrics.build(spec)
    return metric, TOKENS if spec["name"] == "total_variation" else ROWS, reference_of(metric)


# --- every metric ----------------------------------------------------------------------------------------------------


def test_every_metric_is_covered():
    assert {spec["name"] for spec in SPECS} == set(registry.metrics.names())


@EVERY
@exactly
@given(cuts=st.lists(st.integers(1, 119), max_size=8))
def test_any_split_gives_the_value_of_a_single_pass(spec, cuts):
    metric, rows, reference = setting(spec)
    whole = metric.compute(metric.summarize(rows), reference)
    split = metric.compute(fold(metric, rows, [0, *sorted(set(cuts)), 120]), reference)
    assert split == pytest.approx(whole, rel=1e-10, abs=1e-10)


@EVERY
@exactly
@given(a=st.integers(1, 60), b=st.integers(61, 119))
def test_merging_is_associative(spec, a, b):
    metric, rows, reference = setting(spec)
    one, two, three = (metric.summarize(take(rows, *edges)) for edges in ((0, a), (a, b), (b, 120)))
    left = metric.compute(metric.merge(metric.merge(one, two), three), reference)
    right = metric.compute(metric.merge(one, metric.merge(two, three)), reference)
    assert left == pytest.approx(right, rel=1e-10, abs=1e-10)


@EVERY
def test_merging_does_not_change_its_arguments(spec):
    metric, rows, reference = setting(spec)
    one, two = metric.summarize(take(rows, 0, 60)), metric.summarize(take(rows, 60, 120))
    before = metric.compute(one, reference), metric.compute(two, reference)
    metric.merge(one, two)
    assert (metric.compute(one, reference), metric.compute(two, reference)) == before


@EVERY
def test_every_value_has_a_direction_and_an_influence(spec):
    metric, rows, reference = setting(spec)
    summary = metric.summarize(rows)
    values = metric.compute(summary, reference)
    assert set(metric.better) == set(values)
    assert set(metric.better.values()) <= {"higher", "lower"}
    effects = metric.influence(summary, reference, rows)
    assert set(effects) == set(values)
    assert all(isinstance(value, float) for value in values.values())
    assert all(effect.shape == (120,) for effect in effects.values())


@EVERY
def test_influences_have_mean_zero(spec):
    metric, rows, reference = setting(spec)
    for effect in metric.influence(metric.summarize(rows), reference, rows).values():
        used = effect[np.isfinite(effect)]
        # The unbiased covariance of the Frechet distance leaves a mean of order 1 / n.
        slack = 1 / len(used) if spec["name"].startswith("frechet") else 1e-9
        assert abs(used.mean()) <= slack * used.std()


@EVERY
def test_an_influence_is_the_effect_of_leaving_a_row_out(spec):
    # Without row i of n the value falls by influence_i / (n - 1), up to a second-order term.
    metric, rows, reference = setting(spec)
    if spec["name"] == "total_variation":
        rows = tokens_of(4000, np.full(8, 1 / 8))
    if "max_samples" in spec:
        rows = take(rows, 0, spec["max_samples"])
    n = len(rows["position"])
    summary = metric.summarize(rows)
    whole, effects = metric.compute(summary, reference), metric.influence(summary, reference, rows)
    moved = {name: [] for name in whole}
    left_out = range(0, n, max(1, n // 40))
    for i in left_out:
        without = {name: np.delete(column, i, axis=0) for name, column in rows.items()}
        for name, value in metric.compute(metric.summarize(without), reference).items():
            moved[name].append((n - 1) * (whole[name] - value))
    for name, changes in moved.items():
        expected = effects[name][list(left_out)]
        assert np.corrcoef(changes, expected)[0, 1] > 0.98
        assert np.polyfit(expected, changes, 1)[0] == pytest.approx(1, abs=0.12)


# --- moments ---------------------------------------------------------------------------------------------------------


@exactly
@given(cuts=st.lists(st.integers(1, 199), max_size=10), offset=st.sampled_from([0.0, 1e3, 1e6]))
def test_moments_merge_to_the_single_pass(cuts, offset):
    x = np.random.default_rng(0).normal(size=(200, 3)) + offset
    edges = [0, *sorted(set(cuts)), 200]
    merged = functools.reduce(Moments.merge, [Moments.of(x[a:b]) for a, b in zip(edges, edges[1:], strict=False)])
    assert merged.count == 200
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-10, atol=1e-10)
    # An offset of 1e6 costs its square in raw sums of squares; here it costs only the rounding of the data.
    np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=0, atol=1e-10 * max(1.0, offset))


def test_moments_of_float32_features_are_summed_in_float64():
    x = (np.random.default_rng(0).normal(size=(100_000, 1)) + 1000).astype(np.float32)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance[0, 0], np.var(x.astype(np.float64), ddof=1), rtol=1e-10)


@pytest.mark.parametrize("block", [1, 7, 200])
def test_moments_do_not_depend_on_the_rows_held_at_a_time(block, monkeypatch):
    x = np.random.default_rng(0).normal(size=(150, 5)).astype(np.float32) + 30
    monkeypatch.setattr(moments_module, "BLOCK", block)
    found = Moments.of(x)
    np.testing.assert_allclose(found.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)


def test_no_rows_are_the_neutral_element_of_merging():
    x = np.random.default_rng(0).normal(size=(9, 3))
    some, none = Moments.of(x), Moments.of(x[:0])
    assert none.count == 0
    for merged in (some.merge(none), none.merge(some)):
        np.testing.assert_array_equal(merged.covariance, some.covariance)


# --- Fréchet ---------------------------------------------------------------------------------------------------------


def random_gaussian(rng, dim):
    root = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), root @ root.T + 0.1 * np.eye(dim)


def test_frechet_distance_between_commuting_gaussians_is_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    m = rng.normal(size=5)
    value = frechet_distance(m, basis * a @ basis.T, np.zeros(5), basis * b @ basis.T)
    assert value == pytest.approx(m @ m + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


def test_frechet_distance_in_one_dimension_is_closed_form():
    value = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert value == pytest.approx(9 + (2 - 3) ** 2, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 8, 32])
def test_frechet_distance_agrees_with_the_square_root_of_the_product(dim):
    rng = np.random.default_rng(dim)
    (m1, c1), (m2, c2) = random_gaussian(rng, dim), random_gaussian(rng, dim)
    usual = (m1 - m2) @ (m1 - m2) + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(usual, rel=1e-8)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(usual, rel=1e-8)


def test_frechet_distance_of_equal_sets_is_zero():
    rng = np.random.default_rng(0)
    mean, covariance = random_gaussian(rng, 16)
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-10 * np.trace(covariance)


def test_frechet_distance_is_real_on_rank_deficient_input():
    # Rank one against rank one: tr sqrt is |u . v|, exactly.
    u, v = np.array([1.0, 2.0, 0.0]), np.array([0.0, 1.0, 1.0])
    value = frechet_distance(np.zeros(3), np.outer(u, u), np.zeros(3), np.outer(v, v))
    assert value == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-6)


def test_frechet_gradient_vanishes_at_the_reference():
    rng = np.random.default_rng(0)
    own = Moments.of(rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)))
    effect = frechet_influence(rng.normal(size=(50, 5)), own, own.mean, own.covariance)
    np.testing.assert_allclose(effect, 0, atol=1e-9)


def test_diversity_is_the_mean_squared_distance_of_two_samples_over_that_of_two_items():
    def mean_pair(x):
        pairs = np.square(x[:, None] - x[None]).sum(-1)
        return pairs.sum() / (len(x) * (len(x) - 1))

    rng = np.random.default_rng(0)
    samples, items = rng.normal(size=(40, 3)), 2 * rng.normal(size=(50, 3))
    metric = registry.metrics.build({"name": "diversity", "features": "identity"})

    class Data:
        def reference(self):
            return (items, None)

    reference = metric.reference(Data(), lambda spec, rows, labels: rows)
    value = metric.compute(metric.summarize({"identity": samples}), reference)["quality/diversity"]
    assert value == pytest.approx(mean_pair(samples) / mean_pair(items), rel=1e-12)
    same = np.repeat(samples[:1], 40, axis=0)
    assert metric.compute(metric.summarize({"identity": same}), reference)["quality/diversity"] < 1e-12
    with pytest.raises(ValueError, match="num_samples must be 2 at least, got 1"):
        metric.check(Data(), 1)


def test_frechet_of_a_set_with_itself_is_zero():
    metric = registry.metrics.build({"name": "frechet", "features": "identity"})
    reference = {"mean": ROWS["identity"].mean(0, dtype=np.float64), "covariance": np.cov(ROWS["identity"].T)}
    value = metric.compute(fold(metric, ROWS, [0, 7, 50, 120]), reference)
    assert value["quality/frechet"] == pytest.approx(0, abs=1e-6)


def test_frechet_on_a_mixture_uses_its_exact_moments():
    metric = registry.metrics.build({"name": "frechet", "features": "identity"})
    model = registry.models.build("gmm")
    mean, covariance = model.moments()
    reference = metric.reference(model, lambda *_: pytest.fail("no draw is needed"))
    np.testing.assert_array_equal(reference["mean"], mean)
    np.testing.assert_array_equal(reference["covariance"], covariance)
    samples, _ = model.reference(20_000)
    value = metric.compute(metric.summarize({"identity": samples}), reference)["quality/frechet"]
    # n exact draws are at about tr(C) / n for the mean and a quarter of tr(C) (D + 1) / n for the covariance.
    assert 0 <= value < 10 * np.trace(covariance) / 20_000


@pytest.mark.parametrize(("features", "shape", "dim"), [("identity", (2,), 2), ("classifier", (1, 8, 8), 64)])
def test_frechet_refuses_fewer_rows_than_features(features, shape, dim):
    class Model:
        pass

    model = Model()
    model.shape = shape
    metric = registry.metrics.build({"name": "frechet", "features": features})
    metric.check(model, dim + 1)
    for rows in (1, dim):
        with pytest.raises(
            ValueError, match=f"frechet is rank-deficient: {rows} rows for {dim} features. Raise num_sam"
        ):
            metric.check(model, rows)


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [({"name": "frechet", "features": "clasifier"}, "classifier"), ({"name": "mean_reward", "reward": "inkk"}, "ink")],
)
def test_a_metric_of_an_unknown_column_is_refused_with_the_nearest(spec, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        registry.metrics.build(spec).needs()


# --- KID -------------------------------------------------------------------------------------------------------------


def kid(x, y, **fields):
    metric = registry.metrics.build({"name": "kid", "features": "identity"} | fields)

    class Data:
        def reference(self):
            return y, None

    reference = metric.reference(Data(), lambda spec, samples, labels: samples)
    return metric, metric.summarize({"identity": x}), reference


def test_kid_is_the_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    metric, summary, reference = kid(x, y)
    assert metric.compute(summary, reference)["quality/kid"] == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_is_unbiased_around_zero_for_equal_laws():
    rng, values = np.random.default_rng(0), []
    for _ in range(400):
        metric, summary, reference = kid(rng.normal(size=(40, 3)), rng.normal(size=(60, 3)))
        values.append(metric.compute(summary, reference)["quality/kid"])
    standard_error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 5 * standard_error
    assert min(values) < 0  # unbiased near zero means negative about half the time


def test_kid_grows_with_the_distance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.normal(size=(200, 3))
    values = []
    for shift in (0.0, 0.5, 1.0):
        metric, summary, reference = kid(x + shift, y)
        values.append(metric.compute(summary, reference)["quality/kid"])
    assert values[0] < values[1] < values[2]


def test_kid_uses_the_first_rows_in_index_order():
    x, y = ROWS["identity"], REFERENCE_ROWS["identity"]
    metric, _, reference = kid(x, y, max_samples=50)
    assert len(reference["features"]) == 50
    few = fold(metric, ROWS, [0, 20, 45, 90, 120])
    np.testing.assert_array_equal(few.features, x[:50])
    assert few.count == 120
    effects = metric.influence(few, reference, ROWS)["quality/kid"]
    assert np.isfinite(effects[:50]).all()
    assert np.isnan(effects[50:]).all()
    # Chunks know their position: the same rows count whichever chunk they are in.
    second = metric.influence(few, reference, take(ROWS, 40, 120))["quality/kid"]
    np.testing.assert_array_equal(second, effects[40:])


def test_kid_needs_two_rows():
    with pytest.raises(ValueError, match="kid needs at least 2 rows, got num_samples=1"):
        registry.metrics.build("kid").check(None, 1)
    with pytest.raises(ValueError, match="max_samples.*1"):
        registry.metrics.build({"name": "kid", "max_samples": 1}).check(None, 100)


# --- means and histograms --------------------------------------------------------------------------------------------


def test_means_are_means():
    for spec, column, name in (
        ({"name": "mean_reward", "reward": "ink"}, "ink", "reward/ink"),
        ({"name": "class_accuracy"}, "class_correct", "quality/class_accuracy"),
        ({"name": "cost"}, "nfe", "cost/nfe"),
        ({"name": "cost"}, "reward_calls", "cost/reward_calls"),
    ):
        metric = registry.metrics.build(spec)
        value = metric.compute(fold(metric, ROWS, [0, 11, 120]), None)[name]
        assert value == pytest.approx(ROWS[column].astype(np.float64).mean(), rel=1e-12)


def test_total_variation_is_exact():
    probabilities = (0.5, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.25)
    model = registry.models.build({"name": "table", "vocabulary": 2, "length": 3, "probabilities": list(probabilities)})
    metric = registry.metrics.build("total_variation")
    rows = {"identity": np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]], dtype=np.float32)}
    # Shares 1/4, 1/4, 1/2 on strings 0, 1, 2: half of (1/4 + 1/4 + 1/4 + 1/4).
    value = metric.compute(metric.summarize(rows), metric.reference(model, None))
    assert value == {"quality/total_variation": 0.5}


def test_total_variation_of_the_exact_histogram_is_zero_and_of_disjoint_strings_one():
    model = registry.models.build(
        {"name": "table", "vocabulary": 3, "length": 2, "probabilities": [0.25, 0.75, 0, 0, 0, 0, 0, 0, 0]}
    )
    metric = registry.metrics.build("total_variation")
    reference = metric.reference(model, None)
    same = np.array([[0, 0], [0, 1], [0, 1], [0, 1]], dtype=np.float32)
    assert metric.compute(metric.summarize({"identity": same}), reference)["quality/total_variation"] == 0
    apart = np.array([[2, 2], [1, 0]], dtype=np.float32)
    assert metric.compute(metric.summarize({"identity": apart}), reference)["quality/total_variation"] == 1


def test_total_variation_needs_a_table():
    with pytest.raises(ValueError, match="total_variation needs a model with an explicit table"):
        registry.metrics.build("total_variation").check(registry.models.build("gmm"), 10)
    registry.metrics.build("total_variation").check(registry.models.build("table"), 10)


# --- standard errors -------------------------------------------------------------------------------------------------

REPEATS, COUNT = 400, 400


def simulate(draw, metric, reference, name):
    """Spread of the value over repetitions, and the mean of the standard errors from influences."""
    values, errors = [], []
    for seed in range(REPEATS):
        rows = draw(np.random.default_rng(seed))
        summary = metric.summarize(rows)
        values.append(metric.compute(summary, reference)[name])
        errors.append(metric.influence(summary, reference, rows)[name].std(ddof=1) / math.sqrt(COUNT))
    return np.std(values, ddof=1), np.mean(errors)


SKEW = np.array([[1.0, 0.4, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 0.6]])


def draw_features(rng):
    # Skewed and correlated, away from the reference.
    return {"identity": (rng.gamma(2.0, 0.6, (COUNT, 3)) - 1.0) @ SKEW, "position": np.arange(COUNT)}


def draw_reward(rng):
    return {"ink": rng.exponential(2.0, COUNT)}


def draw_correct(rng):
    return {"class_correct": (rng.random(COUNT) < 0.9).astype(np.float32)}


TABLE = np.array([0.3, 0.05, 0.1, 0.05, 0.2, 0.1, 0.15, 0.05])


def draw_tokens(rng):
    strings = np.array([[int(b) for b in f"{i:03b}"] for i in range(8)])
    return {"identity": strings[rng.choice(8, size=COUNT, p=TABLE)].astype(np.float32)}


GAUSSIAN = {"mean": np.zeros(3), "covariance": np.eye(3)}
FAR = {"joint": np.full(8, 1 / 8), "base": np.array([4, 2, 1])}
ERRORS = {
    "frechet": ({"name": "frechet", "features": "identity"}, draw_features, GAUSSIAN, "quality/frechet"),
    "kid": ({"name": "kid", "features": "identity"}, draw_features, None, "quality/kid"),
    "mean_reward": ({"name": "mean_reward", "reward": "ink"}, draw_reward, None, "reward/ink"),
    "class_accuracy": ({"name": "class_accuracy"}, draw_correct, None, "quality/class_accuracy"),
    "total_variation": ({"name": "total_variation"}, draw_tokens, FAR, "quality/total_variation"),
}


@pytest.mark.parametrize(("spec", "draw", "reference", "name"), ERRORS.values(), ids=ERRORS.keys())
def test_the_standard_error_from_influences_is_the_spread_over_repetitions(spec, draw, reference, name):
    metric = registry.metrics.build(spec)
    if spec["name"] == "kid":
        data = np.random.default_rng(1000).normal(size=(300, 3))
        reference = kid(data, data)[2]
    spread, error = simulate(draw, metric, reference, name)
    # The spread of 400 repetitions is known to 1 / sqrt(2 * 400) = 3.5 %: 18 % is five of those.
    assert error == pytest.approx(spread, rel=0.18)


def test_the_standard_error_of_a_mean_is_the_textbook_one():
    metric = registry.metrics.build({"name": "mean_reward", "reward": "ink"})
    effect = metric.influence(metric.summarize(ROWS), None, ROWS)["reward/ink"]
    assert effect.std(ddof=1) / math.sqrt(120) == pytest.approx(stats.sem(ROWS["ink"].astype(np.float64)), rel=1e-10)
