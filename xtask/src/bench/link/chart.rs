//! Goodput over time, one chart for each path, loss and direction, one line for each place.

use std::{collections::BTreeMap, error::Error, path::Path as FilePath};

use anyhow::Result;
use plotters::{
    coord::Shift,
    prelude::{ChartBuilder, DrawingArea, DrawingBackend, LineSeries, PathElement, WHITE},
    style::Color as _,
};

use super::{
    observation::{Metric, SAMPLE_INTERVAL, Series, Way},
    path::{Loss, Path},
    plan::BULK_BYTES,
};
use crate::bench::canvas::{self, COLOURS, FONT, Picture};

/// Of this many intervals a point is the mean: segments arrive in bursts.
const SMOOTHED: usize = 5;
/// Draws the charts of all transfers of [`BULK_BYTES`] as `goodput-….svg` and `.png`, and returns how many there are.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(series: &[Series], folder: &FilePath) -> Result<usize> {
    let mut charts = BTreeMap::<(Path, Loss, Way), Vec<&Series>>::new();
    for line in series.iter().filter(|series| series.round == 1) {
        if let Metric::Transfer(way, BULK_BYTES) = line.cell.metric {
            let key = (line.cell.path, line.cell.loss, way);
            charts.entry(key).or_default().push(line);
        }
    }
    for ((path, loss, way), lines) in &mut charts {
        lines.sort_by_key(|line| line.cell.place);
        let way_name = match way {
            Way::Down => "down",
            Way::Up => "up",
        };
        let name = format!("goodput-{}-{}pct-{way_name}", path.file_name(), loss.percent());
        let chart = Chart {
            title: format!("10 MiB {way_name}, {path}, {loss} loss"),
            rate_mbps: path.rate_bps((*way).into()) as f64 / 1e6,
            lines,
        };
        canvas::save(&chart, folder, &name)?;
    }
    Ok(charts.len())
}

struct Chart<'a> {
    title: String,
    rate_mbps: f64,
    lines: &'a [&'a Series],
}

impl Picture for Chart<'_> {
    fn draw<'a, B: DrawingBackend + 'a>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), Box<dyn Error + 'a>>
    where
        B::ErrorType: 'a,
    {
        let end = shown_seconds(self.lines);
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 22))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..end, 0.0..self.rate_mbps * 1.1)?;
        chart
            .configure_mesh()
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("seconds")
            .y_desc("Mbit/s of payload")
            .light_line_style(WHITE)
            .draw()?;
        for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            // What lies outside would be drawn on the edge.
            let points = goodput(&line.arrived)
                .into_iter()
                .filter(|(seconds, _)| *seconds <= end);
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(line.cell.place.to_string())
                .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
        }
        canvas::legend(&mut chart)?;
        area.present()?;
        Ok(())
    }
}

/// The time axis ends where the second slowest line does, or a little later: one that takes minutes would squeeze all
/// others.
fn shown_seconds(lines: &[&Series]) -> f64 {
    let mut ends: Vec<_> = lines.iter().map(|line| line.arrived.len()).collect();
    ends.sort_unstable();
    let longest = ends.last().copied().unwrap_or(1);
    let second = ends.iter().rev().nth(1).copied().unwrap_or(longest);
    longest.min(second * 3 / 2 + 1) as f64 * SAMPLE_INTERVAL.as_secs_f64()
}

/// Points of time and Mbit/s.
fn goodput(arrived: &[u64]) -> Vec<(f64, f64)> {
    let interval = SAMPLE_INTERVAL.as_secs_f64();
    let arrived_by = |end: usize| end.checked_sub(1).map_or(0, |index| arrived[index]);
    let point = |end: usize| {
        let start = end.saturating_sub(SMOOTHED);
        let bits = (arrived_by(end) - arrived_by(start)) as f64 * 8.0;
        let seconds = (end - start) as f64 * interval;
        (end as f64 * interval, bits / seconds / 1e6)
    };
    [(0.0, 0.0)]
        .into_iter()
        .chain((1..=arrived.len()).map(point))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput_is_the_mean_of_the_last_intervals() {
        // 125,000 bytes in 0.1 s are 10 Mbit/s.
        let arrived: Vec<_> = [0, 0].into_iter().chain((1..=8).map(|n| n * 125_000)).collect();
        let points = goodput(&arrived);
        assert_eq!(points.len(), 11);
        assert_eq!(points[2].1, 0.0);
        assert!((points[4].1 - 5.0).abs() < 1e-9, "{:?}", points[4]);
        assert!((points[10].1 - 10.0).abs() < 1e-9, "{:?}", points[10]);
        assert!((points[10].0 - 1.0).abs() < 1e-9);
    }
}
