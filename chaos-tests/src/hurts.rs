//! Who is hurt, how, and in which order: each second somebody else, never two replicas and never two
//! workers at a time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::endpoint::Endpoint;
use crate::figures::Figures;
use crate::fleet::Fleet;

/// How long a killed replica is gone, a frozen one frozen, and a frozen worker frozen.
const GONE: Duration = Duration::from_millis(1500);
const FROZEN: Duration = Duration::from_secs(3);
const WORKER_FROZEN: Duration = Duration::from_millis(700);
/// A replica or worker that is not back by then will not be.
const RECOVERY: Duration = Duration::from_secs(40);
/// How long a look may take; there is a next one.
const LOOK: Duration = Duration::from_millis(500);

/// What is done to somebody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum How {
    /// `kill -9`.
    Kill,
    /// SIGTERM, and a new start when it has ended.
    Term,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
}

/// What a replica led when it was hurt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Led {
    /// No group.
    Nothing,
    /// One of the two.
    OneGroup,
    /// Both.
    BothGroups,
}

/// One that was hurt.
#[derive(Clone, Debug)]
pub struct Hurt {
    /// How.
    pub how: How,
    /// Its name.
    pub name: String,
    /// For a replica, what it led.
    pub led: Option<Led>,
    /// When.
    pub at: Instant,
    /// When it was back.
    pub over: Option<Instant>,
}

impl Hurt {
    /// In words: what, and what it led.
    pub fn kind(&self) -> String {
        let how = match self.how {
            How::Kill => "kill -9",
            How::Term => "SIGTERM",
            How::Freeze => "SIGSTOP",
        };
        match self.led {
            None => format!("{how} of a worker"),
            Some(Led::Nothing) => format!("{how} of a replica that led nothing"),
            Some(Led::OneGroup) => format!("{how} of a replica that led one group"),
            Some(Led::BothGroups) => format!("{how} of a replica that led both groups"),
        }
    }
}

/// Somebody who is not back yet.
#[derive(Debug)]
struct Down {
    at: usize,
    hurt: usize,
    /// It has been started again, or let go on.
    helped: bool,
}

/// Hurts a fleet, a step at a time.
#[derive(Default, Debug)]
pub struct Hurter {
    /// All that was done.
    pub hurts: Vec<Hurt>,
    /// How long the others took a killed replica to have requests.
    pub load_gone: Figures,
    turn: usize,
    replica_turn: usize,
    worker_turn: usize,
    replica: Option<Down>,
    worker: Option<Down>,
    /// A killed replica that had load, and that is still looked at.
    loaded: Option<(usize, usize)>,
}

impl Hurter {
    /// Hurts the next one: a replica and a worker in turn, if the one before is well again.
    pub async fn strike(&mut self, fleet: &mut Fleet) {
        let replica_is_due = self.turn.is_multiple_of(2);
        self.turn += 1;
        if replica_is_due && self.replica.is_none() {
            self.strike_replica(fleet).await;
        } else if self.worker.is_none() {
            self.strike_worker(fleet);
        }
    }

    async fn strike_replica(&mut self, fleet: &mut Fleet) {
        let (turn, count) = (self.replica_turn, fleet.replicas.len());
        self.replica_turn += 1;
        let how = [How::Kill, How::Term, How::Freeze][turn % 3];
        // Everybody in every way.
        let at = (turn + turn / 3) % count;
        let (led, has_load) = known_of(&fleet.replicas[(at + 1) % count], &fleet.replicas[at].name).await;
        let replica = &mut fleet.replicas[at];
        // What it breaks may break before this returns.
        let now = Instant::now();
        match how {
            How::Kill => replica.kill9(),
            How::Term => replica.sigterm(),
            How::Freeze => replica.sigstop(),
        }
        let (name, hurt) = (replica.name.clone(), self.hurts.len());
        self.hurts.push(Hurt { how, name, led: Some(led), at: now, over: None });
        self.replica = Some(Down { at, hurt, helped: false });
        if how == How::Kill && has_load {
            self.loaded = Some((at, hurt));
        }
    }

