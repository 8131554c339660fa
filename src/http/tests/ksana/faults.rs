//! Section by section what is wrong with the reference router, and that fixed mode does not do it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::nodes::{Script, Step, node, saying};
use super::{beat, call, config, detail_of, pair, register, registration, start, start_on};
use crate::http::auth::digest_of;
use crate::http::tests::support::{
    MemoryCluster, body, eventually, exchange, header, post, refusing, request, start_with, status,
};
use crate::http::{ClientKey, KeyRing, Metrics, TokenDigests};
use crate::ids::ReplicaId;
use crate::state::command::ControlCommand;
use crate::state::ksana::{KsanaCommand, Rules};
use crate::state::replicated::State as _;

fn at(port: u16) -> std::net::SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn ms(at: u64) -> Duration {
    Duration::from_millis(at)
}

/// A chunk of a body.
fn chunk(bytes: &str) -> Step {
    Step::Send(format!("{:x}\r\n{bytes}\r\n", bytes.len()).into_bytes())
}

fn chunked_head(content_type: &str) -> Step {
    let kind =
        if content_type.is_empty() { String::new() } else { format!("content-type: {content_type}\r\n") };
    Step::Send(format!("HTTP/1.1 200 OK\r\n{kind}transfer-encoding: chunked\r\n\r\n").into_bytes())
}

/// A chunked answer whose pieces come at these times.
fn streaming(content_type: &str, pieces: &[(u64, &str)]) -> Script {
    let mut script = vec![(ms(0), chunked_head(content_type))];
    script.extend(pieces.iter().map(|(at, piece)| (ms(*at), chunk(piece))));
    let last = pieces.last().map_or(0, |(at, _)| *at);
    script.push((ms(last), Step::Send(b"0\r\n\r\n".to_vec())));
    script.push((ms(last), Step::Close));
    script
}

fn generate() -> String {
    post("/generate", r#"{"prompt":"hi"}"#)
}

/// The chunks of a body, put together.
fn output(response: &str) -> String {
    let (head, body) = response.split_once("\r\n\r\n").expect(response);
    if header(head, "transfer-encoding") != Some("chunked") {
        return body.to_owned();
    }
    let (mut out, mut rest) = (String::new(), body);
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect(response);
        out.push_str(&more[..size]);
        rest = &more[(size + 2).min(more.len())..];
    }
    out
}

#[tokio::test]
async fn plain_heartbeats_are_not_agreed_on() {
    let front = start(false);
    let (p, d, _) = pair(&front, at(100), at(200)).await;
    let applied = front.cluster.control.lock().digest();
    front.cluster.ksana_heard.lock().clear();
    for id in [&p, &d, &p] {
        beat(&front, id).await;
    }
    assert_eq!(*front.cluster.ksana_heard.lock(), [p.clone(), d, p]);
    assert_eq!(front.cluster.control.lock().digest(), applied);
}

#[tokio::test]
async fn what_one_replica_has_written_another_answers_from() {
    let one = start(false);
    let other = start_on(false, one.cluster.clone());
    let id = register(&one, registration("prefill", at(100), "127.0.0.1:1")).await;
    let before = one.cluster.barriers.load(Ordering::Relaxed);
    assert_eq!(beat(&other, &id).await["node_id"], id.as_str());
    assert!(one.cluster.barriers.load(Ordering::Relaxed) > before, "it asked before it answered");
}

#[tokio::test]
async fn a_node_that_nobody_knows_is_not_found_and_one_that_describes_itself_is_there_again() {
    let front = start(false);
    for id in ["nope", ""] {
        let (status, reply) = call(&front, "/Heartbeat", &json!({ "node_id": id })).await;
        assert_eq!((status, reply), (404, json!({ "detail": format!("Node '{id}' not found") })));
    }
    let named = json!({"node_id": "nope", "comm_key": "a:1__b:2", "comm_id": "X"});
    assert_eq!(call(&front, "/RegisterCommId", &named).await.0, 404);
    let (p, d, key) = pair(&front, at(100), at(200)).await;
    let wiped = start(false);
    for id in [&p, &d] {
        assert_eq!(beat(&wiped, id).await["group_ready"], true);
    }
    assert_eq!(beat(&wiped, &p).await["comm_group_to_id"], json!({ key: "" }));
}

