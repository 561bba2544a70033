"""The checks of `verify --engine`: a real engine loads the files and must compute what we do.

Log-probabilities on fixed text and greedy continuations are compared with our own float32 run of
the decoded weights. Bounds: transformers, whose weights are decoded as ours, gives the same bits;
vLLM computes in 16 bits where its kernels do; llama.cpp rounds activations to 8 bits beside
quantized weights; ONNX Runtime sums in float32, as the export asks it to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.core.activations import LEAST_SCALE, InputQuantizer
from pocketlm.core.errors import ArtifactError
from pocketlm.evaluate.engines.ask import Answer, Job, ask
from pocketlm.evaluate.engines.compare import (
    TIE,
    Distance,
    Moved,
    distance,
    moved,
    our_hidden,
    our_logits,
)
from pocketlm.evaluate.engines.find import Engine
from pocketlm.evaluate.engines.llama_inputs import llama_inputs
from pocketlm.evaluate.engines.questions import WORDS, Questions, questions_for
from pocketlm.evaluate.verify_files import Artifact, Named, NotChecked
from pocketlm.evaluate.verify_logits import as_library, why_unequal
from pocketlm.formats import compressed_tensors
from pocketlm.formats.capabilities import is_expert
from pocketlm.formats.gguf_types import FLOATS as PLAIN_TYPES
from pocketlm.formats.gguf_types import NUMBERS
from pocketlm.formats.read import CompressedIndex
from pocketlm.models import open_model
from pocketlm.models.adapter import Model
from pocketlm.models.gguf import GgufFile

KL_LIMITS = {"transformers": 1e-4, "vllm": 1e-3, "llama.cpp": 5e-3, "onnxruntime": 1e-6}
# Of the greedy tokens, where activations are rounded to 8 bits: noise that flips choices beyond a
# tie. F16 files flip none (docs/experiments.md).
ROUNDING_FLIPS = 0.02
# A mixture's router has steps: rounded inputs choose other experts, at few positions and by much.
# Our own run with its inputs rounded as llama.cpp does is then the measure, the furthest of a few
# draws. Both distances are sums over few choices, hence the factor.
ROUTER_SPREAD, ROUTER_DRAWS = 2, 4
HALF_FIRST = ("float16", "bfloat16")  # vLLM's products of 4-bit weights take no float32
DTYPES = ("float32", "float16", "bfloat16")


class Over127(InputQuantizer):
    """A token's scale in vLLM, max|x| / 127; compressed-tensors and we take max|x| / 127.5."""

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ of any [..., I], in the dtype of x."""
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE) / 127
        return ((wide / scale).round() * scale).to(x.dtype)


@dataclass
class EngineRun:
    """One model in one engine; each check fills in what later ones need.

    Attributes:
        engine: Where it is.
        model: What it loads: the artifact, or a GGUF file.
        view: The same as we read it, in float32.
        answer: What it said.
        notes: What must be told beside it.
    """

    engine: Engine
    model: Path
    view: Model
    answer: Answer | None = None
    notes: list[str] = field(default_factory=list)
    _questions: Questions | None = None
    _distance: Distance | None = None
    _moved: Moved | None = None

    @property
    def questions(self) -> Questions:
        """What is asked."""
        if self._questions is None:
            self._questions = questions_for(self.view)
        return self._questions

    def checks(self) -> tuple[Named, ...]:
        """Name, the checks it builds on, and function of each."""
        loads, name = f"{self.engine.name} loads it", self.engine.name
        found: list[Named] = [
            (loads, (), self.check_loads),
            (f"{name} log-probabilities", (loads,), self.check_logits),
            (f"{name} greedy", (loads,), self.check_greedy),
        ]
        if name == "llama.cpp":
            found.append((f"{name} tokenizer", (loads,), self.check_tokenizer))
        return tuple(found)

    def check_loads(self, artifact: Artifact) -> str:
        """The engine loads it and answers."""
        self.prepare(artifact)
        text = WORDS if self.engine.name == "llama.cpp" else None
        job = Job(self.model, self.questions, dtypes_for(self.engine, artifact.index), text)
        answer = ask(self.engine, [job])[0]
        if not isinstance(answer, Answer):
            raise ArtifactError(f"{self.engine.name} refuses it: {answer.message}")
        self.answer = answer
        refused = "".join(f"; refused in {d}: {m}" for d, m in answer.refused.items())
        beside = "".join(f" {note}" for note in self.notes)
        return f"{answer.version}, {answer.dtype}, asked {self.questions.source}{refused}.{beside}"

    def prepare(self, artifact: Artifact) -> None:
        """Makes our view round inputs as the engine does, where that is known to differ.

        Args:
            artifact: It says what is compressed.
        """
        index = artifact.index
        if self.engine.name == "vllm":
            unrounded = self._unrounded_by_vllm(index)
            self.view.quantizers = {
                name: Over127(q.spec) if q.spec.name == "int8-token" else q
                for name, q in self.view.quantizers.items()
                if name not in unrounded
            }
            if unrounded:
                self.notes.append("(inputs of 4-bit weights unrounded, as this CPU runs them)")
        if self.engine.name != "transformers" or index is None:
            return
        if index.format == compressed_tensors.NAME:
            left_out = as_library(self.view, artifact, index)
            self.notes += [left_out.strip()] if left_out else []

    def _unrounded_by_vllm(self, index: CompressedIndex | None) -> set[str]:
        """Linears whose inputs it leaves as they are, although the artifact asks otherwise.

        Its kernel of 4-bit weights on a CPU takes 16-bit inputs, and rounds them only with AMX, for
        every 4-bit model then; `find.VLLM_SETTINGS` keeps it from that.
        """
        if self.engine.target != "vllm-cpu" or index is None:
            return set()
        four = {n for n, m in index.modules.items() if m.spec.name == "INT4"}
        return four & set(self.view.quantizers)

    def check_logits(self, artifact: Artifact) -> str:
        """Log-probabilities agree within the engine's bound."""
        found, name = self.distance(), self.engine.name
        if name == "transformers" and self.bit_equal():
            return f"bit-equal float32 logits at {found.positions} positions."
        said = (
            f"KL {found.kl:.1e}, largest {found.kl_largest:.1e}, same likeliest token at "
            f"{found.same_top:.1%} of {found.positions} positions"
        )
        limit = self.kl_limit()
        bound = f"{limit:.0e}"
        if limit != KL_LIMITS[name]:
            bound += f", {ROUTER_SPREAD} times what rounded inputs move our own run by"
        if not found.kl < limit:
            raise ArtifactError(f"{said}; the limit is a KL of {bound}.")
        if name != "transformers":
            return f"{said} (limit {bound})."
        reason = why_unequal(artifact, artifact.index)
        if reason is None:
            raise ArtifactError(f"{said}; its logits should be ours bit for bit.")
        return f"{said}; not bit-equal, because transformers {reason}."

    def check_greedy(self, artifact: Artifact) -> str:
        """Greedy continuations are ours, but where our own choice is nearly a tie."""
        found = self.distance()
        if not found.greedy:
            raise NotChecked("the model's context leaves no room.")
        said = (
            f"{found.greedy - found.different} of {found.greedy} tokens are our own choice; at "
            f"{found.wrong} of the others our two best are {TIE} nats or more apart"
        )
        if found.wrong > self.flips_at_most():
            raise ArtifactError(f"{said}.")
        return f"{said}, as rounded activations make it." if found.wrong else f"{said}."

    def check_tokenizer(self, artifact: Artifact) -> str:
        """The engine cuts text into our tokens, and has the chat template."""
        assert self.answer is not None
        try:
            tokenizer = self.view.tokenizer()
        except (OSError, ValueError):
            raise NotChecked("the model came without a tokenizer.") from None
        ours = tuple(tokenizer(WORDS, add_special_tokens=False).input_ids)
        if self.answer.tokens != ours:
            raise ArtifactError(f"cuts text otherwise: {self.answer.tokens}, not {ours}.")
        if (tokenizer.chat_template or None) != self.answer.chat_template:
            raise ArtifactError("does not find the chat template.")
        has = "with the chat template" if self.answer.chat_template else "without a chat template"
        return f"{len(ours)} tokens of a sentence are ours, {has}."

    def distance(self) -> Distance:
        """How far the engine's answers are from ours."""
        if self._distance is None:
            assert self.answer is not None
            self._distance = distance(self.view, self.questions, self.answer)
        return self._distance

    def moved(self) -> Moved | None:
        """How far our own run of a mixture moves where inputs are rounded as llama.cpp does.

        None for other models and engines.
        """
        if self.engine.name != "llama.cpp" or not any(map(is_expert, self.view.linear_shapes())):
            return None
        if self._moved is None:
            assert self.answer is not None
            file = open_model(self.model)
            roundings = [llama_inputs(file, draw) for draw in range(ROUTER_DRAWS)]
            self._moved = moved(self.view, roundings, self.questions, self.answer)
            if self._moved.kl:
                self.notes.append(
                    f"(experts are chosen by rounded inputs; our own run is {self._moved.kl:.1e} "
                    "from itself with such)"
                )
        return self._moved

    def kl_limit(self) -> float:
        """How far its log-probabilities may be from ours, in nats."""
        limit, own = KL_LIMITS[self.engine.name], self.moved()
        return limit if own is None else max(limit, ROUTER_SPREAD * own.kl)

    def flips_at_most(self) -> float:
        """How many of its greedy tokens may be others than ours, beyond ties."""
        rounds = bool(self.view.quantizers)
        allowed, own = flips_at_most(self.engine, self.model, self.distance(), rounds), self.moved()
        return allowed if own is None else max(allowed, ROUTER_SPREAD * own.wrong)

    def bit_equal(self) -> bool:
        """Whether the engine's logits are ours, bit for bit."""
        assert self.answer is not None
        hidden_NTD = our_hidden(self.view, self.questions.sequences_NT)
        sequences, tokens, width = hidden_NTD.shape
        ours = our_logits(self.view, hidden_NTD.reshape(-1, width)).view(sequences, tokens, -1)
        return torch.equal(ours[:, :-1], self.answer.rows_NTV)


