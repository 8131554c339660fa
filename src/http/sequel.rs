//! What an answer adds to the prompt's blocks, at an engine that does not tell: its blocks are
//! reckoned from what it was sent and what it has generated, so that the conversation's next
//! prompt is found there as far as the engine really has it.

use std::sync::Arc;

use bytes::Bytes;
use memchr::memmem;
use tokio::runtime::Handle;

use super::front::Front;
use super::placing::{Placing, PromptBlocks};
use crate::ids::{WorkerId, WorkerIx};
use crate::kv::hash::LocalHash;
use crate::routing::view::{NOT_SCORED, WorkerView};
use crate::state::cache::MOST_ROUTED;
use crate::state::command::CacheCommand;
use crate::state::ranks::RankKey;
use crate::tokens::{Answered, Collector, Form, Prompt, Tokenizers};

/// A request that is answered by an engine whose blocks are reckoned.
pub(super) struct Sequel {
    collector: Collector,
    of: Arc<Of>,
}

/// What of a request is needed when its answer has ended.
struct Of {
    front: Arc<Front>,
    tokenizers: Arc<Tokenizers>,
    model: String,
    form: Form,
    prompt: Prompt,
    blocks: Arc<PromptBlocks>,
    worker: WorkerId,
    ix: WorkerIx,
    generation: u64,
    rank: u32,
}

impl std::fmt::Debug for Sequel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sequel").field("worker", &self.of.worker).finish_non_exhaustive()
    }
}

/// What is asked for in a request, and who answers.
pub(super) struct Question<'a> {
    pub(super) path: &'a str,
    pub(super) model: &'a str,
    pub(super) body: &'a Bytes,
    pub(super) placing: &'a Placing,
    pub(super) worker: &'a WorkerView,
    pub(super) rank: u32,
}

impl Sequel {
    /// Of an answer that has just begun, with events or in one piece. `None` where the engine
    /// tells by itself, or nothing could be made of it.
    pub(super) fn of(front: &Arc<Front>, question: Question<'_>, events: bool) -> Option<Self> {
        let Question { path, model, body, placing, worker, rank } = question;
        worker.reckoned_capacity(rank)?;
        let tokenizers = Arc::clone(front.config.tokenizers.as_ref()?);
        let form = Form::of_path(path)?;
        let (prompt, blocks) = placing.known_prompt(worker.block_size())?;
        // As much as is told of any prompt; or the text of the answer is that of the prompt, too.
        if !prompt.can_go_on() || blocks.hashes().len() >= MOST_ROUTED || asks_for_echo(body) {
            return None;
        }
        let collector = Collector::new(form, events, prompt.ids().is_none())?;
        let model = super::placing::base_of(&front.control.registry(), model).unwrap_or(model.to_owned());
        let of = Of {
            front: Arc::clone(front),
            tokenizers,
            model,
            form,
            prompt: prompt.clone(),
            blocks,
            worker: worker.id().clone(),
            ix: worker.record.ix,
            generation: worker.record.generation,
            rank,
        };
        Some(Self { collector, of: Arc::new(of) })
    }

    /// Takes note of a piece of the answer.
    pub(super) fn push(&mut self, data: &[u8]) {
        self.collector.push(data);
    }

    /// The answer has ended, or the client has gone: what was generated until then stays in the
    /// engine's cache. To be dropped instead when the engine has failed.
    pub(super) fn finish(self) {
        let Self { collector, of } = self;
        if collector.is_empty() {
            return;
        }
        // Outside a runtime the process ends. Bounded by the requests, as each has one answer; what
        // takes long in it waits in the tokenizers' queue.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(of.tell(collector));
        }
    }
}

impl Of {
    /// Tells everybody what the engine has now.
    async fn tell(self: Arc<Self>, answer: Collector) {
        let answered =
            Answered { model: self.model.clone(), form: self.form, prompt: self.prompt.clone(), answer };
        let more = self.tokenizers.behind(answered, self.blocks.block_size()).await;
        if more.is_empty() {
            return;
        }
        let view = self.front.control.registry();
        let same = |worker: &&Arc<WorkerView>| {
            worker.record.ix == self.ix && worker.record.generation == self.generation
        };
        let Some(worker) = view.worker(&self.worker).filter(same) else { return };
        let mut locals = [self.blocks.hashes(), &more].concat();
        locals.truncate(MOST_ROUTED);
        say(&self.front, worker, self.rank, &self.blocks, &locals);
    }
}

fn say(front: &Front, worker: &WorkerView, rank: u32, blocks: &PromptBlocks, locals: &[LocalHash]) {
    let Some(capacity) = worker.reckoned_capacity(rank) else { return };
    let ix = worker.live.ranks().get(rank as usize).copied();
    let known = front.control.blocks();
    let held = ix.map_or(0, |ix| {
        let mut overlaps = Vec::new();
        known.index.load().lookup(locals, &mut overlaps);
        overlaps.iter().find(|overlap| overlap.rank == ix).map_or(0, |overlap| overlap.blocks)
    });
    if !known.is_news(ix, locals, held, true) {
        return;
    }
    if let Some(ix) = ix.filter(|ix| *ix != NOT_SCORED) {
        known.recent.note(ix, blocks.seed(), locals);
    }
    front.control.tell_cache(CacheCommand::Routed {
        rank: RankKey { worker: worker.record.ix, rank },
        seed: blocks.seed(),
        locals: locals.iter().flat_map(|hash| hash.0.to_le_bytes()).collect(),
        capacity: Some(capacity),
    });
}

/// Whether the prompt may be in the answer's text. Seldom enough that it need not be exact.
fn asks_for_echo(body: &[u8]) -> bool {
    memmem::find(body, b"\"echo\"").is_some()
}
