//! Feeds over real sockets, from engines that restart, drop and forget.

mod support;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use self::support::*;
use super::hub::{Claim, Hub};
use super::load::LoadFeed;
use super::{FeedConfig, FeedHandle, Source, discover};
use crate::engines::sim::Simulator;
use crate::engines::sim::events::{EventFormat, ReplayLayout};
use crate::engines::sim::faults::FaultChange;
use crate::kv::feed::Cursor;
use crate::kv::hash::Seed;
use crate::zmtp::{AnyAddress, Endpoint, Limits, Publisher, Resolve, Resolved};

/// The engine process dies and another starts in its place.
fn restart(sim: &Simulator) {
    for dead in [true, false] {
        let change: FaultChange = serde_json::from_value(json!({ "engine_dead": dead })).unwrap();
        sim.engine().set_faults(&change).unwrap();
    }
}

/// Runs a lot of different prompts, more than the cache holds.
async fn traffic(sim: &Simulator, from: u32, count: u32) {
    for family in from..from + count {
        let salt = (family % 3 == 0).then_some("tenant");
        run(sim, &prompt(family % 7, 20 + family % 30), salt, family % 5 == 0).await;
    }
    flush(sim).await;
}

#[tokio::test]
async fn a_feed_has_what_the_engine_has_through_drops_and_restarts() {
    for format in [EventFormat::VllmMap, EventFormat::VllmArray, EventFormat::Sglang] {
        let mut args = args(json!({}));
        (args.kv_events_format, args.drop_frames_every) = (format, 5);
        if format == EventFormat::VllmArray {
            args.kv_replay_layout = ReplayLayout::Plain;
        }
        let sim = start(args).await;
        traffic(&sim, 0, 10).await;
        let sink = Sink::default();
        let feed = follow(&sim, &sink);
        sink.equals(&sim, "what was before the first contact").await;
        traffic(&sim, 10, 30).await;
        sink.equals(&sim, "evictions and dropped frames").await;
        // What is known is enough to tell what the engine will find, salts and adapters included.
        for (family, salt, lora) in [(3, None, false), (3, Some("tenant"), false), (5, None, true)] {
            let prompt = prompt(family, 33);
            run(&sim, &prompt, salt, lora).await;
            flush(&sim).await;
            sink.equals(&sim, "a known prompt").await;
            let seed = Seed::new(lora.then_some("ad"), salt);
            let predicted = sink.kept.lock().overlap(&prompt, seed).min((prompt.len() - 1) / BLOCK as usize);
            assert_eq!(run(&sim, &prompt, salt, lora).await, predicted * BLOCK as usize);
            assert_eq!(predicted, 8);
        }
        assert_eq!(sink.kept.lock().clears, 0);
        restart(&sim);
        traffic(&sim, 3, 8).await;
        sink.until("the new engine", |kept| kept.clears == 1).await;
        sink.equals(&sim, "only what the new engine has").await;
        assert!(!sink.kept.lock().cursor.recovering());
        let counters = feed.counters();
        assert!(counters.stats.gaps > 0 && counters.stats.restarts == 1, "{counters:?}");
        assert_eq!((counters.garbage, counters.stats.losses, counters.skipped.total()), (0, 0, 0));
    }
}

#[tokio::test]
async fn what_is_lost_long_after_the_last_message_is_missed_too() {
    let mut args = args(json!({}));
    args.drop_frames_every = 1;
    let sim = start(args).await;
    let sink = Sink::default();
    let feed = follow(&sim, &sink);
    for round in 0..3 {
        traffic(&sim, round * 10, 5).await;
        // An engine that is silent is asked again and again.
        sink.equals(&sim, "what was never sent").await;
    }
    assert_eq!(feed.counters().messages, 0);
}

#[tokio::test]
async fn a_feed_that_is_handed_over_loses_and_repeats_nothing() {
    let sim = start(args(json!({}))).await;
    let sink = Sink::default();
    for round in 0..6 {
        let feed = follow(&sim, &sink);
        traffic(&sim, round * 4, 4).await;
        if round % 2 == 0 {
            // Wherever it happens to be.
            drop(feed);
        } else {
            feed.stop().await;
        }
        traffic(&sim, 40 + round, 3).await;
    }
    let _feed = follow(&sim, &sink);
    sink.equals(&sim, "after the last hand-over").await;
    assert_eq!(sink.kept.lock().clears, 0, "nothing was ever void");
}

