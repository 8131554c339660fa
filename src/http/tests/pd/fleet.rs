//! Engines that do a part of a request, whose every answer a test can replace, and what they saw.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::cluster::api::ControlPlane as _;
use crate::http::tests::support::*;
use crate::state::load::LoadSum;
use crate::state::worker::{Connector, EngineKind, WorkerRole};

/// What an engine does with a request.
#[derive(Clone, Debug)]
pub(super) enum Do {
    /// Answers like this.
    Say(String),
    /// Answers piece by piece, each when there is a permit, and closes the connection.
    Pieces(Vec<String>),
    /// Ends the connection.
    Close,
    /// Says nothing until the client has gone.
    Hang,
}

/// A request that was seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) head: String,
    pub(super) body: Value,
}

/// An engine.
pub(super) struct Fake {
    pub(super) address: SocketAddr,
    pub(super) seen: Arc<Mutex<Vec<Seen>>>,
    /// What it does first; after that it does what it ordinarily would.
    pub(super) script: Arc<Mutex<VecDeque<Do>>>,
    pub(super) permits: Arc<Semaphore>,
    /// Clients that left before they had an answer.
    pub(super) left: Arc<AtomicUsize>,
}

impl Fake {
    pub(super) async fn new(ordinarily: impl Fn(&Value, usize) -> Do + Send + Sync + 'static) -> Self {
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let script = Arc::<Mutex<VecDeque<Do>>>::default();
        let (permits, left) = (Arc::new(Semaphore::new(0)), Arc::<AtomicUsize>::default());
        let (kept, scripted, go, gone) = (seen.clone(), script.clone(), permits.clone(), left.clone());
        let ordinarily = Arc::new(ordinarily);
        let address = worker(move |mut stream| {
            let (kept, scripted, go, gone) = (kept.clone(), scripted.clone(), go.clone(), gone.clone());
            let ordinarily = ordinarily.clone();
            async move {
                while let Some((head, body)) = read_message(&mut stream).await {
                    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                    let number = {
                        let mut kept = kept.lock();
                        kept.push(Seen { head, body: body.clone() });
                        kept.len()
                    };
                    let first = scripted.lock().pop_front();
                    let (mut read, mut write) = stream.split();
                    let mut byte = [0];
                    match first.unwrap_or_else(|| ordinarily(&body, number)) {
                        Do::Say(answer) => {
                            let _ = write.write_all(answer.as_bytes()).await;
                        }
                        Do::Close => return,
                        Do::Hang => {
                            let _ = read.read(&mut byte).await;
                            gone.fetch_add(1, Ordering::SeqCst);
                            return;
                        }
                        Do::Pieces(pieces) => {
                            let speak = async {
                                for piece in &pieces {
                                    go.acquire().await.unwrap().forget();
                                    let _ = write.write_all(piece.as_bytes()).await;
                                }
                            };
                            tokio::select! {
                                () = speak => {}
                                _ = read.read(&mut byte) => { gone.fetch_add(1, Ordering::SeqCst); }
                            }
                            return;
                        }
                    }
                }
            }
        })
        .await;
        Self { address, seen, script, permits, left }
    }

    pub(super) fn will(&self, does: impl IntoIterator<Item = Do>) {
        self.script.lock().extend(does);
    }

    pub(super) fn bodies(&self) -> Vec<Value> {
        self.seen.lock().iter().map(|seen| seen.body.clone()).collect()
    }

    pub(super) fn count(&self) -> usize {
        self.seen.lock().len()
    }

    pub(super) async fn has_seen(&self, count: usize) {
        eventually("the engine is asked", || self.count() >= count).await;
    }

    pub(super) async fn has_lost(&self, count: usize) {
        eventually("the engine's client leaves", || self.left.load(Ordering::SeqCst) >= count).await;
    }
}

pub(super) const EVENTS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

pub(super) fn json_of(value: &Value) -> Do {
    Do::Say(ok("application/json", &value.to_string()))
}

