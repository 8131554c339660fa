//! What was just sent where, before the engines have told of it.
//!
//! A burst of equal prompts would scatter over the workers until the first event arrives, and an
//! engine's events come a step later at best, or after all that waits before them. So every prompt
//! is taken for cached where it was sent, by whichever replica: until the first token of its answer,
//! or until it has failed, and then for what is left of two turns, so that the events get here
//! first. A turn is a [`TURN`].
//!
//! ```text
//!            note                    turn                      turn
//!  sent ───────────▶ this turn ────────────▶ the one before ─────────▶ forgotten
//!                        ▲                         │
//!                        └── if it still waits ────┘
//! ```
//!
//! Other replicas are told of the prompt once, and with every turn of the prompts that still wait,
//! by their [`Key`]s: one that is not named any more was answered, has failed, or its replica is gone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3;

use crate::kv::hash::{LocalHash, Seed};
use crate::kv::index::{Index, Options};
use crate::kv::types::{Overlap, RankIx};

/// How long a turn is.
pub const TURN: Duration = Duration::from_secs(1);

/// Most blocks of one rank in a turn; the least recently sent go first.
const MOST_BLOCKS: u64 = 1 << 18;

/// Most memory of one turn, for all ranks.
const MOST_BYTES: u64 = 64 << 20;

/// Prompts that are known to wait, of this replica and again of all others, and their blocks in
/// all. Further ones count for two turns.
const MOST_WAITING: usize = 1 << 15;
const MOST_WAITING_BLOCKS: usize = 1 << 20;

/// Most prompts that others are told of in a turn, as still waiting; 64 KiB of log.
const MOST_NAMED: usize = 8192;

/// Turns after which a prompt of another replica that nobody named is forgotten.
const NAMED_WITHIN: u64 = 2;

/// Names a prompt that is on its way to a rank; equal prompts have the same name.
pub type Key = u64;

/// The prompts of this turn and the one before, and those that wait for longer.
#[derive(Debug)]
pub struct Recent {
    /// The newer one first.
    turns: ArcSwap<[Arc<Index>; 2]>,
    waiting: Arc<Mutex<Waiting>>,
}

/// Prompts whose first token has not come.
#[derive(Debug, Default)]
struct Waiting {
    turn: u64,
    /// Of this replica.
    own: Table<u32>,
    /// Of the others.
    told: Table<Named>,
}

/// When somebody said last that a prompt waits.
#[derive(Clone, Copy, Debug)]
struct Named {
    turn: u64,
    /// Again, since the last turn began.
    again: bool,
}

#[derive(Clone, Debug)]
struct Prompt {
    rank: RankIx,
    seed: Seed,
    locals: Arc<[LocalHash]>,
}

#[derive(Debug)]
struct Table<T> {
    prompts: HashMap<Key, (Prompt, T)>,
    blocks: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { prompts: HashMap::new(), blocks: 0 }
    }
}

impl<T> Table<T> {
    fn has_room_for(&self, blocks: usize) -> bool {
        self.prompts.len() < MOST_WAITING && self.blocks + blocks <= MOST_WAITING_BLOCKS
    }

    fn insert(&mut self, key: Key, prompt: Prompt, value: T) {
        self.blocks += prompt.locals.len();
        self.prompts.insert(key, (prompt, value));
    }

    fn remove(&mut self, key: Key) {
        if let Some((prompt, _)) = self.prompts.remove(&key) {
            self.blocks -= prompt.locals.len();
        }
    }
}

/// A request waits for its first token; it does no longer when this is dropped.
#[derive(Debug)]
pub struct Awaited {
    waiting: Arc<Mutex<Waiting>>,
    key: Key,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let own = &mut self.waiting.lock().own;
        let Some((_, requests)) = own.prompts.get_mut(&self.key) else { return };
        *requests -= 1;
        if *requests == 0 {
            own.remove(self.key);
        }
    }
}

fn key_of(rank: RankIx, locals: &[LocalHash]) -> Key {
    let mut hasher = Xxh3::with_seed(u64::from(rank.0));
    locals.iter().for_each(|local| hasher.update(&local.0.to_le_bytes()));
    hasher.digest()
}

fn empty() -> Arc<Index> {
    Arc::new(Index::new(Options { bytes: MOST_BYTES }))
}

impl Default for Recent {
    fn default() -> Self {
        Self { turns: ArcSwap::from_pointee([empty(), empty()]), waiting: Arc::default() }
    }
}

impl Recent {
    /// A prompt of these blocks was sent to a rank.
    pub fn note(&self, rank: RankIx, seed: Seed, locals: &[LocalHash]) {
        if !locals.is_empty() {
            self.turns.load()[0].predict(rank, seed, locals, MOST_BLOCKS);
        }
    }

