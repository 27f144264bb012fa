"""The rim of the daemon: event loop, sockets, threads, real clock, real disk, signals.

Everything that waits or touches the machine stands here; what decides stands above in `engine`,
`server` and `node`, which run unchanged on a virtual clock.
"""