#[tokio::test]
async fn an_engine_that_restarts_unheard_and_comes_further_than_the_cursor_is_noticed() {
    let sim = start(args(json!({}))).await;
    let sink = Sink::default();
    let feed = follow(&sim, &sink);
    traffic(&sim, 0, 3).await;
    sink.equals(&sim, "before").await;
    feed.stop().await;
    let (last, _) = sink.kept.lock().cursor.last.unwrap();
    restart(&sim);
    traffic(&sim, 20, 12).await;
    let feed = follow(&sim, &sink);
    sink.until("the restart", |kept| kept.clears == 1).await;
    sink.equals(&sim, "after").await;
    assert!(sink.kept.lock().cursor.last.unwrap().0 > last);
    assert_eq!(feed.counters().stats.restarts, 1);
}

#[tokio::test]
async fn two_owners_at_once_do_no_harm() {
    let sim = start(args(json!({}))).await;
    let sink = Sink::default();
    let feeds = [follow(&sim, &sink), follow(&sim, &sink)];
    traffic(&sim, 0, 40).await;
    sink.equals(&sim, "both").await;
    assert_eq!(sink.kept.lock().clears, 0);
    eventually("one was told that the other had been faster", async || {
        feeds.iter().map(|feed| feed.counters().moved).sum::<u64>() > 0
    })
    .await;
}

#[tokio::test]
async fn replays_that_break_off_are_continued() {
    let mut args = args(json!({}));
    args.cut_replays_after = 8;
    let sim = start(args).await;
    traffic(&sim, 0, 10).await;
    let sink = Sink::default();
    let feed = follow(&sim, &sink);
    sink.equals(&sim, "all parts").await;
    let kept = sink.kept.lock();
    assert_eq!((kept.clears, kept.cursor.recovering()), (0, false));
    assert!(feed.counters().stats.failed_replays > 0);
}

#[tokio::test]
async fn a_long_past_whose_replays_lose_their_end_is_caught_up_without_waiting_out_the_first_silence() {
    let mut args = args(json!({}));
    args.cut_replays_after = 30;
    let sim = start(args).await;
    traffic(&sim, 0, 40).await;
    let sink = Sink::default();
    let mut config = config(&sim);
    // Longer than anything here is waited for.
    config.silence = Duration::from_secs(600);
    let feed = FeedHandle::spawn(config, Cursor::default(), sink.clone());
    sink.equals(&sim, "all parts").await;
    assert!(feed.counters().stats.failed_replays > 1, "one was enough");
}

#[tokio::test]
async fn a_feed_that_cannot_be_caught_up_recovers_and_a_reset_makes_it_whole() {
    let sim = start(args(json!({"buffer_steps": 3}))).await;
    traffic(&sim, 0, 20).await;
    let sink = Sink::default();
    let _feed = follow(&sim, &sink);
    sink.until("what is left", |kept| kept.cursor.last.is_some()).await;
    assert!(sink.kept.lock().cursor.recovering());
    let truth = sim.engine().indexed_blocks().await;
    assert!(sink.kept.lock().hashes().iter().all(|hash| truth.contains(hash)), "only what is there");
    post(&sim, "/reset_prefix_cache", json!({})).await;
    traffic(&sim, 0, 2).await;
    sink.equals(&sim, "whole").await;
    assert!(!sink.kept.lock().cursor.recovering());
}

#[tokio::test]
async fn without_a_replay_socket_a_feed_is_whole_from_the_engines_start_only() {
    let sim = start(args(json!({"replay_endpoint": null}))).await;
    let sink = Sink::default();
    let feed = follow(&sim, &sink);
    eventually("subscribed", async || sim.engine().kv_publisher().unwrap().stats().subscribers == 1).await;
    traffic(&sim, 0, 10).await;
    sink.equals(&sim, "from the start").await;
    assert!(!sink.kept.lock().cursor.recovering());
    feed.stop().await;
    traffic(&sim, 10, 3).await;
    let _feed = follow(&sim, &sink);
    eventually("subscribed", async || sim.engine().kv_publisher().unwrap().stats().subscribers == 1).await;
    traffic(&sim, 20, 3).await;
    sink.until("nobody knows what was missed", |kept| kept.clears == 1 && kept.cursor.last.is_some()).await;
    assert!(sink.kept.lock().cursor.recovering());
}

