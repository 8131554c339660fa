//! KsanaLLM's groups found by name: pairs of what two names stand for, weights, the registry's say, and
//! what is told to the name service.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::nodes::{Seen, saying};
use super::{config, pair, register, registration};
use crate::http::tests::support::{
    MemoryCluster, Running, admin_of, body, exchange, ok, post, refusing, request, start_with, status,
};
use crate::http::{FrontConfig, Metrics, Names};
use crate::naming::{Answer, Call, Endpoint, NameService, NameState, Standing};

/// A name service that says what it is told, and remembers what it was told of calls.
#[derive(Debug, Default)]
struct Told {
    answers: Mutex<BTreeMap<String, Arc<Answer>>>,
    calls: Mutex<Vec<(String, String, Option<u16>)>>,
    trouble: Mutex<Option<String>>,
}

impl Told {
    fn say(&self, name: &str, endpoints: &[(SocketAddr, u32, Standing)]) {
        let endpoint = |(address, weight, standing): &(SocketAddr, u32, Standing)| Endpoint {
            address: address.to_string(),
            weight: *weight,
            standing: *standing,
        };
        self.answers.lock().insert(name.to_owned(), Arc::new(Answer::new(endpoints.iter().map(endpoint))));
    }
}

impl NameService for Told {
    fn provider(&self) -> &'static str {
        "static"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        self.answers.lock().get(name).cloned()
    }

    fn report(&self, call: &Call<'_>) {
        self.calls.lock().push((call.name.to_owned(), call.address.to_owned(), call.status));
    }

    fn states(&self) -> Vec<NameState> {
        let state = |(name, answer): (&String, &Arc<Answer>)| NameState {
            name: name.clone(),
            answer: Some(Arc::clone(answer)),
            age: Some(Duration::from_secs(35)),
            expired: false,
            trouble: self.trouble.lock().clone(),
            failures: 2,
            lists: 1,
            changes: 1,
        };
        self.answers.lock().iter().map(state).collect()
    }
}

fn start(strict: bool) -> (Running, Arc<Told>) {
    let told = Arc::<Told>::default();
    let service: Arc<dyn NameService> = told.clone();
    let names = Names::new(Arc::clone(&service), "p".to_owned(), "d".to_owned());
    let config = FrontConfig { names: Some(names), name_service: Some(service), ..config(strict) };
    (start_with(config, MemoryCluster::new(), Metrics::default()), told)
}

