"""Asking an engine: answers, refusals and crashes come back; distances count what they should."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tests.unit.evaluate.conftest import VOCABULARY, WholeModel

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError, ConfigError
from pocketlm.core.spec import ActivationSpec, QuantSpec
from pocketlm.evaluate.engines import compare
from pocketlm.evaluate.engines.ask import Answer, Job, Refusal, ask
from pocketlm.evaluate.engines.compare import distance, our_hidden, our_logits
from pocketlm.evaluate.engines.find import (
    JOBS,
    SCRIPTS,
    VLLM_PYTHON,
    Engine,
    EngineMissing,
    find_engine,
)
from pocketlm.evaluate.engines.questions import Questions
from pocketlm.evaluate.verify_engine import EngineRun
from pocketlm.evaluate.verify_files import Artifact
from pocketlm.formats.layouts import pack_quantized
from pocketlm.formats.read import CompressedIndex, CompressedModule
from pocketlm.models.adapter import Model

SCRIPT = f"""
import os, sys
from array import array
sys.path.insert(0, {str(SCRIPTS)!r})
from jobs import answer_all

def answer(job, dtype):
    name = os.path.basename(job["model"])
    if name == "crash":
        os.kill(os.getpid(), 9)
    if name == "refuse" or dtype == "float32":
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("no kernel") from error
    rows = array("f", [-1.0] * (len(job["sequences"]) * (len(job["sequences"][0]) - 1) * 5))
    return {{"version": "fake 1", "generated": [p[:2] for p in job["prompts"]]}}, rows.tobytes()

answer_all(sys.argv[1], answer)
"""
QUESTIONS = Questions(torch.tensor([[1, 2, 3], [4, 0, 1]]), ((1, 2), (3, 4)), 2, "made up")


@pytest.fixture
def fake(tmp_path: Path) -> Engine:
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)
    return Engine("fake", "fake", (sys.executable, str(script), JOBS))


def test_answers_refusals_and_crashes(fake: Engine, tmp_path: Path) -> None:
    dtypes = ("float32", "float16")
    jobs = [Job(tmp_path / n, QUESTIONS, dtypes) for n in ("a", "refuse", "crash", "b")]
    good, refused, crashed, last = ask(fake, jobs)
    assert isinstance(good, Answer)
    assert (good.version, good.dtype, good.generated) == ("fake 1", "float16", ((1, 2), (3, 4)))
    assert good.rows_NTV.shape == (2, 2, 5)
    assert good.refused == {"float32": "ValueError: no kernel (KeyError: 'the cause')"}
    assert isinstance(refused, Refusal)
    assert refused.message.startswith("ValueError: no kernel")
    assert set(refused.messages) == set(dtypes)
    assert isinstance(crashed, Refusal)
    assert "signal 9" in crashed.message
    assert isinstance(last, Answer)


def test_a_process_that_ends_takes_one_job_with_it(tmp_path: Path) -> None:
    """What has no forked processes, as Node.js, ends as a whole: the others are asked again."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import json, sys\n"
        "for job in json.load(open(sys.argv[1])):\n"
        "    if job['model'].endswith('crash'):\n"
        "        sys.exit('GGML_ASSERT failed')\n"
        "    json.dump({'refused': {'gguf': job['model'][-1]}}, open(job['out'] + '.json', 'w'))\n"
    )
    engine = Engine("fake", "fake", (sys.executable, str(script), JOBS))
    jobs = [Job(tmp_path / name, QUESTIONS, ("gguf",)) for name in ("a", "crash", "b")]
    found = ask(engine, jobs)
    assert [r.message for r in found if isinstance(r, Refusal)] == ["a", "GGML_ASSERT failed", "b"]


