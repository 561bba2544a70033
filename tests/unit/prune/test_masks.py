"""Scores and patterns: counts are exact, and no order of rows or columns changes what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.prune.linears import SumOfLinears, inputs, state_of, statistics, weight

from pocketlm.core.errors import ConfigError, UnsupportedLayer
from pocketlm.core.stored import SparsitySpec
from pocketlm.prune.allocation import ALLOCATIONS
from pocketlm.prune.entropy import Entropy
from pocketlm.prune.moments import Moments
from pocketlm.prune.patterns import kept, ranks
from pocketlm.prune.scores import SCORES
from pocketlm.prune.steps import Dsnot, Esparse, Gblm, Magnitude, Pruning, Ria, Wanda
from pocketlm.prune.updates import Alps, Sparsegpt

STEPS = (Magnitude, Wanda, Ria, Esparse, Gblm, Dsnot, Sparsegpt, Alps)


@given(
    st.floats(0, 0.99), st.integers(1, 9), st.integers(1, 40), st.sampled_from(["row", "matrix"])
)
@settings(max_examples=60, deadline=None)
def test_a_share_is_exact(ratio: float, rows: int, columns: int, scope: str) -> None:
    sparsity = SparsitySpec(ratio=ratio)
    mask_OI = kept(torch.rand(rows, columns), sparsity, scope)
    competing = columns if scope == "row" else rows * columns
    assert int((~mask_OI).sum()) == sparsity.pruned(competing) * (rows * columns // competing)
    if scope == "row":
        assert len(set(mask_OI.sum(1).tolist())) == 1


@pytest.mark.parametrize(("text", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_every_group_keeps_its_best(text: str, keep: int, of: int) -> None:
    score_OI = torch.rand(6, 32)
    mask_OGM = kept(score_OI, SparsitySpec.read(text)).view(6, -1, of)
    score_OGM = score_OI.view(6, -1, of)
    assert bool((mask_OGM.sum(-1) == keep).all())
    worst_kept = score_OGM.masked_fill(~mask_OGM, 2).amin(-1)
    best_gone = score_OGM.masked_fill(mask_OGM, -1).amax(-1)
    assert bool((worst_kept >= best_gone).all())


@pytest.mark.parametrize("step_class", STEPS)
@pytest.mark.parametrize("text", ["0.5", "0.3", "2:4"])
def test_a_step_keeps_exactly_what_it_says(step_class: type[Pruning], text: str) -> None:
    weight_OI, step = weight(), step_class.parse({"sparsity": text})
    after = step.compress(state_of(weight_OI), statistics(inputs(), gradient_OI=weight()))
    assert after.mask_OI is not None
    assert after.current is not None
    assert int(after.mask_OI.sum()) == step.kept("x", (12, 32))
    assert torch.equal(after.current.dequantize() != 0, after.mask_OI)
    assert torch.equal(after.reference_OI, after.current.dequantize())


@pytest.mark.parametrize("step_class", STEPS)
def test_pruning_nothing_changes_nothing(step_class: type[Pruning]) -> None:
    weight_OI = weight()
    stats = statistics(inputs(), gradient_OI=weight())
    after = step_class.parse({"sparsity": 0}).compress(state_of(weight_OI), stats)
    assert after.current is not None
    torch.testing.assert_close(after.current.dequantize(), weight_OI, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_scores_follow_a_permutation_of_rows_and_columns(score: str) -> None:
    weight_OI, x_TI, slope_OI = weight(), inputs(), weight(seed=2)
    rows, columns = torch.randperm(12), torch.randperm(32)
    plain_OI = SCORES[score].of(weight_OI, statistics(x_TI, gradient_OI=slope_OI))
    moved = statistics(x_TI[:, columns], gradient_OI=slope_OI[rows][:, columns])
    moved_OI = SCORES[score].of(weight_OI[rows][:, columns], moved)
    torch.testing.assert_close(moved_OI, plain_OI[rows][:, columns], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("step_class", [Wanda, Ria, Alps])
def test_the_mask_follows_a_permutation(step_class: type[Pruning]) -> None:
    weight_OI, x_TI = weight(), inputs()
    rows, columns = torch.randperm(12), torch.randperm(32)
    step = step_class()
    plain = step.compress(state_of(weight_OI), statistics(x_TI)).mask_OI
    moved_OI = weight_OI[rows][:, columns]
    moved = step.compress(state_of(moved_OI), statistics(x_TI[:, columns])).mask_OI
    assert plain is not None
    assert moved is not None
    changed = int((moved != plain[rows][:, columns]).sum())
    assert changed <= (4 if step_class is Alps else 0)  # eigenvectors round; 384 weights


@pytest.mark.parametrize("step_class", [Wanda, Ria, Esparse, Dsnot, Sparsegpt, Alps])
def test_without_a_token_the_least_weights_go(step_class: type[Pruning]) -> None:
    weight_OI, step = weight(), step_class.parse({"sparsity": "2:4"})
    after = step.compress(state_of(weight_OI), statistics(torch.zeros(0, 32)))
    assert after.mask_OI is not None
    assert torch.equal(after.mask_OI, kept(weight_OI.abs(), step.sparsity))
    assert [note.kind for note in after.notes] == ["no_tokens"]


@pytest.mark.parametrize(("name", "reach"), [("samsp", 1e-6), ("global", 0.35)])
def test_a_linear_without_tokens_does_not_upset_the_others(name: str, reach: float) -> None:
    """Three alike and one that nothing reached: it is no extreme."""
    allocation, weight_OI = ALLOCATIONS[name](), weight()
    stats = {str(i): statistics(inputs(seed=0)) for i in range(3)}
    stats["idle"] = statistics(torch.zeros(0, 32))
    task = SumOfLinears(dict.fromkeys(stats, weight_OI), inputs()[None])
    looks = allocation.look(task, stats, 0.5)
    shares = allocation.spread(looks, dict.fromkeys(stats, weight_OI.numel()), 0.5)
    assert all(abs(share - 0.5) < reach for share in shares.values()), shares


def test_wanda_by_hand() -> None:
    x_TI = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # |x|₂ = 5 and 1
    weight_OI = torch.tensor([[0.1, 0.4], [0.1, 0.6]])
    after = Wanda().compress(state_of(weight_OI), statistics(x_TI))
    assert after.mask_OI is not None
    assert after.mask_OI.tolist() == [[True, False], [False, True]]


def test_gblm_by_hand() -> None:
    x_TI = torch.tensor([[3.0, 1.0], [5.0, 1.0]])  # root mean squares √17 and 1
    weight_OI, slope_OI = torch.tensor([[0.1, 0.4]]), torch.tensor([[0.2, 0.0]])
    score_OI = SCORES["gblm"].of(weight_OI, statistics(x_TI, gradient_OI=slope_OI))
    expected_OI = torch.tensor([[0.1 * (17**0.5 + 25 * 0.2), 0.4]])
    torch.testing.assert_close(score_OI, expected_OI)


def test_entropy_tells_a_spread_channel_from_a_constant_one() -> None:
    x_TI = torch.stack([torch.linspace(0, 1, 640), torch.ones(640)], dim=1)
    stat = Entropy(2)
    stat.add(x_TI)
    torch.testing.assert_close(
        stat.value_I(), torch.tensor([64.0, 1.0]).log(), rtol=1e-3, atol=1e-4
    )


def test_exchange_brings_the_mean_output_nearer() -> None:
    weight_OI, stats = weight(20, 32), statistics(inputs())
    mean_I = stats[Moments].mean_I().float()
    errors = []
    for step in (Wanda(), Dsnot()):
        after = step.compress(state_of(weight_OI), stats)
        errors.append(((weight_OI - after.reference_OI) @ mean_I).abs())
    assert bool((errors[1] <= errors[0] + 1e-5).all())
    assert float(errors[1].mean()) < 0.5 * float(errors[0].mean())


@pytest.mark.parametrize("bad", ["1", "1.5", "-0.1", "4:4", "0:4", "5:4", "2:", "half", "nan"])
def test_no_sparsity(bad: str) -> None:
    with pytest.raises(ConfigError, match="no sparsity"):
        SparsitySpec.read(bad, "--sparsity")
    with pytest.raises(ConfigError, match="sparsity"):
        Wanda.parse({"sparsity": bad})


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"model\.x: groups of 8 \(4:8\) do not divide 36"):
        SparsitySpec.read("4:8").check(36, "model.x")


def test_allocation_beside_a_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="2:4 is the same for every linear"):
        Wanda.parse({"sparsity": "2:4", "allocation": "owl"})


def test_overrides_rule_by_pattern() -> None:
    step = Wanda.parse({"sparsity": 0.5, "overrides": {"down_proj": 0.25}})
    assert step.sparsity_of("model.layers.0.mlp.down_proj").zeros == 0.25
    assert step.sparsity_of("model.layers.0.mlp.up_proj").zeros == 0.5


@pytest.mark.parametrize("of", [1, 4, 8])
def test_ranks_are_a_stable_sorts(of: int) -> None:
    score_NM = torch.randint(0, 3, (200, of), generator=torch.Generator().manual_seed(of)).float()
    expected_NM = torch.argsort(torch.argsort(score_NM, dim=1, stable=True), dim=1)
    assert torch.equal(ranks(score_NM), expected_NM)
