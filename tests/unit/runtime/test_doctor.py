import torch

from pocketlm.runtime import doctor as module
from pocketlm.runtime.doctor import doctor
from pocketlm.runtime.kernels.base import Grid
from pocketlm.runtime.kernels.select import kernel_for


def test_every_grid_has_a_line_and_it_is_the_kernel_that_runs():
    report = doctor()
    cpu = [line for line in report.kernels if line.device == "cpu"]
    for bits in range(2, 9):
        for name in ("float32", "bfloat16"):
            lines = [line for line in cpu if line.bits == bits and line.dtype == name]
            groups = [group for line in lines for group in line.groups]
            assert sorted(groups) == ["128", "32", "64", "row"]
            for line in lines:
                group = 4096 if line.groups[0] == "row" else int(line.groups[0])
                grid = Grid(4096, 4096, bits, group, True)
                assert kernel_for(grid, getattr(torch, name)).kernel.name == line.kernel
                assert line.reason


def test_report_is_plain_and_whole():
    report = doctor()
    assert report.model_validate_json(report.model_dump_json()) == report
    assert (
        report.versions["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    )
    assert report.devices[0].device == "cpu"
    assert report.memory_available_bytes > 0
    assert report.disk_free_bytes > 0


def test_kernels_of_compression_are_named_or_why_not(monkeypatch):
    assert torch.cuda.is_available() or "no GPU" in doctor().compression_kernels
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for trouble, said in ((None, "yes"), ("OSError: no gcc", "no: OSError: no gcc")):
        monkeypatch.setattr(module, "kernel_trouble", lambda trouble=trouble: trouble)
        assert doctor().compression_kernels == said
