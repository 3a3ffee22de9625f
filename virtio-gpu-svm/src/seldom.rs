//! What most contexts never have, and those that do keep: a pointer until then.

/// A part that is made when it is first needed.
#[derive(Debug)]
pub(crate) struct Seldom<T>(Option<Box<T>>);

impl<T> Default for Seldom<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Seldom<T> {
    /// It, if it was ever needed.
    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_deref()
    }
    /// The same, to be changed.
    #[inline]
    pub(crate) fn get_mut(&mut self) -> Option<&mut T> {
        self.0.as_deref_mut()
    }
    /// It; made by `make` if it was not needed before.
    #[inline]
    pub(crate) fn obtain_with(&mut self, make: impl FnOnce() -> T) -> &mut T {
        self.0.get_or_insert_with(|| Box::new(make()))
    }
}

impl<T: Default> Seldom<T> {
    /// It.
    #[inline]
    pub(crate) fn obtain(&mut self) -> &mut T {
        self.obtain_with(T::default)
    }
}
