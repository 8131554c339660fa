//! Guessed ids of streams.

use super::*;

/// A guess, and how the answer is read.
struct Guess {
    method: &'static str,
    path: String,
    /// Whether there is such a stream.
    is_somebodys: bool,
}

impl Guess {
    /// The `n`th way to ask for this stream.
    fn nth(n: usize, id: StreamId, is_somebodys: bool) -> Self {
        let (method, path) = match n % 7 {
            1 => ("HEAD", format!("/v1/streams/{id}")),
            2 => ("DELETE", format!("/v1/streams/{id}")),
            3 => ("POST", format!("/v1/streams/{id}/cancel")),
            4 => ("POST", format!("/v1/streams/{id}/token")),
            5 => ("GET", format!("/v1/responses/{}", id.to_string().replace("st_", "resp_"))),
            6 => ("GET", format!("/v1/streams/{id}?after=1")),
            _ => ("GET", format!("/v1/streams/{id}")),
        };
        Self { method, path, is_somebodys }
    }
}

/// Answers, without what is different in each: how often, to guesses at somebody's and at nobody's
/// stream.
type Answers = BTreeMap<(&'static str, u16, String), [u64; 2]>;

/// A client that guesses on one connection, many at a time.
struct Guesser {
    stream: TcpStream,
    key: String,
    buffer: Vec<u8>,
    answers: Answers,
}

impl Guesser {
    async fn connect(address: SocketAddr, key: &str) -> Self {
        let stream = TcpStream::connect(address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket takes options");
        Self { stream, key: key.to_owned(), buffer: Vec::new(), answers: Answers::new() }
    }

    async fn guess(&mut self, guesses: &[Guess]) {
        let mut asked = String::new();
        for Guess { method, path, .. } in guesses {
            asked.push_str(&format!(
                "{method} {path} HTTP/1.1\r\nhost: a\r\nx-request-id: x\r\nauthorization: Bearer {}\r\n\
                 content-length: 0\r\n\r\n",
                self.key
            ));
        }
        self.stream.write_all(asked.as_bytes()).await.expect("guesses are taken");
        for guess in guesses {
            let (status, said) = self.answer(guess.method == "HEAD").await;
            self.answers.entry((guess.method, status, said)).or_default()[usize::from(guess.is_somebodys)] +=
                1;
        }
    }

    async fn answer(&mut self, is_head: bool) -> (u16, String) {
        loop {
            if let Some(end) = self.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&self.buffer[..end + 4]).into_owned();
                let length =
                    header(&head, "content-length").map_or(0, |length| length.parse().expect("a length"));
                let whole = end + 4 + if is_head { 0 } else { length };
                if self.buffer.len() >= whole {
                    let body = String::from_utf8_lossy(&self.buffer[end + 4..whole]).into_owned();
                    self.buffer.drain(..whole);
                    let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
                    let lines = head.lines().filter(|line| !line.starts_with("date:"));
                    return (status, lines.chain([&*body]).collect::<Vec<_>>().join("\n"));
                }
            }
            let read = tokio::time::timeout(LONG, self.stream.read_buf(&mut self.buffer)).await;
            let read = read.expect("an answer to each guess").expect("the connection stays");
            assert!(read > 0, "the connection was closed behind {}", String::from_utf8_lossy(&self.buffer));
        }
    }
}

/// What is told of a metric, over all its labels that contain this.
async fn metric(replica: &Endpoint, name: &str) -> f64 {
    let text = Http::fresh().get(&replica.admin_url("/metrics"), LIMIT).await.expect("metrics").text();
    let values = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit_once(' '));
    values.map(|(_, value)| value.parse::<f64>().expect("a number")).sum()
}

