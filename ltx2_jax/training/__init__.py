"""A training: its objective, state, step and loop, what it checks, keeps and reports."""
