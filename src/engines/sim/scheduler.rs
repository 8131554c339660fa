//! Continuous batching as vLLM does it, one step at a time and without a clock of its own.
//!
//! A step is planned ([`Scheduler::plan`]), takes the time the plan says, and is completed
//! ([`Scheduler::complete`]): sequences whose ids are all computed then get their next token.
//! Running sequences come first; while tokens and batch slots are left, waiting ones follow in the
//! order of arrival. If blocks run out, the youngest running sequence goes back to the queue's head.

mod handover;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use self::handover::Marks;
pub use self::handover::{Came, Contents, Handover, Happening, Leg, Loan, Meeting};
use super::detok::Detokenizer;
use super::kv::{KvCache, Namespace, SequenceBlocks};
use super::outbox::{Failure, FinishReason, Outbox, StopReason};
use super::stats::{LogEntry, Stats};
use super::text::TextState;
use super::tokenizer::EOS;

/// When and how a sequence ends.
#[derive(Clone, Debug)]
pub struct StopRules {
    /// Ids to generate at most, at least 1.
    pub max_tokens: usize,
    /// Ids before which nothing ends the text.
    pub min_tokens: usize,
    /// Strings that end it.
    pub stop: Arc<[String]>,
    /// Ids that end it.
    pub stop_token_ids: Arc<[u32]>,
    /// Whether what ended the text shows in it.
    pub include_stop: bool,
    /// Whether the end-of-sequence id is like any other.
    pub ignore_eos: bool,
    /// Whether markers are left out of the text.
    pub skip_special: bool,
}

/// One sequence to generate.
#[derive(Debug)]
pub struct Submission {
    /// Id for the log and for aborts.
    pub id: String,
    /// The prompt.
    pub prompt: Arc<[u32]>,
    /// Index of the choice in the request's outbox.
    pub choice: usize,
    /// The request's outbox.
    pub outbox: Arc<Outbox>,
    /// What separates it in the prefix cache.
    pub namespace: Namespace,
    /// The model's state, still without the prompt.
    pub text: TextState,
    /// When it ends.
    pub rules: StopRules,
    /// What it has to do with another engine, if anything; nothing in an engine without `--pd`.
    pub leg: Option<Leg>,
    /// Whether its blocks are nobody else's.
    pub private: bool,
}

#[derive(Debug)]
struct Sequence {
    id: String,
    tokens: Vec<u32>,
    prompt_len: usize,
    computed: usize,
    scheduled: usize,
    cached: Option<usize>,
    created: usize,
    blocks: SequenceBlocks,
    text: TextState,
    detok: Detokenizer,
    rules: StopRules,
    choice: usize,
    outbox: Arc<Outbox>,
    arrived: Duration,
    last_token: Option<Duration>,
    leg: Option<Leg>,
    /// Whether the KV of its prompt has come.
    has_fetched: bool,
    /// Whether it holds them while it waits.
    holds_fetched: bool,
    marks: Option<Box<Marks>>,
}

impl Sequence {
    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    fn push(&self, text: &str, token: Option<u32>, finish: Option<(FinishReason, Option<StopReason>)>) {
        self.outbox.push(self.choice, text, token, finish, self.cached.unwrap_or(0), self.created);
    }

