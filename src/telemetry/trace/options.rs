//! What the standard variables say about traces. Values come in; nothing here reads the
//! environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use opentelemetry_sdk::trace::Sampler;

/// Where spans go and which of them.
#[derive(Clone, Debug)]
pub struct TraceOptions {
    /// Full URL that spans are posted to.
    pub endpoint: String,
    /// File with the authority of a collector behind TLS; Mozilla's list without one.
    pub ca: Option<PathBuf>,
    /// Longest time for one export.
    pub timeout: Duration,
    /// `OTEL_TRACES_SAMPLER` with its argument.
    pub sampler: Sampler,
    /// `service.name` and everything else about this process.
    pub resource: BTreeMap<String, String>,
}

/// The path below `OTEL_EXPORTER_OTLP_ENDPOINT`.
const PATH: &str = "v1/traces";

impl TraceOptions {
    /// Reads the `OTEL_*` variables. `None` where they do not ask for traces; an error, with the
    /// remedy, where they ask for what does not exist here.
    pub fn from_variables(variables: impl Iterator<Item = (String, String)>) -> Result<Option<Self>, String> {
        // An empty value counts as none, as the specification says.
        let set: BTreeMap<String, String> =
            variables.filter(|(name, value)| name.starts_with("OTEL_") && !value.is_empty()).collect();
        let get = |name: &str| set.get(name).map(|value| value.trim());
        let of_traces = |what: &str| {
            get(&format!("OTEL_EXPORTER_OTLP_TRACES_{what}"))
                .or_else(|| get(&format!("OTEL_EXPORTER_OTLP_{what}")))
        };
        let endpoint = match (get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), get("OTEL_EXPORTER_OTLP_ENDPOINT")) {
            (Some(whole), _) => whole.to_owned(),
            (None, Some(base)) => format!("{}/{PATH}", base.trim_end_matches('/')),
            (None, None) => return Ok(None),
        };
        let disabled = get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        if disabled || get("OTEL_TRACES_EXPORTER") == Some("none") {
            return Ok(None);
        }
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(format!(
                "traces are not sent: {} is no http:// or https:// URL; set it as in \
                 OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318",
                public(&endpoint)
            ));
        }
        if let Some(protocol) = of_traces("PROTOCOL").filter(|protocol| *protocol != "http/protobuf") {
            return Err(format!(
                "traces are not sent: the OTLP protocol {protocol:?} is not spoken here; set \
                 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf and the collector's port for that, usually 4318"
            ));
        }
        let timeout = match of_traces("TIMEOUT") {
            Some(text) => text.parse().map_err(|_| {
                format!(
                    "traces are not sent: OTEL_EXPORTER_OTLP_TIMEOUT={text} is not a number of milliseconds"
                )
            })?,
            None => 10_000,
        };
        Ok(Some(Self {
            endpoint,
            ca: of_traces("CERTIFICATE").map(PathBuf::from),
            timeout: Duration::from_millis(timeout),
            sampler: sampler(get("OTEL_TRACES_SAMPLER"), get("OTEL_TRACES_SAMPLER_ARG"))?,
            resource: resource(get("OTEL_RESOURCE_ATTRIBUTES"), get("OTEL_SERVICE_NAME")),
        }))
    }

    /// Where spans go, for the log: without credentials.
    pub fn collector(&self) -> String {
        public(&self.endpoint)
    }
}

/// A URL without user and password, for logs.
fn public(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!(
        "{scheme}{}{host}{}",
        if scheme.is_empty() { "" } else { "://" },
        path.split(['?', '#']).next().unwrap_or_default()
    )
}

fn sampler(name: Option<&str>, argument: Option<&str>) -> Result<Sampler, String> {
    let by_parent = |root: Sampler| Sampler::ParentBased(Box::new(root));
    let ratio = || match argument.map(str::parse::<f64>) {
        None => Ok(Sampler::TraceIdRatioBased(1.0)),
        Some(Ok(share)) if (0.0..=1.0).contains(&share) => Ok(Sampler::TraceIdRatioBased(share)),
        Some(_) => {
            Err("traces are not sent: OTEL_TRACES_SAMPLER_ARG must be a share from 0.0 to 1.0".to_owned())
        }
    };
    match name.unwrap_or("parentbased_always_on") {
        "always_on" => Ok(Sampler::AlwaysOn),
        "always_off" => Ok(Sampler::AlwaysOff),
        "traceidratio" => ratio(),
        "parentbased_always_on" => Ok(by_parent(Sampler::AlwaysOn)),
        "parentbased_always_off" => Ok(by_parent(Sampler::AlwaysOff)),
        "parentbased_traceidratio" => Ok(by_parent(ratio()?)),
        other => Err(format!(
            "traces are not sent: OTEL_TRACES_SAMPLER={other} is not known here; use always_on, always_off, \
             traceidratio, parentbased_always_on, parentbased_always_off or parentbased_traceidratio"
        )),
    }
}

