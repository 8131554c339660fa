//! The program with certificates: `everline certs` makes them, replicas use them on every
//! listener, the command line speaks https, and a certificate that is issued anew is taken up.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};

const WAIT: Duration = Duration::from_secs(60);

fn everline(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_everline"))
        .args(args)
        .env_remove("EVERLINE_SERVER")
        .env_remove("EVERLINE_CA")
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn done(args: &[&str]) -> String {
    let output = everline(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    text(&output)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {} s for {what}", WAIT.as_secs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// A replica that is killed when it is dropped.
struct Replica {
    child: Child,
    admin: SocketAddr,
    http: SocketAddr,
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The certificate that a listener shows to somebody who trusts `ca`.
fn shown(address: SocketAddr, ca: &Path) -> CertificateDer<'static> {
    let config = everline::tls::client_config(Some(ca)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let name = ServerName::IpAddress(address.ip().into());
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    })
}

fn start_cluster(folder: &Path, certs: &Path) -> Vec<Replica> {
    let peers: Vec<(String, SocketAddr)> = (1..=3).map(|n| (format!("r{n}"), free_address())).collect();
    let list: Vec<String> = peers.iter().map(|(name, peer)| format!("{name}={peer}")).collect();
    let start = |(name, peer): &(String, SocketAddr)| {
        let (http, admin) = (free_address(), free_address());
        let file = |ending: &str| certs.join(format!("{name}.{ending}")).display().to_string();
        let config = format!(
            "[replica]\nname = \"{name}\"\ndata_dir = \"{}\"\n\
             [http]\nlisten = \"{http}\"\ntls_cert = \"{cert}\"\ntls_key = \"{key}\"\n\
             [admin]\nlisten = \"{admin}\"\ntls_cert = \"{cert}\"\ntls_key = \"{key}\"\n\
             [peer]\nlisten = \"{peer}\"\ntls_ca = \"{}\"\ntls_cert = \"{cert}\"\ntls_key = \"{key}\"\n\
             [cluster]\npeers = [{}]\n",
            folder.join(name).display(),
            certs.join("ca.crt").display(),
            list.iter().map(|peer| format!("\"{peer}\"")).collect::<Vec<_>>().join(", "),
            cert = file("crt"),
            key = file("key"),
        );
        let path: PathBuf = folder.join(format!("{name}.toml"));
        std::fs::write(&path, config).unwrap();
        let log = std::fs::File::create(folder.join(format!("{name}.log"))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_everline"))
            .args(["serve", "--exit-with-parent", "--config"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Replica { child, admin, http }
    };
    peers.iter().map(start).collect()
}

#[test]
fn a_cluster_with_certificates_of_certs_init_speaks_tls_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let certs = folder.path().join("certs");
    let dir = certs.to_str().unwrap();
    let init =
        ["certs", "init", "--dir", dir, "--cluster", "test", "--replica", "r1", "--replica", "r2=127.0.0.1"];
    let said = done(&init);
    assert!(said.contains("[peer]") && said.contains("r2.key"), "{said}");
    assert_eq!(mode(&certs), 0o700);
    for (file, expected) in [("ca.key", 0o600), ("r1.key", 0o600), ("ca.crt", 0o644), ("r1.crt", 0o644)] {
        assert_eq!(mode(&certs.join(file)), expected, "{file}");
    }

    // What is there stays there.
    let before = std::fs::read(certs.join("ca.key")).unwrap();
    let again = everline(&init);
    assert!(again.status.code() == Some(1) && text(&again).contains("--force"), "{}", text(&again));
    let again = everline(&["certs", "issue", "r1", "--dir", dir]);
    assert!(again.status.code() == Some(1) && text(&again).contains("--force"), "{}", text(&again));
    assert_eq!(std::fs::read(certs.join("ca.key")).unwrap(), before);
    done(&["certs", "issue", "r3", "--dir", dir]);
    done(&["certs", "issue", "gateway", "--dir", dir, "--server", "--san", "llm.example"]);

    let replicas = start_cluster(folder.path(), &certs);
    let ca = certs.join("ca.crt");
    let ca_text = ca.to_str().unwrap();
    let url = |i: usize| format!("https://{}", replicas[i].admin);
    let status = |i: usize| everline(&["status", "--json", "--server", &url(i), "--ca", ca_text]);
    for i in 0..3 {
        until("three voters", || {
            let output = status(i);
            let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let members = json["cluster"]["members"].as_array().cloned().unwrap_or_default();
            members.iter().filter(|m| m["membership"] == "voter").count() == 3
                && members
                    .iter()
                    .all(|m| m["info"]["http"].as_str().is_some_and(|u| u.starts_with("https://")))
        });
    }
    done(&[
        "worker",
        "add",
        "http://127.0.0.1:9",
        "--id",
        "w",
        "--model",
        "m",
        "--no-probe",
        "--server",
        &url(0),
        "--ca",
        ca_text,
    ]);
    until("the worker at another replica", || {
        text(&everline(&["worker", "list", "--server", &url(1), "--ca", ca_text])).contains("127.0.0.1:9")
    });

    // Not without trust, and not in plain text.
    let untrusted = everline(&["status", "--server", &url(0)]);
    assert!(untrusted.status.code() == Some(3) && text(&untrusted).contains("--ca"), "{}", text(&untrusted));
    let plain = everline(&["status", "--server", &format!("http://{}", replicas[0].admin)]);
    assert!(plain.status.code() == Some(3) && text(&plain).contains("https://"), "{}", text(&plain));

    // A certificate that is issued anew is shown, without a restart.
    let before = [shown(replicas[0].http, &ca), shown(replicas[0].admin, &ca)];
    done(&["certs", "issue", "r1", "--dir", dir, "--force", "--days", "30"]);
    until("the new certificate", || {
        shown(replicas[0].http, &ca) != before[0] && shown(replicas[0].admin, &ca) != before[1]
    });
    assert!(status(0).status.success());
}

#[test]
fn certs_refuses_what_would_not_work() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("c").display().to_string();
    let refused = |args: &[&str], code: i32, says: &str| {
        let output = everline(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output));
        assert!(text(&output).contains(says), "{args:?}: {}", text(&output));
    };
    refused(&["certs", "issue", "r1", "--dir", &dir], 1, "certs init");
    refused(&["certs", "init", "--dir", &dir, "--replica", "r1", "--replica", "r1=a"], 2, "twice");
    refused(&["certs", "init", "--dir", &dir, "--days", "20", "--ca-days", "10"], 2, "--ca-days");
    refused(&["certs", "init", "--dir", &dir, "--replica", "r1=a b"], 2, "neither a host name");
    assert!(!Path::new(&dir).exists(), "nothing was written");
    done(&["certs", "init", "--dir", &dir, "--cluster", "test"]);
    refused(&["certs", "issue", "gw", "--dir", &dir, "--server"], 2, "--san");
    refused(&["certs", "issue", "r1", "--dir", &dir, "--cluster", "prod"], 2, "of cluster test");
    let key = Path::new(&dir).join("ca.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    refused(&["certs", "issue", "r1", "--dir", &dir], 1, "chmod 600");
    assert!(!Path::new(&dir).join("r1.crt").exists());
}
