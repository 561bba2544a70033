"""llama-quantize, through the library of llama-cpp-python: the peer of our GGUF files.

Calls `llama_model_quantize`, which is all that the program llama-quantize does, with an importance
matrix handed over in memory. Runs in an environment that has llama-cpp-python 0.3.36 and numpy.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy

FTYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a GGUF file in F32 or F16")
    parser.add_argument("output", type=Path)
    parser.add_argument("mix", choices=sorted(FTYPES))
    parser.add_argument("--imatrix", type=Path, help=".npz: tensor → mean squared input by column")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def importance(path: Path) -> tuple[ctypes.Array, list[object]]:
    """The library's array of importance data, closed by an empty entry, and what it points to."""
    stored, held, entries = numpy.load(path), [], []
    for name in stored.files:
        values = numpy.ascontiguousarray(stored[name], dtype=numpy.float32)
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries.append(llama_cpp.llama_model_imatrix_data(name.encode(), pointer, values.size))
        held.append(values)
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries), held


def main() -> None:
    """Quantizes; ends with exit code 1 where the library refuses."""
    arguments = parse()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = arguments.threads, FTYPES[arguments.mix]
    data = None
    if arguments.imatrix is not None:
        data, _held = importance(arguments.imatrix)
        params.imatrix = ctypes.cast(data, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    source, output = (str(path).encode() for path in (arguments.source, arguments.output))
    failed = llama_cpp.llama_model_quantize(source, output, ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize gave {failed}")


if __name__ == "__main__":
    main()
