"""A small, strict cluster to test clients against: section "streams" of Everline's HTTP API.

A request says itself what happens to it, in the member ``fake`` of its body:

    events       how many pieces of text there are
    interval     seconds between two of them
    ping         seconds of silence before a heartbeat, 5
    dribble      most bytes of one write
    faults       what happens to the first, second, … connection of the stream, the POST included:
                 null nothing; {"at": n, "how": "fin" | "rst" | "stall" | "end"} after n bytes of the
                 body, or {"after": n, …} after n whole events; {"how": "dead" | "mute"} instead of a head; {"name": "…"} another Everline-Stream; {"status": 410, "code": "…"} as the answer;
                 {"skip": n} n events left out; {"again": n} n events more than asked for

What it was asked is at ``GET /_fake/log``; what clients did wrong is in there as ``wrong``. Only
Python's standard library is needed. ``python3 fake_cluster.py`` says its address and serves until
its standard input ends.
"""

import hashlib
import json
import random
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = ["once ", "über ", "日本 ", "🦀", "the ", '"quoted" ', "line\\n", "ﬁ", "end. ", "\u0301e"]


def text_of(count, seed):
    """The pieces of a generation's text: a pure function of the request."""
    rng = random.Random(seed)
    return [rng.choice(WORDS) + str(n) for n in range(count)]


def frames_of(route, model, pieces):
    """The events of a stream without their ids: `(event name, data)`."""
    if route == "responses":
        base = {"id": "resp_1", "object": "response", "created_at": 1, "model": model, "output": []}
        base.update(parallel_tool_calls=True, tool_choice="auto", tools=[])
        said = [("response.created", {"response": {**base, "status": "in_progress"}})]
        where = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
        said += [("response.output_text.delta", {**where, "delta": piece}) for piece in pieces]
        said += [("response.completed", {"response": {**base, "status": "completed"}})]
        for number, (name, data) in enumerate(said):
            yield name, json.dumps({"type": name, "sequence_number": number, **data})
        return
    if route == "messages":
        usage = {"input_tokens": 3, "output_tokens": 0}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": []}
        message.update(stop_reason=None, stop_sequence=None, usage=usage)
        said = [("message_start", {"message": message})]
        said += [("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})]
        for piece in pieces:
            said.append(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}}))
        said += [("content_block_stop", {"index": 0})]
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        said += [("message_delta", {"delta": end, "usage": {"output_tokens": len(pieces)}})]
        said += [("message_stop", {})]
        for name, data in said:
            yield name, json.dumps({"type": name, **data})
        return
    chat = route == "chat/completions"
    head = {"id": "cmpl-1", "object": "chat.completion.chunk" if chat else "text_completion", "created": 1}
    head["model"] = model
    for number, piece in enumerate(pieces):
        last = "stop" if number + 1 == len(pieces) else None
        said = {"delta": {"content": piece}} if chat else {"text": piece}
        # Not ASCII, so that cuts fall into characters too.
        choice = {"index": 0, **said, "finish_reason": last, "logprobs": None}
        yield None, json.dumps({**head, "choices": [choice]}, ensure_ascii=False)
    yield None, "[DONE]"


class Stream:
    """One generation, which goes on whoever looks at it."""

    def __init__(self, name, principal, digest, route, body):
        self.name, self.principal, self.digest = name, principal, digest
        plan = body.get("fake") or {}
        self.faults = list(plan.get("faults") or [])
        self.interval, self.ping = plan.get("interval", 0), plan.get("ping", 5)
        self.dribble = plan.get("dribble", 0)
        self.pieces = text_of(plan.get("events", 8), digest)
        self.frames = list(frames_of(route, body.get("model", "m"), self.pieces))
        self.began = time.monotonic()
        self.cancelled = threading.Event()

    def event(self, seq):
        name, data = self.frames[seq]
        retry = "retry: 500\n" if seq == 0 else ""
        named = f"event: {name}\n" if name else ""
        return f"{named}data: {data}\n{retry}id: {self.name}.{seq}\n\n".encode()

    def due(self, seq):
        """Seconds until an event is there."""
        return self.began + seq * self.interval - time.monotonic()