#[tokio::test]
async fn a_node_that_moved_is_registered_and_no_statement_of_a_database_is_shown() {
    let front = start(false);
    register(&front, registration("prefill", at(100), "127.0.0.1:1")).await;
    let moved = register(&front, registration("prefill", at(100), "127.0.0.1:2")).await;
    assert_eq!(beat(&front, &moved).await["coordinator_addr"], "127.0.0.1:2");
    let mut named = registration("decode", at(200), "127.0.0.1:3");
    named["node_id"] = moved.into();
    let (status, reply) = call(&front, "/RegisterNode", &named).await;
    assert_eq!(status, 409);
    assert!(!reply.to_string().contains("SQL"), "{reply}");
}

#[tokio::test]
async fn comm_ids_are_their_owners() {
    let front = start(false);
    let (p, d, key) = pair(&front, at(100), at(200)).await;
    for (id, of, comm_id, code) in [
        (&d, key.as_str(), "Y", 403),
        (&p, "9.9.9.9:1__8.8.8.8:2", "Y", 403),
        (&p, "nokey", "Y", 400),
        (&p, key.as_str(), "", 400),
    ] {
        let named = json!({"node_id": id, "comm_key": of, "comm_id": comm_id});
        assert_eq!(call(&front, "/RegisterCommId", &named).await.0, code, "{of} {comm_id}");
    }
    let again = json!({"node_id": p, "comm_key": key, "comm_id": "Y"});
    assert_eq!(call(&front, "/RegisterCommId", &again).await.1, json!({"status": "OK", "comm_id": "X"}));
}

#[tokio::test]
async fn without_a_leader_nodes_are_answered_from_what_is_known_and_never_with_an_empty_comm_id() {
    let front = start(false);
    let (p, d, key) = pair(&front, at(100), at(200)).await;
    let second = register(&front, registration("decode", at(300), "127.0.0.1:300")).await;
    beat(&front, &second).await;
    front.cluster.leaderless.store(true, Ordering::Relaxed);
    // One pair has its id, the other one may have one that is not known here.
    assert_eq!(beat(&front, &p).await["comm_group_to_id"], json!({ &key: "X" }));
    assert_eq!(beat(&front, &d).await["comm_group_to_id"], json!({ &key: "X" }));
    // A registration has an id all the same, and its node is answered.
    let newcomer = registration("decode", at(400), "127.0.0.1:400");
    let id = register(&front, newcomer.clone()).await;
    let reply = beat(&front, &id).await;
    assert_eq!(
        (&reply["comm_group_to_id"], &reply["coordinator_addr"]),
        (&json!({}), &json!("127.0.0.1:400"))
    );
    let (status, reply) = call(&front, "/Heartbeat", &json!({"node_id": "nope"})).await;
    assert_eq!(status, 503, "{reply}");
    front.cluster.leaderless.store(false, Ordering::Relaxed);
    assert_eq!(beat(&front, &id).await["group_ready"], true);
    assert_eq!(register(&front, newcomer).await, id);
}

