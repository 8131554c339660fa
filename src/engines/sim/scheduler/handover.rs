//! The part of the scheduler that a request has when its prompt is computed by one engine and its text by
//! another: what waits for another engine, what is kept for one, and what the KV in each block is worth.
//!
//! KV is worth the hash of the ids it was computed from ([`TextState::hash`]). A block that came from
//! elsewhere may hold the KV of something else, as it does when a transfer is used twice; then the text is
//! computed on from that, and is silently another one, as it is in the real engines.
//!
//! **Invariant:** a parked sequence is in neither queue; the blocks of one that is kept are released
//! once: when they were fetched, when nobody came in time, or when the engine dies.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Scheduler, Sequence, log};
use crate::engines::sim::kv::SequenceBlocks;
use crate::engines::sim::outbox::{Failure, FinishReason, Outbox};
use crate::engines::sim::pd::{Lender, Mode, Source, Told};
use crate::engines::sim::text::{TextState, mix};

/// What a sequence has to do with another engine.
#[derive(Clone, Debug)]
pub enum Leg {
    /// vLLM's prefill: its blocks are kept for whoever comes for them.
    Lend(Arc<Loan>),
    /// SGLang's and KsanaLLM's prefill: ends when the decode engine has it all.
    Meet(Arc<Meeting>),
    /// Decode: the KV of the prompt comes from there.
    Fetch(Arc<Source>),
    /// vLLM's decode that was told too little to fetch anything: waits until its client leaves.
    Stranded,
    /// vLLM's decode that was told nothing of blocks: the engine process does not survive it.
    Fatal,
}

/// A vLLM engine's word on a prompt that it has computed for another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loan {
    /// The request's id within the engine.
    pub id: Arc<str>,
    /// Under which the blocks are kept.
    pub key: Arc<str>,
    /// What the router is told of them, if anything.
    pub told: Option<Mode>,
    /// Whether the decode engine comes by the key and is given them, instead of reading them itself.
    pub given: bool,
}

/// Two engines that were told the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// What they were told.
    pub key: Arc<str>,
    /// The request's id, for messages.
    pub rid: String,
    /// Whether the prefill engine begins, and says its first token, before the decode engine is there:
    /// KsanaLLM's does, SGLang's does not.
    pub eager: bool,
}

/// The KV of a prompt.
#[derive(Clone, Debug)]
pub struct Came {
    /// What the KV of each block is worth, to the prompt's end.
    pub contents: Vec<u64>,
    /// How many ids the engine that computed it had in its cache, if it says so.
    pub cached: Option<usize>,
}

/// What the shell is to do about it.
#[derive(Debug)]
pub enum Happening {
    /// Get the KV of the last so many blocks and say what came with [`Scheduler::fetched`].
    Fetch {
        /// By which it is known from here on.
        ticket: u64,
        /// Where it is.
        source: Arc<Source>,
        /// How many blocks, from the end.
        blocks: usize,
    },
    /// Say with [`Scheduler::met`] when the decode engine asks for this.
    Meet {
        /// By which it is known from here on.
        ticket: u64,
        /// Where.
        meeting: Arc<Meeting>,
    },
    /// The KV that the decode engine waits for.
    Ready {
        /// Where that one is.
        meeting: Arc<Meeting>,
        /// What it is.
        came: Came,
    },
    /// What was to be met has gone.
    Left(Arc<Meeting>),
    /// What was asked for under this ticket is not wanted any more.
    Abandoned(u64),
    /// The engine process dies of a request.
    Died,
}

/// What the KV in each block is worth; read by other engines at any time, as memory is.
#[derive(Clone, Debug)]
pub struct Contents(Arc<[AtomicU64]>);

impl Contents {
    /// Of so many blocks.
    pub fn new(blocks: u32) -> Self {
        Self((0..blocks.max(1)).map(|_| AtomicU64::new(0)).collect())
    }

    /// What is in a block; `None` if there is no such block.
    pub fn get(&self, block: u32) -> Option<u64> {
        self.0.get(block as usize).map(|content| content.load(Ordering::Relaxed))
    }

    fn set(&self, block: u32, content: u64) {
        if let Some(place) = self.0.get(block as usize) {
            place.store(content, Ordering::Relaxed);
        }
    }

    fn clear(&self) {
        self.0.iter().for_each(|content| content.store(0, Ordering::Relaxed));
    }
}

/// What a sequence's KV should be worth, and what is wrong with it.
#[derive(Debug)]
pub(super) struct Marks {
    start: u64,
    /// At the end of each full block.
    full: Vec<u64>,
    twist: u64,
}