/// A node that answers every request.
async fn answering(said: &str) -> (SocketAddr, Arc<Mutex<Seen>>) {
    saying(ok("application/json", &format!(r#"{{"said":"{said}"}}"#))).await
}

/// `GET` of an operator.
async fn read(admin: SocketAddr, path: &str) -> String {
    exchange(admin, request("GET", path, "", "")).await
}

fn generate() -> String {
    post("/generate", r#"{"prompt":"hi"}"#)
}

const READY: Standing = Standing::Ready;

#[tokio::test]
async fn requests_go_to_what_the_names_stand_for_and_results_are_reported() {
    for strict in [false, true] {
        let (front, told) = start(strict);
        assert_eq!(status(&exchange(front.address, generate()).await), 503, "nothing is known yet");
        let (prefill, seen) = answering("p").await;
        let (decode, _) = answering("d").await;
        told.say("p", &[(prefill, 100, READY)]);
        told.say("d", &[(decode, 100, READY), (refusing().await, 100, Standing::Out)]);
        for _ in 0..4 {
            let response = exchange(front.address, generate()).await;
            assert_eq!(status(&response), 200, "{response}");
        }
        let key = format!("kv-comm-group-key: {prefill}__{decode}");
        assert!(seen.lock().requests[0].0.contains(&key), "{:?}", seen.lock().requests);
        let calls = told.calls.lock().clone();
        assert_eq!(calls.len(), 8, "both legs of each");
        assert!(calls.contains(&("p".to_owned(), prefill.to_string(), Some(200))), "{calls:?}");
        assert!(calls.contains(&("d".to_owned(), decode.to_string(), Some(200))), "{calls:?}");
    }
}

#[tokio::test]
async fn what_the_registry_knows_is_gone_by_and_what_it_does_not_know_is_believed() {
    let (front, told) = start(false);
    let (prefill, _) = answering("p").await;
    let (decode, _) = answering("d").await;
    told.say("p", &[(prefill, 100, READY)]);
    told.say("d", &[(decode, 100, READY)]);
    assert_eq!(status(&exchange(front.address, generate()).await), 200, "nobody registered here");
    register(&front, registration("prefill", prefill, "127.0.0.2:1")).await;
    assert_eq!(
        status(&exchange(front.address, generate()).await),
        503,
        "the prefill group did, and has no pair with the other"
    );
    pair(&front, prefill, decode).await;
    assert_eq!(status(&exchange(front.address, generate()).await), 200);
    // The registry alone is not enough: the name says who takes part.
    told.say("d", &[]);
    assert_eq!(status(&exchange(front.address, generate()).await), 503);

    // In strict mode the two have no relation.
    let (front, told) = start(true);
    told.say("p", &[(prefill, 100, READY)]);
    told.say("d", &[(decode, 100, READY)]);
    register(&front, registration("prefill", prefill, "127.0.0.2:1")).await;
    assert_eq!(status(&exchange(front.address, generate()).await), 200);
}

#[tokio::test]
async fn weights_share_requests_out_and_a_node_that_fails_is_reported_and_passed_over() {
    let (front, told) = start(false);
    let (prefill, _) = answering("p").await;
    let (light, at_light) = answering("l").await;
    let (heavy, at_heavy) = answering("h").await;
    told.say("p", &[(prefill, 100, READY)]);
    told.say("d", &[(light, 1, READY), (heavy, 1000, READY)]);
    for _ in 0..20 {
        assert_eq!(status(&exchange(front.address, generate()).await), 200);
    }
    let counts = (at_light.lock().requests.len(), at_heavy.lock().requests.len());
    assert!(counts.0 <= 3 && counts.1 >= 17, "{counts:?}");

    let gone = refusing().await;
    told.calls.lock().clear();
    told.say("d", &[(gone, 1000, READY), (light, 1, READY)]);
    for _ in 0..12 {
        assert_eq!(status(&exchange(front.address, generate()).await), 200, "the other one does it");
    }
    let failed = told
        .calls
        .lock()
        .iter()
        .filter(|(_, at, status)| *at == gone.to_string() && status.is_none())
        .count();
    // A slow machine may see a trial or two besides.
    let most = front.front.config.proxy.breaker.failures as usize + 3;
    assert!((1..=most).contains(&failed), "{failed}: after some failures it is left alone");
}

#[tokio::test]
async fn operators_and_scrapers_see_the_names() {
    let (front, told) = start(false);
    told.say("p", &[("10.0.0.1:8000".parse().unwrap(), 100, READY)]);
    told.say(
        "d",
        &[
            ("10.0.0.2:8000".parse().unwrap(), 50, READY),
            ("10.0.0.3:8000".parse().unwrap(), 100, Standing::Leaving),
        ],
    );
    *told.trouble.lock() = Some("cannot reach it".to_owned());
    let admin = admin_of(&front);
    let reply = body(&read(admin, "/v1/admin/names").await);
    assert_eq!(reply["provider"], "static");
    assert_eq!(reply["names"][0]["endpoints"][0]["used"], true, "{reply}");
    assert_eq!(reply["names"][0]["endpoints"][1]["state"], "leaving", "{reply}");
    assert_eq!(reply["names"][0]["endpoints"][1]["used"], false, "{reply}");
    let standing = body(&read(admin, "/v1/admin/status").await);
    let line = standing["name_troubles"][0].as_str().unwrap();
    assert_eq!(line, "d: cannot reach it; what was said 35 s ago holds");
    let metrics = read(admin, "/metrics").await;
    for line in [
        r#"everline_name_service_endpoints{name="d",state="leaving"} 1"#,
        r#"everline_name_service_up{name="p"} 0"#,
        r#"everline_name_service_failures_total{name="p"} 2"#,
        r#"everline_name_service_calls_total{role="decode",result="error"} 0"#,
    ] {
        assert!(metrics.lines().any(|is| is == line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn the_registry_is_a_name_service_too() {
    let front = super::start(false);
    let admin = admin_of(&front);
    pair(&front, ([127, 0, 0, 1], 100).into(), ([127, 0, 0, 1], 200).into()).await;
    let reply = body(&read(admin, "/v1/admin/names").await);
    assert_eq!(
        (reply["provider"].as_str(), reply["names"][1]["name"].as_str()),
        (Some("auto"), Some("decode"))
    );
    assert_eq!(reply["names"][1]["endpoints"][0]["address"], "127.0.0.1:200", "{reply}");
    assert_eq!(reply["names"][0]["endpoints"][0]["used"], true, "{reply}");
}
