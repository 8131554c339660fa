//! Whole replicas that show each other certificates, and strangers that would like to be one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::api::MemberOp;
use super::peer::dial::Dialer;
use super::peer::lane::Lane;
use super::peer::link::{Links, call_address};
use super::peer::wire::{Call, Kind, Reply};
use super::tests::{Replicas, away_too_long, knows, spec};
use super::types::{PeerNode, Segment, Vote};
use crate::codec;
use crate::ids::{Group, Incarnation, ReplicaId, WorkerId};
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::tls::files::{Readers, write};
use crate::tls::issue::Authority;
use crate::tls::peer::PeerTls;
use crate::tls::reload::Look;
use crate::tls::testing::{Certs, client, connect, expired, put, shown};

const WITHIN: Duration = Duration::from_secs(5);

fn with_certificates(n: usize, certs: &Certs) -> Replicas {
    Replicas::with(n, |config| {
        let name = config.info.name.clone();
        config.tls = Some(Arc::new(PeerTls::open(&name, &certs.member(&name)).unwrap()));
    })
}

fn address(r: &Replicas, i: usize) -> SocketAddr {
    r.all[i].config.info.peer.parse().unwrap()
}

/// Whether whoever speaks on `io` is served: HTTP/2 servers answer with a SETTINGS frame at once.
async fn is_served(mut io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) -> bool {
    let mut settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    settings.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    let _ = io.write_all(&settings).await;
    let mut head = [0; 9];
    let read =
        tokio::time::timeout(WITHIN, io.read_exact(&mut head)).await.expect("neither served nor refused");
    read.is_ok() && head[3] == 4
}

/// As [`Replicas::until`], for what itself needs the runtime.
fn until(r: &Replicas, what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "waited 20 s for {what}");
        r.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
    }
}

/// Terms and leaders of both groups, which strangers must not change.
fn order(r: &Replicas) -> Vec<(u64, Option<ReplicaId>)> {
    r.plane(0).status().groups.iter().map(|g| (g.term, g.leader)).collect()
}

#[test]
fn only_members_of_the_cluster_get_in_and_each_as_itself() {
    let certs = Certs::new("prod");
    let r = with_certificates(3, &certs);
    r.register(0, "w");
    for i in 0..3 {
        r.until("the worker everywhere", || knows(&r.plane(i), "w"));
    }
    let settled = || r.plane(0).status().groups.iter().all(|g| g.leader.is_some());
    r.until("leaders", settled);
    let before = order(&r);

    // By hand, with an everyday TLS client.
    let elsewhere = Certs::new("prod");
    let ca = certs.ca_file();
    let server =
        certs.authority.issue(&crate::tls::issue::Subject::Server("gw".into()), &["127.0.0.1".to_owned()], 5);
    let cases = [
        ("a member", Some(certs.of("r2", None)), true),
        ("no certificate", None, false),
        ("another authority", Some(elsewhere.of("r2", None)), false),
        ("another cluster", Some(certs.of("r2", Some("staging"))), false),
        ("an expired certificate", Some(expired(&certs, "r2")), false),
        ("a server that is no member", Some(server.unwrap()), false),
    ];
    for (who, shows, expected) in cases {
        let served = r.runtime.block_on(async {
            match connect(client(&ca, shows.as_ref(), &["h2"]), address(&r, 0)).await {
                Ok(stream) => is_served(stream).await,
                Err(_) => false,
            }
        });
        assert_eq!(served, expected, "{who}");
    }
    let plain =
        r.runtime.block_on(async { is_served(TcpStream::connect(address(&r, 0)).await.unwrap()).await });
    assert!(!plain, "plain text");

    // In our own protocol, each as somebody else.
    let tls = |certs: &Certs, name: &str| Arc::new(PeerTls::open(name, &certs.member(name)).unwrap());
    let r2 = Dialer::new(Some(tls(&certs, "r2")));
    let first = r.all[0].config.info.peer.clone();
    let hello = |name: &str| Call::Hello { name: name.to_owned() };
    let ask = |dialer: &Dialer, member: Option<&str>, call: Call| {
        r.runtime.block_on(call_address(dialer, &first, member, &call, WITHIN))
    };
    assert!(matches!(ask(&r2, Some("r1"), hello("r2")), Ok(Reply::Hello { initialized: true, .. })));
    let refused = ask(&r2, Some("r1"), hello("r3")).unwrap_err();
    assert!(refused.contains("certificate is of r2, not of r3"), "{refused}");
    let join = Call::Join { nonce: 9, node: PeerNode { name: "r3".into(), peer: "127.0.0.1:1".into() } };
    assert!(ask(&r2, None, join).unwrap_err().contains("not of r3"));
    let refused = ask(&r2, Some("r3"), hello("r2")).unwrap_err();
    assert!(refused.contains("certificate is of r1, not of r3"), "the server's, too: {refused}");
    assert!(ask(&Dialer::default(), None, hello("r2")).is_err(), "plain text");
    let staging = Certs::new("staging");
    let stranger = Dialer::new(Some(tls(&staging, "r2")));
    let refused = ask(&stranger, None, hello("r2")).unwrap_err();
    assert!(refused.contains("authority"), "{refused}");

    // On a lane: r2 may speak for member 2 only.
    let status = r.plane(0).status();
    let cluster = u128::from_str_radix(&status.cluster_id, 16).unwrap();
    let id = |name: &str| status.members.iter().find(|m| m.info.name == name).unwrap().id;
    let node = PeerNode { name: "r1".into(), peer: first.clone() };
    let lane = |as_member: ReplicaId| {
        let _runtime = r.runtime.enter();
        Lane::new(Links::new(r2.clone(), cluster, as_member).to(id("r1"), &node).unwrap())
    };
    let as_r3 = r.runtime.block_on(async { lane(id("r3")).open().await.map(|_| ()) });
    assert!(as_r3.unwrap_err().to_string().contains("is r3"), "the wrong member");
    let segment = |origin: ReplicaId| {
        codec::encode(&Segment {
            origin,
            incarnation: Incarnation(99),
            number: 1,
            commands: Default::default(),
        })
    };
    let say = |kind: Kind, body: Vec<u8>| {
        r.runtime.block_on(lane(id("r2")).call(kind, Group::Control, body, Duration::from_millis(700)))
    };
    assert!(say(Kind::Propose, segment(id("r3"))).is_err(), "a proposal of another's");
    let vote = |of: ReplicaId| {
        codec::encode(&openraft::raft::VoteRequest::<super::types::TypeConfig> {
            vote: Vote::new(1_000_000, of.0),
            last_log_id: None,
            leadership_transfer: false,
        })
    };
    assert!(say(Kind::Vote, vote(id("r3"))).is_err(), "a candidacy of another's");
    assert!(say(Kind::PreVote, vote(id("r3"))).is_err());
    assert!(say(Kind::PreVote, vote(id("r2"))).is_ok(), "its own is heard");

    assert_eq!(order(&r), before, "no term and no leader has changed");
    r.register(1, "after");
}

