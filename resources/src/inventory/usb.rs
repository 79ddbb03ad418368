//! The USB devices of the host, read from sysfs at the moment of asking (Documentation/ABI/stable/sysfs-bus-usb).

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::base::bdf::{HostBdf, hex};
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::ids::PciId;
use crate::inventory::error::InventoryError;

/// The class of hubs, which stay the host's (USB 3.2, 9.6.1).
const HUB: u32 = 0x09;

/// One USB device of the host as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsbDevice {
    /// Where it is plugged in: the bus, and the ports on the way, such as `1-4.2`; `usb1` for a root hub.
    pub port: String,
    /// Number of the bus.
    pub bus: u32,
    /// Number of the device on its bus; another one each time it is plugged in.
    pub number: u32,
    /// Vendor and product id.
    pub id: PciId,
    /// The maker's name in the device's descriptor.
    pub manufacturer: Option<String>,
    /// The device's name in its descriptor.
    pub product: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// Mbit/s, rounded down: 1 for low speed.
    pub speed: Option<u32>,
    /// Class code; 0 where each interface has its own.
    pub class: u32,
    /// Drivers of its interfaces, each once.
    pub drivers: Vec<String>,
    /// The PCI function that it hangs below.
    pub controller: Option<HostBdf>,
}

impl UsbDevice {
    /// A hub, which stays the host's and is never in a group.
    pub fn is_hub(&self) -> bool {
        self.class == HUB
    }

    /// The names of maker and device, as far as the device has them.
    pub fn name(&self) -> Option<String> {
        let names = [&self.manufacturer, &self.product];
        let names: Vec<&str> = names.into_iter().flatten().map(String::as_str).collect();
        (!names.is_empty()).then(|| names.join(" "))
    }
}

/// Every USB device of the host, by bus and port. A host without USB has none.
///
/// A device that is pulled out during the scan is left out.
pub fn scan_usb(paths: &HostPaths) -> Result<Vec<UsbDevice>, InventoryError> {
    let dir = paths.sysfs.join("bus/usb/devices");
    let names = sysfs::entries(&dir).map_err(|source| InventoryError::Sysfs {
        path: dir.clone(),
        source,
    })?;
    // Those with a colon are interfaces.
    let devices = names.iter().filter(|name| !name.contains(':'));
    let mut devices: Vec<UsbDevice> = devices
        .filter_map(|name| read(paths, &dir.join(name), name))
        .collect();
    devices.sort_by_cached_key(|device| (device.bus, ports(&device.port)));
    Ok(devices)
}

