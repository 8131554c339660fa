//! Random requests, random cuts: a continued stream means what the uninterrupted one means.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::{Value, json};

use super::client::View;
use super::engine::Engine;
use super::*;
use crate::engines::sim::tokenizer::{FIRST_BYTE, SPACED_WORDS, decode, encode};
use crate::state::worker::EngineKind;

/// A token that closes reasoning, where that is one.
const MARKER: u32 = SPACED_WORDS + 77;

/// A request and an engine for it.
#[derive(Clone, Debug)]
struct Case {
    chat: bool,
    n: usize,
    max_tokens: usize,
    min_tokens: usize,
    /// Where in the uninterrupted text stop strings are taken from, and how long they are.
    stops: Vec<(usize, usize)>,
    shows_stop: bool,
    logprobs: Option<usize>,
    usage: bool,
    running: bool,
    ids: bool,
    eos_every: u64,
    coalesce: usize,
    think_end: Option<usize>,
    /// What closes reasoning is one token.
    marker: bool,
    /// ... which the router knows.
    marker_known: bool,
    /// The prompt ends inside a character.
    split_prompt: bool,
    salt: u32,
    /// How each attempt ends: after how many events, how, and whether another process goes on
    /// after so many of the events that this one handed out.
    cuts: Vec<(usize, u8, Option<usize>)>,
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (any::<bool>(), 1..4_usize, 1..60_usize, 0..8_usize, any::<bool>());
    let stops = proptest::collection::vec((0..80_usize, 1..9_usize), 0..3);
    let asks = (proptest::option::of(0..4_usize), any::<bool>(), any::<bool>(), any::<bool>());
    let engine =
        (prop_oneof![Just(0_u64), Just(20)], 1..5_usize, proptest::option::of(0..30_usize), any::<u32>());
    let tokens = (any::<bool>(), any::<bool>(), prop_oneof![3 => Just(false), 1 => Just(true)]);
    let cuts = proptest::collection::vec((0..40_usize, 0..4_u8, proptest::option::of(0..60_usize)), 0..4);
    (shape, stops, asks, engine, tokens, cuts).prop_map(|(shape, stops, asks, engine, tokens, cuts)| Case {
        chat: shape.0,
        n: shape.1,
        max_tokens: shape.2,
        min_tokens: shape.3,
        shows_stop: shape.4,
        stops,
        logprobs: asks.0,
        usage: asks.1,
        running: asks.2,
        ids: asks.3,
        eos_every: engine.0,
        coalesce: engine.1,
        think_end: engine.2,
        salt: engine.3,
        marker: tokens.0,
        marker_known: tokens.1,
        split_prompt: tokens.2,
        cuts,
    })
}

impl Case {
    fn route(&self) -> StreamRoute {
        if self.chat { StreamRoute::Chat } else { StreamRoute::Completions }
    }

    fn engine(&self) -> Engine {
        // Long enough to have more text than a token.
        let mut prompt =
            vec![400, 401, 402, 403, 404, 405, 1, 20 + self.salt % 200, 300, 600 + self.salt / 1000 % 200];
        if self.split_prompt && !self.chat {
            prompt.extend([FIRST_BYTE + 0xe6, FIRST_BYTE + 0x97].iter().take(1 + self.salt as usize % 2));
        }
        let reasons = self.reasons();
        let script = self.think_end.filter(|_| reasons).map(|at| (at, self.closes()));
        // A parser that has seen a part of a marker of several tokens, in one event with other text,
        // does not say so. Those of models are one token.
        let coalesce = if reasons && !self.marker { 1 } else { self.coalesce };
        let closes = reasons.then(|| decode(&self.closes(), false));
        Engine { coalesce, prompt, script, eos_every: self.eos_every, closes }
    }

    fn reasons(&self) -> bool {
        self.chat && self.think_end.is_some()
    }

    /// What closes the reasoning.
    fn closes(&self) -> Vec<u32> {
        if self.marker && self.reasons() { vec![MARKER] } else { encode("</think>") }
    }

    fn options(&self) -> Options {
        let known = self.reasons() && self.marker && self.marker_known;
        Options {
            max_continuations: 10,
            reasoning: ("<think>".to_owned(), decode(&self.closes(), false)),
            reasoning_end: known.then_some(MARKER),
            ..Options::default()
        }
    }

