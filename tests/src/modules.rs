//! Which modules of a crate import which: they lie in floors, so no two import each other, however far around.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree};

/// The modules at a crate's top, each with those that it imports.
pub type Imports = BTreeMap<String, BTreeSet<String>>;

/// Reads what each top module of the crate with this source directory imports, tests left aside.
///
/// # Errors
/// A file cannot be read or is no Rust.
pub fn imports(source: &Path) -> Result<Imports> {
    let root = parse(&source.join("lib.rs"))?;
    let declared = |item: &Item| match item {
        Item::Mod(one) if !is_test(&one.attrs) => Some(one.ident.to_string()),
        _ => None,
    };
    let modules: BTreeSet<String> = root.items.iter().filter_map(declared).collect();
    let mut homes = Homes::default();
    homes.visit_file(&root);
    let mut imports = Imports::new();
    for module in &modules {
        let mut used = Used::default();
        for file in files(source, module)? {
            used.visit_file(&parse(&file)?);
        }
        // A name that the crate exports at its top is its module's.
        let home = |name: &String| homes.0.get(name).unwrap_or(name).clone();
        let mut names: BTreeSet<String> = used.0.iter().map(home).collect();
        names.retain(|name| modules.contains(name) && name != module);
        imports.insert(module.clone(), names);
    }
    Ok(imports)
}

/// The modules that are in circles of imports, or import such; none if all lie in floors.
pub fn circles(imports: &Imports) -> BTreeSet<String> {
    let mut left = imports.clone();
    loop {
        let settled = |names: &BTreeSet<String>| names.iter().all(|name| !left.contains_key(name));
        let free: Vec<String> = left
            .iter()
            .filter(|(_, names)| settled(names))
            .map(|(module, _)| module.clone())
            .collect();
        if free.is_empty() {
            return left.into_keys().collect();
        }
        left.retain(|module, _| !free.contains(module));
    }
}

/// The files of a module: its own, and all in its folder but those of tests.
fn files(source: &Path, module: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let alone = source.join(format!("{module}.rs"));
    if alone.exists() {
        files.push(alone);
    }
    let mut folders = vec![source.join(module)];
    while let Some(folder) = folders.pop().filter(|folder| folder.is_dir()) {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let stem = path.file_stem().unwrap_or_default();
            if stem == "tests" {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn parse(path: &Path) -> Result<syn::File> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    syn::parse_file(&text).with_context(|| path.display().to_string())
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|word| word == "test")
    })
}

/// Names that a crate exports at its top, and the modules that they come from.
#[derive(Default)]
struct Homes(BTreeMap<String, String>);

impl<'ast> Visit<'ast> for Homes {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if let UseTree::Path(path) = &item.tree {
            let mut names = Vec::new();
            leaves(&path.tree, &mut names);
            let home = path.ident.to_string();
            self.0
                .extend(names.into_iter().map(|name| (name, home.clone())));
        }
    }
}

/// The last names of a tree of imports.
fn leaves(tree: &UseTree, names: &mut Vec<String>) {
    match tree {
        UseTree::Path(path) => leaves(&path.tree, names),
        UseTree::Name(name) => names.push(name.ident.to_string()),
        UseTree::Rename(rename) => names.push(rename.rename.to_string()),
        UseTree::Group(group) => group.items.iter().for_each(|one| leaves(one, names)),
        UseTree::Glob(_) => {}
    }
}

/// What stands behind `crate::`, in imports and in paths, outside of tests.
#[derive(Default)]
struct Used(BTreeSet<String>);

impl<'ast> Visit<'ast> for Used {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let first = |tree: &UseTree| match tree {
            UseTree::Path(path) => Some(path.ident.to_string()),
            UseTree::Name(name) => Some(name.ident.to_string()),
            UseTree::Rename(rename) => Some(rename.ident.to_string()),
            UseTree::Glob(_) | UseTree::Group(_) => None,
        };
        match &item.tree {
            _ if is_test(&item.attrs) => {}
            UseTree::Path(path) if path.ident == "crate" => match &*path.tree {
                UseTree::Group(group) => self.0.extend(group.items.iter().filter_map(first)),
                tree => self.0.extend(first(tree)),
            },
            _ => {}
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut segments = path.segments.iter();
        if segments.next().is_some_and(|first| first.ident == "crate") {
            let second = segments.next().map(|second| second.ident.to_string());
            self.0.extend(second);
        }
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::parts::workspace;

    #[test]
    fn circles_are_found_through_exports_and_paths_and_tests_are_left_aside() {
        let source = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = source.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("lib.rs", "mod a; mod b; mod c; mod d; pub use c::Thing;");
        write(
            "a.rs",
            "use crate::b;\n#[cfg(test)] mod tests { use crate::d; }",
        );
        write("b.rs", "use crate::{Thing as Other};");
        write("c/mod.rs", "");
        write("c/deep.rs", "fn f() { crate::a::f() }");
        write("d.rs", "use crate::a;");
        let imports = imports(source.path()).unwrap();
        let names = |names: &[&str]| -> BTreeSet<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        assert_eq!(imports["b"], names(&["c"]));
        assert_eq!(circles(&imports), names(&["a", "b", "c", "d"]));
        write("c/deep.rs", "");
        write("c/tests.rs", "use crate::a;");
        let imports = super::imports(source.path()).unwrap();
        assert_eq!(circles(&imports), BTreeSet::new());
    }

    /// `resources` and `vmm` are not there yet.
    #[test]
    fn the_modules_of_a_crate_lie_in_floors() {
        for crate_name in ["devices", "vfio", "api"] {
            let imports = imports(&workspace().join(crate_name).join("src")).unwrap();
            assert!(imports.len() > 2, "{crate_name}: {imports:?}");
            assert_eq!(circles(&imports), BTreeSet::new(), "{crate_name}");
        }
    }
}
