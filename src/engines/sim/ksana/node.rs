//! A node beside its engine: it registers once, sends heartbeats, and sets up a group for KV with each node of
//! the other role that the router tells it of.
//!
//! As in the engine, every call is a connection of its own; a registration is never tried again, and any JSON
//! object counts as an answer to it; an active group is not torn down. **Invariant:** a group of a prefill
//! node belongs to the one life of the decode node that joined it first: NCCL's set-up is done once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::Method;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::pd::call::call;
use crate::engines::sim::pd::{Role, side};

/// How long a call may take, as in the engine's newest version.
const CALL: Duration = Duration::from_secs(60);
/// Length of an `ncclUniqueId`.
const ID_BYTES: usize = 128;

/// Members that a heartbeat's answer may have, by the types that the engine wants.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    comm_group_to_address: HashMap<String, Vec<(i64, i64, String)>>,
    #[serde(default)]
    comm_group_to_id: HashMap<String, Value>,
}

#[derive(Clone, Debug)]
struct Group {
    comm_id: String,
    /// Where the prefill group's first node is reached.
    prefill: Option<String>,
    /// Whether KV can go through it.
    active: bool,
    /// The life of the decode node that joined it.
    joined_by: Option<String>,
}

/// See the module.
pub struct Node {
    role: Role,
    args: EngineSimArgs,
    router: String,
    inference_addr: String,
    coordinator_addr: SocketAddr,
    /// Tells its lives apart.
    life: String,
    node_id: Mutex<String>,
    groups: Mutex<HashMap<String, Group>>,
}

impl Node {
    /// A node that listens for requests at `listens` and for other nodes at `coordinator`.
    pub fn new(
        args: &EngineSimArgs,
        listens: SocketAddr,
        coordinator: SocketAddr,
    ) -> anyhow::Result<Arc<Self>> {
        let router = args.pd.ksana.router();
        let router = router.ok_or_else(|| {
            anyhow::anyhow!("a KsanaLLM node registers with a router: name it with --router-addr")
        })?;
        Ok(Arc::new(Self {
            role: args.pd.role.unwrap_or(Role::Prefill),
            args: args.clone(),
            router: router.to_owned(),
            inference_addr: args.pd.ksana.inference_addr.clone().unwrap_or_else(|| listens.to_string()),
            coordinator_addr: coordinator,
            life: format!("{:032x}", rand::random::<u128>()),
            node_id: Mutex::default(),
            groups: Mutex::default(),
        }))
    }

    /// Where a group's decode engine finds the KV of prompts; nothing unless the group is active.
    pub(in crate::engines::sim) fn prefill_of(&self, key: &str) -> Option<String> {
        let groups = self.groups.lock();
        groups.get(key).filter(|group| group.active)?.prefill.clone()
    }

    /// How many groups KV can go through.
    pub fn active_groups(&self) -> usize {
        self.groups.lock().values().filter(|group| group.active).count()
    }

    /// By what the router knows it; empty if it does not.
    pub fn node_id(&self) -> String {
        self.node_id.lock().clone()
    }

    /// A decode node wants to set a group up: whether this one does so with it.
    pub(in crate::engines::sim) fn join(&self, key: &str, comm_id: &str, life: &str) -> bool {
        let mut groups = self.groups.lock();
        let Some(group) = groups.get_mut(key).filter(|group| group.comm_id == comm_id) else { return false };
        let joins = group.joined_by.as_deref().is_none_or(|joined| joined == life);
        if joins {
            (group.joined_by, group.active) = (Some(life.to_owned()), true);
        }
        joins
    }

    async fn post(&self, path: &str, body: &Value) -> Option<Value> {
        let answer = call(&self.router, Method::POST, path, Bytes::from(body.to_string()), CALL).await;
        match answer {
            Err(error) => {
                tracing::warn!(%error, path, "the router did not answer");
                None
            }
            Ok((status, body)) => match serde_json::from_slice::<Value>(&body) {
                Ok(value) if value.is_object() => Some(value),
                _ => {
                    tracing::warn!(%status, path, "the router's answer is no JSON object");
                    None
                }
            },
        }
    }

