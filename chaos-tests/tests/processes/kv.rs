//! Every replica knows what each engine has cached: what the router foretells is what the engine
//! reports, whatever is killed in between.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use chaos_tests::client::{Http, Reply};
use chaos_tests::endpoint::Endpoint;
use chaos_tests::fleet::{Fleet, MODEL, ready};
use chaos_tests::published::newest;
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
    answered(http.post(url, &body, REST).await)
}

fn answered(reply: Result<Reply, String>) -> Asked {
    let reply = reply.expect("an answer");
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

/// All that engines have published was applied: a batch that was dropped is missed only when the next one
/// comes, or by a question 2 to 30 s later.
async fn applied(fleet: &Fleet) -> Result<(), String> {
    let reply = Http::fresh().get(&fleet.replicas[0].admin_url("/v1/admin/index"), REST).await?;
    let index: Value = reply.json()?;
    let ranks = index["ranks"].as_array().ok_or_else(|| index.to_string())?;
    for engine in &fleet.engines {
        for (rank, socket) in engine.replay_sockets().iter().enumerate() {
            let is_it = |one: &&Value| one["worker"] == engine.id && one["rank"] == rank;
            let applied = ranks.iter().find(is_it).and_then(|one| one["cursor"].as_u64());
            let newest = newest(socket, applied.unwrap_or(0)).await?;
            check(newest == applied, || format!("{} is at {newest:?}, {applied:?} applied", engine.id))?;
        }
    }
    Ok(())
}

/// Nothing changes any more, on any replica, and all have the same.
pub(crate) async fn settled(fleet: &Fleet) {
    until("all that was published applied", 3 * REST, async || applied(fleet).await).await;
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

/// Requests to all replicas, one after the other, while things are killed. Those to a replica that is
/// away fail, and no answer is looked at.
struct Traffic {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Traffic {
    fn start(fleet: &Fleet, seed: u64) -> Self {
        let urls: Vec<String> =
            fleet.replicas.iter().map(|replica| replica.http_url("/v1/completions")).collect();
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let task = tokio::spawn(async move {
            let (mut talks, http) = (Talks::new(seed, 8), Http::pooled());
            for n in (0_usize..).take_while(|_| !stopped.load(Ordering::Relaxed)) {
                let prompt = talks.next(n % 8);
                if prompt.len() > 2000 {
                    talks = Talks::new(seed + n as u64, 8);
                }
                let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2});
                let answer = http.post(&urls[n % urls.len()], &body, REST).await;
                if answer.is_ok_and(|answer| answer.status == 200) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                // A few requests at a time are enough, and leave the machine to the rest.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { stop, answered, task }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the traffic");
    }
}

/// Who listens to each engine, as a replica has it; nobody, to those that nobody has.
pub(crate) async fn owners(replica: &Endpoint) -> Result<BTreeMap<String, Option<String>>, String> {
    let reply = Http::fresh().get(&replica.admin_url("/v1/admin/index"), REST).await?;
    let reply: Value = reply.json()?;
    let ranks = reply["ranks"].as_array().ok_or_else(|| reply.to_string())?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(ranks.iter().filter_map(|rank| Some((text(&rank["worker"])?, text(&rank["owner"])))).collect())
}

/// Kills each replica in turn, while requests run, and starts it when all of its feeds are with others.
/// The engines whose feeds changed hands.
async fn kill_every_owner(fleet: &mut Fleet, traffic: &Traffic) -> BTreeSet<String> {
    let mut moved = BTreeSet::new();
    for at in 0..fleet.replicas.len() {
        let victim = fleet.replicas[at].name.clone();
        let other = fleet.others(&[at])[0];
        let mut its = BTreeSet::new();
        until("an owner of each feed", 3 * REST, async || {
            let owners = owners(&fleet.replicas[other]).await?;
            let nobodys = owners.values().filter(|owner| owner.is_none()).count();
            its = owners
                .into_iter()
                .filter(|(_, owner)| *owner == Some(victim.clone()))
                .map(|(it, _)| it)
                .collect();
            check(nobodys == 0, || format!("{nobodys} feeds are nobody's"))
        })
        .await;
        println!("{victim} listens to {its:?}");
        fleet.replicas[at].kill9();
        let before = traffic.answered();
        until("other owners of its feeds", 3 * REST, async || {
            let owners = owners(&fleet.replicas[other]).await?;
            let is_others = |it: &String| {
                owners.get(it).is_some_and(|now| now.as_ref().is_some_and(|now| *now != victim))
            };
            check(its.iter().all(is_others), || format!("{owners:?}"))
        })
        .await;
        until("requests answered meanwhile", REST, async || {
            check(traffic.answered() > before + 10, || format!("{} and then {}", before, traffic.answered()))
        })
        .await;
        fleet.replicas[at].start();
        ready(&fleet.replicas[at], REST).await;
        moved.extend(its);
    }
    moved
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_agents_tell_of_engines_that_replicas_cannot_listen_to_is_foretold_as_exactly() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3)
        .engines(3)
        .kv_events()
        .agents()
        .engine_arg("--instant")
        .engine_arg("--blocks=600")
        .engine_arg("--drop-frames-every=17")
        .set("proxy.policy=kv_cost")
        .start()
        .await;
    let mut talks = Talks::new(seed, 8);
    assert_foretold(&fleet, &mut talks, "at first", 3).await;
    // Its sockets have other ports in its next life.
    if let Some(agent) = &mut fleet.engines[0].agent {
        agent.kill9();
        agent.start();
    }
    // Numbers begin at 0 again, at an address that stays.
    fleet.engines[1].kill9();
    fleet.engines[1].start();
    engines_are_online(&fleet, 3).await;
    assert_foretold(&fleet, &mut talks, "an agent and an engine restarted", 3).await;
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

    let traffic = Traffic::start(&fleet, seed + 1);
    let leader = fleet.leader().await;
    fleet.replicas[leader].kill9();
    let others = fleet.others(&[leader]);
    until("another leader", REST, async || fleet.leader_among(&others).await.map(|_| ())).await;
    fleet.replicas[leader].start();
    ready(&fleet.replicas[leader], REST).await;
    traffic.stop().await;
    engines_are_online(&fleet, 8).await;
    assert_foretold(&fleet, &mut talks, "the leader killed and back", 2).await;

    let traffic = Traffic::start(&fleet, seed + 2);
    let moved = kill_every_owner(&mut fleet, &traffic).await;
    assert_eq!(moved.len(), 8, "each feed was with one of those killed: {moved:?}");
    traffic.stop().await;
    engines_are_online(&fleet, 8).await;
    assert_foretold(&fleet, &mut talks, "every owner of a feed killed in turn", 2).await;

    let traffic = Traffic::start(&fleet, seed + 3);
    for at in [0, 3, 5] {
        // Numbers begin at 0 again, and nobody says that everything is gone.
        fleet.engines[at].kill9();
        fleet.engines[at].start();
    }
    engines_are_online(&fleet, 8).await;
    traffic.stop().await;
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

/// Talks that no engine has room for, and their hosts have.
async fn what_lies_on_the_host_is_foretold(format: &str) {
    let fleet = Fleet::of(3)
        .engines(2)
        .kv_events()
        .engine_arg("--instant")
        .engine_arg("--blocks=60")
        .engine_arg("--host-blocks=2000")
        .engine_arg("--kv-events-format")
        .engine_arg(format)
        .set("proxy.policy=kv_cost")
        .start()
        .await;
    let mut talks = Talks::new(crate::seed(), 16);
    rounds(&fleet, &mut talks, 2).await;
    let hit = assert_foretold(&fleet, &mut talks, "on the host", 2).await;
    // 16 talks of more than 8 blocks each do not fit into twice 60.
    assert!(hit > 0.6, "what is on the host is not found again: {hit}");
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_in_the_hosts_memory_is_foretold_too() {
    what_lies_on_the_host_is_foretold("vllm-map").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_sglang_without_metrics_tells_is_foretold_too() {
    what_lies_on_the_host_is_foretold("sglang").await;
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

/// What is booked on each rank of an engine, as a replica has it.
async fn booked(replica: &Endpoint, worker: &str) -> Result<Vec<i64>, String> {
    let body = json!({"route": "/v1/completions", "body": {"model": MODEL, "prompt": "x"}});
    let reply: Value =
        Http::fresh().post(&replica.admin_url("/v1/admin/explain"), &body, REST).await?.json()?;
    let mut ranks: Vec<(u64, i64)> = reply["candidates"]
        .as_array()
        .ok_or_else(|| reply.to_string())?
        .iter()
        .filter(|candidate| candidate["worker"] == worker)
        .filter_map(|one| Some((one["rank"].as_u64()?, one["load"]["requests"].as_i64()?)))
        .collect();
    ranks.sort_unstable();
    Ok(ranks.into_iter().map(|(_, requests)| requests).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_are_foretold_and_booked_one_by_one_on_all_replicas() {
    let mut fleet = Fleet::of(3).engines(3).ranks(2).kv_events().start().await;
    let mut talks = Talks::new(crate::seed(), 12);
    assert_foretold(&fleet, &mut talks, "at first", 3).await;
    // The same prompt is cached on one rank and not on the other, and everybody knows.
    let prompt = talks.next(0);
    let pinned = async |rank: usize, replica: usize| {
        let url = fleet.replicas[replica].http_url("/v1/completions");
        let body = json!({"model": MODEL, "prompt": prompt[1..], "max_tokens": 2,
                          "everline": {"worker": format!("e1/{rank}")}});
        let asked = answered(Http::fresh().post(&url, &body, REST).await);
        settled(&fleet).await;
        (asked.foretold, asked.reported)
    };
    let full = (prompt.len() as u32 - 2) / BLOCK * BLOCK;
    assert_eq!(pinned(1, 0).await, (Some(0), 0));
    assert_eq!(pinned(1, 1).await, (Some(full), full));
    assert_eq!(pinned(0, 2).await, (Some(0), 0));
    assert_eq!(pinned(0, 0).await, (Some(full), full));

    // Streams that one replica sends to one rank count there on the others.
    let mut open = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let url = fleet.replicas[0].http_url("/v1/completions");
        let body = json!({"model": MODEL, "prompt": "a long answer", "max_tokens": 8000, "stream": true,
                          "everline": {"worker": "e2/1"}});
        open.spawn(async move { Http::fresh().post(&url, &body, 6 * REST).await });
    }
    for replica in &fleet.replicas {
        until("the streams on their rank", REST, async || {
            let seen = booked(replica, "e2").await?;
            check(seen == [0, 4], || format!("{} sees {seen:?}", replica.name))
        })
        .await;
    }
    open.shutdown().await;
    for replica in &fleet.replicas {
        until("freed", REST, async || {
            let seen = booked(replica, "e2").await?;
            check(seen == [0, 0], || format!("{} sees {seen:?}", replica.name))
        })
        .await;
    }

    let victim = fleet.leader().await;
    fleet.replicas[victim].kill9();
    fleet.replicas[victim].start();
    ready(&fleet.replicas[victim], REST).await;
    fleet.engines[0].kill9();
    fleet.engines[0].start();
    engines_are_online(&fleet, 3).await;
    assert_foretold(&fleet, &mut talks, "a replica and an engine killed", 3).await;
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
