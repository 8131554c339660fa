//! TLS for clients and operators: a server certificate that is read again when it changes,
//! HTTP/2 or HTTP/1.1, and a bound on the handshake. TLS 1.2 and 1.3.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::reload::{Look, Reloading, Source};
use super::{TlsError, files, provider};

/// The files of a listener.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListenerFiles {
    /// The certificate, with intermediate ones after it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A listener's side of TLS.
#[derive(Debug)]
pub struct ListenerTls {
    config: Arc<Reloading<ServerConfig>>,
    handshake: Duration,
}

impl ListenerTls {
    /// Reads the files. `what` is the listener, for the log; a handshake may take `handshake`.
    pub fn open(what: &'static str, files: &ListenerFiles, handshake: Duration) -> Result<Self, TlsError> {
        let sources = vec![Source::public(&files.cert), Source::secret(&files.key)];
        let paths = files.clone();
        let config = Reloading::open(what, sources, move |contents| server_config(&paths, contents))?;
        Ok(Self { config: Arc::new(config), handshake })
    }

    /// Keeps the certificate current; drop the future to stop.
    pub async fn watch(&self) {
        Arc::clone(&self.config).watch().await;
    }

    /// Looks at the files once.
    pub fn look(&self) -> Look {
        self.config.look()
    }

    /// Answers a client that has connected, within the time for the handshake and `within`.
    pub async fn accept(&self, stream: TcpStream, within: Duration) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.config.get());
        let limit = self.handshake.min(within);
        tokio::time::timeout(limit, acceptor.accept(stream))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?
    }
}

fn server_config(paths: &ListenerFiles, contents: &[Vec<u8>]) -> Result<ServerConfig, TlsError> {
    let [cert, key] = contents else {
        return Err(TlsError::content(&paths.cert, "two files are needed"));
    };
    let key = files::certified_key((&paths.cert, cert), (&paths.key, key))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| TlsError::content(&paths.cert, e))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
