//! The function in sysfs: finding it, and taking it from its driver.

use super::{Error, Result, file_error};
use std::io;
use std::path::{Path, PathBuf};

const DEVICES: &str = "/sys/bus/pci/devices";
const VENDOR: &str = "0x1af4";
/// 0x1040 and the virtio device id of a GPU.
const DEVICE: &str = "0x1050";

/// The function's directory.
pub(super) fn directory(address: &str) -> PathBuf {
    Path::new(DEVICES).join(address)
}

/// The address of the function to use: `wanted`, or the only one there is.
pub(super) fn find(wanted: Option<&str>) -> Result<String> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(DEVICES) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NotFound),
        Err(error) => return Err(file_error("cannot list", DEVICES)(error)),
    };
    for entry in entries.flatten() {
        let id = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if id("vendor").trim_end() == VENDOR && id("device").trim_end() == DEVICE {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.sort();
    match (wanted, found.as_slice()) {
        (Some(wanted), _) if found.iter().any(|address| address == wanted) => Ok(wanted.to_owned()),
        (None, [only]) => Ok(only.clone()),
        (Some(_), _) | (None, []) => Err(Error::NotFound),
        (None, _) => Err(Error::Ambiguous(found)),
    }
}

/// The driver that has the function.
pub(super) fn driver(address: &str) -> Option<String> {
    let link = std::fs::read_link(directory(address).join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// Takes the function from its driver.
pub(super) fn unbind(address: &str) -> Result<()> {
    if driver(address).is_none() {
        return Ok(());
    }
    let path = directory(address).join("driver/unbind");
    std::fs::write(&path, address).map_err(file_error("cannot unbind by", path))
}

/// Gives the function to the driver `name`, if it is loaded. True if it has it then.
pub(super) fn bind(address: &str, name: &str) -> Result<bool> {
    let path = directory(address).join("driver_override");
    std::fs::write(&path, name).map_err(file_error("cannot write", path))?;
    // Refused when the driver is not there or does not want the function; the result is read from the link.
    std::fs::write("/sys/bus/pci/drivers_probe", address).ok();
    Ok(driver(address).as_deref() == Some(name))
}
