//! `everline worker`

use http::Method;

use super::client::{Listing, Server, block_on, segment};
use super::output::{Failure, Out};
use super::status::{state, workers_table};
use crate::admin_types::{
    DrainRequest, MessageReply, ModelEntry, RegisterRequest, WorkerStatus, WorkersReply,
};
use crate::state::worker::{Connector, EngineKind, WorkerRole, WorkerSource};

const WORKERS: &str = "/v1/admin/workers";

/// Add, remove, drain and list workers (engines)
///
/// Examples:
///   everline worker add http://10.0.0.7:8000
///   everline worker add http://10.0.0.7:8000 --id gpu-7 --model llama-3-8b --weight 50 --label zone=a
///   everline worker add http://10.0.0.8:8000 --role prefill      and another one with --role decode
///   everline worker drain gpu-7        no new requests; running ones finish
///   everline worker remove gpu-7
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Register a worker
    Add(Box<Add>),
    /// Take a worker out of the registry; requests that run there are not cut
    Remove(Named),
    /// Send a worker no new requests
    Drain(Named),
    /// Send a drained worker requests again
    Undrain(Named),
    /// List all workers
    List(Listing),
    /// Show everything about one worker
    Show {
        /// Its id
        id: String,
        #[command(flatten)]
        listing: Listing,
    },
}

#[derive(clap::Args, Debug)]
struct Named {
    /// The worker's id
    id: String,
    #[command(flatten)]
    server: Server,
}

#[derive(clap::Args, Debug)]
struct Add {
    /// Base URL of the engine, http://HOST:PORT or https://HOST:PORT
    url: String,
    /// Unique id [default: host:port of the URL]
    #[arg(long)]
    id: Option<String>,
    /// Engine: vllm, sglang or openai-compatible [default: vllm]
    #[arg(long, value_parser = parse_name::<EngineKind>)]
    engine: Option<EngineKind>,
    /// Model it serves; may be given more than once [default: what the engine lists]
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// Part of a request it does: aggregated, prefill or decode [default: aggregated]
    #[arg(long, value_parser = parse_name::<WorkerRole>)]
    role: Option<WorkerRole>,
    /// How a prefill or decode worker hands the KV cache on: nixl, mooncake, p2p-nccl, moriio, shared or sglang
    /// [default: nixl for vllm, sglang for sglang, shared for others]
    #[arg(long, value_parser = parse_name::<Connector>)]
    connector: Option<Connector>,
    /// Where decode workers find this prefill worker (sglang, mooncake) [default: host of the URL]
    #[arg(long, value_name = "HOST")]
    bootstrap_host: Option<String>,
    /// ... and at which port [default: 8998]
    #[arg(long, value_name = "PORT")]
    bootstrap_port: Option<u16>,
    /// The engine's zmq_address, that other engines are told (p2p-nccl, moriio)
    #[arg(long, value_name = "ADDRESS")]
    side_channel: Option<String>,
    /// Data-parallel ranks behind the URL [default: what the engine says, or 1]
    #[arg(long, value_name = "N")]
    dp_ranks: Option<u32>,
    /// Tokens in a KV block [default: what the engine says]
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
    /// KV blocks the engine can hold, over all ranks [default: what the engine says]
    #[arg(long, value_name = "BLOCKS")]
    capacity_blocks: Option<u64>,
    /// Free-form pair for filters; may be given more than once
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_pair)]
    labels: Vec<(String, String)>,
    /// Relative share of traffic, 1 to 1000 [default: 100]
    #[arg(long)]
    weight: Option<u32>,
    /// Speak HTTP/2 to it
    #[arg(long)]
    http2: bool,
    /// Requests it should have at once; more wait [default: proxy.max_requests_per_worker]
    #[arg(long, value_name = "N")]
    max_requests: Option<u32>,
    /// Register it without asking the engine for its health and models; name those with --model
    #[arg(long)]
    no_probe: bool,
    #[command(flatten)]
    server: Server,
}

