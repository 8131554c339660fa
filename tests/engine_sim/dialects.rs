//! Routes beside chat and completions: Responses as recorded, Anthropic's Messages, scores.

use everline::engines::sim::events::EventFormat;

use crate::support::{Shape, call, golden, golden_request, post, quick, start};
use serde_json::{Value, json};

/// A named event: its name and its data.
fn named(chunk: &str) -> (String, String) {
    let lines: Vec<&str> = chunk.trim_end().lines().collect();
    let [event, data] = lines[..] else { panic!("not a named event: {chunk:?}") };
    (event.strip_prefix("event: ").unwrap().to_owned(), data.strip_prefix("data: ").unwrap().to_owned())
}

/// What must be equal of an answer whose output is of another type than the recorded one.
fn without_output(json: &str) -> Shape {
    match Shape::of(json) {
        Shape::Map(fields) => {
            let keep = |(key, value): (String, Shape)| match (key.as_str(), value) {
                ("output", _) => (key, Shape::Null),
                ("response", Shape::Map(inner)) => {
                    let inner = inner.into_iter().map(|(key, value)| {
                        let value = if key == "output" { Shape::Null } else { value };
                        (key, value)
                    });
                    (key, Shape::Map(inner.collect()))
                }
                (_, value) => (key, value),
            };
            Shape::Map(fields.into_iter().map(keep).collect())
        }
        other => other,
    }
}

#[tokio::test]
async fn a_response_has_the_recorded_envelope() {
    let sim = start(quick()).await;
    let request = golden_request("responses_full");
    let reply = post(sim.address(), "/v1/responses", request["body"].clone()).await;
    assert_eq!(reply.status(), 200);
    let recorded = String::from_utf8(golden("vllm_responses_full.body.json")).unwrap();
    assert_eq!(without_output(&reply.body()), without_output(&recorded));
    let response = reply.json();
    assert_eq!((&response["status"], &response["usage"]["output_tokens"]), (&json!("incomplete"), &json!(4)));
    let text = response["output"][0]["content"][0]["text"].as_str().unwrap();

    // The same conversation, asked as a chat, is answered with the same text.
    let chat = json!({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "def main(): return 1"}]});
    let chat = post(sim.address(), "/v1/chat/completions", chat).await.json();
    assert_eq!(chat["choices"][0]["message"]["content"], text);
    assert_eq!(chat["usage"]["prompt_tokens"], response["usage"]["input_tokens"]);
    let listed = json!({"model": "tiny", "max_output_tokens": 4, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "def main(): return 1"}]}]});
    let listed = post(sim.address(), "/v1/responses", listed).await.json();
    assert_eq!(listed["output"][0]["content"][0]["text"], text);
}

#[tokio::test]
async fn sglangs_own_route_says_what_completions_say_whole_in_full_events_and_in_new_ones() {
    let prompt: Vec<u32> = (100..140).collect();
    let vllm = start(quick()).await;
    assert_eq!(post(vllm.address(), "/generate", json!({"input_ids": prompt})).await.status(), 404);
    for incremental in [false, true] {
        let mut args = quick();
        args.kv_events_format = EventFormat::Sglang;
        args.incremental_streaming_output = incremental;
        args.no_coalesce = true;
        let sim = start(args).await;
        let completion =
            json!({"prompt": prompt, "max_tokens": 9, "return_token_ids": true, "temperature": 0});
        let choice = post(sim.address(), "/v1/completions", completion).await.json()["choices"][0].clone();
        let mut body = json!({"input_ids": prompt, "rid": "r1",
            "sampling_params": {"max_new_tokens": 9, "temperature": 0}});
        let whole = post(sim.address(), "/generate", body.clone()).await.json();
        assert_eq!((&whole["text"], &whole["output_ids"]), (&choice["text"], &choice["token_ids"]));
        let info = json!({"id": "r1", "finish_reason": {"type": "length", "length": 9}, "prompt_tokens": 40,
            "weight_version": "default", "completion_tokens": 9, "cached_tokens": 32});
        assert_eq!(whole["meta_info"], info);

        body["stream"] = true.into();
        let reply = post(sim.address(), "/generate", body.clone()).await.body();
        let mut events: Vec<&str> = reply.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        let events: Vec<Value> = events.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
        assert_eq!(events.len(), 9);
        assert_eq!(events[8]["meta_info"], info);
        let ids = |event: &Value| event["output_ids"].as_array().unwrap().clone();
        let all = ids(&whole);
        for (at, event) in events.iter().enumerate() {
            assert_eq!(ids(event), all[if incremental { at } else { 0 }..=at]);
            assert_eq!(event["meta_info"]["completion_tokens"], at + 1);
        }
        let texts: Vec<&str> = events.iter().map(|event| event["text"].as_str().unwrap()).collect();
        let text = if incremental { texts.concat() } else { texts[8].to_owned() };
        assert_eq!(text, choice["text"]);

        for wrong in [
            json!({}),
            json!({"text": "x", "input_ids": [5]}),
            json!({"text": 5}),
            json!({"text": "x", "sampling_params": [1]}),
            json!({"text": "x", "sampling_params": {"n": 0}}),
        ] {
            assert_eq!(post(sim.address(), "/generate", wrong.clone()).await.status(), 400, "{wrong}");
        }
    }
}

