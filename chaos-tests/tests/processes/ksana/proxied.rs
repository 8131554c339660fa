//! The recorded requests in strict mode on three replicas: registered by way of the balancer, each call
//! at another replica, and asked of each in turn.

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::Fleet;
use http::Method;

use super::played::play;
use super::{beat, golden, name, register, registration, until_seen};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recorded_requests_are_answered_alike_over_three_replicas() {
    let golden = golden();
    let vectors = golden["proxy_vectors"].as_array().expect("vectors");
    assert_eq!(vectors.len(), 25);
    let fleet = Fleet::of(3).set("ksana.enabled=true").set("ksana.compat=strict").start().await;
    for (n, vector) in vectors.iter().enumerate() {
        play(vector, fleet.balancer, async |prefill, decode| {
            // The same nodes have moved: only the last pair is one that requests may go to.
            if n > 0 {
                forget(&fleet).await;
            }
            let (of_p, of_d) = (format!("127.0.0.3:{}", 1000 + 2 * n), format!("127.0.0.3:{}", 1001 + 2 * n));
            let p = register(fleet.balancer, &registration("prefill", prefill, &of_p, 0, 1)).await;
            let d = register(fleet.balancer, &registration("decode", decode, &of_d, 0, 1)).await;
            beat(fleet.balancer, &p).await;
            beat(fleet.balancer, &d).await;
            let key = format!("{prefill}__{decode}");
            name(fleet.balancer, &p, &key).await;
            until_seen(&fleet, &[0, 1, 2], "there is one pair", |seen| {
                seen.pairs.len() == 1 && seen.pairs[0].comm_key == key && seen.pairs[0].is_active
            })
            .await;
            key
        })
        .await;
    }
    fleet.agree().await;
}

/// Takes all nodes out.
async fn forget(fleet: &Fleet) {
    let seen = super::tables(&fleet.replicas[0]).await.expect("the tables");
    for node in seen.nodes {
        let url = fleet.replicas[0].admin_url(&format!("/v1/admin/ksana/nodes/{}", node.node_id));
        let reply = Http::fresh().send(Method::DELETE, &url, None::<&()>, LIMIT).await;
        assert_eq!(reply.expect("an answer").status, 200);
    }
}
