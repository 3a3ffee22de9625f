//! Structs that C programs see. The test compares their layout with the header's.

use guest_agent::client;
use std::ffi::c_char;
use virtio_gpu_svm::protocol::job;

/// `struct svm_device`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Device {
    /// Names it.
    pub dev_id: u32,
    /// Its addresses are below `1 << va_bits`.
    pub va_bits: u32,
    /// `SVM_FAULTS_*`.
    pub fault_model: u32,
    /// `SVM_ADDRESSES_*`.
    pub address_model: u32,
    /// Jobs at the same time.
    pub num_engines: u32,
    /// 0.
    pub reserved: u32,
    /// Bit n: packet opcode n.
    pub opcodes: u64,
    /// `DEVICE_*` of PROTOCOL 4.2.
    pub flags: u64,
    /// Ended by a zero.
    pub name: [c_char; 40],
}

impl From<&client::Device> for Device {
    fn from(device: &client::Device) -> Self {
        let mut name = [0; 40];
        // The last byte stays zero.
        for (to, from) in name.iter_mut().take(39).zip(device.name.as_bytes()) {
            *to = c_char::from_ne_bytes([*from]);
        }
        Self {
            dev_id: device.dev_id,
            va_bits: device.va_bits,
            fault_model: device.fault_model,
            address_model: device.address_model,
            num_engines: device.num_engines,
            reserved: 0,
            opcodes: device.opcodes,
            flags: device.flags,
            name,
        }
    }
}

/// `struct svm_packet`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Packet {
    /// `SVM_OP_*`.
    pub opcode: u32,
    /// 0.
    pub flags: u32,
    /// Destination.
    pub dst: u64,
    /// Source.
    pub src: u64,
    /// Bytes.
    pub len: u64,
    /// Operand.
    pub value: u64,
    /// Second operand.
    pub arg: u64,
    /// 0.
    pub reserved: [u64; 2],
}

impl From<&Packet> for job::Packet {
    fn from(packet: &Packet) -> Self {
        Self {
            opcode: packet.opcode.into(),
            flags: packet.flags.into(),
            dst: packet.dst.into(),
            src: packet.src.into(),
            len: packet.len.into(),
            value: packet.value.into(),
            arg: packet.arg.into(),
            reserved: packet.reserved.map(Into::into),
        }
    }
}

/// `struct svm_failure`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Failure {
    /// Negative errno.
    pub error: i32,
    /// Index of the packet.
    pub packet: u32,
    /// The device's address of the access.
    pub address: u64,
    /// `SVM_ACCESS_*`.
    pub access: u32,
    /// 0.
    pub reserved: u32,
}
