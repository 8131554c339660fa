//! SGLang's prefill and decode: two simulated engines that are asked at once, and meet in a room.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use everline::engines::sim::pd::{Protocol, Role};
use everline::engines::sim::{EngineSimArgs, Simulator};
use serde_json::{Value, json};

use crate::support::{Reply, Shape, get, post, quick, start};

fn engine(role: Role) -> EngineSimArgs {
    let mut args = quick();
    (args.pd.protocol, args.pd.role) = (Some(Protocol::Sglang), Some(role));
    args.pd.disaggregation_bootstrap_port = 0;
    args
}

/// A prefill engine, a decode engine, and the port of the first one's bootstrap server.
async fn pair() -> (Simulator, Simulator, u16) {
    let (p, d) = (start(engine(Role::Prefill)).await, start(engine(Role::Decode)).await);
    let port = p.ranks().bootstrap_port().unwrap();
    (p, d, port)
}

fn prompt() -> Vec<u32> {
    (0..300).map(|at| 300 + at * 7).collect()
}

fn in_room(mut body: Value, port: u16, room: u64) -> Value {
    (body["bootstrap_host"], body["bootstrap_port"], body["bootstrap_room"]) =
        ("127.0.0.1".into(), port.into(), room.into());
    body
}

fn native() -> Value {
    json!({"input_ids": prompt(), "sampling_params": {"max_new_tokens": 40, "temperature": 0}})
}

/// Both legs at once.
async fn both(p: SocketAddr, d: SocketAddr, path: &str, body: &Value) -> (Reply, Reply) {
    tokio::join!(post(p, path, body.clone()), post(d, path, body.clone()))
}

/// What one engine says to a body of SGLang's own route.
async fn aggregated(body: Value) -> Value {
    let mut args = quick();
    args.kv_events_format = everline::engines::sim::events::EventFormat::Sglang;
    let sim = start(args).await;
    post(sim.address(), "/generate", body).await.json()
}

async fn failed_transfers(engine: &Simulator) -> u64 {
    engine.engine().stats.transfers_failed.get()
}

#[tokio::test]
async fn two_legs_with_one_room_say_what_one_engine_says() {
    let (p, d, port) = pair().await;
    let alone = aggregated(native()).await;
    for room in [1, 2, 1] {
        let (first, whole) =
            both(p.address(), d.address(), "/generate", &in_room(native(), port, room)).await;
        assert_eq!((first.status(), whole.status()), (200, 200), "{} {}", first.body(), whole.body());
        let (first, whole) = (first.json(), whole.json());
        assert_eq!((&whole["text"], &whole["output_ids"]), (&alone["text"], &alone["output_ids"]));
        assert_eq!(first["meta_info"]["finish_reason"], json!({"type": "length", "length": 0}));
        assert_eq!(first["output_ids"].as_array().unwrap()[..], alone["output_ids"].as_array().unwrap()[..1]);
    }
    // The prefill engine has prefixes, of which the decode engine tells; it has none itself.
    let (_, whole) = both(p.address(), d.address(), "/generate", &in_room(native(), port, 9)).await;
    assert_eq!(whole.json()["meta_info"]["cached_tokens"], 288);
    assert_eq!(d.engine().indexed_blocks().await.len(), 0);
    assert_eq!(p.engine().indexed_blocks().await.len(), 300 / 16);
    for engine in [&p, &d] {
        assert_eq!((engine.engine().stats.kv_usage_ppm.get(), failed_transfers(engine).await), (0, 0));
    }
}

#[tokio::test]
async fn either_leg_may_come_first_and_streams_and_chats_are_split_too() {
    let (p, d, port) = pair().await;
    let question =
        json!({"messages": [{"role": "user", "content": "what about it ".repeat(30)}], "max_tokens": 20});
    let alone = start(quick()).await;
    let whole = post(alone.address(), "/v1/chat/completions", question.clone()).await.json();
    for (room, first_is_decode) in [(5, true), (6, false)] {
        let mut body = in_room(question.clone(), port, room);
        body["stream"] = true.into();
        let (early, late) = if first_is_decode { (&d, &p) } else { (&p, &d) };
        let (address, asked) = (early.address(), body.clone());
        let first = tokio::spawn(async move { post(address, "/v1/chat/completions", asked).await });
        // Whoever is alone waits.
        while early.engine().stats.deferred.get() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!first.is_finished());
        let second = post(late.address(), "/v1/chat/completions", body).await;
        let first = first.await.unwrap();
        let decoded = if first_is_decode { first } else { second };
        let said: String = decoded
            .events()
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(whole["choices"][0]["message"]["content"], said.as_str());
    }
}