def test_an_engine_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "absent.py"
    script.write_text("import sys; print('No module named vllm', file=sys.stderr); sys.exit(3)")
    engine = Engine("vllm", "vllm", (sys.executable, str(script), JOBS))
    with pytest.raises(EngineMissing, match=r"No module named vllm.*--engine-python"):
        ask(engine, [Job(tmp_path, QUESTIONS, ("float32",))])
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    for name, options, said in (
        ("vlm", {}, "Did you mean 'vllm'"),
        ("vllm", {"python": "no-such-python"}, "is no program"),
        ("vllm", {"python": sys.executable}, "has no vLLM"),
        ("vllm", {"path": tmp_path}, "Give --engine-python"),
        ("llama.cpp", {"python": sys.executable}, "Give --engine-path"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_engine(name, **options)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/node")
    with pytest.raises(EngineMissing, match="npm install"):
        find_engine("llama.cpp", path=tmp_path)


def own_answer(view: WholeModel, questions: Questions) -> Answer:
    """What an engine says that computes just what we do."""
    hidden_NTD = our_hidden(view, questions.sequences_NT)
    rows = [our_logits(view, hidden_TD[:-1]) for hidden_TD in hidden_NTD]
    prompts = torch.tensor(questions.prompts)
    for _ in range(questions.new_tokens):
        hidden_NTD = our_hidden(view, prompts)
        best_N = our_logits(view, hidden_NTD[:, -1]).argmax(-1)
        prompts = torch.cat((prompts, best_N[:, None]), dim=1)
    new = prompts[:, len(questions.prompts[0]) :].tolist()
    return Answer("fake", "float32", torch.stack(rows), tuple(map(tuple, new)), {})


def test_distances(original: WholeModel, changed: WholeModel) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (3, 12), generator=generator)
    questions = Questions(ids, tuple(map(tuple, ids[:, :5].tolist())), 6, "random")
    same = distance(original, questions, own_answer(original, questions))
    assert same.kl == 0
    assert (same.positions, same.greedy, same.same_top) == (33, 18, 1.0)
    assert (same.different, same.wrong) == (0, 0)
    other = distance(original, questions, own_answer(changed, questions))
    assert 1e-4 < other.kl < other.kl_largest
    assert other.same_top < 1
    assert other.different >= other.wrong
    answer = own_answer(original, questions)
    worst = tuple((0,) * 6 for _ in range(3))
    wrong = distance(original, questions, Answer("f", "f", answer.rows_NTV, worst, {}))
    assert wrong.different > 12
    assert wrong.wrong > 0
    with pytest.raises(
        ArtifactError, match=f"gives 50 log-probabilities a token, not {VOCABULARY}"
    ):
        distance(original, questions, Answer("f", "f", answer.rows_NTV[..., :50], (), {}))


def test_ties_may_go_either_way(original: WholeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = Questions(torch.tensor([[1, 2, 3]]), ((1, 2),), 1, "made up")
    answer = Answer("f", "f", torch.zeros(1, 2, 4), ((1,),), {})

    def logits(gap: float):
        row = torch.tensor([gap, 0.0, -5.0, -5.0])
        return lambda view, hidden_TD: row.expand(hidden_TD.shape[0], 4)

    for gap, wrong in ((0.05, 0), (0.2, 1)):
        monkeypatch.setattr(compare, "our_logits", logits(gap))
        found = distance(original, questions, answer)
        assert (found.different, found.wrong) == (1, wrong)


@pytest.mark.parametrize(("target", "bits", "kept"), [("vllm-cpu", 4, False), ("vllm", 4, True),
                                                      ("vllm-cpu", 8, True)])  # fmt: skip
def test_a_cpu_leaves_inputs_of_4_bit_weights_unrounded(
    target: str, bits: int, kept: bool, tmp_path: Path
) -> None:
    module = CompressedModule("a", QuantSpec(bits=bits, group_size=32), pack_quantized, ())
    view = SimpleNamespace(quantizers={"a": InputQuantizer(ActivationSpec())})
    run = EngineRun(Engine("vllm", target, ()), tmp_path, cast("Model", view))
    run.prepare(Artifact(tmp_path, index=CompressedIndex("compressed-tensors", {"a": module})))
    assert set(view.quantizers) == ({"a"} if kept else set())
    assert bool(run.notes) != kept
