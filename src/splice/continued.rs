//! Events of a leg that goes on behind a cut. It is a completion of token ids, whatever the client
//! asked: its raw text is turned into the client's shape.

use super::choice::{Channel, End};
use super::json;
use super::logprobs;
use super::pass::message;
use super::render::{self, Parts};
use super::scan::{said, scan, some};
use super::sse::Event;
use super::stops;
use super::stream::{Failure, LOGPROBS, NO_IDS, Out, Progress, REASONS, Splice, TOOL};

/// A stretch of raw text that goes to one channel.
struct Segment {
    channel: Channel,
    text: String,
    /// Where it ends in the raw text.
    end: usize,
}

impl Splice {
    pub(super) fn push_continued(&mut self, at: usize, event: &Event, out: &mut Vec<Out>) -> Progress {
        let data = &event.data[..];
        if data == b"[DONE]" {
            // The leg would be over if its choice had been finished.
            return Progress::Failed(Failure::Truncated);
        }
        let Some(scan) = scan(data).filter(|_| std::str::from_utf8(data).is_ok()) else {
            return Progress::Failed(Failure::Malformed("it is no JSON object"));
        };
        if some(data, scan.error).is_some() {
            return Progress::Failed(Failure::Error(message(data)));
        }
        if let Some(value) = some(data, scan.fingerprint)
            && self.fingerprint.is_none()
        {
            self.fingerprint = Some(value.to_vec());
            self.unwritten.fingerprint = true;
            self.unwritten.any = true;
        }
        let Some(choice) = &scan.first else { return Progress::Going };
        let finish = some(data, choice.finish);
        if let Some(reason @ (b"\"abort\"" | b"\"error\"")) = finish {
            let reason = String::from_utf8_lossy(reason).trim_matches('"').to_owned();
            return Progress::Failed(Failure::Aborted(reason));
        }
        let plan = self.plan.clone();
        let stop = some(data, choice.stop);
        let by_token = finish == Some(b"\"stop\"") && stop.is_none_or(|stop| stop[0] != b'"');
        // Stop strings make the engine show what ends the text; only strings are shown on.
        let shows_token = by_token && !plan.stops.is_empty() && plan.shows_stop_token(stop);
        let Some(mut text) = said(data, choice.text).map_or(Some("".into()), json::string) else {
            return Progress::Failed(Failure::Malformed("its text is no text"));
        };
        let mut ids = Vec::new();
        let known = some(data, choice.token_ids).is_some_and(|raw| json::ids(raw, &mut ids).is_some());
        if shows_token && !text.is_empty() && !plan.shows_stop {
            if ids.len() != 1 {
                return Progress::Failed(Failure::Ambiguous(
                    "the text of the token that ended the generation cannot be told from what came before",
                ));
            }
            text = "".into();
        }

        // A cut inside a character, which only a chunk of several tokens can hide, makes the
        // engine say its whole prompt again before it goes on.
        let by_string = finish == Some(b"\"stop\"") && !by_token;
        let may_repeat = self.choices[at].guard.is_some() && !self.choices[at].leg_spoke;
        if by_string && may_repeat {
            // The engine may have found the string in what it said again.
            return Progress::Failed(Failure::Ambiguous("what ended the text may be a repetition"));
        }
        let prompt = self.prompts.get(self.prompt_of(at)).and_then(Option::as_ref).map_or(0, |ids| ids.len());
        let state = &mut self.choices[at];
        // A repetition has the prompt's text, of at least so many characters, and all that was generated.
        // Even a prompt of ids may end inside a character: then its text was said with the first tokens,
        // and is among the generated.
        let least = if plan.echo { 0 } else { (prompt as u64 / 4).max(1) };
        let (said, more) = (state.characters, state.more_characters);
        let fits = |count: u64| {
            count >= said + least || plan.prompt_of_ids && (count == said || more && count > said)
        };
        state.leg_spoke |= !text.is_empty();
        if !text.is_empty()
            && may_repeat
            && let Some(guard) = state.guard.as_deref()
            && let Some(end) = repeated(guard, &text, fits)
        {
            let Some(end) = end else {
                return Progress::Failed(Failure::Ambiguous(
                    "the engine says again what it said, and where that ends cannot be told",
                ));
            };
            state.leaked += text[..end].chars().count() as u64;
            text = text[end..].to_owned().into();
        }
        // The engine sees stop strings in what it says itself, but not those that begin before.
        let state = &self.choices[at];
        let old = state.held.len();
        let mut joined = [&state.held, &*text].concat();
        let before = state.total();
        let begun = |hit: &stops::Hit| hit.start < state.carried;
        let hit = match ids.len() {
            // Of those that end in one token the first in the list counts, which may be one that the engine
            // has found itself.
            0 | 1 => stops::find(&plan.stops, &joined, old).filter(begun),
            _ => {
                let mut hits = stops::each(&plan.stops, &joined, old).filter(begun);
                let hit = hits.next();
                if hits.next().is_some() {
                    return Progress::Failed(Failure::Ambiguous(
                        "which of several stop strings came first cannot be told",
                    ));
                }
                let found = stop.filter(|_| by_string).and_then(json::string);
                let found = found.and_then(|found| plan.stops.iter().position(|stop| *stop == found));
                hit.filter(|hit| hit.end < joined.len() || found.is_none_or(|found| hit.which < found))
            }
        };
        let hit = hit.filter(|_| before + ids.len() as u64 > plan.min_tokens);
        if hit.is_some() && ids.len() > 1 && before < plan.min_tokens {
            return Progress::Failed(Failure::Ambiguous(
                "whether a stop string came before or after min_tokens cannot be told",
            ));
        }
        // The token whose text has the string that the engine found may go on behind it, and end one that
        // begins before and comes first in the list. What is behind is not shown.
        if by_string
            && hit.is_none()
            && let Some(found) = stop.and_then(json::string)
            && let Some(which) = plan.stops.iter().position(|stop| *stop == found)
        {
            // A leg is asked to show what ends it.
            let end = if joined.ends_with(&*found) { "" } else { &*found };
            let before = plan.stops[..which].iter().map(String::as_str);
            if stops::held(before, &[&joined, end].concat()) < state.carried {
                return Progress::Failed(Failure::Ambiguous("a stop string may end behind another one"));
            }
        }
        // An engine that had seen the string would have stopped within these tokens. The text is cut all
        // the same; that a few too many are counted is no reason to lose the stream.
        let shows_tokens = plan.token_ids || plan.logprobs;
        // Behind the string there may be one without text: what ended the generation, or a part of a character.
        if shows_tokens && ids.len() > 1 && hit.is_some() {
            return Progress::Failed(Failure::Ambiguous(
                "which tokens are behind the stop string cannot be told",
            ));
        }
        let state = &mut self.choices[at];
        if !known {
            ids.clear();
            if !text.is_empty() {
                state.uncounted += 1;
                self.break_off(NO_IDS);
            }
        }
        let state = &mut self.choices[at];
        state.ids.extend_from_slice(&ids);
        let count = ids.len();
        self.count_kept(count);
        let state = &mut self.choices[at];
        let characters = text.chars().count() as u64;
        if !text.is_empty() {
            state.characters += characters;
            state.text_came(count > 1, &text);
        }
        if let Some(raw) = some(data, choice.logprobs).filter(|_| plan.logprobs) {
            let shift = (state.shift(), state.surplus());
            match logprobs::convert(self.chat, raw, shift, plan.top_logprobs) {
                Some(piece) => {
                    if !self.chat {
                        state.note_offsets(&piece, characters);
                    }
                    state.waiting.push((state.ids.len(), piece));
                }
                None => self.break_off(LOGPROBS),
            }
        }

        let state = &mut self.choices[at];
        state.dirty.held |= old > 0;
        state.held.clear();
        let mut end =
            finish.map(|reason| End { reason: reason.to_vec(), stop: stop.unwrap_or(b"null").to_vec() });
        if let Some(hit) = hit {
            joined.truncate(if plan.shows_stop { hit.end } else { hit.start });
            let mut stop = Vec::new();
            json::quote(&plan.stops[hit.which], &mut stop);
            end = Some(End { reason: b"\"stop\"".to_vec(), stop });
        } else if finish == Some(b"\"stop\"")
            && !plan.shows_stop
            && let Some(string) = stop.filter(|_| !by_token).and_then(json::string)
            && let Some(start) = joined.rfind(string.as_ref())
        {
            joined.truncate(start);
        }
        if plan.tools && stops::find(&plan.options.tool_markers, &joined, old).is_some() {
            self.break_off(TOOL);
            return Progress::Failed(Failure::Ambiguous("a tool call begins in the raw text"));
        }
        let (opens, closes) = &plan.options.reasoning;
        let state = &mut self.choices[at];
        if self.chat && state.channel == Channel::Unset && self.reasoning == Channel::Unset {
            state.guess();
        }
        if state.guessed
            && (!closes.is_empty() && joined.contains(closes.as_str())
                || state.channel == Channel::Unset && !opens.is_empty() && joined.starts_with(opens.as_str()))
        {
            self.break_off(REASONS);
            return Progress::Failed(Failure::Ambiguous("it may be a marker of reasoning, or text"));
        }
        let before = out.len();
        let progress = self.speak(at, joined, end, out);
        let is_silent = count == 0 || plan.shows_more() || !self.says_blanks();
        if progress == Progress::Going
            && out.len() == before
            && !is_silent
            && !self.choices[at].blank(!text.is_empty())
        {
            self.emit_text(at, "", out);
        }
        progress
    }

