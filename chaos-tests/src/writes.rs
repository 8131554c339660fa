//! Writers to the registry that remember what was promised to them.
//!
//! Each writer has a few keys of its own and registers them again and again. A registration
//! that is applied raises its key's generation by one, whatever became of the answer; so once
//! everything is settled, `acknowledged <= generation <= attempted` says for every key that no
//! acknowledged write was lost and none was applied twice.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use everline::admin_types::WorkerStatus;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::endpoint::{Endpoint, paper_worker};
use crate::wait::until;

/// Keys of one writer.
const KEYS: u64 = 8;

/// What is known of a key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Promise {
    /// Registrations answered with 2xx.
    pub acknowledged: u64,
    /// Registrations sent.
    pub attempted: u64,
    /// Number of the newest acknowledged registration, which its address says.
    pub newest: u64,
}

/// All that was promised, by key.
#[derive(Clone, Debug, Default)]
pub struct Promises(BTreeMap<String, Promise>);

impl Promises {
    /// Acknowledged writes.
    pub fn acknowledged(&self) -> u64 {
        self.0.values().map(|p| p.acknowledged).sum()
    }

    /// Adds what was promised to others, or later on to the same.
    pub fn extend(&mut self, other: Promises) {
        for (key, more) in other.0 {
            let promise = self.0.entry(key).or_default();
            promise.acknowledged += more.acknowledged;
            promise.attempted += more.attempted;
            promise.newest = promise.newest.max(more.newest);
        }
    }

    /// What is wrong with a registry, if anything.
    pub fn check(&self, workers: &[WorkerStatus]) -> Result<(), String> {
        let found: BTreeMap<&str, &WorkerStatus> = workers.iter().map(|w| (w.id.as_str(), w)).collect();
        for (key, promise) in &self.0 {
            let Some(worker) = found.get(key.as_str()) else {
                match promise.acknowledged {
                    0 => continue,
                    n => return Err(format!("{key} was acknowledged {n} times and is not there")),
                }
            };
            let number = number_in(&worker.url);
            let generation = worker.generation;
            if generation < promise.acknowledged || generation > promise.attempted || number < promise.newest
            {
                return Err(format!("{key}: generation {generation}, number {number}, but {promise:?}"));
            }
        }
        Ok(())
    }

    /// Every one of these replicas shows everything; how long until the last of them did.
    pub async fn visible_at(&self, replicas: &[Endpoint], limit: Duration) -> Duration {
        let started = Instant::now();
        for replica in replicas {
            let what = format!("all acknowledged writes at {}", replica.name);
            until(&what, limit, async || self.check(&replica.local_workers().await?)).await;
        }
        started.elapsed()
    }

    /// A linearizable read anywhere shows everything, at the first answer.
    pub async fn assert_readable(&self, replica: &Endpoint, limit: Duration) {
        let (workers, _) = until("a linearizable read", limit, async || replica.workers().await).await;
        if let Err(why) = self.check(&workers) {
            panic!("{} has lost something: {why}", replica.name);
        }
    }
}

/// A loopback address that says a number of up to 24 bits.
fn url_with(number: u64) -> String {
    format!("http://127.{}.{}.{}:9", number >> 16, number >> 8 & 0xff, number & 0xff)
}

/// The number in an address of [`url_with`]; 0 for any other.
fn number_in(url: &str) -> u64 {
    let host = url.strip_prefix("http://127.").and_then(|rest| rest.strip_suffix(":9"));
    host.unwrap_or_default()
        .split('.')
        .filter_map(|part| part.parse::<u64>().ok())
        .fold(0, |n, part| n << 8 | part)
}

/// One write's fate.
#[derive(Clone, Debug)]
pub struct Write {
    /// When it was sent.
    pub sent: Instant,
    /// When it was answered.
    pub answered: Instant,
    /// Why it was not acknowledged, if so.
    pub result: Result<(), String>,
}

/// Running writers.
#[derive(Debug)]
pub struct Writers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<(Promises, Vec<Write>)>,
}

/// How writers behave.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Writers at each replica.
    pub per_replica: usize,
    /// Time between two writes of one writer.
    pub pause: Duration,
    /// How long a writer waits for an answer.
    pub limit: Duration,
    /// How often a writer repeats a write that was not acknowledged.
    pub retries: usize,
    /// Writers number their writes from here on; for those who have keys of earlier writers.
    pub first: u64,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            per_replica: 1,
            pause: Duration::from_millis(5),
            limit: Duration::from_secs(15),
            retries: 0,
            first: 0,
        }
    }
}

