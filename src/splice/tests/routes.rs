//! Routes whose events are passed on unread, and what engines of other kinds send.

use super::*;

fn push(splice: &mut Splice, stream: &str, outs: &mut Vec<Out>) -> Progress {
    let mut last = Progress::Going;
    for event in events(stream.as_bytes()) {
        last = splice.push(LegId::FIRST, &event, outs);
    }
    last
}

#[test]
fn messages_and_responses_end_with_their_own_events_and_are_replayed_before_the_first() {
    let cases = [
        (
            StreamRoute::Messages,
            "event: message_start\ndata: {\"type\":\"message_start\"}\n\n",
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        ),
        (
            StreamRoute::Responses,
            "data: {\"type\":\"response.created\"}\n\n",
            "data: {\"type\":\"response.incomplete\"}\n\n",
        ),
        (StreamRoute::Other, "data: {\"text\":\"x\"}\n\n", "data: [DONE]\n\n"),
    ];
    for (route, first, last) in cases {
        let plan = plan(route, "not read");
        let mut outs = Vec::new();
        let mut splice = Splice::new(plan.clone());
        let error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"overloaded\"}}\n\n";
        assert_eq!(
            push(&mut splice, error, &mut outs),
            Progress::Failed(Failure::Error("overloaded".to_owned()))
        );
        assert_eq!(splice.recover(&mut outs), Next::Replay(LegId(1)));
        assert!(outs.is_empty());

        let mut splice = Splice::new(plan.clone());
        assert_eq!(push(&mut splice, first, &mut outs), Progress::Going);
        assert_eq!([&outs[0].lines[..], b"\n"].concat(), first.as_bytes());
        let mut other = restored(&plan, &outs);
        assert!(other.delivered());
        assert!(matches!(other.recover(&mut outs), Next::Lost(Lost::NotResumable(_))));
        assert_eq!(push(&mut splice, last, &mut outs), Progress::Done);
        assert!(outs[1].terminal && restored(&plan, &outs).is_done());
    }
}

