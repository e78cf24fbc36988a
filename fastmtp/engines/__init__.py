"""Serving engines: each module knows one engine's command line and contract; process.py starts and stops
them.
"""
