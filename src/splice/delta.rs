//! One choice of an event of a leg that speaks the client's dialect: what of it the client gets now,
//! what waits, and what it says of the choice's state.

use std::sync::Arc;

use super::choice::Channel;
use super::json::{self, Span};
use super::logprobs::{self, Piece};
use super::own::named;
use super::plan::Plan;
use super::render::{self, Head, Patch};
use super::scan::{Choice as Said, Scan, said, some};
use super::sse::Event;
use super::stops;
use super::stream::{Failure, LOGPROBS, LegId, NO_IDS, Out, Progress, Splice, TOOL};

const NULL: &[u8] = b"null";

/// What an event says of one choice.
pub(super) struct Turn<'d> {
    leg: LegId,
    event: &'d Event,
    data: &'d [u8],
    scan: &'d Scan,
    choice: &'d Said,
    plan: Arc<Plan>,
    continues: bool,
    /// Which choice, and how many ids it had before.
    at: usize,
    before: usize,
    content: Option<&'d [u8]>,
    reasoning: Option<&'d [u8]>,
    reasoning_content: Option<&'d [u8]>,
    /// The text, wherever it goes.
    raw: Option<&'d [u8]>,
    /// Where its reasoning goes, if it has some; and where its text goes.
    thinks: Channel,
    channel: Channel,
    finish: Option<&'d [u8]>,
    stop: Option<&'d [u8]>,
    by_string: bool,
    /// The text of a token that ends the text shows, because stop strings were asked to show.
    shows_token: bool,
}

/// What is changed in the client's event.
#[derive(Default)]
struct Changes {
    /// Text in place of the engine's, quoted; in a delta, where the event has no place for it.
    text: Vec<u8>,
    /// The event has a place for the text.
    fits: bool,
    lists: Vec<u8>,
    ids: Vec<u8>,
}

impl<'d> Turn<'d> {
    fn of(splice: &Splice, leg: LegId, event: &'d Event, scan: &'d Scan, choice: &'d Said) -> Self {
        let (data, plan) = (&event.data[..], Arc::clone(&splice.plan));
        let content = said(data, choice.content);
        let reasoning = said(data, choice.reasoning);
        let reasoning_content = said(data, choice.reasoning_content);
        let raw = match splice.chat {
            true => content.or(reasoning).or(reasoning_content),
            false => said(data, choice.text),
        };
        let thinks = match (reasoning.is_some(), reasoning_content.is_some()) {
            (true, true) => Channel::Both,
            (true, false) => Channel::Reasoning,
            (false, true) => Channel::ReasoningContent,
            (false, false) => Channel::Unset,
        };
        let channel = if content.is_some() { Channel::Content } else { thinks };
        let (finish, stop) = (some(data, choice.finish), some(data, choice.stop));
        let by_string = stop.is_some_and(|stop| stop[0] == b'"');
        let stopped = finish == Some(b"\"stop\"");
        let shows_token = plan.hides_stop() && stopped && !by_string && plan.shows_stop_token(stop);
        let at = choice.index as usize;
        let before = splice.choices.get(at).map_or(0, |state| state.ids.len());
        let continues = plan.continues();
        Self {
            leg,
            event,
            data,
            scan,
            choice,
            plan,
            continues,
            at,
            before,
            content,
            reasoning,
            reasoning_content,
            raw,
            thinks,
            channel,
            finish,
            stop,
            by_string,
            shows_token,
        }
    }

    /// The changes to the event.
    fn patch<'p>(&'p self, head: &'p Head, changes: &'p Changes, hides: bool) -> Patch<'p> {
        let (data, choice) = (self.data, self.choice);
        let mut patch = named(self.leg, data, self.scan, head);
        if self.continues && !self.plan.token_ids {
            patch.set(data, self.scan.prompt_token_ids, NULL);
            patch.set(data, choice.prompt_token_ids, NULL);
            match choice.is_sglang {
                false => patch.set(data, choice.token_ids, NULL),
                true => {
                    let whole = |value| render::whole_member(data, "token_ids", value);
                    patch.set(data, choice.token_ids.map(whole), b"");
                }
            }
        }
        if !changes.ids.is_empty() {
            patch.set(data, choice.token_ids, &changes.ids);
        }
        if !changes.lists.is_empty() {
            patch.set(data, choice.logprobs, &changes.lists);
        }
        let text = &changes.text;
        if !changes.fits {
            // Held text that comes out with an event that has no place for it.
            let place = if self.content_is_text() { choice.text } else { choice.delta };
            patch.set(data, place, text);
        } else if hides && self.raw.map_or(&b"\"\""[..], |raw| raw) != text {
            let set = |place: Option<Span>| place.filter(|place| place.of(data).first() == Some(&b'"'));
            if self.content_is_text() {
                patch.set(data, choice.text, text);
            } else if self.content.is_some() {
                patch.set(data, set(choice.content), text);
            } else {
                patch.set(data, set(choice.reasoning).filter(|_| self.reasoning.is_some()), text);
                let other = set(choice.reasoning_content).filter(|_| self.reasoning_content.is_some());
                patch.set(data, other, text);
            }
        }
        patch
    }

    /// It is a completion, whose text stands in the choice itself.
    fn content_is_text(&self) -> bool {
        self.plan.route() != super::plan::StreamRoute::Chat
    }
}

