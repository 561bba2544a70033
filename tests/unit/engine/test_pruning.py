"""Pruning through the engine: as sparse as asked, and resumed to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.engine.test_resume import Killed, digests
from transformers import MixtralConfig, MixtralForCausalLM

from pocketlm import api, catalog
from pocketlm.core.errors import ArtifactError, ConfigError, UnsupportedLayer
from pocketlm.core.spec import Recipe
from pocketlm.engine.compress import finished_ledger
from pocketlm.engine.events import Event
from pocketlm.engine.grids import choose_grids
from pocketlm.engine.order import check_order, passes
from pocketlm.evaluate.verify_files import Artifact, checks

PRUNING = sorted(
    name
    for name in catalog.METHODS
    if "mask" in catalog.method_class(name).makes and name != "sparsegpt_joint"
)
W4 = {"bits": 4, "group_size": 32}


def recipe_of(*steps: object, weights: dict[str, object] | None = None) -> Recipe:
    return Recipe.parse({"steps": list(steps), "weights": weights, "ignore": ["lm_head"]})


def check(recipe: Recipe) -> None:
    check_order(recipe, [catalog.build_step(s.method, s.options) for s in recipe.steps])


@pytest.mark.parametrize(
    ("method", "sparsity", "target"),
    [
        *((method, "2:4", "transformers") for method in PRUNING),
        *((method, "0.5", "pocketlm") for method in PRUNING),
        *(  # how zeros are stored depends on no method
            pytest.param(m, "2:4", "pocketlm", marks=[] if m == "wanda" else pytest.mark.slow)
            for m in PRUNING
        ),
    ],
)
def test_every_method_writes_exactly_as_many_zeros(
    tmp_path: Path, compress, method: str, sparsity: str, target: str
) -> None:
    compress(
        tmp_path / "out", steps=({"method": method, "sparsity": sparsity},), weights=None,
        target=target, floats=True,
    )  # fmt: skip
    ledger = finished_ledger(tmp_path / "out")
    assert ledger is not None
    entries = ledger.compressed()
    assert len(entries) == 21
    assert {entry.action for entry in entries.values()} == {"pruned"}
    assert {entry.sparsity for entry in entries.values()} == {0.5}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    if target == "transformers":
        assert "quantization_config" not in config
        for name in entries:
            assert stored[name].dtype == torch.bfloat16
            assert (stored[name] == 0).double().mean() == 0.5
    else:
        values = sum(t.numel() for n, t in stored.items() if n.endswith("weight_values"))
        assert values == sum(e.shape[0] * e.shape[1] for e in entries.values()) / 2
        bits = 8.75 if sparsity == "2:4" else 9.0
        assert ledger.bits_per_weight() == bits


@pytest.mark.slow
def test_pruned_artifacts_pass_their_checks(tmp_path: Path, compress) -> None:
    steps = ({"method": "wanda", "sparsity": "2:4"},)
    compress(tmp_path / "own", steps=steps, target="pocketlm", floats=True)
    report = api.verify(tmp_path / "own")
    assert report.ok, report.failures()
    named = {c.name: c for c in report.checks}
    assert "50.00 % of their weights pruned" in named["compressed weights"].message
    assert named["transformers logits"].status == "passed"


def test_a_dense_artifact_with_too_few_zeros_fails(tmp_path: Path, compress) -> None:
    compress(tmp_path / "out", steps=({"method": "wanda", "sparsity": "2:4"},), floats=True)
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.up_proj.weight"].fill_(1.0)
    save_file(stored, path, {"format": "pt"})
    artifact = Artifact.open(tmp_path / "out")
    named = {name: check for name, _, check in checks(None)}
    for name in ("config.json", "ledger", "shards"):
        named[name](artifact)
    with pytest.raises(ArtifactError, match=r"up_proj\.weight: has 0 zeros, in the ledger 3072"):
        named["compressed weights"](artifact)


SPARSEGPT, WANDA = ({"method": name, "sparsity": "2:4"} for name in ("sparsegpt", "wanda"))


@pytest.mark.parametrize(
    ("steps", "symmetric"),  # every step with zero points, whose zero is a code of its own
    [
        pytest.param((SPARSEGPT, "clip", "gptq", "refine"), True, marks=pytest.mark.slow),
        ((SPARSEGPT, "clip", "gptq", "refine"), False),
        pytest.param(
            ("clip", {"method": "sparsegpt_joint", "sparsity": "2:4"}, "refine"),
            True,
            marks=pytest.mark.slow,
        ),
        (("clip", {"method": "sparsegpt_joint", "sparsity": "2:4"}, "refine"), False),
        ((WANDA, {"method": "autoround", "iters": 2}), False),
        pytest.param((WANDA, {"method": "lkd", "iters": 2}), False, marks=pytest.mark.slow),
        pytest.param(
            (WANDA, {"method": "learned_clip", "epochs": 1}, "rtn"), False, marks=pytest.mark.slow
        ),
        ((WANDA, "hqq"), False),
        (({"method": "alps", "sparsity": "2:4"}, {"method": "tune", "iters": 2}, "gptq"), False),
    ],
)
def test_quantizing_keeps_the_mask(tmp_path: Path, compress, steps: tuple, symmetric: bool) -> None:
    target = "transformers" if symmetric else "pocketlm"
    grid = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    compress(tmp_path / "out", steps=steps, weights=grid, target=target)
    ledger = finished_ledger(tmp_path / "out")
    assert ledger is not None
    entries = ledger.compressed()
    assert {entry.action for entry in entries.values()} == {"quantized"}
    assert {entry.sparsity for entry in entries.values()} == {0.5}
    from pocketlm.models import open_model

    model = open_model(tmp_path / "out", allow_compressed=True)
    for name in entries:
        zeros = (model.source.read(name) == 0).view(-1, 4).sum(1)
        assert bool((zeros >= 2).all()), name


def test_tuning_lowers_the_blocks_error(tmp_path: Path, compress) -> None:
    losses: dict[int, list[float]] = {}

    def listen(event: Event) -> None:
        if event.kind == "loss" and event.block is not None:
            losses.setdefault(event.block, []).append(event.data["loss"])

    steps = ({"method": "wanda", "sparsity": 0.5}, {"method": "tune", "iters": 40, "rate": 0.01})
    compress(tmp_path / "out", steps=steps, floats=True, listener=listen)
    assert sorted(losses) == [0, 1, 2]
    assert all(found[-1] < 0.9 * found[0] for found in losses.values())


@pytest.mark.parametrize(
    ("steps", "at_once"),
    [
        (("wanda",), True),
        (("magnitude", "dsnot"), True),
        (("wanda", "gptq"), False),
        (("correct", "wanda"), False),
        (("sparsegpt",), False),
        (("alps",), False),
    ],
)
def test_steps_that_fit_values_are_true_sequential(steps: tuple[str, ...], at_once: bool) -> None:
    (one,) = passes([catalog.build_step(name, {}) for name in steps])
    assert one.at_once is at_once


@pytest.mark.parametrize("activation_bytes", [1 << 30, 1000])
def test_masks_are_ranked_by_the_inputs_of_the_block_before_it_is_pruned(
    tmp_path: Path, compress, activation_bytes: int
) -> None:
    """As Wanda's authors have it; a second block reads what the first, pruned, gives."""
    from pocketlm.models import open_model

    compress(
        tmp_path / "out", steps=({"method": "wanda", "sparsity": "2:4"},), floats=True,
        activation_bytes=activation_bytes,
    )  # fmt: skip
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = open_model(compress.source)
    hidden_BTD, call = model.begin(compress.windows().tokens_NT)
    for index in range(2):
        with model.block(index) as block, torch.no_grad():
            sizes: dict[str, torch.Tensor] = {}
            run = block.start(hidden_BTD, call)
            while (pause := run.advance()) is not None:
                for name in block.groups[pause.group].linears:
                    x_TI = pause.inputs.reshape(-1, pause.inputs.shape[-1]).float()
                    sizes[name] = x_TI.norm(dim=0)
            for name, view in block.linears.items():
                score_OI = view.weight_OI().abs() * sizes[name]
                worst = score_OI.view(-1, 4).argsort(1)[:, :2]
                kept_OI = torch.ones(score_OI.numel() // 4, 4).scatter_(1, worst, 0)
                pruned_OI = view.weight_OI() * kept_OI.view_as(score_OI)
                differs = (stored[view.tensor_name].float() != pruned_OI).double().mean()
                assert differs < 1e-3, name  # scores that float32 sums apart
                view.set_weight_OI(stored[view.tensor_name].float())
            hidden_BTD = block.forward(hidden_BTD, call)


@pytest.mark.parametrize(
    ("method", "target", "activation_bytes"),
    [
        pytest.param("sparsegpt", "transformers", 1 << 30, marks=pytest.mark.slow),
        ("gblm", "pocketlm", 1000),
    ],
)
def test_stopped_pruning_goes_on_to_the_same_bytes(
    tmp_path: Path, compress, method: str, target: str, activation_bytes: int
) -> None:
    settings = {
        "steps": ({"method": method, "sparsity": 0.5}, {"method": "tune", "iters": 3}),
        "target": target, "floats": True, "activation_bytes": activation_bytes,
    }  # fmt: skip
    compress(tmp_path / "whole", **settings)

    def listen(event: Event) -> None:
        if event.kind == "block_done" and event.block == 1:
            raise Killed

    with pytest.raises(Killed):
        compress(tmp_path / "parts", listener=listen, **settings)
    outcome = compress(tmp_path / "parts", **settings)
    assert outcome is not None
    assert outcome.blocks_resumed == 2
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_pruning_nothing_writes_the_source(tmp_path: Path, compress, tiny: Path) -> None:
    compress(tmp_path / "out", steps=({"method": "wanda", "sparsity": 0},), floats=True)
    before = load_file(tiny / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_are_pruned_each_for_itself(tmp_path: Path, compress_from) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    compress = compress_from(tmp_path / "moe")
    for target in ("transformers", "pocketlm"):
        steps = ({"method": "sparsegpt", "sparsity": "2:4"},)
        compress(tmp_path / target, steps=steps, target=target, floats=True)
        ledger = finished_ledger(tmp_path / target)
        assert ledger is not None
        experts = {name: e for name, e in ledger.compressed().items() if ".experts." in name}
        assert len(experts) == 2 * 4 * 3
        assert {entry.sparsity for entry in experts.values()} == {0.5}


def test_allocation_becomes_overrides(tmp_path: Path, tiny: Path) -> None:
    recipe = recipe_of({"method": "wanda", "sparsity": 0.6, "allocation": "owl"})
    text = tmp_path / "text.txt"
    text.write_text("nothing", encoding="utf-8")
    from pocketlm.calibration.windows import Windows
    from pocketlm.engine.events import EventLog
    from pocketlm.engine.options import Job
    from pocketlm.models import open_model
    from pocketlm.prepare import _settled

    model = open_model(tiny)
    steps = tuple(catalog.build_step(s.method, s.options) for s in recipe.steps)
    grids = choose_grids(model.linear_shapes(), False, recipe, "transformers", steps)
    job = Job("tiny", recipe, steps, tmp_path / "out", tmp_path / "work", "transformers", 64, 1)
    windows = Windows(torch.randint(0, 300, (4, 32)), "random", "0" * 64, False, 0)
    settled, grids = _settled(model, job, grids, windows, False, EventLog(None, None))
    options = settled.recipe.steps[0].options
    assert options["allocation"] == "uniform"
    assert len(options["overrides"]) == 21
    shapes = model.linear_shapes()
    kept = sum(grids.counts.values()) / sum(o * i for o, i in shapes.values())
    assert kept == pytest.approx(0.4, abs=0.01)
    assert len(set(options["overrides"].values())) == 3  # one share a block


def test_a_learned_allocation_is_settled_before_the_run(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares differ within a block, their mean is the asked one, and another run finds the same."""
    from pocketlm.calibration.windows import Windows
    from pocketlm.engine.events import EventLog
    from pocketlm.engine.options import Job
    from pocketlm.models import open_model
    from pocketlm.prepare import _settled

    monkeypatch.setattr("pocketlm.prune.besa.ITERATIONS", 6)
    recipe = recipe_of({"method": "alps", "sparsity": 0.6, "allocation": "besa"})
    model = open_model(tiny)
    steps = tuple(catalog.build_step(s.method, s.options) for s in recipe.steps)
    grids = choose_grids(model.linear_shapes(), False, recipe, "transformers", steps)
    tokens_NT = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens_NT, "random", "0" * 64, False, 0)
    found = []
    for activation_bytes in (1 << 30, 1):  # in memory, and on disk
        job = Job(
            "tiny", recipe, steps, tmp_path / "out", tmp_path / "work", "transformers", 64,
            activation_bytes,
        )  # fmt: skip
        settled, grids = _settled(model, job, grids, windows, False, EventLog(None, None))
        found.append(settled.recipe.steps[0].options["overrides"])
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 3
    shapes = model.linear_shapes()
    kept = sum(grids.counts.values()) / sum(o * i for o, i in shapes.values())
    assert kept == pytest.approx(0.4, abs=0.01)


def test_what_breaks_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="correct does not keep the mask that wanda made"):
        check(recipe_of("wanda", "correct", "gptq", weights=W4))
    with pytest.raises(ConfigError, match="wanda comes after gptq, which quantizes"):
        check(recipe_of("gptq", "wanda", weights=W4))
    with pytest.raises(ConfigError, match="gptq has no number format"):
        check(recipe_of("wanda", "gptq"))
    with pytest.raises(ConfigError, match="wanda quantizes nothing"):
        check(recipe_of("wanda", weights=W4))
    check(recipe_of("correct", "wanda", "gptq", weights=W4))
    check(recipe_of("sparsegpt_joint", weights=W4))


def test_groups_that_do_not_divide_name_the_layer(tiny: Path) -> None:
    recipe = recipe_of({"method": "wanda", "sparsity": "3:5"})
    steps = [catalog.build_step(s.method, s.options) for s in recipe.steps]
    with pytest.raises(UnsupportedLayer, match=r"layer\.q: groups of 5 \(3:5\) do not divide 64"):
        choose_grids({"layer.q": (64, 64)}, False, recipe, "transformers", steps)


def test_flags_become_recipes() -> None:
    alone = api.build_recipe(sparsity="2:4")
    assert alone.weights is None
    assert [s.method for s in alone.steps] == ["sparsegpt"]
    assert alone.steps[0].options == {"sparsity": "2:4"}
    assert api.build_recipe(scheme="2:4") == alone == api.build_recipe("2:4")
    both = api.build_recipe(sparsity="2:4", scheme="W4A16", group_size=64)
    assert [s.method for s in both.steps] == ["sparsegpt", "clip", "gptq", "refine"]
    assert both.weights is not None
    assert both.weights.group_size == 64
    wanda = api.build_recipe(method="wanda", sparsity=0.25)
    assert wanda.weights is None
    assert wanda.steps[0].options == {"sparsity": "0.25"}
    pruned = api.build_recipe(method="wanda", bits=4)
    assert [s.method for s in pruned.steps] == ["wanda", "clip", "gptq", "refine"]
    corrected = api.build_recipe(method="correct", sparsity="2:4", bits=4)
    assert [s.method for s in corrected.steps][:2] == ["correct", "sparsegpt"]
    with pytest.raises(ConfigError, match="no sparsity"):
        api.build_recipe(sparsity="1.0")
    with pytest.raises(ConfigError, match="contradict"):
        api.build_recipe(scheme="2:4", sparsity="0.5")
