//! Simulated engines as nodes of a KsanaLLM fleet, with a router that is written down here: it answers as the
//! reference does to one prefill and one decode group, and keeps what it was asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use everline::engines::sim::ksana::Node;
use everline::engines::sim::pd::{Protocol, Role};
use everline::engines::sim::{EngineSimArgs, Simulator};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{Reply, call, get, post, quick, start};

#[derive(Default)]
struct Told {
    /// Path and body of each call.
    calls: Vec<(String, String)>,
    nodes: Vec<Value>,
    comm_ids: BTreeMap<String, String>,
    address: Option<SocketAddr>,
}

/// The router's part that nodes talk to.
#[derive(Clone, Default)]
struct Router(Arc<Mutex<Told>>);

impl Router {
    async fn listen(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.0.lock().unwrap().address = Some(address);
        let router = self.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let router = router.clone();
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"}") {
                        let mut chunk = [0; 4096];
                        match stream.read(&mut chunk).await {
                            Ok(count @ 1..) => request.extend_from_slice(&chunk[..count]),
                            _ => return,
                        }
                    }
                    let request = String::from_utf8(request).unwrap();
                    let (head, body) = request.split_once("\r\n\r\n").unwrap();
                    let path = head.split(' ').nth(1).unwrap();
                    let answer = router.answer(path, body).to_string();
                    let length = answer.len();
                    let reply = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{answer}");
                    let _ = stream.write_all(reply.as_bytes()).await;
                });
            }
        });
        address
    }

    fn answer(&self, path: &str, body: &str) -> Value {
        let mut told = self.0.lock().unwrap();
        told.calls.push((path.to_owned(), body.to_owned()));
        let body: Value = serde_json::from_str(body).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        match path {
            "/RegisterNode" => {
                told.nodes.push(body);
                json!({"node_id": format!("node {}", told.nodes.len() - 1), "is_online": true})
            }
            "/RegisterCommId" => {
                let (key, id) = (text(&body["comm_key"]), text(&body["comm_id"]));
                told.comm_ids.insert(key, id.clone());
                json!({"status": "OK", "comm_id": id})
            }
            _ => {
                let of = |role: &str| {
                    told.nodes.iter().filter(|node| node["group_role"] == role).collect::<Vec<_>>()
                };
                let (prefills, decodes) = (of("prefill"), of("decode"));
                let devices = |nodes: &[&Value]| {
                    nodes.iter().map(|node| node["devices"].as_array().unwrap().len()).sum::<usize>()
                };
                let world = |nodes: &[&Value]| nodes[0]["world_size"].as_u64().unwrap() as usize;
                let ready = |nodes: &[&Value]| !nodes.is_empty() && devices(nodes) >= world(nodes);
                if !ready(&prefills) || !ready(&decodes) {
                    return json!({"node_id": body["node_id"], "comm_group_to_address": {}, "comm_group_to_id": {}});
                }
                let last =
                    |nodes: &[&Value]| nodes.last().unwrap()["inference_addr"].as_str().unwrap().to_owned();
                let key = format!("{}__{}", last(&prefills), last(&decodes));
                let mut addresses = Vec::new();
                for node in prefills.iter().chain(&decodes) {
                    for device in node["devices"].as_array().unwrap() {
                        addresses.push(json!([
                            node["node_rank"],
                            device["device_id"],
                            node["coordinator_addr"]
                        ]));
                    }
                }
                let id = told.comm_ids.get(&key).cloned().unwrap_or_default();
                if id.is_empty() {
                    addresses.clear();
                }
                let (addresses, ids) = (json!({ &key: addresses }), json!({ &key: id }));
                json!({"node_id": body["node_id"], "comm_group_to_address": addresses, "comm_group_to_id": ids})
            }
        }
    }

    fn calls(&self, path: &str) -> Vec<Value> {
        let told = self.0.lock().unwrap();
        let calls = told.calls.iter().filter(|(called, _)| called == path);
        calls.map(|(_, body)| serde_json::from_str(body).unwrap()).collect()
    }

    /// The key of the one pair.
    fn key(&self) -> String {
        self.0.lock().unwrap().comm_ids.keys().next_back().unwrap().clone()
    }
}

