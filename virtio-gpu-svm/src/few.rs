//! A list that has one element nearly always, and then allocates nothing: whom a change lets go on.

/// Elements in the order in which they came.
#[derive(Debug)]
pub struct Few<T> {
    first: Option<T>,
    others: Vec<T>,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self { first: None, others: Vec::new() }
    }
}

impl<T> Few<T> {
    /// One.
    pub fn one(first: T) -> Self {
        Self { first: Some(first), others: Vec::new() }
    }
    /// How many.
    pub fn len(&self) -> usize {
        self.others.len().saturating_add(self.first.is_some().into())
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }
    /// Adds one at the end.
    pub fn push(&mut self, element: T) {
        match self.first {
            None => self.first = Some(element),
            Some(_) => self.others.push(element),
        }
    }
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.first.iter().chain(&self.others)
    }
}

impl<T> IntoIterator for Few<T> {
    type Item = T;
    type IntoIter = std::iter::Chain<std::option::IntoIter<T>, std::vec::IntoIter<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_stay_in_order_and_one_needs_no_room() {
        let mut few = Few::default();
        assert!(few.is_empty());
        few.push(1);
        assert_eq!((few.len(), few.others.capacity()), (1, 0));
        few.push(2);
        few.push(3);
        assert_eq!((few.len(), few.iter().copied().collect::<Vec<_>>()), (3, vec![1, 2, 3]));
        assert_eq!(few.into_iter().collect::<Vec<_>>(), [1, 2, 3]);
    }
}
