"""How a model lies across ranks: process group, pipeline stages, wrapping, training state. No storage in here."""
