//! Node agents: streams that outlive all replicas at once, engines that stay registered whichever
//! replica dies, and KV events from where no replica may look.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::streams::{Heard, Manner, Question, Said, read};
use chaos_tests::wait::{check, until};
use serde_json::Value;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);
/// Tokens of an answer: at 25 ms each, enough time for everything to die and come back.
const TOKENS: u32 = 160;

/// The engine that has generated most since then: replicas choose as they please, and may avoid one
/// that was away a moment ago.
async fn busiest(fleet: &Fleet, since: &[u64]) -> usize {
    let now = fleet.generated_by_engine().await;
    (0..now.len()).max_by_key(|at| now[*at].saturating_sub(since[*at])).expect("there are engines")
}

/// Streams of the mix, begun at once.
fn begin(fleet: &Fleet, questions: &[Question]) -> JoinSet<(usize, Heard)> {
    let mut readers = JoinSet::new();
    for (at, question) in questions.iter().enumerate() {
        let (base, question) = (format!("http://{}", fleet.balancer), question.clone());
        let manner = if at.is_multiple_of(2) { Manner::Get } else { Manner::Repost };
        readers.spawn(async move {
            let heard = read(&base, &question, manner).await;
            (at, heard.unwrap_or_else(|broken| panic!("{question:?}: {} {:#?}", broken.why, broken.heard)))
        });
    }
    readers
}

async fn all(readers: JoinSet<(usize, Heard)>) -> BTreeMap<usize, Heard> {
    readers.join_all().await.into_iter().collect()
}

fn questions(count: usize) -> Vec<Question> {
    // Several choices are not for greedy sampling.
    let mixed =
        (0..).map(|at| Question::mixed(at, TOKENS, None)).filter(|question| question.body["n"].is_null());
    mixed.take(count).collect()
}

/// Where two answers differ; how much of the prompt was cached may.
fn difference(said: &Said, expected: &Said, seams: u32) -> Option<String> {
    let count = |said: &Said| said.usage.as_ref().map(|usage| usage["completion_tokens"].clone());
    if count(said) != count(expected) {
        return Some(format!("{:?} instead of {:?}", count(said), count(expected)));
    }
    for (at, choice) in &said.choices {
        let Some(should) = expected.choices.get(at) else { return Some(format!("choice {at}")) };
        if (&choice.text, &choice.end) != (&should.text, &should.end) {
            return Some(format!("{:?} {:?} instead of {should:?}", choice.text, choice.end));
        }
        let pairs = choice.logprobs.iter().zip(&should.logprobs).enumerate();
        let differ = |(is, should): &(&Value, &Value)| match seams {
            0 => is != should,
            // The simulated engine makes the number itself of the place within its own answer.
            _ => [0, 2].iter().any(|at| is[*at] != should[*at]) || is["token"] != should["token"],
        };
        if let Some((token, (is, should))) = pairs.into_iter().find(|(_, pair)| differ(pair)) {
            return Some(format!("token {token}: {is} instead of {should}"));
        }
    }
    let lengths = |said: &Said| said.choices.values().map(|choice| choice.logprobs.len()).collect::<Vec<_>>();
    (lengths(said) != lengths(expected)).then(|| "other log probabilities, or choices".to_owned())
}

fn assert_same(heard: &BTreeMap<usize, Heard>, expected: &BTreeMap<usize, Heard>) {
    for (at, heard) in heard {
        if let Some(difference) = difference(&heard.said, &expected[at].said, heard.seams) {
            panic!("question {at}, {}, {} seams: {difference}", heard.id, heard.seams);
        }
    }
    assert_eq!(heard.len(), expected.len());
}

