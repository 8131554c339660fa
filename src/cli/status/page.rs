//! The page of `everline status`.

use std::collections::BTreeMap;

use super::super::output::Paint;
use super::super::table::{Column, count, cut, duration, flow, render, render_within};
use super::survey::Survey;
use crate::admin_types::{BreakerState, Known, StatusReply, StreamNumbers, WorkerStatus};
use crate::cluster::api::{ClusterStatus, GroupStatus, MemberStatus};

/// Most lines of errors.
const MOST_ERRORS: usize = 10;

/// The whole page, no wider than the terminal if that is possible.
pub(super) fn page(survey: &Survey, paint: Paint, width: Option<usize>) -> String {
    let cluster = &survey.asked.cluster;
    let mut parts = vec![headline(survey, paint, width)];
    if let Some(why) = &cluster.down {
        parts.push(paint.red(&format!("{} does not take part: {why}", cluster.name)));
    }
    if !cluster.members.is_empty() {
        if !cluster.quorum {
            parts.push(paint.yellow("no quorum: what follows is as of the last decision"));
        }
        parts.push(replicas(survey, paint, width));
    }
    parts.push(if survey.asked.workers.is_empty() {
        "no workers yet; add one: everline worker add http://HOST:PORT".to_owned()
    } else {
        workers(survey, paint, width)
    });
    parts
        .extend(survey.asked.name_troubles.iter().map(|text| paint.yellow(&format!("name service: {text}"))));
    parts.extend(streams(survey, width));
    parts.extend(errors(survey, paint, width));
    parts.join("\n\n") + "\n"
}

fn headline(survey: &Survey, paint: Paint, width: Option<usize>) -> String {
    let (status, cluster) = (&survey.asked, &survey.asked.cluster);
    let id = match cluster.cluster_id.get(..8).unwrap_or(&cluster.cluster_id) {
        "" => "none",
        id => id,
    };
    let quorum = if cluster.quorum { "yes" } else { "no" };
    let online = status.workers.iter().filter(|w| w.online).count();
    let alive = cluster.members.iter().filter(|m| m.alive).count();
    let in_flight: i64 = cluster.members.iter().map(|m| m.requests).sum();
    let rate: f64 = survey.rates.values().sum();
    let mut facts = vec![
        format!("cluster {id}"),
        format!("quorum {quorum}"),
        leaders(cluster),
        format!("{} ({alive} up)", count(cluster.members.len(), "replica")),
        format!("{} ({online} up)", count(status.workers.len(), "worker")),
        format!("{in_flight} in flight"),
    ];
    if !survey.rates.is_empty() {
        facts.push(format!("{rate:.1} requests/s"));
    }
    let first = flow(&facts, "  ", width)
        .replacen(&facts[0], &paint.bold(&facts[0]), 1)
        .replacen("quorum yes", &format!("quorum {}", paint.green("yes")), 1)
        .replacen("quorum no", &format!("quorum {}", paint.red("no")), 1);
    let asked = [
        format!("answered by {} (everline {}, up {},", cluster.name, status.version, up(status)),
        format!(
            "{} since then)",
            count(usize::try_from(status.requests_total).unwrap_or(usize::MAX), "request")
        ),
    ];
    let second = flow(&asked, " ", width);
    let second: Vec<String> = second.lines().map(|line| paint.dim(line)).collect();
    format!("{first}\n{}", second.join("\n"))
}