#[tokio::test]
async fn the_events_of_a_response_come_in_the_recorded_order_and_numbered() {
    let sim = start(quick()).await;
    let request = golden_request("responses_stream");
    let reply = post(sim.address(), "/v1/responses", request["body"].clone()).await;
    assert!(reply.complete && reply.head.contains("text/event-stream; charset=utf-8"));
    let recorded = String::from_utf8(golden("vllm_responses_stream.sse")).unwrap();
    let recorded: Vec<_> =
        recorded.split_inclusive("\n\n").filter(|e| !e.trim().is_empty()).map(named).collect();
    let ours: Vec<_> = reply.chunks.iter().map(|chunk| named(chunk)).collect();
    let order = |events: &[(String, String)]| {
        let mut names: Vec<String> =
            events.iter().map(|(name, _)| name.replace("reasoning_text", "output_text")).collect();
        names.dedup();
        names
    };
    assert_eq!(order(&ours), order(&recorded));
    for name in ["response.created", "response.in_progress", "response.completed"] {
        let of = |events: &[(String, String)]| {
            without_output(&events.iter().find(|(is, _)| is == name).expect(name).1)
        };
        assert_eq!(of(&ours), of(&recorded), "{name}");
    }
    let mut text = String::new();
    for (number, (name, data)) in ours.iter().enumerate() {
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["sequence_number"], &data["type"]), (&json!(number), &json!(name)));
        text.push_str(data["delta"].as_str().unwrap_or_default());
    }
    let last: Value = serde_json::from_str(&ours.last().unwrap().1).unwrap();
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], text);
    assert!(!text.is_empty());
}

#[tokio::test]
async fn messages_are_answered_in_anthropics_words() {
    let sim = start(quick()).await;
    let ask = |more: Value| {
        let mut body = json!({"model": "tiny", "max_tokens": 5, "system": "be brief",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        post(sim.address(), "/v1/messages", body)
    };
    let whole = ask(json!({})).await.json();
    assert_eq!((&whole["type"], &whole["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(whole["stop_reason"], "max_tokens");
    assert_eq!(whole["usage"]["output_tokens"], 5);
    let text = whole["content"][0]["text"].as_str().unwrap();

    let streamed = ask(json!({"stream": true})).await;
    let events: Vec<_> = streamed.chunks.iter().map(|chunk| named(chunk)).collect();
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(names, expected);
    let data: Vec<Value> = events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    assert_eq!(data.iter().filter_map(|d| d["delta"]["text"].as_str()).collect::<String>(), text);
    assert_eq!(data[data.len() - 2]["delta"]["stop_reason"], "max_tokens");

    // A stop sequence, and an error in its own shape.
    let stop: String = text.chars().skip(2).take(3).collect();
    let stopped = ask(json!({"stop_sequences": [stop]})).await.json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    let wrong = ask(json!({"model": "nobody"})).await;
    assert_eq!((wrong.status(), &wrong.json()["type"]), (404, &json!("error")));
    assert_eq!(wrong.json()["error"]["type"], "NotFoundError");
    let missing = call(sim.address(), "POST", "/v1/messages", &[], r#"{"model":"tiny","messages":[]}"#).await;
    assert_eq!((missing.status(), &missing.json()["type"]), (400, &json!("error")));
}

#[tokio::test]
async fn scores_and_rankings_have_vllms_shapes() {
    let sim = start(quick()).await;
    let documents = json!(["bread and butter", "the sea is salt", "a story"]);
    let ask = json!({"model": "tiny", "query": "why is the sea salt", "documents": documents, "top_n": 2});
    let ranked = post(sim.address(), "/v1/rerank", ask.clone()).await.json();
    assert_eq!(ranked["results"].as_array().unwrap().len(), 2);
    let best = &ranked["results"][0];
    assert_eq!((&best["index"], &best["document"]["text"]), (&json!(1), &json!("the sea is salt")));
    assert!(best["relevance_score"].as_f64() > ranked["results"][1]["relevance_score"].as_f64());
    assert_eq!(ranked["usage"]["prompt_tokens"], ranked["usage"]["total_tokens"]);

    let scores = json!({"model": "tiny", "text_1": "why is the sea salt", "text_2": documents});
    let scores = post(sim.address(), "/v1/score", scores).await.json();
    assert_eq!((&scores["object"], &scores["data"][1]["object"]), (&json!("list"), &json!("score")));
    assert_eq!(scores["data"][1]["score"], best["relevance_score"]);
    assert_eq!(scores["data"].as_array().unwrap().len(), 3);

    for (path, wrong) in [
        ("/v1/rerank", json!({"model": "tiny", "documents": ["a"]})),
        ("/v1/rerank", json!({"model": "tiny", "query": "a", "documents": []})),
        ("/v1/rerank", json!({"model": "tiny", "query": "a", "documents": ["a"], "top_n": "all"})),
        ("/v1/score", json!({"model": "tiny", "text_1": ["a", "b"], "text_2": ["a", "b", "c"]})),
        ("/v1/score", json!({"model": "tiny", "text_1": 1, "text_2": "a"})),
    ] {
        let reply = post(sim.address(), path, wrong.clone()).await;
        assert_eq!(reply.status(), 400, "{wrong}");
        assert!(reply.json()["error"]["message"].is_string());
    }
}
