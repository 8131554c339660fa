//! `everline explain`

use std::collections::BTreeMap;
use std::path::PathBuf;

use http::Method;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::client::{Listing, block_on};
use super::output::{Failure, Out, Paint};
use super::table::{Column, count, duration, flow, render_within};
use crate::admin_types::{CandidateReply, ExplainReply, ExplainRequest, PrefillReply};

/// From when on the view of others' bookings is worth a word.
const OLD_VIEW_MS: u64 = 100;

/// Show where a request would go and why, without sending it
///
/// The replica that is asked looks at the prompt as it would for a client: it makes token ids of
/// it, looks them up in the prefix index, and reckons what each worker would cost.
///
/// Examples:
///   everline explain --model llama-3-8b --prompt 'Tell me a story'
///   everline explain --file request.json --route /v1/completions
///   everline explain --model llama-3-8b --tokens 1,2,3 --policy least_loaded
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Model or adapter
    #[arg(long, value_name = "NAME", required_unless_present = "file", conflicts_with = "file")]
    model: Option<String>,
    /// Text to ask about: a user's message, or the prompt of a completion
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["file", "tokens"])]
    prompt: Option<String>,
    /// Token ids to ask about, as the prompt of a completion
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "file")]
    tokens: Vec<u32>,
    /// File with the body of a request; - reads standard input
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Route that the request is for [default: /v1/chat/completions, with --tokens /v1/completions]
    #[arg(long, value_name = "PATH")]
    route: Option<String>,
    /// Another policy than the configured one
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// A header of the request, such as 'x-session-id: 7'; may be given more than once
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    #[command(flatten)]
    listing: Listing,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected NAME: VALUE")?;
    Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let request = self.request()?;
        let reply: ExplainReply = block_on(async {
            self.listing.server.client()?.call(Method::POST, "/v1/admin/explain", Some(&request)).await
        })?;
        if self.listing.json { out.json(&reply) } else { out.write(&page(&reply, out.paint(), out.width())) }
    }

    fn request(&self) -> Result<ExplainRequest, Failure> {
        let route = match (&self.route, self.tokens.is_empty()) {
            (Some(route), _) => route.clone(),
            (None, true) => "/v1/chat/completions".to_owned(),
            (None, false) => "/v1/completions".to_owned(),
        };
        let mut headers: BTreeMap<String, String> = self.headers.iter().cloned().collect();
        if let Some(policy) = &self.policy {
            headers.insert("everline-policy".to_owned(), policy.clone());
        }
        let text = match &self.file {
            Some(path) => read(path)?,
            None => self.body(&route).to_string(),
        };
        let body = RawValue::from_string(text)
            .map_err(|why| Failure::Usage(format!("--file: the request is not valid JSON: {why}")))?;
        Ok(ExplainRequest { route, headers, body })
    }

    fn body(&self, route: &str) -> Value {
        let (model, prompt) = (&self.model, self.prompt.as_deref().unwrap_or_default());
        if !self.tokens.is_empty() {
            return json!({"model": model, "prompt": self.tokens});
        }
        match route {
            "/v1/completions" | "/tokenize" => json!({"model": model, "prompt": prompt}),
            "/v1/embeddings" | "/v1/responses" => json!({"model": model, "input": prompt}),
            _ => json!({"model": model, "messages": [{"role": "user", "content": prompt}]}),
        }
    }
}

fn read(path: &std::path::Path) -> Result<String, Failure> {
    if path.as_os_str() == "-" {
        return std::io::read_to_string(std::io::stdin())
            .map_err(|why| Failure::Usage(format!("--file: cannot read standard input: {why}")));
    }
    std::fs::read_to_string(path)
        .map_err(|why| Failure::Usage(format!("--file: cannot read {}: {why}", path.display())))
}