#[tokio::test]
async fn engines_that_connect_to_us_are_told_apart_by_their_topics() {
    let hub =
        Hub::bind(&Endpoint::parse("tcp://127.0.0.1:0").unwrap(), Limits::default(), Arc::new(|_| true))
            .await
            .unwrap();
    let connect = |topic: &str| args(json!({"endpoint": hub.endpoint().to_string(), "topic": topic}));
    let engines = [start(connect("kv@a")).await, start(connect("kv@b")).await];
    let sinks = [Sink::default(), Sink::default()];
    let mut feeds = Vec::new();
    for (sim, (sink, topic)) in engines.iter().zip(sinks.iter().zip(["kv@a", "kv@b"])) {
        let claim = Claim { topic: topic.into(), rank: Some(0) };
        let source = Source::Hub(hub.claim(claim.clone()).unwrap());
        assert!(hub.claim(claim).is_none(), "it is taken");
        feeds.push(FeedHandle::spawn(FeedConfig { source, ..config(sim) }, Cursor::default(), sink.clone()));
        eventually("connected", async || sim.engine().kv_publisher().unwrap().stats().subscribers == 1).await;
    }
    for (number, (sim, sink)) in engines.iter().zip(&sinks).enumerate() {
        traffic(sim, number as u32 * 11, 8).await;
        sink.equals(sim, "its own").await;
    }
    let [first, second] = engines;
    restart(&first);
    traffic(&first, 2, 5).await;
    sinks[0].until("the restart", |kept| kept.clears == 1).await;
    sinks[0].equals(&first, "after the restart").await;
    sinks[1].equals(&second, "untouched").await;
    assert_eq!(sinks[1].kept.lock().clears, 0);
    drop(hub);
    eventually("no hub, no feed", async || feeds.iter().all(FeedHandle::is_finished)).await;
}

#[tokio::test]
async fn only_who_is_admitted_and_says_the_whole_topic_is_connected() {
    let any = Endpoint::parse("tcp://127.0.0.1:0").unwrap();
    let nobody = Hub::bind(&any, Limits::default(), Arc::new(|_| false)).await.unwrap();
    let all = Hub::bind(&any, Limits::default(), Arc::new(|_| true)).await.unwrap();
    let connect = |hub: &Hub| args(json!({"endpoint": hub.endpoint().to_string(), "topic": "gpu-1"}));
    let refused = start(connect(&nobody)).await;
    let admitted = start(connect(&all)).await;
    let claim = |topic: &str| Claim { topic: topic.into(), rank: None };
    let (none, shorter, its) = (
        nobody.claim(claim("gpu-1")).unwrap(),
        all.claim(claim("gpu")).unwrap(),
        all.claim(claim("gpu-1")).unwrap(),
    );
    eventually("connected", async || admitted.engine().kv_publisher().unwrap().stats().subscribers == 1)
        .await;
    traffic(&admitted, 1, 3).await;
    traffic(&refused, 1, 3).await;
    eventually("heard", async || its.is_connected()).await;
    assert!(!shorter.is_connected() && !none.is_connected());
    assert_eq!((all.unclaimed(), refused.engine().kv_publisher().unwrap().stats().subscribers), (0, 0));
}

/// A message of a feed: one block stored, its number standing for everything in it.
fn stored(seq: u64, rank: u8) -> Vec<Bytes> {
    let mut payload = vec![0x93, 0xcb];
    payload.extend_from_slice(&(seq as f64).to_be_bytes());
    payload.extend_from_slice(b"\x91\x96\xabBlockStored\x91");
    payload.extend_from_slice(&[seq as u8, 0xc0, 0x94, 1, 2, 3, 4, 4, 0xc0, rank]);
    vec![Bytes::from_static(b"t"), Bytes::copy_from_slice(&seq.to_be_bytes()), payload.into()]
}

#[tokio::test]
async fn garbage_is_counted_and_never_fatal() {
    let any = Endpoint::parse("tcp://127.0.0.1:0").unwrap();
    let publisher = Publisher::bind(&any, 1000).await.unwrap();
    let sink = Sink::default();
    let source = Source::Connect(publisher.endpoint().clone());
    let mut config = FeedConfig::new(source, None, FORMAT, Arc::new(AnyAddress));
    (config.topic, config.rank) = ("t".into(), Some(0));
    let feed = FeedHandle::spawn(config, Cursor::default(), sink.clone());
    eventually("subscribed", async || publisher.stats().subscribers == 1).await;
    publisher.send(stored(0, 0));
    let part = |bytes: &'static [u8]| Bytes::from_static(bytes);
    publisher.send(vec![part(b"t")]);
    publisher.send(vec![part(b"t"), part(b"not eight"), part(b"\x92\x00\x90")]);
    publisher.send(vec![part(b"t"), part(&[0, 0, 0, 0, 0, 0, 0, 1]), part(b"\xc1garbage")]);
    publisher.send(vec![part(b"other"), part(&[0; 8]), part(b"\x92\x00\x90")]);
    publisher.send(stored(1, 3));
    publisher.send(stored(1, 0));
    sink.until("the good ones", |kept| kept.hashes() == [0, 1]).await;
    let counters = feed.counters();
    assert_eq!((counters.garbage, counters.other_rank, counters.messages), (3, 1, 6));
    assert_eq!((counters.disconnects, sink.kept.lock().clears), (0, 0));
    // A message beyond every bound ends the connection, and the next begins.
    publisher.send(vec![part(b"t"), part(&[0; 8]), Bytes::from(vec![0; (16 << 20) + 1])]);
    eventually("connected again", async || {
        feed.counters().connects == 2 && publisher.stats().subscribers == 1
    })
    .await;
    publisher.send(stored(2, 0));
    sink.until("and on", |kept| kept.hashes() == [0, 1, 2]).await;
}