    /// Registers, and sends heartbeats for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        self.register().await;
        loop {
            self.beat().await;
            tokio::time::sleep(self.args.pd.ksana.heartbeat_interval()).await;
        }
    }

    /// Once; whatever comes of it.
    async fn register(&self) {
        let ksana = &self.args.pd.ksana;
        let ip = self.coordinator_addr.ip().to_string();
        let now = crate::engines::sim::engine::unix_time();
        let devices: Vec<Value> = (0..ksana.devices)
            .map(|device| json!({"device_id": device, "device_ip": ip, "device_type": "SIM"}))
            .collect();
        let body = json!({
            "cluster_name": ksana.cluster_name,
            "coordinator_addr": self.coordinator_addr.to_string(),
            "devices": devices,
            "group_role": match self.role { Role::Prefill => "prefill", Role::Decode => "decode" },
            "inference_addr": self.inference_addr,
            "job_id": format!("{}_{:06}", now.as_micros(), rand::random::<u32>() % 1_000_000),
            "node_rank": ksana.node_rank,
            "start_time": jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string(),
            "world_size": ksana.world(),
        });
        let Some(answer) = self.post("/RegisterNode", &body).await else {
            tracing::error!(router = self.router, "not registered, and the engine does not try again");
            return;
        };
        let id = answer["node_id"].as_str().unwrap_or_default();
        if id.is_empty() {
            tracing::error!(%answer, "registered under no id, and the engine does not notice");
        }
        id.clone_into(&mut self.node_id.lock());
    }

    async fn beat(&self) {
        let id = self.node_id();
        let Some(answer) = self.post("/Heartbeat", &json!({ "node_id": id })).await else { return };
        let answer = match serde_json::from_value::<Answer>(answer) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(%error, "a heartbeat's answer that the engine cannot read");
                return;
            }
        };
        for (key, comm_id) in answer.comm_group_to_id {
            let Some(comm_id) = comm_id.as_str() else { continue };
            let addresses = answer.comm_group_to_address.get(&key).map_or(&[][..], Vec::as_slice);
            self.set_up(&id, &key, comm_id, addresses).await;
        }
    }

    /// What the engine does about one group in a heartbeat's answer.
    async fn set_up(&self, id: &str, key: &str, told: &str, addresses: &[(i64, i64, String)]) {
        let is_first = self.args.pd.ksana.node_rank == 0;
        let mut comm_id = told.to_owned();
        if comm_id.is_empty() {
            if self.role != Role::Prefill || !is_first {
                return;
            }
            let bytes: Vec<u8> = (0..ID_BYTES).map(|_| rand::random()).collect();
            comm_id = STANDARD.encode(bytes);
            let body = json!({"comm_id": comm_id, "comm_key": key, "node_id": id});
            let Some(answer) = self.post("/RegisterCommId", &body).await else { return };
            let is_stored = answer["comm_id"].as_str().is_none_or(|stored| stored == comm_id);
            if answer.get("detail").is_some() || !is_stored {
                tracing::warn!(%answer, key, "a communicator's id was not taken");
                return;
            }
        }
        let is_known = self.groups.lock().get(key).is_some_and(|group| match self.role {
            Role::Prefill => true,
            Role::Decode => group.active && group.comm_id == comm_id,
        });
        if is_known {
            return;
        }
        let group = Group { comm_id: comm_id.clone(), prefill: None, active: false, joined_by: None };
        if self.role == Role::Prefill {
            self.groups.lock().insert(key.to_owned(), group);
            return;
        }
        // The other nodes of a group are joined with its first one. Both groups have to be of one size, and all
        // of their devices there.
        if !is_first || addresses.len() != 2 * self.args.pd.ksana.world() as usize {
            return;
        }
        // Prefill first, by rank and device.
        let Some((0, 0, prefill)) = addresses.first() else { return };
        let joined = side::join_group(prefill, key, &comm_id, &self.life).await;
        match joined {
            Ok(true) => {
                let group = Group { prefill: Some(prefill.clone()), active: true, ..group };
                self.groups.lock().insert(key.to_owned(), group);
            }
            Ok(false) => tracing::warn!(key, "the prefill node has this group set up with somebody else"),
            Err(error) => tracing::warn!(%error, key, prefill, "the prefill node of a group does not answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::sim::pd::Protocol;

    fn node(role: Role) -> Arc<Node> {
        let mut args = EngineSimArgs::defaults();
        (args.pd.protocol, args.pd.role) = (Some(Protocol::Ksana), Some(role));
        args.pd.ksana.router_addr = Some("http://127.0.0.1:1/".into());
        let address = "127.0.0.1:9".parse().unwrap();
        Node::new(&args, address, address).unwrap()
    }

    #[tokio::test]
    async fn a_group_is_set_up_once_with_the_decode_node_that_comes_first() {
        let prefill = node(Role::Prefill);
        assert_eq!(prefill.router, "127.0.0.1:1");
        prefill.set_up("n", "p__d", "id", &[]).await;
        assert!(!prefill.join("p__d", "another", "life 1") && !prefill.join("other", "id", "life 1"));
        assert!(prefill.join("p__d", "id", "life 1") && prefill.join("p__d", "id", "life 1"));
        assert!(!prefill.join("p__d", "id", "life 2"), "it has started again");
        assert_eq!(prefill.active_groups(), 1);
        // What is active stays as it is.
        prefill.set_up("n", "p__d", "new id", &[]).await;
        assert!(prefill.join("p__d", "id", "life 1"));
    }

    #[tokio::test]
    async fn groups_without_id_or_with_other_sizes_are_left_alone_by_decode_nodes() {
        let decode = node(Role::Decode);
        let here = |role: i64| (role, 0, "127.0.0.1:1".to_owned());
        decode.set_up("n", "p__d", "", &[here(0), here(0)]).await;
        decode.set_up("n", "p__d", "id", &[here(0), here(0), here(0)]).await;
        decode.set_up("n", "p__d", "id", &[here(1), here(0)]).await;
        assert_eq!(decode.active_groups(), 0);
        assert_eq!(decode.prefill_of("p__d"), None);
    }
}
