"""Checks that all books of an engine agree, for tests and simulation.

Owns no state. It must not repair anything: it returns what is wrong as text.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.limits import INLINE_BYTES_MAX
from ctxstore_daemon.engine.index import DIRTY, INLINE, LOADING, VISIBLE, WRITING

if TYPE_CHECKING:
    from ctxstore_daemon.engine.machine import Machine


def audit(machine: Machine) -> list[str]:
    """Everything that is wrong; empty when all is well."""
    wrong = [
        *machine.core.index.audit(),
        *machine.core.slabs.audit(),
        *machine.leases.audit(),
        *machine.writeback.audit(),
        *machine.puts.audit(),
        *machine.holds.audit(),
        *machine.reclaim.audit(),
    ]
    return wrong + _slots(machine) + _pins(machine) + _rows(machine) + _caps(machine)


def _slots(machine: Machine) -> list[str]:
    """Every owned slot belongs to exactly the row that says so."""
    core = machine.core
    index = core.index
    owned = {}
    for slab in core.slabs.slabs():
        for page in slab.used_pages():
            if core.slabs.owner_at[page]:
                owned[page] = core.slabs.owner_at[page]
    expected = {
        int(index.slot[row]): row for row in np.flatnonzero(index.slot[: index.high]).tolist()
    }
    expected |= {load.slot: row for row, load in machine.loads.loading.items()}
    return [] if owned == expected else [f"slots owned {owned}, expected {expected}"]


def _pins(machine: Machine) -> list[str]:
    """Every pin has its reason: lease, waiting get, sender, copy, offer, read or group."""
    core = machine.core
    pins: Counter[int] = Counter()
    for pages in machine.leases.pins():
        pins.update(pages.tolist())
    for stream in machine.gets.streams.values():
        pins.update(stream.slots.tolist())
    for waiting in machine.gets.waiting_pins():
        pins.update(waiting)
    pins.update(machine.puts.pins())
    for loads in machine.loads.reads.values():
        pins.update(load.slot for load in loads)
    if machine.writeback.group is not None:
        pins.update(slot for slot in machine.writeback.group.slots if slot)
    pins.update(machine.checks.pins())
    found = {page: int(core.slabs.pins[page]) for page in np.flatnonzero(core.slabs.pins).tolist()}
    return [] if found == dict(pins) else [f"pins {found}, expected {dict(pins)}"]


def _rows(machine: Machine) -> list[str]:
    core = machine.core
    index = core.index
    wrong = []
    claimed = machine.puts.claimed_rows()
    for names in index.maps:
        for row in names.values():
            flags = index.flags_at[row]
            here = bool(index.slot_at[row]) or bool(flags & INLINE)
            if not flags & VISIBLE:
                if row not in claimed:
                    wrong.append(f"row {row} is invisible and nobody is putting it")
                continue
            # One whose segment was reclaimed while it was read lives on in the slot it comes to.
            if not here and index.segment_at[row] < 0 and not flags & LOADING:
                wrong.append(f"row {row} is visible but has no copy")
            if flags & (DIRTY | WRITING) and not here:
                wrong.append(f"row {row} is dirty but not in memory")
            if bool(flags & LOADING) != (row in machine.loads.loading):
                wrong.append(f"row {row}: loading flag is wrong")
            if index.slot_at[row] and not core.policy.contains(row):
                wrong.append(f"row {row} is in memory but no eviction queue has it")
            segment = index.segment_at[row]
            if segment >= 0 and segment not in machine.extents.segments:
                wrong.append(f"row {row} is in segment {segment}, which is not there")
    for number, used in enumerate(core.ns_bytes):
        own = (index.ns[: index.high] == number) & (index.birth[: index.high] > 0)
        stored = int(index.length[: index.high][own].sum(dtype=np.int64))
        if stored > used:
            wrong.append(f"namespace {number}: {used} bytes counted, {stored} stored")
    return wrong


def _caps(machine: Machine) -> list[str]:
    core = machine.core
    wrong = []
    if core.index.count > core.settings.entries_max:
        wrong.append("more rows than entries_max")
    lengths = core.index.length[: core.index.high]
    inline = int(lengths[lengths <= INLINE_BYTES_MAX].sum(dtype=np.int64))
    if inline != core.inline_bytes:
        wrong.append(f"{core.inline_bytes} inline bytes counted, {inline} found")
    if inline > core.settings.inline_bytes_max and not machine.holds.ends:
        wrong.append("more inline bytes than memory has room for")
    if machine.holds.held_bytes > machine.holds.share_bytes and machine.holds.ends:
        wrong.append("holds keep more than their share")
    for number, namespace in enumerate(core.settings.namespaces):
        if namespace.quota_bytes and core.ns_bytes[number] > namespace.quota_bytes:
            wrong.append(f"namespace {namespace.name} is over its quota")
    return wrong
