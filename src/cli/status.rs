//! `everline status`

use std::time::Duration;

use super::client::{Client, Server, block_on};
use super::output::{Failure, Out, Paint};
use super::table::{count, duration, render};
use crate::admin_types::{StatusReply, WorkerStatus};
use crate::cluster::api::{ClusterStatus, MemberStatus};

/// Time between two looks with `--watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Show the cluster: replicas, workers, loads, recent errors
///
/// Examples:
///   everline status
///   everline status --server http://10.0.0.2:8081 --watch
///   everline status --json | jq '.cluster.members[].info.name'
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    server: Server,
    /// As JSON, as the replica answered it
    #[arg(long)]
    json: bool,
    /// Look again each second
    #[arg(long, short)]
    watch: bool,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            let client = self.server.client()?;
            loop {
                let shown = self.look(&client, out).await;
                if !self.watch {
                    return shown.and_then(|text| out.write(&text));
                }
                let text = match shown {
                    Ok(text) => text,
                    // While watching, a cluster that is away is news, not the end.
                    Err(Failure::Unreachable(why) | Failure::Failed(why)) => {
                        format!("{}\n", out.paint().red(&why))
                    }
                    Err(other) => return Err(other),
                };
                let clear = if out.is_terminal() { "\x1b[H\x1b[2J" } else { "" };
                out.write(&format!("{clear}{text}"))?;
                tokio::time::sleep(WATCH).await;
            }
        })
    }

    async fn look(&self, client: &Client, out: &Out) -> Result<String, Failure> {
        if self.json {
            let json: serde_json::Value = client.get("/v1/admin/status").await?;
            return Ok(format!("{json:#}\n"));
        }
        Ok(page(&client.get("/v1/admin/status").await?, out.paint()))
    }
}

/// The whole page.
pub(crate) fn page(status: &StatusReply, paint: Paint) -> String {
    let mut parts = vec![headline(status, paint)];
    if let Some(why) = &status.cluster.down {
        parts.push(paint.red(&format!("{} does not take part: {why}", status.cluster.name)));
    }
    if !status.cluster.members.is_empty() {
        if !status.cluster.quorum {
            parts.push(paint.yellow("no quorum: what follows is as of the last decision"));
        }
        parts.push(members_table(&status.cluster.members, paint));
    }
    parts.push(if status.workers.is_empty() {
        "no workers yet; add one: everline worker add http://HOST:PORT".to_owned()
    } else {
        workers_table(&status.workers, paint)
    });
    if !status.recent_errors.is_empty() {
        let lines =
            status.recent_errors.iter().map(|e| format!("  {:>9} ago  {}", duration(e.at_ms_ago), e.what));
        let lines: Vec<String> = lines.collect();
        parts.push(format!("{}\n{}", paint.dim("RECENT ERRORS"), lines.join("\n")));
    }
    parts.join("\n\n") + "\n"
}

fn headline(status: &StatusReply, paint: Paint) -> String {
    let cluster = &status.cluster;
    let id = match cluster.cluster_id.get(..8).unwrap_or(&cluster.cluster_id) {
        "" => "none",
        id => id,
    };
    let quorum = if cluster.quorum { paint.green("yes") } else { paint.red("no") };
    let online = status.workers.iter().filter(|w| w.online).count();
    let alive = cluster.members.iter().filter(|m| m.alive).count();
    format!(
        "{}  quorum {quorum}  {}  {} ({alive} up)  {} ({online} up)\n{}",
        paint.bold(&format!("cluster {id}")),
        leaders(cluster),
        count(cluster.members.len(), "replica"),
        count(status.workers.len(), "worker"),
        paint.dim(&format!(
            "answered by {} (everline {}, up {}, {} since then)",
            cluster.name,
            status.version,
            duration(status.uptime_s * 1000),
            count(usize::try_from(status.requests_total).unwrap_or(usize::MAX), "request"),
        )),
    )
}

/// Who leads, in a few words.
pub(crate) fn leaders(cluster: &ClusterStatus) -> String {
    if !cluster.quorum {
        return "leader unknown".to_owned();
    }
    let name = |leads: fn(&MemberStatus) -> bool| {
        cluster.members.iter().find(|m| leads(m)).map_or("none", |m| m.info.name.as_str())
    };
    match (name(|m| m.leads_control), name(|m| m.leads_cache)) {
        (control, cache) if control == cache => format!("leader {control}"),
        (control, cache) => format!("leaders {control} (control), {cache} (cache)"),
    }
}

/// The replicas.
pub(crate) fn members_table(members: &[MemberStatus], paint: Paint) -> String {
    let row = |member: &MemberStatus| {
        let leads = match (member.leads_control, member.leads_cache) {
            (true, true) => ", leader",
            (true, false) => ", leader (control)",
            (false, true) => ", leader (cache)",
            (false, false) => "",
        };
        vec![
            member.info.name.clone(),
            member.id.to_string(),
            format!("{}{leads}", member.membership),
            if member.alive { "alive" } else { "silent" }.to_owned(),
            member.lag.map_or("-".to_owned(), |lag| lag.to_string()),
            member.requests.to_string(),
            member.info.http.clone(),
        ]
    };
    let rows = members.iter().map(row).collect();
    render(&["REPLICA", ">ID", "ROLE", "STATE", ">LAG", ">LOAD", "HTTP"], rows, paint)
}

