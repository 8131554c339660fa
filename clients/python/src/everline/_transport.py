"""The transports: what `_policy` decides, done with httpx or httpx2, with or without ``await``."""

from __future__ import annotations

import asyncio
import time
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, AsyncIterator, Iterator, Optional

from ._policy import (
    MAX_ERROR_BODY,
    Exchange,
    Options,
    Patience,
    Read,
    Script,
    Send,
    Sleep,
    exchange_of,
    is_broken,
    is_unsent,
    module_of,
    route_of,
    wants_stream,
)

if TYPE_CHECKING:
    from typing_extensions import Self


def _stream_class(module: ModuleType, name: str, ours: type) -> type:
    """`ours` as a byte stream of httpx or httpx2, which their clients insist on."""
    key = (module.__name__, name)
    if key not in _STREAMS:
        _STREAMS[key] = type(ours.__name__, (ours, getattr(module, name)), {})
    return _STREAMS[key]


_STREAMS: dict[tuple[str, str], type] = {}


def _unpooled(module: ModuleType, kind: str, kwargs: dict[str, Any]) -> Any:
    """A transport that makes a new connection for every request."""
    kwargs = {**kwargs, "limits": module.Limits(max_keepalive_connections=0), "http2": False}
    return getattr(module, kind)(**kwargs)


def _default(module: Optional[ModuleType]) -> ModuleType:
    if module is not None:
        return module
    try:
        import httpx

        return httpx
    except ImportError:
        import httpx2  # type: ignore[import-not-found, unused-ignore]

        found: ModuleType = httpx2
        return found