impl Marks {
    fn at(&mut self, tokens: &[u32], upto: usize, block_size: usize) -> u64 {
        let hash = |from: u64, ids: &[u32]| ids.iter().fold(from, |hash, id| TextState::step(hash, *id));
        for block in tokens[..upto].chunks_exact(block_size).skip(self.full.len()) {
            let before = self.full.last().copied().unwrap_or(self.start);
            self.full.push(hash(before, block));
        }
        let blocks = upto / block_size;
        let before = blocks.checked_sub(1).map_or(self.start, |last| self.full[last]);
        hash(before, &tokens[blocks * block_size..upto])
    }

    /// Whether the block is worth what it should be.
    fn note(&mut self, block: usize, expected: u64, actual: u64) -> bool {
        let is_right = expected == actual;
        if !is_right {
            self.twist = mix(self.twist ^ expected ^ actual ^ block as u64) | 1;
        }
        is_right
    }
}

struct Kept {
    blocks: SequenceBlocks,
    /// When nobody came; never, if that is somebody else's to say.
    until: Option<Duration>,
    /// The reader that is told once they were fetched.
    reader: Option<Arc<Outbox>>,
    /// Where the decode engine is met, if it is.
    meeting: Option<Arc<Meeting>>,
}

/// See the module.
pub struct Handover {
    contents: Contents,
    lender: Option<Lender>,
    parked: BTreeMap<u64, Sequence>,
    /// By name, which one id can be the name of several of, where it is used twice.
    kept: HashMap<Arc<str>, Vec<Kept>>,
    happenings: Vec<Happening>,
    next_ticket: u64,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handover {{ parked: {}, kept: {} }}", self.parked.len(), self.kept.len())
    }
}

impl Handover {
    /// With what other engines read; `lender` is who lends, for engines that do.
    pub fn new(contents: Contents, lender: Option<Lender>) -> Self {
        Self {
            contents,
            lender,
            parked: BTreeMap::new(),
            kept: HashMap::new(),
            happenings: Vec::new(),
            next_ticket: 0,
        }
    }

    fn park(&mut self, sequence: Sequence) -> u64 {
        self.next_ticket += 1;
        self.parked.insert(self.next_ticket, sequence);
        self.next_ticket
    }

    /// What a decode engine is to be told of a sequence that ends like this, if anything.
    pub(super) fn lent(&self, sequence: &Sequence, reason: FinishReason) -> Option<Told> {
        let (Some(Leg::Lend(loan)), Some(lender)) = (&sequence.leg, &self.lender) else { return None };
        if reason == FinishReason::Abort {
            return None;
        }
        let mode = loan.told?;
        // One id was generated, the KV of which was never computed.
        let computed = sequence.tokens.len() - 1;
        Some(lender.params(mode, &loan.id, sequence.blocks.ids(), computed, sequence.cached.unwrap_or(0)))
    }

    /// Writes what the step that is planned computes. Now and not at its end, because a sequence behind it in
    /// the same step may begin with the same blocks: engines write a layer's KV before anybody reads it.
    pub(super) fn computes(&self, sequence: &mut Sequence, block_size: usize) {
        let Some(marks) = &mut sequence.marks else { return };
        let upto = sequence.computed + sequence.scheduled;
        for place in sequence.computed / block_size..upto.div_ceil(block_size) {
            let upto = ((place + 1) * block_size).min(upto);
            let content = marks.at(&sequence.tokens, upto, block_size) ^ marks.twist;
            if let Some(block) = sequence.blocks.ids().get(place) {
                self.contents.set(*block, content);
            }
        }
    }

    /// Looks what is in the blocks that a sequence begins with.
    pub(super) fn check(&self, sequence: &mut Sequence, from: usize, upto: usize, block_size: usize) {
        let Some(marks) = &mut sequence.marks else { return };
        if from == 0 {
            marks.twist = 0;
        }
        for place in from / block_size..upto.div_ceil(block_size) {
            let expected = marks.at(&sequence.tokens, ((place + 1) * block_size).min(upto), block_size);
            let actual = sequence.blocks.ids().get(place).and_then(|block| self.contents.get(*block));
            if !marks.note(place, expected, actual.unwrap_or(0)) {
                tracing::warn!(
                    request = %sequence.id,
                    place,
                    block = sequence.blocks.ids().get(place),
                    from,
                    upto,
                    "the KV in this block is of something else; what follows is another text"
                );
            }
        }
        sequence.text.twist(marks.twist);
    }

