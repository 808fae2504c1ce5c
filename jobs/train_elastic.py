"""Train on the first layout that fits; when a worker or its node dies, go on with what is left, in another layout.

    python jobs/train_elastic.py                                     four stages, then 3 or 2 shards, then one process
    python jobs/train_elastic.py --layouts "pp4,fsdp2x2,single" --steps 200 --save-every 20 --storage /mnt/shared/run3
    ray job submit --working-dir . -- python jobs/train_elastic.py --grow --wait-for-capacity 120 --storage s3://bucket/run3

Started again with the same storage, it goes on from the latest committed step. `--help` lists every option.
"""

from ray_ckpt.recipes.command import main

if __name__ == "__main__":
    main("ray_ckpt.recipes.train_elastic.command:train_elastic")
