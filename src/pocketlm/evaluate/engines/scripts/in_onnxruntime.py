"""Answers jobs by ONNX Runtime GenAI: ``python in_onnxruntime.py JOBS``, on a CPU."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from jobs import Job, run


def answer(job: Job, dtype: str) -> tuple[dict[str, Any], bytes]:
    """Log-probabilities of a job's sequences, one at a time, and what follows its prompts.

    Greedy tokens are chosen here from the engine's logits, token by token over its cache: its own
    search would stop at an end.
    """
    import numpy
    import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports]

    model = genai.Model(job["model"])

    def started(tokens: list[int], longest: int) -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=longest, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(numpy.array([tokens], dtype=numpy.int32))
        return generator

    rows = []
    for tokens in job["sequences"]:
        logits_TV = started(tokens, len(tokens)).get_output("logits")[0]
        rows.append(numpy.asarray(logits_TV, dtype=numpy.float32)[:-1])
    generated = []
    for tokens in job["prompts"]:
        generator, found = started(tokens, len(tokens) + job["new_tokens"]), []
        while len(found) < job["new_tokens"]:
            found.append(int(generator.get_output("logits")[0, -1].argmax()))
            if len(found) < job["new_tokens"]:
                generator.append_tokens(numpy.array([found[-1:]], dtype=numpy.int32))
        generated.append(found)
    said = f"onnxruntime-genai {version('onnxruntime-genai')}"
    said += f", onnxruntime {version('onnxruntime')}"
    return {"version": said, "generated": generated}, numpy.stack(rows).tobytes()


if __name__ == "__main__":
    run(answer, "onnxruntime_genai")
