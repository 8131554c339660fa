//! `everline stream`

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use http::Method;
use serde::Serialize;

use super::client::{Client, Listing, Server, block_on};
use super::output::{Failure, Out, Paint};
use super::table::{Column, duration, render_within};
use crate::admin_types::{
    MembersReply, MessageReply, StreamAtAgent, StreamCopy, StreamReply, StreamStatus, StreamsReply,
};

const STREAMS: &str = "/v1/admin/streams";
const MEMBERS: &str = "/v1/admin/members";
/// How long one replica may take to say what it has of a stream.
const ANSWER: Duration = Duration::from_secs(2);

/// Look at output streams, and end them
///
/// Never shows anything of what is in them.
///
/// Examples:
///   everline stream list                      those that run
///   everline stream list --state failed --model m --limit 20
///   everline stream show st_...               which replicas have copies of it
///   everline stream cancel st_...
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List streams
    List {
        /// Also those that have ended and are kept
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        page: Page,
        #[command(flatten)]
        listing: Listing,
    },
    /// Show one stream, and which replicas have copies
    Show {
        /// Its id: st_ and 26 characters
        id: String,
        #[command(flatten)]
        listing: Listing,
    },
    /// End a stream
    Cancel {
        /// Its id: st_ and 26 characters
        id: String,
        #[command(flatten)]
        server: Server,
    },
}

/// Which streams are listed.
#[derive(clap::Args, Debug)]
struct Page {
    /// Only those: running, completed, failed, cancelled; several with commas
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    state: Vec<String>,
    /// Only those of a model
    #[arg(long)]
    model: Option<String>,
    /// Only those whose ids come after this one: the last one of the page before
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Most streams, 1 to 1000
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

impl Page {
    /// As a path with a query.
    fn path(&self, all: bool) -> Result<String, Failure> {
        let mut path = format!("{STREAMS}?limit={}", self.limit);
        if all {
            path += "&all=true";
        }
        if !self.state.is_empty() {
            path += &format!("&state={}", encoded(&self.state.join(",")));
        }
        if let Some(model) = &self.model {
            path += &format!("&model={}", encoded(model));
        }
        if let Some(after) = &self.after {
            path += &format!("&after={}", checked(after)?);
        }
        Ok(path)
    }
}

/// Text as a value in a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~,/:".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            match self.command {
                Command::List { all, page, listing } => {
                    let reply = page_of(&listing.server.client()?, &page.path(all)?).await?;
                    if listing.json {
                        out.json(&reply)
                    } else {
                        out.write(&list(&reply, out.paint(), out.width()))
                    }
                }
                Command::Show { id, listing } => {
                    let id = checked(&id)?;
                    let shown = look(&listing.server.client()?, id).await?;
                    if listing.json {
                        out.json(&shown)
                    } else {
                        out.write(&shown.page(out.paint(), out.width()))
                    }
                }
                Command::Cancel { id, server } => {
                    let path = format!("{STREAMS}/{}/cancel", checked(&id)?);
                    let reply: MessageReply = server.client()?.call(Method::POST, &path, None::<&()>).await?;
                    out.line(&reply.message)
                }
            }
        })
    }
}

/// An id that can stand in a path.
fn checked(id: &str) -> Result<&str, Failure> {
    match crate::ids::StreamId::parse(id) {
        Some(_) => Ok(id),
        None => Err(Failure::Usage(format!(
            "{id:?} is no stream's id: st_ and 26 characters, as everline stream list and the header \
             Everline-Stream show it"
        ))),
    }
}

/// A page of streams. What a replica knows only of streams that it has itself is asked of all members;
/// those that do not answer leave gaps.
async fn page_of(client: &Client, path: &str) -> Result<StreamsReply, Failure> {
    let mut page: StreamsReply = client.get(path).await?;
    if page.streams.iter().all(is_whole) {
        return Ok(page);
    }
    let Ok(members) = client.get::<MembersReply>(MEMBERS).await else { return Ok(page) };
    let asked = members.members.iter().map(|member| async {
        let there = client.of(&member.info.admin).ok()?.with_timeout(ANSWER);
        there.get::<StreamsReply>(path).await.ok()
    });
    for said in join_all(asked).await.into_iter().flatten() {
        fill(&mut page, said);
    }
    Ok(page)
}

fn is_whole(stream: &StreamStatus) -> bool {
    stream.worker.is_some() && stream.age_s.is_some()
}

/// Takes what is not known yet from another replica's page, which may have been made a moment later.
fn fill(page: &mut StreamsReply, said: StreamsReply) {
    let mut said: BTreeMap<String, StreamStatus> =
        said.streams.into_iter().map(|stream| (stream.id.clone(), stream)).collect();
    for stream in &mut page.streams {
        let Some(other) = said.remove(&stream.id) else { continue };
        stream.worker = stream.worker.take().or(other.worker);
        stream.key = stream.key.take().or(other.key);
        stream.age_s = stream.age_s.or(other.age_s);
    }
}