async fn with_agents(replicas: usize, engines: usize) -> Fleet {
    let fleet = Fleet::of(replicas).engines(engines).agents();
    fleet.engine_arg("--decode-step-ms").engine_arg("25").start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_replicas_killed_at_once_lose_nothing_and_nothing_is_generated_twice() {
    let mut fleet = with_agents(3, 2).await;
    let questions = questions(12);
    let before = fleet.generated().await;
    let expected = all(begin(&fleet, &questions)).await;
    let tokens = fleet.generated().await - before;
    assert!(tokens > 0);

    for round in 0..2 {
        let before = fleet.generated().await;
        let readers = begin(&fleet, &questions);
        until("all streams run", LIMIT, async || {
            let now = fleet.generated().await - before;
            check(now > tokens / 8 + tokens / 16 * round, || format!("{now} of {tokens} tokens"))
        })
        .await;
        fleet.replicas.iter_mut().for_each(|replica| replica.kill9_at_once());
        fleet.replicas.iter_mut().for_each(|replica| replica.kill9());
        fleet.replicas.iter_mut().for_each(|replica| replica.start());
        let heard = all(readers).await;
        assert_same(&heard, &expected);
        let returned = heard.values().filter(|heard| heard.returns > 0).count();
        assert_eq!(returned, questions.len(), "all lost their connection in the middle");
        let seams: u32 = heard.values().map(|heard| heard.seams).sum();
        assert_eq!(seams, 0, "nobody had to go on with anything");
        assert_eq!(fleet.generated().await - before, tokens, "not one token twice");
        for replica in &fleet.replicas {
            ready(replica, LIMIT).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_killed_agent_go_on_and_so_do_those_of_one_that_is_stopped_or_lost_its_engine() {
    let mut fleet = with_agents(3, 2).await;
    let questions = questions(8);
    let expected = all(begin(&fleet, &questions)).await;
    for what in ["the agent is killed", "the agent is stopped", "the engine is killed", "both are killed"] {
        println!("-- {what}");
        let before = fleet.generated_by_engine().await;
        let readers = begin(&fleet, &questions);
        until("all streams run", LIMIT, async || {
            let now = fleet.generated().await - before.iter().sum::<u64>();
            check(now > 8 * 20, || format!("{now} tokens"))
        })
        .await;
        let victim = busiest(&fleet, &before).await;
        let engine = &mut fleet.engines[victim];
        let began = Instant::now();
        if let Some(agent) = &mut engine.agent {
            match what {
                "the agent is stopped" => agent.stop(LIMIT),
                "the engine is killed" => {}
                _ => agent.kill9(),
            }
        }
        if what.contains("engine") || what.contains("both") {
            fleet.engines[victim].kill9();
        }
        println!("after {:?}", began.elapsed());
        let heard = all(readers).await;
        assert_same(&heard, &expected);
        let seams: u32 = heard.values().map(|heard| heard.seams).sum();
        let returns: u32 = heard.values().map(|heard| heard.returns).sum();
        assert!(seams > 0 && returns == 0, "{seams} seams, {returns} returns: clients notice a pause only");
        let engine = &mut fleet.engines[victim];
        if what.contains("engine") || what.contains("both") {
            engine.start();
            let url = format!("http://{}/health", engine.address);
            until("the engine is back", LIMIT, async || Http::fresh().get(&url, LIMIT).await.map(drop)).await;
        }
        if what.contains("agent") || what.contains("both") {
            let agent = engine.agent.as_mut().expect("engines have agents here");
            let before = agent.registrations();
            agent.start();
            until("the agent is back", LIMIT, async || {
                let count = agent.registrations();
                check(count > before, || format!("registered {count} times"))
            })
            .await;
        }
        for replica in &fleet.replicas {
            until("both engines are online", LIMIT, async || {
                let online = replica.local_workers().await?.iter().filter(|worker| worker.online).count();
                check(online == 2, || format!("{online} online"))
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_stays_registered_whichever_replica_dies_and_not_longer_than_it_is_well() {
    let mut fleet = with_agents(3, 1).await;
    let generation = fleet.replicas[0].worker("e1").await.expect("a worker").generation;
    for at in 0..3 {
        fleet.replicas[at].kill9();
        let other = (at + 1) % 3;
        // Longer than an engine is believed without a sign of life.
        let until = Instant::now() + Duration::from_secs(8);
        while Instant::now() < until {
            if let Ok(worker) = fleet.replicas[other].worker("e1").await {
                assert!(worker.online, "taken for dead when {} died", fleet.replicas[at].name);
                assert_eq!(worker.generation, generation, "not registered anew");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        fleet.replicas[at].start();
        ready(&fleet.replicas[at], LIMIT).await;
    }
    fleet.engines[0].kill9();
    until("the engine is missed", LIMIT, async || {
        let worker = fleet.replicas[0].worker("e1").await?;
        check(!worker.online, || "still online".to_owned())
    })
    .await;
    fleet.engines[0].start();
    until("the engine is back", LIMIT, async || {
        let worker = fleet.replicas[1].worker("e1").await?;
        check(worker.online, || "not online".to_owned())
    })
    .await;
    if let Some(agent) = &mut fleet.engines[0].agent {
        agent.stop(LIMIT);
    }
    until("the engine is unregistered", LIMIT, async || {
        let workers = fleet.replicas[2].workers().await?;
        check(workers.is_empty(), || format!("{} workers", workers.len()))
    })
    .await;
}
