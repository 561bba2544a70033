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
from typing import NamedTuple

import torch
from torch import Tensor

from pocketlm.core.errors import ConfigError
from pocketlm.engine.machine import available_ram_bytes, choose_device
from pocketlm.evaluate.hardware import copy_bandwidth, device_name, synchronize
from pocketlm.evaluate.results import Result

AUTO = "auto"
RATE_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is timed
PRODUCT_SIDES = {"cuda": (4096, 14336), "cpu": (1024, 4096)}  # few and many, of rows and columns
HEADS = (8, 4, 128)  # of the attention that is timed: of keys, queries for each, width
POSITIONS = 128  # that it sees: few, so that its time is not that of its bytes
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
        column_seconds: That each of its columns adds: a program goes through them in turn.
        attention_seconds: That one more attention over few positions adds; None where it is not
            one kernel: as a small operation.
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
    column_seconds: float = 0.0
    attention_seconds: float | None = None
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
    cost = product_cost(place, weight_bits, batch, step, bandwidth)
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
        product_share=cost.rate / bandwidth,
        product_seconds=cost.seconds,
        column_seconds=cost.column_seconds,
        attention_seconds=attention_seconds(place, batch, step),
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


class ProductCost(NamedTuple):
    """What a product takes: bytes / rate + seconds + columns · column_seconds."""

    rate: float
    seconds: float
    column_seconds: float


def product_cost(
    place: torch.device, weight_bits: int | None, batch: int, step: float, bandwidth: float
) -> ProductCost:
    """What products with few tokens take, caches out of reach, each after a small operation.

    Args:
        place: The device.
        weight_bits: Bits of a code, groups of 128; None for bfloat16.
        batch: Tokens.
        step: Seconds of the operation between two products.
        bandwidth: Of the device; bytes of weights do not come faster.
    """
    few, many = PRODUCT_SIDES["cuda" if place.type == "cuda" else "cpu"]
    small, low, wide = (
        _product_seconds(place, weight_bits, batch, rows, columns)
        for rows, columns in ((few, few), (many, few), (few, many))
    )
    return _line(small, low, wide[1] - low[1], few, many - few, step, bandwidth)


def _line(
    small: tuple[float, float],
    large: tuple[float, float],
    longer: float,
    columns: int,
    more_columns: int,
    step: float,
    bandwidth: float,
) -> ProductCost:
    """The cost of a product from three.

    Args:
        small: Bytes and seconds of a weight of `columns`.
        large: Of one with more rows.
        longer: Seconds that a weight of the large one's bytes takes longer with more columns.
        columns: Of both.
        more_columns: That the third has more.
        step: Seconds of the small operation that is in all of them.
        bandwidth: Bytes of weights do not come faster; a line through two sizes can say so where
            the small one leaves part of the device idle.
    """
    more = large[1] - small[1]
    rate = min(bandwidth, (large[0] - small[0]) / more) if more > 0 else bandwidth
    beyond = sum(seconds - stored / rate for stored, seconds in (small, large)) / 2 - step
    column_seconds = min(max(0.0, longer / more_columns), max(0.0, beyond) / columns)
    return ProductCost(rate, max(0.0, beyond) - columns * column_seconds, column_seconds)


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
    between = _small_operation(place, batch, min(rows, columns))  # the same one for all sizes
    x_BI = torch.zeros(batch, columns, device=place, dtype=torch.bfloat16)

    def all_calls() -> None:
        for call in calls:
            between()
            call(x_BI)

    with torch.inference_mode():
        seconds = _seconds(_replayed(all_calls, place), place)
    return stored, seconds / len(calls)


def attention_seconds(place: torch.device, batch: int, step: float) -> float | None:
    """Seconds of the attention that a step runs, beyond `step` of the small operation before it.

    None where attention is no kernel of our own.
    """
    if place.type != "cuda":
        return None
    try:
        from pocketlm.runtime.decode_kernels import attend
    except ImportError:  # no Triton
        return None
    K, G, D = HEADS
    keys_BKND = torch.zeros(batch, K, 2 * POSITIONS, D, device=place, dtype=torch.bfloat16)
    values_BKND = torch.zeros_like(keys_BKND)
    slot_1 = torch.full((1,), POSITIONS - 1, device=place)
    pad_B = torch.zeros(batch, device=place, dtype=torch.long)
    done_P = torch.zeros(batch * K, device=place, dtype=torch.int32)
    between, count = _small_operation(place, batch, K * G * D), 100

    def chain() -> None:
        for _ in range(count):
            q_BHD = between().view(batch, K * G, D)
            attend(q_BHD, keys_BKND, values_BKND, slot_1, pad_B, D**-0.5, None, done_P)

    with torch.inference_mode():
        return max(0.0, _seconds(_replayed(chain, place), place) / count - step)


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
