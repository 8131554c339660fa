"""From the bytes of a body to whole events: pure, without I/O.

What is handed on ends between two events, always, so that a connection may break anywhere and the
next one goes on behind the last whole event. Events that were handed on already are dropped, an
event that is missing is a fault.
"""

from __future__ import annotations

import json
from typing import Optional

#: Largest event held back until it is whole: what a replica keeps of a whole stream.
MAX_EVENT_BYTES = 8 << 20

#: Names of the events that close a stream, by the last part of the route's path. On every route
#: ``data: [DONE]`` does as well.
CLOSING = {
    "responses": frozenset({"response.completed", "response.incomplete", "response.failed", "error"}),
    "messages": frozenset({"message_stop", "error"}),
}


def _parts(event_id: str) -> "tuple[str, str]":
    """The stream and the number in an event's id. Behind the number may be which attempt said it."""
    stream, _, rest = event_id.partition(".")
    number, _, attempt = rest.partition(".")
    return stream, number if not attempt or attempt.isascii() and attempt.isdigit() else ""


def number_of(event_id: str) -> str:
    """The number in an event's id."""
    return _parts(event_id)[1]


class Events:
    """The events of one stream, over all the connections that it takes."""

    def __init__(self, route: str, last_event_id: Optional[str] = None) -> None:
        self._closing = CLOSING.get(route, frozenset())
        self._buffer = bytearray()
        #: Where the first line begins that was not looked at yet.
        self._line = 0
        #: How far was looked for the end of that line.
        self._scanned = 0
        self._id: Optional[str] = None
        self._name = ""
        self._data: list[bytes] = []
        #: The stream's id, when it is known.
        self.stream: Optional[str] = None
        #: Of the last event that was handed on.
        self.last_event_id = last_event_id
        #: How many events were handed on.
        self.count = 0
        #: The event that closes the stream was handed on.
        self.ended = False
        #: An event without a number was handed on: nobody can say where to go on.
        self.unnumbered = False
        #: What is wrong with this connection. Everything before it was handed on.
        self.fault: Optional[str] = None

    def reconnected(self) -> None:
        """Forgets the unfinished event of a connection that broke."""
        self._buffer.clear()
        self._line = self._scanned = 0
        self._forget_block()
        self.fault = None

    def feed(self, chunk: bytes) -> bytes:
        """Takes what was read and returns what may be handed on."""
        if self.fault is not None:
            return b""
        buffer, out = self._buffer, bytearray()
        buffer += chunk
        block = 0
        while self.fault is None:
            newline = buffer.find(b"\n", max(self._line, self._scanned))
            if newline < 0:
                self._scanned = len(buffer)
                break
            line = bytes(buffer[self._line : newline]).rstrip(b"\r")
            first = self._line == block
            self._line = newline + 1
            if not line:
                if not first and self._take_event():
                    out += buffer[block : self._line]
                block = self._line
                self._forget_block()
            elif first and line.startswith(b":"):
                # A heartbeat or a note between two events.
                out += buffer[block : self._line]
                block = self._line
            else:
                self._field(line)
        del buffer[:block]
        self._line -= block
        self._scanned = max(0, self._scanned - block)
        if len(buffer) > MAX_EVENT_BYTES and self.fault is None:
            self.fault = f"an event is larger than {MAX_EVENT_BYTES} bytes"
        return bytes(out)

    def _forget_block(self) -> None:
        self._id, self._name, self._data = None, "", []

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"data":
            self._data.append(value)
        elif name == b"id":
            self._id = value.decode("utf-8", "replace")
        elif name == b"event":
            self._name = value.decode("utf-8", "replace")

    def _take_event(self) -> bool:
        """Whether the event that just became whole is to be handed on."""
        if self._id is None:
            if self._data:
                self.unnumbered = True
        elif not self._is_next(self._id):
            return False
        else:
            self.last_event_id = self._id
        self.count += 1
        self.ended = self.ended or self._is_closing()
        return True

    def _is_next(self, event_id: str) -> bool:
        stream, number = _parts(event_id)
        if not stream or not (number.isascii() and number.isdigit()):
            self.fault = f"an event has the id {event_id!r}, which is none of Everline's"
            return False
        if self.stream is None:
            self.stream = stream
        if stream != self.stream:
            self.fault = f"an event of {stream} came in the stream {self.stream}"
            return False
        expected = 0 if self.last_event_id is None else int(number_of(self.last_event_id)) + 1
        if int(number) > expected:
            self.fault = f"event {number} came where {expected} was expected"
        return int(number) == expected

    def _is_closing(self) -> bool:
        data = b"\n".join(self._data)
        if data.strip() == b"[DONE]":
            return True
        if not self._closing:
            return False
        if self._name:
            return self._name in self._closing
        try:
            said = json.loads(data)
        except ValueError:
            return False
        return isinstance(said, dict) and said.get("type") in self._closing
