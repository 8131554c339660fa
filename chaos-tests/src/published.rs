//! What an engine published of its cache last, asked of its replay socket.

use std::time::Duration;

use bytes::Bytes;
use everline::zmtp::{AnyAddress, Endpoint, Limits, Link, SocketType};
use tokio::time::timeout;

/// How long the socket may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Number of the engine's newest batch, `None` if it has published none since it began; the engine
/// must have kept all its batches from `from` on. `from` beyond the newest says nothing about it: `None`,
/// too.
pub async fn newest(socket: &Endpoint, from: u64) -> Result<Option<u64>, String> {
    let asked = async {
        let mut link = Link::connect(socket, SocketType::Dealer, Limits::default(), &AnyAddress).await?;
        link.send(&[Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())]).await?;
        let mut newest = None;
        loop {
            let parts = link.recv().await?;
            let [.., number, payload] = parts.as_slice() else { continue };
            if payload.is_empty() {
                return Ok(newest);
            }
            newest = number.as_ref().try_into().ok().map(u64::from_be_bytes);
        }
    };
    let answered = timeout(LIMIT, asked).await.map_err(|_| format!("{socket} does not answer"))?;
    answered.map_err(|error: everline::zmtp::ZmtpError| format!("{socket}: {error}"))
}
