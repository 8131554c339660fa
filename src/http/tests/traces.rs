//! Spans as a collector gets them, and the context as a worker sees it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::support::*;
use crate::http::{FrontConfig, Metrics};
use crate::telemetry::trace::{TraceOptions, Tracing};
use crate::tls::listener::ListenerTls;
use crate::tls::testing::Certs;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A collector that keeps what it is sent.
pub(super) async fn collector() -> (String, mpsc::UnboundedReceiver<(String, ExportTraceServiceRequest)>) {
    let (tell, told) = mpsc::unbounded_channel();
    let address = worker(move |mut stream| {
        let tell = tell.clone();
        async move {
            while let Some((head, body)) = read_message(&mut stream).await {
                let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
                tell.send((head, request)).unwrap();
                let answer =
                    "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        }
    })
    .await;
    (format!("http://{address}"), told)
}

/// A worker that tells the heads of requests it gets and answers with these bytes.
async fn telling(answer: String) -> (std::net::SocketAddr, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let address = worker(move |mut stream| {
        let (tell, answer) = (tell.clone(), answer.clone());
        async move {
            while let Some((head, _)) = read_message(&mut stream).await {
                tell.send(head).unwrap();
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        }
    })
    .await;
    (address, told)
}

pub(super) fn traced(variables: &[(&str, &str)]) -> Running {
    let owned = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let options = TraceOptions::from_variables(owned).unwrap().unwrap();
    let tracing = Tracing::start(options, "r1").unwrap();
    start_with(FrontConfig::default(), MemoryCluster::new(), Metrics::default().with_tracing(Some(tracing)))
}

pub(super) async fn flush(front: &Running) {
    let metrics = Arc::clone(&front.front.metrics);
    tokio::task::spawn_blocking(move || metrics.flush_spans()).await.unwrap();
}

fn ask(extra: &str) -> String {
    let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"a secret question"}]}"#;
    request("POST", "/v1/chat/completions", extra, body)
}

fn with_parent() -> String {
    ask(&format!(
        "traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\ntracestate: b=2\r\nx-request-id: mine\r\n"
    ))
}

fn events() -> String {
    let chunk = |data: &str| format!("{:x}\r\n{data}\r\n", data.len());
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{}{}0\r\n\r\n",
        chunk("data: {\"secret\":\"answer\"}\n\n"),
        chunk("data: [DONE]\n\n")
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let pairs = attributes.iter();
    pairs
        .map(|pair| {
            (
                pair.key.clone(),
                pair.value.as_ref().and_then(|v| v.value.as_ref()).map(text).unwrap_or_default(),
            )
        })
        .collect()
}

pub(super) fn spans(exported: &ExportTraceServiceRequest) -> Vec<&Span> {
    let scopes = exported.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    scopes.flat_map(|scope| &scope.spans).collect()
}

#[tokio::test]
async fn a_span_stands_between_the_clients_and_the_workers() {
    let (endpoint, mut collected) = collector().await;
    let front = traced(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_SERVICE_NAME", "router"),
        ("OTEL_RESOURCE_ATTRIBUTES", "zone=a"),
    ]);
    let (address, mut heads) = telling(events()).await;
    front.cluster.add("w", address);
    let response = exchange(front.address, with_parent()).await;
    assert_eq!(status(&response), 200, "{response}");
    flush(&front).await;

    let (head, exported) = collected.recv().await.unwrap();
    assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
    let resource = texts(&exported.resource_spans[0].resource.as_ref().unwrap().attributes);
    assert_eq!((resource["service.name"].as_str(), resource["zone"].as_str()), ("router", "a"));
    assert_eq!(resource["service.instance.id"], "r1");
    let all = spans(&exported);
    let [span] = all[..] else { panic!("{all:?}") };
    assert_eq!((hex(&span.trace_id).as_str(), hex(&span.parent_span_id).as_str()), (TRACE, PARENT));
    assert_eq!((span.name.as_str(), span.kind), ("POST /v1/chat/completions", SpanKind::Server as i32));
    assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
    let attributes = texts(&span.attributes);
    for (key, value) in [
        ("http.request.method", "POST"),
        ("http.route", "/v1/chat/completions"),
        ("http.response.status_code", "200"),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "m"),
        ("everline.worker", "w"),
        ("everline.request_id", "mine"),
        ("everline.retries", "0"),
        ("everline.outcome", "ok"),
    ] {
        assert_eq!(attributes.get(key).map(String::as_str), Some(value), "{key} in {attributes:?}");
    }
    assert!(attributes["everline.ttft_ms"].parse::<f64>().unwrap() > 0.0);
    assert!(!format!("{exported:?}").contains("secret"), "prompts and answers stay out");

    // The worker is the child of that span, and sees all of the client's state.
    let seen = heads.recv().await.unwrap();
    let expected = format!("00-{TRACE}-{}-01", hex(&span.span_id));
    assert_eq!(header(&seen, "traceparent"), Some(expected.as_str()));
    assert_eq!(header(&seen, "tracestate"), Some("a=1,b=2"));
}

