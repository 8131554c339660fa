//! Random operations and clean reopenings against the naive model.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Action {
    Step(Group, Step),
    Read(Group, u64, usize),
    Settle,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..6_u64, 0..200_u64).prop_map(|(count, salt)| Step::Append { count, salt }),
        2 => any::<u64>().prop_map(Step::Vote),
        2 => (0..9_u64).prop_map(Step::Truncate),
        2 => (0..12_u64).prop_map(Step::Purge),
        1 => any::<u64>().prop_map(Step::Committed),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let group = prop_oneof![Just(Group::Control), Just(Group::Cache)];
    prop_oneof![
        12 => (group.clone(), step()).prop_map(|(group, step)| Action::Step(group, step)),
        4 => (group, 0..20_u64, 0..2000_usize).prop_map(|(group, back, bytes)| Action::Read(group, back, bytes)),
        1 => Just(Action::Settle),
        1 => Just(Action::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_behaves_like_a_map(actions in proptest::collection::vec(action(), 1..120), seed in any::<u64>()) {
        let disk = SimDisk::new(seed);
        let mut driver = Driver::open(&disk).expect("creates");
        for action in actions {
            match action {
                Action::Step(group, step) => prop_assert!(driver.step(group, &step)),
                Action::Read(group, back, bytes) => {
                    let model = &driver.models[group.index()];
                    let after_purge = model.purged_index().map_or(0, |index| index + 1);
                    let start = model.next.saturating_sub(back).max(after_purge);
                    let read = driver.wal().read(group, start..model.next, bytes).expect("reads");
                    let mut left = bytes;
                    let mut expected = Vec::new();
                    for (index, data) in model.entries.range(start..) {
                        if data.len() > left && !expected.is_empty() {
                            break;
                        }
                        left = left.saturating_sub(data.len());
                        expected.push((*index, data.clone()));
                    }
                    prop_assert_eq!(read, expected);
                }
                Action::Settle => drop(driver.settle()),
                Action::Reopen => {
                    let before = driver.models.clone();
                    driver.wal = None;
                    driver = Driver::open(&disk).expect("opens");
                    prop_assert_eq!(&driver.models, &before);
                }
            }
        }
        for group in Group::ALL {
            prop_assert_eq!(Model::of(driver.wal(), group), driver.models[group.index()].clone());
        }
    }
}
