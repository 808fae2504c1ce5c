"""sign: who made a checkpoint. `verify --signature` checks it."""

from __future__ import annotations

import os

import click

from ray_ckpt.cli.output import as_json, json_option, printable, step_option, uri_argument


@click.command(
    epilog="A password of the key is taken from the environment variable RAY_CKPT_KEY_PASSWORD, where it has one."
)
@uri_argument()
@click.option("--key", required=True, metavar="FILE", help="Elliptic-curve private key (P-256, P-384 or P-521) as PEM.")
@step_option
@click.option("--record-only", is_flag=True, help="Sign the record alone, without reading the data files.")
@json_option
def sign(uri: str, key: str, step: int | None, record_only: bool, in_json: bool) -> int:
    """Sign a checkpoint, so that `ray-ckpt verify --signature` refuses it when any byte of it has changed.

    The signature is the file model.sig beside the record: an OpenSSF model signature, made without network.

    \b
    ray-ckpt sign /mnt/run --step 100 --key key.pem
    ray-ckpt verify /mnt/run --step 100 --signature key.pub
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.signing import sign as sign_checkpoint

    with shown("sign", quiet=in_json) as progress:
        report = sign_checkpoint(
            uri,
            key,
            step,
            password=os.environ.get("RAY_CKPT_KEY_PASSWORD"),
            record_only=record_only,
            progress=progress,
        )
    as_json(report) if in_json else click.echo(printable(report))
    return 0


COMMANDS = (sign,)
