"""A study: a recipe plus a search, as plain data; it makes trials and refuses what cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.measure import compares
from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches
from orchestrator.trial import Trial
from tasks import registry
from tasks.noise import MAX_INDEX
from tasks.recipe import Recipe, digest
from tasks.registry import Spec, unknown
from tasks.run import COLUMNS
from tasks.types import sample_shape


@dataclass(frozen=True)
class Study:
    """What a user asked for, frozen.

    Attributes:
        name: its name; results lie in ``studies/NAME``.
        recipe: how a sample is made, before overrides.
        metrics: specs of metrics; ``cost`` is always among them.
        search: spec of the search.
        num_samples: samples of a trial.
        first_index: sample index at which they start.
        shard_size: samples of one unit of work.
        root: where everything is written.
        question: what the study is to answer, for people.
        reuse_gib: bound of the states that trials with equal beginnings share; 0 keeps none.
        group_by: what rows are alike in, for standard errors: a column of theirs, a number k for rows whose indices
            agree modulo k (as with k prompts), or None for independent rows.
        config: the composed configuration, as it was given.
    """

    name: str
    recipe: Recipe
    metrics: list[Spec]
    search: Spec
    num_samples: int
    shard_size: int
    root: str
    first_index: int = 0
    question: str = ""
    price_per_device_hour: float = 0.0
    storage: str | None = None
    reuse_gib: float = 0.0
    group_by: str | int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model_revision(self) -> str:
        """Hash of the model's weights when the study began."""
        return self.recipe.parts.model.revision

    @property
    def better(self) -> dict[str, str]:
        """Which way is up, for every value that the metrics produce."""
        found: dict[str, str] = {}
        for spec in self.metrics:
            found |= registry.metrics.build(spec).better
        return found

    @property
    def goal(self) -> tuple[str, str] | None:
        """The value by which people ask what is best, and which way is up: the search's objective, or a quality."""
        better = self.better
        names = [*_objectives(self.search), *(name for name in better if name.startswith("quality/")), *better]
        return next(((name, better[name]) for name in names if name in better), None)

    def context(self) -> SearchContext:
        """What the search may know."""
        _ = self.model_revision  # pinned from here on
        metrics = [registry.identity(spec) for spec in self.metrics]
        key = digest({"recipe": self.recipe.key, "metrics": metrics, "num_samples": self.num_samples})
        return SearchContext(
            self.name, key, self.recipe.seed, self.root, self.storage, self.better, self.recipe, self.num_samples,
            self.first_index, self.metrics,
        )  # fmt: skip

    def trial(self, number: int, proposal: Proposal) -> Trial:
        """The trial that a proposal means, checked.

        Raises:
            ValueError: it cannot run.
        """
        overrides = dict(proposal.overrides)
        count = overrides.pop("num_samples", self.num_samples)
        first = overrides.pop("first_index", self.first_index)
        for name, value in (("num_samples", count), ("first_index", first)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
        if count < 1:
            raise ValueError(f"num_samples must be at least 1, got {count}.")
        recipe = self.recipe.override(overrides)
        if recipe.model == self.recipe.model and recipe.parts.model.revision != self.model_revision:
            raise ValueError(
                f"the weights of model {recipe.model['name']} changed while the study ran: revision "
                f"{self.model_revision} became {recipe.parts.model.revision}. Run the study again."
            )
        trial = Trial(number, proposal, recipe, first, count)
        if not 0 <= first <= MAX_INDEX - count:
            raise ValueError(f"sample indices [{first}, {first + count}) must lie in [0, {MAX_INDEX}).")
        recipe.check()
        model = recipe.parts.model
        self._check_groups(recipe, count)
        for spec in self.metrics:
            plugin = registry.metrics.build(spec)
            for need in plugin.needs():
                scorer = recipe.scorer(need)
                scorer.check(sample_shape(model))
                if hasattr(scorer, "check_model"):
                    scorer.check_model(model)
                if scorer.needs_labels and not recipe.has_labels:
                    raise ValueError(f"metric {spec['name']} needs labels, but this study has none. Leave it out.")
                self._check_companion(recipe, spec["name"], need)
            plugin.check(model, count)
            if compares(plugin) and hasattr(model, "check_data"):
                model.check_data()
            if hasattr(plugin, "check_recipe"):
                plugin.check_recipe(recipe)
        return trial

    def _check_groups(self, recipe: Recipe, count: int) -> None:
        """Refuse clusters of a column that no row will have, and those of which there are not two."""
        if self.group_by is None:
            return
        written = getattr(recipe.parts.strategy, "columns", None)  # None: it is not known before rows are there
        known = {*COLUMNS, *getattr(recipe.parts.model, "columns", ()), *(written or ())}
        if isinstance(self.group_by, str) and written is not None and self.group_by not in known:
            raise unknown("column to group rows by:", self.group_by, sorted(known), "Columns of this study's rows")
        if self.group_by == "label" and not recipe.has_labels:
            raise ValueError("group_by=label needs labels, but this study has none. Set group_by=null.")
        single = isinstance(recipe.labels, int) or recipe.parts.model.num_classes < 2
        if count < 2 or (self.group_by == "label" and single):
            raise ValueError(
                f"group_by={self.group_by} makes one cluster of all {count} samples, which has no standard error. Set "
                "group_by=null or raise num_samples."
            )

    @staticmethod
    def _check_companion(recipe: Recipe, metric: str, need: Spec) -> None:
        """Refuse a metric that compares with rows which cannot be made, or that is not meant to compare rows."""
        if (other := recipe.companion(need)) is None:
            return
        if not getattr(registry.metrics.get(metric), "paired", False):
            raise ValueError(
                f"metric {metric} cannot read {need['name']}, which compares a sample with another one and not with "
                "data. Use metric trajectory."
            )
        try:
            other.check()
        except ValueError as error:
            raise ValueError(f"what metric {metric} compares with cannot be sampled: {error}") from None


def _objectives(spec: Mapping[str, Any]) -> list[str]:
    """The objectives of a search and of those inside it."""
    spec = searches.complete(dict(spec))
    own = spec.get("objectives") or [spec.get("objective")]
    inside = [part for part in [*(spec.get("parts") or ()), spec.get("inner")] if part]
    return [name for name in own if name] + [name for part in inside for name in _objectives(part)]
