"""Real logs of `first_model.py`: public tables with one binary label nested in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.first_model_sets import CLICK, CONVERSION, LogSet, table_set


@dataclass(frozen=True)
class RealLog:
    """A public log, and its definitions of click and conversion."""

    file: str
    """File name as published, below one of the given folders."""
    labels: Callable[[pd.DataFrame], tuple[Any, Any]]
    """Function that returns click, and conversion if clicked."""
    ids: str
    """Names of the id columns; the fields below are column names too."""
    dense: str
    lists: str = ""
    read: Callable[[Path], pd.DataFrame] = pd.read_csv


def _movielens(path: Path) -> pd.DataFrame:
    ratings = pd.read_csv(path, sep="\t", names=["user", "item", "rating", "time"])
    names = ["user", "age", "gender", "occupation", "zip"]
    users = pd.read_csv(path.with_name("u.user"), sep="|", names=names)
    items = pd.read_csv(path.with_name("u.item"), sep="|", encoding="latin-1", header=None)
    genres = items[list(range(5, 24))].astype(str).agg("".join, axis=1)
    year = pd.to_numeric(items[2].str[-4:], errors="coerce")
    facts = pd.DataFrame({"item": items[0], "genres": "g" + genres, "year": year})
    frame = ratings.merge(users, on="user").merge(facts, on="item")
    frame["zip"] = "z" + frame["zip"].astype(str).str[:2]
    return frame


def _movielens_small(path: Path) -> pd.DataFrame:
    films = pd.read_csv(path.with_name("movies.csv"))
    frame = pd.read_csv(path).merge(films, on="movieId")
    frame["genres"] = frame.genres.str.split("|")
    frame["year"] = pd.to_numeric(frame.title.str.extract(r"\((\d{4})\)")[0])
    return frame


def _semicolons(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep=None, engine="python")


LOGS = {
    # E-mail → visit → purchase (K. Hillstrom, MineThatData, 2008).
    "hillstrom": RealLog(
        "hillstrom.csv",
        lambda log: (log.visit, log.conversion),
        ids="history_segment zip_code channel segment mens womens newbie",
        dense="recency history",
    ),
    # MovieLens 100k: rated 4 or more → rated 5.
    "movielens": RealLog(
        "u.data",
        lambda log: (log.rating >= 4, log.rating == 5),
        ids="user item genres gender occupation zip",
        dense="age year",
        read=_movielens,
    ),
    # MovieLens latest-small, with genres as a list: rated 4 or more → rated 5.
    "movielens-small": RealLog(
        "ratings.csv",
        lambda log: (log.rating >= 4, log.rating == 5),
        ids="userId movieId",
        dense="year",
        lists="genres",
        read=_movielens_small,
    ),
    # UCI Online Shoppers Purchasing Intention: a session that sees a page of value → purchase.
    "shoppers": RealLog(
        "online_shoppers_intention.csv",
        lambda log: ((log.PageValues > 0) | log.Revenue, log.Revenue),
        ids="Month OperatingSystems Browser Region TrafficType VisitorType",
        dense=(
            "Administrative Administrative_Duration Informational Informational_Duration "
            "ProductRelated ProductRelated_Duration BounceRates ExitRates SpecialDay"
        ),
        read=_semicolons,
    ),
    # UCI Bank Marketing: a call of three minutes or more → subscription.
    "bank": RealLog(
        "bank-full.csv",
        lambda log: (log.duration >= 180, log.y == "yes"),
        ids="job marital education default housing loan contact month poutcome",
        dense="age balance day campaign pdays previous",
        read=_semicolons,
    ),
    # Hotel bookings (Antonio, Almeida, Nunes, 2019): not cancelled → with a special request.
    "hotels": RealLog(
        "hotel_bookings.csv",
        lambda log: (log.is_canceled == 0, log.total_of_special_requests > 0),
        ids=(
            "hotel arrival_date_year arrival_date_month meal country market_segment "
            "distribution_channel is_repeated_guest reserved_room_type deposit_type agent "
            "company customer_type"
        ),
        dense=(
            "lead_time arrival_date_week_number arrival_date_day_of_month "
            "stays_in_weekend_nights stays_in_week_nights adults children babies "
            "previous_cancellations previous_bookings_not_canceled days_in_waiting_list adr"
        ),
    ),
    # UCI Diabetes 130-US hospitals: readmitted → within 30 days.
    "diabetes": RealLog(
        "diabetic_data.csv",
        lambda log: (log.readmitted != "NO", log.readmitted == "<30"),
        ids=(
            "patient_nbr race gender age admission_type_id discharge_disposition_id "
            "admission_source_id payer_code medical_specialty diag_1 diag_2 diag_3 metformin "
            "repaglinide nateglinide glimepiride glipizide glyburide pioglitazone "
            "rosiglitazone acarbose insulin change diabetesMed"
        ),
        dense=(
            "time_in_hospital num_lab_procedures num_procedures num_medications "
            "number_outpatient number_emergency number_inpatient number_diagnoses"
        ),
    ),
    # Cookie Cats, a mobile game: played on day 1 → played on day 7.
    "cookie-cats": RealLog(
        "cookie_cats.csv",
        lambda log: (log.retention_1, log.retention_7),
        ids="version",
        dense="sum_game_rounds",
    ),
}


def real_sets(folders: tuple[Path, ...], out: Path) -> Iterator[tuple[str, Callable[[], LogSet]]]:
    """Yields name and maker of each real log found in or below one of the folders."""
    for name, log in LOGS.items():
        path = next((path for folder in folders for path in folder.rglob(log.file)), None)
        if path is not None:
            yield name, lambda name=name, log=log, path=path: _prepared(name, log, path, out)


def _prepared(name: str, log: RealLog, path: Path, out: Path) -> LogSet:
    frame = log.read(path)
    click, conversion = (pd.Series(label).astype(bool) for label in log.labels(frame))
    ids, lists, dense = (tuple(names.split()) for names in (log.ids, log.lists, log.dense))
    frame = frame[[*ids, *lists, *dense]]
    frame = frame.assign(**{CLICK: click.astype(int), CONVERSION: (click & conversion).astype(int)})
    return table_set(name, frame, out, ids=ids, lists=lists, dense=dense)