impl Writers {
    /// Starts writers at each of these replicas; `name` must be new to the registry,
    /// or their [`Manner::first`] above all numbers of the earlier ones.
    pub fn start(name: &str, replicas: &[Endpoint], manner: Manner) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for at in 0..replicas.len() * manner.per_replica {
            let replica = replicas[at % replicas.len()].clone();
            let others: Vec<Endpoint> = replicas.to_vec();
            tasks.spawn(write(format!("{name}-{at}"), replica, others, manner, stopped.clone()));
        }
        Self { stop, tasks }
    }

    /// Lets every writer finish what it is at.
    pub async fn stop(mut self) -> (Promises, Vec<Write>) {
        // Nobody listens when there are no writers.
        let _ = self.stop.send(true);
        let (mut promises, mut writes) = (Promises::default(), Vec::new());
        while let Some(done) = self.tasks.join_next().await {
            let (some, more) = done.expect("a writer does not panic");
            promises.extend(some);
            writes.extend(more);
        }
        writes.sort_by_key(|w| w.answered);
        (promises, writes)
    }
}

async fn write(
    name: String,
    replica: Endpoint,
    others: Vec<Endpoint>,
    manner: Manner,
    stopped: watch::Receiver<bool>,
) -> (Promises, Vec<Write>) {
    let (mut promises, mut writes) = (Promises::default(), Vec::new());
    let mut number = manner.first;
    while !*stopped.borrow() {
        number += 1;
        let key = format!("{name}-{}", number % KEYS);
        let mut request = paper_worker(&key);
        request.url = url_with(number);
        // Bulk, so that small log segments are filled by few writes.
        request.labels = (0..8).map(|n| (format!("bulk-{n}"), "x".repeat(200))).collect();
        let promise = promises.0.entry(key).or_default();
        let sent = Instant::now();
        let mut result = Ok(());
        for attempt in 0..=manner.retries {
            // A retry goes to somebody else: its own replica may be on its way out.
            let target = match attempt {
                0 => &replica,
                n => others.iter().filter(|o| o.name != replica.name).nth(n - 1).unwrap_or(&replica),
            };
            promise.attempted += 1;
            let reply = target.add_worker(&request, manner.limit).await;
            result = reply.and_then(|reply| reply.json::<serde_json::Value>()).map(drop);
            if result.is_ok() {
                promise.acknowledged += 1;
                promise.newest = number;
                break;
            }
        }
        writes.push(Write { sent, answered: Instant::now(), result });
        tokio::time::sleep(manner.pause).await;
    }
    (promises, writes)
}

/// The longest time between two acknowledgements, and the first of them.
pub fn longest_gap(writes: &[Write]) -> Duration {
    let good: Vec<Instant> = writes.iter().filter(|w| w.result.is_ok()).map(|w| w.answered).collect();
    good.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn worker(generation: u64, number: u64) -> WorkerStatus {
        let worker = json!({
            "id": "w", "url": url_with(number), "engine": "vllm", "role": "aggregated",
            "models": [], "online": true, "drain": false, "source": "admin", "liveness": "probe",
            "requests": 0, "prefill_tokens": 0, "decode_blocks": 0, "reachable": true,
            "generation": generation, "weight": 100, "block_size": null, "capacity_blocks": null,
        });
        serde_json::from_value(worker).unwrap()
    }

    #[test]
    fn numbers_survive_in_addresses() {
        assert_eq!(url_with(0x01_02_03), "http://127.1.2.3:9");
        assert!([0, 255, 256, 70_000, 0xff_ff_ff].into_iter().all(|n| number_in(&url_with(n)) == n));
    }

    #[test]
    fn losses_repetitions_and_steps_back_are_found() {
        let promise = Promise { acknowledged: 3, attempted: 4, newest: 17 };
        let promises = Promises(BTreeMap::from([("w".to_owned(), promise)]));
        assert!(promises.check(&[worker(3, 17)]).is_ok());
        assert!(promises.check(&[worker(4, 25)]).is_ok(), "the unanswered one may have been applied");
        assert!(promises.check(&[]).is_err(), "lost with its key");
        assert!(promises.check(&[worker(2, 17)]).is_err(), "one is lost");
        assert!(promises.check(&[worker(5, 17)]).is_err(), "one was applied twice");
        assert!(promises.check(&[worker(3, 9)]).is_err(), "an older one stands");
    }
}