#[test]
fn the_shapes_of_sglang_are_continued_without_keys_it_does_not_send() {
    let plan = plan(StreamRoute::Chat, r#"{"stream":true,"max_tokens":9}"#);
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    let stream = "data: {\"id\":\"s\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null},\"finish_reason\":null,\"matched_stop\":null,\"prompt_token_ids\":[1]}],\"usage\":null}\n\n\
        data: {\"id\":\"s\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"role\":null,\"content\":null,\"reasoning_content\":\"a\"},\"token_ids\":[5],\"finish_reason\":null,\"matched_stop\":null}],\"usage\":null}\n\n";
    assert_eq!(push(&mut splice, stream, &mut outs), Progress::Going);
    assert!(!String::from_utf8_lossy(&outs[1].lines).contains("\"token_ids\""));
    let mut splice = restored(&plan, &outs);
    let Next::Continue(legs) = splice.recover(&mut outs) else { panic!("it goes on") };
    let rest = r#"{"id":"t","choices":[{"index":0,"text":"b</think>c","token_ids":[6],"finish_reason":"stop","matched_stop":2}]}"#;
    let rest = Event::unnamed(Bytes::from_static(rest.as_bytes()));
    assert_eq!(splice.push(legs[0].id, &rest, &mut outs), Progress::Done);
    let lines: Vec<_> = outs.iter().map(|out| String::from_utf8_lossy(&out.lines).into_owned()).collect();
    assert!(lines[2].contains(r#""delta":{"reasoning_content":"b"}"#) && lines[2].contains(r#""id":"s""#));
    assert!(
        lines[3]
            .contains(r#""delta":{"content":"c"},"logprobs":null,"finish_reason":"stop","matched_stop":2}"#)
    );
}

#[test]
fn several_choices_in_one_event_become_one_event_each() {
    let plan = plan(StreamRoute::Completions, r#"{"stream":true,"n":2,"max_tokens":1}"#);
    let mut splice = Splice::new(plan);
    let mut outs = Vec::new();
    let stream = "data: {\"id\":\"i\",\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":\"length\",\"token_ids\":[1]}, {\"index\":1,\"text\":\"b\",\"finish_reason\":\"length\",\"token_ids\":[2]}]}\n\n";
    assert_eq!(push(&mut splice, &format!("{stream}data: [DONE]\n\n"), &mut outs), Progress::Done);
    assert_eq!(outs.len(), 3);
    assert_eq!(splice.generated_tokens(), 2);
}

#[test]
fn a_stream_that_ends_before_every_choice_did_is_cut_off() {
    let plan = plan(StreamRoute::Completions, r#"{"stream":true,"n":2}"#);
    let mut splice = Splice::new(plan);
    let mut outs = Vec::new();
    let stream = "data: {\"id\":\"i\",\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":\"stop\",\"token_ids\":[1]}]}\n\ndata: [DONE]\n\n";
    assert_eq!(push(&mut splice, stream, &mut outs), Progress::Failed(Failure::Truncated));
}

#[test]
fn a_journal_of_another_version_or_with_damage_is_refused() {
    let plan = plan(StreamRoute::Chat, r#"{"stream":true}"#);
    let read = |entry: &'static [u8]| Splice::restore(plan.clone(), [entry]).map(|_| ());
    assert_eq!(read(&[9, 1, 5]), Err(JournalError::Version(9)));
    assert_eq!(read(&[3, 99]), Err(JournalError::Damaged));
    assert_eq!(read(&[3, 2, 200, 1, 1, 7]), Err(JournalError::Damaged));
    assert_eq!(read(&[3, 1, 7]), Ok(()));
}

/// A chat whose only text is one event of reasoning with two tokens.
fn reasoned(end: Option<u32>) -> Next {
    let options = Options { reasoning_end: end, ..Options::default() };
    let body = Bytes::from_static(br#"{"stream":true}"#);
    let plan = Arc::new(Plan::new(StreamRoute::Chat, &body, &options).unwrap());
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    let stream = "data: {\"id\":\"i\",\"created\":1,\"model\":\"m\",\"prompt_token_ids\":[1],\"choices\":[{\"index\":0,\"delta\":{\"reasoning\":\"a\"},\"finish_reason\":null,\"token_ids\":[5,9]}]}\n\n";
    assert_eq!(push(&mut splice, stream, &mut outs), Progress::Going);
    let mut splice = restored(&plan, &outs);
    let next = splice.recover(&mut outs);
    if let Next::Continue(legs) = &next {
        let rest = r#"{"choices":[{"index":0,"text":"b","token_ids":[6],"finish_reason":"stop"}]}"#;
        let rest = Event::unnamed(Bytes::from_static(rest.as_bytes()));
        assert_eq!(splice.push(legs[0].id, &rest, &mut outs), Progress::Done);
        let said = String::from_utf8_lossy(&outs[1].lines).into_owned();
        let delta =
            if end == Some(9) { r#""delta":{"content":"b"}"# } else { r#""delta":{"reasoning":"b"}"# };
        assert!(said.contains(delta), "{said}");
    }
    next
}

#[test]
fn reasoning_that_may_have_ended_within_an_event_is_continued_by_its_token_only() {
    assert!(matches!(reasoned(Some(9)), Next::Continue(_)));
    assert!(matches!(reasoned(Some(10)), Next::Continue(_)));
    assert!(matches!(reasoned(None), Next::Lost(Lost::NotAnyMore(_))));
}

/// A chat with these events of reasoning, each one token, that is cut behind them.
fn reasoned_in(texts: &[&str]) -> Next {
    let plan = plan(StreamRoute::Chat, r#"{"stream":true}"#);
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let prompt = if at == 0 { r#","prompt_token_ids":[1]"# } else { "" };
        let delta = if text.is_empty() { "{}".to_owned() } else { format!(r#"{{"reasoning":"{text}"}}"#) };
        let event = format!(
            "data: {{\"id\":\"i\",\"created\":1,\"model\":\"m\"{prompt},\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":null,\"token_ids\":[{}]}}]}}\n\n",
            40 + at
        );
        assert_eq!(push(&mut splice, &event, &mut outs), Progress::Going);
    }
    let here = splice.leg_ended(LegId::FIRST, &mut outs);
    assert_eq!(here, Progress::Failed(Failure::Truncated));
    let there = restored(&plan, &outs).recover(&mut Vec::new());
    let here = splice.recover(&mut outs);
    assert_eq!(here, there);
    here
}

#[test]
fn reasoning_whose_last_token_the_engine_kept_back_is_lost_until_the_next_one_shows_it() {
    // An incomplete character shows only with what follows it, and that may begin the marker.
    assert!(matches!(reasoned_in(&["a", "", "\u{fffd}"]), Next::Lost(Lost::NotAnyMore(_))));
    assert!(matches!(reasoned_in(&["a", "", "\u{fffd}", "<b"]), Next::Continue(_)));
    // The first `<` shows when another one comes.
    assert!(matches!(reasoned_in(&["a", "", "<"]), Next::Lost(Lost::NotAnyMore(_))));
    assert!(matches!(reasoned_in(&["a", "", "<b"]), Next::Continue(_)));
    assert!(matches!(reasoned_in(&["a", "<"]), Next::Continue(_)));
    // A whole character of several tokens.
    assert!(matches!(reasoned_in(&["a", "", "", "\u{65e5}"]), Next::Continue(_)));
}

#[test]
fn only_what_a_continuation_says_first_may_be_a_repetition() {
    let plan = plan(StreamRoute::Completions, r#"{"stream":true,"stop":["END"]}"#);
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    // Several tokens in one event may hide that they end inside a character.
    let stream = "data: {\"id\":\"i\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"text\":\"ab\",\"finish_reason\":null,\"prompt_token_ids\":[1],\"token_ids\":[5,9]}]}\n\n";
    assert_eq!(push(&mut splice, stream, &mut outs), Progress::Going);
    let last = r#"{"choices":[{"index":0,"text":"xEND","token_ids":[6,7],"finish_reason":"stop","stop_reason":"END"}]}"#;
    let more = r#"{"choices":[{"index":0,"text":"cd","token_ids":[3,4],"finish_reason":null}]}"#;
    let event = |data: &'static str| Event::unnamed(Bytes::from_static(data.as_bytes()));

    let continued = || {
        let mut splice = restored(&plan, &outs);
        let Next::Continue(legs) = splice.recover(&mut Vec::new()) else { panic!("it is continued") };
        (splice, legs[0].id)
    };
    let mut said = Vec::new();
    let (mut splice, leg) = continued();
    assert!(matches!(splice.push(leg, &event(last), &mut said), Progress::Failed(Failure::Ambiguous(_))));

    let (mut splice, leg) = continued();
    assert_eq!(splice.push(leg, &event(more), &mut said), Progress::Going);
    assert_eq!(splice.push(leg, &event(last), &mut said), Progress::Done);
    let text: String = said.iter().map(|out| String::from_utf8_lossy(&out.lines).into_owned()).collect();
    assert!(text.contains(r#""text":"cd""#) && text.contains(r#""text":"x""#), "{text}");
}
