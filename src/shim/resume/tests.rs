//! Streams cut everywhere, against what an uncut one gives.

use proptest::prelude::*;

use super::*;

const NAME: &str = "st_abcdefghijklmnopqrstuvwxyz";

fn event(number: u64, more: &str, data: &str) -> String {
    // What the second attempt says has that in its id.
    let attempt = if number < 2 { "" } else { ".2" };
    let (lines, last) = (format!("data: {data}\n{more}"), format!("id: {NAME}.{number}{attempt}\n"));
    // The cluster writes the id last; to a reader it is the same wherever it stands.
    if number == 1 { format!("{last}{lines}\n") } else { format!("{lines}{last}\n") }
}

fn events() -> Vec<String> {
    vec![
        event(0, "retry: 500\n", r#"{"a":1}"#),
        event(1, "", r#"{"ü":"🦀"}"#),
        event(2, "", "x\ndata: y"),
        event(3, "", "[DONE]"),
    ]
}

/// What a server sends to whoever has this event, heartbeats included.
fn sent_after(last: Option<&str>) -> Vec<u8> {
    let from = last.map_or(0, |id| id.split('.').nth(1).unwrap().parse::<usize>().unwrap() + 1);
    let rest: Vec<String> = events().split_off(from);
    rest.join(": ping\n").into_bytes()
}

fn without_comments(bytes: &[u8]) -> String {
    let text = std::str::from_utf8(bytes).unwrap();
    text.split_inclusive('\n').filter(|line| !line.starts_with(':')).collect()
}

#[test]
fn whatever_is_cut_once_or_twice_the_events_are_the_same() {
    let whole = sent_after(None);
    for first in 0..=whole.len() {
        for second in 0..whole.len() {
            let mut stream = Events::new(Dialect::OpenAi);
            let mut out = stream.feed(&whole[..first]).to_vec();
            stream.reconnected();
            let again = sent_after(stream.last_event_id());
            out.extend_from_slice(&stream.feed(&again[..second.min(again.len())]));
            stream.reconnected();
            out.extend_from_slice(&stream.feed(&sent_after(stream.last_event_id())));
            assert_eq!(without_comments(&out), events().concat(), "{first} {second}");
            assert!(stream.ended() && stream.fault().is_none());
            assert_eq!((stream.count(), stream.next_number()), (4, 4));
        }
    }
}

proptest! {
    #[test]
    fn however_it_is_split_and_cut_the_events_are_the_same(
        sizes in proptest::collection::vec(1usize..40, 1..80),
        cuts in proptest::collection::vec(0usize..200, 0..12),
    ) {
        let mut stream = Events::new(Dialect::OpenAi);
        let mut out = Vec::new();
        let mut sizes = sizes.into_iter().cycle();
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let sent = sent_after(stream.last_event_id());
            let mut left = &sent[..cut.min(sent.len())];
            while !left.is_empty() {
                let (now, later) = left.split_at(sizes.next().unwrap().min(left.len()));
                let whole = stream.feed(now);
                prop_assert!(whole.is_empty() || whole.ends_with(b"\n"));
                out.extend_from_slice(&whole);
                left = later;
            }
            stream.reconnected();
        }
        prop_assert_eq!(without_comments(&out), events().concat());
        prop_assert!(stream.ended());
    }
}

#[test]
fn bytes_pass_as_they_are() {
    let whole = sent_after(None);
    assert_eq!(Events::new(Dialect::OpenAi).feed(&whole), whole);
    let returns = String::from_utf8(whole).unwrap().replace('\n', "\r\n").into_bytes();
    for cut in 0..returns.len() {
        let mut stream = Events::new(Dialect::OpenAi);
        let out = [stream.feed(&returns[..cut]), stream.feed(&returns[cut..])].concat();
        assert_eq!(out, returns);
        assert_eq!(stream.last_event_id(), Some(format!("{NAME}.3.2").as_str()));
    }
}

#[test]
fn a_heartbeat_is_handed_on_at_once_and_a_lone_blank_line_is_not() {
    let mut stream = Events::new(Dialect::OpenAi);
    assert_eq!(stream.feed(b": ping\n"), ": ping\n");
    assert_eq!(stream.feed(b"\n\n"), "");
    assert_eq!((stream.count(), stream.last_event_id()), (0, None));
}

#[test]
fn events_that_were_had_are_dropped() {
    let all = events();
    let mut stream = Events::new(Dialect::OpenAi);
    stream.feed(all[..2].concat().as_bytes());
    stream.reconnected();
    let again = format!("{}: note\n{}{}", all[0], all[1], all[2]);
    assert_eq!(stream.feed(again.as_bytes()), format!(": note\n{}", all[2]));
}

#[test]
fn nothing_behind_a_fault_is_handed_on_until_there_is_another_connection() {
    let all = events();
    let gap = Fault::Gap { came: 2, expected: 1 };
    let strange = |id: &str| format!("id: {id}\ndata: x\n\n");
    for (bad, fault) in [
        (all[2].clone(), gap),
        (strange("st_other.1"), Fault::ForeignEvent("st_other".to_owned())),
        (strange("7"), Fault::StrangeId("7".to_owned())),
        (strange(".7"), Fault::StrangeId(".7".to_owned())),
        (strange("a.b"), Fault::StrangeId("a.b".to_owned())),
    ] {
        let mut stream = Events::new(Dialect::OpenAi);
        assert_eq!(stream.feed(format!("{}{bad}{}", all[0], all[1]).as_bytes()), all[0]);
        assert_eq!(stream.fault(), Some(&fault));
        assert_eq!(stream.feed(all[1].as_bytes()), "");
        stream.reconnected();
        assert_eq!(stream.feed(all[1].as_bytes()), all[1]);
    }
    let mut stream = Events::new(Dialect::OpenAi);
    stream.feed(&vec![b'x'; MAX_EVENT_BYTES + 1]);
    assert_eq!(stream.fault(), Some(&Fault::TooLarge));
}

#[test]
fn a_stream_that_was_named_takes_no_events_of_another() {
    let mut stream = Events::new(Dialect::OpenAi);
    stream.belong_to("st_mine");
    assert_eq!(stream.feed(events()[0].as_bytes()), "");
    assert_eq!(stream.fault(), Some(&Fault::ForeignEvent(NAME.to_owned())));
}

#[test]
fn what_closes_a_stream_depends_on_the_dialect() {
    use Dialect::{Anthropic, OpenAi, Responses};
    for (dialect, name, data, closes) in [
        (OpenAi, "", "[DONE]", true),
        (OpenAi, "", r#"{"error":{"code":"stream_lost"}}"#, false),
        (OpenAi, "", r#""[DONE]""#, false),
        (OpenAi, "error", "{}", false),
        (Responses, "response.completed", "{}", true),
        (Responses, "response.failed", "{}", true),
        (Responses, "", r#"{"type":"response.incomplete"}"#, true),
        (Responses, "", r#"{"type":"response.output_text.delta","delta":"response.completed"}"#, false),
        (Responses, "response.output_text.done", "{}", false),
        (Anthropic, "message_stop", "{}", true),
        (Anthropic, "message_delta", "{}", false),
        (Anthropic, "", "[DONE]", true),
    ] {
        let mut stream = Events::new(dialect);
        let more = if name.is_empty() { String::new() } else { format!("event: {name}\n") };
        stream.feed(event(0, &more, data).as_bytes());
        assert_eq!(stream.ended(), closes, "{dialect:?} {name} {data}");
    }
}

#[test]
fn an_error_in_place_of_a_stream_is_handed_on_and_ends_it() {
    // What comes when the head was given early: one event with a number, and the route's own end.
    let error = event(0, "retry: 500\n", r#"{"error":{"code":"workers_saturated"}}"#);
    for (dialect, end) in [
        (Dialect::OpenAi, format!("{error}data: [DONE]\n\n")),
        (Dialect::Responses, format!("event: error\n{error}")),
        (Dialect::Anthropic, format!("event: error\n{error}")),
    ] {
        let mut stream = Events::new(dialect);
        assert_eq!(stream.feed(format!(": ping\n{end}").as_bytes()), format!(": ping\n{end}"));
        assert!(stream.ended() && stream.fault().is_none(), "{dialect:?}");
    }
}

#[test]
fn an_event_without_a_number_is_passed_and_remembered() {
    let mut stream = Events::new(Dialect::OpenAi);
    assert_eq!(stream.feed(b"data: x\n\n"), "data: x\n\n");
    assert!(stream.unnumbered());
}

#[test]
fn the_first_attempt_comes_at_once_and_the_last_before_the_budget_is_used_up() {
    let start = Instant::now();
    let mut patience = Patience::new(Duration::from_secs(3));
    let mut now = start;
    let mut pauses = Vec::new();
    while let Some(pause) = patience.next_pause(now, 1.0) {
        pauses.push(pause.as_millis());
        // Each attempt itself takes a little.
        now += pause + Duration::from_millis(1);
    }
    assert_eq!(pauses[..8], [0, 20, 40, 80, 160, 320, 640, 1000]);
    let all = now - start;
    assert!(all >= Duration::from_secs(3) && all < Duration::from_millis(3100), "{all:?}");
}

#[test]
fn only_time_without_a_sign_of_life_is_counted_and_an_event_begins_anew() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut patience = Patience::new(Duration::from_secs(10));
    assert!(patience.next_pause(at(0), 0.5).is_some());
    patience.heard(at(4));
    // A long prefill with heartbeats only, then it breaks again: four seconds are spent.
    assert!(patience.next_pause(at(100), 0.5).is_some());
    assert!(patience.next_pause(at(105), 0.5).is_some());
    assert_eq!(patience.next_pause(at(106), 0.5), None);
    patience.progressed();
    assert_eq!(patience.next_pause(at(107), 0.5), Some(Duration::ZERO));
}