    fn body(&self, stops: &[String]) -> String {
        let mut body = json!({"model": "m", "stream": true, "max_tokens": self.max_tokens, "temperature": 0});
        match self.chat {
            true => body["messages"] = json!([{"role": "user", "content": "x"}]),
            // A text is made of whole characters, and so is what a template makes.
            false if self.split_prompt => body["prompt"] = json!(self.engine().prompt),
            false => body["prompt"] = json!("x"),
        }
        let mut set = |key: &str, value: Value, wanted: bool| {
            if wanted {
                body[key] = value;
            }
        };
        set("n", json!(self.n), self.n > 1);
        set("min_tokens", json!(self.min_tokens), self.min_tokens > 0);
        set("stop", json!(stops), !stops.is_empty());
        set("include_stop_str_in_output", json!(true), self.shows_stop && !stops.is_empty());
        set("return_token_ids", json!(true), self.ids);
        set(
            "stream_options",
            json!({"include_usage": true, "continuous_usage_stats": self.running}),
            self.usage,
        );
        match (self.logprobs, self.chat) {
            (Some(top), true) => {
                set("logprobs", json!(true), true);
                set("top_logprobs", json!(top), top > 0);
            }
            (Some(top), false) => set("logprobs", json!(top), true),
            (None, _) => {}
        }
        body.to_string()
    }

    /// Whether a stop string may have a part of what closes the reasoning: where that is a word, and
    /// no mark of its own, texts have it by chance.
    fn touches_marker(&self, stop: &str) -> bool {
        let marker = decode(&self.closes(), false);
        let parts = marker.char_indices().map(|(at, _)| marker.split_at(at));
        let touches =
            |(head, tail): (&str, &str)| (!head.is_empty() && stop.ends_with(head)) || stop.starts_with(tail);
        self.reasons() && (marker.contains(stop) || stop.contains(&marker) || parts.into_iter().any(touches))
    }

    /// Strings that the text has, at places anywhere in it.
    fn stop_strings(&self) -> Vec<String> {
        let events = self.engine().run(self.route(), self.body(&[]).as_bytes(), "x", 0);
        let view = View::of(&events);
        let choice = &view.choices[&0];
        let text: Vec<char> =
            if choice.text.len() > choice.reasoning.len() { &choice.text } else { &choice.reasoning }
                .chars()
                .collect();
        let taken = self.stops.iter().filter_map(|(at, length)| {
            let from = at % text.len().max(1);
            let stop: String = text.get(from..(from + length).min(text.len()))?.iter().collect();
            (!stop.is_empty() && !self.touches_marker(&stop)).then_some(stop)
        });
        taken.collect()
    }
}

