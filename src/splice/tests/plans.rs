//! Which requests are continued, and what is sent for them.

use serde_json::{Value, json};

use super::*;
use crate::state::worker::EngineKind;

fn with(more: Value) -> String {
    let mut body = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

#[test]
fn what_cannot_be_continued_exactly_is_replayed_only() {
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    for no in [
        json!({"response_format": {"type": "json_object"}}),
        json!({"structured_outputs": {"regex": "a"}}),
        json!({"guided_choice": ["a"]}),
        json!({"tools": [{}], "tool_choice": "required"}),
        json!({"tools": [{}], "tool_choice": {"type": "function"}}),
        json!({"messages": image}),
        json!({"best_of": 2}),
        json!({"use_beam_search": true}),
        json!({"prompt_logprobs": 1}),
        json!({"logits_processors": ["x"]}),
        json!({"n": 1000}),
        json!({"stream": false}),
    ] {
        let plan = plan(StreamRoute::Chat, &with(no.clone()));
        assert!(matches!(plan.resumable(), Resumable::Replay(_)), "{no}");
        assert_eq!(plan.first_body(EngineKind::Vllm), with(no));
    }
    for yes in [
        json!({}),
        json!({"response_format": {"type": "text"}}),
        json!({"tools": [{}]}),
        json!({"tools": [{}], "tool_choice": "none"}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
        json!({"best_of": 1, "n": 3, "suffix": null, "prompt_logprobs": null}),
        json!({"seed": 5, "temperature": 0}),
    ] {
        let plan = plan(StreamRoute::Chat, &with(yes.clone()));
        assert_eq!(plan.resumable(), Resumable::Continue { inexact: None }, "{yes}");
    }
}

#[test]
fn seeds_and_penalties_are_the_operators_choice() {
    for (more, key) in [(json!({"seed": 5}), "seed"), (json!({"presence_penalty": 0.5}), "penalties")] {
        let body = Bytes::from(with(more));
        let lenient = Plan::new(StreamRoute::Chat, &body, &Options::default()).unwrap();
        let Resumable::Continue { inexact: Some(why) } = lenient.resumable() else { panic!("{key}") };
        assert!(why.contains(key));
        let options = Options { strict_seed: true, penalties: Penalties::Fail, ..Options::default() };
        let strict = Plan::new(StreamRoute::Chat, &body, &options).unwrap();
        assert_eq!(strict.resumable(), Resumable::Replay(why));
    }
}

#[test]
fn the_clients_body_is_kept_byte_by_byte_but_for_what_is_added() {
    let cases = [
        (
            r#"{"model":"m", "stream":true,"stop":["x"] }"#,
            EngineKind::Vllm,
            r#"{"return_token_ids":true,"include_stop_str_in_output":true,"stream_options":{"include_usage":true},"model":"m", "stream":true,"stop":["x"] }"#,
        ),
        (
            r#"{"stream":true,"stream_options":{"continuous_usage_stats":true, "include_usage":false},"return_token_ids":null}"#,
            EngineKind::Vllm,
            r#"{"stream":true,"stream_options":{"continuous_usage_stats":true, "include_usage":true},"return_token_ids":true}"#,
        ),
        (
            r#"{"stream":true,"stop":"x"}"#,
            EngineKind::Sglang,
            r#"{"return_token_ids":true,"no_stop_trim":true,"stream_options":{"include_usage":true},"stream":true,"stop":"x"}"#,
        ),
        (r#"{"stream":true}"#, EngineKind::OpenaiCompatible, r#"{"stream":true}"#),
    ];
    for (body, engine, wanted) in cases {
        assert_eq!(plan(StreamRoute::Completions, body).first_body(engine), wanted);
    }
    assert!(Plan::new(StreamRoute::Chat, &Bytes::from_static(b"[]"), &Options::default()).is_err());
    assert!(Plan::new(StreamRoute::Chat, &Bytes::from_static(b"{"), &Options::default()).is_err());
}

/// A chat of which three tokens were delivered, one by one.
fn begun(body: &str, options: Options) -> (Splice, Vec<Out>) {
    begun_with(body, options, &[("a", "7"), ("b", "8"), ("c", "9")])
}

/// A chat of which these events were delivered, each a text with its ids.
fn begun_with(body: &str, options: Options, events: &[(&str, &str)]) -> (Splice, Vec<Out>) {
    let plan = Plan::new(StreamRoute::Chat, &Bytes::copy_from_slice(body.as_bytes()), &options).unwrap();
    let mut splice = Splice::new(Arc::new(plan));
    let mut outs = Vec::new();
    let role = r#"{"id":"i","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[1,2]}"#;
    let texts = events.iter().map(|(text, ids)| {
        format!(
            r#"{{"id":"i","created":1,"model":"m","choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":null,"token_ids":[{ids}]}}]}}"#
        )
    });
    for data in std::iter::once(role.to_owned()).chain(texts) {
        let event = Event::unnamed(Bytes::from(data));
        assert_eq!(splice.push(LegId::FIRST, &event, &mut outs), Progress::Going);
    }
    assert!(matches!(splice.leg_ended(LegId::FIRST, &mut outs), Progress::Failed(_)));
    (splice, outs)
}

#[test]
fn content_whose_last_token_may_have_begun_a_tool_call_is_lost() {
    let next = |body: &str, events: &[(&str, &str)]| {
        let (mut splice, mut outs) = begun_with(body, Options::default(), events);
        splice.recover(&mut outs)
    };
    let tools = with(json!({"tools": [{}]}));
    let lost = Next::Lost(Lost::NotAnyMore("whether a tool call has begun cannot be told"));
    assert_eq!(next(&tools, &[("abc", "7,8,9")]), lost);
    assert!(matches!(next(&tools, &[("abc", "7,8,9"), ("d", "10")]), Next::Continue(_)));
    assert!(matches!(next(&with(json!({})), &[("abc", "7,8,9")]), Next::Continue(_)));
}

#[test]
fn an_event_without_text_whose_token_is_written_down_is_continued_and_not_begun_again() {
    let body = r#"{"stream":true,"max_tokens":2,"stop":"ab"}"#;
    let plan = plan(StreamRoute::Completions, body);
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    let data = r#"{"id":"i","created":1,"model":"m","choices":[{"index":0,"text":"a","finish_reason":null,"prompt_token_ids":[1],"token_ids":[7]}]}"#;
    let event = Event::unnamed(Bytes::from_static(data.as_bytes()));
    assert_eq!(splice.push(LegId::FIRST, &event, &mut outs), Progress::Going);
    assert!(matches!(splice.leg_ended(LegId::FIRST, &mut outs), Progress::Failed(_)));
    let there = restored(&plan, &outs).recover(&mut Vec::new());
    assert_eq!(splice.recover(&mut outs), there);
    assert!(matches!(there, Next::Continue(_)));
}

#[test]
fn a_continuation_asks_for_the_rest_with_the_clients_sampling_and_nothing_of_its_chat() {
    let body =
        with(json!({"seed": 5, "top_k": 4, "max_completion_tokens": 10, "max_tokens": 99, "min_tokens": 5,
        "cache_salt": "s", "stop": "END", "logprobs": true, "top_logprobs": 2, "kv_transfer_params": {"a": 1},
        "chat_template_kwargs": {"x": 1}}));
    let (mut splice, mut outs) = begun(&body, Options::default());
    let Next::Continue(legs) = splice.recover(&mut outs) else { panic!("it goes on") };
    assert_eq!(
        (legs.len(), legs[0].choice, legs[0].path, legs[0].prompt_tokens),
        (1, 0, "/v1/completions", 5)
    );
    let mut asked: Value = serde_json::from_slice(&legs[0].body).unwrap();
    let seed = asked.as_object_mut().unwrap().remove("seed").unwrap();
    assert_ne!(seed, json!(5));
    assert_eq!(
        asked,
        json!({"model": "m", "top_k": 4, "cache_salt": "s", "prompt": [1, 2, 7, 8, 9], "max_tokens": 7,
            "min_tokens": 2, "stop": "END", "include_stop_str_in_output": true, "no_stop_trim": true,
            "logprobs": 2, "stream": true, "return_token_ids": true})
    );
}

#[test]
fn what_is_exhausted_is_ended_and_what_was_tried_too_often_is_lost() {
    let (mut splice, mut outs) = begun(&with(json!({"max_tokens": 3})), Options::default());
    assert_eq!(splice.recover(&mut outs), Next::Finish);
    let end = String::from_utf8(outs[outs.len() - 2].lines.to_vec()).unwrap();
    assert!(end.contains(r#""finish_reason":"length""#) && outs.last().unwrap().terminal);

    let context = Options { context: Some(5), ..Options::default() };
    assert_eq!(begun(&with(json!({})), context).0.recover(&mut outs), Next::Finish);

    let none = Options { max_continuations: 0, ..Options::default() };
    assert_eq!(begun(&with(json!({})), none).0.recover(&mut outs), Next::Lost(Lost::Attempts));
    let few = Options { max_kept_tokens: 2, ..Options::default() };
    let lost = begun(&with(json!({})), few).0.recover(&mut outs);
    assert_eq!(lost, Next::Lost(Lost::NotAnyMore("it has more tokens than are kept")));
    let tools = with(json!({"response_format": {"type": "json_object"}}));
    let lost = begun(&tools, Options::default()).0.recover(&mut outs);
    assert!(matches!(lost, Next::Lost(Lost::NotResumable(_))));
}

#[test]
fn a_tool_call_that_begins_behind_the_cut_is_lost_and_not_shown() {
    let (mut splice, mut outs) = begun(&with(json!({"tools": [{}]})), Options::default());
    let Next::Continue(legs) = splice.recover(&mut outs) else { panic!("it goes on") };
    let before = outs.len();
    for (text, id) in [("d<tool", 10), ("_call>{", 11)] {
        let data = json!({"choices": [{"index": 0, "text": text, "finish_reason": null, "token_ids": [id]}]});
        let progress = splice.push(legs[0].id, &Event::unnamed(Bytes::from(data.to_string())), &mut outs);
        assert_eq!(matches!(progress, Progress::Failed(_)), id == 11);
    }
    let shown: String =
        outs[before..].iter().map(|out| String::from_utf8_lossy(&out.lines).into_owned()).collect();
    assert!(shown.contains(r#""content":"d""#) && !shown.contains("<tool"));
    assert_eq!(splice.recover(&mut outs), Next::Lost(Lost::NotAnyMore("a tool call has begun")));
}
