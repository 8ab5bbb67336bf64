//! Renders `pepsal top` for the documents: the real program in a terminal, while flows of several clients
//! cross an emulated satellite link.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pepsal_tests::{
    Cancel, Connector, Daemon, Direction, Family, Link, LinkProfile, Server, Session, Topology, Transfer,
};

use crate::{
    build, cargo,
    setup::{self, Needs},
    shell,
};

const COLUMNS: u16 = 132;
const ROWS: u16 = 18;

/// Time to fill the plots.
const WATCHED: Duration = Duration::from_secs(40);

/// Builds the daemon and writes docs/images/top.svg.
pub fn run() -> Result<()> {
    let daemon = build::daemon_with(&build::ebpf(&setup::run(Needs::Demo)?)?, false)?;
    ensure!(
        shell::is_root(),
        "namespaces need root: run this as root or with sudo"
    );
    let topology = Topology::builder().link(Link::Tun(LinkProfile::GEO)).build()?;
    let server = Server::start(&topology.server)?;
    let socket = cargo::target_dir().join("tmp/screenshot.sock");
    let socket_text = socket.to_str().context("the target folder's name is no text")?;
    let link = "sat0,rate=50mbit,rtt=600ms";
    let arguments = [
        "-i",
        "lan0",
        "-i",
        "sat0",
        "--link",
        link,
        "--admin-socket",
        socket_text,
    ];
    let running = Daemon::start_quiet(&daemon, &topology.gateway, &arguments)?;
    let cancel = Cancel::default();
    let screen = thread::scope(|scope| {
        let transfers = [
            (Direction::Upload, Family::V4),
            (Direction::Upload, Family::V6),
            (Direction::Upload, Family::V4),
            (Direction::Download, Family::V4),
            (Direction::Download, Family::V6),
        ];
        for ((direction, family), seed) in transfers.into_iter().zip(1..) {
            let transfer = Transfer::new(direction, 1 << 40)
                .seed(seed)
                .cancelled_by(cancel.clone());
            let (client, address) = (&topology.client, server.address(family));
            // The transfer is interrupted at the end, which is an error.
            scope.spawn(move || transfer.run(client, address));
            thread::sleep(Duration::from_secs(1));
        }
        let idle = Session::open(
            &Connector::default(),
            &topology.client,
            server.address(Family::V4),
            &cancel,
        );
        let screen = idle.and_then(|_idle| {
            let top = format!(
                "stty columns {COLUMNS} rows {ROWS}; exec {} top --admin-socket {socket_text}",
                daemon.display()
            );
            Terminal::start(&top)?.after(WATCHED)
        });
        cancel.cancel();
        screen
    })?;
    running.terminate()?;
    let path = cargo::root().join("docs/images/top.svg");
    fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
    fs::write(&path, svg(screen.screen()))?;
    println!("Drew {}.", path.display());
    Ok(())
}

/// A program in a terminal of script(1).
struct Terminal {
    script: Child,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    fn start(command: &str) -> Result<Self> {
        let mut script = Command::new("script")
            .args(["--quiet", "--return", "--command", command, "/dev/null"])
            .env("TERM", "xterm-256color")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run `script` (Debian's package bsdutils)")?;
        let mut output = script.stdout.take().context("it has a standard output")?;
        let screen = Arc::new(Mutex::new(vt100::Parser::new(ROWS, COLUMNS, 0)));
        let reader = screen.clone();
        thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                let mut screen = reader.lock().unwrap_or_else(PoisonError::into_inner);
                // The sequence that restores the terminal would clear the screen.
                if !buffer[..length].windows(8).any(|bytes| bytes == b"\x1b[?1049l") {
                    screen.process(&buffer[..length]);
                }
            }
        });
        Ok(Self { script, screen })
    }

    /// Returns the screen after some time.
    fn after(mut self, time: Duration) -> Result<vt100::Parser> {
        thread::sleep(time);
        // Its last screen is complete before it reads the key.
        self.script
            .stdin
            .take()
            .context("it has a standard input")?
            .write_all(b"q")?;
        ensure!(self.script.wait()?.success(), "`pepsal top` failed");
        let mut screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *screen))
    }
}

