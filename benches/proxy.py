#!/usr/bin/env python3
"""CPU per request and latency of Everline beside other proxies: same minute, same workers, same load.

Two fake workers, one target after the other, the whole several times over; CPU is that of the
target's processes (user and system). Everline runs with least_loaded (`..._kv`: with kv_cost,
prompts compared as text, token ids as they are) and an API key that every request shows.
Everything on 127.0.0.1.

    benches/proxy.py                              # everline, everline3, plain, haproxy, nginx
    benches/proxy.py --targets everline,plain --reps 5 --secs 5
    benches/proxy.py --targets everline,plain --phases slow5000
    benches/proxy.py --targets plain,everline,everline_kv,everline3,everline3_kv --phases ns_c64,long_c64,ids_c64

Targets: direct (the worker), plain (a bare hyper proxy), haproxy, nginx, everline (one replica),
everline3 (three replicas, one of which gets the load; `cpu_all` is that of all three), everline3_local
(the same with `streams.durability = "local"`: a stream is held where its client is), everline_kv,
everline3_kv, and with --venvs DIR (`pip install sglang-router`, `vllm-router`, `smg` in DIR/<name>) sgl_rr, vllm_rr, smg_rr.
Phases: ns_c1, ns_c64 (not streaming, ~300 B), long_c64 (16 KiB), ids_c64 (4,000 token ids, half shared), st_max_c64 (64 chunks flat out),
st_first_c1 (2 chunks 10 ms apart, for the time to the first), st_10ms_c1, st_10ms_c64 (64 chunks, one each 10 ms), slow5000 (5,000 streams, a chunk a second).
"""
import argparse, json, os, pathlib, shutil, signal, statistics, subprocess, sys, tempfile, time, urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
WORKERS, PORT, ADMIN = (21001, 21002), 30100, 31100
PHASES = {
    "ns_c1": ["--conc", "1"],
    "ns_c64": ["--conc", "64"],
    "long_c64": ["--conc", "64", "--prefix-bytes", "16384"],
    "ids_c64": ["--conc", "64", "--path", "/v1/completions", "--ids", "4000"],
    "st_max_c64": ["--conc", "64", "--stream", "64"],
    "st_first_c1": ["--conc", "1", "--stream", "2", "--gap-us", "10000"],
    "st_10ms_c1": ["--conc", "1", "--stream", "64", "--gap-us", "10000"],
    "st_10ms_c64": ["--conc", "64", "--stream", "64", "--gap-us", "10000"],
    "slow5000": ["--conc", "5000", "--stream", "20", "--gap-us", "1000000"],
}
TICK = os.sysconf("SC_CLK_TCK")


def sh(*command, **more):
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)


def cpu(pids):
    total = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def rss_mib(pids):
    text = "".join(pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids)
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024


def family(pid):
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *map(int, out)]


def raise_priority(pids):
    """Above what else runs on the machine; needs root, and does without it."""
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                os.setpriority(os.PRIO_PROCESS, int(thread), -10)
            except OSError:
                pass


def wait_for(port, key):
    body = b'{"model":"fake-model","messages":[{"role":"user","content":"warm up"}],"max_tokens":2}'
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    for _ in range(300):
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=2).read()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"nothing answers on port {port}")