impl Splice {
    pub(super) fn own_choice(
        &mut self,
        leg: LegId,
        event: &Event,
        scan: &Scan,
        choice: &Said,
        head: &Head,
        out: &mut Vec<Out>,
    ) -> Progress {
        if let Some(reason @ (b"\"abort\"" | b"\"error\"")) = some(&event.data, choice.finish) {
            let reason = String::from_utf8_lossy(reason).trim_matches('"').to_owned();
            return Progress::Failed(Failure::Aborted(reason));
        }
        if self.choice(choice.index).is_none_or(|state| state.finished) {
            return match (choice.index as usize) < self.choices.len() {
                true => Progress::Going,
                false => Progress::Failed(Failure::Malformed("it has a choice that was not asked for")),
            };
        }
        let turn = Turn::of(self, leg, event, scan, choice);
        self.take_turn(&turn, head, out).unwrap_or_else(Progress::Failed)
    }

    fn take_turn(&mut self, turn: &Turn<'_>, head: &Head, out: &mut Vec<Out>) -> Result<Progress, Failure> {
        let (plan, choice, at) = (&turn.plan, turn.choice, turn.at);
        let count = self.own_ids(turn)?;
        // The token that ends the reasoning is the last of this event: what comes next goes elsewhere.
        let ends =
            plan.options.reasoning_end.filter(|_| self.chat && turn.continues && turn.channel.reasons());
        let ended = ends.is_some_and(|end| self.choices[at].ids[turn.before..].contains(&end));
        let hides = turn.continues && plan.searches();
        let shown = if hides { Some(self.own_held(turn, ended, out)?) } else { None };
        let emitted = shown.as_ref().map_or(turn.raw.is_some(), |text| !text.is_empty());
        self.own_text(turn, count, ended);

        // What an engine says a second time, and what the client is better told later.
        let state = &mut self.choices[at];
        let role = choice.role.is_some() && !state.role;
        let again = choice.role.is_some() && state.role;
        if role {
            state.role = true;
            state.dirty.role = turn.continues;
        }
        let lists = self.own_lists(turn);
        let bare = !emitted && turn.finish.is_none() && !choice.tool && !choice.other;
        if bare && !role {
            let state = &mut self.choices[at];
            if again || turn.continues && (plan.shows_more() || state.blank(turn.raw.is_some())) {
                state.waiting.extend(lists.map(|lists| (state.ids.len(), lists)));
                return Ok(Progress::Going);
            }
        }

        let changes = self.own_changes(turn, shown.as_deref(), lists);
        let mut patch = turn.patch(head, &changes, hides);
        let state = &mut self.choices[at];
        state.spoke |= emitted || turn.finish.is_some() || choice.tool;
        if emitted {
            state.shows();
        }
        if turn.finish.is_some() {
            if turn.continues {
                state.finish();
            }
            state.finished = true;
            state.leg = None;
        }
        let waits = turn.continues && !plan.usage && turn.finish.is_some() && turn.scan.fingerprint.is_none();
        if waits && self.all_finished() {
            self.last = Some((choice.index, patch.line(turn.data)));
        } else if patch.is_empty() {
            self.emit_lines(Some(choice.index), turn.event.lines.clone(), out);
        } else {
            let line = patch.line(turn.data);
            self.emit(Some(choice.index), line, out);
        }
        Ok(Progress::Going)
    }

    /// Keeps the ids of what came. How many there were.
    fn own_ids(&mut self, turn: &Turn<'_>) -> Result<usize, Failure> {
        let at = turn.at;
        if !turn.continues {
            return Ok(0);
        }
        self.own_prompt(at, turn.data, turn.scan, turn.choice);
        let mut count = 0;
        if let Some(ids) = some(turn.data, turn.choice.token_ids)
            && json::ids(ids, &mut self.choices[at].ids).is_some()
        {
            count = self.choices[at].ids.len() - turn.before;
            if turn.shows_token && turn.raw.is_some() && count != 1 {
                self.choices[at].ids.truncate(turn.before);
                return Err(Failure::Ambiguous(
                    "the text of the token that ended the generation cannot be told from what came before",
                ));
            }
            self.count_kept(count);
        } else if turn.raw.is_some() {
            self.choices[at].ids.truncate(turn.before);
            // A chat's echo is no generated text and has no ids.
            if !(turn.plan.echo && self.choices[at].total() == 0) {
                self.choices[at].uncounted += 1;
                self.break_off(NO_IDS);
            }
        }
        if turn.choice.tool {
            self.break_off(TOOL);
        }
        if let Some(content) = turn.content.filter(|_| turn.plan.tools) {
            self.note_opening(at, content);
        }
        Ok(count)
    }

