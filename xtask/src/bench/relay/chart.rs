//! Charts of rates, CPU time and the cost of open flows.

use std::{collections::BTreeSet, error::Error, path::Path};

use anyhow::Result;
use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, DrawingArea, DrawingBackend, LineSeries, PathElement, RGBColor, Rectangle,
        WHITE,
    },
    style::Color as _,
};

use super::{
    contender::Contender,
    observation::{Metric, Observations},
};
use crate::bench::canvas::{self, COLOURS, FONT, Picture};

/// Draws all charts with data, each as `.svg` and `.png`, and returns their number.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(found: &Observations, folder: &Path) -> Result<usize> {
    let bars = [
        (
            "rate",
            "Gbit/s of payload",
            bars(found, |metric| matches!(metric, Metric::Rate(_))),
        ),
        (
            "processor",
            "CPU-seconds per GB",
            bars(found, |metric| matches!(metric, Metric::Processor(_))),
        ),
        (
            "connections",
            "new connections per second",
            bars(found, |metric| matches!(metric, Metric::Connections(_))),
        ),
        (
            "forwarded",
            "ns per forwarded packet",
            bars(found, |metric| matches!(metric, Metric::Passing(_))),
        ),
    ];
    let lines = [
        (
            "flows-processor",
            "µs of processor time per request",
            growth(found, |metric| match metric {
                Metric::Exchange(flows) => Some(flows),
                _ => None,
            }),
        ),
        (
            "flows-memory",
            "kB of the machine per further flow",
            growth(found, |metric| match metric {
                Metric::Memory(_, flows) => Some(flows),
                _ => None,
            }),
        ),
    ];
    let mut count = 0;
    for (name, title, groups) in bars {
        if !groups.is_empty() {
            canvas::save(&Bars { title, groups }, folder, name)?;
            count += 1;
        }
    }
    for (name, title, lines) in lines {
        if lines.iter().any(|(_, points)| !points.is_empty()) {
            canvas::save(&Lines { title, lines }, folder, name)?;
            count += 1;
        }
    }
    Ok(count)
}

/// Medians of each contender, by quantity.
type Group = (String, Vec<(Contender, f64)>);

fn bars(found: &Observations, is_meant: impl Fn(&Metric) -> bool) -> Vec<Group> {
    let metrics = found.metrics().into_iter().filter(is_meant);
    let group = |metric: Metric| {
        let name = metric.to_string();
        let name = name
            .rsplit_once("processor, ")
            .map_or(name.as_str(), |(_, bulk)| bulk);
        let medians = Contender::ALL.map(|contender| Some((contender, found.median(metric, contender)?)));
        (name.to_owned(), medians.into_iter().flatten().collect())
    };
    metrics.map(group).collect()
}

/// Medians by the number of flows, a line for each contender.
type Line = (Contender, Vec<(f64, f64)>);

fn growth(found: &Observations, flows: impl Fn(Metric) -> Option<usize>) -> Vec<Line> {
    let points = |contender| {
        let point = |metric| Some((flows(metric)? as f64, found.median(metric, contender)?));
        found.metrics().into_iter().filter_map(point).collect()
    };
    Contender::ALL
        .map(|contender| (contender, points(contender)))
        .into()
}

fn colour(contender: Contender) -> RGBColor {
    // The colours do not depend on the presence of an old build.
    COLOURS[match contender {
        Contender::Forwarding => 0,
        Contender::Pepsal => 1,
        Contender::Haproxy => 2,
        Contender::OldBuild => 3,
    }]
}

struct Bars<'a> {
    title: &'a str,
    groups: Vec<Group>,
}

impl Picture for Bars<'_> {
    fn draw<'a, B: DrawingBackend + 'a>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), Box<dyn Error + 'a>>
    where
        B::ErrorType: 'a,
    {
        let values = self.groups.iter().flat_map(|(_, bars)| bars);
        let most = values.map(|(_, value)| *value).fold(0.0, f64::max);
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 22))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..self.groups.len() as f64, 0.0..most * 1.25)?;
        let label = |x: &f64| {
            // Labels are at the start of groups.
            let group = self.groups.get(*x as usize).filter(|_| x.fract() == 0.0);
            group.map(|(name, _)| name.clone()).unwrap_or_default()
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(self.groups.len() + 1)
            .x_label_formatter(&label)
            .x_label_offset(i32::try_from(900 / (2 * self.groups.len()))?)
            .label_style((FONT, 13))
            .light_line_style(WHITE)
            .draw()?;
        let contenders: BTreeSet<_> = self
            .groups
            .iter()
            .flat_map(|(_, bars)| bars.iter().map(|(contender, _)| *contender))
            .collect();
        // Three wide bars, or four narrower ones.
        let step = 0.81 / contenders.len().max(3) as f64;
        for (place, contender) in contenders.into_iter().enumerate() {
            let bars = self.groups.iter().enumerate().filter_map(|(index, (_, bars))| {
                let (_, value) = bars.iter().find(|(other, _)| *other == contender)?;
                let left = index as f64 + 0.1 + step * place as f64;
                Some(Rectangle::new(
                    [(left, 0.0), (left + step - 0.02, *value)],
                    colour(contender).filled(),
                ))
            });
            let bars: Vec<_> = bars.collect();
            if !bars.is_empty() {
                chart
                    .draw_series(bars)?
                    .label(contender.to_string())
                    .legend(move |(x, y)| {
                        Rectangle::new([(x, y - 5), (x + 20, y + 5)], colour(contender).filled())
                    });
            }
        }
        canvas::legend(&mut chart)?;
        area.present()?;
        Ok(())
    }
}

struct Lines<'a> {
    title: &'a str,
    lines: Vec<Line>,
}

impl Picture for Lines<'_> {
    fn draw<'a, B: DrawingBackend + 'a>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), Box<dyn Error + 'a>>
    where
        B::ErrorType: 'a,
    {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let widest = points().map(|(flows, _)| *flows).fold(0.0, f64::max);
        let most = points().map(|(_, value)| *value).fold(0.0, f64::max);
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 22))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..widest * 1.05, 0.0..most * 1.25)?;
        chart
            .configure_mesh()
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("open flows")
            .light_line_style(WHITE)
            .draw()?;
        for (contender, points) in self.lines.iter().filter(|(_, points)| !points.is_empty()) {
            let colour = colour(*contender);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(contender.to_string())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, colour.filled())))?;
        }
        canvas::legend(&mut chart)?;
        area.present()?;
        Ok(())
    }
}
