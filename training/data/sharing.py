"""A batch on its way from a loader process to its reader."""

from __future__ import annotations

import pickle

from torch.utils.data import get_worker_info

from training.data.samples import Batch


def hand_over(batch: Batch) -> Batch | bytes:
    """The batch as a loader process gives it on: in shared memory, or as bytes where there is no room for it."""
    return batch if get_worker_info() is None or _share(batch) else pickle.dumps(batch)


def _share(batch: Batch) -> bool:
    """Put the tensors of a batch into shared memory, as the queue would: in its thread, a failure would be lost and the
    batch waited for without end. Returns whether there is room."""
    text = () if batch.text is None else (batch.text.context, batch.text.mask, batch.text.pooled)
    tensors = [batch.data, batch.slots, *batch.extras.values(), *(part for part in text if part is not None)]
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        return False
    return True
