//! What operators see of streams, and how they end them.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::streams::*;
use super::support::*;
use crate::http::FrontConfig;

#[tokio::test]
async fn operators_see_streams_and_end_them() {
    let front = keeping(FrontConfig::default());
    let admin = admin_of(&front);
    let engine = engine(chat_events(2)).await;
    front.cluster.add("w", engine.address);
    engine.permits.add_permits(1);
    let (_client, id, got) = begin(&front, ask(""), "w0").await;
    let send = |method: &'static str, path: String| exchange(admin, request(method, &path, "", ""));
    let listed = body(&send("GET", "/v1/admin/streams".to_owned()).await);
    assert_eq!((&listed["streams"][0]["id"], &listed["more"]), (&json!(id), &json!(false)));
    let shown = body(&send("GET", format!("/v1/admin/streams/{id}")).await);
    assert_eq!(
        (&shown["copy"]["role"], &shown["copy"]["worker"]),
        (&json!("holder"), &json!("w")),
        "{shown}"
    );
    assert_eq!(shown["copy"]["request_id"].as_str(), header(&got, "x-request-id"));
    assert!(!shown.to_string().contains("w0"), "nothing of its content: {shown}");
    let numbers = body(&send("GET", "/v1/admin/status".to_owned()).await)["streams"].clone();
    assert_eq!((&numbers["held"], &numbers["opened"]), (&json!(1), &json!(1)));
    let cancelled = send("POST", format!("/v1/admin/streams/{id}/cancel")).await;
    assert!(status(&cancelled) == 200 && cancelled.contains("is cancelled"), "{cancelled}");
    eventually("the engine is let go", || engine.broken_off.load(Ordering::SeqCst) == 1).await;
    let all = body(&send("GET", "/v1/admin/streams?all=true".to_owned()).await);
    assert_eq!(all["streams"][0]["state"], "cancelled");
    assert_eq!(body(&send("GET", "/v1/admin/streams".to_owned()).await)["streams"], json!([]));
}

#[tokio::test]
async fn operators_list_streams_a_page_at_a_time_of_one_state_or_model() {
    let front = keeping(with_keys());
    let admin = admin_of(&front);
    let mut made = BTreeSet::new();
    for _ in 0..3 {
        made.insert(ended(&front, &key_of("a")).await.0);
    }
    let list = async |query: &str| {
        exchange(admin, request("GET", &format!("/v1/admin/streams?{query}"), "", "")).await
    };
    let ids = |page: &Value| -> Vec<String> {
        let streams = page["streams"].as_array().unwrap();
        streams.iter().map(|stream| stream["id"].as_str().unwrap().to_owned()).collect()
    };
    let first = body(&list("all=true&limit=2").await);
    assert_eq!((ids(&first).len(), &first["more"]), (2, &json!(true)), "{first}");
    let (worker, key) = (&first["streams"][0]["worker"], &first["streams"][0]["key"]);
    assert_eq!((worker, key), (&json!("w"), &json!("a")), "{first}");
    assert!(first["streams"][0]["age_s"].as_u64().is_some_and(|age| age < 60), "{first}");
    let second = body(&list(&format!("all=true&limit=2&after={}", ids(&first)[1])).await);
    assert_eq!(second["more"], json!(false));
    assert_eq!([ids(&first), ids(&second)].concat(), made.into_iter().collect::<Vec<_>>());
    for (query, count) in [
        ("state=completed", 3),
        ("state=failed,completed", 3),
        ("state=failed", 0),
        ("all=true&model=m", 3),
        ("all=true&model=%6D", 3),
        ("all=true&model=other", 0),
        ("model=m", 0),
    ] {
        assert_eq!(ids(&body(&list(query).await)).len(), count, "{query}");
    }
    for bad in ["state=x", "after=x", "limit=0", "limit=1001", "model=%"] {
        let refused = list(bad).await;
        assert_eq!((status(&refused), code(&refused).as_str()), (400, "invalid_value"), "{bad}");
    }
}
