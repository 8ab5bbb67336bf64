//! `pepsal top`: a live, sorted list of flows with plots. [`view`] draws the [`app`] with its [`history`].

mod app;
mod history;
mod view;

use std::{
    process::ExitCode,
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use ratatui::{
    DefaultTerminal, Terminal,
    backend::TestBackend,
    crossterm::event::{self, Event, KeyEventKind},
};

use crate::{
    ctl::{
        client::{Client, Socket},
        top::app::{App, Picture},
    },
    observe::protocol::Sort,
};

/// Options of `pepsal top`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Refresh interval, over which rates are measured
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,

    /// Sort key, in descending order
    #[arg(long, value_name = "BY", default_value = "rate")]
    sort: Sort,

    /// Print one screen as text and exit
    #[arg(long)]
    once: bool,

    /// Size of that screen in characters
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "120x30", value_parser = size, requires = "once")]
    size: (u16, u16),

    #[command(flatten)]
    socket: Socket,
}

fn interval(text: &str) -> Result<Duration, String> {
    match crate::units::time(text)? {
        time if (Duration::from_millis(100)..=Duration::from_secs(10)).contains(&time) => Ok(time),
        _ => Err(format!("'{text}' is not between 100ms and 10s")),
    }
}

fn size(text: &str) -> Result<(u16, u16), String> {
    let wrong = || format!("'{text}' is no size: give WIDTHxHEIGHT like 120x30, each from 20 to 500");
    let (width, height) = text.split_once('x').ok_or_else(wrong)?;
    let side = |text: &str| {
        let side = text.parse().ok();
        side.filter(|side| (20..=500).contains(side)).ok_or_else(wrong)
    };
    Ok((side(width)?, side(height)?))
}

/// Shows the flows until `q` is pressed.
///
/// # Errors
/// When no daemon replies, or without a terminal.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut client = arguments.socket.connect()?;
    let mut app = App::new(arguments.sort);
    if arguments.once {
        app.update(Ok(Picture::ask(&mut client, arguments.interval)?));
        let (width, height) = arguments.size;
        let mut terminal = Terminal::new(TestBackend::new(width, height))?;
        terminal.draw(|frame| view::draw(frame, &app))?;
        print!("{}", text_of(terminal.backend()));
        return Ok(ExitCode::SUCCESS);
    }
    let pictures = poll(arguments.clone(), client);
    // This also restores the terminal after a panic.
    let mut terminal = ratatui::try_init().context("cannot set up the terminal")?;
    let watched = watch(&mut app, &mut terminal, &pictures);
    ratatui::restore();
    watched?;
    Ok(ExitCode::SUCCESS)
}

fn text_of(backend: &TestBackend) -> String {
    let buffer = backend.buffer();
    let width = usize::from(buffer.area.width);
    let rows = buffer.content.chunks(width);
    rows.map(|row| {
        let row: String = row.iter().map(|cell| cell.symbol()).collect();
        format!("{}\n", row.trim_end())
    })
    .collect()
}

