"""How a model lies across ranks: process group, pipeline stages, wrapping. No storage in here."""
