//! The table of open connections: bounded in number, and shared between the users that connect.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

/// All connections. When every slot is taken, a new connection evicts one that has sent no whole request. A user
/// other than the owner and root has at most half of the slots; the owner and root also evict connections of other
/// users that are in use.
#[derive(Debug)]
pub struct ConnectionTable {
    most: usize,
    owner: u32,
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    entries: Vec<ConnectionEntry>,
}

#[derive(Debug)]
struct ConnectionEntry {
    id: u64,
    user: u32,
    /// Since when it has waited for a request; none while a request is answered.
    idle: Option<Instant>,
    evicted: Arc<Notify>,
}

impl ConnectionTable {
    /// A table of `most` slots, for a server whose socket belongs to `owner`.
    pub fn new(most: usize, owner: u32) -> Arc<Self> {
        Arc::new(Self {
            most,
            owner,
            connections: Mutex::default(),
        })
    }

    /// A slot for a connection of `user`; none if the connection is refused.
    pub fn take(self: &Arc<Self>, user: u32) -> Option<ConnectionSlot> {
        let mut locked = self.locked();
        let own = locked.count(user);
        let at_share = !self.is_owner(user) && own >= self.share();
        if at_share || locked.entries.len() >= self.most {
            let victim = self.victim(&locked, user, at_share)?;
            locked.entries.remove(victim).evicted.notify_one();
        }
        let evicted = Arc::new(Notify::new());
        let id = locked.next;
        locked.next += 1;
        locked.entries.push(ConnectionEntry {
            id,
            user,
            idle: Some(Instant::now()),
            evicted: Arc::clone(&evicted),
        });
        Some(ConnectionSlot {
            table: Arc::clone(self),
            id,
            evicted,
        })
    }

    /// Whether no connection is open.
    pub fn is_empty(&self) -> bool {
        self.locked().entries.is_empty()
    }

    /// Index of the connection to evict: of the user with the most connections, the one that has been idle longest.
    fn victim(&self, locked: &Connections, user: u32, own_only: bool) -> Option<usize> {
        let entries = || locked.entries.iter().enumerate();
        let idle = entries().filter(|(_, entry)| !own_only || entry.user == user);
        let idle = idle.filter_map(|(index, entry)| Some((index, entry, entry.idle?)));
        let longest =
            idle.max_by_key(|(_, entry, since)| (locked.count(entry.user), Reverse(*since)));
        if let Some((index, ..)) = longest {
            return Some(index);
        }
        let in_use =
            entries().filter(|(_, entry)| self.is_owner(user) && !self.is_owner(entry.user));
        let (index, _) = in_use.max_by_key(|(_, entry)| locked.count(entry.user))?;
        Some(index)
    }

    fn share(&self) -> usize {
        self.most.div_ceil(2)
    }

    fn is_owner(&self, user: u32) -> bool {
        user == 0 || user == self.owner
    }

    fn locked(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn set_idle(&self, id: u64, idle: Option<Instant>) {
        let mut locked = self.locked();
        if let Some(entry) = locked.entries.iter_mut().find(|entry| entry.id == id) {
            entry.idle = idle;
        }
    }
}

impl Connections {
    fn count(&self, user: u32) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.user == user)
            .count()
    }
}

/// The slot of one connection. Dropping it frees it.
#[derive(Debug)]
pub struct ConnectionSlot {
    table: Arc<ConnectionTable>,
    id: u64,
    evicted: Arc<Notify>,
}

impl ConnectionSlot {
    /// Marks the connection as in use, from the end of a request to the end of its answer.
    pub fn in_use(&self) -> InUse {
        self.table.set_idle(self.id, None);
        InUse {
            table: Arc::clone(&self.table),
            id: self.id,
        }
    }

    /// Notified when another connection evicts this one.
    pub fn evicted(&self) -> Arc<Notify> {
        Arc::clone(&self.evicted)
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.table
            .locked()
            .entries
            .retain(|entry| entry.id != self.id);
    }
}

/// Marks a connection as in use. Dropping it makes the connection idle.
#[derive(Debug)]
pub struct InUse {
    table: Arc<ConnectionTable>,
    id: u64,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.table.set_idle(self.id, Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u32 = 1000;
    const ALICE: u32 = 1001;
    const BOB: u32 = 1002;

    fn is_lost(slot: &ConnectionSlot) -> bool {
        !slot.table.locked().entries.iter().any(|s| s.id == slot.id)
    }

    #[test]
    fn the_connection_that_idles_longest_goes_first() {
        let connections = ConnectionTable::new(2, OWNER);
        let first = connections.take(OWNER).unwrap();
        let second = connections.take(OWNER).unwrap();
        let answering = first.in_use();
        let third = connections.take(0).unwrap();
        assert!(is_lost(&second) && !is_lost(&first));
        // The two remaining connections are in use.
        let _other = third.in_use();
        assert!(connections.take(OWNER).is_none());
        drop(answering);
        assert!(connections.take(OWNER).is_some());
        assert!(is_lost(&first));
        drop((first, second, third));
        assert!(connections.is_empty());
    }

    #[test]
    fn one_user_gets_half_and_harms_nobody_else() {
        let connections = ConnectionTable::new(4, OWNER);
        let alices: Vec<ConnectionSlot> =
            (0..2).map(|_| connections.take(ALICE).unwrap()).collect();
        let in_use: Vec<InUse> = alices.iter().map(ConnectionSlot::in_use).collect();
        assert!(connections.take(ALICE).is_none());
        let bobs: Vec<ConnectionSlot> = (0..2).map(|_| connections.take(BOB).unwrap()).collect();
        // Her own idle connection is evicted for her next one.
        drop(in_use);
        let next = connections.take(ALICE).unwrap();
        assert!(is_lost(&alices[0]) && !is_lost(&bobs[0]));
        drop(next);
    }

    #[test]
    fn the_owner_and_root_always_get_in() {
        let connections = ConnectionTable::new(2, OWNER);
        let alice = connections.take(ALICE).unwrap();
        let bob = connections.take(BOB).unwrap();
        let _busy = (alice.in_use(), bob.in_use());
        assert!(connections.take(1003).is_none());
        let owner = connections.take(OWNER).unwrap();
        let _answering = owner.in_use();
        let root = connections.take(0).unwrap();
        assert!(is_lost(&alice) && is_lost(&bob));
        assert!(!is_lost(&owner) && !is_lost(&root));
    }
}
