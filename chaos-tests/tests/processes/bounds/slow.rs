//! Clients that read slowly, or never.

use chaos_tests::raw::Answer;

use super::*;

/// All that is said to a client that takes 48 KiB each 60 ms at most.
async fn read_slowly(address: SocketAddr, body: &Value) -> String {
    let (mut stream, head) = begin(address, None, body).await;
    let (mut bytes, mut all) = (vec![0; 48 << 10], head.into_bytes());
    while !all.ends_with(b"0\r\n\r\n") {
        let read = tokio::time::timeout(LONG, stream.read(&mut bytes)).await.expect("it goes on");
        let read = read.expect("a slow reader keeps its connection");
        assert!(read > 0, "a slow reader keeps its connection");
        all.extend_from_slice(&bytes[..read]);
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    // Chunks may end anywhere.
    Answer::parse(&all).text()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_read_or_are_slow_hold_up_only_themselves() {
    const PIECE: usize = 32 << 10;
    const PIECES: usize = 1024;
    const NEVER: usize = 12;
    let written = Arc::new(AtomicU64::new(0));
    let gusher = {
        let written = Arc::clone(&written);
        RawWorker::start(move |mut stream: TcpStream, seen| {
            let written = Arc::clone(&written);
            async move {
                if is_refused(&mut stream, &seen).await {
                    return (stream, Then::KeepAlive);
                }
                // Little of what it has written is on its way.
                set_socket_send_buffer_size(&stream, 64 << 10).expect("a socket takes options");
                let pieces = if seen.body.windows(4).any(|bytes| bytes == b"some") { 64 } else { PIECES };
                let mut well = stream.write_all(EVENTS).await.is_ok();
                let piece = event(&format!("########{}", "x".repeat(PIECE)), None);
                for n in 0..pieces {
                    let text = piece.replacen("########", &format!("{n:08}"), 1);
                    // Many of these run at once, and the worker answers probes, too.
                    tokio::task::yield_now().await;
                    well = well && chunk(&mut stream, &text).await;
                    if well {
                        written.fetch_add(text.len() as u64, Ordering::Relaxed);
                    }
                }
                for text in [event("", Some("stop")), "data: [DONE]\n\n".to_owned()] {
                    well = well && chunk(&mut stream, &text).await;
                }
                // Who is not there any more is not told.
                let _ = stream.write_all(b"0\r\n\r\n").await;
                (stream, Then::Close)
            }
        })
        .await
    };
    let fleet = Fleet::of(3)
        .engines(1)
        .engine_arg("--decode-step-ms")
        .engine_arg("40")
        .set("streams.stream_bytes=1048576")
        .set("streams.orphan_grace_s=20")
        .set("http.write_stall_timeout_ms=4000")
        .start()
        .await;
    register(&fleet, "gush", gusher.address).await;
    let honest = Honest::begin(&format!("http://{}", fleet.balancer), None, 4).await;
    let before = memory(&fleet);
    let ask = |prompt: &str| json!({"model": "gush", "stream": true, "prompt": prompt});

    // Some never read the answer's body, some over HTTP/2 give it no window.
    let mut never = Vec::new();
    for at in 0..NEVER {
        never.push(begin(fleet.replicas[at % 3].http, None, &ask("all")).await);
    }
    let mut closed = Vec::new();
    for at in 0..NEVER {
        let none = h2::setting(h2::INITIAL_WINDOW_SIZE, 0);
        let mut raw = h2::Raw::connect(fleet.replicas[at % 3].http, &none).await.expect("a connection");
        assert!(raw.send(&h2::post(1, "/v1/completions", &ask("all").to_string())).await);
        closed.push(raw);
    }
    // One is slow, but goes on reading: it gets everything.
    let slow = {
        let address = fleet.replicas[0].http;
        let body = ask("some");
        tokio::spawn(async move {
            let (mut text, mut lost) = (read_slowly(address, &body).await, 0);
            while text.contains("stream_lost") && lost < 2 {
                lost += 1;
                text = read_slowly(address, &body).await;
            }
            let mut rest = text.as_str();
            for piece in (0..64).map(|n| format!("\"{n:08}x")) {
                let at = rest.find(&piece).unwrap_or_else(|| {
                    panic!("{piece} is missing: {} bytes, {}", text.len(), text.replace("xxxxxxxx", ""))
                });
                rest = &rest[at..];
            }
            assert!(rest.contains("[DONE]"));
            lost
        })
    };
    // Before they are let go: everything is full, and the worker waits.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let (full, kept) = (memory(&fleet), written.load(Ordering::Relaxed));
    // The h2 ones hear of it; the others' connections are closed.
    let let_go = Instant::now();
    for mut raw in closed {
        let reset = async {
            while raw.receive().await.expect("the connection stays").kind != h2::kind::RST_STREAM {}
        };
        tokio::time::timeout(LONG, reset).await.expect("a stream that nobody reads is reset");
    }
    for (mut stream, _) in never {
        // What was on its way is still there, then comes the end.
        let mut bytes = vec![0; 1 << 20];
        let drain = async { while let Ok(1..) = stream.read(&mut bytes).await {} };
        tokio::time::timeout(LONG, drain).await.expect("a client that never read is let go");
    }
    let let_go = let_go.elapsed();
    // A replica that was without a processor for a second is taken to be dead, and nobody can go on with
    // what this worker says. Nothing else excuses a loss.
    let lost = slow.await.expect("the slow reader is content");
    assert!(lost == 0 || was_silent(&fleet), "the slow reader's stream was lost, and no replica was silent");
    let after = memory(&fleet);
    let (read, stall) = honest.end().await;
    println!(
        "{} clients that never read: {} KiB taken from the worker; KiB before {before:?}, full {full:?}, after \
         {after:?}; let go after {:.1} s; {read} honest streams, longest pause {} ms",
        2 * NEVER,
        kept >> 10,
        2.5 + let_go.as_secs_f64(),
        stall.as_millis()
    );
    // Of each stream at most its bound, and a window, at each of two replicas; and what is on its way
    // in sockets, which is the kernel's. The allocator keeps some of what was freed; without bounds it would be
    // eight times as much.
    let bound = 2 * NEVER as u64 * (1024 + 2 * 256 + 512);
    for full in [&full, &after] {
        let growth: u64 = before.iter().zip(full).map(|(before, full)| full.saturating_sub(*before)).sum();
        assert!(growth < 3 * bound + (48 << 10), "{before:?} KiB became {full:?}");
    }
    let whole = (2 * NEVER * PIECES * PIECE) as u64;
    assert!(kept < whole / 4, "{kept} of {whole} bytes were taken for who reads none of it");
    assert!(read > 0);
}
