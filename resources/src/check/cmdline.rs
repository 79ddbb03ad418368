//! The kernel's command line as words, and changes to it
//! (Documentation/admin-guide/kernel-parameters.rst).

/// The words of a command line for the kernel; words after `--` are for init.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CommandLine(Vec<String>);

impl CommandLine {
    /// Splits at blanks outside of double quotes.
    pub(super) fn parse(text: &str) -> Self {
        let mut quoted = false;
        let words = text.split(|symbol: char| {
            quoted ^= symbol == '"';
            !quoted && symbol.is_ascii_whitespace()
        });
        let words = words.filter(|word| !word.is_empty());
        Self(
            words
                .take_while(|word| *word != "--")
                .map(str::to_owned)
                .collect(),
        )
    }

    /// The words with this name, with their values, in order. The kernel reads `-` as `_`.
    pub(super) fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let wanted = underscored(name);
        self.0.iter().filter_map(move |word| {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            (underscored(name) == wanted).then_some((word.as_str(), value))
        })
    }

    /// The words `name=...` that have `option` among their comma-separated values.
    pub(super) fn with_option<'a>(
        &'a self,
        name: &str,
        option: &'a str,
    ) -> impl Iterator<Item = &'a str> {
        self.named(name)
            .filter(move |(_, value)| value.split(',').any(|one| one == option))
            .map(|(word, _)| word)
    }

    /// The last of a pair of options counts: true for `on`, false for `off`, none for neither.
    pub(super) fn switch(&self, name: &str, on: &str, off: &str) -> Option<bool> {
        let options = self.named(name).flat_map(|(_, value)| value.split(','));
        options
            .filter(|option| *option == on || *option == off)
            .map(|option| option == on)
            .last()
    }

    /// The words that set a boolean parameter to yes (`1`, `Y` or `y`).
    pub(super) fn switched_on(&self, name: &str) -> Vec<String> {
        let on = self
            .named(name)
            .filter(|(_, value)| is_yes(value) || value.is_empty());
        on.map(|(word, _)| word.to_owned()).collect()
    }

    pub(super) fn first(&self) -> Option<&str> {
        self.0.first().map(String::as_str)
    }

    /// The line without the words of these names.
    pub(super) fn without(&self, names: &[&str]) -> Self {
        let name = |word: &str| {
            word.split('=')
                .next()
                .map(str::to_owned)
                .unwrap_or_default()
        };
        let words = self
            .0
            .iter()
            .filter(|word| !names.contains(&name(word).as_str()));
        Self(words.cloned().collect())
    }

    pub(super) fn has(&self, word: &str) -> bool {
        self.0.iter().any(|own| own == word)
    }

    /// Whether a change has been made already.
    pub(super) fn follows(&self, change: &Change) -> bool {
        change.add.iter().all(|word| self.has(word))
            && !change.remove.iter().any(|word| self.has(word))
    }

    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The line with a change made.
    pub(super) fn with(&self, change: &Change) -> String {
        let stay = self.0.iter().filter(|word| !change.remove.contains(word));
        let new = change.add.iter().filter(|word| !self.has(word));
        let words: Vec<&str> = stay.chain(new).map(String::as_str).collect();
        words.join(" ")
    }
}

/// Whether the kernel reads the text of a boolean parameter as yes.
pub(super) fn is_yes(value: &str) -> bool {
    value.starts_with(['1', 'Y', 'y']) || value.eq_ignore_ascii_case("on")
}

/// Replaces `-` in names of parameters and modules, which the kernel accepts in both forms.
pub(super) fn underscored(name: &str) -> String {
    name.replace('-', "_")
}

/// Words to add to a command line and to take away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) add: Vec<String>,
    pub(super) remove: Vec<String>,
}

impl Change {
    pub(super) fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (own, more) in [
            (&mut self.add, &other.add),
            (&mut self.remove, &other.remove),
        ] {
            for word in more {
                if !own.contains(word) {
                    own.push(word.clone());
                }
            }
        }
    }

    /// The part of the change that the running kernel lacks.
    pub(super) fn against(self, running: &CommandLine) -> Self {
        let Self {
            mut add,
            mut remove,
        } = self;
        add.retain(|word| !running.has(word));
        remove.retain(|word| running.has(word));
        Self { add, remove }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_where_the_kernel_splits() {
        let line = CommandLine::parse(
            "a=1  dyndbg=\"file x +p; y\"\tvfio_pci.ids=1:2 -- intel_iommu=on\n",
        );
        assert!(line.has("a=1") && line.has("dyndbg=\"file x +p; y\""));
        assert!(!line.has("intel_iommu=on"));
        assert_eq!(
            line.named("vfio-pci.ids").collect::<Vec<_>>(),
            [("vfio_pci.ids=1:2", "1:2")]
        );
    }

    #[test]
    fn the_last_switch_counts() {
        for (text, expected) in [
            ("quiet", None),
            ("intel_iommu=on", Some(true)),
            ("intel_iommu=sm_on", None),
            ("intel_iommu=on,sm_on intel_iommu=off", Some(false)),
            ("intel_iommu=off,on", Some(true)),
        ] {
            let line = CommandLine::parse(text);
            assert_eq!(line.switch("intel_iommu", "on", "off"), expected, "{text}");
        }
    }

    #[test]
    fn a_change_is_made_once() {
        let line = CommandLine::parse("quiet iommu=off splash");
        let change = Change {
            add: vec!["intel_iommu=on".into(), "quiet".into()],
            remove: vec!["iommu=off".into(), "nointremap".into()],
        };
        assert_eq!(line.with(&change), "quiet splash intel_iommu=on");
        assert!(!line.follows(&change));
        let after = CommandLine::parse(&line.with(&change));
        assert!(after.follows(&change));
        assert!(change.clone().against(&after).is_empty());
        assert_eq!(change.against(&line).remove, ["iommu=off"]);
    }
}
