//! The proxied requests recorded from the reference router, played again in strict mode.

use serde_json::Value;

use super::golden::vectors;
use super::played::play;
use super::{pair, start};

async fn replay(vector: &Value) {
    let front = start(true);
    play(vector, front.address, async |prefill, decode| pair(&front, prefill, decode).await.2).await;
}

#[tokio::test]
async fn all_proxied_requests_are_answered_as_the_reference_answers_them() {
    let golden = vectors();
    let vectors = golden["proxy_vectors"].as_array().unwrap();
    assert_eq!(vectors.len(), 25);
    futures_util::future::join_all(vectors.iter().map(replay)).await;
}
