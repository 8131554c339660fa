#!/usr/bin/env python3
"""How long streams stand still when the replica that generates them is killed or frozen.

Starts a demo (three replicas, children are started again) and four simulated engines of a speed of one's
choice, keeps streams running at all replicas, hurts one replica after the other, and reads the longest pause
of every stream of the other replicas that says it went on elsewhere: told apart by whether the hurt replica led
the group that has the directory of streams, as one of three did. A pause has in it what went by of the engine's
step before, and what the engine takes for a new request, which is measured beside it, alone and of as many at
once as a replica holds streams: the rest is the replicas'.
One thread reads all streams, so that they cost little beside the replicas. Everything on 127.0.0.1.

    benches/stall.py                                    # kill -9, 12 times
    benches/stall.py --signal STOP                      # freeze for 4 s
    benches/stall.py --streams 200 --step-ms 80
"""
import argparse, http.client, json, os, pathlib, random, selectors, signal, socket, statistics, subprocess, tempfile
import threading, time, urllib.error, urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = "everline-stall"
ENGINES = 4
# A stream without a word for so long is not waited for any more, s.
SILENT = 30


class Stream:
    """One stream at one replica, on and on."""

    def __init__(self, number, replica, tokens):
        self.number, self.replica = number, replica
        host, port = replica["http"].removeprefix("http://").split(":")
        self.address = (host, int(port))
        body = json.dumps({"model": MODEL, "stream": True, "max_tokens": tokens,
                           "messages": [{"role": "user", "content": f"story {number}"}]})
        self.request = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}").encode()
        self.socket, self.again = None, 0.0

    def begin(self):
        self.last, self.longest, self.seam = time.monotonic(), (0.0, 0.0), False
        self.socket = socket.create_connection(self.address, timeout=5)
        self.socket.sendall(self.request)
        self.socket.setblocking(False)

    def end(self, selector, pause):
        if self.socket:
            selector.unregister(self.socket)
            self.socket.close()
        self.socket, self.again = None, time.monotonic() + pause


class Reader(threading.Thread):
    """Keeps all streams running until told to stop."""

    def __init__(self, streams):
        super().__init__(daemon=True)
        self.streams, self.stop = streams, threading.Event()
        self.seams, self.broken, self.done = [], [], 0

    def run(self):
        selector = selectors.DefaultSelector()
        while not self.stop.is_set():
            now = time.monotonic()
            for stream in self.streams:
                if stream.socket is None and now >= stream.again:
                    try:
                        stream.begin()
                        selector.register(stream.socket, selectors.EVENT_READ, stream)
                    except OSError:
                        stream.socket, stream.again = None, now + 0.3
                elif stream.socket is not None and now - stream.last > SILENT:
                    self.broke(selector, stream)
            for key, _ in selector.select(0.1):
                self.take(selector, key.data)

    def take(self, selector, stream):
        try:
            data = stream.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.monotonic()
        if b": everline attempt" in data:
            stream.seam = True
        # What comes with the head says nothing of pauses between tokens.
        if b"data: " in data:
            if not data.startswith(b"HTTP/"):
                stream.longest = max(stream.longest, (now - stream.last, now))
            stream.last = now
        if b"data: [DONE]" in data:
            self.done += 1
            if stream.seam:
                self.seams.append(stream.longest)
            stream.end(selector, 0)
        elif not data:
            self.broke(selector, stream)

    def broke(self, selector, stream):
        self.broken.append(stream.replica["id"])
        stream.end(selector, 0.3)


def ask(url, body=None):
    request = urllib.request.Request(url, body and json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start_engines(options, state):
    """Engines of our own speed, and where they are; the demo's own ones have another model, and nothing to do."""
    engines, addresses, server = [], [], state["replicas"][0]["admin"]
    for _ in range(ENGINES):
        address = f"127.0.0.1:{free_port()}"
        engines.append(subprocess.Popen(
            [options.everline, "engine-sim", "--listen", address, "--model", MODEL, "--eos-every", "0",
             "--decode-step-ms", str(options.step_ms)], stdout=subprocess.DEVNULL))
        while True:
            try:
                ask(f"http://{address}/v1/models")
                break
            except OSError:
                time.sleep(0.05)
        subprocess.run([options.everline, "worker", "add", f"http://{address}", "--server", server], check=True,
                       stdout=subprocess.DEVNULL)
        addresses.append(address)
    return engines, addresses


def first_tokens(engine, times=20):
    """How long a new request waits for its first token at a busy engine, asked without a router, ms."""
    host, port = engine.split(":")
    body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 1, "prompt": "a story"}).encode()
    waited = []
    for _ in range(times):
        connection = http.client.HTTPConnection(host, int(port), timeout=5)
        connection.connect()
        began = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        while not answer.readline().startswith(b"data: "):
            pass
        waited.append((time.monotonic() - began) * 1000)
        connection.close()
        # Not always at the same place of a step.
        time.sleep(random.uniform(0, 0.05))
    return statistics.median(waited)