const CELL: (f32, f32) = (8.4, 18.0);
const FOREGROUND: &str = "#d8dee9";
const BACKGROUND: &str = "#1e222a";
/// The sixteen colours of a terminal, the bright ones last.
const PALETTE: [&str; 16] = [
    "#3b4252", "#bf616a", "#a3be8c", "#ebcb8b", "#81a1c1", "#b48ead", "#88c0d0", "#e5e9f0", "#4c566a",
    "#d08770", "#b9d3a2", "#f0d9a4", "#9bb7d4", "#c9a6c3", "#a3d4e0", "#eceff4",
];

/// Renders a screen as SVG. Each run of cells is stretched to the width of its cells, for any font.
fn svg(screen: &vt100::Screen) -> String {
    let (width, height) = (f32::from(COLUMNS) * CELL.0, f32::from(ROWS) * CELL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-8 -8 {} {}\" font-size=\"14\" \
         font-family=\"'DejaVu Sans Mono', Menlo, Consolas, monospace\">\n\
         <rect x=\"-8\" y=\"-8\" width=\"100%\" height=\"100%\" rx=\"6\" fill=\"{BACKGROUND}\"/>\n",
        width + 16.0,
        height + 16.0
    );
    for row in 0..ROWS {
        let mut column = 0;
        while column < COLUMNS {
            let run = Run::at(screen, row, column);
            column += run.cells;
            svg += &run.svg();
        }
    }
    svg + "</svg>\n"
}

/// Adjacent cells of one style.
struct Run {
    row: u16,
    column: u16,
    cells: u16,
    text: String,
    style: Style,
}

#[derive(Clone, PartialEq)]
struct Style {
    foreground: String,
    background: String,
    is_bold: bool,
    is_dim: bool,
}

impl Run {
    fn at(screen: &vt100::Screen, row: u16, column: u16) -> Self {
        let cell = |column| screen.cell(row, column);
        let style = Style::of(cell(column));
        let mut run = Self {
            row,
            column,
            cells: 0,
            text: String::new(),
            style,
        };
        while run.column + run.cells < COLUMNS && Style::of(cell(run.column + run.cells)) == run.style {
            let contents = cell(run.column + run.cells).map_or("", vt100::Cell::contents);
            run.text += if contents.is_empty() { " " } else { contents };
            run.cells += 1;
        }
        run
    }

    fn svg(&self) -> String {
        let Style {
            foreground,
            background,
            is_bold,
            is_dim,
        } = &self.style;
        let (x, y) = (f32::from(self.column) * CELL.0, f32::from(self.row) * CELL.1);
        let width = f32::from(self.cells) * CELL.0;
        let mut svg = String::new();
        if background != BACKGROUND {
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{}\" fill=\"{background}\"/>",
                CELL.1
            );
        }
        if !self.text.trim().is_empty() {
            let text = self.text.replace('&', "&amp;").replace('<', "&lt;");
            let weight = if *is_bold { " font-weight=\"bold\"" } else { "" };
            let opacity = if *is_dim { " opacity=\"0.6\"" } else { "" };
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" textLength=\"{width:.1}\" lengthAdjust=\"spacingAndGlyphs\" \
                 xml:space=\"preserve\" fill=\"{foreground}\"{weight}{opacity}>{text}</text>",
                y + CELL.1 * 0.75
            );
        }
        svg
    }
}

impl Style {
    fn of(cell: Option<&vt100::Cell>) -> Self {
        let colour = |colour, default: &str| match colour {
            vt100::Color::Default => default.to_owned(),
            vt100::Color::Idx(index) => PALETTE[usize::from(index) % PALETTE.len()].to_owned(),
            vt100::Color::Rgb(red, green, blue) => format!("#{red:02x}{green:02x}{blue:02x}"),
        };
        let own = |of: fn(&vt100::Cell) -> vt100::Color| cell.map_or(vt100::Color::Default, of);
        let mut foreground = colour(own(vt100::Cell::fgcolor), FOREGROUND);
        let mut background = colour(own(vt100::Cell::bgcolor), BACKGROUND);
        if cell.is_some_and(vt100::Cell::inverse) {
            std::mem::swap(&mut foreground, &mut background);
        }
        Self {
            foreground,
            background,
            is_bold: cell.is_some_and(vt100::Cell::bold),
            is_dim: cell.is_some_and(vt100::Cell::dim),
        }
    }
}