/// Polls the daemon on a separate thread, so that keys are handled at once. Reconnects after a restart of the
/// daemon.
fn poll(arguments: Arguments, client: Client) -> Receiver<Result<Picture>> {
    let (send, pictures) = sync_channel(1);
    thread::spawn(move || {
        let mut client = Some(client);
        loop {
            let asked = match &mut client {
                Some(connected) => Picture::ask(connected, arguments.interval),
                None => match arguments.socket.connect() {
                    Ok(connected) => {
                        client = Some(connected);
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            if asked.is_err() {
                client = None;
                thread::sleep(arguments.interval);
            }
            if send.send(asked).is_err() {
                return;
            }
        }
    });
    pictures
}

/// Draws until the user quits.
fn watch(app: &mut App, terminal: &mut DefaultTerminal, pictures: &Receiver<Result<Picture>>) -> Result<()> {
    loop {
        terminal.draw(|frame| view::draw(frame, app))?;
        if event::poll(Duration::from_millis(100))? {
            // The next iteration draws a new size.
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
                && app.is_last(key)
            {
                return Ok(());
            }
        }
        match pictures.try_recv() {
            Ok(asked) => app.update(asked),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => bail!("the thread that polls the daemon has ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyCode;

    use super::*;
    use crate::observe::protocol::{FlowState, FlowStatus, Flows, Legs, Ways};

    fn flow(id: u64, up: f64) -> FlowStatus {
        FlowStatus {
            id,
            client: ([10, 1, 0, 2], 40_000 + id as u16).into(),
            server: ([10, 2, 0, 2], 80).into(),
            state: FlowState::Open,
            age_seconds: id as f64,
            idle_seconds: 0.0,
            bytes: Ways { up: 10, down: 20 },
            bytes_per_second: Ways { up, down: 0.0 },
            limited: Ways::default(),
            legs: Legs {
                client: None,
                server: None,
            },
        }
    }

    fn picture() -> Picture {
        Picture {
            status: serde_json::from_value(serde_json::json!({
                "version": "0.1.0", "pid": 7, "uptime_seconds": 61.0, "ready": true, "problems": [],
                "port": 5000, "mark": "0x1/0x1", "devices": ["pepsal-c0", "pepsal-s0"], "interfaces": [],
                "links": [{"interface": "sat0", "rtt_seconds": 0.6, "rate_bytes_per_second": 1000,
                           "ceiling_bytes_per_second": 2000, "queueing_delay_seconds": 0.0, "state": "holding",
                           "throughput_bytes_per_second": 500.0, "congestion": "pepsal"}],
                "flows": {"open": 2, "pending": 0, "limit": 2112}, "bytes": {"up": 20, "down": 40},
                "closed": {}, "events": {}, "packets": {}
            }))
            .unwrap(),
            flows: Flows {
                total: 2,
                list: vec![flow(1, 125_000.0), flow(2, 1_000_000.0)],
            },
        }
    }

    fn drawn(app: &App, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view::draw(frame, app)).unwrap();
        text_of(terminal.backend())
    }

    #[test]
    fn flows_are_drawn_in_the_order_that_a_key_chooses() {
        let mut app = App::new(Sort::Rate);
        app.update(Ok(picture()));
        let text = drawn(&app, 140, 30);
        assert!(text.contains("2 of 2112 flows"), "{text}");
        assert!(
            text.contains("8.0 Mbit/s") && text.contains("1.0 Mbit/s"),
            "{text}"
        );
        assert!(text.contains("sat0") && text.contains("50 %"), "{text}");
        let at = |text: &str, part: &str| text.find(part).unwrap();
        assert!(at(&text, "10.1.0.2:40002") < at(&text, "10.1.0.2:40001"));
        app.update(Ok(picture()));
        assert!(!app.is_last(KeyCode::Char('a').into()));
        app.picture.as_mut().unwrap().flows.list[1].age_seconds = 99.0;
        app.arrange();
        let text = drawn(&app, 140, 30);
        assert!(
            at(&text, "10.1.0.2:40001") < at(&text, "10.1.0.2:40002"),
            "{text}"
        );
        assert!(app.is_last(KeyCode::Char('q').into()));
    }

    #[test]
    fn any_size_can_be_drawn() {
        let mut app = App::new(Sort::Rate);
        for (width, height) in [(1, 1), (20, 3), (40, 10), (300, 100)] {
            drawn(&app, width, height);
        }
        app.update(Ok(picture()));
        for (width, height) in [(1, 1), (20, 3), (40, 10), (300, 100)] {
            drawn(&app, width, height);
        }
    }

    #[test]
    fn daemon_that_is_gone_is_said_to_be() {
        let mut app = App::new(Sort::Rate);
        app.update(Ok(picture()));
        app.update(Err(anyhow::anyhow!("no daemon listens at /x")));
        let text = drawn(&app, 100, 20);
        assert!(text.contains("no daemon listens at /x"), "{text}");
    }
}
