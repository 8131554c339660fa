//! `everline replay`

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, json};

use super::output::{Failure, Out};
use super::table;
use super::urls;
use crate::replay::engine::EngineModel;
use crate::replay::generate::{Kind, generate};
use crate::replay::simulate::{Options, Router, simulate};
use crate::replay::stats::{Run, Summary};
use crate::replay::trace::{self, Request, TraceError};
use crate::replay::{live, plot, prompt};
use crate::routing::policy::from_spec;

/// Replay a trace of requests, simulated or against a cluster, and compare policies
///
/// A trace has one JSON object a line, as Mooncake's have: timestamp (ms), input_length,
/// output_length, and hash_ids, one for each block of the prompt. The simulation runs the routing
/// of this program on simulated engines in virtual time; the same seed gives the same figures.
///
/// Policies take parameters after a colon: kv_cost:weight=4,temperature=0.1
///
/// Examples:
///   everline replay --simulate --policy round_robin --policy kv_cost trace.jsonl
///   everline replay --simulate --workers 16 --blocks 8000 --routers 3 --lag-ms 10 trace.jsonl
///   everline replay --url http://127.0.0.1:8080 --model m --speed 10 --limit 1000 trace.jsonl
///   everline replay --url http://127.0.0.1:8080 --model m --policy kv_cost --policy cache_aware trace.jsonl
///   everline replay --generate agents --requests 5000 > agents.jsonl
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The trace
    #[arg(value_name = "TRACE", required_unless_present = "generate")]
    trace: Option<PathBuf>,
    /// Simulate, instead of asking a cluster
    #[arg(long, conflicts_with_all = ["url", "generate"])]
    simulate: bool,
    /// Client address of a cluster to send the trace to
    #[arg(long, value_name = "URL", requires = "model", conflicts_with = "generate")]
    url: Option<String>,
    /// Write a made-up trace to standard output: agents, rag, chat, uniform or bursts
    #[arg(long, value_name = "KIND", conflicts_with = "trace")]
    generate: Option<String>,

    /// Arrivals come so many times as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    speed: f64,
    /// Leave out so many requests at the beginning
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: usize,
    /// Take at most so many requests
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Tokens in a block of the trace
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    block_size: u32,
    /// Where chance begins
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write plots to this file (SVG)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Policy to compare; repeatable [default: round_robin and kv_cost, or a cluster's own]
    ///
    /// Parameters are for the simulation; a cluster is asked by name, for one run after the other,
    /// each with prompts of its own
    #[arg(long = "policy", value_name = "NAME[:KEY=VALUE,...]")]
    policies: Vec<String>,
    /// Engines to simulate [default: 8]
    #[arg(long, value_name = "N", help_heading = "Simulation")]
    workers: Option<u32>,
    /// Blocks in the cache of each engine [default: 4000]
    #[arg(long, value_name = "N", help_heading = "Simulation")]
    blocks: Option<u64>,
    /// Replicas of the router, which take requests in turn [default: 1]
    #[arg(long, value_name = "N", help_heading = "Simulation")]
    routers: Option<u32>,
    /// How late a replica learns what others booked, and all learn what an engine holds [default: 10]
    #[arg(long, value_name = "MS", help_heading = "Simulation")]
    lag_ms: Option<f64>,
    /// Do not simulate one pooled cache to compare hit rates with
    #[arg(long, help_heading = "Simulation")]
    no_bound: bool,

    /// Model to ask for
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    model: Option<String>,
    /// File with an API key
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    key_file: Option<PathBuf>,
    /// Authority that the certificate of an https cluster must be of (PEM) [default: Mozilla's list]
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    ca: Option<PathBuf>,
    /// Most requests under way; further ones wait and are counted as late
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "Cluster")]
    concurrency: u32,
    /// Longest time for one request, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, help_heading = "Cluster")]
    timeout: f64,
    /// Tokens that each block of the trace is made into, to shrink prompts [default: --block-size]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 20), help_heading = "Cluster")]
    tokens_per_block: Option<u32>,
    /// Longest output asked for, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cluster")]
    max_output: u32,
    /// Send token ids below this to /v1/completions, instead of words to /v1/chat/completions
    #[arg(long, value_name = "IDS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cluster")]
    vocabulary: Option<u32>,

    /// Requests to make up
    #[arg(long, value_name = "N", default_value_t = 5000, help_heading = "Made-up traces")]
    requests: usize,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        if let Some(kind) = &self.generate {
            return self.make_up(kind, out);
        }
        if !(self.speed.is_finite() && (1e-3..=1e6).contains(&self.speed)) {
            return Err(Failure::Usage(format!("--speed must lie in 0.001 to 1000000, not {}", self.speed)));
        }
        match (&self.url, self.simulate) {
            (Some(url), _) => self.live(url, out),
            (None, true) => self.simulated(out),
            (None, false) => Err(Failure::Usage(
                "say --simulate, or with --url and --model which cluster to ask".to_owned(),
            )),
        }
    }

    fn make_up(&self, kind: &str, out: &mut Out) -> Result<(), Failure> {
        const MOST: usize = 10_000_000;
        let kind = Kind::parse(kind).map_err(|why| Failure::Usage(format!("--generate: {why}")))?;
        if !(1..=MOST).contains(&self.requests) {
            return Err(Failure::Usage(format!("--requests must be 1 to {MOST}")));
        }
        for lines in generate(kind, self.requests, self.block_size, self.seed).chunks(1000) {
            let mut text = String::new();
            for line in lines {
                text.push_str(&serde_json::to_string(line).map_err(|e| Failure::Failed(e.to_string()))?);
                text.push('\n');
            }
            out.write(&text)?;
        }
        Ok(())
    }

    fn read(&self) -> Result<Vec<Request>, Failure> {
        // clap sees to it that there is one.
        let path = self.trace.as_deref().unwrap_or(Path::new(""));
        let name = path.display();
        let file = File::open(path).map_err(|e| Failure::Usage(format!("cannot read {name}: {e}")))?;
        let limit = self.limit.unwrap_or(usize::MAX);
        trace::read(BufReader::new(file), self.block_size, self.skip, limit).map_err(|why| match why {
            TraceError::Io(_) => Failure::Failed(format!("{name}: {why}")),
            _ => Failure::Usage(format!("{name}: {why}")),
        })
    }

    fn simulated(&self, out: &mut Out) -> Result<(), Failure> {
        let lag_ms = self.lag_ms.unwrap_or(10.0);
        let options = Options {
            workers: self.workers.unwrap_or(8),
            blocks: self.blocks.unwrap_or(4000),
            routers: self.routers.unwrap_or(1),
            lag: lag_ms / 1000.0,
            speed: self.speed,
            seed: self.seed,
            engine: EngineModel::new(self.block_size),
        };
        options.check().map_err(Failure::Usage)?;
        let mut policies = self.policies.clone();
        if policies.is_empty() {
            policies.extend(["round_robin", "kv_cost"].map(str::to_owned));
        }
        for (at, spec) in policies.iter().enumerate() {
            check_policy(spec, &policies[..at])?;
        }
        let requests = self.read()?;
        let pooled = (!self.no_bound).then(|| simulate(&requests, &options, Router::Pooled));
        let bound = pooled.transpose().map_err(Failure::Usage)?;
        let bound_rate = bound.as_ref().map(Run::hit_rate);
        let mut runs = Vec::new();
        for spec in policies {
            let run = simulate(&requests, &options, Router::Policy(&spec)).map_err(Failure::Usage)?;
            runs.push((spec, run));
        }
        self.draw(&runs)?;
        let summaries: Vec<(&str, Summary)> =
            runs.iter().map(|(name, run)| (name.as_str(), run.summary(bound_rate))).collect();
        let bound = bound.map(|run| run.summary(None));
        if !self.json {
            let bound = bound.map(|summary| ("(pooled cache)", summary));
            return print(out, summaries.into_iter().chain(bound));
        }
        let policies: Map<String, serde_json::Value> =
            summaries.into_iter().map(|(name, summary)| (name.to_owned(), json!(summary))).collect();
        let about = json!({
            "requests": requests.len(), "workers": options.workers, "blocks": options.blocks,
            "block_size": self.block_size, "routers": options.routers, "lag_ms": lag_ms,
            "speed": self.speed, "seed": self.seed,
        });
        out.json(&json!({"simulation": about, "policies": policies, "pooled_bound": bound}))
    }

    /// Refuses what a cluster cannot be told.
    fn check_live(&self) -> Result<(), Failure> {
        let simulated = [
            ("--workers", self.workers.is_some()),
            ("--blocks", self.blocks.is_some()),
            ("--routers", self.routers.is_some()),
            ("--lag-ms", self.lag_ms.is_some()),
            ("--no-bound", self.no_bound),
        ];
        if let Some((flag, _)) = simulated.iter().find(|(_, given)| *given) {
            return Err(Failure::Usage(format!(
                "{flag} is for the simulation, and a cluster is what it is: leave it out, or say --simulate \
                 in place of --url"
            )));
        }
        for (at, spec) in self.policies.iter().enumerate() {
            check_policy(spec, &self.policies[..at])?;
            if let Some((name, _)) = spec.split_once(':') {
                return Err(Failure::Usage(format!(
                    "--policy {spec}: a cluster is asked by name, with the parameters that it is configured \
                     with; say --policy {name}, and the parameters in the cluster's configuration"
                )));
            }
        }
        if !(self.timeout.is_finite() && (0.001..=86_400.0).contains(&self.timeout)) {
            return Err(Failure::Usage("--timeout must lie in 0.001 to 86400 s".to_owned()));
        }
        Ok(())
    }

    fn live(&self, url: &str, out: &mut Out) -> Result<(), Failure> {
        let url = urls::base(url).map_err(|why| Failure::Usage(format!("--url {url}: {why}")))?;
        self.check_live()?;
        let key = self.key_file.as_deref().map(|path| {
            let read = std::fs::read_to_string(path);
            let text =
                read.map_err(|e| Failure::Usage(format!("--key-file: cannot read {}: {e}", path.display())));
            text.map(|text| text.trim().to_owned())
        });
        let tls = crate::tls::client_config(self.ca.as_deref())
            .map_err(|e| Failure::Usage(format!("--ca: {e}")))?;
        let requests = self.read()?;
        let options = live::Options {
            url: url.clone(),
            model: self.model.clone().unwrap_or_default(),
            policy: None,
            key: key.transpose()?,
            tls,
            speed: self.speed,
            concurrency: self.concurrency as usize,
            timeout: Duration::from_secs_f64(self.timeout),
            block_size: self.block_size,
            tokens_per_block: self.tokens_per_block.unwrap_or(self.block_size),
            max_output: self.max_output,
            vocabulary: self.vocabulary,
        };
        let mut policies: Vec<Option<&String>> = self.policies.iter().map(Some).collect();
        if policies.is_empty() {
            policies.push(None);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (mut runs, mut told) = (Vec::new(), Vec::new());
        for (run, policy) in (0..).zip(&policies) {
            let options = live::Options { policy: policy.cloned(), ..options.clone() };
            let requests = prompt::of_run(run, &requests);
            let outcome = runtime.block_on(live::replay(&requests, options)).map_err(Failure::Usage)?;
            let summary = outcome.run.summary(None);
            let model = self.model.as_deref().unwrap_or_default();
            runs.push((policy.map_or_else(|| format!("{url} {model}"), |name| (*name).clone()), outcome.run));
            told.push(Told {
                policy: policy.map(String::as_str),
                summary,
                late: outcome.late,
                failures: outcome.failures,
                cached_tokens_known: outcome.cached_known,
            });
        }
        self.draw(&runs)?;
        match self.json {
            true => out.json(&in_json(&told))?,
            false => self.tell(&told, out)?,
        }
        let sent: usize = told.iter().map(|told| told.summary.requests).sum();
        if told.iter().all(|told| told.summary.errors == told.summary.requests) {
            return Err(Failure::Unreachable(format!("all {sent} requests failed")));
        }
        Ok(())
    }

    fn tell(&self, told: &[Told<'_>], out: &mut Out) -> Result<(), Failure> {
        print(out, told.iter().map(|told| (told.name(), told.summary.clone())))?;
        for told in told {
            let of = told.policy.map(|name| format!("{name}: ")).unwrap_or_default();
            if told.late > 0 {
                let (late, places) = (told.late, self.concurrency);
                out.line(&format!("{of}late: {late} requests waited for one of {places} places"))?;
            }
            if !told.cached_tokens_known {
                out.line(&format!(
                    "{of}hit rate unknown: no answer has usage.prompt_tokens_details.cached_tokens (vLLM: \
                     --enable-prompt-tokens-details)"
                ))?;
            }
            for (why, count) in &told.failures {
                out.line(&format!("{of}failed: {count} × {why}"))?;
            }
        }
        Ok(())
    }

    fn draw(&self, runs: &[(String, Run)]) -> Result<(), Failure> {
        let Some(path) = &self.plot else { return Ok(()) };
        let written = File::create(path).and_then(|mut file| file.write_all(plot::svg(runs).as_bytes()));
        written.map_err(|e| Failure::Failed(format!("--plot: cannot write {}: {e}", path.display())))
    }
}

/// What is told of a run against a cluster.
struct Told<'a> {
    policy: Option<&'a str>,
    summary: Summary,
    late: usize,
    failures: BTreeMap<String, usize>,
    cached_tokens_known: bool,
}

