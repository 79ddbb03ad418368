//! The published document of the API, made from the table of calls and the types of their bodies.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use gantry_resources::pools::DeviceRequest;

use super::routes::{Call, ROOT, ROUTES, Route};
use super::wire;
use crate::config::{DiskConfig, PlanDevices};

/// OpenAPI 3.1, whose schemas are JSON Schema as [`schemars`] writes it.
pub fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut schemas = settings.into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let verb = route.verb.to_lowercase();
        paths.insert(
            route.path.to_owned(),
            json!({ verb: operation(route, &mut schemas) }),
        );
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "gantry",
            "description": "Controls one VM over its Unix socket. Paths, verbs and bodies are those of \
                            Cloud Hypervisor's API, with more in some.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0 OR BSD-3-Clause", "identifier": "Apache-2.0 OR BSD-3-Clause"},
        },
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
    });
    let mut definitions = schemas.take_definitions(true);
    for (name, place) in [("DeviceConfig", "devices[]"), ("DiskConfig", "disks[]")] {
        if let Some(schema) = definitions.get_mut(name) {
            crate::config::add_inert(schema, place);
        }
    }
    definitions.insert("VmConfig".to_owned(), vm_config());
    document["components"] = json!({ "schemas": definitions });
    document
}

/// What `gantry run` reads from a file.
fn vm_config() -> Value {
    let mut schema = crate::config::schema();
    if let Value::Object(members) = &mut schema {
        members.remove("$schema");
    }
    schema
}

fn operation(route: &Route, schemas: &mut SchemaGenerator) -> Value {
    let mut operation = json!({
        "operationId": operation_id(route.path),
        "summary": route.summary,
        "responses": {},
    });
    if let Some(schema) = request(route.call, schemas) {
        operation["requestBody"] = json!({
            "required": true,
            "content": {"application/json": {"schema": schema}},
        });
    }
    let answers = &mut operation["responses"];
    match answer(route.call, schemas) {
        None if route.call == Call::Console => {
            answers["101"] = json!({"description": "The connection is the console's."});
        }
        None => answers["204"] = json!({"description": "It is done."}),
        Some((kind, schema)) => {
            let content = json!({ kind: {"schema": schema} });
            answers["200"] = json!({"description": "The answer.", "content": content});
        }
    }
    for (status, when) in route.refusals {
        answers[status.to_string()] = json!({
            "description": when,
            "content": {"application/json": {"schema": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What is wrong, and because of what.",
            }}},
        });
    }
    if matches!(route.call, Call::AddDevice | Call::AddDisk) {
        let cold = "The VM is not booted: it will have it when it is.";
        answers["204"] = json!({ "description": cold });
    }
    operation
}

/// `vmAddDevice` for `/api/v1/vm.add-device`.
fn operation_id(path: &str) -> String {
    let path = path.strip_prefix(ROOT).unwrap_or(path);
    let words = path.split(|c: char| !c.is_ascii_alphanumeric());
    let mut id = String::new();
    for word in words.filter(|word| !word.is_empty()) {
        let (first, rest) = word.split_at(1);
        match id.is_empty() {
            true => id.push_str(first),
            false => id.push_str(&first.to_uppercase()),
        }
        id.push_str(rest);
    }
    id
}

fn request(call: Call, schemas: &mut SchemaGenerator) -> Option<Value> {
    match call {
        Call::Create => Some(json!({"$ref": "#/components/schemas/VmConfig"})),
        Call::AddDevice => Some(json!({
            "description": "Devices of a group or alias, one device by its path, or the devices of a plan.",
            "anyOf": [of::<PlanDevices>(schemas), of::<DeviceRequest>(schemas)],
        })),
        Call::AddDisk => Some(of::<DiskConfig>(schemas)),
        Call::ResizeDisk => Some(of::<wire::ResizeDisk>(schemas)),
        Call::RemoveDevice => Some(of::<wire::RemoveDevice>(schemas)),
        _ => None,
    }
}

fn answer(call: Call, schemas: &mut SchemaGenerator) -> Option<(&'static str, Value)> {
    const JSON: &str = "application/json";
    match call {
        Call::Ping => Some((JSON, of::<wire::VmmPing>(schemas))),
        Call::Info => Some((JSON, of::<wire::VmInfo>(schemas))),
        Call::Counters => Some((JSON, of::<wire::Counters>(schemas))),
        Call::AddDevice => Some((JSON, of::<wire::AddedDevices>(schemas))),
        Call::AddDisk => Some((JSON, of::<wire::AddedDisk>(schemas))),
        Call::Events => Some(("application/x-ndjson", of::<wire::EventLine>(schemas))),
        Call::OpenApi => Some((JSON, json!({"type": "object"}))),
        Call::Metrics => Some((super::metrics::CONTENT_TYPE, json!({"type": "string"}))),
        _ => None,
    }
}

fn of<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Value {
    schemas.subschema_for::<T>().to_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let text = document.to_string();
        let references: Vec<&str> = text.split("\"$ref\":\"#").skip(1).collect();
        assert!(references.len() > 5);
        for reference in references {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
        assert_eq!(document["paths"].as_object().unwrap().len(), ROUTES.len());
        let add = &document["paths"]["/api/v1/vm.add-device"]["put"];
        assert_eq!(add["operationId"], "vmAddDevice");
    }
}
