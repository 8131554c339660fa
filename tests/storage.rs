//! Storage on a real file system: power cuts of an ext4 on a loop device, and the time a synced
//! append takes. The writer is a child process (this binary again); its disk is copied while it
//! stands still, it is killed, and the copy is mounted and read.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use everline::cluster::storage::checkpoint::CheckpointStore;
use everline::cluster::storage::disk::RealDisk;
use everline::cluster::storage::wal::{Wal, WalError, WalOptions};
use everline::ids::Group;
use rustix::process::{Pid, Signal, kill_process};

/// Tells the child where to write.
const CHILD_DIR: &str = "EVERLINE_TEST_STORAGE_DIR";
const CUTS: u64 = 12;

fn options() -> WalOptions {
    WalOptions {
        cluster: 1,
        member: 2,
        segment_bytes: 256 << 10,
        cache_bytes: 16 << 10,
        max_entry_bytes: 16 << 10,
        ..WalOptions::default()
    }
}

fn open_wal(dir: &Path) -> Result<Wal, WalError> {
    Wal::open(Arc::new(RealDisk), &dir.join("replica"), options()).map(|(wal, _)| wal)
}

fn payload(index: u64) -> Bytes {
    (0..100 + index * 7919 % 3000).map(|at| (at.wrapping_mul(index + 1) >> 3) as u8).collect()
}

fn records(index: u64) -> Vec<(Vec<u8>, Vec<u8>)> {
    (0..100 + index % 50)
        .map(|nth| {
            let value = (0..nth * 397 % 20_000).map(|at| (at ^ index ^ nth) as u8).collect();
            (format!("record {nth}").into_bytes(), value)
        })
        .collect()
}

fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // The parent is gone when this fails, and this process is about to be killed.
    let _ = writeln!(out, "\nack {line}").and_then(|()| out.flush());
}

/// A file system of our own; unmounted whatever happens.
struct Mount(PathBuf);

impl Mount {
    fn new(image: &Path, at: &Path) -> Option<Mount> {
        std::fs::create_dir_all(at).ok()?;
        let ok =
            Command::new("mount").args(["-o", "loop"]).arg(image).arg(at).output().ok()?.status.success();
        ok.then(|| Mount(at.to_path_buf()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for _ in 0..50 {
            let done = Command::new("umount").arg(&self.0).output();
            if done.is_ok_and(|output| output.status.success()) {
                return;
            }
            // A killed child may still be on its way out.
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn make_image(path: &Path) -> bool {
    File::create(path).and_then(|file| file.set_len(96 << 20)).is_ok()
        && Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path).output().is_ok_and(|o| o.status.success())
}

/// Runs `child` on a fresh file system and cuts the power [`CUTS`] times; `check` gets the
/// directory as it is after the cut, and what the child said before it. The next round goes on
/// with what was found.
fn cut_power(child: &str, acks: impl Fn(u64) -> usize, check: impl Fn(&Path, &[String])) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (mut image, mut copy) = (dir.path().join("a.img"), dir.path().join("b.img"));
    let point = dir.path().join("mnt");
    let usable = make_image(&image) && Mount::new(&image, &point).is_some();
    if !usable {
        println!("skipped: needs root and loop devices");
        return;
    }
    for cut in 0..CUTS {
        let mount = Mount::new(&image, &point).expect("mounts");
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", child, "--nocapture", "--ignored"])
            .env(CHILD_DIR, &point)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut child = Killed(child);
        let out = BufReader::new(child.0.stdout.take().expect("piped"));
        let said = out.lines().map(|line| line.expect("text"));
        let said: Vec<String> =
            said.filter_map(|line| Some(line.strip_prefix("ack ")?.to_string())).take(acks(cut)).collect();
        assert_eq!(said.len(), acks(cut), "the child ended early");
        // A copy takes time and a power cut does not: the writer stands still meanwhile. What
        // it wrote and did not sync is not in the image.
        let pid = Pid::from_child(&child.0);
        kill_process(pid, Signal::STOP).expect("stops");
        let copied = Command::new("cp").arg("--sparse=always").args([&image, &copy]).status();
        assert!(copied.is_ok_and(|status| status.success()), "copies");
        drop(child);
        drop(mount);
        std::mem::swap(&mut image, &mut copy);
        let _mount = Mount::new(&image, &point).expect("the copy mounts");
        check(&point, &said);
    }
    println!("{CUTS} power cuts");
}

/// Highest number said after `word`.
fn highest(said: &[String], word: &str) -> Option<u64> {
    said.iter().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok()).max()
}

#[test]
#[ignore = "run by power_cuts_of_a_real_file_system_lose_nothing_acknowledged"]
fn child_appends() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let wal = open_wal(Path::new(&dir)).expect("opens");
    // At most 24 appends are under way.
    let (free, slots) = mpsc::channel();
    (0..24).for_each(|_| free.send(()).expect("the receiver is here"));
    let mut next = Group::ALL.map(|group| wal.bounds(group).1.map_or(1, |last| last + 1));
    loop {
        for group in Group::ALL {
            let first = next[group.index()];
            let count = 1 + first % 4;
            let last = first + count - 1;
            next[group.index()] = last + 1;
            slots.recv().expect("a sender is here");
            let free = free.clone();
            let entries = (first..=last).map(|index| (index, payload(index))).collect();
            wal.append(
                group,
                entries,
                Box::new(move |result| {
                    result.expect("synced");
                    say(format_args!("{group} {last}"));
                    let _ = free.send(());
                }),
            )
            .expect("accepted");
            if last % 16 == 0 {
                let vote = last.to_le_bytes().to_vec().into();
                wal.save_vote(group, vote, Box::new(move |_| say(format_args!("{group}-vote {last}"))))
                    .expect("accepted");
            }
            if last > 400 && last % 32 == 0 {
                wal.purge(group, last - 400, Bytes::from_static(b"meta"), Box::new(|_| ()))
                    .expect("accepted");
            }
        }
    }
}

#[test]
fn power_cuts_of_a_real_file_system_lose_nothing_acknowledged() {
    cut_power(
        "child_appends",
        |cut| 150 + (cut as usize * 131) % 700,
        |dir, said| {
            let wal = open_wal(dir).expect("opens after the power cut");
            for group in Group::ALL {
                let acknowledged = highest(said, &format!("{group} ")).expect("something was said");
                let (first, last) = wal.bounds(group);
                let (first, last) = (first.expect("not empty"), last.expect("not empty"));
                assert!(last >= acknowledged, "{group}: {acknowledged} was acknowledged, {last} is the last");
                let read = wal.read(group, first..last + 1, usize::MAX).expect("reads");
                assert_eq!(read.len() as u64, last + 1 - first);
                assert!(read.iter().all(|(index, data)| *data == payload(*index)));
                if let Some(voted) = highest(said, &format!("{group}-vote ")) {
                    let vote = wal.vote(group).expect("there is a vote");
                    let found = u64::from_le_bytes(vote[..].try_into().expect("8 bytes"));
                    assert!(found >= voted, "{group}: vote {voted} was acknowledged, {found} was found");
                }
            }
        },
    );
}

#[test]
#[ignore = "run by power_cuts_lose_no_checkpoint"]
fn child_checkpoints() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = CheckpointStore::open(&Path::new(&dir).join("checkpoints")).expect("opens");
    let last = store.load(Group::Cache).expect("loads").map_or(0, |found| found.index);
    for index in last + 1.. {
        store.write(Group::Cache, index, b"meta", records(index).into_iter()).expect("writes");
        say(format_args!("checkpoint {index}"));
        let change = [(b"last".to_vec(), Some(index.to_le_bytes().to_vec()))];
        store.put(Group::Control, &change).expect("puts");
        say(format_args!("record {index}"));
    }
}

