//! `rpc.discover`: the table of methods as an OpenRPC document.

use super::ControlState;
use super::events::{GAP, KINDS};
use super::methods::{Answer, METHODS, Method, Rights, Then};
use super::params::{Args, Param};
use super::rpc::{Error, Kind, result_text};
use serde_json::{Value, json};

/// What any request may fail with.
const COMMON_ERRORS: &[Kind] = &[
    Kind::ParseError,
    Kind::LineTooLong,
    Kind::InvalidRequest,
    Kind::UnknownMethod,
    Kind::InvalidParams,
    Kind::Internal,
    Kind::TooManyConnections,
    Kind::NotPermitted,
    Kind::ReadOnly,
    Kind::Busy,
];

pub(super) fn run(_: &ControlState, _: &Args<'_>) -> Result<Answer, Error> {
    Ok(Answer { result: result_text(&document())?, then: Then::Continue })
}

fn document() -> Value {
    json!({
        "openrpc": "1.3.2",
        "info": {
            "title": "svmd control",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "JSON-RPC 2.0 on a unix stream socket, one message a line. Parameters are named. Every \
                            error carries data.kind, which does not change between versions.",
        },
        "methods": METHODS.iter().map(method).collect::<Vec<_>>(),
        "x-common-errors": COMMON_ERRORS.iter().map(|kind| error(*kind)).collect::<Vec<_>>(),
        "x-notifications": [{
            "name": "event",
            "description": "sent after events.subscribe",
            "kinds": KINDS.iter().chain([&GAP]).collect::<Vec<_>>(),
        }],
    })
}

fn method(method: &Method) -> Value {
    json!({
        "name": method.name,
        "summary": method.summary,
        "paramStructure": "by-name",
        "params": method.params.iter().map(param).collect::<Vec<_>>(),
        "result": { "name": "result", "description": method.result, "schema": { "type": "object" } },
        "x-read-only": method.rights == Rights::ReadOnly,
        "errors": method.errors.iter().map(|kind| error(*kind)).collect::<Vec<_>>(),
    })
}

fn param(param: &Param) -> Value {
    json!({
        "name": param.name,
        "description": param.doc,
        "required": param.required,
        "schema": param.shape.schema(),
    })
}

fn error(kind: Kind) -> Value {
    json!({ "code": kind.code(), "message": kind.as_str(), "data": { "kind": kind.as_str() } })
}
