//! A reader of AML for tests: what is declared under which path, and where each thing ends.

use std::collections::BTreeMap;

/// A declared object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A device or scope.
    Device,
    /// A named integer.
    Integer(u64),
    /// Any other named value.
    Value,
    /// A method: its code.
    Method(Vec<u8>),
    /// A field of a region.
    Region,
}

/// All objects of a table by their paths. Anything that is not understood ends the test.
pub fn objects(code: &[u8]) -> BTreeMap<String, Object> {
    let mut found = BTreeMap::new();
    Reader(code).list("", &mut found);
    found
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn number(&mut self, bytes: usize) -> u64 {
        let bytes = self.take(bytes).iter().rev();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// What a package length (ACPI Specification 6.5, 20.2.4) covers.
    fn package(&mut self) -> Reader<'a> {
        let before = self.0.len();
        let lead = self.byte();
        let more = usize::from(lead >> 6);
        let mut len = usize::from(lead & if more == 0 { 0x3f } else { 0xf });
        for place in 0..more {
            len |= usize::from(self.byte()) << (4 + 8 * place);
        }
        let read = before - self.0.len();
        Reader(self.take(len - read))
    }

    fn path(&mut self, under: &str) -> String {
        let absolute = self.0[0] == b'\\';
        if absolute {
            self.byte();
        }
        let parts = match self.0[0] {
            0x2e => {
                self.byte();
                2
            }
            0x2f => {
                self.byte();
                self.byte()
            }
            _ => 1,
        };
        let mut path = if absolute {
            String::new()
        } else {
            under.to_owned()
        };
        for _ in 0..parts {
            path += ".";
            path += std::str::from_utf8(self.take(4)).unwrap();
        }
        path
    }

    fn value(&mut self) -> Object {
        match self.byte() {
            0 => Object::Integer(0),
            1 => Object::Integer(1),
            0x0a => Object::Integer(self.number(1)),
            0x0b => Object::Integer(self.number(2)),
            0x0c => Object::Integer(self.number(4)),
            0x0e => Object::Integer(self.number(8)),
            0x0d => {
                while self.byte() != 0 {}
                Object::Value
            }
            0x11 | 0x12 => {
                self.package();
                Object::Value
            }
            other => panic!("no value begins with {other:#x}"),
        }
    }

    fn list(&mut self, under: &str, found: &mut BTreeMap<String, Object>) {
        while !self.0.is_empty() {
            let op = self.byte();
            let op = if op == 0x5b {
                0x5b00 | u16::from(self.byte())
            } else {
                op.into()
            };
            match op {
                0x08 => {
                    let path = self.path(under);
                    let value = self.value();
                    assert_eq!(found.insert(path, value), None);
                }
                0x10 | 0x5b82 => {
                    let mut body = self.package();
                    let path = body.path(under);
                    if op != 0x10 {
                        assert_eq!(found.insert(path.clone(), Object::Device), None);
                    }
                    body.list(&path, found);
                }
                0x14 => {
                    let mut body = self.package();
                    let path = body.path(under);
                    body.byte();
                    assert_eq!(found.insert(path, Object::Method(body.0.to_vec())), None);
                }
                0x5b80 => {
                    let path = self.path(under);
                    self.byte();
                    self.value();
                    self.value();
                    found.insert(path, Object::Region);
                }
                0x5b81 => {
                    self.package();
                }
                other => panic!("nothing is declared by {other:#x}"),
            }
        }
    }
}
