//! Engines that keep a connection, but are gone.

use std::sync::atomic::Ordering;

use super::streams::{ask, chat_events, engine, keeping};
use super::support::*;
use crate::http::FrontConfig;

#[tokio::test]
async fn a_stream_leaves_an_engine_that_is_silent_and_cannot_be_reached() {
    let front = keeping(FrontConfig::default());
    let silent = engine(chat_events(3)).await;
    front.cluster.add("silent", silent.address);
    let address = front.address;
    let client = tokio::spawn(async move { exchange(address, ask("")).await });
    eventually("asked", || !silent.bodies.lock().is_empty()).await;
    let other = engine(chat_events(3)).await;
    other.permits.add_permits(100);
    front.cluster.add("other", other.address);
    // Each time a probe fails; the answer's head, which may be on its way, says the contrary once.
    eventually("left", || {
        front.cluster.worker("silent").unwrap().live.unreachable.store(true, Ordering::Relaxed);
        !other.bodies.lock().is_empty()
    })
    .await;
    let answer = client.await.unwrap();
    assert!(answer.contains("w2 ") && answer.contains("data: [DONE]"), "{answer}");
    // The engine hears of it when its connection closes.
    eventually("broken off", || silent.broken_off.load(Ordering::SeqCst) == 1).await;
}
