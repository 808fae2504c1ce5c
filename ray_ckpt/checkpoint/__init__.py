"""The verbs on an initialised process group, or on none: save and load a training state. No Ray in here."""