#[tokio::test]
async fn a_batch_has_a_room_for_each_prompt() {
    let (p, d, port) = pair().await;
    let prompts = [prompt()[..100].to_vec(), prompt()[50..200].to_vec()];
    let mut body = json!({"input_ids": prompts, "sampling_params": {"max_new_tokens": 9, "temperature": 0}});
    let alone = aggregated(body.clone()).await;
    (body["bootstrap_host"], body["bootstrap_port"], body["bootstrap_room"]) =
        (json!(["127.0.0.1", "127.0.0.1"]), json!([port, port]), json!([70, 3]));
    let (first, whole) = both(p.address(), d.address(), "/generate", &body).await;
    assert_eq!(first.json().as_array().unwrap().len(), 2);
    for at in 0..2 {
        assert_eq!(whole.json()[at]["text"], alone[at]["text"], "{}", whole.body());
    }
    body["stream"] = true.into();
    let (_, stream) = both(p.address(), d.address(), "/generate", &body).await;
    let last = |index: usize| stream.events().into_iter().rfind(|event| event["index"] == index).unwrap();
    assert_eq!((&last(0)["text"], &last(1)["text"]), (&alone[0]["text"], &alone[1]["text"]));
    // A list that does not fit is refused.
    body["bootstrap_room"] = json!([1]);
    assert_eq!(post(d.address(), "/generate", body).await.status(), 400);
}

#[tokio::test]
async fn log_probabilities_of_the_prompt_are_with_the_prefill_leg() {
    let (p, d, port) = pair().await;
    let mut body = in_room(native(), port, 4);
    (body["return_logprob"], body["logprob_start_len"]) = (true.into(), 0.into());
    let (first, whole) = both(p.address(), d.address(), "/generate", &body).await;
    let input = first.json()["meta_info"]["input_token_logprobs"].clone();
    assert_eq!(input.as_array().unwrap().len(), 300);
    assert_eq!(input[0], json!([null, 300, null]));
    assert!(input[1][0].as_f64().unwrap() <= 0.0);
    let output = whole.json()["meta_info"]["output_token_logprobs"].clone();
    assert_eq!(output.as_array().unwrap().len(), 40);
    assert_eq!(output, aggregated(body).await["meta_info"]["output_token_logprobs"]);
}

#[tokio::test]
async fn a_request_without_a_room_is_refused_and_a_request_id_cannot_be_there_twice() {
    let (p, d, port) = pair().await;
    let why = "Invalid request: Disaggregated request received without bootstrap room id. req.rid='r'";
    let mut body = native();
    body["rid"] = "r".into();
    for engine in [&p, &d] {
        let reply = post(engine.address(), "/generate", body.clone()).await;
        assert_eq!((reply.status(), reply.json()), (400, json!({"error": {"message": why}})));
        let chat = json!({"messages": [{"role": "user", "content": "x"}], "rid": "r"});
        let reply = post(engine.address(), "/v1/chat/completions", chat).await;
        let said = r#"{"object":"error","message":"x","type":"BadRequestError","param":null,"code":400}"#;
        assert_eq!((reply.status(), Shape::of(&reply.body())), (400, Shape::of(said)));
    }
    let (address, waits) = (d.address(), in_room(body.clone(), port, 1));
    let waiting = tokio::spawn(async move { post(address, "/generate", waits).await });
    while d.engine().stats.deferred.get() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let twice = post(d.address(), "/generate", in_room(body.clone(), port, 2)).await;
    assert_eq!(twice.status(), 400);
    assert!(twice.body().contains("Duplicate request ID detected: r"), "{}", twice.body());
    assert_eq!(post(p.address(), "/generate", in_room(body, port, 1)).await.status(), 200);
    assert_eq!(waiting.await.unwrap().status(), 200);
}

