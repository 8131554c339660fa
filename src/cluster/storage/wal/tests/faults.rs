//! Power cuts, failing syncs, full disks, flipped bits and cut files.

use std::io::ErrorKind;

use super::*;
use crate::cluster::storage::sim_disk::DiskOp;

/// Small seeded generator for the steps; the disk has its own.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn step(&mut self) -> (Group, Step) {
        let group = Group::ALL[self.below(2) as usize];
        let step = match self.below(16) {
            0..=8 => Step::Append { count: 1 + self.below(4), salt: self.below(200) },
            9 | 10 => Step::Vote(self.below(1000)),
            11 | 12 => Step::Truncate(self.below(9)),
            13 | 14 => Step::Purge(self.below(11)),
            _ => Step::Committed(self.below(1000)),
        };
        (group, step)
    }
}

fn dice(seed: u64) -> Dice {
    Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
}

/// Random steps until the log refuses or `steps` are done.
fn run(driver: &mut Driver, dice: &mut Dice, steps: usize) {
    for _ in 0..steps {
        let (group, step) = dice.step();
        if !driver.step(group, &step) {
            return;
        }
        // Waiting now and then makes batches of one and of many.
        if dice.below(4) == 0
            && let Some((_, waiting)) = driver.waiting[group.index()].last()
        {
            let answer = waiting.recv().expect("every callback is called");
            let (tx, again) = mpsc::channel();
            tx.send(answer).expect("the receiver is here");
            driver.waiting[group.index()].last_mut().expect("just seen").1 = again;
        }
    }
}

/// Opens after a power cut, which may strike again while opening.
fn open_after_cut(disk: &SimDisk, context: &str) -> Wal {
    disk.power_cycle();
    match open(disk) {
        Ok((wal, _)) => wal,
        Err(error) => panic!("{context}: {error}"),
    }
}

/// Runs steps, cuts the power during operation `cut`, and checks what is found.
fn cut_once(disk: &SimDisk, dice: &mut Dice, cut: u64, steps: usize, context: &str) {
    disk.cut_power_after(cut);
    let mut driver = match Driver::open(disk) {
        Ok(driver) => driver,
        Err(error) => {
            assert!(!disk.powered(), "{context}: while opening: {error}");
            drop(open_after_cut(disk, context));
            return;
        }
    };
    run(&mut driver, dice, steps);
    let vouched = driver.settle();
    driver.wal = None;
    let found = open_after_cut(disk, context);
    driver.check_found(vouched, &found, context);
    // What was found was told to the caller: a second cut must not take it away.
    let known = Group::ALL.map(|group| Model::of(&found, group));
    drop(found);
    let again = open_after_cut(disk, context);
    assert_eq!(Group::ALL.map(|group| Model::of(&again, group)), known, "{context}: second opening");
}

#[test]
fn power_cuts_at_random_operations_lose_nothing_acknowledged() {
    for seed in 0..400 {
        let disk = SimDisk::new(seed);
        let mut dice = dice(seed);
        for round in 0..4 {
            let cut = 1 + dice.below(250);
            cut_once(&disk, &mut dice, cut, 60, &format!("seed {seed} round {round} cut {cut}"));
        }
    }
}

#[test]
fn power_cuts_at_every_operation_lose_nothing_acknowledged() {
    for seed in 1000..1004 {
        let whole = SimDisk::new(seed);
        let mut driver = Driver::open(&whole).expect("creates");
        run(&mut driver, &mut dice(seed), 40);
        driver.settle();
        drop(driver);
        for cut in 1..=whole.ops() {
            let disk = SimDisk::new(seed ^ cut << 32);
            cut_once(&disk, &mut dice(seed), cut, 40, &format!("seed {seed} cut {cut}"));
        }
    }
}

#[test]
fn a_failed_sync_is_final_and_never_repeated() {
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let mut dice = dice(seed);
        let mut driver = Driver::open(&disk).expect("creates");
        run(&mut driver, &mut dice, 10);
        driver.settle();
        let base = [driver.history[0].len(), driver.history[1].len()];
        disk.fail_nth(DiskOp::Sync, 1 + dice.below(6), ErrorKind::Other);
        run(&mut driver, &mut dice, 200);
        let vouched = driver.settle();
        let vouched = [vouched[0].max(base[0]), vouched[1].max(base[1])];
        if driver.wal().failed().is_none() {
            // The fault hit the background thread, which starts over with a new file.
            continue;
        }
        let syncs = disk.syncs();
        assert!(matches!(
            driver.wal().save_vote(Group::Cache, Bytes::new(), done().0),
            Err(WalError::Failed(_))
        ));
        driver.wal = None;
        assert!(disk.syncs() - syncs <= 2, "only the background thread may still finish a file a group");

        // The process starts again on a machine that stayed up: pages that were never written
        // look clean. What is found now must survive a power cut.
        disk.process_restart();
        let (wal, _) = open(&disk).expect("opens");
        driver.check_found(vouched, &wal, &format!("seed {seed}"));
        let known = Group::ALL.map(|group| Model::of(&wal, group));
        drop(wal);
        let again = open_after_cut(&disk, &format!("seed {seed}"));
        assert_eq!(Group::ALL.map(|group| Model::of(&again, group)), known, "seed {seed}");
    }
}

