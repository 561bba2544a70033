"""Quantization methods, one file each: a config class and pure functions over core."""
