"""References of `first_model.py`: scikit-learn on the same columns.

Three classifiers are fitted for each kind: click on all rows, conversion on clicked rows, and click
and conversion together on all rows.

- Logistic regression: ids one-hot if two training rows have them, lists multi-hot, dense columns
  standardised with an indicator of missing values; L2 with C = 1.
- Gradient boosting (HistGradientBoostingClassifier, its defaults): dense columns as they are, an id
  as a category if it is among the column's 254 most frequent ones; lists are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from benchmarks.first_model_sets import CLICK, CONVERSION, LogSet


def reference_aucs(kind: str, log: LogSet, seed: int) -> dict[str, float]:
    """Returns CTR, CVR and CTCVR AUC on the test split.

    Args:
        kind: "logistic regression" or "gradient boosting".
        log: data to fit and to test on.
        seed: seed of the classifier.
    """
    encode, classifier = KINDS[kind]
    train, test = encode(log)
    click, conversion = (log.train[name].to_numpy() == 1 for name in (CLICK, CONVERSION))
    test_click, test_conversion = (log.test[name].to_numpy() == 1 for name in (CLICK, CONVERSION))
    figures = {}
    for name, label, rows, test_label, test_rows in (
        ("ctr", click, slice(None), test_click, slice(None)),
        ("cvr", conversion, np.flatnonzero(click), test_conversion, np.flatnonzero(test_click)),
        ("ctcvr", conversion, slice(None), test_conversion, slice(None)),
    ):
        model = classifier(log, seed).fit(train[rows], label[rows])
        scores = model.predict_proba(test[test_rows])[:, 1]
        figures[name] = float(roc_auc_score(test_label[test_rows], scores))
    return figures


def _for_regression(log: LogSet) -> tuple[Any, Any]:
    columns: list[tuple[str, Any, Any]] = []
    if log.dense:
        numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
        columns.append(("dense", numbers, list(log.dense)))
    if log.ids:
        one_hot = OneHotEncoder(min_frequency=2, handle_unknown="infrequent_if_exist")
        columns.append(("ids", one_hot, list(log.ids)))
    for name in log.lists:
        words = CountVectorizer(analyzer=_identity, min_df=2, binary=True)  # pyright: ignore
        columns.append((name, words, name))
    encoder = ColumnTransformer(columns, sparse_threshold=1.0)
    train = encoder.fit_transform(_with_text_ids(log, log.train))
    return sp.csr_matrix(train), sp.csr_matrix(encoder.transform(_with_text_ids(log, log.test)))


def _with_text_ids(log: LogSet, frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{name: frame[name].astype(str) for name in log.ids})


def _identity(values: Any) -> Any:
    return values


def _for_boosting(log: LogSet) -> tuple[Any, Any]:
    encoder = ColumnTransformer(
        [
            (
                "ids",
                OrdinalEncoder(
                    max_categories=254,
                    handle_unknown="use_encoded_value",
                    unknown_value=np.nan,
                ),
                list(log.ids),
            ),
            ("dense", "passthrough", list(log.dense)),
        ]
    )
    train = encoder.fit_transform(_with_text_ids(log, log.train))
    return train, encoder.transform(_with_text_ids(log, log.test))


def _regression(log: LogSet, seed: int) -> LogisticRegression:  # noqa: ARG001
    return LogisticRegression(max_iter=300, random_state=seed)


def _boosting(log: LogSet, seed: int) -> HistGradientBoostingClassifier:
    categorical = np.arange(len(log.ids) + len(log.dense)) < len(log.ids)
    return HistGradientBoostingClassifier(
        categorical_features=categorical,  # pyright: ignore[reportArgumentType]
        random_state=seed,
    )


KINDS: dict[str, tuple[Callable[[LogSet], tuple[Any, Any]], Callable[[LogSet, int], Any]]] = {
    "logistic regression": (_for_regression, _regression),
    "gradient boosting": (_for_boosting, _boosting),
}