    /// Keeps back what may become a stop string; the text that is handed out now.
    fn own_held(&mut self, turn: &Turn<'_>, ended: bool, out: &mut Vec<Out>) -> Result<String, Failure> {
        let (plan, at) = (&turn.plan, turn.at);
        let turns = turn.channel != Channel::Unset && turn.channel != self.choices[at].channel;
        let mixed = turn.content.is_some() && turn.thinks != Channel::Unset;
        if self.chat && (turns || mixed) && !self.choices[at].held.is_empty() {
            self.flush_held(at, out);
        }
        let text = match turn.raw.filter(|_| !turn.shows_token).map(json::string) {
            Some(text) => text.ok_or(Failure::Malformed("its text is no text"))?,
            None => "".into(),
        };
        let state = &mut self.choices[at];
        let mut joined = std::mem::take(&mut state.held);
        state.dirty.held |= !joined.is_empty();
        joined.push_str(&text);
        if let Some(finish) = turn.finish {
            let cuts = turn.by_string && finish == b"\"stop\"" && !plan.shows_stop;
            let string = turn.stop.filter(|_| cuts).and_then(json::string);
            if let Some(start) = string.and_then(|string| joined.rfind(string.as_ref())) {
                joined.truncate(start);
            }
            return Ok(joined);
        }
        let keep = match ended {
            // Engines look for them in the raw text, where the marker is in between.
            true => joined.len(),
            false => stops::held(plan.stops.iter().map(String::as_str), &joined),
        };
        state.held = joined.split_off(keep);
        state.dirty.held |= !state.held.is_empty();
        Ok(joined)
    }

    /// Notes that text came, and where it goes.
    fn own_text(&mut self, turn: &Turn<'_>, count: usize, ended: bool) {
        let Some(raw) = turn.raw else { return };
        let state = &mut self.choices[turn.at];
        if turn.continues {
            state.characters += json::characters(raw);
            let unseen = state.ids.len() - state.safe;
            let unclear = count > 1 || keeps_back(&turn.plan, self.chat, turn.channel, unseen, raw);
            if self.chat && turn.channel != state.channel {
                state.text_breaks();
            }
            // Text that was no text has failed before.
            state.text_came(unclear, &json::string(raw).unwrap_or_default());
            if ended {
                state.text_breaks();
            }
        }
        if self.chat {
            let channel = if ended { Channel::Content } else { turn.channel };
            if turn.thinks != Channel::Unset && turn.thinks != channel {
                state.pass(turn.thinks);
            }
            state.turn_to(channel);
            if turn.thinks != Channel::Unset {
                self.reasoning = turn.thinks;
            }
        }
    }

    /// The log probabilities of an event.
    fn own_lists(&mut self, turn: &Turn<'_>) -> Option<Piece> {
        let wanted = turn.plan.logprobs && turn.continues;
        let raw = some(turn.data, turn.choice.logprobs).filter(|_| wanted)?;
        let lists = logprobs::take(self.chat, raw);
        match &lists {
            None => self.break_off(LOGPROBS),
            Some(lists) if !self.chat => {
                self.choices[turn.at].note_offsets(lists, turn.raw.map_or(0, json::characters));
            }
            Some(_) => {}
        }
        lists
    }

    /// What the client's event has in place of what the engine's has.
    fn own_changes(&mut self, turn: &Turn<'_>, shown: Option<&str>, lists: Option<Piece>) -> Changes {
        let state = &mut self.choices[turn.at];
        let mut changes = Changes::default();
        if let Some(shown) = shown {
            json::quote(shown, &mut changes.text);
        }
        changes.fits = turn.raw.is_some() || changes.text.len() <= 2;
        if !changes.fits && self.chat {
            changes.text = render::delta(state.channel, &changes.text);
        }
        if turn.continues && turn.plan.token_ids && state.journaled < turn.before {
            json::write_ids(&state.ids[state.journaled..], &mut changes.ids);
        }
        if turn.continues && !state.waiting.is_empty() {
            let waiting = std::mem::take(&mut state.waiting);
            let pieces = waiting.iter().map(|(_, piece)| piece).chain(&lists);
            changes.lists = logprobs::join(self.chat, pieces);
        }
        changes
    }
}

/// Whether the engine's parser kept back what the last of `unseen` ids says, and shows with it what
/// others said before.
///
/// A parser keeps back what may become one of its markers, and says so only where this is all of an
/// event. Engines never show an incomplete character before the next one is known: text that ends
/// with one has something behind it that is kept back. And text that begins a marker was kept back
/// itself, and may be followed by another beginning of one (`<` by `<`). A token whose own text
/// has something else before such a beginning is not known by anything; where one token is the
/// marker there is none, and no model's tokens are known to be cut like that.
fn keeps_back(plan: &Plan, chat: bool, channel: Channel, unseen: usize, raw: &[u8]) -> bool {
    let reasons = channel.reasons() && plan.options.reasoning_end.is_none();
    if !chat || !(reasons || plan.tools) {
        return false;
    }
    let Some(text) = json::string(raw) else { return false };
    let closes = reasons.then_some(&plan.options.reasoning.1);
    let mut markers = closes.into_iter().chain(plan.options.tool_markers.iter().filter(|_| plan.tools));
    text.ends_with(char::REPLACEMENT_CHARACTER)
        || unseen > 1 && markers.any(|marker| marker.len() > text.len() && marker.starts_with(text.as_ref()))
}
