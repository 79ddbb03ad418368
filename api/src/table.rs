//! A table for the terminal: columns as wide as they need, narrowed or left out to fit.

use std::fmt;
use std::io::{self, Write};

use anstyle::Style;
use clap::builder::PossibleValuesParser;
use gantry_resources::base::ByteSize;

use crate::output::print;
use crate::report::{Failure, USAGE};

const HEADER: Style = Style::new().bold();
const GAP: usize = 2;

/// The terminal's width; without limit if standard output is no terminal.
pub fn terminal_width() -> usize {
    let size = terminal_size::terminal_size_of(std::io::stdout());
    size.map_or(usize::MAX, |(width, _)| usize::from(width.0))
}

/// What a column may give up when the table is wider than the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shrink {
    /// Nothing: it is shown in full.
    Never,
    /// Its cells are cut, to no less than this many characters.
    Cut(usize),
    /// The column is left out. Lower numbers go first; a column without any value goes before all others.
    Drop(u8),
    /// Its cells are cut to this many characters; then the column is left out, in the order of the numbers.
    CutThenDrop(usize, u8),
}

impl Shrink {
    /// The least width of its cells.
    fn least(self) -> Option<usize> {
        match self {
            Self::Cut(least) | Self::CutThenDrop(least, _) => Some(least),
            Self::Never | Self::Drop(_) => None,
        }
    }

    /// Its place in the order in which columns are left out.
    fn order(self) -> Option<u8> {
        match self {
            Self::Drop(order) | Self::CutThenDrop(_, order) => Some(order),
            Self::Never | Self::Cut(_) => None,
        }
    }
}

/// Head of a column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// The word for `--sort`; the table shows it in capitals.
    title: &'static str,
    /// How it may shrink.
    shrink: Shrink,
}

impl Column {
    /// A column that may shrink.
    pub const fn new(title: &'static str, shrink: Shrink) -> Self {
        Self { title, shrink }
    }

    /// A column that is always shown in full.
    pub const fn full(title: &'static str) -> Self {
        Self::new(title, Shrink::Never)
    }

    /// Whether it may be narrower than `width` characters.
    fn can_shrink(&self, width: usize) -> bool {
        let least = self.shrink.least();
        least.is_some_and(|least| width > least.max(self.title.len()))
    }

    fn is_named(&self, name: &str) -> bool {
        self.title.eq_ignore_ascii_case(name)
    }
}

/// Takes a column's title from the command line.
pub fn column(columns: &[Column]) -> PossibleValuesParser {
    let mut titles = Vec::new();
    for column in columns {
        if !titles.contains(&column.title) {
            titles.push(column.title);
        }
    }
    PossibleValuesParser::new(titles)
}

/// A cell; `-` for an absent value or an empty text.
pub fn cell(value: Option<impl ToString>) -> String {
    let text = value.map(|value| value.to_string());
    text.filter(|text| !text.is_empty())
        .unwrap_or_else(|| "-".to_owned())
}

/// Refuses to sort by a column that the table does not have.
pub fn has_column(columns: &[Column], sort: Option<&str>) -> Result<(), Failure> {
    match sort.filter(|sort| !columns.iter().any(|column| column.is_named(sort))) {
        None => Ok(()),
        Some(sort) => {
            let titles: Vec<&str> = columns.iter().map(|column| column.title).collect();
            let what = format!("this table has no column {sort}: {}", titles.join(", "));
            Err(Failure::new(USAGE, what.to_lowercase()))
        }
    }
}

/// Sorts rows by the column of that title; rows with equal cells stay in their order.
pub fn sort_rows<T>(
    rows: &mut [T],
    columns: &[Column],
    title: Option<&str>,
    cells: impl Fn(&T) -> Vec<String>,
) {
    let named = |column: &Column| title.is_some_and(|title| column.is_named(title));
    if let Some(index) = columns.iter().position(named) {
        rows.sort_by_cached_key(|row| order(&cells(row)[index]));
    }
}

/// Prints rows in the order of a column, narrowed to the terminal.
pub fn print_table(
    columns: &[Column],
    rows: Vec<Vec<String>>,
    sort: Option<&str>,
) -> Result<(), Failure> {
    print(|out| write_table(out, columns, rows, sort))
}

/// Writes rows in the order of a column, narrowed to the terminal, and names the columns that did not fit.
pub fn write_table(
    out: &mut dyn Write,
    columns: &[Column],
    rows: Vec<Vec<String>>,
    sort: Option<&str>,
) -> io::Result<()> {
    write_table_within(terminal_width(), out, columns, rows, sort)
}

