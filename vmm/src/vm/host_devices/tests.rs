//! Which devices share a port, and what they reserve.

use super::*;

fn arranged(devices: &[&str]) -> Vec<Vec<(usize, u8)>> {
    arrange(&parts(devices, false))
}

fn parts(devices: &[&str], virtual_function: bool) -> Vec<Part> {
    let part = |text: &&str| Part {
        name: text.parse().unwrap(),
        virtual_function,
    };
    devices.iter().map(part).collect()
}

struct Closed(Arc<std::sync::Mutex<Option<std::thread::ThreadId>>>);

impl Drop for Closed {
    fn drop(&mut self) {
        *self.0.lock().unwrap() = Some(std::thread::current().id());
    }
}

#[test]
fn who_drops_a_device_is_the_one_that_closes_it() {
    let by = Arc::default();
    let device = Arc::new(Closed(Arc::clone(&by)));
    let vcpu = Arc::clone(&device);
    let slow = LEAVE_PATIENCE + Duration::from_millis(100);
    let vcpu = std::thread::spawn(move || {
        sleep(slow);
        drop(vcpu);
    });
    drop(Last(device));
    let closed = *by.lock().unwrap();
    assert_eq!(closed, Some(std::thread::current().id()));
    vcpu.join().unwrap();
}

#[test]
fn functions_of_a_device_stay_together_if_it_is_whole() {
    assert_eq!(arranged(&[]), Vec::<Vec<_>>::new());
    assert_eq!(
        arranged(&["01:00.0", "02:00.0", "01:00.1"]),
        [vec![(2, 1), (0, 0)], vec![(1, 0)]]
    );
    // Without function 0 a guest would find none of them.
    assert_eq!(
        arranged(&["01:00.1", "01:00.2"]),
        [vec![(0, 0)], vec![(1, 0)]]
    );
    assert_eq!(
        arranged(&["01:00.3", "0001:01:00.0", "01:00.0"]),
        [vec![(0, 3), (2, 0)], vec![(1, 0)]]
    );
}

#[test]
fn virtual_functions_have_slots_of_their_own() {
    let mut devices = parts(&["03:10.0", "03:10.2", "03:10.1"], true);
    devices.extend(parts(&["01:00.1", "01:00.0"], false));
    assert_eq!(
        arrange(&devices),
        [
            vec![(0, 0)],
            vec![(1, 0)],
            vec![(2, 0)],
            vec![(3, 1), (4, 0)]
        ]
    );
    // With ARI they may have the address of a function of the card itself.
    let mut devices = parts(&["01:00.0"], false);
    devices.extend(parts(&["01:00.1"], true));
    assert_eq!(arrange(&devices), [vec![(0, 0)], vec![(1, 0)]]);
}
