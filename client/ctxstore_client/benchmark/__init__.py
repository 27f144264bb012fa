"""`ctxstore bench`: every path of one node beside a ceiling measured in the same run.

Owns the measurements and their report. It must not time anything whose bytes it does not verify,
and it
knows the daemon only as a process it starts and a store it connects to.
"""
