//! vLLM's NIXL connector, by which the decode engine reads what the prefill engine keeps: the
//! `kv_transfer_params` of requests, and the side channel between the engines.
//!
//! The side channel is a ROUTER socket as vLLM's, with vLLM's handshake. What goes over UCX there goes over
//! the same socket here: reads of blocks, the word that a request's blocks were read, and heartbeats.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rmp::encode::{ByteBuf, write_array_len, write_bin, write_map_len, write_str, write_uint};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use xxhash_rust::xxh3::xxh3_64;

use super::Mode;
use super::rooms::Told;
use super::side::{self, Question, Shared};
use crate::engines::sim::options::EngineSimArgs;
use crate::kv::msgpack::{self, Reader};
use crate::zmtp::{Link, ZmtpError};

/// How long the other engine gets to answer the handshake, as in vLLM.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Pause before connecting again within that time.
const AGAIN: Duration = Duration::from_millis(100);
/// How long an engine that is known gets to have its blocks read.
const READ: Duration = Duration::from_secs(30);
/// Engines that are remembered to have been shaken hands with.
const KNOWN: usize = 1024;

/// What a decode engine was told of KV that another keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Name of the engine.
    pub engine_id: String,
    /// Under which it keeps the blocks.
    pub request_id: String,
    /// Its side channel.
    pub host: String,
    /// Its side channel.
    pub port: u16,
    /// The blocks, in the order of the ids.
    pub blocks: Vec<u32>,
    /// Ids that it had in its cache.
    pub cached_there: Option<usize>,
}

/// What a decode engine was told of an engine that will write its prompt's KV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pusher {
    /// Name of the engine.
    pub engine_id: String,
    /// Its side channel.
    pub host: String,
    /// Its side channel.
    pub port: u16,
    /// Under which it keeps the blocks, for heartbeats.
    pub request_id: Option<String>,
    /// What both engines call the request.
    pub key: String,
}

/// What both engines of a push call a request: the id without what vLLM adds to it.
pub fn shared_id(id: &str) -> &str {
    id.rsplit_once('-').map_or(id, |(shared, _)| shared)
}

/// What `kv_transfer_params` ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// To keep the blocks.
    Lend,
    /// To fetch them.
    Fetch(Remote),
    /// To have them written here.
    Await(Pusher),
    /// To fetch them, but not from where.
    Stranded,
    /// To fetch nothing.
    Fatal,
}

impl Asked {
    /// Reads the member; what is of the wrong type counts as absent, as it would in Python.
    pub fn read(params: &Value, mode: Mode) -> Self {
        let is_set = |name: &str| match &params[name] {
            Value::Null | Value::Bool(false) => false,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            Value::Bool(true) => true,
        };
        if !is_set("do_remote_prefill") {
            return if is_set("do_remote_decode") { Self::Lend } else { Self::Nothing };
        }
        if mode == Mode::Push {
            let text = |name: &str| params[name].as_str().map(str::to_owned);
            let port = params["remote_port"].as_u64().and_then(|port| u16::try_from(port).ok());
            // What is missing is an exception in the engine's process.
            let told = (text("remote_engine_id"), text("remote_host"), port, params.get("tp_size"));
            let (Some(engine_id), Some(host), Some(port), Some(_)) = told else { return Self::Fatal };
            let request_id = text("remote_request_id");
            return Self::Await(Pusher { engine_id, host, port, request_id, key: String::new() });
        }
        if !is_set("remote_block_ids") {
            return Self::Fatal;
        }
        let text = |name: &str| params[name].as_str().map(str::to_owned);
        let port = params["remote_port"].as_u64().and_then(|port| u16::try_from(port).ok());
        let (Some(engine_id), Some(request_id), Some(host), Some(port)) =
            (text("remote_engine_id"), text("remote_request_id"), text("remote_host"), port)
        else {
            return Self::Stranded;
        };
        // Of the first group of layers; until 0.9 there was one list.
        let list = match &params["remote_block_ids"][0] {
            Value::Array(group) => group.as_slice(),
            _ => params["remote_block_ids"].as_array().map_or(&[][..], Vec::as_slice),
        };
        let block = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(blocks) = list.iter().map(block).collect() else { return Self::Fatal };
        let cached_there = params["remote_prefill_cached_tokens"].as_u64();
        let cached_there = cached_there.and_then(|cached| usize::try_from(cached).ok());
        Self::Fetch(Remote { engine_id, request_id, host, port, blocks, cached_there })
    }
}

