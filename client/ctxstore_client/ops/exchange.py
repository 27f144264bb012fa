"""How plans talk over one link: borrow it, ask, find the answer, give it back in one piece.

Owns the rule which errors leave a link usable, the one retry on a stale link, and the time a daemon
is granted. Must not know any particular operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from ctxstore import limits
from ctxstore.errors import (
    ClosedError,
    CtxStoreError,
    DeadlineExceeded,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
)
from ctxstore.wire.messages import Failure, Message, error_from_failure
from ctxstore_client.ops.requests import (
    Acquire,
    Context,
    Link,
    Plan,
    Purpose,
    Receive,
    Send,
)

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
R = TypeVar("R")

_BREAKING: Final = (TransportError, ProtocolError, DeadlineExceeded)
"""After these the link is out of step with its peer; other errors are answers of the daemon."""

_ANSWER_SHARE: Final = 0.9
_ANSWER_SLACK_S_MAX: Final = 0.05


def on_link(
    context: Context,
    purpose: Purpose,
    body: Callable[[Link], Plan[T]],
    *,
    staging_bytes: int = 0,
) -> Plan[T]:
    """Run `body` on a borrowed link; on another one when a used link turns out to be dead.

    A link that served before may have died since, with its daemon restarted behind it. All plans
    can be begun again: they continue with the keys that have no verdict yet.
    """
    lost: TransportError | None = None
    while True:
        try:
            link: Link = yield Acquire(purpose, staging_bytes)
        except ClosedError:
            if lost is None:
                raise
            # It was the store's close that took the first link away.
            raise lost from None
        stale = not link.fresh
        try:
            result = yield from body(link)
        except DeadlineExceeded:
            context.pool.discard(link)
            raise
        except TransportError as error:
            context.pool.discard(link)
            if not stale or context.deadline.remaining_s() <= 0:
                raise
            lost = error
            context.pool.count("retries")
        except CtxStoreError as error:
            _part_with(context, link, error)
            raise
        except BaseException:
            context.pool.discard(link)
            raise
        else:
            context.pool.give_back(link)
            return result


def with_link(context: Context, link: Link, plan: Plan[T]) -> Plan[T]:
    """Run `plan` on a link that was acquired for it, and part with the link afterwards."""
    try:
        result = yield from plan
    except CtxStoreError as error:
        _part_with(context, link, error)
        raise
    except BaseException:
        context.pool.discard(link)
        raise
    context.pool.give_back(link)
    return result


def _part_with(context: Context, link: Link, error: CtxStoreError) -> None:
    """Keep a link only when the error was an answer and nothing else is on its way."""
    if isinstance(error, _BREAKING) or not link.settled:
        context.pool.discard(link)
    else:
        context.pool.give_back(link)


def ask(link: Link, request: Message, answer: type[R]) -> Plan[R]:
    """Send a request and wait for its reply; a Failure is raised as the error it stands for."""
    yield Send(link, link.encode(request))
    return (yield from answer_to(link, request.rid, answer))


def answer_to(link: Link, rid: int, answer: type[R]) -> Plan[R]:
    """The reply to request `rid`, whatever arrives before it."""
    while True:
        message = link.parked.pop(rid, None)
        if message is None:
            arrived: Message = yield Receive(link)
            if isinstance(arrived, Failure) and arrived.rid == 0:
                raise _as_broken(arrived)
            if arrived.rid != rid:
                link.parked[arrived.rid] = arrived
                continue
            message = arrived
        if isinstance(message, Failure):
            raise _error_of(message)
        if not isinstance(message, answer):
            raise RemoteProtocolError(
                f"expected {answer.__name__}, the daemon sent {type(message).__name__}"
            )
        return message


def _as_broken(failure: Failure) -> CtxStoreError:
    """The error of a failure after which the daemon closes the connection."""
    error = _error_of(failure)
    return TransportError(str(error)) if error.retryable else error


def _error_of(failure: Failure) -> CtxStoreError:
    error = error_from_failure(failure)
    # A node that is shutting down is to its clients one that cannot be reached.
    return TransportError(str(error)) if isinstance(error, ClosedError) else error


def timeout_us(context: Context) -> int:
    """Time for the daemon, a little less than the caller's: its verdict must arrive too.

    Raises DeadlineExceeded when nothing is left.
    """
    remaining = context.deadline.remaining_s()
    if remaining <= 0:
        raise DeadlineExceeded("the deadline passed before the request was sent")
    granted = max(remaining * _ANSWER_SHARE, remaining - _ANSWER_SLACK_S_MAX)
    return max(1, int(min(granted, limits.REQUEST_TIMEOUT_S_MAX) * 1e6))
