"""The card carries licence and base model over, says how to load, and gives measured figures."""

import yaml

from pocketlm.core.spec import QuantSpec, Recipe, StepSpec
from pocketlm.engine.ledger import Entry, Ledger
from pocketlm.report.card import carried_front_matter, model_card
from pocketlm.report.data import ReportData

RECIPE = Recipe(steps=(StepSpec(method="gptq"),), weights=QuantSpec(group_size=64))
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def ledger(spec: QuantSpec | None = None, form: str = "compressed-tensors") -> Ledger:
    spec = spec or QuantSpec(group_size=64)
    shape = (96, 128)
    bits = int(96 * 128 * spec.bits_per_weight(128))
    linears = {
        f"model.layers.0.self_attn.{part}_proj.weight": Entry(
            action="quantized", reason="asked", shape=shape, bits=bits, spec=spec
        )
        for part in ("q", "k", "v")
    }
    kept = Entry(action="kept", reason="not a linear of a block", shape=(50, 96), bits=50 * 96 * 16)
    return Ledger(
        source="org/Model-1B",
        format=form,
        fingerprint={},
        tensors=linears | {"model.embed_tokens.weight": kept},
        warnings=["groups of 128 became 64", "damping raised"],
    )


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_licence_and_base_model_are_carried_over() -> None:
    readme = (
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [en, de]\n"
        "datasets: [x]\n---\n# A model\n---\n"
    )
    carried = carried_front_matter(readme)
    assert set(carried) == {"license", "license_name", "license_link", "language"}
    card = model_card(CONFIG, ledger(), RECIPE, revision="abc123", carried=carried)
    head = front_matter(card)
    assert head["license"] == "other"
    assert head["license_name"] == "llama3"
    assert head["language"] == ["en", "de"]
    assert head["base_model"] == "org/Model-1B"
    assert head["base_model_relation"] == "quantized"
    assert {"compressed-tensors", "4-bit", "pocketlm"} <= set(head["tags"])
    assert "revision `abc123`" in card
    assert "That of the base model: llama3 (LICENSE)." in card


def test_a_path_is_no_base_model_of_a_hub() -> None:
    card = model_card(CONFIG, ledger(), RECIPE, base_model="/data/models/mine")
    assert "base_model" not in front_matter(card)
    assert "# mine, W4A16" in card
    carried = carried_front_matter("---\nbase_model: org/Model-1B\n---\n")
    again = model_card(CONFIG, ledger(), RECIPE, base_model="/data/models/mine", carried=carried)
    assert front_matter(again)["base_model"] == "org/Model-1B"
    assert "base_model_relation" not in front_matter(again)  # it was made from something between


def test_cards_without_front_matter_carry_nothing() -> None:
    assert carried_front_matter("") == {}
    assert carried_front_matter("# Title\n---\nlicense: mit\n---\n") == {}
    assert carried_front_matter("---\n{broken: [\n---\n") == {}


def test_what_was_done_is_said() -> None:
    card = model_card(CONFIG, ledger(), RECIPE)
    assert "3 linears: 4 bits, symmetric, groups of 64" in card
    assert "**4.250 bits per compressed weight**" in card
    assert "- method: gptq" in card
    assert "- groups of 128 became 64" in card
    assert "kept: not a linear of a block: 1 tensors, such as `model.embed_tokens.weight`" in card


def test_loading_names_the_oldest_release_that_reads_it() -> None:
    assert '"compressed-tensors>=0.15.0"' in model_card(CONFIG, ledger(), RECIPE)
    odd = model_card(CONFIG, ledger(QuantSpec(bits=3, group_size=64)), RECIPE)
    assert '"compressed-tensors>=0.18.0"' in odd
    assert "vllm serve PATH" in model_card(CONFIG, ledger(), RECIPE)
    assert "vLLM cannot load it: model.layers.0.self_attn.q_proj: vllm has no kernel" in odd


def test_our_own_format_says_so() -> None:
    card = model_card(CONFIG, ledger(form="pocketlm"), RECIPE)
    assert "import pocketlm.hf" in card
    assert "compressed-tensors>=" not in card
    assert "vLLM cannot load it" in card
    assert front_matter(card)["library_name"] == "pocketlm"


def test_figures_only_where_measured(full: ReportData, bare: ReportData) -> None:
    assert "Not measured." in model_card(CONFIG, ledger(), RECIPE)
    assert "Not measured." in model_card(CONFIG, ledger(), RECIPE, bare)
    card = model_card(CONFIG, ledger(), RECIPE, full)
    assert "**Regression on arc_easy.** 2.42× smaller" in card
    assert full.quality is not None
    assert full.quality.protocol.sentence() in card
    assert "| log-perplexity over the original | " in card
    assert "tokens/s" in card
