"""The verbs on an initialized process group, or on none: save and load a training state. No Ray in here."""
