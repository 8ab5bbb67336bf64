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
    estimate::Estimate,
    finding::{Moment, Timeline},
};
use crate::bench::{
    canvas::{self, COLOURS, FONT, Picture},
    link::place::{Place, Proxy},
};

/// Height of the upper part, in pixels.
const UPPER: i32 = 350;
/// Of this many moments a point is the mean: what waits behind a lost segment arrives at once with it.
const SMOOTHED: usize = 4;
/// What is shown of the link's highest rate; the legend is above it.
const HEADROOM: f64 = 1.7;
/// The link itself.
const GREY: RGBColor = RGBColor(170, 170, 170);
/// Not a place's, of which there are fewer.
const ESTIMATE: RGBColor = COLOURS[COLOURS.len() - 1];

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
        let rates = self.rates();
        let link = rates.first().map_or(1.0, |link| highest(&link.points));
        panel(&upper, &self.title, "Mbit/s", link * HEADROOM, &rates)?;
        let queues = self.queues();
        let longest = queues.iter().map(|line| highest(&line.points));
        panel(
            &lower,
            "",
            "queue, ms",
            longest.fold(1.0, f64::max) * 1.1,
            &queues,
        )?;
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
        lines.extend(self.coloured(goodput));
        let new_build = self
            .timelines
            .iter()
            .find(|timeline| is_new_build(timeline.place));
        lines.extend(new_build.map(|timeline| Line {
            label: "pepsal's estimate".into(),
            colour: ESTIMATE,
            width: 1,
            points: points(timeline, |moment| {
                moment.estimate.as_ref().map(Estimate::rate_mbit)
            }),
        }));
        lines
    }

    fn queues(&self) -> Vec<Line> {
        self.coloured(|timeline| points(timeline, |moment| moment.queue_ms))
            .collect()
    }

    /// A line for each place.
    fn coloured(&self, points: fn(&Timeline) -> Vec<(f64, f64)>) -> impl Iterator<Item = Line> {
        let timelines = self.timelines.iter().zip(COLOURS.iter().cycle());
        timelines.map(move |(timeline, colour)| Line {
            label: timeline.place.to_string(),
            colour: *colour,
            width: 2,
            points: points(timeline),
        })
    }
}

fn is_new_build(place: Place) -> bool {
    matches!(place, Place::Proxy(Proxy::Pepsal, _))
}

fn goodput(timeline: &Timeline) -> Vec<(f64, f64)> {
    let point = |moments: &[Moment]| {
        let sum: f64 = moments.iter().map(|moment| moment.goodput_mbit).sum();
        let last = moments.last().map_or(0.0, |moment| moment.seconds);
        (last, sum / moments.len() as f64)
    };
    timeline.moments.windows(SMOOTHED).map(point).collect()
}

fn highest(points: &[(f64, f64)]) -> f64 {
    points.iter().map(|point| point.1).fold(1.0, f64::max)
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
    most: f64,
    lines: &[Line],
) -> Result<(), Box<dyn Error + 'a>>
where
    B::ErrorType: 'a,
{
    let ends = lines.iter().filter_map(|line| line.points.last());
    let end = ends.map(|point| point.0).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(10)
        .x_label_area_size(38)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..most)?;
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
                // What lies outside would be drawn beyond the edge.
                line.points.iter().map(|(x, y)| (*x, y.min(most))),
                colour.stroke_width(width),
            ))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(width)));
    }
    canvas::legend(&mut chart)?;
    Ok(())
}
