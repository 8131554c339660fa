//! The name services against fake servers on real sockets.

mod fake;
mod kubernetes;
mod polaris;

use std::time::Duration;

use super::NameService;

/// Waits until something is so.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..5000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never came true: {what}");
}

/// The addresses that get requests, as far as anything is known.
fn usable(service: &dyn NameService, name: &str) -> Option<Vec<String>> {
    let answer = service.answer(name)?;
    Some(answer.usable().map(|endpoint| endpoint.address.clone()).collect())
}

fn trouble(service: &dyn NameService) -> String {
    service.states()[0].trouble.clone().unwrap_or_default()
}

async fn until_usable(service: &dyn NameService, name: &str, addresses: &[&str]) {
    let wanted = Some(addresses.iter().map(|address| (*address).to_owned()).collect::<Vec<_>>());
    eventually(&format!("{name} is {addresses:?}"), || usable(service, name) == wanted).await;
}
