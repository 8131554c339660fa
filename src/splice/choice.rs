//! One choice of a stream: what was generated, what the client has of it, what was written down.

use super::journal::Op;
use super::logprobs::{Offsets, Piece};
use super::stream::LegId;

/// Where a chat's text goes. Engines and their versions name reasoning differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Channel {
    /// Nothing was said.
    #[default]
    Unset,
    Content,
    Reasoning,
    ReasoningContent,
    /// Under both names.
    Both,
}

impl Channel {
    pub(super) const ALL: [Channel; 5] =
        [Channel::Unset, Channel::Content, Channel::Reasoning, Channel::ReasoningContent, Channel::Both];

    pub(super) fn reasons(self) -> bool {
        !matches!(self, Channel::Unset | Channel::Content)
    }
}

/// Why a choice is at its end: `finish_reason` and `stop_reason`, as JSON.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct End {
    pub(super) reason: Vec<u8>,
    pub(super) stop: Vec<u8>,
}

/// What changed since the last entry, ids left out.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Dirty {
    pub(super) held: bool,
    pub(super) channel: bool,
    pub(super) opening: bool,
    pub(super) guard: bool,
    pub(super) role: bool,
    pub(super) ending: bool,
    pub(super) finished: bool,
    pub(super) guessed: bool,
    pub(super) setbacks: bool,
    pub(super) blanks: bool,
}

/// See the module.
#[derive(Default, Debug)]
pub(super) struct Choice {
    /// Generated ids. With `max_kept_tokens` exceeded, only what is not in the journal.
    pub(super) ids: Vec<u32>,
    /// So many of `ids` may be continued behind: the last of them had text, which is delivered or
    /// in `held`.
    pub(super) safe: usize,
    /// So many of `ids` are in the journal, and delivered where the client wants ids.
    pub(super) journaled: usize,
    /// Generated tokens whose ids are not in `ids`.
    pub(super) uncounted: u64,
    uncounted_journaled: u64,
    /// Tokens that the caller was told of.
    told: u64,
    /// Text of safe tokens that was not delivered.
    pub(super) held: String,
    pub(super) channel: Channel,
    /// Where it was within an event, since the last entry.
    passed: Option<Channel>,
    /// Characters of all text, or as many as are known of.
    pub(super) characters: u64,
    /// There are more: another process had counted them, which was cut where nobody needed to know.
    pub(super) more_characters: bool,
    /// Where the next token's text begins, of completions with log probabilities.
    offsets: Offsets,
    /// The same behind the last safe token.
    safe_offsets: Offsets,
    offsets_journaled: Offsets,
    /// Offset of the leg that goes on.
    leg_began: u64,
    /// Characters that the leg said although they were said before it.
    pub(super) leaked: u64,
    /// The leg that goes on has said text: it repeats nothing any more.
    pub(super) leg_spoke: bool,
    /// So many bytes of `held` are from before the leg that goes on.
    pub(super) carried: usize,
    /// That it does not reason is not known but taken from its siblings: nothing of it was seen.
    pub(super) guessed: bool,
    /// Engines in a row that were lost without getting on with it.
    setbacks: u32,
    /// Tokens that it had at the last of them.
    set_back_at: u64,
    /// Events without text that the client has of tokens behind the last safe one: an incomplete
    /// character's, as a rule.
    blanks: u32,
    /// So many of them the leg that goes on says again.
    owed: u32,
    /// First visible character of the content, if tools are offered.
    pub(super) opening: Option<char>,
    /// End of the text that came last, of at least `GUARD` characters where there was as much; it never
    /// has what an engine took out, as the markers of channels.
    tail: String,
    /// End of the text, if the last id may say more than that.
    pub(super) guard: Option<String>,
    pub(super) role: bool,
    pub(super) ending: Option<End>,
    /// The end that the next event tells.
    pub(super) finishing: Option<End>,
    /// Where text goes behind what is handed out next.
    pub(super) after: Channel,
    pub(super) finished: bool,
    /// The client has seen something of it besides its role, or the journal has.
    pub(super) spoke: bool,
    /// Log probabilities of tokens that were not delivered, each with how many ids there were then.
    pub(super) waiting: Vec<(usize, Piece)>,
    pub(super) leg: Option<LegId>,
    pub(super) dirty: Dirty,
}

/// Tokens by which an engine has got on with a choice: its loss begins a new row then. Fewer may be
/// what it takes to make the next one fail by the same.
const PROGRESS: u64 = 16;

/// Characters of a guard. The more there are, the less often the same stands elsewhere in a text; they
/// are in the journal of every event whose last token may be unfinished.
const GUARD: usize = 32;