fn engine(role: Role, router: SocketAddr) -> EngineSimArgs {
    let mut args = quick();
    (args.pd.protocol, args.pd.role) = (Some(Protocol::Ksana), Some(role));
    args.pd.ksana.router_addr = Some(router.to_string());
    args.pd.ksana.heartbeat_interval_ms = 20;
    args
}

fn node(engine: &Simulator) -> Arc<Node> {
    engine.engine().desk().unwrap().node().unwrap().clone()
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < limit, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn pair(router: &Router) -> (Simulator, Simulator) {
    let address = router.listen().await;
    let p = start(engine(Role::Prefill, address)).await;
    let d = start(engine(Role::Decode, address)).await;
    until("a group", || node(&d).active_groups() == 1 && node(&p).active_groups() == 1).await;
    (p, d)
}

async fn ask(engine: &Simulator, path: &str, key: &str, id: u32, body: &Value) -> Reply {
    let id = id.to_string();
    let headers = [("kv-comm-group-key", key), ("kv-comm-request-id", id.as_str())];
    call(engine.address(), "POST", path, &headers, &body.to_string()).await
}

fn body() -> Value {
    let prompt: Vec<u32> = (0..100).map(|at| 400 + at * 3).collect();
    json!({"input_tokens": prompt, "sampling_config": {"max_new_tokens": 12, "temperature": 0.0}})
}

/// The frames of a reply; each ends in a NUL.
fn frames(reply: &Reply) -> Vec<Value> {
    assert_eq!((reply.status(), reply.complete), (200, true), "{}", reply.body());
    let whole = reply.body();
    assert!(whole.ends_with('\0'), "{whole:?}");
    whole.trim_end_matches('\0').split('\0').map(|frame| serde_json::from_str(frame).unwrap()).collect()
}

async fn aggregated() -> Value {
    let sim = start(quick()).await;
    let body = json!({"prompt": body()["input_tokens"], "max_tokens": 12, "temperature": 0, "return_token_ids": true});
    let whole = post(sim.address(), "/v1/completions", body).await.json();
    whole["choices"][0].clone()
}

#[tokio::test]
async fn nodes_register_as_the_engine_does_and_set_their_group_up_by_heartbeats() {
    let router = Router::default();
    let (p, d) = pair(&router).await;
    let nodes = router.calls("/RegisterNode");
    assert_eq!(nodes.len(), 2, "once each");
    let mut members: Vec<&String> = nodes[0].as_object().unwrap().keys().collect();
    members.sort();
    let all = [
        "cluster_name",
        "coordinator_addr",
        "devices",
        "group_role",
        "inference_addr",
        "job_id",
        "node_rank",
        "start_time",
        "world_size",
    ];
    assert_eq!(members, all);
    assert_eq!((&nodes[0]["group_role"], &nodes[1]["group_role"]), (&json!("prefill"), &json!("decode")));
    assert_eq!(nodes[0]["inference_addr"], p.address().to_string());
    assert_eq!((node(&p).node_id(), node(&d).node_id()), ("node 0".into(), "node 1".into()));
    let ids = router.calls("/RegisterCommId");
    assert_eq!((ids.len(), ids[0]["comm_id"].as_str().unwrap().len()), (1, 172), "128 bytes in base64");
    assert_eq!(ids[0]["comm_key"], format!("{}__{}", p.address(), d.address()));
    let beats = router.calls("/Heartbeat").len();
    until("more heartbeats", || router.calls("/Heartbeat").len() > beats + 4).await;
}

#[tokio::test]
async fn both_legs_stream_frames_with_all_so_far_and_the_decode_leg_says_what_one_engine_says() {
    let router = Router::default();
    let (p, d) = pair(&router).await;
    let (key, alone) = (router.key(), aggregated().await);
    let body = body();
    let (first, whole) =
        tokio::join!(ask(&p, "/generate", &key, 7, &body), ask(&d, "/generate", &key, 7, &body));
    for reply in [&first, &whole] {
        assert!(
            !reply.head.contains("content-type") && reply.head.contains("transfer-encoding: chunked"),
            "{}",
            reply.head
        );
    }
    let (first, whole) = (frames(&first), frames(&whole));
    assert_eq!((first.len(), whole.len()), (1, 12));
    for (at, frame) in whole.iter().enumerate() {
        assert_eq!(
            frame["output_token_ids"][0].as_array().unwrap()[..],
            alone["token_ids"].as_array().unwrap()[..=at]
        );
        assert_eq!(frame["input_token_ids"], body["input_tokens"]);
    }
    assert_eq!(whole[11]["texts"][0], alone["text"]);
    assert_eq!(first[0], whole[0], "the prefill leg has the first token, too");
    // One answer, without a NUL.
    let mut body = body;
    body["stream"] = false.into();
    let (_, whole) = tokio::join!(ask(&p, "/generate", &key, 8, &body), ask(&d, "/generate", &key, 8, &body));
    assert_eq!(whole.json()["texts"], json!([alone["text"]]));
    let order = ["{\"texts\":[", "],\"output_token_ids\":[[", "]],\"logprobs\":[],\"input_token_ids\":["];
    let text = whole.body();
    assert!(order.iter().try_fold(0, |from, part| Some(from + text[from..].find(part)?)).is_some(), "{text}");
    // OpenAI's routes go by the same headers.
    let chat = json!({"messages": [{"role": "user", "content": "hello there ".repeat(20)}], "max_tokens": 9});
    let (_, said) = tokio::join!(
        ask(&p, "/v1/chat/completions", &key, 9, &chat),
        ask(&d, "/v1/chat/completions", &key, 9, &chat)
    );
    let alone = start(quick()).await;
    let alone = post(alone.address(), "/v1/chat/completions", chat).await.json();
    assert_eq!(said.json()["choices"][0]["message"]["content"], alone["choices"][0]["message"]["content"]);
    for engine in [&p, &d] {
        let stats = &engine.engine().stats;
        until("no blocks in use", || stats.kv_usage_ppm.get() == 0).await;
        assert_eq!(stats.deferred.get(), 0);
    }
}

#[tokio::test]
async fn a_leg_that_is_alone_waits_until_its_client_leaves() {
    let router = Router::default();
    let (p, d) = pair(&router).await;
    let (key, body) = (router.key(), body());
    let patience = Duration::from_millis(300);
    for (engine, key, id) in [(&d, key.as_str(), 1), (&p, key.as_str(), 2), (&d, "some__other", 3)] {
        let reply = tokio::time::timeout(patience, ask(engine, "/generate", key, id, &body)).await;
        assert!(reply.is_err(), "{id}");
        let stats = engine.engine().stats.clone();
        until("no blocks in use", || stats.kv_usage_ppm.get() == 0 && stats.deferred.get() == 0).await;
    }
    // Two numbers that are not the same.
    let legs =
        async { tokio::join!(ask(&p, "/generate", &key, 4, &body), ask(&d, "/generate", &key, 5, &body)) };
    assert!(tokio::time::timeout(patience, legs).await.is_err());
    // A number that is none.
    let wrong = [("kv-comm-group-key", key.as_str()), ("kv-comm-request-id", "x")];
    let reply = call(d.address(), "POST", "/generate", &wrong, &body.to_string()).await;
    assert_eq!((reply.status(), reply.body().as_str()), (500, r#"{"detail":"stoll"}"#));
}

#[tokio::test]
async fn a_request_id_that_is_in_flight_twice_leaves_one_pair_of_legs_waiting() {
    let router = Router::default();
    let (p, d) = pair(&router).await;
    let (key, body) = (router.key(), body());
    let leg = |engine: &Simulator| {
        let (address, key, body) = (engine.address(), key.clone(), body.to_string());
        tokio::spawn(async move {
            let headers = [("kv-comm-group-key", key.as_str()), ("kv-comm-request-id", "6")];
            call(address, "POST", "/generate", &headers, &body).await
        })
    };
    let legs = [leg(&d), leg(&d), leg(&p), leg(&p)];
    let done = || legs.iter().map(|leg| usize::from(leg.is_finished())).sum::<usize>();
    until("one pair of legs", || done() >= 2).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(done() < 4, "all of them ended");
    legs.iter().for_each(|leg| leg.abort());
    for engine in [&p, &d] {
        let stats = &engine.engine().stats;
        until("no blocks in use", || stats.kv_usage_ppm.get() == 0 && stats.deferred.get() == 0).await;
    }
}

#[tokio::test]
async fn groups_of_several_nodes_answer_by_their_first_and_need_all_their_devices() {
    let router = Router::default();
    let address = router.listen().await;
    let of = |role, rank, first: Option<SocketAddr>| {
        let mut args = engine(role, address);
        (args.pd.ksana.node_rank, args.pd.ksana.devices, args.pd.ksana.world_size) = (rank, 2, Some(4));
        args.pd.ksana.inference_addr = first.map(|first| first.to_string());
        args
    };
    let p0 = start(of(Role::Prefill, 0, None)).await;
    let p1 = start(of(Role::Prefill, 1, Some(p0.address()))).await;
    let d0 = start(of(Role::Decode, 0, None)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(node(&d0).active_groups(), 0, "half of the decode group is missing");
    let d1 = start(of(Role::Decode, 1, Some(d0.address()))).await;
    until("a group", || node(&d0).active_groups() == 1 && node(&p0).active_groups() == 1).await;
    assert_eq!(router.calls("/RegisterNode")[1]["inference_addr"], p0.address().to_string());
    let (key, body) = (router.key(), body());
    let (_, whole) =
        tokio::join!(ask(&p0, "/generate", &key, 7, &body), ask(&d0, "/generate", &key, 7, &body));
    assert_eq!(frames(&whole)[11]["texts"][0], aggregated().await["text"]);
    for other in [&p1, &d1] {
        assert_eq!(
            ask(other, "/generate", &key, 8, &body).await.status(),
            404,
            "only the first node listens"
        );
    }
}

#[tokio::test]
async fn a_decode_node_that_starts_again_needs_its_prefill_node_to_do_so_too() {
    let router = Router::default();
    let (p, d) = pair(&router).await;
    let mut again = engine(Role::Decode, node_router(&router));
    again.listen = d.address();
    again.pd.ksana.coordinator_addr = Some(d.engine().desk().unwrap().side_channel());
    d.stop().await;
    // What it had registered is what it registers again.
    router.0.lock().unwrap().nodes.retain(|node| node["group_role"] == "prefill");
    let d = start_again(again).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node(&d).active_groups(), 0);
    let mut again = engine(Role::Prefill, node_router(&router));
    (again.listen, again.pd.ksana.coordinator_addr) =
        (p.address(), Some(p.engine().desk().unwrap().side_channel()));
    p.stop().await;
    {
        let mut told = router.0.lock().unwrap();
        told.nodes.retain(|node| node["group_role"] == "decode");
        told.comm_ids.clear();
    }
    let p = start_again(again).await;
    until("a group", || node(&d).active_groups() == 1 && node(&p).active_groups() == 1).await;
    let (key, body) = (router.key(), body());
    let (_, whole) = tokio::join!(ask(&p, "/generate", &key, 7, &body), ask(&d, "/generate", &key, 7, &body));
    assert_eq!(frames(&whole)[11]["texts"][0], aggregated().await["text"]);
}

/// Starts an engine where another one has just stopped listening.
async fn start_again(args: EngineSimArgs) -> Simulator {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        match Simulator::start(args.clone()).await {
            Ok(engine) => return engine,
            Err(error) => assert!(Instant::now() < limit, "{error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Where the router listens, as its nodes know it.
fn node_router(router: &Router) -> SocketAddr {
    router.0.lock().unwrap().address.unwrap()
}

#[tokio::test]
async fn a_node_has_the_routes_of_its_engine_and_no_others() {
    let router = Router::default();
    let (p, _d) = pair(&router).await;
    assert_eq!(get(p.address(), "/health").await.body(), r#"{"status":"healthy"}"#);
    assert_eq!(get(p.address(), "/models").await.status(), 200);
    for path in ["/v1/models", "/metrics", "/version", "/server_info"] {
        assert_eq!(get(p.address(), path).await.status(), 404, "{path}");
    }
    let reply = post(p.address(), "/generate", json!({"prompt": 5})).await;
    assert_eq!(reply.status(), 400);
    assert!(reply.body().starts_with(r#"{"detail":""#), "{}", reply.body());
}

#[tokio::test]
async fn a_node_without_a_router_asks_for_one() {
    let mut args = quick();
    (args.pd.protocol, args.pd.role) = (Some(Protocol::Ksana), Some(Role::Prefill));
    let error = Simulator::start(args).await.err().map(|error| format!("{error:#}")).unwrap();
    assert!(error.contains("--router-addr"), "{error}");
}
