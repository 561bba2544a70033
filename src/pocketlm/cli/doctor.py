"""What this machine has, and which kernels run here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from pocketlm.cli import draw
from pocketlm.cli.options import Json
from pocketlm.cli.output import Answer
from pocketlm.report.words import bytes_text

if TYPE_CHECKING:
    from pocketlm.runtime.doctor import DoctorReport


def run(json: Json = False) -> Answer:
    """Show versions, memory, devices, and which bits and groups have a kernel.

    Example: [bold]pocketlm doctor[/bold]
    """
    from pocketlm.runtime.doctor import doctor

    found = doctor()
    return Answer(found, lambda console: _draw(console, found))


def _draw(console: Console, found: DoctorReport) -> None:
    draw.facts(
        console,
        "Machine",
        {
            "system": f"{found.system}, Python {found.python}",
            "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
            "processor": f"{found.cores} cores, {found.threads} threads in use",
            "memory": f"{bytes_text(found.memory_available_bytes)} available",
            "step in C": found.step_in_c,
            "kernels of compression": found.compression_kernels,
            "disk": f"{bytes_text(found.disk_free_bytes)} free at {found.disk_path}",
        },
    )
    devices = [
        (line.device, line.name, bytes_text(line.memory_bytes), line.dtype, line.dtype_reason)
        for line in found.devices
    ]
    draw.table(console, ("\ndevice", "name", "memory>", "computes in", "because"), devices)
    packages = [(line.name, line.version or "absent", line.enables) for line in found.packages]
    draw.table(console, ("\noptional package", "version", "for"), packages)
    kernels = [
        (line.device, line.dtype, line.bits, ", ".join(line.groups), line.kernel, line.reason)
        for line in found.kernels
    ]
    draw.table(console, ("\ndevice", "dtype", "bits>", "groups", "kernel", "because"), kernels)
