//! Which modules of a crate import which: they lie in floors, so no two import each other, however far around.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree};

/// Modules that lie beside each other, each with those of them that it imports.
pub type Imports = BTreeMap<String, BTreeSet<String>>;

/// Reads what each module imports of those beside it, tests left aside: the modules at the top of the crate with
/// this source directory, or those of one of its folders.
///
/// # Errors
/// A file cannot be read or is no Rust.
pub fn imports(source: &Path, folder: Option<&str>) -> Result<Imports> {
    let (dir, root) = match folder {
        None => (source.to_owned(), "lib.rs"),
        Some(folder) => (source.join(folder), "mod.rs"),
    };
    let root = parse(&dir.join(root))?;
    let declared = |item: &Item| match item {
        Item::Mod(one) if !is_test(&one.attrs) => Some(one.ident.to_string()),
        _ => None,
    };
    let modules: BTreeSet<String> = root.items.iter().filter_map(declared).collect();
    let mut homes = Homes::default();
    homes.visit_file(&root);
    let mut imports = Imports::new();
    for module in &modules {
        let mut names = BTreeSet::new();
        for (file, place) in files(&dir, module)? {
            let place = folder.map(str::to_owned).into_iter().chain(place).collect();
            let mut used = Used::at(place);
            used.visit_file(&parse(&file)?);
            let beside = used.paths.into_iter().filter_map(|path| {
                let mut path = path.into_iter();
                let same = folder.is_none() || path.next().as_deref() == folder;
                path.next().filter(|_| same)
            });
            // A name that is exported beside the modules is its module's.
            names.extend(beside.map(|name| homes.0.get(&name).cloned().unwrap_or(name)));
        }
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

/// The files of a module, its own and all in its folder but those of tests, each with the module that it is.
fn files(source: &Path, module: &str) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let mut files = Vec::new();
    let place = vec![module.to_owned()];
    let alone = source.join(format!("{module}.rs"));
    if alone.exists() {
        files.push((alone, place.clone()));
    }
    let mut folders = vec![(source.join(module), place)];
    while let Some((folder, place)) = folders.pop().filter(|(folder, _)| folder.is_dir()) {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let inner = || place.iter().cloned().chain([stem.to_string()]).collect();
            match path.extension() {
                _ if stem == "tests" => {}
                _ if path.is_dir() => folders.push((path.clone(), inner())),
                Some(extension) if extension == "rs" && stem == "mod" => {
                    files.push((path.clone(), place.clone()));
                }
                Some(extension) if extension == "rs" => files.push((path.clone(), inner())),
                _ => {}
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

/// Names that a root exports, and the modules that they come from.
#[derive(Default)]
struct Homes(BTreeMap<String, String>);

impl<'ast> Visit<'ast> for Homes {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let mut paths = Vec::new();
        expand(&item.tree, &[], &mut paths);
        for (path, exported) in paths {
            if let [home, _, ..] = path.as_slice() {
                self.0.insert(exported, home.clone());
            }
        }
    }
}

/// The paths in a tree of imports, each with the name that it is imported by.
fn expand(tree: &UseTree, above: &[String], paths: &mut Vec<(Vec<String>, String)>) {
    let inner = |name: &syn::Ident| -> Vec<String> {
        above.iter().cloned().chain([name.to_string()]).collect()
    };
    match tree {
        UseTree::Path(path) => expand(&path.tree, &inner(&path.ident), paths),
        UseTree::Name(name) => paths.push((inner(&name.ident), name.ident.to_string())),
        UseTree::Rename(name) => paths.push((inner(&name.ident), name.rename.to_string())),
        UseTree::Group(group) => {
            for one in &group.items {
                expand(one, above, paths);
            }
        }
        UseTree::Glob(_) => paths.push((above.to_vec(), String::new())),
    }
}

/// The paths within the crate that a module names, in imports and elsewhere, outside of tests.
struct Used {
    module: Vec<String>,
    paths: BTreeSet<Vec<String>>,
}

impl Used {
    fn at(module: Vec<String>) -> Self {
        let paths = BTreeSet::new();
        Self { module, paths }
    }

    fn add(&mut self, path: &[String]) {
        let mut place = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("super" | "self") => self.module.clone(),
            _ => return,
        };
        for segment in path {
            match segment.as_str() {
                "crate" | "self" => {}
                "super" => drop(place.pop()),
                name => place.push(name.to_owned()),
            }
        }
        self.paths.insert(place);
    }
}

impl<'ast> Visit<'ast> for Used {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_test(&item.attrs) {
            self.module.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if !is_test(&item.attrs) {
            let mut paths = Vec::new();
            expand(&item.tree, &[], &mut paths);
            paths.iter().for_each(|(path, _)| self.add(path));
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments = path.segments.iter();
        let segments: Vec<String> = segments.map(|one| one.ident.to_string()).collect();
        self.add(&segments);
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
        let imports = imports(source.path(), None).unwrap();
        let names = |names: &[&str]| -> BTreeSet<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        assert_eq!(imports["b"], names(&["c"]));
        assert_eq!(circles(&imports), names(&["a", "b", "c", "d"]));
        write("c/deep.rs", "");
        write("c/tests.rs", "use crate::a;");
        let imports = super::imports(source.path(), None).unwrap();
        assert_eq!(circles(&imports), BTreeSet::new());
    }

    #[test]
    fn circles_below_a_folder_are_found_through_the_paths_of_parents() {
        let source = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = source.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("low/mod.rs", "mod a; mod b; mod c; pub use c::Thing;");
        write("low/a.rs", "use super::b::One;");
        write("low/b.rs", "use crate::low::Thing;");
        write("low/c.rs", "mod deep; use crate::high::a;");
        write("low/c/deep.rs", "use super::super::{c, a::Two};");
        let circle = circles(&imports(source.path(), Some("low")).unwrap());
        let all = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(circle, all.into());
        write("low/c/deep.rs", "use super::a;");
        let imports = imports(source.path(), Some("low")).unwrap();
        assert_eq!(circles(&imports), BTreeSet::new());
    }

    #[test]
    fn the_modules_of_a_crate_lie_in_floors() {
        for crate_name in ["devices", "vfio", "resources", "vmm", "api"] {
            let imports = imports(&workspace().join(crate_name).join("src"), None).unwrap();
            assert!(imports.len() > 2, "{crate_name}: {imports:?}");
            assert_eq!(circles(&imports), BTreeSet::new(), "{crate_name}");
        }
    }

    #[test]
    fn within_a_floor_too_no_modules_import_each_other() {
        let resources = [
            "base",
            "facts",
            "holding",
            "inventory",
            "pools",
            "moving",
            "making",
        ];
        let vmm = [
            "process",
            "host",
            "kvm",
            "cpu",
            "boot",
            "machine",
            "passthrough",
            "hotplug",
            "vm",
        ];
        let of = |crate_name, floor| (workspace().join(crate_name).join("src"), floor);
        let resources = resources.map(|floor| of("resources", floor));
        let vmm = vmm.map(|floor| of("vmm", floor));
        let api = ["bench", "cli", "config", "http"].map(|floor| of("api", floor));
        let vfio = ["measure"].map(|floor| of("vfio", floor));
        for (source, floor) in resources.into_iter().chain(vmm).chain(api).chain(vfio) {
            let imports = imports(&source, Some(floor)).unwrap();
            assert!(imports.len() > 2, "{floor}: {imports:?}");
            assert_eq!(circles(&imports), BTreeSet::new(), "{floor}");
        }
    }
}
