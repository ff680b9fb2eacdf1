"""The command line, `hf-sugar`. Each command is a module with a function of its name, which is the command in Python."""
