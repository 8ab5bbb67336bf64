//! Coverage-guided fuzzing of the parsers of untrusted bytes.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{cargo, setup, shell, tool::Tool};

const CARGO_FUZZ: Tool = Tool {
    name: "cargo-fuzz",
    version: "^0.13",
};

/// Options of fuzzing.
#[derive(clap::Args)]
pub struct Options {
    /// Targets to run; all in turn, if none is given.
    #[arg(value_enum)]
    targets: Vec<Target>,
    /// Time for each target, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Check every memory access too, which is slower.
    #[arg(long)]
    address_sanitizer: bool,
    /// Add inputs with new coverage to the corpus of the repository.
    #[arg(long)]
    keep: bool,
}

/// The binaries in `fuzz/`.
#[derive(Clone, Copy, ValueEnum)]
enum Target {
    /// The packet parser, compared with etherparse.
    Packet,
    /// The relay, between two ends that follow a script.
    Relay,
    /// The configuration file.
    Configuration,
    /// A line of the admin socket.
    Request,
}

impl Target {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("no target is hidden");
        value.get_name().to_owned()
    }

    /// Returns the maximum useful length of an input in bytes.
    fn max_len(self) -> u32 {
        match self {
            Self::Relay => 202,
            Self::Packet => 600,
            Self::Configuration | Self::Request => 4096,
        }
    }
}

/// Fuzzes each target for its time. Inputs that fail are kept in `fuzz/artifacts`.
pub fn run(options: &Options) -> Result<()> {
    setup::offer(&[("c++", "g++")])?;
    let program = CARGO_FUZZ.install()?;
    let all = Target::value_variants();
    let targets = if options.targets.is_empty() {
        all
    } else {
        &options.targets
    };
    for target in targets {
        let name = target.name();
        let found = found(&name);
        fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        let corpus = corpus(&name);
        let fuzz = |folders: [&PathBuf; 2], arguments: String| {
            let mut command = cargo_fuzz(&program, options.address_sanitizer);
            command.arg(&name).args(folders).arg("--");
            command
                .arg(format!("-max_len={}", target.max_len()))
                .args(arguments.split(' '));
            shell::run(&mut command)
        };
        shell::heading(&format!("{name}, for {} s", options.seconds));
        let seconds = options.seconds;
        // The limit is for one input, to find hangs.
        fuzz(
            [&found, &corpus],
            format!("-max_total_time={seconds} -timeout=30 -print_final_stats=1"),
        )?;
        if options.keep {
            fuzz([&corpus, &found], "-set_cover_merge=1 -use_counters=0".into())?;
        }
    }
    Ok(())
}

fn found(target: &str) -> PathBuf {
    cargo::target_dir().join("fuzz/found").join(target)
}

fn corpus(target: &str) -> PathBuf {
    cargo::root().join("fuzz/corpus").join(target)
}

fn cargo_fuzz(program: &PathBuf, address_sanitizer: bool) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--release", "--sanitizer"]);
    command.arg(if address_sanitizer { "address" } else { "none" });
    command
        .arg("--target-dir")
        .arg(cargo::target_dir().join("fuzz"))
        .current_dir(cargo::root().join("fuzz"))
        // Enables unstable options, which libFuzzer needs, in a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1");
    command
}
