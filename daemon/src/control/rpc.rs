//! JSON-RPC 2.0 as data: from the bytes of a line to requests, from outcomes to the text of a response.
//!
//! Stricter than the standard where silence would hide a mistake: parameters are named, unknown members of a request
//! are refused, ids are integers, strings or null. Knows no method.

use super::json;
use serde::Serialize;
use serde_json::{Map, Value};

/// Requests in one batch at most.
pub const MAX_BATCH: usize = 128;
/// Characters of a client's own text that an error message repeats.
const MAX_QUOTE: usize = 80;

/// Why a request failed, in a word that never changes: `error.data.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The line is no JSON text, nested too deeply, or has two members of one name.
    ParseError,
    /// The line exceeds the limit.
    LineTooLong,
    /// JSON, but no request.
    InvalidRequest,
    /// No such method.
    UnknownMethod,
    /// A parameter is missing, unknown, of the wrong type or out of range.
    InvalidParams,
    /// A defect of the daemon.
    Internal,
    /// Every connection is taken.
    TooManyConnections,
    /// The peer's user may not use this socket.
    NotPermitted,
    /// The socket has only methods that change nothing, and this is none of them.
    ReadOnly,
    /// As many large results as there may be are on their way.
    Busy,
    /// No guest has that name.
    GuestNotFound,
    /// The guest's VMM is not connected.
    GuestNotConnected,
    /// A guest's name has other characters than it may have.
    BadName,
    /// Another guest has that name.
    NameTaken,
    /// The socket's path is not below a runtime folder.
    SocketOutsideRuntimeDirs,
    /// The socket's path is taken.
    SocketInUse,
    /// The socket could not be made.
    SocketFailed,
    /// No such host device.
    UnknownDevice,
    /// A host device is granted twice to one guest.
    DeviceTwice,
    /// No such context in that guest.
    ContextNotFound,
    /// The daemon is ending.
    ShuttingDown,
}

impl Kind {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ParseError => "parse-error",
            Self::LineTooLong => "line-too-long",
            Self::InvalidRequest => "invalid-request",
            Self::UnknownMethod => "unknown-method",
            Self::InvalidParams => "invalid-params",
            Self::Internal => "internal",
            Self::TooManyConnections => "too-many-connections",
            Self::NotPermitted => "not-permitted",
            Self::ReadOnly => "read-only",
            Self::Busy => "busy",
            Self::GuestNotFound => "guest-not-found",
            Self::GuestNotConnected => "guest-not-connected",
            Self::BadName => "bad-name",
            Self::NameTaken => "name-taken",
            Self::SocketOutsideRuntimeDirs => "socket-outside-runtime-dirs",
            Self::SocketInUse => "socket-in-use",
            Self::SocketFailed => "socket-failed",
            Self::UnknownDevice => "unknown-device",
            Self::DeviceTwice => "device-twice",
            Self::ContextNotFound => "context-not-found",
            Self::ShuttingDown => "shutting-down",
        }
    }

    /// The code on the wire: the standard's own where it has one, else -32000.
    pub fn code(self) -> i32 {
        match self {
            Self::ParseError => -32700,
            Self::InvalidRequest | Self::LineTooLong => -32600,
            Self::UnknownMethod => -32601,
            Self::InvalidParams => -32602,
            Self::Internal => -32603,
            Self::TooManyConnections
            | Self::NotPermitted
            | Self::ReadOnly
            | Self::Busy
            | Self::GuestNotFound
            | Self::GuestNotConnected
            | Self::BadName
            | Self::NameTaken
            | Self::SocketOutsideRuntimeDirs
            | Self::SocketInUse
            | Self::SocketFailed
            | Self::UnknownDevice
            | Self::DeviceTwice
            | Self::ContextNotFound
            | Self::ShuttingDown => -32000,
        }
    }
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The cause, for programs.
    pub kind: Kind,
    /// The cause and what to do, for people.
    pub message: String,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The client's name for a request. Absent in a notification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Id {
    /// Also the id of an answer to what was no request.
    Null,
    /// An integer.
    Unsigned(u64),
    /// A negative integer.
    Signed(i64),
    /// A string.
    Text(String),
}

/// One call of a method.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// `None`: a notification, which gets no answer, not even an error.
    pub id: Option<Id>,
    /// The method.
    pub method: String,
    /// Its parameters.
    pub params: Map<String, Value>,
}

/// What a line holds.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// One value, which may be a request.
    Single(Value),
    /// Several, to be answered in one array.
    Batch(Vec<Value>),
}

impl Message {
    /// Takes a line apart.
    ///
    /// # Errors
    /// [`Kind::ParseError`]; [`Kind::InvalidRequest`] for a batch that is empty or too long.
    pub fn parse(line: &[u8]) -> Result<Self, Error> {
        let value = json::parse(line).map_err(|error| {
            Error::new(Kind::ParseError, format!("not one JSON text in one line of UTF-8: {error}"))
        })?;
        match value {
            Value::Array(values) if values.is_empty() => {
                Err(Error::new(Kind::InvalidRequest, "an empty batch; send at least one request"))
            }
            Value::Array(values) if values.len() > MAX_BATCH => Err(Error::new(
                Kind::InvalidRequest,
                format!("a batch of {} requests; send at most {MAX_BATCH} at once", values.len()),
            )),
            Value::Array(values) => Ok(Self::Batch(values)),
            other => Ok(Self::Single(other)),
        }
    }
}

