"""The node engine: pure decisions. Takes events, returns instructions, per batch.

Nothing here touches clock, disk, socket or thread; `executor` carries the instructions out.
"""