/// The numbers of the ports on the way; none for a root hub, which so comes first.
fn ports(port: &str) -> Vec<u32> {
    let way = port.split_once('-').map_or("", |(_, way)| way);
    way.split('.')
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// Reads a device; none if it does not exist.
fn read(paths: &HostPaths, dir: &Path, port: &str) -> Option<UsbDevice> {
    let text = |name: &str| {
        let text = sysfs::text(&dir.join(name)).ok().flatten();
        text.filter(|text| !text.is_empty())
    };
    let number = |name: &str| text(name)?.parse::<u32>().ok();
    let speed = text("speed")?;
    let vendor = hex(&text("idVendor")?, 4..=4)? as u16;
    Some(UsbDevice {
        port: port.to_owned(),
        bus: number("busnum")?,
        number: number("devnum")?,
        id: PciId {
            vendor,
            device: hex(&text("idProduct")?, 4..=4)? as u16,
        },
        manufacturer: text("manufacturer"),
        product: text("product"),
        serial: text("serial"),
        speed: speed.split('.').next().and_then(|whole| whole.parse().ok()),
        class: hex(&text("bDeviceClass")?, 2..=2)?,
        drivers: drivers(dir, port),
        controller: controller(paths, dir),
    })
}

/// The drivers of the interfaces, which are directories such as `1-4.2:1.0`.
fn drivers(dir: &Path, port: &str) -> Vec<String> {
    let prefix = format!("{port}:");
    let entries = sysfs::entries(dir).unwrap_or_default();
    let interfaces = entries.iter().filter(|name| name.starts_with(&prefix));
    let mut drivers: Vec<String> = interfaces
        .filter_map(|name| sysfs::link_name(&dir.join(name).join("driver")).ok()?)
        .collect();
    drivers.sort();
    drivers.dedup();
    drivers
}

/// The last PCI function above the device.
fn controller(paths: &HostPaths, dir: &Path) -> Option<HostBdf> {
    let place = fs::canonicalize(dir).ok()?;
    let root = fs::canonicalize(&paths.sysfs).ok()?;
    let above = place.ancestors().take_while(|path| **path != root);
    above
        .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
        .next()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use crate::pools::group::Groups;

    /// Plugs a device in, below a controller.
    pub(crate) fn plug(host: &FakeHost, port: &str, attributes: &[(&str, &str)]) {
        let path = format!("usb1/{port}");
        let dir = host.child(bdf("00:14.0"), &path, &format!("bus/usb/devices/{port}"));
        for (name, text) in attributes {
            fs::write(dir.join(name), format!("{text}\n")).unwrap();
        }
    }

    pub(crate) fn host() -> FakeHost {
        let host = FakeHost::new(&[Fake::nvme("00:14.0", 1)
            .class(0x0c_03_30)
            .driver("xhci_hcd")]);
        fs::create_dir_all(host.paths.sysfs.join("bus/usb/devices")).unwrap();
        let common = |class, speed, number| {
            vec![
                ("busnum", "1"),
                ("devnum", number),
                ("bDeviceClass", class),
                ("speed", speed),
            ]
        };
        let ids = [("idVendor", "1d6b"), ("idProduct", "0002")];
        plug(
            &host,
            "usb1",
            &[common("09", "480", "1"), ids.to_vec()].concat(),
        );
        let stick = [
            ("idVendor", "0951"),
            ("idProduct", "1666"),
            ("manufacturer", "Kingston"),
            ("product", "DataTraveler 3.0"),
            ("serial", "60A44C42"),
        ];
        plug(
            &host,
            "1-10",
            &[common("00", "5000", "4"), stick.to_vec()].concat(),
        );
        let keyboard = [("idVendor", "046d"), ("idProduct", "c31c"), ("serial", "")];
        plug(
            &host,
            "1-4.2",
            &[common("00", "1.5", "7"), keyboard.to_vec()].concat(),
        );
        let interface = host.dir(bdf("00:14.0")).join("usb1/1-4.2/1-4.2:1.0");
        fs::create_dir_all(&interface).unwrap();
        let driver = host.paths.sysfs.join("bus/usb/drivers/usbhid");
        fs::create_dir_all(&driver).unwrap();
        std::os::unix::fs::symlink(&driver, interface.join("driver")).unwrap();
        host
    }

    #[test]
    fn devices_are_read_with_what_they_say_of_themselves() {
        let host = host();
        // An interface is no device, and one that is half gone is left out.
        fs::create_dir_all(host.paths.sysfs.join("bus/usb/devices/1-4.2:1.0")).unwrap();
        plug(&host, "1-5", &[("busnum", "1")]);
        let found = scan_usb(&host.paths).unwrap();
        let ports: Vec<&str> = found.iter().map(|device| device.port.as_str()).collect();
        assert_eq!(ports, ["usb1", "1-4.2", "1-10"]);
        let [hub, keyboard, stick] = &found[..] else {
            panic!()
        };
        assert!(hub.is_hub() && !stick.is_hub());
        assert_eq!(stick.id.to_string(), "0951:1666");
        assert_eq!(stick.name().unwrap(), "Kingston DataTraveler 3.0");
        assert_eq!(
            (stick.speed, stick.serial.as_deref()),
            (Some(5000), Some("60A44C42"))
        );
        assert_eq!(stick.controller, Some(bdf("00:14.0")));
        assert_eq!((keyboard.speed, keyboard.number), (Some(1), 7));
        assert_eq!((keyboard.name(), keyboard.serial.as_deref()), (None, None));
        assert_eq!(keyboard.drivers, ["usbhid"]);
    }

    #[test]
    fn a_host_without_usb_has_none() {
        assert_eq!(scan_usb(&FakeHost::new(&[]).paths).unwrap(), []);
    }

    #[test]
    fn groups_of_usb_devices_take_them_by_their_fields() {
        let host = host();
        for (rule, taken) in [
            (r#"{"port": "1-4.*"}"#, "1-4.2"),
            (r#"{"speed": {"more": 480}}"#, "1-10"),
            (r#"{"bus": 1, "speed": {"less": 100}}"#, "1-4.2"),
            (r#"{"vendor": "0951", "serial": "60A44C42"}"#, "1-10"),
            (r#"{"id": "046d:c31c"}"#, "1-4.2"),
            (r#"{"name": {"contains": "traveler"}}"#, "1-10"),
            (r#"{"driver": "usbhid"}"#, "1-4.2"),
            // Hubs are the host's, and what only PCI has is had by none.
            (r#"{"vendor": "1d6b"}"#, ""),
            (r#"{"slot": "00:14.0"}"#, ""),
            (r#"{"numa": 0}"#, ""),
        ] {
            let file =
                format!(r#"{{"groups": [{{"name": "g", "type": "usb", "rules": [{rule}]}}]}}"#);
            host.groups(&file);
            let groups = Groups::load(&host.paths).unwrap();
            let all = scan_usb(&host.paths).unwrap();
            let ports = all
                .iter()
                .filter(|device| groups.group_of_usb(device).is_some());
            let ports: Vec<&str> = ports.map(|device| device.port.as_str()).collect();
            assert_eq!(ports.join(" "), taken, "{rule}");
            assert!(
                host.scan()
                    .iter()
                    .all(|device| groups.group_of(device).is_none())
            );
        }
    }
}