#[tokio::test]
async fn a_request_without_a_parent_begins_a_trace_and_its_troubles_are_told() {
    let (endpoint, mut collected) = collector().await;
    let front = traced(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("{endpoint}/own"))]);
    front.cluster.add("a", refusing().await);
    front.cluster.add("b", refusing().await);
    assert_eq!(status(&exchange(front.address, ask("traceparent: 00-nonsense\r\n")).await), 502);
    flush(&front).await;
    let (head, exported) = collected.recv().await.unwrap();
    assert!(head.starts_with("POST /own HTTP/1.1"), "{head}");
    let all = spans(&exported);
    let [span] = all[..] else { panic!("{all:?}") };
    assert!(span.parent_span_id.is_empty() && hex(&span.trace_id) != "0".repeat(32), "{span:?}");
    assert_eq!(span.status.as_ref().unwrap().code, StatusCode::Error as i32);
    let attributes = texts(&span.attributes);
    assert_eq!(attributes["error.type"], "upstream_error");
    assert_eq!(attributes["http.response.status_code"], "502");
    assert_eq!(attributes["everline.retries"], "1");
    assert_eq!(span.events.len(), 1);
    assert_eq!(texts(&span.events[0].attributes)["everline.retry.reason"], "connect");
}

#[tokio::test]
async fn what_is_not_sampled_is_not_sent_but_the_worker_still_gets_a_context() {
    let (endpoint, mut collected) = collector().await;
    let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str());
    let front = traced(&[base, ("OTEL_TRACES_SAMPLER", "always_off")]);
    let (address, mut heads) = telling(events()).await;
    front.cluster.add("w", address);
    assert_eq!(status(&exchange(front.address, with_parent()).await), 200);
    let seen = heads.recv().await.unwrap();
    let parent = header(&seen, "traceparent").unwrap();
    assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with("-00"), "{parent}");
    assert!(!parent.contains(PARENT), "{parent}");
    flush(&front).await;

    // A parent that is not sampled decides by default.
    let front = traced(&[base]);
    front.cluster.add("w", address);
    exchange(front.address, ask(&format!("traceparent: 00-{TRACE}-{PARENT}-00\r\n"))).await;
    flush(&front).await;
    assert!(collected.try_recv().is_err(), "nothing was sent");
}

#[tokio::test]
async fn without_traces_the_clients_context_passes_unchanged() {
    let front = start(FrontConfig::default());
    let (address, mut heads) = telling(events()).await;
    front.cluster.add("w", address);
    assert_eq!(status(&exchange(front.address, with_parent()).await), 200);
    let seen = heads.recv().await.unwrap();
    assert_eq!(header(&seen, "traceparent"), Some(format!("00-{TRACE}-{PARENT}-01").as_str()));
    assert_eq!(header(&seen, "tracestate"), Some("a=1"), "and the second line after it");
    assert!(seen.contains("tracestate: b=2"), "{seen}");
}

