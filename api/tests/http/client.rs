//! What `cloud-hypervisor-client`, made for another VMM, gets from this server.

use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{self, VmState};
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};

use crate::fake::Bed;

fn run(test: impl AsyncFnOnce(SocketBasedApiClient)) {
    let bed = Bed::new();
    run_in(&bed, test);
}

fn run_in(bed: &Bed, test: impl AsyncFnOnce(SocketBasedApiClient)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test(socket_based_api_client(bed.socket())));
}

/// Status of a refusal.
fn status<T: std::fmt::Debug>(outcome: Result<T, Error>) -> u16 {
    match outcome {
        Err(Error::Api(error)) => {
            let messages: Vec<String> = serde_json::from_str(&error.body).unwrap();
            assert!(!messages.is_empty() && !messages[0].is_empty());
            error.code.as_u16()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_takes_a_vm_through_its_life() {
    let bed = Bed::new();
    let config: models::VmConfig = serde_json::from_str(&bed.config()).unwrap();
    run_in(&bed, async |client| {
        let ping = client.vmm_ping_get().await.unwrap();
        assert_eq!(ping.version, env!("CARGO_PKG_VERSION"));
        assert_eq!(ping.pid, Some(std::process::id().into()));
        client.create_vm(config.clone()).await.unwrap();
        assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Created);
        client.boot_vm().await.unwrap();
        let info = client.vm_info_get().await.unwrap();
        assert_eq!(info.state, VmState::Running);
        assert_eq!(info.config.payload, config.payload);
        assert_eq!(info.config.cpus, config.cpus);
        assert_eq!(info.memory_actual_size, Some(128 << 20));
        client.pause_vm().await.unwrap();
        assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Paused);
        client.resume_vm().await.unwrap();
        client.reboot_vm().await.unwrap();
        client.power_button_vm().await.unwrap();
        client.vmm_nmi_put().await.unwrap();
        client.shutdown_vm().await.unwrap();
        assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Shutdown);
        client.delete_vm().await.unwrap();
        client.shutdown_vmm().await.unwrap();
    });
}

#[test]
fn it_names_devices_before_the_vm_is_booted() {
    let bed = Bed::new();
    let mut config: models::VmConfig = serde_json::from_str(&bed.config()).unwrap();
    let device = |address: &str, id: &str| models::DeviceConfig {
        id: Some(id.to_owned()),
        iommu: Some(false),
        ..models::DeviceConfig::new(format!("/sys/bus/pci/devices/0000:{address}"))
    };
    config.devices = Some(vec![device("01:00.0", "disk")]);
    run_in(&bed, async |client| {
        client.create_vm(config.clone()).await.unwrap();
        let info = client.vm_info_get().await.unwrap();
        assert_eq!(info.config.devices.unwrap()[0].id.as_deref(), Some("disk"));
        client.delete_vm().await.unwrap();
        config.devices = Some(vec![device("01:00.0", "disk"), device("02:00.0", "disk")]);
        assert_eq!(status(client.create_vm(config.clone()).await), 400);
    });
}

#[test]
fn it_attaches_and_detaches_devices() {
    let bed = Bed::new();
    bed.boot();
    run_in(&bed, async |client| {
        let path = "/sys/bus/pci/devices/0000:01:00.0".to_owned();
        let mut device = models::DeviceConfig::new(path.clone());
        device.id = Some("disk".to_owned());
        let added = client.vm_add_device_put(device.clone()).await.unwrap();
        assert_eq!((&*added.id, &*added.bdf), ("disk", "0000:01:00.0"));
        assert_eq!(status(client.vm_add_device_put(device).await), 409);
        let info = client.vm_info_get().await.unwrap();
        assert_eq!(info.config.devices.unwrap()[0].path, path);
        let tree = info.device_tree.unwrap();
        assert_eq!(tree["disk"].pci_bdf.as_deref(), Some("0000:01:00.0"));
        let counters = client.vm_counters_get().await.unwrap();
        assert_eq!(counters["disk"]["interrupts"], 43);
        assert_eq!(counters["disk"]["interrupts.2"], 40);
        let remove = |id: &str| models::VmRemoveDevice {
            id: Some(id.to_owned()),
        };
        client.vm_remove_device_put(remove("disk")).await.unwrap();
        assert_eq!(
            status(client.vm_remove_device_put(remove("disk")).await),
            404
        );
        let nothing = models::VmRemoveDevice { id: None };
        assert_eq!(status(client.vm_remove_device_put(nothing).await), 400);
        let odd = models::DeviceConfig::new("/dev/null".to_owned());
        assert_eq!(status(client.vm_add_device_put(odd).await), 400);
    });
}

#[test]
fn it_hears_why_something_is_refused() {
    run(async |client| {
        assert_eq!(status(client.vm_info_get().await), 404);
        assert_eq!(status(client.boot_vm().await), 404);
        assert_eq!(status(client.pause_vm().await), 404);
        let mut config = models::VmConfig::new(models::PayloadConfig::new());
        assert_eq!(status(client.create_vm(config.clone()).await), 400);
        config.payload.kernel = Some("/nowhere/vmlinux".to_owned());
        let refused = client.create_vm(config).await.unwrap_err();
        let text = format!("{refused:?}");
        assert!(
            text.contains("payload.kernel") && text.contains("/nowhere/vmlinux"),
            "{text}"
        );
    });
    let bed = Bed::new();
    bed.boot();
    run_in(&bed, async |client| {
        assert_eq!(status(client.boot_vm().await), 405);
        assert_eq!(status(client.resume_vm().await), 405);
        let again = serde_json::from_str(&bed.config()).unwrap();
        assert_eq!(status(client.create_vm(again).await), 409);
        client.shutdown_vm().await.unwrap();
        assert_eq!(status(client.pause_vm().await), 405);
    });
}

#[test]
fn it_hears_what_is_not_supported() {
    run(async |client| {
        let snapshot = client
            .vm_snapshot_put(models::VmSnapshotConfig::new())
            .await;
        assert!(
            format!("{snapshot:?}").contains("vm.snapshot"),
            "{snapshot:?}"
        );
        assert_eq!(status(snapshot), 501);
        assert_eq!(
            status(client.vm_resize_put(models::VmResize::new()).await),
            501
        );
        let pmem = client
            .vm_add_pmem_put(models::PmemConfig::new("/tmp/pmem".to_owned()))
            .await;
        assert_eq!(status(pmem), 501);
    });
}
