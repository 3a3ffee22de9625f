//! What a method takes: declared once as data, from which both the check and the schema of `rpc.discover` are made.

use super::rpc::{Error, Kind, quote};
use crate::limits::{Limits, Overrides};
use serde_json::{Map, Value, json};

/// Bytes of a text parameter at most.
const MAX_TEXT: usize = 4096;
/// Items of a list parameter at most.
const MAX_ITEMS: usize = 64;

/// Which values a parameter may have.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Text of 1 to 4096 bytes, without control characters.
    Text,
    /// Up to 64 of such texts.
    TextList,
    /// An integer in this range.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A host device: its index or its name.
    Device,
    /// One or more of these words.
    Words(&'static [&'static str]),
    /// Limits of a guest by name, each within its bounds.
    Limits,
}

/// One parameter.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// Which values it may have.
    pub shape: Shape,
    /// Whether it must be given.
    pub required: bool,
    /// What it means, and what its absence means.
    pub doc: &'static str,
}

impl Param {
    /// A parameter that must be given.
    pub const fn required(name: &'static str, shape: Shape, doc: &'static str) -> Self {
        Self { name, shape, required: true, doc }
    }
    /// A parameter that may be absent.
    pub const fn optional(name: &'static str, shape: Shape, doc: &'static str) -> Self {
        Self { name, shape, required: false, doc }
    }
}

impl Shape {
    /// What a value must be, for an error message.
    fn wanted(self) -> String {
        match self {
            Self::Text => format!("text of 1 to {MAX_TEXT} bytes without control characters"),
            Self::TextList => format!("a list of at most {MAX_ITEMS} texts"),
            Self::Integer { min, max } => format!("an integer from {min} to {max}"),
            Self::Device => "the index or the name of a host device".to_owned(),
            Self::Words(words) => format!("a list of one or more of {}", words.join(", ")),
            Self::Limits => {
                let bounds = Limits::BOUNDS.map(|(name, least, most)| format!("{name} ({least} to {most})"));
                format!("an object with integers for some of {}", bounds.join(", "))
            }
        }
    }

    /// What is wrong with a value, for people.
    fn problem(self, value: &Value) -> Option<String> {
        // Whoever misspells one of many names is told which.
        if let (Self::Limits, Some(Err((name, problem)))) = (self, limits(value)) {
            return Some(format!(": {}: {problem}", quote(&name)));
        }
        (!self.accepts(value)).then(|| format!(" is not {}", self.wanted()))
    }

    fn accepts(self, value: &Value) -> bool {
        match self {
            Self::Text => value.as_str().is_some_and(is_text),
            Self::TextList => value.as_array().is_some_and(|items| {
                items.len() <= MAX_ITEMS && items.iter().all(|item| item.as_str().is_some_and(is_text))
            }),
            Self::Integer { min, max } => value.as_u64().is_some_and(|n| (min..=max).contains(&n)),
            Self::Device => value.is_u64() || value.as_str().is_some_and(is_text),
            Self::Words(words) => value.as_array().is_some_and(|items| {
                (1..=MAX_ITEMS).contains(&items.len())
                    && items.iter().all(|item| item.as_str().is_some_and(|word| words.contains(&word)))
            }),
            Self::Limits => matches!(limits(value), Some(Ok(_))),
        }
    }

    /// Its JSON schema.
    pub fn schema(self) -> Value {
        let text = json!({ "type": "string", "minLength": 1, "maxLength": MAX_TEXT });
        match self {
            Self::Text => text,
            Self::TextList => json!({ "type": "array", "items": text, "maxItems": MAX_ITEMS }),
            Self::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
            Self::Device => json!({ "oneOf": [{ "type": "integer", "minimum": 0 }, text] }),
            Self::Words(words) => json!({
                "type": "array", "items": { "enum": words }, "minItems": 1, "maxItems": MAX_ITEMS,
            }),
            Self::Limits => {
                let number = |least, most| json!({ "type": "integer", "minimum": least, "maximum": most });
                let limits = Limits::BOUNDS.map(|(name, least, most)| (name.to_owned(), number(least, most)));
                let limits: Map<String, Value> = limits.into_iter().collect();
                json!({ "type": "object", "properties": limits, "additionalProperties": false })
            }
        }
    }
}

/// Limits of a guest; none if these are no names and numbers, else what is wrong with the first wrong one.
fn limits(value: &Value) -> Option<Result<Overrides, (String, String)>> {
    let numbers = value.as_object()?.iter().map(|(name, value)| Some((name.clone(), value.as_u64()?)));
    Some(Overrides::new(numbers.collect::<Option<Vec<_>>>()?))
}

fn is_text(text: &str) -> bool {
    (1..=MAX_TEXT).contains(&text.len()) && !text.contains(char::is_control)
}

