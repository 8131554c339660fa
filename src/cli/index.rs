//! `everline index`

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::client::{Client, Listing, block_on};
use super::output::{Failure, Out, Paint};
use super::table::{Column, render, render_within};
use crate::admin_types::{IndexReply, Known, RankStatus, StatusReply};
use crate::cluster::api::MemberStatus;
use crate::ids::ReplicaId;

const INDEX: &str = "/v1/admin/index";
const STATUS: &str = "/v1/admin/status";

/// Time between two looks at all replicas.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one replica may take to answer one look.
const ANSWER: Duration = Duration::from_secs(2);
/// Indexes of the log that are kept to wait for other replicas' words.
const MOST_KEPT: usize = 4096;

/// Look at the index of cached blocks
///
/// Examples:
///   everline index stats           what is in it, and who listens to which engine
///   everline index digest          whether all replicas have the same; exit code 1 if not
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Compare what all living replicas have, at the same index of the log
    ///
    /// Each replica tells its state's digest and the index of the log that it belongs to, until
    /// all have told theirs for one index. States change all the time; digests of different
    /// indexes say nothing about each other.
    Digest {
        /// Seconds to wait for an index that all replicas tell of
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        wait: u64,
        #[command(flatten)]
        listing: Listing,
    },
    /// Show counts, and each rank with its blocks, its feed and how far that was read
    Stats(Listing),
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            match self.command {
                Command::Stats(listing) => {
                    let reply: IndexReply = listing.get(INDEX).await?;
                    if listing.json {
                        out.json(&reply)
                    } else {
                        out.write(&stats(&reply, out.paint(), out.width()))
                    }
                }
                Command::Digest { wait, listing } => {
                    let told = compare(&listing.server.client()?, Duration::from_secs(wait)).await?;
                    if listing.json {
                        out.json(&told)?
                    } else {
                        out.write(&told.page(out.paint()))?
                    }
                    told.verdict()
                }
            }
        })
    }
}

/// What a replica's state was at one index of the log.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
struct Told {
    /// Digest of the whole state of the cache group.
    state: String,
    /// Of the prefix index alone, where it was told.
    index: Option<String>,
}

/// What replicas told, until all told of one index of the log or time was up.
#[derive(Debug, serde::Serialize)]
struct Comparison {
    /// Whether all living replicas told the same of the same index.
    agree: bool,
    /// That index: the newest of which all told; else of which the most did.
    log_index: Option<u64>,
    /// What they told of it, by name.
    replicas: BTreeMap<String, Option<Told>>,
    /// Names of members that the cluster counts as gone; they were not asked.
    away: Vec<String>,
}

/// Words of replicas by index of the log.
#[derive(Default)]
struct Words(BTreeMap<u64, BTreeMap<ReplicaId, Told>>);

impl Words {
    fn hear(&mut self, reply: &IndexReply) {
        let digest = &reply.digest;
        if digest.applied > 0 {
            let told = Told { state: digest.state.clone(), index: Some(digest.index.clone()) };
            self.0.entry(digest.applied).or_default().insert(reply.replica, told);
        }
        for round in &digest.rounds {
            let words = self.0.entry(round.index).or_default();
            for (id, state) in &round.states {
                words.entry(*id).or_insert_with(|| Told { state: state.clone(), index: None });
            }
        }
        while self.0.len() > MOST_KEPT {
            self.0.pop_first();
        }
    }

    /// The newest index, not before `since`, of which all of them told; else that of which the
    /// most did.
    fn best(&self, wanted: &BTreeSet<ReplicaId>, since: u64) -> Option<(u64, bool)> {
        let told =
            |words: &BTreeMap<ReplicaId, Told>| wanted.iter().filter(|id| words.contains_key(id)).count();
        let recent = self.0.range(since..);
        let (index, most) =
            recent.map(|(index, words)| (*index, told(words))).max_by_key(|(at, n)| (*n, *at))?;
        Some((index, most == wanted.len()))
    }