/// Drives a stream through its cuts. Returns the events of the client, and why it was lost if it was.
fn drive(case: &Case, body: &str, seams: &mut usize, unclear: &mut usize) -> (Vec<Event>, Option<Lost>) {
    let engine = case.engine();
    let options = case.options();
    let plan = Arc::new(Plan::new(case.route(), &Bytes::copy_from_slice(body.as_bytes()), &options).unwrap());
    assert_eq!(plan.resumable(), Resumable::Continue { inexact: None });
    let mut splice = Splice::new(plan.clone());
    let first = plan.first_body(EngineKind::Vllm);
    let mut names = 0;
    let mut name = move || {
        names += 1;
        "a".repeat(names)
    };
    let mut legs: BTreeMap<LegId, std::collections::VecDeque<Event>> = BTreeMap::new();
    legs.insert(LegId::FIRST, engine.run(case.route(), &first, &name(), 0).into());
    let mut outs: Vec<Out> = Vec::new();
    let mut cuts = case.cuts.iter();
    let mut cut = cuts.next();
    let mut pushed = 0;
    loop {
        // The legs in turn, until one is cut or all is said.
        let mut done = false;
        'legs: while !legs.is_empty() {
            for leg in legs.keys().copied().collect::<Vec<_>>() {
                if cut.is_some_and(|(after, ..)| pushed >= *after) {
                    break 'legs;
                }
                let event = legs.get_mut(&leg).and_then(|events| events.pop_front()).expect("an end");
                pushed += 1;
                match splice.push(leg, &event, &mut outs) {
                    Progress::Going => {}
                    Progress::LegDone => {
                        legs.remove(&leg);
                    }
                    Progress::Done => {
                        done = true;
                        break 'legs;
                    }
                    Progress::Failed(Failure::Ambiguous(_)) => {
                        *unclear += 1;
                        legs.remove(&leg);
                        break 'legs;
                    }
                    Progress::Failed(why) => panic!("{why} of {event:?}"),
                }
            }
        }
        if done {
            break;
        }
        let (_, how, elsewhere) = cut.copied().unwrap_or_default();
        cut = cuts.next();
        pushed = 0;
        *seams += 1;
        match elsewhere {
            // Another process has what was relayed, and no more.
            Some(relayed) => {
                outs.truncate(outs.len().max(1).min(relayed.max(1)));
                splice = restored(&plan, &outs);
                legs.clear();
                if outs.is_empty() {
                    splice = Splice::new(plan.clone());
                    assert!(matches!(splice.leg_ended(LegId::FIRST, &mut outs), Progress::Failed(_)));
                }
            }
            None => {
                for leg in std::mem::take(&mut legs).into_keys() {
                    let broken = match how {
                        0 => None,
                        1 => {
                            Some(r#"{"error": {"message": "EngineCore encountered an issue", "code": 500}}"#)
                        }
                        2 => Some(
                            r#"{"id":"x","choices":[{"index":0,"delta":{"content":"never"},"text":"never","finish_reason":"abort","token_ids":[9]}]}"#,
                        ),
                        _ => Some("{\"cut"),
                    };
                    let progress = match broken {
                        None => splice.leg_ended(leg, &mut outs),
                        Some(data) => {
                            let event = Event::unnamed(Bytes::from_static(data.as_bytes()));
                            splice.push(leg, &event, &mut outs)
                        }
                    };
                    assert!(matches!(progress, Progress::Failed(_)), "{progress:?}");
                }
            }
        }
        match splice.recover(&mut outs) {
            Next::Replay(leg) => {
                legs.insert(leg, engine.run(case.route(), &first, &name(), 0).into());
            }
            Next::Continue(next) => {
                for leg in next {
                    let events = engine.run(StreamRoute::Completions, &leg.body, &name(), leg.choice.into());
                    legs.insert(leg.id, events.into());
                }
            }
            Next::Finish => break,
            Next::Lost(why) => return (sent(&outs), Some(why)),
        }
    }
    assert!(splice.is_done());
    assert!(outs.last().unwrap().terminal && outs.iter().filter(|out| out.terminal).count() == 1);
    let again = restored(&plan, &outs);
    assert_eq!((again.usage().completion_tokens, again.is_done()), (splice.usage().completion_tokens, true));
    (sent(&outs), None)
}

/// The client's events.
fn sent(outs: &[Out]) -> Vec<Event> {
    let lines: Vec<u8> = outs.iter().flat_map(|out| [&out.lines[..], b"\n"].concat()).collect();
    events(&lines)
}

/// By choice: what each event says.
fn pieces(events: &[Event]) -> BTreeMap<u64, Vec<String>> {
    let mut all: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let values = events.iter().filter_map(|event| serde_json::from_slice::<Value>(&event.data).ok());
    for choice in values.filter_map(|value| value["choices"].as_array()?.first().cloned()) {
        let said = [&choice["text"], &choice["delta"]["content"], &choice["delta"]["reasoning"]];
        let said: String = said.iter().filter_map(|said| said.as_str()).collect();
        all.entry(choice["index"].as_u64().unwrap()).or_default().push(said);
    }
    all
}

