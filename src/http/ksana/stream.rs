//! Two legs' bodies as one: what comes next of them, strictly or well. Dropping it closes both.

use std::time::Duration;

use bytes::Bytes;
use flate2::write::{GzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use http_body_util::BodyExt as _;
use std::io::Write as _;

use super::pairs::Booked;
use crate::http::growth::Growth;
use crate::http::upstream::UpstreamBody;
use crate::ksana::merge::{DONE, FirstFrame, strict_decode, strict_prefill};

/// How long a prefill leg that is not needed any more may take to say the rest.
const DRAIN: Duration = Duration::from_secs(5);

/// The next bytes of a leg; `None` at its end, and for ever from a leg that is not there.
async fn read(leg: &mut Option<UpstreamBody>) -> Option<std::io::Result<Bytes>> {
    let Some(body) = leg else { return std::future::pending().await };
    loop {
        match body.frame().await? {
            Ok(frame) => match frame.into_data() {
                Ok(data) if !data.is_empty() => return Some(Ok(data)),
                _ => {}
            },
            Err(error) => return Some(Err(error)),
        }
    }
}

/// What the reference makes of two legs.
pub(super) struct Strict {
    prefill: Option<UpstreamBody>,
    decode: Option<UpstreamBody>,
    unpacking: Unpacking,
    shows_prefill: bool,
    is_done: bool,
}

impl Strict {
    pub(super) fn new(
        prefill: UpstreamBody,
        decode: UpstreamBody,
        unpacking: Unpacking,
        is_generate: bool,
    ) -> Self {
        Self {
            prefill: Some(prefill),
            decode: Some(decode),
            unpacking,
            shows_prefill: is_generate,
            is_done: false,
        }
    }

    /// What to send next; `None` at the end.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        while self.prefill.is_some() || self.decode.is_some() {
            let out = tokio::select! {
                biased;
                data = read(&mut self.prefill) => {
                    // One read, and the leg is closed.
                    self.prefill = None;
                    let shown = data.and_then(Result::ok).filter(|_| self.shows_prefill);
                    shown.map(|data| strict_prefill(&data)).unwrap_or_default()
                }
                data = read(&mut self.decode) => {
                    let data = data.and_then(Result::ok).and_then(|data| self.unpacking.take(&data).ok());
                    let Some(data) = data else {
                        self.decode = None;
                        continue;
                    };
                    let out = strict_decode(&data);
                    self.shows_prefill &= out.is_empty();
                    out
                }
            };
            if !out.is_empty() {
                return Some(out.into());
            }
        }
        (!std::mem::replace(&mut self.is_done, true)).then(|| Bytes::from_static(DONE))
    }
}

/// Unpacks what a node has compressed, as the reference's HTTP library does unasked.
pub(super) enum Unpacking {
    Plain,
    Gzip(Box<GzDecoder<Vec<u8>>>),
    Zlib(Box<ZlibDecoder<Vec<u8>>>),
}

impl Unpacking {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        match headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()) {
            Some(b"gzip") => Self::Gzip(Box::new(GzDecoder::new(Vec::new()))),
            Some(b"deflate") => Self::Zlib(Box::new(ZlibDecoder::new(Vec::new()))),
            _ => Self::Plain,
        }
    }

    /// What more is there to be had with these bytes.
    pub(super) fn take(&mut self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(bytes.to_vec()),
            Self::Gzip(decoder) => {
                decoder.write_all(bytes)?;
                decoder.flush()?;
                Ok(std::mem::take(decoder.get_mut()))
            }
            Self::Zlib(decoder) => {
                decoder.write_all(bytes)?;
                decoder.flush()?;
                Ok(std::mem::take(decoder.get_mut()))
            }
        }
    }
}

/// What comes of two legs in fixed mode.
#[derive(Debug)]
pub(super) enum Next {
    /// These bytes.
    Bytes(Bytes),
    /// Nothing more: the decode leg has ended as it should.
    End,
    /// A leg was lost that is needed.
    Lost(String),
}

/// Two legs in fixed mode: the prefill leg's first frame whole or not at all, the decode leg's bytes as
/// they are.
pub(super) struct Merged {
    prefill: Option<UpstreamBody>,
    decode: Option<UpstreamBody>,
    first: FirstFrame,
    shows_prefill: bool,
    decode_began: bool,
    idle: Duration,
    booked: Booked,
    /// How many blocks the output takes, of one that comes in pieces.
    growth: Option<Growth>,
}

impl Merged {
    pub(super) fn new(
        prefill: UpstreamBody,
        decode: UpstreamBody,
        shows_prefill: bool,
        idle: Duration,
        booked: Booked,
        growth: Option<Growth>,
    ) -> Self {
        Self {
            prefill: Some(prefill),
            decode: Some(decode),
            first: FirstFrame::default(),
            shows_prefill,
            decode_began: false,
            idle,
            booked,
            growth,
        }
    }

    /// What comes next.
    pub(super) async fn next(&mut self) -> Next {
        let idle = tokio::time::sleep(self.idle);
        tokio::pin!(idle);
        loop {
            tokio::select! {
                biased;
                data = read(&mut self.prefill) => {
                    let frame = match data {
                        Some(Ok(data)) => {
                            self.prefill_done();
                            self.first.take(&data)
                        }
                        None => {
                            self.prefill_over();
                            self.first.end()
                        }
                        Some(Err(_)) if self.decode_began => {
                            // It has done its part.
                            self.prefill_over();
                            continue;
                        }
                        Some(Err(why)) => return Next::Lost(format!("the prefill node was lost: {why}")),
                    };
                    if let Some(frame) = frame.filter(|_| self.shows_prefill && !self.decode_began) {
                        return Next::Bytes(frame.into());
                    }
                }
                data = read(&mut self.decode) => return match data {
                    Some(Ok(data)) => {
                        self.heard(&data);
                        Next::Bytes(data)
                    }
                    None => {
                        self.drain();
                        Next::End
                    }
                    Some(Err(why)) => Next::Lost(format!("the decode node was lost: {why}")),
                },
                () = &mut idle => {
                    return Next::Lost(format!("nothing came for {} ms", self.idle.as_millis()));
                }
            }
        }
    }

    /// The prefill leg has nothing more to say.
    fn prefill_over(&mut self) {
        self.prefill = None;
        self.booked.prefill = None;
    }

    /// The prompt is computed.
    fn prefill_done(&mut self) {
        if let Some(booking) = &mut self.booked.prefill {
            booking.heard();
            booking.prefill_done();
        }
    }

    /// The decode leg has said something.
    fn heard(&mut self, data: &[u8]) {
        if !std::mem::replace(&mut self.decode_began, true) {
            self.prefill_done();
        }
        if let Some(booking) = &mut self.booked.decode {
            booking.heard();
            let blocks = self.growth.as_mut().map_or(0, |growth| growth.push(data));
            if blocks > 0 {
                booking.grow(blocks);
            }
        }
    }

    /// Lets the prefill leg come to its end, so that its connection can be kept.
    fn drain(&mut self) {
        self.decode = None;
        let mut rest = self.prefill.take();
        if rest.is_some() {
            tokio::spawn(tokio::time::timeout(DRAIN, async move {
                while let Some(Ok(_)) = read(&mut rest).await {}
            }));
        }
    }
}
