"""What a trained model measures on a split."""

from __future__ import annotations

import numpy as np
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader, SharedFeatures
from esmm_torchrec.metrics.report import ScoredImpressions
from esmm_torchrec.models.losses import ctcvr_logit
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import CLICK, CONVERSION, GROUP_ID, TRUE_CTR, TRUE_CVR
from esmm_torchrec.sharding.prediction import predict
from esmm_torchrec.sharding.process_group import Ranks


def score_split(
    model: DistributedModelParallel,
    split: MappedSplit,
    ranks: Ranks,
    *,
    batch_size: int,
    shared_features: SharedFeatures = "once",
) -> ScoredImpressions | None:
    """Scores every impression of a split; to be called on every rank.

    Returns:
        on rank 0 the scores and labels in the order of the data, on the other ranks None.
    """
    reader = ImpressionReader(
        split,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=False,
        shared_features=shared_features,
    )
    num_rows = split.impressions if ranks.is_first else 0
    click, conversion, ctcvr = (np.empty(num_rows, np.float32) for _ in range(3))
    done = 0
    with progress_bar("Evaluating", split.impressions, "rows", disable=not ranks.is_first) as bar:
        for logits in predict(model, reader, ranks):
            if logits is None:
                continue
            place = slice(done, min(done + len(logits.click), num_rows))
            size = place.stop - place.start
            click[place] = logits.click[:size].numpy()
            conversion[place] = logits.conversion[:size].numpy()
            ctcvr[place] = ctcvr_logit(logits.click, logits.conversion)[:size].numpy()
            done = place.stop
            bar.update(size)
    if not ranks.is_first:
        return None
    columns = split.scalars
    return ScoredImpressions(
        click_logit=click,
        conversion_logit=conversion,
        ctcvr_score=ctcvr,
        click=columns[CLICK],
        conversion=columns[CONVERSION],
        group_id=columns.get(GROUP_ID),
        true_ctr=columns.get(TRUE_CTR),
        true_cvr=columns.get(TRUE_CVR),
    )
