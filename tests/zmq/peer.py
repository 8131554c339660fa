"""The other side of ZeroMQ sockets, with libzmq: what engines and their usual listeners use.

peer.py publish            binds PUB and ROUTER, says their endpoints, obeys lines on standard input
peer.py connect ENDPOINT   the same, with a PUB that connects and a ROUTER that binds
peer.py listen SUB REPLAY  subscribes, asks for a replay as DEALER and as REQ, says what comes
"""

import json
import struct
import sys
import threading
import time

import zmq

END = b"\xff" * 8
context = zmq.Context()


def say(what):
    print(json.dumps(what), flush=True)


def bind(socket, endpoint):
    # A port that was just closed is free a moment later.
    for _ in range(500):
        try:
            return socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
            time.sleep(0.01)
    raise TimeoutError(endpoint)


class Engine:
    def __init__(self, connect=None, live="tcp://127.0.0.1:*", replay="tcp://127.0.0.1:*"):
        self.pub = context.socket(zmq.PUB)
        self.pub.setsockopt(zmq.LINGER, 0)
        if connect:
            self.pub.connect(connect)
        else:
            bind(self.pub, live)
        self.router = context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        bind(self.router, replay)
        self.next, self.kept, self.run = 0, [], 0

    def endpoints(self, connect=None):
        at = lambda socket: socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        return [connect or at(self.pub), at(self.router)]

    def publish(self, lost, stamp):
        seq, self.next = self.next, self.next + 1
        event = b"\x96\xabBlockStored\x91" + bytes([seq]) + b"\xc0\x94\x01\x02\x03\x04\x04\xc0"
        payload = b"\x93\xcb" + struct.pack(">d", stamp) + b"\x91" + event + b"\x00"
        if not lost:
            self.pub.send_multipart((b"kv", struct.pack(">q", seq), payload))
        self.kept.append((seq, payload))

    def replay(self):
        while self.router.poll(0):
            client, _, start = self.router.recv_multipart()
            start = int.from_bytes(start, "big")
            for seq, payload in self.kept:
                if seq >= start:
                    self.router.send_multipart((client, b"", b"kv", struct.pack(">q", seq), payload))
            self.router.send_multipart((client, b"", b"", END, b""))

    def close(self):
        self.pub.close()
        self.router.close()


def engine(connect):
    lines = context.socket(zmq.PULL)
    lines.bind("inproc://lines")

    def read():
        sender = context.socket(zmq.PUSH)
        sender.connect("inproc://lines")
        for line in sys.stdin:
            sender.send_string(line.strip())
        sender.send_string("end")

    threading.Thread(target=read, daemon=True).start()
    self, stamp = Engine(connect), 0.0
    say(self.endpoints(connect))
    while True:
        self.replay()
        if not lines.poll(20):
            continue
        word, *rest = lines.recv_string().split()
        if word == "send" or word == "lose":
            for _ in range(int(rest[0])):
                stamp += 1.0
                self.publish(word == "lose", stamp)
        elif word == "restart":
            live, replay = self.endpoints(connect)
            self.close()
            self = Engine(connect, live, replay)
        else:
            return
        say(word)


def hexed(parts):
    return [part.hex() for part in parts]


def listen(live, replay):
    sub = context.socket(zmq.SUB)
    sub.setsockopt(zmq.SUBSCRIBE, b"kv")
    # Pings that have to be answered.
    sub.setsockopt(zmq.HEARTBEAT_IVL, 50)
    sub.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1000)
    monitor = sub.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sub.connect(live)
    say("ready")
    for line in sys.stdin:
        word = line.strip()
        if word == "live":
            say(hexed(sub.recv_multipart()))
        elif word == "disconnects":
            say(bool(monitor.poll(300)))
        else:
            socket = context.socket(zmq.DEALER if word == "dealer" else zmq.REQ)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(replay)
            start = struct.pack(">q", 1)
            socket.send_multipart((b"", start) if word == "dealer" else (start,))
            answers = [hexed(socket.recv_multipart())]
            while word == "dealer" and answers[-1][-2] != END.hex():
                answers.append(hexed(socket.recv_multipart()))
            socket.close()
            say(answers)


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen(sys.argv[2], sys.argv[3])
    else:
        engine(sys.argv[2] if sys.argv[1] == "connect" else None)
    context.destroy(linger=0)