    /// Keeps the blocks of a sequence that has ended, if somebody is to fetch them; they are taken out of it.
    pub(super) fn keep(&mut self, sequence: &mut Sequence, reason: FinishReason, now: Duration) {
        let (key, until, reader, meeting) = match (&sequence.leg, &self.lender) {
            // Mooncake's connector gives nothing of a text that ended by itself.
            (Some(Leg::Lend(loan)), _) if loan.told.is_none() && reason != FinishReason::Length => return,
            (Some(Leg::Lend(loan)), Some(lender)) => {
                let (key, rid) = (Arc::clone(&loan.key), loan.id.to_string());
                let meeting = loan.given.then(|| Arc::new(Meeting { key, rid, eager: true }));
                (Arc::clone(&loan.key), Some(now + lender.lease), None, meeting)
            }
            (Some(Leg::Meet(meeting)), _) => {
                let reader = Some(Arc::clone(&sequence.outbox));
                (Arc::clone(&meeting.key), None, reader, Some(Arc::clone(meeting)))
            }
            _ => return,
        };
        let blocks = std::mem::take(&mut sequence.blocks);
        if let Some(meeting) = &meeting {
            // A block that is there is within the contents.
            let contents = blocks.ids().iter().map(|block| self.contents.get(*block).unwrap_or(0)).collect();
            let came = Came { contents, cached: sequence.cached };
            self.happenings.push(Happening::Ready { meeting: Arc::clone(meeting), came });
        }
        self.kept.entry(key).or_default().push(Kept { blocks, until, reader, meeting });
    }

    fn keeps(&self) -> impl Iterator<Item = &Kept> {
        self.kept.values().flatten()
    }
}

impl Kept {
    /// Lets the reader read on.
    fn let_go(&self) {
        let is_eager = self.meeting.as_ref().is_some_and(|meeting| meeting.eager);
        match &self.reader {
            Some(outbox) if is_eager => outbox.part(),
            Some(outbox) => outbox.let_go(),
            None => {}
        }
    }
}

impl Sequence {
    /// Whether its prompt's KV is to come from elsewhere, and has not come yet.
    pub(super) fn wants_to_fetch(&self) -> bool {
        !self.has_fetched && matches!(self.leg, Some(Leg::Fetch(_) | Leg::Stranded | Leg::Fatal))
    }
}

impl Scheduler {
    /// The same for an engine that hands requests over or takes them on.
    #[must_use]
    pub fn with_handover(mut self, handover: Handover) -> Self {
        self.handover = Some(handover);
        self
    }

    /// What happened since the last call.
    pub fn take_happenings(&mut self) -> Vec<Happening> {
        self.handover.as_mut().map(|handover| std::mem::take(&mut handover.happenings)).unwrap_or_default()
    }

    /// What a sequence that is put into the queue needs, and whether it has to wait for another engine first.
    /// `start` is the hash of no ids at all.
    pub(super) fn prepare(&mut self, sequence: &mut Sequence, start: u64) -> bool {
        if self.handover.is_none() {
            sequence.leg = None;
            return false;
        }
        sequence.marks = Some(Box::new(Marks { start, full: Vec::new(), twist: 0 }));
        let Some(Leg::Meet(meeting)) = &sequence.leg else { return false };
        match meeting.eager {
            true => sequence.outbox.linger(),
            false => sequence.outbox.hold(),
        }
        !meeting.eager
    }

    /// Has a sequence wait until the engine that takes it on asks for it.
    pub(super) fn await_meeting(&mut self, sequence: Sequence) {
        let (Some(handover), Some(Leg::Meet(meeting))) = (&mut self.handover, &sequence.leg) else { return };
        let meeting = Arc::clone(meeting);
        let ticket = handover.park(sequence);
        handover.happenings.push(Happening::Meet { ticket, meeting });
    }

    /// The decode engine is there: what waited for it is computed.
    pub fn met(&mut self, ticket: u64) {
        if let Some(sequence) = self.handover.as_mut().and_then(|handover| handover.parked.remove(&ticket)) {
            self.waiting.push_back(sequence);
        }
        self.update_gauges();
    }

    /// Takes the first of the queue out of it and asks for its prompt's KV; false if there is no room.
    pub(super) fn ask_for_kv(&mut self, now: Duration) -> bool {
        let Some(mut next) = self.waiting.pop_front() else { return false };
        let Some(handover) = &mut self.handover else { return false };
        let source = match &next.leg {
            Some(Leg::Fetch(source)) => Some(Arc::clone(source)),
            Some(Leg::Fatal) => {
                handover.happenings.push(Happening::Died);
                None
            }
            _ => None,
        };
        let cached = self.kv.cached_tokens(&mut next.blocks, &next.tokens);
        if !self.kv.reserve(&mut next.blocks, &next.tokens, cached, next.prompt_len) {
            self.waiting.push_front(next);
            return false;
        }
        next.computed = cached;
        handover.check(&mut next, 0, cached, self.block_size);
        let blocks = next.blocks.ids().len() - cached / self.block_size;
        self.stats.external_queries.add(next.prompt_len - cached);
        if next.cached.is_none() {
            self.stats.histograms.lock().queue_time.observe(now.saturating_sub(next.arrived).as_secs_f64());
        }
        let ticket = handover.park(next);
        if let Some(source) = source {
            handover.happenings.push(Happening::Fetch { ticket, source, blocks });
        }
        true
    }

