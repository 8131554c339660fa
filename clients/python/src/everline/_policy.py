"""What is resumed, when it is tried again, and for how long: one set of rules for both transports.

The rules are generators that say what to do next (`Send`, `Sleep`, `Read`) and are told how it
went; `_transport` does it, with or without ``await``.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Callable, Generator, Optional, Sequence, Union
from urllib.parse import urlsplit

from ._events import Events, number_of

#: Routes whose streams are resumed, behind the ``/v1/`` of a path.
ROUTES = ("chat/completions", "completions", "messages", "responses")
#: Answers of a replica that may be different a moment later, or from another replica.
PASSING = frozenset({408, 429, 500, 502, 503, 504})
#: Most of an error's body that is read for its message.
MAX_ERROR_BODY = 64 << 10
#: Headers of the first request that say nothing about a resumption.
OF_THE_BODY = ("content-length", "content-type", "content-encoding", "transfer-encoding", "expect")


@dataclass(frozen=True)
class Options:
    """How patient a transport is. Times are in seconds."""

    #: How long a stream may make no progress while nobody can be reached: 30.
    retry_budget: float = 30.0
    #: How long connecting is tried again for requests of which nothing was sent yet: 5.
    connect_budget: float = 5.0
    #: What the cluster sends in silence, `streams.heartbeat`: 5.
    heartbeat: float = 5.0
    #: A connection silent for this long is dead; by default 1.75 heartbeats.
    stall_timeout: Optional[float] = None
    #: Longest wait for the head of the first answer before the request is sent again, with the
    #: same key. By default as long as the client's own read timeout, and then it is not sent again.
    head_timeout: Optional[float] = None
    #: Longest wait for the head of a resumption: 5.
    resume_head_timeout: float = 5.0
    #: Longest wait for a connection when resuming: 2.
    resume_connect_timeout: float = 2.0
    #: Shortest pause between two attempts, after the first, which comes at once: 0.02.
    backoff_min: float = 0.02
    #: Longest pause between two attempts: 1.
    backoff_max: float = 1.0
    #: How long an early close may take to tell the cluster: 1.
    cancel_timeout: float = 1.0
    #: Whether an early close cancels the generation.
    cancel_on_close: bool = True
    #: Further addresses of the same cluster, such as ``https://r2.example:8080``, tried in turn.
    base_urls: Sequence[str] = ()

    @property
    def silence(self) -> float:
        """How long a connection may be silent."""
        return 1.75 * self.heartbeat if self.stall_timeout is None else self.stall_timeout

    def __post_init__(self) -> None:
        for base in self.base_urls:
            url = urlsplit(base)
            if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/") or url.query:
                example = "https://r2.example:8080"
                raise ValueError(f"base_urls: {base!r} is no address; write it like {example}, without a path")


class StreamError(Exception):
    """A stream could not be brought to its end.

    What is raised is a ``RemoteProtocolError`` of httpx (or httpx2) as well, so that code that
    knows nothing of Everline handles it as a broken connection.
    """

    #: Everline's code, such as ``stream_expired``; ``unreachable`` if nobody answered in time.
    code: str
    #: Status of the answer that was final, if there was one.
    status: Optional[int]
    #: The stream, if it began.
    stream: Optional[str]
    #: The last event that was delivered.
    last_event_id: Optional[str]


@dataclass
class Send:
    """Send a request; the answer is a response, or what was raised."""

    request: Any
    #: On a connection of its own.
    fresh: bool


@dataclass
class Sleep:
    """Wait."""

    seconds: float


@dataclass
class Read:
    """Read at most `MAX_ERROR_BODY` of a response and close it; without `wanted`, only close it."""

    response: Any
    wanted: bool = True


Step = Union[Send, Sleep, Read]
Script = Generator[Step, Any, Any]


@dataclass
class Patience:
    """How long it has been tried, and how long to wait before the next attempt."""

    options: Options
    budget: float
    clock: Callable[[], float] = time.monotonic
    attempt: int = 0
    spent: float = 0.0
    since: Optional[float] = None

    def heard(self) -> None:
        """Bytes came: the outage is over for now."""
        if self.since is not None:
            self.spent += self.clock() - self.since
            self.since = None

    def progressed(self) -> None:
        """An event came: everything before is forgotten."""
        self.attempt, self.spent, self.since = 0, 0.0, None

    def next_pause(self) -> Optional[float]:
        """Called when something failed: how long to wait, or nothing if it is enough."""
        now = self.clock()
        if self.since is None:
            self.since = now
        left = self.budget - self.spent - (now - self.since)
        if left <= 0:
            return None
        self.attempt += 1
        if self.attempt == 1:
            return 0.0
        doubled: float = self.options.backoff_min * 2.0 ** min(self.attempt - 2, 30)
        return min(left, min(self.options.backoff_max, doubled) * random.uniform(0.5, 1.0))


@dataclass
class Exchange:
    """One streaming request, over all the connections that it takes."""

    options: Options
    #: httpx or httpx2: whichever the request is of.
    module: ModuleType
    request: Any
    content: bytes
    route: str
    events: Events
    patience: Patience
    #: Addresses tried so far.
    turn: int = 0
    #: Whether the answer said that the stream can be asked for again.
    resumable: bool = False
    origins: list[Any] = field(default_factory=list)

    # ---- requests ----

    def _next_url(self, path: Optional[str] = None) -> Any:
        url = self.origins[self.turn % len(self.origins)]
        return url if path is None else url.copy_with(raw_path=path.encode("ascii"))

    def _is_elsewhere(self) -> bool:
        return self.turn % len(self.origins) != 0

    def _headers(self) -> Any:
        """Those of the first request that are for a stream's other routes too."""
        headers = self.module.Headers(self.request.headers)
        for name in OF_THE_BODY:
            headers.pop(name, None)
        if self._is_elsewhere():
            headers.pop("host", None)
        headers["accept-encoding"] = "identity"
        headers["everline-resume"] = "1"
        return headers

    def _extensions(self, head_timeout: Optional[float], connect: Optional[float]) -> dict[str, Any]:
        extensions = dict(self.request.extensions)
        timeout = dict(extensions.get("timeout") or {})
        if head_timeout is not None:
            timeout["read"] = head_timeout
        if connect is not None:
            timeout["connect"] = min(connect, timeout.get("connect") or connect)
        extensions["timeout"] = timeout
        return extensions

    def post(self) -> Any:
        """The request itself, to whoever's turn it is."""
        request = self.module.Request(
            "POST",
            self._next_url(),
            headers=self.request.headers,
            content=self.content,
            extensions=self._extensions(self.options.head_timeout, None),
        )
        if self._is_elsewhere():
            request.headers["host"] = request.url.netloc.decode("ascii")
        return request

    def _stream_path(self) -> str:
        path = self.request.url.raw_path.decode("ascii").partition("?")[0]
        return f"{path[: -len(self.route)]}streams/{self.events.stream}"

    def resumption(self) -> Any:
        """The request for what comes after the last event."""
        headers = self._headers()
        headers["accept"] = "text/event-stream"
        headers["cache-control"] = "no-store"
        headers.pop("idempotency-key", None)
        headers.pop("last-event-id", None)
        if self.events.last_event_id is not None:
            headers["last-event-id"] = self.events.last_event_id
        # Another connection may reach another replica; this one is not kept for anybody else.
        headers["connection"] = "close"
        extensions = self._extensions(self.options.resume_head_timeout, self.options.resume_connect_timeout)
        return self.module.Request(
            "GET", self._next_url(self._stream_path()), headers=headers, extensions=extensions
        )

    def cancellation(self) -> Optional[Any]:
        """The request that ends the generation, if there is something to end."""
        if not (self.options.cancel_on_close and self.resumable) or self.events.ended:
            return None
        headers = self._headers()
        headers.pop("accept", None)
        headers.pop("idempotency-key", None)
        headers["connection"] = "close"
        longest = self.options.cancel_timeout
        timeout = {"connect": longest, "read": longest, "write": longest, "pool": longest}
        url = self._next_url(f"{self._stream_path()}/cancel")
        return self.module.Request("POST", url, headers=headers, content=b"", extensions={"timeout": timeout})

    # ---- rules ----

    def begin(self) -> Script:
        """Sends the request until there is an answer; returns that."""
        died = False
        connecting = Patience(self.options, self.options.connect_budget, self.patience.clock)
        while True:
            request = self.post()
            answer = yield Send(request, fresh=died)
            if isinstance(answer, Exception):
                patience = connecting
                if not is_unsent(self.module, answer):
                    if not self._may_resend(answer):
                        raise answer
                    died = True
                if died:
                    patience = self.patience
                pause = patience.next_pause()
                if pause is None:
                    raise answer
            elif died and answer.status_code in PASSING and not is_final(answer):
                pause = self.patience.next_pause()
                if pause is None:
                    return answer
                yield Read(answer, wanted=False)
            else:
                self._began(request, answer)
                return answer
            self.turn += 1
            yield Sleep(pause)

    def _may_resend(self, error: Exception) -> bool:
        if isinstance(error, self.module.ReadTimeout):
            return self.options.head_timeout is not None
        return is_broken(self.module, error)

    def _began(self, request: Any, response: Any) -> None:
        timeout = request.extensions["timeout"]
        timeout["read"] = (self.request.extensions.get("timeout") or {}).get("read")
        if not self.is_watched(response):
            return
        name = response.headers.get("everline-stream", "")
        # It becomes part of a path; nothing else may.
        self.resumable = re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) is not None
        self.events.stream = name if self.resumable else None
        if self.resumable:
            # What comes from now on is an event or a heartbeat. Transports look this up at each read.
            timeout["read"] = self.options.silence

    def is_watched(self, response: Any) -> bool:
        """Whether the answer is a stream of Everline's."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        plain = response.headers.get("content-encoding", "identity").lower() == "identity"
        ours = "everline-stream" in response.headers or "everline-replica" in response.headers
        return response.status_code == 200 and kind == "text/event-stream" and plain and ours

    def resume(self, error: Optional[Exception]) -> Script:
        """After a connection broke: returns the response that goes on, or raises."""
        why = self.events.fault or ("the body ended before its stream did" if error is None else describe(error))
        if not self.resumable or self.events.unnumbered:
            raise self._lost("not_resumable", f"{why}, and this stream cannot be resumed") from error
        while True:
            pause = self.patience.next_pause()
            if pause is None:
                tried = f"no progress within {self.options.retry_budget:g} s"
                raise self._lost("unreachable", f"{tried}; at last: {why}") from error
            yield Sleep(pause)
            self.turn += 1
            request = self.resumption()
            answer = yield Send(request, fresh=True)
            if isinstance(answer, Exception):
                if not (is_unsent(self.module, answer) or is_broken(self.module, answer)):
                    raise answer
                error, why = answer, describe(answer)
                continue
            if self.is_watched(answer):
                self.events.reconnected()
                request.extensions["timeout"]["read"] = self.options.silence
                return answer
            status, final = answer.status_code, is_final(answer)
            body = yield Read(answer)
            code, message = read_error(body if isinstance(body, bytes) else b"")
            error, why = None, f"{status} {message or 'without a message'}"
            if status in PASSING and not final:
                continue
            if status == 204:
                code, message = "incomplete", "it ended there without the event that closes it"
            raise self._lost(code or "refused", message or f"the answer was {status}", status)

    def _lost(self, code: str, message: str, status: Optional[int] = None) -> Exception:
        name = self.events.stream or "without an id"
        after = self.events.last_event_id
        where = f" after event {number_of(after)}" if after else ""
        self.resumable = False
        kind: Any = lost_class(self.module)
        error = kind(f"stream {name} broke{where}: {message}", request=self.request)
        error.code, error.status = code, status
        error.stream, error.last_event_id = self.events.stream, after
        result: Exception = error
        return result


# ---- what is looked at ----


def module_of(request: Any) -> ModuleType:
    """httpx or httpx2, whichever `request`, or a URL, is of."""
    packages = (kind.__module__.partition(".")[0] for kind in type(request).__mro__)
    return sys.modules[next(name for name in packages if name in ("httpx", "httpx2"))]


def route_of(request: Any) -> Optional[str]:
    """The route of a request whose stream would be resumed, by its method and path."""
    if request.method != "POST":
        return None
    path = request.url.path
    for route in ROUTES:
        if path.endswith(f"/v1/{route}"):
            # A client that goes on by itself is left alone.
            return None if "last-event-id" in request.headers or "everline-resume" in request.headers else route
    return None


def wants_stream(content: bytes) -> bool:
    """Whether a body asks for a stream."""
    if b'"stream"' not in content:
        return False
    try:
        body = json.loads(content)
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("stream") is True


def exchange_of(options: Options, request: Any, route: str, content: bytes) -> Exchange:
    """What is needed to bring the stream that `request` asks for to its end."""
    module = module_of(request)
    request.headers["everline-resume"] = "1"
    request.headers["accept-encoding"] = "identity"
    if "idempotency-key" not in request.headers:
        request.headers["idempotency-key"] = f"everline-client-{uuid.uuid4().hex}"
    origins = [request.url, *(at_origin(request.url, base) for base in options.base_urls)]
    patience = Patience(options, options.retry_budget)
    return Exchange(options, module, request, content, route, Events(route), patience, origins=origins)


def at_origin(url: Any, base: str) -> Any:
    """`url` at another address of the cluster, which is told without a path."""
    other = module_of(url).URL(base)
    return url.copy_with(scheme=other.scheme, host=other.host, port=other.port)


def is_unsent(module: ModuleType, error: Exception) -> bool:
    """Whether nothing of the request can have been received."""
    return isinstance(error, (module.ConnectError, module.ConnectTimeout))


def is_broken(module: ModuleType, error: Exception) -> bool:
    """Whether a connection broke or fell silent, as one to a dead replica does."""
    kinds = (module.NetworkError, module.RemoteProtocolError, module.ReadTimeout, module.WriteTimeout)
    return isinstance(error, kinds)


def is_final(response: Any) -> bool:
    """Whether the answer says that asking again is of no use."""
    return bool(response.headers.get("x-should-retry", "").lower() == "false")


def describe(error: Exception) -> str:
    """An error in words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def read_error(body: bytes) -> tuple[Optional[str], Optional[str]]:
    """Code and message of an error object, as OpenAI or Anthropic have it."""
    try:
        error = json.loads(body)["error"]
        code, message = error.get("code") or error.get("type"), error.get("message")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, None
    return (None if code is None else str(code)), (None if message is None else str(message))


_LOST: dict[str, type[Exception]] = {}


def lost_class(module: ModuleType) -> type[Exception]:
    """`StreamError` as an error of httpx or httpx2."""
    name = module.__name__
    if name not in _LOST:
        _LOST[name] = type("StreamLost", (StreamError, module.RemoteProtocolError), {"__module__": "everline"})
    return _LOST[name]
