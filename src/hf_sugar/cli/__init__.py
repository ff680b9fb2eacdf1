"""The command line, `hf-sugar`. Each command is a module with a `main` of its own, usable from Python as well."""