#[test]
fn snapshots_and_elections_after_restarts_work_with_certificates() {
    let certs = Certs::new("prod");
    away_too_long(with_certificates(3, &certs));
}

#[test]
fn a_replica_joins_with_a_certificate_and_not_without() {
    let certs = Certs::new("prod");
    let mut r = with_certificates(1, &certs);
    r.register(0, "w");
    let first = r.all[0].config.info.peer.clone();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = super::inner::NodeConfig::new("r2", r.all[0].config.data_dir.with_file_name("r2"));
    config.info.peer = port.local_addr().unwrap().to_string();
    drop(port);
    config.join = vec![first];
    config.wal_segment_bytes = 1 << 20;
    r.all.push(super::tests::Replica { config, cluster: None });
    r.all[1].start();
    let refused = Certs::new("prod");
    for without in [None, Some(refused.member("r2"))] {
        r.all[1].crash();
        let tls = without.map(|files| Arc::new(PeerTls::open("r2", &files).unwrap()));
        r.all[1].config.tls = tls.clone();
        r.all[1].start();
        let hello = Call::Hello { name: "r2".into() };
        let dialer = Dialer::new(tls);
        let asked = call_address(&dialer, &r.all[0].config.info.peer, None, &hello, WITHIN);
        assert!(r.runtime.block_on(asked).is_err());
        assert_eq!(r.plane(0).status().members.len(), 1);
    }
    r.all[1].crash();
    r.all[1].config.tls = Some(Arc::new(PeerTls::open("r2", &certs.member("r2")).unwrap()));
    r.all[1].start();
    r.until("two voters", || {
        r.plane(0).status().members.iter().filter(|m| m.membership == "voter").count() == 2
    });
    r.until("the newcomer knows", || knows(&r.plane(1), "w"));
    let op = MemberOp::TransferLeader { member: Some("r2".into()) };
    r.runtime.block_on(r.plane(0).member(op)).unwrap();
    r.until("it leads", || r.leader() == Some(1));
}

