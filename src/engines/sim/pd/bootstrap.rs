//! SGLang's bootstrap server, which a prefill engine has beside its own (and Mooncake's, of vLLM), and the decode
//! engine's questions to it: which ranks there are, and where each of them takes transfers.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::call::call;
use super::{Desk, Protocol};
use crate::engines::sim::options::EngineSimArgs;

/// Connections at once; the next one is closed.
const CONNECTIONS: usize = 256;
/// Longest body that is read.
const MAX_BODY: usize = 1 << 20;
/// How long one question may take, as in SGLang.
const ASK: Duration = Duration::from_secs(5);
/// How often a decode engine asks about a prefill engine that does not answer, and how long it waits between.
const ATTEMPTS: u32 = 15;
const AGAIN: Duration = Duration::from_secs(1);

/// What a prefill engine says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Info {
    attn_tp_size: u32,
    attn_cp_size: u32,
    dp_size: u32,
    pp_size: u32,
    page_size: Option<u32>,
    kv_cache_dtype: Option<String>,
    follow_bootstrap_room: bool,
    enable_dsa_cache_layer_split: bool,
    prefill_http_port: Option<u16>,
    target_tp_rank: Option<u32>,
    target_tp_ranks: Option<Vec<u32>>,
    target_cp_ranks: Option<Vec<u32>>,
    target_pp_ranks: Option<Vec<u32>>,
    required_dst_info_num: Option<u32>,
    required_prefill_response_num: Option<u32>,
}

/// Where a rank takes transfers.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Rank {
    rank_ip: String,
    rank_port: u16,
}

/// The server; dropping it closes it.
pub struct Bootstrap {
    port: u16,
    _task: AbortOnDropHandle<()>,
}

impl Bootstrap {
    /// Listens beside an engine whose ranks take transfers at these ports.
    pub async fn start(
        args: &EngineSimArgs,
        listens: SocketAddr,
        ranks: Vec<Arc<Desk>>,
    ) -> anyhow::Result<Self> {
        let port = args.pd.disaggregation_bootstrap_port;
        let listener = TcpListener::bind((listens.ip(), port)).await.with_context(|| {
            format!(
                "engine-sim cannot have its bootstrap server at port {port}; choose another \
                 --disaggregation-bootstrap-port"
            )
        })?;
        let port = listener.local_addr()?.port();
        let info = Info {
            attn_tp_size: 1,
            attn_cp_size: 1,
            dp_size: args.dp,
            pp_size: 1,
            page_size: Some(args.block_size),
            kv_cache_dtype: Some("auto".into()),
            follow_bootstrap_room: true,
            enable_dsa_cache_layer_split: false,
            prefill_http_port: Some(listens.port()),
            target_tp_rank: None,
            target_tp_ranks: None,
            target_cp_ranks: None,
            target_pp_ranks: None,
            required_dst_info_num: None,
            required_prefill_response_num: None,
        };
        let mooncake = args.pd.protocol == Some(Protocol::VllmMooncake);
        let served = Arc::new(Served { info, ip: listens.ip(), ranks, mooncake });
        Ok(Self { port, _task: AbortOnDropHandle::new(tokio::spawn(serve(listener, served))) })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }
}

struct Served {
    info: Info,
    ip: IpAddr,
    ranks: Vec<Arc<Desk>>,
    /// Whether it is Mooncake's, of vLLM, and not SGLang's.
    mooncake: bool,
}