/// The workers.
pub(crate) fn workers_table(workers: &[WorkerStatus], paint: Paint) -> String {
    let rows = workers.iter().map(|worker| {
        vec![
            worker.id.to_string(),
            state(worker).to_owned(),
            models(&worker.models),
            worker.requests.to_string(),
            worker.prefill_tokens.to_string(),
            blocks(worker),
            worker.url.clone(),
        ]
    });
    let rows = rows.collect();
    render(&["WORKER", "STATE", "MODELS", ">LOAD", ">PREFILL", ">BLOCKS", "URL"], rows, paint)
}

/// A worker's state in a word.
pub(crate) fn state(worker: &WorkerStatus) -> &'static str {
    match worker {
        w if !w.online => "offline",
        w if w.drain => "draining",
        w if !w.reachable => "unreachable",
        _ => "online",
    }
}

fn models(names: &[String]) -> String {
    match names {
        [] => "-".to_owned(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} +{}", rest.len()),
    }
}

fn blocks(worker: &WorkerStatus) -> String {
    match worker.capacity_blocks {
        Some(capacity) => format!("{}/{capacity}", worker.decode_blocks),
        None => worker.decode_blocks.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::admin_types::RecentError;

    pub(crate) fn sample() -> StatusReply {
        let member = |id: u64, leads: bool, alive: bool| {
            serde_json::json!({
                "id": id,
                "info": { "name": format!("r{id}"), "peer": format!("10.0.0.{id}:8082"),
                          "http": format!("http://10.0.0.{id}:8080"), "admin": format!("http://10.0.0.{id}:8081"),
                          "version": "0.1.0" },
                "incarnation": 1, "membership": "voter", "alive": alive, "lag": if alive { Some(id - 1) } else { None },
                "leads_control": leads, "leads_cache": leads, "requests": id * 7,
            })
        };
        let worker = |id: &str, online: bool, drain: bool| {
            serde_json::json!({
                "id": id, "url": format!("http://{id}:8000"), "engine": "vllm", "role": "aggregated",
                "models": ["llama-3-8b", "llama-3-8b-sql"], "online": online, "drain": drain, "source": "config",
                "liveness": "probe", "requests": 21, "prefill_tokens": 4096, "decode_blocks": 350, "reachable": true,
                "generation": 1, "weight": 100, "block_size": 16,
                "capacity_blocks": if online { Some(10_000) } else { None }, "last_heard_ms_ago": 120,
            })
        };
        let reply = serde_json::json!({
            "cluster": { "cluster_id": "3f9a2c1b77d04e55", "me": 1, "name": "r1", "incarnation": 4, "quorum": true,
                         "down": null, "groups": [],
                         "members": [member(1, false, true), member(2, true, true), member(3, false, false)] },
            "workers": [worker("gpu-1", true, false), worker("gpu-2", true, true), worker("gpu-10", false, false)],
            "version": "0.1.0", "uptime_s": 7384, "requests_total": 48_211,
            "recent_errors": [],
        });
        let mut reply: StatusReply = serde_json::from_value(reply).unwrap();
        let what = "gpu-10: connection refused, 1 request went to gpu-1 instead".to_owned();
        reply.recent_errors.push(RecentError { at_ms_ago: 3_200, what });
        reply
    }

    const PAGE: &str = "\
cluster 3f9a2c1b  quorum yes  leader r2  3 replicas (2 up)  3 workers (2 up)
answered by r1 (everline 0.1.0, up 2 h 3 m, 48211 requests since then)

REPLICA  ID  ROLE           STATE   LAG  LOAD  HTTP
r1        1  voter          alive     0     7  http://10.0.0.1:8080
r2        2  voter, leader  alive     1    14  http://10.0.0.2:8080
r3        3  voter          silent    -    21  http://10.0.0.3:8080

WORKER  STATE     MODELS         LOAD  PREFILL     BLOCKS  URL
gpu-1   online    llama-3-8b +1    21     4096  350/10000  http://gpu-1:8000
gpu-2   draining  llama-3-8b +1    21     4096  350/10000  http://gpu-2:8000
gpu-10  offline   llama-3-8b +1    21     4096        350  http://gpu-10:8000

RECENT ERRORS
        3 s ago  gpu-10: connection refused, 1 request went to gpu-1 instead
";

    #[test]
    fn the_page_looks_like_this() {
        let page = page(&sample(), Paint { on: false });
        assert!(page == PAGE, "{page}");
    }

    #[test]
    fn colours_do_not_move_columns() {
        let painted = page(&sample(), Paint { on: true });
        let mut plain = String::new();
        let mut rest = painted.as_str();
        while let Some(at) = rest.find('\x1b') {
            plain.push_str(&rest[..at]);
            rest = &rest[at + 1 + rest[at..].find('m').unwrap()..];
        }
        plain.push_str(rest);
        assert_eq!(plain, PAGE);
    }

    #[test]
    fn a_cluster_without_anything_says_what_to_do() {
        let mut reply = sample();
        reply.workers.clear();
        reply.cluster.cluster_id.clear();
        let page = page(&reply, Paint { on: false });
        assert!(page.contains("cluster none") && page.contains("everline worker add"), "{page}");
    }
}
