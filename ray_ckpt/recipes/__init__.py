"""What the jobs do: whole runs built from the rooms below, one package or module per job."""