#[test]
fn a_failed_write_is_final() {
    let disk = SimDisk::new(5);
    let (wal, _) = open(&disk).expect("creates");
    assert!(acknowledged(&append(&wal, Group::Cache, 0..3, 0)));
    // The writer may be preceded by the background thread, which makes one file a group.
    for _ in 0..8 {
        disk.fail_nth(DiskOp::Write, 1, ErrorKind::Other);
    }
    let mut failed = false;
    for index in 3..20 {
        let (done, waiting) = done();
        match wal.append(Group::Cache, vec![(index, payload(index, 0))], done) {
            Ok(()) => failed |= !acknowledged(&waiting),
            Err(WalError::Failed(_)) => failed = true,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(failed && wal.failed().is_some());
}

#[test]
fn a_full_disk_is_an_error_and_all_is_there_once_there_is_space() {
    let disk = SimDisk::new(9);
    let mut driver = Driver::open(&disk).expect("creates");
    assert!(driver.step(Group::Control, &Step::Append { count: 4, salt: 1 }));
    driver.settle();
    let base = driver.history[0].len();
    disk.set_capacity(Some(disk.used() + 4096));
    for salt in 0..200 {
        if !driver.step(Group::Control, &Step::Append { count: 5, salt }) {
            break;
        }
    }
    let vouched = driver.settle();
    let why = driver.wal().failed().expect("the disk is full");
    assert!(why.contains("full"), "{why}");
    driver.wal = None;
    disk.process_restart();
    let (wal, _) = open(&disk).expect("opens");
    driver.check_found([vouched[0].max(base), 1], &wal, "full disk");
    assert!(acknowledged(&append(&wal, Group::Cache, 0..100, 0)));
}

/// A log with several segments, recycled ones among them, closed cleanly.
fn full_log(seed: u64) -> (SimDisk, [Model; 2]) {
    let disk = SimDisk::new(seed);
    let mut dice = dice(seed);
    let mut driver = Driver::open(&disk).expect("creates");
    run(&mut driver, &mut dice, 120);
    for group in Group::ALL {
        for salt in 0..6 {
            assert!(driver.step(group, &Step::Append { count: 9, salt }));
        }
        assert!(driver.step(group, &Step::Vote(seed)));
    }
    driver.settle();
    driver.wal = None;
    (disk, driver.models)
}

/// Opens a damaged copy: an error, or exactly the same data. True if it was noticed.
fn noticed_or_harmless(disk: &SimDisk, expected: &[Model; 2], context: &str) -> bool {
    match open(disk) {
        Err(_) => true,
        Ok((wal, _)) => {
            for group in Group::ALL {
                assert_eq!(Model::of(&wal, group), expected[group.index()], "{context}");
            }
            false
        }
    }
}

#[test]
fn flipped_bits_are_noticed_or_harmless() {
    let (mut noticed, mut harmless) = (0, 0);
    for seed in 0..6 {
        let (disk, expected) = full_log(seed);
        let paths = disk.paths();
        let mut dice = dice(seed + 77);
        for _ in 0..120 {
            let path = &paths[dice.below(paths.len() as u64) as usize];
            let size = disk.bytes_of(path).expect("is there").len() as u64;
            let (byte, bit) = (dice.below(size), dice.below(8) as u8);
            let copy = disk.fork();
            copy.flip(path, byte, bit);
            let context = format!("seed {seed} {} byte {byte} bit {bit}", path.display());
            match noticed_or_harmless(&copy, &expected, &context) {
                true => noticed += 1,
                false => harmless += 1,
            }
        }
    }
    println!("720 flipped bits: {noticed} noticed, {harmless} harmless");
    assert!(noticed > 300);
}

#[test]
fn every_bit_of_an_acknowledged_frame_is_guarded() {
    let disk = SimDisk::new(3);
    let (wal, _) = open(&disk).expect("creates");
    assert!(acknowledged(&append(&wal, Group::Control, 1..3, 150)));
    drop(wal);
    let path = Path::new("/r/log/control-00000001.wal");
    let bytes = disk.bytes_of(path).expect("is there");
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("is not empty");
    let padding: Vec<usize> = (64..=end).filter(|at| bytes[*at] == 0).collect();
    for byte in 0..=end {
        let copy = disk.fork();
        copy.flip(path, byte as u64, (byte % 8) as u8);
        match open(&copy) {
            Err(error) => assert!(error.forbids_voting() || matches!(error, WalError::Version { .. })),
            Ok((wal, _)) => {
                assert!(padding.contains(&byte), "byte {byte} is not guarded");
                let read = wal.read(Group::Control, 1..3, usize::MAX).expect("reads");
                assert_eq!(read, [(1, payload(1, 150)), (2, payload(2, 150))]);
            }
        }
    }
}

#[test]
fn shortened_files_are_noticed() {
    let mut noticed = 0;
    for seed in 20..24 {
        let (disk, expected) = full_log(seed);
        let paths = disk.paths();
        let mut dice = dice(seed + 77);
        for _ in 0..40 {
            let path = &paths[dice.below(paths.len() as u64) as usize];
            let copy = disk.fork();
            let size = dice.below(copy.bytes_of(path).expect("is there").len() as u64);
            copy.truncate(path, size);
            let context = format!("seed {seed} {} cut to {size}", path.display());
            noticed += u32::from(noticed_or_harmless(&copy, &expected, &context));
        }
    }
    // A segment that was only prepared may be shortened without harm; it is made anew.
    assert!(noticed > 80, "{noticed} of 160");
}

#[test]
fn a_missing_segment_is_noticed() {
    let (disk, expected) = full_log(31);
    for path in disk.paths() {
        let copy = disk.fork();
        copy.remove(&path).expect("is there");
        noticed_or_harmless(&copy, &expected, &format!("without {}", path.display()));
    }
}

#[test]
fn damage_under_an_open_log_is_noticed_by_the_reader() {
    let disk = SimDisk::new(3);
    let (wal, _) = open(&disk).expect("creates");
    assert!(acknowledged(&append(&wal, Group::Control, 1..12, 150)));
    // The cache holds 300 bytes; entry 2 is on disk only.
    disk.flip(Path::new("/r/log/control-00000001.wal"), 600, 3);
    let error = wal.read(Group::Control, 1..12, usize::MAX).expect_err("is damaged");
    assert!(matches!(error, WalError::Corrupt { .. }), "{error}");
}

#[test]
fn segments_are_recycled_and_what_they_held_never_comes_back() {
    let disk = SimDisk::new(8);
    let mut driver = Driver::open(&disk).expect("creates");
    for round in 0..60 {
        assert!(driver.step(Group::Cache, &Step::Append { count: 6, salt: round }));
        assert!(driver.step(Group::Cache, &Step::Purge(3)));
        driver.settle();
    }
    driver.wal = None;
    let stale = disk.paths().iter().filter(|path| path.to_string_lossy().contains("/cache-")).any(|path| {
        // Recycled files are full of frames of other segments behind their own.
        disk.bytes_of(path).is_some_and(|bytes| bytes[3000..].iter().any(|byte| *byte != 0))
    });
    assert!(stale, "no segment was recycled");
    let names: Vec<_> = disk.paths();
    assert!(names.len() < 12, "files are bounded: {names:?}");
    let again = Driver::open(&disk).expect("opens");
    assert_eq!(again.models, driver.models);
}

#[test]
fn what_lay_behind_a_torn_frame_never_comes_back() {
    let disk = SimDisk::new(4);
    let (wal, _) = open(&disk).expect("creates");
    let (done, waiting) = done();
    wal.sync_watermark(done).expect("accepted");
    assert!(acknowledged(&waiting));
    let watermark = disk.bytes_of(Path::new("/r/watermark")).expect("is there");
    assert!(acknowledged(&append(&wal, Group::Control, 1..4, 0)));
    drop(wal);
    // As after a power cut that came before the sync: the first of three frames is torn, the
    // two behind it are whole, and the watermark knows of none.
    disk.damage(Path::new("/r/watermark"), |bytes| bytes.clone_from(&watermark));
    let path = Path::new("/r/log/control-00000001.wal");
    let bytes = disk.bytes_of(path).expect("is there");
    let first = bytes.windows(4).position(|window| window == b"1/0/").expect("is there");
    disk.flip(path, first as u64, 0);
    let (wal, recovered) = open(&disk).expect("a torn tail is cut");
    assert_eq!(recovered[0].last, None);
    assert!(recovered[0].truncated_tail_bytes > 0);
    // A frame of the same length takes the torn one's place.
    let other = Bytes::from(vec![9; payload(1, 0).len()]);
    let (done, waiting) = super::done();
    wal.append(Group::Control, vec![(1, other)], done).expect("accepted");
    assert!(acknowledged(&waiting));
    drop(wal);
    let (_, recovered) = open(&disk).expect("opens");
    assert_eq!(recovered[0].last, Some(1));
}
