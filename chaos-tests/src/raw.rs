//! HTTP as bytes: workers that answer whatever a test wants, and clients that send it.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Most bytes kept of one message, so that a fault of the other end does not fill the memory.
const MOST: usize = 64 << 20;

/// A request as a worker has received it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// From the request line to the empty line.
    pub head: String,
    /// As long as the head says.
    pub body: Vec<u8>,
    /// Counts the requests of its connection, from 0.
    pub nth: usize,
}

impl Seen {
    /// Whether the client asked for events.
    pub fn is_stream(&self) -> bool {
        let body: Result<serde_json::Value, _> = serde_json::from_slice(&self.body);
        body.is_ok_and(|body| body["stream"] == true)
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// A header's value in a raw head.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = head.lines().filter_map(|line| line.split_once(':'));
    pairs.find_map(|(is, value)| is.eq_ignore_ascii_case(name).then(|| value.trim()))
}

/// What is done with the connection after a script has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next request is read.
    KeepAlive,
    /// It is closed, with a reset if there is something unread.
    Close,
    /// It is closed with a reset.
    Reset,
}

/// A worker over raw TCP. It is healthy, keeps a list of what it was sent, and lets a script
/// answer; nothing of it outlives it.
#[derive(Debug)]
pub struct RawWorker {
    /// Where it listens.
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl RawWorker {
    /// Starts one on a free port; `script` answers everything that is not a health probe.
    pub async fn start<S, F>(script: S) -> Self
    where
        S: Fn(TcpStream, Seen) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = (TcpStream, Then)> + Send + 'static,
    {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), script).await.expect("a free port")
    }

    /// Starts one at this address.
    pub async fn start_at<S, F>(address: SocketAddr, script: S) -> io::Result<Self>
    where
        S: Fn(TcpStream, Seen) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = (TcpStream, Then)> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let list = seen.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task, and its connections with it.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(converse(stream, list.clone(), script.clone()));
            }
        });
        Ok(Self { address, seen, task })
    }

    /// What it was sent so far, health probes left out.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what it was sent, and says what that was.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for RawWorker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn converse<S, F>(mut stream: TcpStream, list: Arc<Mutex<Vec<Seen>>>, script: S)
where
    S: Fn(TcpStream, Seen) -> F,
    F: Future<Output = (TcpStream, Then)>,
{
    for nth in 0.. {
        let Some(seen) = read_request(&mut stream, nth).await else { return };
        if seen.head.starts_with("GET /health ") {
            if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
                return;
            }
            continue;
        }
        list.lock().unwrap_or_else(PoisonError::into_inner).push(seen.clone());
        let then;
        (stream, then) = script(stream, seen).await;
        match then {
            Then::KeepAlive => {}
            Then::Close => return,
            Then::Reset => {
                // Without it the end is an ordinary close, and the test that wants a reset fails.
                let _ = stream.set_zero_linger();
                return;
            }
        }
    }
}

/// Reads a message with a `Content-Length`, a chunked one (its frame as it came), or one
/// without a body; `None` when the connection ends or what comes is none.
async fn read_request(stream: &mut TcpStream, nth: usize) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        if head.len() > 1 << 20 {
            return None;
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut body = Vec::new();
    if header(&head, "transfer-encoding").is_some() {
        while !body.ends_with(b"0\r\n\r\n") && body.len() < MOST {
            body.push(stream.read_u8().await.ok()?);
        }
    } else if let Some(length) = header(&head, "content-length") {
        body = vec![0; length.parse::<usize>().ok().filter(|length| *length <= MOST)?];
        stream.read_exact(&mut body).await.ok()?;
    }
    Some(Seen { head, body, nth })
}