async fn serve(listener: TcpListener, served: Arc<Served>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let served = Arc::clone(&served);
        // They end with the server, whose set they are in.
        connections.spawn(async move {
            connection(stream, served).await;
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, served: Arc<Served>) {
    let service = service_fn(move |request| {
        let served = Arc::clone(&served);
        async move { Ok::<_, Infallible>(served.answer(request).await) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection to the bootstrap server ended");
    }
}

fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    reply
}

/// Plain structs as JSON; writing them to memory cannot fail.
fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    reply(StatusCode::OK, JSON, serde_json::to_vec(value).unwrap_or_default())
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";

impl Served {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let query = request.uri().query().unwrap_or("").to_owned();
        match (request.uri().path(), request.method()) {
            ("/query", &Method::GET) if self.mooncake => {
                let entries =
                    self.ranks.iter().enumerate().map(|(rank, desk)| (rank.to_string(), desk.entry()));
                json(&entries.collect::<BTreeMap<_, _>>())
            }
            _ if self.mooncake => reply(StatusCode::NOT_FOUND, JSON, r#"{"detail":"Not Found"}"#),
            ("/health", &Method::GET) => reply(StatusCode::OK, TEXT, "OK"),
            ("/route", &Method::GET) => self.route(&query),
            // Ranks register themselves there; those of this engine are known.
            ("/route", &Method::PUT) | ("/register_dp_rank", &Method::POST) => {
                reply(StatusCode::OK, TEXT, "OK")
            }
            ("/route", _) => reply(StatusCode::METHOD_NOT_ALLOWED, "application/json", "Method not allowed"),
            ("/query_dp_ranks", &Method::POST) => self.dp_ranks(request.into_body()).await,
            ("/health" | "/register_dp_rank" | "/query_dp_ranks", _) => {
                reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "405: Method Not Allowed")
            }
            _ => reply(StatusCode::NOT_FOUND, TEXT, "404: Not Found"),
        }
    }

    fn route(&self, query: &str) -> Response<Full<Bytes>> {
        let asked: HashMap<&str, i64> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
            .collect();
        let names = ["prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"];
        let numbers: Option<Vec<i64>> = names.iter().map(|name| asked.get(name).copied()).collect();
        let Some(numbers) = numbers else {
            return reply(StatusCode::BAD_REQUEST, TEXT, "Missing inputs for bootstrap server.");
        };
        let (dp, others) = (numbers[0], &numbers[1..]);
        if numbers.iter().all(|number| *number == -1) {
            return json(&self.info);
        }
        let port =
            usize::try_from(dp).ok().and_then(|dp| self.ranks.get(dp)).map(|desk| desk.side_channel_port());
        match port.filter(|_| others.iter().all(|number| *number == 0)) {
            Some(rank_port) => json(&Rank { rank_ip: self.ip.to_string(), rank_port }),
            None => {
                let text = format!(
                    "Bootstrap info not found for dp_rank={dp} cp_rank={} tp_rank={} pp_rank={}",
                    others[0], others[1], others[2]
                );
                reply(StatusCode::NOT_FOUND, TEXT, text)
            }
        }
    }

    /// The rank of each room, which is the one that the room's number says.
    async fn dp_ranks(&self, body: Incoming) -> Response<Full<Bytes>> {
        let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
            return reply(StatusCode::PAYLOAD_TOO_LARGE, TEXT, "413: Request Entity Too Large");
        };
        let asked: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
        let rooms = asked["bootstrap_rooms"].as_array().cloned().unwrap_or_default();
        let ranks: Map<String, Value> = rooms
            .iter()
            .filter_map(Value::as_u64)
            .map(|room| (room.to_string(), (room % u64::from(self.info.dp_size)).into()))
            .collect();
        reply(StatusCode::OK, JSON, Value::from(ranks).to_string())
    }
}

/// Where the ranks of prefill engines take transfers, as far as that is known.
#[derive(Default)]
pub(super) struct Directory {
    known: Mutex<HashMap<String, Known>>,
}

/// What a bootstrap server has said.
struct Known {
    ranks: u32,
    places: HashMap<u32, (String, u16)>,
}

/// Servers that are remembered.
const KNOWN: usize = 1024;

impl Directory {
    /// Where the rank that a room belongs to takes transfers; the error is SGLang's.
    pub(super) async fn find(&self, bootstrap: &str, room: u64) -> Result<(String, u16), String> {
        let known = self.known.lock().get(bootstrap).map(|known| known.ranks);
        let ranks = match known {
            Some(ranks) => ranks,
            None => self.count(bootstrap).await?,
        };
        let rank = u32::try_from(room % u64::from(ranks.max(1))).unwrap_or(0);
        if let Some(place) = self.known.lock().get(bootstrap).and_then(|known| known.places.get(&rank)) {
            return Ok(place.clone());
        }
        let path =
            format!("/route?prefill_dp_rank={rank}&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0");
        let asked = call(bootstrap, Method::GET, &path, Bytes::new(), ASK).await;
        let found = asked.ok().filter(|(status, _)| *status == StatusCode::OK);
        let found = found.and_then(|(_, body)| serde_json::from_slice::<Rank>(&body).ok());
        let Some(Rank { rank_ip, rank_port }) = found else {
            self.forget(bootstrap);
            return Err(format!(
                "Could not fetch bootstrap info for: prefill_dp_rank: {rank} prefill_cp_rank: 0 target_tp_rank: 0 \
                 and target_pp_rank 0"
            ));
        };
        let place = (rank_ip, rank_port);
        if let Some(known) = self.known.lock().get_mut(bootstrap) {
            known.places.insert(rank, place.clone());
        }
        Ok(place)
    }

    async fn count(&self, bootstrap: &str) -> Result<u32, String> {
        let path = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
        for attempt in 1..=ATTEMPTS {
            if let Ok((StatusCode::OK, body)) = call(bootstrap, Method::GET, path, Bytes::new(), ASK).await
                && let Ok(info) = serde_json::from_slice::<Info>(&body)
            {
                let mut known = self.known.lock();
                if known.len() >= KNOWN {
                    known.clear();
                }
                let first = Known { ranks: info.dp_size, places: HashMap::new() };
                known.entry(bootstrap.to_owned()).or_insert(first);
                return Ok(info.dp_size);
            }
            if attempt < ATTEMPTS {
                tokio::time::sleep(AGAIN).await;
            }
        }
        Err(format!("Could not fetch prefill parallel info from {bootstrap} after {ATTEMPTS} attempts"))
    }

    /// An engine may be somewhere else when it comes back.
    pub(super) fn forget(&self, bootstrap: &str) {
        self.known.lock().remove(bootstrap);
    }
}