/// A stream is lost only where the engine kept back what the last token says, the marker of
/// reasoning having begun within a character or within an event of several tokens; where nothing was
/// seen of a choice nor any reasoning of others; or where what comes is unclear again and again. What
/// the client has is right all the same.
fn check_lost(case: &Case, why: Lost, got: &View, wanted: &View, stops: &[String], unclear: usize) {
    for (index, choice) in &got.choices {
        let whole = &wanted.choices[index];
        let is_told_as_content = was_guessed(case, got) && whole.reasoning.starts_with(&choice.text);
        assert!(whole.text.starts_with(&choice.text) || is_told_as_content);
        assert!(whole.reasoning.starts_with(&choice.reasoning));
        assert!(whole.ids.starts_with(&choice.ids));
    }
    if why == Lost::Attempts {
        let hidden = case.stops.len() > 1;
        assert!(unclear > 3 && (case.coalesce > 1 || hidden), "{unclear} of {case:?}");
        return;
    }
    assert_eq!(why, Lost::NotAnyMore("whether its reasoning has ended cannot be told"));
    let at_a_seam = |choice: &super::client::Choice| {
        // The character itself may be held, as the beginning of a stop string.
        let held = stops.iter().any(|stop| stop.contains('\u{fffd}'));
        choice.finish.is_none() && choice.text.is_empty() && (held || choice.reasoning.ends_with('\u{fffd}'))
    };
    let unseen = wanted.choices.keys().any(|index| {
        got.choices.get(index).is_none_or(|choice| choice.finish.is_none() && choice.text.is_empty())
    });
    let reasons = got.choices.values().any(|choice| !choice.reasoning.is_empty());
    let within_an_event =
        |choice: &super::client::Choice| choice.finish.is_none() && !choice.reasoning.is_empty();
    let in_heaps = case.marker && !case.marker_known && case.coalesce > 1;
    let at_a_seam = got.choices.values().any(at_a_seam) && !(case.marker && case.marker_known)
        || in_heaps && got.choices.values().any(within_an_event);
    assert!(at_a_seam || unseen && !reasons && wanted.choices.len() > 1, "{why}: {got:?}");
}

/// Whether no choice showed that the model reasons: then what comes behind a cut is taken for content, and
/// stays that if it ends before its reasoning does.
fn was_guessed(case: &Case, got: &View) -> bool {
    case.n > 1 && case.reasons() && got.choices.values().all(|choice| choice.reasoning.is_empty())
}

fn check(case: &Case) -> usize {
    let stops = case.stop_strings();
    let body = case.body(&stops);
    let mut wanted = View::of(&case.engine().run(case.route(), body.as_bytes(), "a", 0));
    let (mut seams, mut unclear) = (0, 0);
    let (events, lost) = drive(case, &body, &mut seams, &mut unclear);
    let mut got = View::of(&events);
    if let Some(why) = lost {
        check_lost(case, why, &got, &wanted, &stops, unclear);
        return seams;
    }
    // A parser of reasoning keeps back from the router what ends the beginning of a stop string; behind a
    // cut there is no parser, and the text comes an event earlier.
    let parted = case.reasons() && !stops.is_empty();
    if case.coalesce == 1 && !parted && !was_guessed(case, &got) {
        let whole = Case { cuts: Vec::new(), ..case.clone() };
        let (whole, lost) = drive(&whole, &body, &mut 0, &mut 0);
        assert!(lost.is_none());
        assert_eq!(pieces(&events), pieces(&whole), "{body}");
    }
    assert_eq!(got.names.len(), 1, "one id, one created, one model");
    // The first event may be of a replay, and so may its names.
    got.names.clear();
    wanted.names.clear();
    // The prompt's ids come once, if at all, and never unasked.
    assert!(!got.prompt_ids || case.ids);
    got.prompt_ids = wanted.prompt_ids;
    // What only the lost end of an attempt would have told is not made up.
    if seams > 0 {
        got.fingerprint = wanted.fingerprint;
    }
    if case.coalesce > 1 && !stops.is_empty() && seams > 0 {
        // Tokens that came in one event with a stop string which began before a seam, and behind it.
        let more = |view: &View| view.usage.map_or(0, |(_, tokens)| tokens);
        let surplus = more(&got).checked_sub(more(&wanted)).expect("none is left out");
        assert!(surplus <= (case.n * (case.coalesce - 1)) as u64, "{surplus} of {case:?}");
        got.usage = wanted.usage;
        let all = got.choices.values_mut().chain(wanted.choices.values_mut());
        all.for_each(|choice| choice.running = None);
    }
    if seams > 0 && was_guessed(case, &got) {
        for (index, choice) in &mut got.choices {
            let whole = &wanted.choices[index];
            if whole.text.is_empty() && choice.text == whole.reasoning {
                choice.reasoning = std::mem::take(&mut choice.text);
            }
        }
    }
    for (index, choice) in &wanted.choices {
        assert_eq!(got.choices.get(index), Some(choice), "choice {index} of {body}");
    }
    assert_eq!((got.usage, got.done), (wanted.usage, wanted.done), "{body}");
    assert_eq!(got, wanted, "{body}");
    seams
}

