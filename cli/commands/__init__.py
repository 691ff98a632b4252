"""The commands, a module each: flags in, core calls, results on stdout."""
