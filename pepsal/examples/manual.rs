//! Writes the manual pages and the shell completions into a folder: `cargo run --example manual -- FOLDER`.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

/// The configuration file as it is installed, every key with its comment.
const CONFIGURATION: &str = include_str!("../../packaging/pepsal.toml");

fn main() -> Result<()> {
    let folder = PathBuf::from(env::args_os().nth(1).context("name the folder to write to")?);
    let (manual, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&manual, &completions] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut command = pepsal::cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "pepsal", &completions)?;
    }
    command.build();
    pages(&command, "pepsal", &manual)?;
    configuration_page(&manual.join("pepsal.toml.5"))
}

/// A page for the command, and one for each command below it.
fn pages(command: &Command, name: &str, folder: &Path) -> Result<()> {
    let page = Man::new(command.clone())
        .title(name)
        .section("8")
        .manual("System administration");
    page.render(&mut File::create(folder.join(format!("{name}.8")))?)?;
    for below in command
        .get_subcommands()
        .filter(|below| below.get_name() != "help")
    {
        pages(below, &format!("{name}-{}", below.get_name()), folder)?;
    }
    Ok(())
}

fn configuration_page(path: &Path) -> Result<()> {
    let version = format!("pepsal {}", env!("CARGO_PKG_VERSION"));
    let mut page = Roff::new();
    page.control("TH", ["pepsal.toml", "5", "", version.as_str(), "File formats"]);
    page.control("SH", ["NAME"]);
    page.text([roman(
        "pepsal.toml - configuration of the TCP performance enhancing proxy pepsal",
    )]);
    page.control("SH", ["SYNOPSIS"]);
    page.text([bold("/etc/pepsal/pepsal.toml")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "A TOML file. Every key stands for an option of pepsal(8), and what the command line says wins. The file is read \
         at start, and again at SIGHUP (systemctl reload pepsal).",
    )]);
    page.control("SH", ["KEYS"]);
    page.text([roman("This is the file as it is installed.")]);
    page.control("PP", []);
    page.control("nf", []);
    for line in CONFIGURATION.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("pepsal"), roman("(8)")]);
    page.to_writer(&mut File::create(path)?)?;
    Ok(())
}