impl Told<'_> {
    fn name(&self) -> &str {
        self.policy.unwrap_or("live")
    }
}

/// One run with the cluster's own policy as `live`, others by policy.
fn in_json(told: &[Told<'_>]) -> serde_json::Value {
    let beside = |told: &Told<'_>| json!({"late": told.late, "failures": told.failures, "cached_tokens_known": told.cached_tokens_known});
    let put = |whole: &mut serde_json::Value, more: serde_json::Value| {
        if let (Some(whole), serde_json::Value::Object(more)) = (whole.as_object_mut(), more) {
            whole.extend(more);
        }
    };
    if let [only] = told
        && only.policy.is_none()
    {
        let mut whole = json!({"live": only.summary});
        put(&mut whole, beside(only));
        return whole;
    }
    let policies = told.iter().map(|told| {
        let mut whole = json!(told.summary);
        put(&mut whole, beside(told));
        (told.name().to_owned(), whole)
    });
    json!({"policies": policies.collect::<Map<String, serde_json::Value>>()})
}

fn check_policy(spec: &str, before: &[String]) -> Result<(), Failure> {
    from_spec(spec).map_err(|why| Failure::Usage(format!("--policy: {why}")))?;
    if before.iter().any(|other| other == spec) {
        return Err(Failure::Usage(format!("--policy {spec} is given twice")));
    }
    Ok(())
}

fn print<'a>(out: &mut Out, summaries: impl Iterator<Item = (&'a str, Summary)>) -> Result<(), Failure> {
    let headings = [
        "POLICY",
        ">REQUESTS",
        ">ERRORS %",
        ">HIT %",
        ">OF BOUND %",
        ">TTFT MEAN",
        ">P50",
        ">P90",
        ">P99",
        ">ITL MEAN",
        ">P50",
        ">P99",
        ">IMBALANCE",
    ];
    let share = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{:.1}", v * 100.0));
    let rows = summaries.map(|(name, s)| {
        vec![
            name.to_owned(),
            s.requests.to_string(),
            share(Some(s.error_rate)),
            share(Some(s.hit_rate)),
            share(s.hit_rate_of_bound),
            format!("{:.3} s", s.mean_ttft_s),
            format!("{:.3} s", s.p50_ttft_s),
            format!("{:.3} s", s.p90_ttft_s),
            format!("{:.2} s", s.p99_ttft_s),
            format!("{:.1} ms", s.mean_itl_s * 1000.0),
            format!("{:.1} ms", s.p50_itl_s * 1000.0),
            format!("{:.1} ms", s.p99_itl_s * 1000.0),
            s.imbalance.map_or("-".to_owned(), |v| format!("{v:.2}")),
        ]
    });
    let text = table::render(&headings, rows.collect(), out.paint());
    out.line(&text)
}
