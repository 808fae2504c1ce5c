"""Every exception of the tree travels between processes and says everything that it knows."""

from __future__ import annotations

import pickle

import pytest

from ray_ckpt import errors
from ray_ckpt.errors import IntegrityError, RankFailure, RayCkptError, StorageError, WorkerError


def every_class(root: type[RayCkptError] = RayCkptError) -> list[type[RayCkptError]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


def example(cls: type[RayCkptError]) -> RayCkptError:
    if cls is WorkerError:
        return WorkerError((RankFailure(2, "host (10.0.0.1)", "ValueError", "boom", "Traceback: boom"),))
    if cls is StorageError:
        return StorageError("write", "s3://bucket/file", "no space left")
    if cls is IntegrityError:
        return IntegrityError(file="a.distcp", start=0, end=4096, tensor="model.w", expected="00ff", found="ff00")
    return cls("what was asked, what was found, what to do")


@pytest.mark.parametrize("cls", every_class(), ids=lambda cls: cls.__name__)
def test_every_error_survives_pickle_and_stands_in_the_tree(cls: type[RayCkptError]) -> None:
    error = example(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert cls.__name__ in (errors.__doc__ or "")
    assert cls.__name__ in errors.__all__


def test_equal_failures_are_grouped_and_every_rank_is_named() -> None:
    error = WorkerError(
        (
            RankFailure(3, "b", "OSError", "no space left", "Traceback A"),
            RankFailure(1, "a", "OSError", "no space left", "Traceback A"),
            RankFailure(0, "a", "ValueError", "boom", "Traceback B"),
        )
    )
    assert str(error) == "ranks 1, 3 on a, b: OSError: no space left; rank 0 on a: ValueError: boom"
    assert error.ranks == (3, 1, 0)
    assert error.tracebacks() == "--- ranks 1, 3\nTraceback A\n--- rank 0\nTraceback B"
