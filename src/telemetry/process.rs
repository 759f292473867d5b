//! What the system knows about this process, under the names that Prometheus has for it. From /proc; elsewhere nothing is known, and nothing is shown.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// Ticks a second of times in /proc. Linux counts for programs in these, whatever it counts in itself.
const TICKS: f64 = 100.0;

/// Asks the system when Prometheus asks.
#[derive(Debug)]
pub struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let (status, stat) = (read("/proc/self/status"), read("/proc/self/stat"));
        let begun = begin(&read("/proc/stat")).zip(field(&stat, 22)).map(|(boot, ticks)| boot + ticks / TICKS);
        let gauges = [
            ("process_resident_memory_bytes", "Memory of the process", line(&status, "VmRSS:").map(|kib| kib * 1024.0)),
            ("process_threads", "Threads of the process", line(&status, "Threads:")),
            ("process_open_fds", "Open files and connections of the process", open_files()),
            ("process_start_time_seconds", "When the process began, in Unix seconds", begun),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
                ConstGauge::new(value).encode(metric)?;
            }
        }
        let help = "Time that processors worked for the process, for it and in the system";
        if let Some((user, system)) = field(&stat, 14).zip(field(&stat, 15)) {
            let metric = encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?;
            ConstCounter::new((user + system) / TICKS).encode(metric)?;
        }
        Ok(())
    }
}

/// A file of /proc; nothing where there is none.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The number of a line of /proc/self/status.
fn line(status: &str, name: &str) -> Option<f64> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// A field of /proc/self/stat, which counts from 1. The second one, a name in parentheses, may hold anything.
fn field(stat: &str, number: usize) -> Option<f64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// When the system began, in Unix seconds: of /proc/stat.
fn begin(stat: &str) -> Option<f64> {
    line(stat, "btime ")
}

fn open_files() -> Option<f64> {
    // One of them is the folder that is being read.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_writes_is_read() {
        let status = "Name:\tmote\nVmHWM:\t  300 kB\nVmRSS:\t  278912 kB\nThreads:\t7\n";
        assert_eq!(
            (line(status, "VmRSS:"), line(status, "Threads:"), line(status, "VmSwap:")),
            (Some(278_912.0), Some(7.0), None)
        );
        let stat =
            "12 (a) b) c) S 1 12 12 0 -1 4194560 9 0 0 0 250 50 0 0 20 0 7 0 123456 1000 70000 18446744073709551615";
        assert_eq!((field(stat, 14), field(stat, 15), field(stat, 22)), (Some(250.0), Some(50.0), Some(123_456.0)));
        assert_eq!((field("", 14), field("12 (mote) S", 22), field(stat, 1)), (None, None, None));
        assert_eq!(begin("cpu  1 2 3\nbtime 1700000000\nprocesses 9\n"), Some(1_700_000_000.0));
    }
}
