//! Streams of a real vLLM 0.32: what is asked for is taken out again, and every cut is continued.

use serde_json::{Value, json};

use super::client::View;
use super::*;
use crate::state::worker::EngineKind;

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/golden/http/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn request(name: &str) -> Value {
    let request: Value = serde_json::from_slice(&file(&format!("{name}.req.json"))).unwrap();
    request["body"].clone()
}

/// A stream with what differs between two runs of one request replaced.
fn unnamed(stream: &[u8]) -> Vec<String> {
    events(stream)
        .iter()
        .map(|event| {
            let text = String::from_utf8(event.lines.to_vec()).unwrap();
            let Some((_, rest)) = text.split_once("\"object\"") else { return text };
            let (object, rest) = rest.split_once("\"created\":").unwrap();
            let (_, rest) = rest.split_once(',').unwrap();
            format!("{object}{rest}")
        })
        .collect()
}

fn lines(outs: &[Out]) -> Vec<u8> {
    outs.iter().flat_map(|out| [&out.lines[..], b"\n"].concat()).collect()
}

#[test]
fn a_stream_without_anything_asked_for_passes_byte_by_byte_however_it_is_chunked() {
    for (name, route) in [
        ("vllm_chat_stream", StreamRoute::Chat),
        ("vllm_chat_stream_usage", StreamRoute::Chat),
        ("vllm_completions_stream", StreamRoute::Completions),
        ("vllm_completions_n2", StreamRoute::Completions),
        ("vllm_completions_stream_tokens", StreamRoute::Completions),
        ("vllm_completions_stop_hit", StreamRoute::Completions),
        ("vllm_responses_stream", StreamRoute::Responses),
    ] {
        let stream = file(&format!("{name}.sse"));
        let mut body = request(name);
        // Not continued, so that nothing is asked for.
        body["suffix"] = json!("x");
        let body = Bytes::from(body.to_string());
        let plan = Arc::new(Plan::new(route, &body, &Options::default()).unwrap());
        assert_eq!(plan.first_body(EngineKind::Vllm), body);
        for size in 1..stream.len().min(700) {
            let mut parser = Parser::new(1 << 20);
            let mut splice = Splice::new(plan.clone());
            let mut outs = Vec::new();
            let mut progress = Progress::Going;
            for piece in stream.chunks(size) {
                parser.push(Bytes::copy_from_slice(piece)).unwrap();
                while let Some(event) = parser.next_event() {
                    assert_eq!(progress, Progress::Going);
                    progress = splice.push(LegId::FIRST, &event, &mut outs);
                }
            }
            assert_eq!(progress, Progress::Done, "{name}");
            assert!(lines(&outs) == stream, "{name} in pieces of {size}");
        }
    }
}

/// The real engine's chat with ids asked for, and the same chat without: equal once undone.
#[test]
fn what_the_router_asked_for_is_taken_out_again() {
    let mut body = request("vllm_apiserver_sigterm_midstream_chat");
    body.as_object_mut().unwrap().remove("return_token_ids");
    body.as_object_mut().unwrap().remove("stream_options");
    let plan = plan(StreamRoute::Chat, &body.to_string());
    let mut splice = Splice::new(plan);
    let mut outs = Vec::new();
    let stream = events(&file("vllm_apiserver_sigterm_midstream_chat.sse"));
    let mut last = Progress::Going;
    for event in &stream {
        last = splice.push(LegId::FIRST, event, &mut outs);
        if last != Progress::Going {
            break;
        }
    }
    assert_eq!(last, Progress::Failed(Failure::Aborted("abort".to_owned())));
    let undone = unnamed(&lines(&outs));
    let without = unnamed(&file("vllm_abort_midstream_chat.sse"));
    // The other run sends nothing for a token without text, as it has no ids to tell.
    let undone: Vec<_> = undone.into_iter().filter(|event| !event.contains("\"delta\":{}")).collect();
    let same = undone.iter().zip(&without).take_while(|(undone, without)| undone == without).count();
    // From there on the two runs have their tokens in other events.
    assert!(same >= 24, "{same}: {:?} {:?}", undone[same], without[same]);
    let most = outs[2..20].iter().map(|out| out.journal.len()).max().unwrap();
    assert!(most <= 8, "an entry has {most} bytes");
}

