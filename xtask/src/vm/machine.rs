//! A virtual machine that runs one file of tests.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{kernel::Kernel, matrix::TestResult};
use crate::{build::OBJECT_VARIABLE, cargo, shell};

/// How many times as long as usual the tests have patience: software emulation is about so much slower.
const SLOWNESS: u32 = 10;

/// What virtme-ng is told of every machine. Neither KVM nor the microvm's devices are everywhere.
const MACHINE: &str = "--verbose --disable-kvm --disable-microvm --cpus 2 --memory 3G";

/// The version of virtme-ng that is installed.
const VIRTME_NG: &str = "virtme-ng==1.42";

/// Installs virtme-ng below the target folder, unless it is there, and returns the folder of its programs.
pub fn install() -> Result<PathBuf> {
    let venv = cargo::target_dir().join("vm/venv");
    let programs = venv.join("bin");
    if !programs.join("vng").is_file() {
        shell::heading("Installing virtme-ng");
        shell::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        shell::run(Command::new(programs.join("pip")).args(["install", "--quiet", VIRTME_NG]))?;
    }
    Ok(programs)
}

/// A machine that has still to be started.
pub struct Machine<'a> {
    /// The folder of virtme-ng's programs.
    pub vng: &'a Path,
    pub kernel: &'a Kernel,
    /// The eBPF object, for tests that load it themselves.
    pub object: &'a Path,
    pub daemon: &'a Path,
    /// Arguments of libtest.
    pub filter: &'a [String],
}

/// A machine that runs. Dropping it ends it.
pub struct Run {
    child: Child,
    output: PathBuf,
    status: PathBuf,
}

impl Machine<'_> {
    /// Boots it to run one program of tests.
    ///
    /// The results come back through a folder that both sides see: the console has the kernel's messages between them.
    pub fn start(&self, name: &str, program: &Path) -> Result<Run> {
        let folder = cargo::target_dir().join("vm/results").join(&self.kernel.version);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let file = |extension: &str| folder.join(format!("{name}.{extension}"));
        let (script, output, status) = (file("sh"), file("txt"), file("status"));
        for old in [&output, &status] {
            // There may be none.
            let _ = fs::remove_file(old);
        }
        fs::write(&script, self.script(program, &output, &status))
            .context("cannot write the machine's script")?;
        let console = File::create(file("console")).context("cannot write the machine's console")?;

        let path = std::env::join_paths([self.vng.to_owned()].into_iter().chain(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        )))?;
        let vng = format!(
            "vng --run '{}' {MACHINE} --rwdir='{}' --exec 'sh {}'",
            self.kernel.image.display(),
            folder.display(),
            script.display()
        );
        // virtme-ng wants a terminal, which makes it a session of its own. A process namespace ends all of it at once;
        // its first process is a shell, since `script` does not know what to make of orphans.
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"])
            .args([
                "script --quiet --return --command \"$0\" /dev/null; exit $?",
                &vng,
            ])
            .env("PATH", path)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("cannot run `unshare` and `script` (Debian's packages util-linux and bsdutils)")?;
        Ok(Run {
            child,
            output,
            status,
        })
    }

    /// TUN's device file comes with its module, which nobody loads on demand there.
    fn script(&self, program: &Path, output: &Path, status: &Path) -> String {
        let filter: Vec<String> = self
            .filter
            .iter()
            .map(|argument| format!("'{}'", argument.replace('\'', "'\\''")))
            .collect();
        format!(
            "cd '{}'\n\
             export PEPSAL_BIN='{}' {OBJECT_VARIABLE}='{}' PEPSAL_TEST_SLOWNESS={SLOWNESS}\n\
             ulimit -n 20000\n\
             modprobe --quiet tun\n\
             '{}' --test-threads 2 {} >'{}' 2>&1\n\
             echo $? >'{}'\n",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../tests"),
            self.daemon.display(),
            self.object.display(),
            program.display(),
            filter.join(" "),
            output.display(),
            status.display(),
        )
    }
}

impl Run {
    pub fn has_ended(&mut self) -> Result<bool> {
        let status = self.child.try_wait().context("cannot wait for the machine")?;
        Ok(status.is_some())
    }

    /// How many tests have come to an end.
    pub fn tests_done(&self) -> usize {
        let output = fs::read_to_string(&self.output).unwrap_or_default();
        output
            .lines()
            .filter(|line| line.starts_with("test ") && line.contains(" ... "))
            .count()
    }

    /// What the tests came to; `ended` says whether the machine was off in time.
    pub fn result(self, ended: bool) -> TestResult {
        let output = fs::read_to_string(&self.output).unwrap_or_default();
        let has_status = fs::read_to_string(&self.status).is_ok_and(|status| !status.trim().is_empty());
        TestResult::new(&output, ended && has_status)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // The namespace, with the virtme-ng and the QEMU that `script` has started. It may all be gone already.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
