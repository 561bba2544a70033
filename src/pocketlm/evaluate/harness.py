"""A loaded model as lm-eval's harness asks it: each answer is kept by its content, at once.

Imported only where lm-eval is installed. Batches are padded on the right: a causal model does not
see what comes later. Answers are greedy.

Legend: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]: an extra

from pocketlm.core.errors import ConfigError
from pocketlm.evaluate.cache import Findings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_BYTES, LOGIT_COPIES = 512 << 20, 3  # [B, T, V] float32 tensors alive at once
NEW_TOKENS = 256  # of an answer, where the task says nothing

Pair = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """Scores continuations and generates answers; what is known is not computed again.

    Args:
        load: Loads model and tokenizer; called once something is not known yet.
        tokenizer: Of the model.
        context: Longest input.
        findings: Of this model.
        on_progress: Called with how many questions are answered, and how many there are.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        findings: Findings,
        on_progress: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self._load, self._loaded = load, None
        self._context, self._findings, self._on_progress = context, findings, on_progress

    @property
    def model(self) -> Any:
        """The model, loaded at the first question that has no answer yet."""
        if self._loaded is None:
            self._loaded = self._load().eval()
        return self._loaded

    @property
    def eot_token_id(self) -> int:
        """Stands for an empty context."""
        found = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the special tokens that the tokenizer itself adds unless told."""
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special).input_ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its nats, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        unknown = {_frozen(key) for key in cut if self._findings.get(key) is None}
        missing = sorted(unknown, key=lambda key: (-len(key[0]) - len(key[1]), key))
        self._on_progress(len(cut) - len(missing), len(cut))
        while missing:
            size = len(missing[0][0]) + len(missing[0][1])
            count = max(1, LOGIT_BYTES // (4 * LOGIT_COPIES * size * self._vocabulary))
            together, missing = missing[:count], missing[count:]
            for key, value in zip(together, self._score(together), strict=True):
                self._findings.keep([list(key[0]), list(key[1])], value)
            self._on_progress(len(cut) - len(missing), len(cut))
        found = [self._findings.get(key) for key in cut]
        return [(nats, greedy) for nats, greedy in filter(None, found)]

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _cut(self, context: list[int], continuation: list[int]) -> list[list[int]]:
        """The end of a context that leaves room for its continuation."""
        room = self._context + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens; the model reads {self._context}.",
                where="--tasks",
                remedy="Choose a model with a longer context.",
            )
        return [context[-room:], continuation]

    def _score(self, pairs: Sequence[tuple[tuple[int, ...], ...]]) -> list[list[Any]]:
        """Of each: nats of the continuation, and whether greedy decoding would give it."""
        inputs = [torch.tensor((*context, *continuation)[:-1]) for context, continuation in pairs]
        tokens_BT = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        logits_BTV = self.model(tokens_BT.to(self.model.device), use_cache=False).logits
        found: list[list[Any]] = []
        for row, (context, continuation) in enumerate(pairs):
            start = len(context) - 1
            logits_TV = logits_BTV[row, start : start + len(continuation)].float()
            logq_TV = torch.log_softmax(logits_TV, dim=-1)
            next_T = torch.tensor(continuation, device=logq_TV.device)
            nats = float(logq_TV.gather(1, next_T[:, None]).double().sum())
            found.append([nats, bool((logq_TV.argmax(-1) == next_T).all())])
        return found

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first stop string."""
        answers: list[str] = []
        for count, request in enumerate(requests):
            context, settings = request.args
            key = ["generate", context, settings]
            answer = self._findings.get(key)
            if answer is None:
                answer = self._answer(context, settings)
                self._findings.keep(key, answer)
            answers.append(answer)
            self._on_progress(count + 1, len(requests))
        return answers

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise ConfigError(
                "it asks for sampled answers or beams; here answers are greedy.",
                where="--tasks",
                remedy="Set do_sample to false in the task's generation_kwargs.",
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        new = int(settings.get("max_gen_toks", NEW_TOKENS))
        room = self._context - new
        if room < 1:
            raise ConfigError(
                f"an answer may have {new} tokens; the model reads {self._context}.",
                where="--tasks",
                remedy="Set max_gen_toks in the task's generation_kwargs.",
            )
        ids_1T = torch.tensor([self.tok_encode(context)[-room:]], device=self.model.device)
        output_1T = self.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=self.tokenizer.eos_token_id,
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
        )
        text = self.tokenizer.decode(output_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Not answered: perplexity has a protocol of its own here.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "it measures perplexity of whole texts.",
            where="--tasks",
            remedy="Use `pocketlm eval --text`, which measures that with its interval.",
        )


def _frozen(key: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(part) for part in key)
