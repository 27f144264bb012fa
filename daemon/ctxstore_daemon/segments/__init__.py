"""The node's files: segments of shards, the meta log, the identity.

Owns every byte below the data directory except the lock and the published addresses. It must not
decide what to keep: the engine does; here bytes are laid out, made durable, found and checked.
"""
