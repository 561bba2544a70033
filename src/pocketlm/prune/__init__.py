"""Pruning along four axes: score, pattern, allocation, repair. Each is a few small functions.

`scores` says what a weight is worth, `patterns` which weights are compared and kept, `allocation`
how sparse each linear becomes; `sweep`, `admm`, `dsnot` and `tune` what the kept weights do for the
others. `steps` puts them together under the names of the literature.
"""
