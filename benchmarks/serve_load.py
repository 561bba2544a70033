"""Does `pocketlm serve` keep 64 streams apart, and its memory flat, while others send nonsense?

The server is a process of its own on the loopback address; its clients are OpenAI's. Each stream
asks one of 64 prompts after the other, greedily, for a length that belongs to the prompt; one in
`--leave` is left half-way. Beside them malformed requests go in all the time. Afterwards the same
runtime answers each prompt alone, in this process and in the same dtype: every complete answer must
be that text, or differ first at a token where the two likeliest logits of the answer alone are less
than `--gap` apart, where rounding that depends on the number of rows may decide. Memory is resident
memory of the server once a second: flat means that the median of the last third of the run is at
most 2 % above that of the second third. Figures: no error, no such answer, flat, every malformed
request 4xx.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import psutil
from harness import QUIET_THREADS, environment, publish, table

TOPICS = ("rain", "bread", "the moon", "a bicycle", "trees", "maps", "glass", "honey")
FORMS = (
    "What is {}?", "Tell me about {}.", "Write one sentence on {}.", "Why do people like {}?",
    "Explain {} to a child of six years, in simple words and with an example.", "Describe {}.",
    "List three facts about {}.", "How would you draw {}?",
)  # fmt: skip
MALFORMED: tuple[tuple[bytes, dict[str, str]], ...] = (
    (b"{", {}),
    (b"[]", {}),
    (b'{"model": "x", "messages": []}', {}),
    (b'{"model": "served", "messages": [{"role": "user"}], "temperature": 9}', {}),
    (b'{"model": "served", "messages": "hello"}', {}),
    (b'{"model": "served", "messages": [{"role": "user", "content": "x"}], "n": 0}', {}),
    (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', {}),
    (b"\xff\xfe", {}),
    (b"[" * 100_000, {}),
    (b"x" * (5 << 20), {}),
    (b"{}", {"Content-Type": "text/plain"}),
)
FLAT = 1.02


@dataclass
class Tally:
    """What happened."""

    answers: list[tuple[int, str, int]] = field(default_factory=list)  # prompt, text, tokens
    left: int = 0
    errors: list[str] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--leave", type=int, default=10, help="one request in so many is left")
    parser.add_argument("--gap", type=float, default=0.01, help="of logits that may tie")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def prompts() -> list[tuple[str, int]]:
    """64 prompts of several lengths, with the length of each one's answer."""
    texts = [form.format(topic) for form in FORMS for topic in TOPICS]
    return [(text, 6 + 5 * i % 23) for i, text in enumerate(texts)]


async def load(url: str, server: psutil.Process, arguments: argparse.Namespace) -> Tally:
    """All clients at once, for the time that was asked for."""
    tally, asked = Tally(), prompts()
    until = time.monotonic() + arguments.seconds
    limits = httpx2.Limits(max_connections=arguments.streams + 8)
    http = httpx2.AsyncClient(limits=limits, timeout=120, trust_env=False)
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0
    )

    async def stream(index: int) -> None:
        draw = random.Random(index)
        while time.monotonic() < until:
            which = draw.randrange(len(asked))
            try:
                await answer(which, leaves=draw.randrange(arguments.leave) == 0)
            except Exception as error:
                tally.errors.append(f"{type(error).__name__}: {error}")

    async def answer(which: int, leaves: bool) -> None:
        text, length = asked[which]
        started, said, tokens = time.monotonic(), "", 0
        async with await client.chat.completions.create(
            model="served", messages=[{"role": "user", "content": text}], temperature=0,
            max_tokens=length, stream=True, stream_options={"include_usage": True},
        ) as chunks:  # fmt: skip
            async for chunk in chunks:
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
                if chunk.choices and chunk.choices[0].delta.content:
                    if not said:
                        tally.first_seconds.append(time.monotonic() - started)
                    said += chunk.choices[0].delta.content
                    if leaves and len(said) > 8:
                        tally.left += 1
                        return
        tally.answers.append((which, said, tokens))

    async def nonsense() -> None:
        while time.monotonic() < until:
            for body, headers in MALFORMED:
                sent = {"Content-Type": "application/json", **headers}
                answer = await http.post(f"{url}/v1/chat/completions", content=body, headers=sent)
                tally.statuses[answer.status_code] = tally.statuses.get(answer.status_code, 0) + 1
                await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.monotonic() < until:
            tally.memory.append(server.memory_info().rss)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), nonsense(), *map(stream, range(arguments.streams)))
    await http.aclose()
    return tally


