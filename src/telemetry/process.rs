//! The process as the kernel sees it, under the names that Prometheus' clients agree on
//! (`process_*`, without a prefix of ours), so that ordinary dashboards find them.

use std::sync::OnceLock;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// What `/proc/self` says; what cannot be read is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time, user and system, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Bytes in memory.
    pub resident_bytes: Option<u64>,
    /// Bytes of address space.
    pub virtual_bytes: Option<u64>,
    /// Threads.
    pub threads: Option<u64>,
    /// Start, in seconds since 1970.
    pub start_seconds: Option<f64>,
    /// Open file descriptors.
    pub open_fds: Option<u64>,
    /// Most file descriptors allowed; `None` also where there is no limit.
    pub max_fds: Option<u64>,
}

impl Usage {
    /// Reads it now: four small files and one directory.
    pub fn read() -> Self {
        static BOOT: OnceLock<Option<f64>> = OnceLock::new();
        let text = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).ok();
        let boot = *BOOT.get_or_init(|| text("stat").and_then(|stat| boot_time(&stat)));
        let ticks = rustix::param::clock_ticks_per_second().max(1) as f64;
        let page = rustix::param::page_size() as u64;
        let mut usage = text("self/stat").map(|stat| from_stat(&stat, ticks, page, boot)).unwrap_or_default();
        // The directory is open while it is read: one is ours.
        usage.open_fds =
            std::fs::read_dir("/proc/self/fd").ok().map(|fds| (fds.count() as u64).saturating_sub(1));
        usage.max_fds = text("self/limits").and_then(|limits| max_open_files(&limits));
        usage
    }
}

/// Reads `/proc/self/stat`. The command in brackets may hold anything, so what counts begins
/// after the last bracket, with field 3.
fn from_stat(stat: &str, ticks: f64, page: u64, boot: Option<f64>) -> Usage {
    let Some((_, rest)) = stat.rsplit_once(')') else { return Usage::default() };
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Numbered from 1, as in proc(5).
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok());
    let seconds = |number| field(number).map(|count| count as f64 / ticks);
    Usage {
        cpu_seconds: seconds(14).zip(seconds(15)).map(|(user, system)| user + system),
        threads: field(20),
        start_seconds: boot.zip(seconds(22)).map(|(boot, after)| boot + after),
        virtual_bytes: field(23),
        resident_bytes: field(24).map(|pages| pages * page),
        open_fds: None,
        max_fds: None,
    }
}

fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn max_open_files(limits: &str) -> Option<u64> {
    limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Exports [`Usage`] at each scrape.
#[derive(Debug)]
pub struct ProcessMetrics;

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let usage = Usage::read();
        if let Some(seconds) = usage.cpu_seconds {
            let help = "Processor time used, user and system";
            let family = encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?;
            ConstCounter::new(seconds).encode(family)?;
        }
        let gauges = [
            ("process_resident_memory_bytes", "Memory in use", usage.resident_bytes.map(|n| n as f64)),
            ("process_virtual_memory_bytes", "Address space in use", usage.virtual_bytes.map(|n| n as f64)),
            ("process_threads", "Threads", usage.threads.map(|n| n as f64)),
            ("process_open_fds", "Open file descriptors", usage.open_fds.map(|n| n as f64)),
            ("process_max_fds", "Most file descriptors allowed", usage.max_fds.map(|n| n as f64)),
            ("process_start_time_seconds", "Start, in seconds since 1970", usage.start_seconds),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
                ConstGauge::new(value).encode(family)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_brackets_and_spaces_does_not_shift_the_fields() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 150 50 13 14 15 16 7 18 1000 4096 3 21";
        let usage = from_stat(&format!("42 (a ) (b) {tail}"), 100.0, 4096, Some(1_000_000.0));
        let expected = Usage {
            cpu_seconds: Some(2.0),
            resident_bytes: Some(3 * 4096),
            virtual_bytes: Some(4096),
            threads: Some(7),
            start_seconds: Some(1_000_010.0),
            open_fds: None,
            max_fds: None,
        };
        assert_eq!(usage, expected);
        assert_eq!(from_stat("nonsense", 100.0, 4096, None), Usage::default());
        assert_eq!(
            max_open_files("Limit Soft Hard\nMax open files            1024   4096   files\n"),
            Some(1024)
        );
        assert_eq!(max_open_files("Max open files            unlimited   unlimited   files\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_seen() {
        let held = std::fs::File::open("/proc/self/stat").unwrap();
        let usage = Usage::read();
        drop(held);
        assert!(usage.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{usage:?}");
        assert!(usage.open_fds.is_some_and(|fds| fds >= 4), "{usage:?}");
        assert!(usage.threads.is_some_and(|threads| threads >= 1), "{usage:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(
            usage.start_seconds.is_some_and(|start| start <= now + 2.0 && start > now - 86_400.0),
            "{usage:?}"
        );
        assert!(usage.cpu_seconds.is_some(), "{usage:?}");
    }
}
