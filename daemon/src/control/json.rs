//! JSON text to a value, stricter than the library: nesting is bounded, and no object has two members of one name, so
//! that nobody who looks at a request before us can take it for another one.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt::Formatter;

/// Arrays and objects inside each other at most. A list of texts in a batch is four deep.
pub const MAX_DEPTH: usize = 16;

/// The one value in `text`.
///
/// # Errors
/// It is no JSON text, more than one, nested too deeply, or has an object with two members of one name.
pub fn parse(text: &[u8]) -> serde_json::Result<Value> {
    let mut source = serde_json::Deserializer::from_slice(text);
    let value = Strict { room: MAX_DEPTH }.deserialize(&mut source)?;
    source.end()?;
    Ok(value)
}

/// Reads a value that may hold values inside each other to this depth.
#[derive(Clone, Copy)]
struct Strict {
    room: usize,
}

impl Strict {
    fn inside<E: Error>(self) -> Result<Self, E> {
        let room = self.room.checked_sub(1);
        let room = room.ok_or_else(|| E::custom(format_args!("nested deeper than {MAX_DEPTH}")))?;
        Ok(Self { room })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inside = self.inside()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inside)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let inside = self.inside()?;
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                return Err(A::Error::custom(format_args!("two members {}", super::rpc::quote(&name))));
            }
            object.insert(name, members.next_value_seed(inside)?);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> String {
        format!("{}{}", "[".repeat(depth), "]".repeat(depth))
    }

    #[test]
    fn values_are_those_of_the_library() {
        let texts = [
            r#"{"a":[null,true,-1,18446744073709551615,1.5,"x\u0000"],"b":{"a":{}}}"#,
            "18446744073709551616",
            "[]",
            "\"\"",
        ];
        for text in texts {
            assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
    }

    #[test]
    fn depth_at_the_limit_accepted_and_one_more_refused() {
        assert!(parse(nested(MAX_DEPTH).as_bytes()).is_ok());
        assert!(parse(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err().to_string().contains("nested deeper"));
    }

    #[test]
    fn member_named_twice_refused_however_it_is_written() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"a":1,"\u0061":2}]"#, r#"{"b":{"":1,"":2}}"#] {
            assert!(parse(text.as_bytes()).unwrap_err().to_string().contains("two members"), "{text}");
        }
    }
}