/// An answer as a client has received it.
#[derive(Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status; 0 when there was no answer at all.
    pub status: u16,
    /// From the status line to the empty line.
    pub head: String,
    /// Its body, without its framing.
    pub body: Vec<u8>,
    /// The body ended as the head said it would.
    pub complete: bool,
    /// Bytes after the end.
    pub rest: Vec<u8>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body: String = self.text().chars().take(400).collect();
        let framing = if self.complete { "whole" } else { "broken off" };
        write!(f, "{}{body} ({framing}, {} bytes, then {})", self.head, self.body.len(), self.rest.len())
    }
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `code` of a whole OpenAI error object; `Err` with the answer when it is none.
    pub fn code(&self) -> Result<String, String> {
        let error: serde_json::Value =
            serde_json::from_slice(&self.body).map_err(|e| format!("{e} in {self:?}"))?;
        let error = &error["error"];
        let whole = ["message", "type", "param", "code"].iter().all(|member| error.get(member).is_some());
        match error["code"].as_str() {
            Some(code) if whole && self.complete => Ok(code.to_owned()),
            _ => Err(format!("no OpenAI error: {self:?}")),
        }
    }

    /// Takes an answer apart, checking its framing strictly.
    pub fn parse(bytes: &[u8]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let none =
            |head: String| Self { status: 0, head, body: Vec::new(), complete: false, rest: Vec::new() };
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { return none(text(bytes)) };
        let head = text(&bytes[..end + 4]);
        let after = &bytes[end + 4..];
        let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        if status / 100 == 1 {
            return Self::parse(after);
        }
        let chunked = header(&head, "transfer-encoding").is_some_and(|te| te.eq_ignore_ascii_case("chunked"));
        let length = header(&head, "content-length").and_then(|length| length.parse::<usize>().ok());
        let (body, used, complete) = match (chunked, length) {
            _ if matches!(status, 204 | 304) => (Vec::new(), 0, true),
            // Both: nobody may send that.
            (true, Some(_)) => (after.to_vec(), after.len(), false),
            (true, None) => dechunk(after),
            (false, Some(length)) => {
                let used = length.min(after.len());
                (after[..used].to_vec(), used, used == length)
            }
            (false, None) => (after.to_vec(), after.len(), true),
        };
        Self { status, head, body, complete, rest: after[used..].to_vec() }
    }
}

/// The body, the bytes it took, and whether it has its last chunk.
fn dechunk(bytes: &[u8]) -> (Vec<u8>, usize, bool) {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(line) = bytes[at..].windows(2).position(|w| w == b"\r\n") else {
            return (body, bytes.len(), false);
        };
        let size = std::str::from_utf8(&bytes[at..at + line]).ok();
        let Some(size) = size.and_then(|size| usize::from_str_radix(size, 16).ok()) else {
            return (body, bytes.len(), false);
        };
        at += line + 2;
        if bytes.len() < at + size + 2 {
            body.extend_from_slice(&bytes[at..]);
            return (body, bytes.len(), false);
        }
        body.extend_from_slice(&bytes[at..at + size]);
        at += size + 2;
        if size == 0 {
            return (body, at, true);
        }
    }
}

/// Sends bytes and reads until the other end closes; `Err` with what came when it does not
/// within `limit`.
pub async fn exchange(address: SocketAddr, bytes: &[u8], limit: Duration) -> Result<Vec<u8>, Vec<u8>> {
    let mut got = Vec::new();
    let conversation = async {
        let Ok(stream) = TcpStream::connect(address).await else { return };
        let (mut read, mut write) = stream.into_split();
        // What is refused early is not read to its end; both directions therefore at once.
        let send = async {
            let _ = write.write_all(bytes).await;
            std::future::pending::<()>().await;
        };
        let receive = async {
            let mut chunk = vec![0; 16 << 10];
            while let Ok(count @ 1..) = read.read(&mut chunk).await {
                got.extend_from_slice(&chunk[..count]);
                if got.len() > MOST {
                    return;
                }
            }
        };
        tokio::select! { () = send => {}, () = receive => {} }
    };
    let ended = tokio::time::timeout(limit, conversation).await;
    if ended.is_ok() { Ok(got) } else { Err(got) }
}

/// A `POST` of JSON that asks for the connection to be closed.
pub fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: everline\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_body_that_ends_as_announced_is_complete() {
        let parse = |text: &str| {
            let answer = Answer::parse(text.as_bytes());
            (answer.status, answer.text(), answer.complete, answer.rest.len())
        };
        let is = |status, body: &str, complete, rest| (status, body.to_owned(), complete, rest);
        assert_eq!(parse("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabx"), is(200, "ab", true, 1));
        assert_eq!(parse("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab"), is(200, "ab", false, 0));
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(parse(&format!("{chunked}2\r\nab\r\n0\r\n\r\n")), is(200, "ab", true, 0));
        assert_eq!(parse(&format!("{chunked}2\r\nab\r\n")), is(200, "ab", false, 0));
        assert_eq!(parse(&format!("{chunked}zz\r\nab\r\n")), is(200, "", false, 0));
        assert_eq!(parse(&format!("HTTP/1.1 100 Continue\r\n\r\n{chunked}0\r\n\r\n")), is(200, "", true, 0));
        assert_eq!(parse("nonsense"), is(0, "", false, 0));
    }
}
