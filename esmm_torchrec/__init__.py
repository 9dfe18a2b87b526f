"""Conversion models over the entire space of impressions, on TorchRec.

The names in `__all__` are the public API. Each is imported from its module on first use, so that
`import esmm_torchrec` is fast and using only a model requires neither pyarrow nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esmm_torchrec.batch import BatchFeatures, ImpressionBatch
    from esmm_torchrec.data.mapped import MappedSplit
    from esmm_torchrec.data.prepared import PreparedDataSet
    from esmm_torchrec.data.reader import ImpressionReader
    from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp
    from esmm_torchrec.data.sources.append import append_table
    from esmm_torchrec.data.sources.tabular import prepare_table
    from esmm_torchrec.errors import (
        DataError,
        EsmmTorchrecError,
        OptionError,
        PlanError,
        RunError,
    )
    from esmm_torchrec.metrics.ranking import auc
    from esmm_torchrec.metrics.windowed import (
        metric_module,
        metrics_config,
        model_output,
        windowed_figures,
    )
    from esmm_torchrec.models.embeddings import PooledFeatures, embedding_bag_collections
    from esmm_torchrec.models.esmm import ESMM, EsmmTrainTask, TrainTask
    from esmm_torchrec.models.losses import ctcvr_logit, ctcvr_loss, product_logit, product_loss
    from esmm_torchrec.models.methods import Method
    from esmm_torchrec.models.parts import Architecture, Objective, Rows
    from esmm_torchrec.models.towers import EsmmTowers, Logits, Towers
    from esmm_torchrec.runs.restore import restore
    from esmm_torchrec.runs.run_folder import RunFolder
    from esmm_torchrec.schema import IdFeature, Schema, Table
    from esmm_torchrec.serving.predictor import Predictor
    from esmm_torchrec.sharding.apply import shard
    from esmm_torchrec.sharding.planner import Workload, make_plan
    from esmm_torchrec.sharding.process_group import Ranks, process_group
    from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain
    from esmm_torchrec.training.options import TrainOptions
    from esmm_torchrec.training.run import train

_NAMES = {
    "batch": "BatchFeatures ImpressionBatch",
    "data.mapped": "MappedSplit",
    "data.prepared": "PreparedDataSet",
    "data.reader": "ImpressionReader",
    "data.sources.ali_ccp.prepare": "prepare_ali_ccp",
    "data.sources.append": "append_table",
    "data.sources.tabular": "prepare_table",
    "errors": "DataError EsmmTorchrecError OptionError PlanError RunError",
    "metrics.ranking": "auc",
    "metrics.windowed": "metric_module metrics_config model_output windowed_figures",
    "models.embeddings": "PooledFeatures embedding_bag_collections",
    "models.esmm": "ESMM EsmmTrainTask TrainTask",
    "models.losses": "ctcvr_logit ctcvr_loss product_logit product_loss",
    "models.methods": "Method",
    "models.parts": "Architecture Objective Rows",
    "models.towers": "EsmmTowers Logits Towers",
    "runs.restore": "restore",
    "runs.run_folder": "RunFolder",
    "schema": "IdFeature Schema Table",
    "serving.predictor": "Predictor",
    "sharding.apply": "shard",
    "sharding.planner": "Workload make_plan",
    "sharding.process_group": "Ranks process_group",
    "tasks": "DEFAULT_TASKS Task TaskChain",
    "training.options": "TrainOptions",
    "training.run": "train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "DEFAULT_TASKS",
    "ESMM",
    "Architecture",
    "BatchFeatures",
    "DataError",
    "EsmmTorchrecError",
    "EsmmTowers",
    "EsmmTrainTask",
    "IdFeature",
    "ImpressionBatch",
    "ImpressionReader",
    "Logits",
    "MappedSplit",
    "Method",
    "Objective",
    "OptionError",
    "PlanError",
    "PooledFeatures",
    "Predictor",
    "PreparedDataSet",
    "Ranks",
    "Rows",
    "RunError",
    "RunFolder",
    "Schema",
    "Table",
    "Task",
    "TaskChain",
    "Towers",
    "TrainOptions",
    "TrainTask",
    "Workload",
    "append_table",
    "auc",
    "ctcvr_logit",
    "ctcvr_loss",
    "embedding_bag_collections",
    "make_plan",
    "metric_module",
    "metrics_config",
    "model_output",
    "prepare_ali_ccp",
    "prepare_table",
    "process_group",
    "product_logit",
    "product_loss",
    "restore",
    "shard",
    "train",
    "windowed_figures",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