    /// Generates one id and tells the reader; returns why that was the last one.
    fn advance(&mut self, handover: Option<&Handover>) -> Option<FinishReason> {
        let rules = &self.rules;
        let position = self.generated() + 1;
        let may_end = position > rules.min_tokens;
        let id = self.text.next(may_end && !rules.ignore_eos);
        self.text.push(id);
        self.tokens.push(id);
        let stop_token = may_end && (id == EOS && !rules.ignore_eos || rules.stop_token_ids.contains(&id));
        let mut finish = None;
        if stop_token {
            let reason = (id != EOS).then_some(StopReason::Token(id));
            finish = Some((FinishReason::Stop, reason));
        } else if position >= rules.max_tokens {
            finish = Some((FinishReason::Length, None));
        }
        let grown = if stop_token && !rules.include_stop { 0 } else { self.detok.push(id) };
        if may_end
            && !rules.stop.is_empty()
            && let Some(index) = self.detok.find_stop(&rules.stop, grown, rules.include_stop)
        {
            finish = Some((FinishReason::Stop, Some(StopReason::Text(rules.stop[index].clone()))));
        }
        let reason = finish.as_ref().map(|(reason, _)| *reason);
        if let Some(lent) = reason.and_then(|reason| handover?.lent(self, reason)) {
            self.outbox.attach(self.choice, Arc::new(lent));
        }
        let text = self.detok.take(finish.is_some());
        self.outbox.push(self.choice, text, Some(id), finish, self.cached.unwrap_or(0), self.created);
        reason
    }
}

/// What a step computes, and thereby how long it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Prompt ids.
    pub prefill_tokens: usize,
    /// Sequences in the batch.
    pub sequences: usize,
}

/// The batch, the queue and the cache of an engine.
#[derive(Debug)]
pub struct Scheduler {
    kv: KvCache,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    max_running: usize,
    max_batched_tokens: usize,
    block_size: usize,
    host_blocks: u32,
    handover: Option<Handover>,
    stats: Arc<Stats>,
}

