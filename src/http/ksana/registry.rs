//! The replicated registry as a name service: `name_service.provider = "auto"`. The names stand for the
//! groups that are ready.
//!
//! It is for operators to look at: the proxy itself goes by the registry's pairs, which say more.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::api::ControlPlane;
use crate::naming::answer::WEIGHT;
use crate::naming::{Answer, Endpoint, NameService, NameState, Standing};
use crate::state::ksana::Role;

/// See the module.
pub(in crate::http) struct RegistryNames {
    control: Arc<dyn ControlPlane>,
    cluster: String,
    /// The names of the prefill and of the decode groups.
    names: [(Role, String); 2],
}

impl fmt::Debug for RegistryNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryNames").field("names", &self.names).finish_non_exhaustive()
    }
}

impl RegistryNames {
    /// The groups of a cluster, by these names of both kinds.
    pub(in crate::http) fn new(
        control: Arc<dyn ControlPlane>,
        cluster: String,
        prefill: String,
        decode: String,
    ) -> Self {
        Self { control, cluster, names: [(Role::Prefill, prefill), (Role::Decode, decode)] }
    }

    fn groups(&self, role: Role) -> Answer {
        let mut endpoints = Vec::new();
        self.control.ksana(&mut |state, _| {
            let ours =
                state.groups().iter().filter(|(key, _)| key.role == role && key.cluster == self.cluster);
            endpoints = ours
                .map(|(key, group)| Endpoint {
                    address: key.inference_addr.clone(),
                    weight: WEIGHT,
                    standing: if group.ready { Standing::Ready } else { Standing::Out },
                })
                .collect();
        });
        Answer::new(endpoints)
    }
}

impl NameService for RegistryNames {
    fn provider(&self) -> &'static str {
        "auto"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        let (role, _) = self.names.iter().find(|(_, is)| is == name)?;
        Some(Arc::new(self.groups(*role)))
    }

    fn states(&self) -> Vec<NameState> {
        let state = |(role, name): &(Role, String)| NameState {
            name: name.clone(),
            answer: Some(Arc::new(self.groups(*role))),
            age: Some(Duration::ZERO),
            expired: false,
            trouble: None,
            failures: 0,
            lists: 0,
            changes: 0,
        };
        self.names.iter().map(state).collect()
    }
}
