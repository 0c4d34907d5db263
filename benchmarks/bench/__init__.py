"""Measurements of speed and size against the plain way, one module each with `KEY` and `measure()`."""
