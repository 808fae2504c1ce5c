"""Four Ray workers save a pipeline-parallel run and load it with FSDP; the driver proves that nothing changed.

    python jobs/pipeline_to_fsdp.py                                  a local Ray, a temporary directory
    python jobs/pipeline_to_fsdp.py --target fsdp1 --workers 2       PyTorch's own kind of load, two stages
    python jobs/pipeline_to_fsdp.py --address HOST:6379 --storage /mnt/shared/run1
    ray job submit --working-dir . -- python jobs/pipeline_to_fsdp.py --storage s3://bucket/run1 --json -

`--help` lists every option.
"""

from ray_ckpt.recipes.command import main

if __name__ == "__main__":
    main("ray_ckpt.recipes.pipeline_to_fsdp.command:pipeline_to_fsdp")
