"""The commands: flags in, core calls, results on stdout. A module has the name of its command."""