/// Parameters that were checked against their declaration.
pub struct Args<'a>(&'a Map<String, Value>);

impl<'a> Args<'a> {
    /// Checks parameters: all that are given are declared and right, and all that are required are given.
    ///
    /// # Errors
    /// [`Kind::InvalidParams`], naming the first that is wrong.
    pub fn check(declared: &[Param], given: &'a Map<String, Value>) -> Result<Self, Error> {
        let invalid = |message: String| Err(Error::new(Kind::InvalidParams, message));
        for name in given.keys() {
            if !declared.iter().any(|param| param.name == name) {
                let known: Vec<_> = declared.iter().map(|param| param.name).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return invalid(format!("unknown parameter {}; this method takes: {known}", quote(name)));
            }
        }
        for param in declared {
            match given.get(param.name) {
                None if param.required => {
                    return invalid(format!("parameter {} is missing: {}", param.name, param.doc));
                }
                None => {}
                Some(value) => {
                    if let Some(problem) = param.shape.problem(value) {
                        return invalid(format!("parameter {}{problem}", param.name));
                    }
                }
            }
        }
        Ok(Self(given))
    }

    /// A text, if given.
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).and_then(Value::as_str)
    }
    /// A list of texts, if given.
    pub fn texts(&self, name: &str) -> Option<Vec<&'a str>> {
        self.0
            .get(name)
            .and_then(Value::as_array)
            .map(|items| items.iter().filter_map(Value::as_str).collect())
    }
    /// An integer that fits `T`, if given.
    pub fn integer<T: TryFrom<u64>>(&self, name: &str) -> Option<T> {
        self.0.get(name).and_then(Value::as_u64).and_then(|n| T::try_from(n).ok())
    }
    /// Limits of a guest; none if not given.
    pub fn limits(&self, name: &str) -> Overrides {
        self.0.get(name).and_then(limits).and_then(Result::ok).unwrap_or_default()
    }
    /// A required parameter that was read with one of the above.
    ///
    /// # Errors
    /// [`Kind::Internal`]: the table does not declare it so.
    pub fn must<T>(value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| Error::new(Kind::Internal, "the method's table does not declare this parameter"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: &[Param] = &[
        Param::required("name", Shape::Text, "a name"),
        Param::optional("limit", Shape::Integer { min: 1, max: 10 }, "a limit"),
        Param::optional("list", Shape::TextList, "a list"),
        Param::optional("device", Shape::Device, "a device"),
        Param::optional("kinds", Shape::Words(&["a", "b"]), "kinds"),
        Param::optional("limits", Shape::Limits, "limits"),
    ];

    fn check(value: Value) -> Result<(), Kind> {
        Args::check(PARAMS, value.as_object().unwrap()).map(|_| ()).map_err(|error| error.kind)
    }

    #[test]
    fn right_values_accepted() {
        let all = json!({"name": "n", "limit": 10, "list": [], "device": 0, "kinds": ["a", "b", "a"]});
        assert_eq!(check(all), Ok(()));
        assert_eq!(check(json!({"name": "n", "device": "gpu0"})), Ok(()));
        assert_eq!(check(json!({"name": "n", "limits": {"jobs": 1, "table_bytes": 1 << 20}})), Ok(()));
        assert_eq!(check(json!({"name": "n", "limits": {}})), Ok(()));
    }

    #[test]
    fn wrong_values_refused() {
        let wrong = [
            json!({}),
            json!({"name": null}),
            json!({"name": ""}),
            json!({"name": "a\u{0}b"}),
            json!({"name": "n".repeat(MAX_TEXT + 1)}),
            json!({"name": ["n"]}),
            json!({"name": "n", "limit": 0}),
            json!({"name": "n", "limit": 11}),
            json!({"name": "n", "limit": -1}),
            json!({"name": "n", "limit": 1.0}),
            json!({"name": "n", "limit": "1"}),
            json!({"name": "n", "limit": u64::MAX}),
            json!({"name": "n", "list": "x"}),
            json!({"name": "n", "list": [1]}),
            json!({"name": "n", "list": vec!["x"; MAX_ITEMS + 1]}),
            json!({"name": "n", "device": -1}),
            json!({"name": "n", "device": ""}),
            json!({"name": "n", "kinds": []}),
            json!({"name": "n", "kinds": ["c"]}),
            json!({"name": "n", "limits": {"jobs": 0}}),
            json!({"name": "n", "limits": {"jobs": "1"}}),
            json!({"name": "n", "limits": {"colour": 1}}),
            json!({"name": "n", "limits": [1]}),
            json!({"name": "n", "Name": "n"}),
        ];
        for value in wrong {
            assert_eq!(check(value.clone()), Err(Kind::InvalidParams), "{value}");
        }
    }
}
