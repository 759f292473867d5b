//! The machine that is measured: what it is, and whether somebody else is using it. From /proc; elsewhere nothing is known.

use std::{fs, thread, time::Duration};

use serde_json::{Value, json};

/// Of all cores together: more than this in other hands, and figures are not to be trusted.
const TOLERATED: f64 = 0.05;
/// How long the machine is watched before a measurement.
const LOOK: Duration = Duration::from_secs(1);

/// Clock ticks of all processors since they started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    all: u64,
}

/// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (guest time is in user already).
fn total_ticks(stat: &str) -> Option<Ticks> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().take(8).map_while(|field| field.parse().ok()).collect();
    let waiting = fields.get(3)? + fields.get(4)?;
    let all: u64 = fields.iter().sum();
    Some(Ticks { busy: all - waiting, all })
}

/// Of /proc/PID/stat: user and system time of the process and of the children it has waited for.
fn process_ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum()
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn now() -> Option<(Ticks, u64)> {
    Some((total_ticks(&read("/proc/stat")?)?, process_ticks(&read("/proc/self/stat")?)?))
}

/// The share of all cores that was busy and not ours between two readings.
fn others(before: (Ticks, u64), after: (Ticks, u64)) -> f64 {
    let all = (after.0.all - before.0.all).max(1) as f64;
    let busy = (after.0.busy - before.0.busy) as f64;
    ((busy - (after.1 - before.1) as f64) / all).clamp(0.0, 1.0)
}

/// Watches what others take, from before a measurement to its end.
pub(super) struct Watch {
    /// Before anything was done; None where the system does not say.
    idle: Option<Idle>,
    begun: Option<(Ticks, u64)>,
}

/// A look at a machine on which nothing of ours runs.
struct Idle {
    busy: f64,
    load: f64,
}

impl Watch {
    /// Looks for a second, and says loudly when somebody else is at work.
    pub(super) fn begin() -> Self {
        let before = now();
        thread::sleep(LOOK);
        let after = now();
        let load = read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok());
        let idle = before
            .zip(after)
            .zip(load)
            .map(|((before, after), load): (_, f64)| Idle { busy: others(before, after), load });
        if let Some(Idle { busy, load }) = idle.as_ref().filter(|idle| idle.busy > TOLERATED) {
            tracing::warn!(
                "THE MACHINE IS NOT IDLE: others use {:.0} % of its cores (load {load}). These figures are not to be trusted.",
                100.0 * busy
            );
        }
        Self { idle, begun: after }
    }

    /// What the report says about the machine. Children must have been waited for.
    pub(super) fn end(self) -> Machine {
        let during = self.begun.zip(now()).map(|(before, after)| others(before, after));
        Machine { idle: self.idle, during }
    }
}

/// The machine, and who else used it.
pub(super) struct Machine {
    idle: Option<Idle>,
    during: Option<f64>,
}

impl Machine {
    /// Were these figures disturbed? None: nobody knows.
    fn disturbed(&self) -> Option<bool> {
        Some(self.idle.as_ref()?.busy > TOLERATED || self.during? > TOLERATED)
    }

    /// For the JSON report.
    pub(super) fn json(&self) -> Value {
        json!({
            "cpu": cpu_name(),
            "cores": thread::available_parallelism().map_or(0, usize::from),
            "mote": env!("CARGO_PKG_VERSION"),
            "debug_assertions": cfg!(debug_assertions),
            "others_before": self.idle.as_ref().map(|idle| idle.busy),
            "load_before": self.idle.as_ref().map(|idle| idle.load),
            "others_during": self.during,
            "disturbed": self.disturbed(),
        })
    }

    /// For the printed report: loud, when something is wrong.
    pub(super) fn lines(&self) -> String {
        let cores = thread::available_parallelism().map_or(0, usize::from);
        let mut text = format!("{}, {cores} cores, mote {}", cpu_name(), env!("CARGO_PKG_VERSION"));
        match (&self.idle, self.during) {
            (Some(idle), Some(during)) => {
                let (before, during) = (100.0 * idle.busy, 100.0 * during);
                text += &format!(
                    "; others used {before:.0} % of the cores before and {during:.0} % during the measurement"
                );
            }
            _ => text += "; this system does not say whether it was idle",
        }
        if self.disturbed() == Some(true) {
            text += "\n!!! THE MACHINE WAS NOT IDLE: these figures are not to be trusted !!!";
        }
        if cfg!(debug_assertions) {
            text += "\n!!! built with debug assertions (dev profile): measure with --release !!!";
        }
        text
    }
}

fn cpu_name() -> String {
    let text = read("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Memory of a process in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// Resident now.
    pub(super) resident: u64,
    /// The most that was ever resident.
    pub(super) peak: u64,
}

impl Memory {
    /// Of a running process, where the system says it.
    pub(super) fn of(pid: u32) -> Option<Self> {
        Self::parse(&read(&format!("/proc/{pid}/status"))?)
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        Some(Self { resident: field("VmRSS")?, peak: field("VmHWM")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_iowait_are_not_busy() {
        let stat = "cpu  100 10 20 500 70 0 5 5 50 0\ncpu0 1 2 3 4\n";
        assert_eq!(total_ticks(stat), Some(Ticks { busy: 140, all: 710 }));
        assert_eq!(total_ticks("intr 5"), None);
        assert_eq!(total_ticks("cpu  1 2"), None);
    }

    #[test]
    fn a_process_counts_with_the_children_it_waited_for() {
        let stat = "17 (a) b (c) S 1 17 17 0 -1 4 9 9 9 9 100 20 3000 400 20 0 1 0";
        assert_eq!(process_ticks(stat), Some(3520));
        assert_eq!(process_ticks("17 (a"), None);
    }

    #[test]
    fn our_own_work_is_not_others() {
        let at = |busy, all, own| (Ticks { busy, all }, own);
        assert_eq!(others(at(0, 0, 0), at(150, 200, 150)), 0.0);
        assert_eq!(others(at(0, 0, 0), at(150, 200, 50)), 0.5);
        assert_eq!(others(at(10, 20, 5), at(10, 20, 9)), 0.0);
    }

    #[test]
    fn memory_is_read_in_kib() {
        let status = "Name:\tmote\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(Memory::parse(status), Some(Memory { resident: 1 << 20, peak: 2 << 20 }));
        assert_eq!(Memory::parse("Name: x"), None);
    }
}
