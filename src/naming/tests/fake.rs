//! An HTTP server that answers as a function says, over TLS or in clear, and may keep answers open.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// Method and target.
    pub(super) line: String,
    pub(super) head: String,
    pub(super) body: String,
}

impl Asked {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        lines.filter(|(is, _)| is.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }

    /// A parameter of the query.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        let target = self.line.split(' ').nth(1)?;
        target.split_once('?')?.1.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

pub(super) enum Says {
    /// A whole answer.
    Whole(u16, String),
    /// Lines, as they come, until the sender is dropped.
    Lines(mpsc::UnboundedReceiver<String>),
}

type Answering = dyn Fn(&Asked) -> Says + Send + Sync;

/// See the module.
pub(super) struct Fake {
    pub(super) address: SocketAddr,
    pub(super) asked: Arc<Mutex<Vec<Asked>>>,
    task: AbortHandle,
    connections: Arc<Mutex<Vec<AbortHandle>>>,
}

impl Fake {
    pub(super) async fn start(
        address: Option<SocketAddr>,
        tls: Option<TlsAcceptor>,
        answering: impl Fn(&Asked) -> Says + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address.unwrap_or(([127, 0, 0, 1], 0).into())).await.unwrap();
        let address = listener.local_addr().unwrap();
        let answering: Arc<Answering> = Arc::new(answering);
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let connections = Arc::<Mutex<Vec<AbortHandle>>>::default();
        let (log, kept) = (Arc::clone(&asked), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answering, log, tls) = (Arc::clone(&answering), Arc::clone(&log), tls.clone());
                let serving = tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, &*answering, &log).await;
                            }
                        }
                        None => serve(stream, &*answering, &log).await,
                    }
                });
                kept.lock().push(serving.abort_handle());
            }
        });
        Self { address, asked, task: task.abort_handle(), connections }
    }

    /// Is gone, with all connections.
    pub(super) fn stop(&self) {
        self.task.abort();
        for connection in self.connections.lock().drain(..) {
            connection.abort();
        }
    }

    pub(super) fn count(&self, is: impl Fn(&Asked) -> bool) -> usize {
        self.asked.lock().iter().filter(|asked| is(asked)).count()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One request a connection.
async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    answering: &Answering,
    log: &Mutex<Vec<Asked>>,
) {
    let Some(asked) = read(&mut stream).await else { return };
    log.lock().push(asked.clone());
    match answering(&asked) {
        Says::Whole(status, body) => {
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        }
        Says::Lines(mut lines) => {
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            while let Some(line) = lines.recv().await {
                let chunk = format!("{:x}\r\n{line}\r\n", line.len());
                if stream.write_all(chunk.as_bytes()).await.is_err() {
                    return;
                }
                let _ = stream.flush().await;
            }
            let _ = stream.write_all(b"0\r\n\r\n").await;
        }
    }
    let _ = stream.shutdown().await;
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Asked> {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(at) = all.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&all[..at]).into_owned();
            let (line, rest) = head.split_once("\r\n").unwrap_or((&head, ""));
            let mut asked = Asked { line: line.to_owned(), head: rest.to_owned(), body: String::new() };
            let length = asked.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            if all.len() >= at + 4 + length {
                asked.body = String::from_utf8_lossy(&all[at + 4..]).into_owned();
                return Some(asked);
            }
        }
        match stream.read(&mut chunk).await {
            Ok(count @ 1..) => all.extend_from_slice(&chunk[..count]),
            _ => return None,
        }
    }
}
