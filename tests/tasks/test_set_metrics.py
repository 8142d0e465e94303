"""Metrics of whole sets of features: definitions, closed forms, and agreement with well-kept libraries."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors

from tasks import neighbours, registry
from tasks.intervals import standard_error
from tasks.manifold import overlap
from tasks.moments import Moments, frechet_distance
from tasks.parts import part_of


class Data:
    """A model that is its reference data."""

    num_classes = 3

    def __init__(self, samples, labels=None):
        self.samples, self.labels = samples, labels

    def reference(self):
        return self.samples, self.labels


def measured(spec, x, y, labels=None, **columns):
    """A metric's values of features x against reference features y."""
    metric = registry.metrics.build(spec)
    name = registry.column(metric.needs()[0])
    reference = metric.reference(Data(y, labels), lambda spec, samples, labels: samples)
    summary = metric.summarize({name: x, "position": np.arange(len(x))} | columns)
    return metric.compute(summary, reference)


def feature_error(spec, draw, y, repetitions=300):
    """Spread of each value over repeated draws, and the mean of its own standard error."""
    metric = registry.metrics.build(spec)
    reference = metric.reference(Data(y), lambda spec, samples, labels: samples)
    values, errors = [], []
    for seed in range(repetitions):
        rows = draw(np.random.default_rng(seed))
        summary = metric.summarize(rows)
        values.append(list(metric.compute(summary, reference).values()))
        effects = metric.influence(summary, reference, rows).values()
        errors.append([standard_error(effect) for effect in effects])
    return np.std(values, axis=0, ddof=1), np.mean(errors, axis=0)


# --- Fréchet ---------------------------------------------------------------------------------------------------------


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x

    rng = np.random.default_rng(0)
    x, y = rng.gamma(2.0, 0.3, (400, 12)), rng.gamma(2.2, 0.3, (500, 12))
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(y), real=True)
    metric.update(torch.from_numpy(x), real=False)
    ours = measured({"name": "frechet", "features": "identity"}, x, y)["quality/frechet"]
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_takes_an_extractor_as_a_name_or_as_a_spec():
    x, y = np.random.default_rng(0).normal(size=(2, 50, 3))
    named, spelled = (measured({"name": "frechet", "features": f}, x, y) for f in ("identity", {"name": "identity"}))
    assert named == spelled


def test_frechet_at_infinity_has_no_bias_where_the_distance_has_one():
    # The reference is exact, so of the bias nothing stays: -tr-like terms of order 1 / n cancel between the two sizes.
    dim, rows, rng = 8, 200, np.random.default_rng(0)
    metric = registry.metrics.build({"name": "frechet_infinity", "features": "identity"})
    reference = {"mean": np.zeros(dim), "covariance": np.eye(dim)}
    raw, extrapolated = [], []
    for _ in range(200):
        summary = metric.summarize({"identity": rng.normal(size=(rows, dim)), "position": np.arange(rows)})
        m = summary.whole
        raw.append(frechet_distance(m.mean, m.covariance, reference["mean"], reference["covariance"]))
        extrapolated.append(metric.compute(summary, reference)["quality/frechet_infinity"])
    error = np.std(extrapolated) / math.sqrt(200)
    assert np.mean(raw) > 20 * error
    assert abs(np.mean(extrapolated)) < max(5 * error, 0.05 * np.mean(raw))


def test_frechet_at_infinity_finds_the_true_distance():
    dim, rows, rng = 6, 300, np.random.default_rng(1)
    mean, scale = 0.3 * np.ones(dim), 1.5
    truth = float(mean @ mean) + dim * (scale - 1.0) ** 2
    metric = registry.metrics.build({"name": "frechet_infinity", "features": "identity", "groups": 3})
    reference = {"mean": np.zeros(dim), "covariance": np.eye(dim)}
    found = []
    for _ in range(200):
        x = mean + scale * rng.normal(size=(rows, dim))
        summary = metric.summarize({"identity": x, "position": np.arange(rows)})
        found.append(metric.compute(summary, reference)["quality/frechet_infinity"])
    assert np.mean(found) == pytest.approx(truth, abs=5 * np.std(found) / math.sqrt(200) + 0.002)


