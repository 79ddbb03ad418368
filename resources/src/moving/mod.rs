//! How devices change drivers, and come back: writes with deadlines, binding, restore records.

pub(crate) mod bind;
pub(crate) mod moves;
pub(crate) mod persist;
pub(crate) mod writer;