/// An API key, and its entry in a configuration.
async fn key(name: &str) -> (String, String) {
    let made = run_ok(&["keys", "new", name]).await;
    let secret = made.lines().find(|line| line.starts_with("ev_")).expect("a key").to_owned();
    let entry = made.lines().skip_while(|line| *line != "[[key]]").collect::<Vec<_>>().join("\n");
    (secret, entry + "\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessed_ids_find_nothing_and_cost_bounded_memory() {
    // `EVERLINE_GUESSES=1000000` for the whole lot.
    let guesses = number("EVERLINE_GUESSES", 50_000);
    let ((a, a_entry), (b, b_entry)) = (key("a").await, key("b").await);
    let fleet = Fleet::of(3)
        .engines(1)
        .engine_arg("--decode-step-ms")
        .engine_arg("40")
        .config(&(a_entry + &b_entry))
        .set("streams.orphan_grace_s=3600")
        .set("proxy.idle_timeout_ms=3600000")
        // What honest readers have read is not what is measured.
        .set("streams.keep_s=5")
        .start()
        .await;
    let go = watch::Sender::new(false);
    let quiet = quiet(&go).await;
    register(&fleet, "quiet", quiet.address).await;
    // Streams of the first key that run all the time, begun at every replica.
    let mut somebodys = Vec::new();
    for replica in &fleet.replicas {
        let body = json!({"model": "quiet", "stream": true, "prompt": "on and on"});
        let (_stream, head) = begin(replica.http, Some(&a), &body).await;
        let id = header(&head, "everline-stream").expect("a stream");
        somebodys.push(StreamId::parse(id).expect("an id"));
    }
    for replica in &fleet.replicas {
        until("all of them everywhere", LIMIT, async || {
            let listed = get_as(replica, &a, "/v1/streams").await?;
            check(listed.matches("st_").count() >= somebodys.len(), || listed)
        })
        .await;
    }
    let somebodys = Arc::new(somebodys);
    let nobodys = || StreamId::from_bits(rand::random());
    let honest = Honest::begin(&format!("http://{}", fleet.balancer), Some(&a), 4).await;

    // As long as the limit lets them through, the answers are the same to the byte. This is what
    // the process needs for guesses at all, too.
    for replica in &fleet.replicas {
        let mut guesser = Guesser::connect(replica.http, &b).await;
        for n in 0..14 {
            guesser.guess(&[Guess::nth(n, somebodys[n % 3], true), Guess::nth(n, nobodys(), false)]).await;
        }
        // 503 is said where the log did not answer in time, on a machine with too much to do, whoever's
        // stream it is; behind it, the counts need not be equal.
        let (late, in_time): (Vec<_>, Vec<_>) =
            guesser.answers.iter().partition(|((_, status, _), _)| *status == 503);
        let late: u64 = late.iter().flat_map(|(_, times)| *times).sum();
        assert!(late <= 7, "{late} of 28 not answered in time");
        for ((method, status, said), times) in in_time {
            assert_eq!(*status, 404, "{method}: {said}");
            let same = times[0] == times[1] || late > 0 && times[0] > 0 && times[1] > 0;
            assert!(same, "{method}, {times:?} times, of {late} late: {said}");
        }
    }

    let (before, began) = (memory(&fleet), Instant::now());
    let mut guessers = JoinSet::new();
    let each = guesses / 6;
    for at in 0..6 {
        let (address, key, somebodys) = (fleet.replicas[at % 3].http, b.clone(), Arc::clone(&somebodys));
        guessers.spawn(async move {
            let mut guesser = Guesser::connect(address, &key).await;
            for _ in 0..each / 50 {
                let batch: Vec<Guess> = (0..50)
                    .map(|n| match n % 10 {
                        9 => Guess::nth(n, somebodys[n % 3], true),
                        _ => Guess::nth(n, nobodys(), false),
                    })
                    .collect();
                guesser.guess(&batch).await;
            }
            guesser.answers
        });
    }
    let (mut said, mut statuses) =
        (BTreeMap::<(&str, u16), BTreeSet<String>>::new(), BTreeMap::<u16, u64>::new());
    while let Some(answers) = guessers.join_next().await {
        for ((method, status, text), times) in answers.expect("a guesser gets its answers") {
            assert!(
                times[1] == 0 || times[0] > 0 || [404, 503].contains(&status),
                "said of somebody's streams only: {text}"
            );
            said.entry((method, status)).or_default().insert(text);
            *statuses.entry(status).or_default() += times.iter().sum::<u64>();
        }
    }
    let took = began.elapsed();
    let (streams, stall) = honest.end().await;
    let after = memory(&fleet);
    let made: u64 = statuses.values().sum();
    println!(
        "{made} guesses in {:.1} s, {:.0}/s: {statuses:?}; KiB before {before:?}, after {after:?}; {streams} honest \
         streams, longest pause {} ms",
        took.as_secs_f64(),
        made as f64 / took.as_secs_f64(),
        stall.as_millis()
    );
    // 503 is said where the log did not answer in time, on a machine with too much to do.
    assert!(statuses.keys().all(|status| [404, 429, 503].contains(status)), "{statuses:?}");
    assert!(statuses.get(&503).is_none_or(|times| times * 1000 < made), "{statuses:?}");
    // One for each replica, and a wait of one second or two.
    assert!(said.values().all(|texts| texts.len() <= 6), "{said:#?}");
    for (before, after) in before.iter().zip(&after) {
        assert!(after.saturating_sub(*before) < 32 << 10, "{before} KiB became {after}");
    }
    for replica in &fleet.replicas {
        // What is let through, and no more, is looked up in the log: 100 at once and 10 a second.
        let looked = metric(replica, "everline_stream_resumed_total{result=\"not_found\"}").await;
        let most = 101.0 + 10.0 * (began.elapsed().as_secs_f64() + 10.0);
        assert!(looked <= most, "{looked} looks, {most} allowed");
        for id in somebodys.iter() {
            let text = get_as(replica, &a, &format!("/v1/streams/{id}")).await.expect("an answer");
            let stands: Value = serde_json::from_str(&text).expect(&text);
            assert_eq!(stands["state"], "running", "{stands}");
        }
    }
    assert!(streams > 0);
}

/// What a key's owner is told of this, as JSON.
async fn get_as(replica: &Endpoint, key: &str, path: &str) -> Result<String, String> {
    let asked = format!(
        "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\naccept: application/json\r\n\
         authorization: Bearer {key}\r\n\r\n"
    );
    let got = chaos_tests::raw::exchange(replica.http, asked.as_bytes(), LIMIT).await;
    let answer = chaos_tests::raw::Answer::parse(&got.map_err(|_| "no end".to_owned())?);
    check(answer.status == 200, || format!("{answer:?}"))?;
    Ok(answer.text())
}
