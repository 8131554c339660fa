//! A small, strict replica made of raw sockets, whose connections break as a test wants it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The stream that this replica has.
pub(super) const STREAM: &str = "st_abcdefghijklmnopqrstuvwxyz";

/// What happens to a connection that asks for the stream.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// It breaks after this much of the body.
    Cut(usize, How),
    /// It is reset instead of an answer.
    Dead,
    /// It gets this answer, with this code.
    Refused(u16, &'static str),
    /// The answer is no stream of Everline's that could be asked for again.
    Unnamed(usize),
}

/// How a connection breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    /// It closes.
    Fin,
    /// It is reset.
    Rst,
    /// The body ends as if it were whole.
    End,
    /// Nothing comes any more.
    Stall,
}

/// A request that came.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) head: String,
    pub(super) body: String,
    pub(super) from: SocketAddr,
}

impl Asked {
    /// The first line without the version.
    pub(super) fn what(&self) -> &str {
        self.head.lines().next().unwrap().trim_end_matches(" HTTP/1.1")
    }

    /// A header.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }
}

/// What connections share.
#[derive(Default, Debug)]
struct State {
    events: Vec<String>,
    faults: Mutex<VecDeque<Fault>>,
    pause: Duration,
    piece: usize,
    asked: Mutex<Vec<Asked>>,
    written: AtomicUsize,
}

/// A replica; it ends with this.
#[derive(Debug)]
pub(super) struct Fake {
    pub(super) address: SocketAddr,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

impl Fake {
    /// Starts one whose stream has these events' data, with a pause before each; connections to it
    /// break as `faults` says, one after the other.
    pub(super) async fn start(data: &[&str], pause: Duration, piece: usize, faults: &[Fault]) -> Self {
        let events = data.iter().enumerate().map(|(number, data)| {
            let retry = if number == 0 { "retry: 500\n" } else { "" };
            format!("{data}\n{retry}id: {STREAM}.{number}\n\n")
        });
        let state = Arc::new(State {
            events: events.collect(),
            faults: Mutex::new(faults.iter().cloned().collect()),
            pause,
            piece,
            ..State::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        let shared = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, from)) = listener.accept().await {
                let state = Arc::clone(&shared);
                connections.spawn(async move { while serve(&state, &socket, from).await.is_some() {} });
            }
        });
        Self { address, state, _tasks: tasks }
    }

    /// The body of the whole stream.
    pub(super) fn whole(&self) -> String {
        self.state.events.concat()
    }

    /// What was asked so far.
    pub(super) fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().clone()
    }

    /// What was asked, in short.
    pub(super) fn whats(&self) -> Vec<String> {
        self.asked().iter().map(|asked| asked.what().to_owned()).collect()
    }

    /// Bytes of bodies written so far.
    pub(super) fn written(&self) -> usize {
        self.state.written.load(Ordering::Relaxed)
    }
}

/// Reads until `end`, and what came behind it.
async fn read_head(mut socket: &TcpStream) -> Option<(String, Vec<u8>)> {
    let (mut read, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = read.split_off(at + 4);
            return Some((String::from_utf8(read).unwrap(), rest));
        }
        match socket_read(&mut socket, &mut piece).await {
            0 => return None,
            count => read.extend_from_slice(&piece[..count]),
        }
    }
}

/// The socket's reading half by reference, so that a reset needs no second owner.
async fn socket_read(socket: &mut &TcpStream, piece: &mut [u8]) -> usize {
    loop {
        if socket.readable().await.is_err() {
            return 0;
        }
        match socket.try_read(piece) {
            Ok(count) => return count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return 0,
        }
    }
}

async fn write(socket: &TcpStream, mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        socket.writable().await.ok()?;
        match socket.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
    Some(())
}

/// One request; none when the connection is over.
async fn serve(state: &State, mut socket: &TcpStream, from: SocketAddr) -> Option<()> {
    let (head, mut body) = read_head(socket).await?;
    let mut asked = Asked { head, body: String::new(), from };
    if asked.what() == "POST /echo" {
        state.asked.lock().push(asked);
        return echo(socket, body).await;
    }
    let length = asked.header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut piece = [0; 4096];
    while body.len() < length {
        match socket_read(&mut socket, &mut piece).await {
            0 => return None,
            count => body.extend_from_slice(&piece[..count]),
        }
    }
    asked.body = String::from_utf8(body).unwrap();
    state.asked.lock().push(asked.clone());
    let json = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    match asked.what() {
        what if what.ends_with("/cancel") => {
            return write(socket, format!("HTTP/1.1 200 OK\r\n{json}").as_bytes()).await;
        }
        "GET /v1/models" => {
            return write(socket, format!("HTTP/1.1 200 OK\r\nx-fake: 1\r\n{json}").as_bytes()).await;
        }
        what if what.starts_with("POST") && !asked.body.contains(r#""stream":true"#) => {
            return write(socket, format!("HTTP/1.1 200 OK\r\n{json}").as_bytes()).await;
        }
        _ => {}
    }
    let first = match asked.header("last-event-id") {
        None => 0,
        Some(id) => id.strip_prefix(STREAM).unwrap().strip_prefix('.').unwrap().parse::<usize>().unwrap() + 1,
    };
    let fault = state.faults.lock().pop_front().unwrap_or(Fault::None);
    match fault {
        Fault::None => stream(state, socket, first, true, usize::MAX, How::End).await,
        Fault::Cut(at, how) => stream(state, socket, first, true, at, how).await,
        Fault::Unnamed(at) => stream(state, socket, first, false, at, How::End).await,
        Fault::Dead => reset(socket),
        Fault::Refused(status, code) => {
            let body = format!(r#"{{"error":{{"message":"as the test wants it","code":"{code}"}}}}"#);
            let body = if status == 204 { String::new() } else { body };
            let length = body.len();
            write(socket, format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{body}").as_bytes())
                .await
        }
    }
}

/// Answers with the stream from an event on, until it is whole or breaks after `at` bytes.
async fn stream(
    state: &State,
    socket: &TcpStream,
    first: usize,
    named: bool,
    at: usize,
    how: How,
) -> Option<()> {
    assert!(first < state.events.len(), "the stream ended, nobody needs to ask");
    let name = if named { format!("everline-stream: {STREAM}\r\n") } else { String::new() };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n{name}everline-replica: fake\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    write(socket, head.as_bytes()).await?;
    let mut left = at;
    for event in &state.events[first..] {
        if !state.pause.is_zero() {
            tokio::time::sleep(state.pause).await;
        }
        for piece in event.as_bytes()[..event.len().min(left)].chunks(state.piece) {
            write(socket, &[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await?;
            state.written.fetch_add(piece.len(), Ordering::Relaxed);
        }
        if event.len() >= left {
            return match how {
                How::Fin => None,
                How::Rst => reset(socket),
                How::End => write(socket, b"0\r\n\r\n").await,
                How::Stall => {
                    // Until the other side has had enough.
                    let mut socket = socket;
                    socket_read(&mut socket, &mut [0; 1]).await;
                    None
                }
            };
        }
        left -= event.len();
    }
    write(socket, b"0\r\n\r\n").await
}

/// Sends back what comes, as it comes.
async fn echo(socket: &TcpStream, first: Vec<u8>) -> Option<()> {
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
    write(socket, head.as_bytes()).await?;
    write(socket, &first).await?;
    let (mut socket, mut piece) = (socket, [0; 4096]);
    loop {
        match socket_read(&mut socket, &mut piece).await {
            0 => return None,
            count => write(socket, &piece[..count]).await?,
        }
    }
}

fn reset(socket: &TcpStream) -> Option<()> {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
    None
}