/// Writes a table as [`write_table`] does, narrowed to `width` characters.
pub fn write_table_within(
    width: usize,
    out: &mut dyn Write,
    columns: &[Column],
    mut rows: Vec<Vec<String>>,
    sort: Option<&str>,
) -> io::Result<()> {
    sort_rows(&mut rows, columns, sort, Vec::clone);
    let table = Table::new(columns, rows).fit(width);
    write!(out, "{table}")?;
    match table.left_out() {
        [] => Ok(()),
        titles => writeln!(
            out,
            "Columns that do not fit the terminal: {}",
            titles.join(", ").to_uppercase()
        ),
    }
}

/// The sort key of a cell: numbers and sizes come first, by their value, then texts, then absent values.
fn order(cell: &str) -> (u8, u64, String) {
    let decimal = |c: char| c.is_ascii_digit() || c == '.';
    let number = cell.parse().ok().filter(|_| cell.chars().all(decimal));
    // Bits of what is not negative are in its order.
    let number = number.map(f64::to_bits);
    let size = || ByteSize::parse(cell).map(|ByteSize(bytes)| (bytes as f64).to_bits());
    match (cell, number.or_else(size)) {
        ("-", _) => (2, 0, String::new()),
        (_, Some(bits)) => (0, bits, String::new()),
        (text, None) => (1, 0, text.to_lowercase()),
    }
}

/// Rows of cells under their columns.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
    left_out: Vec<&'static str>,
}

impl Table {
    /// A table whose rows have one cell for each column.
    pub fn new(columns: &[Column], rows: Vec<Vec<String>>) -> Self {
        Self {
            columns: columns.to_vec(),
            rows,
            left_out: Vec::new(),
        }
    }

    /// Its rows.
    pub fn into_rows(self) -> Vec<Vec<String>> {
        self.rows
    }

    /// Characters of its widest line.
    pub fn width(&self) -> usize {
        self.total(&self.widths())
    }

    /// The table, narrowed to `width` characters as far as its columns allow.
    fn fit(mut self, width: usize) -> Self {
        while self.narrowest() > width {
            let columns = self.columns.iter().enumerate();
            let expendable = columns.filter_map(|(index, column)| {
                let holds = self.rows.iter().any(|row| row[index] != "-");
                Some((holds, column.shrink.order()?, index))
            });
            let Some((.., index)) = expendable.min() else {
                break;
            };
            self.left_out.push(self.columns.remove(index).title);
            self.rows.iter_mut().for_each(|row| drop(row.remove(index)));
        }
        let widths = self.narrowed(width);
        for row in &mut self.rows {
            row.iter_mut()
                .zip(&widths)
                .for_each(|(cell, width)| cut(cell, *width));
        }
        self
    }

    /// The widths of the columns. The widest column that can shrink does, until the table fits.
    fn narrowed(&self, width: usize) -> Vec<usize> {
        let mut widths = self.widths();
        while self.total(&widths) > width {
            let giving = widths.iter_mut().zip(&self.columns);
            let giving = giving.filter(|(width, column)| column.can_shrink(**width));
            // Of equally wide columns, the last one: it matters least.
            match giving.map(|(width, _)| width).max() {
                Some(widest) => *widest -= 1,
                None => break,
            }
        }
        widths
    }

    /// Titles of the columns that did not fit.
    fn left_out(&self) -> &[&'static str] {
        &self.left_out
    }

    fn widths(&self) -> Vec<usize> {
        let widest = |index: usize| self.rows.iter().map(move |row| row[index].chars().count());
        let title = |column: &Column| column.title.chars().count();
        let columns = self.columns.iter().enumerate();
        columns
            .map(|(index, column)| widest(index).fold(title(column), usize::max))
            .collect()
    }

    fn total(&self, widths: &[usize]) -> usize {
        widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
    }

    /// The width with all cells cut as far as possible.
    fn narrowest(&self) -> usize {
        let mut widths = self.widths();
        for (width, column) in widths.iter_mut().zip(&self.columns) {
            if let Some(least) = column.shrink.least() {
                *width = least.max(column.title.len()).min(*width);
            }
        }
        self.total(&widths)
    }
}

