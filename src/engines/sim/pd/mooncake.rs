//! vLLM's Mooncake connector: both engines are told one id for the transfer, and the decode engine is told where
//! the prefill engine's bootstrap server says where its workers are.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::call::call;
use super::rooms::Told;
use super::side::{self, Question};

/// How long the bootstrap server may take.
const ASK: Duration = Duration::from_secs(5);

/// What a decode engine was told of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The bootstrap server, as `host:port`.
    pub bootstrap: String,
    /// Name of the prefill engine.
    pub engine_id: String,
    /// The transfer.
    pub id: String,
}

/// What `kv_transfer_params` ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// To give the blocks to whoever comes with this id.
    Give(String),
    /// To take them.
    Take(Transfer),
    /// To take them, but not from where.
    Stranded,
}

impl Asked {
    /// Reads the member; what is of the wrong type counts as absent.
    pub fn read(params: &Value) -> Self {
        let text = |name: &str| params[name].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let is_set = |name: &str| params[name].as_bool().unwrap_or(false);
        if is_set("do_remote_prefill") {
            let told = (text("remote_bootstrap_addr"), text("remote_engine_id"), text("transfer_id"));
            let (Some(bootstrap), Some(engine_id), Some(id)) = told else { return Self::Stranded };
            let bootstrap = bootstrap.trim_start_matches("http://").trim_end_matches('/').to_owned();
            return Self::Take(Transfer { bootstrap, engine_id, id });
        }
        match (is_set("do_remote_decode"), text("transfer_id")) {
            (true, Some(id)) => Self::Give(id),
            // vLLM says in its log that the id is missing, and keeps nothing.
            _ => Self::Nothing,
        }
    }
}

/// A rank's entry in what the bootstrap server says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) engine_id: String,
    /// By rank of tensor and of pipeline parallelism.
    pub(super) worker_addr: BTreeMap<String, BTreeMap<String, String>>,
}

impl Entry {
    /// An engine of one worker.
    pub(super) fn of(engine_id: String, worker: String) -> Self {
        let worker = BTreeMap::from([("0".to_owned(), worker)]);
        Self { engine_id, worker_addr: BTreeMap::from([("0".to_owned(), worker)]) }
    }
}

impl Transfer {
    /// Waits for the KV of a prompt, and says then that it is here; the error is for the log.
    pub(super) async fn take(&self, patience: Duration) -> Result<(Vec<u64>, usize), String> {
        let asked = call(&self.bootstrap, Method::GET, "/query", Bytes::new(), ASK).await;
        let (status, body) = asked.map_err(|error| format!("the bootstrap server: {error}"))?;
        if status != StatusCode::OK {
            return Err(format!("the bootstrap server answers {status}"));
        }
        let entries: BTreeMap<String, Entry> =
            serde_json::from_slice(&body).map_err(|error| format!("the bootstrap server: {error}"))?;
        let entry = entries.values().find(|entry| entry.engine_id == self.engine_id);
        let worker = entry.and_then(|entry| entry.worker_addr.get("0")?.get("0"));
        let worker = worker.ok_or_else(|| format!("there is no engine {} there", self.engine_id))?;
        let worker = worker.trim_start_matches("tcp://").to_owned();
        let taking = async {
            let mut link = side::connect_to(&worker).await?;
            let told: Told = side::ask(&mut link, &Question::Join(self.id.clone())).await?;
            if matches!(told, Told::Kv { .. }) {
                side::say(&mut link, &Question::Done(self.id.clone())).await?;
            }
            Ok::<_, crate::zmtp::ZmtpError>(told)
        };
        match tokio::time::timeout(patience, taking).await {
            Ok(Ok(Told::Kv { contents, cached })) => Ok((contents, cached)),
            Ok(Ok(Told::Gone)) => Err("the prefill engine has given it up".into()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("nothing came within {patience:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_are_read_as_they_are_written_for_both_legs() {
        let give = json!({"do_remote_decode": true, "do_remote_prefill": false, "transfer_id": "t"});
        assert_eq!(Asked::read(&give), Asked::Give("t".into()));
        assert_eq!(Asked::read(&json!({"do_remote_decode": true})), Asked::Nothing);
        let take = json!({"do_remote_decode": false, "do_remote_prefill": true, "transfer_id": "t",
            "remote_engine_id": "e", "remote_bootstrap_addr": "http://127.0.0.1:8998"});
        let transfer = Transfer { bootstrap: "127.0.0.1:8998".into(), engine_id: "e".into(), id: "t".into() };
        assert_eq!(Asked::read(&take), Asked::Take(transfer));
        assert_eq!(Asked::read(&json!({"do_remote_prefill": true, "transfer_id": "t"})), Asked::Stranded);
    }
}
