//! Which pair a request goes to: one whose groups are both ready, by what they have to do for all
//! replicas and by what the prefill group has cached of the prompt. Where names say which groups there
//! are, `named` has the pairs.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rand::seq::IndexedRandom;

use super::named::{self, Answers, AtStranger, Ended, Stranger, Strangers, Weighed};
use super::prompt::Prompt;
use crate::http::front::Front;
use crate::http::names::Names;
use crate::kv::types::Overlap;
use crate::naming::answer::WEIGHT;
use crate::routing::book::{Booking, Share};
use crate::routing::breaker::BreakerState;
use crate::routing::cost::{CostOptions, choose};
use crate::routing::groups::Groups;
use crate::routing::policy::{Candidate, RouteRequest};
use crate::routing::stale::Freshness;
use crate::routing::view::{NOT_SCORED, WorkerView};
use crate::state::command::CacheCommand;
use crate::state::ksana::{GroupKey, Role, RoutePair};
use crate::state::ranks::RankKey;

/// A pair that was chosen.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    /// Where it is.
    pub(super) route: Arc<RoutePair>,
    /// Its groups; in strict mode a pair may be of groups that never sent a heartbeat.
    groups: Option<(Arc<WorkerView>, Arc<WorkerView>)>,
    /// Its groups where the registry knows neither.
    strangers: Option<Strangers>,
    /// Blocks of the prompt that the prefill group has.
    held: u32,
}

/// A request at both groups of a pair; freed when dropped.
#[derive(Debug, Default)]
pub(super) struct Booked {
    /// Until the prefill group has said all.
    pub(super) prefill: Option<Booking>,
    /// Until the end.
    pub(super) decode: Option<Booking>,
    /// At groups that the registry does not know, of both until the end.
    _strangers: Option<(AtStranger, AtStranger)>,
}

impl Pair {
    /// Books the request at both groups, and tells all replicas that its prompt goes there.
    pub(super) fn book(&self, front: &Front, prompt: &Prompt) -> Booked {
        let Some((prefill, decode)) = &self.groups else {
            let begin =
                |pair: &Strangers| (AtStranger::begin(&pair.prefill), AtStranger::begin(&pair.decode));
            return Booked { _strangers: self.strangers.as_ref().map(begin), ..Booked::default() };
        };
        self.tell(front, prefill, prompt);
        let bookings = front.control.bookings();
        let share = |worker: &WorkerView, held: u32, computes: bool| {
            let block = worker.block_size();
            let cached = held.saturating_mul(block);
            Share {
                rank: 0,
                prefill_tokens: if computes { prompt.tokens.saturating_sub(cached) } else { 0 },
                decode_blocks: prompt.tokens.div_ceil(block),
                chain: Some(Arc::clone(&prompt.chain)),
            }
        };
        Booked {
            prefill: Some(bookings.book_share(Arc::clone(prefill), share(prefill, self.held, true))),
            decode: Some(bookings.book_share(Arc::clone(decode), share(decode, 0, false))),
            _strangers: None,
        }
    }

    /// The decode group's blocks grow with the output, in blocks of so many tokens.
    pub(super) fn block_size(&self) -> u32 {
        self.groups.as_ref().map_or(u32::MAX, |(_, decode)| decode.block_size())
    }

    /// One of its groups failed a request.
    pub(super) fn failed(&self, front: &Front, role: Role) {
        let is_prefill = role == Role::Prefill;
        let breaker = match (&self.groups, &self.strangers) {
            (Some((prefill, decode)), _) => &if is_prefill { prefill } else { decode }.live.breaker,
            (None, Some(pair)) => &if is_prefill { &pair.prefill } else { &pair.decode }.breaker,
            (None, None) => return,
        };
        breaker.failed(front.now_ms(), &front.config.proxy.breaker);
    }

    /// Tells the name service how a leg ended.
    pub(super) fn ended(&self, front: &Front, role: Role, ended: Ended) {
        named::report(front, role, &self.route, ended);
    }

    /// Both have answered.
    pub(super) fn answered(&self) {
        if let Some((prefill, decode)) = &self.groups {
            prefill.live.breaker.succeeded();
            decode.live.breaker.succeeded();
        }
        if let Some(pair) = &self.strangers {
            pair.prefill.breaker.succeeded();
            pair.decode.breaker.succeeded();
        }
    }

    /// A prompt that was sent is as good as cached. Where that is known already nothing is said: a
    /// prompt is some kilobytes of log on every replica.
    fn tell(&self, front: &Front, prefill: &WorkerView, prompt: &Prompt) {
        let (hashes, known) = (&prompt.hashes, front.control.blocks());
        if hashes.is_empty() {
            return;
        }
        let ix = prefill.live.ranks().first().copied();
        if !known.is_news(ix, hashes, self.held, true) {
            return;
        }
        if let Some(ix) = ix.filter(|ix| *ix != NOT_SCORED) {
            known.recent.note(ix, prompt.seed, hashes);
        }
        let locals: Vec<u8> = hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect();
        front.control.tell_cache(CacheCommand::Routed {
            rank: RankKey { worker: prefill.record.ix, rank: 0 },
            seed: prompt.seed,
            locals: locals.into(),
            capacity: prefill.reckoned_capacity(0),
        });
    }
}

