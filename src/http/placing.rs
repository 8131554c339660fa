//! Where a request goes and why: its prompt's blocks, who holds them, and the choice.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;
use http::HeaderValue;
use parking_lot::Mutex;
use serde_json::json;

use super::front::Front;
use super::queue::Held;
use super::wishes::Wishes;
use crate::admin_types::{CandidateReply, CostReply, TierBlocks};
use crate::ids::{WorkerId, WorkerIx};
use crate::kv::hash::{LocalHash, Seed, SequenceHash, sequence_hashes};
use crate::kv::types::Overlap;
use crate::routing::book::Share;
use crate::routing::part::{Connectors, Part};
use crate::routing::policy::{LeastLoaded, Pin, Policy, RouteRequest};
use crate::routing::rehearse::{Rehearsal, rehearse};
use crate::routing::select::{Explained, Limits, NoWorker, Selection, explain, prefill_connectors, select};
use crate::routing::view::{NOT_SCORED, RegistryView};
use crate::state::cache::MOST_ROUTED;
use crate::state::command::CacheCommand;
use crate::state::ranks::RankKey;
use crate::tokens::{Ask, Form, Lifted, Prompt, PromptKey};

/// Block sizes of one model's workers that are told apart; workers with further ones are taken
/// to hold nothing.
const MOST_SIZES: usize = 4;

/// Candidates that are told of in a trace.
const MOST_TRACED: usize = 16;

/// Longest trace: what clients and proxies take as a header without being told to.
const MOST_TRACE_BYTES: usize = 8 << 10;

/// What routing knows of one request.
#[derive(Debug, Default)]
pub(super) struct Placing {
    /// Estimated or counted length of the prompt, in tokens.
    pub(super) prompt_tokens: u32,
    /// Longest output asked for.
    pub(super) max_tokens: Option<u32>,
    /// What the client wants.
    pub(super) wishes: Wishes,
    /// The body without the ids of its prompt, if they were lifted out of it.
    pub(super) lifted: Option<Lifted>,
    prompt: Option<Prompt>,
    /// The prompt's blocks, by block size; made when first needed.
    keys: Mutex<Vec<Arc<PromptBlocks>>>,
}

/// A prompt in blocks of one size.
#[derive(Debug)]
pub(super) struct PromptBlocks {
    key: PromptKey,
    chain: OnceLock<Arc<[SequenceHash]>>,
}

impl PromptBlocks {
    /// Hashes of the first ones, as many as routing looks at.
    pub(super) fn hashes(&self) -> &[LocalHash] {
        &self.key.hashes
    }

    pub(super) fn seed(&self) -> Seed {
        self.key.seed
    }

    pub(super) fn block_size(&self) -> usize {
        self.key.block_size
    }

    fn chain(&self) -> &Arc<[SequenceHash]> {
        self.chain.get_or_init(|| sequence_hashes(&self.key.hashes).into())
    }
}

impl Placing {
    /// Of a request whose prompt is not looked at.
    pub(super) fn new(prompt_tokens: u32, max_tokens: Option<u32>) -> Self {
        Self { prompt_tokens, max_tokens, ..Self::default() }
    }

    /// Finds out what the engine will make of the prompt, if the policy wants to know.
    pub(super) async fn look_at_prompt(&mut self, front: &Front, path: &str, model: &str, body: &Bytes) {
        let Some(tokenizers) = &front.config.tokenizers else { return };
        if !self.policy(front).wants_overlap() && !self.wishes.trace {
            return;
        }
        let Some(form) = Form::of_path(path) else { return };
        let base = base_of(&front.control.registry(), model);
        let ask = Ask {
            model: base.as_deref().unwrap_or(model),
            lora: base.as_deref().map(|_| model),
            form,
            body,
            lifted: self.lifted.as_ref(),
            now: SystemTime::now(),
        };
        let prompt = tokenizers.prompt(ask).await;
        self.prompt_tokens = u32::try_from(prompt.tokens()).unwrap_or(u32::MAX);
        self.prompt = Some(prompt);
    }

