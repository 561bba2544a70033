"""What kept weights do for the others: the sweep, ADMM and the solve against plain references."""

from __future__ import annotations

import pytest
import torch
from tests.unit.prune.linears import SumOfLinears, inputs, state_of, statistics, weight

from pocketlm.core.measure import relative_error
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState
from pocketlm.core.stats import Hessian
from pocketlm.core.stored import SparsitySpec
from pocketlm.prune.admm import alternate, solve
from pocketlm.prune.allocation import ALLOCATIONS
from pocketlm.prune.steps import Magnitude, Wanda
from pocketlm.prune.sweep import prune_columns
from pocketlm.prune.updates import Alps, Sparsegpt, SparsegptJoint
from pocketlm.quant.gptq import Gptq
from pocketlm.quant.refine import Refine
from pocketlm.quant.rtn import Rtn


def by_columns(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, mask_OI: torch.Tensor
) -> torch.Tensor:
    """Optimal brain surgery column by column: the inverse shrinks after each, no factorisation."""
    rest_OI, inverse_II = weight_OI.double().clone(), torch.linalg.inv(hessian_II.double())
    for i in range(weight_OI.shape[1]):
        error_O = torch.where(mask_OI[:, i], 0.0, rest_OI[:, i]) / inverse_II[i, i]
        rest_OI -= error_O[:, None] * inverse_II[i]
        inverse_II = inverse_II - torch.outer(inverse_II[:, i], inverse_II[i]) / inverse_II[i, i]
    return (rest_OI * mask_OI).float()


@pytest.mark.parametrize("block_columns", [1, 5, 8, 32, 128])
def test_blocked_equals_column_by_column(block_columns: int) -> None:
    weight_OI, hessian = weight(), statistics(inputs())[Hessian]
    factor = hessian.inverse_factor(0.01, None)
    damped_II = hessian.shrunk_II()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    sparsity = SparsitySpec(ratio=0.5)
    done = prune_columns(weight_OI, factor.upper_II, sparsity, "row", block_columns)
    expected_OI = by_columns(weight_OI, damped_II, done.mask_OI)
    torch.testing.assert_close(done.weight_OI, expected_OI, rtol=1e-3, atol=1e-4)


def test_masks_of_groups_do_not_depend_on_the_blocks_they_are_chosen_in() -> None:
    weight_OI, hessian = weight(), statistics(inputs())[Hessian]
    upper_II, sparsity = hessian.inverse_factor(0.01, None).upper_II, SparsitySpec.read("2:4")
    fine = prune_columns(weight_OI, upper_II, sparsity, block_columns=1)
    by_four = prune_columns(weight_OI, upper_II, sparsity, block_columns=4)
    assert torch.equal(fine.mask_OI, by_four.mask_OI)


