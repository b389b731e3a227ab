"""Commands that measure: each prints a table and, with --json, writes its figures with the machine they come from."""