pub(super) fn error(status: &str) -> Do {
    let body = r#"{"error":{"message":"no","type":"x","param":null,"code":"x"}}"#;
    Do::Say(format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
}

pub(super) fn event(text: &str, finish: Value) -> String {
    let choice = json!({"index": 0, "text": text, "finish_reason": finish, "token_ids": [7]});
    format!("data: {}\n\n", json!({"id": "c", "object": "text_completion", "choices": [choice]}))
}

/// What a decode worker says: `one two`, as the request wants it.
pub(super) fn decoded(body: &Value, _: usize) -> Do {
    if body["stream"] == true {
        let pieces = [event("one ", Value::Null), event("two", json!("stop")), "data: [DONE]\n\n".to_owned()];
        let chunks = pieces.map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len())).concat();
        return Do::Say(format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"
        ));
    }
    let choice = json!({"index": 0, "text": "one two", "finish_reason": "stop"});
    json_of(&json!({"id": "c", "object": "text_completion", "choices": [choice]}))
}

/// What vLLM's prefill worker says, with parameters that are never the same twice.
pub(super) fn prefilled(_: &Value, number: usize) -> Do {
    prefilled_as("length", number)
}

pub(super) fn prefilled_as(finish: &str, number: usize) -> Do {
    let choice = json!({"index": 0, "text": "one ", "finish_reason": finish, "token_ids": [7]});
    let params = json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2]],
                        "remote_engine_id": "e", "remote_request_id": format!("r{number}")});
    json_of(&json!({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice],
                    "usage": {"total_tokens": 3}, "kv_transfer_params": params}))
}

/// Registers an engine for a part of the requests for `m`.
pub(super) fn add(front: &Running, id: &str, address: SocketAddr, role: WorkerRole, connector: Connector) {
    front.cluster.add(id, address);
    front.cluster.change(id, |record| {
        record.spec.role = role;
        record.spec.engine = match connector {
            Connector::Sglang => EngineKind::Sglang,
            _ => EngineKind::Vllm,
        };
        record.spec.transfer.connector = Some(connector);
    });
}

/// Prefill and decode workers, called `p0`… and `d0`…, that hand over by NIXL.
pub(super) async fn fleet(front: &Running, prefills: usize, decodes: usize) -> (Vec<Fake>, Vec<Fake>) {
    let (mut p, mut d) = (Vec::new(), Vec::new());
    for at in 0..prefills {
        p.push(Fake::new(prefilled).await);
        add(front, &format!("p{at}"), p[at].address, WorkerRole::Prefill, Connector::Nixl);
    }
    for at in 0..decodes {
        d.push(Fake::new(decoded).await);
        add(front, &format!("d{at}"), d[at].address, WorkerRole::Decode, Connector::Nixl);
    }
    (p, d)
}

pub(super) const PROMPT: &str = r#""model":"m","prompt":"a b c","max_tokens":9"#;

/// Asks for a completion in one piece.
pub(super) async fn complete(front: &Running) -> String {
    exchange(front.address, post("/v1/completions", &format!("{{{PROMPT}}}"))).await
}

/// Asks for one in events.
pub(super) async fn stream(front: &Running) -> String {
    exchange(front.address, post("/v1/completions", &format!("{{{PROMPT},\"stream\":true}}"))).await
}

/// All texts of a stream's events.
pub(super) fn said(response: &str) -> String {
    let events = response.lines().filter_map(|line| line.strip_prefix("data: {"));
    let texts = events.map(|event| {
        let event: Value = serde_json::from_str(&format!("{{{event}")).expect(event);
        event["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
    });
    texts.collect()
}

/// Nothing is booked anywhere any more.
pub(super) async fn is_idle(front: &Running) {
    let idle = || {
        let view = front.cluster.registry();
        view.workers.iter().all(|worker| worker.live.booked() == LoadSum::default())
    };
    eventually("all bookings are given up", idle).await;
}

/// Parameters that decode workers were shown; none of them twice.
pub(super) fn shown(decodes: &[&Fake]) -> Vec<String> {
    let bodies = decodes.iter().flat_map(|fake| fake.bodies());
    let ids =
        bodies.filter_map(|body| Some(body["kv_transfer_params"]["remote_request_id"].as_str()?.to_owned()));
    let ids: Vec<String> = ids.collect();
    let different: std::collections::BTreeSet<_> = ids.iter().collect();
    assert_eq!(different.len(), ids.len(), "parameters were used twice: {ids:?}");
    ids
}

/// Short pauses between attempts.
pub(super) fn quick() -> crate::http::FrontConfig {
    let mut config = crate::http::FrontConfig::default();
    config.proxy.retry.pause = Duration::from_millis(1);
    config.pool.connect_timeout = Duration::from_millis(500);
    config
}