#[tokio::test]
async fn nothing_is_sent_to_a_pair_that_is_not_ready() {
    let front = start(false);
    let (prefill, prefill_seen) = saying("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let (decode, _) = saying("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    let none = exchange(front.address, generate()).await;
    assert_eq!((status(&none), detail_of(&none).as_str()), (503, "No available nodes for processing"));
    let (p, d, _) = pair(&front, prefill, decode).await;
    assert_eq!(status(&exchange(front.address, generate()).await), 200);
    // Both fall silent: nobody needs to say so.
    let rules = Rules { strict: false, timeout_ms: 60_000 };
    let wait = ControlCommand::Tick {
        elapsed_ms: 61_000,
        replicas: Vec::new(),
        worker_timeout_ms: 5000,
        lease_ms: 750,
    };
    front.cluster.apply(wait);
    let judge = KsanaCommand::Judge { rules, forget_ms: u64::MAX };
    front.cluster.control.lock().apply(ReplicaId(1), ControlCommand::Ksana(judge));
    assert_eq!(status(&exchange(front.address, generate()).await), 503);
    assert_eq!(prefill_seen.lock().requests.len(), 1);
    beat(&front, &p).await;
    assert_eq!(status(&exchange(front.address, generate()).await), 503, "half of it is none");
    beat(&front, &d).await;
    assert_eq!(status(&exchange(front.address, generate()).await), 200);
}

#[tokio::test]
async fn headers_query_and_body_reach_both_legs_as_they_are() {
    let front = start(false);
    let (prefill, prefill_seen) = saying("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    let (decode, decode_seen) = saying(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-engine: d\r\ncontent-length: 2\r\n\r\n{}",
    )
    .await;
    let (_, _, key) = pair(&front, prefill, decode).await;
    let json = "{ \"a\" : 1.10, \"a\": 1e3 }";
    let extra = "authorization: Bearer theirs\r\nx-remote-ip: 1.2.3.4\r\ntraceparent: 00-1-2-03\r\n\
                 kv-comm-request-id: 7\r\ncontent-type: application/json\r\n";
    let response = exchange(front.address, request("POST", "/v1/embeddings?a=b&c", extra, json)).await;
    assert_eq!((status(&response), header(&response, "x-engine")), (200, Some("d")), "{response}");
    assert_eq!(header(&response, "everline-replica"), Some("everline"));
    let mut ids = BTreeSet::new();
    for seen in [prefill_seen, decode_seen] {
        let seen = seen.lock();
        let (head, body) = &seen.requests[0];
        assert!(head.starts_with("POST /v1/embeddings?a=b&c HTTP/1.1\r\n"), "{head}");
        assert_eq!(body, json.as_bytes());
        for (name, value) in
            [("authorization", "Bearer theirs"), ("x-remote-ip", "1.2.3.4"), ("kv-comm-group-key", &key)]
        {
            assert_eq!(header(head, name), Some(value), "{head}");
        }
        ids.insert(header(head, "kv-comm-request-id").unwrap().to_owned());
    }
    assert!(ids.len() == 1 && !ids.contains("7"), "{ids:?}");
}

#[tokio::test]
async fn frames_are_put_together_whole_whatever_pieces_they_come_in() {
    let front = start(false);
    let prefill = streaming("", &[(0, "{\"texts\":[\"A"), (30, "\"]}\0rest")]);
    let decode = streaming("", &[(100, "{\"texts\":[\"AB\"]}"), (130, "\0{\"texts\":[\"ABC\"]}\0")]);
    let ((prefill, _), (decode, _)) = (node(vec![prefill]).await, node(vec![decode]).await);
    pair(&front, prefill, decode).await;
    let response = exchange(front.address, generate()).await;
    assert_eq!(header(&response, "content-type"), Some("application/octet-stream"), "{response}");
    assert_eq!(
        output(&response),
        "{\"texts\":[\"A\"]}\0{\"texts\":[\"AB\"]}\0{\"texts\":[\"ABC\"]}\0[DONE]\0"
    );
}

#[tokio::test]
async fn events_stay_events() {
    let front = start(false);
    let prefill = streaming("text/event-stream", &[(0, "data: p\n\n")]);
    let decode =
        streaming("text/event-stream; charset=utf-8", &[(20, "data: d\n\n"), (40, "data: [DONE]\n\n")]);
    let ((prefill, _), (decode, _)) = (node(vec![prefill]).await, node(vec![decode]).await);
    pair(&front, prefill, decode).await;
    let response = exchange(front.address, post("/v1/chat/completions", r#"{"stream":true}"#)).await;
    assert_eq!(header(&response, "content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(output(&response), "data: d\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn a_stream_ends_with_its_last_token() {
    let front = start(false);
    let ((prefill, _), (decode, _)) =
        (node(vec![streaming("", &[(0, "a\0")])]).await, node(vec![streaming("", &[(20, "ab\0")])]).await);
    pair(&front, prefill, decode).await;
    exchange(front.address, generate()).await;
    let took = {
        let began = std::time::Instant::now();
        assert_eq!(output(&exchange(front.address, generate()).await), "a\0ab\0[DONE]\0");
        began.elapsed()
    };
    assert!(took < ms(95), "{took:?}: the reference waits 100 ms more");
}

#[tokio::test]
async fn what_fails_before_any_output_is_tried_at_another_pair_under_another_number() {
    let good = || streaming("", &[(30, "ab\0")]);
    let broken: Vec<(&str, Script)> = vec![
        ("refused", Vec::new()),
        ("reset before its head", vec![(ms(20), Step::Abort)]),
        (
            "500",
            vec![
                (ms(0), Step::Send(b"HTTP/1.1 500 X\r\ncontent-length: 1\r\n\r\nx".to_vec())),
                (ms(0), Step::Close),
            ],
        ),
        (
            "307",
            vec![
                (ms(0), Step::Send(b"HTTP/1.1 307 X\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n".to_vec())),
                (ms(0), Step::Close),
            ],
        ),
        ("reset behind its head", vec![(ms(0), chunked_head("")), (ms(20), Step::Abort)]),
    ];
    for bad_leg in ["prefill", "decode"] {
        for (what, script) in &broken {
            let front = start(false);
            let (other, other_seen) =
                node(vec![vec![(ms(0), chunked_head("")), (ms(0), Step::Look(ms(3000)))]]).await;
            let (bad, bad_seen) = node(vec![script.clone()]).await;
            let bad = if *what == "refused" { refusing().await } else { bad };
            let (prefill, decode) = if bad_leg == "prefill" { (bad, other) } else { (other, bad) };
            pair(&front, prefill, decode).await;
            let only = exchange(front.address, generate()).await;
            assert_eq!(status(&only), 502, "{bad_leg} {what}: {only}");
            assert!(detail_of(&only).contains(bad_leg), "{bad_leg} {what}: {only}");
            if *what != "refused" {
                eventually("the other leg is closed", || other_seen.lock().closed.first() == Some(&true))
                    .await;
            }

            let ((prefill, prefill_seen), (decode, _)) =
                (node(vec![streaming("", &[(0, "a\0")])]).await, node(vec![good()]).await);
            pair(&front, prefill, decode).await;
            // Whichever comes first: where the good one is chosen at once, nothing is tried again.
            for _ in 0..6 {
                let response = exchange(front.address, generate()).await;
                assert_eq!(
                    (status(&response), output(&response).as_str()),
                    (200, "a\0ab\0[DONE]\0"),
                    "{what}"
                );
            }
            let id = |head: &str| header(head, "kv-comm-request-id").unwrap().parse::<u32>().unwrap();
            let of = |seen: &super::nodes::Seen| {
                seen.requests.iter().map(|(head, _)| id(head)).collect::<Vec<_>>()
            };
            let all = [of(&prefill_seen.lock()), of(&bad_seen.lock())].concat();
            assert_eq!(
                all.iter().collect::<BTreeSet<_>>().len(),
                all.len(),
                "a number was used twice: {all:?}"
            );
        }
    }
}

#[tokio::test]
async fn what_fails_behind_some_output_is_told() {
    let cut = |head: Step, piece: &str| vec![(ms(0), head), (ms(20), chunk(piece)), (ms(60), Step::Abort)];
    let front = start(false);
    let (prefill, _) = node(vec![streaming("", &[(0, "a\0")])]).await;
    let (decode, _) = node(vec![cut(chunked_head(""), "ab\0")]).await;
    pair(&front, prefill, decode).await;
    let told = output(&exchange(front.address, generate()).await);
    let last = told.strip_prefix("a\0ab\0").and_then(|rest| rest.strip_suffix('\0')).expect(&told);
    assert!(serde_json::from_str::<Value>(last).unwrap()["detail"].is_string(), "{told}");

    let front = start(false);
    let events = "text/event-stream";
    let (prefill, _) = node(vec![streaming(events, &[(0, "data: a\n\n")])]).await;
    let (decode, _) = node(vec![cut(chunked_head(events), "data: b\n\n")]).await;
    pair(&front, prefill, decode).await;
    let told = output(&exchange(front.address, post("/v1/completions", "{}")).await);
    let last = told.strip_prefix("data: b\n\ndata: ").expect(&told);
    assert!(serde_json::from_str::<Value>(last).unwrap()["error"]["message"].is_string(), "{told}");
}

#[tokio::test]
async fn an_engine_s_refusal_is_the_client_s_answer() {
    let refusal =
        "HTTP/1.1 422 X\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{\"detail\":\"x\"}";
    for bad_leg in ["prefill", "decode"] {
        let front = start(false);
        let (bad, seen) = saying(refusal).await;
        let (good, _) = saying("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        let (prefill, decode) = if bad_leg == "prefill" { (bad, good) } else { (good, bad) };
        pair(&front, prefill, decode).await;
        let response = exchange(front.address, generate()).await;
        assert_eq!((status(&response), body(&response)), (422, json!({"detail": "x"})), "{bad_leg}");
        assert_eq!(seen.lock().requests.len(), 1, "it is not tried again");
    }
}

#[tokio::test]
async fn a_body_that_is_no_json_is_refused_in_words() {
    let front = start(false);
    pair(&front, at(100), at(200)).await;
    for bad in ["{bad", ""] {
        let response = exchange(front.address, post("/generate", bad)).await;
        assert_eq!(status(&response), 400, "{response}");
        assert!(detail_of(&response).contains("not valid JSON"), "{response}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_both_legs_with_it_in_every_phase() {
    let waiting = |head: bool, piece: bool| {
        let mut script: Script = Vec::new();
        if head {
            script.push((ms(0), chunked_head("")));
        }
        if piece {
            script.push((ms(0), chunk("ab\0")));
        }
        script.push((ms(0), Step::Look(ms(5000))));
        script
    };
    for (head, piece) in [(false, false), (true, false), (true, true)] {
        let front = start(false);
        let (prefill, prefill_seen) = node(vec![waiting(head, false)]).await;
        let (decode, decode_seen) = node(vec![waiting(head, piece)]).await;
        pair(&front, prefill, decode).await;
        let mut client = TcpStream::connect(front.address).await.unwrap();
        client.write_all(generate().as_bytes()).await.unwrap();
        eventually("both have it", || {
            !prefill_seen.lock().requests.is_empty() && !decode_seen.lock().requests.is_empty()
        })
        .await;
        if piece {
            client.read_u8().await.unwrap();
        }
        drop(client);
        for seen in [&prefill_seen, &decode_seen] {
            eventually("the leg is closed", || seen.lock().closed == [true]).await;
        }
    }
}

#[tokio::test]
async fn the_pair_with_less_to_do_is_chosen_and_no_number_is_used_twice_by_any_replica() {
    let one = start(false);
    let other = start_on(false, one.cluster.clone());
    let slow = || streaming("", &[(300, "ab\0")]);
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let (prefill, seen) = node(vec![streaming("", &[(0, "a\0")])]).await;
        let (decode, _) = node(vec![slow()]).await;
        pair(&one, prefill, decode).await;
        nodes.push(seen);
    }
    // Groups of different pairs go together as well, once they have a comm id; these have none.
    let asked = (0..4).map(|_| async {
        tokio::join!(exchange(one.address, generate()), exchange(other.address, generate()))
    });
    futures_util::future::join_all(asked).await;
    let counts: Vec<usize> = nodes.iter().map(|seen| seen.lock().requests.len()).collect();
    assert_eq!(counts, [4, 4], "each replica gives half of its requests to each");
    let ids = nodes.iter().flat_map(|seen| {
        let seen = seen.lock();
        seen.requests
            .iter()
            .map(|(head, _)| header(head, "kv-comm-request-id").unwrap().to_owned())
            .collect::<Vec<_>>()
    });
    assert_eq!(ids.collect::<BTreeSet<_>>().len(), 8);
}

#[tokio::test]
async fn nodes_and_clients_show_their_credentials_where_some_are_configured() {
    let key = ClientKey {
        id: "k".into(),
        digest: digest_of(b"client"),
        models: None,
        rate: None,
        max_concurrent: None,
        expires: None,
    };
    let mut config = config(false);
    config.keys = Arc::new(KeyRing::new(Some(vec![key])));
    config.nodes.tokens = TokenDigests::of_tokens(["node"]);
    let front = start_with(config, MemoryCluster::new(), Metrics::default());
    let routes = [("/RegisterNode", "node"), ("/Heartbeat", "node"), ("/RegisterCommId", "node")];
    for (path, secret) in routes.into_iter().chain([("/generate", "client"), ("/v1/x", "client")]) {
        for (shown, is_good) in [("", false), ("other", false), (secret, true)] {
            let header = match shown {
                "" => String::new(),
                shown => format!("authorization: Bearer {shown}\r\n"),
            };
            let response = exchange(front.address, request("POST", path, &header, "{}")).await;
            let refused = matches!(status(&response), 401 | 403);
            assert_eq!(refused, !is_good, "{path} {shown}: {response}");
            assert!(body(&response)["detail"] != Value::Null, "{response}");
        }
    }
    assert_eq!(status(&exchange(front.address, request("GET", "/readyz", "", "")).await), 200);
}
