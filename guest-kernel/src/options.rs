//! The kernel command line. Words that are not options of ours are left alone (a VMM may add its own), but an option of ours with
//! a value that makes no sense is an error: a test that asked for something must get it.

use crate::protocol::number;

/// What to do at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The platform's power-off.
    PowerOff,
    /// The platform's reset.
    Reset,
    /// A fault the processor cannot handle.
    TripleFault,
}

impl End {
    /// The word on the command line, and in `ORACLE end`.
    pub const fn name(self) -> &'static str {
        match self {
            End::PowerOff => "poweroff",
            End::Reset => "reset",
            End::TripleFault => "triple-fault",
        }
    }
}

/// What the oracle breaks by itself, once, so that a test can see that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelfTest {
    /// One bit in RAM.
    Ram,
    /// A general register.
    Register,
    /// An x87 register.
    X87,
    /// An SSE register.
    Xmm,
    /// The upper half of an AVX register.
    Ymm,
    /// A SIMD register.
    Simd,
    /// The part of an SVE register that is no SIMD register.
    Sve,
    /// The timer stops.
    Tick,
    /// The platform's second timer stops.
    Watchdog,
    /// A model-specific register.
    Msr,
    /// A control register.
    Control,
    /// A system register.
    SystemRegister,
    /// A debug register.
    Debug,
    /// The CPU's description.
    Cpuid,
    /// The counter goes back.
    Tsc,
    /// The clock diverges.
    Clock,
    /// A register of the interrupt controller.
    Gic,
    /// An interrupt that the CPU sends to itself is lost.
    Sgi,
    /// A message-signalled interrupt is lost.
    Lpi,
    /// The serial port's scratch register.
    Uart,
    /// The kernel's own code and constants.
    Image,
    /// An exception nobody expects.
    Exception,
    /// An interrupt from one CPU to another is lost.
    Ipi,
    /// An interrupt from one CPU to another comes twice.
    IpiTwice,
    /// The counter is behind what another CPU has read before.
    Behind,
    /// A CPU stands still.
    Processor,
    /// No damage: the guest does not look at the time for a second.
    Pause,
}

/// What the CPUs do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// They check all there is.
    Checks,
    /// They do nothing but interrupt each other and themselves, wherever they are, and check what an interrupt could harm.
    IpiStorm,
}

/// The most CPUs that are used.
pub const MOST_CPUS: usize = 64;

/// Both of the architectures that there is an oracle for.
const BOTH: &[&str] = &["x86_64", "aarch64"];
const X86_64: &[&str] = &["x86_64"];
const AARCH64: &[&str] = &["aarch64"];

impl SelfTest {
    /// All of them, with the words that name them and the architectures on which there is something to break.
    const ALL: [(&'static str, SelfTest, &'static [&'static str]); 27] = [
        ("ram", SelfTest::Ram, BOTH),
        ("register", SelfTest::Register, BOTH),
        ("x87", SelfTest::X87, X86_64),
        ("xmm", SelfTest::Xmm, X86_64),
        ("ymm", SelfTest::Ymm, X86_64),
        ("simd", SelfTest::Simd, AARCH64),
        ("sve", SelfTest::Sve, AARCH64),
        ("tick", SelfTest::Tick, BOTH),
        ("watchdog", SelfTest::Watchdog, BOTH),
        ("msr", SelfTest::Msr, X86_64),
        ("control", SelfTest::Control, X86_64),
        ("sysreg", SelfTest::SystemRegister, AARCH64),
        ("debug", SelfTest::Debug, BOTH),
        ("cpuid", SelfTest::Cpuid, BOTH),
        ("tsc", SelfTest::Tsc, BOTH),
        ("clock", SelfTest::Clock, BOTH),
        ("gic", SelfTest::Gic, AARCH64),
        ("sgi", SelfTest::Sgi, AARCH64),
        ("lpi", SelfTest::Lpi, AARCH64),
        ("uart", SelfTest::Uart, BOTH),
        ("image", SelfTest::Image, BOTH),
        ("exception", SelfTest::Exception, BOTH),
        ("ipi", SelfTest::Ipi, BOTH),
        ("ipi-twice", SelfTest::IpiTwice, BOTH),
        ("behind", SelfTest::Behind, BOTH),
        ("processor", SelfTest::Processor, BOTH),
        ("pause", SelfTest::Pause, BOTH),
    ];

    /// Those there are on an architecture, with the words that name them. Not every machine has all: the oracle refuses what it
    /// cannot break by `DAMAGE option refused=WORD`.
    pub fn offered_on(architecture: &str) -> impl Iterator<Item = (&'static str, SelfTest)> {
        let offered = move |architectures: &[&str]| architectures.contains(&architecture);
        Self::ALL.into_iter().filter_map(move |(word, what, on)| offered(on).then_some((word, what)))
    }

    /// Whether it takes more than one CPU.
    pub fn takes_processors(self) -> bool {
        matches!(self, SelfTest::Ipi | SelfTest::IpiTwice | SelfTest::Behind | SelfTest::Processor)
    }

    /// The word that names it.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find_map(|(word, what, _)| (what == self).then_some(word)).unwrap_or_default()
    }
}

/// The options, each with its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// `stride=BYTES`: one line of 64 bytes per stride is checked; 64 checks every byte.
    pub stride: u64,
    /// `pause_ms=N`: a longer silence between two looks at the counter is reported as a pause.
    pub pause_ms: u64,
    /// `tick_ms=N`: the timer's interval.
    pub tick_ms: u64,
    /// `rest=N`: for so many ticks more than it must a CPU rests in each round, its registers held. For an oracle that
    /// shares a slow host with guests which have work to do.
    pub rest: u64,
    /// `clock_ms=N`: how far the clock may diverge from the counter in total.
    pub clock_ms: u64,
    /// `clock_ppm=N`: how much further per million since the start. The default is what KVM takes for the same frequency; a
    /// host under emulation measures worse.
    pub clock_ppm: u64,
    /// `lost_ms=N`: a tick that has not come after so much running time is lost.
    pub lost_ms: u64,
    /// `lines=N`: end after so many lines; without it the oracle runs for ever.
    pub lines: Option<u64>,
    /// `end=poweroff|reset|triple-fault`.
    pub end: End,
    /// `selftest=WHAT`.
    pub self_test: Option<SelfTest>,
    /// `apic=xapic`: use the memory-mapped interrupt controller even where registers are offered.
    pub memory_mapped_apic: bool,
    /// `cpus=N`: use so many of the CPUs there are, and leave the others switched off; without it all are used.
    pub cpus: Option<usize>,
    /// `load=checks|ipi-storm`.
    pub load: Load,
    /// `hotplug=on`: the last CPU is switched off and on again and again.
    pub hotplug: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            stride: 4096,
            pause_ms: 300,
            tick_ms: 20,
            rest: 0,
            clock_ms: 50,
            clock_ppm: 250,
            lost_ms: 5000,
            lines: None,
            end: End::PowerOff,
            self_test: None,
            memory_mapped_apic: false,
            cpus: None,
            load: Load::Checks,
            hotplug: false,
        }
    }
}

