"""`python -m ray_ckpt`, which is the command `ray-ckpt`."""

from ray_ckpt.cli.main import run

if __name__ == "__main__":
    run()
