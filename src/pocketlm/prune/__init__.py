"""Pruning methods, one file each; they import core only."""
