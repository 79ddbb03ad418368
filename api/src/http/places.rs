//! The places that connections take: bounded in number, and shared between the users that connect.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

/// All places. When every place is taken, a new connection takes that of one that has sent no whole
/// request. A user other than the owner and root has at most half of the places; the owner and root also
/// take places of other users' connections that are in use.
#[derive(Debug)]
pub struct Places {
    most: usize,
    owner: u32,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    seats: Vec<Seat>,
}

#[derive(Debug)]
struct Seat {
    id: u64,
    user: u32,
    /// Since when it has waited for a request; none while one is answered.
    idle: Option<Instant>,
    lost: Arc<Notify>,
}

impl Places {
    /// So many places of a server whose socket is `owner`'s.
    pub fn new(most: usize, owner: u32) -> Arc<Self> {
        Arc::new(Self {
            most,
            owner,
            taken: Mutex::default(),
        })
    }

    /// A place for a connection of `user`; none if it has to be turned away.
    pub fn take(self: &Arc<Self>, user: u32) -> Option<Place> {
        let mut taken = self.taken();
        let own = taken.of(user);
        let at_share = !self.is_owner(user) && own >= self.share();
        if at_share || taken.seats.len() >= self.most {
            let victim = self.victim(&taken, user, at_share)?;
            taken.seats.remove(victim).lost.notify_one();
        }
        let lost = Arc::new(Notify::new());
        let id = taken.next;
        taken.next += 1;
        taken.seats.push(Seat {
            id,
            user,
            idle: Some(Instant::now()),
            lost: Arc::clone(&lost),
        });
        Some(Place {
            places: Arc::clone(self),
            id,
            lost,
        })
    }

    /// Whether nobody is connected.
    pub fn are_empty(&self) -> bool {
        self.taken().seats.is_empty()
    }

    /// Index of the connection that has to go: of the user with the most, the one that idles longest.
    fn victim(&self, taken: &Taken, user: u32, own_only: bool) -> Option<usize> {
        let seats = || taken.seats.iter().enumerate();
        let idle = seats().filter(|(_, seat)| !own_only || seat.user == user);
        let idle = idle.filter_map(|(index, seat)| Some((index, seat, seat.idle?)));
        let longest = idle.max_by_key(|(_, seat, since)| (taken.of(seat.user), Reverse(*since)));
        if let Some((index, ..)) = longest {
            return Some(index);
        }
        let busy = seats().filter(|(_, seat)| self.is_owner(user) && !self.is_owner(seat.user));
        let (index, _) = busy.max_by_key(|(_, seat)| taken.of(seat.user))?;
        Some(index)
    }

    fn share(&self) -> usize {
        self.most.div_ceil(2)
    }

    fn is_owner(&self, user: u32) -> bool {
        user == 0 || user == self.owner
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_idle(&self, id: u64, idle: Option<Instant>) {
        let mut taken = self.taken();
        if let Some(seat) = taken.seats.iter_mut().find(|seat| seat.id == id) {
            seat.idle = idle;
        }
    }
}

impl Taken {
    fn of(&self, user: u32) -> usize {
        self.seats.iter().filter(|seat| seat.user == user).count()
    }
}

/// The place of one connection. Dropping it frees it.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    id: u64,
    lost: Arc<Notify>,
}

impl Place {
    /// Tells that a request has come in whole, for as long as its answer takes.
    pub fn busy(&self) -> Busy {
        self.places.set_idle(self.id, None);
        Busy {
            places: Arc::clone(&self.places),
            id: self.id,
        }
    }

    /// What tells that another connection has taken the place.
    pub fn lost(&self) -> Arc<Notify> {
        Arc::clone(&self.lost)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().seats.retain(|seat| seat.id != self.id);
    }
}

/// A connection is in use. Dropping it makes the connection idle.
#[derive(Debug)]
pub struct Busy {
    places: Arc<Places>,
    id: u64,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.places.set_idle(self.id, Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u32 = 1000;
    const ALICE: u32 = 1001;
    const BOB: u32 = 1002;

    fn is_lost(place: &Place) -> bool {
        !place.places.taken().seats.iter().any(|s| s.id == place.id)
    }

    #[test]
    fn the_connection_that_idles_longest_goes_first() {
        let places = Places::new(2, OWNER);
        let first = places.take(OWNER).unwrap();
        let second = places.take(OWNER).unwrap();
        let answering = first.busy();
        let third = places.take(0).unwrap();
        assert!(is_lost(&second) && !is_lost(&first));
        // Both that are left are in use.
        let _other = third.busy();
        assert!(places.take(OWNER).is_none());
        drop(answering);
        assert!(places.take(OWNER).is_some());
        assert!(is_lost(&first));
        drop((first, second, third));
        assert!(places.are_empty());
    }

    #[test]
    fn one_user_gets_half_and_harms_nobody_else() {
        let places = Places::new(4, OWNER);
        let alices: Vec<Place> = (0..2).map(|_| places.take(ALICE).unwrap()).collect();
        let busy: Vec<Busy> = alices.iter().map(Place::busy).collect();
        assert!(places.take(ALICE).is_none());
        let bobs: Vec<Place> = (0..2).map(|_| places.take(BOB).unwrap()).collect();
        // Her own idle connection makes place for her next.
        drop(busy);
        let next = places.take(ALICE).unwrap();
        assert!(is_lost(&alices[0]) && !is_lost(&bobs[0]));
        drop(next);
    }

    #[test]
    fn the_owner_and_root_always_get_in() {
        let places = Places::new(2, OWNER);
        let alice = places.take(ALICE).unwrap();
        let bob = places.take(BOB).unwrap();
        let _busy = (alice.busy(), bob.busy());
        assert!(places.take(1003).is_none());
        let owner = places.take(OWNER).unwrap();
        let _answering = owner.busy();
        let root = places.take(0).unwrap();
        assert!(is_lost(&alice) && is_lost(&bob));
        assert!(!is_lost(&owner) && !is_lost(&root));
    }
}
