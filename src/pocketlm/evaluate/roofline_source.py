"""From what a user names to a roofline: the model's shape, the device, and perhaps a run of it."""

from __future__ import annotations

from pathlib import Path

from pocketlm.core.errors import ConfigError
from pocketlm.evaluate.devices import AUTO
from pocketlm.evaluate.devices import device as device_of
from pocketlm.evaluate.roofline import RooflineReport, Widths, roofline
from pocketlm.evaluate.speed import measure_speed
from pocketlm.models.shape import model_shape


def roofline_source(
    source: str | Path,
    device: str,
    widths: Widths,
    *,
    batch: int,
    context: int,
    prompt: int,
    measure: bool,
    trust_remote_code: bool,
) -> RooflineReport:
    """What a device allows a model; see `pocketlm.api.roofline`.

    Args:
        source: A directory with at least config.json, or what `compress` takes.
        device: A name of `devices.json`, or ``auto``.
        widths: Bits of what is moved.
        batch: Rows.
        context: Positions that a step of decoding reads.
        prompt: Tokens of each row in the prefill.
        measure: Whether the model runs too.
        trust_remote_code: Whether code from the checkpoint may run.

    Raises:
        ConfigError: If a value is out of range, the device unknown, or not the one that is here.
    """
    if measure and device != AUTO:
        raise ConfigError(
            f"'{device}' is a data sheet, not this machine.",
            where="--measure",
            remedy="Leave --device out, or give auto.",
        )
    shape = model_shape(source, trust_remote_code=trust_remote_code)
    bits = widths.weights or shape.linears[0].bits
    packed = None if bits is None or bits >= 16 else max(2, min(8, int(bits)))
    found = roofline(
        shape,
        device_of(device, weight_bits=packed, batch=batch),
        batch=batch,
        prompt=prompt,
        context=context,
        widths=widths,
    )
    if not measure:
        return found
    run = measure_speed(
        source, device=device, batch=batch, prompt_tokens=prompt, context=context,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return found.model_copy(update={"measured": run})