def error(weight_OI: torch.Tensor, after: LinearState, hessian: Hessian) -> float:
    assert after.current is not None
    return relative_error(weight_OI, after.current.dequantize(), hessian.matrix_II())


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_better_methods_lose_less_of_the_output(text: str) -> None:
    weight_OI, stats = weight(48, 64), statistics(inputs(400, 64))
    hessian = stats[Hessian]
    options = {"sparsity": text, "shrinkage": 0}
    steps = (
        Magnitude.parse({"sparsity": text}),
        Wanda.parse({"sparsity": text}),
        Sparsegpt.parse(options),
        Alps.parse(options),
    )
    errors = [error(weight_OI, s.compress(state_of(weight_OI), stats), hessian) for s in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[2]


def test_the_solve_finds_each_rows_least_squares() -> None:
    weight_OI, hessian = weight(), statistics(inputs())[Hessian]
    hessian_II = hessian.shrunk_II(0.1)
    mask_OI = torch.rand(12, 32) < 0.5
    found_OI = solve(weight_OI, hessian_II, mask_OI, steps=100)
    for row, found_I, mask_I in zip(weight_OI, found_OI, mask_OI, strict=True):
        inner_KK = hessian_II[mask_I][:, mask_I].double()
        right_K = (hessian_II @ row)[mask_I].double()
        expected_K = torch.linalg.solve(inner_KK, right_K).float()
        torch.testing.assert_close(found_I[mask_I], expected_K, rtol=1e-3, atol=1e-3)
        assert not bool(found_I[~mask_I].any())


def test_alternation_on_a_diagonal_hessian_is_exact() -> None:
    weight_OI = weight()
    hessian_II = torch.rand(32).add(0.1).diag()
    mask_OI = alternate(weight_OI, hessian_II, SparsitySpec(ratio=0.5), "row", start=2.0)
    worth_OI = weight_OI.square() * hessian_II.diagonal()
    best_OI = torch.zeros(12, 32, dtype=torch.bool).scatter_(1, worth_OI.topk(16, 1).indices, True)
    assert torch.equal(mask_OI, best_OI)


def test_without_tokens_magnitude_decides_and_says_so() -> None:
    for step in (Sparsegpt(), Alps()):
        after = step.compress(state_of(weight()), statistics(torch.empty(0, 32)))
        assert [note.kind for note in after.notes] == ["no_tokens"]
        assert after.mask_OI is not None
        assert int(after.mask_OI.sum()) == step.kept("x", (12, 32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantizing_keeps_a_mask(symmetric: bool, bits: int) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=16)
    stats = statistics(inputs())
    start = LinearState("x", weight(), spec, torch.float16)
    pruned = Wanda.parse({"sparsity": "2:4"}).compress(start, stats)
    assert pruned.mask_OI is not None
    for steps in ((Rtn(),), (Gptq(),), (Gptq(), Refine())):
        after = pruned
        for step in steps:
            after = step.compress(after, stats)
        assert after.current is not None
        assert not bool(after.current.dequantize()[~pruned.mask_OI].any())


def test_one_sweep_prunes_and_rounds() -> None:
    spec = QuantSpec(bits=4, group_size=16)
    stats, weight_OI = statistics(inputs(400, 64)), weight(48, 64)
    start = LinearState("x", weight_OI, spec, torch.float16)
    joint = SparsegptJoint.parse({"sparsity": "2:4"}).compress(start, stats)
    assert joint.mask_OI is not None
    assert joint.current is not None
    assert joint.current.spec == spec
    assert not bool(joint.current.dequantize()[~joint.mask_OI].any())
    assert bool((joint.mask_OI.view(48, -1, 4).sum(-1) == 2).all())
    rounded = Rtn().compress(Wanda.parse({"sparsity": "2:4"}).compress(start, stats), stats)
    hessian = stats[Hessian]
    assert error(weight_OI, joint, hessian) < error(weight_OI, rounded, hessian)


@pytest.mark.parametrize("name", ["owl", "samsp", "global"])
def test_shares_keep_the_mean_and_follow_what_was_seen(name: str) -> None:
    allocation = ALLOCATIONS[name]()
    x_TI = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    stats = {"quiet": statistics(x_TI)}
    x_TI[:, 0] *= 100  # outliers: a block that has them keeps more
    stats["loud"] = statistics(x_TI)
    weights = {"loud": weight(12, 32), "quiet": weight(24, 32, seed=2)}
    looks: dict[str, object] = {}
    for linear in weights:
        task = SumOfLinears({linear: weights[linear]}, x_TI[None])
        looks |= allocation.look(task, {linear: stats[linear]}, 0.6)
    sizes = {linear: w.numel() for linear, w in weights.items()}
    shares = allocation.spread(looks, sizes, 0.6)  # pyright: ignore[reportArgumentType]
    mean = sum(shares[linear] * sizes[linear] for linear in sizes) / sum(sizes.values())
    assert mean == pytest.approx(0.6, abs=2e-3)
    assert shares["loud"] != pytest.approx(shares["quiet"], abs=1e-3)
    if name != "global":
        assert shares["loud"] < shares["quiet"]
