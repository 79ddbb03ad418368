//! The next boot: which boot loader this one came by, and what its configuration says in the end.

use super::*;

const GRUB: &str = "proc/self/root/etc/default/grub";
const CLOUD: &str = "proc/self/root/etc/default/grub.d/50-cloud.cfg";
const MENU: &str = "proc/self/root/boot/grub/grub.cfg";
const USUAL: &str = "GRUB_CMDLINE_LINUX_DEFAULT";

/// What is to be done, as text: the first line is the sentence.
fn how(host: &Host) -> String {
    let report = check(&host.paths(), &[]).unwrap();
    let how = report.command_line.expect("nothing is to be done").how;
    format!("{}\n{}", how.text, how.lines.join("\n"))
}

/// A file with this text and no other.
fn set(host: &Host, path: &str, text: &str) {
    fs::write(host.path(path), text).unwrap();
}

fn efi(host: &Host, name: &str, text: &str) {
    let wide = text.encode_utf16().flat_map(u16::to_le_bytes);
    let bytes: Vec<u8> = [7, 0, 0, 0].into_iter().chain(wide).collect();
    let file = format!("sys/firmware/efi/efivars/{name}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f");
    fs::write(host.path(&file), bytes).unwrap();
}

#[test]
fn the_boot_loader_is_the_one_that_started_this_kernel() {
    // GRUB by its command line, whatever else is installed.
    let host = Host::unpack("command-line-off");
    set(&host, "proc/self/root/etc/kernel/cmdline", "quiet");
    set(&host, "proc/self/root/usr/bin/kernel-install", "");
    assert!(
        how(&host).contains("/etc/default/grub this"),
        "{}",
        how(&host)
    );
    set(
        &host,
        "proc/self/root/etc/kernel/proxmox-boot-uuids",
        "1234\n",
    );
    let said = how(&host);
    assert!(said.contains("/etc/default/grub this"), "{said}");
    assert!(said.contains("\nproxmox-boot-tool refresh\n"), "{said}");
    // systemd-boot, though GRUB is installed and its old menu is there.
    set(
        &host,
        "proc/cmdline",
        "initrd=\\EFI\\proxmox\\6.8\\initrd.img root=ZFS=x quiet\n",
    );
    let said = how(&host);
    assert!(said.contains("/etc/kernel/cmdline this"), "{said}");
    assert!(said.contains("\nquiet intel_iommu=on"), "{said}");
    host.remove("proc/self/root/etc/kernel/proxmox-boot-uuids");
    set(&host, "proc/cmdline", "root=/dev/vda2 quiet\n");
    efi(&host, "LoaderInfo", "systemd-boot 257.7");
    let said = how(&host);
    assert!(said.contains("\nkernel-install add-all\n"), "{said}");
    efi(&host, "LoaderInfo", "GRUB 2.12");
    assert!(how(&host).contains("\nupdate-grub\n"), "{}", how(&host));
}

#[test]
fn an_entry_that_nothing_writes_is_changed_itself() {
    let host = Host::unpack("command-line-off");
    set(
        &host,
        "proc/cmdline",
        "initrd=\\initramfs-linux.img root=/dev/vda2 rw\n",
    );
    let entries = "proc/self/root/boot/loader/entries";
    set(
        &host,
        &format!("{entries}/arch.conf"),
        "title Arch\noptions root=/dev/vda2 rw\n",
    );
    set(
        &host,
        &format!("{entries}/old.conf"),
        "title Old\noptions root=/dev/vda9\n",
    );
    efi(&host, "LoaderInfo", "systemd-boot 257");
    efi(&host, "LoaderEntrySelected", "arch.conf");
    let said = how(&host);
    assert!(
        said.contains("options line of /boot/loader/entries/arch.conf this"),
        "{said}"
    );
    let line = "options root=/dev/vda2 rw intel_iommu=on vfio-pci.ids=10de:1c30,10de:10f1";
    assert!(said.contains(&format!("\n{line}\n")), "{said}");
    set(
        &host,
        &format!("{entries}/arch.conf"),
        &format!("title Arch\n{line}\n"),
    );
    assert!(
        how(&host).contains("has it already; restart"),
        "{}",
        how(&host)
    );
    // One of kernel-install's would be written anew for the next kernel.
    set(&host, "proc/self/root/etc/machine-id", "52dc\n");
    set(&host, "proc/self/root/usr/bin/kernel-install", "");
    set(
        &host,
        &format!("{entries}/52dc-6.8.conf"),
        "options root=/dev/vda2 rw\n",
    );
    efi(&host, "LoaderEntrySelected", "52dc-6.8.conf");
    let said = how(&host);
    assert!(said.contains("/etc/kernel/cmdline this"), "{said}");
    assert!(
        said.contains("\nroot=/dev/vda2 rw intel_iommu=on"),
        "{said}"
    );
}

