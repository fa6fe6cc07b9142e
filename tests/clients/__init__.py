"""Rollout clients and routers as they are on PyPI, each in an environment of its own.

A script here is run by the Python of that environment with the URL of a server and the
folder of its tokenizer, and prints what the client made of the answers as JSON.
"""
