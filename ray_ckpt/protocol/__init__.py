"""How ranks and a coordinator save and load a checkpoint together, whoever carries their messages.

    every rank     RankSave.plan        what it holds            -> LocalPlan      (rank_save.py, holdings.py)
    coordinator    Coordinator.merge    who writes what          -> Assignment     (coordinator.py)
    every rank     RankSave.stage       only if training goes on meanwhile: a private copy       (host_copy.py)
    every rank     RankSave.write       files, with checksums    -> RankRecord
    coordinator    Coordinator.check    is all of it there?
    coordinator    Coordinator.publish  the commit               -> SaveReport

    every rank     RankLoad.open, offer what it wants            -> LoadOffer      (rank_load.py)
    coordinator    agree                what nobody wants        -> LoadOffer      (agreement.py)
    every rank     RankLoad.check, read, finish                  -> LoadReport

`checkpoint/` carries them by collectives, `cluster/` by actor calls, `dcp/` by DCP's own planners. Messages
(messages.py) are plain columns: one record per file rather than one object per tensor, because pickling plans is most
of what a save of many small tensors costs. The coordinator needs no torch.
"""