impl Choice {
    /// Tokens generated.
    pub(super) fn total(&self) -> u64 {
        self.uncounted + self.ids.len() as u64
    }

    /// Notes that an engine was lost that went on with it.
    pub(super) fn set_back(&mut self) {
        let kept = self.uncounted + self.safe as u64;
        let got_on = kept >= self.set_back_at + PROGRESS;
        self.setbacks = if got_on { 1 } else { self.setbacks.saturating_add(1) };
        self.set_back_at = kept;
        self.dirty.setbacks = true;
    }

    /// Engines in a row that were lost without getting on with it.
    pub(super) fn setbacks(&self) -> u32 {
        self.setbacks
    }

    /// Notes that what is taken for its content may be reasoning.
    pub(super) fn guess(&mut self) {
        self.dirty.guessed |= !self.guessed;
        self.guessed = true;
    }

    /// Notes that another leg goes on from here.
    pub(super) fn begin_leg(&mut self) {
        self.leg_began = self.safe_offsets.next();
        self.carried = self.held.len();
        self.leaked = 0;
        self.leg_spoke = false;
        self.owed = self.blanks;
    }

    /// Forgets all but what the client was told: the role.
    pub(super) fn begin_again(&mut self) {
        let dirty = Dirty { role: self.dirty.role, ..Dirty::default() };
        let (told, blanks) = (self.told, self.blanks);
        *self = Self { role: self.role, told, blanks, owed: blanks, dirty, ..Self::default() };
    }

    /// Takes note of an event that shows nothing. Its token is `safe` if its text is held. Whether the
    /// client has it already, because the leg says again what was behind the cut.
    pub(super) fn blank(&mut self, safe: bool) -> bool {
        let again = self.owed > 0;
        self.owed = self.owed.saturating_sub(1);
        let blanks = match (safe, again) {
            (true, _) => self.owed,
            (false, true) => self.blanks,
            (false, false) => self.blanks + 1,
        };
        self.dirty.blanks |= blanks != self.blanks;
        self.blanks = blanks;
        again
    }

    /// Takes note of an event that shows text.
    pub(super) fn shows(&mut self) {
        (self.blanks, self.owed) = (0, 0);
    }

    /// How far a leg's offsets into the text are behind the client's.
    pub(super) fn shift(&self) -> u64 {
        self.leg_began
    }

    /// What a leg's offsets count that the client was told before.
    pub(super) fn surplus(&self) -> u64 {
        if self.offsets.by_text() { self.leaked } else { 0 }
    }

    /// Notes where the tokens of an event begin, as the client is told, whose text has so many
    /// characters. Whether the tokens are safe is noted already.
    pub(super) fn note_offsets(&mut self, piece: &Piece, characters: u64) {
        self.offsets.note(piece, characters);
        if self.safe == self.ids.len() {
            self.safe_offsets = self.offsets;
        }
    }

    /// Forgets what came behind the safe cut: it is generated again.
    pub(super) fn cut(&mut self) {
        self.ids.truncate(self.safe);
        let safe = self.safe;
        self.waiting.retain(|(end, _)| *end <= safe);
        self.offsets = self.safe_offsets;
    }

    /// Notes text that came with the last ids. It is `unclear` where the last of them may say more
    /// than that: there are several, or the engine may have kept back what the last one says.
    pub(super) fn text_came(&mut self, unclear: bool, text: &str) {
        self.safe = self.ids.len();
        if self.tail.len() + text.len() > 3 * GUARD * size_of::<char>() {
            let keep = end_of(&self.tail).len();
            self.tail.drain(..self.tail.len() - keep);
        }
        self.tail.push_str(end_of(text));
        if unclear || self.guard.is_some() {
            let guard = unclear.then(|| end_of(&self.tail).to_owned());
            self.dirty.guard |= guard != self.guard;
            self.guard = guard;
        }
    }

    /// Notes that there is something between the text before and the text behind that nobody sees.
    pub(super) fn text_breaks(&mut self) {
        self.tail.clear();
    }

    pub(super) fn hold(&mut self, text: &str) {
        if self.held != text {
            self.held.clear();
            self.held.push_str(text);
            self.dirty.held = true;
        }
    }

    pub(super) fn turn_to(&mut self, channel: Channel) {
        if self.channel != channel {
            self.channel = channel;
            self.dirty.channel = true;
        }
    }

    /// Notes that an event had text of a channel in which it is not any more: that the model reasons, others
    /// have to know.
    pub(super) fn pass(&mut self, channel: Channel) {
        self.passed = Some(channel);
        self.dirty.channel = true;
    }

    /// Notes the end: nothing is cut any more.
    pub(super) fn finish(&mut self) {
        self.finished = true;
        self.dirty.finished = true;
        self.ending = None;
        self.dirty.ending = false;
        self.safe = self.ids.len();
        self.leg = None;
    }