impl Add {
    fn request(&self) -> RegisterRequest {
        RegisterRequest {
            url: self.url.clone(),
            id: self.id.clone(),
            engine: self.engine,
            models: self.models.iter().cloned().map(ModelEntry::Name).collect(),
            role: self.role,
            connector: self.connector,
            bootstrap_host: self.bootstrap_host.clone(),
            bootstrap_port: self.bootstrap_port,
            side_channel: self.side_channel.clone(),
            dp_ranks: self.dp_ranks,
            block_size: self.block_size,
            capacity_blocks: self.capacity_blocks,
            labels: self.labels.iter().cloned().collect(),
            weight: self.weight,
            http2: self.http2.then_some(true),
            max_requests: self.max_requests,
            heartbeat: None,
            probe: self.no_probe.then_some(false),
        }
    }
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(self.command.run(out))
    }
}

impl Command {
    async fn run(self, out: &mut Out) -> Result<(), Failure> {
        match self {
            Command::Add(add) => {
                let request = add.request();
                // The same bounds as the server's, found without a round trip.
                request.to_spec(WorkerSource::Admin).map_err(Failure::Usage)?;
                if add.no_probe && add.models.is_empty() {
                    let text = "--no-probe needs --model NAME: the engine is not asked what it serves";
                    return Err(Failure::Usage(text.to_owned()));
                }
                let reply: MessageReply =
                    add.server.client()?.call(Method::POST, WORKERS, Some(&request)).await?;
                out.line(&reply.message)
            }
            Command::Remove(named) => {
                let path = path(&named.id);
                let client = named.server.client()?;
                let reply: MessageReply = client.call(Method::DELETE, &path, None::<&()>).await?;
                out.line(&reply.message)
            }
            Command::Drain(named) => drain(named, true, out).await,
            Command::Undrain(named) => drain(named, false, out).await,
            Command::List(listing) => {
                let reply: WorkersReply = listing.get(WORKERS).await?;
                match (listing.json, reply.workers.is_empty()) {
                    (true, _) => out.json(&reply),
                    (false, true) => {
                        out.line("no workers yet; add one: everline worker add http://HOST:PORT")
                    }
                    (false, false) => out.line(&workers_table(&reply.workers, out.paint())),
                }
            }
            Command::Show { id, listing } => {
                let worker: WorkerStatus = listing.get(&path(&id)).await?;
                if listing.json { out.json(&worker) } else { out.write(&page(&worker)) }
            }
        }
    }
}

async fn drain(named: Named, drain: bool, out: &mut Out) -> Result<(), Failure> {
    let client = named.server.client()?;
    let path = format!("{}/drain", path(&named.id));
    let reply: MessageReply = client.call(Method::POST, &path, Some(&DrainRequest { drain })).await?;
    out.line(&reply.message)
}

fn path(id: &str) -> String {
    format!("{WORKERS}/{}", segment(id))
}

fn page(worker: &WorkerStatus) -> String {
    let known = |number: Option<u64>| number.map_or("unknown".to_owned(), |n| n.to_string());
    let lines = [
        ("id", worker.id.to_string()),
        ("url", worker.url.clone()),
        ("state", state(worker).to_owned()),
        ("engine", worker.engine.to_string()),
        ("role", role(worker)),
        ("models", worker.models.join(", ")),
        ("requests", worker.requests.to_string()),
        ("prefill tokens", worker.prefill_tokens.to_string()),
        ("KV blocks", format!("{} of {}", worker.decode_blocks, known(worker.capacity_blocks))),
        ("block size", known(worker.block_size.map(u64::from))),
        ("weight", worker.weight.to_string()),
        ("http2", worker.http2.to_string()),
        ("max requests", worker.max_requests.map_or("as configured".to_owned(), |most| most.to_string())),
        ("source", format!("{:?}", worker.source).to_lowercase()),
        ("liveness", format!("{:?}", worker.liveness).to_lowercase()),
        ("generation", worker.generation.to_string()),
    ];
    lines.iter().map(|(name, value)| format!("{name:<15} {value}\n")).collect()
}

fn role(worker: &WorkerStatus) -> String {
    match worker.connector {
        Some(connector) => format!("{}, {}", worker.role.name(), connector.name()),
        None => worker.role.name().to_owned(),
    }
}

/// Reads a name as the JSON API spells it, so that flags and API cannot differ.
pub(super) fn parse_name<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|e| e.to_string())
}

pub(super) fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}