def _prepared(module: ModuleType, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with one TLS context for both transports: reading certificates takes long."""
    verify = kwargs.get("verify", True)
    if verify is True and not kwargs.get("cert"):
        kwargs = {**kwargs, "verify": module.create_ssl_context(trust_env=kwargs.get("trust_env", True))}
    return kwargs


class EverlineTransport:
    """An httpx transport under which streams outlive the replica that carries them.

    ``httpx.Client(transport=EverlineTransport())`` for whatever takes an httpx client; with
    ``module=httpx2`` the same for httpx2. `inner` does the first requests, `resume_transport` the
    resumptions, which must each come over a connection of their own; both are made here, with
    `transport_options` (``verify``, ``cert``, ``proxy`` …), unless they are given.
    """

    def __init__(
        self,
        inner: Optional[Any] = None,
        *,
        options: Optional[Options] = None,
        resume_transport: Optional[Any] = None,
        module: Optional[ModuleType] = None,
        **transport_options: Any,
    ) -> None:
        self.options = options or Options()
        kwargs = transport_options
        if inner is None:
            module = _default(module)
            kwargs = _prepared(module, kwargs)
            resume_transport = resume_transport or _unpooled(module, "HTTPTransport", kwargs)
            inner = module.HTTPTransport(**kwargs)
        elif kwargs:
            raise TypeError(f"{', '.join(kwargs)}: give these to the inner transport, which you made yourself")
        self._inner = inner
        self._fresh = resume_transport or inner

    def handle_request(self, request: Any) -> Any:
        """Called by httpx for every request."""
        route = route_of(request)
        if route is not None:
            content = request.read()
            if wants_stream(content):
                exchange = exchange_of(self.options, request, route, content)
                return self._wrapped(exchange, self._run(exchange.begin()))
        return self._run(_plain(self.options, request))

    def _wrapped(self, exchange: Exchange, response: Any) -> Any:
        if exchange.is_watched(response):
            response.stream = _stream_class(exchange.module, "SyncByteStream", _Body)(self, exchange, response)
        return response

    def _run(self, script: Script) -> Any:
        """Does what a script says."""
        told: Any = None
        while True:
            try:
                step = script.send(told)
            except StopIteration as done:
                return done.value
            told = None
            try:
                if isinstance(step, Sleep):
                    time.sleep(step.seconds)
                elif isinstance(step, Send):
                    told = (self._fresh if step.fresh else self._inner).handle_request(step.request)
                else:
                    told = self._read(step)
            except Exception as error:  # noqa: BLE001 - the script raises what it does not know
                told = error

    @staticmethod
    def _read(step: Read) -> bytes:
        body = bytearray()
        try:
            for chunk in step.response.stream if step.wanted else ():
                body += chunk
                if len(body) >= MAX_ERROR_BODY:
                    break
        finally:
            step.response.close()
        return bytes(body)

    def close(self) -> None:
        """Closes both transports."""
        self._inner.close()
        if self._fresh is not self._inner:
            self._fresh.close()

    def __enter__(self) -> Self:
        self._inner.__enter__()
        if self._fresh is not self._inner:
            self._fresh.__enter__()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]] = None,
        error: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> None:
        self._inner.__exit__(kind, error, traceback)
        if self._fresh is not self._inner:
            self._fresh.__exit__(kind, error, traceback)


class AsyncEverlineTransport:
    """`EverlineTransport` for ``httpx.AsyncClient`` and ``httpx2.AsyncClient``."""

    def __init__(
        self,
        inner: Optional[Any] = None,
        *,
        options: Optional[Options] = None,
        resume_transport: Optional[Any] = None,
        module: Optional[ModuleType] = None,
        **transport_options: Any,
    ) -> None:
        self.options = options or Options()
        kwargs = transport_options
        if inner is None:
            module = _default(module)
            kwargs = _prepared(module, kwargs)
            resume_transport = resume_transport or _unpooled(module, "AsyncHTTPTransport", kwargs)
            inner = module.AsyncHTTPTransport(**kwargs)
        elif kwargs:
            raise TypeError(f"{', '.join(kwargs)}: give these to the inner transport, which you made yourself")
        self._inner = inner
        self._fresh = resume_transport or inner

    async def handle_async_request(self, request: Any) -> Any:
        """Called by httpx for every request."""
        route = route_of(request)
        if route is not None:
            content = await request.aread()
            if wants_stream(content):
                exchange = exchange_of(self.options, request, route, content)
                response = await self._run(exchange.begin())
                if exchange.is_watched(response):
                    body = _stream_class(exchange.module, "AsyncByteStream", _AsyncBody)
                    response.stream = body(self, exchange, response)
                return response
        return await self._run(_plain(self.options, request))

    async def _run(self, script: Script) -> Any:
        """Does what a script says."""
        told: Any = None
        while True:
            try:
                step = script.send(told)
            except StopIteration as done:
                return done.value
            told = None
            try:
                if isinstance(step, Sleep):
                    await _sleep(step.seconds)
                elif isinstance(step, Send):
                    told = await (self._fresh if step.fresh else self._inner).handle_async_request(step.request)
                else:
                    told = await self._read(step)
            except Exception as error:  # noqa: BLE001 - the script raises what it does not know
                told = error

    @staticmethod
    async def _read(step: Read) -> bytes:
        body = bytearray()
        try:
            if step.wanted:
                async for chunk in step.response.stream:
                    body += chunk
                    if len(body) >= MAX_ERROR_BODY:
                        break
        finally:
            await step.response.aclose()
        return bytes(body)

    async def aclose(self) -> None:
        """Closes both transports."""
        await self._inner.aclose()
        if self._fresh is not self._inner:
            await self._fresh.aclose()

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        if self._fresh is not self._inner:
            await self._fresh.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: Optional[type[BaseException]] = None,
        error: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> None:
        await self._inner.__aexit__(kind, error, traceback)
        if self._fresh is not self._inner:
            await self._fresh.__aexit__(kind, error, traceback)


def _plain(options: Options, request: Any) -> Script:
    """Any other request: sent as it is; tried again only while nothing of it was sent."""
    patience = Patience(options, options.connect_budget)
    module = module_of(request)
    while True:
        answer = yield Send(request, fresh=False)
        if not isinstance(answer, Exception):
            return answer
        pause = patience.next_pause() if is_unsent(module, answer) else None
        if pause is None:
            raise answer
        yield Sleep(pause)


async def _sleep(seconds: float) -> None:
    # anyio is what httpx runs on, so that trio works as well; without it there is only asyncio.
    try:
        import anyio
    except ImportError:
        await asyncio.sleep(seconds)
    else:
        await anyio.sleep(seconds)


class _Body:
    """The body of a stream, over all the connections that it takes."""

    def __init__(self, transport: EverlineTransport, exchange: Exchange, response: Any) -> None:
        self._transport = transport
        self._exchange = exchange
        self._response = response
        #: What is read now; httpx replaces the stream of the first response by this object.
        self._stream = response.stream
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        exchange, events = self._exchange, self._exchange.events
        while True:
            error: Optional[Exception] = None
            source = iter(self._stream)
            while events.fault is None:
                try:
                    chunk = next(source, None)
                except Exception as raised:  # noqa: BLE001 - looked at below
                    error = raised
                    break
                if chunk is None:
                    break
                exchange.patience.heard()
                count, whole = events.count, events.feed(chunk)
                if events.count != count:
                    exchange.patience.progressed()
                if whole:
                    yield whole
            if error is not None and not is_broken(exchange.module, error):
                raise error
            if events.ended:
                return
            if self._closed:
                raise exchange.module.StreamClosed()
            self._close_stream()
            response = self._transport._run(exchange.resume(error))
            self._stream = response.stream

    def _close_stream(self) -> None:
        try:
            self._stream.close()
        except Exception:  # noqa: BLE001 - it is broken, or of no use any more
            pass

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._close_stream()
        self._cancel()

    def _cancel(self) -> None:
        request = self._exchange.cancellation()
        if request is None:
            return
        try:
            self._transport._fresh.handle_request(request).close()
        except Exception:  # noqa: BLE001 - the cluster cancels by itself, some time later
            pass


class _AsyncBody:
    """`_Body` with ``await``."""

    def __init__(self, transport: AsyncEverlineTransport, exchange: Exchange, response: Any) -> None:
        self._transport = transport
        self._exchange = exchange
        self._stream = response.stream
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange, events = self._exchange, self._exchange.events
        while True:
            error: Optional[Exception] = None
            source = self._stream.__aiter__()
            while events.fault is None:
                try:
                    chunk = await source.__anext__()
                except StopAsyncIteration:
                    break
                except Exception as raised:  # noqa: BLE001 - looked at below
                    error = raised
                    break
                exchange.patience.heard()
                count, whole = events.count, events.feed(chunk)
                if events.count != count:
                    exchange.patience.progressed()
                if whole:
                    yield whole
            if error is not None and not is_broken(exchange.module, error):
                raise error
            if events.ended:
                return
            if self._closed:
                raise exchange.module.StreamClosed()
            await self._close_stream()
            response = await self._transport._run(exchange.resume(error))
            self._stream = response.stream

    async def _close_stream(self) -> None:
        try:
            await self._stream.aclose()
        except Exception:  # noqa: BLE001 - it is broken, or of no use any more
            pass

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._close_stream()
        request = self._exchange.cancellation()
        if request is None:
            return
        try:
            import anyio

            # The caller may itself be cancelled just now; this is bounded by its own timeout.
            with anyio.CancelScope(shield=True):
                await self._send(request)
        except ImportError:
            await self._send(request)

    async def _send(self, request: Any) -> None:
        try:
            response = await self._transport._fresh.handle_async_request(request)
            await response.aclose()
        except Exception:  # noqa: BLE001 - the cluster cancels by itself, some time later
            pass