impl Scheduler {
    /// With an empty cache of `blocks` blocks.
    pub fn new(
        blocks: u32,
        block_size: u32,
        max_running: u32,
        max_batched_tokens: u32,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            kv: KvCache::new(blocks, block_size as usize),
            waiting: VecDeque::new(),
            running: Vec::new(),
            max_running: max_running as usize,
            max_batched_tokens: max_batched_tokens as usize,
            block_size: block_size as usize,
            host_blocks: 0,
            handover: None,
            stats,
        }
    }

    /// The same with a host tier of so many blocks behind the cache.
    #[must_use]
    pub fn with_host(mut self, blocks: u32) -> Self {
        self.kv = self.kv.with_host(blocks);
        self.host_blocks = blocks;
        self
    }

    /// The cache, for its events and for clearing it.
    pub fn kv(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    /// Puts a sequence at the end of the queue.
    pub fn submit(&mut self, submission: Submission, now: Duration) {
        let Submission { id, prompt, choice, outbox, namespace, mut text, rules, leg, private } = submission;
        let start = text.hash();
        prompt.iter().for_each(|id| text.push(*id));
        self.stats.requests.add(1);
        let blocks =
            if private { SequenceBlocks::private(namespace) } else { SequenceBlocks::new(namespace) };
        let mut sequence = Sequence {
            id,
            prompt_len: prompt.len(),
            tokens: prompt.to_vec(),
            computed: 0,
            scheduled: 0,
            cached: None,
            created: 0,
            blocks,
            text,
            detok: Detokenizer::new(&prompt, &rules.stop, rules.include_stop, rules.skip_special),
            rules,
            choice,
            outbox,
            arrived: now,
            last_token: None,
            leg,
            has_fetched: false,
            holds_fetched: false,
            marks: None,
        };
        match self.prepare(&mut sequence, start) {
            true => self.await_meeting(sequence),
            false => self.waiting.push_back(sequence),
        }
        self.update_gauges();
    }

    /// Chooses what the next step computes; `None` if there is nothing to do.
    pub fn plan(&mut self, now: Duration) -> Option<Plan> {
        let mut budget = self.max_batched_tokens;
        let mut prefill_tokens = 0;
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let wanted = (sequence.tokens.len() - sequence.computed).min(budget);
            sequence.scheduled = wanted;
            if wanted == 0 || self.kv.grow(&mut sequence.blocks, &sequence.tokens, sequence.computed + wanted)
            {
                if sequence.computed < sequence.prompt_len {
                    prefill_tokens += wanted;
                }
                if let Some(handover) = &self.handover {
                    handover.computes(sequence, self.block_size);
                }
                budget -= wanted;
                at += 1;
                continue;
            }
            preempted = true;
            // Never empty here: `at` is within.
            if let Some(mut victim) = self.running.pop() {
                self.kv.release(&mut victim.blocks);
                victim.computed = 0;
                victim.holds_fetched = false;
                self.stats.preemptions.add(1);
                self.waiting.push_front(victim);
            }
        }
        while !preempted && budget > 0 && self.running.len() < self.max_running {
            let Some(next) = self.waiting.front_mut() else { break };
            if next.wants_to_fetch() {
                match self.ask_for_kv(now) {
                    true => continue,
                    false => break,
                }
            }
            if next.holds_fetched {
                let Some(mut next) = self.waiting.pop_front() else { break };
                next.holds_fetched = false;
                next.scheduled = (next.tokens.len() - next.computed).min(budget);
                if let Some(handover) = &self.handover {
                    handover.computes(&mut next, self.block_size);
                }
                prefill_tokens += next.scheduled;
                budget -= next.scheduled;
                self.running.push(next);
                continue;
            }
            let cached = self.kv.cached_tokens(&mut next.blocks, &next.tokens);
            let wanted = (next.tokens.len() - cached).min(budget);
            if !self.kv.admit(&mut next.blocks, &next.tokens, cached, cached + wanted) {
                break;
            }
            let Some(mut next) = self.waiting.pop_front() else { break };
            next.computed = cached;
            next.scheduled = wanted;
            if let Some(handover) = &self.handover {
                handover.check(&mut next, 0, cached, self.block_size);
                handover.computes(&mut next, self.block_size);
            }
            if next.cached.is_none() {
                self.first_admission(&mut next, cached, now);
            }
            prefill_tokens += wanted;
            budget -= wanted;
            self.running.push(next);
        }
        self.update_gauges();
        if self.running.is_empty() {
            return None;
        }
        let tokens = self.max_batched_tokens - budget;
        self.stats.histograms.lock().iteration_tokens.observe(tokens as f64);
        Some(Plan { prefill_tokens, sequences: self.running.len() })
    }

    fn first_admission(&self, sequence: &mut Sequence, cached: usize, now: Duration) {
        sequence.cached = Some(cached);
        sequence.created = (sequence.prompt_len / self.block_size * self.block_size).saturating_sub(cached);
        self.stats.cache_queries.add(sequence.prompt_len);
        self.stats.prompt_tokens.add(sequence.prompt_len);
        self.stats.cached_tokens.add(cached);
        self.stats.prefill_tokens.add(sequence.prompt_len - cached);
        self.stats.histograms.lock().queue_time.observe(now.saturating_sub(sequence.arrived).as_secs_f64());
    }

    /// Ends the planned step: whoever is computed to its end gets its next token.
    pub fn complete(&mut self, now: Duration) {
        let stats = self.stats.clone();
        let mut histograms = stats.histograms.lock();
        let (kv, handover) = (&mut self.kv, &mut self.handover);
        let mut generated = 0;
        self.running.retain_mut(|sequence| {
            sequence.computed += std::mem::take(&mut sequence.scheduled);
            if sequence.computed < sequence.tokens.len() {
                return true;
            }
            let reason = sequence.advance(handover.as_ref());
            generated += 1;
            match sequence.last_token.replace(now) {
                Some(last) => histograms.inter_token_latency.observe(now.saturating_sub(last).as_secs_f64()),
                None => {
                    histograms.time_to_first_token.observe(now.saturating_sub(sequence.arrived).as_secs_f64())
                }
            }
            let Some(reason) = reason else { return true };
            if let Some(handover) = handover.as_mut() {
                handover.keep(sequence, reason, now);
            }
            kv.release(&mut sequence.blocks);
            stats.finished[reason as usize].add(1);
            histograms.prompt_tokens.observe(sequence.prompt_len as f64);
            histograms.generation_tokens.observe(sequence.generated() as f64);
            histograms.e2e_latency.observe(now.saturating_sub(sequence.arrived).as_secs_f64());
            log(&stats, sequence, reason.name());
            false
        });
        drop(histograms);
        stats.generated_tokens.add(generated);
        stats.steps.add(1);
        self.update_gauges();
    }

    /// Drops the requests whose clients are gone.
    pub fn drop_cancelled(&mut self) {
        let stats = self.stats.clone();
        self.remove(
            |sequence| sequence.outbox.is_cancelled(),
            |sequence| {
                stats.disconnected.add(1);
                log(&stats, sequence, "disconnect");
            },
        );
        self.drop_unread();
    }

    /// Ends with `finish_reason` `abort` whatever the filter says.
    pub fn abort(&mut self, filter: impl Fn(&str) -> bool) {
        let stats = self.stats.clone();
        self.remove(
            |sequence| filter(&sequence.id),
            |sequence| {
                stats.finished[FinishReason::Abort as usize].add(1);
                let text = sequence.detok.take(true).to_owned();
                sequence.push(&text, None, Some((FinishReason::Abort, None)));
                log(&stats, sequence, "abort");
            },
        );
    }

    /// The engine process dies: everything fails and the cache is gone without an event.
    pub fn kill(&mut self) {
        let stats = self.stats.clone();
        self.remove(
            |_| true,
            |sequence| {
                stats.finished[3].add(1);
                sequence.outbox.fail(Failure::EngineDead);
                log(&stats, sequence, "error");
            },
        );
        self.forget_kept();
        let blocks = u32::try_from(self.kv.free_blocks()).unwrap_or(u32::MAX);
        self.kv = KvCache::new(blocks, self.block_size).with_host(self.host_blocks);
    }

    /// Makes all readers look again.
    pub fn wake_readers(&self) {
        let parked = self.parked();
        self.running.iter().chain(&self.waiting).chain(parked).for_each(|sequence| sequence.outbox.wake());
    }

    /// Number of sequences that run or wait.
    pub fn len(&self) -> usize {
        self.running.len() + self.waiting.len() + self.deferred()
    }

    /// Whether nothing runs or waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn remove(&mut self, wanted: impl Fn(&Sequence) -> bool, mut each: impl FnMut(&mut Sequence)) {
        self.remove_parked(&wanted, &mut each);
        let kv = &mut self.kv;
        let mut left = Vec::new();
        let mut keep = |sequence: &mut Sequence| {
            if !wanted(sequence) {
                return true;
            }
            kv.release(&mut sequence.blocks);
            left.extend(sequence.leg.take());
            each(sequence);
            false
        };
        self.running.retain_mut(&mut keep);
        self.waiting.retain_mut(&mut keep);
        self.leave(left);
        self.update_gauges();
    }

    fn update_gauges(&self) {
        self.stats.running.set(self.running.len());
        self.stats.waiting.set(self.waiting.len() + self.deferred());
        self.stats.deferred.set(self.deferred());
        self.stats.kv_usage_ppm.set((self.kv.usage() * 1e6).round() as usize);
    }
}