/// A stream, as all replicas know it.
#[derive(Debug, Serialize)]
struct Shown {
    id: String,
    /// What the cluster says.
    stream: Option<StreamStatus>,
    /// What each replica has, by its name.
    copies: BTreeMap<String, StreamCopy>,
    /// What the node agent says that generates it.
    agent: Option<StreamAtAgent>,
    /// Names of members that did not answer.
    mute: Vec<String>,
}

async fn look(client: &Client, id: &str) -> Result<Shown, Failure> {
    let members: MembersReply = client.get(MEMBERS).await?;
    let path = format!("{STREAMS}/{id}");
    let asked = members.members.iter().map(|member| async {
        let reply = async {
            let there = client.of(&member.info.admin)?.with_timeout(ANSWER);
            // A replica that knows nothing of it says so with 404.
            there.raw(Method::GET, &path, None::<&()>).await
        };
        (member.info.name.clone(), reply.await)
    });
    let (copies, mute) = (BTreeMap::new(), Vec::new());
    let mut shown = Shown { id: id.to_owned(), stream: None, copies, agent: None, mute };
    for (name, answer) in join_all(asked).await {
        match answer {
            Ok((status, bytes)) if status.is_success() => {
                let Ok(reply) = serde_json::from_slice::<StreamReply>(&bytes) else {
                    shown.mute.push(name);
                    continue;
                };
                // Of what they say the newest counts.
                let newer =
                    |is: &StreamStatus| shown.stream.as_ref().is_none_or(|was| was.attempt < is.attempt);
                if reply.stream.as_ref().is_some_and(newer) {
                    shown.stream = reply.stream;
                }
                shown.copies.extend(reply.copy.map(|copy| (name, copy)));
                shown.agent = shown.agent.take().or(reply.agent);
            }
            Ok((status, _)) if status.as_u16() == 404 => {}
            Ok(_) | Err(_) => shown.mute.push(name),
        }
    }
    if shown.stream.is_none() && shown.copies.is_empty() {
        let mute = match &shown.mute[..] {
            [] => String::new(),
            names => format!("; {} did not answer", names.join(", ")),
        };
        return Err(Failure::Failed(format!("no replica knows stream {id}, or it is forgotten{mute}")));
    }
    Ok(shown)
}

fn dash(value: Option<impl ToString>) -> String {
    value.map_or("-".to_owned(), |value| value.to_string())
}

fn list(reply: &StreamsReply, paint: Paint, width: Option<usize>) -> String {
    if reply.streams.is_empty() {
        return "no such stream; with --all those are shown, too, that have ended and are kept\n".to_owned();
    }
    let rows = reply.streams.iter().map(|stream| {
        vec![
            stream.id.clone(),
            stream.state.clone(),
            stream.model.clone(),
            stream.holder.clone(),
            dash(stream.mirror.as_ref()),
            stream.attempt.to_string(),
            dash(stream.worker.as_ref()),
            stream.age_s.map_or("-".to_owned(), |seconds| duration(seconds.saturating_mul(1000))),
            dash(stream.key.as_ref()),
        ]
    });
    let columns = [
        Column::kept("STREAM"),
        Column::kept("STATE"),
        Column::dropped(3, "MODEL"),
        Column::kept("HOLDER"),
        Column::dropped(4, "COPY AT"),
        Column::dropped(6, ">ATTEMPT"),
        Column::dropped(1, "WORKER"),
        Column::dropped(2, ">AGE"),
        Column::dropped(5, "KEY"),
    ];
    let table = render_within(&columns, rows.collect(), paint, width);
    let last = reply.streams.last().filter(|_| reply.more);
    let more = last.map(|last| format!("\n\nthere are more: --after {}", last.id)).unwrap_or_default();
    format!("{table}{more}\n")
}