/// The whole page.
fn page(reply: &ExplainReply, paint: Paint, width: Option<usize>) -> String {
    let mut facts = vec![
        format!("policy {}", reply.policy),
        format!("{} {}", count(reply.prompt_tokens as usize, "prompt token"), origin(&reply.source)),
        format!("asked of {}", reply.replica),
    ];
    if let Some(model) = &reply.model {
        facts.insert(0, format!("model {model}"));
    }
    if reply.view_age_ms >= OLD_VIEW_MS {
        facts.push(format!("others' bookings {} old", duration(reply.view_age_ms)));
    }
    let mut parts = vec![flow(&facts, "  ", width), paint.bold(&verdict(reply)), table(reply, paint, width)];
    if reply.more > 0 {
        parts.push(paint.dim(&format!("and {} more", count(reply.more, "candidate"))));
    }
    let of_prefill = reply.prefill.clone().map(|prefill| {
        let PrefillReply { policy, candidates, more } = prefill;
        ExplainReply {
            policy,
            candidates,
            more,
            waits: false,
            last_resort: false,
            prefill: None,
            ..reply.clone()
        }
    });
    if let Some(prefill) = &of_prefill {
        let text = format!("for the prefill (policy {}) {}", prefill.policy, verdict(prefill));
        parts.extend([paint.bold(&text), table(prefill, paint, width)]);
        if prefill.more > 0 {
            parts.push(paint.dim(&format!("and {} more", count(prefill.more, "candidate"))));
        }
    }
    let costed = of_prefill.iter().chain([reply]).flat_map(|reply| &reply.candidates);
    if costed.into_iter().any(|candidate| candidate.terms.is_some()) {
        let legend = "cost in blocks = QUEUED (prefill that waits there) + PROMPT (this one's) - CREDIT (what is \
                      cached of it) + DECODE (what runs there); the least is chosen";
        let words: Vec<String> = legend.split(' ').map(str::to_owned).collect();
        let legend = flow(&words, " ", width);
        parts.push(legend.lines().map(|line| paint.dim(line)).collect::<Vec<_>>().join("\n"));
    }
    parts.join("\n\n") + "\n"
}

fn origin(source: &str) -> &str {
    match source {
        "ids" => "(ids of the client)",
        "tokenizer" => "(counted by the tokenizer here)",
        "engine" => "(counted by an engine)",
        "text" => "(estimated; prefixes are compared as text)",
        _ => "(estimated; no prefix is known)",
    }
}

/// The answer in a sentence.
fn verdict(reply: &ExplainReply) -> String {
    let chosen: Vec<&CandidateReply> = reply
        .candidates
        .iter()
        .filter(|candidate| candidate.share.is_some_and(|share| share > 0.0))
        .collect();
    let least_bad = if reply.last_resort { ", for want of a better one" } else { "" };
    match chosen[..] {
        _ if reply.waits => {
            "it would wait in line: all workers have all the requests they should have".to_owned()
        }
        [] => "it would be refused: no worker may be chosen".to_owned(),
        [one] => format!("it would go to {}{least_bad}", name(reply, one)),
        [first, ..] => format!(
            "it would go to one of {} by chance, most often to {}{least_bad}",
            chosen.len(),
            name(reply, first)
        ),
    }
}

/// The worker, with its rank where it has several.
fn name(reply: &ExplainReply, candidate: &CandidateReply) -> String {
    let ranked =
        reply.candidates.iter().any(|other| other.worker == candidate.worker && other.rank != candidate.rank);
    if ranked { format!("{}/{}", candidate.worker, candidate.rank) } else { candidate.worker.to_string() }
}

/// A load, with what the engine's own figures make of it.
fn corrected(load: i64, correction: i64) -> String {
    if correction == 0 { load.to_string() } else { format!("{load} ({correction:+})") }
}

