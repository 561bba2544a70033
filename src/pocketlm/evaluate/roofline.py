"""What a model's operators ask of a device: intensity, what bounds each, the time of a pass.

Time of an operator ≥ max(operations / rate, bytes / bandwidth) (Williams, Waterman, Patterson:
Roofline, 2009; the analysis by operators as in LLM-Viewer, arXiv:2402.16363, with dense peaks). The
sum over operators is the bound. Where the device was measured, a prediction stands beside it: bytes
of weights at the rate the product kernel reaches, and what each operation costs beyond its bytes:
products by their columns, attention as a kernel of its own, the rest as a small operation.

Counted: weights once a pass, experts as often as they are hit on average, inputs and outputs of
each operator, keys and values once for each row. Attention does not write its scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from pocketlm.core.errors import ConfigError
from pocketlm.evaluate.devices import Device
from pocketlm.evaluate.results import Result, SpeedReport
from pocketlm.models.shape import LinearShape, ModelShape

JOINED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # one product in our runtime


@dataclass(frozen=True)
class Widths:
    """Bits of what is moved.

    Attributes:
        weights: Of the blocks' linears; None: as stored.
        head: Of the head; None: as stored.
        activations: Of inputs and outputs, which also decides the units that multiply.
        cache: Of keys and values.
    """

    weights: float | None = None
    head: float | None = None
    activations: int = 16
    cache: int = 16

    def __post_init__(self) -> None:
        for name, bits in vars(self).items():
            if bits is not None and not 1 <= bits <= 32:
                raise ConfigError(f"{bits} bits of {name} are not in 1 … 32.", where="roofline")


class Operator(Result):
    """One operator, all its occurrences in a pass together.

    Attributes:
        name: Such as ``mlp.down_proj`` or ``attention``.
        count: Occurrences.
        operations: Multiplications and additions.
        weight_bytes: Read.
        activation_bytes: Read and written.
        cache_bytes: Of keys and values, read and written.
        intensity: Operations for each byte.
        bound: ``memory`` or ``compute``.
        seconds: At the device's peaks.
    """

    name: str
    count: int
    operations: float
    weight_bytes: float
    activation_bytes: float
    cache_bytes: float
    intensity: float
    bound: str
    seconds: float


class Pass(Result):
    """A prefill, or one step of decoding.

    Attributes:
        name: ``prefill`` or ``decode``.
        tokens: Computed in it, of all rows.
        operators: In order.
        operations: Sum.
        bytes_moved: Sum.
        seconds: At the device's peaks: no pass takes less.
        predicted_seconds: As the measured device should take; None where it was not measured.
        tokens_per_second: Tokens over seconds, of the bound.
        predicted_tokens_per_second: Of the prediction.
    """

    name: str
    tokens: int
    operators: tuple[Operator, ...]
    operations: float
    bytes_moved: float
    seconds: float
    predicted_seconds: float | None
    tokens_per_second: float
    predicted_tokens_per_second: float | None


class RooflineReport(Result):
    """A model on a device.

    Attributes:
        model: Its name.
        device: What bounds it.
        batch: Rows.
        prompt: Tokens of each row in the prefill.
        context: Positions that a step of decoding reads.
        weight_bits: Of the blocks' linears, mean.
        head_bits: Of the head.
        activation_bits: As given.
        cache_bits: As given.
        weight_bytes: Of linears and head.
        cache_bytes: Of all rows at `context`.
        fits: Whether both fit into the device's memory.
        ridge: Operations for each byte from which the units, not the memory, bound.
        prefill: The pass over the prompt.
        decode: One step.
        measured: What the model did here; None where it was not run.
    """

    model: str
    device: Device
    batch: int
    prompt: int
    context: int
    weight_bits: float
    head_bits: float
    activation_bits: int
    cache_bits: int
    weight_bytes: float
    cache_bytes: float
    fits: bool
    ridge: float
    prefill: Pass
    decode: Pass
    measured: SpeedReport | None = None


def roofline(
    shape: ModelShape,
    device: Device,
    *,
    batch: int = 1,
    prompt: int = 512,
    context: int = 1024,
    widths: Widths | None = None,
) -> RooflineReport:
    """Bounds of prefill and decoding.

    Args:
        shape: Of the model.
        device: Known or measured.
        batch: Rows.
        prompt: Tokens of each in the prefill.
        context: Positions that a step reads.
        widths: Bits; None: weights as stored, the rest 16.

    Raises:
        ConfigError: If a count is below 1.
    """
    widths = widths or Widths()
    if min(batch, prompt, context) < 1:
        raise ConfigError(
            f"batch {batch}, prompt {prompt}, context {context}: each is at least 1.",
            where="roofline",
        )
    weights = sum(
        each.count * each.experts * _weight_bytes(each, shape, widths) for each in shape.linears
    )
    values = sum(each.count * each.experts * each.rows * each.columns for each in shape.linears)
    head_bytes = _weight_bytes(shape.head, shape, widths)
    cache = batch * sum(
        shape.cache_values * min(context, window or context) * widths.cache / 8
        for window in shape.windows
    )
    return RooflineReport(
        model=shape.name,
        device=device,
        batch=batch,
        prompt=prompt,
        context=context,
        weight_bits=8 * weights / values,
        head_bits=8 * head_bytes / (shape.head.rows * shape.head.columns),
        activation_bits=widths.activations,
        cache_bits=widths.cache,
        weight_bytes=weights + head_bytes,
        cache_bytes=cache,
        fits=weights + head_bytes + cache <= device.memory_bytes,
        ridge=device.rate(_units(widths)) / device.bandwidth,
        prefill=_pass("prefill", shape, device, widths, batch, prompt, None),
        decode=_pass("decode", shape, device, widths, batch, 1, context),
    )


@dataclass(frozen=True)
class _Load:
    """An operator before the device is known; numbers of all its occurrences."""

    name: str
    count: int
    operations: float
    weight_bytes: float
    activation_bytes: float
    cache_bytes: float
    launches: int
    columns: int = 0  # of a product
    is_attention: bool = False


def _pass(
    name: str,
    shape: ModelShape,
    device: Device,
    widths: Widths,
    batch: int,
    new: int,
    context: int | None,
) -> Pass:
    rate = device.rate(_units(widths))
    operators, predicted = [], 0.0
    for load in _loads(shape, widths, batch, new, context):
        moved = load.weight_bytes + load.activation_bytes + load.cache_bytes
        computing, moving = load.operations / rate, moved / device.bandwidth
        operators.append(
            Operator(
                name=load.name,
                count=load.count,
                operations=load.operations,
                weight_bytes=load.weight_bytes,
                activation_bytes=load.activation_bytes,
                cache_bytes=load.cache_bytes,
                intensity=load.operations / moved,
                bound="compute" if computing > moving else "memory",
                seconds=max(computing, moving),
            )
        )
        if device.product_share is not None and device.step_seconds is not None:
            lost = load.weight_bytes / device.bandwidth * (1 / device.product_share - 1)
            predicted += max(computing, moving + lost) + load.launches * _each(load, device)
    tokens, seconds = batch * new, sum(operator.seconds for operator in operators)
    return Pass(
        name=name,
        tokens=tokens,
        operators=tuple(operators),
        operations=sum(operator.operations for operator in operators),
        bytes_moved=sum(o.weight_bytes + o.activation_bytes + o.cache_bytes for o in operators),
        seconds=seconds,
        predicted_seconds=predicted or None,
        tokens_per_second=tokens / seconds,
        predicted_tokens_per_second=tokens / predicted if predicted else None,
    )


def _each(load: _Load, device: Device) -> float:
    """Seconds of a launch beyond its bytes."""
    if load.columns:
        return (device.product_seconds or 0.0) + load.columns * device.column_seconds
    small = device.step_seconds or 0.0
    if load.is_attention and device.attention_seconds is not None:
        return (small + device.attention_seconds) / 2  # rotation is a launch too
    return small


def _loads(
    shape: ModelShape, widths: Widths, batch: int, new: int, context: int | None
) -> Iterator[_Load]:
    """All operators of a pass over `new` tokens of each row, in order."""
    tokens, value = batch * new, widths.activations / 8
    seen_names: set[int] = set()
    yield _Load(
        "embedding", 1, 0.0, tokens * shape.hidden * 2.0, tokens * shape.hidden * value, 0.0, 1
    )
    yield _Load(
        "norms and residuals",
        2 * shape.blocks + 1,
        (2 * shape.blocks + 1) * 6.0 * tokens * shape.hidden,
        0.0,
        (2 * shape.blocks + 1) * 4 * tokens * shape.hidden * value,
        0.0,
        2 * shape.blocks + 1,
    )
    for linear in shape.linears:
        leaf = linear.kind.rpartition(".")[2]
        group = next((at for at, names in enumerate(JOINED) if leaf in names), None)
        joined = group is not None and group in seen_names
        seen_names |= {group} if group is not None else set()
        yield _product(linear, shape, widths, tokens, 0 if joined else linear.count)
    yield from _attention(shape, widths, batch, new, context)
    yield _Load(
        "activation",
        shape.blocks,
        shape.blocks * 5.0 * tokens * shape.inner,
        0.0,
        shape.blocks * 3 * tokens * shape.inner * value,
        0.0,
        shape.blocks,
    )
    yield _product(shape.head, shape, widths, batch, 1)  # the last position of each row


def _product(
    linear: LinearShape, shape: ModelShape, widths: Widths, tokens: int, launches: int
) -> _Load:
    """A linear, or as many experts as are hit when tokens choose independently."""
    hit = linear.experts * (1 - (1 - linear.active / linear.experts) ** tokens)
    rows = tokens * linear.active
    return _Load(
        linear.kind,
        linear.count,
        linear.count * 2.0 * rows * linear.rows * linear.columns,
        linear.count * hit * _weight_bytes(linear, shape, widths),
        linear.count * rows * (linear.rows + linear.columns) * widths.activations / 8,
        0.0,
        launches,
        columns=linear.columns,
    )


def _attention(
    shape: ModelShape, widths: Widths, batch: int, new: int, context: int | None
) -> Iterator[_Load]:
    """Scores and sums over values, by window: of a prefill causal, of a step over the context."""
    value = widths.activations / 8
    for window, blocks in Counter(shape.windows).items():
        if context is None:  # position t sees t + 1 positions, at most the window
            full = min(new, window or new)
            pairs = full * (full + 1) / 2 + (new - full) * full
            read = new
        else:
            pairs = read = min(context, window or context)
        cached = batch * blocks * shape.cache_values * widths.cache / 8
        query = batch * new * shape.heads * shape.head_dim * value
        yield _Load(
            "attention" if window is None else f"attention, window {window}",
            blocks,
            blocks * batch * 4.0 * pairs * shape.heads * shape.head_dim,
            0.0,
            blocks * 2 * query,
            cached * (read + new),
            2 * blocks,  # rotation with the writing of keys and values, attention
            is_attention=True,
        )


def _weight_bytes(linear: LinearShape, shape: ModelShape, widths: Widths) -> float:
    """Bytes of one matrix."""
    wanted = widths.head if linear is shape.head else widths.weights
    bits = wanted or linear.bits or shape.dtype_bits
    return linear.rows * linear.columns * bits / 8


def _units(widths: Widths) -> str:
    """What multiplies: narrow activations run on narrow units, others as bfloat16."""
    if widths.activations <= 4:
        return "int4"
    if widths.activations <= 8:
        return "int8"
    return "bf16" if widths.activations <= 16 else "fp32"
