//! How often a stream is continued: as often as it gets on in between.

use std::collections::VecDeque;

use super::client::View;
use super::engine::Engine;
use super::*;
use crate::state::worker::EngineKind;

const TOKENS: usize = 400;

/// How the stream is cut each time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// Who drives it is lost, and another process goes on.
    Process,
    Engine,
}

/// A chat that is cut after so many events each time: how often it went on, and whether it was lost.
fn cut_after(events: usize, loss: impl Fn(usize) -> Loss, most: u32) -> (usize, Option<Lost>, View, View) {
    let body = format!(r#"{{"model":"m","stream":true,"max_tokens":{TOKENS},"temperature":0}}"#);
    let engine = Engine { prompt: vec![400, 401, 402, 403], coalesce: 1, ..Engine::default() };
    let options = Options { max_continuations: most, ..Options::default() };
    let plan = Arc::new(Plan::new(StreamRoute::Chat, &Bytes::from(body.clone()), &options).unwrap());
    let wanted = View::of(&engine.run(StreamRoute::Chat, body.as_bytes(), "a", 0));
    let mut splice = Splice::new(plan.clone());
    let first = plan.first_body(EngineKind::Vllm);
    let mut leg = (LegId::FIRST, VecDeque::from(engine.run(StreamRoute::Chat, &first, "a", 0)));
    let mut outs: Vec<Out> = Vec::new();
    let mut times = 0;
    let lost = 'stream: loop {
        for _ in 0..events {
            let event = leg.1.pop_front().expect("an end");
            match splice.push(leg.0, &event, &mut outs) {
                Progress::Going => {}
                Progress::Done => break 'stream None,
                other => panic!("{other:?}"),
            }
        }
        match loss(times) {
            Loss::Process if !outs.is_empty() => splice = restored(&plan, &outs),
            _ => assert!(matches!(splice.leg_ended(leg.0, &mut outs), Progress::Failed(_))),
        }
        times += 1;
        leg = match splice.recover(&mut outs) {
            Next::Replay(id) => (id, engine.run(StreamRoute::Chat, &first, "b", 0).into()),
            Next::Continue(legs) => {
                (legs[0].id, engine.run(StreamRoute::Completions, &legs[0].body, "b", 0).into())
            }
            Next::Finish => break None,
            Next::Lost(why) => break Some(why),
        };
    };
    let lines: Vec<u8> = outs.iter().flat_map(|out| [&out.lines[..], b"\n"].concat()).collect();
    (times, lost, View::of(&super::events(&lines)), wanted)
}

#[test]
fn a_stream_outlives_any_number_of_processes_and_of_engines_that_got_on_with_it() {
    let cases: [fn(usize) -> Loss; 3] = [
        |_| Loss::Process,
        |_| Loss::Engine,
        |time| if time.is_multiple_of(2) { Loss::Engine } else { Loss::Process },
    ];
    for loss in cases {
        // Some tokens have no text, and are said again.
        let (times, lost, got, wanted) = cut_after(30, loss, 3);
        assert_eq!(lost, None);
        assert!(times >= 12, "{times}");
        assert_eq!((&got.choices[&0].text, got.usage), (&wanted.choices[&0].text, wanted.usage));
    }
    // Processes are lost before it gets on, too.
    let (times, lost, got, wanted) = cut_after(4, |_| Loss::Process, 3);
    assert_eq!((lost, &got.choices[&0].text), (None, &wanted.choices[&0].text));
    assert!(times >= 90, "{times}");
}

#[test]
fn a_stream_that_costs_one_engine_after_the_other_is_lost_soon_whoever_drives_it() {
    for (events, most) in [(0, 3), (1, 3), (4, 3), (4, 7)] {
        let (times, lost, ..) = cut_after(events, |_| Loss::Engine, most);
        assert_eq!(lost, Some(Lost::Attempts), "{events}");
        assert!((most as usize..=most as usize + 2).contains(&times), "{times} of {most}");
    }
    // The count is written down: another process does not begin it anew.
    let in_turn = |time: usize| if time.is_multiple_of(2) { Loss::Engine } else { Loss::Process };
    let (times, lost, ..) = cut_after(4, in_turn, 3);
    assert_eq!(lost, Some(Lost::Attempts));
    assert!(times <= 12, "{times}");
}

#[test]
fn the_loss_of_one_engine_that_went_on_with_many_choices_is_one() {
    let body = r#"{"stream":true,"n":6,"max_tokens":40}"#;
    let plan = plan(StreamRoute::Completions, body);
    let mut splice = Splice::new(plan);
    let mut outs = Vec::new();
    for choice in 0..6 {
        let prompt = if choice == 0 { r#","prompt_token_ids":[1]"# } else { "" };
        let event = format!(
            r#"{{"id":"i","choices":[{{"index":{choice},"text":"a","finish_reason":null{prompt},"token_ids":[5]}}]}}"#
        );
        let event = Event::unnamed(Bytes::from(event));
        assert_eq!(splice.push(LegId::FIRST, &event, &mut outs), Progress::Going);
    }
    assert!(matches!(splice.leg_ended(LegId::FIRST, &mut outs), Progress::Failed(_)));
    let Next::Continue(mut legs) = splice.recover(&mut outs) else { panic!("it goes on") };
    assert_eq!(legs.len(), 6);
    // The engine is lost with all its connections, which are noticed one by one.
    for (at, leg) in legs.iter_mut().enumerate() {
        assert!(matches!(splice.leg_ended(leg.id, &mut outs), Progress::Failed(_)));
        let Next::Continue(again) = splice.recover(&mut outs) else { panic!("it goes on at {at}") };
        *leg = again.into_iter().next().unwrap();
    }
}

#[test]
fn what_a_process_had_guessed_of_a_choice_the_next_one_does_not_take_for_certain() {
    let plan = plan(StreamRoute::Chat, r#"{"stream":true,"n":2,"max_tokens":40}"#);
    let mut splice = Splice::new(plan.clone());
    let mut outs = Vec::new();
    let seen = r#"{"id":"i","created":1,"model":"m","prompt_token_ids":[1],"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null,"token_ids":[5]}]}"#;
    let push = |splice: &mut Splice, leg, data: &str, outs: &mut Vec<Out>| {
        splice.push(leg, &Event::unnamed(Bytes::copy_from_slice(data.as_bytes())), outs)
    };
    assert_eq!(push(&mut splice, LegId::FIRST, seen, &mut outs), Progress::Going);
    let said = r#"{"choices":[{"index":0,"text":"b","token_ids":[6],"finish_reason":null}]}"#;
    let marker = r#"{"choices":[{"index":0,"text":"c</think>d","token_ids":[7,8,9],"finish_reason":null}]}"#;
    // Nothing was seen of the second choice: it may reason, although the first one does not.
    for data in [said, marker] {
        splice = restored(&plan, &outs);
        let Next::Continue(legs) = splice.recover(&mut outs) else { panic!("it goes on") };
        let leg = legs.iter().find(|leg| leg.choice == 1).unwrap().id;
        let progress = push(&mut splice, leg, data, &mut outs);
        assert_eq!(matches!(progress, Progress::Failed(Failure::Ambiguous(_))), data == marker);
    }
    let told: String = outs.iter().map(|out| String::from_utf8_lossy(&out.lines).into_owned()).collect();
    assert!(told.contains(r#""content":"b""#) && !told.contains("think"), "{told}");
    assert!(matches!(splice.recover(&mut outs), Next::Lost(Lost::NotAnyMore(_))));
}
