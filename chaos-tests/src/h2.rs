//! HTTP/2 as frames: just enough to break its rules.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Frame types.
pub mod kind {
    /// Bytes of a body.
    pub const DATA: u8 = 0;
    /// A head.
    pub const HEADERS: u8 = 1;
    /// The end of a stream by force.
    pub const RST_STREAM: u8 = 3;
    /// Settings, or their acknowledgement.
    pub const SETTINGS: u8 = 4;
    /// A ping, or its answer.
    pub const PING: u8 = 6;
    /// The end of the connection, announced.
    pub const GOAWAY: u8 = 7;
    /// More window.
    pub const WINDOW_UPDATE: u8 = 8;
    /// More of a head.
    pub const CONTINUATION: u8 = 9;
}

/// Flag of HEADERS and DATA: the last frame of this direction.
pub const END_STREAM: u8 = 1;
/// Flag of HEADERS and CONTINUATION: the head ends here.
pub const END_HEADERS: u8 = 4;
/// Setting: how much body a stream may send at first.
pub const INITIAL_WINDOW_SIZE: u16 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame as bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("frames are short").to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A setting as the payload of a SETTINGS frame.
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// The head of a `POST` with a body to follow, in HPACK without any compression.
pub fn post_head(path: &str) -> Vec<u8> {
    // Indexed `:method: POST` and `:scheme: http`; literals for `:path` and `:authority`.
    let mut head = vec![0x83, 0x86];
    for (name, value) in [(0x04, path), (0x01, "everline")] {
        head.push(name);
        head.push(u8::try_from(value.len()).ok().filter(|n| *n < 127).expect("short values"));
        head.extend_from_slice(value.as_bytes());
    }
    head
}

/// A whole `POST` on a stream: head and body.
pub fn post(stream: u32, path: &str, body: &str) -> Vec<u8> {
    let mut bytes = frame(kind::HEADERS, END_HEADERS, stream, &post_head(path));
    bytes.extend(frame(kind::DATA, END_STREAM, stream, body.as_bytes()));
    bytes
}

/// The header of a frame that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// See [`kind`].
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream.
    pub stream: u32,
    /// What is in it.
    pub payload: Vec<u8>,
}

/// A connection that says what it likes; settings of the other end are acknowledged.
#[derive(Debug)]
pub struct Raw {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
}

impl Raw {
    /// Connects and says hello with these settings.
    pub async fn connect(address: SocketAddr, settings: &[u8]) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        let mut raw = Self { read, write };
        let mut hello = PREFACE.to_vec();
        hello.extend(frame(kind::SETTINGS, 0, 0, settings));
        hello.extend(frame(kind::SETTINGS, 1, 0, &[]));
        raw.write.write_all(&hello).await?;
        Ok(raw)
    }

    /// Sends bytes; false when the connection is over.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        self.write.write_all(bytes).await.is_ok()
    }

    /// The next frame; `None` when the connection is over.
    pub async fn receive(&mut self) -> Option<Frame> {
        receive(&mut self.read).await
    }

    /// Sends what `next` gives until that is all or the other end has had enough, reading
    /// meanwhile; says whether the other end closed the connection within `limit`.
    pub async fn flood(self, mut next: impl FnMut(u32) -> Option<Vec<u8>>, limit: Duration) -> Flood {
        let Self { mut read, mut write } = self;
        let (mut sent, mut goaway) = (0, None);
        let send = async {
            let mut n = 0;
            while let Some(bytes) = next(n) {
                if write.write_all(&bytes).await.is_err() {
                    break;
                }
                sent += bytes.len();
                n += 1;
            }
            std::future::pending::<()>().await;
        };
        let receive = async {
            while let Some(frame) = receive(&mut read).await {
                if frame.kind == kind::GOAWAY {
                    goaway =
                        frame.payload.get(4..8).and_then(|code| code.try_into().ok()).map(u32::from_be_bytes);
                }
            }
        };
        let closed = tokio::time::timeout(limit, async {
            tokio::select! { () = send => {}, () = receive => {} }
        });
        let closed = closed.await.is_ok();
        Flood { closed, goaway, sent }
    }
}

/// How a flood ended.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// The other end closed the connection.
    pub closed: bool,
    /// The code it gave for that.
    pub goaway: Option<u32>,
    /// Bytes it let us send.
    pub sent: usize,
}

async fn receive(read: &mut OwnedReadHalf) -> Option<Frame> {
    let mut head = [0; 9];
    read.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    read.read_exact(&mut payload).await.ok()?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some(Frame { kind: head[3], flags: head[4], stream, payload })
}
