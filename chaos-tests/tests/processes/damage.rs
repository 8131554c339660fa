//! Damaged disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chaos_tests::binary::run_ok;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::load::{Answers, Load};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Writers};

const LIMIT: Duration = Duration::from_secs(60);

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder can be read").map(|e| e.expect("an entry").path());
    let (folders, mut found): (Vec<PathBuf>, Vec<PathBuf>) = entries.partition(|path| path.is_dir());
    folders.iter().for_each(|folder| found.extend(files(folder)));
    found.sort();
    found
}

/// How far a file that was made longer beforehand is really written.
fn written(file: &Path) -> usize {
    let bytes = fs::read(file).expect("a log can be read");
    bytes.iter().rposition(|b| *b != 0).unwrap_or(0)
}

/// Flips bits of some bytes in the middle of what was written to the log, with good entries
/// before and after: nothing that a crash could have done.
fn flip(data_dir: &Path) {
    let segments = files(&data_dir.join("raft"));
    let log = segments.iter().filter(|path| path.extension().is_some_and(|e| e == "wal"));
    let log = log.max_by_key(|path| written(path)).expect("there is a log");
    let (mut bytes, at) = (fs::read(log).expect("a log can be read"), written(log) / 2);
    bytes[at..at + 8].iter_mut().for_each(|b| *b ^= 0x5a);
    fs::write(log, bytes).expect("a log can be written");
    println!("flipped 8 bytes at {at} of {} in {}", written(log), log.display());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_noticed_kept_out_and_repaired_from_the_others() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3).engines(2).start().await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    let writers = Writers::start("before", &fleet.endpoints(&[0, 1, 2]), Manner::default());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (mut promises, _) = writers.stop().await;

    let damaged = fleet.leader().await;
    let others = fleet.others(&[damaged]);
    fleet.replicas[damaged].kill9();
    flip(fleet.replicas[damaged].data_dir());

    // Everything else is unaffected meanwhile.
    until("a leader", LIMIT, async || fleet.leader_among(&others).await).await;
    let load = Load::start(&fleet.targets(&others), 3, &answers, seed, true);
    let writers = Writers::start("meanwhile", &fleet.endpoints(&others), Manner::default());
    fleet.replicas[damaged].start();
    let (reply, _) = until("it answers", LIMIT, async || fleet.replicas[damaged].ready().await).await;
    assert_eq!(reply.status, 503, "{}", reply.text());
    println!("/readyz: {}", reply.text());
    assert!(reply.text().contains("member repair"), "the remedy is said: {}", reply.text());
    let status = fleet.replicas[damaged].status().await.expect("a status").cluster;
    assert!(status.down.is_some() && status.groups.is_empty(), "{status:?}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    fleet.replicas[damaged].sigterm();
    fleet.replicas[damaged].wait(LIMIT);

    let folder = fleet.replicas[damaged].data_dir().display().to_string();
    print!("{}", run_ok(&["member", "repair", "--data-dir", &folder, "--yes"]).await);
    fleet.replicas[damaged].start();
    ready(&fleet.replicas[damaged], LIMIT).await;
    until("three voters", LIMIT, async || {
        let members = fleet.replicas[others[0]].members().await?;
        let voters = members.iter().filter(|m| m.membership == "voter").count();
        check(members.len() == 3 && voters == 3, || format!("{members:?}"))
    })
    .await;
    let (new, writes) = writers.stop().await;
    promises.extend(new);
    assert!(writes.iter().all(|w| w.result.is_ok()), "{:?}", writes.iter().find(|w| w.result.is_err()));
    load.stop().await.assert_all_good(8);
    promises.visible_at(&fleet.endpoints(&[0, 1, 2]), LIMIT).await;
    fleet.agree().await;
}