def test_frechet_at_infinity_refuses_groups_that_are_rank_deficient():
    model = registry.models.build("gmm")
    metric = registry.metrics.build({"name": "frechet_infinity", "features": "identity"})
    metric.check(model, 6)
    with pytest.raises(ValueError, match="2 rows in each of 2 groups for 2 features. Raise num_samples above 6"):
        metric.check(model, 5)
    with pytest.raises(ValueError, match="metric.groups must be at least 2, got 1"):
        registry.metrics.build({"name": "frechet_infinity", "groups": 1})


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_kid_agrees_with_sklearns_kernel_and_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 5)) + 0.3
    kernels = [torch.from_numpy(polynomial_kernel(a, b, degree=3)) for a, b in ((x, x), (x, y), (y, y))]
    value = measured({"name": "kid", "features": "identity"}, x, y)["quality/kid"]
    assert value == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-10)
    n, (xx, xy, yy) = 60, kernels
    expected = ((xx.sum() - xx.trace()) + (yy.sum() - yy.trace())) / (n * (n - 1)) - 2 * xy.mean()
    assert value == pytest.approx(float(expected), rel=1e-10)


def test_cmmd_agrees_with_sklearns_kernel():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(50, 6)) + 0.5
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    gamma = 1 / (2 * 10.0**2)
    expected = rbf_kernel(u, u, gamma).mean() + rbf_kernel(v, v, gamma).mean() - 2 * rbf_kernel(u, v, gamma).mean()
    value = measured({"name": "cmmd", "features": "identity"}, x, y)["quality/cmmd"]
    assert value == pytest.approx(1000 * expected, rel=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_and_does_not_see_lengths():
    x = np.random.default_rng(0).normal(size=(40, 6))
    assert measured({"name": "cmmd", "features": "identity"}, x, 3 * x)["quality/cmmd"] == pytest.approx(0, abs=1e-9)


def test_kernel_means_do_not_depend_on_the_rows_held_at_a_time(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 50, 4))
    whole = measured({"name": "kid", "features": "identity"}, x, y)
    monkeypatch.setattr("tasks.discrepancy.BLOCK", 7)
    assert measured({"name": "kid", "features": "identity"}, x, y) == pytest.approx(whole, rel=1e-12)


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_nearest_others_agree_with_sklearn(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    x = np.random.default_rng(0).normal(size=(70, 4)) + 1000.0
    squared, places = neighbours.nearest_others(x, 3)
    distances, expected = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(x - 1000.0).kneighbors()
    np.testing.assert_allclose(np.sqrt(squared), distances[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(places, expected[:, :3])


def test_precision_recall_density_and_coverage_are_their_definitions():
    rng, k = np.random.default_rng(0), 3
    x, y = rng.normal(size=(60, 2)) * 0.8 + 0.3, rng.normal(size=(80, 2))
    reach = {name: NearestNeighbors(n_neighbors=k).fit(a).kneighbors()[0][:, -1] for name, a in (("x", x), ("y", y))}
    distance = np.linalg.norm(x[:, None] - y[None], axis=-1)
    expected = {
        "quality/precision": (distance < reach["y"]).any(axis=1).mean(),
        "quality/recall": (distance < reach["x"][:, None]).any(axis=0).mean(),
        "quality/density": (distance < reach["y"]).sum() / (k * 60),
        "quality/coverage": (distance < reach["y"]).any(axis=0).mean(),
    }
    assert measured({"name": "prdc", "features": "identity", "k": k}, x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_effects_on_recall_and_coverage_are_what_leaving_a_row_out_changes(seed):
    rng, k = np.random.default_rng(seed), 2
    x, y = rng.normal(size=(25, 2)) + 0.7, rng.normal(size=(40, 2))
    radius = neighbours.nearest_others(y, k)[0][:, -1]
    whole = overlap(x, y, radius, k)
    for name in ("recall", "coverage"):
        moved = [
            24 * (whole.values[name] - overlap(np.delete(x, i, axis=0), y, radius, k).values[name]) for i in range(25)
        ]
        np.testing.assert_allclose(whole.effects[name], np.array(moved) - np.mean(moved), atol=1e-9)


def test_coverage_and_density_of_equal_laws_are_known():
    rng, n, m, k = np.random.default_rng(0), 400, 200, 5
    found = [
        measured({"name": "prdc", "features": "identity"}, rng.normal(size=(m, 3)), rng.normal(size=(n, 3)))
        for _ in range(30)
    ]
    expected = 1 - np.prod([(n - j) / (m + n - j) for j in range(1, k + 1)])
    coverage = [value["quality/coverage"] for value in found]
    density = [value["quality/density"] for value in found]
    assert np.mean(coverage) == pytest.approx(expected, abs=5 * np.std(coverage) / math.sqrt(30))
    assert np.mean(density) == pytest.approx(1, abs=5 * np.std(density) / math.sqrt(30))


def test_standard_errors_of_manifold_metrics_cover_the_spread():
    y = np.random.default_rng(1000).normal(size=(150, 2))

    def draw(rng):
        return {"identity": rng.normal(size=(120, 2)) * 0.9 + 0.3, "position": np.arange(120)}

    spread, error = feature_error({"name": "prdc", "features": "identity", "k": 3}, draw, y)
    precision, recall, density, coverage = error / spread
    # The spread of 300 repetitions is known to 4 %.
    assert precision == pytest.approx(1, abs=0.2)
    assert density == pytest.approx(1, abs=0.2)
    assert 0.8 < recall < 2
    assert 0.8 < coverage < 2


# --- inception score -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features")
@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")  # of one split
def test_the_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Given(torch.nn.Module):
        def forward(self, x):
            return x

    logits = 2 * np.random.default_rng(0).normal(size=(90, 7))
    theirs = InceptionScore(feature=Given(), splits=1).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(logits))
    found = measured({"name": "inception_score", "splits": 1}, logits, None)["quality/inception_score"]
    assert found == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_the_inception_score_is_the_mean_over_its_splits():
    logits = np.random.default_rng(0).normal(size=(30, 4))
    expected = []
    for s in range(3):
        log_p = log_softmax(logits[part_of(np.arange(30), 3) == s], axis=1)
        p = np.exp(log_p)
        expected.append(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    found = measured({"name": "inception_score", "splits": 3}, logits, None)["quality/inception_score"]
    assert found == pytest.approx(np.mean(expected), rel=1e-12)


def test_the_inception_score_of_sure_and_even_samples_is_the_number_of_classes():
    logits = np.tile(1000.0 * np.eye(5), (8, 1))
    found = measured({"name": "inception_score", "splits": 1}, logits, None)["quality/inception_score"]
    assert found == pytest.approx(5, rel=1e-9)
    same = measured({"name": "inception_score", "splits": 1}, logits[:1].repeat(9, axis=0), None)
    assert same["quality/inception_score"] == pytest.approx(1, rel=1e-9)


# --- memorisation ----------------------------------------------------------------------------------------------------


def test_copies_are_memorised_and_new_draws_only_at_the_level():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(2000, 3)).astype(np.float32)
    spec = {"name": "memorisation", "features": "identity", "level": 0.1}
    assert measured(spec, data[:300], data)["quality/memorisation"] == 1.0
    new = measured(spec, rng.normal(size=(2000, 3)).astype(np.float32), data)["quality/memorisation"]
    assert new == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / 2000) * 1.5)  # the threshold is estimated, too
    mixed = np.concatenate([data[:500], rng.normal(size=(500, 3)).astype(np.float32) + 50])
    assert measured(spec, mixed, data)["quality/memorisation"] == 0.5


def test_memorisation_refuses_a_level_that_the_data_cannot_show():
    with pytest.raises(ValueError, match="cannot find the 0.01 quantile of 20 items. Raise metric.level to 0.05"):
        measured({"name": "memorisation", "features": "identity"}, np.zeros((5, 2)), np.zeros((20, 2)))


# --- conditional diversity -------------------------------------------------------------------------------------------


def test_conditional_diversity_is_the_mean_squared_distance_within_a_label():
    rng = np.random.default_rng(0)
    label = np.array([0, 1, 0, 1, 2, 0, 1, 2, 5])
    x = rng.normal(size=(9, 3)) + 100.0 * label[:, None]
    within = []
    for key in (0, 1, 2):  # label 5 is alone
        own = x[label == key]
        pairs = np.square(own[:, None] - own[None]).sum(-1)
        within.append(pairs.sum() / (len(own) * (len(own) - 1)))
    spec = {"name": "conditional_diversity", "features": "identity", "relative": False}
    found = measured(spec, x, None, label=label)["quality/conditional_diversity"]
    assert found == pytest.approx(np.mean(within), rel=1e-9)
    data = {"labels": label, "y": x}
    ratio = measured({"name": "conditional_diversity", "features": "identity"}, 2 * x, **data, label=label)
    assert ratio["quality/conditional_diversity"] == pytest.approx(4, rel=1e-9)


def test_conditional_diversity_groups_by_words_as_well():
    prompts = np.array(["a cat", "a dog", "a cat", "a dog"], dtype=object)
    x = np.array([[0.0], [0.0], [1.0], [3.0]])
    spec = {"name": "conditional_diversity", "features": "identity", "by": "prompt", "relative": False}
    assert measured(spec, x, None, prompt=prompts)["quality/conditional_diversity"] == pytest.approx((1 + 9) / 2)
    with pytest.raises(ValueError, match="the rows lack the column"):
        measured(spec, x, None, prompt=np.full(4, np.nan))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "conditional_diversity", "by": "prompt"}, "metric.by is 'prompt'. Set metric.relative to false"),
        ({"name": "cmmd", "sigma": 0.0}, "metric.sigma must be positive, got 0.0"),
        ({"name": "prdc", "k": 0}, "metric.k must be at least 1, got 0"),
        ({"name": "inception_score", "splits": 0}, "metric.splits must be at least 1, got 0"),
        ({"name": "memorisation", "level": 1.0}, "metric.level must lie between 0 and 1, got 1.0"),
    ],
)
def test_impossible_settings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.metrics.build(spec)


