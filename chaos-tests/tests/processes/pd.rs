//! Requests that a prefill and a decode engine share, through the deaths of whoever carries them.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Builder, Fleet, ready};
use chaos_tests::handover::Handover;
use chaos_tests::streams::{Manner, Question, Said, read};
use chaos_tests::wait::{check, until};
use everline::state::worker::WorkerRole;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);
/// Streams at a time.
const STREAMS: usize = 20;
/// Tokens of an answer: five seconds.
const TOKENS: u32 = 100;
/// Between two tokens, milliseconds.
const STEP: &str = "50";

/// Of one choice each: what asks for several stays at one engine.
fn questions() -> Vec<Question> {
    let all = (0..).map(|at| Question::mixed(at, TOKENS, None));
    all.filter(|question| question.body.get("n").is_none()).take(STREAMS).collect()
}

/// What was said, but for what an engine had cached: that is another engine's affair.
fn text_and_counts(mut said: Said) -> Said {
    if let Some(usage) = said.usage.as_mut().and_then(|usage| usage.as_object_mut()) {
        usage.remove("prompt_tokens_details");
    }
    said
}

/// What engines say that do whole requests.
async fn aggregated() -> Vec<Said> {
    let fleet = Fleet::of(1).engines(1).engine_arg("--instant").start().await;
    let base = format!("http://{}", fleet.balancer);
    let mut said = Vec::new();
    for question in questions() {
        let heard = read(&base, &question, Manner::Get).await.expect("nobody is hurt");
        said.push(text_and_counts(heard.said));
    }
    said
}

/// Three replicas, two prefill and three decode engines.
fn shared(how: Handover) -> Builder {
    use WorkerRole::{Decode, Prefill};
    let fleet = Fleet::of(3).engines(5).roles(&[Prefill, Prefill, Decode, Decode, Decode]).handover(how);
    fleet.engine_arg("--decode-step-ms").engine_arg(STEP)
}

/// Sum of the lines of a page of metrics that begin like this; 0 of a process that is not there.
async fn sum_of(url: &str, line: &str) -> u64 {
    let page = Http::fresh().get(url, LIMIT).await.map(|reply| reply.text()).unwrap_or_default();
    let lines = page.lines().filter(|text| text.starts_with(line));
    lines.filter_map(|text| text.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

/// How often a line of the metrics was counted, over all replicas that are there.
async fn counted(fleet: &Fleet, line: &str) -> u64 {
    let mut sum = 0;
    for replica in &fleet.replicas {
        sum += sum_of(&replica.admin_url("/metrics"), line).await;
    }
    sum
}

const PREFILLED: &str = r#"everline_pd_legs_total{leg="prefill",outcome="ok"}"#;
const HELD: &str = r#"everline_stream_active{role="holder"}"#;
const DECODED: [&str; 2] = ["vllm:generation_tokens_total", "sglang:generation_tokens_total"];

async fn streams_outlive_replicas_and_either_engine(how: Handover) {
    let known = aggregated().await;
    let mut fleet = shared(how).start().await;
    let base = format!("http://{}", fleet.balancer);
    let mut streams = JoinSet::new();
    for (at, question) in questions().into_iter().enumerate() {
        let base = base.clone();
        streams.spawn(async move { (at, read(&base, &question, Manner::Get).await) });
    }
    // All have begun, each at two engines, and are a good part of their way.
    until("all are prefilled", LIMIT, async || {
        let prefilled = counted(&fleet, PREFILLED).await;
        check(prefilled >= STREAMS as u64, || format!("{prefilled} are"))
    })
    .await;
    until("a fifth is decoded", LIMIT, async || {
        let mut decoded = 0;
        for engine in &fleet.engines[2..] {
            for line in DECODED {
                decoded += sum_of(&format!("http://{}/metrics", engine.address), line).await;
            }
        }
        check(decoded >= STREAMS as u64 * u64::from(TOKENS) / 5, || format!("{decoded} tokens"))
    })
    .await;
    // The replica that holds most and has the clients of others, with an engine that decodes.
    let mut held = Vec::new();
    for (at, replica) in fleet.replicas.iter().enumerate() {
        held.push((sum_of(&replica.admin_url("/metrics"), HELD).await, at));
    }
    let (most, dead) = held.into_iter().max().expect("three");
    assert!(most > 0, "nobody holds any");
    fleet.replicas[dead].kill9();
    fleet.engines[2].kill9();
    // One that prefills: what goes on needs it no more than any other.
    fleet.engines[0].kill9();
    let (mut seams, mut named) = (0, 0);
    while let Some(stream) = streams.join_next().await {
        let (at, heard) = stream.expect("clients do not panic");
        let heard = heard.unwrap_or_else(|broken| panic!("{at}: {broken:?}"));
        assert_eq!(text_and_counts(heard.said), known[at], "{at}: not what one engine says");
        // Nobody is named to a client that waited a second for the engine.
        if let Some(worker) = &heard.worker {
            assert!(["e3", "e4", "e5"].contains(&worker.as_str()), "{at}: {worker} answered");
            named += 1;
        }
        seams += heard.seams;
    }
    assert!(seams > 0, "nobody was hurt");
    assert!(named > 0, "nobody heard who answers");
    let after = counted(&fleet, PREFILLED).await;
    assert!(after > 0, "what went on was prefilled");

    // Whoever comes back is used again.
    fleet.engines[0].start();
    fleet.engines[2].start();
    fleet.replicas[dead].start();
    ready(&fleet.replicas[dead], LIMIT).await;
    let question = Question::mixed(1, TOKENS, None);
    let heard = read(&base, &question, Manner::Get).await.expect("nobody is hurt");
    assert_eq!(text_and_counts(heard.said), known[1]);
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_whose_blocks_are_pulled_outlive_replicas_and_either_engine() {
    streams_outlive_replicas_and_either_engine(Handover::Nixl).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_whose_blocks_are_pushed_outlive_replicas_and_either_engine() {
    streams_outlive_replicas_and_either_engine(Handover::NixlPush).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_two_engines_begin_at_once_outlive_replicas_and_either_engine() {
    streams_outlive_replicas_and_either_engine(Handover::Mooncake).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_two_sglangs_outlive_replicas_and_either_engine() {
    streams_outlive_replicas_and_either_engine(Handover::Sglang).await;
}