    /// Whether engines of this kind send an event for a token whose text has to wait. SGLang's chats do not.
    fn says_blanks(&self) -> bool {
        !(self.chat && self.head.as_ref().is_some_and(|head| head.sglang))
    }

    /// Hands out raw text of a choice, all of it if this is the end, else without what may still
    /// become something else.
    pub(super) fn speak(&mut self, at: usize, raw: String, end: Option<End>, out: &mut Vec<Out>) -> Progress {
        let mut segments = self.segments(at, &raw, end.is_some());
        if let Some(content) = segments.iter().find(|segment| segment.channel == Channel::Content)
            && self.plan.tools
        {
            let text = content.text.clone();
            let before = self.broken;
            self.note_opening_text(at, &text);
            if before.is_none() && self.broken.is_some() {
                return Progress::Failed(Failure::Ambiguous("its content may be a tool call"));
            }
        }
        segments.retain(|segment| !segment.text.is_empty());
        let held_from = raw.len() - self.choices[at].held.len();
        if segments.is_empty() && end.is_some() {
            let channel = self.choices[at].channel;
            segments.push(Segment { channel, text: String::new(), end: raw.len() });
        }
        let count = segments.len();
        for (number, segment) in segments.into_iter().enumerate() {
            let is_last = number + 1 == count;
            let rest = match is_last {
                true => &raw[held_from..],
                // Another process that continues between two of them has the rest to say.
                false => &raw[segment.end..],
            };
            let state = &mut self.choices[at];
            state.hold(rest);
            let after = match is_last {
                true => state.after,
                false => segment.channel,
            };
            state.turn_to(after);
            match &end {
                Some(end) if is_last => state.finishing = Some(end.clone()),
                Some(end) => {
                    state.ending = Some(end.clone());
                    state.dirty.ending = true;
                }
                None => {}
            }
            self.emit_segment(at, segment.channel, &segment.text, out);
        }
        if count == 0 {
            // What changed without an event is in the next one's entry.
            let after = self.choices[at].after;
            self.choices[at].turn_to(after);
        }
        if end.is_none() {
            return Progress::Going;
        }
        if self.all_finished() {
            self.finish(out);
            return Progress::Done;
        }
        Progress::LegDone
    }