/// What the same engine sends when it goes on behind `kept` tokens of a golden stream.
fn rest(stream: &[Event], kept: usize) -> Vec<Event> {
    let mut seen = 0;
    let mut rest = Vec::new();
    for event in stream {
        let Ok(value) = serde_json::from_slice::<Value>(&event.data) else {
            rest.push(event.clone());
            continue;
        };
        let choice = &value["choices"][0];
        let count = choice["token_ids"].as_array().map_or(0, Vec::len);
        seen += count;
        if count == 0 || seen <= kept {
            continue;
        }
        let delta = &choice["delta"];
        let text = choice["text"].as_str().or(delta["reasoning"].as_str()).or(delta["content"].as_str());
        let finish = match choice["finish_reason"].as_str() {
            Some("abort") => json!("length"),
            _ => choice["finish_reason"].clone(),
        };
        let event = json!({"id": "other", "object": "text_completion", "created": 1, "model": "tiny",
            "choices": [{"index": 0, "text": text.unwrap_or_default(), "logprobs": null, "finish_reason": finish,
                "stop_reason": null, "prompt_token_ids": null, "token_ids": choice["token_ids"]}]});
        rest.push(Event::unnamed(Bytes::from(event.to_string())));
    }
    rest
}

#[test]
fn real_streams_are_continued_from_every_cut_by_the_same_and_by_another_process() {
    for (name, route) in [
        ("vllm_completions_stream_tokens", StreamRoute::Completions),
        ("vllm_apiserver_sigterm_midstream_chat", StreamRoute::Chat),
    ] {
        let stream = events(&file(&format!("{name}.sse")));
        // The chat's engine was stopped; as if it had been its last token.
        let whole: Vec<Event> = stream
            .iter()
            .map(|event| {
                let text = String::from_utf8(event.data.to_vec()).unwrap();
                Event::unnamed(Bytes::from(text.replace("\"abort\"", "\"length\"")))
            })
            .collect();
        let wanted = View::of(&whole);
        let options = Options { reasoning_end: Some(u32::MAX), ..Options::default() };
        let body = Bytes::from(request(name).to_string());
        let plan = Arc::new(Plan::new(route, &body, &options).unwrap());
        for cut in 0..whole.len() - 2 {
            for elsewhere in [false, true] {
                let mut splice = Splice::new(plan.clone());
                let mut outs = Vec::new();
                for event in &whole[..cut] {
                    assert_eq!(splice.push(LegId::FIRST, event, &mut outs), Progress::Going);
                }
                match elsewhere && !outs.is_empty() {
                    true => splice = restored(&plan, &outs),
                    false => {
                        let lost = splice.leg_ended(LegId::FIRST, &mut outs);
                        assert_eq!(lost, Progress::Failed(Failure::Truncated));
                    }
                }
                let (leg, events) = match splice.recover(&mut outs) {
                    Next::Replay(leg) => (leg, whole.clone()),
                    Next::Continue(legs) => {
                        let body: Value = serde_json::from_slice(&legs[0].body).unwrap();
                        let ids: Vec<u64> =
                            body["prompt"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
                        let kept = ids.len() - 19;
                        assert_eq!(ids[19..], wanted.choices[&0].ids[..kept]);
                        let most = request(name)["max_tokens"].as_u64().unwrap();
                        assert_eq!(body["max_tokens"], json!(most - kept as u64));
                        (legs[0].id, rest(&whole, kept))
                    }
                    Next::Finish => continue,
                    other => panic!("{other:?}"),
                };
                for event in &events {
                    if splice.push(leg, event, &mut outs) == Progress::Done {
                        break;
                    }
                }
                let got = View::of(&super::events(&lines(&outs)));
                let (got, wanted) = (&got.choices[&0], &wanted.choices[&0]);
                assert_eq!(
                    (&got.text, &got.reasoning, &got.ids),
                    (&wanted.text, &wanted.reasoning, &wanted.ids)
                );
                assert_eq!((&got.finish, got.roles), (&wanted.finish, wanted.roles), "{name} cut at {cut}");
            }
        }
    }
}

#[test]
fn a_dead_engine_is_a_failure_and_none_of_it_is_handed_out() {
    let plan = plan(StreamRoute::Chat, &request("vllm_enginedead_chat_stream").to_string());
    let mut splice = Splice::new(plan);
    let mut outs = Vec::new();
    let event = &events(&file("vllm_enginedead_chat_stream.sse"))[0];
    let Progress::Failed(Failure::Error(why)) = splice.push(LegId::FIRST, event, &mut outs) else {
        panic!("an error is a failure")
    };
    assert!(why.starts_with("EngineCore encountered an issue"));
    assert!(outs.is_empty() && !splice.delivered());
    assert_eq!(splice.recover(&mut outs), Next::Replay(LegId(1)));
}
