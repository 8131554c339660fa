//! Links that a thread drives itself, and their end.

use super::*;
use crate::cluster::peer::purpose::Purpose;
use crate::relay::link::PING_EVERY;
use crate::relay::link::caller::{Link, Wanted};
use crate::relay::links::drive_links_here;

/// Runs something on a thread that serves clients, and ends the thread, with all that is left on it.
fn on_a_serving_thread<T: Send>(run: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            drive_links_here();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let done = runtime.block_on(run);
            runtime.shutdown_background();
            done
        });
        thread.join().unwrap()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_a_thread_that_ends_goes_on_by_another_link() {
    let cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = on_a_serving_thread(async {
        let (id, mut listener) = cluster.begin(0, true, 60_000).await;
        read(&mut listener, 50).await;
        assert_eq!(cluster.hub(0).open_links(), 1);
        (id, listener)
    });
    assert_ne!(cluster.holder(id), 0);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 400);
    assert_eq!(cluster.engines.began.lock().as_slice(), [(1, 0)], "its holder was never lost");
    eventually("it has a link that is no thread's", || cluster.hub(0).open_links() == 1).await;
}

#[tokio::test]
async fn a_link_that_nobody_uses_is_closed_and_one_with_a_stream_is_not() {
    let cluster = Cluster::new(2, numbers(1_000_000), &Options::default()).await;
    let (id, _listener) = cluster.begin(1, false, 60_000).await;
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    let peer = cluster.world.members.lock()[cluster.holder(id)].clone();
    let open = async || {
        let channel = Dialer::default().channel(&peer.address, Some(&peer.name), Purpose::Streams).unwrap();
        let times = (Duration::from_secs(20), Some(PING_EVERY * 2));
        Link::open(channel, &cluster.hub(0).view().cluster, times, Arc::new(|_, _| {})).await.unwrap()
    };
    let (used, unused) = (open().await, open().await);
    let within = Duration::from_secs(20);
    let (ticket, _) = used.attach(id, Wanted::default(), within).await.unwrap();
    eventually("it is closed", || !unused.is_open()).await;
    assert!(unused.glance(id, within).await.is_err());
    assert!(used.is_open() && ticket.is_open());
    drop(ticket);
    eventually("it is closed without its stream, too", || !used.is_open()).await;
}
