"""waggle as a service of a machine without Kubernetes: what stands in which file, putting it there, taking it away."""
