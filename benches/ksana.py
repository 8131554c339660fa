#!/usr/bin/env python3
"""CPU per request and latency of `/generate` to a KsanaLLM pair: Everline beside stand-ins for its router.

One prefill and one decode node (raw sockets, no work of their own: a token, and eight tokens back to
back), a closed loop with a new connection for each request, one target after the other, the whole
several times over in the same window. CPU is that of the target's processes (user and system).

    benches/ksana.py                                 # everline, everline_strict, shared, stock, direct
    benches/ksana.py --targets everline,stock --reps 3 --secs 5 --conc 1,16,64

Targets: everline (fixed mode, one replica), everline_strict, direct (the decode node itself), and with
--python (an interpreter with fastapi, uvicorn, httpx and sqlalchemy) stock and shared. Those two do on
FastAPI, httpx and SQLAlchemy what the reference router's proxy was seen to do for a request: ask SQLite for
the pairs and for both nodes of one, parse and write the body, make a client (stock) or use one for all
(shared), send both legs, wait for both heads, merge by tasks and a poll every 100 ms, and write its log to a
file and to stderr.
"""
import argparse, asyncio, json, os, pathlib, shutil, signal, statistics, subprocess, sys, tempfile, time, urllib.request

HERE = pathlib.Path(__file__).resolve().parent
PREFILL, DECODE, ROUTER, ADMIN, PEER = 22001, 22002, 32080, 32081, 32082
TICK = os.sysconf("SC_CLK_TCK")
TOKENS = 8


def frame(tokens):
    ids = list(range(100, 100 + tokens))
    return json.dumps({"texts": ["x" * tokens], "output_token_ids": [ids], "logprobs": [], "input_token_ids": [1, 2, 3]},
                      separators=(",", ":")).encode() + b"\0"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


# ---- nodes ----

async def nodes():
    def serve(tokens):
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        frames = [chunk(frame(n + 1)) for n in range(tokens)]

        async def serve_one(reader, writer):
            try:
                while True:
                    asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = int(asked.split(b"content-length:")[1].split(b"\r\n")[0])
                    await reader.readexactly(length)
                    # Of the answer's own pieces the router sees as many as it reads.
                    writer.write(head)
                    for one in frames:
                        writer.write(one)
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()
        return serve_one

    one = await asyncio.start_server(serve(1), "127.0.0.1", PREFILL)
    other = await asyncio.start_server(serve(TOKENS), "127.0.0.1", DECODE)
    print("ready", flush=True)
    await asyncio.gather(one.serve_forever(), other.serve_forever())


# ---- stand-ins ----

def database(folder):
    """As the router keeps its nodes and pairs; gives a function that picks a pair."""
    import random
    from datetime import datetime, timezone
    from sqlalchemy import JSON, Boolean, DateTime, Integer, String, create_engine, select
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

    class Base(DeclarativeBase):
        pass

    class Node(Base):
        __tablename__ = "node_info"
        id: Mapped[int] = mapped_column(Integer, primary_key=True)
        node_id: Mapped[str] = mapped_column(String(64), unique=True)
        cluster_name: Mapped[str] = mapped_column(String(128), index=True)
        inference_addr: Mapped[str] = mapped_column(String(128))
        coordinator_addr: Mapped[str] = mapped_column(String(128))
        role: Mapped[str] = mapped_column(String(16))
        node_rank: Mapped[int] = mapped_column(Integer)
        world_size: Mapped[int] = mapped_column(Integer)
        device_num: Mapped[int] = mapped_column(Integer)
        last_heartbeat: Mapped[datetime] = mapped_column(DateTime(timezone=True))
        is_online: Mapped[bool] = mapped_column(Boolean)
        start_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
        created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
        updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))

    class Pair(Base):
        __tablename__ = "comm_group_pair"
        id: Mapped[int] = mapped_column(Integer, primary_key=True)
        comm_key: Mapped[str] = mapped_column(String(256), unique=True)
        is_active: Mapped[bool] = mapped_column(Boolean)
        cluster_name: Mapped[str] = mapped_column(String(128), index=True)
        prefill_addr: Mapped[str] = mapped_column(String(128), index=True)
        decode_addr: Mapped[str] = mapped_column(String(128), index=True)
        control_channel_meta: Mapped[list] = mapped_column(JSON)
        data_channel_meta: Mapped[str] = mapped_column(JSON)
        updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))

    engine = create_engine(f"sqlite:///{folder}/router.db")
    Base.metadata.create_all(engine)
    now, addresses = datetime.now(timezone.utc), [f"127.0.0.1:{port}" for port in (PREFILL, DECODE)]
    with Session(engine) as session:
        for role, address in zip(("prefill", "decode"), addresses):
            session.add(Node(node_id=role, cluster_name="c", inference_addr=address, coordinator_addr=address + "0",
                             role=role, node_rank=0, world_size=1, device_num=1, is_online=True, last_heartbeat=now,
                             start_time=now, created_at=now, updated_at=now))
        session.add(Pair(comm_key="__".join(addresses), is_active=True, cluster_name="c", prefill_addr=addresses[0],
                         decode_addr=addresses[1], control_channel_meta=[], data_channel_meta="X", updated_at=now))
        session.commit()

    def pick():
        with Session(engine) as session:
            pairs = list(session.scalars(select(Pair).where(Pair.is_active.is_(True), Pair.cluster_name == "c")))
            random.shuffle(pairs)
            for pair in pairs:
                asked = (("prefill", pair.prefill_addr), ("decode", pair.decode_addr))
                if all(session.scalar(select(Node).where(
                        Node.inference_addr == address, Node.role == role, Node.node_rank == 0, Node.is_online.is_(True)))
                       for role, address in asked):
                    return pair.comm_key, pair.prefill_addr, pair.decode_addr
        raise RuntimeError("no pair")
    return pick


