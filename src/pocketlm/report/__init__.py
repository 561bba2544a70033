"""Typed results become one self-contained HTML page."""
