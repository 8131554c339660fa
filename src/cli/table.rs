//! Tables without lines: columns, and words of state in colour.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};

use super::output::Paint;

/// Renders rows below headings. Headings that start with `>` are aligned to the right.
pub(crate) fn render(headings: &[&str], rows: Vec<Vec<String>>, paint: Paint) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
    table.add_rows(rows);
    for (column, heading) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        if heading.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let painted = table.lines().enumerate().map(|(at, line)| match at {
        0 => paint.dim(line.trim_end()),
        _ => paint_states(line.trim_end(), paint),
    });
    painted.collect::<Vec<_>>().join("\n")
}

/// Colours are put in after the columns are laid out, so that they do not count as width.
fn paint_states(line: &str, paint: Paint) -> String {
    if !paint.on {
        return line.to_owned();
    }
    let words = line.split_inclusive(' ').map(|word| match word.trim_end() {
        "online" | "alive" => paint.green(word),
        "offline" | "down" | "silent" => paint.red(word),
        "draining" | "unreachable" => paint.yellow(word),
        "leader" => paint.bold(word),
        _ => word.to_owned(),
    });
    words.collect()
}

/// A duration for people, two units at most.
pub(crate) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        _ if ms < 1000 => format!("{ms} ms"),
        0..60 => format!("{s} s"),
        60..3600 => format!("{} m {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} m", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A count and its noun.
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}
