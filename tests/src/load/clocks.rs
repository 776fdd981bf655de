//! The guest's clocks, each time together with its raw counter: whoever listens can tell whether they agree.
use super::report::Report;
use crate::moment::Moment;
use anyhow::Result;
use std::io::Write;
use std::thread;
use std::time::Duration;

/// How often it looks whether a sign of life is due.
const STEP: Duration = Duration::from_millis(50);

/// Tells them for ever.
pub fn run(report: &mut Report<impl Write>) -> Result<()> {
    report.start(format_args!("unit=ns"))?;
    loop {
        thread::sleep(STEP);
        let Moment { counter, width, realtime, monotonic, boottime } = Moment::now();
        report.progress(format_args!(
            "counter={counter} width={width} realtime={realtime} monotonic={monotonic} boottime={boottime}"
        ))?;
    }
}
