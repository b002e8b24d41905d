"""The built-in rules, one small file each; a rule's name is its file's. Start with `topp`."""
