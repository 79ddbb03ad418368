//! Tests: every mistake is told, in one style.

use std::path::Path;

use serde::Deserialize;

use super::*;

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct File {
    things: Vec<Thing>,
    #[serde(default)]
    size: Option<u8>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(try_from = "Keys")]
struct Thing(u32);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    count: u32,
    name: Option<String>,
}

impl TryFrom<Keys> for Thing {
    type Error = String;

    fn try_from(keys: Keys) -> Result<Self, String> {
        match (keys.count, keys.name) {
            (0, _) => Err("`count`: 0 is too few: use 1 or more".to_owned()),
            (1, Some(_)) => Err("one thing has no name".to_owned()),
            (count, _) => Ok(Self(count)),
        }
    }
}

fn read(text: &str) -> Result<File, String> {
    let mut document = Document::parse(Path::new("a.json"), text).map_err(|e| e.to_string())?;
    let file = document.decode();
    document.finish(file).map_err(|error| error.to_string())
}

#[test]
fn all_mistakes_of_a_text_are_told_in_their_order() {
    let text = "{\"things\": [{\"count\": 0},\n {\"count\": 2},\n {\"cuont\": 1},\n 7,\n \
        {\"count\": 1, \"name\": \"x\"}],\n \"size\": 256, \"sise\": 1}";
    let said = [
        "a.json:1:23: `things[0].count`: 0 is too few: use 1 or more",
        "a.json:3:3: unknown key `things[2].cuont`: did you mean `count`?",
        "a.json:4:2: `things[3]`: expected an object, found the number 7",
        "a.json:5:2: `things[4]`: one thing has no name",
        "a.json:6:10: `size`: expected a whole number, 0 to 255, found the number 256",
        "a.json:6:15: unknown key `sise`: did you mean `size`?",
    ];
    assert_eq!(read(text).unwrap_err(), said.join("\n"));
}

#[test]
fn a_part_that_is_wrong_is_not_missing_too() {
    let said = read(r#"{"things": 1, "size": "x"}"#).unwrap_err();
    assert_eq!(said.lines().count(), 2, "{said}");
    assert!(!said.contains("missing"), "{said}");
    let said = read("{}").unwrap_err();
    let missing = "a.json:1:1: `things`: this key is missing: add \"things\": ...";
    assert_eq!(said, missing);
}

#[test]
fn a_null_is_an_absent_key_and_a_list_is_no_object() {
    let file = read(r#"{"things": [{"count": 3, "name": null}], "size": null}"#).unwrap();
    assert_eq!(file.things, [Thing(3)]);
    for text in ["[]", r#"[[{"count": 1}], 1]"#] {
        let said = read(text).unwrap_err();
        assert_eq!(said, "a.json:1:1: expected an object, found a list");
    }
    let said = read(r#"{"things": [[3]]}"#).unwrap_err();
    assert!(said.contains("expected an object, found a list"), "{said}");
}

#[test]
fn a_text_without_end_of_mistakes_is_told_in_part() {
    let things = vec!["{}"; 1000].join(",");
    let said = read(&format!("{{\"things\": [{things}]}}")).unwrap_err();
    assert_eq!(said.lines().count(), MOST_MISTAKES);
}