#[tokio::test]
async fn a_collector_that_is_dead_or_silent_harms_no_request_and_delays_the_end_by_two_seconds() {
    let silent = worker(|mut stream| async move {
        let _ = read_message(&mut stream).await;
        std::future::pending::<()>().await;
    })
    .await;
    for endpoint in [refusing().await, silent] {
        let front = traced(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{endpoint}")),
            // One that is waited for long, were anybody to wait.
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "30000"),
        ]);
        front.cluster.add("w", answering(ok("application/json", "{}")).await);
        for _ in 0..50 {
            assert_eq!(status(&exchange(front.address, chat()).await), 200);
        }
        let stopping = std::time::Instant::now();
        flush(&front).await;
        assert!(stopping.elapsed() < Duration::from_secs(4), "{:?}", stopping.elapsed());
        // Spans after the end are nobody's, and no harm.
        assert_eq!(status(&exchange(front.address, chat()).await), 200);
    }
}

#[tokio::test]
async fn a_collector_behind_tls_is_believed_by_its_authority_only() {
    let certs = Certs::new("prod");
    let (endpoint, mut collected) = collector().await;
    // A front of our own with TLS stands before the collector and passes its route through.
    let tls = ListenerTls::open("http", &certs.server("r1"), Duration::from_secs(5)).unwrap();
    let before = start(FrontConfig { client_tls: Some(Arc::new(tls)), ..FrontConfig::default() });
    before.cluster.add("collector", endpoint.trim_start_matches("http://").parse().unwrap());
    let endpoint = format!("https://{}", before.address);
    let (trusted, ca) = (certs.ca_file(), "OTEL_EXPORTER_OTLP_CERTIFICATE");
    for (name, trusts) in [(ca, true), ("OTEL_UNUSED", false)] {
        let front = traced(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint), (name, trusted.to_str().unwrap())]);
        front.cluster.add("w", answering(ok("application/json", "{}")).await);
        assert_eq!(status(&exchange(front.address, chat()).await), 200);
        flush(&front).await;
        assert_eq!(collected.try_recv().is_ok(), trusts, "{name}");
    }
}

#[tokio::test]
async fn an_attempt_at_a_stream_is_a_span_in_its_clients_trace() {
    let (endpoint, mut collected) = collector().await;
    let front = traced(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]);
    super::streams::keep(&front, crate::relay::Options::default());
    let said: String = super::streams::chat_events(2).iter().map(|event| format!("{event}\n\n")).collect();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let (address, mut heads) = telling(format!("{head}{:x}\r\n{said}\r\n0\r\n\r\n", said.len())).await;
    front.cluster.add("w", address);
    let response = exchange(front.address, with_parent()).await;
    let id = header(&response, "everline-stream").expect(&response).to_owned();
    let ended = || front.cluster.streams.lock().values().any(|record| record.ended.is_some());
    eventually("the attempt is over", ended).await;
    flush(&front).await;

    let (_, exported) = collected.recv().await.unwrap();
    let all = spans(&exported);
    let is_attempt = |span: &&&Span| texts(&span.attributes).contains_key("everline.stream");
    let attempt = all.iter().find(is_attempt).expect("a span of the attempt");
    let attributes = texts(&attempt.attributes);
    assert_eq!((&*attributes["everline.stream"], &*attributes["everline.attempt"]), (&*id, "1"));
    assert_eq!(&*attributes["everline.outcome"], "ok");
    // Client, then where it was let in, then where it is generated, then the worker.
    let entry = all.iter().find(|span| hex(&span.parent_span_id) == PARENT).expect("a span of the client's");
    assert_eq!(attempt.parent_span_id, entry.span_id);
    assert!(all.iter().all(|span| hex(&span.trace_id) == TRACE));
    let seen = heads.recv().await.unwrap();
    let expected = format!("00-{TRACE}-{}-01", hex(&attempt.span_id));
    assert_eq!(header(&seen, "traceparent"), Some(&*expected), "{seen}");
}
