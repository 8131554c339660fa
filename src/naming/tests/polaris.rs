//! Polaris: questions with a revision, several servers, results pushed to its monitoring.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::super::polaris::{Polaris, PolarisOptions};
use super::super::{Call, NameService as _};
use super::fake::{Asked, Fake, Says};
use super::{eventually, trouble, until_usable, usable};

const NAME: &str = "prefill-service";

fn instance(host: &str, healthy: bool) -> Value {
    json!({
        "id": host, "service": NAME, "namespace": "Production", "host": host, "port": 8000, "weight": 100,
        "healthy": healthy, "isolate": false, "metadata": {},
    })
}

fn naming(state: &Mutex<(String, Vec<Value>)>, asked: &Asked) -> Says {
    assert_eq!(asked.line, "POST /v1/Discover HTTP/1.1");
    let question: Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!((&question["type"], &question["service"]["namespace"]), (&json!(1), &json!("Production")));
    let (revision, instances) = &*state.lock();
    if question["service"]["name"] != NAME {
        return Says::Whole(400, json!({"code": 400_202, "info": "not found resource"}).to_string());
    }
    if question["service"]["revision"] == **revision {
        return Says::Whole(200, json!({"code": 200_001, "info": "discover data is no change"}).to_string());
    }
    let reply = json!({
        "code": 200_000, "info": "execute success", "type": "INSTANCE",
        "service": {"name": NAME, "namespace": "Production", "revision": revision}, "instances": instances,
    });
    Says::Whole(200, reply.to_string())
}

fn options(servers: &[&Fake]) -> PolarisOptions {
    PolarisOptions {
        servers: servers.iter().map(|server| format!("http://{}", server.address)).collect(),
        namespace: "Production".to_owned(),
        ca: None,
        token_file: None,
        refresh: Duration::from_millis(20),
        max_age: Duration::from_secs(3600),
        push_gateway: None,
        caller: "r1".to_owned(),
        report_every: Some(Duration::from_millis(20)),
    }
}

