//! Many inputs in one file: for each its length (32 bits, little-endian) and its bytes.

/// The inputs of a pack, in order; none if the file is torn.
pub fn unpack(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut inputs = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk()?;
        let (input, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        inputs.push(input);
        bytes = rest;
    }
    Some(inputs)
}

/// A pack of these inputs.
///
/// # Panics
/// If an input has 4 GiB or more.
pub fn pack(inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for input in inputs {
        let Ok(length) = u32::try_from(input.len()) else { panic!("an input of {} bytes", input.len()) };
        bytes.extend(length.to_le_bytes());
        bytes.extend(input);
    }
    bytes
}