fn log(stats: &Stats, sequence: &Sequence, finish_reason: &'static str) {
    stats.log(LogEntry {
        id: sequence.id.clone(),
        prompt_tokens: sequence.prompt_len,
        cached_tokens: sequence.cached.unwrap_or(0),
        generated_tokens: sequence.generated(),
        finish_reason,
    });
}

#[cfg(test)]
mod tests {
    use super::super::kv::KvEvent;
    use super::*;

    fn scheduler(blocks: u32, max_running: u32) -> Scheduler {
        Scheduler::new(blocks, 4, max_running, 8, Arc::default())
    }

    fn sequence(id: &str, prompt: Vec<u32>, max_tokens: usize) -> Submission {
        Submission {
            id: id.into(),
            prompt: prompt.into(),
            choice: 0,
            outbox: Arc::new(Outbox::new(true, Arc::default())),
            namespace: Namespace::default(),
            text: TextState::new(0, 0, 0),
            rules: StopRules {
                max_tokens,
                min_tokens: 0,
                stop: Vec::new().into(),
                stop_token_ids: Vec::new().into(),
                include_stop: false,
                ignore_eos: false,
                skip_special: true,
            },
            leg: None,
            private: false,
        }
    }

    fn step(scheduler: &mut Scheduler) -> Option<Plan> {
        let plan = scheduler.plan(Duration::ZERO);
        scheduler.complete(Duration::ZERO);
        plan
    }