def judge(tally: Tally, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every answer against the one alone."""
    import torch

    from pocketlm.runtime.generate import generate
    from pocketlm.runtime.load import load as load_model

    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=dtype)
    alone, asked = {}, prompts()
    for which in {which for which, _, _ in tally.answers}:
        text, length = asked[which]
        alone[which] = generate(model, tokenizer, text, max_new_tokens=length)
    other = {(which, said) for which, said, _ in tally.answers if said != alone[which].text}
    wrong, gaps = [], []
    for which, said in other:
        gap = _gap(model, tokenizer, asked[which][0], list(alone[which].tokens), said)
        gaps.append(gap)
        if not gap < arguments.gap:
            wrong.append((asked[which][0], said, alone[which].text, gap))
    return {
        "answers": len(tally.answers),
        "different": sum((which, said) in other for which, said, _ in tally.answers),
        "largest gap there": max(gaps, default=None),
        "mixed up": wrong,
    }


def _gap(model: Any, tokenizer: Any, prompt: str, tokens: list[int], said: str) -> float:
    """Between the two likeliest logits where the answer alone first leaves what was said."""
    import torch

    from pocketlm.runtime.generate import prompt_ids

    ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    texts = (
        tokenizer.decode(tokens[: k + 1], skip_special_tokens=True) for k in range(len(tokens))
    )
    at = next((k for k, text in enumerate(texts) if not said.startswith(text)), len(tokens) - 1)
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids + tokens[:at]], device=model.device)).logits[0, -1]
    first, second = logits_V.float().topk(2).values.tolist()
    return first - second


def main() -> None:
    """Starts the server, loads it, judges."""
    arguments = parse()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    quiet = {**os.environ, **QUIET_THREADS, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [
        sys.executable, "-m", "pocketlm.cli.main", "serve", arguments.model, "--engine", "pocketlm",
        "--port", str(port), "--name", "served", "--dtype", arguments.dtype, "--device",
        arguments.device, "--concurrency", str(arguments.streams), "--context", "512",
    ]  # fmt: skip
    server = subprocess.Popen(command, env=quiet)
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.5)
        tally = asyncio.run(load(url, psutil.Process(server.pid), arguments))
        health = httpx2.get(f"{url}/health", trust_env=False).json()
    finally:
        server.terminate()
        code = server.wait(60)
    judged = judge(tally, arguments)
    third = len(tally.memory) // 3
    flat = statistics.median(tally.memory[-third:]) / statistics.median(tally.memory[third:-third])
    tokens = sum(count for _, _, count in tally.answers)
    first = sorted(tally.first_seconds)
    result = {
        "environment": environment(arguments.threads),
        "command": " ".join(sys.argv),
        "streams": arguments.streams,
        "seconds": arguments.seconds,
        **judged,
        "left half-way": tally.left,
        "errors": tally.errors[:10],
        "tokens per second": tokens / arguments.seconds,
        "first token, median seconds": first[len(first) // 2],
        "first token, 99 % within": first[int(0.99 * (len(first) - 1))],
        "memory, last third over second": flat,
        "memory, MB": [round(value / 1e6) for value in tally.memory[:: max(1, third // 4)]],
        "malformed, by status": tally.statuses,
        "rows left running": health["running"],
        "exit code": code,
    }
    kept = not tally.errors and not judged["mixed up"] and flat <= FLAT and code == 0
    kept = kept and all(400 <= status < 500 for status in tally.statuses) and bool(tally.answers)
    rows = [
        ("complete answers", str(judged["answers"])),
        ("other than alone (top-two gap below the bound)", str(judged["different"])),
        ("mixed up", str(len(judged["mixed up"]))),
        ("errors", str(len(tally.errors))),
        ("left half-way", str(tally.left)),
        ("tokens/s, all streams", f"{result['tokens per second']:.1f}"),
        ("first token, median s", f"{result['first token, median seconds']:.2f}"),
        ("memory, last third over second", f"{flat:.4f}"),
        ("malformed requests, all 4xx", str(sum(tally.statuses.values()))),
    ]
    text = table(("", f"{arguments.streams} streams, {arguments.seconds:g} s"), rows)
    title = f"does pocketlm serve keep streams apart ({arguments.model}, {arguments.dtype})?"
    publish(title, text, result, arguments.record)
    sys.exit(not kept)


if __name__ == "__main__":
    main()
