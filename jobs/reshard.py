"""Rewrites a checkpoint for another layout: every rank then finds its own bytes in a file of its own. No model needed.

    python jobs/reshard.py --source /mnt/run/step-100 --to fsdp2x2.tp2 --target /mnt/run/step-100-resharded
    ray job submit --working-dir . -- python jobs/reshard.py --source s3://bucket/a --to fsdp2x64 --target s3://bucket/b

A load does not need this: it reads any layout's checkpoint exactly, each rank only its own bytes. Rewriting costs one
read and one write of everything, so it is worth it only for many later loads, or for readers that take whole files.
The source may be all that ray_ckpt loads: stock DCP, accelerate's or Lightning's FSDP, torch.save, safetensors.
`--help` lists every option.
"""

from ray_ckpt.recipes.command import main

if __name__ == "__main__":
    main("ray_ckpt.recipes.reshard.command:reshard")
