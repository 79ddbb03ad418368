//! Power: the ACPI sleep and reset registers of hardware-reduced ACPI.