impl Shown {
    fn page(&self, paint: Paint, width: Option<usize>) -> String {
        let mut text = match &self.stream {
            Some(stream) => format!(
                "{}  {}  {}  held by {}, attempt {}\n",
                paint.bold(&self.id),
                stream.state,
                stream.model,
                stream.holder,
                stream.attempt
            ),
            None => format!("{}  not listed by the cluster\n", paint.bold(&self.id)),
        };
        let newest = self.copies.values().max_by_key(|copy| (copy.attempt, copy.events));
        if let Some(copy) = newest {
            text += &format!(
                "{}  worker {}  {}  key {}  request {}\n",
                copy.route,
                dash(copy.worker.as_ref()),
                dash(copy.resumable.as_ref()),
                dash(copy.key.as_ref()),
                copy.request_id
            );
        }
        let rows = self.copies.iter().map(|(name, copy)| {
            vec![
                name.clone(),
                copy.role.clone(),
                copy.state.clone(),
                copy.attempt.to_string(),
                copy.events.to_string(),
                copy.clients.to_string(),
                copy.bytes.to_string(),
                duration(copy.age_ms),
            ]
        });
        let agent = self.agent.iter().map(|agent| {
            let (attempt, events) = (agent.attempt.to_string(), agent.events.to_string());
            let mut row = vec![agent.name.clone(), "holder".to_owned(), agent.state.clone(), attempt, events];
            row.extend(std::iter::repeat_n("-".to_owned(), 3));
            row
        });
        let rows = rows.chain(agent);
        let columns = [
            Column::kept("AT"),
            Column::kept("HAS IT AS"),
            Column::kept("STATE"),
            Column::dropped(2, ">ATTEMPT"),
            Column::kept(">EVENTS"),
            Column::dropped(1, ">CLIENTS"),
            Column::dropped(4, ">BYTES"),
            Column::dropped(3, ">SINCE"),
        ];
        match self.copies.is_empty() && self.agent.is_none() {
            true => text += "\nno replica has a copy of it any more\n",
            false => text += &format!("\n{}\n", render_within(&columns, rows.collect(), paint, width)),
        }
        if !self.mute.is_empty() {
            text += &format!("\ndid not answer: {}\n", self.mute.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { on: false };
    const ID: &str = "st_aaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn stream() -> StreamStatus {
        StreamStatus {
            id: ID.to_owned(),
            state: "running".to_owned(),
            model: "m".to_owned(),
            holder: "r2".to_owned(),
            mirror: Some("r1".to_owned()),
            attempt: 2,
            worker: None,
            key: None,
            age_s: None,
        }
    }

    fn copy(role: &str) -> StreamCopy {
        StreamCopy {
            role: role.to_owned(),
            state: "running".to_owned(),
            attempt: 2,
            events: 40,
            bytes: 9000,
            clients: 1,
            age_ms: 2500,
            worker: Some("w".to_owned()),
            resumable: Some("continue".to_owned()),
            route: "/v1/completions".to_owned(),
            key: None,
            request_id: "x".to_owned(),
        }
    }

    #[test]
    fn a_stream_is_shown_with_all_its_copies() {
        let copies = BTreeMap::from([("r1".to_owned(), copy("copy")), ("r2".to_owned(), copy("holder"))]);
        let agent = StreamAtAgent {
            name: "agent of w".to_owned(),
            state: "running".to_owned(),
            attempt: 2,
            events: 41,
            worker: Some("w".to_owned()),
        };
        let mute = vec!["r3".to_owned()];
        let shown = Shown { id: ID.to_owned(), stream: Some(stream()), copies, agent: Some(agent), mute };
        let page = shown.page(PLAIN, None);
        let expected = "\
st_aaaaaaaaaaaaaaaaaaaaaaaaaa  running  m  held by r2, attempt 2
/v1/completions  worker w  continue  key -  request x

AT          HAS IT AS  STATE    ATTEMPT  EVENTS  CLIENTS  BYTES  SINCE
r1          copy       running        2      40        1   9000    2 s
r2          holder     running        2      40        1   9000    2 s
agent of w  holder     running        2      41        -      -      -

did not answer: r3
";
        assert!(page == expected, "{page}");
    }

    #[test]
    fn streams_are_listed_and_their_ids_checked() {
        let mut page = StreamsReply { streams: vec![stream()], more: true };
        let known = StreamStatus {
            worker: Some("gpu-7".to_owned()),
            key: Some("team".to_owned()),
            age_s: Some(90),
            ..stream()
        };
        let other = StreamStatus { id: ID.replace('a', "b"), ..stream() };
        fill(&mut page, StreamsReply { streams: vec![other, known], more: false });
        assert!(page.streams.len() == 1 && is_whole(&page.streams[0]) && !is_whole(&stream()));
        let page = list(&page, PLAIN, None);
        let row = page.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(row[..7], [ID, "running", "m", "r2", "r1", "2", "gpu-7"], "{page}");
        assert!(row.last() == Some(&"team") && page.contains(&format!("--after {ID}")), "{page}");
        assert!(list(&StreamsReply { streams: Vec::new(), more: false }, PLAIN, None).contains("--all"));
        let wanted = Page {
            state: vec!["failed".to_owned(), "cancelled".to_owned()],
            model: Some("org/a&b c".to_owned()),
            after: Some(ID.to_owned()),
            limit: 7,
        };
        let path =
            format!("{STREAMS}?limit=7&all=true&state=failed,cancelled&model=org/a%26b%20c&after={ID}");
        assert_eq!(wanted.path(true).unwrap(), path);
        assert!(checked(ID).is_ok());
        assert!(matches!(checked("../workers"), Err(Failure::Usage(_))));
    }
}