#[tokio::test]
async fn a_publisher_in_a_file_is_found_again_when_it_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::parse(&format!("ipc://{}/feed", folder.path().display())).unwrap();
    let sink = Sink::default();
    let config = FeedConfig::new(Source::Connect(endpoint.clone()), None, FORMAT, Arc::new(AnyAddress));
    let feed = FeedHandle::spawn(config, Cursor::default(), sink.clone());
    eventually("nobody is there yet", async || feed.counters().disconnects > 0).await;
    for run in 0..3 {
        let publisher = Publisher::bind(&endpoint, 1000).await.unwrap();
        eventually("subscribed", async || publisher.stats().subscribers == 1).await;
        publisher.send(stored(0, 0));
        publisher.send(stored(1, 0));
        sink.until("heard", |kept| kept.clears == run && kept.hashes() == [0, 1]).await;
        drop(publisher);
        eventually("gone", async || !feed.counters().connected).await;
    }
}

/// Allows nothing.
struct Nowhere;

impl Resolve for Nowhere {
    fn addresses(&self, host: &str, _: u16) -> Resolved {
        let why = io::Error::new(io::ErrorKind::PermissionDenied, format!("{host} is not allowed"));
        Box::pin(async move { Err(why) })
    }

    fn path(&self, _: &Path) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "files are not allowed"))
    }
}

#[tokio::test]
async fn addresses_that_are_not_allowed_are_not_connected_to() {
    let sim = start(args(json!({}))).await;
    let publisher = sim.engine().kv_publisher().unwrap();
    for (endpoint, says) in [
        (publisher.endpoint().clone(), "127.0.0.1 is not allowed"),
        (Endpoint::parse("ipc:///run/x").unwrap(), "files are not allowed"),
    ] {
        let config = FeedConfig::new(Source::Connect(endpoint), None, FORMAT, Arc::new(Nowhere));
        let feed = FeedHandle::spawn(config, Cursor::default(), Sink::default());
        eventually("refused", async || feed.counters().last_error.as_deref() == Some(says)).await;
        assert_eq!(feed.counters().connects, 0);
    }
    assert_eq!(publisher.stats().subscribers, 0);
}

#[tokio::test]
async fn engines_say_where_their_feeds_are() {
    let mut args = args(json!({"topic": "kv"}));
    args.load_publish_endpoint = Some(Endpoint::parse("tcp://*:0").unwrap());
    let vllm = start(args.clone()).await;
    let sources = discover::vllm(&get(&vllm, "/kv_event_sources").await, "127.0.0.1").unwrap();
    let publisher = vllm.engine().kv_publisher().unwrap();
    assert_eq!(&sources.ranks[0].endpoint, publisher.endpoint());
    assert_eq!(sources.ranks[0].replay.as_ref(), publisher.replay_endpoint());
    assert_eq!(sources.ranks[0].topic, "kv");

    args.kv_events_format = EventFormat::Sglang;
    let sglang = start(args).await;
    let sources = discover::sglang(&get(&sglang, "/server_info").await, "127.0.0.1").unwrap();
    let publisher = sglang.engine().kv_publisher().unwrap();
    assert_eq!((sources.block_size, sources.ranks.len()), (Some(BLOCK), 1));
    assert_eq!(&sources.ranks[0].endpoint, publisher.endpoint());
    assert_eq!(sources.ranks[0].replay.as_ref(), publisher.replay_endpoint());
    let (load, topic) = sources.ranks[0].load.clone().unwrap();
    let mut feed = LoadFeed::spawn(load, &topic, Arc::new(AnyAddress));
    let said = tokio::time::timeout(Duration::from_secs(10), feed.changed()).await.unwrap().unwrap();
    assert_eq!((said.running, said.max_tokens), (0, 64 * u64::from(BLOCK)));
    assert_eq!(feed.newest(), Some(said));

    let silent = start(crate::engines::sim::EngineSimArgs::defaults()).await;
    let sources = discover::vllm(&get(&silent, "/kv_event_sources").await, "127.0.0.1").unwrap();
    assert_eq!(sources.ranks, []);
}
