"""Tasks through lm-eval on tiny models; what needs it runs with ``make test-tasks``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.e2e.conftest import save_model

from pocketlm.core.errors import ConfigError, SourceError
from pocketlm.evaluate import tasks
from pocketlm.evaluate.gates import judge_gates, parse_gates
from pocketlm.evaluate.tasks import TaskSettings, figures, load_tasks, run_tasks

FILES = Path("benchmarks/tasks")
NAMES = ("hellaswag", "piqa", "arc_easy", "gsm8k")
WORDS = ["red", "green", "blue", "grey", "pink", "gold", "lime", "teal", "navy", "rust"]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few items of each task, in the form of the public data."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "arc_easy.jsonl", [
        {"query": f"Question: Is it {a}?", "choices": [b, a, "no"], "gold": i % 3}
        for i, (a, b) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ])  # fmt: skip
    write(folder / "piqa.jsonl", [
        {"goal": f"find {a}", "sol1": f"look {a}", "sol2": f"run 'n {i}", "label": i % 2}
        for i, a in enumerate(WORDS)
    ])  # fmt: skip
    write(folder / "hellaswag.jsonl", [
        {"activity_label": "Walk", "ctx_a": f"It is {a}.", "ctx_b": "she [step] goes",
         "endings": [f"to the {a} [title] door", "a\"b", "c'd", f"up {i}"], "label": i % 4}
        for i, a in enumerate(WORDS)
    ])  # fmt: skip
    worked = [{"question": f"1 + {i}?", "answer": f"It is.\n#### {i + 1}"} for i in range(8)]
    write(folder / "gsm8k-train.jsonl", worked)
    write(folder / "gsm8k-test.jsonl", worked[:3])
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    longer = {"max_position_embeddings": 512, "initializer_range": 0.3}
    return save_model(folder / "a", 0, **longer), save_model(folder / "b", 1, **longer)


def settings(data: Path, cache: Path, names=NAMES, **changes) -> TaskSettings:
    return TaskSettings(names=names, directory=FILES, data=data, cache=cache, **changes)


def test_without_lm_eval_the_extra_is_named(monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(ConfigError, match=r"pocketlm\[eval\]"):
        load_tasks(settings(data, tmp_path))


@pytest.mark.tasks
def test_all_tasks_in_pairs_and_nothing_is_scored_twice(data, pair, tmp_path, monkeypatch):
    original, model = pair
    (results,) = run_tasks([model], original, settings(data, tmp_path))
    assert [result.task for result in results] == list(NAMES)
    assert [result.items for result in results] == [10, 10, 10, 3]
    assert results[0].metric == "acc_norm"
    assert results[3].metric == "exact_match (flexible-extract)"
    for result in results[:3]:
        found = result.comparison
        assert found.change.value == pytest.approx(result.score.value - found.original.value)
        assert found.gained - found.lost == pytest.approx(result.items * found.change.value)
        assert found.flips >= found.gained + found.lost
        assert found.verdict == "inconclusive"
        assert "more items would decide" in result.sentence()
    assert sum(result.comparison.flips for result in results[:3]) > 0

    def never(*args, **options):
        raise AssertionError("an answer was known")

    monkeypatch.setattr(tasks, "load", never)
    again = run_tasks([model], original, settings(data, tmp_path))
    assert again == [results]
    (fewer,) = run_tasks([model], original, settings(data, tmp_path, items=2))
    assert [result.items for result in fewer] == [2, 2, 2, 2]


@pytest.mark.tasks
def test_a_model_beside_itself_changes_nothing(data, pair, tmp_path):
    (results,) = run_tasks([pair[0]], pair[0], settings(data, tmp_path, ("piqa",)))
    found = results[0].comparison
    assert (found.flips, found.change.value, found.p_value) == (0, 0.0, 1.0)
    gates = parse_gates(["piqa_change>-0.5", "piqa>=0"], ["piqa"], True)
    verdicts = judge_gates(gates, quality_of_nothing(), figures(results))
    assert [verdict.verdict for verdict in verdicts] == ["pass", "pass"]


def quality_of_nothing():
    from types import SimpleNamespace

    from pocketlm.evaluate.bootstrap import Interval

    zero = Interval(value=0, low=0, high=0)
    return SimpleNamespace(
        log_perplexity=zero, divergence=None, protocol=SimpleNamespace(windows=2)
    )


@pytest.mark.tasks
def test_an_interrupted_run_goes_on(data, pair, tmp_path, monkeypatch):
    from pocketlm.evaluate import harness

    monkeypatch.setattr(harness, "LOGIT_BYTES", 1)  # one request a batch

    def stop_after_ten(text: str, done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    once = settings(data, tmp_path, ("arc_easy",))
    with pytest.raises(KeyboardInterrupt):
        run_tasks([pair[0]], None, once, stop_after_ten)
    steps: list[tuple[int, int]] = []
    (results,) = run_tasks([pair[0]], None, once, lambda _, *step: steps.append(step))
    assert steps[0] == (10, 30)  # known at once
    assert steps[-1] == (30, 30)
    fresh = run_tasks([pair[0]], None, settings(data, tmp_path / "other", ("arc_easy",)))
    assert fresh == [results]


@pytest.mark.tasks
def test_continuations_are_scored_as_transformers_scores_them(pair, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocketlm.evaluate.cache import Findings
    from pocketlm.evaluate.harness import HarnessModel

    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    harness = HarnessModel(lambda: model, tokenizer, 20, Findings(tmp_path, {}), lambda *step: None)
    pairs = [([5, 6, 7], [8]), ([9], [10, 11, 12]), (list(range(1, 40)), [41, 42])]
    found = harness._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for (context, continuation), (nats, greedy) in zip(pairs, found, strict=True):
        whole = (context + continuation)[-21:]
        with torch.no_grad():
            logq = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        at = range(len(whole) - 1 - len(continuation), len(whole) - 1)
        expected = sum(float(logq[i, t]) for i, t in zip(at, continuation, strict=True))
        assert nats == pytest.approx(expected, abs=1e-4)
        assert greedy == all(
            int(logq[i].argmax()) == t for i, t in zip(at, continuation, strict=True)
        )


@pytest.mark.tasks
def test_answers_end_before_a_stop_string(pair, tmp_path):
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocketlm.evaluate.cache import Findings
    from pocketlm.evaluate.harness import HarnessModel

    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    harness = HarnessModel(
        lambda: model, tokenizer, 512, Findings(tmp_path, {}), lambda *step: None
    )

    def ask(**options):
        return harness.generate_until([SimpleNamespace(args=("abc", options))])[0]

    whole = ask(max_gen_toks=12)
    assert len(whole) > 4
    stop = whole[3]
    assert ask(max_gen_toks=12, until=[stop]) == whole.split(stop)[0]
    with pytest.raises(ConfigError, match="sampled"):
        ask(do_sample=True)


@pytest.mark.tasks
def test_scores_are_those_of_lm_eval_with_transformers(data, pair, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = settings(data, tmp_path, NAMES[:3])
    (results,) = run_tasks([pair[0]], None, asked)
    theirs = simple_evaluate(
        "hf", model_args={"pretrained": str(pair[0]), "dtype": "float32"}, tasks=load_tasks(asked),
        bootstrap_iters=0, task_manager=TaskManager(include_defaults=False), device="cpu",
    )  # fmt: skip
    for result in results:
        assert result.score.value == theirs["results"][result.task]["acc_norm,none"]


@pytest.mark.tasks
def test_hellaswag_asks_as_lm_eval_itself_does():
    import ast

    import yaml
    from lm_eval import utils
    from lm_eval.tasks.hellaswag.utils import preprocess

    config = yaml.safe_load((FILES / "hellaswag.yaml").read_text("utf-8"))
    item = {
        "activity_label": " Walk", "ctx_a": "How [step] to go. [title] Now.", "ctx_b": "THE dog",
        "endings": ["[header] a [title] b  c ", "it's [x] \"d\"", "e\\f"],
    }  # fmt: skip
    asked = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    assert utils.apply_template(config["doc_to_text"], item) == preprocess(asked)
    choices = ast.literal_eval(utils.apply_template(config["doc_to_choice"], item))
    assert choices == [preprocess(ending) for ending in item["endings"]]


@pytest.mark.tasks
def test_wrong_names_and_absent_data(data, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'hellaswag'"):
        load_tasks(settings(data, tmp_path, ("helaswag",)))
    with pytest.raises(SourceError, match="--task-data"):
        load_tasks(settings(tmp_path, tmp_path, ("piqa",)))