/// `PROPTEST_CASES` new ones, or the same each time, as many as take a few seconds: what only one in ten
/// thousand shows is to be looked for, not to be stumbled on.
fn config() -> ProptestConfig {
    let wanted = std::env::var("PROPTEST_CASES").ok().and_then(|count| count.parse().ok());
    let rng_seed = wanted.map_or(RngSeed::Fixed(20_261_122), |_: u32| RngSeed::Random);
    let cases = wanted.unwrap_or(400);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_stream_that_was_cut_says_what_an_uninterrupted_one_says(case in cases()) {
        check(&case);
    }
}

/// Where the engine says again what it said, and the end of that stands in what is new, too: " no" in
/// "ñ not".
#[test]
fn a_repetition_is_told_from_what_is_new() {
    let case = Case {
        chat: true,
        n: 3,
        max_tokens: 10,
        min_tokens: 0,
        stops: Vec::new(),
        shows_stop: false,
        logprobs: None,
        usage: false,
        running: false,
        ids: false,
        eos_every: 0,
        coalesce: 3,
        think_end: None,
        marker: false,
        marker_known: false,
        split_prompt: false,
        salt: 777_019_930,
        cuts: vec![(13, 0, None)],
    };
    assert!(check(&case) > 0, "it was not cut");
}

/// The prompt ends inside a character, so its text is the engine's; another process, which does not know
/// how much that was, is itself cut inside a character.
#[test]
fn a_repetition_is_told_by_a_process_that_does_not_know_how_much_was_said() {
    let case = Case {
        chat: false,
        n: 3,
        max_tokens: 42,
        min_tokens: 3,
        stops: vec![(38, 5)],
        shows_stop: false,
        logprobs: None,
        usage: false,
        running: false,
        ids: false,
        eos_every: 0,
        coalesce: 4,
        think_end: None,
        marker: false,
        marker_known: false,
        split_prompt: true,
        salt: 3_685_792_027,
        cuts: vec![(10, 0, Some(10))],
    };
    assert!(check(&case) > 0, "it was not cut");
}

/// " m" ends "onon m", which began before the cut; the engine sees only the space in it. That is no reason
/// to say anything wrong.
#[test]
fn a_stop_string_that_hides_another_one_is_not_believed() {
    let case = Case {
        chat: false,
        n: 3,
        max_tokens: 15,
        min_tokens: 6,
        stops: vec![(10, 6), (20, 1)],
        shows_stop: false,
        logprobs: None,
        usage: false,
        running: false,
        ids: false,
        eos_every: 0,
        coalesce: 1,
        think_end: None,
        marker: false,
        marker_known: false,
        split_prompt: false,
        salt: 591_840_307,
        cuts: vec![(16, 0, None)],
    };
    check(&case);
}

/// Reasoning begins and ends in one event of one choice; another process takes over before any other
/// choice has said anything.
#[test]
fn that_a_model_reasons_is_known_behind_an_event_in_which_it_had_done_so() {
    let case = Case {
        chat: true,
        n: 3,
        max_tokens: 2,
        min_tokens: 1,
        stops: Vec::new(),
        shows_stop: false,
        logprobs: None,
        usage: false,
        running: false,
        ids: false,
        eos_every: 0,
        coalesce: 3,
        think_end: Some(1),
        marker: true,
        marker_known: true,
        split_prompt: false,
        salt: 0,
        cuts: vec![(4, 0, Some(4))],
    };
    assert!(check(&case) > 0, "it was not cut");
}

/// One event ends a stop string that began before the cut, and has another one behind it, which is all that
/// the engine sees and comes first in the list.
#[test]
fn a_stop_string_that_ends_before_another_one_in_an_event_ends_the_text() {
    let case = Case {
        chat: true,
        n: 1,
        max_tokens: 8,
        min_tokens: 0,
        stops: vec![(31, 7), (21, 8)],
        shows_stop: false,
        logprobs: None,
        usage: false,
        running: false,
        ids: false,
        eos_every: 0,
        coalesce: 3,
        think_end: None,
        marker: false,
        marker_known: false,
        split_prompt: false,
        salt: 3_364_298_896,
        cuts: vec![(4, 0, None)],
    };
    assert!(check(&case) > 0, "it was not cut");
}
