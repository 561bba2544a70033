"""Devices by what bounds them: bytes and operations a second, from makers' figures or measured.

`devices.json` holds dense peaks, each number with its source. ``auto`` measures the device that is
here: copying, a large product in bfloat16, the product kernel that decoding would use, and what one
more operation of a step costs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.engine.machine import available_ram_bytes, choose_device
from pocketlm.evaluate.hardware import copy_bandwidth, device_name, synchronize
from pocketlm.evaluate.results import Result

AUTO = "auto"
RATE_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is timed
PRODUCT_SIDES = {"cuda": (4096, (14336, 4096)), "cpu": (2048, (4096, 1024))}  # I, both O
PRODUCT_BYTES = 512 << 20  # of weights read in turn, so that no cache holds them
RUNS = 5


class Device(Result):
    """What bounds a device.

    Attributes:
        name: As it is asked for.
        title: In words.
        memory_bytes: That weights and caches must fit into.
        bandwidth: Bytes per second of its memory.
        rates: Dense operations per second by the width of what is multiplied: ``fp32``, ``bf16``
            (fp16 too), ``fp8``, ``int8``, ``fp4``, ``int4``.
        sources: Field → where its number is from.
        product_share: Share of the bandwidth at which the product kernel reads one more byte of
            weights, with the tokens of a step; None where it was not measured.
        product_seconds: That one more product adds to a step, beyond its bytes; None likewise.
        step_seconds: That one more small operation adds; None likewise.
    """

    name: str
    title: str
    memory_bytes: float
    bandwidth: float
    rates: dict[str, float]
    sources: dict[str, str]
    product_share: float | None = None
    product_seconds: float | None = None
    step_seconds: float | None = None

    @classmethod
    def bare(cls, bandwidth: float, rate: float) -> Device:
        """A device of which two numbers are known."""
        return cls(
            name="here",
            title="here",
            memory_bytes=float("inf"),
            bandwidth=bandwidth,
            rates={"bf16": rate},
            sources={},
        )

    def rate(self, kind: str) -> float:
        """Operations per second for operands of a kind; what the device lacks runs as bf16."""
        return self.rates.get(kind) or self.rates.get("bf16") or max(self.rates.values())


@lru_cache(maxsize=1)
def known_devices() -> dict[str, Device]:
    """All of `devices.json`, by name."""
    text = resources.files("pocketlm.evaluate").joinpath("devices.json").read_text("utf-8")
    found = json.loads(text)
    devices = {}
    for name, entry in found["devices"].items():
        numbers = {"memory": entry["memory"], "bandwidth": entry["bandwidth"], **entry["rates"]}
        devices[name] = Device(
            name=name,
            title=entry["title"],
            memory_bytes=entry["memory"][0],
            bandwidth=entry["bandwidth"][0],
            rates={kind: value for kind, (value, _) in entry["rates"].items()},
            sources={f: _source(found["sources"][key]) for f, (_, key) in numbers.items()},
        )
    return devices


def _source(entry: dict[str, str | None]) -> str:
    """The maker's document, and with what public page the number was compared."""
    page = entry["compared"]
    return f"{entry['text']}; compared with {page or 'no public page'}"


def device(name: str, *, weight_bits: int | None = None, batch: int = 1) -> Device:
    """A device by name, or, as ``auto``, the one that is here, measured.

    Args:
        name: Of `devices.json`, or ``auto``.
        weight_bits: Of the product kernel that is measured; None for bfloat16.
        batch: Tokens that it multiplies at once.

    Raises:
        ConfigError: If it is unknown; lists the known ones.
    """
    if name == AUTO:
        return measured(weight_bits, batch)
    known = known_devices()
    if name not in known:
        raise ConfigError(
            f"unknown device '{name}'.",
            where="--device",
            remedy=f"Known: {', '.join([AUTO, *known])}.",
        )
    return known[name]


def measured(weight_bits: int | None = None, batch: int = 1) -> Device:
    """The device that is here; arguments as for `device`."""
    place = choose_device(AUTO)
    cuda = place.type == "cuda"
    memory = torch.cuda.get_device_properties(place).total_memory if cuda else available_ram_bytes()
    bandwidth = copy_bandwidth(place)
    step = step_seconds(place)
    rate, beyond = product_cost(place, weight_bits, batch, step)
    return Device(
        name=AUTO,
        title=device_name(place),
        memory_bytes=float(memory),
        bandwidth=bandwidth,
        rates={"bf16": matmul_rate(place)},
        sources={
            "memory": "as the system reports it",
            "bandwidth": "measured: copying, bytes read and written",
            "bf16": "measured: a product of square matrices, in the faster of bfloat16 and float32",
        },
        product_share=rate / bandwidth,
        product_seconds=beyond,
        step_seconds=step,
    )


