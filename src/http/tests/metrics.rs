//! What is exported, against the reference, and what a request leaves behind in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::support::*;
use crate::http::{Access, AccessOptions, FrontConfig, Metrics, ProcessGauges};

/// Type and label names of a family.
type Family = (String, BTreeSet<String>);

/// Families of a page of OpenMetrics, by the names that queries use. Labels of those that have
/// no sample are unknown.
fn exported(text: &str) -> BTreeMap<String, (String, Option<BTreeSet<String>>)> {
    let mut families = BTreeMap::new();
    for line in text.lines() {
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else {
            continue;
        };
        let ending = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let sample = match kind {
            "histogram" => format!("{name}_count"),
            _ => format!("{name}{ending}"),
        };
        let labels = text.lines().find_map(|line| {
            let rest = line.strip_prefix(&sample)?;
            match rest.strip_prefix('{') {
                Some(rest) => {
                    let pairs = rest.split_once('}')?.0;
                    Some(
                        pairs
                            .split("\",")
                            .filter_map(|pair| Some(pair.split_once('=')?.0.to_owned()))
                            .collect(),
                    )
                }
                None => rest.starts_with(' ').then(BTreeSet::new),
            }
        });
        families.insert(format!("{name}{ending}"), (kind.to_owned(), labels));
    }
    families
}

/// Families of the reference page.
fn documented() -> BTreeMap<String, Family> {
    let page = include_str!("../../../docs/reference/metrics.md");
    let code = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let name = code(cells[0]).concat();
        // An empty cell of labels leaves one space between the bars.
        let labels = cells[1..].iter().find(|cell| cell.starts_with('`')).filter(|_| !row.contains(" | | "));
        let labels = labels.map(|cell| code(cell).into_iter().collect()).unwrap_or_default();
        (name, (cells[1].trim_end_matches([' ', '|']).to_owned(), labels))
    })
    .collect()
}

async fn scrape(front: &Running) -> String {
    exchange(front.address, request("GET", "/metrics", "", "")).await
}

#[tokio::test]
async fn the_reference_has_every_family_with_its_type_and_labels_and_no_other() {
    let certificates = ProcessGauges::new(|| vec![("http", 0)]);
    let metrics = Metrics::default().with_collector(certificates);
    let front = start_with(FrontConfig::default(), MemoryCluster::new(), metrics);
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    exchange(front.address, chat()).await;
    exchange(front.address, post("/v1/completions", "{")).await;
    let exported = exported(&scrape(&front).await);
    // Those of an edge are collected where that is put together.
    let documented: BTreeMap<_, _> =
        documented().into_iter().filter(|(name, _)| !name.starts_with("everline_edge_")).collect();
    let names = |of: BTreeSet<&String>| of.into_iter().cloned().collect::<Vec<_>>();
    let (is, said) = (exported.keys().collect::<BTreeSet<_>>(), documented.keys().collect::<BTreeSet<_>>());
    assert_eq!(names(&is - &said), [""; 0], "exported, not in docs/reference/metrics.md");
    assert_eq!(names(&said - &is), [""; 0], "in docs/reference/metrics.md, not exported");
    let mut seen = 0;
    for (name, (kind, labels)) in exported {
        assert_eq!(documented[&name].0, kind, "type of {name}");
        if let Some(labels) = labels {
            assert_eq!(documented[&name].1, labels, "labels of {name}");
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} families had a sample");
}

/// The value of a sample.
fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} is missing in\n{text}")).trim().parse().unwrap()
}

