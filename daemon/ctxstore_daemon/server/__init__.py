"""What the daemon says to its clients, without sockets: sessions, data connections, credits.

Takes bytes and returns bytes; `runtime` carries them. It must not wait, and never moves payload.
"""