#[tokio::test]
async fn legs_that_are_alone_or_in_different_rooms_end_with_an_error_after_a_while() {
    let (mut prefills, mut decodes) = (engine(Role::Prefill), engine(Role::Decode));
    (prefills.pd.bootstrap_timeout, decodes.pd.waiting_timeout) = (0.4, 0.5);
    let (p, d) = (start(prefills).await, start(decodes).await);
    let port = p.ranks().bootstrap_port().unwrap();
    let (first, second) = tokio::join!(
        post(p.address(), "/generate", {
            let mut body = in_room(native(), port, 1);
            body["rid"] = "mine".into();
            body
        }),
        post(d.address(), "/v1/completions", {
            let mut body = in_room(json!({"prompt": prompt(), "max_tokens": 9}), port, 2);
            body["stream"] = true.into();
            body
        })
    );
    assert_eq!(first.status(), 500);
    let said = first.json();
    assert_eq!(
        (&said["object"], &said["type"], &said["code"]),
        (&json!("error"), &json!("500"), &json!(500))
    );
    let message = said["message"].as_str().unwrap();
    assert!(message.starts_with("Prefill bootstrap failed for request rank=0 req.rid='mine'"), "{message}");
    let end = " req.bootstrap_room=1 with exception KVTransferError(bootstrap_room=1): Request 1 timed out after 0.4s \
        in KVPoll.Bootstrapping";
    assert!(message.ends_with(end), "{message}");
    // A stream begins, and then says it.
    assert_eq!((second.status(), second.chunks.len()), (200, 2));
    let event = &second.events()[0]["error"];
    assert_eq!((&event["type"], &event["code"]), (&json!("INTERNAL_SERVER_ERROR"), &json!(500)));
    let message = event["message"].as_str().unwrap();
    assert!(message.ends_with("Request 2 timed out after 0.5s in KVPoll.WaitingForInput"), "{message}");
    assert_eq!(second.chunks[1], "data: [DONE]\n\n");
    // On SGLang's own route it is the finish reason of an ordinary event.
    let mut body = in_room(native(), port, 3);
    body["stream"] = true.into();
    let reason = post(d.address(), "/generate", body).await.events()[0]["meta_info"]["finish_reason"].clone();
    assert_eq!((&reason["type"], &reason["status_code"]), (&json!("abort"), &json!(500)));
    for engine in [&p, &d] {
        assert_eq!((engine.engine().stats.kv_usage_ppm.get(), engine.engine().stats.deferred.get()), (0, 0));
    }
}

#[tokio::test]
async fn a_room_used_twice_at_once_gives_its_kv_to_one_of_them() {
    let (prefills, mut decodes) = (engine(Role::Prefill), engine(Role::Decode));
    decodes.pd.waiting_timeout = 1.0;
    let (p, d) = (start(prefills).await, start(decodes).await);
    let body = in_room(native(), p.ranks().bootstrap_port().unwrap(), 7);
    let (first, second, third, fourth) = tokio::join!(
        post(d.address(), "/generate", body.clone()),
        post(d.address(), "/generate", body.clone()),
        post(p.address(), "/generate", body.clone()),
        post(p.address(), "/generate", body.clone())
    );
    for (one, other) in [(first, second), (third, fourth)] {
        let mut statuses = [one.status(), other.status()];
        statuses.sort_unstable();
        assert!(statuses == [200, 500] || statuses == [200, 200], "{} {}", one.body(), other.body());
    }
}

