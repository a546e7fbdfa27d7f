"""The daemon of a node: sources → store → plan → reconcile, and the API through which people and runtimes see it."""