#[test]
fn a_system_that_comes_as_a_whole_is_told_by_its_own_tool() {
    let host = Host::unpack("command-line-off");
    set(&host, "proc/self/root/usr/bin/rpm-ostree", "");
    set(
        &host,
        "proc/cmdline",
        "BOOT_IMAGE=(hd0,gpt3)/x ostree=/ostree/boot.1/y quiet\n",
    );
    let said = how(&host);
    assert!(
        said.contains("rpm-ostree kargs --append-if-missing=intel_iommu=on"),
        "{said}"
    );
}

#[test]
fn advice_that_was_followed_is_not_given_again() {
    let host = Host::unpack("command-line-off");
    let words = "intel_iommu=on vfio-pci.ids=10de:1c30,10de:10f1";
    let cloud = "console=tty1 console=ttyS0";
    set(&host, CLOUD, &format!("{USUAL}=\"{cloud}\"\n"));
    let overridden = how(&host);
    assert!(
        overridden.contains(
            "line of /etc/default/grub.d/50-cloud.cfg, which is read after /etc/default/grub,"
        ),
        "{overridden}"
    );
    let line = format!("{USUAL}=\"{cloud} {words}\"\n");
    assert!(overridden.contains(&line), "{overridden}");
    // Where it does not count.
    set(&host, GRUB, &format!("{USUAL}=\"quiet {words}\"\n"));
    assert_eq!(how(&host), overridden);
    set(&host, CLOUD, &line);
    let configured = how(&host);
    assert!(
        configured.contains("50-cloud.cfg has it already; write"),
        "{configured}"
    );
    set(&host, MENU, &format!("linux /vmlinuz ro {words}\n"));
    let installed = how(&host);
    assert!(
        installed.contains("/boot/grub/grub.cfg has it already; restart"),
        "{installed}"
    );
    // The next boot did not come by this menu.
    host.line("proc/stat", "btime 1");
    assert_eq!(how(&host), installed);
    set(&host, "proc/stat", "btime 32503680000\n");
    let restarted = how(&host);
    assert!(
        restarted.contains("this boot did not come from there"),
        "{restarted}"
    );
    let (level, text) = answer(&check(&host.paths(), &[]).unwrap(), "reboot");
    assert_eq!(level, Level::Warn);
    assert!(text.contains("another boot loader"), "{text}");
}

#[test]
fn words_are_removed_where_they_are() {
    let host = Host::unpack("command-line-forbids");
    set(&host, "proc/self/root/usr/sbin/update-grub", "");
    set(
        &host,
        GRUB,
        &format!("{USUAL}=\"quiet\"\nGRUB_CMDLINE_LINUX=\"iommu=off x\"\n"),
    );
    set(
        &host,
        CLOUD,
        &format!("{USUAL}=\"${USUAL} amd_iommu=off\"\n"),
    );
    let said = how(&host);
    for line in [
        "# /etc/default/grub\n",
        "\nGRUB_CMDLINE_LINUX=\"x\"\n# /etc/default/grub.d/50-cloud.cfg\n",
        &format!("\n{USUAL}=\"${USUAL}\"\nupdate-grub\nreboot"),
    ] {
        assert!(said.contains(line), "{said}");
    }
}
