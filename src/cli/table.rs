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

/// A column of a table that has to fit.
#[derive(Clone, Copy)]
pub(crate) struct Column {
    heading: &'static str,
    /// The highest goes first when there is no room; 0 never goes.
    rank: u8,
}

impl Column {
    /// One that is always shown.
    pub(crate) fn kept(heading: &'static str) -> Self {
        Self { heading, rank: 0 }
    }

    /// One that is shown where there is room; the highest rank goes first.
    pub(crate) fn dropped(rank: u8, heading: &'static str) -> Self {
        Self { heading, rank }
    }
}

/// [`render`], without as many columns as it takes to be no wider than `width`.
pub(crate) fn render_within(
    columns: &[Column],
    mut rows: Vec<Vec<String>>,
    paint: Paint,
    width: Option<usize>,
) -> String {
    let mut columns = columns.to_vec();
    loop {
        let headings: Vec<&str> = columns.iter().map(|column| column.heading).collect();
        let plain = render(&headings, rows.clone(), Paint { on: false });
        let widest = plain.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        let first_to_go = (0..columns.len()).max_by_key(|at| columns[*at].rank);
        match first_to_go.filter(|at| columns[*at].rank > 0 && width.is_some_and(|width| widest > width)) {
            None => return render(&headings, rows, paint),
            Some(at) => {
                columns.remove(at);
                rows.iter_mut().for_each(|row| _ = row.remove(at));
            }
        }
    }
}

/// Phrases one after the other, on as many lines as it takes.
pub(crate) fn flow(phrases: &[String], between: &str, width: Option<usize>) -> String {
    let mut lines: Vec<String> = Vec::new();
    for phrase in phrases {
        match lines.last_mut() {
            Some(line)
                if width.is_none_or(|width| {
                    line.chars().count() + between.len() + phrase.chars().count() <= width
                }) =>
            {
                line.push_str(between);
                line.push_str(phrase);
            }
            _ => lines.push(phrase.clone()),
        }
    }
    lines.join("\n")
}

/// A line no longer than the terminal is wide.
pub(crate) fn cut(line: &str, width: Option<usize>) -> String {
    match width {
        Some(width) if line.chars().count() > width => {
            let kept: String = line.chars().take(width.saturating_sub(1)).collect();
            format!("{kept}…")
        }
        _ => line.to_owned(),
    }
}

/// Colours are put in after the columns are laid out, so that they do not count as width.
fn paint_states(line: &str, paint: Paint) -> String {
    if !paint.on {
        return line.to_owned();
    }
    let words = line.split_inclusive(' ').map(|word| match word.trim_end() {
        "online" | "alive" => paint.green(word),
        "offline" | "down" | "silent" | "open" => paint.red(word),
        "draining" | "unreachable" | "half-open" => paint.yellow(word),
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
