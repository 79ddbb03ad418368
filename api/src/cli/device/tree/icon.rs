//! Icons of devices in a picture, by what they are.

use gantry_resources::facts::PciClass;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Icon {
    Storage,
    Network,
    Display,
    Sound,
    Usb,
    Accelerator,
    Bridge,
    Other,
}

impl Icon {
    /// Those that a picture can have.
    pub const ALL: [Self; 8] = [
        Self::Storage,
        Self::Network,
        Self::Display,
        Self::Sound,
        Self::Usb,
        Self::Accelerator,
        Self::Bridge,
        Self::Other,
    ];

    /// What a device is by the word that its group has for it, or else by its PCI class.
    pub fn of(class: PciClass, word: Option<&str>) -> Self {
        let by_word = word.and_then(|word| match word.to_lowercase().as_str() {
            "storage" | "disk" | "disks" | "nvme" | "ssd" => Some(Self::Storage),
            "network" | "net" | "nic" => Some(Self::Network),
            "gpu" | "vgpu" | "display" | "graphics" => Some(Self::Display),
            "sound" | "audio" => Some(Self::Sound),
            "usb" => Some(Self::Usb),
            "accelerator" | "crypto" | "fpga" | "qat" => Some(Self::Accelerator),
            _ => None,
        });
        by_word.unwrap_or(match (class.base(), class.sub()) {
            (0x01, _) => Self::Storage,
            (0x02 | 0x0d, _) => Self::Network,
            (0x03, _) => Self::Display,
            (0x04, _) => Self::Sound,
            (0x0c, 0x03) => Self::Usb,
            (0x0b | 0x10 | 0x12, _) => Self::Accelerator,
            (0x06, _) => Self::Bridge,
            _ => Self::Other,
        })
    }

    /// The word in the legend.
    pub fn word(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::Network => "network",
            Self::Display => "display",
            Self::Sound => "sound",
            Self::Usb => "USB",
            Self::Accelerator => "accelerator",
            Self::Bridge => "bridge",
            Self::Other => "other",
        }
    }

    /// Its lines, around the middle of a circle of radius 8.
    pub fn path(self) -> &'static str {
        match self {
            Self::Storage => "M-4 -3a4 1.5 0 0 1 8 0a4 1.5 0 0 1 -8 0V3a4 1.5 0 0 0 8 0V-3",
            Self::Network => "M-4 4V1H4V4M0 1V-2M-2 -5H2V-2H-2Z",
            Self::Display => "M-4 -4H4V2H-4ZM-2 4.5H2M0 2V4.5",
            Self::Sound => "M-4 -1.5H-2L0 -4V4L-2 1.5H-4ZM2 -2a3 3 0 0 1 0 4",
            Self::Usb => "M0 5V-5M-1.5 -3L0 -5L1.5 -3M0 3L-3 1V-1M0 1L3 -1V-3",
            Self::Accelerator => "M-3 -3H3V3H-3ZM-1 -5V-3M1 -5V-3M-1 3V5M1 3V5M-5 0H-3M3 0H5",
            Self::Bridge => "M-4 0H0M0 -3V3M0 -3H4M0 3H4",
            Self::Other => "M-1 0H1M0 -1V1",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_or_the_groups_word_gives_an_icon_of_its_own() {
        for (code, icon) in [
            (0x01_08_02, Icon::Storage),
            (0x02_00_00, Icon::Network),
            (0x03_02_00, Icon::Display),
            (0x04_03_00, Icon::Sound),
            (0x0c_03_30, Icon::Usb),
            (0x12_00_00, Icon::Accelerator),
            (0x06_04_00, Icon::Bridge),
            (0xff_00_00, Icon::Other),
        ] {
            assert_eq!(Icon::of(PciClass::new(code), None), icon);
            assert_eq!(Icon::of(PciClass::new(code), Some("of the lab")), icon);
            assert_eq!(Icon::of(PciClass::new(code), Some("GPU")), Icon::Display);
        }
        let paths: std::collections::BTreeSet<_> = Icon::ALL.iter().map(|one| one.path()).collect();
        assert_eq!(paths.len(), Icon::ALL.len());
    }
}
