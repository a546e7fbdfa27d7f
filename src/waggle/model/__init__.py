"""The executable semantics: what Kubernetes' objects mean. Pure: no I/O, no clock, no kernel."""