    /// A prompt that was noted counts until the guard is dropped, however long that takes. `None`
    /// if too many do.
    pub fn until_first_token(&self, rank: RankIx, seed: Seed, locals: &[LocalHash]) -> Option<Awaited> {
        let key = key_of(rank, locals);
        let mut waiting = self.waiting.lock();
        let own = &mut waiting.own;
        if let Some((_, requests)) = own.prompts.get_mut(&key) {
            *requests += 1;
        } else if own.has_room_for(locals.len()) {
            own.insert(key, Prompt { rank, seed, locals: locals.into() }, 1);
        } else {
            return None;
        }
        Some(Awaited { waiting: Arc::clone(&self.waiting), key })
    }

    /// Another replica sent a prompt to a rank.
    pub fn note_told(&self, rank: RankIx, seed: Seed, locals: Vec<LocalHash>) {
        if locals.is_empty() {
            return;
        }
        self.note(rank, seed, &locals);
        let key = key_of(rank, &locals);
        let mut waiting = self.waiting.lock();
        let named = Named { turn: waiting.turn, again: false };
        let told = &mut waiting.told;
        if let Some((_, known)) = told.prompts.get_mut(&key) {
            *known = named;
        } else if told.has_room_for(locals.len()) {
            told.insert(key, Prompt { rank, seed, locals: locals.into() }, named);
        }
    }

    /// Prompts that another replica told of still wait.
    pub fn still_wait(&self, keys: &[Key]) {
        let mut waiting = self.waiting.lock();
        let turn = waiting.turn;
        for key in keys {
            if let Some((_, named)) = waiting.told.prompts.get_mut(key) {
                *named = Named { turn, again: true };
            }
        }
    }

    /// Whether the rank was sent all of these blocks in this turn already, or they still wait: then
    /// to note it again would change nothing. `buffer` is scratch.
    pub fn knows(&self, rank: RankIx, locals: &[LocalHash], buffer: &mut Vec<Overlap>) -> bool {
        self.turns.load()[0].lookup(locals, buffer);
        let sent = buffer.binary_search_by_key(&rank, |sent| sent.rank);
        sent.is_ok_and(|at| buffer[at].blocks as usize == locals.len())
    }

    /// Whether it is news to any replica that a prompt of these blocks goes to a rank that has the
    /// first `held` of them. The events of a rank tell by themselves, so that only what they have not
    /// told yet counts; of one that is `reckoned`, it has to be known to a turn what it used last.
    pub fn is_news(
        &self,
        rank: RankIx,
        locals: &[LocalHash],
        held: u32,
        reckoned: bool,
        buffer: &mut Vec<Overlap>,
    ) -> bool {
        let held = held as usize >= locals.len();
        match reckoned {
            true => !held || !self.knows(rank, locals, buffer),
            false => !held && !self.knows(rank, locals, buffer),
        }
    }

    /// Raises `overlaps` (sorted by rank, as [`Index::lookup`] leaves them) to what was just sent.
    /// `buffer` is scratch.
    pub fn raise(&self, locals: &[LocalHash], overlaps: &mut Vec<Overlap>, buffer: &mut Vec<Overlap>) {
        for turn in self.turns.load().iter() {
            turn.lookup(locals, buffer);
            for sent in buffer.iter() {
                match overlaps.binary_search_by_key(&sent.rank, |known| known.rank) {
                    Ok(at) if overlaps[at].blocks < sent.blocks => overlaps[at] = *sent,
                    Ok(_) => {}
                    Err(at) => overlaps.insert(at, *sent),
                }
            }
        }
    }

    /// Begins the next turn, and forgets the last but one except for what still waits. Returns this
    /// replica's prompts that do, to be told to the others: [`Recent::still_wait`]. To be called by
    /// one thread, once in a [`TURN`].
    pub fn turn(&self) -> Vec<Key> {
        let (mut prompts, keys) = self.waiting.lock().turn();
        let turns = self.turns.load();
        // Nothing was sent for two turns: as empty as can be.
        if prompts.is_empty() && turns.iter().all(|turn| turn.counters().blocks == 0) {
            return keys;
        }
        let next = empty();
        // In an order that no map decides, for the simulation.
        prompts.sort_unstable_by_key(|(key, _)| *key);
        for (_, prompt) in prompts {
            next.predict(prompt.rank, prompt.seed, &prompt.locals, MOST_BLOCKS);
        }
        self.turns.store(Arc::new([next, turns[0].clone()]));
        keys
    }
}