    /// An index at which somebody's state differs from another's.
    fn differing(&self) -> Option<u64> {
        let differ = |words: &BTreeMap<ReplicaId, Told>| {
            let states: BTreeSet<&str> = words.values().map(|told| told.state.as_str()).collect();
            states.len() > 1
        };
        self.0.iter().rev().find(|(_, words)| differ(words)).map(|(index, _)| *index)
    }
}

/// Asks all living replicas again and again until they can be compared.
async fn compare(client: &Client, wait: Duration) -> Result<Comparison, Failure> {
    let deadline = Instant::now() + wait;
    let status: StatusReply = client.get(STATUS).await?;
    let (living, away): (Vec<&MemberStatus>, Vec<&MemberStatus>) =
        status.cluster.members.iter().partition(|member| member.alive);
    if living.is_empty() {
        return Err(Failure::Failed("no replica is known to be alive; see everline status".to_owned()));
    }
    let mut clients = Vec::new();
    for member in &living {
        clients.push(client.of(&member.info.admin)?.with_timeout(ANSWER));
    }
    let wanted: BTreeSet<ReplicaId> = living.iter().map(|member| member.id).collect();
    let names: BTreeMap<ReplicaId, &str> = living.iter().map(|m| (m.id, m.info.name.as_str())).collect();
    let mut words = Words::default();
    let mut since = None;
    loop {
        let answers = join_all(clients.iter().map(|client| client.get::<IndexReply>(INDEX))).await;
        for reply in answers.iter().flatten() {
            words.hear(reply);
        }
        // What was the case long ago is no answer to whether they agree now.
        let now = answers.iter().flatten().map(|reply| reply.digest.applied).min();
        let since = *since.get_or_insert(now.unwrap_or(0));
        let best = words.best(&wanted, since);
        let differing = words.differing();
        if differing.is_some() || best.is_some_and(|(_, all)| all) || Instant::now() >= deadline {
            let log_index = differing.or(best.map(|(index, _)| index));
            let told = log_index.and_then(|index| words.0.get(&index));
            let replicas = names
                .iter()
                .map(|(id, name)| ((*name).to_owned(), told.and_then(|told| told.get(id)).cloned()));
            return Ok(Comparison {
                agree: differing.is_none() && best.is_some_and(|(_, all)| all),
                log_index,
                replicas: replicas.collect(),
                away: away.iter().map(|member| member.info.name.clone()).collect(),
            });
        }
        sleep(PAUSE).await;
    }
}

impl Comparison {
    fn differs(&self) -> bool {
        let states: BTreeSet<&str> =
            self.replicas.values().flatten().map(|told| told.state.as_str()).collect();
        states.len() > 1
    }

    fn page(&self, paint: Paint) -> String {
        let dash = || "-".to_owned();
        let index = self.log_index.map_or_else(dash, |index| index.to_string());
        let rows = self.replicas.iter().map(|(name, told)| {
            let told = told.as_ref();
            vec![
                name.clone(),
                told.map_or_else(dash, |_| index.clone()),
                told.map_or_else(dash, |told| told.state.clone()),
                told.and_then(|told| told.index.clone()).unwrap_or_else(dash),
            ]
        });
        let table = render(&["REPLICA", ">LOG INDEX", "STATE", "PREFIX INDEX"], rows.collect(), paint);
        let words = match (self.agree, self.differs()) {
            (true, _) => paint.green(&format!("all {} agree at log index {index}", self.replicas.len())),
            (false, true) => paint.red(&format!("they differ at log index {index}")),
            (false, false) => paint.yellow("not all of them told of the same index"),
        };
        let away = match &self.away[..] {
            [] => String::new(),
            names => format!("\nnot asked, because away: {}", names.join(", ")),
        };
        format!("{table}\n\n{words}{away}\n")
    }

