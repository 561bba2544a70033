"""Bits where they matter: what each grid of each unit costs the model, and the best choice of them.

units → output errors → divergences → table → allocation → an ordinary recipe
"""