#[tokio::test]
async fn instances_are_asked_for_with_the_revision_that_is_known() {
    let state = Arc::new(Mutex::new((
        "r1".to_owned(),
        vec![instance("10.0.0.1", true), instance("10.0.0.2", false)],
    )));
    let shared = Arc::clone(&state);
    let server = Fake::start(None, None, move |asked| naming(&shared, asked)).await;
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    fs::write(&token_file, "secret\n").unwrap();
    let stop = CancellationToken::new();
    let options = PolarisOptions { token_file: Some(token_file), ..options(&[&server]) };
    let names = Polaris::start(options, &[NAME.to_owned()], &stop).unwrap();
    until_usable(&*names, NAME, &["10.0.0.1:8000"]).await;
    let first = names.answer(NAME).unwrap();
    eventually("it was asked again", || server.asked.lock().len() >= 3).await;
    assert!(Arc::ptr_eq(&first, &names.answer(NAME).unwrap()));
    let asked = server.asked.lock()[2].clone();
    assert!(asked.body.contains(r#""revision":"r1""#), "{}", asked.body);
    assert_eq!(asked.header("x-polaris-token"), Some("secret"));

    *state.lock() = ("r2".to_owned(), vec![instance("10.0.0.2", true)]);
    until_usable(&*names, NAME, &["10.0.0.2:8000"]).await;
    assert_eq!(names.states()[0].lists, 2, "everything only where something has changed");
    stop.cancel();
}

#[tokio::test]
async fn a_server_that_is_away_is_not_asked_alone_and_all_of_them_leave_the_last_answer() {
    let state = Arc::new(Mutex::new(("r1".to_owned(), vec![instance("10.0.0.1", true)])));
    let (one, other) = (Arc::clone(&state), Arc::clone(&state));
    let first = Fake::start(None, None, move |asked| naming(&one, asked)).await;
    let second = Fake::start(None, None, move |asked| naming(&other, asked)).await;
    let stop = CancellationToken::new();
    let options = PolarisOptions { max_age: Duration::from_millis(1500), ..options(&[&first, &second]) };
    let names = Polaris::start(options, &[NAME.to_owned()], &stop).unwrap();
    until_usable(&*names, NAME, &["10.0.0.1:8000"]).await;
    first.stop();
    *state.lock() = ("r2".to_owned(), vec![instance("10.0.0.2", true)]);
    until_usable(&*names, NAME, &["10.0.0.2:8000"]).await;
    second.stop();
    eventually("it is told", || trouble(&*names).contains("cannot reach")).await;
    assert_eq!(usable(&*names, NAME).unwrap(), ["10.0.0.2:8000"]);
    eventually("it is too old", || usable(&*names, NAME).is_none()).await;
    stop.cancel();
}

#[tokio::test]
async fn a_service_that_polaris_does_not_know_is_told_by_name() {
    let state = Mutex::new(("r1".to_owned(), Vec::new()));
    let server = Fake::start(None, None, move |asked| naming(&state, asked)).await;
    let stop = CancellationToken::new();
    let names = Polaris::start(options(&[&server]), &["other".to_owned()], &stop).unwrap();
    eventually("it is told", || !trouble(&*names).is_empty()).await;
    assert!(trouble(&*names).contains("service other in namespace Production"), "{}", trouble(&*names));
    // Something else than Polaris.
    let web = Fake::start(None, None, |_| Says::Whole(404, "<html>".to_owned())).await;
    let names = Polaris::start(options(&[&web]), &["other".to_owned()], &stop).unwrap();
    eventually("it is told", || trouble(&*names).contains("8090")).await;
    stop.cancel();
}

#[tokio::test]
async fn results_of_calls_are_pushed_to_the_monitoring() {
    let state = Mutex::new(("r1".to_owned(), vec![instance("10.0.0.1", true)]));
    let server = Fake::start(None, None, move |asked| naming(&state, asked)).await;
    let gateway = Fake::start(None, None, |_| Says::Whole(200, String::new())).await;
    let stop = CancellationToken::new();
    let push_gateway = Some(format!("http://{}", gateway.address));
    let names =
        Polaris::start(PolarisOptions { push_gateway, ..options(&[&server]) }, &[NAME.to_owned()], &stop)
            .unwrap();
    for status in [Some(200), Some(200), Some(503), None] {
        let took = Duration::from_millis(3);
        names.report(&Call { name: NAME, address: "10.0.0.1:8000", status, took });
    }
    let row = |family: &str, code: &str, value: &str| {
        format!(
            "{family}{{callee_namespace=\"Production\",callee_service=\"{NAME}\",callee_instance=\"10.0.0.1:8000\",\
             callee_result_code=\"{code}\",caller_service=\"r1\"}} {value}"
        )
    };
    let wanted = [
        row("upstream_rq_total", "200", "2"),
        row("upstream_rq_success", "200", "2"),
        row("upstream_rq_timeout", "200", "6"),
        row("upstream_rq_total", "503", "1"),
        row("upstream_rq_success", "503", "0"),
        row("upstream_rq_success", "0", "0"),
    ];
    let is_there = |asked: &Asked| wanted.iter().all(|row| asked.body.lines().any(|line| line == row));
    eventually("it is reported", || gateway.count(is_there) > 0).await;
    assert_eq!(gateway.asked.lock()[0].line, "PUT /metrics/job/polaris-client/instance/r1 HTTP/1.1");
    eventually("reports are counted", || names.reports().0 > 0).await;
    // What came after the last report is reported at the end.
    names.report(&Call { name: NAME, address: "10.0.0.1:8000", status: Some(201), took: Duration::ZERO });
    stop.cancel();
    let last = row("upstream_rq_total", "201", "1");
    eventually("the end is reported", || gateway.count(|asked| asked.body.contains(&last)) > 0).await;

    gateway.stop();
    let stop = CancellationToken::new();
    let push_gateway = Some(format!("http://{}", gateway.address));
    let names =
        Polaris::start(PolarisOptions { push_gateway, ..options(&[&server]) }, &[NAME.to_owned()], &stop)
            .unwrap();
    names.report(&Call { name: NAME, address: "10.0.0.1:8000", status: Some(200), took: Duration::ZERO });
    eventually("failures are counted", || names.reports().1 > 0).await;
    stop.cancel();
}
