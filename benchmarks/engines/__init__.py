"""Serving engines on a machine without a GPU."""
