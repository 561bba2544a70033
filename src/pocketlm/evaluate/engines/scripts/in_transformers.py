"""Answers jobs by plain transformers: ``python in_transformers.py JOBS``.

The environment needs pocketlm too, whose `hf` says how an artifact is loaded in float32; the
weights are decoded and the model is run by the libraries alone.
"""

from __future__ import annotations

from typing import Any

from jobs import Job, run


def answer(job: Job, dtype: str) -> tuple[dict[str, Any], bytes]:
    """Log-probabilities of a job's sequences as one batch, and what follows its prompts."""
    import torch
    import transformers

    from pocketlm.hf import load_plain

    model = load_plain(job["model"], getattr(torch, dtype))
    with torch.no_grad():
        logits_NTV = model(torch.tensor(job["sequences"]), use_cache=False).logits.float()
    generated = []
    if job["prompts"]:  # all of one length
        prompts_NT = torch.tensor(job["prompts"])
        model.generation_config.eos_token_id = None  # what follows an end is compared too
        with torch.no_grad():
            found_NT = model.generate(  # pyright: ignore[reportCallIssue]
                prompts_NT, attention_mask=torch.ones_like(prompts_NT), do_sample=False,
                max_new_tokens=job["new_tokens"], pad_token_id=0,
            )  # fmt: skip
        generated = found_NT[:, prompts_NT.shape[1] :].tolist()
    raw = logits_NTV[:, :-1].contiguous().numpy().tobytes()
    said = {"version": f"transformers {transformers.__version__}", "logits": True}
    return {**said, "generated": generated}, raw


if __name__ == "__main__":
    run(answer, "transformers", "pocketlm.hf")
