//! Plots as SVG, by hand: times to the first token, hit rate over time, balance over time.

use std::fmt::Write as _;

use super::stats::{Run, quantile};

/// A colour a run; with more runs they come again.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"];
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const GAP: f64 = 70.0;
/// Parts that a run is cut into for hit rates.
const PARTS: usize = 60;

struct Panel<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
    /// The x axis counts powers of ten.
    logarithmic: bool,
    lines: Vec<Vec<(f64, f64)>>,
    top: f64,
}

/// All runs in one picture, each with a name and a colour.
pub fn svg(runs: &[(String, Run)]) -> String {
    let panels = [
        Panel {
            title: "Time to the first token",
            x: "seconds",
            y: "share of requests",
            logarithmic: true,
            lines: runs.iter().map(|(_, run)| distribution(run)).collect(),
            top: 1.0,
        },
        Panel {
            title: "Hit rate over time",
            x: "seconds into the trace",
            y: "share of prompt tokens",
            logarithmic: false,
            lines: runs.iter().map(|(_, run)| run.hit_rates(PARTS)).collect(),
            top: 1.0,
        },
        Panel {
            title: "Balance over time (1 is even)",
            x: "seconds into the trace",
            y: "longest queue / mean queue",
            logarithmic: false,
            lines: runs.iter().map(|(_, run)| balance(run)).collect(),
            top: 0.0,
        },
    ];
    let legend = runs.len().div_ceil(3) as f64 * 20.0 + 30.0;
    let height = legend + panels.len() as f64 * (HEIGHT + GAP + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {height}\" width=\"{w}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        w = WIDTH + LEFT + 30.0
    );
    for (at, (name, _)) in runs.iter().enumerate() {
        let (x, y) = (LEFT + (at % 3) as f64 * 260.0, 20.0 + (at / 3) as f64 * 20.0);
        let colour = COLOURS[at % COLOURS.len()];
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"{y}\">{}</text>",
            y - 6.0,
            x + 20.0,
            escaped(name)
        );
    }
    for (at, panel) in panels.iter().enumerate() {
        draw(&mut out, panel, legend + at as f64 * (HEIGHT + GAP + 20.0));
    }
    out.push_str("</svg>\n");
    out
}

/// Shares of requests below each time, at up to 200 points.
fn distribution(run: &Run) -> Vec<(f64, f64)> {
    let times = run.ttfts();
    if times.is_empty() {
        return Vec::new();
    }
    let share = |point: u32| f64::from(point) / 200.0;
    (1..=200).map(|point| (quantile(&times, share(point)).max(1e-4), share(point))).collect()
}

/// The mean of each of [`PARTS`] parts.
fn balance(run: &Run) -> Vec<(f64, f64)> {
    let parts = run.spread.chunks(run.spread.len().div_ceil(PARTS).max(1));
    parts
        .map(|part| {
            let mean = part.iter().map(|s| s.most_to_mean).sum::<f64>() / part.len() as f64;
            (part[0].at, mean)
        })
        .collect()
}

fn draw(out: &mut String, panel: &Panel<'_>, top: f64) {
    let scale = |x: f64| if panel.logarithmic { x.log10() } else { x };
    let points = || panel.lines.iter().flatten();
    let (low, high) = points().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (x, _)| {
        (low.min(scale(*x)), high.max(scale(*x)))
    });
    let (low, high) = match panel.logarithmic {
        _ if low > high => (0.0, 1.0),
        true => (low.floor(), high.ceil().max(low.floor() + 1.0)),
        false => (0.0, high.max(1.0)),
    };
    let most = points().map(|(_, y)| *y).fold(panel.top, f64::max).max(1e-9);
    let place = |x: f64, y: f64| {
        let (right, up) = ((scale(x) - low) / (high - low) * WIDTH, y / most * HEIGHT);
        (LEFT + right, top + 20.0 + HEIGHT - up)
    };
    let _ =
        writeln!(out, "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 10.0, panel.title);
    let bottom = top + 20.0 + HEIGHT;
    for step in 0..=4 {
        let value = most * f64::from(step) / 4.0;
        let y = bottom - HEIGHT * f64::from(step) / 4.0;
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {y:.1}h{WIDTH}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            short(value)
        );
    }
    let ticks: Vec<f64> = if panel.logarithmic {
        (low as i32..=high as i32).map(f64::from).collect()
    } else {
        (0..=6).map(|step| low + (high - low) * f64::from(step) / 6.0).collect()
    };
    for tick in ticks {
        let x = LEFT + (tick - low) / (high - low) * WIDTH;
        let label = short(if panel.logarithmic { 10_f64.powf(tick) } else { tick });
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {bottom:.1}v5\" stroke=\"#888\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 18.0
        );
    }
    let (middle, half) = (LEFT + WIDTH / 2.0, top + 20.0 + HEIGHT / 2.0);
    let _ = writeln!(
        out,
        "<text x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(16 {half:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        bottom + 36.0,
        panel.x,
        panel.y
    );
    for (at, line) in panel.lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        let colour = COLOURS[at % COLOURS.len()];
        let _ = write!(out, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"");
        for (x, y) in line {
            let (x, y) = place(*x, *y);
            let _ = write!(out, "{x:.1},{y:.1} ");
        }
        out.push_str("\"/>\n");
    }
}

/// A number with as many digits as it takes to tell it from its neighbours.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::stats::{Done, Spread};
    use super::*;

    #[test]
    fn every_run_has_a_line_in_each_panel_and_all_points_lie_inside() {
        let done = |n: u32| Done {
            at: f64::from(n),
            ttft: Some(f64::from(n) / 7.0 + 0.01),
            itl: None,
            prompt: 10,
            cached: n % 10,
        };
        let spread = |n: u32| Spread { at: f64::from(n), most_to_mean: 1.0 + f64::from(n) / 9.0 };
        let run = Run {
            requests: (0..90).map(done).collect(),
            spread: (0..90).map(spread).collect(),
            seconds: 90.0,
        };
        let picture = svg(&[("a<b".to_owned(), run.clone()), ("c".to_owned(), run)]);
        assert_eq!(picture.matches("<polyline").count(), 6);
        assert!(picture.contains("a&lt;b") && picture.ends_with("</svg>\n"));
        for points in picture.split("points=\"").skip(1) {
            let points = points.split('"').next().unwrap();
            for point in points.split_whitespace() {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=LEFT + WIDTH).contains(&x) && y > 0.0, "{point}");
            }
        }
    }

    #[test]
    fn runs_without_any_answer_are_drawn_as_nothing() {
        let picture = svg(&[("none".to_owned(), Run::default())]);
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }
}
