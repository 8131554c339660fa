//! Clients that can come back: what they have read, they read on from any replica.

use std::time::Duration;

use bytes::Bytes;
use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::wait::{check, until};
use everline::admin_types::{StreamReply, StreamsReply};
use http::{HeaderMap, Method, Request};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::{Engine, beat, name, register, registration, until_seen};

/// Tokens of an output.
const TOKENS: usize = 150;
/// Time between two of them.
const EVERY: Duration = Duration::from_millis(40);

/// An output of which something was read.
struct Reading {
    headers: HeaderMap,
    body: UnsyncBoxBody<Bytes, String>,
    got: Vec<u8>,
}

impl Reading {
    async fn open(method: Method, url: &str, headers: &[(&str, &str)], body: Option<Value>) -> Self {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).expect("a request");
        let client = Client::builder(TokioExecutor::new()).build_http();
        let reply = tokio::time::timeout(LIMIT * 2, client.request(request)).await;
        let (head, body) = reply.expect("an answer in time").expect("an answer").into_parts();
        assert_eq!(head.status, 200, "{:?}", head.headers);
        let body = body.map_err(|error| error.to_string()).boxed_unsync();
        Self { headers: head.headers, body, got: Vec::new() }
    }

    /// Reads until there is enough of it, or to its end; whether it broke off.
    async fn until(&mut self, enough: impl Fn(&[u8]) -> bool) -> bool {
        while !enough(&self.got) {
            let frame = tokio::time::timeout(LIMIT * 2, self.body.frame()).await.expect("it goes on");
            match frame {
                None => return false,
                Some(Err(_)) => return true,
                Some(Ok(frame)) => self.got.extend_from_slice(frame.data_ref().map_or(b"", |data| data)),
            }
        }
        false
    }

    async fn read_to_the_end(&mut self) -> bool {
        self.until(|_| false).await
    }

    fn stream(&self) -> String {
        let id = self.headers.get("everline-stream").expect("it can be read on");
        id.to_str().expect("text").to_owned()
    }

    fn text(&self) -> String {
        String::from_utf8(self.got.clone()).expect("text")
    }
}

fn frame(tokens: usize) -> String {
    format!("{{\"texts\":[\"{}\"]}}\0", "word ".repeat(tokens))
}

fn event(token: usize) -> String {
    format!("data: {{\"token\":{token}}}\n\n")
}

/// A pair whose decode node says these pieces.
async fn pair(
    fleet: &Fleet,
    content_type: &'static str,
    first: &str,
    pieces: Vec<String>,
) -> (Engine, Engine) {
    let prefill = Engine::streaming(content_type, vec![first.to_owned()], EVERY, None).await;
    let decode = Engine::streaming(content_type, pieces, EVERY, Some(&prefill)).await;
    let mut ids = Vec::new();
    for (role, of) in [("prefill", &prefill), ("decode", &decode)] {
        let coordinator = format!("127.0.0.3:{}", of.address.port());
        let id = register(fleet.balancer, &registration(role, of.address, &coordinator, 0, 1)).await;
        beat(fleet.balancer, &id).await;
        ids.push(id);
    }
    name(fleet.balancer, &ids[0], &format!("{}__{}", prefill.address, decode.address)).await;
    until_seen(fleet, &[0, 1, 2], "the pair is ready", |seen| seen.pairs.iter().any(|pair| pair.is_active))
        .await;
    (prefill, decode)
}

async fn fleet() -> Fleet {
    Fleet::of(3).set("ksana.enabled=true").start().await
}

/// Who holds a stream, as this replica knows.
async fn holder(fleet: &Fleet, asked: usize, id: &str) -> usize {
    let url = fleet.replicas[asked].admin_url(&format!("/v1/admin/streams/{id}"));
    let (name, _) = until("the stream has a holder", LIMIT, async || {
        let reply: StreamReply = Http::fresh().get(&url, LIMIT).await?.json()?;
        reply.stream.map(|stream| stream.holder).ok_or("it is not listed".to_owned())
    })
    .await;
    fleet.replicas.iter().position(|replica| replica.name == name).expect("one of the replicas")
}