fn up(status: &StatusReply) -> String {
    duration(status.uptime_s * 1000)
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

fn role(member: &MemberStatus) -> String {
    let leads = match (member.leads_control, member.leads_cache) {
        (true, true) => ", leader",
        (true, false) => ", leader (control)",
        (false, true) => ", leader (cache)",
        (false, false) => "",
    };
    format!("{}{leads}", member.membership)
}

fn life(member: &MemberStatus) -> String {
    if member.alive { "alive" } else { "silent" }.to_owned()
}

/// Text, or a dash for what is not known.
fn known(value: Option<impl ToString>) -> String {
    value.map_or("-".to_owned(), |value| value.to_string())
}

/// The replicas as one of them knows them.
pub(crate) fn members_table(members: &[MemberStatus], paint: Paint) -> String {
    let row = |member: &MemberStatus| {
        vec![
            member.info.name.clone(),
            member.id.to_string(),
            role(member),
            life(member),
            known(member.lag),
            member.requests.to_string(),
            member.info.http.clone(),
        ]
    };
    let rows = members.iter().map(row).collect();
    render(&["REPLICA", ">ID", "ROLE", "STATE", ">LAG", ">LOAD", "HTTP"], rows, paint)
}

/// A number of each group, once if they are the same.
fn of_groups(reply: &StatusReply, read: fn(&GroupStatus) -> u64) -> String {
    match &reply.cluster.groups[..] {
        [] => "-".to_owned(),
        [first, rest @ ..] if rest.iter().all(|group| read(group) == read(first)) => read(first).to_string(),
        groups => groups.iter().map(|group| read(group).to_string()).collect::<Vec<_>>().join("/"),
    }
}

/// The replicas, with what they say of themselves.
fn replicas(survey: &Survey, paint: Paint, width: Option<usize>) -> String {
    let members = &survey.asked.cluster.members;
    // How far everybody is behind only the leader knows.
    let lags: BTreeMap<_, u64> = survey
        .replies()
        .flat_map(|reply| &reply.cluster.members)
        .filter_map(|member| Some((member.id, member.lag?)))
        .collect();
    let rows = members.iter().map(|member| {
        let reply = survey.reply(member.id);
        let mut row = vec![
            member.info.name.clone(),
            member.id.to_string(),
            role(member),
            life(member),
            known(reply.map(|reply| of_groups(reply, |group| group.term))),
            known(reply.map(|reply| of_groups(reply, |group| group.applied))),
            known(lags.get(&member.id)),
            known(member.view_age_ms.map(duration)),
            member.requests.to_string(),
            known(survey.rates.get(&member.id).map(|rate| format!("{rate:.1}"))),
            known(reply.map(up)),
            member.info.version.clone(),
            member.info.http.clone(),
        ];
        if survey.rates.is_empty() {
            row.remove(9);
        }
        row
    });
    let mut columns = vec![
        Column::kept("REPLICA"),
        Column::dropped(8, ">ID"),
        Column::kept("ROLE"),
        Column::kept("STATE"),
        Column::dropped(5, ">TERM"),
        Column::dropped(6, ">APPLIED"),
        Column::dropped(2, ">LAG"),
        Column::dropped(3, ">VIEW"),
        Column::kept(">LOAD"),
        Column::dropped(1, ">REQ/S"),
        Column::dropped(4, ">UP"),
        Column::dropped(7, "VERSION"),
        Column::dropped(9, "HTTP"),
    ];
    if survey.rates.is_empty() {
        columns.remove(9);
    }
    let table = render_within(&columns, rows.collect(), paint, width);
    let mute = members.iter().filter(|member| survey.mute.contains(&member.id));
    let mute: Vec<String> = mute
        .map(|member| {
            let text = format!(
                "{} did not answer at {}: its own words are missing",
                member.info.name, member.info.admin
            );
            paint.dim(&cut(&text, width))
        })
        .collect();
    std::iter::once(table).chain(mute).collect::<Vec<_>>().join("\n")
}

/// The workers as one replica knows them.
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

/// The workers, with every replica's breaker.
fn workers(survey: &Survey, paint: Paint, width: Option<usize>) -> String {
    // Columns that would be empty for all are not shown.
    let caches = survey.asked.workers.iter().any(|worker| worker.cache.is_some());
    let rows = survey.asked.workers.iter().map(|worker| {
        let mut row = vec![
            worker.id.to_string(),
            state(worker).to_owned(),
            breaker(survey, worker),
            models(&worker.models),
            worker.requests.to_string(),
            worker.prefill_tokens.to_string(),
            blocks(worker),
            worker.url.clone(),
        ];
        if caches {
            row.splice(7..7, [known(worker.cache.as_ref().map(|cache| cache.blocks)), feed(worker)]);
        }
        row
    });
    let mut columns = vec![
        Column::kept("WORKER"),
        Column::kept("STATE"),
        Column::dropped(5, "BREAKER"),
        Column::dropped(7, "MODELS"),
        Column::kept(">LOAD"),
        Column::dropped(8, ">PREFILL"),
        Column::dropped(6, ">BLOCKS"),
        Column::dropped(9, "URL"),
    ];
    if caches {
        columns.splice(7..7, [Column::dropped(3, ">CACHED"), Column::dropped(4, "FEED")]);
    }
    render_within(&columns, rows.collect(), paint, width)
}

/// Who listens to the engine's events.
fn feed(worker: &WorkerStatus) -> String {
    let Some(cache) = &worker.cache else { return "-".to_owned() };
    let listeners = match (cache.known, &cache.owners[..]) {
        (Known::Predicted, _) => "predicted".to_owned(),
        (Known::Events, []) => "nobody".to_owned(),
        (Known::Events, owners) => owners.join(","),
    };
    if cache.recovering { format!("{listeners}, recovering") } else { listeners }
}

/// The worst of the replicas' breakers, and how many are that.
fn breaker(survey: &Survey, worker: &WorkerStatus) -> String {
    let states: Vec<BreakerState> = survey
        .replies()
        .filter_map(|reply| reply.workers.iter().find(|w| w.id == worker.id))
        .map(|worker| worker.breaker)
        .collect();
    let number = |wanted: BreakerState| states.iter().filter(|state| **state == wanted).count();
    let (open, half_open) = (number(BreakerState::Open), number(BreakerState::HalfOpen));
    let (word, n) = match (open, half_open) {
        (0, 0) => return "closed".to_owned(),
        (0, n) => ("half-open", n),
        (n, _) => ("open", n),
    };
    if states.len() > 1 { format!("{word} {n}/{}", states.len()) } else { word.to_owned() }
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

/// The newest errors of all replicas; what one says several times is one line.
/// Output streams, over all replicas that answered.
fn streams(survey: &Survey, width: Option<usize>) -> Option<String> {
    let all: Vec<_> = survey.replies().filter_map(|reply| reply.streams).collect();
    let sum = |read: fn(&StreamNumbers) -> u64| all.iter().map(read).sum::<u64>();
    if sum(|streams| streams.opened + streams.held + streams.copies + streams.kept) == 0 {
        return None;
    }
    let facts = [
        format!("streams: {} running", sum(|streams| streams.held)),
        format!("{} copies", sum(|streams| streams.copies)),
        format!("{} kept", sum(|streams| streams.kept)),
        format!("{:.1} MiB", sum(|streams| streams.bytes) as f64 / 1_048_576.0),
        format!("since the start {} opened", sum(|streams| streams.opened)),
        format!("{} resumed", sum(|streams| streams.resumed)),
        format!("{} taken over", sum(|streams| streams.taken_over)),
        format!("{} continued", sum(|streams| streams.continued)),
        format!("{} lost", sum(|streams| streams.lost)),
    ];
    Some(flow(&facts, "  ", width))
}

fn errors(survey: &Survey, paint: Paint, width: Option<usize>) -> Option<String> {
    let mut seen: BTreeMap<(&str, &str), (u64, usize)> = BTreeMap::new();
    for reply in survey.replies() {
        for error in &reply.recent_errors {
            let (age, times) = seen.entry((&reply.cluster.name, &error.what)).or_insert((error.at_ms_ago, 0));
            *age = error.at_ms_ago.min(*age);
            *times += 1;
        }
    }
    let mut all: Vec<_> =
        seen.into_iter().map(|((who, what), (age, times))| (age, who, what, times)).collect();
    all.sort_unstable();
    let left_out = all.len().saturating_sub(MOST_ERRORS);
    let name_width = all.iter().map(|(_, who, ..)| who.chars().count()).max()?;
    let mut lines = vec![paint.dim("RECENT ERRORS")];
    lines.extend(all.iter().take(MOST_ERRORS).map(|(age, who, what, times)| {
        let again = if *times > 1 { format!(" (x{times})") } else { String::new() };
        cut(&format!("  {:>9} ago  {who:name_width$}  {what}{again}", duration(*age)), width)
    }));
    if left_out > 0 {
        lines.push(paint.dim(&format!("  and {left_out} more; everline status -o json has them")));
    }
    Some(lines.join("\n"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::admin_types::RecentError;
    use crate::ids::ReplicaId;

    /// What r1 says of a cluster of three, of which r3 is silent.
    pub(crate) fn sample() -> StatusReply {
        let member = |id: u64, leads: bool, alive: bool| {
            serde_json::json!({
                "id": id,
                "info": { "name": format!("r{id}"), "peer": format!("10.0.0.{id}:8082"),
                          "http": format!("http://10.0.0.{id}:8080"), "admin": format!("http://10.0.0.{id}:8081"),
                          "version": "0.1.0" },
                "incarnation": 1, "membership": "voter", "alive": alive, "lag": null,
                "leads_control": leads, "leads_cache": leads, "requests": id * 7,
                "view_age_ms": match id { 1 => None, 2 => Some(240), _ => Some(18_000) },
            })
        };
        let worker = |id: &str, online: bool, drain: bool| {
            serde_json::json!({
                "id": id, "url": format!("http://{id}:8000"), "engine": "vllm", "role": "aggregated",
                "models": ["llama-3-8b", "llama-3-8b-sql"], "online": online, "drain": drain, "source": "config",
                "liveness": "probe", "requests": 21, "prefill_tokens": 4096, "decode_blocks": 350, "reachable": true,
                "breaker": if online { "closed" } else { "open" },
                "generation": 1, "weight": 100, "block_size": 16,
                "capacity_blocks": if online { Some(10_000) } else { None }, "last_heard_ms_ago": 120,
            })
        };
        let group = |name: &str, term: u64, applied: u64| {
            serde_json::json!({
                "group": name, "role": "follower", "term": term, "leader": 2, "last_log": applied, "committed": applied,
                "applied": applied, "checkpoint": 0, "first_log": 1, "log_bytes": 0, "digest": "", "quorum_age_ms": 10,
            })
        };
        let reply = serde_json::json!({
            "cluster": { "cluster_id": "3f9a2c1b77d04e55", "me": 1, "name": "r1", "incarnation": 4, "quorum": true,
                         "down": null, "groups": [group("control", 3, 120), group("cache", 3, 5310)],
                         "members": [member(1, false, true), member(2, true, true), member(3, false, false)] },
            "workers": [worker("gpu-1", true, false), worker("gpu-2", true, true), worker("gpu-10", false, false)],
            "version": "0.1.0", "uptime_s": 7384, "requests_total": 48_211,
            "recent_errors": [],
        });
        let mut reply: StatusReply = serde_json::from_value(reply).unwrap();
        let what = "gpu-10: connection refused, 1 request went to gpu-1 instead".to_owned();
        reply.recent_errors.push(RecentError { at_ms_ago: 3_200, what: what.clone() });
        reply.recent_errors.push(RecentError { at_ms_ago: 9_900, what });
        reply
    }

    /// The same, with what the leader r2 said when it was asked.
    fn survey() -> Survey {
        let mut leader = sample();
        leader.cluster.me = ReplicaId(2);
        leader.cluster.name = "r2".to_owned();
        leader.cluster.groups[1].term = 4;
        leader.uptime_s = 59;
        leader.recent_errors =
            vec![RecentError { at_ms_ago: 65_000, what: "gpu-10: closed the connection".to_owned() }];
        for (member, lag) in leader.cluster.members.iter_mut().zip([1, 0, 44]) {
            member.lag = Some(lag);
        }
        leader.workers[2].breaker = BreakerState::HalfOpen;
        Survey {
            asked: sample(),
            others: BTreeMap::from([(ReplicaId(2), leader)]),
            mute: Vec::new(),
            rates: BTreeMap::new(),
        }
    }

    const PLAIN: Paint = Paint { on: false };

    const PAGE: &str = "\
cluster 3f9a2c1b  quorum yes  leader r2  3 replicas (2 up)  3 workers (2 up)  42 in flight
answered by r1 (everline 0.1.0, up 2 h 3 m, 48211 requests since then)

REPLICA  ID  ROLE           STATE   TERM   APPLIED  LAG    VIEW  LOAD       UP  VERSION  HTTP
r1        1  voter          alive      3  120/5310    1       -     7  2 h 3 m  0.1.0    http://10.0.0.1:8080
r2        2  voter, leader  alive    3/4  120/5310    0  240 ms    14     59 s  0.1.0    http://10.0.0.2:8080
r3        3  voter          silent     -         -   44    18 s    21        -  0.1.0    http://10.0.0.3:8080

WORKER  STATE     BREAKER   MODELS         LOAD  PREFILL     BLOCKS  URL
gpu-1   online    closed    llama-3-8b +1    21     4096  350/10000  http://gpu-1:8000
gpu-2   draining  closed    llama-3-8b +1    21     4096  350/10000  http://gpu-2:8000
gpu-10  offline   open 1/2  llama-3-8b +1    21     4096        350  http://gpu-10:8000

RECENT ERRORS
        3 s ago  r1  gpu-10: connection refused, 1 request went to gpu-1 instead (x2)
    1 m 5 s ago  r2  gpu-10: closed the connection
";

    #[test]
    fn the_page_looks_like_this() {
        let page = page(&survey(), PLAIN, None);
        assert!(page == PAGE, "{page}");
        assert!(self::page(&survey(), PLAIN, Some(120)) == PAGE);
    }

    const NARROW: &str = "\
cluster 3f9a2c1b  quorum yes  leader r2  3 replicas (2 up)
3 workers (2 up)  42 in flight
answered by r1 (everline 0.1.0, up 2 h 3 m,
48211 requests since then)

REPLICA  ROLE           STATE   LAG    VIEW  LOAD       UP
r1       voter          alive     1       -     7  2 h 3 m
r2       voter, leader  alive     0  240 ms    14     59 s
r3       voter          silent   44    18 s    21        -

WORKER  STATE     BREAKER   MODELS         LOAD     BLOCKS
gpu-1   online    closed    llama-3-8b +1    21  350/10000
gpu-2   draining  closed    llama-3-8b +1    21  350/10000
gpu-10  offline   open 1/2  llama-3-8b +1    21        350

RECENT ERRORS
        3 s ago  r1  gpu-10: connection refused, 1 request …
    1 m 5 s ago  r2  gpu-10: closed the connection
";

    #[test]
    fn on_a_narrow_terminal_the_least_important_columns_go() {
        let page = page(&survey(), PLAIN, Some(60));
        assert!(page == NARROW, "{page}");
        let smallest = self::page(&survey(), PLAIN, Some(10));
        for kept in ["REPLICA", "ROLE", "STATE", "LOAD", "WORKER"] {
            assert!(smallest.contains(kept), "{smallest}");
        }
    }

    #[test]
    fn who_watches_sees_rates_and_who_does_not_answer() {
        let mut survey = survey();
        survey.rates = BTreeMap::from([(ReplicaId(1), 12.25), (ReplicaId(2), 0.5)]);
        survey.mute = vec![ReplicaId(2)];
        let page = page(&survey, PLAIN, None);
        assert!(page.contains("12.8 requests/s") && page.contains("REQ/S"), "{page}");
        assert!(page.contains("r2 did not answer at http://10.0.0.2:8081"), "{page}");
    }

    #[test]
    fn caches_are_shown_with_who_listens_where_something_is_known() {
        use crate::admin_types::CacheStatus;
        let mut survey = survey();
        let cache = |known, recovering, owners: &[&str]| {
            let owners = owners.iter().map(|name| (*name).to_owned()).collect();
            Some(CacheStatus { blocks: 512, known, recovering, owners })
        };
        survey.asked.workers[0].cache = cache(Known::Events, true, &["r1", "r2"]);
        survey.asked.workers[1].cache = cache(Known::Predicted, false, &[]);
        let page = page(&survey, PLAIN, None);
        let lines: Vec<&str> =
            page.lines().filter(|line| line.starts_with("gpu-") || line.starts_with("WORKER")).collect();
        for (line, part) in lines.iter().zip([
            "BLOCKS  CACHED  FEED               URL",
            "350/10000     512  r1,r2, recovering  http://gpu-1:8000",
            "350/10000     512  predicted          http://gpu-2:8000",
            "      350       -  -                  http://gpu-10:8000",
        ]) {
            assert!(line.ends_with(part), "{page}");
        }
    }

    #[test]
    fn colours_do_not_move_columns() {
        let painted = page(&survey(), Paint { on: true }, None);
        let mut plain = String::new();
        let mut rest = painted.as_str();
        while let Some(at) = rest.find('\x1b') {
            plain.push_str(&rest[..at]);
            rest = &rest[at + 1 + rest[at..].find('m').unwrap()..];
        }
        plain.push_str(rest);
        assert_eq!(plain, PAGE);
        assert!(painted.len() > PAGE.len());
    }

    #[test]
    fn a_cluster_without_anything_says_what_to_do() {
        let mut survey = survey();
        survey.asked.workers.clear();
        survey.asked.cluster.cluster_id.clear();
        let page = page(&survey, PLAIN, None);
        assert!(page.contains("cluster none") && page.contains("everline worker add"), "{page}");
    }

    #[test]
    fn many_errors_are_cut_with_a_word_about_the_rest() {
        let mut survey = survey();
        survey.asked.recent_errors =
            (0..16).map(|n| RecentError { at_ms_ago: n * 1000, what: format!("error {n}") }).collect();
        let page = page(&survey, PLAIN, None);
        assert!(page.contains("error 9\n") && !page.contains("error 10\n"), "{page}");
        assert!(page.contains("and 7 more"), "{page}");
    }
}
