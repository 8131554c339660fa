//! What a connection to the peer listener is for, which its caller says at once: so it is served by the
//! threads that do the work, and streams do not wake those of consensus.

use std::io;

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::tls::peer::{ALPN, ALPN_STREAMS};

/// What stands before HTTP/2's preface on a connection for streams in plain text. Its first byte is none
/// that HTTP/2 or TLS begins with.
const STREAMS: [u8; 18] = *b"EVERLINE STREAMS\r\n";

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Consensus, and whatever else is asked seldom.
    Cluster,
    /// Output streams, or where they go.
    Streams,
}

impl Purpose {
    /// What says so in a TLS handshake.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Purpose::Cluster => ALPN,
            Purpose::Streams => ALPN_STREAMS,
        }
    }

    /// What says so in plain text, before anything else.
    pub fn preamble(self) -> &'static [u8] {
        match self {
            Purpose::Cluster => &[],
            Purpose::Streams => &STREAMS,
        }
    }

    /// Reads as much as says so in plain text. Ends when the caller has spoken: limit its time.
    pub async fn heard(stream: &mut TcpStream) -> io::Result<Self> {
        let mut first = [0];
        // Left there: it may be the beginning of HTTP/2. So may be an end.
        stream.peek(&mut first).await?;
        if first[0] != STREAMS[0] {
            return Ok(Purpose::Cluster);
        }
        let mut said = [0; STREAMS.len()];
        stream.read_exact(&mut said).await?;
        match said == STREAMS {
            true => Ok(Purpose::Streams),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "that is no peer of this version")),
        }
    }
}
