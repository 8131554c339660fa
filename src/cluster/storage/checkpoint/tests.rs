//! Tests of the checkpoint store: generations, damage, and the measured way sled loses data.

use super::*;

fn records(salt: u64) -> Records {
    (0..40_u64)
        .map(|nth| {
            let length = (nth * 613 + salt * 97) % 9000;
            let value = (0..length).map(|at| (at.wrapping_mul(nth + salt + 3) >> 2) as u8).collect();
            (format!("key {nth:03}").into_bytes(), value)
        })
        .collect()
}

fn write(store: &CheckpointStore, group: Group, index: u64) -> CheckpointInfo {
    store
        .write(group, index, &index.to_le_bytes(), records(index).into_iter())
        .expect("a checkpoint can be written")
}

fn whole(index: u64) -> Checkpoint {
    Checkpoint { index, meta: index.to_le_bytes().to_vec(), records: records(index), fell_back: None }
}

#[test]
fn a_checkpoint_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = CheckpointStore::open(dir.path()).expect("creates");
    assert_eq!(store.load(Group::Cache).expect("loads"), None);
    for index in [10, 20, 30] {
        let info = write(&store, Group::Cache, index);
        assert_eq!((info.index, info.records), (index, 40));
        assert_eq!(info.previous_index, (index > 10).then(|| index - 10));
    }
    store.write(Group::Control, 5, b"", std::iter::empty()).expect("an empty one is fine");
    drop(store);
    let store = CheckpointStore::open(dir.path()).expect("opens");
    assert_eq!(store.load(Group::Cache).expect("loads"), Some(whole(30)));
    let control = store.load(Group::Control).expect("loads").expect("is there");
    assert_eq!((control.index, control.records.len()), (5, 0));
    assert!(!dir.path().join("sled/blobs").read_dir().is_ok_and(|mut blobs| blobs.next().is_some()));
}

#[test]
fn damage_of_the_newest_falls_back_with_a_reason_and_of_both_is_an_error() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = CheckpointStore::open(dir.path()).expect("creates");
    write(&store, Group::Cache, 10);
    write(&store, Group::Cache, 20);
    let remove_one = |generation| {
        let inner = store.store.lock();
        let tree = &inner.half(generation).trees[Group::Cache.index()];
        let key = tree.scan_prefix(pieces::record_prefix(generation)).keys().nth(17);
        tree.remove(key.expect("is there").expect("reads")).expect("removes");
    };
    remove_one(2);
    let found = store.load(Group::Cache).expect("loads").expect("is there");
    let reason = found.fell_back.clone().expect("it says so");
    assert!(reason.contains("missing or incomplete"), "{reason}");
    assert_eq!(Checkpoint { fell_back: None, ..found }, whole(10));
    // The next one goes beside the whole one, not over it.
    let info = write(&store, Group::Cache, 30);
    assert_eq!((info.generation, info.previous_index), (4, Some(10)));
    assert_eq!(store.load(Group::Cache).expect("loads"), Some(whole(30)));
    remove_one(4);
    remove_one(1);
    assert!(matches!(store.load(Group::Cache), Err(CheckpointError::Damaged { .. })));
}

#[test]
fn a_sled_that_lost_everything_is_noticed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = CheckpointStore::open(dir.path()).expect("creates");
    write(&store, Group::Cache, 10);
    store.put(Group::Control, &[(b"a".to_vec(), Some(b"1".to_vec()))]).expect("puts");
    drop(store);
    fs::remove_dir_all(dir.path().join("sled")).expect("removes");
    let store = CheckpointStore::open(dir.path()).expect("opens");
    assert!(matches!(store.load(Group::Cache), Err(CheckpointError::Damaged { .. })));
    assert!(matches!(store.records(Group::Control), Err(CheckpointError::Records { .. })));
    drop(store);
    fs::remove_file(dir.path().join(sidecar::FILE_NAME)).expect("removes");
    assert!(matches!(CheckpointStore::open(dir.path()), Err(CheckpointError::Sidecar { .. })));
}

#[test]
fn plain_records_are_all_there_or_an_error() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = CheckpointStore::open(dir.path()).expect("creates");
    let pair = |key: &str, value: &str| (key.as_bytes().to_vec(), Some(value.as_bytes().to_vec()));
    store.put(Group::Control, &[pair("a", "1"), pair("b", "2"), pair("a", "3")]).expect("puts");
    store.put(Group::Control, &[(b"b".to_vec(), None), pair("c", "4")]).expect("puts");
    let expected: Records = vec![(b"a".to_vec(), b"3".to_vec()), (b"c".to_vec(), b"4".to_vec())];
    assert_eq!(store.records(Group::Control).expect("reads"), expected);
    let large = [(b"d".to_vec(), Some(vec![0; 8000]))];
    assert!(matches!(store.put(Group::Control, &large), Err(CheckpointError::TooLarge { .. })));
    drop(store);
    let store = CheckpointStore::open(dir.path()).expect("opens");
    assert_eq!(store.records(Group::Control).expect("reads"), expected);
    // The sidecar may be one change ahead of sled, or sled one behind it: both are whole.
    store.store.lock().halves[0].trees[0].remove(keyed(b"a")).expect("removes");
    assert!(matches!(store.records(Group::Control), Err(CheckpointError::Records { .. })));
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("creates");
    for entry in fs::read_dir(from).expect("lists") {
        let entry = entry.expect("lists");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("has a type").is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copies");
        }
    }
}