    /// Splits raw text by the markers of reasoning. What has to wait is left in `held`, and where
    /// the text goes behind it in `after`.
    fn segments(&mut self, at: usize, raw: &str, all: bool) -> Vec<Segment> {
        let plan = self.plan.clone();
        let (opens, closes) = &plan.options.reasoning;
        let chat = self.chat;
        let known = self.reasoning;
        let state = &mut self.choices[at];
        let mut channel = state.channel;
        let mut segments = Vec::new();
        let mut from = 0;
        if chat && channel == Channel::Unset && !opens.is_empty() {
            if raw.starts_with(opens.as_str()) && known != Channel::Unset {
                channel = known;
                from = opens.len();
            } else if all || raw.len() >= opens.len() || !opens.starts_with(raw) {
                // A model that was seen to reason begins with that, its marker being in the prompt.
                channel = if known == Channel::Unset { Channel::Content } else { known };
            }
        }
        if chat
            && channel.reasons()
            && !closes.is_empty()
            && let Some(found) = raw[from..].find(closes.as_str())
        {
            let text = raw[from..from + found].to_owned();
            segments.push(Segment { channel, text, end: from + found });
            from += found + closes.len();
            channel = Channel::Content;
        }
        let keep = if all {
            raw.len()
        } else {
            let stops = plan.stops.iter().map(String::as_str).filter(|_| plan.searches());
            let tools = plan.options.tool_markers.iter().map(String::as_str).filter(|_| plan.tools);
            let closes = (chat && (channel.reasons() || state.guessed)).then_some(closes.as_str());
            let opens = (chat && channel == Channel::Unset).then_some(opens.as_str());
            from + stops::held(stops.chain(tools).chain(closes).chain(opens), &raw[from..])
        };
        segments.push(Segment { channel, text: raw[from..keep].to_owned(), end: keep });
        state.after = channel;
        state.carried = state.carried.saturating_sub(keep);
        state.held.clear();
        state.held.push_str(&raw[keep..]);
        state.dirty.held |= keep < raw.len();
        segments
    }

