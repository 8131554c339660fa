//! Every replica knows what each engine has cached: what the router foretells is what the engine
//! reports, whatever is killed in between.

use std::collections::BTreeMap;
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL, ready};
use chaos_tests::wait::{check, until};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

/// Tokens in a block of the simulated engines.
const BLOCK: u32 = 16;

/// How long everything may take to come to rest.
const REST: Duration = Duration::from_secs(20);

/// Conversations that grow, some of which begin alike.
struct Talks {
    rng: StdRng,
    talks: Vec<Vec<u32>>,
}

impl Talks {
    fn new(seed: u64, many: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let system: Vec<u32> = (0..5 * BLOCK).map(|_| rng.random_range(10..20_000)).collect();
        let talks = (0..many)
            .map(|n| {
                // Every other one begins with the same.
                let mut talk = if n % 2 == 0 { system.clone() } else { Vec::new() };
                talk.extend((0..3 * BLOCK).map(|_| rng.random_range(10..20_000)));
                talk
            })
            .collect();
        Self { rng, talks }
    }

    /// The talk's next prompt: what was said, and some more.
    fn next(&mut self, talk: usize) -> Vec<u32> {
        let more = self.rng.random_range(1..4 * BLOCK);
        let grown: Vec<u32> = (0..more).map(|_| self.rng.random_range(10..20_000)).collect();
        self.talks[talk].extend(grown);
        self.talks[talk].clone()
    }
}

/// One answered request.
#[derive(Debug)]
struct Asked {
    worker: String,
    foretold: Option<u32>,
    reported: u32,
}

async fn ask(http: &Http, url: &str, prompt: &[u32]) -> Asked {
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2});
    let reply = http.post(url, &body, REST).await.expect("an answer");
    let header = |name: &str| reply.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let (worker, foretold) = (header("everline-worker"), header("everline-cached-tokens"));
    let answer: Value = reply.json().expect("a good answer");
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    Asked {
        worker: worker.expect("the worker's name"),
        foretold: foretold.and_then(|text| text.parse().ok()),
        reported: cached.as_u64().unwrap_or(0) as u32,
    }
}

/// Nothing changes any more, on any replica, and all have the same.
async fn settled(fleet: &Fleet) {
    let mut last = (String::new(), 0);
    until("the cache group at rest", REST, async || {
        let mut digests = Vec::new();
        for replica in &fleet.replicas {
            let groups = replica.status().await?.cluster.groups;
            let cache = groups.into_iter().find(|group| group.group == "cache").ok_or("no cache group")?;
            digests.push(cache.digest);
        }
        let same = digests.windows(2).all(|pair| pair[0] == pair[1]);
        last = match digests.pop() {
            Some(digest) if same && digest == last.0 => (digest, last.1 + 1),
            Some(digest) => (digest, 0),
            None => return Err("no replicas".to_owned()),
        };
        // Looked at every 20 ms or so; an engine's events are there within a step of it.
        check(last.1 >= 10, || format!("digests {digests:?}, equal {} times", last.1))
    })
    .await;
}

/// So many rounds of each talk once, over all replicas in turn; the share that was foretold
/// exactly, and the share of prompts that was cached.
async fn rounds(fleet: &Fleet, talks: &mut Talks, rounds: usize) -> (f64, f64) {
    let http = Http::pooled();
    let (mut exact, mut all, mut cached, mut tokens) = (0, 0, 0_u64, 0_u64);
    let mut wrong = Vec::new();
    for round in 0..rounds {
        settled(fleet).await;
        for talk in 0..talks.talks.len() {
            let prompt = talks.next(talk);
            let url = fleet.replicas[(talk + round) % fleet.replicas.len()].http_url("/v1/completions");
            let asked = ask(&http, &url, &prompt).await;
            all += 1;
            cached += u64::from(asked.reported);
            tokens += prompt.len() as u64;
            if asked.foretold == Some(asked.reported) {
                exact += 1;
            } else {
                wrong.push((round, talk, asked));
            }
            // Talks that begin alike follow each other; the next is not in this one's shadow.
            if talk % 2 == 0 {
                settled(fleet).await;
            }
        }
    }
    let share = f64::from(exact) / f64::from(all);
    let hit = cached as f64 / tokens as f64;
    println!("{exact} of {all} foretold exactly, {:.1} % of prompts cached", 100.0 * hit);
    if !wrong.is_empty() {
        println!("otherwise: {:?}", &wrong[..wrong.len().min(8)]);
    }
    (share, hit)
}

/// So many rounds, of which nearly all must be foretold; the share that was cached.
async fn assert_foretold(fleet: &Fleet, talks: &mut Talks, what: &str, times: usize) -> f64 {
    println!("-- {what}");
    let (share, hit) = rounds(fleet, talks, times).await;
    assert!(share >= 0.99, "{what}: only {:.1} % were foretold exactly", 100.0 * share);
    hit
}