fn resource(attributes: Option<&str>, service: Option<&str>) -> BTreeMap<String, String> {
    let mut resource = BTreeMap::from([("service.name".to_owned(), "everline".to_owned())]);
    let pairs = attributes.unwrap_or_default().split(',').filter_map(|pair| pair.split_once('='));
    resource.extend(pairs.map(|(key, value)| (key.trim().to_owned(), percent_decoded(value.trim()))));
    if let Some(service) = service {
        resource.insert("service.name".to_owned(), service.to_owned());
    }
    resource
}

/// Values of `OTEL_RESOURCE_ATTRIBUTES` are percent-encoded; what is not stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<TraceOptions>, String> {
        let owned = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        TraceOptions::from_variables(owned)
    }

    const BASE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/");

    #[test]
    fn traces_are_sent_only_where_an_endpoint_is_named_and_nothing_says_no() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[("OTEL_SERVICE_NAME", "x")]).unwrap().is_none());
        assert!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]).unwrap().is_none());
        for no in [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert!(read(&[BASE, no]).unwrap().is_none(), "{no:?}");
        }
        assert_eq!(read(&[BASE]).unwrap().unwrap().endpoint, "http://c:4318/v1/traces");
        let whole = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://d/own");
        assert_eq!(read(&[BASE, whole]).unwrap().unwrap().endpoint, "http://d/own");
        assert!(read(&[BASE, ("OTEL_SDK_DISABLED", "false")]).unwrap().is_some());
    }

    #[test]
    fn what_does_not_exist_here_is_said_with_a_remedy() {
        for (wrong, remedy) in [
            (("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4317"), "http://127.0.0.1:4318"),
            (("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), "http/protobuf"),
            (("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"), "http/protobuf"),
            (("OTEL_TRACES_SAMPLER", "xray"), "always_on"),
            (("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"), "milliseconds"),
        ] {
            let error = read(&[BASE, wrong]).unwrap_err();
            assert!(error.contains(remedy), "{wrong:?}: {error}");
        }
        let ratio = ("OTEL_TRACES_SAMPLER", "traceidratio");
        assert!(read(&[BASE, ratio, ("OTEL_TRACES_SAMPLER_ARG", "2")]).is_err());
    }

    #[test]
    fn the_service_says_its_name_and_attributes() {
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a, zone = b%2Cc%zz,odd");
        let resource = read(&[BASE, attributes]).unwrap().unwrap().resource;
        assert_eq!(resource["service.name"], "a");
        assert_eq!(resource["zone"], "b,c%zz");
        let named = read(&[BASE, attributes, ("OTEL_SERVICE_NAME", "n")]).unwrap().unwrap().resource;
        assert_eq!(named["service.name"], "n");
        assert_eq!(read(&[BASE]).unwrap().unwrap().resource["service.name"], "everline");
    }

    #[test]
    fn credentials_in_an_endpoint_are_not_told() {
        let options = read(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://u:p@ss@c:4318/own?key=k")]);
        assert_eq!(options.unwrap().unwrap().collector(), "http://c:4318/own");
        let error = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://u:secret@c")]).unwrap_err();
        assert!(error.contains("ftp://c/v1/traces") && !error.contains("secret"), "{error}");
        assert_eq!(public("c:4318"), "c:4318");
    }

    #[test]
    fn samplers_have_their_standard_names() {
        let named = |name, argument| {
            let sampler = read(&[BASE, ("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", argument)]);
            format!("{:?}", sampler.unwrap().unwrap().sampler)
        };
        assert_eq!(named("always_off", ""), "AlwaysOff");
        assert_eq!(named("traceidratio", "0.25"), "TraceIdRatioBased(0.25)");
        assert_eq!(named("parentbased_traceidratio", "0.5"), "ParentBased(TraceIdRatioBased(0.5))");
        assert_eq!(format!("{:?}", read(&[BASE]).unwrap().unwrap().sampler), "ParentBased(AlwaysOn)");
    }
}