/// A pair, and the places of its groups on the board.
#[derive(Debug)]
struct Row {
    route: Arc<RoutePair>,
    groups: Option<(usize, usize)>,
    strangers: Option<Strangers>,
    weights: (u32, u32),
}

#[derive(Debug, Default)]
struct Board {
    /// Of the tables, when this was made.
    version: Option<u64>,
    groups: Arc<Groups>,
    /// Of the names, if there are any.
    answers: Answers,
    strangers: HashMap<(Role, String), Arc<Stranger>>,
    rows: Vec<Row>,
    prefill: Vec<Arc<WorkerView>>,
    decode: Vec<Arc<WorkerView>>,
}

/// The pairs that requests may go to, as last seen.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    board: ArcSwap<Board>,
}

impl Pairs {
    /// Any of the pairs, as the reference has it, by the weights of names; `None` if there is none.
    pub(super) fn any(&self, front: &Front, cluster: &str) -> Option<Pair> {
        let board = self.look(front, cluster, true);
        let mut rng = rand::rng();
        let row = match front.config.names {
            None => board.rows.choose(&mut rng),
            Some(_) => board.rows.choose_weighted(&mut rng, |row| named::product(row.weights)).ok(),
        }?;
        Some(board.pair(row, 0))
    }

    /// The best pair that was not tried; `None` if there is none.
    pub(super) fn best(
        &self,
        front: &Front,
        cluster: &str,
        prompt: &Prompt,
        tried: &[String],
    ) -> Option<Pair> {
        let board = self.look(front, cluster, false);
        let mut rows: Vec<(&Row, usize, usize)> = board
            .rows
            .iter()
            .filter(|row| !tried.contains(&row.route.comm_key))
            .filter_map(|row| row.groups.map(|(prefill, decode)| (row, prefill, decode)))
            .collect();
        let strangers: Vec<(&Row, &Strangers)> = board
            .rows
            .iter()
            .filter(|row| !tried.contains(&row.route.comm_key))
            .filter_map(|row| row.strangers.as_ref().map(|pair| (row, pair)))
            .collect();
        // Those that are known and those that are not cannot be compared: each kind gets its share.
        let all = rows.len() + strangers.len();
        if all == 0 {
            return None;
        }
        if !strangers.is_empty() && rand::random_range(0..all) >= rows.len() {
            return named::least(strangers, front, &mut rand::rng()).map(|row| board.pair(row, 0));
        }
        let age_ms = front.control.view_age_ms();
        let freshness = Freshness::of(age_ms);
        let (mut held, mut sent) = (Vec::new(), Vec::new());
        if !prompt.hashes.is_empty() {
            front.control.blocks().overlaps(&prompt.hashes, &mut held, &mut sent);
        }
        let peers_count = freshness != Freshness::OwnOnly;
        let look = |group: &WorkerView| {
            let ix = group.live.ranks().first().copied();
            let of = |list: &[Overlap]| {
                let at = ix.and_then(|ix| list.binary_search_by_key(&ix, |overlap| overlap.rank).ok());
                at.map(|at| list[at]).unwrap_or_default()
            };
            (of(&held), of(&sent))
        };
        let request =
            RouteRequest { prompt_tokens: prompt.tokens, view_age_ms: age_ms, ..Default::default() };
        // The decode group gets its blocks from the prefill group, whatever it had.
        let output = RouteRequest { prompt_tokens: 0, ..request };
        let prefill: Vec<(f64, u32)> = board
            .prefill
            .iter()
            .map(|group| {
                let (held, sent) = look(group);
                let coming = sent.blocks.saturating_sub(held.blocks);
                (cost(front, group, held, coming, &request, peers_count), held.blocks)
            })
            .collect();
        let decode: Vec<f64> = board
            .decode
            .iter()
            .map(|group| cost(front, group, Overlap::default(), 0, &output, peers_count))
            .collect();
        let pick = |rows: &[(&Row, usize, usize)]| {
            let costs: Vec<f64> = rows.iter().map(|(_, p, d)| prefill[*p].0 + decode[*d]).collect();
            // Ties by chance.
            choose(&costs, 0.0, freshness.tolerance(), &mut rand::rng()).min(rows.len() - 1)
        };
        let (now_ms, breaker) = (front.now_ms(), front.config.proxy.breaker);
        let is_open = |group: &WorkerView| group.live.breaker.state(now_ms) == BreakerState::Open;
        let is_doubtful =
            |(_, p, d): &(&Row, usize, usize)| is_open(&board.prefill[*p]) || is_open(&board.decode[*d]);
        let mut doubtful: Vec<_> = rows.extract_if(.., |row| is_doubtful(row)).collect();
        while !rows.is_empty() {
            let (row, p, d) = rows.swap_remove(pick(&rows));
            let enters = |group: &WorkerView| group.live.breaker.enter(now_ms, &breaker);
            if enters(&board.prefill[p]) && enters(&board.decode[d]) {
                return Some(board.pair(row, prefill[p].1));
            }
            // Somebody else's request is the trial of a group that failed.
            doubtful.push((row, p, d));
        }
        // There is no other: a failed attempt costs less than a refusal.
        let (row, p, _) = doubtful.swap_remove(pick(&doubtful));
        Some(board.pair(row, prefill[p].1))
    }