#[tokio::test]
async fn a_stream_leaves_its_times_behind_and_an_answer_in_one_piece_does_not() {
    let front = start(FrontConfig::default());
    let (go, pieces) = mpsc::channel::<&'static str>(1);
    let pieces = Arc::new(tokio::sync::Mutex::new(pieces));
    let address = worker(move |mut stream| {
        let pieces = Arc::clone(&pieces);
        async move {
            read_message(&mut stream).await;
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            while let Some(piece) = pieces.lock().await.recv().await {
                stream.write_all(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes()).await.unwrap();
            }
            stream.write_all(b"0\r\n\r\n").await.unwrap();
        }
    })
    .await;
    front.cluster.add("w", address);

    // Three pieces, each sent when the one before has reached the client.
    let mut client = tokio::net::TcpStream::connect(front.address).await.unwrap();
    client.write_all(chat().as_bytes()).await.unwrap();
    let mut got = String::new();
    let paused = Duration::from_millis(20);
    for piece in ["data: {\"a\":1}\n\n", "data: {\"b\":2}\n\n"] {
        go.send(piece).await.unwrap();
        while !got.contains(piece) {
            let mut bytes = [0; 1024];
            let count = client.read(&mut bytes).await.unwrap();
            assert!(count > 0, "{got}");
            got.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        assert_eq!(
            value(&scrape(&front).await, "everline_requests_in_flight{route=\"/v1/chat/completions\"}"),
            1.0
        );
        tokio::time::sleep(paused).await;
    }
    go.send("data: [DONE]\n\n").await.unwrap();
    drop(go);
    read_to_close(&mut client).await;

    let text = scrape(&front).await;
    assert_eq!(value(&text, "everline_time_to_first_token_seconds_count{model=\"m\"}"), 1.0);
    assert_eq!(value(&text, "everline_inter_token_seconds_count{model=\"m\"}"), 2.0);
    let sum = value(&text, "everline_inter_token_seconds_sum{model=\"m\"}");
    assert!(sum >= 2.0 * paused.as_secs_f64() && sum < 5.0, "{sum}");
    assert_eq!(value(&text, "everline_requests_in_flight{route=\"/v1/chat/completions\"}"), 0.0);
    assert_eq!(value(&text, "everline_router_overhead_seconds_count{route=\"/v1/chat/completions\"}"), 1.0);
    assert_eq!(value(&text, "everline_model_requests_total{model=\"m\",outcome=\"ok\"}"), 1.0);

    // In one piece, by a worker that is found after one that is not there.
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    front.cluster.add("a", refusing().await);
    for _ in 0..8 {
        exchange(front.address, chat()).await;
    }
    let text = scrape(&front).await;
    assert_eq!(value(&text, "everline_time_to_first_token_seconds_count{model=\"m\"}"), 1.0, "streams only");
    assert_eq!(
        value(&text, "everline_time_to_first_byte_seconds_count{route=\"/v1/chat/completions\"}"),
        9.0
    );
    assert_eq!(value(&text, "everline_router_overhead_seconds_count{route=\"/v1/chat/completions\"}"), 9.0);
    assert!(value(&text, "everline_retries_total{reason=\"connect\"}") >= 1.0);
    assert_eq!(value(&text, "everline_worker_breaker_state{worker=\"a\"}"), 2.0);
    assert_eq!(value(&text, "everline_worker_breaker_state{worker=\"w\"}"), 0.0);
}

#[tokio::test]
async fn a_model_that_nobody_serves_gets_no_label() {
    let front = start(FrontConfig::default());
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    exchange(front.address, post("/v1/completions", r#"{"model":"made-up","prompt":"x"}"#)).await;
    let text = scrape(&front).await;
    assert!(!text.contains("made-up"), "{text}");
    assert_eq!(value(&text, "everline_rejected_total{reason=\"model_not_found\"}"), 1.0);
}

/// What is logged by this thread while it is held.
pub(super) struct Logged {
    text: Arc<parking_lot::Mutex<Vec<u8>>>,
    _guard: tracing::subscriber::DefaultGuard,
}

impl Logged {
    fn begin() -> Self {
        Self::with("info")
    }

    /// Everything that this program says, down to its traces.
    pub(super) fn all_of_ours() -> Self {
        Self::with("everline=trace")
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock()).into_owned()
    }

    fn with(filter: &str) -> Self {
        let text = Arc::<parking_lot::Mutex<Vec<u8>>>::default();
        let sink = Arc::clone(&text);
        let writer = move || Sink(Arc::clone(&sink));
        // With a single subscriber in the process, tracing lets whichever thread first comes by
        // decide for all whether a line is wanted, even one that has no subscriber.
        static SECOND: std::sync::OnceLock<tracing::Dispatch> = std::sync::OnceLock::new();
        SECOND.get_or_init(|| tracing::Dispatch::new(tracing_subscriber::registry()));
        let subscriber =
            tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(writer).finish();
        Self { text, _guard: tracing::subscriber::set_default(subscriber) }
    }

    fn access_lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.text.lock().clone()).unwrap();
        text.lines().filter(|line| line.contains("everline::access")).map(str::to_owned).collect()
    }
}

struct Sink(Arc<parking_lot::Mutex<Vec<u8>>>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_log_line_has_what_finds_the_request_and_nothing_of_its_content() {
    let private = "x-request-id: mine\r\nauthorization: Bearer very-secret\r\n";
    let body = r#"{"model":"m","prompt":"very-secret"}"#;
    let answer = ok("application/json", r#"{"text":"very-secret"}"#);
    for (access, of_ok, of_error) in [(Access::All, 1, 1), (Access::Errors, 0, 1), (Access::Off, 0, 0)] {
        let logged = Logged::begin();
        let metrics = Metrics::new(AccessOptions { access, ..AccessOptions::default() });
        let front = start_with(FrontConfig::default(), MemoryCluster::new(), metrics);
        front.cluster.add("w", answering(answer.clone()).await);
        assert_eq!(
            status(&exchange(front.address, request("POST", "/v1/completions", private, body)).await),
            200
        );
        let lines = logged.access_lines();
        assert_eq!(lines.len(), of_ok, "{access:?}: {lines:?}");
        for part in [
            "\"request_id\":\"mine\"",
            "\"worker\":\"w\"",
            "\"status\":200",
            "\"outcome\":\"ok\"",
            "\"model\":\"m\"",
        ] {
            assert!(lines.iter().all(|line| line.contains(part)), "{part} in {lines:?}");
        }
        let wrong = request("POST", "/v1/completions", private, r#"{"model":"m","prompt":very-secret"#);
        assert_eq!(status(&exchange(front.address, wrong).await), 400);
        let lines = logged.access_lines();
        assert_eq!(lines.len(), of_ok + of_error, "{access:?}: {lines:?}");
        assert!(lines.iter().skip(of_ok).all(|line| line.contains("client_error")), "{lines:?}");
        assert!(!String::from_utf8_lossy(&logged.text.lock()).contains("very-secret"));
    }
}