class Target:
    """A proxy under measurement, and how to stop it."""

    def __init__(self, name, options, folder):
        self.key, self.port, self.processes, self.others = "", PORT, [], []
        bins, urls = options.bins, [f"http://127.0.0.1:{port}" for port in WORKERS]
        if name == "direct":
            self.port = WORKERS[0]
        elif name == "plain":
            self.start(bins / "plainproxy", PORT, *(f"127.0.0.1:{port}" for port in WORKERS))
        elif name == "haproxy":
            servers = "".join(f"  server w{p} 127.0.0.1:{p}\n" for p in WORKERS)
            (folder / "haproxy.cfg").write_text(
                "global\n  maxconn 8000\n  nbthread 2\ndefaults\n  mode http\n  timeout connect 5s\n"
                "  timeout client 300s\n  timeout server 300s\n  http-reuse always\n  option http-no-delay\n"
                f"frontend f\n  bind 127.0.0.1:{PORT}\n  default_backend b\nbackend b\n  balance roundrobin\n{servers}")
            self.start("haproxy", "-f", folder / "haproxy.cfg", "-db")
        elif name == "nginx":
            servers = "".join(f"server 127.0.0.1:{p}; " for p in WORKERS)
            (folder / "nginx.conf").write_text(
                f"worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/nginx.err; daemon off;\n"
                "events { worker_connections 16384; }\nhttp { access_log off; client_body_buffer_size 256k;\n"
                f"upstream w {{ {servers} keepalive 256; }}\nserver {{ listen 127.0.0.1:{PORT}; keepalive_requests 10000000;\n"
                'location / { proxy_pass http://w; proxy_http_version 1.1; proxy_set_header Connection "";\n'
                "proxy_buffering off; proxy_read_timeout 300s; } } }\n")
            self.start("nginx", "-c", folder / "nginx.conf")
        elif name in ("everline", "everline3", "everline3_local", "everline_kv", "everline3_kv"):
            routing = ('policy = "kv_cost"\n[kv]\ndefault_mode = "text"\n' if name.endswith("_kv")
                       else 'policy = "least_loaded"\n')
            if name.endswith("_local"):
                routing += '[streams]\ndurability = "local"\n'
            self.everline(options, folder, 3 if name.startswith("everline3") else 1, urls, routing)
        elif name in ("sgl_rr", "vllm_rr", "smg_rr"):
            common = ["--host", "127.0.0.1", "--port", PORT, "--worker-urls", *urls, "--policy", "round_robin",
                      "--prometheus-host", "127.0.0.1", "--prometheus-port", ADMIN]
            venvs = pathlib.Path(options.venvs or sys.exit(f"{name} needs --venvs"))
            program = {
                "sgl_rr": [venvs / "sglang-router/bin/python", "-m", "sglang_router.launch_router", "--log-level", "warn"],
                "vllm_rr": [venvs / "vllm-router/bin/vllm-router"],
                "smg_rr": [venvs / "smg/bin/smg", "launch", "--log-level", "warn"],
            }[name]
            self.start(*program, *common)
        else:
            sys.exit(f"no target is called {name}")
        wait_for(self.port, self.key)
        for process in self.processes + self.others:
            raise_priority(family(process.pid))

    def start(self, *command):
        self.processes.append(sh(*command))

    def everline(self, options, folder, replicas, urls, routing):
        made = subprocess.run([options.everline, "keys", "new", "bench"], capture_output=True, text=True, check=True)
        self.key = next(word for word in made.stdout.split() if word.startswith("ev_"))
        digest = subprocess.run([options.everline, "keys", "hash"], input=self.key, capture_output=True, text=True, check=True)
        (folder / "keys.toml").write_text(f'[[key]]\nid = "bench"\nsha256 = "{digest.stdout.strip().split()[-1].strip(chr(34))}"\n')
        workers = "".join(f'[[worker]]\nurl = "{u}"\nmodels = ["fake-model"]\nprobe = false\n' for u in urls)
        peers = [f'"r{n}=127.0.0.1:{ADMIN + 100 * n + 2}"' for n in range(replicas)]
        for n in range(replicas):
            base = ADMIN + 100 * n
            http = PORT if n == 0 else base
            (folder / f"r{n}.toml").write_text(
                f'[replica]\nname = "r{n}"\ndata_dir = "{folder}/r{n}"\n'
                f'[http]\nlisten = "127.0.0.1:{http}"\nkeys_file = "{folder}/keys.toml"\n'
                f'[admin]\nlisten = "127.0.0.1:{base + 1}"\n[peer]\nlisten = "127.0.0.1:{base + 2}"\n'
                + (f'[cluster]\npeers = [{", ".join(peers)}]\n' if replicas > 1 else "")
                + f'[proxy]\n{routing}[log]\nfilter = "warn"\n' + (workers if n == 0 else ""))
            process = sh(options.everline, "serve", "--config", folder / f"r{n}.toml")
            (self.processes if n == 0 else self.others).append(process)

    def pids(self):
        return [pid for process in self.processes for pid in family(process.pid)]

    def stop(self):
        for process in self.processes + self.others:
            for pid in reversed(family(process.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()


def measure(name, phase, target, options):
    load = [options.bins / "loadgen", "--url", f"127.0.0.1:{target.port}", *PHASES[phase], "--key", target.key]
    high = (lambda: os.setpriority(os.PRIO_PROCESS, 0, -10)) if os.geteuid() == 0 else None
    if phase != "slow5000":
        subprocess.run([*map(str, load), "--secs", "1"], stdout=subprocess.DEVNULL, preexec_fn=high)
    pids, others = target.pids(), [p.pid for p in target.others]
    before, before_others, rss = cpu(pids), cpu(others), 0.0
    secs = "5" if phase == "slow5000" else str(options.secs)
    run = subprocess.Popen([*map(str, load), "--secs", secs], stdout=subprocess.PIPE, text=True, preexec_fn=high)
    while run.poll() is None:
        time.sleep(0.2)
        rss = max(rss, rss_mib(pids))
    result = json.loads(run.stdout.read())
    spent, all_spent = cpu(pids) - before, cpu(pids) - before + cpu(others) - before_others
    done = max(result["ok"], 1)
    row = {
        "target": name, "phase": phase, "rps": result["rps"], "p50_us": result["lat_us"][0], "p99_us": result["lat_us"][2],
        "errors": result["errs"] + result["short"], "cpu_us": 1e6 * spent / done, "cpu_all_us": 1e6 * all_spent / done,
        "rss_mib": rss, "load": os.getloadavg()[0],
    }
    if result.get("chunks"):
        row |= {"cpu_us_chunk": 1e6 * spent / result["chunks"], "ttft_us": result["ttft_us"][0], "relay_us": result["relay_us"][0]}
    return row


def table(rows, phases, targets):
    def median(target, phase, field):
        values = [r[field] for r in rows if (r["target"], r["phase"]) == (target, phase) and field in r]
        return statistics.median(values) if values else None

    for phase in phases:
        unit = "cpu_us_chunk" if "st_" in phase or phase == "slow5000" else "cpu_us"
        plain = median("plain", phase, unit)
        print(f"\n{phase}: {'us CPU a chunk' if unit == 'cpu_us_chunk' else 'us CPU a request'}, x plain, medians of {max(1, sum(r['phase'] == phase for r in rows) // len(targets))}")
        for target in targets:
            spent = median(target, phase, unit)
            if spent is None:
                continue
            more = "".join(f"  {field} {median(target, phase, field):.0f}" for field in ("ttft_us", "relay_us") if median(target, phase, field) is not None)
            everywhere = f"  all replicas {median(target, phase, 'cpu_all_us'):.1f} us/request" if target.startswith("everline3") else ""
            ratio = f"{spent / plain:5.2f} x" if plain and target != "direct" else "       "
            errors = sum(r["errors"] for r in rows if (r["target"], r["phase"]) == (target, phase))
            print(f"  {target:10s} {spent:7.2f} {ratio}  rps {median(target, phase, 'rps'):7.0f}  p50 {median(target, phase, 'p50_us'):7.0f}"
                  f"  p99 {median(target, phase, 'p99_us'):7.0f}  rss {median(target, phase, 'rss_mib'):4.0f} MiB{more}{everywhere}  errors {errors}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="direct,plain,everline,everline3,haproxy,nginx")
    parser.add_argument("--phases", default="ns_c1,ns_c64,long_c64,st_max_c64,st_10ms_c1,st_10ms_c64")
    parser.add_argument("--secs", type=float, default=5)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--everline", default=ROOT / "target/release/everline")
    parser.add_argument("--venvs", help="folder of virtual environments with other routers")
    parser.add_argument("--out", help="append one JSON line a measurement to this file")
    options = parser.parse_args()
    options.bins = ROOT / "target/peers/release"
    build = ["cargo", "build", "--release", "--quiet", "--manifest-path", HERE / "peers/Cargo.toml", "--target-dir", ROOT / "target/peers"]
    subprocess.run(build, check=True)
    if not pathlib.Path(options.everline).exists():
        subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    targets, phases, rows = options.targets.split(","), options.phases.split(","), []
    for name in [t for t in targets if t in ("haproxy", "nginx") and not shutil.which(t)]:
        print(f"{name} is not installed: left out", file=sys.stderr)
        targets.remove(name)
    for _ in range(options.reps):
        for name in targets:
            fakes = [sh(options.bins / "fakew", port) for port in WORKERS]
            time.sleep(0.3)
            raise_priority([fake.pid for fake in fakes])
            with tempfile.TemporaryDirectory(prefix="everline-bench-") as folder:
                target = Target(name, options, pathlib.Path(folder))
                try:
                    for phase in phases:
                        row = measure(name, phase, target, options)
                        rows.append(row)
                        if options.out:
                            with open(options.out, "a") as out:
                                out.write(json.dumps(row) + "\n")
                finally:
                    target.stop()
                    for fake in fakes:
                        fake.kill()
                        fake.wait()
            time.sleep(0.3)
    table(rows, phases, targets)


if __name__ == "__main__":
    main()
