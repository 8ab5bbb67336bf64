//! Runs one test file in a virtual machine.

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

/// Factor of the tests' timeouts, which is the slowdown of software emulation.
const SLOWNESS: u32 = 10;

/// Options of virtme-ng. Not every host has KVM or the devices of microvm.
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

/// Parameters of a machine.
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

/// A running machine; dropping it ends the machine.
pub struct Run {
    child: Child,
    output: PathBuf,
    status: PathBuf,
}

impl Machine<'_> {
    /// Boots a machine that runs one test program.
    ///
    /// A shared folder returns the results: the console also has messages of the kernel.
    pub fn start(&self, name: &str, program: &Path) -> Result<Run> {
        let folder = cargo::target_dir().join("vm/results").join(&self.kernel.version);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
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
        // virtme-ng needs a terminal, which creates another session. A PID namespace ends all its processes
        // together; its first process is a shell, because `script` does not reap orphans.
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

    /// Loads the module of TUN, whose device file does not exist before.
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

    /// Returns the number of completed tests.
    pub fn tests_done(&self) -> usize {
        let output = fs::read_to_string(&self.output).unwrap_or_default();
        output
            .lines()
            .filter(|line| line.starts_with("test ") && line.contains(" ... "))
            .count()
    }

    /// Returns the results; `ended` is false after a timeout.
    pub fn result(self, ended: bool) -> TestResult {
        let output = fs::read_to_string(&self.output).unwrap_or_default();
        let has_status = fs::read_to_string(&self.status).is_ok_and(|status| !status.trim().is_empty());
        TestResult::new(&output, ended && has_status)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Kills the namespace, with virtme-ng and QEMU. It may have ended already.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