def stand_in(is_shared):
    import httpx, logging, uvicorn, zlib
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    folder = tempfile.TemporaryDirectory(prefix="everline-ksana-")
    # httpx says a line for each leg, uvicorn one for the request.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(process)d | %(levelname)s | %(name)s | %(message)s",
                        handlers=[logging.FileHandler(f"{folder.name}/router.log"), logging.StreamHandler()])
    log = logging.getLogger("router")
    app, numbers, pick = FastAPI(), iter(range(110, 1 << 31)), database(folder.name)
    shared = httpx.AsyncClient(timeout=None) if is_shared else None

    @app.post("/generate")
    async def generate(request: Request):
        key, *addresses = pick()
        number = zlib.crc32(f"{os.getpid()}:{next(numbers)}".encode()) & 0x7FFFFFFF or 1
        headers = {"kv-comm-group-key": key, "kv-comm-request-id": str(number)}
        log.info("request %s goes to %s", number, addresses)
        client, body = shared or httpx.AsyncClient(timeout=None), await request.json()
        legs = [client.build_request("POST", f"http://{address}/generate", json=body, headers=headers) for address in addresses]
        prefill, decode = await asyncio.gather(*(client.send(leg, stream=True) for leg in legs))

        async def merged():
            out, has_decoded = asyncio.Queue(), asyncio.Event()

            async def read(answer, only_first):
                async for data in answer.aiter_bytes():
                    if only_first and has_decoded.is_set():
                        return
                    parts = data.split(b"\0")
                    for at, part in enumerate(parts):
                        if not part:
                            continue
                        await out.put(part + (b"\0" if at < len(parts) - 1 else b""))
                        if only_first:
                            return
                        has_decoded.set()

            async def closed(answer, reading):
                try:
                    await reading
                finally:
                    await answer.aclose()

            reads = [(prefill, asyncio.create_task(read(prefill, True))), (decode, asyncio.create_task(read(decode, False)))]
            ends = [asyncio.create_task(closed(*one)) for one in reads]
            try:
                while True:
                    try:
                        yield await asyncio.wait_for(out.get(), 0.1)
                    except asyncio.TimeoutError:
                        if all(end.done() for end in ends):
                            break
                log.info("request %s is done", number)
                yield b"[DONE]\0"
            finally:
                if not is_shared:
                    await client.aclose()
        return StreamingResponse(merged(), media_type="application/octet-stream")

    uvicorn.run(app, host="127.0.0.1", port=ROUTER)


# ---- load ----

async def load(port, conc, secs, has_done):
    body = json.dumps({"prompt": "hello " * 16, "stream": True}).encode()
    request = (b"POST /generate HTTP/1.1\r\nhost: router\r\nconnection: close\r\ncontent-type: application/json\r\n"
               b"content-length: %d\r\n\r\n%s" % (len(body), body))
    last = frame(TOKENS)
    first_bytes, totals, errors = [], [], []
    end = time.perf_counter() + secs

    async def client():
        while time.perf_counter() < end:
            began, first, seen = time.perf_counter(), None, b""
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                while not seen.endswith(b"0\r\n\r\n"):
                    data = await reader.read(65536)
                    if not data:
                        break
                    seen += data
                    if first is None and b'"texts"' in seen:
                        first = time.perf_counter()
                writer.close()
            except OSError as why:
                errors.append(str(why))
                continue
            took = time.perf_counter()
            is_whole = seen.startswith(b"HTTP/1.1 200") and last in seen and (b"[DONE]\0" in seen or not has_done)
            if not is_whole or first is None:
                errors.append(seen[-200:].decode("utf-8", "replace"))
                continue
            first_bytes.append((first - began) * 1000)
            totals.append((took - began) * 1000)

    # A round to warm up, uncounted.
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(conc)))
    return first_bytes, totals, errors, time.perf_counter() - began


def at(values, part):
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else float("nan")


# ---- targets ----

