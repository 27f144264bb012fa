"""Test doubles that are shipped: a virtual clock, a disk that fails, a network that cuts.

Owns what lets a whole node run in one process and replay exactly from a seed. Nothing that is
shipped to run may import it.
"""