    /// Who decodes only has nothing of the prompt to compute: load decides.
    fn policy_of<'a>(&self, front: &'a Front, part: Part) -> &'a dyn Policy {
        match part {
            Part::Decode(_) => &LeastLoaded,
            _ => self.policy(front),
        }
    }

    fn policy<'a>(&self, front: &'a Front) -> &'a dyn Policy {
        let asked = self.wishes.overrides.policy().and_then(|name| front.policy(name));
        asked.unwrap_or(front.config.policy.as_ref())
    }

    fn blocks(&self, size: u32) -> Option<Arc<PromptBlocks>> {
        let prompt = self.prompt.as_ref()?;
        let mut keys = self.keys.lock();
        if let Some(found) = keys.iter().find(|blocks| blocks.key.block_size == size as usize) {
            return Some(Arc::clone(found));
        }
        if keys.len() == MOST_SIZES {
            return None;
        }
        let mut key = prompt.key(size as usize);
        key.hashes.truncate(MOST_ROUTED);
        let blocks = Arc::new(PromptBlocks { key, chain: OnceLock::new() });
        keys.push(Arc::clone(&blocks));
        Some(blocks)
    }

    /// The prompt, and its blocks for an engine with blocks of this size.
    pub(super) fn known_prompt(&self, block_size: u32) -> Option<(&Prompt, Arc<PromptBlocks>)> {
        self.prompt.as_ref().zip(self.blocks(block_size))
    }

    /// Asks `with` about the request as routing sees it now.
    fn as_routing_sees_it<R>(
        &self,
        front: &Front,
        view: &RegistryView,
        model: Option<&str>,
        part: Part,
        with: impl FnOnce(&RouteRequest<'_>) -> R,
    ) -> R {
        let (mut held, mut sent) = (Vec::new(), Vec::new());
        let sizes = self.prompt.as_ref().map(|_| block_sizes(view, model)).unwrap_or_default();
        let mut first = None;
        for size in sizes {
            let Some(blocks) = self.blocks(size) else { continue };
            look_up(front, &blocks.key.hashes, &mut held, &mut sent);
            first.get_or_insert(blocks);
        }
        let labels: Vec<(&str, &str)> =
            self.wishes.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let pinned = self.wishes.worker.as_ref().map(|(worker, rank)| Pin { worker, rank: *rank });
        with(&RouteRequest {
            model,
            prompt_tokens: self.prompt_tokens,
            max_tokens: self.max_tokens,
            hashes: first.as_ref().map_or(&[], |blocks| blocks.chain()),
            overlaps: &held,
            predicted: &sent,
            session: self.wishes.session,
            bound: self.binding(front).map(|(worker, _)| worker),
            overrides: self.wishes.overrides,
            pinned,
            labels: &labels,
            part,
            view_age_ms: front.control.view_age_ms(),
        })
    }

    /// Chooses a worker and rank.
    pub(super) fn choose(
        &self,
        front: &Front,
        model: Option<&str>,
        part: Part,
        tried: &[WorkerId],
    ) -> Result<Selection, NoWorker> {
        let view = front.control.registry();
        self.as_routing_sees_it(front, &view, model, part, |request| {
            select(&view, self.policy_of(front, part), request, &limits(front), tried, &mut rand::rng())
        })
    }

    /// How prefill workers hand over that might be asked.
    pub(super) fn prefill_connectors(
        &self,
        front: &Front,
        view: &RegistryView,
        model: Option<&str>,
        tried: &[WorkerId],
    ) -> Connectors {
        self.as_routing_sees_it(front, view, model, Part::Whole, |request| {
            prefill_connectors(view, request, tried)
        })
    }

    /// The name of the policy that chooses for this part.
    pub(super) fn policy_name(&self, front: &Front, part: Part) -> &'static str {
        self.policy_of(front, part).name()
    }

    /// What the prompt's blocks are made of; nothing is known without a prompt.
    pub(super) fn source(&self) -> &'static str {
        self.prompt.as_ref().map_or("unknown", |prompt| prompt.source().name())
    }

    /// Where the request's session is, if the policy keeps sessions where they are.
    fn binding(&self, front: &Front) -> Option<(WorkerIx, bool)> {
        let session = self.wishes.session.filter(|_| self.policy(front).binds_sessions())?;
        front.control.session(session)
    }

    /// Tells everybody that the request's session is there from now on, unless they know. A
    /// request whose worker was named says nothing about the session.
    fn bind(&self, front: &Front, selection: &Selection) {
        let computes = !matches!(selection.part, Part::Decode(_));
        let binds = computes && self.policy(front).binds_sessions() && self.wishes.worker.is_none();
        let Some(session) = self.wishes.session.filter(|_| binds) else { return };
        let (now, worker) = (front.control.session(session), selection.worker.record.ix);
        if now != Some((worker, false)) {
            let from = now.map(|(worker, _)| worker);
            front.control.tell_cache(CacheCommand::Bind { session, worker, from });
        }
    }

    /// Tells everybody that the prompt goes there: it is as good as cached from now on. Where that
    /// is known already, nothing is said: a prompt is some kilobytes of log on every replica.
    pub(super) fn sent_to(&self, front: &Front, selection: &Selection, booking: &mut Held) {
        self.bind(front, selection);
        let worker = &selection.worker;
        let size = worker.block_size();
        let Some(blocks) = self.blocks(size) else { return };
        let (seed, hashes) = (blocks.key.seed, &blocks.key.hashes);
        self.is_sent(front, selection, seed, hashes, selection.overlap.blocks);
        let ix = worker.live.ranks().get(selection.rank as usize).copied().filter(|ix| *ix != NOT_SCORED);
        // What is reckoned is in the index as soon as it is told.
        let reckoned = worker.reckoned_capacity(selection.rank).is_some();
        if let (Some(ix), false) = (ix, reckoned || selection.overlap.blocks as usize >= hashes.len()) {
            booking.awaits(front.control.blocks().recent.until_first_token(ix, seed, hashes));
        }
        // The other prompts of the request, as far as all together are no more than one may be.
        let mut room = MOST_ROUTED.saturating_sub(hashes.len());
        for other in self.prompt.iter().flat_map(|prompt| prompt.others()) {
            let mut key = other.key(size as usize);
            key.hashes.truncate(room);
            room -= key.hashes.len();
            let (mut held, mut sent) = (Vec::new(), Vec::new());
            front.control.blocks().overlaps(&key.hashes, &mut held, &mut sent);
            let held = held.iter().find(|held| Some(held.rank) == ix).map_or(0, |held| held.blocks);
            self.is_sent(front, selection, key.seed, &key.hashes, held);
        }
    }

    /// Tells everybody that these blocks go there, of which it has the first `held`, unless all know.
    fn is_sent(&self, front: &Front, selection: &Selection, seed: Seed, hashes: &[LocalHash], held: u32) {
        let worker = &selection.worker;
        let ix = worker.live.ranks().get(selection.rank as usize).copied();
        let capacity = worker.reckoned_capacity(selection.rank);
        let known = front.control.blocks();
        if hashes.is_empty() || !known.is_news(ix, hashes, held, capacity.is_some()) {
            return;
        }
        if let Some(ix) = ix.filter(|ix| *ix != NOT_SCORED) {
            known.recent.note(ix, seed, hashes);
        }
        let mut locals = Vec::with_capacity(hashes.len() * 8);
        hashes.iter().for_each(|hash| locals.extend_from_slice(&hash.0.to_le_bytes()));
        front.control.tell_cache(CacheCommand::Routed {
            rank: RankKey { worker: worker.record.ix, rank: selection.rank },
            seed,
            locals: locals.into(),
            capacity,
        });
    }

    /// What to book where it goes.
    pub(super) fn share(&self, selection: &Selection) -> Share {
        let (prefill_tokens, decode_blocks) = selection.to_book(self.prompt_tokens);
        let blocks = self.blocks(selection.worker.block_size());
        let chain = blocks.map(|blocks| Arc::clone(blocks.chain()));
        Share { rank: selection.rank, prefill_tokens, decode_blocks, chain }
    }

    /// Tokens of the prompt that the chosen worker has cached, as far as its engine would use
    /// them: the last token is computed in any case. `None` if the prompt is not known.
    pub(super) fn cached_tokens(&self, selection: &Selection) -> Option<u32> {
        // Of several prompts the one that was looked up: of the others nothing is known.
        let tokens = u32::try_from(self.prompt.as_ref()?.own_tokens()).unwrap_or(u32::MAX);
        let block = selection.worker.block_size();
        let usable = tokens.saturating_sub(1) / block;
        Some(selection.overlap.blocks.min(usable) * block)
    }

    /// What would be chosen how often, without choosing.
    pub(super) fn rehearse(
        &self,
        front: &Front,
        model: Option<&str>,
        part: Part,
    ) -> Result<Rehearsal, NoWorker> {
        let view = front.control.registry();
        self.as_routing_sees_it(front, &view, model, part, |request| {
            rehearse(&view, self.policy_of(front, part), request, &limits(front), &mut rand::rng())
        })
    }

    /// One candidate for people and tools.
    pub(super) fn candidate(&self, front: &Front, explained: &Explained) -> CandidateReply {
        let view = front.control.registry();
        let terms = explained.terms.map(|terms| CostReply {
            queued: rounded(terms.queued),
            prompt: rounded(terms.prompt),
            credit: rounded(terms.credit),
            decode: rounded(terms.decode),
        });
        CandidateReply {
            worker: explained.worker.clone(),
            rank: explained.rank,
            share: None,
            overlap: TierBlocks {
                gpu: explained.overlap.gpu,
                host: explained.overlap.host,
                disk: explained.overlap.disk(),
            },
            coming: explained.coming,
            block_size: view.worker(&explained.worker).map_or(0, |worker| worker.block_size()),
            load: explained.load,
            correction: explained.correction,
            cost: explained.terms.map(|terms| rounded(terms.total())),
            terms,
            not_chosen: explained.filtered.map(|why| why.to_string()).or_else(|| explained.behind.clone()),
        }
    }

    /// `Everline-Trace`, if it is asked for: a line of JSON with what was known of the candidates
    /// before the request was booked, the chosen one first and the others after it, best first; the same
    /// of those for the prefill, if somebody else does that; no longer than [`MOST_TRACE_BYTES`].
    pub(super) fn trace(
        &self,
        front: &Front,
        model: Option<&str>,
        tried: &[WorkerId],
        selection: &Selection,
        prefill: Option<&Selection>,
    ) -> Option<HeaderValue> {
        if !self.wishes.trace {
            return None;
        }
        let mut all = self.traced(front, model, tried, selection)?;
        let mut of_prefill = match prefill {
            Some(prefill) => Some(self.traced(front, model, tried, prefill)?),
            None => None,
        };
        loop {
            let mut trace = all.json(self, front);
            trace["prompt_tokens"] = self.prompt_tokens.into();
            trace["source"] = self.source().into();
            if let Some(prefill) = &of_prefill {
                trace["prefill"] = prefill.json(self, front);
            }
            let trace = trace.to_string();
            // Ids may be long; the last candidates are the least interesting.
            let longest = match &mut of_prefill {
                Some(prefill) if prefill.listed.len() > all.listed.len() => &mut prefill.listed,
                _ => &mut all.listed,
            };
            if trace.len() <= MOST_TRACE_BYTES || longest.pop().is_none() {
                return HeaderValue::try_from(trace).ok();
            }
        }
    }

    fn traced(
        &self,
        front: &Front,
        model: Option<&str>,
        tried: &[WorkerId],
        selection: &Selection,
    ) -> Option<Traced> {
        let view = front.control.registry();
        let part = selection.part;
        let chosen = (selection.worker.id(), selection.rank);
        let mut explained = self
            .as_routing_sees_it(front, &view, model, part, |request| {
                explain(&view, self.policy_of(front, part), request, &limits(front), tried, Some(chosen))
            })
            .ok()?;
        let cost = |c: &Explained| c.terms.map_or(f64::INFINITY, |terms| terms.total());
        let other = |c: &Explained| (&c.worker, c.rank) != chosen;
        explained.sort_by(|a, b| {
            let by_kind = (other(a), a.filtered.is_some()).cmp(&(other(b), b.filtered.is_some()));
            by_kind.then_with(|| cost(a).total_cmp(&cost(b)))
        });
        let listed = explained.iter().take(MOST_TRACED).map(|explained| self.candidate(front, explained));
        let (worker, rank) = (chosen.0.clone(), chosen.1);
        Some(Traced { part, worker, rank, all: explained.len(), listed: listed.collect() })
    }
}