    /// The KV of a prompt came, from its last blocks backwards; or it does not come.
    pub fn fetched(&mut self, ticket: u64, came: Result<Came, Failure>) {
        let Some(handover) = &mut self.handover else { return };
        // It may have been aborted meanwhile.
        let Some(mut sequence) = handover.parked.remove(&ticket) else { return };
        let from = sequence.computed;
        let wanted = sequence.blocks.ids().len() - from / self.block_size;
        let Came { mut contents, cached } = match came {
            Ok(came) => came,
            Err(failure) => {
                self.stats.transfers_failed.add(1);
                self.fail(sequence, failure);
                return;
            }
        };
        // Of another prompt it may be more or less; then it is wrong, too.
        contents.drain(..contents.len().saturating_sub(wanted));
        contents.resize(wanted, 0);
        for (block, content) in sequence.blocks.ids()[from / self.block_size..].iter().zip(contents) {
            handover.contents.set(*block, content);
        }
        let prompt_len = sequence.prompt_len;
        handover.check(&mut sequence, from, prompt_len, self.block_size);
        // Cannot lack room: the blocks are there.
        self.kv.grow(&mut sequence.blocks, &sequence.tokens, sequence.prompt_len);
        (sequence.has_fetched, sequence.holds_fetched) = (true, true);
        // The last id is computed again, so that a next one comes out.
        sequence.computed = sequence.prompt_len - 1;
        if sequence.cached.is_none() {
            sequence.cached = Some(cached.unwrap_or(sequence.prompt_len - 1).min(sequence.prompt_len));
            self.stats.cache_queries.add(sequence.prompt_len);
            self.stats.prompt_tokens.add(sequence.prompt_len);
            self.stats.cached_tokens.add(from);
            self.stats.external_tokens.add(sequence.prompt_len - from);
            self.stats.recomputed_tokens.add(1);
            self.stats.prefill_tokens.add(1);
        }
        self.waiting.push_front(sequence);
        self.update_gauges();
    }

    /// Nobody takes what was kept last under this name.
    pub fn not_taken(&mut self, key: &str, failure: Failure) {
        let Some(mut kept) = self.newest(key) else { return };
        self.kv.release(&mut kept.blocks);
        self.stats.transfers_failed.add(1);
        if let Some(outbox) = kept.reader {
            outbox.fail(failure);
        }
        self.update_gauges();
    }

    /// Takes out what was kept last under this name: an older one is forgotten by the real engines, and waits.
    fn newest(&mut self, key: &str) -> Option<Kept> {
        let kept = &mut self.handover.as_mut()?.kept;
        let list = kept.get_mut(key)?;
        let newest = list.pop();
        if list.is_empty() {
            kept.remove(key);
        }
        newest
    }

    /// What is parked or kept under this name comes to nothing.
    pub fn not_met(&mut self, ticket: Option<u64>, key: &str, failure: Failure) {
        let Some(handover) = &mut self.handover else { return };
        if let Some(sequence) = ticket.and_then(|ticket| handover.parked.remove(&ticket)) {
            self.fail(sequence, failure);
            return;
        }
        for mut kept in handover.kept.remove(key).into_iter().flatten() {
            self.kv.release(&mut kept.blocks);
            if let Some(outbox) = kept.reader {
                self.stats.transfers_failed.add(1);
                outbox.fail(failure.clone());
            }
        }
        self.update_gauges();
    }

    fn fail(&mut self, mut sequence: Sequence, failure: Failure) {
        self.kv.release(&mut sequence.blocks);
        sequence.outbox.fail(failure);
        self.stats.finished[3].add(1);
        log(&self.stats, &sequence, "error");
        self.update_gauges();
    }

    /// Somebody has fetched what was kept under this name; false if nothing is (any more).
    pub fn taken(&mut self, key: &str) -> bool {
        let Some(mut kept) = self.newest(key) else { return false };
        self.kv.release(&mut kept.blocks);
        kept.let_go();
        self.update_gauges();
        true
    }

