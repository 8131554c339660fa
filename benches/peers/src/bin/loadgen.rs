//! loadgen: closed-loop HTTP/1.1 load generator for OpenAI-style routers.
//!
//! usage: loadgen --url HOST:PORT [--path /v1/chat/completions] [--conc 64] [--secs 10]
//!                [--max-reqs N] [--stream N_CHUNKS] [--gap-us G] [--prefix-bytes B]
//!                [--prefixes P] [--unique-bytes U] [--model NAME] [--label TEXT] [--key SECRET]
//!                [--ids N]
//! With --ids (and --path /v1/completions), prompts are N token ids: half of them of one of the P
//! prefixes, half of one of 256 tails that begins with a number of its own.
//! Bodies: P distinct shared prefixes of B bytes plus a unique tail of U bytes per request.
//! Prints one JSON line: requests, errors, rps, latency p50/p90/p99/p999 (us); in streaming
//! mode also TTFT percentiles, per-chunk relay latency percentiles (worker timestamp to
//! arrival here) and chunks/s.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn mono_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

#[derive(Default)]
struct Out {
    lat: Vec<u32>,
    ttft: Vec<u32>,
    relay: Vec<u32>,
    chunks: u64,
    errs: u64,
    short: u64,
}

struct Cfg {
    id_prefixes: Vec<String>, id_tails: Vec<String>,
    url: String,
    path: String,
    stream: u64,
    gap: u64,
    prefixes: Vec<String>,
    unique: usize,
    model: String,
    max_reqs: u64,
    /// A header line with the key, or nothing.
    key: String,
}

fn find(h: &[u8], n: &[u8]) -> Option<usize> {
    memchr::memmem::find(h, n)
}

fn pct(v: &mut [u32], p: f64) -> u32 {
    if v.is_empty() { return 0; }
    let i = ((v.len() as f64 - 1.0) * p).round() as usize;
    *v.select_nth_unstable(i).1
}

