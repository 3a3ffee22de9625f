//! What EXEC and an asynchronous VM_BIND say of timelines: the points that stand before their list, and the one that
//! they promise. PROTOCOL 5.6.

use super::{Error, Result};
use crate::context::Launch;
use crate::protocol::request::FencePoint;
use crate::protocol::{MAX_RINGS, MAX_WAITS};
use crate::timeline::{Point, Timeline};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// A request with its two lists.
pub struct Waits<'a, T, E> {
    /// Its fixed part.
    pub request: T,
    /// The points that it waits for.
    pub waits: &'a [FencePoint],
    /// The list that it is about.
    pub list: &'a [E],
}

/// Cuts a request into its fixed part, its points and its list, which must be all of it. Both counts are compared with
/// their limits and with the bytes that are there before anything is allocated.
pub fn with_waits<T, E>(
    bytes: &[u8],
    counts: impl Fn(&T) -> (U32, U32),
    limit: u32,
) -> Result<Waits<'_, T, E>>
where
    T: FromBytes,
    E: FromBytes + Immutable + KnownLayout,
{
    let (request, rest) = T::read_from_prefix(bytes).map_err(|_| Error::Length)?;
    let (waits, count) = counts(&request);
    if waits.get() > MAX_WAITS || count.get() > limit {
        return Err(Error::Count);
    }
    let length = |count: U32| usize::try_from(count.get()).map_err(|_| Error::Count);
    let points = <[FencePoint]>::ref_from_prefix_with_elems(rest, length(waits)?);
    let (waits, rest) = points.map_err(|_| Error::Length)?;
    let list = <[E]>::ref_from_bytes_with_elems(rest, length(count)?).map_err(|_| Error::Length)?;
    Ok(Waits { request, waits, list })
}

/// Checks what can be said of points without the context. `line` is the GPU VM and its ring.
pub fn launch(line: (U32, U32), user_data: U64, signal: U64, waits: &[FencePoint]) -> Result<Launch> {
    let timeline = |vm_id: U32, ring_idx: U32| {
        let timeline = Timeline { vm_id: vm_id.get(), ring_idx: ring_idx.get() };
        if timeline.ring_idx < MAX_RINGS { Ok(timeline) } else { Err(Error::Value) }
    };
    let point = |(wait, index): (&FencePoint, u32)| {
        let timeline = timeline(wait.vm_id, wait.ring_idx).map_err(|error| error.at(index))?;
        Ok(Point { timeline, seqno: wait.seqno.get() })
    };
    Ok(Launch {
        timeline: timeline(line.0, line.1)?,
        user_data: user_data.get(),
        signal: signal.get(),
        waits: waits.iter().zip(0..).map(point).collect::<Result<_>>()?,
    })
}
