"""Settings of every command, validated where they are made. Standard library only, so that `--help` stays fast."""