def first_tokens_at_once(engines, count, times=4):
    """The same of so many requests at once, which engines know all but the end of: as many as one replica holds
    streams. Connections are opened beforehand, which a replica does not."""
    waited = []
    for turn in range(times):
        selector, began = selectors.DefaultSelector(), {}
        for number in range(count):
            host, port = engines[number % len(engines)].split(":")
            prompt = [number * 31 + at for at in range(96)] + [turn]
            body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 1, "prompt": prompt})
            asking = socket.create_connection((host, int(port)), timeout=5)
            selector.register(asking, selectors.EVENT_READ, f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
                              f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}")
        for key in list(selector.get_map().values()):
            began[key.fileobj] = time.monotonic()
            key.fileobj.sendall(key.data.encode())
        while selector.get_map():
            for key, _ in selector.select(5):
                data = key.fileobj.recv(1 << 16)
                if b"data: " in data or not data:
                    # The first time their prompts are new.
                    if turn > 0:
                        waited.append((time.monotonic() - began[key.fileobj]) * 1000)
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
        time.sleep(random.uniform(0.3, 0.5))
    return statistics.median(waited)


def leader(state):
    """Who leads the group that has the directory of streams: a take-over of what it held waits for an election."""
    for replica in state["replicas"]:
        try:
            members = ask(replica["admin"] + "/v1/admin/status")["cluster"]["members"]
        except OSError:
            continue
        return next((member["info"]["name"] for member in members if member["leads_cache"]), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everline", default=ROOT / "target/release/everline")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--step-ms", type=float, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, engines = pathlib.Path(folder) / "state.json", []
        demo = subprocess.Popen([options.everline, "demo", "--port", "0", "--restart", "--state-file", path],
                                stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                time.sleep(0.1)
            engines, addresses = start_engines(options, json.loads(path.read_text()))
            hurt(options, path, addresses)
        finally:
            for child in [demo, *engines]:
                child.terminate()
                child.wait()


def hurt(options, path, engines):
    replicas = json.loads(path.read_text())["replicas"]
    # Streams of some three seconds.
    tokens = max(20, int(3000 / options.step_ms))
    reader = Reader([Stream(number, replicas[number % 3], tokens) for number in range(options.streams)])
    reader.start()
    time.sleep(5)
    waited = [first_tokens(engine) for engine in engines]
    at_once = first_tokens_at_once(engines, max(1, options.streams // 3))
    hurts = []
    for turn in range(options.times):
        known = json.loads(path.read_text())
        leads = leader(known)
        # New streams are held by those who lead nothing, as long as there are any.
        others = [replica for replica in known["replicas"] if replica["id"] != leads]
        is_leader = turn % 3 == 2
        replica = next(it for it in known["replicas"] if it["id"] == leads) if is_leader else others[turn % 2]
        hurts.append((is_leader, time.monotonic()))
        os.kill(replica["pid"], getattr(signal, "SIG" + options.signal))
        if options.signal == "STOP":
            time.sleep(4)
            os.kill(replica["pid"], signal.SIGCONT)
        time.sleep(7)
    reader.stop.set()
    reader.join()
    print(f"SIG{options.signal} {options.times} times, {options.streams} streams, a token each {options.step_ms:g} ms; "
          f"{reader.done} read to their end, {len(reader.broken)} broke with their own replica; "
          f"a new request at these engines has its first token after p50 {statistics.median(waited):.0f} ms, "
          f"each of {max(1, options.streams // 3)} at once after {at_once:.0f} ms")
    for what, is_leader in ("were no leader", False), ("led the directory", True):
        times = [at for led, at in hurts if led == is_leader]
        # A pause belongs to the hurt that it ends behind.
        mine = sorted(pause * 1000 for pause, ended in reader.seams
                      if any(at < ended and pause + 0.1 >= ended - at for at in times))
        if mine:
            at = lambda share: mine[min(len(mine) - 1, int(len(mine) * share))]
            print(f"  {len(times)} that {what}: {len(mine)} went on elsewhere, longest pause of each: "
                  f"p50 {statistics.median(mine):.0f} p90 {at(0.9):.0f} p99 {at(0.99):.0f} max {mine[-1]:.0f} ms")
    if not reader.seams:
        raise SystemExit("no stream went over a seam")


if __name__ == "__main__":
    main()
