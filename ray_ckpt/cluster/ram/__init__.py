"""`ram://NAME`: files in the memory of the cluster's nodes.

    client.py   what a process sees: Files, as `storage/registered.py` wants them
    index.py    one actor: which file is where; who gets a copy; whose memory is full; when all of it ends
    keeper.py   one actor per node: holds files in its node's memory
    sending.py  bytes from one node to another
    holds.py    in the index: what is read stays whole, also without its name
    durable_copies.py   in the index: what is to be copied to a durable store; the keepers copy

    write  client ── create ──> index ──> keeper of the own node        an empty file in its memory
           client ── bytes straight into that memory
           client ── put ─────> index ──> keepers of other nodes copy   then it has its name: all of it, or none
    read   client ── where ───> index
           own node: bytes straight out of the keeper's memory; other node: from its keeper's sender

Files are memory of the keepers' processes (`memfd_create(2)`), which the kernel frees with them: nothing is left in
`/dev/shm`, however a process ends. Processes of the same node and user reach it through `/proc`.
"""
