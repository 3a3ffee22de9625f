//! Packs a folder of inputs into one file, and unpacks it: `corpus pack DIR FILE`, `corpus unpack FILE DIR`.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["pack", dir, file] => {
            let mut inputs = Vec::new();
            for entry in std::fs::read_dir(dir)? {
                inputs.push(std::fs::read(entry?.path())?);
            }
            inputs.sort_by_key(|input| (input.len(), input.clone()));
            std::fs::write(file, fuzz::pack::pack(&inputs))?;
        }
        ["unpack", file, dir] => {
            let bytes = std::fs::read(file)?;
            std::fs::create_dir_all(dir)?;
            for (n, input) in fuzz::pack::unpack(&bytes).ok_or("the pack is torn")?.iter().enumerate() {
                std::fs::write(Path::new(dir).join(format!("{n:05}")), input)?;
            }
        }
        _ => return Err("usage: corpus pack DIR FILE | corpus unpack FILE DIR".into()),
    }
    Ok(())
}
