"""Answers requests, as a micro service of NATS: ``nats micro ls`` finds it, and ``nats micro stats`` counts."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qmpvcpu.bus.link import Link, in_words
from qmpvcpu.errors import ServerLostError, printable

if TYPE_CHECKING:
    from nats.micro.request import Request as NatsRequest
    from nats.micro.service import Service

_LOGGER = logging.getLogger("qmpvcpu.bus")
_STOP_S: Final = 2.0
FAILED: Final = "500"


@dataclass(frozen=True)
class Request:
    """What was asked.

    Attributes:
        subject: The subject, which says who asked for what.
        data: The question.
    """

    subject: str
    data: bytes


Handler = Callable[[Request], Awaitable[bytes]]


@dataclass(frozen=True)
class Endpoint:
    """Which requests are answered, and how.

    Attributes:
        subject: Their subject; ``*`` stands for one token.
        handler: Returns the answer. Each request has a task of its own, so a long one holds up no other.
    """

    subject: str
    handler: Handler


@asynccontextmanager
async def serving(
    link: Link,
    *,
    name: str,
    version: str,
    description: str,
    metadata: Mapping[str, str],
    endpoints: Mapping[str, Endpoint],
) -> AsyncGenerator[None, None]:
    """Answer requests while the context lasts; those that are being answered at its end are cancelled.

    Raises:
        ServerForbiddenError: The server does not let this user answer one of them.
        ServerLostError: It does not answer.
    """
    running: set[asyncio.Task[None]] = set()

    def taking(endpoint: Endpoint) -> "Callable[[NatsRequest], Awaitable[None]]":
        async def take(request: "NatsRequest") -> None:
            task = asyncio.create_task(_answer(link, endpoint, request))
            running.add(task)
            task.add_done_callback(running.discard)

        return take

    service: Service | None = None

    async def start() -> None:
        nonlocal service
        import nats.errors
        from nats.micro import add_service

        asked = f"serve {name}"
        try:
            service = await add_service(
                link.client, name=name, version=version, description=description, metadata=dict(metadata)
            )
            for each, endpoint in endpoints.items():
                await service.add_endpoint(name=each, subject=endpoint.subject, handler=taking(endpoint))
        except (OSError, nats.errors.Error) as error:
            raise ServerLostError(asked, in_words(error), maybe_done=False) from error
        await link.check_subscribed(asked, [each.subject for each in endpoints.values()])

    link.on_client.add(start)
    try:
        await start()
        yield
    finally:
        link.on_client.discard(start)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        with contextlib.suppress(Exception):  # the server forgets it when the connection is closed
            async with asyncio.timeout(_STOP_S):
                if link.is_connected and service is not None:
                    await service.stop()


async def _answer(link: Link, endpoint: Endpoint, request: "NatsRequest") -> None:
    try:
        answer = await endpoint.handler(Request(request.subject, request.data))
        link.check_length(f"answer to {request.subject}", answer)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await request.respond_error(FAILED, "it was stopped meanwhile")
        raise
    except Exception as error:
        _LOGGER.exception("%s", request.subject)
        with contextlib.suppress(Exception):
            await request.respond_error(FAILED, printable(f"{type(error).__name__}: {error}")[:1000])
    else:
        with contextlib.suppress(Exception):  # who asked is told by the silence
            await request.respond(answer)
