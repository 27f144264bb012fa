"""Thin adapters between inference engines and the store.

Each engine has a module (or package) here that is imported only by those who use it. Nothing in
this package imports torch, an engine or CUDA at import time.
"""