    /// Whether there is none.
    pub(super) fn are_none(&self, front: &Front, cluster: &str) -> bool {
        self.look(front, cluster, false).rows.is_empty()
    }

    fn look(&self, front: &Front, cluster: &str, strict: bool) -> Arc<Board> {
        let board = self.board.load_full();
        let groups = front.control.ksana_groups();
        let names = front.config.names.as_ref();
        let answers = names.map(Names::answers).unwrap_or_default();
        let is_same = named::are_same(&answers, &board.answers) && Arc::ptr_eq(&groups, &board.groups);
        let mut fresh = None;
        front.control.ksana(&mut |state, _| {
            if board.version != Some(state.version()) || !is_same {
                let routes = match names {
                    None => {
                        let routes = state.routes(cluster, strict).into_iter();
                        routes.map(|route| (route, (WEIGHT, WEIGHT))).collect()
                    }
                    Some(_) => named::pairs(state, cluster, strict, &answers),
                };
                fresh = Some((state.version(), routes));
            }
        });
        let Some((version, routes)) = fresh else { return board };
        let strangers = names.map(|_| &board.strangers);
        let board = Board { answers, ..Board::new(version, groups, cluster, routes, strangers) };
        let board = Arc::new(board);
        self.board.store(Arc::clone(&board));
        board
    }
}

impl Board {
    /// `strangers` are those there were, where there may be any.
    fn new(
        version: u64,
        groups: Arc<Groups>,
        cluster: &str,
        routes: Vec<Weighed>,
        strangers: Option<&HashMap<(Role, String), Arc<Stranger>>>,
    ) -> Self {
        let mut board = Self { version: Some(version), ..Self::default() };
        let mut places: [HashMap<String, Option<usize>>; 2] = Default::default();
        for (route, weights) in routes {
            let (prefill, decode) = (&mut board.prefill, &mut board.decode);
            let [of_prefill, of_decode] = &mut places;
            let mut place = |role, addr: &String, weight: u32| {
                let (list, known) = match role {
                    Role::Prefill => (&mut *prefill, &mut *of_prefill),
                    Role::Decode => (&mut *decode, &mut *of_decode),
                };
                *known.entry(addr.clone()).or_insert_with(|| {
                    let key = GroupKey { cluster: cluster.to_owned(), role, inference_addr: addr.clone() };
                    list.push(weighed(groups.get(&key)?, weight));
                    Some(list.len() - 1)
                })
            };
            let (prefill, decode) = (
                place(Role::Prefill, &route.prefill_addr, weights.0),
                place(Role::Decode, &route.decode_addr, weights.1),
            );
            let groups = prefill.zip(decode);
            let strangers = strangers.filter(|_| groups.is_none()).map(|known| {
                let mut of = |role, addr: &String| {
                    let key = (role, addr.clone());
                    let kept = |key: &(Role, String)| known.get(key).cloned().unwrap_or_default();
                    Arc::clone(board.strangers.entry(key).or_insert_with_key(kept))
                };
                let prefill = of(Role::Prefill, &route.prefill_addr);
                Strangers { prefill, decode: of(Role::Decode, &route.decode_addr), weights }
            });
            board.rows.push(Row { route: Arc::new(route), groups, strangers, weights });
        }
        board.groups = groups;
        board
    }

    fn pair(&self, row: &Row, held: u32) -> Pair {
        let groups = row.groups.map(|(p, d)| (Arc::clone(&self.prefill[p]), Arc::clone(&self.decode[d])));
        Pair { route: Arc::clone(&row.route), groups, strangers: row.strangers.clone(), held }
    }
}

/// A group with the weight that a name gives it; its load stays that of the group.
fn weighed(group: &Arc<WorkerView>, weight: u32) -> Arc<WorkerView> {
    if group.record.spec.weight == weight {
        return Arc::clone(group);
    }
    let mut record = group.record.clone();
    record.spec.weight = weight.clamp(1, 1000);
    Arc::new(WorkerView { record, live: Arc::clone(&group.live) })
}

/// What it costs to send a request to a group: as the configured policy reckons, if it goes by cost.
fn cost(
    front: &Front,
    group: &Arc<WorkerView>,
    overlap: Overlap,
    coming: u32,
    request: &RouteRequest<'_>,
    peers_count: bool,
) -> f64 {
    let load = group.rank_load(0, peers_count);
    let candidate = Candidate { worker: group, rank: 0, load, overlap, coming, seen: load };
    let configured = front.config.policy.terms(&candidate, request);
    let terms = configured.unwrap_or_else(|| CostOptions::default().terms(&candidate.cost_input(request)));
    terms.total()
}
