//! The serial port, and where its output goes.

use std::io::{self, Write};
use std::sync::Arc;

use gantry_devices::bounded::BoundedFile;
use gantry_devices::bounded_writer::{BoundedWriter, Kind};
use gantry_devices::serial::Serial;
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use crate::config::{SerialMode, VmConfig};
use crate::host::files;
use crate::info::ConsoleSink;
use crate::process::error::cannot;
use crate::process::journal::{GuestLines, is_journal};

/// The most that `serial.file` holds. A guest can write without end, and a full disk harms the host.
const MAX_FILE: u64 = 64 << 20;

/// Makes the serial port, if the VM has one. It interrupts through `trigger`. What the guest writes goes where its
/// file says, and to `console`; nowhere at all with [`SerialMode::Null`].
///
/// # Errors
/// Its file cannot be made, standard output is closed, or no file descriptor is left.
pub fn port(
    config: &VmConfig,
    console: &ConsoleSink,
    trigger: impl FnOnce() -> Result<EventFd, MachineError>,
) -> Result<Option<Arc<Serial>>, MachineError> {
    let below = config.folders.as_ref();
    let below = below.and_then(|folders| folders.output.as_deref());
    let file: Box<dyn Write + Send> = match &config.serial {
        SerialMode::Off => return Ok(None),
        SerialMode::Null => Box::new(io::sink()),
        SerialMode::Tty => {
            let stdout = BoundedWriter::of_stream(&io::stdout(), Kind::Guest);
            let stdout = stdout.map_err(cannot("use stdout"))?;
            match is_journal(&io::stdout()) {
                true => Box::new(GuestLines::new(stdout)),
                false => Box::new(stdout),
            }
        }
        SerialMode::File(path) => Box::new(BoundedFile::new(
            files::create("serial.file", path, below)?,
            MAX_FILE,
        )),
    };
    let out: Box<dyn Write + Send> = match config.serial.is_console() {
        false => file,
        true => Box::new(Tee {
            file,
            console: Arc::clone(console),
        }),
    };
    let serial = Serial::new(trigger()?, out).map_err(cannot("make an eventfd"))?;
    Ok(Some(Arc::new(serial)))
}

/// Output that goes to a file, and to those who read along.
struct Tee {
    file: Box<dyn Write + Send>,
    console: ConsoleSink,
}

impl Write for Tee {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        (self.console)(data);
        self.file.write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