/// What is told of one choice.
struct Traced {
    part: Part,
    worker: WorkerId,
    rank: u32,
    all: usize,
    listed: Vec<CandidateReply>,
}

impl Traced {
    fn json(&self, placing: &Placing, front: &Front) -> serde_json::Value {
        json!({
            "policy": placing.policy_name(front, self.part),
            "chosen": {"worker": self.worker, "rank": self.rank},
            "candidates": self.listed,
            "more": self.all - self.listed.len(),
        })
    }
}

/// Costs to a thousandth of a block.
fn rounded(cost: f64) -> f64 {
    (cost * 1000.0).round() / 1000.0
}

fn limits(front: &Front) -> Limits {
    Limits {
        now_ms: front.now_ms(),
        breaker: front.config.proxy.breaker,
        max_requests: front.config.proxy.max_requests_per_worker,
        overload: front.config.proxy.overload,
    }
}

/// Adds who holds, and was just sent, these blocks. Blocks of different sizes never meet, so that
/// lists of several sizes can be put together.
fn look_up(front: &Front, locals: &[LocalHash], held: &mut Vec<Overlap>, sent: &mut Vec<Overlap>) {
    let blocks = front.control.blocks();
    if held.is_empty() && sent.is_empty() {
        return blocks.overlaps(locals, held, sent);
    }
    let (mut more_held, mut more_sent) = (Vec::new(), Vec::new());
    blocks.overlaps(locals, &mut more_held, &mut more_sent);
    for (all, more) in [(held, more_held), (sent, more_sent)] {
        all.extend(more);
        all.sort_unstable_by_key(|overlap| overlap.rank);
        all.dedup_by_key(|overlap| overlap.rank);
    }
}

fn block_sizes(view: &RegistryView, model: Option<&str>) -> Vec<u32> {
    let serving = match model {
        Some(model) => view.by_model.get(model).map_or(&[][..], |positions| positions),
        None => &view.all,
    };
    let mut sizes: Vec<u32> = Vec::new();
    for &position in serving {
        let size = view.workers[position].block_size();
        if sizes.last() != Some(&size) && !sizes.contains(&size) && sizes.len() < MOST_SIZES {
            sizes.push(size);
        }
    }
    sizes
}

/// The base model, if `model` is an adapter.
pub(super) fn base_of(view: &RegistryView, model: &str) -> Option<String> {
    let first = *view.by_model.get(model)?.first()?;
    let served = view.workers[first].record.spec.models.iter().find(|served| served.name == model)?;
    served.lora_of.clone()
}
