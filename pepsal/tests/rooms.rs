//! The order of the rooms of `src`, by the paths that begin with `crate::` in each file (docs/architecture.md, Rooms).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A room imports only from rooms of earlier lines.
const ORDER: [&[&str]; 10] = [
    &["units"],
    &["host", "tcp"],
    &["link"],
    &["wire"],
    &["flow"],
    &["observe"],
    &["config"],
    &["daemon", "ctl"],
    &["cli"],
    &["lib", "main"],
];

/// Files by their path below `src`, each with the files that it imports from and the line of the first such import.
type Imports = BTreeMap<String, BTreeMap<String, usize>>;

#[test]
fn rooms_import_in_one_direction() {
    let rank = |file: &str| -> (usize, String) {
        let room = file.split(['/', '.']).next().unwrap_or_default();
        let rank = ORDER.iter().position(|rooms| rooms.contains(&room));
        (
            rank.unwrap_or_else(|| panic!("{file}: a room without a place in ORDER")),
            room.to_owned(),
        )
    };
    let mut wrong = Vec::new();
    for (file, imports) in &imports() {
        for (imported, line) in imports {
            let ((own, room), (other, from)) = (rank(file), rank(imported));
            if room != from && other >= own {
                wrong.push(format!("src/{file}:{line}: {room} imports from {from}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_import_without_circles() {
    let mut imports = imports();
    // Removes files without imports or importers, until only circles are left.
    loop {
        let files: BTreeSet<String> = imports.keys().cloned().collect();
        let imported: BTreeSet<String> = imports.values().flat_map(BTreeMap::keys).cloned().collect();
        for imported in imports.values_mut() {
            imported.retain(|file, _| files.contains(file));
        }
        imports.retain(|file, imports| !imports.is_empty() && imported.contains(file));
        if imports.len() == files.len() {
            break;
        }
    }
    let line = |(file, imported): (&String, &BTreeMap<String, usize>)| {
        let line = |(other, line)| format!("src/{file}:{line}: imports from {other}");
        imported.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    let circle: Vec<String> = imports.iter().map(line).collect();
    assert!(circle.is_empty(), "a circle:\n{}", circle.join("\n"));
}

fn imports() -> Imports {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    list(&src, &mut files);
    let name = |path: &Path| {
        let name = path.strip_prefix(&src).expect("listed below it");
        name.to_str().expect("names are ASCII").to_owned()
    };
    files
        .iter()
        .map(|path| (name(path), imports_of(&src, path, &name(path))))
        .collect()
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable folder").path();
        match path.is_dir() {
            true => list(&path, files),
            false => files.push(path),
        }
    }
}

fn imports_of(src: &Path, path: &Path, name: &str) -> BTreeMap<String, usize> {
    let content = fs::read_to_string(path).expect("a readable file");
    // Unit tests come last, and may import any file.
    let code = content.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let plain = |line: &str| match line.trim_start().starts_with("//") {
        true => String::new(),
        false => line.to_owned(),
    };
    let code: Vec<String> = code.lines().map(plain).collect();
    let mut imports = BTreeMap::new();
    for (line, text) in (1..).zip(&code) {
        assert!(
            !text.contains("super::") && !text.contains("self::"),
            "src/{name}:{line}: write crate::, which this test reads: {text}"
        );
        let child = text.trim_start_matches("pub ").trim_start_matches("pub(crate) ");
        if let Some(child) = child
            .strip_prefix("mod ")
            .and_then(|child| child.strip_suffix(';'))
        {
            let folder = name.trim_end_matches("lib.rs").trim_end_matches("mod.rs");
            imports.insert(file_of(src, &format!("{folder}{child}")), line);
        }
    }
    let code = code.join("\n");
    for (at, prefix) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|before| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let mut paths = Vec::new();
        read_paths(&code, at + prefix.len(), "", &mut paths);
        for (path, at) in paths {
            let line = code[..at].lines().count();
            imports.entry(file_of(src, &path)).or_insert(line);
        }
    }
    imports.remove(name);
    imports
}

/// Reads a path, or a tree of paths in braces, from `at` on. Returns where it ends.
fn read_paths(code: &str, at: usize, prefix: &str, paths: &mut Vec<(String, usize)>) -> usize {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    if code[at..].starts_with('{') {
        let mut end = at + 1;
        while !code[end..].starts_with('}') {
            match code[end..].starts_with(|c| is_part(c) || c == '{') {
                true => end = read_paths(code, end, prefix, paths),
                false => end += 1,
            }
            // `as` is followed by a name, not a path.
            if let Some(alias) = code[end..].strip_prefix(" as ") {
                end = code.len() - alias.trim_start_matches(is_part).len();
            }
        }
        return end + 1;
    }
    let end = code.len() - code[at..].trim_start_matches(is_part).len();
    let path = format!("{prefix}/{}", &code[at..end]);
    match code[end..].strip_prefix("::") {
        Some(_) => read_paths(code, end + 2, &path, paths),
        None => {
            paths.push((path, at));
            end
        }
    }
}

/// The file that a path leads into: its longest part that is a file's.
fn file_of(src: &Path, path: &str) -> String {
    let mut module = path.trim_start_matches('/');
    loop {
        for file in [format!("{module}.rs"), format!("{module}/mod.rs")] {
            if src.join(&file).is_file() {
                return file;
            }
        }
        module = module
            .rsplit_once('/')
            .unwrap_or_else(|| panic!("{path} is in no room"))
            .0;
    }
}
