"""Measures a served model: accept length, speed and losslessness on seven benchmarks. See
docs/evaluate.md.
"""