/// Cuts a text to `width` characters, with `…` at the end.
pub fn cut(text: &mut String, width: usize) {
    if text.chars().count() > width {
        *text = text
            .chars()
            .take(width.saturating_sub(1))
            .chain((width > 0).then_some('…'))
            .collect();
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let widths = self.widths();
        let line = |f: &mut fmt::Formatter, cells: &mut dyn Iterator<Item = &str>| {
            let padded = cells
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:width$}"));
            let text = padded.collect::<Vec<_>>().join(&" ".repeat(GAP));
            f.write_str(text.trim_end())
        };
        write!(f, "{HEADER}")?;
        let titles: Vec<String> = self
            .columns
            .iter()
            .map(|column| column.title.to_uppercase())
            .collect();
        line(f, &mut titles.iter().map(String::as_str))?;
        writeln!(f, "{HEADER:#}")?;
        for row in &self.rows {
            line(f, &mut row.iter().map(String::as_str))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(
            &[
                Column::full("ADDRESS"),
                Column::new("NAME", Shrink::Cut(6)),
                Column::new("NUMA", Shrink::Drop(1)),
                Column::new("ID", Shrink::Drop(0)),
            ],
            vec![
                ["01:00.0", "a long name", "0", "1b36:0010"]
                    .map(String::from)
                    .to_vec(),
                ["02:00.0", "née", "-", "8086:0001"]
                    .map(String::from)
                    .to_vec(),
            ],
        )
    }

    fn shown(table: &Table) -> Vec<String> {
        anstream::adapter::strip_str(&table.to_string())
            .to_string()
            .lines()
            .map(String::from)
            .collect()
    }

    #[test]
    fn columns_are_as_wide_as_they_need() {
        assert_eq!(
            shown(&table().fit(100)),
            [
                "ADDRESS  NAME         NUMA  ID",
                "01:00.0  a long name  0     1b36:0010",
                "02:00.0  née          -     8086:0001",
            ]
        );
    }

    #[test]
    fn texts_are_cut_before_columns_go() {
        let table = table().fit(34);
        assert!(table.left_out().is_empty());
        assert_eq!(shown(&table)[1], "01:00.0  a long …  0     1b36:0010");
    }

    #[test]
    fn rows_are_sorted_by_any_column_numbers_by_their_size() {
        let columns = ["NAME", "FREE"].map(Column::full);
        let cells = [["b", "10"], ["C", "-"], ["a", "9"]];
        let sorted = |by: Option<&str>| {
            let mut rows = cells.map(|row| row.map(String::from).to_vec());
            sort_rows(&mut rows, &columns, by, Vec::clone);
            let lines = shown(&Table::new(&columns, rows.to_vec()));
            let names = lines[1..].iter().map(|line| line[..1].to_owned());
            names.collect::<String>()
        };
        assert_eq!(sorted(None), "bCa");
        assert_eq!(sorted(Some("name")), "abC");
        assert_eq!(sorted(Some("free")), "abC");
    }

    #[test]
    fn sizes_come_by_what_they_are_worth() {
        let mut cells = ["x", "2 GiB", "-", "512M", "1.5", "12", "128 MiB", "5000"];
        cells.sort_by_key(|cell| order(cell));
        assert_eq!(
            cells,
            ["1.5", "12", "5000", "128 MiB", "512M", "2 GiB", "x", "-"]
        );
    }

    #[test]
    fn the_widest_column_gives_first() {
        let columns = [
            Column::new("NAME", Shrink::Cut(4)),
            Column::new("CLASS", Shrink::CutThenDrop(6, 0)),
        ];
        let rows = vec![vec![
            "a name of 20 letters".to_owned(),
            "controller".to_owned(),
        ]];
        let fit = |width| shown(&Table::new(&columns, rows.clone()).fit(width))[1].clone();
        assert_eq!(fit(26), "a name of 20 …  controller");
        assert_eq!(fit(20), "a name o…  controll…");
        assert_eq!(fit(13), "a na…  contr…");
        assert_eq!(fit(11), "a name of …");
    }

    #[test]
    fn what_holds_nothing_goes_first() {
        let mut table = table();
        table
            .rows
            .iter_mut()
            .for_each(|row| row[2] = "-".to_owned());
        assert_eq!(table.fit(30).left_out(), ["NUMA"]);
    }

    #[test]
    fn columns_go_in_their_order() {
        let table = table().fit(22);
        assert_eq!(table.left_out(), ["ID"]);
        assert_eq!(shown(&table)[1], "01:00.0  a long…  0");
        assert_eq!(self::table().fit(5).left_out(), ["ID", "NUMA"]);
    }
}
