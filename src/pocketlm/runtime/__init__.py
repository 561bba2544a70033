"""Runs models from packed weights; heavy imports happen in the modules, not here."""
