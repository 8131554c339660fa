#!/usr/bin/env python3
"""How long streams stand still when the replica that generates them is killed or frozen.

Starts a demo (three replicas, simulated engines, children are started again), keeps streams running
at all replicas, hurts one replica after the other, and reads the longest pause of every stream of
the other replicas that says it went on elsewhere: told apart by whether the hurt replica led the group
that has the directory of streams, as one of three did. Everything on 127.0.0.1.

    benches/stall.py                       # kill -9, 12 times
    benches/stall.py --signal STOP         # freeze for 4 s
"""
import argparse, http.client, json, os, pathlib, signal, statistics, subprocess, tempfile, threading, time, urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Stream(threading.Thread):
    """One stream at one replica, on and on until told to stop."""

    def __init__(self, number, replica, stop, seams, broken):
        super().__init__(daemon=True)
        self.number, self.replica, self.stop, self.seams, self.broken = number, replica, stop, seams, broken

    def run(self):
        while not self.stop.is_set():
            try:
                self.one()
            except (OSError, http.client.HTTPException):
                self.broken.append(self.replica["id"])
                time.sleep(0.3)

    def one(self):
        host, port = self.replica["http"].removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        body = json.dumps({"model": "everline-demo", "stream": True, "max_tokens": 400,
                           "messages": [{"role": "user", "content": f"story {self.number}"}]})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        last, longest, seam, done = time.monotonic(), (0.0, 0.0), None, False
        for line in response:
            if line.startswith(b"data: "):
                now = time.monotonic()
                longest, last = max(longest, (now - last, now)), now
                done = line.startswith(b"data: [DONE]")
            elif line.startswith(b": everline attempt"):
                seam = line
        if not done:
            self.broken.append(self.replica["id"])
        elif seam:
            self.seams.append(longest)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everline", default=ROOT / "target/release/everline")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--streams", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = pathlib.Path(folder) / "state.json"
        demo = subprocess.Popen([options.everline, "demo", "--port", "0", "--restart", "--state-file", state],
                                stdout=subprocess.DEVNULL)
        try:
            hurt(options, state)
        finally:
            demo.terminate()
            demo.wait()


def leader(state):
    """Who leads the group that has the directory of streams: a take-over of what it held waits for an election."""
    for replica in state["replicas"]:
        try:
            with urllib.request.urlopen(replica["admin"] + "/v1/admin/status", timeout=5) as answer:
                members = json.load(answer)["cluster"]["members"]
        except OSError:
            continue
        return next((member["info"]["name"] for member in members if member["leads_cache"]), None)


def hurt(options, state):
    while not state.exists():
        time.sleep(0.1)
    known = json.loads(state.read_text())
    replicas = known["replicas"]
    stop, seams, broken, hurts = threading.Event(), [], [], []
    streams = [Stream(n, replicas[n % 3], stop, seams, broken) for n in range(options.streams)]
    for stream in streams:
        stream.start()
    time.sleep(3)
    for turn in range(options.times):
        known = json.loads(state.read_text())
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
    stop.set()
    time.sleep(6)
    print(f"SIG{options.signal} {options.times} times, {options.streams} streams; {len(broken)} broke with their own replica")
    for what, is_leader in ("were no leader", False), ("led the directory", True):
        times = [at for led, at in hurts if led == is_leader]
        # A pause belongs to the hurt that it ends behind.
        mine = sorted(pause * 1000 for pause, ended in seams
                      if any(at < ended and pause + 0.1 >= ended - at for at in times))
        if mine:
            at = lambda share: mine[min(len(mine) - 1, int(len(mine) * share))]
            print(f"  {len(times)} that {what}: {len(mine)} went on elsewhere, longest pause of each: "
                  f"p50 {statistics.median(mine):.0f} p90 {at(0.9):.0f} p99 {at(0.99):.0f} max {mine[-1]:.0f} ms")
    if not seams:
        raise SystemExit("no stream went over a seam")


if __name__ == "__main__":
    main()