@pytest.mark.parametrize(
    ("spec", "rows", "message"),
    [
        ({"name": "prdc"}, 6, "prdc needs at least 7 rows, got num_samples=6"),
        ({"name": "inception_score"}, 99, "ten rows for each of 10 splits, got num_samples=99"),
        ({"name": "conditional_diversity"}, 5, "num_samples must be 6 at least for 3 labels, got 5"),
    ],
)
def test_too_few_rows_are_refused(spec, rows, message):
    with pytest.raises(ValueError, match=message):
        registry.metrics.build(spec).check(Data(None), rows)


def test_moments_of_one_set_are_those_of_numpy_for_any_memory_order():
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(30, 4)))
    np.testing.assert_allclose(Moments.of(x).covariance, np.cov(x.T), rtol=1e-12)


@pytest.mark.parametrize("parts", [2, 5, 10])
def test_parts_are_even_and_take_no_turns_with_labels(parts):
    part = part_of(np.arange(20_000), parts)
    assert np.bincount(part, minlength=parts) == pytest.approx(20_000 / parts, rel=0.05)
    for label in range(parts):  # labels take turns
        share = np.bincount(part[label::parts], minlength=parts) * parts**2 / 20_000
        assert share == pytest.approx(1, abs=5 * math.sqrt(parts**2 / 20_000))


