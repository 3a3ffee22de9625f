//! Virtio's vendor capabilities in PCI config space (virtio 1.3, 4.1.4): where the registers are.

const STATUS: usize = 6;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const FIRST: usize = 0x34;
const VENDOR: u8 = 9;
/// A list longer than this is a loop.
const MAX_CAPABILITIES: usize = 48;

const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;

/// Why the capabilities do not describe a modern device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// One is not there.
    #[error("the {0} capability is missing: is this a legacy device?")]
    Missing(&'static str),
    /// Registers are spread over BARs.
    #[error("registers are in BAR {0} and BAR {1}, only one is supported")]
    SeveralBars(u8, u8),
}

/// Offsets in the one BAR that has the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The BAR.
    pub bar: u8,
    /// Common configuration.
    pub common: usize,
    /// Doorbells.
    pub notify: usize,
    /// Bytes between doorbells.
    pub notify_multiplier: usize,
    /// Interrupt status.
    pub isr: usize,
}

#[derive(Clone, Copy)]
struct Capability {
    bar: u8,
    offset: usize,
    multiplier: usize,
}

/// Reads the capabilities from the first 256 bytes of config space.
///
/// # Errors
/// When one is missing or they lie in several BARs.
pub fn parse(space: &[u8; 256]) -> Result<Layout, CapabilityError> {
    let byte = |at: usize| space.get(at).copied().unwrap_or(0);
    let word = |at: usize| {
        let value = u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
        usize::try_from(value).unwrap_or(usize::MAX)
    };
    let mut found: [Option<Capability>; 5] = [None; 5];
    let has_list = byte(STATUS) & STATUS_CAPABILITIES != 0;
    let mut at = if has_list { usize::from(byte(FIRST) & !3) } else { 0 };
    for _ in 0..MAX_CAPABILITIES {
        if at == 0 {
            break;
        }
        if byte(at) == VENDOR {
            let (offset, multiplier) = (word(at + 8), word(at + 16));
            // The first of a kind is the one that the device prefers.
            if let Some(slot @ None) = found.get_mut(usize::from(byte(at + 3))) {
                *slot = Some(Capability { bar: byte(at + 4), offset, multiplier });
            }
        }
        at = usize::from(byte(at + 1) & !3);
    }
    let need = |kind: u8, name| {
        found.get(usize::from(kind)).copied().flatten().ok_or(CapabilityError::Missing(name))
    };
    let (common, notify) = (need(COMMON, "common configuration")?, need(NOTIFY, "notification")?);
    let isr = need(ISR, "interrupt status")?;
    for other in [notify, isr] {
        if other.bar != common.bar {
            return Err(CapabilityError::SeveralBars(common.bar, other.bar));
        }
    }
    Ok(Layout {
        bar: common.bar,
        common: common.offset,
        notify: notify.offset,
        notify_multiplier: notify.multiplier,
        isr: isr.offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Config space with capabilities of (kind, bar, offset, len, multiplier).
    fn space(capabilities: &[(u8, u8, u32, u32, u32)]) -> [u8; 256] {
        let mut space = [0; 256];
        space[STATUS] = STATUS_CAPABILITIES;
        space[FIRST] = if capabilities.is_empty() { 0 } else { 0x40 };
        for (index, (kind, bar, offset, len, multiplier)) in capabilities.iter().enumerate() {
            let at = 0x40 + 24 * index;
            space[at] = VENDOR;
            space[at + 1] = if index + 1 < capabilities.len() { u8::try_from(at + 24).unwrap() } else { 0 };
            space[at + 3] = *kind;
            space[at + 4] = *bar;
            space[at + 8..at + 12].copy_from_slice(&offset.to_le_bytes());
            space[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
            space[at + 16..at + 20].copy_from_slice(&multiplier.to_le_bytes());
        }
        space
    }

    const GOOD: [(u8, u8, u32, u32, u32); 4] =
        [(1, 4, 0, 0x1000, 0), (3, 4, 0x1000, 0x1000, 0), (4, 4, 0x2000, 128, 0), (2, 4, 0x3000, 0x1000, 4)];

    #[test]
    fn modern_device_is_understood() {
        let layout = parse(&space(&GOOD)).unwrap();
        let expected = Layout { bar: 4, common: 0, notify: 0x3000, notify_multiplier: 4, isr: 0x1000 };
        assert_eq!(layout, expected);
    }

    #[test]
    fn missing_capability_is_named() {
        assert_eq!(parse(&space(&[])), Err(CapabilityError::Missing("common configuration")));
        assert_eq!(parse(&space(&GOOD[..3])), Err(CapabilityError::Missing("notification")));
    }

    #[test]
    fn list_that_loops_ends() {
        let mut space = space(&GOOD[..2]);
        space[0x40 + 24 + 1] = 0x40;
        assert!(parse(&space).is_err());
    }

    #[test]
    fn registers_in_two_bars_are_refused() {
        let mut capabilities = GOOD;
        capabilities[1].1 = 2;
        assert_eq!(parse(&space(&capabilities)), Err(CapabilityError::SeveralBars(4, 2)));
    }
}