impl Request {
    /// Checks that a value is a request.
    ///
    /// # Errors
    /// The error, and the id to answer it under; no id for a notification, which gets no answer.
    pub fn from_value(value: Value) -> Result<Self, (Option<Id>, Error)> {
        let invalid = |id: &Id, text: &str| (Some(id.clone()), Error::new(Kind::InvalidRequest, text));
        let Value::Object(mut members) = value else {
            return Err(invalid(&Id::Null, "a request is an object with jsonrpc, method, params and id"));
        };
        let id = match members.remove("id") {
            None => None,
            Some(value) => Some(
                id_of(value)
                    .ok_or_else(|| invalid(&Id::Null, "id is neither an integer, a string nor null"))?,
            ),
        };
        // What is no request is answered even without an id: nobody knows that it was meant as a notification.
        let answer_to = id.clone().unwrap_or(Id::Null);
        if members.remove("jsonrpc").as_ref().and_then(Value::as_str) != Some("2.0") {
            return Err(invalid(&answer_to, "member jsonrpc is not \"2.0\""));
        }
        let Some(Value::String(method)) = members.remove("method") else {
            return Err(invalid(&answer_to, "member method is not a string"));
        };
        let params = members.remove("params");
        if let Some(name) = members.keys().next() {
            let text = format!("unknown member {} in the request", quote(name));
            return Err(invalid(&answer_to, &text));
        }
        match params {
            None => Ok(Self { id, method, params: Map::new() }),
            Some(Value::Object(params)) => Ok(Self { id, method, params }),
            Some(Value::Array(_)) => {
                let text = "params is an array; name the parameters: {\"NAME\": VALUE, ...}";
                Err((id, Error::new(Kind::InvalidParams, text)))
            }
            Some(_) => Err(invalid(&answer_to, "params is not an object")),
        }
    }
}

fn id_of(value: Value) -> Option<Id> {
    match value {
        Value::Null => Some(Id::Null),
        Value::String(text) => Some(Id::Text(text)),
        Value::Number(number) => {
            number.as_u64().map(Id::Unsigned).or_else(|| number.as_i64().map(Id::Signed))
        }
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A client's own text for an error message: quoted, escaped and not longer than needed to recognise it.
pub fn quote(text: &str) -> String {
    let head: String = text.chars().take(MAX_QUOTE).collect();
    let dots = if head.len() < text.len() { "..." } else { "" };
    format!("{head:?}{dots}")
}

/// The text of a result. Results are plain data; one that does not serialise is a defect.
///
/// # Errors
/// [`Kind::Internal`].
pub fn result_text(result: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(result)
        .map_err(|error| Error::new(Kind::Internal, format!("the result does not serialise: {error}")))
}

/// The text of a response, without the end of the line. `outcome` holds the text of the result.
pub fn response(id: &Id, outcome: Result<String, Error>) -> String {
    let id = serde_json::json!(id);
    match outcome {
        Ok(result) => format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#),
        Err(Error { kind, message }) => {
            let error = serde_json::json!({
                "code": kind.code(),
                "message": message,
                "data": { "kind": kind.as_str() },
            });
            format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#)
        }
    }
}

/// The text of a notification, without the end of the line.
pub fn notification(method: &str, params: &Value) -> String {
    serde_json::json!({ "jsonrpc": "2.0", "method": method, "params": params }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(value: Value) -> (Option<Id>, Kind) {
        let (id, error) = Request::from_value(value).unwrap_err();
        (id, error.kind)
    }

    #[test]
    fn request_without_params_has_none() {
        let request = Request::from_value(json!({"jsonrpc": "2.0", "method": "m", "id": -3})).unwrap();
        assert_eq!(request, Request { id: Some(Id::Signed(-3)), method: "m".into(), params: Map::new() });
    }

    #[test]
    fn fractional_id_refused_under_null() {
        let value = json!({"jsonrpc": "2.0", "method": "m", "id": 1.5});
        assert_eq!(refused(value), (Some(Id::Null), Kind::InvalidRequest));
    }

    #[test]
    fn misspelt_member_refused_under_its_id() {
        let value = json!({"jsonrpc": "2.0", "method": "m", "id": "x", "param": {}});
        assert_eq!(refused(value), (Some(Id::Text("x".into())), Kind::InvalidRequest));
    }

    #[test]
    fn array_params_of_notification_unanswered() {
        let value = json!({"jsonrpc": "2.0", "method": "m", "params": []});
        assert_eq!(refused(value), (None, Kind::InvalidParams));
    }

    #[test]
    fn long_quote_is_cut_and_escaped() {
        assert_eq!(quote("a\nb"), r#""a\nb""#);
        assert_eq!(quote(&"x".repeat(1000)).len(), MAX_QUOTE + 5);
    }

    #[test]
    fn response_bytes() {
        let ok = response(&Id::Unsigned(7), Ok("{}".into()));
        assert_eq!(ok, r#"{"jsonrpc":"2.0","id":7,"result":{}}"#);
        let error = response(&Id::Null, Err(Error::new(Kind::BadName, "no")));
        let expected = json!({"jsonrpc": "2.0", "id": null,
            "error": {"code": -32000, "message": "no", "data": {"kind": "bad-name"}}});
        assert_eq!(serde_json::from_str::<Value>(&error).unwrap(), expected);
    }
}
