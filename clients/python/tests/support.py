"""What the tests share: the fake cluster, both HTTP libraries, and a proxy that cuts connections."""

import asyncio
import importlib
import json
import random
import socket
import struct
import sys
import threading
import unittest
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent.parent / "testing")]

import everline  # noqa: E402
from fake_cluster import Cluster  # noqa: E402

HEADERS = {"authorization": "Bearer k"}


def loaded(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


#: httpx and httpx2, as far as they are installed.
MODULES = [module for module in map(loaded, ("httpx", "httpx2")) if module is not None]
QUICK = {"backoff_min": 0.001, "backoff_max": 0.02}


class WithCluster(unittest.TestCase):
    """A fake cluster for each test; nothing that a client did wrong is forgiven."""

    def setUp(self):
        self.cluster = Cluster().start()
        self.addCleanup(self.cluster.server_close)
        self.addCleanup(self.cluster.shutdown)
        self.addCleanup(lambda: self.assertEqual(self.cluster.wrongs, []))

    def chat(self, **fake):
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}], "fake": fake}
        return body

    def asked(self, path="", method=None):
        found = [said for said in self.cluster.log if path in said["path"]]
        return [said for said in found if method in (None, said["method"])]

    def fetch(self, module, body, how="sync", path="/v1/chat/completions", headers=HEADERS, base=None, **options):
        """A whole body, as the code above the transport gets it."""
        options = everline.Options(**{**QUICK, **options})
        url = (base or self.cluster.url) + path
        if how == "sync":
            with everline.http_client(module=module, options=options) as client:
                with client.stream("POST", url, json=body, headers=headers) as response:
                    return response, b"".join(response.iter_bytes())

        async def run():
            async with everline.async_http_client(module=module, options=options) as client:
                async with client.stream("POST", url, json=body, headers=headers) as response:
                    return response, b"".join([chunk async for chunk in response.aiter_bytes()])

        return asyncio.run(run())

    def everywhere(self):
        for module in MODULES:
            for how in ("sync", "async"):
                with self.subTest(f"{module.__name__} {how}"):
                    self.cluster.log.clear()
                    yield module, how


def datas(body):
    """The data of each event of a body, its ids checked to be in order."""
    events = [block for block in body.decode().split("\n\n") if block]
    found = []
    for number, block in enumerate(events):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        # Last, for clients that take note of an id as soon as they have read its line.
        assert lines[-1].startswith("id: ") and lines[-1].endswith(f".{number}"), (number, lines)
        found.append(next(line[6:] for line in lines if line.startswith("data: ")))
    return found


def chat_text(body):
    """The text of a whole chat stream."""
    said = datas(body)
    assert said[-1] == "[DONE]", said[-1]
    chunks = [json.loads(data) for data in said[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class CuttingProxy:
    """Copies TCP to an address and cuts each connection some bytes after its answer began.

    `cuts` is called for every connection: (bytes, "fin" | "rst" | "stall"), or nothing.
    """

    def __init__(self, url, cuts):
        where = urlsplit(url)
        self._to, self._cuts = (where.hostname, where.port or 80), cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.count = 0
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
            except OSError:
                return
            self._open += [client, server]
            threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, self._cuts()), daemon=True).start()

    def _copy(self, source, sink, cut):
        passed = 0
        try:
            while data := source.recv(4096):
                if cut is not None and passed + len(data) >= cut[0]:
                    sink.sendall(data[: cut[0] - passed])
                    self.count += 1
                    if cut[1] == "stall":
                        return
                    if cut[1] == "rst":
                        sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                # A close alone would wait for the other thread's read.
                if cut is None or cut[1] != "rst" or end is source:
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            except OSError:
                pass

    def close(self):
        for one in (self._listener, *self._open):
            one.close()


def random_cuts(seed, most, hows=("fin", "rst"), longest=3000):
    """Cuts for the first `most` connections. Silence begins after the head: before it, it would be
    an engine that thinks for long.
    """
    rng = random.Random(seed)
    left = [most]

    def cut():
        left[0] -= 1
        how = rng.choice(hows)
        return (rng.randrange(1000 if how == "stall" else 1, longest), how) if left[0] >= 0 else None

    return cut
