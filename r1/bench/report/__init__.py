"""From the answers of an arm's process to rows, and from rows to tables and text."""