def matmul_rate(place: torch.device) -> float:
    """Operations per second of a product of large square matrices."""
    side = RATE_SIDE["cuda" if place.type == "cuda" else "cpu"]
    rates = []
    for dtype in (torch.bfloat16,) if place.type == "cuda" else (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=place).to(dtype)
        b, out = a.clone(), torch.empty_like(a)
        rates.append(
            2 * side**3 / _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), place)
        )
    return max(rates)


def product_cost(
    place: torch.device, weight_bits: int | None, batch: int, step: float
) -> tuple[float, float]:
    """What products with few tokens take, caches out of reach, each after a small operation.

    A line through a large and a small weight: time = bytes / rate + what a product takes beyond.

    Args:
        place: The device.
        weight_bits: Bits of a code, groups of 128; None for bfloat16.
        batch: Tokens.
        step: Seconds of the operation between two products.

    Returns:
        Bytes of weights per second, and seconds of a product beyond its bytes.
    """
    columns, sizes = PRODUCT_SIDES["cuda" if place.type == "cuda" else "cpu"]
    (many, slow), (few, fast) = (
        _product_seconds(place, weight_bits, batch, rows, columns) for rows in sizes
    )
    if slow <= fast:  # a busy machine: no line can be drawn
        return many / slow, 0.0
    rate = (many - few) / (slow - fast)
    return rate, max(0.0, fast - few / rate - step)


def _product_seconds(
    place: torch.device, weight_bits: int | None, batch: int, rows: int, columns: int
) -> tuple[int, float]:
    """Bytes of a weight, and seconds of its product together with a small operation before it."""
    from pocketlm.core.tensors import PackedInt
    from pocketlm.runtime.linear import PackedLinear

    if weight_bits is None:
        one = torch.nn.Linear(columns, rows, bias=False, device=place, dtype=torch.bfloat16)
        stored = one.weight.nbytes
        weights = [torch.randn_like(one.weight) for _ in range(_copies(stored))]
        calls: list[Callable[[Tensor], Tensor]] = [
            lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights
        ]
    else:
        half = 1 << (weight_bits - 1)
        codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=place)
        scale_OG = torch.ones(rows, columns // 128, device=place)
        weight = PackedInt(codes_OI, scale_OG, None, weight_bits)
        first = PackedLinear(weight, dtype=torch.bfloat16, device=place)
        stored = first.packed_bytes
        calls = [first, *(copy.deepcopy(first) for _ in range(_copies(stored) - 1))]
    between = _small_operation(place, batch, columns)

    def all_calls() -> None:
        for call in calls:
            call(between())

    with torch.inference_mode():
        seconds = _seconds(_replayed(all_calls, place), place)
    return stored, seconds / len(calls)


def step_seconds(place: torch.device, operations: int = 200) -> float:
    """Seconds of one small operation among many: in a CUDA graph, or called from Python."""
    one = _small_operation(place, 1, 4096)

    def chain() -> None:
        for _ in range(operations):
            one()

    with torch.inference_mode():
        return _seconds(_replayed(chain, place), place) / operations


def _small_operation(place: torch.device, batch: int, columns: int) -> Callable[[], Tensor]:
    """Gives [batch, columns]: on CUDA a norm, by the kernel that a step runs there."""
    x_BC = torch.zeros(batch, columns, device=place, dtype=torch.bfloat16)
    if place.type == "cuda":
        with contextlib.suppress(ImportError):  # no Triton
            from pocketlm.runtime.decode_kernels import norm

            return lambda: norm(x_BC, x_BC[0], 1e-5)
    return lambda: x_BC.add_(1.0)


def _replayed(work: Callable[[], None], place: torch.device) -> Callable[[], None]:
    """The work as it would run in a step: on CUDA as a graph."""
    if place.type != "cuda":
        return work
    side = torch.cuda.Stream(place)
    side.wait_stream(torch.cuda.current_stream(place))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(place).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _seconds(work: Callable[[], object], place: torch.device) -> float:
    """The fastest of a few runs, after one to warm up."""
    work()
    taken = []
    for _ in range(RUNS):
        synchronize(place)
        start = time.perf_counter()
        work()
        synchronize(place)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _copies(stored: int) -> int:
    return max(1, PRODUCT_BYTES // stored)