def flips_at_most(
    engine: Engine, model: Path, found: Distance, rounds_inputs: bool = False
) -> float:
    """How many greedy tokens may be others than ours, though ours lead by more than a tie.

    Args:
        engine: llama.cpp rounds activations to 8 bits beside quantized weights.
        model: What it loaded.
        found: What was compared.
        rounds_inputs: Whether the model says that inputs are rounded: 16 bits before the rounding
            give other codes than float32, and one token at a time others than a whole sequence
            (transformers then disagrees with itself, at as many tokens).
    """
    if engine.name != "llama.cpp" and rounds_inputs:
        return ROUNDING_FLIPS * found.greedy
    if engine.name != "llama.cpp":
        return 0
    plain = {NUMBERS[name] for name in PLAIN_TYPES}
    kinds = {tensor.kind for tensor in GgufFile(model).header.tensors}
    return 0 if kinds <= plain else ROUNDING_FLIPS * found.greedy


def dtypes_for(engine: Engine, index: CompressedIndex | None) -> tuple[str, ...]:
    """What an engine is asked to compute in, the first that it takes."""
    if engine.name in ("llama.cpp", "onnxruntime"):
        return ("gguf" if engine.name == "llama.cpp" else "onnx",)
    if engine.name == "transformers":
        return ("float32",)
    packed = () if index is None else index.modules.values()
    by_codes = any(not module.activations for module in packed)
    return HALF_FIRST if by_codes else DTYPES


Export = Callable[[Path, Path, str], list[str]]
"""Writes an artifact (first) at a place in a form; gives what was lost, as sentences."""
