"""waggle: container networking on BPF, with a control plane in Python."""

__version__ = "0.1.0"
