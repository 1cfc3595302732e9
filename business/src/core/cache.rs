//! What an owner has read of the store: each thing when it is first needed, once for all requests that wait for it.

use std::sync::Arc;
use std::time::Duration;

use super::Map;
use super::ownership::RETRY_PAUSE;

/// Idle time after which a thing may leave memory.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// The things of one kind by their names.
pub(super) struct Cache<T> {
    slots: Map<Arc<str>, Slot<T>>,
    /// What could not be read and is waited for nevertheless, and when it is asked for again.
    again: Vec<(Duration, Arc<str>)>,
}

enum Slot<T> {
    /// Being read; these requests wait.
    Loading(Vec<u64>),
    Ready {
        value: T,
        used_at: Duration,
    },
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self { slots: Map::default(), again: Vec::new() }
    }
}

impl<T> Cache<T> {
    /// How many there are, those being read among them.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it is there or being read.
    pub(super) fn is_known(&self, name: &str) -> bool {
        self.slots.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&T> {
        self.get_named(name).map(|(_, value)| value)
    }

    /// The value, and the name as it is shared.
    pub(super) fn get_named(&self, name: &str) -> Option<(&Arc<str>, &T)> {
        match self.slots.get_key_value(name) {
            Some((name, Slot::Ready { value, .. })) => Some((name, value)),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut T> {
        match self.slots.get_mut(name) {
            Some(Slot::Ready { value, .. }) => Some(value),
            _ => None,
        }
    }

    /// All that is there.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&Arc<str>, &mut T)> {
        self.slots.iter_mut().filter_map(|(name, slot)| match slot {
            Slot::Ready { value, .. } => Some((name, value)),
            Slot::Loading(_) => None,
        })
    }

    /// Notes that it is used. False: it is not there.
    pub(super) fn touch(&mut self, now: Duration, name: &str) -> bool {
        match self.slots.get_mut(name) {
            Some(Slot::Ready { used_at, .. }) => {
                *used_at = now;
                true
            }
            _ => false,
        }
    }

    /// Notes that a request needs it. What nobody has asked for yet is to be asked for by `load`. True: the request waits.
    pub(super) fn need(&mut self, now: Duration, name: &str, waiter: Option<u64>, load: impl FnOnce(Arc<str>)) -> bool {
        match self.slots.get_mut(name) {
            Some(Slot::Ready { used_at, .. }) => {
                *used_at = now;
                return false;
            }
            Some(Slot::Loading(waiters)) => waiters.extend(waiter),
            None => {
                let name: Arc<str> = name.into();
                self.slots.insert(name.clone(), Slot::Loading(waiter.into_iter().collect()));
                load(name);
            }
        }
        true
    }

    /// Has a request wait for everything that is being read; gives how many that are.
    pub(super) fn need_all_loads(&mut self, waiter: u64) -> usize {
        let loading = self.slots.values_mut().filter_map(|slot| match slot {
            Slot::Loading(waiters) => Some(waiters),
            Slot::Ready { .. } => None,
        });
        loading.map(|waiters| waiters.push(waiter)).count()
    }

    /// A request does not wait any more.
    pub(super) fn forget_waiter(&mut self, waiter: u64) {
        for slot in self.slots.values_mut() {
            if let Slot::Loading(waiters) = slot {
                waiters.retain(|id| *id != waiter);
            }
        }
    }

    /// It was read. Gives who waited for it.
    pub(super) fn loaded(&mut self, now: Duration, name: Arc<str>, value: T) -> Vec<u64> {
        match self.slots.insert(name, Slot::Ready { value, used_at: now }) {
            Some(Slot::Loading(waiters)) => waiters,
            Some(Slot::Ready { .. }) | None => Vec::new(),
        }
    }

    /// It could not be read. Gives who waited for it.
    pub(super) fn failed(&mut self, name: &str) -> Vec<u64> {
        match self.slots.remove(name) {
            Some(Slot::Loading(waiters)) => waiters,
            Some(Slot::Ready { .. }) | None => Vec::new(),
        }
    }

    /// It could not be read, and these wait for it nevertheless.
    pub(super) fn try_again(&mut self, now: Duration, name: Arc<str>, waiters: Vec<u64>) {
        if !waiters.is_empty() {
            self.slots.insert(name.clone(), Slot::Loading(waiters));
            self.again.push((now + RETRY_PAUSE, name));
        }
    }

    /// What is to be asked for again now.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Arc<str>> {
        self.again.extract_if(.., |(at, _)| *at <= now).map(|(_, name)| name).collect()
    }

    /// Forgets what `stays` does not want to keep, which also hears whether it was idle for long. What is being read stays.
    pub(super) fn retain(&mut self, now: Duration, mut stays: impl FnMut(&Arc<str>, &mut T, bool) -> bool) {
        self.slots.retain(|name, slot| match slot {
            Slot::Loading(_) => true,
            Slot::Ready { value, used_at } => stays(name, value, *used_at + IDLE_MAX < now),
        });
    }
}
