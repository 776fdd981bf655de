//! Devices that the monitor emulates itself.

use alloc::format;
use alloc::vec::Vec;

use super::node::Node;
use super::record::{Reader, Record, to_node};
use super::{DecodeError, Problem};
use crate::names;

/// A 16550 serial port: its registers by name, and what was received but not yet read by the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SerialV1 {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// The receive FIFO, oldest byte first.
    pub in_buffer: Vec<u8>,
}

impl Record for SerialV1 {
    const COMPATIBLE: &'static str = "kho-vmm,serial-v1";

    fn encode(&self, node: Node) -> Node {
        let Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self;
        node.with_u8("baud-divisor-low", *baud_divisor_low)
            .with_u8("baud-divisor-high", *baud_divisor_high)
            .with_u8("interrupt-enable", *interrupt_enable)
            .with_u8("interrupt-identification", *interrupt_identification)
            .with_u8("line-control", *line_control)
            .with_u8("line-status", *line_status)
            .with_u8("modem-control", *modem_control)
            .with_u8("modem-status", *modem_status)
            .with_u8("scratch", *scratch)
            .with_bytes("in-buffer", in_buffer.as_slice())
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            baud_divisor_low: reader.u8("baud-divisor-low")?,
            baud_divisor_high: reader.u8("baud-divisor-high")?,
            interrupt_enable: reader.u8("interrupt-enable")?,
            interrupt_identification: reader.u8("interrupt-identification")?,
            line_control: reader.u8("line-control")?,
            line_status: reader.u8("line-status")?,
            modem_control: reader.u8("modem-control")?,
            modem_status: reader.u8("modem-status")?,
            scratch: reader.u8("scratch")?,
            in_buffer: reader.bytes("in-buffer")?,
        })
    }
}

/// The most output of a serial port that waits for a reader, in bytes.
pub const SERIAL_BACKLOG_MAX: usize = 64 << 10;

/// A serial port with what lies between it and whoever reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SerialV2 {
    /// The port itself.
    pub port: SerialV1,
    /// What the guest has said and nobody has read, oldest byte first.
    pub backlog: Vec<u8>,
    /// How many bytes the guest has said that nobody will read.
    pub dropped: u64,
}

impl From<SerialV1> for SerialV2 {
    fn from(port: SerialV1) -> Self {
        Self { port, backlog: Vec::new(), dropped: 0 }
    }
}

impl SerialV2 {
    /// The node called `name`: of the previous version where that holds all there is, so that who knows only that can read it.
    pub fn to_node(&self, name: &str) -> Node {
        let Self { port, backlog, dropped } = self;
        if backlog.is_empty() && *dropped == 0 { to_node(name, port) } else { to_node(name, self) }
    }

    /// Reads a node of this version or the previous one.
    ///
    /// # Errors
    /// When it is of neither, or does not decode.
    pub fn decode_any(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.compatible()?.as_str() {
            SerialV1::COMPATIBLE => reader.record::<SerialV1>().map(Self::from),
            Self::COMPATIBLE => reader.record(),
            found => {
                let expected = [SerialV1::COMPATIBLE, Self::COMPATIBLE].join(" or ");
                Err(reader.error(Problem::Incompatible { expected, found: found.into() }))
            }
        }
    }
}

impl Record for SerialV2 {
    const COMPATIBLE: &'static str = "kho-vmm,serial-v2";

    fn encode(&self, node: Node) -> Node {
        let Self { port, backlog, dropped } = self;
        node.with_bytes("backlog", backlog.as_slice())
            .with_u64("dropped", *dropped)
            .with_child(to_node(names::PORT, port))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let state = Self {
            port: reader.child(names::PORT)?,
            backlog: reader.bytes("backlog")?,
            dropped: reader.u64("dropped")?,
        };
        if state.backlog.len() > SERIAL_BACKLOG_MAX {
            let reason = format!("is {} bytes, more than are kept", state.backlog.len());
            return Err(reader.invalid("backlog", reason));
        }
        Ok(state)
    }
}

/// A PL031 real-time clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RtcV1 {
    /// RTCLR: the time that the guest has set last, in seconds.
    pub load: u32,
    /// What is added to the host's time to give the guest's, in seconds, in two's complement.
    pub offset_seconds: u64,
    /// RTCMR.
    pub match_value: u32,
    /// RTCIMSC.
    pub interrupt_mask: u32,
    /// RTCRIS.
    pub interrupt: u32,
}

impl Record for RtcV1 {
    const COMPATIBLE: &'static str = "kho-vmm,rtc-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { load, offset_seconds, match_value, interrupt_mask, interrupt } = self;
        node.with_u32("load", *load)
            .with_u64("offset-seconds", *offset_seconds)
            .with_u32("match-value", *match_value)
            .with_u32("interrupt-mask", *interrupt_mask)
            .with_u32("interrupt", *interrupt)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            load: reader.u32("load")?,
            offset_seconds: reader.u64("offset-seconds")?,
            match_value: reader.u32("match-value")?,
            interrupt_mask: reader.u32("interrupt-mask")?,
            interrupt: reader.u32("interrupt")?,
        })
    }
}