def cpu(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def post(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{ROUTER}{path}", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=5))


def until(what, holds, secs=30):
    end = time.time() + secs
    while time.time() < end:
        try:
            if holds():
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"never came true: {what}")


def register():
    ids = {}
    for role, port in (("prefill", PREFILL), ("decode", DECODE)):
        reply = post("/RegisterNode", {
            "inference_addr": f"127.0.0.1:{port}", "coordinator_addr": f"127.0.0.1:{port + 10}", "group_role": role,
            "node_rank": 0, "world_size": 1, "devices": [{"device_id": 0, "device_ip": "127.0.0.1", "device_type": "T"}]})
        ids[role] = reply["node_id"]
    for _ in range(2):
        for node in ids.values():
            post("/Heartbeat", {"node_id": node})
        post("/RegisterCommId", {"node_id": ids["prefill"], "comm_id": "X",
                                 "comm_key": f"127.0.0.1:{PREFILL}__127.0.0.1:{DECODE}"})


class Target:
    def __init__(self, name, args):
        self.name, self.folder, self.process = name, None, None
        if name == "direct":
            return
        if name.startswith("everline"):
            self.folder = tempfile.mkdtemp(prefix="everline-ksana-")
            compat = "strict" if name.endswith("strict") else "fixed"
            sets = [f"http.listen=127.0.0.1:{ROUTER}", f"admin.listen=127.0.0.1:{ADMIN}", f"peer.listen=127.0.0.1:{PEER}",
                    f"replica.data_dir={self.folder}", "ksana.enabled=true", f"ksana.compat={compat}", "log.filter=warn",
                    "ksana.heartbeat_timeout_s=3600"]
            command = [args.everline, "serve", *(part for one in sets for part in ("--set", one))]
        else:
            command = [args.python, __file__, "--stand-in", name]
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                                        stderr=None if name.startswith("everline") else subprocess.DEVNULL)
        if name.startswith("everline"):
            until("everline is ready", lambda: urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}/readyz").status == 200)
            until("the pair is registered", lambda: register() is None)
        else:
            until(f"{name} is ready", lambda: urllib.request.urlopen(f"http://127.0.0.1:{ROUTER}/openapi.json").status == 200)

    def run(self, conc, secs):
        port = DECODE if self.process is None else ROUTER
        asyncio.run(load(port, conc, 0.5, self.process is not None))
        before = cpu(self.process.pid) if self.process else 0
        first, totals, errors, took = asyncio.run(load(port, conc, secs, self.process is not None))
        used = cpu(self.process.pid) - before if self.process else float("nan")
        if errors:
            print(f"  {self.name} c{conc}: {len(errors)} errors, such as {errors[0]!r}", file=sys.stderr)
        count = max(1, len(totals))
        return {"target": self.name, "conc": conc, "n": len(totals), "errors": len(errors), "req_s": len(totals) / took,
                "cpu_ms": used * 1000 / count, "ttft_p50": at(first, 0.5), "ttft_p99": at(first, 0.99),
                "total_p50": at(totals, 0.5), "total_p99": at(totals, 0.99), "total_max": max(totals, default=float("nan"))}

    def stop(self):
        if self.process:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everline", default=HERE.parent / "target/release/everline")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--targets", default="stock,shared,everline,everline_strict,direct")
    parser.add_argument("--conc", default="1,16,64")
    parser.add_argument("--secs", type=float, default=5)
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--json", help="append a line for each measurement to this file")
    parser.add_argument("--stand-in", help=argparse.SUPPRESS)
    parser.add_argument("--nodes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stand_in:
        return stand_in(args.stand_in == "shared")
    if args.nodes:
        return asyncio.run(nodes())
    served = subprocess.Popen([sys.executable, __file__, "--nodes"], stdout=subprocess.PIPE)
    served.stdout.readline()
    rows, targets = [], args.targets.split(",")
    try:
        for rep in range(args.reps):
            # There and back again, so that a drift of the machine meets all alike.
            for name in targets if rep % 2 == 0 else reversed(targets):
                target = Target(name, args)
                try:
                    for conc in map(int, args.conc.split(",")):
                        rows.append(target.run(conc, args.secs))
                        print(json.dumps(rows[-1]), flush=True)
                finally:
                    target.stop()
    finally:
        served.terminate()
    if args.json:
        with open(args.json, "a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n| target | conc | n | errors | req/s | CPU ms/req | TTFT p50 | p99 | total p50 | p99 | max |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in targets:
        for conc in map(int, args.conc.split(",")):
            some = [row for row in rows if row["target"] == name and row["conc"] == conc]
            middle = lambda key: statistics.median(row[key] for row in some)
            cost = "–" if name == "direct" else f"{middle('cpu_ms'):.3f}"
            print(f"| {name} | {conc} | {sum(r['n'] for r in some)} | {sum(r['errors'] for r in some)} | {middle('req_s'):.0f} "
                  f"| {cost} | {middle('ttft_p50'):.1f} | {middle('ttft_p99'):.1f} | {middle('total_p50'):.1f} "
                  f"| {middle('total_p99'):.1f} | {max(r['total_max'] for r in some):.1f} |")


if __name__ == "__main__":
    main()