def test_labels_that_take_turns_do_not_move_values_that_need_parts():
    rng = np.random.default_rng(0)
    label = np.arange(4000) % 10
    logits = 8.0 * np.eye(10)[label] + 0.1 * rng.normal(size=(4000, 10))
    score = measured({"name": "inception_score"}, logits, None)["quality/inception_score"]
    assert score > 9
    x, y = (3.0 * (label % 2)[:, None] + rng.normal(size=(4000, 3)) for _ in range(2))
    found = measured({"name": "frechet_infinity", "features": "identity"}, x, y)["quality/frechet_infinity"]
    assert abs(found) < 0.05


def test_the_error_of_conditional_diversity_for_new_labels_is_the_spread_over_labels():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(30), 20)
    x = rng.normal(size=(600, 2)) * (1 + rng.random(30))[label][:, None]
    metric = registry.metrics.build({"name": "conditional_diversity", "features": "identity", "relative": False})
    rows = {"identity": x, "label": label}
    summary = metric.summarize(rows)
    within = [group.pairs for group in summary.values()]
    effects = metric.influence(summary, None, rows | {"group": label})["quality/conditional_diversity"]
    expected = np.std(within, ddof=1) / math.sqrt(30)
    assert standard_error(effects, label) == pytest.approx(expected, rel=1e-9)
    given = metric.influence(summary, None, rows)["quality/conditional_diversity"]
    assert standard_error(given) < expected
