//! The process's environment, read here and nowhere else in the library.

use std::path::PathBuf;

/// All variables that are valid Unicode.
pub fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Whether `NO_COLOR` asks for plain output.
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Where temporary files go.
pub fn temporary_folder() -> PathBuf {
    std::env::temp_dir()
}

/// The admin token in `EVERLINE_ADMIN_TOKEN`, for commands that ask a cluster.
pub fn admin_token() -> Option<String> {
    std::env::var("EVERLINE_ADMIN_TOKEN").ok().filter(|token| !token.trim().is_empty())
}

/// The node token in `EVERLINE_NODE_TOKEN`, for agents.
pub fn node_token() -> Option<String> {
    std::env::var("EVERLINE_NODE_TOKEN").ok().filter(|token| !token.trim().is_empty())
}

/// Where Kubernetes says that its API server is, to whatever runs in it.
pub fn kubernetes_api() -> Option<String> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok().filter(|host| !host.is_empty())?;
    let port = std::env::var("KUBERNETES_SERVICE_PORT").unwrap_or_else(|_| "443".to_owned());
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    Some(format!("https://{host}:{port}"))
}
