"""Pruning: weights along four axes, or whole blocks, heads, channels and experts.

Weights: score, pattern, allocation, repair, each a few small functions. `scores` says what a weight
is worth, `patterns` which weights are compared and kept, `allocation` how sparse each linear
becomes; `sweep`, `admm`, `dsnot` and `tune` what the kept weights do for the others. `steps` puts
them together under the names of the literature.

Structure: `depth` removes blocks, `width` heads and channels by an `importance`, `experts` experts;
`slicegpt` rotates the hidden size and cuts it. Each gives edits that make a smaller model.
"""