fn table(reply: &ExplainReply, paint: Paint, width: Option<usize>) -> String {
    let number = |cost: Option<f64>| cost.map_or("-".to_owned(), |cost| format!("{cost:.1}"));
    let rows = reply.candidates.iter().map(|candidate| {
        let (held, terms) = (candidate.overlap, candidate.terms);
        let blocks = held.gpu + held.host + held.disk + candidate.coming;
        let tokens = u64::from(blocks) * u64::from(candidate.block_size);
        let cached = match (100 * tokens).checked_div(u64::from(reply.prompt_tokens)) {
            Some(share) => format!("{} %", share.min(100)),
            None => "-".to_owned(),
        };
        vec![
            name(reply, candidate),
            candidate.share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0)),
            cached,
            held.gpu.to_string(),
            held.host.to_string(),
            held.disk.to_string(),
            candidate.coming.to_string(),
            corrected(candidate.load.requests, candidate.correction.requests),
            corrected(candidate.load.prefill_tokens, candidate.correction.prefill_tokens),
            corrected(candidate.load.decode_blocks, candidate.correction.decode_blocks),
            number(candidate.cost),
            number(terms.map(|terms| terms.queued)),
            number(terms.map(|terms| terms.prompt)),
            number(terms.map(|terms| terms.credit)),
            number(terms.map(|terms| terms.decode)),
            candidate.not_chosen.clone().unwrap_or_default(),
        ]
    });
    let columns = [
        Column::kept("WORKER"),
        Column::kept(">CHOSEN"),
        Column::kept(">CACHED"),
        Column::dropped(1, ">GPU"),
        Column::dropped(2, ">HOST"),
        Column::dropped(3, ">DISK"),
        Column::dropped(4, ">COMING"),
        Column::kept(">LOAD"),
        Column::dropped(6, ">PREFILL"),
        Column::dropped(5, ">BLOCKS"),
        Column::kept(">COST"),
        Column::dropped(10, ">QUEUED"),
        Column::dropped(9, ">PROMPT"),
        Column::dropped(8, ">CREDIT"),
        Column::dropped(7, ">DECODE"),
        Column::kept("WHY NOT"),
    ];
    render_within(&columns, rows.collect(), paint, width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_types::{CostReply, TierBlocks};
    use crate::ids::WorkerId;
    use crate::state::load::LoadSum;

    const PLAIN: Paint = Paint { on: false };

    fn candidate(worker: &str, share: f64, gpu: u32, why: Option<&str>) -> CandidateReply {
        let prompt = 13.2;
        let credit = f64::from(gpu) * 3.3;
        CandidateReply {
            worker: WorkerId::parse(worker).unwrap(),
            rank: 0,
            share: Some(share),
            overlap: TierBlocks { gpu, host: 0, disk: 0 },
            coming: 0,
            block_size: 16,
            load: LoadSum { requests: 2, prefill_tokens: 32, decode_blocks: 9 },
            correction: LoadSum::default(),
            cost: Some(2.0 + prompt - credit + 0.8),
            terms: Some(CostReply { queued: 2.0, prompt, credit, decode: 0.8 }),
            not_chosen: why.map(str::to_owned),
        }
    }

    fn reply(candidates: Vec<CandidateReply>) -> ExplainReply {
        ExplainReply {
            replica: "r1".to_owned(),
            model: Some("m".to_owned()),
            policy: "kv_cost".to_owned(),
            prompt_tokens: 64,
            source: "tokenizer".to_owned(),
            view_age_ms: 3,
            waits: false,
            last_resort: false,
            candidates,
            more: 0,
            prefill: None,
        }
    }

    const PAGE: &str = "\
model m  policy kv_cost  64 prompt tokens (counted by the tokenizer here)  asked of r1

it would go to e2

WORKER  CHOSEN  CACHED  GPU  HOST  DISK  COMING  LOAD  PREFILL  BLOCKS  COST  QUEUED  PROMPT  CREDIT  DECODE  WHY NOT
e2       100 %    75 %    3     0     0       0     2       32       9   6.1     2.0    13.2     9.9     0.8
e1         0 %     0 %    0     0     0       0     2       32       9  16.0     2.0    13.2     0.0     0.8
e3         0 %   100 %    4     0     0       0     2       32       9   2.8     2.0    13.2    13.2     0.8  draining

cost in blocks = QUEUED (prefill that waits there) + PROMPT (this one's) - CREDIT (what is cached of it) + DECODE (what runs there); the least is chosen
";

    #[test]
    fn the_page_says_who_and_why_and_why_not() {
        let candidates = vec![
            candidate("e2", 1.0, 3, None),
            candidate("e1", 0.0, 0, None),
            candidate("e3", 0.0, 4, Some("draining")),
        ];
        let page = page(&reply(candidates), PLAIN, None);
        assert!(page == PAGE, "{page}");
    }

    #[test]
    fn a_correction_is_told_beside_the_load_that_it_is_in() {
        let mut other = candidate("e1", 1.0, 0, None);
        other.load = LoadSum { requests: 12, prefill_tokens: 32, decode_blocks: 2 };
        other.correction = LoadSum { requests: 10, prefill_tokens: 0, decode_blocks: -7 };
        let page = page(&reply(vec![other.clone()]), PLAIN, None);
        let (head, row) = (page.lines().nth(4).unwrap(), page.lines().nth(5).unwrap());
        let column = |name: &str| {
            let end = head.find(name).unwrap() + name.len();
            row[..end].rsplit("  ").next().unwrap().trim()
        };
        assert_eq!(["LOAD", "PREFILL", "BLOCKS"].map(column), ["12 (+10)", "32", "2 (-7)"], "{page}");
        let told = serde_json::to_value(&other).unwrap();
        assert_eq!(told["correction"]["requests"], 10);
        other.correction = LoadSum::default();
        assert!(serde_json::to_value(&other).unwrap().get("correction").is_none(), "seldom there");
    }

    #[test]
    fn chance_waiting_and_refusal_are_told_apart() {
        let mut two = reply(vec![candidate("e1", 0.52, 0, None), candidate("e2", 0.48, 0, None)]);
        assert_eq!(verdict(&two), "it would go to one of 2 by chance, most often to e1");
        two.candidates[1].worker = two.candidates[0].worker.clone();
        two.candidates[1].rank = 1;
        two.last_resort = true;
        assert!(verdict(&two).ends_with("most often to e1/0, for want of a better one"));
        let mut none = reply(vec![candidate("e1", 0.0, 0, Some("offline"))]);
        assert!(verdict(&none).contains("refused"));
        none.waits = true;
        assert!(verdict(&none).contains("wait in line"));
    }

    #[test]
    fn a_narrow_terminal_keeps_who_and_why_not() {
        let page = page(&reply(vec![candidate("e1", 1.0, 0, Some("offline"))]), PLAIN, Some(60));
        assert!(page.lines().all(|line| line.chars().count() <= 80), "{page}");
        assert!(page.contains("WHY NOT") && page.contains("offline") && !page.contains(">QUEUED"), "{page}");
    }

    #[test]
    fn the_body_is_what_a_client_would_send() {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            args: Args,
        }
        let of = |line: &str| {
            let args = <Alone as clap::Parser>::parse_from(line.split_whitespace()).args;
            let request = args.request().unwrap();
            (request.route.clone(), request.body.get().to_owned(), request.headers)
        };
        let (route, body, headers) = of("x --model m --tokens 1,2,3 --policy random -H X-Session-Id:7");
        assert_eq!((route.as_str(), body.as_str()), ("/v1/completions", r#"{"model":"m","prompt":[1,2,3]}"#));
        assert_eq!((headers["everline-policy"].as_str(), headers["x-session-id"].as_str()), ("random", "7"));
        let (route, body, _) = of("x --model m --prompt hi");
        assert_eq!(route, "/v1/chat/completions");
        assert_eq!(body, r#"{"messages":[{"content":"hi","role":"user"}],"model":"m"}"#);
        let (_, body, _) = of("x --model m --prompt hi --route /v1/embeddings");
        assert_eq!(body, r#"{"input":"hi","model":"m"}"#);
    }
}
