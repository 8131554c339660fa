//! What answers add to the blocks of engines that tell nothing.

use std::sync::Arc;

use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::support::*;
use crate::http::FrontConfig;
use crate::kv::hash::{Seed, local_hashes};
use crate::kv::types::RankIx;
use crate::routing::policy::by_name;
use crate::state::command::CacheCommand;
use crate::state::worker::ServedModel;
use crate::tokens::{Options, Tokenizers};

fn knowing() -> Running {
    let tokenizers = Tokenizers::load(Vec::new(), &Options::default(), None).unwrap();
    let policy = by_name("kv_cost").unwrap();
    start(FrontConfig { policy, tokenizers: Some(Arc::new(tokenizers)), ..FrontConfig::default() })
}

/// Lengths of the chains that were said to be at a worker; they are those of
/// the ids that count up from 0.
fn told(front: &Running) -> Vec<usize> {
    let told = front.cluster.told.lock();
    let chain = local_hashes(&(0..320).collect::<Vec<u32>>(), 16, Seed::default());
    let routed = told.iter().filter_map(|command| match command {
        CacheCommand::Routed { locals, capacity, .. } => {
            let said: Vec<u8> =
                chain[..locals.len() / 8].iter().flat_map(|hash| hash.0.to_le_bytes()).collect();
            assert_eq!(locals[..], said[..]);
            assert!(capacity.is_some());
            Some(locals.len() / 8)
        }
        _ => None,
    });
    routed.collect()
}

fn prompt(stream: bool) -> String {
    let body = json!({"model": "m", "prompt": (0..40).collect::<Vec<u32>>(), "stream": stream});
    request("POST", "/v1/completions", "", &body.to_string())
}