async fn one(s: &mut TcpStream, buf: &mut Vec<u8>, req: &[u8], c: &Cfg, o: &mut Out) -> Result<bool, ()> {
    let t0 = Instant::now();
    s.write_all(req).await.map_err(|_| ())?;
    buf.clear();
    let (head, clen, chunked, status, close) = loop {
        if s.read_buf(buf).await.map_err(|_| ())? == 0 { return Err(()); }
        let mut hs = [httparse::EMPTY_HEADER; 64];
        let mut r = httparse::Response::new(&mut hs);
        if let Ok(httparse::Status::Complete(n)) = r.parse(buf) {
            let (mut cl, mut ch, mut close) = (None, false, false);
            for h in r.headers.iter() {
                if h.name.eq_ignore_ascii_case("content-length") { cl = std::str::from_utf8(h.value).ok().and_then(|x| x.trim().parse::<usize>().ok()); }
                if h.name.eq_ignore_ascii_case("transfer-encoding") { ch = true; }
                if h.name.eq_ignore_ascii_case("connection") && h.value.eq_ignore_ascii_case(b"close") { close = true; }
            }
            break (n, cl, ch, r.code.unwrap_or(0), close);
        }
    };
    buf.drain(..head);
    let mut keep = !close;
    if c.stream > 0 && status == 200 {
        // scan for data frames as they arrive; end at the zero chunk
        let mut scanned = 0usize;
        let mut n = 0u64;
        let mut done = false;
        let mut first = true;
        loop {
            let now = mono_ns();
            while let Some(i) = find(&buf[scanned..], b"\"ts\":\"") {
                let at = scanned + i + 6;
                if buf.len() < at + 20 { break; }
                if let Ok(ts) = std::str::from_utf8(&buf[at..at + 20]).unwrap_or("x").parse::<u64>() {
                    o.relay.push((now.saturating_sub(ts) / 1000) as u32);
                }
                if first { o.ttft.push(t0.elapsed().as_micros() as u32); first = false; }
                n += 1;
                scanned = at + 20;
            }
            if find(&buf[scanned..], b"[DONE]").is_some() { done = true; }
            if done && (buf.ends_with(b"0\r\n\r\n") || !chunked) { break; }
            // keep the tail only
            if scanned > 8192 { buf.drain(..scanned); scanned = 0; }
            if s.read_buf(buf).await.map_err(|_| ())? == 0 {
                if !done { o.short += 1; return Err(()); }
                keep = false;
                break;
            }
        }
        o.chunks += n;
        if n < c.stream { o.short += 1; }
    } else if let Some(cl) = clen {
        while buf.len() < cl { if s.read_buf(buf).await.map_err(|_| ())? == 0 { return Err(()); } }
    } else if chunked {
        while !buf.ends_with(b"0\r\n\r\n") { if s.read_buf(buf).await.map_err(|_| ())? == 0 { return Err(()); } }
    }
    if status != 200 { return Err(()); }
    o.lat.push(t0.elapsed().as_micros() as u32);
    Ok(keep)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let a: Vec<String> = std::env::args().collect();
    let g = |k: &str, d: &str| a.iter().position(|x| x == k).and_then(|i| a.get(i + 1)).cloned().unwrap_or_else(|| d.to_string());
    let conc: u64 = g("--conc", "64").parse().unwrap();
    let secs: f64 = g("--secs", "10").parse().unwrap();
    let pb: usize = g("--prefix-bytes", "200").parse().unwrap();
    let np: usize = g("--prefixes", "64").parse().unwrap();
    let prefixes = (0..np)
        .map(|i| {
            let mut s = format!("prefix {i:05} ");
            let mut x = i as u64 + 1;
            while s.len() < pb {
                x ^= x << 13; x ^= x >> 7; x ^= x << 17;
                s.push_str(&format!("w{:x} ", x & 0xffff));
            }
            s.truncate(pb.max(13));
            s
        })
        .collect();
    let ids: usize = g("--ids", "0").parse().unwrap();
    let list = |seed: usize, n: usize| (0..n).map(|i| ((seed * 7919 + i * 31) % 120_000).to_string()).collect::<Vec<_>>().join(",");
    let id_prefixes = (0..if ids > 0 { np } else { 0 }).map(|i| list(i + 1, ids / 2)).collect();
    let id_tails = (0..if ids > 0 { 256 } else { 0 }).map(|i| list(i + 10_001, ids - ids / 2 - 1)).collect();
    let c = Arc::new(Cfg {
        id_prefixes, id_tails,
        url: g("--url", "127.0.0.1:30000"), path: g("--path", "/v1/chat/completions"),
        stream: g("--stream", "0").parse().unwrap(), gap: g("--gap-us", "0").parse().unwrap(),
        prefixes, unique: g("--unique-bytes", "60").parse().unwrap(),
        model: g("--model", "fake-model"), max_reqs: g("--max-reqs", "1000000000").parse().unwrap(),
        key: match g("--key", "").as_str() { "" => String::new(), key => format!("authorization: Bearer {key}\r\n") },
    });
    let seq = Arc::new(AtomicU64::new(0));
    let stop = Instant::now() + Duration::from_secs_f64(secs);
    let t0 = Instant::now();
    let seed = g("--seed", "0").parse::<u64>().unwrap();
    let mut hs = Vec::new();
    for _ in 0..conc {
        let (c, seq) = (c.clone(), seq.clone());
        hs.push(tokio::spawn(async move {
            let mut o = Out::default();
            let mut buf = Vec::with_capacity(65536);
            let mut conn: Option<TcpStream> = None;
            while Instant::now() < stop {
                let n = seq.fetch_add(1, Ordering::Relaxed);
                if n >= c.max_reqs { break; }
                let p = &c.prefixes[(n.wrapping_mul(0x9E3779B97F4A7C15) >> 33) as usize % c.prefixes.len()];
                let mut uniq = format!("q{:016x} ", (n + seed * 1_000_000_007).wrapping_mul(0x9E3779B97F4A7C15));
                while uniq.len() < c.unique { let l = uniq.len(); uniq.push_str(&format!("u{:x} ", (n + 1).wrapping_mul(l as u64 | 1).wrapping_mul(0x2545F4914F6CDD1D) >> 40)); }
                uniq.truncate(c.unique);
                if c.gap > 0 { uniq.push_str(&format!(" gap_us={}", c.gap)); }
                let tail = if c.stream > 0 { format!(",\"stream\":true,\"max_tokens\":{}", c.stream) } else { ",\"max_tokens\":16".to_string() };
                let body = if !c.id_prefixes.is_empty() {
                    let p = &c.id_prefixes[(n.wrapping_mul(0x9E3779B97F4A7C15) >> 33) as usize % c.id_prefixes.len()];
                    format!("{{\"model\":\"{}\",\"prompt\":[{},{},{}]{}}}", c.model, p, (n + seed) % 120_000, c.id_tails[n as usize % c.id_tails.len()], tail)
                } else if c.path.ends_with("chat/completions") {
                    format!("{{\"model\":\"{}\",\"messages\":[{{\"role\":\"system\",\"content\":\"{}\"}},{{\"role\":\"user\",\"content\":\"{}\"}}]{}}}", c.model, p, uniq, tail)
                } else {
                    format!("{{\"model\":\"{}\",\"prompt\":\"{}{}\"{}}}", c.model, p, uniq, tail)
                };
                let req = format!("POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n{}content-length: {}\r\n\r\n{}", c.path, c.url, c.key, body.len(), body);
                if conn.is_none() {
                    match TcpStream::connect(&c.url).await {
                        Ok(s) => { let _ = s.set_nodelay(true); conn = Some(s); }
                        Err(_) => { o.errs += 1; tokio::time::sleep(Duration::from_millis(20)).await; continue; }
                    }
                }
                match one(conn.as_mut().unwrap(), &mut buf, req.as_bytes(), &c, &mut o).await {
                    Ok(true) => {}
                    Ok(false) => conn = None,
                    Err(()) => { o.errs += 1; conn = None; }
                }
            }
            o
        }));
    }
    let mut all = Out::default();
    for h in hs {
        let o = h.await.unwrap();
        all.lat.extend(o.lat); all.ttft.extend(o.ttft); all.relay.extend(o.relay);
        all.chunks += o.chunks; all.errs += o.errs; all.short += o.short;
    }
    let el = t0.elapsed().as_secs_f64();
    let n = all.lat.len();
    print!("{{\"label\":\"{}\",\"conc\":{},\"secs\":{:.2},\"ok\":{},\"errs\":{},\"short\":{},\"rps\":{:.1},\"lat_us\":[{},{},{},{}]", g("--label", ""), conc, el, n, all.errs, all.short, n as f64 / el, pct(&mut all.lat, 0.5), pct(&mut all.lat, 0.9), pct(&mut all.lat, 0.99), pct(&mut all.lat, 0.999));
    if c.stream > 0 {
        print!(",\"ttft_us\":[{},{},{}],\"relay_us\":[{},{},{}],\"chunks\":{},\"chunks_s\":{:.0}", pct(&mut all.ttft, 0.5), pct(&mut all.ttft, 0.9), pct(&mut all.ttft, 0.99), pct(&mut all.relay, 0.5), pct(&mut all.relay, 0.9), pct(&mut all.relay, 0.99), all.chunks, all.chunks as f64 / el);
    }
    println!("}}");
}
