//! Simulated engines, which check what vLLM checks: two say together what one says.

use serde_json::{Value, json};

use super::fleet::quick;
use crate::engines::sim::pd::Protocol;
use crate::engines::sim::{EngineSimArgs, Simulator};
use crate::http::tests::streams::keep;
use crate::http::tests::support::*;
use crate::relay::Options;
use crate::state::worker::WorkerRole;

async fn sim(splits: bool) -> Simulator {
    let mut args = EngineSimArgs::defaults();
    (args.instant, args.models) = (true, vec!["m".into()]);
    if splits {
        args.pd.protocol = Some(Protocol::VllmNixl);
        (args.pd.side_channel_host, args.pd.side_channel_port) = ("127.0.0.1".into(), 0);
    }
    Simulator::start(args).await.unwrap()
}

async fn say(front: &Running, path: &str, body: &Value) -> (String, Option<String>) {
    let answer = exchange(front.address, post(path, &body.to_string())).await;
    assert_eq!(status(&answer), 200, "{answer}");
    let prefill = header(&answer, "everline-prefill-worker").map(str::to_owned);
    let text = match body["stream"] == true {
        true => answer.lines().filter_map(|line| line.strip_prefix("data: {")).map(content).collect(),
        false => {
            let choice = &body_of(&answer)["choices"][0];
            choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap_or_default().to_owned()
        }
    };
    (text, prefill)
}

fn body_of(answer: &str) -> Value {
    let (head, rest) = answer.split_once("\r\n\r\n").unwrap();
    assert!(header(head, "content-length").is_some(), "{answer}");
    serde_json::from_str(rest).unwrap()
}

fn content(event: &str) -> String {
    let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap_or_default();
    let choice = &event["choices"][0];
    choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn two_engines_say_together_what_one_says() {
    let (one, p, d) = (sim(false).await, sim(true).await, sim(true).await);
    let (alone, shared) = (start(quick()), start(quick()));
    for front in [&alone, &shared] {
        keep(front, Options::default());
    }
    alone.cluster.add("one", one.address());
    shared.cluster.add("p", p.address());
    shared.cluster.add("d", d.address());
    shared.cluster.change("p", |record| record.spec.role = WorkerRole::Prefill);
    shared.cluster.change("d", |record| record.spec.role = WorkerRole::Decode);
    let words = "a long story about nothing at all ".repeat(20);
    for (path, mut body) in [
        ("/v1/completions", json!({"prompt": words})),
        ("/v1/completions", json!({"prompt": (100..400).collect::<Vec<u32>>(), "min_tokens": 5})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": words}], "max_completion_tokens": 40}),
        ),
    ] {
        body["model"] = json!("m");
        if body.get("max_completion_tokens").is_none() {
            body["max_tokens"] = json!(40);
        }
        for streams in [false, true] {
            body["stream"] = json!(streams);
            let (wanted, nobody) = say(&alone, path, &body).await;
            let (got, prefill) = say(&shared, path, &body).await;
            assert!(!wanted.is_empty() && nobody.is_none());
            assert_eq!((got, prefill.as_deref()), (wanted, Some("p")), "{body}");
        }
    }
}