    fn verdict(&self) -> Result<(), Failure> {
        if self.agree {
            return Ok(());
        }
        Err(Failure::Failed(if self.differs() {
            "replicas have different states at the same index of the log: keep their data folders and logs, and \
             report it"
                .to_owned()
        } else {
            let mute: Vec<&str> = self
                .replicas
                .iter()
                .filter(|(_, told)| told.is_none())
                .map(|(name, _)| name.as_str())
                .collect();
            format!(
                "nothing to compare was told in time by {}; look at everline status, or give it longer with --wait",
                mute.join(", ")
            )
        }))
    }
}

/// Sizes for people.
fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

fn stats(reply: &IndexReply, paint: Paint, width: Option<usize>) -> String {
    let counters = &reply.counters;
    let head = format!(
        "{} blocks, {} with copies  {}  {} evicted  {} orphans  {} refused  (as {} has it at log index {})",
        counters.blocks,
        counters.worker_blocks,
        bytes(counters.bytes),
        counters.evicted,
        counters.orphans,
        counters.refused,
        reply.name,
        reply.digest.applied,
    );
    if reply.ranks.is_empty() {
        return format!("{head}\n\nno worker has told of its cache or was sent a prompt yet\n");
    }
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let row = |rank: &RankStatus| {
        let feed = rank.feed.as_ref();
        let count =
            |read: fn(&crate::admin_types::FeedStatus) -> u64| text(feed.map(|feed| read(feed).to_string()));
        vec![
            rank.worker.as_ref().map_or("(gone)".to_owned(), ToString::to_string),
            rank.rank.to_string(),
            match (rank.known, rank.recovering) {
                (Known::Predicted, _) => "predicted",
                (Known::Events, true) => "recovering",
                (Known::Events, false) => "events",
            }
            .to_owned(),
            rank.blocks.to_string(),
            text(rank.cursor.map(|number| number.to_string())),
            text(rank.owner.clone()),
            text(feed.map(|feed| if feed.connected { "connected" } else { "away" }.to_owned())),
            count(|feed| feed.gaps),
            count(|feed| feed.replays),
            count(|feed| feed.restarts),
            count(|feed| feed.losses),
        ]
    };
    let columns = [
        Column::kept("WORKER"),
        Column::kept(">RANK"),
        Column::kept("KNOWN BY"),
        Column::kept(">BLOCKS"),
        Column::dropped(1, ">CURSOR"),
        Column::kept("OWNER"),
        Column::dropped(2, "FEED"),
        Column::dropped(6, ">GAPS"),
        Column::dropped(5, ">REPLAYS"),
        Column::dropped(4, ">RESTARTS"),
        Column::dropped(3, ">LOSSES"),
    ];
    let table = render_within(&columns, reply.ranks.iter().map(row).collect(), paint, width);
    let note = "what a feed did is told by the replica that owns it, since it began to";
    format!("{head}\n\n{table}\n\n{}\n", paint.dim(note))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_types::{FeedStatus, IndexCounters};
    use crate::cluster::api::{CacheDigest, DigestRound};
    use crate::ids::WorkerId;

    const PLAIN: Paint = Paint { on: false };

    fn reply(id: u64, applied: u64, state: &str, rounds: &[(u64, &[(u64, &str)])]) -> IndexReply {
        let rounds = rounds.iter().map(|(index, states)| DigestRound {
            index: *index,
            states: states.iter().map(|(id, state)| (ReplicaId(*id), (*state).to_owned())).collect(),
        });
        let digest = CacheDigest {
            applied,
            state: state.to_owned(),
            index: format!("x{state}"),
            rounds: rounds.collect(),
        };
        IndexReply {
            replica: ReplicaId(id),
            name: format!("r{id}"),
            digest,
            counters: IndexCounters {
                blocks: 5,
                worker_blocks: 9,
                bytes: 3 << 20,
                ..IndexCounters::default()
            },
            ranks: Vec::new(),
        }
    }

    #[test]
    fn states_are_compared_at_one_index_of_the_log_only() {
        let all = BTreeSet::from([ReplicaId(1), ReplicaId(2)]);
        let mut words = Words::default();
        words.hear(&reply(1, 10, "a", &[]));
        words.hear(&reply(2, 11, "b", &[]));
        assert_eq!((words.best(&all, 10), words.differing()), (Some((11, false)), None));
        words.hear(&reply(1, 11, "b", &[]));
        assert_eq!((words.best(&all, 10), words.differing()), (Some((11, true)), None));
        words.hear(&reply(2, 10, "c", &[]));
        assert_eq!(words.differing(), Some(10));
    }

    #[test]
    fn what_was_reported_at_agreed_indexes_counts_if_it_is_of_now() {
        let all = BTreeSet::from([ReplicaId(1), ReplicaId(2)]);
        let mut words = Words::default();
        words.hear(&reply(1, 300, "a", &[(256, &[(1, "x"), (2, "x")])]));
        assert_eq!(words.best(&all, 300), Some((300, false)), "256 was before the question");
        words.hear(&reply(1, 600, "b", &[(512, &[(1, "y"), (2, "y")])]));
        assert_eq!(words.best(&all, 300), Some((512, true)));
        for index in 0..2 * MOST_KEPT as u64 {
            words.hear(&reply(1, 1000 + index, "b", &[]));
        }
        assert_eq!(words.0.len(), MOST_KEPT);
    }

    fn comparison(states: [Option<&str>; 2]) -> Comparison {
        let told = |state: &str| Told { state: state.to_owned(), index: None };
        let replicas =
            states.iter().zip(["r1", "r2"]).map(|(state, name)| (name.to_owned(), state.map(told)));
        Comparison {
            agree: states[0].is_some() && states[0] == states[1],
            log_index: Some(7),
            replicas: replicas.collect(),
            away: vec!["r3".to_owned()],
        }
    }

    #[test]
    fn only_agreement_of_all_that_live_is_a_success() {
        let good = comparison([Some("a"), Some("a")]);
        assert!(good.verdict().is_ok());
        assert!(good.page(PLAIN).contains("all 2 agree at log index 7\nnot asked, because away: r3"));
        let bad = comparison([Some("a"), Some("b")]);
        assert!(matches!(bad.verdict(), Err(Failure::Failed(why)) if why.contains("different")));
        assert!(bad.page(PLAIN).contains("they differ at log index 7"));
        let mute = comparison([Some("a"), None]);
        assert!(matches!(mute.verdict(), Err(Failure::Failed(why)) if why.contains("by r2;")));
    }

    #[test]
    fn the_ranks_are_shown_with_what_their_feeds_did() {
        let mut index = reply(1, 7, "a", &[]);
        assert!(stats(&index, PLAIN, None).contains("no worker has told"));
        let rank = |worker: &str, known| RankStatus {
            worker: Some(WorkerId::parse(worker).unwrap()),
            rank: 0,
            known,
            owner: None,
            blocks: 4,
            cursor: None,
            recovering: false,
            feed: None,
        };
        let feed = FeedStatus { connected: true, gaps: 2, ..FeedStatus::default() };
        let told = RankStatus {
            owner: Some("r1".to_owned()),
            cursor: Some(41),
            feed: Some(feed),
            ..rank("e1", Known::Events)
        };
        index.ranks = vec![told, rank("e2", Known::Predicted)];
        let page = stats(&index, PLAIN, None);
        let expected = "\
5 blocks, 9 with copies  3.0 MiB  0 evicted  0 orphans  0 refused  (as r1 has it at log index 7)

WORKER  RANK  KNOWN BY   BLOCKS  CURSOR  OWNER  FEED       GAPS  REPLAYS  RESTARTS  LOSSES
e1         0  events          4      41  r1     connected     2        0         0       0
e2         0  predicted       4       -  -      -             -        -         -       -

what a feed did is told by the replica that owns it, since it began to
";
        assert!(page == expected, "{page}");
    }
}