    /// Somebody will still come for these.
    pub fn renew<'a>(&mut self, keys: impl Iterator<Item = &'a str>, now: Duration) {
        let Some(handover) = &mut self.handover else { return };
        let Some(lease) = handover.lender.as_ref().map(|lender| lender.lease) else { return };
        for key in keys {
            for kept in handover.kept.get_mut(key).into_iter().flatten().filter(|kept| kept.until.is_some()) {
                kept.until = Some(now + lease);
            }
        }
    }

    /// Gives up what nobody came for, and says when to look again.
    pub fn expire(&mut self, now: Duration) -> Option<Duration> {
        let handover = self.handover.as_mut()?;
        let late = |kept: &Kept| kept.until.is_some_and(|until| until <= now);
        if handover.keeps().any(late) {
            let (kv, stats, happenings) = (&mut self.kv, &self.stats, &mut handover.happenings);
            handover.kept.retain(|_, list| {
                list.retain_mut(|kept| {
                    let is_late = late(kept);
                    if is_late {
                        kv.release(&mut kept.blocks);
                        happenings.extend(kept.meeting.take().map(Happening::Left));
                        stats.transfers_expired.add(1);
                    }
                    !is_late
                });
                !list.is_empty()
            });
            self.update_gauges();
        }
        self.handover.as_ref()?.keeps().filter_map(|kept| kept.until).min()
    }

    /// What queued and parked sequences wait for, for engines that are to be told so.
    pub fn awaited(&self) -> impl Iterator<Item = &Source> {
        let parked = self.handover.iter().flat_map(|handover| handover.parked.values());
        self.waiting.iter().chain(parked).filter(|sequence| !sequence.has_fetched).filter_map(|sequence| {
            match &sequence.leg {
                Some(Leg::Fetch(source)) => Some(source.as_ref()),
                _ => None,
            }
        })
    }

    /// What waits for another engine.
    pub(super) fn parked(&self) -> impl Iterator<Item = &Sequence> {
        self.handover.iter().flat_map(|handover| handover.parked.values())
    }

    /// How many sequences wait for another engine.
    pub(super) fn deferred(&self) -> usize {
        self.handover.as_ref().map_or(0, |handover| handover.parked.len())
    }

    /// Takes whatever is wanted out of what is parked and kept.
    pub(super) fn remove_parked(
        &mut self,
        wanted: &impl Fn(&Sequence) -> bool,
        each: &mut impl FnMut(&mut Sequence),
    ) {
        let Some(handover) = &mut self.handover else { return };
        let kv = &mut self.kv;
        let happenings = &mut handover.happenings;
        handover.parked.retain(|ticket, sequence| {
            let is_wanted = wanted(sequence);
            if is_wanted {
                kv.release(&mut sequence.blocks);
                happenings.push(match &sequence.leg {
                    Some(Leg::Meet(meeting)) => Happening::Left(Arc::clone(meeting)),
                    _ => Happening::Abandoned(*ticket),
                });
                each(sequence);
            }
            !is_wanted
        });
    }

    /// What is kept for a reader who has gone is kept no more.
    pub(super) fn drop_unread(&mut self) {
        let Some(handover) = &mut self.handover else { return };
        let (kv, happenings) = (&mut self.kv, &mut handover.happenings);
        handover.kept.retain(|_, list| {
            list.retain_mut(|kept| {
                if !kept.reader.as_ref().is_some_and(|outbox| outbox.is_cancelled()) {
                    return true;
                }
                happenings.extend(kept.meeting.take().map(Happening::Left));
                kv.release(&mut kept.blocks);
                false
            });
            !list.is_empty()
        });
        self.update_gauges();
    }

    /// These are over before their time.
    pub(super) fn leave(&mut self, legs: Vec<Leg>) {
        let Some(handover) = &mut self.handover else { return };
        handover.happenings.extend(legs.into_iter().filter_map(|leg| match leg {
            Leg::Meet(meeting) => Some(Happening::Left(meeting)),
            _ => None,
        }));
    }

    /// The engine process dies: nothing is kept for anybody.
    pub(super) fn forget_kept(&mut self) {
        let Some(handover) = &mut self.handover else { return };
        for mut kept in handover.kept.drain().flat_map(|(_, list)| list) {
            self.kv.release(&mut kept.blocks);
            if let Some(outbox) = kept.reader {
                outbox.fail(Failure::EngineDead);
            }
            handover.happenings.extend(kept.meeting.map(Happening::Left));
        }
        handover.contents.clear();
        if let Some(lender) = &mut handover.lender {
            lender.begin_anew();
        }
    }
}