impl Options {
    /// Reads a command line. The error is the word that makes no sense.
    pub fn parse(command_line: &str) -> Result<Self, &str> {
        let mut options = Options::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else { continue };
            let positive = || number(value).filter(|value| *value > 0).ok_or(word);
            match key {
                "stride" => options.stride = number(value).filter(|value| is_stride(*value)).ok_or(word)?,
                "pause_ms" => options.pause_ms = positive()?,
                "tick_ms" => options.tick_ms = number(value).filter(|value| (1..=100).contains(value)).ok_or(word)?,
                "rest" => options.rest = number(value).filter(|value| *value <= 50).ok_or(word)?,
                "clock_ms" => options.clock_ms = positive()?,
                "clock_ppm" => options.clock_ppm = number(value).filter(|value| *value <= 100_000).ok_or(word)?,
                "lost_ms" => options.lost_ms = positive()?,
                "lines" => options.lines = Some(positive()?),
                "end" => {
                    let ends = [End::PowerOff, End::Reset, End::TripleFault];
                    options.end = ends.into_iter().find(|end| end.name() == value).ok_or(word)?;
                }
                "selftest" => {
                    let mut all = SelfTest::ALL.into_iter();
                    options.self_test = Some(all.find(|(name, ..)| *name == value).ok_or(word)?.1);
                }
                "apic" => {
                    options.memory_mapped_apic = match value {
                        "xapic" => true,
                        "auto" => false,
                        _ => return Err(word),
                    }
                }
                "cpus" => {
                    let cpus = number(value).and_then(|value| usize::try_from(value).ok());
                    options.cpus = Some(cpus.filter(|cpus| (1..=MOST_CPUS).contains(cpus)).ok_or(word)?);
                }
                "load" => {
                    options.load = match value {
                        "checks" => Load::Checks,
                        "ipi-storm" => Load::IpiStorm,
                        _ => return Err(word),
                    }
                }
                "hotplug" => {
                    options.hotplug = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(word),
                    }
                }
                _ => {}
            }
        }
        Ok(options)
    }
}

/// Lines must not overlap, and a stride of more than 1 GiB would check next to nothing.
fn is_stride(value: u64) -> bool {
    value.is_multiple_of(crate::scrub::LINE) && (crate::scrub::LINE..=1 << 30).contains(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_command_line_gives_the_defaults() {
        assert_eq!(Options::parse(""), Ok(Options::default()));
    }

    #[test]
    fn every_self_test_has_a_word_and_an_architecture() {
        for (word, what, on) in SelfTest::ALL {
            assert_eq!(what.name(), word);
            assert!(on.iter().all(|name| SelfTest::offered_on(name).any(|offered| offered == (word, what))), "{word}");
        }
        assert!(SelfTest::offered_on("aarch64").all(|(word, _)| word != "msr"));
        assert!(SelfTest::offered_on("x86_64").all(|(word, _)| word != "lpi"));
    }

    #[test]
    fn every_option_is_read() {
        let line = "console=ttyS0 quiet stride=64 pause_ms=500 tick_ms=10 rest=3 clock_ms=100 clock_ppm=2000 lost_ms=2000 lines=20 end=triple-fault \
                    selftest=msr apic=xapic cpus=3 load=ipi-storm hotplug=on";
        let expected = Options {
            stride: 64,
            pause_ms: 500,
            tick_ms: 10,
            rest: 3,
            clock_ms: 100,
            clock_ppm: 2000,
            lost_ms: 2000,
            lines: Some(20),
            end: End::TripleFault,
            self_test: Some(SelfTest::Msr),
            memory_mapped_apic: true,
            cpus: Some(3),
            load: Load::IpiStorm,
            hotplug: true,
        };
        assert_eq!(Options::parse(line), Ok(expected));
    }

    #[test]
    fn values_that_make_no_sense_are_named() {
        for word in [
            "stride=0",
            "stride=65",
            "stride=x",
            "lines=0",
            "lines=",
            "end=sleep",
            "selftest=cpu",
            "apic=2",
            "tick_ms=0",
            "rest=51",
            "cpus=0",
            "cpus=65",
            "load=heavy",
            "hotplug=1",
        ] {
            assert_eq!(Options::parse(word), Err(word));
        }
    }
}