/// Every replica takes every engine for alive again.
async fn engines_are_online(fleet: &Fleet, engines: usize) {
    for replica in &fleet.replicas {
        until("all engines online", REST, async || {
            let online = replica.local_workers().await?.iter().filter(|worker| worker.online).count();
            check(online == engines, || format!("{online} online"))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_router_foretells_is_what_the_engine_reports_whatever_is_killed() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3)
        .engines(8)
        .kv_events()
        .engine_arg("--instant")
        .engine_arg("--blocks=600")
        .engine_arg("--drop-frames-every=17")
        .set("proxy.policy=kv_cost")
        .start()
        .await;
    let mut talks = Talks::new(seed, 16);
    assert_foretold(&fleet, &mut talks, "at first", 4).await;

    let leader = fleet.leader().await;
    fleet.replicas[leader].kill9();
    fleet.replicas[leader].start();
    ready(&fleet.replicas[leader], REST).await;
    engines_are_online(&fleet, 8).await;
    assert_foretold(&fleet, &mut talks, "the leader killed and back", 2).await;

    for at in 0..3 {
        // Whichever feeds it has move to the others.
        fleet.replicas[at].kill9();
        let others = fleet.others(&[at]);
        until("another owner", REST, async || fleet.leader_among(&others).await.map(|_| ())).await;
        fleet.replicas[at].start();
        ready(&fleet.replicas[at], REST).await;
    }
    engines_are_online(&fleet, 8).await;
    assert_foretold(&fleet, &mut talks, "every owner of a feed killed in turn", 2).await;

    for at in [0, 3, 5] {
        // Numbers begin at 0 again, and nobody says that everything is gone.
        fleet.engines[at].kill9();
        fleet.engines[at].start();
    }
    engines_are_online(&fleet, 8).await;
    assert_foretold(&fleet, &mut talks, "engines restarted", 3).await;

    for replica in &mut fleet.replicas {
        replica.kill9();
    }
    for replica in &mut fleet.replicas {
        replica.start();
    }
    for replica in &fleet.replicas {
        ready(replica, REST).await;
    }
    engines_are_online(&fleet, 8).await;
    let hit = assert_foretold(&fleet, &mut talks, "all replicas killed at once", 2).await;
    assert!(hit > 0.5, "what the engines still had was not found again: {hit}");
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_that_connect_to_a_replica_are_known_to_all_of_them() {
    let mut fleet = Fleet::of(3).engines(3).kv_hubs().engine_arg("--instant").start().await;
    let mut talks = Talks::new(crate::seed(), 8);
    // The first message is what tells a replica that an engine is there.
    rounds(&fleet, &mut talks, 1).await;
    assert_foretold(&fleet, &mut talks, "at first", 2).await;
    // The engine connects again, to the replica that is back; what it said meanwhile is asked for.
    fleet.replicas[1].kill9();
    let http = Http::pooled();
    for talk in 0..8 {
        let prompt = talks.next(talk);
        ask(&http, &fleet.replicas[0].http_url("/v1/completions"), &prompt).await;
    }
    fleet.replicas[1].start();
    ready(&fleet.replicas[1], REST).await;
    engines_are_online(&fleet, 3).await;
    rounds(&fleet, &mut talks, 1).await;
    assert_foretold(&fleet, &mut talks, "one replica killed and back", 2).await;
    fleet.agree().await;
}

/// Hit rate of each talk's next turn, each asked of one replica only; engines keep what they
/// have, so that every replica may be asked the same thing.
async fn hit_rate(fleet: &Fleet, replica: usize, prompts: &[Vec<u32>]) -> f64 {
    let (http, url) = (Http::pooled(), fleet.replicas[replica].http_url("/v1/completions"));
    let (mut cached, mut tokens) = (0_u64, 0_u64);
    for prompt in prompts {
        let asked = ask(&http, &url, prompt).await;
        cached += u64::from(asked.reported);
        tokens += prompt.len() as u64;
    }
    cached as f64 / tokens as f64
}

async fn a_restarted_replica_routes_as_well_as_the_others(mut fleet: Fleet) {
    let mut talks = Talks::new(crate::seed(), 48);
    let http = Http::pooled();
    let mut homes = BTreeMap::new();
    for talk in 0..talks.talks.len() {
        let prompt = talks.next(talk);
        let url = fleet.replicas[talk % 3].http_url("/v1/completions");
        let worker = ask(&http, &url, &prompt).await.worker;
        *homes.entry(worker).or_insert(0) += 1;
    }
    settled(&fleet).await;
    println!("talks by engine: {homes:?}");
    let victim = (fleet.leader().await + 1) % 3;
    fleet.replicas[victim].kill9();
    fleet.replicas[victim].start();
    ready(&fleet.replicas[victim], REST).await;
    // At once, without a rest: its first requests.
    let prompts: Vec<Vec<u32>> = talks.talks.clone();
    let first = hit_rate(&fleet, victim, &prompts).await;
    let other = hit_rate(&fleet, (victim + 1) % 3, &prompts).await;
    println!("hit rate {:.1} % at the restarted one, {:.1} % at another", 100.0 * first, 100.0 * other);
    assert!(other > 0.8, "the others do not find what is cached: {other}");
    assert!(first >= other - 0.01, "the restarted replica is cold: {first} against {other}");
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_is_warm_when_it_is_ready() {
    let fleet = Fleet::of(3).engines(8).kv_events().engine_arg("--instant").start().await;
    a_restarted_replica_routes_as_well_as_the_others(fleet).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_is_warm_when_engines_tell_nothing_too() {
    let fleet = Fleet::of(3).engines(8).engine_arg("--instant").start().await;
    a_restarted_replica_routes_as_well_as_the_others(fleet).await;
}