impl Waiting {
    /// What goes on to wait, and which of it is ours.
    fn turn(&mut self) -> (Vec<(Key, Prompt)>, Vec<Key>) {
        self.turn += 1;
        let own = self.own.prompts.iter().map(|(key, (prompt, _))| (*key, prompt.clone()));
        let mut prompts: Vec<(Key, Prompt)> = own.collect();
        let mut keys: Vec<Key> = prompts.iter().map(|(key, _)| *key).take(MOST_NAMED).collect();
        keys.sort_unstable();
        let mut over = Vec::new();
        for (key, (prompt, named)) in &mut self.told.prompts {
            if std::mem::take(&mut named.again) {
                prompts.push((*key, prompt.clone()));
            } else if self.turn - named.turn > NAMED_WITHIN {
                over.push(*key);
            }
        }
        over.into_iter().for_each(|key| self.told.remove(key));
        (prompts, keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANK: RankIx = RankIx(3);

    fn locals(blocks: u64) -> Vec<LocalHash> {
        (1..=blocks).map(LocalHash).collect()
    }

    fn coming(recent: &Recent, locals: &[LocalHash]) -> u32 {
        let mut overlaps = Vec::new();
        recent.raise(locals, &mut overlaps, &mut Vec::new());
        overlaps.first().map_or(0, |overlap| overlap.blocks)
    }

    #[test]
    fn what_was_sent_counts_for_two_turns_beside_what_is_known() {
        let recent = Recent::default();
        let locals = locals(8);
        recent.note(RANK, Seed::default(), &locals[..6]);
        let known = Overlap { rank: RankIx(1), blocks: 2, gpu: 2, host: 0 };
        let raised = |recent: &Recent| {
            let mut overlaps = vec![known, Overlap { rank: RankIx(3), blocks: 4, gpu: 1, host: 3 }];
            recent.raise(&locals, &mut overlaps, &mut Vec::new());
            overlaps
        };
        let sent = Overlap { rank: RankIx(3), blocks: 6, gpu: 6, host: 0 };
        assert_eq!(raised(&recent), [known, sent]);
        let knows = |rank, blocks| recent.knows(RankIx(rank), &locals[..blocks], &mut Vec::new());
        assert!(knows(3, 6) && knows(3, 2) && !knows(3, 7) && !knows(1, 2));
        assert!(recent.turn().is_empty());
        assert!(!knows(3, 6), "it is to be noted again before it is forgotten");
        assert_eq!(raised(&recent), [known, sent]);
        recent.turn();
        assert_eq!(raised(&recent)[1].blocks, 4, "forgotten after two turns");
        recent.turn();
        assert_eq!(coming(&recent, &locals), 0);
    }

    #[test]
    fn a_prompt_that_waits_for_its_first_token_counts_until_then_and_at_most_two_turns_more() {
        let recent = Recent::default();
        let locals = locals(8);
        recent.note(RANK, Seed::default(), &locals);
        let [one, another] =
            [(); 2].map(|()| recent.until_first_token(RANK, Seed::default(), &locals).unwrap());
        for _ in 0..5 {
            assert_eq!(recent.turn(), [one.key]);
            assert_eq!(coming(&recent, &locals), 8);
            assert!(recent.knows(RANK, &locals, &mut Vec::new()), "nobody needs to hear of it again");
        }
        drop(one);
        assert_eq!(recent.turn().len(), 1, "another request of the same prompt waits");
        drop(another);
        assert!(recent.turn().is_empty());
        assert_eq!(coming(&recent, &locals), 8, "its events may still be on their way");
        recent.turn();
        assert_eq!(coming(&recent, &locals), 0);
        let waiting = recent.waiting.lock();
        assert!(waiting.own.prompts.is_empty() && waiting.own.blocks == 0);
    }

    #[test]
    fn a_prompt_of_another_replica_counts_as_long_as_that_one_names_it() {
        let (here, there) = (Recent::default(), Recent::default());
        let locals = locals(8);
        here.note(RANK, Seed::default(), &locals);
        there.note_told(RANK, Seed::default(), locals.clone());
        let awaited = here.until_first_token(RANK, Seed::default(), &locals).unwrap();
        for turn in 0..6 {
            // Turns of two replicas do not begin together, and words take their time.
            if turn % 2 == 0 {
                there.still_wait(&here.turn());
                there.turn();
            } else {
                there.turn();
                there.still_wait(&here.turn());
            }
            assert_eq!(coming(&there, &locals), 8, "turn {turn}");
        }
        drop(awaited);
        for _ in 0..=NAMED_WITHIN + 2 {
            there.still_wait(&here.turn());
            there.turn();
        }
        assert_eq!(coming(&there, &locals), 0);
        assert!(there.waiting.lock().told.prompts.is_empty() && there.waiting.lock().told.blocks == 0);
    }

    #[test]
    fn what_is_known_to_wait_is_bounded() {
        let recent = Recent::default();
        let long = locals(MOST_WAITING_BLOCKS as u64 / 2);
        let sent = |rank| recent.until_first_token(RankIx(rank), Seed::default(), &long);
        let [one, two, three] = [1, 2, 3].map(sent);
        assert!(one.is_some() && two.is_some() && three.is_none());
        drop(one);
        assert!(sent(3).is_some(), "there is room again");
        for rank in 1..=3 {
            recent.note_told(RankIx(rank), Seed::default(), long.clone());
        }
        assert_eq!(recent.waiting.lock().told.prompts.len(), 2);
    }
}