/// An event with these ids.
fn event(ids: std::ops::Range<u32>) -> String {
    let choice = json!({"index": 0, "text": "x", "token_ids": ids.collect::<Vec<u32>>()});
    format!("data: {}\n\n", json!({"choices": [choice]}))
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

const EVENTS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

#[tokio::test]
async fn an_answer_in_one_piece_and_one_with_events_add_their_full_blocks() {
    let choice = json!({"index": 0, "text": "x", "token_ids": (40..65).collect::<Vec<u32>>()});
    let whole = ok("application/json", &json!({"choices": [choice]}).to_string());
    let events = EVENTS.to_owned()
        + &chunk(&event(40..50))
        + &chunk(&event(50..65))
        + &chunk("data: [DONE]\n\n")
        + "0\r\n\r\n";
    for (answer, stream) in [(whole, false), (events, true)] {
        let front = knowing();
        front.cluster.add("w", answering(answer).await);
        let response = exchange(front.address, prompt(stream)).await;
        assert_eq!(status(&response), 200, "{response}");
        // 40 ids in front, and 24 that were computed.
        eventually("told", || told(&front).len() == 2).await;
        assert_eq!(told(&front), [2, 4], "{stream}");
    }
}

#[tokio::test]
async fn answers_of_sglangs_own_route_add_their_full_blocks_whether_the_model_is_named_or_not() {
    let result = |ids: std::ops::Range<u32>| {
        let info = json!({"completion_tokens": ids.end - 40, "finish_reason": null});
        json!({"text": "x", "output_ids": ids.collect::<Vec<u32>>(), "meta_info": info}).to_string()
    };
    let events = |ids: [std::ops::Range<u32>; 3]| {
        let events = ids.map(|ids| chunk(&format!("data: {}\n\n", result(ids)))).concat();
        EVENTS.to_owned() + &events + &chunk("data: [DONE]\n\n") + "0\r\n\r\n"
    };
    for (answer, model) in [
        (ok("application/json", &result(40..65)), Some("m")),
        (ok("application/json", &result(40..65)), None),
        (events([40..41, 40..50, 40..65]), Some("m")),
        (events([40..41, 41..50, 50..65]), None),
    ] {
        let front = knowing();
        front.cluster.add("w", answering(answer.clone()).await);
        let mut body = json!({"input_ids": (0..40).collect::<Vec<u32>>(), "sampling_params": {}});
        if let Some(model) = model {
            body["model"] = model.into();
        }
        let response = exchange(front.address, request("POST", "/generate", "", &body.to_string())).await;
        assert_eq!(status(&response), 200, "{response}");
        eventually("told", || told(&front).len() == 2).await;
        assert_eq!(told(&front), [2, 4], "{answer}");
    }
    // Of two models nobody knows which one is meant: any worker may have it, and nothing is reckoned.
    let front = knowing();
    front.cluster.add("w", answering(ok("application/json", &result(40..65))).await);
    front.cluster.change("w", |record| {
        let other = ServedModel { name: "other".into(), lora_of: None, max_model_len: None };
        record.spec.models.push(other);
    });
    let body = json!({"input_ids": (0..40).collect::<Vec<u32>>()}).to_string();
    let response = exchange(front.address, request("POST", "/generate", "", &body)).await;
    assert_eq!(status(&response), 200, "{response}");
    let named = json!({"input_ids": (0..40).collect::<Vec<u32>>(), "model": "other"}).to_string();
    exchange(front.address, request("POST", "/generate", "", &named)).await;
    eventually("told", || told(&front).len() == 2).await;
    assert_eq!(told(&front), [2, 4], "of the second one only");
    let gone = json!({"input_ids": [1], "model": "gone"}).to_string();
    let response = exchange(front.address, request("POST", "/generate", "", &gone)).await;
    assert_eq!(status(&response), 404, "{response}");
}

#[tokio::test]
async fn of_a_client_that_goes_away_the_beginning_counts_and_of_a_worker_that_fails_nothing() {
    for (worker_fails, expected) in [(false, vec![2, 4]), (true, vec![2])] {
        let front = knowing();
        let address = worker(move |mut stream| async move {
            read_message(&mut stream).await;
            let _ = stream.write_all((EVENTS.to_owned() + &chunk(&event(40..70))).as_bytes()).await;
            if !worker_fails {
                // Until the connection ends.
                read_message(&mut stream).await;
            }
        })
        .await;
        front.cluster.add("w", address);
        let mut client = tokio::net::TcpStream::connect(front.address).await.unwrap();
        client.write_all(prompt(true).as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        let ended = if worker_fails { "upstream_failed" } else { "token_ids" };
        while !String::from_utf8_lossy(&seen).contains(ended) {
            use tokio::io::AsyncReadExt;
            assert_ne!(client.read_buf(&mut seen).await.unwrap(), 0);
        }
        drop(client);
        let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
        eventually("freed", || live.load().requests == 0).await;
        for _ in 0..20 {
            // What was begun before the error was sent would be done.
            tokio::task::yield_now().await;
        }
        eventually("told", || told(&front).len() >= expected.len()).await;
        assert_eq!(told(&front), expected);
    }
}

#[tokio::test]
async fn nothing_is_added_where_the_engine_tells_itself_or_the_prompt_is_in_the_answer() {
    let choice = json!({"index": 0, "text": "x", "token_ids": (40..65).collect::<Vec<u32>>()});
    let answer = ok("application/json", &json!({"choices": [choice]}).to_string());
    let front = knowing();
    front.cluster.add("w", answering(answer).await);
    let echo = json!({"model": "m", "prompt": (0..40).collect::<Vec<u32>>(), "echo": true}).to_string();
    let response = exchange(front.address, request("POST", "/v1/completions", "", &echo)).await;
    assert_eq!(status(&response), 200, "{response}");
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    live.set_ranks(vec![RankIx(0)]);
    exchange(front.address, prompt(false)).await;
    live.set_reckoned(true);
    exchange(front.address, prompt(false)).await;
    eventually("told", || told_all(&front).contains(&(4, true))).await;
    let all = told_all(&front);
    // Each prompt, and of the answers that of the last request.
    assert_eq!(all.iter().filter(|(blocks, _)| *blocks > 2).count(), 1, "{all:?}");
    assert!(all.contains(&(2, false)), "{all:?}");
}

/// Lengths, and whether blocks are reckoned.
fn told_all(front: &Running) -> Vec<(usize, bool)> {
    let told = front.cluster.told.lock();
    let routed = told.iter().filter_map(|command| match command {
        CacheCommand::Routed { locals, capacity, .. } => Some((locals.len() / 8, capacity.is_some())),
        _ => None,
    });
    routed.collect()
}
