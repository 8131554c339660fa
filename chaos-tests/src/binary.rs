//! The program under test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Builds the program once per test process (which does nothing when it is fresh) and says
/// where it is. `EVERLINE_BINARY` names another one to try, such as that of a release.
pub fn everline() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("EVERLINE_BINARY") {
            return given.into();
        }
        // target/PROFILE/deps/TEST-HASH
        let test = std::env::current_exe().expect("a test has a path");
        let folder = test.ancestors().nth(2).expect("a test lies in deps/");
        let target = folder.parent().expect("a profile has a folder");
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--quiet", "--package", "everline", "--bin", "everline"]);
        command.arg("--target-dir").arg(target);
        if folder.ends_with("release") {
            command.arg("--release");
        }
        command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let status = command.status().expect("cargo runs");
        assert!(status.success(), "the program under test does not build");
        folder.join("everline")
    })
}

/// Runs a command of the program to its end.
pub async fn run(args: &[&str]) -> Output {
    let output = tokio::process::Command::new(everline()).args(args).kill_on_drop(true).output();
    let limit = std::time::Duration::from_secs(30);
    let output = tokio::time::timeout(limit, output).await;
    output.unwrap_or_else(|_| panic!("everline {args:?} took 30 s")).expect("everline starts")
}

/// Like [`run`]; the command must succeed. Its standard output.
pub async fn run_ok(args: &[&str]) -> String {
    let output = run(args).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "everline {args:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}