/// Outcomes of opening a damaged copy.
#[derive(Default, Debug)]
struct Tally {
    /// The store did not open: its list of checkpoints is damaged.
    refused: u32,
    /// Plain records, which are in the first database only.
    records_refused: u32,
    /// The newest checkpoint is damaged, the one before is whole.
    fell_back: u32,
    /// The newest checkpoint is whole.
    harmless: u32,
}

impl Tally {
    /// Opens and reads; anything but an error, a reported fall-back or the very same data fails.
    fn judge(&mut self, dir: &Path, context: &str) {
        let store = match CheckpointStore::open(dir) {
            Ok(store) => store,
            Err(_) => return self.refused += 1,
        };
        let expected_records = vec![(b"a".to_vec(), b"1".to_vec())];
        match store.records(Group::Control) {
            Ok(records) => assert_eq!(records, expected_records, "{context}"),
            Err(_) => self.records_refused += 1,
        }
        match store.load(Group::Cache) {
            Ok(Some(found)) if found.fell_back.is_some() => {
                self.fell_back += 1;
                assert_eq!(Checkpoint { fell_back: None, ..found }, whole(10), "{context}");
                write(&store, Group::Cache, 30);
                assert_eq!(store.load(Group::Cache).expect("loads"), Some(whole(30)), "{context}");
            }
            Ok(found) => {
                assert_eq!(found, Some(whole(20)), "{context}");
                self.harmless += 1;
            }
            Err(error) => panic!("{context}: one database is whole: {error}"),
        }
    }
}

/// Damages a random place of a copy of a good store, `times` times.
fn damaged(times: u64, seed: u64, damage: impl Fn(&mut Vec<u8>, u64)) -> Tally {
    let dir = tempfile::tempdir().expect("temporary directory");
    let good = dir.path().join("good");
    let store = CheckpointStore::open(&good).expect("creates");
    write(&store, Group::Cache, 10);
    write(&store, Group::Cache, 20);
    store.put(Group::Control, &[(b"a".to_vec(), Some(b"1".to_vec()))]).expect("puts");
    drop(store);
    // An undamaged copy is fine, so what is noticed below is the damage.
    let mut tally = Tally::default();
    copy_dir(&good, &dir.path().join("same"));
    tally.judge(&dir.path().join("same"), "undamaged");
    assert_eq!(tally.harmless, 1);
    tally.harmless = 0;
    let mut state = seed;
    for round in 0..times {
        let bad = dir.path().join("bad");
        copy_dir(&good, &bad);
        // Every fourth time the list of checkpoints, else sled's own files.
        let files: Vec<PathBuf> = match round % 4 {
            0 => vec![bad.join(sidecar::FILE_NAME)],
            _ => fs::read_dir(bad.join(format!("sled/{}", u64::from(round % 4 == 3))))
                .expect("lists")
                .map(|entry| entry.expect("lists").path())
                .filter(|path| path.is_file())
                .collect(),
        };
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Mostly the large `db` file.
        let by_size = |path: &&PathBuf| path.metadata().map_or(0, |meta| meta.len());
        let largest = files.iter().max_by_key(by_size).expect("there are files");
        let file = if state >> 60 < 12 { largest } else { &files[(state >> 33) as usize % files.len()] };
        let mut bytes = fs::read(file).expect("reads");
        if !bytes.is_empty() {
            damage(&mut bytes, state >> 11);
            fs::write(file, bytes).expect("writes");
        }
        tally.judge(&bad, &format!("round {round} {}", file.display()));
        fs::remove_dir_all(&bad).expect("removes");
    }
    tally
}

#[test]
fn flipped_bits_never_change_a_checkpoint_silently() {
    let tally = damaged(300, 1, |bytes, random| {
        // The written part of sled's file lies in front; the rest of it is mostly unused.
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |at| at + 1) as u64;
        bytes[(random % used) as usize] ^= 1 << (random >> 50 & 7);
    });
    println!("300 flipped bits: {tally:?}");
    assert!(tally.refused == 75 && tally.fell_back > 100, "{tally:?}");
}

#[test]
fn shortened_files_never_change_a_checkpoint_silently() {
    let tally = damaged(100, 2, |bytes, random| {
        let length = random % bytes.len() as u64;
        bytes.truncate(length as usize);
    });
    println!("100 shortened files: {tally:?}");
    assert!(tally.refused == 25 && tally.fell_back > 30, "{tally:?}");
}