    fn strike_worker(&mut self, fleet: &mut Fleet) {
        let turn = self.worker_turn;
        self.worker_turn += 1;
        let how = [How::Kill, How::Freeze, How::Term][turn % 3];
        let count = fleet.engines.len();
        let at = (turn + turn / count) % count;
        let engine = &mut fleet.engines[at];
        let now = Instant::now();
        match how {
            How::Kill => engine.kill9(),
            How::Term => engine.sigterm(),
            How::Freeze => engine.sigstop(),
        }
        let hurt = self.hurts.len();
        self.hurts.push(Hurt { how, name: engine.id.clone(), led: None, at: now, over: None });
        self.worker = Some(Down { at, hurt, helped: false });
    }

    /// Does what is due for those who were hurt. To be called often.
    pub async fn heal(&mut self, fleet: &mut Fleet) {
        self.watch_load(fleet).await;
        if let Some(down) = &mut self.replica {
            let hurt = &mut self.hurts[down.hurt];
            let (replica, since) = (&mut fleet.replicas[down.at], hurt.at.elapsed());
            assert!(since < RECOVERY, "{} is not back: {hurt:?}", replica.name);
            if down.helped {
                if matches!(timeout(LOOK, replica.ready()).await, Ok(Ok(reply)) if reply.status.is_success())
                {
                    hurt.over = Some(Instant::now());
                    self.replica = None;
                }
            } else if match hurt.how {
                How::Kill => since > GONE,
                How::Term => !replica.is_running(),
                How::Freeze => since > FROZEN,
            } {
                match hurt.how {
                    How::Freeze => replica.sigcont(),
                    How::Kill | How::Term => {
                        replica.wait(Duration::ZERO);
                        replica.start();
                    }
                }
                down.helped = true;
            }
        }
        if let Some(down) = &mut self.worker {
            let hurt = &mut self.hurts[down.hurt];
            let (engine, since) = (&mut fleet.engines[down.at], hurt.at.elapsed());
            assert!(since < RECOVERY, "{} is not back: {hurt:?}", engine.id);
            let is_due = match hurt.how {
                How::Kill => true,
                How::Term => !engine.is_running(),
                How::Freeze => since > WORKER_FROZEN,
            };
            if is_due {
                match hurt.how {
                    How::Freeze => engine.sigcont(),
                    How::Kill | How::Term => engine.start(),
                }
                hurt.over = Some(Instant::now());
                self.worker = None;
            }
        }
    }

    /// Whether the others still count requests of the replica that was killed last.
    async fn watch_load(&mut self, fleet: &Fleet) {
        let Some((at, hurt)) = self.loaded else { return };
        let since = self.hurts[hurt].at;
        for other in fleet.others(&[at]) {
            if known_of(&fleet.replicas[other], &fleet.replicas[at].name).await.1 {
                // What comes now is of its next life.
                if self.replica.as_ref().is_none_or(|down| down.helped) {
                    self.load_gone.add(since.elapsed());
                    self.loaded = None;
                }
                return;
            }
        }
        self.load_gone.add(since.elapsed());
        self.loaded = None;
    }

    /// Waits until all are back.
    pub async fn settle(&mut self, fleet: &mut Fleet) {
        while self.replica.is_some() || self.worker.is_some() {
            self.heal(fleet).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How often what was done, by kind.
    pub fn kinds(&self) -> BTreeMap<String, u32> {
        let mut kinds = BTreeMap::new();
        self.hurts.iter().for_each(|hurt| *kinds.entry(hurt.kind()).or_default() += 1);
        kinds
    }
}

/// What a replica knows of another: what it leads, and whether it has requests.
async fn known_of(replica: &Endpoint, name: &str) -> (Led, bool) {
    let Ok(Ok(members)) = timeout(LOOK, replica.members()).await else { return (Led::Nothing, true) };
    let Some(member) = members.iter().find(|member| member.info.name == name) else {
        return (Led::Nothing, false);
    };
    let led = match (member.leads_control, member.leads_cache) {
        (true, true) => Led::BothGroups,
        (false, false) => Led::Nothing,
        _ => Led::OneGroup,
    };
    (led, member.requests > 0)
}
