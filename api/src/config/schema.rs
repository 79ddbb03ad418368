//! The JSON Schema of a VM's file, inert keys included.

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use serde_json::{Map, Value, json};

use super::inert::{self, Accepts};
use super::model::VmConfig;

/// Draft 2020-12, in one piece without references.
pub fn schema() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    let one_line = RecursiveTransform(|schema: &mut Schema| {
        if let Some(Value::String(text)) = schema.get_mut("description") {
            *text = text.replace('\n', " ");
        }
    });
    let settings = settings.with_transform(one_line);
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<VmConfig>()
        .to_value();
    add_inert(&mut schema, "");
    schema
}

/// Adds the inert keys to the schema of the object at `place` of their table.
pub fn add_inert(schema: &mut Value, place: &str) {
    for (path, accepts) in inert::KEYS {
        let path = match place {
            "" => Some(*path),
            place => path
                .strip_prefix(place)
                .and_then(|path| path.strip_prefix('.')),
        };
        if let Some(path) = path {
            add(schema, path, inert_schema(*accepts));
        }
    }
}

fn inert_schema(accepts: Accepts) -> Value {
    match accepts {
        Accepts::Members => json!({
            "description": "Not supported yet; accepted where it asks for nothing.",
            "type": ["object", "null"],
            "properties": {},
            "additionalProperties": false,
        }),
        Accepts::Text => json!({
            "description": "gantry ignores it.",
            "type": ["string", "null"],
        }),
        Accepts::Only(values) => {
            let values = values.iter().copied().filter(|value| *value != "null");
            let values = values.chain(["null"]).map(serde_json::from_str);
            json!({
                "description": "Not supported yet; accepted where it asks for nothing.",
                "enum": values.filter_map(Result::ok).collect::<Vec<Value>>(),
            })
        }
    }
}

/// Puts a schema at a key path; a parent comes before its members in the table.
fn add(schema: &mut Value, path: &str, child: Value) {
    let (key, rest) = path
        .split_once('.')
        .map_or((path, None), |(key, rest)| (key, Some(rest)));
    let (key, in_list) = key
        .strip_suffix("[]")
        .map_or((key, false), |key| (key, true));
    let properties = &mut schema["properties"];
    if properties.is_null() {
        *properties = Value::Object(Map::new());
    }
    let property = &mut properties[key];
    let property = if in_list {
        &mut property["items"]
    } else {
        property
    };
    match rest {
        Some(rest) => add(property, rest, child),
        None => *property = child,
    }
}
