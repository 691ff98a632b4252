"""The settings of every command, validated when they are made. Standard library only, so that the command line starts fast."""