class Cut(Exception):
    """The connection ends here, in this way."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    # ---- what was asked ----

    def note(self, body=None):
        headers = {name.lower(): value for name, value in self.headers.items()}
        peer = self.client_address[1]
        said = {"method": self.command, "path": self.path, "headers": headers, "peer": peer, "body": body}
        said["at"] = time.monotonic()
        with self.server.lock:
            self.server.log.append(said)
        return headers

    def wrong(self, what):
        with self.server.lock:
            self.server.wrongs.append(f"{self.command} {self.path}: {what}")

    def principal(self):
        return self.headers.get("authorization") or self.headers.get("x-api-key") or ""

    def do_GET(self):
        if self.path == "/_fake/log":
            with self.server.lock:
                self.json(200, {"log": self.server.log, "wrong": self.server.wrongs})
            return
        self.note()
        if not self.path.startswith("/v1/streams/"):
            self.json(200, {"object": "list", "data": []})
            return
        stream = self.server.streams.get(self.path[len("/v1/streams/") :].partition("?")[0])
        if stream is None or stream.principal != self.principal():
            self.error(404, "stream_not_found", "no such stream")
            return
        if self.headers.get("everline-resume") != "1" or self.headers.get("accept") != "text/event-stream":
            self.wrong("a resumption lacks Everline-Resume or Accept")
        if self.headers.get("content-type") or self.headers.get("idempotency-key"):
            self.wrong("a resumption has headers of the first request's body")
        self.attach(stream, self.headers.get("last-event-id"))

    def do_POST(self):
        if self.headers.get("transfer-encoding"):
            self.wrong("a body without a length")
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(raw) if raw else None
        self.note(body)
        if self.path.endswith("/cancel"):
            stream = self.server.streams.get(self.path.split("/")[-2])
            if stream is not None and stream.principal == self.principal():
                stream.cancelled.set()
                self.json(200, {"id": stream.name, "cancelled": True})
            else:
                self.error(404, "stream_not_found", "no such stream")
            return
        route = self.path.partition("?")[0].removeprefix("/v1/")
        if not body.get("stream"):
            self.whole(body)
            return
        key, digest = self.headers.get("idempotency-key"), hashlib.sha256(raw).hexdigest()
        name = self.server.name_of(self.principal(), key)
        with self.server.lock:
            stream = self.server.streams.get(name)
            attached = stream is not None
            if not attached:
                stream = Stream(name, self.principal(), digest, route, body)
                self.server.streams[name] = stream
        if stream.digest != digest:
            self.error(422, "idempotency_key_reused", "the same key with another body")
            return
        self.attach(stream, self.headers.get("last-event-id"), attached)

    def whole(self, body):
        plan = body.get("fake") or {}
        pieces = text_of(plan.get("events", 8), hashlib.sha256(json.dumps(body).encode()).hexdigest())
        self.json(200, {"id": "cmpl-1", "object": "chat.completion", "pieces": pieces})

    # ---- answers ----

    def json(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Everline-Replica", "fake")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, code, message):
        error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        final = status < 500 and status not in (408, 429)
        self.json(status, error, **({"x_should_retry": "false"} if final else {}))

    def attach(self, stream, last_event_id, attached=False):
        with self.server.lock:
            fault = stream.faults.pop(0) if stream.faults else None
        fault = fault or {}
        try:
            if fault.get("how") in ("dead", "mute"):
                raise Cut("rst" if fault["how"] == "dead" else "stall")
            if "status" in fault:
                if fault["status"] == 204:
                    self.send_response(204)
                    self.end_headers()
                else:
                    self.error(fault["status"], fault.get("code", "some_code"), "as the test wants it")
                return
            after = -1
            if last_event_id is not None:
                name, _, seq = last_event_id.rpartition(".")
                if name != stream.name or not seq.isdigit():
                    self.wrong(f"Last-Event-ID {last_event_id!r}")
                    self.error(400, "bad_event_id", "an id of another stream")
                    return
                after = int(seq)
            if after >= len(stream.frames):
                self.wrong("a cursor ahead of the stream")
                self.error(412, "cursor_ahead", "that event was never sent")
                return
            if after == len(stream.frames) - 1:
                self.wrong("a resumption of what ended")
                self.send_response(204)
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Everline-Replica", "fake")
            self.send_header("Everline-Worker", "w1")
            self.send_header("Everline-Stream", fault.get("name", stream.name))
            self.send_header("Everline-Resumable", "exact")
            if attached:
                self.send_header("Everline-Attached", "1")
            self.end_headers()
            self.sent, self.fault, self.dribble = 0, fault, stream.dribble
            self.feed(stream, after + 1 + fault.get("skip", 0) - fault.get("again", 0))
            self.wfile.write(b"0\r\n\r\n")
        except Cut as cut:
            self.end(str(cut))
        except OSError:
            self.close_connection = True

    def feed(self, stream, seq):
        heard = time.monotonic()
        while seq < len(stream.frames):
            if stream.cancelled.is_set():
                error = {"error": {"message": "cancelled", "type": "server_error", "code": "cancelled"}}
                self.body(f"data: {json.dumps(error)}\nid: {stream.name}.{seq}\n\n".encode())
                self.body(f"data: [DONE]\nid: {stream.name}.{seq + 1}\n\n".encode())
                return
            left = stream.due(seq)
            if left > 0:
                stream.cancelled.wait(min(left, 0.02))
                if time.monotonic() - heard > stream.ping:
                    self.body(b": ping\n")
                    heard = time.monotonic()
                continue
            self.body(stream.event(seq))
            heard = time.monotonic()
            seq += 1
            if self.fault.get("after") is not None:
                self.fault["after"] -= 1
                if self.fault["after"] == 0:
                    raise Cut(self.fault["how"])

    def body(self, data):
        at = self.fault.get("at")
        if at is not None and self.sent + len(data) >= at:
            self.chunks(data[: at - self.sent])
            raise Cut(self.fault["how"])
        self.chunks(data)

    def chunks(self, data):
        self.sent += len(data)
        size = self.dribble or len(data) or 1
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def end(self, how):
        self.close_connection = True
        if how == "end":
            self.wfile.write(b"0\r\n\r\n")
            self.close_connection = False
        elif how == "stall":
            # Silent, but open, until the client has had enough.
            self.connection.settimeout(60)
            try:
                self.connection.recv(1)
            except OSError:
                pass
        elif how == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Cluster(ThreadingHTTPServer):
    """The server; `url` is where it is."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.log, self.wrongs, self.streams = [], [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._salt = random.Random()

    def name_of(self, principal, key):
        if key is None:
            return f"st_{self._salt.getrandbits(130):026x}"[:29]
        return "st_" + hashlib.sha256(f"{principal}\0{key}".encode()).hexdigest()[:26]

    def process_request(self, request, client_address):
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        try:
            super().shutdown_request(request)
        except OSError:
            pass

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def start(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self


if __name__ == "__main__":
    cluster = Cluster().start()
    print(cluster.url, flush=True)
    sys.stdin.read()
