//! Where a request goes and why: its prompt's blocks, who holds them, and the choice.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;

use super::front::Front;
use super::wishes::Wishes;
use crate::admin_types::{CandidateReply, CostReply, TierBlocks};
use crate::ids::{WorkerId, WorkerIx};
use crate::kv::hash::{LocalHash, SequenceHash, sequence_hashes};
use crate::kv::types::Overlap;
use crate::routing::book::Share;
use crate::routing::policy::{Pin, Policy, RouteRequest};
use crate::routing::rehearse::{Rehearsal, rehearse};
use crate::routing::select::{Explained, Limits, NoWorker, Selection, explain, select};
use crate::routing::view::{NOT_SCORED, RegistryView};
use crate::state::cache::MOST_ROUTED;
use crate::state::command::CacheCommand;
use crate::state::ranks::RankKey;
use crate::tokens::{Ask, Form, Prompt, PromptKey};

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
    prompt: Option<Prompt>,
    /// The prompt's blocks, by block size; made when first needed.
    keys: Mutex<Vec<Arc<Blocks>>>,
}

/// A prompt in blocks of one size.
#[derive(Debug)]
struct Blocks {
    key: PromptKey,
    chain: OnceLock<Arc<[SequenceHash]>>,
}

impl Blocks {
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
            now: SystemTime::now(),
        };
        let prompt = tokenizers.prompt(ask).await;
        self.prompt_tokens = u32::try_from(prompt.tokens()).unwrap_or(u32::MAX);
        self.prompt = Some(prompt);
    }

    fn policy<'a>(&self, front: &'a Front) -> &'a dyn Policy {
        let asked = self.wishes.overrides.policy().and_then(|name| front.policy(name));
        asked.unwrap_or(front.config.policy.as_ref())
    }

    fn blocks(&self, size: u32) -> Option<Arc<Blocks>> {
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
        let blocks = Arc::new(Blocks { key, chain: OnceLock::new() });
        keys.push(Arc::clone(&blocks));
        Some(blocks)
    }

    /// Asks `with` about the request as routing sees it now.
    fn as_routing_sees_it<R>(
        &self,
        front: &Front,
        view: &RegistryView,
        model: Option<&str>,
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
            view_age_ms: front.control.view_age_ms(),
        })
    }

    /// Chooses a worker and rank.
    pub(super) fn choose(
        &self,
        front: &Front,
        model: Option<&str>,
        tried: &[WorkerId],
    ) -> Result<Selection, NoWorker> {
        let view = front.control.registry();
        self.as_routing_sees_it(front, &view, model, |request| {
            select(&view, self.policy(front), request, &limits(front), tried, &mut rand::rng())
        })
    }

    /// What there is to choose from, without choosing.
    pub(super) fn explain(&self, front: &Front, model: Option<&str>) -> Result<Vec<Explained>, NoWorker> {
        let view = front.control.registry();
        self.as_routing_sees_it(front, &view, model, |request| {
            explain(&view, self.policy(front), request, &limits(front), &[])
        })
    }

    /// The name of the policy that chooses.
    pub(super) fn policy_name(&self, front: &Front) -> &'static str {
        self.policy(front).name()
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
        let binds = self.policy(front).binds_sessions() && self.wishes.worker.is_none();
        let Some(session) = self.wishes.session.filter(|_| binds) else { return };
        let (now, worker) = (front.control.session(session), selection.worker.record.ix);
        if now != Some((worker, false)) {
            let from = now.map(|(worker, _)| worker);
            front.control.tell_cache(CacheCommand::Bind { session, worker, from });
        }
    }

    /// Tells everybody that the prompt goes there: it is as good as cached from now on. Where that
    /// is known already, nothing is said: a prompt is some kilobytes of log on every replica.
    pub(super) fn sent_to(&self, front: &Front, selection: &Selection) {
        self.bind(front, selection);
        let worker = &selection.worker;
        let Some(blocks) = self.blocks(worker.block_size()).filter(|b| !b.key.hashes.is_empty()) else {
            return;
        };
        let (seed, hashes) = (blocks.key.seed, &blocks.key.hashes);
        let ix = worker.live.ranks().get(selection.rank as usize).copied();
        let capacity = worker.reckoned_capacity(selection.rank);
        let known = front.control.blocks();
        if !known.is_news(ix, hashes, selection.overlap.blocks, capacity.is_some()) {
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
        self.prompt.as_ref()?;
        let block = selection.worker.block_size();
        let usable = self.prompt_tokens.saturating_sub(1) / block;
        Some(selection.overlap.blocks.min(usable) * block)
    }

    /// What would be chosen how often, without choosing.
    pub(super) fn rehearse(&self, front: &Front, model: Option<&str>) -> Result<Rehearsal, NoWorker> {
        let view = front.control.registry();
        self.as_routing_sees_it(front, &view, model, |request| {
            rehearse(&view, self.policy(front), request, &limits(front), &mut rand::rng())
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
            cost: explained.terms.map(|terms| rounded(terms.total())),
            terms,
            not_chosen: explained.filtered.map(|why| why.to_string()),
        }
    }

    /// `Everline-Trace`: a line of JSON with what was known of the candidates, best first; no
    /// longer than [`MOST_TRACE_BYTES`].
    pub(super) fn trace(&self, front: &Front, model: Option<&str>) -> Option<String> {
        let mut explained = self.explain(front, model).ok()?;
        let cost = |c: &Explained| c.terms.map_or(f64::INFINITY, |terms| terms.total());
        explained.sort_by(|a, b| {
            a.filtered.is_some().cmp(&b.filtered.is_some()).then_with(|| cost(a).total_cmp(&cost(b)))
        });
        let all = explained.len();
        let mut listed: Vec<_> =
            explained.iter().take(MOST_TRACED).map(|explained| self.candidate(front, explained)).collect();
        loop {
            let trace = json!({
                "policy": self.policy_name(front),
                "prompt_tokens": self.prompt_tokens,
                "source": self.source(),
                "candidates": listed,
                "more": all - listed.len(),
            })
            .to_string();
            // Ids may be long; the last candidates are the least interesting.
            if trace.len() <= MOST_TRACE_BYTES || listed.pop().is_none() {
                return Some(trace);
            }
        }
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
fn base_of(view: &RegistryView, model: &str) -> Option<String> {
    let first = *view.by_model.get(model)?.first()?;
    let served = view.workers[first].record.spec.models.iter().find(|served| served.name == model)?;
    served.lora_of.clone()
}