    /// Hands out text in the channel that the choice is in.
    pub(super) fn emit_text(&mut self, at: usize, text: &str, out: &mut Vec<Out>) {
        self.emit_segment(at, self.choices[at].channel, text, out);
    }

    fn emit_segment(&mut self, at: usize, channel: Channel, text: &str, out: &mut Vec<Out>) {
        let Some(head) = self.head.clone() else { return };
        let plan = self.plan.clone();
        let prompt = self.prompt_of(at);
        let prompt = self.prompts.get(prompt).and_then(Option::as_ref).map_or(0, |ids| ids.len() as u64);
        let state = &mut self.choices[at];
        let end = state.finishing.take();
        if !text.is_empty() || end.is_some() {
            state.spoke = true;
            state.shows();
        }
        if end.is_some() {
            state.finish();
        }
        let safe = state.safe;
        let pieces = state.waiting.iter().filter(|(end, _)| *end <= safe).map(|(_, piece)| piece);
        let lists = match plan.logprobs && pieces.clone().next().is_some() {
            true => Some(logprobs::join(self.chat, pieces)),
            false => None,
        };
        state.waiting.retain(|(end, _)| *end > safe);
        let completion = state.uncounted + safe as u64;
        let state = &self.choices[at];
        let last = end.is_some() && self.all_finished();
        let fingerprint = self.fingerprint.as_deref().filter(|_| last && !plan.usage);
        let line = render::event(
            &head,
            self.chat,
            &Parts {
                index: at as u32,
                channel,
                text,
                logprobs: lists.as_deref(),
                finish: end.as_ref().map(|end| (&end.reason[..], &end.stop[..])),
                ids: plan.token_ids.then(|| &state.ids[state.journaled.min(safe)..safe]),
                usage: plan.running_usage.then_some((prompt, completion)),
                fingerprint,
            },
        );
        self.emit(Some(at as u32), line, out);
    }
}

/// Where the new text begins, if `text` says again what was said until `said`; `Some(None)` if there are
/// several places where it may.
///
/// A first delta that is longer than all before it, which as many characters as `fits` may be, and has the
/// end of that in it, is nothing else. What is new begins with the character that the cut went through, so
/// with one of several bytes; or with what an engine takes out, like a mark of reasoning.
fn repeated(said: &str, text: &str, fits: impl Fn(u64) -> bool) -> Option<Option<usize>> {
    let (mut cut, mut other) = (Vec::new(), Vec::new());
    let (mut from, mut before) = (0, 0);
    while let Some(place) = text[from..].find(said) {
        let start = from + place;
        let end = start + said.len();
        before += text[from..start].chars().count() as u64;
        if fits(before + said.chars().count() as u64) {
            let is_cut = text[end..].chars().next().is_some_and(|new| !new.is_ascii());
            if is_cut { &mut cut } else { &mut other }.push(end);
        }
        // They may overlap.
        let Some(first) = text[start..].chars().next() else { break };
        before += 1;
        from = start + first.len_utf8();
    }
    match (&cut[..], &other[..]) {
        ([], []) => None,
        ([end], _) | ([], [end]) => Some(Some(*end)),
        _ => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use super::repeated;

    #[test]
    fn a_repetition_ends_before_the_character_that_was_cut() {
        let text = "A prompt, no less. Ω two fine noñ not";
        let end = text.find("ñ").unwrap();
        // "no" stands in the prompt, at the end of what was said, and in what is new.
        assert_eq!(repeated(" no", text, |count| count >= 19), Some(Some(end)));
        assert_eq!(repeated(" two fine no", text, |count| count >= 19), Some(Some(end)));
        assert_eq!(repeated(" else", text, |count| count >= 19), None);
        assert_eq!(repeated(" no", "ñ not", |count| count >= 19), None, "nothing was repeated");
        assert_eq!(repeated("fine", text, |count| count >= 19), Some(Some(end - 3)), "a mark comes first");
        assert_eq!(repeated(" no", " noñ", |count| count == 3), Some(Some(3)), "a prompt of ids");
    }

    #[test]
    fn what_may_end_in_several_places_is_not_guessed() {
        let text = "A prompt, no less. 😀😀😀😀";
        assert_eq!(repeated("😀😀", text, |count| count >= 7), Some(None));
        assert_eq!(repeated("less. 😀😀", text, |count| count >= 13), Some(Some(text.len() - 8)));
    }
}
