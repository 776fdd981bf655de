//! What the CPUs share: how many there are, the readings that none may fall behind, and the ring in which each interrupts the next.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use guest_kernel::clock::Latest;
use guest_kernel::options::{MOST_CPUS, Options};
use guest_kernel::ring::{LANES, Link, Sender, Step};

use crate::arch;
use crate::console::damage;
use crate::irq_cell::IrqCell;

/// An interrupt from another CPU, or a sign of life of one, takes so many times longer until it is lost than a tick: where CPUs have to
/// take turns, as in an emulator, each waits for all others.
pub const LOST: u64 = 4;

/// The latest reading of the counter.
pub static COUNTER: Latest = Latest::new();
/// The latest reading of the host's clock.
pub static CLOCK: Latest = Latest::new();
/// How often each CPU has been round.
pub static PROGRESS: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];

/// What the first CPU tells the others.
#[derive(Clone, Copy)]
pub struct Settings {
    /// The command line's.
    pub options: Options,
    /// The counter's frequency.
    pub khz: u64,
    /// How many CPUs are used.
    pub count: usize,
}

impl Settings {
    /// How many CPUs interrupt each other; the one that is switched off and on does not.
    pub fn ring(&self) -> usize {
        self.count - usize::from(self.options.hotplug)
    }
}

static SETTINGS: IrqCell<Option<Settings>> = IrqCell::new(None);
static COUNT: AtomicUsize = AtomicUsize::new(1);
static RING: AtomicUsize = AtomicUsize::new(1);
static GO: AtomicBool = AtomicBool::new(false);

/// Each from the CPU of that number to the next.
static LINKS: [Link; MOST_CPUS] = [const { Link::new() }; MOST_CPUS];

/// Before the other CPUs are started.
pub fn set_up(settings: Settings) {
    SETTINGS.with(|place| *place = Some(settings));
    COUNT.store(settings.count, Ordering::SeqCst);
    RING.store(settings.ring(), Ordering::SeqCst);
}

/// What was set up. None before that.
pub fn settings() -> Option<Settings> {
    SETTINGS.get()
}

/// How many CPUs are used.
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// All CPUs are there: their checks begin.
pub fn go() {
    GO.store(true, Ordering::SeqCst);
}

/// Waits for [`go`].
pub fn await_go() {
    while !GO.load(Ordering::SeqCst) {
        core::hint::spin_loop();
    }
}

/// How many interrupts have arrived.
pub fn ipis() -> u64 {
    LINKS.iter().map(Link::taken).sum()
}

/// An interrupt from the CPU before this one has come.
pub fn ipi_taken(lane: u64) {
    let ring = RING.load(Ordering::Relaxed);
    if let Err(taken) = LINKS[(arch::number() + ring - 1) % ring].take(lane) {
        damage("ipi", format_args!("unexpected=1 lane={lane} taken={taken}"));
    }
}

/// What a CPU keeps of its interrupts to the next one.
pub struct Ring {
    sender: Sender,
    number: usize,
    khz: u64,
    lose: bool,
    double: bool,
}

impl Ring {
    /// The ring as this CPU sees it.
    pub fn new(khz: u64, lost_ms: u64) -> Self {
        Ring { sender: Sender::new(LOST * lost_ms * khz), number: arch::number(), khz, lose: false, double: false }
    }

    /// Sends the next one if the last has come and `send` says so.
    pub fn look(&mut self, ran: u64, send: bool) {
        let ring = RING.load(Ordering::Relaxed);
        if count() == 1 || self.number >= ring {
            return;
        }
        let (link, next) = (&LINKS[self.number], (self.number + 1) % ring);
        match self.sender.look(link, ran, send) {
            Step::Wait => {}
            Step::Send { lane } => {
                let before = link.taken();
                if !core::mem::take(&mut self.lose) {
                    arch::send_ipi(next, lane);
                }
                if core::mem::take(&mut self.double) {
                    while link.taken() == before {
                        core::hint::spin_loop();
                    }
                    arch::send_ipi(next, lane);
                }
            }
            Step::Lost { number, waited } => {
                damage("ipi", format_args!("lost=1 number={number} to={next} waited_ms={}", waited / self.khz));
                arch::send_ipi(next, number % LANES);
            }
        }
    }

    /// Loses the next one: for the self-test.
    pub fn strike_lose(&mut self) {
        self.lose = true;
    }

    /// Sends the next one twice: for the self-test.
    pub fn strike_double(&mut self) {
        self.double = true;
    }
}
