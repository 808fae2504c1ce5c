"""Train as a pipeline, save stage by stage, load with FSDP in fresh processes, prove equality, train on."""
