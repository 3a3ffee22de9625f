//! Picks out of a kernel package the modules that a guest needs, in load order.
//!
//! Debian writes `modules.dep` only when a kernel is installed, so the order comes from the modules themselves: each
//! names what it depends on in its `.modinfo` section. A name without a file is built into the kernel.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A module, uncompressed.
#[derive(Debug)]
pub struct Module {
    /// With underscores, as the kernel prints it.
    pub name: String,
    /// The `.ko` file's contents.
    pub image: Vec<u8>,
}

/// The modules `wanted` with all that they depend on, each after its dependencies.
///
/// # Errors
/// Fails when a wanted module is not in the tree or does not decompress.
pub fn closure(tree: &Path, wanted: &[&str], busybox: &Path) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    collect(tree, &mut files)?;
    let mut picker = Picker { files, busybox, loaded: Vec::new(), entered: Vec::new() };
    for name in wanted {
        ensure!(picker.files.contains_key(*name), "no module {name} in the kernel package");
        picker.visit(name)?;
    }
    Ok(picker.loaded)
}

struct Picker<'a> {
    files: HashMap<String, PathBuf>,
    busybox: &'a Path,
    loaded: Vec<Module>,
    entered: Vec<String>,
}

impl Picker<'_> {
    fn visit(&mut self, name: &str) -> Result<()> {
        let Some(path) = self.files.get(name) else { return Ok(()) };
        if self.entered.iter().any(|entered| entered == name) {
            return Ok(());
        }
        self.entered.push(name.to_owned());
        let image = decompress(path, self.busybox)?;
        for dependency in dependencies(&image) {
            self.visit(&dependency)?;
        }
        self.loaded.push(Module { name: name.to_owned(), image });
        Ok(())
    }
}

/// File names use dashes and underscores alike; the kernel's names have underscores only.
fn collect(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some((stem, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(stem.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn decompress(path: &Path, busybox: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let mut command = Command::new(busybox);
    let output =
        command.arg("xzcat").arg(path).stdin(Stdio::null()).output().context("busybox does not start")?;
    ensure!(output.status.success(), "{} does not decompress ({})", path.display(), output.status);
    Ok(output.stdout)
}

/// The `depends=` entry of `.modinfo`: a comma-separated list between NULs.
fn dependencies(image: &[u8]) -> Vec<String> {
    let entry = image.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"depends=".as_slice()));
    let names = String::from_utf8_lossy(entry.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(tree: &Path, file: &str, depends: &str) {
        fs::write(tree.join(file), format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
    }

    #[test]
    fn each_module_follows_its_dependencies_and_comes_once() {
        let tree = tempfile::tempdir().unwrap();
        module(tree.path(), "virtio-gpu.ko", "drm_kms_helper,drm,virtio-ring");
        module(tree.path(), "drm_kms_helper.ko", "drm");
        module(tree.path(), "drm.ko", "");
        module(tree.path(), "unrelated.ko", "drm");
        let modules = closure(tree.path(), &["virtio_gpu"], Path::new("/nonexistent")).unwrap();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["drm", "drm_kms_helper", "virtio_gpu"]);
    }

    #[test]
    fn missing_wanted_module_is_an_error() {
        let tree = tempfile::tempdir().unwrap();
        assert!(closure(tree.path(), &["virtio_gpu"], Path::new("/nonexistent")).is_err());
    }
}
