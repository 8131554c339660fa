//! Clients that only listen.

use super::*;

/// Takes as many open files as the system allows; whether those are enough.
fn files(wanted: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    // Where that fails, what there is decides.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.is_none_or(|allowed| allowed >= wanted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_listeners_by_the_thousand_take_little_memory_and_slow_nobody_down() {
    /// As many as may listen to one stream at one replica.
    const EACH: usize = 8;
    let listeners = number("EVERLINE_LISTENERS", 2_000) as usize;
    let streams = listeners.div_ceil(EACH);
    let wanted = (listeners + 3 * streams + 1000) as u64;
    if !files(wanted) {
        println!("SKIPPED: fewer than {wanted} open files are allowed; raise the hard limit (ulimit -Hn)");
        return;
    }
    let go = watch::Sender::new(false);
    let quiet = quiet(&go).await;
    let fleet = Fleet::of(3)
        .engines(1)
        .engine_arg("--decode-step-ms")
        .engine_arg("40")
        .set(&format!("http.max_connections={}", 2 * listeners + 1000))
        .set("streams.orphan_grace_s=3600")
        .start()
        .await;
    register(&fleet, "quiet", quiet.address).await;
    let base = format!("http://{}", fleet.balancer);
    let honest = Honest::begin(&base, None, 4).await;
    let body = json!({"model": "quiet", "stream": true, "prompt": "hush"});

    // Begun at one replica: they are held at the others, and so are some of those at the one that all
    // listen at.
    let (began, mut beginning) = (Instant::now(), JoinSet::new());
    let mut ids = Vec::new();
    for _ in 0..streams {
        if beginning.len() >= 64 {
            ids.push(beginning.join_next().await.expect("there are some").expect("it begins"));
        }
        let (address, body) = (fleet.replicas[1].http, body.clone());
        beginning.spawn(async move {
            let (_stream, head) = begin(address, None, &body).await;
            header(&head, "everline-stream").expect("a stream").to_owned()
        });
    }
    ids.extend(beginning.join_all().await);
    let began_in = began.elapsed();
    let before = memory(&fleet);
    let (attached, mut attaching) = (Instant::now(), JoinSet::new());
    let mut all = Vec::new();
    let listen = async |address: SocketAddr, id: String| {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let asked = format!("GET /v1/streams/{id} HTTP/1.1\r\nhost: a\r\n\r\n");
        stream.write_all(asked.as_bytes()).await.expect("a request is taken");
        let mut got = String::new();
        read_until(&mut stream, &mut got, "\r\n\r\n").await;
        (stream, got, id)
    };
    for at in 0..listeners {
        if attaching.len() >= 128 {
            all.push(attaching.join_next().await.expect("there are some").expect("it listens"));
        }
        let (address, id) = (fleet.replicas[0].http, ids[at / EACH].clone());
        attaching.spawn(async move {
            let (mut stream, mut got, id) = listen(address, id).await;
            read_until(&mut stream, &mut got, "data: {").await;
            (stream, got, id)
        });
    }
    all.extend(attaching.join_all().await);
    let attached_in = attached.elapsed();
    // One more of each is one too many, wherever the stream is held.
    for id in ids.iter().take(listeners / EACH).step_by(50) {
        let (mut stream, mut got, _) = listen(fleet.replicas[0].http, id.clone()).await;
        read_until(&mut stream, &mut got, "}}").await;
        let is_refused = got.starts_with("HTTP/1.1 429") && got.contains("too_many_listeners");
        assert!(is_refused || got.contains("stream_lost") && was_silent(&fleet), "{got}");
    }
    // Long enough for a sign of life to each of them.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let idle = memory(&fleet);
    let (read, stall) = honest.end().await;

    // They are not forgotten either.
    let released = Instant::now();
    go.send_replace(true);
    let mut ending = JoinSet::new();
    for (mut stream, mut got, id) in all {
        ending.spawn(async move {
            read_until(&mut stream, &mut got, "data: [DONE]").await;
            if got.contains("stream_lost") {
                return false;
            }
            let ids: Vec<&str> = got.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
            let expected: Vec<String> = (0..4).map(|seq| format!("{id}.{seq}")).collect();
            assert_eq!(ids, expected, "{got}");
            true
        });
    }
    let ended = ending.join_all().await.into_iter().filter(|whole| *whole).count();
    let each: Vec<f64> =
        before.iter().zip(&idle).map(|(b, i)| i.saturating_sub(*b) as f64 / listeners as f64).collect();
    println!(
        "{streams} streams begun in {:.1} s, {listeners} listeners in {:.1} s; KiB before {before:?}, with all of them \
         {idle:?}: {each:.1?} for each; {ended} heard the end within {:.1} s; {read} honest streams, longest pause {} ms",
        began_in.as_secs_f64(),
        attached_in.as_secs_f64(),
        released.elapsed().as_secs_f64(),
        stall.as_millis()
    );
    assert!(ended == listeners || was_silent(&fleet), "{ended} of {listeners} heard the end");
    assert!(each.iter().all(|kib| *kib < 64.0), "{each:?} KiB for each listener");
    assert!(read > 0);
}