/// An output of which the client's replica, the first one, is not the holder, too. It is where the others
/// did not answer in time.
async fn held_elsewhere(fleet: &Fleet, ask: impl AsyncFn() -> Reading) -> Reading {
    for _ in 0..5 {
        let reading = ask().await;
        if holder(fleet, 0, &reading.stream()).await != 0 {
            return reading;
        }
    }
    panic!("the first replica holds all of its clients' streams");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_are_read_on_from_another_replica_when_the_one_that_was_asked_dies() {
    let mut fleet = fleet().await;
    let pieces: Vec<String> = (2..=TOKENS).map(frame).collect();
    let whole = format!("{}{}[DONE]\0", frame(1), pieces.concat());
    let (prefill, decode) = pair(&fleet, "application/octet-stream", &frame(1), pieces).await;
    let aware = [("everline-resume", "1")];
    let url = fleet.replicas[0].http_url("/generate");
    let ask = async || Reading::open(Method::POST, &url, &aware, Some(json!({"prompt": "x"}))).await;
    let mut first = held_elsewhere(&fleet, ask).await;
    first.until(|got| got.iter().filter(|byte| **byte == 0).count() >= 10).await;
    let computed = (prefill.numbers().len(), decode.numbers().len());
    fleet.replicas[0].kill9();
    first.read_to_the_end().await;
    // Only what came whole was read.
    let end = first.got.iter().rposition(|byte| *byte == 0).expect("ten frames") + 1;
    let frames = first.got[..end].iter().filter(|byte| **byte == 0).count();
    assert!((10..TOKENS).contains(&frames), "{frames}");
    let url = fleet.replicas[1].http_url(&format!("/v1/streams/{}?after={}", first.stream(), frames - 1));
    let mut rest = Reading::open(Method::GET, &url, &[], None).await;
    assert!(!rest.read_to_the_end().await, "it ends as it should");
    assert_eq!(format!("{}{}", &first.text()[..end], rest.text()), whole);
    // And once more from its first frame, wherever.
    let url = fleet.replicas[2].http_url(&format!("/v1/streams/{}", first.stream()));
    let mut again = Reading::open(Method::GET, &url, &[], None).await;
    again.read_to_the_end().await;
    assert_eq!(again.text(), whole);
    let after = (prefill.numbers().len(), decode.numbers().len());
    assert_eq!(after, computed, "nothing was computed again");
    fleet.replicas[0].start();
    ready(&fleet.replicas[0], Duration::from_secs(20)).await;
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_read_on_by_their_ids() {
    let mut fleet = fleet().await;
    let events = "text/event-stream";
    let pieces: Vec<String> = (1..=TOKENS).map(event).chain(["data: [DONE]\n\n".to_owned()]).collect();
    let (_prefill, decode) = pair(&fleet, events, &event(0), pieces).await;
    let url = fleet.replicas[0].http_url("/v1/chat/completions");
    let body = json!({"messages": [], "stream": true});
    let aware = [("everline-resume", "1")];
    let ask = async || Reading::open(Method::POST, &url, &aware, Some(body.clone())).await;
    let mut first = held_elsewhere(&fleet, ask).await;
    assert_eq!(first.headers["content-type"], "text/event-stream; charset=utf-8");
    first.until(|got| got.windows(2).filter(|two| two == b"\n\n").count() >= 10).await;
    let computed = decode.numbers().len();
    fleet.replicas[0].kill9();
    first.read_to_the_end().await;
    let text = first.text();
    let read = &text[..text.rfind("\n\n").expect("ten events") + 2];
    let last = read.lines().rev().find_map(|line| line.strip_prefix("id: ")).expect("an id").to_owned();
    let url = fleet.replicas[1].http_url(&format!("/v1/streams/{}", first.stream()));
    let mut rest = Reading::open(Method::GET, &url, &[("last-event-id", &last)], None).await;
    rest.read_to_the_end().await;
    let all = format!("{read}{}", rest.text());
    let data: Vec<&str> = all.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let wanted: Vec<String> = (1..=TOKENS).map(|token| format!("{{\"token\":{token}}}")).collect();
    assert_eq!(
        data.split_last(),
        Some((&"[DONE]", wanted.iter().map(String::as_str).collect::<Vec<_>>().as_slice()))
    );
    assert_eq!(decode.numbers().len(), computed, "nothing was computed again");
    fleet.replicas[0].start();
    ready(&fleet.replicas[0], Duration::from_secs(20)).await;
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_holder_dies_is_begun_again_before_its_first_frame_and_ends_with_an_error_behind_it() {
    let mut fleet = fleet().await;
    let pieces: Vec<String> = (2..=TOKENS).map(frame).collect();
    let whole = format!("{}{}[DONE]\0", frame(1), pieces.concat());
    let (prefill, decode) = pair(&fleet, "application/octet-stream", &frame(1), pieces).await;
    let url = fleet.replicas[0].http_url("/generate");
    let ask = |url: String| async move {
        Reading::open(Method::POST, &url, &[("everline-resume", "1")], Some(json!({"prompt": "x"}))).await
    };

    // Behind some frames.
    let mut cut = ask(url.clone()).await;
    cut.until(|got| got.iter().filter(|byte| **byte == 0).count() >= 5).await;
    let dead = holder(&fleet, 0, &cut.stream()).await;
    assert_ne!(dead, 0, "who has the client is not who generates");
    fleet.replicas[dead].kill9();
    assert!(!cut.read_to_the_end().await, "the body ends as it should");
    let text = cut.text();
    let (before, last) = text.trim_end_matches('\0').rsplit_once('\0').expect("frames");
    assert!(whole.starts_with(before), "{text}");
    let last: Value = serde_json::from_str(last).expect("an error");
    assert!(last["detail"].as_str().is_some_and(|why| why.contains("go on")), "{last}");
    fleet.replicas[dead].start();
    ready(&fleet.replicas[dead], Duration::from_secs(20)).await;

    // Before the first.
    let before = decode.numbers().len();
    decode.hold(true);
    prefill.hold(true);
    let asked = tokio::spawn(ask(url));
    until("the engines have it", LIMIT, async || {
        check(decode.numbers().len() == before + 1, || format!("{:?}", decode.numbers()))
    })
    .await;
    let list = fleet.replicas[0].admin_url("/v1/admin/streams");
    // It is listed with what the cluster is told next, which may be after it was asked for.
    let (running, _) = until("it is listed", LIMIT, async || {
        let streams: StreamsReply = Http::fresh().get(&list, LIMIT).await.and_then(|reply| reply.json())?;
        let running = streams.streams.into_iter().find(|stream| stream.state == "running");
        running.ok_or_else(|| "nothing runs".to_owned())
    })
    .await;
    let dead = holder(&fleet, 0, &running.id).await;
    fleet.replicas[dead].kill9();
    until("the engines have it again", LIMIT, async || {
        check(decode.numbers().len() == before + 2, || format!("{:?}", decode.numbers()))
    })
    .await;
    decode.hold(false);
    prefill.hold(false);
    let mut reading = asked.await.expect("it does not panic");
    reading.read_to_the_end().await;
    assert_eq!(reading.text(), whole);
    let mut numbers = decode.numbers();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), before + 2, "each attempt has a number of its own");
    fleet.replicas[dead].start();
    ready(&fleet.replicas[dead], Duration::from_secs(20)).await;
    fleet.agree().await;
}