/// What engines have to have in common.
pub(super) fn compatibility(args: &EngineSimArgs) -> String {
    let text =
        format!("{}/{}/{}", crate::engines::sim::http::shape::VERSION, args.models[0], args.block_size);
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

/// Whether this is vLLM's handshake.
pub(super) fn asks_for_metadata(question: &[u8]) -> bool {
    let mut reader = Reader::new(question);
    matches!(reader.value(), Ok(msgpack::Value::List(3)))
        && matches!(reader.value(), Ok(msgpack::Value::Bytes(b"get_meta_msg")))
}

/// The answer to it.
pub(super) fn metadata(shared: &Shared) -> Vec<u8> {
    let mut out = ByteBuf::new();
    // Writing into memory does not fail.
    let _ = write_map_len(&mut out, 2);
    let _ = write_str(&mut out, "compatibility_hash");
    let _ = write_str(&mut out, &shared.compatibility);
    let _ = write_str(&mut out, "agent_metadata_bytes");
    let _ = write_bin(&mut out, shared.identity.get().as_bytes());
    out.into_vec()
}

/// The hash and the engine's name out of the answer to a handshake.
fn read_metadata(answer: &[u8]) -> Option<(String, String)> {
    let mut reader = Reader::new(answer);
    let msgpack::Value::Map(2) = reader.value().ok()? else { return None };
    let mut found = (None, None);
    for _ in 0..2 {
        let msgpack::Value::Text(key) = reader.value().ok()? else { return None };
        match (key, reader.value().ok()?) {
            (b"compatibility_hash", msgpack::Value::Text(hash)) => {
                found.0 = String::from_utf8(hash.to_vec()).ok()
            }
            (b"agent_metadata_bytes", msgpack::Value::Bytes(name)) => {
                found.1 = String::from_utf8(name.to_vec()).ok();
            }
            _ => return None,
        }
    }
    Some((found.0?, found.1?))
}

/// Why blocks could not be fetched; for the log only, as in vLLM.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("no answer to the handshake within {} s", HANDSHAKE.as_secs())]
    Silent,
    #[error("the other engine is not compatible")]
    Incompatible,
    #[error("the engine there is another one")]
    Stranger,
    #[error("its memory cannot be read")]
    Unreadable,
    #[error("the transfer took more than {} s", READ.as_secs())]
    Slow,
    #[error(transparent)]
    Link(#[from] ZmtpError),
}

/// The decode engine's side.
pub(super) struct Client {
    compatibility: String,
    known: Mutex<HashSet<String>>,
}

impl Client {
    pub(super) fn new(compatibility: String) -> Arc<Self> {
        Arc::new(Self { compatibility, known: Mutex::default() })
    }

    /// Reads the last `wanted` of the blocks, and says that they are not needed any more.
    pub(super) async fn fetch(&self, remote: &Remote, wanted: usize) -> Result<Vec<u64>, FetchError> {
        let is_known = self.known.lock().contains(&remote.engine_id);
        let reading = async {
            let mut link = match is_known {
                true => side::connect(&remote.host, remote.port).await?,
                false => self.shake_hands(&remote.engine_id, &remote.host, remote.port).await?,
            };
            let blocks = remote.blocks[remote.blocks.len().saturating_sub(wanted)..].to_vec();
            let question = Question::Read { engine: remote.engine_id.clone(), blocks };
            let contents: Option<Vec<u64>> = side::ask(&mut link, &question).await?;
            let contents = contents.ok_or(FetchError::Unreadable)?;
            side::say(&mut link, &Question::Done(remote.request_id.clone())).await?;
            Ok(contents)
        };
        let read = timeout(READ, reading).await.unwrap_or(Err(FetchError::Slow));
        if read.is_err() {
            // It may be back under another name, or never.
            self.known.lock().remove(&remote.engine_id);
        }
        read
    }

    async fn shake_hands(&self, engine_id: &str, host: &str, port: u16) -> Result<Link, FetchError> {
        let until = Instant::now() + HANDSHAKE;
        let shaking = async {
            loop {
                if let Ok(mut link) = side::connect(host, port).await {
                    let mut question = ByteBuf::new();
                    // Writing into memory does not fail.
                    let _ = write_array_len(&mut question, 3);
                    let _ = write_bin(&mut question, b"get_meta_msg");
                    let _ = write_uint(&mut question, 0);
                    let _ = write_uint(&mut question, 0);
                    link.send(&side::framed(question.into_vec())).await?;
                    let answer = link.recv().await?;
                    let told =
                        answer.get(1).and_then(|answer| read_metadata(answer)).ok_or_else(side::wrong)?;
                    return Ok((link, told));
                }
                sleep(AGAIN).await;
            }
        };
        let shaken = timeout_at(until, shaking).await;
        let (link, (compatibility, engine)) = match shaken {
            Ok(Ok(shaken)) => shaken,
            Ok(Err(error)) => {
                // vLLM's socket connects again behind its back, and waits.
                tokio::time::sleep_until(until).await;
                return Err(FetchError::Link(error));
            }
            Err(_) => return Err(FetchError::Silent),
        };
        if compatibility != self.compatibility {
            return Err(FetchError::Incompatible);
        }
        if engine != engine_id {
            return Err(FetchError::Stranger);
        }
        let mut known = self.known.lock();
        if known.len() >= KNOWN {
            known.clear();
        }
        known.insert(engine);
        drop(known);
        Ok(link)
    }

    /// Tells an engine where to write the KV of a prompt, and waits for it for as long as that may take; fails
    /// only where the engine is not there in the first place.
    pub(super) async fn be_given(&self, pusher: &Pusher) -> Result<(Vec<u64>, usize), FetchError> {
        let mut link = self.shake_hands(&pusher.engine_id, &pusher.host, pusher.port).await?;
        let told = side::ask(&mut link, &Question::Join(pusher.key.clone())).await;
        if let Ok(Told::Kv { contents, cached }) = told {
            side::say(&mut link, &Question::Done(pusher.key.clone())).await?;
            return Ok((contents, cached));
        }
        tracing::warn!(request = pusher.key, ?told, "the KV of a prompt will not be written");
        std::future::pending().await
    }

    /// Says that the blocks of these requests are still wanted.
    pub(super) async fn heartbeat(host: &str, port: u16, ids: Vec<String>) -> Result<(), ZmtpError> {
        let mut link = side::connect(host, port).await?;
        side::say(&mut link, &Question::Heartbeat(ids)).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Identity;
    use super::*;
    use crate::engines::sim::scheduler::Contents;

    #[test]
    fn parameters_are_read_as_they_were_recorded() {
        let told = json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2, 3]],
            "remote_engine_id": "e", "remote_request_id": "cmpl-pd-1-0-9c3a8dac", "remote_host": "127.0.0.1",
            "remote_port": 5600, "tp_size": 1, "remote_prefill_cached_tokens": 2,
        });
        let remote = Remote {
            engine_id: "e".into(),
            request_id: "cmpl-pd-1-0-9c3a8dac".into(),
            host: "127.0.0.1".into(),
            port: 5600,
            blocks: vec![1, 2, 3],
            cached_there: Some(2),
        };
        assert_eq!(Asked::read(&told, Mode::Pull), Asked::Fetch(remote.clone()));
        let mut flat = told.clone();
        flat["remote_block_ids"] = json!([1, 2, 3]);
        assert_eq!(Asked::read(&flat, Mode::Pull), Asked::Fetch(remote));
        let mut placeless = told.clone();
        placeless["remote_host"] = Value::Null;
        assert_eq!(Asked::read(&placeless, Mode::Pull), Asked::Stranded);
        let mut empty = told;
        empty["remote_block_ids"] = Value::Null;
        assert_eq!(Asked::read(&empty, Mode::Pull), Asked::Fatal);
        let lend = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_block_ids": null});
        assert_eq!(Asked::read(&lend, Mode::Pull), Asked::Lend);
        assert_eq!(Asked::read(&json!({"do_remote_decode": true}), Mode::Pull), Asked::Lend);
        assert_eq!(Asked::read(&json!({}), Mode::Pull), Asked::Nothing);
    }

    #[test]
    fn parameters_of_a_push_need_no_blocks() {
        let told = json!({"do_remote_prefill": true, "remote_engine_id": "e", "remote_host": "h",
            "remote_port": 7, "tp_size": 1, "remote_request_id": "cmpl-x-0-9c3a8dac"});
        let Asked::Await(pusher) = Asked::read(&told, Mode::Push) else { panic!("{told}") };
        assert_eq!((pusher.host.as_str(), pusher.port), ("h", 7));
        assert_eq!(shared_id(&pusher.request_id.unwrap()), "cmpl-x-0");
        assert_eq!(Asked::read(&json!({"do_remote_prefill": true}), Mode::Push), Asked::Fatal);
        assert_eq!(Asked::read(&json!({"do_remote_decode": true}), Mode::Push), Asked::Lend);
    }

    #[test]
    fn a_handshake_is_understood_by_its_other_side() {
        let shared = Shared {
            identity: Identity::new(),
            contents: Contents::new(1),
            compatibility: "0123456789abcdef".into(),
            rooms: Arc::default(),
            node: Arc::default(),
        };
        let told = read_metadata(&metadata(&shared)).unwrap();
        assert_eq!(told, ("0123456789abcdef".into(), shared.identity.get()));
        assert!(asks_for_metadata(b"\x93\xc4\x0cget_meta_msg\x00\x00"));
        assert!(!asks_for_metadata(b"{}") && read_metadata(b"\x80").is_none());
    }
}
