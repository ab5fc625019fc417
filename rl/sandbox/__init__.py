"""Where code that nobody trusts runs: a ladder of sandboxes, and nothing below its last rung."""
