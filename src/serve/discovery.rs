//! Engines that say of themselves that they are there: those with P2pNccl or MoRI-IO ping a router over
//! ZeroMQ every few seconds, and become workers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::time::timeout;

use super::engines_endpoint;
use crate::admin_types::RegisterRequest;
use crate::config::Config;
use crate::disagg::ping::{MOST_PING, Ping};
use crate::http::{Front, Shard, register_found};
use crate::zmtp::{Limits, Link, Router, ZmtpError};

/// How long an engine may say nothing before its connection is closed; it makes another one.
const SILENCE: Duration = Duration::from_secs(60);

/// Opens `pd.listen`; only those may connect that could be workers. Dropping what is returned closes it.
pub(super) async fn listen(config: &Config, front: &Arc<Front>) -> anyhow::Result<Option<Router>> {
    let Some(text) = &config.pd.listen else { return Ok(None) };
    let endpoint = engines_endpoint("pd.listen", text, config, "have prompts sent to itself")?;
    let allow = Arc::clone(&front.config.allow);
    let shard = Shard::new(Arc::clone(front));
    let limits = Limits { bytes: MOST_PING, parts: 4 };
    let router = Router::bind_for(
        &endpoint,
        limits,
        move |peer| allow.check(peer).is_ok(),
        move |link| hear(Arc::clone(&shard), link),
    );
    Ok(Some(router.await.with_context(|| format!("cannot listen on {text} (pd.listen)"))?))
}

/// Hears one engine out.
async fn hear(shard: Arc<Shard>, mut link: Link) -> Result<(), ZmtpError> {
    let mut said = String::new();
    loop {
        let parts = timeout(SILENCE, link.recv()).await.map_err(|_| ZmtpError::Closed)??;
        let ping = match Ping::parse(parts.last().map(Bytes::as_ref).unwrap_or_default()) {
            Ok(Some(ping)) => ping,
            Ok(None) => continue,
            Err(why) => {
                tracing::debug!(%why, "a message on pd.listen is not understood");
                continue;
            }
        };
        let request = RegisterRequest {
            role: Some(ping.role),
            connector: Some(ping.connector),
            side_channel: Some(ping.zmq_address),
            dp_ranks: ping.dp_size.filter(|size| *size > 0),
            heartbeat: Some(false),
            ..RegisterRequest::new(format!("http://{}", ping.http_address))
        };
        match register_found(&shard, request).await {
            Ok(true) => {
                tracing::info!(worker = ping.http_address, role = ping.role.name(), "an engine has come");
                said.clear();
            }
            Ok(false) => {}
            // It pings before it serves, and will again.
            Err(error) if said != error.message => {
                tracing::warn!(worker = ping.http_address, why = %error.message, "an engine is not registered yet");
                said = error.message.into_owned();
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::WorkerId;
    use crate::serve::testing::{Alone, Scripted, eventually};
    use crate::state::worker::{Connector, WorkerRole};
    use crate::zmtp::{AnyAddress, Endpoint, SocketType};

    /// A map of texts as MessagePack.
    fn packed(members: &[(&str, &str)]) -> Bytes {
        let mut out = vec![0x80 | members.len() as u8];
        for text in members.iter().flat_map(|(name, value)| [name, value]) {
            out.extend([0xd9, text.len() as u8]);
            out.extend(text.as_bytes());
        }
        out.into()
    }

    async fn ping(to: &Endpoint, role: &str, engine: &Scripted, zmq: &str) -> Link {
        let limits = Limits { bytes: MOST_PING, parts: 4 };
        let mut link = Link::connect(to, SocketType::Dealer, limits, &AnyAddress).await.unwrap();
        let http = engine.address.to_string();
        let members = [("type", role), ("http_address", &http), ("zmq_address", zmq)];
        link.send(&[Bytes::from_static(b"oops")]).await.unwrap();
        link.send(&[packed(&members)]).await.unwrap();
        link
    }

    #[tokio::test]
    async fn engines_that_ping_become_workers_and_change_their_role_with_a_ping() {
        let alone = Alone::start().await;
        let mut config = Config::default();
        config.pd.listen = Some("tcp://127.0.0.1:0".to_owned());
        let router = listen(&config, &alone.front).await.unwrap().expect("a listener");
        let engine = Scripted::start().await;
        engine.says("/health", "");
        engine.says("/v1/models", r#"{"data":[{"id":"m","max_model_len":100}]}"#);
        let id = WorkerId(engine.address.to_string().into());
        let known = || alone.plane.registry().worker(&id).map(|worker| worker.record.spec.clone());
        let _first = ping(router.endpoint(), "P", &engine, "10.0.0.1:21001").await;
        eventually("it is registered", || known().is_some()).await;
        let spec = known().unwrap();
        assert_eq!((spec.role, spec.connector()), (WorkerRole::Prefill, Connector::P2pNccl));
        assert_eq!(spec.transfer.side_channel.as_deref(), Some("10.0.0.1:21001"));
        assert!(spec.serves("m") && spec.url == format!("http://{}", engine.address));
        // The same again says nothing new.
        let asked = engine.asked("/health");
        let _second = ping(router.endpoint(), "P", &engine, "10.0.0.1:21001").await;
        let zmq = "host:10.0.0.1,handshake:1,notify:2";
        let _third = ping(router.endpoint(), "D", &engine, zmq).await;
        eventually("it decodes now", || known().is_some_and(|spec| spec.role == WorkerRole::Decode)).await;
        assert_eq!(known().map(|spec| spec.connector()), Some(Connector::Moriio));
        assert_eq!(engine.asked("/health"), asked + 1);
    }

    #[tokio::test]
    async fn a_listener_that_others_can_reach_has_to_be_wanted() {
        let alone = Alone::start().await;
        let mut config = Config::default();
        assert!(listen(&config, &alone.front).await.unwrap().is_none());
        config.pd.listen = Some("tcp://0.0.0.0:0".to_owned());
        let Err(error) = listen(&config, &alone.front).await else { panic!("it listens") };
        assert!(
            error.to_string().contains("pd.listen") && error.to_string().contains("http.insecure"),
            "{error}"
        );
        config.http.insecure = true;
        assert!(listen(&config, &alone.front).await.unwrap().is_some());
    }
}
