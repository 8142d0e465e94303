"""Steps that leave out blocks of the network: what remains, what it costs, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tasks import registry
from tasks.layer_skip import Blocks, skipping, survey
from tasks.prefixes import keys
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.schedule import SolverSchedule, Step

TIMES = [1.0, 0.7, 0.3, 0.0]


class Residual(nn.Module):
    skippable = True

    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Growing(Residual):
    """Not of the shape of its input, so no block."""

    def forward(self, x):
        return torch.cat([super().forward(x), x], dim=-1)


def by_hand():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False), Residual(4, 6), Residual(4, 2), Growing(4, 3)).eval()


def recipe(model="digits", steps=None, **changes):
    plain = Recipe(model, "ddim", "uniform", "none", "single", batch_size=8).completed()
    if steps is not None:
        changes = {"schedule": {"times": TIMES, "steps": steps}} | changes
    return plain.override(changes)


def test_the_work_of_a_network_built_by_hand_is_its_multiply_adds():
    network, x = by_hand(), torch.randn(5, 4)
    blocks = survey(network, lambda: network(x))
    assert blocks.names == ("1", "2")
    whole = 16 + 2 * 24 + 2 * 8 + 2 * 12
    assert [blocks.share(mask) for mask in range(4)] == pytest.approx(
        [1.0, 1 - 48 / whole, 1 - 16 / whole, 1 - 64 / whole], abs=1e-12
    )
    a, first, second, last = network
    for mask, expected in ((0b01, last(second(a(x)))), (0b10, last(first(a(x)))), (0b11, last(a(x)))):
        with skipping(network, blocks, mask) as share:
            assert torch.equal(network(x), expected) and share == blocks.share(mask)
    assert torch.equal(network(x), last(second(first(a(x))))), "the blocks are back"
    with pytest.raises(ValueError, match="leaves out block 2, but this Sequential has 2 blocks"):
        skipping(network, blocks, 0b100).__enter__()


def test_blocks_are_back_after_an_error():
    network, x = by_hand(), torch.randn(5, 4)
    blocks, expected = survey(network, lambda: network(x)), network(x)
    with pytest.raises(RuntimeError), skipping(network, blocks, 3):
        network(torch.randn(5, 3))
    assert torch.equal(network(x), expected)
    assert all("forward" not in vars(module) for module in network.modules())


def test_layers_of_a_transformer_encoder_become_the_identity():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    blocks = survey(network, lambda: network(x))
    assert blocks.names == ("layers.0", "layers.1", "layers.2") and blocks.share(7) == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        expected = network.layers[2](network.layers[0](x))
        with skipping(network, blocks, 0b010):
            assert torch.equal(network(x), expected)


def test_blocks_of_a_diffusion_transformer_become_the_identity():
    import diffusers

    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    given = (torch.randn(2, 1, 8, 8), torch.full((2,), 300), torch.tensor([1, 2]))
    blocks = survey(network, lambda: network(*given))
    assert len(blocks.names) == 3
    with torch.no_grad():
        with skipping(network, blocks, 0b010):
            found = network(*given).sample
        whole = network(*given).sample
        kept = network.transformer_blocks
        network.transformer_blocks = nn.ModuleList([kept[0], kept[2]])
        expected = network(*given).sample
    assert torch.equal(found, expected) and not torch.equal(found, whole)


@pytest.fixture(scope="module")
def unet():
    return registry.models.build({"name": "digits"}).load("cpu")


def test_the_blocks_of_the_digits_unet_come_in_the_order_in_which_it_runs_them():
    blocks = registry.models.build({"name": "digits"}).blocks
    assert len(blocks.names) == 12 == len(registry.models.build({"name": "digits_flow"}).blocks.names)
    assert [name.split(".")[0] for name in blocks.names] == ["down_blocks"] * 3 + ["mid_block"] * 3 + ["up_blocks"] * 6
    assert all(saving > 0 for saving in blocks.savings) and 0 < blocks.share(2**12 - 1) < 0.25


@pytest.mark.parametrize("bit", [0, 1, 2, 4, 8])
def test_a_block_left_out_of_a_unet_is_the_path_around_it(unet, bit):
    name = registry.models.build({"name": "digits"}).blocks.names[bit]
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    parent, _, last = name.rpartition(".")

    class Around(nn.Module):
        def __init__(self, shortcut):
            super().__init__()
            self.shortcut = shortcut

        def forward(self, x, *args, **options):
            return x if self.shortcut is None else self.shortcut(x)

    with torch.no_grad():
        whole = unet.denoise(x, 0.5)
        with unet.skipping(0):
            assert torch.equal(unet.denoise(x, 0.5), whole)
        with unet.skipping(1 << bit):
            found = unet.denoise(x, 0.5)
        blocks = unet.network.get_submodule(parent)
        block = blocks[int(last)]
        blocks[int(last)] = Around(getattr(block, "conv_shortcut", None))
        expected = unet.denoise(x, 0.5)
        blocks[int(last)] = block
    assert torch.equal(found, expected) and not torch.equal(found, whole)


def test_masks_survive_in_a_schedule_and_none_changes_no_key():
    steps = (Step(skip=5), Step(2), Step(skip=2**61))
    schedule = SolverSchedule(tuple(TIMES), steps)
    assert SolverSchedule.from_json(schedule.to_json()) == schedule
    assert [step.to_data() for step in steps] == [{"skip": 5}, {"order": 2}, {"skip": 2**61}]
    assert "without block 0, 2 of the network" in schedule.read_aloud()
    plain, zero, masked = (recipe(steps=[{"skip": m} if m is not None else {}, {}, {}]) for m in (None, 0, 1))
    assert plain.masks == () == zero.masks and masked.masks == (1, 0, 0) and masked.key != plain.key
    assert zero.parts.solver.records == plain.parts.solver.records
    assert "skip" not in str(plain.parts.solver.prefix(plain.parts.model.noising, plain.grid[0]))
    for bad in (-1, 2**62):
        with pytest.raises(ValueError, match=r"bit mask between 0 and 2\^62 - 1, got"):
            Step(skip=bad)


@pytest.mark.parametrize("guidance", ["none", "cfg"])
@pytest.mark.parametrize("strategy", ["single", "best_of_n"])
def test_rows_cost_what_was_planned(guidance, strategy):
    steps = [{"skip": 3}, {"corrector": "implicit", "skip": 4095, "order": 1}, {}]
    changes = {"strategy": strategy} | ({"reward": "ink"} if strategy != "single" else {})
    made = recipe(steps=steps, guidance=guidance, **changes)
    made.check()
    rows, share = generate(made, 0, 3), made.parts.model.blocks.share
    each = (2 if guidance == "cfg" else 1) * made.parts.strategy.particles
    assert (rows["nfe"] == made.nfe).all() and made.nfe == 4 * each
    assert made.work == pytest.approx(each * (1 + share(3) + 2 * share(4095)), rel=1e-12)
    np.testing.assert_allclose(rows["work"], made.work, rtol=1e-12)
    assert "work" not in generate(recipe(steps=[{}, {}, {}]), 0, 3)


def test_a_kept_beginning_depends_on_its_masks_and_keeps_its_account():
    from tests.tasks.test_prefixes import Kept, same_rows

    one, two = (recipe(steps=[{"skip": 6}, {"skip": m}, {}]) for m in (1, 2))
    assert (
        keys(one)[0] == keys(two)[0]
        and keys(one)[1] != keys(two)[1]
        and keys(one)[0] != keys(recipe(steps=[{}] * 3))[0]
    )
    states = Kept()
    same_rows(one, states)
    same_rows(two, states)
    assert states.reused == 12


@pytest.mark.parametrize("model", ["gmm", "empirical"])
def test_a_model_without_blocks_is_refused(model):
    with pytest.raises(ValueError, match=rf"leaves out blocks of the network \(skip=4\), but model {model} has none"):
        recipe(model, [{"skip": 4}, {}, {}]).check()


def test_masks_beyond_the_blocks_and_strategies_that_look_are_refused():
    with pytest.raises(ValueError, match="leaves out block 12, but model digits has 12 blocks.*Allowed: 0 to 4095"):
        recipe(steps=[{"skip": 2**12}, {}, {}]).check()
    steps = [{"skip": 1, "kappa": 1.0}, {"kappa": 1.0}, {"kappa": 1.0}]
    with pytest.raises(ValueError, match="which strategy fk_steering cannot. Use strategy=single"):
        recipe(steps=steps, strategy="fk_steering", reward="ink").check()


def test_schedulers_and_exports_refuse_masks():
    from orchestrator.export.point import point
    from tasks.scheduler import UnifiedScheduler

    masked = recipe(steps=[{"skip": 1}, {}, {}])
    with pytest.raises(ValueError, match="which a stock scheduler cannot: it never sees the network"):
        point(masked)
    schedule = masked.parts.solver.schedule(masked.parts.model.noising, masked.grid[0])
    with pytest.raises(ValueError, match="which a scheduler cannot"):
        UnifiedScheduler(schedule=json.loads(schedule.to_json()))


def test_the_metric_says_what_the_work_was():
    metric = registry.metrics.build("cost")
    rows = {"nfe": np.array([4, 4]), "reward_calls": np.array([0, 0]), "decodes": np.array([1, 1])}
    known = {"cost/nfe": 4.0, "cost/reward_calls": 0.0, "cost/decodes": 1.0}
    assert metric.compute(metric.summarize(rows), None) == known
    rows["work"] = np.array([2.5, 3.5])
    summary = metric.summarize(rows)
    assert metric.compute(summary, None) == known | {"cost/work": 3.0}
    assert metric.influence(summary, None, rows)["cost/work"].tolist() == [-0.5, 0.5]


def test_shares_add_up():
    assert Blocks(("a", "b"), (0.25, 0.5)).share(3) == 0.25 and Blocks((), ()).share(0) == 1.0