#[test]
fn power_cuts_lose_no_checkpoint() {
    cut_power(
        "child_checkpoints",
        |cut| 3 + (cut as usize * 5) % 14,
        |dir, said| {
            let store = CheckpointStore::open(&dir.join("checkpoints")).expect("opens after the power cut");
            let found = store.load(Group::Cache).expect("loads").expect("there is one");
            let acknowledged = highest(said, "checkpoint ").expect("something was said");
            assert_eq!(found.fell_back, None);
            assert!(
                found.index >= acknowledged,
                "{acknowledged} was acknowledged, {} was found",
                found.index
            );
            assert_eq!(found.records, records(found.index));
            if let Some(kept) = highest(said, "record ") {
                let record = &store.records(Group::Control).expect("reads")[0];
                let value = u64::from_le_bytes(record.1[..].try_into().expect("8 bytes"));
                assert!(value >= kept);
            }
        },
    );
}

#[test]
fn the_log_is_private_and_has_one_owner() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("temporary directory");
    let wal = open_wal(dir.path()).expect("creates");
    assert!(matches!(open_wal(dir.path()), Err(WalError::Locked { .. })));
    let mode = |path: &str| {
        let meta = dir.path().join(path).metadata().expect("is there");
        meta.permissions().mode() & 0o777
    };
    assert_eq!((mode("replica"), mode("replica/log")), (0o700, 0o700));
    assert_eq!((mode("replica/watermark"), mode("replica/log/control-00000001.wal")), (0o600, 0o600));
    drop(wal);
    open_wal(dir.path()).expect("opens once the first is closed");
}

#[test]
#[ignore = "a measurement; run it alone, on a quiet machine"]
fn time_of_a_synced_append() {
    let base = std::env::var_os("EVERLINE_TEST_DISK").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(base).expect("temporary directory");
    let options = WalOptions { cluster: 1, member: 1, ..WalOptions::default() };
    let (wal, _) = Wal::open(Arc::new(RealDisk), dir.path(), options).expect("opens");
    let data = Bytes::from(vec![7; 64 << 10]);
    let (tx, rx) = mpsc::channel();
    let batches = 2000_u64;
    let start = Instant::now();
    for index in 1..=batches {
        let due = start + Duration::from_millis(5 * index);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let (begun, tx) = (Instant::now(), tx.clone());
        let done = Box::new(move |_| {
            let _ = tx.send(begun.elapsed());
        });
        wal.append(Group::Cache, vec![(index, data.clone())], done).expect("accepted");
        if index % 100 == 0 {
            wal.purge(Group::Cache, index - 50, Bytes::new(), Box::new(|_| ())).expect("accepted");
        }
    }
    let mut times: Vec<_> = (0..batches).map(|_| rx.recv().expect("called")).collect();
    let quarter = times.split_off(times.len() / 4);
    for (name, mut times) in [("first quarter", times), ("the rest", quarter)] {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_micros();
        println!(
            "{name}: p50 {} µs, p99 {} µs, p99.9 {} µs, max {} µs",
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
    println!("{:?}", wal.stats());
}