#[tokio::test]
async fn a_client_that_leaves_one_leg_ends_the_other() {
    let (_p, d, port) = pair().await;
    // The decode leg's client leaves while the prefill leg has not begun: the latter is alone again.
    let body = in_room(native(), port, 1);
    let alone =
        tokio::time::timeout(Duration::from_millis(300), post(d.address(), "/generate", body.clone()));
    assert!(alone.await.is_err());
    while d.engine().stats.deferred.get() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(d.engine().stats.kv_usage_ppm.get(), 0);
    // The prefill leg's client leaves while the decode leg waits.
    let mut slow = engine(Role::Prefill);
    (slow.instant, slow.prefill_tokens_per_second, slow.max_batched_tokens) = (false, 100.0, 20);
    let slow = start(slow).await;
    let body = in_room(native(), slow.ranks().bootstrap_port().unwrap(), 2);
    let before = Instant::now();
    let (_, left) = tokio::join!(
        tokio::time::timeout(Duration::from_millis(500), post(slow.address(), "/generate", body.clone())),
        post(d.address(), "/generate", body.clone())
    );
    assert_eq!(left.status(), 500, "{}", left.body());
    assert!(
        left.body().contains("Failed to get kvcache from prefill instance, it might be dead"),
        "{}",
        left.body()
    );
    assert!(before.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_prompt_that_is_not_the_same_on_both_sides_gives_another_text_and_no_error() {
    let (p, d, port) = pair().await;
    let (right, mut other) = (in_room(native(), port, 1), in_room(native(), port, 1));
    other["input_ids"][150] = 4.into();
    let (_, wrong) =
        tokio::join!(post(p.address(), "/generate", other), post(d.address(), "/generate", right));
    assert_eq!(wrong.status(), 200);
    assert_ne!(wrong.json()["text"], aggregated(native()).await["text"]);
}

#[tokio::test]
async fn the_bootstrap_server_says_what_there_is_and_the_room_which_rank() {
    let mut args = engine(Role::Prefill);
    args.dp = 2;
    let (p, d) = (start(args).await, start(engine(Role::Decode)).await);
    let port = p.ranks().bootstrap_port().unwrap();
    let bootstrap = SocketAddr::from(([127, 0, 0, 1], port));
    let ask = |dp: i32, others: i32| {
        format!(
            "/route?prefill_dp_rank={dp}&prefill_cp_rank={others}&target_tp_rank={others}&target_pp_rank={others}"
        )
    };
    let info = get(bootstrap, &ask(-1, -1)).await.json();
    assert_eq!((&info["dp_size"], &info["page_size"]), (&json!(2), &json!(16)));
    assert_eq!(info["prefill_http_port"], p.address().port());
    let ports: Vec<Value> = [get(bootstrap, &ask(0, 0)).await, get(bootstrap, &ask(1, 0)).await]
        .iter()
        .map(|reply| reply.json()["rank_port"].clone())
        .collect();
    assert_ne!(ports[0], ports[1]);
    assert_eq!(get(bootstrap, &ask(2, 0)).await.status(), 404);
    assert_eq!(get(bootstrap, "/route").await.status(), 400);
    assert_eq!(get(bootstrap, "/health").await.body(), "OK");
    let ranks = post(bootstrap, "/query_dp_ranks", json!({"bootstrap_rooms": [4, 5]})).await.json();
    assert_eq!(ranks, json!({"4": 0, "5": 1}));
    for room in [10, 11] {
        let (_, whole) = both(p.address(), d.address(), "/generate", &in_room(native(), port, room)).await;
        assert_eq!(whole.json()["text"], aggregated(native()).await["text"], "{}", whole.body());
    }
    let served: Vec<u64> = p.ranks().iter().map(|rank| rank.stats.requests.get()).collect();
    assert_eq!(served, [1, 1]);
    for (engine, mode) in [(&p, "prefill"), (&d, "decode")] {
        assert_eq!(get(engine.address(), "/server_info").await.json()["disaggregation_mode"], mode);
    }
    assert_eq!(get(p.address(), "/server_info").await.json()["disaggregation_bootstrap_port"], port);
}

#[tokio::test]
async fn an_engine_with_a_protocol_that_needs_a_role_asks_for_it() {
    let mut args = engine(Role::Decode);
    args.pd.role = None;
    let error = Simulator::start(args).await.err().map(|error| format!("{error:#}")).unwrap();
    assert!(error.contains("--role prefill"), "{error}");
}
