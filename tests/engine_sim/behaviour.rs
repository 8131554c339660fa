//! What the simulated engine promises: continuations, prefix hits, aborts, faults, many streams.

use std::time::Duration;

use crate::support::{call, get, post, quick, request_bytes, start};
use everline::engines::sim::kv::KvEvent;
use everline::engines::sim::run;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

async fn complete(address: std::net::SocketAddr, body: Value) -> Value {
    let reply = post(address, "/v1/completions", body).await;
    assert_eq!(reply.status(), 200, "{}", reply.body());
    reply.json()
}

#[tokio::test]
async fn a_chat_continued_by_ids_from_any_cut_says_the_same() {
    let sim = start(quick()).await;
    for seed in [Value::Null, json!(7)] {
        let body = json!({"messages": [{"role": "user", "content": "tell me a story é"}], "max_tokens": 60,
                          "return_token_ids": true, "seed": seed, "temperature": 0.8});
        let whole = post(sim.address(), "/v1/chat/completions", body).await.json();
        let prompt = ids(&whole["prompt_token_ids"]);
        let output = ids(&whole["choices"][0]["token_ids"]);
        assert_eq!(output.len(), 60);
        for cut in 0..output.len() {
            let longer = [&prompt[..], &output[..cut]].concat();
            let body = json!({"prompt": longer, "max_tokens": 60 - cut, "return_token_ids": true, "seed": seed,
                              "temperature": 0.8});
            let rest = complete(sim.address(), body).await;
            assert_eq!(ids(&rest["choices"][0]["token_ids"]), output[cut..], "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn stop_rules_hold_in_streams_and_without() {
    let sim = start(quick()).await;
    let base =
        complete(sim.address(), json!({"prompt": "x", "max_tokens": 40, "return_token_ids": true})).await;
    let text = base["choices"][0]["text"].as_str().unwrap().to_owned();
    let output = ids(&base["choices"][0]["token_ids"]);
    let middle: String = text.chars().skip(25).take(6).collect();
    let at = text.find(&middle).unwrap();
    for include in [false, true] {
        let body =
            json!({"prompt": "x", "max_tokens": 40, "stop": middle, "include_stop_str_in_output": include});
        let choice = complete(sim.address(), body.clone()).await["choices"][0].clone();
        let end = if include { at + middle.len() } else { at };
        assert_eq!(choice["text"], text[..end]);
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(middle)));
        let mut streaming = body;
        streaming["stream"] = json!(true);
        let events = post(sim.address(), "/v1/completions", streaming).await.events();
        let joined: String =
            events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(joined, text[..end]);
    }
    let first_at_ten = output.iter().position(|id| *id == output[10]).unwrap();
    let body =
        json!({"prompt": "x", "max_tokens": 40, "stop_token_ids": [output[10]], "return_token_ids": true});
    let choice = complete(sim.address(), body).await["choices"][0].clone();
    assert_eq!(ids(&choice["token_ids"]), output[..=first_at_ten]);
    assert_eq!(choice["stop_reason"], json!(output[10]));
    let body = json!({"prompt": "x", "max_tokens": 40, "stop_token_ids": [output[0]], "min_tokens": 40,
                      "return_token_ids": true});
    let choice = complete(sim.address(), body).await["choices"][0].clone();
    assert_eq!(ids(&choice["token_ids"]).len(), 40);
}

#[tokio::test]
async fn many_prompts_and_choices_are_numbered_prompt_by_prompt() {
    let sim = start(quick()).await;
    let body = json!({"prompt": ["one", "two"], "n": 2, "seed": 3, "max_tokens": 5, "return_token_ids": true,
                      "logprobs": 2, "echo": true});
    let reply = complete(sim.address(), body).await;
    let choices = reply["choices"].as_array().unwrap();
    let prompts: Vec<_> = choices.iter().map(|choice| choice["prompt_token_ids"].clone()).collect();
    assert_eq!(choices.len(), 4);
    assert!(prompts[0] == prompts[1] && prompts[1] != prompts[2] && prompts[2] == prompts[3]);
    assert_ne!(choices[0]["token_ids"], choices[1]["token_ids"]);
    assert!(choices[2]["text"].as_str().unwrap().starts_with("two"));
    assert_eq!(choices[0]["logprobs"]["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(reply["usage"]["completion_tokens"], 20);
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": true,
                      "top_logprobs": 2});
    let reply = post(sim.address(), "/v1/chat/completions", body).await.json();
    assert_eq!(reply["choices"][0]["logprobs"]["content"][2]["top_logprobs"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn prefix_hits_are_reported_and_kept_apart_by_salt_and_adapter() {
    let mut args = quick();
    args.loras = vec!["ad".into()];
    let sim = start(args).await;
    let mut events = sim.engine().subscribe_kv_events();
    let prompt: Vec<u32> = (300..400).collect();
    let mut cached = Vec::new();
    for extra in
        [json!({}), json!({}), json!({"cache_salt": "s"}), json!({"model": "ad"}), json!({"model": "ad"})]
    {
        let mut body = json!({"prompt": prompt, "max_tokens": 2});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let reply = complete(sim.address(), body).await;
        cached.push(reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
    }
    assert_eq!(cached, [0, 96, 0, 0, 96]);
    let batch = events.recv().await.unwrap();
    assert_eq!(batch.sequence, 0);
    let [KvEvent::Stored { token_ids, block_hashes, .. }] = &batch.events[..] else { panic!("{batch:?}") };
    assert_eq!((&token_ids[..], block_hashes.len()), (&prompt[..96], 6));
    let stats = get(sim.address(), "/sim/stats").await.json();
    assert_eq!(stats["cached_tokens"], 192);
    assert_eq!(stats["requests"][1]["cached_tokens"], 96);
    assert_eq!(post(sim.address(), "/reset_prefix_cache", json!({})).await.json(), json!({"success": true}));
}

#[tokio::test]
async fn too_few_blocks_make_sequences_wait_or_start_over_but_never_change_their_text() {
    let mut small = quick();
    small.blocks = 12;
    let (small, large) = (start(small).await, start(quick()).await);
    let body = json!({"prompt": ["a", "b", "c", "d"], "max_tokens": 100, "return_token_ids": true});
    let crowded = complete(small.address(), body.clone()).await;
    let roomy = complete(large.address(), body).await;
    assert_eq!(crowded["choices"], roomy["choices"]);
    assert!(get(small.address(), "/sim/stats").await.json()["preemptions"].as_u64().unwrap() > 0);
}

async fn wait_until_idle(address: std::net::SocketAddr, wanted: u64) -> Value {
    for _ in 0..100 {
        let stats = get(address, "/sim/stats").await.json();
        if stats["running"] == wanted && stats["waiting"] == 0 {
            return stats;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("still busy: {}", get(address, "/sim/stats").await.body());
}

#[tokio::test]
async fn a_client_that_leaves_or_half_closes_frees_its_slot() {
    let mut args = quick();
    args.instant = false;
    let sim = start(args).await;
    for (stream, half) in [(true, false), (true, true), (false, false), (false, true)] {
        let body = json!({"prompt": "x", "max_tokens": 2000, "stream": stream}).to_string();
        let mut socket = TcpStream::connect(sim.address()).await.unwrap();
        socket.write_all(request_bytes("POST", "/v1/completions", &[], &body).as_bytes()).await.unwrap();
        wait_until_idle(sim.address(), 1).await;
        if half {
            socket.shutdown().await.unwrap();
        } else {
            drop(socket);
        }
        wait_until_idle(sim.address(), 0).await;
    }
    let stats = wait_until_idle(sim.address(), 0).await;
    assert_eq!((&stats["disconnected"], &stats["kv_usage"]), (&json!(4), &json!(0.0)));
    assert_eq!(stats["requests"][0]["finish_reason"], "disconnect");
    assert_eq!(get(sim.address(), "/load").await.body(), r#"{"server_load":0}"#);
}

#[tokio::test]
async fn fault_switches_do_what_they_say() {
    let sim = start(quick()).await;
    let address = sim.address();
    let stream = json!({"prompt": "x", "max_tokens": 10, "stream": true});
    post(address, "/sim/faults", json!({"close_after_events": 4})).await;
    let reply = post(address, "/v1/completions", stream.clone()).await;
    assert_eq!((reply.chunks.len(), reply.complete), (4, false));
    post(address, "/sim/faults", json!({"close_after_events": null, "reset": true})).await;
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = request_bytes("POST", "/v1/completions", &[], &stream.to_string());
    socket.write_all(request.as_bytes()).await.unwrap();
    let error = socket.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    post(address, "/sim/faults", json!({"reset": false, "error_status": 503})).await;
    assert_eq!(post(address, "/v1/completions", stream.clone()).await.status(), 503);
    post(address, "/sim/faults", json!({"error_status": null, "garbage": true})).await;
    let reply = post(address, "/v1/completions", stream.clone()).await;
    assert!(serde_json::from_str::<Value>(reply.body().trim_start_matches("data: ")).is_err());
    let state = post(address, "/sim/faults", json!({"garbage": false, "health": "fail", "hang": true})).await;
    assert_eq!((&state.json()["health"], &state.json()["hang"]), (&json!("fail"), &json!(true)));
    assert_eq!(get(address, "/health").await.status(), 503);
    let hanging = tokio::spawn(async move { post(address, "/v1/completions", stream).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!hanging.is_finished());
    post(address, "/sim/faults", json!({"hang": false, "health": "ok"})).await;
    assert_eq!(hanging.await.unwrap().events().len(), 10);
    assert_eq!(post(address, "/sim/faults", json!({"hangs": true})).await.status(), 400);
    assert_eq!(get(address, "/sim/faults").await.json()["hang"], false);
}

#[tokio::test]
async fn a_slow_reader_gets_several_tokens_in_one_event() {
    let mut args = quick();
    args.no_coalesce = false;
    let sim = start(args).await;
    let body = json!({"prompt": "x", "max_tokens": 1500, "stream": true, "return_token_ids": true});
    let events = post(sim.address(), "/v1/completions", body).await.events();
    let counts: Vec<usize> =
        events.iter().map(|event| event["choices"][0]["token_ids"].as_array().unwrap().len()).collect();
    assert_eq!(counts.iter().sum::<usize>(), 1500);
}

#[tokio::test]
async fn small_routes_answer() {
    let mut args = quick();
    args.loras = vec!["ad".into()];
    let sim = start(args).await;
    let address = sim.address();
    assert_eq!(get(address, "/version").await.body(), r#"{"version":"0.32.0"}"#);
    assert_eq!(get(address, "/ping").await.status(), 200);
    let models = get(address, "/v1/models").await.json();
    assert_eq!(
        (&models["data"][0]["max_model_len"], &models["data"][1]["parent"]),
        (&json!(2048), &json!("tiny"))
    );
    let text = "Grüße 日本 <|im_start|> 12345 the end";
    let body = json!({"prompt": text, "add_special_tokens": false});
    let tokens = post(address, "/tokenize", body).await.json()["tokens"].clone();
    assert_eq!(post(address, "/detokenize", json!({"tokens": tokens})).await.json()["prompt"], text);
    let floats = post(address, "/v1/embeddings", json!({"input": ["a", "b"]})).await.json();
    assert_eq!(floats["data"][1]["embedding"].as_array().unwrap().len(), 64);
    let body = json!({"input": "a", "encoding_format": "base64"});
    assert_eq!(
        post(address, "/v1/embeddings", body).await.json()["data"][0]["embedding"].as_str().unwrap().len(),
        344
    );
    let body =
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 1});
    let id = [("X-Request-Id", "abc")];
    let reply = call(address, "POST", "/v1/chat/completions", &id, &body.to_string()).await;
    assert_eq!(reply.json()["id"], "chatcmpl-abc");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_streams_at_once_finish() {
    let mut args = quick();
    args.instant = false;
    args.no_coalesce = false;
    args.max_running = 2048;
    args.blocks = 20_000;
    let sim = start(args).await;
    let address = sim.address();
    let streams: Vec<_> = (0..2000)
        .map(|number| {
            tokio::spawn(async move {
                let body = json!({"prompt": format!("stream {number}"), "max_tokens": 30, "stream": true,
                                  "return_token_ids": true});
                let reply = post(address, "/v1/completions", body).await;
                assert!(reply.complete);
                reply
                    .events()
                    .iter()
                    .map(|event| event["choices"][0]["token_ids"].as_array().unwrap().len())
                    .sum()
            })
        })
        .collect();
    for stream in streams {
        let tokens: usize = stream.await.unwrap();
        assert_eq!(tokens, 30);
    }
}

#[tokio::test]
async fn run_reports_its_address_ends_on_shutdown_and_says_why_it_cannot_listen() {
    let (ready, address) = tokio::sync::oneshot::channel();
    let (shutdown, ended) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(run(
        quick(),
        async {
            let _ = ended.await;
        },
        |address| ready.send(address).unwrap(),
    ));
    let address = address.await.unwrap();
    assert_eq!(get(address, "/health").await.status(), 200);
    let mut taken = quick();
    taken.listen = address;
    let error = run(taken, async {}, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("cannot listen on"), "{error:#}");
    shutdown.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}
