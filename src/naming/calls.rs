//! Results of calls, added up as Polaris' own clients do it for its monitoring, and written as text for a
//! push gateway of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Call;

/// Rows that are kept; results of further endpoints are counted, and nothing more.
const MAX_ROWS: usize = 4096;

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Row {
    namespace: String,
    service: String,
    instance: String,
    code: String,
}

#[derive(Clone, Copy, Default, Debug)]
struct Sums {
    total: u64,
    ok: u64,
    ms: u64,
}

/// What calls came to, since the start.
#[derive(Debug, Default)]
pub struct Calls {
    rows: BTreeMap<Row, Sums>,
    /// Results that were left out because there are too many rows.
    pub left_out: u64,
}

impl Calls {
    /// Adds a result.
    pub fn add(&mut self, namespace: &str, service: &str, call: &Call<'_>) {
        let row = Row {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            instance: call.address.to_owned(),
            code: call.status.unwrap_or_default().to_string(),
        };
        if self.rows.len() >= MAX_ROWS && !self.rows.contains_key(&row) {
            self.left_out += 1;
            return;
        }
        let sums = self.rows.entry(row).or_default();
        sums.total += 1;
        sums.ok += u64::from(call.is_ok());
        sums.ms += call.took.as_millis() as u64;
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Everything, with the names that Polaris' monitoring knows, in the form that push gateways read.
    pub fn to_text(&self, caller: &str) -> String {
        type Read = fn(&Sums) -> u64;
        let families: [(&str, &str, &str, Read); 3] = [
            ("upstream_rq_total", "counter", "total of request per period", |sums| sums.total),
            ("upstream_rq_success", "counter", "total of success request per period", |sums| sums.ok),
            ("upstream_rq_timeout", "gauge", "total of request delay per period", |sums| sums.ms),
        ];
        let mut out = String::new();
        for (family, kind, help, read) in families {
            // Writing into a `String` cannot fail.
            let _ = writeln!(out, "# HELP {family} {help}\n# TYPE {family} {kind}");
            for (row, sums) in &self.rows {
                let _ = writeln!(
                    out,
                    "{family}{{callee_namespace=\"{}\",callee_service=\"{}\",callee_instance=\"{}\",\
                     callee_result_code=\"{}\",caller_service=\"{}\"}} {}",
                    escaped(&row.namespace),
                    escaped(&row.service),
                    escaped(&row.instance),
                    row.code,
                    escaped(caller),
                    read(sums)
                );
            }
        }
        out
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_add_up_by_instance_and_code() {
        let mut calls = Calls::default();
        let call = |address, status, ms| Call { name: "p", address, status, took: Duration::from_millis(ms) };
        for (status, ms) in [(Some(200), 10), (Some(200), 5), (Some(500), 1), (None, 2)] {
            calls.add("Production", "p", &call("a:1", status, ms));
        }
        let text = calls.to_text("every\"line");
        let labels = |code: &str| {
            format!(
                "{{callee_namespace=\"Production\",callee_service=\"p\",callee_instance=\"a:1\",\
                 callee_result_code=\"{code}\",caller_service=\"every\\\"line\"}}"
            )
        };
        for line in [
            format!("upstream_rq_total{} 2", labels("200")),
            format!("upstream_rq_success{} 2", labels("200")),
            format!("upstream_rq_timeout{} 15", labels("200")),
            format!("upstream_rq_total{} 1", labels("500")),
            format!("upstream_rq_success{} 0", labels("500")),
            format!("upstream_rq_success{} 0", labels("0")),
        ] {
            assert!(text.lines().any(|is| is == line), "{line}\n{text}");
        }
    }

    #[test]
    fn rows_are_bounded() {
        let mut calls = Calls::default();
        for at in 0..MAX_ROWS + 2 {
            let address = format!("a:{at}");
            calls.add(
                "n",
                "s",
                &Call { name: "s", address: &address, status: Some(200), took: Duration::ZERO },
            );
        }
        assert_eq!((calls.rows.len(), calls.left_out), (MAX_ROWS, 2));
    }
}