    #[test]
    fn a_long_prompt_is_computed_in_chunks_beside_the_others() {
        let mut scheduler = scheduler(100, 10);
        scheduler.submit(sequence("short", vec![5], 9), Duration::ZERO);
        scheduler.submit(sequence("long", (0..20).collect(), 9), Duration::ZERO);
        let prefill: Vec<usize> = (0..4).map(|_| step(&mut scheduler).unwrap().prefill_tokens).collect();
        // One token of every later step goes to the short one's decoding.
        assert_eq!(prefill, [1 + 7, 7, 6, 0]);
    }

    #[test]
    fn what_one_sequence_computes_in_a_step_the_next_in_that_step_can_begin_with() {
        let handover = Handover::new(Contents::new(100), None);
        let mut scheduler = scheduler(100, 10).with_handover(handover);
        for id in ["a", "b"] {
            scheduler.submit(sequence(id, vec![1, 2, 3, 4, 5], 9), Duration::ZERO);
        }
        // Five ids of the first, and the last one of the second.
        assert_eq!(step(&mut scheduler).unwrap().prefill_tokens, 6);
        (0..4).for_each(|_| assert!(step(&mut scheduler).is_some()));
        let [a, b] = &scheduler.running[..] else { panic!("{}", scheduler.running.len()) };
        assert_eq!((a.tokens.len(), &a.tokens), (10, &b.tokens));
    }

    #[test]
    fn slots_are_given_in_the_order_of_arrival() {
        let mut scheduler = scheduler(100, 1);
        for id in ["a", "b", "c"] {
            scheduler.submit(sequence(id, vec![1, 2], 1), Duration::ZERO);
        }
        while step(&mut scheduler).is_some() {}
        let order: Vec<_> = scheduler.stats.log_entries().into_iter().map(|entry| entry.id).collect();
        assert_eq!(order, ["a", "b", "c"]);
        assert_eq!(scheduler.kv().usage(), 0.0);
    }

    #[test]
    fn decode_blocks_are_announced_once_their_last_id_is_computed() {
        let mut scheduler = scheduler(100, 1);
        scheduler.submit(sequence("a", vec![1, 2, 3, 4, 5], 6), Duration::ZERO);
        let mut stored = Vec::new();
        while let Some(_plan) = step(&mut scheduler) {
            let hashes = scheduler.kv().take_events().into_iter().map(|event| match event {
                KvEvent::Stored { token_ids, .. } => token_ids.len(),
                _ => 0,
            });
            stored.push(hashes.sum::<usize>());
        }
        // Prompt block at once; the second is full when its third output id is fed back in.
        assert_eq!(stored, [4, 0, 0, 4, 0, 0]);
    }

    #[test]
    fn an_abort_ends_with_its_reason_and_frees_the_blocks() {
        let mut scheduler = scheduler(100, 1);
        scheduler.submit(sequence("a", vec![1, 2, 3], 50), Duration::ZERO);
        scheduler.submit(sequence("b", vec![1, 2, 3], 50), Duration::ZERO);
        step(&mut scheduler);
        scheduler.abort(|id| id == "a");
        assert_eq!(scheduler.len(), 1);
        assert_eq!(scheduler.kv().usage(), 0.0);
        assert_eq!(scheduler.stats.log_entries()[0].finish_reason, "abort");
    }
}