    /// Tokens that the caller does not know of yet.
    pub(super) fn tell(&mut self) -> u32 {
        let new = self.total().saturating_sub(self.told);
        self.told += new;
        u32::try_from(new).unwrap_or(u32::MAX)
    }

    /// Writes down what happened since the last time.
    pub(super) fn journal(&mut self, index: u32, offsets: bool, out: &mut Vec<u8>) {
        let dirty = std::mem::take(&mut self.dirty);
        if dirty.role {
            Op::Role(index).write(out);
        }
        if dirty.setbacks {
            // Before the tokens that came since.
            Op::SetBack(index, self.setbacks).write(out);
        }
        if dirty.guessed {
            Op::Guessed(index).write(out);
        }
        // What is written down is not begun again, even if all its text is held.
        self.spoke |= self.safe > self.journaled || self.uncounted > self.uncounted_journaled;
        self.spoke |= !self.held.is_empty();
        match &self.ids[self.journaled.min(self.safe)..self.safe] {
            [] => {}
            [id] if index == 0 => Op::Token(*id).write(out),
            ids => Op::Tokens(index, ids.to_vec()).write(out),
        }
        self.journaled = self.journaled.max(self.safe);
        if dirty.blanks && self.blanks > 0 {
            Op::Blanks(index, self.blanks).write(out);
        }
        let uncounted = self.uncounted - self.uncounted_journaled;
        if uncounted > 0 {
            Op::Uncounted(index, u32::try_from(uncounted).unwrap_or(u32::MAX)).write(out);
            self.uncounted_journaled = self.uncounted;
        }
        if offsets && self.safe_offsets != self.offsets_journaled {
            Op::Offset(index, self.safe_offsets.next(), self.safe_offsets.by_text()).write(out);
            self.offsets_journaled = self.safe_offsets;
        }
        if dirty.held {
            Op::Held(index, &self.held).write(out);
        }
        if let Some(passed) = self.passed.take() {
            Op::Channel(index, passed as u8).write(out);
        }
        if dirty.channel {
            Op::Channel(index, self.channel as u8).write(out);
        }
        if dirty.guard {
            let characters = if self.more_characters { 0 } else { self.characters };
            Op::Guard(index, self.guard.as_deref().map(|end| (characters, end))).write(out);
        }
        if dirty.opening
            && let Some(opening) = self.opening
        {
            Op::Opening(index, opening).write(out);
        }
        if dirty.ending
            && let Some(end) = &self.ending
        {
            Op::Ending(index, &end.reason, &end.stop).write(out);
        }
        if dirty.finished {
            Op::Finished(index).write(out);
        }
    }

    /// Stops keeping ids: there are too many. What is in the journal is counted only.
    pub(super) fn forget_ids(&mut self) {
        let known = self.journaled;
        self.ids.drain(..known);
        self.safe = self.safe.saturating_sub(known);
        self.waiting.iter_mut().for_each(|(end, _)| *end = end.saturating_sub(known));
        self.journaled = 0;
        self.uncounted += known as u64;
        // The journal has them already, as ids.
        self.uncounted_journaled += known as u64;
    }

    /// Notes ids from a journal.
    pub(super) fn restore_ids(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.safe = self.ids.len();
        self.journaled = self.safe;
        self.told += ids.len() as u64;
        self.spoke = true;
        self.more_characters = true;
        self.blanks = 0;
    }

    pub(super) fn restore_blanks(&mut self, count: u32) {
        self.blanks = count;
    }

    pub(super) fn restore_uncounted(&mut self, count: u32) {
        self.uncounted += u64::from(count);
        self.uncounted_journaled = self.uncounted;
        self.told += u64::from(count);
        self.spoke = true;
    }

    pub(super) fn restore_setbacks(&mut self, count: u32) {
        (self.setbacks, self.set_back_at) = (count, self.total());
    }

    pub(super) fn restore_guard(&mut self, guard: Option<(u64, &str)>) {
        self.guard = guard.map(|(_, end)| end.to_owned());
        self.tail.clear();
        self.tail.extend(guard.map(|(_, end)| end));
        if let Some((characters @ 1.., _)) = guard {
            self.characters = characters;
            self.more_characters = false;
        }
    }

    pub(super) fn restore_offset(&mut self, next: u64, by_text: bool) {
        self.offsets = Offsets::at(next, by_text);
        self.safe_offsets = self.offsets;
        self.offsets_journaled = self.offsets;
    }
}

/// The last `GUARD` characters.
fn end_of(text: &str) -> &str {
    let at = text.char_indices().rev().nth(GUARD - 1).map_or(0, |(at, _)| at);
    &text[at..]
}
