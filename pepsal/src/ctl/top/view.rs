//! The screen: a status line, plots of all flows, links, and the list of flows.

use std::collections::VecDeque;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::Line,
    widgets::{Block, Gauge, Row, Sparkline, Table},
};

use crate::{
    ctl::{flows::limited, text, top::app::App},
    observe::protocol::{FlowState, FlowStatus, LegStatus, LinkStatus, Sort, Status},
};

const PLOT_HEIGHT: u16 = 5;

pub fn draw(frame: &mut Frame<'_>, app: &App) {
    let links = app
        .picture
        .as_ref()
        .map_or(0, |picture| picture.status.links.len());
    let [head, plots, gauges, flows, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(PLOT_HEIGHT),
        Constraint::Length(u16::try_from(links).unwrap_or(u16::MAX)),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(headline(app), head);
    let [up, down] = Layout::horizontal([Constraint::Fill(1); 2]).areas(plots);
    plot(frame, up, "up", &app.history.up, Color::Green);
    plot(frame, down, "down", &app.history.down, Color::Cyan);
    if let Some(picture) = &app.picture {
        let rows = Layout::vertical(vec![Constraint::Length(1); links]).split(gauges);
        for (link, row) in picture.status.links.iter().zip(rows.iter()) {
            share(frame, *row, link);
        }
        frame.render_widget(table(app, &picture.flows.list), flows);
    }
    let keys_line = "q quit   sort: a age, b bytes, r rate, t round trip, x retransmits   ↑↓ PgUp PgDn Home";
    frame.render_widget(Line::from(keys_line).dim(), keys);
}

fn headline(app: &App) -> Line<'static> {
    if let Some(trouble) = &app.trouble {
        return Line::from(trouble.clone()).red().bold();
    }
    let Some(picture) = &app.picture else {
        return Line::from("asking the daemon …");
    };
    let Status { flows, .. } = &picture.status;
    let line = format!(
        "pepsal {}  up {}  {} of {} flows, {} pending  {} up, {} down",
        picture.status.version,
        text::age(picture.status.uptime_seconds),
        flows.open,
        flows.limit,
        flows.pending,
        text::bytes(picture.status.bytes.up),
        text::bytes(picture.status.bytes.down),
    );
    match picture.status.problems.first() {
        None => Line::from(line).bold(),
        Some(problem) => Line::from(format!("{line}  NOT READY: {problem}")).red().bold(),
    }
}

fn plot(frame: &mut Frame<'_>, area: Rect, way: &str, history: &VecDeque<u64>, color: Color) {
    let now = history.back().copied().unwrap_or(0);
    let width = usize::from(area.width.saturating_sub(2));
    let shown: Vec<u64> = history
        .iter()
        .skip(history.len().saturating_sub(width))
        .copied()
        .collect();
    let highest = shown.iter().copied().max().unwrap_or(0);
    let title = format!(
        " {way} {}, highest {} ",
        text::rate(now as f64),
        text::rate(highest as f64)
    );
    let plot = Sparkline::default()
        .block(Block::bordered().title(title))
        .data(shown)
        .style(color);
    frame.render_widget(plot, area);
}

fn share(frame: &mut Frame<'_>, area: Rect, link: &LinkStatus) {
    let rate = link.rate_bytes_per_second as f64;
    let ratio = (link.throughput_bytes_per_second / rate.max(1.0)).clamp(0.0, 1.0);
    let label = format!(
        "{}: {} of {}, {:.0} %, {}",
        link.interface,
        text::rate(link.throughput_bytes_per_second),
        text::rate(rate),
        ratio * 100.0,
        link.state.replace('_', " ")
    );
    let gauge = Gauge::default()
        .ratio(ratio)
        .label(label)
        .gauge_style(Color::Blue);
    frame.render_widget(gauge, area);
}

fn table<'a>(app: &App, flows: &'a [FlowStatus]) -> Table<'a> {
    let columns = [
        ("ID", Constraint::Length(5), None),
        ("CLIENT", Constraint::Fill(1), None),
        ("SERVER", Constraint::Fill(1), None),
        ("AGE", Constraint::Length(7), Some(Sort::Age)),
        ("BYTES", Constraint::Length(9), Some(Sort::Bytes)),
        ("UP", Constraint::Length(11), Some(Sort::Rate)),
        ("DOWN", Constraint::Length(11), Some(Sort::Rate)),
        ("RTT", Constraint::Length(15), Some(Sort::Rtt)),
        ("RETRANS", Constraint::Length(8), Some(Sort::Retransmits)),
        ("LIMITED BY", Constraint::Length(16), None),
        ("", Constraint::Length(8), None),
    ];
    let heading = |(name, _, sort): &(&'static str, _, Option<Sort>)| match *sort == Some(app.sort) {
        true => Line::from(format!("{name}▼")),
        false => Line::from(*name),
    };
    let header = Row::new(columns.iter().map(heading)).style(Style::new().add_modifier(Modifier::REVERSED));
    let rows = flows.iter().skip(app.offset).map(|flow| row(app, flow));
    Table::new(rows, columns.iter().map(|(_, width, _)| *width)).header(header)
}

fn row<'a>(app: &App, flow: &'a FlowStatus) -> Row<'a> {
    let legs = [&flow.legs.client, &flow.legs.server];
    let of_legs = |value: &dyn Fn(&LegStatus) -> String| {
        let values = legs.iter().map(|leg| leg.as_ref().map_or("-".to_owned(), value));
        values.collect::<Vec<_>>().join("/")
    };
    let busier = match flow.bytes_per_second.up > flow.bytes_per_second.down {
        true => flow.limited.up.or(flow.limited.down),
        false => flow.limited.down.or(flow.limited.up),
    };
    let limit = match flow.state {
        FlowState::Pending => "pending".to_owned(),
        FlowState::Open => limited(busier),
    };
    Row::new([
        flow.id.to_string(),
        flow.client.to_string(),
        flow.server.to_string(),
        text::age(flow.age_seconds),
        text::bytes(flow.bytes.up + flow.bytes.down),
        text::rate(flow.bytes_per_second.up),
        text::rate(flow.bytes_per_second.down),
        of_legs(&|leg| text::round_trip(leg.rtt_seconds)),
        of_legs(&|leg| leg.retransmitted_segments.to_string()),
        limit,
        app.history.bars(flow.id),
    ])
}
