//! The client listener as KsanaLLM's: the golden vectors in strict mode, and what fixed mode does
//! better.

mod faults;
mod golden;
mod hanging;
mod names;
mod nodes;
mod played;
mod proxied;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::support::{MemoryCluster, Running, body, exchange, post, start_with, status};
use crate::http::{FrontConfig, KsanaOptions, Metrics, ProxyOptions};

const CLUSTER: &str = "default_cluster";

fn config(strict: bool) -> FrontConfig {
    let ksana =
        KsanaOptions { strict, cluster: CLUSTER.to_owned(), heartbeat_timeout: Duration::from_secs(60) };
    let proxy = ProxyOptions { idle_timeout: Duration::from_secs(5), ..ProxyOptions::default() };
    FrontConfig { ksana: Some(ksana), proxy, ..FrontConfig::default() }
}

fn start(strict: bool) -> Running {
    start_on(strict, MemoryCluster::new())
}

/// Another replica of the same cluster.
fn start_on(strict: bool, cluster: Arc<MemoryCluster>) -> Running {
    start_with(config(strict), cluster, Metrics::default())
}

/// A registration of one node with one device.
fn registration(role: &str, inference: SocketAddr, coordinator: &str) -> Value {
    json!({
        "inference_addr": inference.to_string(), "coordinator_addr": coordinator, "group_role": role,
        "node_rank": 0, "world_size": 1,
        "devices": [{"device_id": 0, "device_type": "T", "device_ip": "127.0.0.1"}],
    })
}

async fn call(front: &Running, path: &str, json: &Value) -> (u16, Value) {
    let response = exchange(front.address, post(path, &json.to_string())).await;
    let text = response.split_once("\r\n\r\n").expect(&response).1;
    (status(&response), serde_json::from_str(text).unwrap_or_else(|_| Value::from(text)))
}

async fn register(front: &Running, json: Value) -> String {
    let (status, reply) = call(front, "/RegisterNode", &json).await;
    assert_eq!(status, 201, "{reply}");
    reply["node_id"].as_str().unwrap().to_owned()
}

async fn beat(front: &Running, id: &str) -> Value {
    let (status, reply) = call(front, "/Heartbeat", &json!({ "node_id": id })).await;
    assert_eq!(status, 200, "{reply}");
    reply
}

/// Has two nodes form a pair; their ids and its key.
async fn pair(front: &Running, prefill: SocketAddr, decode: SocketAddr) -> (String, String, String) {
    let coordinator = |of: SocketAddr| format!("127.0.0.2:{}", of.port());
    let p = register(front, registration("prefill", prefill, &coordinator(prefill))).await;
    let d = register(front, registration("decode", decode, &coordinator(decode))).await;
    beat(front, &p).await;
    beat(front, &d).await;
    let key = format!("{prefill}__{decode}");
    let named = json!({"node_id": p, "comm_key": key, "comm_id": "X"});
    assert_eq!(call(front, "/RegisterCommId", &named).await.0, 200);
    (p, d, key)
}

/// The detail of an error.
fn detail_of(response: &str) -> String {
    body(response)["detail"].as_str().expect(response).to_owned()
}