#[test]
fn all_certificates_and_their_authority_are_replaced_under_load_and_no_proposal_fails() {
    let certs = Certs::new("prod");
    let mut r = with_certificates(3, &certs);
    r.register(0, "w");
    for i in 0..3 {
        r.until("the worker everywhere", || knows(&r.plane(i), "w"));
    }
    r.until("a leader", || r.leader().is_some());
    let leader = r.leader().unwrap();
    let follower = (leader + 1) % 3;

    // Proposals all the time, on the two that stay.
    let loads = tokio::runtime::Runtime::new().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (done, failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for at in (0..3).filter(|at| *at != follower) {
        let (plane, stop) = (r.plane(at), stop.clone());
        let (done, failed) = (done.clone(), failed.clone());
        let id = format!("load-{at}");
        loads.spawn(async move {
            while !stop.load(Ordering::Acquire) {
                let command = ControlCommand::RegisterWorker { spec: spec(&id), heartbeats: true };
                match plane.propose(command).await {
                    Ok(ControlOutcome::Registered { .. }) => done.fetch_add(1, Ordering::AcqRel),
                    other => {
                        eprintln!("{other:?}");
                        failed.fetch_add(1, Ordering::AcqRel)
                    }
                };
            }
        });
    }
    let more = |r: &Replicas| {
        let then = done.load(Ordering::Acquire);
        r.until("more proposals done", || done.load(Ordering::Acquire) >= then + 20);
    };
    // Strangers see which certificate a listener shows, whatever it then thinks of them.
    let ca = certs.ca_file();
    let show = |r: &Replicas, i: usize| {
        r.runtime
            .block_on(async { shown(&connect(client(&ca, None, &["h2"]), address(r, i)).await.unwrap()) })
    };
    let look = |r: &Replicas| -> Vec<Look> {
        r.all.iter().map(|replica| replica.config.tls.as_ref().unwrap().look()).collect()
    };

    more(&r);
    let old: Vec<_> = (0..3).map(|i| show(&r, i)).collect();
    for i in 1..=3 {
        certs.member(&format!("r{i}"));
    }
    // Nobody tells them.
    until(&r, "new certificates shown by all", || (0..3).all(|i| show(&r, i) != old[i]));
    more(&r);

    // A certificate that makes no sense changes nothing.
    let files = crate::tls::peer::files_in(certs.folder.path(), "r1");
    let kept = show(&r, 0);
    std::fs::write(&files.cert, "nonsense").unwrap();
    r.until("refused", || look(&r)[0] == Look::Same);
    assert_eq!(show(&r, 0), kept);
    certs.member("r1");
    until(&r, "taken", || show(&r, 0) != kept);

    // The authority is replaced: both are trusted, then certificates are of the new one, then
    // only it is trusted.
    let next = Certs::new("prod");
    let write_ca = |text: &str| write(&ca, text, Readers::Everybody).unwrap();
    write_ca(&format!("{}{}", certs.ca.cert, next.ca.cert));
    r.until("both authorities trusted", || look(&r).iter().all(|look| *look == Look::Same));
    more(&r);
    for i in 1..=3 {
        let name = format!("r{i}");
        put(&crate::tls::peer::files_in(certs.folder.path(), &name), &next.of(&name, None));
    }
    r.until("certificates of the new authority", || look(&r).iter().all(|look| *look == Look::Same));
    more(&r);
    write_ca(&next.ca.cert);
    r.until("only the new authority trusted", || look(&r).iter().all(|look| *look == Look::Same));

    // A follower that comes back makes all its connections anew, in both directions.
    r.all[follower].crash();
    more(&r);
    let name = r.all[follower].config.info.name.clone();
    let files = crate::tls::peer::files_in(certs.folder.path(), &name);
    r.all[follower].config.tls = Some(Arc::new(PeerTls::open(&name, &files).unwrap()));
    r.all[follower].start();
    r.register(follower, "after");
    for i in 0..3 {
        r.until("what it registered is everywhere", || knows(&r.plane(i), "after"));
    }
    more(&r);
    stop.store(true, Ordering::Release);
    assert_eq!(failed.load(Ordering::Acquire), 0, "of {}", done.load(Ordering::Acquire));
    assert!(Authority::from_pem(&next.ca.cert, &next.ca.key).is_ok());
    assert!(r.plane(0).registry().worker(&WorkerId::parse("after").unwrap()).is_some());

    // And the old authority's are strangers now.
    let stranger = certs.of("r2", None);
    let served = r.runtime.block_on(async {
        match connect(client(&ca, Some(&stranger), &["h2"]), address(&r, 0)).await {
            Ok(stream) => is_served(stream).await,
            Err(_) => false,
        }
    });
    assert!(!served, "the old authority is no longer trusted");
}
