//! What happens on a lane over time: the link, the flows and the daemon's estimate above, the link's queue below. One chart for
//! each lane, of the first round.

use std::{collections::BTreeMap, error::Error, path::Path as FilePath};

use anyhow::Result;
use clap::ValueEnum as _;
use plotters::{
    coord::Shift,
    prelude::{ChartBuilder, DrawingArea, DrawingBackend, LineSeries, PathElement, WHITE},
    style::{Color as _, RGBColor},
};

use super::{
    Lane,
    finding::{Moment, Timeline},
};
use crate::bench::canvas::{self, COLOURS, FONT, Picture};

/// Height of the upper part, in pixels.
const UPPER: i32 = 340;
/// The link itself.
const GREY: RGBColor = RGBColor(170, 170, 170);

/// Draws `lane-….svg` and `.png`, and returns how many lanes there are.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(timelines: &[Timeline], folder: &FilePath) -> Result<usize> {
    let mut lanes = BTreeMap::<Lane, Vec<&Timeline>>::new();
    for timeline in timelines.iter().filter(|timeline| timeline.round == 1) {
        lanes.entry(timeline.lane).or_default().push(timeline);
    }
    for (lane, timelines) in &mut lanes {
        timelines.sort_by_key(|timeline| timeline.place);
        let value = lane.to_possible_value().expect("no lane is hidden");
        let chart = Chart {
            title: format!("{}: {}", value.get_name(), value.get_help().unwrap_or_default()),
            timelines,
        };
        canvas::save(&chart, folder, &format!("lane-{}", value.get_name()))?;
    }
    Ok(lanes.len())
}

struct Chart<'a> {
    title: String,
    timelines: &'a [&'a Timeline],
}

/// A line of a chart.
struct Line {
    label: String,
    colour: RGBColor,
    width: u32,
    points: Vec<(f64, f64)>,
}

impl Picture for Chart<'_> {
    fn draw<'a, B: DrawingBackend + 'a>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), Box<dyn Error + 'a>>
    where
        B::ErrorType: 'a,
    {
        area.fill(&WHITE)?;
        let (upper, lower) = area.split_vertically(UPPER);
        panel(&upper, &self.title, "Mbit/s", &self.rates())?;
        panel(&lower, "", "ms in the queue", &self.queues())?;
        area.present()?;
        Ok(())
    }
}

impl Chart<'_> {
    fn rates(&self) -> Vec<Line> {
        let link = self.timelines.first().map(|timeline| Line {
            label: "the link".into(),
            colour: GREY,
            width: 4,
            points: points(timeline, |moment| Some(moment.link_mbit)),
        });
        let mut lines: Vec<_> = link.into_iter().collect();
        lines.extend(self.coloured(2, |moment| Some(moment.goodput_mbit)));
        let estimates = self.coloured(1, |moment| {
            moment.estimate.as_ref().map(|estimate| estimate.rate_mbit())
        });
        lines.extend(estimates.filter(|line| !line.points.is_empty()).map(|line| Line {
            label: format!("{}, estimate", line.label),
            // Beside the goodput's, which it is often close to.
            colour: COLOURS[COLOURS.len() - 1],
            ..line
        }));
        lines
    }

    fn queues(&self) -> Vec<Line> {
        self.coloured(2, |moment| moment.queue_ms).collect()
    }

    /// A line for each place.
    fn coloured(&self, width: u32, value: fn(&Moment) -> Option<f64>) -> impl Iterator<Item = Line> {
        let timelines = self.timelines.iter().zip(COLOURS.iter().cycle());
        timelines.map(move |(timeline, colour)| Line {
            label: timeline.place.to_string(),
            colour: *colour,
            width,
            points: points(timeline, value),
        })
    }
}

fn points(timeline: &Timeline, value: fn(&Moment) -> Option<f64>) -> Vec<(f64, f64)> {
    let moments = timeline.moments.iter();
    moments
        .filter_map(|moment| Some((moment.seconds, value(moment)?)))
        .collect()
}

fn panel<'a, B: DrawingBackend + 'a>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    unit: &str,
    lines: &[Line],
) -> Result<(), Box<dyn Error + 'a>>
where
    B::ErrorType: 'a,
{
    let most = |of: fn(&(f64, f64)) -> f64| {
        let points = lines.iter().flat_map(|line| &line.points);
        points.map(of).fold(1.0, f64::max)
    };
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(10)
        .x_label_area_size(38)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..most(|point| point.0), 0.0..most(|point| point.1) * 1.1)?;
    chart
        .configure_mesh()
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .x_desc("seconds")
        .y_desc(unit)
        .light_line_style(WHITE)
        .draw()?;
    for line in lines {
        let (colour, width) = (line.colour, line.width);
        chart
            .draw_series(LineSeries::new(
                line.points.iter().copied(),
                colour.stroke_width(width),
            ))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(width)));
    }
    canvas::legend(&mut chart)?;
    Ok(())
}
